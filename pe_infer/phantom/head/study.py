"""Synthetic head CT studies with and without intracranial hemorrhage, and their ground truth."""

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from pe_infer.errors import ConfigurationError
from pe_infer.geometry import SeriesInfo, Slice, SliceGeometry
from pe_infer.phantom.head.bleeding import BloodPainter
from pe_infer.phantom.head.brain import build_brain, calcifications, sample_shape, vessels
from pe_infer.phantom.head.config import DEFAULT, HeadConfig
from pe_infer.phantom.head.fields import Fields, gantry_capsules
from pe_infer.phantom.head.frame import Frame, sample_frame
from pe_infer.phantom.head.hemorrhage import TYPES, Bleed, Planner
from pe_infer.phantom.head.layout import HeadLayout, sample_layout
from pe_infer.phantom.head.render import Painter, Scene
from pe_infer.phantom.head.scanner import Scanner, head_holder
from pe_infer.phantom.head.skull import build_skull
from pe_infer.phantom.head.tissues import sample_tissues
from pe_infer.phantom.head.truth import Hemorrhage, Truth
from pe_infer.phantom.raster import F32, Box, Lattice, Upsampler
from pe_infer.phantom.sampling import Draw
from pe_infer.phantom.truth import as_slices

SERIES: Final = SeriesInfo(
    modality="CT",
    body_part_examined="HEAD",
    protocol_name="CT head phantom",
    series_description="synthetic head CT without contrast",
    patient_position="HFS",
    manufacturer="pe_infer phantom",
    series_number=1,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeadStudy:
    """One synthetic study.

    Attributes:
        slices: Ascending position.
        labels: (n, rows, cols) uint8: 0, or the number of the type of blood, ``TYPES`` from 1 on,
            in voxels of which at least ``MASK_SHARE`` is blood.
        cavity_mask: (n, rows, cols) bool, within the skull.
        hemorrhages: Largest first; empty in a negative study.
        seed: What it was made from, together with the configuration.
        positive: Whether it has hemorrhages.
        tilt_degrees: Of the gantry.
        parameters: Values drawn, by name; the same for both studies of a pair.
    """

    slices: tuple[Slice, ...]
    labels: NDArray[np.uint8]
    cavity_mask: NDArray[np.bool_]
    hemorrhages: tuple[Hemorrhage, ...]
    seed: int
    positive: bool
    tilt_degrees: float
    parameters: dict[str, float | bool | str]

    @property
    def hemorrhage_mask(self) -> NDArray[np.bool_]:
        """(n, rows, cols) bool: blood of any type."""
        return np.asarray(self.labels > 0, np.bool_)

    def type_mask(self, kind: str) -> NDArray[np.bool_]:
        """(n, rows, cols) bool: blood of one of ``TYPES``."""
        return np.asarray(self.labels == TYPES.index(kind) + 1, np.bool_)

    def mask_slices(self) -> tuple[Slice, ...]:
        """Return the mask as slices of the same geometry: 1000 HU within blood, 0 elsewhere."""
        return as_slices(self.hemorrhage_mask, self.slices)

    @property
    def lesions(self) -> tuple[Hemorrhage, ...]:
        """The hemorrhages."""
        return self.hemorrhages

    @property
    def lesion_mask(self) -> NDArray[np.bool_]:
        """(n, rows, cols) bool: blood of any type."""
        return self.hemorrhage_mask

    def truth(self) -> dict[str, Any]:
        """Hemorrhages, what the labels mean, and parameters, as values that JSON can hold."""
        return {
            "seed": self.seed,
            "positive": self.positive,
            "hemorrhages": [asdict(hemorrhage) for hemorrhage in self.hemorrhages],
            "labels": {str(number): kind for number, kind in enumerate(TYPES, start=1)},
            "tilt_degrees": self.tilt_degrees,
            "parameters": self.parameters,
        }

    def masks(self) -> dict[str, NDArray[Any]]:
        """``hemorrhage``: (n, rows, cols) uint8, 0 or a number that ``labels`` names."""
        return {"hemorrhage": self.labels}


def generate(seed: int, *, positive: bool, config: HeadConfig = DEFAULT) -> HeadStudy:
    """Make one study. The same arguments give the same study, bit by bit, on one machine.

    Raises:
        ConfigurationError: The voxels are so large that blood fills none of them.
    """
    return _generate(seed, config, with_blood=positive)[-1]


def generate_pair(seed: int, config: HeadConfig = DEFAULT) -> tuple[HeadStudy, HeadStudy]:
    """Make a negative and a positive study that differ by nothing but blood and what it does.

    Anatomy, artefacts and noise are the same, voxel by voxel: outside the skull the two are equal,
    and inside it away from blood, its edema and the brain that it pushes aside.

    Raises:
        ConfigurationError: The voxels are so large that blood fills none of them.
    """
    negative, positive = _generate(seed, config, with_blood=True)
    return negative, positive


def _uid(*parts: object) -> str:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big')}"


def _unit_noise(rng: np.random.Generator, lattice: Lattice, sigma: float) -> F32:
    values = gaussian_filter(
        rng.standard_normal(lattice.shape, dtype=np.float32), sigma, mode="wrap"
    )
    return np.asarray(values / max(float(values.std()), 1e-6), np.float32)


def _scene(draw: Draw, config: HeadConfig) -> tuple[Scene, Frame]:
    frame = sample_frame(draw, config)
    layout = sample_layout(draw, config, frame)
    fields = Fields(layout.coarse, frame)
    grain = _unit_noise(draw.rng("grain"), layout.coarse, 1.0)
    clouds = _unit_noise(draw.rng("clouds"), layout.coarse, 4.0)
    skull = build_skull(draw, config, fields, grain, clouds)
    shape = sample_shape(draw, config)
    return Scene(
        layout=layout,
        reference=(fields.x, fields.y, fields.z),
        grain=grain,
        clouds=clouds,
        shape=shape,
        brain=build_brain(draw, config, shape, fields, skull, (grain, clouds)),
        skull=skull,
        tissues=sample_tissues(draw, config),
        vessels=gantry_capsules(frame, vessels(draw)),
        calcium=tuple(
            (gantry_capsules(frame, [caps]), hu) for caps, hu in calcifications(draw, config)
        ),
    ), frame


@dataclass(frozen=True, slots=True, kw_only=True)
class _Painted:
    """Planes of the fine lattice, (v, u) float32 each.

    Attributes:
        plain: Without hemorrhage.
        bloody: With it; empty if there is none.
        shares: Per plane the share of every bleed that touches it.
    """

    plain: list[F32]
    bloody: list[F32]
    shares: list[dict[int, F32]]


def _paint(scene: Scene, frame: Frame, painter: Painter, bleeds: list[Bleed]) -> _Painted:
    blood = BloodPainter(scene, frame, painter, bleeds)
    painted = _Painted(plain=[], bloody=[], shares=[])
    for k in range(scene.layout.fine.shape[0]):
        hu, around = painter.surround(k, blood.plain[k])
        painted.plain.append(hu)
        if bleeds:
            content, parts = blood.plane(k)
            held = 1 - around
            painted.bloody.append(hu + held * (content - blood.plain[k]))
            painted.shares.append({number: part * held for number, part in parts})
    return painted


def _generate(seed: int, config: HeadConfig, *, with_blood: bool) -> list[HeadStudy]:
    """Make the negative study, and the positive one after it if asked for."""
    draw = Draw(seed)
    scene, frame = _scene(draw, config)
    layout = scene.layout
    scanner = Scanner(draw, config, layout)
    slice_mm = float(layout.thickness_mm.max())
    planner = Planner(draw, config, scene.shape, scene.tissues, slice_mm)
    bleeds = planner.plan() if with_blood else []
    painter = Painter(scene)
    painted = _paint(scene, frame, painter, bleeds)
    images = np.stack([_average(layout, painted.plain, i) for i in range(len(layout.w_mm))])
    scanner.look(images)
    up = Upsampler(layout.fine, layout.axis(0), layout.axis(1))
    box = _head_box(layout)
    background = head_holder(draw, layout, _back_mm(layout, images), frame.shift_mm[0])
    truth = Truth(layout, bleeds)
    cavity = np.zeros_like(truth.labels, np.bool_)
    stored: tuple[list[NDArray[np.int16]], list[NDArray[np.int16]]] = ([], [])
    for index, plain in enumerate(images):
        first, weights = layout.profile(index)
        planes = slice(first, first + len(weights))
        extras = scanner.extras(index)
        image = _place(background, up.up(plain, box), box)
        stored[0].append(scanner.store(scanner.blur(image) + extras))
        middle = first + len(weights) // 2
        cavity[index][box] = up.up(painter.planes.at(scene.skull.cavity, middle), box) < 0
        if not with_blood:
            continue
        bloody = _average(layout, painted.bloody, index)
        if np.array_equal(bloody, plain):
            stored[1].append(stored[0][-1])
            continue
        image = _place(background, up.up(bloody, box), box)
        stored[1].append(scanner.store(scanner.blur(image) + extras))
        shares = _slice_shares(painted.shares[planes], weights)
        if shares:
            truth.add(index, box, {n: up.up(part, box) for n, part in shares.items()})
    hemorrhages = truth.hemorrhages()
    if with_blood and not hemorrhages:
        raise ConfigurationError(
            f"seed {seed}: blood fills no voxel of {layout.pixel_mm:.2f} mm and {slice_mm:.1f} mm "
            "thickness. Use smaller voxels or another seed."
        )
    studies: list[HeadStudy] = []
    for positive in (False, True)[: 1 + with_blood]:
        identity = f"pe_infer head phantom/{seed}/{positive}/{config.digest()}"
        studies.append(
            HeadStudy(
                slices=_slices(identity, scanner, layout, stored[positive]),
                labels=truth.labels if positive else np.zeros_like(truth.labels),
                cavity_mask=cavity,
                hemorrhages=hemorrhages if positive else (),
                seed=seed,
                positive=positive,
                tilt_degrees=float(np.rad2deg(layout.tilt_rad)),
                parameters=dict(draw.values),
            )
        )
    return studies


def _back_mm(layout: HeadLayout, images: F32) -> float:
    """Return v of the back of the head."""
    inside = np.flatnonzero((images > -300).any((0, 2)))
    return float(layout.fine.axis(1)[inside[-1]])


def _average(layout: HeadLayout, planes: list[F32], index: int) -> F32:
    first, weights = layout.profile(index)
    out = planes[first] * weights[0]
    for k in range(1, len(weights)):
        out += planes[first + k] * weights[k]
    return np.asarray(out, np.float32)


def _slice_shares(planes: list[dict[int, F32]], weights: F32) -> dict[int, F32]:
    found: dict[int, F32] = {}
    for parts, weight in zip(planes, weights, strict=True):
        for number, part in parts.items():
            found[number] = found[number] + part * weight if number in found else part * weight
    return found


def _head_box(layout: HeadLayout) -> Box:
    """Pixels that lie on the painted planes."""
    fine = layout.fine
    ranges = []
    for which in (1, 0):
        ends = fine.axis(which)
        low, high = np.searchsorted(layout.axis(which), (ends[0], ends[-1]))
        ranges.append(slice(int(low), int(high)))
    return ranges[0], ranges[1]


def _place(background: F32, head: F32, box: Box) -> F32:
    """Put the head on its background, which shows where there is air around it."""
    out = np.array(background, np.float32)
    view = out[box]
    air = np.clip((-960 - head) / 40, 0, 1)
    view += (1 - air) * (head - view)
    return out


def _slices(
    identity: str, scanner: Scanner, layout: HeadLayout, pixels: list[NDArray[np.int16]]
) -> tuple[Slice, ...]:
    series = replace(
        SERIES,
        series_instance_uid=_uid(identity, "series"),
        study_instance_uid=_uid(identity, "study"),
        frame_of_reference_uid=_uid(identity, "frame"),
        convolution_kernel="STANDARD" if scanner.sharpness < 0.4 else "HEAD SHARP",
    )
    u, v = layout.first_pixel_mm
    c, s = float(np.cos(layout.tilt_rad)), float(np.sin(layout.tilt_rad))
    return tuple(
        Slice(
            pixels=values,
            geometry=SliceGeometry(
                rows=layout.matrix,
                cols=layout.matrix,
                row_spacing_mm=layout.pixel_mm,
                col_spacing_mm=layout.pixel_mm,
                image_position_mm=(u, v * c, float(w) - v * s),
                row_direction=(1.0, 0.0, 0.0),
                col_direction=(0.0, c, -s),
                thickness_mm=float(thickness),
            ),
            rescale_intercept=scanner.intercept,
            padding=scanner.padding,
            series=series,
            sop_instance_uid=_uid(identity, "instance", index),
            acquisition_number=1,
            source=f"head phantom slice {index}",
        )
        for index, (values, w, thickness) in enumerate(
            zip(pixels, layout.w_mm, layout.thickness_mm, strict=True)
        )
    )
