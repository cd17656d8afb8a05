"""From the reference head to one patient, and from the planes of a tilted gantry to the patient.

Reference coordinates are LPS in mm. The origin is the middle of the brain, halfway between its
poles, at the height of the anterior and posterior commissure.

Gantry coordinates (u, v, w) are regular: u along rows, v along columns, w the place of the table.
A slice is a plane of constant w, also where the gantry is tilted:
patient = (u, v cos t, w - v sin t).
"""

from dataclasses import dataclass

import numpy as np

from pe_infer.phantom.head.config import HeadConfig
from pe_infer.phantom.raster import F32, Lattice
from pe_infer.phantom.sampling import Draw

_WAVES_PER_AXIS = 2
_TILTED_PITCH_DEGREES = (-12.0, 2.0)
_LEVEL_PITCH_DEGREES = (-2.0, 14.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """An invertible map of points.

    Attributes:
        scale: Size along (x, y, z).
        rotation: (3, 3) from the reference to the patient.
        shift_mm: Patient coordinates of the reference origin.
        tilt_rad: Of the gantry; the front of a slice lies higher.
        wave_mm: (3, waves) amplitude of the deformation along x, y, z.
        wave_number: (3, waves, 3) radians per mm.
        phase: (3, waves).
    """

    scale: tuple[float, float, float]
    rotation: F32
    shift_mm: tuple[float, float, float]
    tilt_rad: float
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
                angle = _along(points, self.wave_number[axis, wave]) + self.phase[axis, wave]
                moved[..., axis] += self.wave_mm[axis, wave] * np.sin(angle)
        return moved

    def to_gantry(self, points: F32) -> F32:
        """Map reference points (..., 3) to gantry coordinates in mm."""
        p = np.asarray(points, np.float32)
        p = (p + self._warp(p)) * np.array(self.scale, np.float32)
        x, y, z = (_along(p, self.rotation[k]) + np.float32(self.shift_mm[k]) for k in range(3))
        v = y / np.float32(np.cos(self.tilt_rad))
        return np.asarray(np.stack([x, v, z + v * np.float32(np.sin(self.tilt_rad))], -1))

    def reference_grid(self, lattice: Lattice) -> tuple[F32, F32, F32]:
        """Return reference x, y and z, each (w, v, u), of a lattice in gantry coordinates."""
        u, v, w = (lattice.axis(k).astype(np.float32) for k in range(3))
        sine, cosine = np.float32(np.sin(self.tilt_rad)), np.float32(np.cos(self.tilt_rad))
        p = np.stack(
            np.broadcast_arrays(
                u[None, None, :],
                (v * cosine)[None, :, None],
                w[:, None, None] - (v * sine)[None, :, None],
            ),
            -1,
        )
        p = p - np.array(self.shift_mm, np.float32)
        p = np.stack([_along(p, self.rotation[:, k]) for k in range(3)], -1)
        p = (p / np.array(self.scale, np.float32)).astype(np.float32)
        p = p - self._warp(p)
        return p[..., 0].copy(), p[..., 1].copy(), p[..., 2].copy()


def _along(points: F32, direction: F32) -> F32:
    """Return scalar products (...) of points (..., 3): no BLAS, whose sums depend on threads."""
    x, y, z = direction
    return np.asarray(points[..., 0] * x + points[..., 1] * y + points[..., 2] * z, np.float32)


def _rotation(pitch: float, roll: float, yaw: float) -> F32:
    """Return the rotation about x (chin to the chest is positive), y and z, angles in degrees."""
    a, b, c = np.deg2rad((pitch, roll, yaw))
    about_x = [[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]]
    about_y = [[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]]
    about_z = [[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]]
    return np.asarray(np.array(about_z) @ np.array(about_y) @ np.array(about_x), np.float32)


def sample_frame(draw: Draw, config: HeadConfig) -> Frame:
    """Draw a patient's frame and the tilt of the gantry."""
    size = draw.uniform("head_scale", config.head_scale)
    aspect = draw.uniform("aspect", config.aspect)
    height = draw.uniform("height", (0.96, 1.05))
    tilted = draw.chance("tilted", config.tilted_probability)
    tilt = draw.uniform("gantry_tilt_degrees", config.gantry_tilt_degrees) if tilted else 0.0
    askew = config.rotation_degrees
    # A positive pitch lowers the front of the head, so that slices cut it with the front higher.
    pitch = draw.uniform("pitch", _TILTED_PITCH_DEGREES if tilted else _LEVEL_PITCH_DEGREES)
    rng = draw.rng("warp")
    amplitude = draw.uniform("warp_mm", config.warp_mm)
    wavelength = rng.uniform(90.0, 220.0, (3, _WAVES_PER_AXIS, 1))
    heading = rng.standard_normal((3, _WAVES_PER_AXIS, 3))
    heading /= np.linalg.norm(heading, axis=-1, keepdims=True)
    shift = config.isocentre_shift_mm
    return Frame(
        scale=(size / aspect, size * aspect, size * height),
        rotation=_rotation(
            pitch,
            draw.uniform("roll", (-0.6, 0.6)) * askew,
            draw.uniform("yaw", (-1.0, 1.0)) * askew,
        ),
        shift_mm=(
            draw.uniform("shift_x_mm", (-shift, shift)),
            draw.uniform("shift_y_mm", (-shift, shift)),
            draw.uniform("shift_z_mm", (-300.0, 300.0)),
        ),
        tilt_rad=float(np.deg2rad(tilt)),
        wave_mm=(amplitude / _WAVES_PER_AXIS * rng.uniform(0.5, 1.0, (3, _WAVES_PER_AXIS))).astype(
            np.float32
        ),
        wave_number=(2 * np.pi / wavelength * heading).astype(np.float32),
        phase=rng.uniform(0, 2 * np.pi, (3, _WAVES_PER_AXIS)).astype(np.float32),
    )
