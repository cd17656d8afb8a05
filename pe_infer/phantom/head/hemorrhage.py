"""Blood inside the skull: what bleeds, where, how old it is, and what it does to the brain.

A bleed is planned in reference coordinates and painted plane by plane: between skull and dura
(epidural), dura and arachnoid (subdural), in the fluid around the brain (subarachnoid), in the
brain (intraparenchymal) or in the ventricles (intraventricular).
"""

from dataclasses import dataclass, replace

import numpy as np

from pe_infer.phantom.head.brain import Shape
from pe_infer.phantom.head.config import HeadConfig
from pe_infer.phantom.head.fields import bump
from pe_infer.phantom.head.skull import half_width
from pe_infer.phantom.head.tissues import Tissues
from pe_infer.phantom.raster import F32
from pe_infer.phantom.sampling import Draw

TYPES = ("epidural", "subdural", "subarachnoid", "intraparenchymal", "intraventricular")
MASS_TYPES = ("epidural", "subdural", "intraparenchymal")  # they push the brain aside
_FALL_HU_PER_DAY = 1.5
_VAULT_POWER = 2.2
_CISTERNS = (0.0, -14.0, -18.0)  # where an aneurysm bleeds

Point = tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bleed:
    """One hemorrhage before it is painted, in reference coordinates.

    Attributes:
        kind: One of ``TYPES``.
        place: In words, e.g. ``"left putamen"``.
        centre: On the inner table for extra-axial blood, else its middle.
        size: Half-axes (intraparenchymal), or thickness in its first number (extra-axial).
        reach_mm: How far it extends along the surface, or from its centre.
        hu: Of its blood.
        age_days: 0 is fresh.
        edema_mm: Width of the rim around it.
        layering_hu: How much denser the blood at the back is than at the front.
        swirl: Share of clot that has not clotted yet (0 even, 1 patchy).
        level: Reference y behind which blood lies in the ventricles.
        push_mm: By how much it moves the brain.
        angle: Of its longest axis.
    """

    kind: str
    place: str
    centre: Point
    size: Point
    reach_mm: float
    hu: float
    age_days: float
    edema_mm: float
    layering_hu: float
    swirl: float
    level: float
    push_mm: float
    angle: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Here:
    """One plane of what blood depends on, (v, u) float32.

    Attributes:
        x, y, z: Reference coordinates.
        cavity: Signed distance to the inner table, mm, negative inside.
        midline: Signed distance to the falx.
        tentorium: Height above the tentorium.
        grain: Smooth noise of unit variance, correlated over about 4 mm.
        clouds: Over about 15 mm.
        subarachnoid: Share of fluid around the brain.
        ventricle: Share of fluid in it.
    """

    x: F32
    y: F32
    z: F32
    cavity: F32
    midline: F32
    tentorium: F32
    grain: F32
    clouds: F32
    subarachnoid: F32
    ventricle: F32


def _soft(distance: F32, edge_mm: float = 1.2) -> F32:
    share = np.float32(0.5) - distance * np.float32(1 / edge_mm)
    return np.asarray(np.clip(share, 0, 1), np.float32)


def share(bleed: Bleed, here: Here) -> F32:
    """Share of each pixel that is blood: (v, u) float32."""
    if bleed.kind == "epidural":
        return _epidural(bleed, here)
    if bleed.kind == "subdural":
        return _subdural(bleed, here)
    if bleed.kind == "subarachnoid":
        return _subarachnoid(bleed, here)
    if bleed.kind == "intraventricular":
        return _intraventricular(bleed, here)
    return _soft(_ball(bleed, here))


def edema(bleed: Bleed, here: Here) -> F32 | None:
    """Share of water around blood in the brain; None without any."""
    if bleed.kind != "intraparenchymal" or bleed.edema_mm < 0.5:
        return None
    around = _ball(bleed, here) - np.float32(bleed.edema_mm) * (1 + 0.25 * here.clouds)
    solid = (1 - here.subarachnoid) * (1 - here.ventricle)
    return np.asarray(_soft(around, 3.0) * solid, np.float32)


def blood_hu(bleed: Bleed, here: Here) -> F32:
    """HU of the blood of one bleed in every pixel."""
    patches = np.clip(here.clouds + 0.4 * here.grain - 0.2, 0, 1.3)
    hu = bleed.hu + 1.2 * here.grain - 24 * bleed.swirl * patches
    hu += bleed.layering_hu * np.tanh((here.y - bleed.centre[1]) / 5) * 0.5
    return np.asarray(hu, np.float32)


