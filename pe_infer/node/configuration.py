"""Reading what a node is told: a TOML file, environment variables, flags.

``PE_INFER_NODE__LISTEN__PORT=11113`` and ``--listen.port 11113`` set what ``port`` in ``[listen]``
sets. Flags go before the environment, the environment before the file.
"""

import difflib
import json
import textwrap
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args, get_origin

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import CliSettingsSource
from pydantic_settings.exceptions import SettingsError

from pe_infer.errors import ConfigurationError
from pe_infer.node.settings import ENVIRONMENT, NodeSettings

_PRINTED: Final = "pe-infer serve --print-config"
_WIDTH: Final = 98
_BETWEEN: Final = "__"

Key = tuple[str, ...]
Place = tuple[str | int, ...]
_Source = tuple[dict[str, Any], Callable[[Place], str]]  # what it says, how it names an option


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option, or a section that has no default.

    Attributes:
        key: Where it is, such as ``("listen", "port")``.
        about: What it is for.
        default: ``None`` where it has none.
        example: Of what has no default.
        required: Whether a value has to be given.
    """

    key: Key
    about: str
    default: object
    example: object
    required: bool

    @property
    def flag(self) -> str:
        """How it is set on the command line."""
        return _flag(self.key)

    @property
    def variable(self) -> str:
        """How it is set in the environment."""
        return _variable(self.key)


def _flag(key: Key) -> str:
    return "--" + ".".join(key)


def _variable(key: Key) -> str:
    return ENVIRONMENT + _BETWEEN.join(key).upper()


def options() -> list[Option]:
    """Every option that a flag or an environment variable sets, in the order of the file."""
    return list(_walk(NodeSettings, ()))


def load_settings(
    file: Path | None, *, arguments: Sequence[str] = (), environment: Mapping[str, str]
) -> NodeSettings:
    """Read what a node is told.

    Args:
        file: TOML; ``None``: flags and environment say it all.
        arguments: Flags, ``--section.option VALUE``; lists as JSON or with commas.
        environment: Variables; those whose names do not begin with ``PE_INFER_NODE__`` are not
            looked at.

    Raises:
        ConfigurationError: The file cannot be read, an option is unknown, a value makes no sense.
    """
    sources: list[_Source] = []
    if file is not None:
        sources.append((_read_file(file), lambda place: f"{file}: {'.'.join(map(str, place))}"))
    variables = {name: value for name, value in environment.items() if name.startswith(ENVIRONMENT)}
    for name in variables:
        _refuse_unknown(name, [option.variable for option in options()], "variables")
    told = [
        f"--{name.removeprefix(ENVIRONMENT).lower().replace(_BETWEEN, '.')}={value}"
        for name, value in variables.items()
    ]
    sources.append((_parse(told), lambda place: _variable(tuple(map(str, place)))))
    sources.append((_parse(_plain(arguments)), lambda place: _flag(tuple(map(str, place)))))
    together: dict[str, Any] = {}
    for given, _ in sources:
        together = _merged(together, given)
    try:
        return NodeSettings(**together)
    except ValidationError as error:
        raise ConfigurationError(_explained(error, sources)) from None


def default_file() -> str:
    """TOML in which every option stands with its default, and what it is for."""
    lines = [
        "# pe-infer serve --config FILE",
        "#",
        "# Every option with its default; what has none is commented out, with an example.",
        f"# As a flag: --listen.port 11113. As a variable: {ENVIRONMENT}LISTEN__PORT=11113.",
        "",
        *_table(NodeSettings, (), off=""),
    ]
    return "\n".join(lines).rstrip() + "\n"


# Flags and variables.


def _parse(arguments: Sequence[str]) -> dict[str, Any]:
    if not arguments:
        return {}
    try:
        return CliSettingsSource[Any](
            NodeSettings, cli_parse_args=list(arguments), cli_exit_on_error=False
        )()
    except SettingsError as exc:
        raise ConfigurationError(
            f"{exc}. Options are given as --section.option VALUE; pe-infer serve --print-config "
            "lists them."
        ) from None


def _plain(arguments: Sequence[str]) -> list[str]:
    """Flags as the settings name them; refuses those that do not exist."""
    known = [option.flag for option in options()]
    plain: list[str] = []
    expects_value = False
    for argument in arguments:
        if expects_value:
            plain[-1] += f"={argument}"
            expects_value = False
            continue
        name, sign, value = argument.partition("=")
        name = name.replace("-", "_").replace("__", "--", 1)
        _refuse_unknown(name, known, "options")
        plain.append(name + sign + value)
        expects_value = not sign
    if expects_value:
        raise ConfigurationError(f"{plain[-1]}: needs a value after it")
    return plain


def _refuse_unknown(name: str, known: Sequence[str], what: str) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=2)
    raise ConfigurationError(
        f"{name}: there is no such option. "
        + (f"Did you mean {' or '.join(near)}?" if near else f"{_PRINTED} lists the {what}.")
    )


# The file.


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as exc:
        raise ConfigurationError(
            f"{path}: cannot be read: {exc.strerror}. {_PRINTED} > {path} makes one."
        ) from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"{path}: is no TOML: {exc}") from exc


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Sections are merged, values and lists replaced."""
    both = dict(below)
    for name, value in above.items():
        there = both.get(name)
        if isinstance(there, dict) and isinstance(value, dict):
            both[name] = _merged(there, value)
        else:
            both[name] = value
    return both


