"""Hounsfield units of one patient: plain tissues, and blood with its mixing."""

from dataclasses import dataclass, replace

import numpy as np

from pe_infer.phantom.chest.config import PhantomConfig
from pe_infer.phantom.chest.frame import Frame
from pe_infer.phantom.chest.shapes import FIRST_VERTEBRA_Z_MM, VERTEBRA_PITCH_MM
from pe_infer.phantom.raster import F32
from pe_infer.phantom.sampling import Draw

_BLOOD_ORDER = (
    "muscle_heart",
    "lower_cava",
    "ventricle_left",
    "ventricle_right",
    "atrium_right",
    "atrium_left",
    "veins",
    "azygos",
    "neck_veins",
    "cava",
    "aorta",
    "artery",
)  # painted in this order


@dataclass(frozen=True, slots=True, kw_only=True)
class Tissues:
    """Values of one study.

    Attributes:
        plain: HU of tissues without contrast dynamics, by name.
        blood: HU, and strength of mixing (0 even, 1 patchy), per structure.
        texture_hu: Standard deviation of the unevenness of soft tissue.
        skin_mm: Thickness of the skin.
        lung_slope_hu: Gain in lung density per 100 mm towards the back.
        emphysema_hu: Loss of lung density in patches.
        first_vertebra_mm: Patient position of the middle of the first thoracic vertebra.
        vertebra_pitch_mm: Distance of vertebrae.
        unopacified_hu: Blood without contrast.
        slow_flow: Strength of hazy dark patches in the pulmonary arteries.
        ground_glass_hu: Gain in lung density in patches.
        distal_fade: Share of the contrast that is missing in the outermost arteries.
    """

    plain: dict[str, float]
    blood: dict[str, tuple[float, float]]
    texture_hu: float
    skin_mm: float
    lung_slope_hu: float
    emphysema_hu: float
    first_vertebra_mm: float
    vertebra_pitch_mm: float
    unopacified_hu: float
    slow_flow: float
    ground_glass_hu: float = 0.0
    distal_fade: float = 0.0

    @property
    def blood_order(self) -> tuple[str, ...]:
        """Names in the order in which they are painted."""
        return _BLOOD_ORDER

    def artery_hu(self, clouds: F32, arrived: F32 | None = None) -> F32:
        """Return the lumen of the pulmonary arteries: uneven, hazy and dark where flow is slow.

        Args:
            clouds: Smooth noise of unit variance.
            arrived: Share of the contrast at each place; ``None`` is all of it.
        """
        level, mixing = self.blood["artery"]
        share = 1 + mixing * clouds - self.slow_flow * np.clip(-0.9 - clouds, 0, 0.8)
        if arrived is not None:
            share = share * arrived
        return np.asarray(np.maximum(level * share, self.unopacified_hu), np.float32)

    def vein_hu(self, clouds: F32) -> F32:
        """Return the lumen of the pulmonary veins."""
        level, mixing = self.blood["veins"]
        return np.asarray(level * (1 + mixing * 0.3 * clouds), np.float32)

    def blood_hu(self, name: str, clouds: F32, grain: F32) -> F32:
        """Return blood of one structure where contrast and plain blood have mixed to a degree."""
        if name == "artery":
            return self.artery_hu(clouds)
        if name == "veins":
            return self.vein_hu(clouds)
        level, mixing = self.blood[name]
        share = np.clip(1 + mixing * (0.45 * clouds + 0.45 * grain), 0.0, 1.6)
        return np.asarray(self.unopacified_hu + (level - self.unopacified_hu) * share, np.float32)

    def vertebra_hu(self, z_mm: float) -> tuple[float, float]:
        """Return HU of rim and core of the spine at a height: bone, end plate or disc."""
        phase = ((z_mm - self.first_vertebra_mm) / self.vertebra_pitch_mm + 0.5) % 1.0
        off = abs(phase - 0.5)  # 0 in the middle of a vertebra, 0.5 in the middle of a disc
        disc = float(np.clip((off - 0.36) / 0.06, 0, 1))
        plate = float(np.clip(1 - abs(off - 0.36) / 0.07, 0, 1))
        rim = self.plain["vertebra_rim"] * (1 - disc) + 110 * disc
        core = self.plain["vertebra"] * (1 - disc) + 85 * disc + 160 * plate
        return rim, core


def sample_tissues(draw: Draw, config: PhantomConfig, frame: Frame) -> Tissues:
    """Draw the values; the phases of contrast are independent of each other and of emboli."""
    usual = _usual_tissues(draw, config, frame)
    if draw.chance("late_phase", config.late_phase_probability):
        return _late_phase(draw, usual)
    if draw.chance("poor_opacification", config.poor_opacification_probability):
        return _poor_opacification(draw, config, usual)
    return usual


def _late_phase(draw: Draw, usual: Tissues) -> Tissues:
    """Contrast has gone round: all vessels are moderately bright and alike, organs too."""
    artery = draw.uniform("late_artery_hu", (125.0, 230.0))
    draw.values["artery_hu"] = artery
    blood = dict(usual.blood)
    for name in blood:
        lowest = {"lower_cava": 0.55, "azygos": 0.7, "neck_veins": 0.7}.get(name, 0.9)
        level = artery * draw.uniform(f"late_{name}", (lowest, 1.12))
        blood[name] = (level, 0.15 * blood[name][1])
    blood["artery"] = (artery, usual.blood["artery"][1])
    blood["muscle_heart"] = (draw.uniform("late_heart_muscle_hu", (90.0, 140.0)), 0.1)
    organs = {
        "liver": draw.uniform("late_liver_hu", (85.0, 130.0)),
        "spleen": draw.uniform("late_spleen_hu", (95.0, 150.0)),
        "muscle": usual.plain["muscle"] + 8.0,
    }
    return replace(usual, plain=usual.plain | organs, blood=blood)