def _ball(bleed: Bleed, here: Here) -> F32:
    """Signed distance to the surface of blood in the brain."""
    dx, dy = here.x - bleed.centre[0], here.y - bleed.centre[1]
    c, s = np.float32(np.cos(bleed.angle)), np.float32(np.sin(bleed.angle))
    a, b, d = bleed.size
    q = ((c * dx + s * dy) / a) ** 2 + ((c * dy - s * dx) / b) ** 2
    q += ((here.z - bleed.centre[2]) / d) ** 2
    mean = float(a * b * d) ** (1 / 3)
    rough = min(0.16 * mean, 2.4)
    ball = (np.sqrt(q) - 1) * np.float32(mean) + rough * here.clouds + 0.25 * rough * here.grain
    inner = np.maximum(here.cavity + 0.8, here.subarachnoid * 1.2 - 1.0)
    return np.asarray(np.maximum(ball, inner), np.float32)


def _along(bleed: Bleed, here: Here) -> F32:
    """Distance from the centre, mm."""
    x, y, z = bleed.centre
    return np.asarray(
        np.sqrt((here.x - x) ** 2 + (here.y - y) ** 2 + (here.z - z) ** 2), np.float32
    )


def _epidural(bleed: Bleed, here: Here) -> F32:
    """A lens: the part of a ball around a point beyond the skull that lies inside it."""
    thickness, half = bleed.size[0], bleed.reach_mm
    radius = (half * half + thickness * thickness) / (2 * thickness)
    x, y, z = bleed.centre
    length = float(np.sqrt(x * x + y * y + z * z))
    beyond = (radius - thickness) / length
    away = np.sqrt(
        (here.x - x * (1 + beyond)) ** 2
        + (here.y - y * (1 + beyond)) ** 2
        + (here.z - z * (1 + beyond)) ** 2
    )
    lens = away - radius + 0.4 * here.grain
    # Blood outside the dura does not cross the tentorium, nor leave the skull.
    return _soft(np.maximum.reduce([lens, here.cavity, 0.5 - here.tentorium]))


def _subdural(bleed: Bleed, here: Here) -> F32:
    """A crescent along one hemisphere, or a layer along falx or tentorium."""
    thickness = bleed.size[0]
    side = np.float32(np.sign(bleed.centre[0]))
    fade = np.clip(1.15 - (_along(bleed, here) / bleed.reach_mm) ** 2, 0, 1) ** 0.6
    width = thickness * fade * (1 + 0.12 * here.clouds)
    own = 0.6 - side * here.midline
    above = 0.8 - here.tentorium
    depth = np.maximum(here.cavity, -14.0 - here.z)
    if bleed.place.endswith("falx"):
        layer = np.maximum(side * here.midline - width, depth)
    elif bleed.place.endswith("tentorium"):
        layer = np.maximum(here.tentorium - 0.8 - width, here.cavity)
        above = np.maximum(above, 8.0 - here.y)
    else:
        layer = np.maximum(-here.cavity - width, here.cavity)
    region = np.asarray(np.maximum.reduce([layer, own, above]), np.float32)
    return np.asarray(_soft(region) * np.clip(width / 0.8, 0, 1), np.float32)


def _subarachnoid(bleed: Bleed, here: Here) -> F32:
    """The fluid of cisterns and sulci, densest near where it bled."""
    near = np.clip(1.3 - _along(bleed, here) / bleed.reach_mm, 0, 1)
    patchy = np.clip(0.75 + 0.55 * here.clouds + 0.2 * here.grain, 0, 1)
    inner = np.clip(0.5 - (here.cavity + 0.3) / 1.2, 0, 1)
    fluid = np.clip(here.subarachnoid * 1.15, 0, 1)
    return np.asarray(fluid * inner * np.minimum(near * 2.2, 1) * patchy, np.float32)


def _intraventricular(bleed: Bleed, here: Here) -> F32:
    """A level at the back of the patient who lies on it, or a cast where it bled."""
    if bleed.place == "cast":
        side = np.float32(np.sign(bleed.centre[0]))
        cast = np.clip(1.1 - _along(bleed, here) / bleed.reach_mm, 0, 1)
        own = np.clip(0.5 + side * here.x / 6, 0, 1)
        return np.asarray(here.ventricle * np.minimum(3 * cast, 1) * own, np.float32)
    surface = bleed.level + 0.6 * here.grain
    return np.asarray(here.ventricle * _soft(surface - here.y, 2.5), np.float32)


