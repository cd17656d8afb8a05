"""What a generator may draw: frozen values that TOML and JSON can hold, with a digest.

Every anatomy has its own fields; how they are read, checked and written is the same.
"""

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Self, TypeAlias

from pe_infer.errors import ConfigurationError

Range: TypeAlias = tuple[float, float]


class Configuration:
    """Methods of a frozen dataclass whose fields are numbers and pairs (low, high) of numbers.

    Fields named ``*_probability`` lie between 0 and 1. ``TEMPLATE`` names the committed file.
    """

    __slots__ = ()

    TEMPLATE: ClassVar[str]

    def check(self) -> None:
        """Refuse reversed pairs and probabilities out of bounds.

        Raises:
            ConfigurationError: There is one.
        """
        for name, value in self._values().items():
            if isinstance(value, tuple) and not (len(value) == 2 and value[0] <= value[1]):
                raise ConfigurationError(
                    f"phantom configuration: {name}={value} must be a pair low <= high"
                )
            if name.endswith("_probability") and not 0 <= value <= 1:
                raise ConfigurationError(
                    f"phantom configuration: {name}={value} must lie between 0 and 1"
                )

    @classmethod
    def from_mapping(cls, values: Mapping[str, object], source: str) -> Self:
        """Make a configuration of parsed TOML or JSON; ``source`` is named in messages.

        Raises:
            ConfigurationError: Fields are missing or unknown, or a value has the wrong type.
        """
        kinds = {field.name: field.type for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # subclasses are dataclasses
        missing = sorted(kinds.keys() - values.keys())
        unknown = sorted(values.keys() - kinds.keys())
        if missing or unknown:
            raise ConfigurationError(
                f"{source}: phantom configuration lacks {missing} and has unknown {unknown}. "
                f"Start from {cls.TEMPLATE}."
            )
        return cls(
            **{
                name: _typed(value, kinds[name], f"{source}: {name}")
                for name, value in values.items()
            }
        )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a ``.toml`` or ``.json`` file.

        Raises:
            ConfigurationError: The file cannot be read or parsed, or its fields are wrong.
        """
        try:
            text = path.read_text(encoding="utf-8")
            values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        except (OSError, ValueError) as exc:
            raise ConfigurationError(
                f"{path}: cannot read the phantom configuration: {exc}"
            ) from exc
        if not isinstance(values, dict):
            raise ConfigurationError(f"{path}: the phantom configuration must be an object")
        return cls.from_mapping(values, str(path))

    @classmethod
    def shipped(cls, package: str) -> Self:
        """Read the committed ``default.toml`` of a package."""
        text = resources.files(package).joinpath("default.toml").read_text(encoding="utf-8")
        return cls.from_mapping(tomllib.loads(text), cls.TEMPLATE)

    def to_mapping(self) -> dict[str, object]:
        """Return plain values that JSON and TOML can hold; ``from_mapping`` reads them back."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self._values().items()
        }

    def digest(self) -> str:
        """Return the sha256 of the values, to be recorded with data made from them."""
        return hashlib.sha256(json.dumps(self.to_mapping(), sort_keys=True).encode()).hexdigest()

    def _values(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]  # as above


def _typed(value: object, kind: object, name: str) -> object:
    """Return a parsed value as the field's type: int, float, or a pair of one of them."""
    wants_pair = kind not in (int, float)
    whole = kind in (int, tuple[int, int])
    numbers = value if isinstance(value, (list, tuple)) else (value,)
    checked = [
        n if whole else float(n)
        for n in numbers
        if not isinstance(n, bool) and isinstance(n, int if whole else (int, float))
    ]
    pair = isinstance(value, (list, tuple))
    if pair != wants_pair or len(checked) != len(numbers) or not checked:
        expected = f"{'a pair of ' if wants_pair else 'a '}{'whole ' if whole else ''}number"
        raise ConfigurationError(f"{name}={value!r} should be {expected}{'s' * wants_pair}")
    return tuple(checked) if pair else checked[0]
