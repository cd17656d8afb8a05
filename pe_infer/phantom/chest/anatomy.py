"""Organs of one patient as signed distances on a coarse lattice.

Fields whose name ends in ``_mm`` are signed distances (negative inside). The others are *levels*:
distances divided by the width over which a surface is blurred by a pixel and a slice, so that
occupancy is ``clip(0.5 - level, 0, 1)``.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from pe_infer.phantom.chest import shapes
from pe_infer.phantom.chest.config import PhantomConfig
from pe_infer.phantom.chest.frame import Frame
from pe_infer.phantom.chest.mediastinum import CentralVessels
from pe_infer.phantom.raster import F32, Capsules, Lattice, lower_distance
from pe_infer.phantom.sampling import Draw

_FAR_MM = 40.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """Fields on ``lattice``, each (z, y, x) float32.

    ``reference`` holds the reference coordinates (z, y, x, 3) of the lattice. ``grain`` and
    ``clouds`` are smooth noise of unit variance with correlation lengths of about 5 and 18 mm.
    """

    lattice: Lattice
    reference: F32
    grain: F32
    clouds: F32
    body_mm: F32
    spine_mm: F32
    canal: F32
    airway_mm: F32
    lung_mm: F32
    levels: dict[str, F32]


class _Builder:
    """Evaluates shapes on one lattice."""

    def __init__(
        self, lattice: Lattice, frame: Frame, pixel_mm: float, thickness_mm: float
    ) -> None:
        x, y, z = (lattice.axis(k).astype(np.float32) for k in range(3))
        grid = np.stack(
            np.broadcast_arrays(x[None, None, :], y[None, :, None], z[:, None, None]), -1
        )
        self.lattice = lattice
        self.frame = frame
        by_axis = np.ascontiguousarray(np.moveaxis(frame.to_reference(grid), -1, 0))
        self.reference: F32 = np.moveaxis(by_axis, 0, -1)  # each coordinate is contiguous
        self._pixel_mm = np.float32(pixel_mm)
        self._thickness_mm = np.float32(thickness_mm)

    def distance(self, level: F32) -> F32:
        """Turn a level function (1 on the surface) into a distance, exact to first order."""
        sx, sy, sz = self.lattice.step_mm
        gz, gy, gx = np.gradient(level, sz, sy, sx)
        slope = np.sqrt(gz * gz + gy * gy + gx * gx)
        return np.asarray((level - 1) / np.maximum(slope, 1e-3), np.float32)

    def ellipsoid(
        self, centre: tuple[float, float, float], semi: tuple[float, float, float]
    ) -> F32:
        """Signed distance of an ellipsoid given in reference mm, up to the scale of the patient."""
        k0 = np.zeros(self.lattice.shape, np.float32)
        k1 = np.zeros_like(k0)
        for axis in range(3):
            q = (self.reference[..., axis] - np.float32(centre[axis])) * np.float32(1 / semi[axis])
            q *= q
            k0 += q
            q *= np.float32(semi[axis] ** -2)
            k1 += q
        np.sqrt(k0, out=k0)
        k0 *= (k0 - 1) / np.sqrt(np.maximum(k1, 1e-12))
        k0 *= np.float32(self.frame.mean_scale)
        return k0

    def tubes(self, caps: Capsules, reach_mm: float = 14.0, far_mm: float = _FAR_MM) -> F32:
        """Signed distance of capsules given in reference coordinates; ``far_mm`` out of reach."""
        out = np.full(self.lattice.shape, far_mm, np.float32)
        lower_distance(out, self.frame.capsules(caps), self.lattice, reach_mm)
        return out

    def level(self, distance: F32, motion_mm: float = 0.0) -> F32:
        """Divide a distance by its blur: pixel, slice (where the surface lies flat) and motion."""
        slope = np.clip(np.gradient(distance, self.lattice.step_mm[2], axis=0), -1, 1)
        width = np.hypot(
            np.hypot(self._pixel_mm, np.float32(motion_mm)), self._thickness_mm * slope
        )
        return np.asarray(distance / width, np.float32)


def coarse_lattice(
    x_mm: tuple[float, float], y_mm: tuple[float, float], z_mm: tuple[float, float], step_mm: float
) -> Lattice:
    """Return the lattice that covers the given ranges in patient mm with a margin of one step."""
    spans = (x_mm, y_mm, z_mm)
    counts = [int(np.ceil((high - low) / step_mm)) + 3 for low, high in spans]
    return Lattice(
        origin_mm=(x_mm[0] - step_mm, y_mm[0] - step_mm, z_mm[0] - step_mm),
        step_mm=(step_mm, step_mm, step_mm),
        shape=(counts[2], counts[1], counts[0]),
    )


def _unit_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> F32:
    values = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma, mode="wrap")
    return np.asarray(values / max(float(values.std()), 1e-6), np.float32)


def _smooth_minimum(a: F32, b: F32, width_mm: float) -> F32:
    """Return the union of two shapes with a rounded groove between them."""
    share = np.clip(0.5 + 0.5 * (b - a) / width_mm, 0, 1)
    return np.asarray(b + (a - b) * share - width_mm * share * (1 - share), np.float32)


def _trunk(draw: Draw, config: PhantomConfig, make: _Builder) -> tuple[F32, F32]:
    """Distances to the trunk with arms, and to the skin: extra fat and breasts added."""
    shape = draw.uniform("chest_shape", config.chest_shape)
    outline = shapes.body_narrowing(shapes.oval(make.reference, shape, 0.9), shape)
    trunk = make.distance(shapes.body_level(outline))
    down = draw.chance("arms_down", config.arms_down_probability)
    thin = np.float32(9 * shape)
    arms = [
        Capsules.chain(
            [(s * 150, 10, 72), (s * 184, 8, 55), (s * 208, 16, -170)]
            if down
            else [(s * 140, 12, 80), (s * 168, 2, 118), (s * 180, -14, 270)],
            np.array([50, 46, 44], np.float32) - thin,
        )
        for s in (-1, 1)
    ]
    extra = draw.uniform("extra_fat_mm", config.extra_fat_mm)
    reach, far = (16.0 + max(extra, 0.0), 1e3) if shape else (14.0, _FAR_MM)
    trunk = np.minimum(trunk, make.tubes(Capsules.join(arms), reach, far))
    body = trunk - np.float32(extra)
    if draw.chance("breasts", 0.45):
        size = draw.uniform("breast_mm", (28.0, 48.0))
        for s in (-1, 1):
            y = -104.0 - 0.6 * extra
            x, semi = 76 + 4 * shape, (60 - 9 * shape, (1 - 0.4 * shape) * size, 58)
            body = _smooth_minimum(body, make.ellipsoid((s * x, y, -45), semi), 16.0)
    return trunk, np.asarray(body, np.float32)


def _mediastinum(
    draw: Draw,
    config: PhantomConfig,
    make: _Builder,
    organs: dict[str, F32],
    connective: F32,
    hilar: F32,
) -> F32:
    """Distance to all that is neither lung nor chest wall: organs wrapped in a little fat."""
    point = make.reference
    z = point[..., 2]
    shape = draw.uniform("chest_shape", config.chest_shape)
    fat = np.float32(draw.uniform("mediastinal_fat_mm", (1.5, 5.0)))
    # A wedge of fat behind the sternum
    ahead = np.maximum(point[..., 1] + 92 + 0.25 * z * (z < 0), 0)
    lean = draw.uniform("wedge_lean_mm", (-8.0, 10.0))
    wedge = np.abs(point[..., 0] - lean * ahead / 60) - 2.0 - 0.3 * ahead
    wedge = np.maximum(wedge * 0.95, np.maximum(point[..., 1] + 15, np.abs(z + 20) - 110))
    neck = np.maximum(
        np.hypot(point[..., 0], point[..., 1] + 10) - (12 + 0.35 * np.maximum(z - 30, 0)),
        np.abs(z - 65) - 35,
    )
    wrapped = [organs[name] - fat for name in ("heart", "aorta", "cava", "artery")]
    wrapped += [organs["azygos"], organs["lower_cava"], organs["oesophagus"] - 1.0]
    wrapped += [
        organs["airway"] - 0.5 * fat - 1.0 - np.float32(3 * shape),
        organs["spine"] - 4.0,
        organs["veins"] - 0.6 * fat,
    ]
    wrapped += [wedge, neck, connective, hilar - np.float32(0.4) * fat]
    return np.asarray(np.minimum.reduce(wrapped), np.float32)


def _abdomen(
    draw: Draw, make: _Builder, right_dome: F32, below: F32, cavity: F32
) -> dict[str, F32]:
    """Levels of what lies under the diaphragm."""
    levels: dict[str, F32] = {}
    abdomen = np.maximum(below + 1.0, cavity + 0.8)
    levels["liver"] = make.level(
        np.maximum(
            np.minimum(right_dome + 1.0, make.ellipsoid((10, -45, -170), (75, 50, 52))), abdomen
        )
    )
    levels["spleen"] = make.level(np.maximum(make.ellipsoid((92, 52, -160), (28, 44, 48)), abdomen))
    stomach = np.maximum(make.ellipsoid((62, -5, -150), (42, 50, 46)), abdomen + 2)
    levels["stomach"] = make.level(stomach)
    gas_y = draw.uniform("stomach_gas_y_mm", (-45.0, 0.0))
    levels["gas"] = make.level(np.maximum(stomach + 4, make.reference[..., 1] - gas_y))
    return levels


def build_anatomy(
    draw: Draw,
    config: PhantomConfig,
    frame: Frame,
    central: CentralVessels,
    hilar: Capsules,
    lattice: Lattice,
    pixel_mm: float,
    thickness_mm: float,
) -> Anatomy:
    """Evaluate every organ.

    Args:
        draw: Source of random numbers.
        config: Ranges and probabilities.
        frame: From reference to patient.
        central: Great vessels, airways and oesophagus in reference coordinates.
        hilar: The thick parts of the vessel trees, which carry some fat with them.
        lattice: Where to evaluate.
        pixel_mm: Pixel distance of the slices to be painted.
        thickness_mm: Their thickness.
    """
    make = _Builder(lattice, frame, pixel_mm, thickness_mm)
    point = make.reference
    grain = _unit_noise(draw.rng("grain"), lattice.shape, 1.1)
    clouds = _unit_noise(draw.rng("clouds"), lattice.shape, 4.0)
    levels: dict[str, F32] = {}

    trunk, body = _trunk(draw, config, make)
    extra = draw.uniform("extra_fat_mm", config.extra_fat_mm)
    deep = trunk + np.float32(7.0 + 0.1 * max(extra, 0.0)) + 2.5 * clouds

    right_dome, below = _diaphragm(draw, make)
    heart = _heart(make, draw.uniform("heart_scale", config.heart_scale))
    organs = {
        "heart": np.minimum.reduce([*heart.values()]),
        "aorta": make.tubes(central.aorta),
        "cava": make.tubes(central.cava),
        "azygos": make.tubes(central.azygos),
        "lower_cava": make.tubes(central.inferior_cava),
        "artery": make.tubes(central.artery),
        "oesophagus": make.tubes(central.oesophagus),
        "airway": make.tubes(central.airway),
        "spine": make.distance(shapes.spine_level(point)),
        "veins": make.tubes(central.veins),
    }
    middle = _mediastinum(
        draw, config, make, organs, make.tubes(central.connective), make.tubes(hilar)
    )
    middle = np.asarray(middle + 0.6 * grain, np.float32)
    shape = draw.uniform("chest_shape", config.chest_shape)
    cavity = _cavity(make, shape)
    lungs = np.maximum(cavity, -np.minimum(middle, below))

    fluid, dense = _findings(draw, config, make, cavity, np.minimum(middle, below), lungs, clouds)
    if fluid is not None:
        levels["fluid"] = make.level(fluid)
        lungs = np.maximum(lungs, -fluid)
    if dense is not None:
        levels["dense"] = make.level(np.maximum(dense, lungs))

    inner = np.minimum(cavity, np.maximum(middle, trunk + 12))
    sheets = np.minimum(np.abs(clouds + 0.15 * grain) * 8 - 1.6, (1.25 - clouds - 0.3 * grain) * 7)
    if shape:  # muscles in layers around the ribs
        layers = [np.abs(inner - depth - 5 * clouds) - 0.8 * (1 + grain) for depth in (15, 27)]
        sheets = np.minimum.reduce([*layers, (1.5 - clouds - 0.3 * grain) * 7])
    fat_planes = np.maximum(sheets, 9 - inner)
    levels["muscle"] = make.level(np.asarray(np.maximum(deep, -fat_planes), np.float32))
    levels["inner"] = make.level(inner)
    levels["lung"] = make.level(lungs)
    if draw.chance("fissures", config.fissure_probability):
        levels |= _fissures(make, clouds)
    airless = below if fluid is None else np.minimum(below, fluid)
    levels["airless"] = make.level(np.asarray(airless, np.float32))
    levels |= _abdomen(draw, make, right_dome, below, cavity)
    motion = draw.uniform("heart_motion_mm", (0.5, 3.5))
    levels |= {name: make.level(distance, motion) for name, distance in heart.items()}
    outside_heart = np.maximum(organs["lower_cava"], -levels["atrium_right"])
    levels["lower_cava"] = make.level(outside_heart)
    levels["neck_veins"] = make.level(make.tubes(central.neck_veins))
    for name, share in (("aorta", 0.3), ("artery", 0.25)):  # of the motion of the heart
        levels[name] = make.level(organs[name], share * motion)
    for name in ("cava", "azygos", "veins", "oesophagus"):
        levels[name] = make.level(organs[name])
    centre_y = shapes.spine_centre_y(point[..., 2]).astype(np.float32) + 25
    return Anatomy(
        lattice=lattice,
        reference=point,
        grain=grain,
        clouds=clouds,
        body_mm=np.asarray(body, np.float32),
        spine_mm=organs["spine"],
        canal=np.asarray(np.hypot(point[..., 0] / 1.15, point[..., 1] - centre_y) - 9, np.float32),
        airway_mm=organs["airway"],
        lung_mm=np.asarray(lungs, np.float32),
        levels=levels,
    )


def _cavity(make: _Builder, shape: float) -> F32:
    """Distance to the inside of the ribs."""
    wall = shapes.oval(make.reference, shape)
    cage = [make.distance(shapes.cage_level(wall, side)) for side in (-1, 1)]
    cavity = np.minimum(cage[0], cage[1])
    if shape:
        arches = np.float32(make.frame.mean_scale) * shapes.arch_level(make.reference)
        cavity = np.maximum(cavity, -arches)
    return np.asarray(cavity, np.float32)


def _diaphragm(draw: Draw, make: _Builder) -> tuple[F32, F32]:
    """Distances to its right dome, and to all that is below it."""
    dome_rise = draw.uniform("diaphragm_rise_mm", (-14.0, 16.0))
    left_rise = draw.uniform("left_rise_mm", (-8, 8))
    right_dome = make.ellipsoid((-60, 8, -187 + dome_rise), (84, 97, 98))
    left_dome = make.ellipsoid((68, 14, -193 + dome_rise + left_rise), (76, 92, 95))
    tendon = make.ellipsoid((2, -25, -188 + dome_rise), (78, 90, 80))
    return right_dome, np.asarray(np.minimum.reduce([right_dome, left_dome, tendon]), np.float32)


def _fissures(make: _Builder, clouds: F32) -> dict[str, F32]:
    """Levels of the surfaces between the lobes (`lungs.lobe_of`), slightly wavy."""
    x, y, z = (make.reference[..., axis] for axis in range(3))
    bow = 0.005 * (np.abs(x) - 60) ** 2 - 5
    oblique = (z - 34 + (70 - y) * 1.08) / 1.47 + 1.5 * clouds + bow
    minor = np.where((x < 0) & (oblique > 0), z + 36 + 1.5 * clouds + bow, _FAR_MM)
    return {
        "fissure_oblique": make.level(np.asarray(oblique, np.float32)),
        "fissure_minor": make.level(np.asarray(minor, np.float32)),
    }


def _heart(make: _Builder, scale: float) -> dict[str, F32]:
    """Muscle and the four chambers (distances), each drawn over the one before."""
    grow = np.float32((scale - 1) * 38)
    left = make.tubes(
        Capsules.chain([(24, -20, -70), (38, -30, -86), (57, -42, -106)], [18, 18.5, 10])
    )
    right = make.ellipsoid((16, -52, -86), (30, 21, 30)) - grow
    atrium_right = make.ellipsoid((-19, -30, -74), (21, 24, 28)) - grow
    atrium_left = make.ellipsoid((6, 13, -56), (30, 18, 20)) - grow
    left = left - grow
    muscle = np.minimum.reduce([left - 9.5, right - 3.0, atrium_right - 2.0, atrium_left - 1.5])
    return {
        "muscle_heart": np.asarray(muscle, np.float32),
        "ventricle_right": np.asarray(np.maximum(right, 10.5 - left), np.float32),
        "ventricle_left": np.asarray(left, np.float32),
        "atrium_right": np.asarray(np.maximum(atrium_right, 3 - right), np.float32),
        "atrium_left": np.asarray(np.maximum(atrium_left, 2.5 - atrium_right), np.float32),
    }


def _findings(
    draw: Draw,
    config: PhantomConfig,
    make: _Builder,
    cavity: F32,
    middle: F32,
    lungs: F32,
    clouds: F32,
) -> tuple[F32 | None, F32 | None]:
    """Pleural fluid, and airless lung (dependent atelectasis, plates, consolidation)."""
    y, z = make.reference[..., 1], make.reference[..., 2]
    sided = make.reference[..., 0] * (1 if draw.chance("finding_left", 0.5) else -1)
    fluid: F32 | None = None
    dense: list[F32] = []
    top = draw.uniform("fluid_top_z_mm", (-90.0, 10.0))
    thickest = draw.uniform("fluid_thickness_mm", (8.0, 32.0))
    if draw.chance("effusion", config.effusion_probability):
        depth = thickest * np.clip((top - z) / 60, 0, 1.5) * np.clip((y - 10) / 60, 0, 1)
        one_sided = -sided - (0.0 if draw.chance("one_sided", 0.6) else 1e3)
        dependent = np.maximum.reduce([12 - y, z - top, one_sided])
        region = np.maximum(2 - cavity - depth - 1.5 * clouds, dependent)
        fluid = np.asarray(np.maximum.reduce([cavity, -middle, region]), np.float32)
        pressed = fluid - draw.uniform("compression_mm", (2.0, 14.0))
        dense.append(np.asarray(np.maximum(pressed, dependent + 14), np.float32))
    if draw.chance("atelectasis", config.atelectasis_probability):
        thickness = draw.uniform("atelectasis_mm", (4.5, 12.0))
        band = np.maximum(-cavity - thickness * (0.6 + 0.5 * clouds), np.maximum(58 - y, z + 40))
        dense.append(np.asarray(band, np.float32))
        rng = draw.rng("plates")
        for _ in range(int(rng.integers(0, 4))):
            tilt = rng.uniform(-0.4, 0.4, 2)
            height = rng.uniform(-125, -60)
            plate = np.abs(z - height - tilt[0] * y - tilt[1] * sided) - rng.uniform(1.8, 3.2)
            outer = np.maximum(sided - rng.uniform(80, 110), rng.uniform(40, 70) - sided)
            dense.append(
                np.asarray(
                    np.maximum(plate, np.maximum(outer, np.abs(y - rng.uniform(-20, 40)) - 45))
                )
            )
    if draw.chance("consolidation", config.consolidation_probability):
        rng = draw.rng("consolidation_place")
        inside = make.reference[lungs < -12]
        if len(inside):
            x0, y0, z0 = (float(v) for v in inside[rng.integers(len(inside))])
            size = rng.uniform(10, 32)
            dense.append(
                np.asarray(
                    make.ellipsoid((x0, y0, z0), (size, size, size)) + 5 * clouds, np.float32
                )
            )
    return fluid, (np.asarray(np.minimum.reduce(dense), np.float32) if dense else None)