class Planner:
    """Chooses the hemorrhages of one study."""

    def __init__(
        self, draw: Draw, config: HeadConfig, shape: Shape, tissues: Tissues, slice_mm: float
    ) -> None:
        """Keep what the choices need; ``slice_mm`` is the thickest slice."""
        self._rng = draw.rng("hemorrhage")
        self._config = config
        self._shape = shape
        self._tissues = tissues
        self._slice_mm = slice_mm

    def plan(self) -> list[Bleed]:
        """Return at least one bleed."""
        config, rng = self._config, self._rng
        shares = {
            "epidural": config.epidural_probability,
            "subdural": config.subdural_probability,
            "subarachnoid": config.subarachnoid_probability,
            "intraparenchymal": config.intraparenchymal_probability,
            "intraventricular": config.intraventricular_probability,
        }
        chosen = [kind for kind in TYPES if rng.uniform() < shares[kind]]
        total = sum(shares.values())
        if not chosen:
            weights = [shares[k] / total if total > 0 else 1 / len(TYPES) for k in TYPES]
            chosen = [str(rng.choice(TYPES, p=weights))]
        makers = {
            "epidural": self._epidural,
            "subdural": self._subdural,
            "subarachnoid": self._subarachnoid,
            "intraparenchymal": self._intraparenchymal,
            "intraventricular": self._intraventricular,
        }
        return [bleed for kind in chosen for bleed in makers[kind]()]

    def _make(self, kind: str, place: str, centre: Point, size: Point, reach: float) -> Bleed:
        config, rng = self._config, self._rng
        age = float(rng.uniform(*config.age_of_blood_days)) * float(rng.uniform()) ** 1.5
        hu = self._tissues.clot + rng.uniform(-4, 4) - _FALL_HU_PER_DAY * age
        extra = kind in {"epidural", "subdural"}
        moves = kind in MASS_TYPES
        smallest = min(size) if kind == "intraparenchymal" else size[0]
        return Bleed(
            kind=kind,
            place=place,
            centre=centre,
            size=size,
            reach_mm=reach,
            hu=float(hu),
            age_days=age,
            edema_mm=float(rng.uniform(*config.edema_mm)) * min(1.0, smallest / 8 + age / 20),
            layering_hu=float(rng.uniform(0, 26)) if extra and rng.uniform() < 0.25 else 0.0,
            swirl=float(rng.uniform(0.2, 1)) if extra and rng.uniform() < 0.35 else 0.0,
            level=0.0,
            push_mm=float(rng.uniform(*config.mass_effect)) * smallest if moves else 0.0,
            angle=float(rng.uniform(0, np.pi)),
        )

    def _on_vault(self, side: float, y: float, z: float) -> Point:
        """Return the place of the inner table at (y, z), on one side."""
        inner = 1 - (abs(y) / 86.0) ** _VAULT_POWER - (max(z - 2, 0) / 74.0) ** _VAULT_POWER
        wide = float(half_width(np.asarray([y], np.float32))[0])
        return (side * wide * max(inner, 0.02) ** (1 / _VAULT_POWER), y, z)

    def _side(self) -> tuple[float, str]:
        side = float(self._rng.choice([-1.0, 1.0]))
        return side, "left" if side > 0 else "right"

    def _thickness(self) -> float:
        low, high = self._config.thickness_mm
        return float(np.exp(self._rng.uniform(np.log(low), np.log(high))))

    def _epidural(self) -> list[Bleed]:
        side, name = self._side()
        rng = self._rng
        region, y, z = [
            ("temporal", rng.uniform(-36, 8), rng.uniform(-12, 16)),
            ("frontal", rng.uniform(-66, -40), rng.uniform(2, 45)),
            ("parietal", rng.uniform(5, 60), rng.uniform(12, 52)),
        ][int(rng.choice(3, p=[0.5, 0.22, 0.28]))]
        thickness = max(self._thickness(), 3.0)
        half = thickness * float(rng.uniform(1.3, 2.6)) + 6.0
        centre = self._on_vault(side, float(y), float(z))
        size = (thickness, thickness, thickness)
        return [self._make("epidural", f"{name} {region}", centre, size, half)]

    def _subdural(self) -> list[Bleed]:
        side, name = self._side()
        rng = self._rng
        thickness = self._thickness()
        pick = rng.uniform()
        if pick < 0.12:
            thickness = min(thickness, 7.0)
            centre: Point = (side * 2, float(rng.uniform(20, 75)), float(rng.uniform(15, 45)))
            reach = float(rng.uniform(25, 50))
            place = f"{name} falx"
        elif pick < 0.22:
            thickness = min(thickness, 6.0)
            centre = (side * float(rng.uniform(15, 35)), float(rng.uniform(30, 65)), -5.0)
            reach, place = float(rng.uniform(22, 45)), f"{name} tentorium"
        else:
            thickness = min(thickness, 20.0)
            centre = self._on_vault(side, float(rng.uniform(-45, 45)), float(rng.uniform(5, 45)))
            reach, place = float(rng.uniform(42, 95)), f"{name} convexity"
        return [self._make("subdural", place, centre, (thickness,) * 3, reach)]

    def _subarachnoid(self) -> list[Bleed]:
        rng = self._rng
        if rng.uniform() < 0.5:
            centre, place = _CISTERNS, "cisterns"
            reach = float(rng.uniform(22, 75))
        else:
            side, name = self._side()
            y, z = float(rng.uniform(-60, 60)), float(rng.uniform(0, 55))
            x, y, z = self._on_vault(side, y, z)
            centre, place = (0.93 * x, 0.93 * y, 0.93 * z), f"{name} convexity"
            reach = float(rng.uniform(16, 48))
        return [self._make("subarachnoid", place, centre, (reach,) * 3, reach)]

    def _intraparenchymal(self) -> list[Bleed]:
        rng = self._rng
        count = int(rng.choice([1, 2, 3], p=[0.78, 0.14, 0.08]))
        found: list[Bleed] = []
        for k in range(count):
            side, name = self._side()
            places: list[tuple[str, Point, float]] = [
                (f"{name} putamen", (side * 27, rng.uniform(-18, 4), rng.uniform(0, 9)), 0.33),
                (f"{name} thalamus", (side * 12, rng.uniform(2, 12), rng.uniform(3, 9)), 0.15),
                (f"{name} lobe", self._lobe(side), 0.36),
                (
                    f"{name} cerebellum",
                    (side * 22, rng.uniform(40, 58), rng.uniform(-42, -26)),
                    0.1,
                ),
                ("pons", (rng.uniform(-4, 4), 11.0, rng.uniform(-34, -24)), 0.06),
            ]
            weights = np.array([p[2] for p in places])
            place, centre, _ = places[int(rng.choice(len(places), p=weights / weights.sum()))]
            low, high = self._config.diameter_mm
            high = {"pons": 20.0}.get(place, 38.0 if "cerebellum" in place else high)
            high = min(high, 32.0) if "thalamus" in place else high
            low = max(low, 1.1 * self._slice_mm) if k == 0 else low
            diameter = float(np.exp(rng.uniform(np.log(low), np.log(max(high, low)))))
            if k:
                diameter = min(diameter, 16.0)
            aspect = np.exp(rng.normal(0, 0.16, 3))
            a, b, c = (float(v) for v in diameter / 2 * aspect / aspect.prod() ** (1 / 3))
            mx, my, mz = (float(v) for v in centre)
            made = self._make("intraparenchymal", place, (mx, my, mz), (a, b, c), diameter)
            found.append(made)
            if k == 0 and diameter > 18 and rng.uniform() < 0.45 and "lobe" not in place:
                found += self._intraventricular()
        return found

    def _lobe(self, side: float) -> Point:
        rng = self._rng
        x, y, z = self._on_vault(side, float(rng.uniform(-62, 68)), float(rng.uniform(-4, 50)))
        deep = float(rng.uniform(0.62, 0.86))
        return (deep * x, deep * y, deep * z)

    def _intraventricular(self) -> list[Bleed]:
        rng = self._rng
        if rng.uniform() < 0.35:
            side, _ = self._side()
            centre: Point = (side * 12, float(rng.uniform(-25, 20)), 19.0)
            reach = float(rng.uniform(14, 50))
            return [self._make("intraventricular", "cast", centre, (reach,) * 3, reach)]
        made = self._make("intraventricular", "level", (0.0, 40.0, 10.0), (10.0,) * 3, 60.0)
        return [replace(made, level=float(rng.uniform(14, 46)))]


