"""What the generator may draw: ranges and probabilities, with their units in the names.

The committed values are in ``default.toml`` beside this module; a study is a pure function of
(seed, configuration).
"""

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TypeAlias

from pe_infer.errors import ConfigurationError

Range: TypeAlias = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhantomConfig:
    """Ranges the generator samples from; a pair is an inclusive (low, high).

    Give a range with equal ends to fix a value, e.g.
    ``dataclasses.replace(config, slice_spacing_mm=(1.0, 1.0))``.

    Raises:
        ConfigurationError: A range is reversed, or a size or probability is out of bounds.
    """

    # Acquisition
    matrix: int  # rows and columns of a slice
    pixel_spacing_mm: Range
    slice_spacing_mm: Range
    thickness_per_spacing: Range  # slice thickness divided by slice spacing
    coverage_above_lungs_mm: Range
    coverage_below_lungs_mm: Range
    noise_hu: Range  # standard deviation of the noise in the middle of the body
    kernel_sharpness: Range  # 0 soft tissue kernel, 1 lung kernel
    isocentre_shift_mm: float  # largest in-plane shift of the patient in the field of view
    padded_circle_probability: (
        float  # pixels outside the reconstruction circle carry a padding value
    )
    # Patient
    body_scale: Range  # size of the skeleton, 1 = the reference adult
    lung_length_scale: Range
    heart_scale: Range
    vessel_scale: Range
    extra_fat_mm: Range
    rotation_degrees: float
    warp_mm: Range  # amplitude of the smooth deformation
    terminals_per_lung: tuple[int, int]  # ends of the arterial tree
    terminal_radius_mm: Range
    lung_hu: Range
    # Contrast
    artery_hu: Range
    pulmonary_vein_hu: Range
    aorta_hu: Range
    cava_hu: Range
    unopacified_vein_probability: float
    streak_probability: float
    # Findings that both classes have
    effusion_probability: float
    atelectasis_probability: float
    consolidation_probability: float
    emphysema_probability: float
    nodules_max: int
    lymph_nodes_max: int
    mucus_plugs_max: int
    # Emboli
    embolus_hu: Range
    central_probability: float  # share of positives whose largest embolus is central
    lobar_probability: float  # share whose largest is lobar; the rest is segmental only
    saddle_probability: float  # among the central ones
    central_emboli_max: int
    lobar_emboli_max: int
    segmental_emboli_max: int
    occlusive_probability: float

    def __post_init__(self) -> None:
        """Refuse values that cannot be sampled."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple) and not (len(value) == 2 and value[0] <= value[1]):
                raise ConfigurationError(
                    f"phantom configuration: {field.name}={value} must be a pair low <= high"
                )
            if field.name.endswith("_probability") and not 0 <= value <= 1:
                raise ConfigurationError(
                    f"phantom configuration: {field.name}={value} must lie between 0 and 1"
                )
        if self.matrix < 64:
            raise ConfigurationError(
                f"phantom configuration: matrix={self.matrix} must be at least 64"
            )
        if min(self.pixel_spacing_mm[0], self.slice_spacing_mm[0]) < 0.3:
            raise ConfigurationError(
                f"phantom configuration: pixel_spacing_mm={self.pixel_spacing_mm} and "
                f"slice_spacing_mm={self.slice_spacing_mm} must be at least 0.3 mm"
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, object], source: str) -> "PhantomConfig":
        """Make a configuration of parsed TOML or JSON; ``source`` is named in messages.

        Raises:
            ConfigurationError: Fields are missing or unknown, or a value has the wrong type.
        """
        kinds = {field.name: field.type for field in dataclasses.fields(cls)}
        missing = sorted(kinds.keys() - values.keys())
        unknown = sorted(values.keys() - kinds.keys())
        if missing or unknown:
            raise ConfigurationError(
                f"{source}: phantom configuration lacks {missing} and has unknown {unknown}. "
                "Start from pe_infer/phantom/default.toml."
            )
        parsed = {
            name: _typed(value, kinds[name], f"{source}: {name}") for name, value in values.items()
        }
        return cls(**parsed)  # type: ignore[arg-type]  # checked one by one

    @classmethod
    def load(cls, path: Path) -> "PhantomConfig":
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

    def to_mapping(self) -> dict[str, object]:
        """Return plain values that JSON and TOML can hold; ``from_mapping`` reads them back."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    def digest(self) -> str:
        """Return the sha256 of the values, to be recorded with data made from them."""
        return hashlib.sha256(json.dumps(self.to_mapping(), sort_keys=True).encode()).hexdigest()


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


def _shipped() -> PhantomConfig:
    text = resources.files("pe_infer.phantom").joinpath("default.toml").read_text(encoding="utf-8")
    return PhantomConfig.from_mapping(tomllib.loads(text), "pe_infer/phantom/default.toml")


DEFAULT = _shipped()
