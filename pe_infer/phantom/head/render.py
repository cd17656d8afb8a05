"""Paints planes of the fine lattice: what the skull holds, then the skull and all around it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pe_infer.phantom.head.brain import Brain, Shape, sylvian_height
from pe_infer.phantom.head.layout import HeadLayout
from pe_infer.phantom.head.skull import Skull
from pe_infer.phantom.head.tissues import Tissues
from pe_infer.phantom.raster import F32, Box, Capsules, Upsampler, add_occupancy

_EDGE_MM = np.float32(1.0)  # surfaces are blurred by this much before they are averaged
_CALLOSUM = (0.0, 6.0, 41.0, 25.0)  # middle (y, z) and half-axes of what lies under the fissure
_FALX = (6.0, -2.0, 56.0, 45.0)  # free edge of the falx


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Everything to be painted.

    Attributes:
        layout: Where.
        reference: Reference coordinates x, y, z on the coarse lattice, (w, v, u).
        grain: Smooth noise of unit variance, correlated over about 4 mm.
        clouds: Over about 15 mm.
        shape: Widths of thin structures.
        brain: Fields.
        skull: Fields.
        tissues: HU.
        vessels: In gantry coordinates.
        calcium: In gantry coordinates, with HU.
    """

    layout: HeadLayout
    reference: tuple[F32, F32, F32]
    grain: F32
    clouds: F32
    shape: Shape
    brain: Brain
    skull: Skull
    tissues: Tissues
    vessels: Capsules
    calcium: tuple[tuple[Capsules, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """One plane of what the skull holds, (v, u) float32.

    Attributes:
        hu: Values; beyond the inner table they go on as fluid.
        subarachnoid: Share of fluid outside the brain.
        ventricle: Share of fluid inside the brain.
    """

    hu: F32
    subarachnoid: F32
    ventricle: F32


def inside(distance: F32, edge_mm: float | np.float32 = _EDGE_MM) -> F32:
    """Return occupancy of a signed distance, blurred by an edge."""
    out = np.asarray(distance, np.float32) * np.float32(-1 / edge_mm)
    out += np.float32(0.5)
    return np.clip(out, 0, 1, out=out)


def _cover(hu: F32, share: F32, value: F32 | float) -> None:
    hu += share * (np.asarray(value, np.float32) - hu)


class Planes:
    """Brings coarse fields to planes of the fine lattice."""

    def __init__(self, scene: Scene) -> None:
        """Prepare the interpolation."""
        self._scene = scene
        fine = scene.layout.fine
        self._up = Upsampler(scene.layout.coarse, fine.axis(0), fine.axis(1))
        self._full: Box = (slice(0, fine.shape[1]), slice(0, fine.shape[2]))
        self._w = fine.axis(2)

    def at(self, volume: F32, plane: int) -> F32:
        """Interpolate a coarse field: (v, u) float32."""
        return self._up.up(self._up.plane(volume, float(self._w[plane])), self._full)

    def near(self, volume: F32, plane: int, below: float) -> F32 | None:
        """Interpolate it unless it stays above a value in the whole plane."""
        coarse = self._up.plane(volume, float(self._w[plane]))
        return self._up.up(coarse, self._full) if float(coarse.min()) < below else None


def rasterise(scene: Scene, parts: Sequence[Capsules]) -> list[F32 | None]:
    """Occupancy (w, v, u) of each group of capsules on the fine lattice; None if it is empty."""
    fine = scene.layout.fine
    found: list[F32 | None] = []
    for caps in parts:
        volume = np.zeros(fine.shape, np.float32)
        add_occupancy(volume, caps, fine, float(_EDGE_MM))
        found.append(volume if len(caps) else None)
    return found


def _above(y: F32, z: F32, ellipse: tuple[float, float, float, float]) -> F32:
    """Signed distance (negative outside the ellipse) in the plane of the falx."""
    y0, z0, ry, rz = ellipse
    level = np.sqrt(((y - y0) / ry) ** 2 + ((z - z0) / rz) ** 2)
    return np.asarray((1 - level) * np.float32(0.5 * (ry + rz)), np.float32)


class Painter:
    """Paints planes of one scene in any order."""

    def __init__(self, scene: Scene) -> None:
        """Rasterise what is thin."""
        self._scene = scene
        self.planes = Planes(scene)
        groups = [scene.vessels, *(caps for caps, _ in scene.calcium)]
        self._vessels, *self._calcium = rasterise(scene, groups)

    def content(self, k: int) -> Content:
        """Paint what the skull holds in plane ``k``, without hemorrhage."""
        scene, at = self._scene, self.planes.at
        brain, shape, tissues = scene.brain, scene.shape, scene.tissues
        x, y, z = (at(c, k) for c in scene.reference)
        ax = np.abs(x)
        cavity = at(scene.skull.cavity, k)
        grain, clouds = at(scene.grain, k), at(scene.clouds, k)
        hu = np.full(x.shape, tissues.fluid, np.float32)

        midline = np.abs(at(brain.midline, k))
        callosum = _above(y, z, _CALLOSUM)
        pial = np.maximum(
            cavity + at(brain.gap, k), at(brain.fold_half, k) - np.abs(at(brain.fold, k))
        )
        front_base = np.maximum(-14 - z, y + 32)
        apart = np.where(z > -14, callosum, np.maximum(callosum, front_base))
        pial = np.maximum(pial, np.minimum(shape.fissure_mm - midline, -apart))
        pial = np.maximum(pial, self._insula(ax, y, z, clouds))
        tissue = inside(pial)
        _cover(hu, tissue, tissues.gray + 0.6 * clouds)
        pale = at(brain.pale, k)
        white = tissues.white - pale
        _cover(hu, inside(pial + shape.cortex_mm, 1.6), white)
        _cover(hu, tissue * inside(at(brain.nuclei, k), 2.0), tissues.gray - 0.5)
        ventricle = at(brain.ventricle, k)
        cistern = at(brain.cistern, k)
        fluid = inside(cistern)
        subarachnoid = np.maximum(1 - tissue, fluid)
        _cover(hu, fluid, tissues.fluid)
        infra = inside(at(brain.infra, k))
        if infra.any():
            self._infratentorial(k, hu, subarachnoid, infra, (ax, y, z, grain))
        stem = self.planes.near(brain.stem, k, 1.0)
        if stem is not None:
            share = inside(stem)
            _cover(hu, share, tissues.stem)
            subarachnoid *= 1 - share
        if brain.infarct is not None:
            lost = self.planes.near(brain.infarct, k, 3.0)
            if lost is not None:
                _cover(hu, inside(lost, 3.0) * (1 - subarachnoid), tissues.infarct)
        wet = inside(ventricle)
        _cover(hu, wet, tissues.fluid)
        subarachnoid *= 1 - wet
        hu += tissues.texture * (0.7 * grain + 0.5 * clouds) * (1 - 0.7 * subarachnoid)
        self._membranes(k, hu, subarachnoid, (ax, y, z, midline))
        if self._vessels is not None:
            share = self._vessels[k]
            _cover(hu, share, tissues.vessel)
            subarachnoid *= 1 - share
        for occupancy, (_, value) in zip(self._calcium, scene.calcium, strict=True):
            if occupancy is not None:
                _cover(hu, occupancy[k], value)
                subarachnoid *= 1 - occupancy[k]
        return Content(hu=hu, subarachnoid=subarachnoid, ventricle=wet)

    def _insula(self, ax: F32, y: F32, z: F32, clouds: F32) -> F32:
        """Negative distance to the Sylvian fissure and the sulcus around the insula."""
        half = np.float32(self._scene.shape.sylvian_mm)
        low = sylvian_height(y) + 2.0 * clouds
        wider = half * (0.8 + 0.6 * np.clip((-y - 10) / 25, 0, 1) + 0.3 * clouds)
        fissure = np.maximum(np.abs(z - low) - wider, np.maximum(34.5 - ax, np.abs(y + 6) - 34))
        island = np.maximum(
            np.abs(ax - 37.5 - 0.12 * y + 0.006 * (y + 9) ** 2 - 2.0 * clouds)
            - half * (0.65 + 0.45 * clouds),
            np.maximum(np.maximum(low - 3 - z, z - low - 21), np.abs(y + 9) - 23),
        )
        return np.asarray(-np.minimum(fissure, island), np.float32)

    def _infratentorial(
        self,
        k: int,
        hu: F32,
        subarachnoid: F32,
        infra: F32,
        point: tuple[F32, F32, F32, F32],
    ) -> None:
        ax, y, z, grain = point
        tissues = self._scene.tissues
        cerebellum = self.planes.at(self._scene.brain.cerebellum, k)
        share = inside(cerebellum)
        leaf = np.sin((z + 0.35 * y + 0.25 * ax + 0.7 * grain) * np.float32(2 * np.pi / 4.6))
        own = np.full_like(hu, tissues.fluid)
        fissures = np.clip((6 + cerebellum) / 6, 0, 1) * self._scene.shape.sulcus_mm
        _cover(own, share, tissues.cerebellum + 1.2 * leaf - 5 * fissures * np.maximum(leaf, 0))
        core = np.sqrt(((ax - 20) / 15) ** 2 + ((y - 40) / 14) ** 2 + ((z + 34) / 8) ** 2) - 1
        _cover(own, share * inside(np.asarray(core * 9, np.float32), 5.0), tissues.white + 2)
        _cover(hu, infra, own)
        subarachnoid += infra * ((1 - share) - subarachnoid)

    def _membranes(
        self, k: int, hu: F32, subarachnoid: F32, point: tuple[F32, F32, F32, F32]
    ) -> None:
        """Falx and tentorium."""
        ax, y, z, midline = point
        scene, at = self._scene, self.planes.at
        tentorium = at(scene.brain.tentorium, k)
        edge = np.maximum(_above(y, z, _FALX), 10 - z - 0.9 * np.maximum(-y - 30, 0))
        edge = np.where(y > 26, 1.0 - tentorium, edge)
        share = inside(np.maximum(midline - scene.shape.falx_mm, edge))
        petrous = at(scene.skull.petrous, k)
        opening = np.interp(y, (0.0, 12.0, 26.0, 38.0), (17.0, 17.0, 12.0, 0.0)) - ax
        sheet = np.maximum(np.abs(tentorium) * 0.92 - scene.shape.tentorium_mm, opening)
        share = np.maximum(share, inside(np.maximum(sheet, 1.0 - petrous), 1.8))
        skirt = np.maximum(
            np.abs(petrous) - scene.shape.tentorium_mm, np.maximum(tentorium, -z - 22)
        )
        share = np.maximum(share, inside(np.maximum(skirt, 13.0 - ax)))
        _cover(hu, share, scene.tissues.dura)
        subarachnoid *= 1 - share

    def surround(self, k: int, content: F32) -> tuple[F32, F32]:
        """Put the content of the skull into the head.

        Args:
            k: Plane.
            content: (v, u) HU; not changed.

        Returns:
            HU with air around the head, and the share of each pixel that is not content.
        """
        scene, planes, tissues = self._scene, self.planes, self._scene.tissues
        skull, at = scene.skull, planes.at
        grain, clouds = at(scene.grain, k), at(scene.clouds, k)
        cavity, skin = at(skull.cavity, k), at(skull.skin, k)
        hu = np.full(content.shape, -1000.0, np.float32)
        body = inside(skin, 1.2)
        _cover(hu, body, tissues.skin)
        _cover(hu, inside(skin + 2.0, 1.2), tissues.fat + 4 * clouds)
        muscle = planes.near(skull.muscle, k, 1.0)
        if muscle is not None:
            _cover(hu, inside(muscle) * inside(skin + 3), tissues.muscle + 3 * clouds)
        self._orbits(k, hu)
        vault = at(skull.vault, k)
        outer = np.minimum(vault - cavity, cavity)  # depth from the nearer surface of the bone
        _cover(hu, inside(cavity - vault), tissues.table + 60 * clouds)
        deep = inside(1.5 + 0.12 * vault - outer + 0.25 * grain, 1.4)
        _cover(hu, deep, tissues.diploe + 130 * grain)
        self._base(k, hu, skin, (grain, clouds))
        held = inside(cavity)
        _cover(hu, held, content)
        return hu, np.asarray(1 - held, np.float32)

    def _orbits(self, k: int, hu: F32) -> None:
        skull, tissues = self._scene.skull, self._scene.tissues
        parts = (
            (skull.orbit, tissues.orbit),
            (skull.optic, tissues.muscle - 15),
            (skull.globe, tissues.globe + 30),
        )
        for volume, value in parts:
            field = self.planes.near(volume, k, 1.0)
            if field is not None:
                _cover(hu, inside(field), value)
                if volume is skull.globe:
                    _cover(hu, inside(field + 1.4), tissues.globe)
        lens = self.planes.near(skull.lens, k, 1.0)
        if lens is not None:
            _cover(hu, inside(lens), tissues.lens)

    def _base(self, k: int, hu: F32, skin: F32, noise: tuple[F32, F32]) -> None:
        grain, clouds = noise
        skull, tissues, planes = self._scene.skull, self._scene.tissues, self.planes
        base = planes.near(skull.base, k, 1.0)
        if base is not None:
            rim = inside(base)
            _cover(hu, rim, tissues.base + 350 + 80 * clouds)
            _cover(hu, inside(base + 1.8, 1.5), tissues.base + 170 * grain + 60 * clouds)
        walls = planes.near(skull.walls, k, 1.0)
        if walls is not None:
            _cover(hu, inside(walls, 1.4) * 0.8, tissues.base)
        cells = planes.near(skull.cells, k, 1.0)
        if cells is not None:
            bubbles = inside(cells) * np.clip((grain + 0.15) * 2.2, 0, 1)
            _cover(hu, inside(cells + 0.5), tissues.cells)
            _cover(hu, bubbles, -880.0)
        air = planes.near(skull.air, k, 1.0)
        if air is not None:
            _cover(hu, inside(air), -980.0)
        if skull.fluid is not None:
            fluid = planes.near(skull.fluid, k, 1.0)
            if fluid is not None:
                _cover(hu, inside(fluid) * inside(skin + 3), tissues.secretion)