def displacement(bleeds: list[Bleed], here: Here) -> tuple[F32, F32, F32] | None:
    """From where in the brain a pixel's content comes: reference offsets (x, y, z) in mm."""
    moving = [b for b in bleeds if b.push_mm > 0.3]
    if not moving:
        return None
    out = [np.zeros_like(here.x) for _ in range(3)]
    for bleed in moving:
        x, y, z = bleed.centre
        offset = (here.x - x, here.y - y, here.z - z)
        away = np.sqrt(sum(o * o for o in offset)) + np.float32(1e-3)
        if bleed.kind == "intraparenchymal":
            reach = max(bleed.size) + 14.0
            amount = bleed.push_mm * (away / (0.6 * reach)) * np.exp(0.5 - (away / reach) ** 2)
            for axis in range(3):
                out[axis] -= amount * offset[axis] / away
        else:
            reach = 0.6 * bleed.reach_mm + 22.0
            inward = np.array([-x, -y, -0.5 * z]) / (np.hypot(np.hypot(x, y), z) + 1e-6)
            amount = bleed.push_mm * np.exp(-((away / reach) ** 2))
            for axis in range(3):
                out[axis] -= amount * np.float32(inward[axis])
    fixed = np.clip(-here.cavity / 9.0, 0, 1)
    stem = 1 - bump(here.z, -30, 22) * bump(here.x, 0, 25) * np.float32(0.7)
    return (out[0] * fixed * stem, out[1] * fixed * stem, out[2] * fixed * stem)
