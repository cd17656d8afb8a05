"""Synthetic contrast chest CT studies with and without pulmonary emboli, and their ground truth."""

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pe_infer.errors import ConfigurationError
from pe_infer.geometry import SeriesInfo, Slice, SliceGeometry
from pe_infer.phantom.acquisition import Layout
from pe_infer.phantom.chest.anatomy import build_anatomy, coarse_lattice
from pe_infer.phantom.chest.clots import EmbolusPlan
from pe_infer.phantom.chest.config import DEFAULT, PhantomConfig
from pe_infer.phantom.chest.emboli import Planner, choose_narrowing
from pe_infer.phantom.chest.findings import confusers
from pe_infer.phantom.chest.frame import Frame, sample_frame
from pe_infer.phantom.chest.layout import sample_layout, table_background
from pe_infer.phantom.chest.lungs import grow_lungs
from pe_infer.phantom.chest.mediastinum import central_vessels
from pe_infer.phantom.chest.render import Painted, Painter, Scene
from pe_infer.phantom.chest.scanner import Scanner
from pe_infer.phantom.chest.skeleton import build_skeleton
from pe_infer.phantom.chest.tissues import sample_tissues
from pe_infer.phantom.chest.tree import narrowed
from pe_infer.phantom.raster import Capsules
from pe_infer.phantom.sampling import Draw
from pe_infer.phantom.truth import as_slices