def _poor_opacification(draw: Draw, config: PhantomConfig, usual: Tissues) -> Tissues:
    """Little contrast in the pulmonary arteries, unevenly mixed; elsewhere as it happens."""
    artery = draw.uniform("poor_artery_hu", config.poor_artery_hu)
    per_usual = artery / float(draw.values["artery_hu"])
    draw.values["artery_hu"] = artery
    heart = usual.blood["ventricle_right"]
    blood = usual.blood | {
        "artery": (artery, draw.uniform("poor_artery_mixing", (0.04, 0.16))),
        "ventricle_right": (heart[0] * per_usual, heart[1]),
    }
    return replace(usual, blood=blood)


def _usual_tissues(draw: Draw, config: PhantomConfig, frame: Frame) -> Tissues:
    artery = draw.uniform("artery_hu", config.artery_hu)
    plain_blood = draw.uniform("unopacified_hu", (32.0, 55.0))
    late = draw.chance("veins_unopacified", config.unopacified_vein_probability)
    vein = draw.uniform("pulmonary_vein_hu", config.pulmonary_vein_hu)
    vein = draw.uniform("early_vein_hu", (40.0, 110.0)) if late else vein
    aorta = draw.uniform("aorta_hu", config.aorta_hu)
    aorta = min(aorta, draw.uniform("early_aorta_hu", (45.0, 150.0))) if late else aorta
    cava = draw.log_uniform("cava_hu", config.cava_hu)
    right_mixing = draw.uniform("right_mixing", (0.05, 0.9))
    return Tissues(
        plain={
            "skin": draw.uniform("skin_hu", (-20.0, 40.0)),
            "fat": draw.uniform("fat_hu", (-115.0, -92.0)),
            "inner": draw.uniform("mediastinal_fat_hu", (-108.0, -70.0)),
            "muscle": draw.uniform("muscle_hu", (42.0, 68.0)),
            "lung": draw.uniform("lung_hu", config.lung_hu),
            "fluid": draw.uniform("fluid_hu", (0.0, 22.0)),
            "dense": draw.uniform("dense_hu", (-120.0, 80.0)),
            "liver": draw.uniform("liver_hu", (50.0, 115.0)),
            "spleen": draw.uniform("spleen_hu", (50.0, 150.0)),
            "stomach": draw.uniform("stomach_hu", (0.0, 60.0)),
            "gas": -960.0,
            "cartilage": draw.uniform("cartilage_hu", (90.0, 180.0)),
            "bone": draw.uniform("bone_hu", (420.0, 850.0)),
            "marrow": draw.uniform("marrow_hu", (60.0, 260.0)),
            "vertebra_rim": draw.uniform("vertebra_rim_hu", (280.0, 600.0)),
            "vertebra": draw.uniform("vertebra_hu", (110.0, 250.0)),
            "canal": 22.0,
            "soft": draw.uniform("node_hu", (25.0, 95.0)),
            "airway_wall": draw.uniform("airway_wall_hu", (10.0, 60.0)),
            "airway": -970.0,
            "plug": draw.uniform("plug_hu", (5.0, 50.0)),
            "oesophagus": draw.uniform("oesophagus_hu", (30.0, 65.0)),
        },
        blood={
            "artery": (artery, draw.uniform("artery_mixing", (0.01, 0.07))),
            "veins": (vein, draw.uniform("vein_mixing", (0.0, 0.4))),
            "atrium_left": (vein * 0.97, draw.uniform("left_mixing", (0.02, 0.25))),
            "ventricle_left": (
                0.5 * (vein + aorta),
                draw.uniform("left_ventricle_mixing", (0.05, 0.3)),
            ),
            "aorta": (aorta, draw.uniform("aorta_mixing", (0.0, 0.06))),
            "atrium_right": (0.5 * artery + 0.35 * cava, right_mixing),
            "ventricle_right": (
                artery * draw.uniform("ventricle_per_artery", (0.8, 1.1)),
                0.5 * right_mixing,
            ),
            "cava": (cava, draw.uniform("cava_mixing", (0.05, 0.8))),
            "lower_cava": (
                draw.uniform("lower_cava_hu", (45.0, 170.0)),
                draw.uniform("lower_cava_mixing", (0.1, 0.8)),
            ),
            "neck_veins": (draw.uniform("neck_vein_hu", (50.0, 250.0)), 0.3),
            "azygos": (draw.uniform("azygos_hu", (45.0, 170.0)), 0.2),
            "muscle_heart": (draw.uniform("heart_muscle_hu", (70.0, 130.0)), 0.1),
        },
        texture_hu=draw.uniform("texture_hu", (3.0, 9.0)),
        skin_mm=draw.uniform("skin_mm", (1.2, 2.4)),
        lung_slope_hu=draw.uniform("lung_slope_hu", (5.0, 70.0)),
        emphysema_hu=draw.uniform("emphysema_hu", (30.0, 110.0))
        if draw.chance("emphysema", config.emphysema_probability)
        else 0.0,
        first_vertebra_mm=frame.shift_mm[2] + FIRST_VERTEBRA_Z_MM * frame.scale[2],
        vertebra_pitch_mm=VERTEBRA_PITCH_MM * frame.scale[2],
        unopacified_hu=plain_blood,
        slow_flow=draw.uniform("slow_flow", (0.1, 0.6))
        if draw.chance("slow_flow_present", 0.35)
        else 0.0,
        ground_glass_hu=draw.uniform("ground_glass_hu", (60.0, 260.0))
        if draw.chance("ground_glass", config.ground_glass_probability)
        else 0.0,
        distal_fade=draw.uniform("distal_fade", config.distal_fade),
    )
