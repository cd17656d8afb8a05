"""What the generator of heads may draw: ranges and probabilities, with their units in the names.

The committed values are in ``default.toml`` beside this module; a study is a pure function of
(seed, configuration).
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from pe_infer.errors import ConfigurationError
from pe_infer.phantom.configuration import Configuration, Range

MAX_TILT_DEGREES = 30.0  # what gantries can do


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfig(Configuration):
    """Ranges the generator samples from; a pair is an inclusive (low, high).

    Raises:
        ConfigurationError: A range is reversed, or a size or probability is out of bounds.
    """

    TEMPLATE: ClassVar[str] = "pe_infer/phantom/head/default.toml"

    # Acquisition
    matrix: int  # rows and columns of a slice
    pixel_spacing_mm: Range
    thick_slice_probability: float  # share of studies with spacings of the next range
    thick_slice_spacing_mm: Range
    slice_spacing_mm: Range  # of the others, even in the logarithm
    mixed_spacing_probability: float  # thinner slices in the posterior fossa than above it
    tilted_probability: float
    gantry_tilt_degrees: Range  # where it is tilted; the front of a slice lies higher
    coverage_below_foramen_mm: Range  # from the foramen magnum
    coverage_above_vertex_mm: Range
    noise_hu: Range  # standard deviation in the middle of the brain with slices of 5 mm
    kernel_sharpness: Range  # 0 smooth, 1 bone kernel
    isocentre_shift_mm: float  # largest in-plane shift of the head in the field of view
    padded_circle_probability: float  # pixels outside the circle carry a padding value
    beam_hardening: Range  # 1 = bands of about 10 HU between the petrous bones
    motion_probability: float
    motion_mm: Range
    # Patient
    age_years: Range  # sulci and ventricles widen with it
    head_scale: Range  # 1 = the reference adult
    aspect: Range  # length by width, 1 = the reference adult
    rotation_degrees: float  # how far the head may lie askew about each axis
    warp_mm: Range  # amplitude of the smooth deformation
    skull_mm: Range  # thickness of the vault
    hematocrit: Range  # decides the HU of blood in the vessels, and of fresh clots
    gray_hu: Range
    white_hu: Range
    fluid_hu: Range
    # Findings that both classes have
    old_infarct_probability: float
    white_matter_disease_probability: float  # at 90 years; less before
    pineal_calcification_probability: float
    choroid_calcification_probability: float
    falx_calcification_probability: float
    ganglia_calcification_probability: float
    artery_calcification_probability: float
    opaque_sinus_probability: float  # fluid in an air cell of the skull base
    # Hemorrhage
    epidural_probability: float  # of each type among positives; at least one is drawn
    subdural_probability: float
    subarachnoid_probability: float
    intraparenchymal_probability: float
    intraventricular_probability: float  # on its own; more where the brain bleeds deep inside
    age_of_blood_days: Range
    diameter_mm: Range  # of bleeding in the brain
    thickness_mm: Range  # of blood between skull and brain
    edema_mm: Range
    mass_effect: Range  # share of a clot's thickness by which it moves the brain

    def with_spacing(self, spacing_mm: float) -> Self:
        """Return the same configuration with one slice spacing throughout."""
        return replace(
            self,
            thick_slice_probability=0.0,
            mixed_spacing_probability=0.0,
            slice_spacing_mm=(spacing_mm, spacing_mm),
        )

    def __post_init__(self) -> None:
        """Refuse values that cannot be sampled."""
        self.check()
        if self.matrix < 64:
            raise ConfigurationError(
                f"phantom configuration: matrix={self.matrix} must be at least 64"
            )
        spacings = (self.pixel_spacing_mm, self.slice_spacing_mm, self.thick_slice_spacing_mm)
        if min(low for low, _ in spacings) < 0.3:
            raise ConfigurationError(
                f"phantom configuration: pixel_spacing_mm={self.pixel_spacing_mm}, "
                f"slice_spacing_mm={self.slice_spacing_mm} and "
                f"thick_slice_spacing_mm={self.thick_slice_spacing_mm} must be at least 0.3 mm"
            )
        if max(abs(t) for t in self.gantry_tilt_degrees) > MAX_TILT_DEGREES:
            raise ConfigurationError(
                f"phantom configuration: gantry_tilt_degrees={self.gantry_tilt_degrees} must lie "
                f"within {MAX_TILT_DEGREES:g} degrees"
            )


DEFAULT = HeadConfig.shipped("pe_infer.phantom.head")
