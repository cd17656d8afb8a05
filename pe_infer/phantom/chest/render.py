"""Paints a patient slice by slice: organs, then bones, airways and vessels, then emboli."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pe_infer.phantom.acquisition import Layout
from pe_infer.phantom.chest.anatomy import Anatomy
from pe_infer.phantom.chest.clots import CALCIUM_HU, EmbolusPlan
from pe_infer.phantom.chest.tissues import Tissues
from pe_infer.phantom.raster import F32, Box, Capsules, Lattice, Upsampler, add_occupancy

_CHUNK_MM = 25.0
_FISSURE_MM = 0.35  # thickness of two layers of pleura
_FINE = ("airway_wall", "airway", "plug", "soft", "vein", "artery")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Everything to be painted, in patient coordinates.

    ``capsules`` holds the classes bone, marrow, cartilage, airway_wall, airway, plug, soft, vein
    and artery.
    """

    layout: Layout
    anatomy: Anatomy
    tissues: Tissues
    capsules: dict[str, Capsules]
    background: F32
    emboli: tuple[EmbolusPlan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Painted:
    """One slice without noise.

    Attributes:
        hu: (rows, cols) float32 without emboli.
        artery: (rows, cols) float32 occupancy of arterial lumen.
        emboli: Per embolus that touches the slice: index, pixel box, occupancy in the box.
        drop_hu: (rows, cols) float32 fall in HU by the emboli; None without any.
    """

    hu: F32
    artery: F32
    emboli: tuple[tuple[int, Box, F32], ...]
    drop_hu: F32 | None


def _occupancy(level: F32) -> F32:
    out = 0.5 - level
    np.clip(out, 0.0, 1.0, out=out)
    return out


def _blend(hu: F32, box: Box, occupancy: F32, value: F32 | float) -> None:
    """Cover ``hu`` in ``box`` by ``occupancy`` of ``value``."""
    view = hu[box]
    view += occupancy * (np.asarray(value, np.float32) - view)


class Painter:
    """Paints the slices of one scene in ascending order."""

    def __init__(self, scene: Scene) -> None:
        """Prepare the interpolation and the window of the lungs."""
        self._scene = scene
        self._buffers: dict[str, F32] = {}  # reused from chunk to chunk
        layout, anatomy = scene.layout, scene.anatomy
        self._x, self._y = layout.axis(0), layout.axis(1)
        self._up = Upsampler(anatomy.lattice, self._x, self._y)
        self._full: Box = (slice(0, layout.matrix), slice(0, layout.matrix))
        self._trunk = (
            self._up.box(np.asarray(anatomy.body_mm.min(0), np.float32), 2.0) or self._full
        )
        self._chest = (
            self._up.box(np.asarray(anatomy.lung_mm.min(0), np.float32), 10.0) or self._full
        )

    def slices(self) -> Iterator[Painted]:
        """Yield every slice, from the lowest position up."""
        layout = self._scene.layout
        count = len(layout.z_mm)
        per_chunk = max(1, int(_CHUNK_MM / layout.spacing_mm))
        for begin in range(0, count, per_chunk):
            members = range(begin, min(begin + per_chunk, count))
            low = layout.profile(members[0])[0]
            last, weights = layout.profile(members[-1])
            fine = self._rasterise(low, last + len(weights))
            clots = self._rasterise_emboli(low, last + len(weights))
            for index in members:
                yield self._paint(index, low, fine, clots)

    def air(self, index: int) -> F32:
        """Return (rows, cols) float32: 0 in soft tissue to 1 deep in the lungs."""
        plane = self._up.plane(self._scene.anatomy.lung_mm, float(self._scene.layout.z_mm[index]))
        return self._up.up(np.clip(0.3 - plane / 35, 0, 1), self._full)

    def _lattice(self, low: int, high: int, box: Box) -> Lattice:
        layout = self._scene.layout
        rows, cols = box
        return Lattice(
            origin_mm=(
                float(self._x[cols.start]),
                float(self._y[rows.start]),
                layout.first_subplane_mm + low * layout.subplane_mm,
            ),
            step_mm=(layout.pixel_mm, layout.pixel_mm, layout.subplane_mm),
            shape=(high - low, rows.stop - rows.start, cols.stop - cols.start),
        )

    def _rasterise(self, low: int, high: int) -> dict[str, F32]:
        edge = self._scene.layout.pixel_mm
        out: dict[str, F32] = {}
        for name, caps in self._scene.capsules.items():
            lattice = self._lattice(low, high, self._chest if name in _FINE else self._trunk)
            size = int(np.prod(lattice.shape))
            if name not in self._buffers or self._buffers[name].size < size:
                self._buffers[name] = np.empty(size, np.float32)
            out[name] = self._buffers[name][:size].reshape(lattice.shape)
            out[name].fill(0)
            add_occupancy(out[name], caps, lattice, edge)
        return out

    def _rasterise_emboli(self, low: int, high: int) -> list[tuple[int, Box, F32]]:
        """Occupancies of the emboli on the sub-planes of a chunk, each in its own pixel box."""
        layout = self._scene.layout
        z0 = layout.first_subplane_mm + low * layout.subplane_mm
        z1 = layout.first_subplane_mm + high * layout.subplane_mm
        found: list[tuple[int, Box, F32]] = []
        for number, plan in enumerate(self._scene.emboli):
            lower, upper = plan.capsules.bounds()
            if lower[:, 2].min() > z1 or upper[:, 2].max() < z0:
                continue
            corner, far = lower.min(0) - 1.0, upper.max(0) + 1.0
            r0, r1 = np.clip(np.searchsorted(self._y, (corner[1], far[1])), 0, layout.matrix)
            c0, c1 = np.clip(np.searchsorted(self._x, (corner[0], far[0])), 0, layout.matrix)
            if r0 >= r1 or c0 >= c1:
                continue
            box = (slice(int(r0), int(r1)), slice(int(c0), int(c1)))
            lattice = self._lattice(low, high, box)
            occupancy = np.zeros(lattice.shape, np.float32)
            add_occupancy(occupancy, plan.capsules, lattice, layout.pixel_mm)
            if plan.channel is not None:
                free = np.zeros(lattice.shape, np.float32)
                add_occupancy(free, plan.channel, lattice, layout.pixel_mm)
                occupancy *= 1 - free
            found.append((number, box, occupancy))
        return found

    def _calcium(self, index: int, plan: EmbolusPlan, box: Box) -> F32 | None:
        """Occupancy of the calcified part of an embolus in a pixel box."""
        if plan.calcium is None:
            return None
        first, weights = self._scene.layout.profile(index)
        lattice = self._lattice(first, first + len(weights), box)
        planes = np.zeros(lattice.shape, np.float32)
        add_occupancy(planes, plan.calcium, lattice, self._scene.layout.pixel_mm)
        return np.asarray(np.tensordot(weights, planes, 1), np.float32)

    def _mean(self, planes: F32, index: int, low: int) -> F32:
        first, weights = self._scene.layout.profile(index)
        out: F32 = planes[first - low] * weights[0]
        for k in range(1, len(weights)):
            out += planes[first - low + k] * weights[k]
        return out

    def _field(self, name: str, z_mm: float) -> tuple[Box, F32] | None:
        """Box and occupancy of a coarse organ in the slice at ``z_mm``; None where it is absent."""
        volume = self._scene.anatomy.levels.get(name)
        if volume is None:
            return None
        plane = self._up.plane(volume, z_mm)
        box = self._up.box(plane, 0.5)
        return None if box is None else (box, _occupancy(self._up.up(plane, box)))

    def _paint(
        self, index: int, low: int, fine: dict[str, F32], clots: list[tuple[int, Box, F32]]
    ) -> Painted:
        scene, up = self._scene, self._up
        anatomy, tissues, layout = scene.anatomy, scene.tissues, scene.layout
        z = float(layout.z_mm[index])
        hu = scene.background.copy()
        body = self._body(hu, z)
        grain, clouds = up.plane(anatomy.grain, z), up.plane(anatomy.clouds, z)
        for name in ("muscle", "inner"):
            if (part := self._field(name, z)) is not None:
                _blend(hu, *part, tissues.plain[name])
        if (part := self._field("lung", z)) is not None:
            self._lung(hu, part, z, clouds, grain)
        for name in ("fluid", "dense", "liver", "spleen", "stomach", "gas"):
            if (part := self._field(name, z)) is not None:
                _blend(hu, *part, tissues.plain[name])
        self._bones(hu, index, low, z, fine)
        chest = self._chest
        aerated = self._lung_share(z)
        _blend(hu, chest, self._mean(fine["soft"], index, low), tissues.plain["soft"])
        for name in ("airway_wall", "airway", "plug"):
            if len(scene.capsules[name]):
                _blend(hu, chest, self._mean(fine[name], index, low) * aerated, tissues.plain[name])
        fall = self._fall(z)
        flow = up.up(clouds, chest)
        _blend(hu, chest, self._mean(fine["vein"], index, low) * aerated, tissues.vein_hu(flow))
        thin = self._mean(fine["artery"], index, low) * aerated
        lumen = tissues.artery_hu(flow, None if fall is None else fall[chest])
        _blend(hu, chest, thin, lumen)
        artery = np.zeros_like(hu)
        artery[chest] = thin
        self._central(hu, artery, z, (clouds, grain), fall)
        jitter = tissues.texture_hu * (0.75 * grain + 0.5 * clouds)
        box = up.box(up.plane(anatomy.body_mm, z), 0.0) or self._full
        hu[box] += body[box] * up.up(np.asarray(jitter, np.float32), box)
        here, drop = self._emboli(index, low, clots, artery, clouds, fall)
        return Painted(hu=hu, artery=artery, emboli=here, drop_hu=drop)

    def _fall(self, z: float) -> F32 | None:
        """(rows, cols) share of the contrast that has arrived; None if it is the same all over."""
        fade = self._scene.tissues.distal_fade
        if not fade:
            return None
        k = int(np.argmin(np.abs(self._scene.anatomy.lattice.axis(2) - z)))
        point = self._scene.anatomy.reference[k]
        away = np.hypot(np.abs(point[..., 0]) - 30, 0.6 * (point[..., 2] + 20))
        plane = 1 - fade * np.clip((away - 12) / 70, 0, 1)
        return self._up.up(np.asarray(plane, np.float32), self._full)

    def _lung_share(self, z: float) -> F32 | float:
        """Share of each pixel of the chest window that is not beyond diaphragm or fluid."""
        part = self._field("airless", z)
        if part is None:
            return 1.0
        covered = np.zeros((self._scene.layout.matrix,) * 2, np.float32)
        covered[part[0]] = part[1]
        return np.asarray(1 - covered[self._chest], np.float32)

    def _body(self, hu: F32, z: float) -> F32:
        plane = self._up.plane(self._scene.anatomy.body_mm, z)
        body = np.zeros_like(hu)
        box = self._up.box(plane, 2.0)
        if box is None:
            return body
        distance = self._up.up(plane, box)
        width = self._scene.layout.pixel_mm * 1.2
        body[box] = np.clip(0.5 - distance / width, 0, 1)
        _blend(hu, box, body[box], self._scene.tissues.plain["skin"])
        under = np.clip(0.5 - (distance + self._scene.tissues.skin_mm) / width, 0, 1)
        _blend(hu, box, under, self._scene.tissues.plain["fat"])
        return body

    def _lung(self, hu: F32, part: tuple[Box, F32], z: float, clouds: F32, grain: F32) -> None:
        box, occupancy = part
        tissues = self._scene.tissues
        k = int(np.argmin(np.abs(self._scene.anatomy.lattice.axis(2) - z)))
        depth = self._scene.anatomy.reference[k, :, :, 1]
        value = (
            tissues.plain["lung"] + tissues.lung_slope_hu * depth / 100 + 14 * clouds + 9 * grain
        )
        value -= tissues.emphysema_hu * np.clip(clouds + 0.5 * grain - 0.6, 0, 1)
        if tissues.ground_glass_hu:
            value += tissues.ground_glass_hu * np.clip(0.25 * grain - clouds - 0.4, 0, 1.6) / 1.6
        _blend(
            hu, box, occupancy, np.maximum(self._up.up(np.asarray(value, np.float32), box), -985.0)
        )
        self._fissures(hu, part, z)

    def _fissures(self, hu: F32, lung: tuple[Box, F32], z: float) -> None:
        """Thin sheets of soft tissue, blurred by pixel and slice."""
        layout = self._scene.layout
        box, inside = lung
        share = _FISSURE_MM / np.hypot(layout.pixel_mm, 0.7 * layout.thickness_mm)
        for name in ("fissure_oblique", "fissure_minor"):
            volume = self._scene.anatomy.levels.get(name)
            if volume is not None:
                level = self._up.up(self._up.plane(volume, z), box)
                sheet = np.clip(1 - np.abs(level), 0, 1) * np.float32(min(share, 1.0))
                _blend(hu, box, inside * sheet, 0.0)

    def _bones(self, hu: F32, index: int, low: int, z: float, fine: dict[str, F32]) -> None:
        tissues, up = self._scene.tissues, self._up
        _blend(
            hu, self._trunk, self._mean(fine["cartilage"], index, low), tissues.plain["cartilage"]
        )
        plane = up.plane(self._scene.anatomy.spine_mm, z)
        box = up.box(plane, 2.0)
        if box is not None:
            distance = up.up(plane, box)
            width = self._scene.layout.pixel_mm * 1.3
            rim, core = tissues.vertebra_hu(z)
            _blend(hu, box, np.clip(0.5 - distance / width, 0, 1), rim)
            _blend(hu, box, np.clip(0.5 - (distance + 1.6) / width, 0, 1), core)
        for name in ("bone", "marrow"):
            _blend(hu, self._trunk, self._mean(fine[name], index, low), tissues.plain[name])
        plane = up.plane(self._scene.anatomy.canal, z)
        box = up.box(plane, 1.0)
        if box is not None:
            _blend(hu, box, np.clip(0.5 - up.up(plane, box), 0, 1), tissues.plain["canal"])

    def _central(
        self, hu: F32, artery: F32, z: float, noise: tuple[F32, F32], fall: F32 | None
    ) -> None:
        """Heart and great vessels, over whatever lay there; the pulmonary trunk comes last."""
        tissues, up = self._scene.tissues, self._up
        clouds, grain = noise
        if (part := self._field("oesophagus", z)) is not None:
            _blend(hu, *part, tissues.plain["oesophagus"])
        plane = up.plane(self._scene.anatomy.airway_mm, z)
        box = up.box(plane, 3.0)
        if box is not None:
            distance, width = up.up(plane, box), self._scene.layout.pixel_mm * 1.2
            _blend(
                hu, box, np.clip(0.5 - (distance - 1.3) / width, 0, 1), tissues.plain["airway_wall"]
            )
            _blend(hu, box, np.clip(0.5 - distance / width, 0, 1), -985.0)
        for name in tissues.blood_order:
            part = self._field(name, z)
            if part is None:
                continue
            box, occupancy = part
            if name == "artery":
                arrived = None if fall is None else fall[box]
                value = tissues.artery_hu(up.up(clouds, box), arrived)
            else:
                value = tissues.blood_hu(name, up.up(clouds, box), up.up(grain, box))
            _blend(hu, box, occupancy, value)
            if name == "artery":
                np.maximum(artery[box], occupancy, out=artery[box])
            else:
                artery[box] *= 1 - occupancy

    def _emboli(
        self,
        index: int,
        low: int,
        clots: list[tuple[int, Box, F32]],
        artery: F32,
        clouds: F32,
        fall: F32 | None,
    ) -> tuple[tuple[tuple[int, Box, F32], ...], F32 | None]:
        here: list[tuple[int, Box, F32]] = []
        drop: F32 | None = None
        for number, box, planes in clots:
            occupancy = np.minimum(self._mean(planes, index, low), artery[box])
            if not occupancy.any():
                continue
            here.append((number, box, occupancy))
            if drop is None:
                drop = np.zeros_like(artery)
            arrived = None if fall is None else fall[box]
            lumen = self._scene.tissues.artery_hu(self._up.up(clouds, box), arrived)
            plan = self._scene.emboli[number]
            change = occupancy * np.maximum(lumen - np.float32(plan.hu), 0)
            np.maximum(drop[box], change, out=drop[box])
            if (lime := self._calcium(index, plan, box)) is not None:
                drop[box] -= occupancy * lime * np.float32(CALCIUM_HU - plan.hu)
        return tuple(here), drop
