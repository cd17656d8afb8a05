"""From the reference adult to one patient: size, rotation, place, and a smooth deformation.

Reference coordinates are LPS in mm with the carina near (0, 8, 0). Anatomy is described there; the
patient differs by a map that moves organs, vessels and bones together.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pe_infer.phantom.chest.config import PhantomConfig
from pe_infer.phantom.raster import F32, Capsules
from pe_infer.phantom.sampling import Draw

_WAVES_PER_AXIS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """An invertible map of points.

    Attributes:
        scale: Size along (x, y, z).
        angle_rad: Rotation about the body axis.
        shift_mm: Patient coordinates of the reference origin.
        wave_mm: (3, waves) amplitude of the deformation along x, y, z.
        wave_number: (3, waves, 3) radians per mm.
        phase: (3, waves).
    """

    scale: tuple[float, float, float]
    angle_rad: float
    shift_mm: tuple[float, float, float]
    wave_mm: F32
    wave_number: F32
    phase: F32

    @property
    def mean_scale(self) -> float:
        """Geometric mean of the three scales, for radii."""
        return float(np.prod(self.scale) ** (1 / 3))

    def _warp(self, points: F32) -> F32:
        moved = np.zeros_like(points)
        for axis in range(3):
            for wave in range(self.wave_mm.shape[1]):
                angle = points @ self.wave_number[axis, wave] + self.phase[axis, wave]
                moved[..., axis] += self.wave_mm[axis, wave] * np.sin(angle)
        return moved

    def to_patient(self, points: F32) -> F32:
        """Map reference points (..., 3) to patient coordinates in mm."""
        p = (points + self._warp(points)) * np.array(self.scale, np.float32)
        c, s = np.float32(np.cos(self.angle_rad)), np.float32(np.sin(self.angle_rad))
        turned = np.stack(
            [c * p[..., 0] - s * p[..., 1], s * p[..., 0] + c * p[..., 1], p[..., 2]], -1
        )
        return np.asarray(turned + np.array(self.shift_mm, np.float32), np.float32)

    def to_reference(self, points: F32) -> F32:
        """Map patient points (..., 3) back; the deformation is inverted to first order."""
        p = points - np.array(self.shift_mm, np.float32)
        c, s = np.float32(np.cos(self.angle_rad)), np.float32(np.sin(self.angle_rad))
        p = np.stack([c * p[..., 0] + s * p[..., 1], c * p[..., 1] - s * p[..., 0], p[..., 2]], -1)
        p = (p / np.array(self.scale, np.float32)).astype(np.float32)
        return np.asarray(p - self._warp(p), np.float32)

    def capsules(self, caps: Capsules) -> Capsules:
        """Map capsules; radii grow with the mean scale."""
        return Capsules.of(
            self.to_patient(caps.start),
            self.to_patient(caps.end),
            caps.start_radius_mm * self.mean_scale,
            caps.end_radius_mm * self.mean_scale,
        )


def sample_frame(draw: Draw, config: PhantomConfig) -> Frame:
    """Draw a patient's frame."""
    size = draw.uniform("body_scale", config.body_scale)
    aspect = draw.uniform("body_aspect", (0.95, 1.05))
    length = draw.uniform("lung_length_scale", config.lung_length_scale)
    rng = draw.rng("warp")
    amplitude = draw.uniform("warp_mm", config.warp_mm)
    wavelength: NDArray[np.float64] = rng.uniform(160.0, 380.0, (3, _WAVES_PER_AXIS, 1))
    heading = rng.standard_normal((3, _WAVES_PER_AXIS, 3))
    heading /= np.linalg.norm(heading, axis=-1, keepdims=True)
    shift = config.isocentre_shift_mm
    return Frame(
        scale=(size * aspect, size / aspect, size * length),
        angle_rad=float(
            np.deg2rad(draw.uniform("rotation_degrees", (-1.0, 1.0)) * config.rotation_degrees)
        ),
        shift_mm=(
            draw.uniform("shift_x_mm", (-shift, shift)),
            draw.uniform("shift_y_mm", (-shift, shift)),
            draw.uniform("shift_z_mm", (-400.0, 400.0)),
        ),
        wave_mm=(amplitude / _WAVES_PER_AXIS * rng.uniform(0.5, 1.0, (3, _WAVES_PER_AXIS))).astype(
            np.float32
        ),
        wave_number=(2 * np.pi / wavelength * heading).astype(np.float32),
        phase=rng.uniform(0, 2 * np.pi, (3, _WAVES_PER_AXIS)).astype(np.float32),
    )
