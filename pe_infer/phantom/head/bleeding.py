"""Adds hemorrhages to the content of the skull, and moves the brain out of their way."""

import numpy as np
from scipy.ndimage import map_coordinates

from pe_infer.phantom.head.frame import Frame
from pe_infer.phantom.head.hemorrhage import Bleed, Here, blood_hu, displacement, edema, share
from pe_infer.phantom.head.render import Painter, Scene
from pe_infer.phantom.raster import F32

_EDEMA_HU = 13.0
_SOLID_HU = 128.0
_LEAST_MOVE_MM = 0.05


class BloodPainter:
    """Adds hemorrhages to the content of the skull."""

    def __init__(self, scene: Scene, frame: Frame, painter: Painter, bleeds: list[Bleed]) -> None:
        self._scene, self._frame, self._painter = scene, frame, painter
        self._bleeds = bleeds
        shape = scene.layout.fine.shape
        contents = [painter.content(k) for k in range(shape[0])]
        self.plain = np.stack([c.hu for c in contents])
        self._fluid = (
            [np.stack([getattr(c, n) for c in contents]) for n in ("subarachnoid", "ventricle")]
            if bleeds
            else []
        )

    def _here(self, k: int) -> Here:
        at, scene = self._painter.planes.at, self._scene
        x, y, z = (at(c, k) for c in scene.reference)
        return Here(
            x=x,
            y=y,
            z=z,
            cavity=at(scene.skull.cavity, k),
            midline=at(scene.brain.midline, k),
            tentorium=at(scene.brain.tentorium, k),
            grain=at(scene.grain, k),
            clouds=at(scene.clouds, k),
            subarachnoid=self._fluid[0][k],
            ventricle=self._fluid[1][k],
        )

    def plane(self, k: int) -> tuple[F32, list[tuple[int, F32]]]:
        """Return the content with blood, and the share of every bleed that touches the plane."""
        here = self._here(k)
        moved = displacement(self._bleeds, here)
        volumes = [v[k].copy() for v in (self.plain, *self._fluid)]
        if moved is not None:
            largest = max(float(np.abs(m).max()) for m in moved)
            if largest > 0.2:
                away = sum(np.abs(m) for m in moved) > _LEAST_MOVE_MM
                at = self._sources(k, moved)[:, away]
                for volume, whole in zip(volumes, (self.plain, *self._fluid), strict=True):
                    volume[away] = map_coordinates(whole, at, order=1, mode="nearest")
        hu = volumes[0]
        pushed = Here(
            **{
                name: getattr(here, name)
                for name in ("x", "y", "z", "cavity", "midline", "tentorium", "grain", "clouds")
            },
            subarachnoid=volumes[1],
            ventricle=volumes[2],
        )
        for bleed in self._bleeds:
            wet = edema(bleed, pushed)
            if wet is not None:
                hu -= wet * np.float32(_EDEMA_HU)
        parts: list[tuple[int, F32]] = []
        free = np.ones_like(hu)  # blood of one bleed does not take the place of another's
        for number, bleed in enumerate(self._bleeds):
            soft = np.clip((_SOLID_HU - hu) / 30, 0, 1)  # calcifications stay
            part = np.asarray(share(bleed, pushed) * free * soft, np.float32)
            part[part < 0.02] = 0
            if not part.any():
                continue
            free = free * (1 - part)
            hu += part * (blood_hu(bleed, pushed) - hu)
            parts.append((number, part))
        return hu, parts

    def _sources(self, k: int, moved: tuple[F32, F32, F32]) -> F32:
        """From which voxels (w, v, u) the content of a plane comes."""
        fine, tilt = self._scene.layout.fine, self._frame.tilt_rad
        matrix = self._frame.rotation * np.array(self._frame.scale, np.float32)
        px, py, pz = (sum(matrix[row, axis] * moved[axis] for axis in range(3)) for row in range(3))
        v = py / np.float32(np.cos(tilt))
        w = pz + v * np.float32(np.sin(tilt))
        rows, cols = np.indices(px.shape, np.float32)
        su, sv, sw = fine.step_mm
        return np.asarray(np.stack([k + w / sw, rows + v / sv, cols + px / su]), np.float32)