_COARSE_STEP_MM = 4.0
SERIES: Final = SeriesInfo(
    modality="CT",
    body_part_examined="CHEST",
    protocol_name="CT PE phantom",
    series_description="synthetic chest CT with contrast",
    contrast_bolus_agent="synthetic",
    patient_position="HFS",
    manufacturer="pe_infer phantom",
    series_number=1,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Embolus:
    """One embolus as it appears in the voxels.

    Attributes:
        place: Which artery, e.g. ``"saddle"``, ``"left lower segmental"``.
        kind: occlusive, eccentric, central, irregular, mural or web.
        centre_mm: Patient coordinates (LPS) of a mask voxel near its centroid.
        length_mm: Length along the centre line of the artery, before the scan's borders cut it.
        lumen_radius_mm: Mean radius of the artery along it.
        volume_mm3: Volume within the lumen.
        hu: Its Hounsfield units.
    """

    place: str
    kind: str
    centre_mm: tuple[float, float, float]
    length_mm: float
    lumen_radius_mm: float
    volume_mm3: float
    hu: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PhantomStudy:
    """One synthetic study.

    Attributes:
        slices: Ascending position.
        embolus_mask: (n, rows, cols) bool, at least half of the voxel is embolus.
        artery_mask: (n, rows, cols) bool, at least half of the voxel is lumen of a pulmonary
            artery (emboli included).
        emboli: Largest first; empty in a negative study.
        seed: What it was made from, together with the configuration.
        positive: Whether it has emboli.
        parameters: Values drawn, by name; the same for both studies of a pair.
    """

    slices: tuple[Slice, ...]
    embolus_mask: NDArray[np.bool_]
    artery_mask: NDArray[np.bool_]
    emboli: tuple[Embolus, ...]
    seed: int
    positive: bool
    parameters: dict[str, float | bool | str]

    def mask_slices(self) -> tuple[Slice, ...]:
        """Return the mask as slices of the same geometry: 1000 HU within emboli, 0 elsewhere."""
        return as_slices(self.embolus_mask, self.slices)

    @property
    def lesions(self) -> tuple[Embolus, ...]:
        """The emboli."""
        return self.emboli

    @property
    def lesion_mask(self) -> NDArray[np.bool_]:
        """(n, rows, cols) bool: voxels of emboli."""
        return self.embolus_mask

    def truth(self) -> dict[str, Any]:
        """Emboli and parameters, as values that JSON can hold."""
        volumes: dict[str, float] = {}
        for embolus in self.emboli:
            volumes[embolus.kind] = volumes.get(embolus.kind, 0.0) + embolus.volume_mm3
        return {
            "seed": self.seed,
            "positive": self.positive,
            "emboli": [asdict(embolus) for embolus in self.emboli],
            "volume_mm3_by_kind": volumes,
            "parameters": self.parameters,
        }

    def masks(self) -> dict[str, NDArray[Any]]:
        """``embolus``: (n, rows, cols) bool."""
        return {"embolus": self.embolus_mask}


def generate(seed: int, *, positive: bool, config: PhantomConfig = DEFAULT) -> PhantomStudy:
    """Make one study. The same arguments give the same study, bit by bit, on one machine.

    Raises:
        ConfigurationError: The voxels are so large that no embolus fills half of one.
    """
    return _generate(seed, config, with_emboli=positive)[-1]


def generate_pair(seed: int, config: PhantomConfig = DEFAULT) -> tuple[PhantomStudy, PhantomStudy]:
    """Make a negative and a positive study that differ by nothing but the emboli.

    Anatomy, contrast and noise are the same, voxel by voxel. Slices without emboli share their
    pixels.

    Raises:
        ConfigurationError: The voxels are so large that no embolus fills half of one.
    """
    negative, positive = _generate(seed, config, with_emboli=True)
    return negative, positive


def _uid(*parts: object) -> str:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big')}"


def _scene(draw: Draw, config: PhantomConfig, *, with_emboli: bool) -> tuple[Scene, Frame]:
    frame = sample_frame(draw, config)
    layout = sample_layout(draw, config, frame)
    tissues = sample_tissues(draw, config, frame)
    vessel_scale = draw.uniform("vessel_scale", config.vessel_scale)
    central = central_vessels(draw, vessel_scale)
    trees = grow_lungs(draw, config, vessel_scale)
    narrowing = choose_narrowing(draw, config, trees.arteries)
    if narrowing is not None:
        trees = replace(trees, arteries=narrowed(trees.arteries, *narrowing))
    bones = build_skeleton(draw, config)
    x, y = layout.axis(0), layout.axis(1)
    middle_y = frame.shift_mm[1]
    lattice = coarse_lattice(
        (float(x[0]), float(x[-1])),
        (max(float(y[0]), middle_y - 215), min(float(y[-1]), middle_y + 205)),
        (float(layout.z_mm[0]) - 3, float(layout.z_mm[-1]) + 3),
        _COARSE_STEP_MM,
    )
    anatomy = build_anatomy(
        draw, config, frame, central, trees.hilar(), lattice, layout.pixel_mm, layout.thickness_mm
    )
    airways = frame.capsules(trees.airways)
    wall = Capsules.of(
        airways.start,
        airways.end,
        airways.start_radius_mm * 1.12 + 0.55,
        airways.end_radius_mm * 1.12 + 0.55,
    )
    soft, plugs = confusers(draw, config, frame, trees, anatomy)
    capsules = {
        "bone": frame.capsules(bones.bone),
        "marrow": frame.capsules(bones.marrow),
        "cartilage": frame.capsules(bones.cartilage),
        "airway_wall": wall,
        "airway": airways,
        "plug": plugs,
        "soft": soft,
        "vein": frame.capsules(trees.veins.capsules()),
        "artery": frame.capsules(trees.arteries.capsules()),
    }
    plans: list[EmbolusPlan] = []
    if with_emboli:
        planner = Planner(
            draw,
            config,
            frame,
            trees.arteries,
            vessel_scale=vessel_scale,
            visible_mm=(0.45 * layout.thickness_mm + 0.6 * layout.pixel_mm) / frame.mean_scale,
            narrowing=None if narrowing is None else narrowing[0],
        )
        plans = planner.plan()
    inside = np.flatnonzero((anatomy.body_mm < 0).any((0, 2)))
    back = float(lattice.axis(1)[inside[-1]]) if len(inside) else 150.0
    scene = Scene(
        layout=layout,
        anatomy=anatomy,
        tissues=tissues,
        capsules=capsules,
        background=table_background(draw, layout, back),
        emboli=tuple(plans),
    )
    return scene, frame


class _Truth:
    """Collects the voxels of the emboli."""

    def __init__(self, layout: Layout, plans: tuple[EmbolusPlan, ...]) -> None:
        self._layout = layout
        self._plans = plans
        self._volume = np.zeros(len(plans))
        self._voxels: list[list[NDArray[np.float64]]] = [[] for _ in plans]
        self.mask = np.zeros((len(layout.z_mm), layout.matrix, layout.matrix), bool)

    def add(self, index: int, painted: Painted) -> None:
        layout = self._layout
        voxel = layout.pixel_mm**2 * layout.spacing_mm
        for number, box, occupancy in painted.emboli:
            self._volume[number] += float(occupancy.sum()) * voxel
            rows, cols = np.nonzero(occupancy >= 0.5)
            rows, cols = rows + box[0].start, cols + box[1].start
            self.mask[index, rows, cols] = True
            x = layout.first_pixel_mm[0] + cols * layout.pixel_mm
            y = layout.first_pixel_mm[1] + rows * layout.pixel_mm
            self._voxels[number].append(np.stack([x, y, np.full(len(x), layout.z_mm[index])], 1))

    def emboli(self) -> tuple[Embolus, ...]:
        found: list[Embolus] = []
        for plan, volume, parts in zip(self._plans, self._volume, self._voxels, strict=True):
            voxels = np.concatenate(parts) if parts else np.zeros((0, 3))
            if not len(voxels):
                continue
            nearest = np.argmin(((voxels - voxels.mean(0)) ** 2).sum(1))
            x, y, z = (float(v) for v in voxels[nearest])
            found.append(
                Embolus(
                    place=plan.place,
                    kind=plan.kind,
                    centre_mm=(x, y, z),
                    length_mm=plan.length_mm,
                    lumen_radius_mm=plan.lumen_radius_mm,
                    volume_mm3=float(volume),
                    hu=plan.hu,
                )
            )
        return tuple(sorted(found, key=lambda e: -e.volume_mm3))


def _generate(seed: int, config: PhantomConfig, *, with_emboli: bool) -> list[PhantomStudy]:
    """Make the negative study, and the positive one after it if asked for."""
    draw = Draw(seed)
    scene, frame = _scene(draw, config, with_emboli=with_emboli)
    layout = scene.layout
    scanner = Scanner(draw, config, layout, scene.tissues, frame)
    truth = _Truth(layout, scene.emboli)
    arteries = np.zeros_like(truth.mask)
    plain: list[NDArray[np.int16]] = []
    clotted: list[NDArray[np.int16]] = []
    painter = Painter(scene)
    for index, painted in enumerate(painter.slices()):
        hu = painted.hu
        scanner.streak(hu, index)
        noise = scanner.noise(index, painter.air(index) if scanner.uneven else None)
        plain.append(scanner.store(scanner.blur(hu, index) + noise))
        arteries[index] = painted.artery >= 0.5
        if painted.drop_hu is None:
            clotted.append(plain[-1])
        else:
            truth.add(index, painted)
            clotted.append(scanner.store(scanner.blur(hu - painted.drop_hu, index) + noise))
    emboli = truth.emboli()
    if with_emboli and not emboli:
        raise ConfigurationError(
            f"seed {seed}: no embolus fills half of a voxel of {layout.pixel_mm:.2f} mm and "
            f"{layout.thickness_mm:.1f} mm thickness. Use smaller voxels or another seed."
        )
    studies: list[PhantomStudy] = []
    for positive in (False, True)[: 1 + with_emboli]:
        identity = f"pe_infer phantom/{seed}/{positive}/{config.digest()}"
        studies.append(
            PhantomStudy(
                slices=_slices(identity, scanner, layout, clotted if positive else plain),
                embolus_mask=truth.mask if positive else np.zeros_like(truth.mask),
                artery_mask=arteries,
                emboli=emboli if positive else (),
                seed=seed,
                positive=positive,
                parameters=dict(draw.values),
            )
        )
    return studies


def _slices(
    identity: str, scanner: Scanner, layout: Layout, pixels: list[NDArray[np.int16]]
) -> tuple[Slice, ...]:
    series = replace(
        SERIES,
        series_instance_uid=_uid(identity, "series"),
        study_instance_uid=_uid(identity, "study"),
        frame_of_reference_uid=_uid(identity, "frame"),
        convolution_kernel="LUNG" if scanner.sharpness > 0.66 else "STANDARD",
    )
    return tuple(
        Slice(
            pixels=values,
            geometry=SliceGeometry(
                rows=layout.matrix,
                cols=layout.matrix,
                row_spacing_mm=layout.pixel_mm,
                col_spacing_mm=layout.pixel_mm,
                image_position_mm=(*layout.first_pixel_mm, float(z)),
                thickness_mm=layout.thickness_mm,
            ),
            rescale_intercept=scanner.intercept,
            padding=scanner.padding,
            series=series,
            sop_instance_uid=_uid(identity, "instance", index),
            acquisition_number=1,
            source=f"phantom slice {index}",
        )
        for index, (values, z) in enumerate(zip(pixels, layout.z_mm, strict=True))
    )