# Errors.


def _explained(error: ValidationError, sources: Sequence[_Source]) -> str:
    """A line per value; pydantic has one per alternative that the value could have been."""
    said: dict[str, list[str]] = {}
    for problem in error.errors(include_url=False, include_context=False):
        key, siblings = _place(problem["loc"])
        where = next((name(key) for given, name in reversed(sources) if _has(given, key)), None)
        if problem["type"] == "missing":
            where = ".".join(map(str, key))
            reason = "is missing: it has no default"
        elif problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(key[-1]), siblings, n=2)
            reason = "there is no such option. " + (
                f"Did you mean {' or '.join(near)}?" if near else f"There are {siblings}"
            )
        else:
            reason = problem["msg"].removeprefix("Value error, ")
            if not _holds_secret(key):
                where = f"{where} = {_short(problem['input'])}"
        said.setdefault(where or "settings", []).append(reason)
    lines = [f"{where}: {'; or '.join(reasons)}" for where, reasons in said.items()]
    return "\n  ".join((*lines, f"{_PRINTED} shows every option and what it is for."))


def _place(location: Sequence[str | int]) -> tuple[Place, list[str]]:
    """Where a problem is, and what else could be there.

    Pydantic puts the names of alternatives between those of options.
    """
    place: list[str | int] = []
    models: list[type[BaseModel]] = [NodeSettings]
    fields = _fields(models)
    for part in location:
        if isinstance(part, int):
            place.append(part)
        elif chosen := [model for model in models if _kind_of(model) == part]:
            models = chosen
        else:
            fields = _fields(models)
            if not fields:
                break  # inside a value
            place.append(part)
            models = _models(fields[part].annotation) if part in fields else []
    return tuple(place), sorted(fields)


def _fields(models: Sequence[type[BaseModel]]) -> dict[str, FieldInfo]:
    return {name: field for model in models for name, field in model.model_fields.items()}


def _kind_of(model: type[BaseModel]) -> str | None:
    kind = model.model_fields.get("kind")
    return None if kind is None else str(get_args(kind.annotation)[0])


def _has(given: Any, place: Sequence[str | int]) -> bool:
    for part in place:
        try:
            given = given[part]
        except (KeyError, IndexError, TypeError):
            return False
    return True


def _holds_secret(place: Sequence[str | int]) -> bool:
    """A value that is no option, such as a whole destination, may hold one."""
    name = next((part for part in reversed(place) if isinstance(part, str)), "")
    return name in {"secret", "destinations"}


def _short(value: object) -> str:
    return textwrap.shorten(repr(value), 80, placeholder=" ...")


# What the model says.


def _models(annotation: object) -> list[type[BaseModel]]:
    """The sections that an annotation speaks of, such as those of ``tuple[Route, ...]``."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for part in get_args(annotation) for model in _models(part)]


def _walk(model: type[BaseModel], above: Key) -> Iterator[Option]:
    for name, field in model.model_fields.items():
        sections = _models(field.annotation)
        if sections and get_origin(field.annotation) is not tuple:
            yield from _walk(sections[0], (*above, name))
        else:
            yield _option((*above, name), field)


def _option(key: Key, field: FieldInfo) -> Option:
    required = field.is_required()
    return Option(
        key=key,
        about=" ".join((field.description or "").split()),
        default=None if required else field.default,
        example=field.examples[0] if field.examples else None,
        required=required,
    )


def _table(model: type[BaseModel], above: Key, *, off: str) -> Iterator[str]:
    """The lines of a section: values first, then the sections within.

    Args:
        model: The section.
        above: Its name.
        off: ``"#"`` where the section itself is commented out.
    """
    within = []
    for name, field in model.model_fields.items():
        if _models(field.annotation):
            within.append((name, field))
            continue
        option = _option((*above, name), field)
        yield from _comment(option.about)
        value = option.default if option.default is not None else option.example
        # The folder is the one thing that has to be said: it stands, as an example.
        commented = off or ("" if option.default is not None or not above else "#")
        yield f"{commented}{name} = {_toml(value)}"
        yield ""
    for name, field in within:
        sections, key = _models(field.annotation), (*above, name)
        title = ".".join(key)
        listed = get_origin(field.annotation) is tuple
        for section in sections:
            yield from _comment(field.description or "" if section is sections[0] else "")
            yield from _comment(section.__doc__ or "")
            shut = "#" if listed or field.default is None else off
            yield f"{shut}[[{title}]]" if listed else f"{shut}[{title}]"
            yield from _table(section, key, off=shut)


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        " ".join(text.replace("`", "").split()), _WIDTH, initial_indent="# ", subsequent_indent="# "
    )


def _toml(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case SecretStr():
            return json.dumps(value.get_secret_value())
        case tuple() | list():
            return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(str(value), ensure_ascii=False)
