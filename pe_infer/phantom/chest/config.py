"""What the generator of chests may draw: ranges and probabilities, with their units in the names.

The committed values are in ``default.toml`` beside this module; a study is a pure function of
(seed, configuration). They are version 2 of the generator; a field with a default value in the
class was not in version 1 (``export/configs/pe-phantom-v1.toml``); there it changes nothing.
"""

import hashlib
import json
from dataclasses import dataclass, fields
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
    noise_z_correlation: Range = (0.0, 0.0)  # of neighbouring slices that do not overlap
    noise_kernel_gain: float = 0.0  # growth of the logarithm of the noise per unit of sharpness
    noise_lung_drop: Range = (0.0, 0.0)  # share by which noise is lower deep in the lungs
    iterative_strength: Range = (0.0, 0.0)  # 0 filtered back-projection, 1 smooth and blotchy
    motion_probability: float = 0.0  # breathing: part of the lungs is seen twice
    motion_mm: Range = (0.0, 0.0)
    arms_down_probability: float = 0.0
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
    chest_shape: Range = (0.0, 0.0)  # 0 an oval chest, 1 lungs that reach back beside the spine
    murray_exponent: Range = (3.1, 3.1)
    smallest_branch_share: float = 0.28  # of a branch's end points that its smaller child serves
    early_division: Range = (0.0, 0.0)  # share by which branches divide nearer to the hilum
    branch_curve: Range = (0.0, 0.0)  # 0 straight branches, 1 branches that leave as a tangent
    fissure_probability: float = 0.0  # fissures can be seen
    # Contrast
    artery_hu: Range
    pulmonary_vein_hu: Range
    aorta_hu: Range
    cava_hu: Range
    unopacified_vein_probability: float
    streak_probability: float
    fine_streak_probability: float = 0.0  # among the streaks: narrow rays
    late_phase_probability: float = 0.0  # all vessels alike
    poor_opacification_probability: float = 0.0
    poor_artery_hu: Range = (0.0, 0.0)
    distal_fade: Range = (0.0, 0.0)  # share of the contrast that is missing near the pleura
    # Findings that both classes have
    effusion_probability: float
    atelectasis_probability: float
    consolidation_probability: float
    emphysema_probability: float
    nodules_max: int
    lymph_nodes_max: int
    mucus_plugs_max: int
    ground_glass_probability: float = 0.0
    hilar_nodes_max: int = 0  # long lymph nodes that lie against central arteries
    plug_chains_max: int = 0  # mucus over several generations of a bronchus
    narrowed_artery_probability: float = 0.0  # one branch is too thin from some point on
    # Emboli
    embolus_hu: Range
    central_probability: float  # share of positives whose largest embolus is central
    lobar_probability: float  # share whose largest is lobar; the rest is segmental only
    saddle_probability: float  # among the central ones
    central_emboli_max: int
    lobar_emboli_max: int
    segmental_emboli_max: int
    occlusive_probability: float
    smallest_embolus_mm: float = 1.25  # radius of the thinnest lumen
    subsegmental_probability: float = 0.0  # share of positives with subsegmental emboli only
    subsegmental_emboli_max: int = 0  # besides the others
    chronic_probability: float = 0.0  # share of emboli, where the lumen is wide enough
    calcified_probability: float = 0.0  # among the chronic ones

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

    def digest(self) -> str:
        """Return the sha256 of the values; later fields count only where they change something.

        So data and bundles of version 1 keep the digest that was recorded with them.
        """
        later = {field.name: field.default for field in fields(self)}
        values = {
            name: value
            for name, value in self.to_mapping().items()
            if (tuple(value) if isinstance(value, list) else value) != later[name]
        }
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


DEFAULT = PhantomConfig.shipped("pe_infer.phantom.chest")
