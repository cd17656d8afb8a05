"""The cranial cavity, the skull around and below it, and the face, as signed distances.

All numbers are those of the reference adult, in reference coordinates (mm).
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from pe_infer.phantom.head.config import HeadConfig
from pe_infer.phantom.head.fields import (
    Fields,
    both_sides,
    bump,
    largest,
    smallest,
    table,
    union,
)
from pe_infer.phantom.raster import F32, Capsules
from pe_infer.phantom.sampling import Draw

_POWER = 2.2
_HALF_LENGTH = 86.0
_HEIGHT = 74.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Skull:
    """Fields on the coarse lattice, (w, v, u) float32; distances in mm, negative inside.

    Attributes:
        cavity: Inner table, sella and foramen magnum.
        vault: Bone thickness around the cavity where it is covered by a vault, mm.
        base: Bones of the skull base, the face and the neck.
        cells: Regions of bone that hold air cells (mastoid).
        skin: Surface of the head and neck.
        muscle: Muscle, where there is neither bone nor cavity.
        orbit: Fat of the orbits.
        globe: Eyeballs.
        lens: Their lenses.
        optic: Optic nerves and muscles of the eyes.
        air: Sinuses, nasal cavity, pharynx, ear canals.
        walls: Thin bone around sinuses and orbits.
        fluid: Sinuses that are filled with fluid.
        petrous: Side of the petrous ridge: positive behind it, mm.
        ridge: Half the width of the ridge, mm.
    """

    cavity: F32
    vault: F32
    base: F32
    cells: F32
    skin: F32
    muscle: F32
    orbit: F32
    globe: F32
    lens: F32
    optic: F32
    air: F32
    walls: F32
    fluid: F32 | None
    petrous: F32
    ridge: F32


def half_width(y: F32) -> F32:
    """Half the width of the cavity: egg-shaped, widest behind the ears."""
    return np.asarray(63.0 + 8.5 * bump(y, 22.0, 60.0), np.float32)


def vault_point(angle_rad: float, share: float) -> tuple[float, float, float]:
    """Return a point of the midline: 0 is the front, half a turn the back, over the vertex."""
    c, s = float(np.cos(angle_rad)), float(np.sin(angle_rad))
    return (0.0, -share * _HALF_LENGTH * c, 2.0 + share * (_HEIGHT - 1) * s)


def _cavity(f: Fields) -> tuple[F32, F32, F32]:
    """Return the cavity, the side of the petrous ridge, and half its width."""
    p = np.float32(_POWER)
    level = (f.ax / half_width(f.y)) ** p + (np.abs(f.y) / np.float32(_HALF_LENGTH)) ** p
    level += (np.maximum(f.z - 2, 0) / np.float32(_HEIGHT)) ** p
    vault = f.normalised(np.asarray(level ** (1 / p) - 1, np.float32), 4e-3)
    floor = table(
        f.y,
        (
            (-90, -9),
            (-70, -13),
            (-48, -16),
            (-38, -17),
            (-28, -20),
            (-20, -25),
            (-8, -27),
            (12, -30),
        ),
    )
    front = np.clip((-42 - f.y) / 10, 0, 1)
    floor += front * (6 * bump(f.ax, 32, 15) - 7 * bump(f.ax, 0, 9))
    vault = largest(vault, np.asarray((floor - f.z) * np.float32(0.95), np.float32))
    petrous = np.asarray(0.857 * (f.y - (0.6 * (f.ax - 8) + 1)), np.float32)
    lateral = np.clip((f.ax - 9) / 9, 0, 1)
    ridge = np.asarray(lateral * np.clip((-13 - f.z) * 0.45, 0, 11.5), np.float32)
    temporal = f.axis_distance((41, -15, -20), (26, 33, 25), paired=True)
    temporal = largest(temporal, petrous + ridge)
    behind = f.axis_distance((0, 40, -29), (57, 45, 38))
    clivus = np.asarray(table(-f.z, ((20, -9), (66, 7))) - f.y, np.float32)
    behind = largest(behind, ridge - petrous, clivus, f.z + 12)
    cavity = union(union(vault, temporal, 5.0), behind, 3.0)
    canal = f.tubes([Capsules.chain([(0, 21, -56), (0, 24, -74), (0, 28, -125)], [14, 13, 9.5])])
    sella = f.axis_distance((0, -27, -30), (6.5, 5.5, 6.5))
    return smallest(union(cavity, canal, 5.0), sella), petrous, ridge


def _base_bones(f: Fields) -> F32:
    chains = [
        *both_sides([(15, -1, -33), (34, 14, -35), (54, 27, -38)], [8, 9, 12]),  # petrous
        *both_sides([(58, 28, -40), (56, 27, -62)], [11, 5]),  # mastoid process
        *both_sides([(16, -36, -36), (36, -44, -24), (60, -42, -14)], [5, 3.5, 3]),  # wings
        *both_sides([(18, 12, -68), (19, 20, -72)], [6.5, 6.5]),  # condyles of the occiput
        *both_sides([(64, -4, -42), (64, -26, -46), (58, -50, -46), (46, -74, -46)], [3] * 4),
        *both_sides([(51, -68, -46), (51, -70, -28), (46, -76, -14)], [3.5, 3, 3.5]),  # orbit rim
        *both_sides([(44, -78, -44), (28, -88, -48), (12, -90, -34)], [3, 3, 2.5]),
        *both_sides([(46, -77, -16), (28, -87, -14), (8, -90, -18)], [3.5, 3.5, 4]),
        *both_sides([(44, -74, -48), (38, -66, -70)], [4, 4]),  # zygoma to maxilla
        *both_sides([(52, -2, -48), (52, -4, -56), (50, -12, -78), (46, -20, -110)], [5, 4, 4, 4]),
        *both_sides([(15, -34, -46), (13, -36, -80)], [2.2, 2.2]),  # pterygoid plates
        Capsules.chain([(0, -14, -30), (0, -6, -44), (0, 5, -66)], [7, 7, 4]),  # clivus
        Capsules.chain([(0, -88, -20), (0, -94, -32), (0, -102, -42)], [4, 2.5, 2]),  # nose
        Capsules.chain([(0, -80, -84), (0, -40, -82)], [2, 2]),
        Capsules.chain([(0, 12, -76), (0, 12, -92), (0, 14, -125)], [4.5, 6, 9]),  # dens
    ]
    ring = np.linspace(-1, 1, 15) * np.pi
    atlas = [(24 * np.sin(a), 28 - 24 * np.cos(a), -83.0) for a in ring]
    chains.append(Capsules.chain(atlas, 4.5 + 2.5 * np.abs(np.sin(ring))))
    sphenoid = f.axis_distance((0, -36, -39), (18, 16, 12))
    frontal = f.axis_distance((0, -88, -12), (26, 8, 13))
    return smallest(f.tubes(chains, 12.0), sphenoid, frontal)


def _air(draw: Draw, f: Fields, grain: F32) -> tuple[F32, F32, F32 | None]:
    """Return the air of the sinuses, everything thin bone lies around, and what fluid fills."""
    size = draw.uniform("sinus_scale", (0.8, 1.1))
    maxillary = f.axis_distance((30, -62, -66), (15 * size, 18 * size, 18), paired=True)
    septa = 2.2 - 1.8 * np.abs(np.sin(f.x * 0.52 + 0.9 * grain) * np.sin(f.y * 0.3 + 0.9 * grain))
    ethmoid = f.axis_distance((0, -64, -36), (13, 25, 15))
    cells = largest(ethmoid, np.asarray(septa - 1.1, np.float32))
    sphenoid = f.axis_distance((0, -37, -40), (14 * size, 12 * size, 10))
    sphenoid = largest(sphenoid, np.asarray(0.8 - np.abs(f.x - 2), np.float32))
    frontal = f.axis_distance((11, -88, -11), (11 * size, 4.5, 10 * size), paired=True)
    nasal = f.axis_distance((0, -68, -66), (14, 30, 18))
    turbinate = 1.7 - np.abs(np.mod(f.ax + 0.6 * grain, 6.5) - 3.2)
    nasal = largest(nasal, np.asarray(turbinate, np.float32), 1.0 - f.ax)
    pharynx = f.axis_distance((0, -27, -82), (12, 9, 24))
    canals = f.tubes(both_sides([(46, 9, -42), (66, 11, -42), (84, 12, -41)], [2.5, 3, 3.5]))
    bony = smallest(maxillary, ethmoid, sphenoid, frontal)
    air = smallest(maxillary, cells, sphenoid, frontal, nasal, pharynx, canals)
    fluid: F32 | None = None
    if draw.chance("opaque_sinus", 1.0):
        which = {"left maxillary": maxillary, "right maxillary": maxillary, "sphenoid": sphenoid}
        name = str(draw.rng("opaque_sinus_place").choice(list(which)))
        side = 1.0 if name.startswith("left") else -1.0
        fluid = which[name] if name == "sphenoid" else largest(which[name], -side * f.x)
        if draw.chance("fluid_level", 0.5):
            fluid = largest(fluid, draw.uniform("fluid_level_y_mm", (-66.0, -50.0)) - f.y)
    return air, bony, fluid


def build_skull(draw: Draw, config: HeadConfig, f: Fields, grain: F32, clouds: F32) -> Skull:
    """Evaluate the head without the brain.

    Args:
        draw: Source of random numbers.
        config: Ranges and probabilities.
        f: Shapes on the coarse lattice.
        grain: Smooth noise of unit variance, correlated over about 4 mm.
        clouds: Over about 15 mm.
    """
    cavity, petrous, ridge = _cavity(f)
    thickness = draw.uniform("skull_mm", config.skull_mm)
    squama = np.clip((f.ax - 40) / 20, 0, 1) * bump(f.z, -8, 26)
    vault = thickness * (1 + 0.09 * clouds - 0.45 * squama)
    vault += draw.uniform("occiput_mm", (0.5, 4.0)) * bump(f.ax, 0, 9) * bump(f.y, 86, 26)
    vault += draw.uniform("forehead_mm", (0.0, 3.5)) * bump(f.ax, 0, 30) * bump(f.y, -86, 22)
    below = np.clip((-14 - f.z) / 10, 0, 1) * np.clip((30 - f.y) / 20, 0, 1)
    floor = np.clip((-42 - f.z) / 12, 0, 1)
    vault = np.asarray(np.maximum(vault * (1 - 0.45 * np.maximum(below, floor)), 2.4), np.float32)

    scalp = draw.uniform("scalp_mm", (3.5, 8.0)) * (1 + 0.25 * bump(f.y, 80, 40))
    above = f.z + 24  # the cavity's own surface makes the head down to here
    head = np.asarray(cavity - vault - scalp - 7 * squama * bump(f.y, -28, 28), np.float32)
    face = f.axis_distance((0, -34, -60), (69, 70, 72))
    neck = f.tubes([Capsules.chain([(0, 26, -52), (0, 34, -150)], [61, 56])], 60.0)
    low = union(face, neck, 12.0)
    skin = union(largest(head, -above - 40), low, 9.0)
    nose = f.tubes([Capsules.chain([(0, -98, -40), (0, -112, -64)], [7, 10])])
    lean = np.asarray(f.ax - 78 - 0.42 * (f.y - 16), np.float32)
    shell = f.axis_distance((78, 18, -38), (9, 15, 28), paired=True)
    ears = largest(shell, np.abs(lean) - 2.4)
    skin = smallest(union(skin, nose, 6.0), ears)

    fat = draw.uniform("face_fat_mm", (5.0, 11.0))
    planes = np.minimum(np.abs(clouds + 0.3 * grain) * 7 - 1.1, np.abs(grain - 1.2) * 6)
    temple = largest(
        np.abs(f.y + 26) - 34, np.abs(f.z) - 34, cavity - vault - 7.5 * squama, 48 - f.ax
    )
    deep = largest(smallest(face, neck) + fat, f.z + 12 + 0.2 * f.y)
    muscle = largest(smallest(deep, temple + 1), -np.asarray(planes, np.float32))

    orbit = f.axis_distance((31, -63, -31), (18.5, 28, 17.5), paired=True)
    globe = f.axis_distance((32, -77, -31), (12, 12, 12), paired=True)
    lens = f.axis_distance((32, -86, -31), (4.6, 2.2, 4.6), paired=True)
    straps = [
        *both_sides([(31, -70, -31), (22, -52, -30), (13, -40, -29)], [2.1, 2.0, 2.0]),
        *both_sides([(44, -78, -31), (40, -62, -31), (22, -44, -30)], [1.4, 2.3, 1.2]),
        *both_sides([(20, -78, -31), (17, -60, -31), (16, -44, -30)], [1.2, 2.0, 1.2]),
        *both_sides([(32, -78, -19), (29, -60, -18), (17, -44, -25)], [1.2, 2.2, 1.2]),
        *both_sides([(32, -78, -43), (29, -60, -43), (17, -44, -34)], [1.2, 2.2, 1.2]),
    ]
    air, bony, fluid = _air(draw, f, grain)
    if not draw.chance("opaque", config.opaque_sinus_probability):
        fluid = None
    walls = smallest(np.abs(bony) - 1.0, np.abs(orbit) - 0.9)
    walls = largest(np.asarray(walls, np.float32), skin + 5)
    cells = f.tubes(both_sides([(46, 20, -38), (57, 27, -42), (57, 27, -56)], [6, 10, 6]))
    return Skull(
        cavity=cavity,
        vault=np.asarray(vault, np.float32),
        base=_base_bones(f),
        cells=cells,
        skin=np.asarray(gaussian_filter(skin, 0.7), np.float32),
        muscle=muscle,
        orbit=orbit,
        globe=globe,
        lens=lens,
        optic=f.tubes(straps),
        air=air,
        walls=walls,
        fluid=fluid,
        petrous=petrous,
        ridge=ridge,
    )
