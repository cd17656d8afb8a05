"""What the generator of chests may draw: ranges and probabilities, with their units in the names.

The committed values are in ``default.toml`` beside this module; a study is a pure function of
(seed, configuration).
"""

from dataclasses import dataclass
from typing import ClassVar

from pe_infer.errors import ConfigurationError
from pe_infer.phantom.configuration import Configuration, Range


@dataclass(frozen=True, slots=True, kw_only=True)
class PhantomConfig(Configuration):
    """Ranges the generator samples from; a pair is an inclusive (low, high).

    Give a range with equal ends to fix a value, e.g.
    ``dataclasses.replace(config, slice_spacing_mm=(1.0, 1.0))``.

    Raises:
        ConfigurationError: A range is reversed, or a size or probability is out of bounds.
    """

    TEMPLATE: ClassVar[str] = "pe_infer/phantom/chest/default.toml"

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
        self.check()
        if self.matrix < 64:
            raise ConfigurationError(
                f"phantom configuration: matrix={self.matrix} must be at least 64"
            )
        if min(self.pixel_spacing_mm[0], self.slice_spacing_mm[0]) < 0.3:
            raise ConfigurationError(
                f"phantom configuration: pixel_spacing_mm={self.pixel_spacing_mm} and "
                f"slice_spacing_mm={self.slice_spacing_mm} must be at least 0.3 mm"
            )


DEFAULT = PhantomConfig.shipped("pe_infer.phantom.chest")
