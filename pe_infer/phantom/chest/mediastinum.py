"""Centre lines of the large vessels, airways and the oesophagus of the reference adult.

Coordinates are reference LPS in mm (carina near (0, 8, 0)), with the proportions of a normal
contrast chest CT, arms raised. Each path is a list of (x, y, z, radius).
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from pe_infer.phantom.raster import Capsules
from pe_infer.phantom.sampling import Draw

Path: TypeAlias = tuple[tuple[float, float, float, float], ...]

AORTA: tuple[Path, ...] = (
    (
        (4, -26, -62, 13),
        (3, -26, -52, 15),
        (-4, -28, -35, 15.5),
        (-2, -31, -5, 15),
        (-2, -28, 20, 14.5),
        (8, -14, 36, 13.5),
        (19, 8, 41, 13),
        (24, 26, 33, 12.5),
        (23, 36, 12, 12),
        (25, 46, -20, 11.5),
        (31, 54, -60, 11.5),
        (36, 52, -105, 11),
        (25, 42, -180, 10.5),
        (20, 38, -230, 10),
    ),
    (
        (-2, -20, 44, 6),
        (-12, -22, 75, 5.5),
        (-20, -24, 90, 4.5),
        (-28, -26, 140, 3.5),
        (-30, -26, 260, 3.2),
    ),
    ((8, -13, 49, 4.2), (14, -20, 80, 3.6), (24, -24, 140, 3.4), (28, -26, 260, 3.2)),
    (
        (18, 4, 52, 5),
        (29, 3, 74, 4.6),
        (45, -12, 90, 4.3),
        (95, -25, 94, 4),
        (150, -20, 110, 3.6),
        (178, -8, 240, 3),
    ),
    (
        (-16, -23, 82, 4.6),
        (-45, -15, 93, 4.3),
        (-95, -25, 94, 4),
        (-150, -20, 110, 3.6),
        (-178, -8, 240, 3),
    ),
)
CAVA: tuple[Path, ...] = (  # superior vena cava and what joins it
    (
        (-21, -37, 42, 7.5),
        (-24, -29, 8, 8),
        (-25, -23, -20, 8.5),
        (-25, -21, -48, 9.5),
        (-23, -24, -60, 11),
    ),
    ((58, -42, 80, 5.5), (32, -46, 60, 6), (2, -50, 46, 6), (-19, -39, 38, 7)),
    ((-45, -38, 82, 5.5), (-28, -38, 62, 6.5), (-21, -37, 42, 7.5)),
    ((45, -40, 82, 5.2), (95, -47, 90, 4.6), (150, -30, 100, 4.2), (182, -18, 240, 3.6)),
    ((-45, -38, 82, 5.2), (-95, -47, 90, 4.6), (-150, -30, 100, 4.2), (-182, -18, 240, 3.6)),
)
NECK_VEINS: tuple[Path, ...] = (
    ((45, -40, 82, 5), (36, -32, 105, 4.8), (36, -24, 260, 4.6)),
    ((-45, -38, 82, 5), (-36, -32, 105, 5.2), (-36, -24, 260, 5)),
)
AZYGOS: tuple[Path, ...] = (
    (
        (-5, 46, -190, 2.6),
        (-6, 47, -90, 3),
        (-6, 44, -20, 3.3),
        (-8, 40, 6, 3.6),
        (-14, 24, 17, 3.8),
        (-20, 2, 17, 4),
        (-23, -20, 13, 4.2),
    ),
)
INFERIOR_CAVA: tuple[Path, ...] = (
    ((-20, -12, -92, 11), (-24, 0, -125, 10.5), (-20, 12, -230, 10)),
)
ARTERY_TRUNK: Path = (
    (20, -48, -66, 13),
    (22, -46, -56, 13.5),
    (25, -38, -38, 13.5),
    (24, -22, -18, 13),
    (19, -11, -12, 12),
)
ARTERY_LEFT: Path = (
    (19, -11, -12, 11.5),
    (30, -3, -1, 11),
    (41, 8, -2, 10),
    (51, 18, -12, 8.5),
    (54, 22, -28, 7.6),
    (53, 26, -44, 7),
)
ARTERY_RIGHT: Path = (
    (19, -11, -12, 11.5),
    (2, -8, -16, 10.5),
    (-18, -6, -16, 10.3),
    (-37, -1, -18, 9.3),
    (-48, 6, -28, 8.2),
    (-52, 12, -44, 7.2),
)
ARTERY_TRUNCUS: Path = ((-28, -4, -13, 7), (-44, -5, -1, 5.8), (-50, -4, 6, 5.2))
LEFT_VEINS: tuple[Path, ...] = (
    ((26, 4, -42, 8), (40, 0, -36, 7), (50, -9, -27, 5)),
    ((26, 16, -60, 8), (42, 22, -64, 7), (54, 27, -68, 5)),
)
RIGHT_VEINS: tuple[Path, ...] = (
    ((-16, 5, -46, 8), (-38, -4, -38, 7), (-52, -11, -28, 5)),
    ((-14, 17, -60, 8), (-38, 21, -64, 7), (-52, 25, -68, 5)),
)
TRACHEA: tuple[Path, ...] = (
    (
        (3, -30, 260, 8),
        (3, -30, 100, 8.5),
        (1, -18, 65, 9),
        (0, -5, 35, 9),
        (0, 6, 8, 9),
        (0, 9, 1, 8.6),
    ),
    ((0, 9, 1, 7.4), (-16, 13, -12, 6.8), (-29, 15, -18, 6.5)),
    ((-20, 14, -14, 5), (-42, 9, -6, 4.6)),
    ((-29, 15, -18, 5.6), (-38, 19, -44, 5.2)),
    ((0, 9, 1, 7), (18, 14, -16, 6.2), (35, 17, -24, 5.8)),
    ((35, 17, -24, 5), (52, 7, -24, 4.4)),
    ((35, 17, -24, 5), (42, 22, -46, 4.8)),
)
BRONCHUS_ENDS: dict[str, tuple[float, float, float, float]] = {
    "right upper": (-42, 9, -6, 4.4),
    "right middle": (-38, 18, -42, 4),
    "right lower": (-38, 19, -44, 4.8),
    "left upper": (52, 7, -24, 4.2),
    "lingula": (52, 7, -24, 3.8),
    "left lower": (42, 22, -46, 4.6),
}
OESOPHAGUS: tuple[Path, ...] = (
    (
        (4, -12, 260, 6),
        (4, -6, 100, 6.5),
        (4, 14, 60, 7),
        (6, 26, 20, 7),
        (6, 33, -20, 7.5),
        (8, 38, -60, 7.5),
        (18, 40, -95, 7.5),
        (32, 20, -125, 8),
    ),
)
CONNECTIVE: tuple[Path, ...] = (  # fat and connective tissue between the structures
    ((-10, -14, 72, 12), (-10, -10, 40, 13), (-9, -6, 12, 14)),
    ((4, 14, 70, 12), (6, 24, 30, 13), (4, 26, -5, 13)),
    ((2, -42, 62, 16), (-4, -44, 30, 16), (-4, -42, 5, 18), (2, -44, -20, 20)),
    ((2, 24, -10, 14), (4, 30, -40, 14), (9, 42, -70, 14), (16, 42, -100, 16), (16, 36, -150, 20)),
    ((-12, -12, 14, 13), (-9, 14, 14, 13), (-4, 34, 8, 13)),
    ((6, 24, -70, 14), (10, 22, -100, 20), (10, 10, -128, 26)),
    ((20, 28, 30, 14), (14, 44, 0, 12), (16, 48, -60, 13), (22, 50, -110, 16)),
)


def smooth(path: Path, scale: float = 1.0, step_mm: float = 9.0) -> NDArray[np.float64]:
    """Return (n, 4) points about ``step_mm`` apart on a smooth curve, radii times ``scale``."""
    knots = np.array(path, np.float64)
    along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(knots[:, :3], axis=0), axis=1))])
    dense = np.linspace(0, along[-1], max(2, int(along[-1] / step_mm) + 1))
    points = np.asarray(PchipInterpolator(along, knots)(dense), np.float64)
    points[:, 3] *= scale
    return points


def tubes(paths: tuple[Path, ...], scale: float = 1.0) -> Capsules:
    """Return the capsules of several paths in reference coordinates."""
    chains = [smooth(path, scale) for path in paths]
    return Capsules.join([Capsules.chain(c[:, :3], c[:, 3]) for c in chains])


@dataclass(frozen=True, slots=True, kw_only=True)
class CentralVessels:
    """The large structures of one patient as capsules in reference coordinates."""

    aorta: Capsules
    cava: Capsules
    neck_veins: Capsules
    azygos: Capsules
    inferior_cava: Capsules
    artery: Capsules
    veins: Capsules
    airway: Capsules
    oesophagus: Capsules
    connective: Capsules


def central_vessels(draw: Draw, vessel_scale: float) -> CentralVessels:
    """Make the large structures; calibres vary independently of each other."""
    aorta = draw.uniform("aorta_scale", (0.85, 1.2))
    cava = draw.uniform("cava_scale", (0.8, 1.2))
    airway = draw.uniform("airway_scale", (0.85, 1.1))
    return CentralVessels(
        aorta=tubes(AORTA, aorta),
        cava=tubes(CAVA, cava),
        neck_veins=tubes(NECK_VEINS, cava),
        azygos=tubes(AZYGOS, cava),
        inferior_cava=tubes(INFERIOR_CAVA, cava),
        artery=tubes((ARTERY_TRUNK, ARTERY_LEFT, ARTERY_RIGHT, ARTERY_TRUNCUS), vessel_scale),
        veins=tubes((*LEFT_VEINS, *RIGHT_VEINS), vessel_scale),
        airway=tubes(TRACHEA, airway),
        oesophagus=tubes(OESOPHAGUS),
        connective=tubes(CONNECTIVE),
    )
