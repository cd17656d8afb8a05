"""Frozen value types: where pixels lie in the patient, and the grid they are brought to.

Coordinates are DICOM patient coordinates (LPS): x grows to the patient's left, y to the back, z to
the head. Units are in the names; ``_um`` positions are integers, so that they compare exactly.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from pe_infer.errors import Code, ConfigurationError, GeometryError
from pe_infer.pixels import DevicePixels, StoredPixels, checked, on_host

Vector: TypeAlias = tuple[float, float, float]

MIN_NORMAL_Z = 0.7  # |n_z| below this is not an axial series
MAX_MM = 1e5  # positions and spacings beyond 100 m are damage
MAX_COMPONENT = 1.5  # of an orientation vector that is meant to be of unit length
MIN_SQUARED_LENGTH = 0.5  # of an orientation vector that is meant to be of unit length
MAX_COSINE = 0.01  # between orientation vectors that are meant to be orthogonal
INT16_MIN, UINT16_MAX = -0x8000, 0xFFFF
AIR_HU = -1024.0
MAX_HU = 4095.0
TISSUE_HU = -200.0  # pixels of at least this are body
MIN_SLOPE, MAX_RESCALE = 1e-9, 1e9  # the kernel computes in single precision


def _dot(a: Vector, b: Vector) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _cross(a: Vector, b: Vector) -> Vector:
    return (a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0])


def _unit(v: Vector) -> Vector:
    length = math.sqrt(_dot(v, v))
    return (v[0] / length, v[1] / length, v[2] / length)


def _negative(v: Vector) -> Vector:
    return (-v[0], -v[1], -v[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A linear map from Hounsfield units to [0, 1]: ``low_hu`` becomes 0, ``high_hu`` becomes 1."""

    low_hu: float
    high_hu: float

    def __post_init__(self) -> None:
        """Refuse an empty window."""
        if not self.low_hu < self.high_hu:
            raise ConfigurationError(
                f"window low_hu={self.low_hu} must be below high_hu={self.high_hu}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Which slabs show the organ: by the share of the middle plane within [low_hu, high_hu].

    Only what is enclosed counts: a pixel with parts of the largest connected piece of at least
    ``enclosed_by_hu`` to the left and right, in front and behind. By default that piece is the
    body; with a value of bone it is the skull, and what it encloses is the brain. A slab with a
    smaller share than ``min_fraction`` does not exist for any node of the study program.
    """

    low_hu: float
    high_hu: float
    min_fraction: float
    enclosed_by_hu: float = TISSUE_HU


@dataclass(frozen=True, slots=True, kw_only=True)
class PatientGrid:
    """The grid that every study is brought to before a network sees it (preprocessing version 1).

    Attributes:
        rows: Rows of a plane, front to back.
        cols: Columns of a plane, patient's right to left.
        spacing_mm: Distance of neighbouring rows and columns.
        pitch_um: Distance of planes; planes lie at absolute multiples of it.
        planes_per_slab: Odd number of planes stacked into one slab.
        slab_step: Slabs are centred on every ``slab_step``-th plane (absolute).
        through_plane: ``"resample"``, or ``"source"``: series with a slice thickness of
            ``SOURCE_THICKNESS_MM`` or more keep their own slices as planes.
        windows: Applied last; a slab has ``planes_per_slab * len(windows)`` channels, window
            fastest.
        gate: Which slabs exist; ``None`` lets all pass.
    """

    rows: int
    cols: int
    spacing_mm: float
    pitch_um: int
    planes_per_slab: int
    slab_step: int
    windows: tuple[Window, ...]
    gate: Gate | None = None
    through_plane: Literal["resample", "source"] = "resample"

    def __post_init__(self) -> None:
        """Refuse grids that cannot be filled."""
        if min(self.rows, self.cols, self.pitch_um, self.planes_per_slab, self.slab_step) < 1:
            raise ConfigurationError(f"grid sizes must be at least 1: {self}")
        if self.planes_per_slab % 2 == 0:
            raise ConfigurationError(
                f"planes_per_slab={self.planes_per_slab} must be odd: a slab has a middle plane"
            )
        if not self.spacing_mm > 0:
            raise ConfigurationError(f"spacing_mm={self.spacing_mm} must be positive")
        if not self.windows:
            raise ConfigurationError("a grid needs at least one window")
        if self.through_plane == "source" and self.slab_step != 1:
            raise ConfigurationError(
                f"slab_step={self.slab_step} with through_plane='source': source slices have no "
                "absolute phase, use 1"
            )

    @property
    def channels(self) -> int:
        """Channels of one slab."""
        return self.planes_per_slab * len(self.windows)


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceGeometry:
    """Place and size of one image in the patient (DICOM PS3.3 C.7.6.2).

    Direction vectors are normalised on construction: files carry vectors that are not exactly of
    unit length.

    Attributes:
        rows: Number of rows.
        cols: Number of columns.
        row_spacing_mm: PixelSpacing[0], distance between row centres.
        col_spacing_mm: PixelSpacing[1], distance between column centres.
        image_position_mm: ImagePositionPatient, centre of the first pixel.
        row_direction: ImageOrientationPatient[:3], the way along a row (growing column index).
        col_direction: ImageOrientationPatient[3:], the way along a column (growing row index).
        thickness_mm: SliceThickness, if known.

    Raises:
        GeometryError: Sizes or spacings are not positive, positions or spacings exceed ``MAX_MM``,
            vectors are not of unit length or not orthogonal, or the image is not axial
            (``|n_z| < 0.7``).
    """

    rows: int
    cols: int
    row_spacing_mm: float
    col_spacing_mm: float
    image_position_mm: Vector
    row_direction: Vector = (1.0, 0.0, 0.0)
    col_direction: Vector = (0.0, 1.0, 0.0)
    thickness_mm: float | None = None
    normal: Vector = field(init=False)
    position_um: int = field(init=False)

    def __post_init__(self) -> None:
        """Check, normalise, and derive the normal and the position."""
        lengths = (*self.image_position_mm, self.row_spacing_mm, self.col_spacing_mm)
        if not all(abs(length) <= MAX_MM for length in lengths):
            raise GeometryError(
                f"position {self.image_position_mm} mm, spacing {self.row_spacing_mm} x "
                f"{self.col_spacing_mm} mm: numbers of at most {MAX_MM:g} mm are expected",
                code=Code.BAD_GEOMETRY,
            )
        if self.rows < 1 or self.cols < 1 or self.row_spacing_mm <= 0 or self.col_spacing_mm <= 0:
            raise GeometryError(
                f"image of {self.rows} x {self.cols} pixels with spacing {self.row_spacing_mm} x "
                f"{self.col_spacing_mm} mm: sizes and spacings must be positive",
                code=Code.BAD_GEOMETRY,
            )
        axes = (self.row_direction, self.col_direction)
        if not all(abs(component) <= MAX_COMPONENT for axis in axes for component in axis) or any(
            _dot(axis, axis) < MIN_SQUARED_LENGTH for axis in axes
        ):
            raise GeometryError(
                f"orientation {self.row_direction}, {self.col_direction} is not made of unit "
                "vectors",
                code=Code.BAD_GEOMETRY,
            )
        row, col = _unit(self.row_direction), _unit(self.col_direction)
        if abs(_dot(row, col)) > MAX_COSINE:
            raise GeometryError(
                f"orientation vectors {row} and {col} are not orthogonal", code=Code.BAD_GEOMETRY
            )
        normal = _unit(_cross(row, col))
        if normal[2] < 0:
            normal = _negative(normal)
        if normal[2] < MIN_NORMAL_Z:
            raise GeometryError(
                f"the slice normal {tuple(round(c, 3) for c in normal)} is not along the body axis "
                f"(|z| >= {MIN_NORMAL_Z} expected): send the axial reconstruction",
                code=Code.NON_AXIAL,
            )
        object.__setattr__(self, "row_direction", row)
        object.__setattr__(self, "col_direction", col)
        object.__setattr__(self, "normal", normal)
        object.__setattr__(self, "position_um", round(_dot(self.centre_mm, normal) * 1000.0))

    @property
    def position_mm(self) -> float:
        """Centre of the image projected on the normal, growing to the head."""
        return self.position_um / 1000.0

    @property
    def centre_mm(self) -> Vector:
        """Centre of the image in patient coordinates."""
        along_row = (self.cols - 1) / 2 * self.col_spacing_mm
        along_col = (self.rows - 1) / 2 * self.row_spacing_mm
        p, r, c = self.image_position_mm, self.row_direction, self.col_direction
        return (
            p[0] + along_row * r[0] + along_col * c[0],
            p[1] + along_row * r[1] + along_col * c[1],
            p[2] + along_row * r[2] + along_col * c[2],
        )

    @property
    def transposed(self) -> bool:
        """Whether image rows run front to back rather than right to left."""
        return abs(self.row_direction[1]) > abs(self.row_direction[0])

    @property
    def left_axis(self) -> Vector:
        """Unit vector of growing grid columns: the image axis nearest to left, pointing left."""
        axis = self.col_direction if self.transposed else self.row_direction
        return axis if axis[0] > 0 else _negative(axis)

    @property
    def back_axis(self) -> Vector:
        """Unit vector of growing grid rows: the image axis nearest to the back, pointing back."""
        axis = self.row_direction if self.transposed else self.col_direction
        return axis if axis[1] > 0 else _negative(axis)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesInfo:
    """What a series says of itself, as far as pe_infer uses it. No patient data.

    Every field is the DICOM attribute of the same name; ``None`` where the series does not say.
    """

    series_instance_uid: str = ""
    study_instance_uid: str = ""
    frame_of_reference_uid: str | None = None
    modality: str = "CT"
    body_part_examined: str | None = None
    protocol_name: str | None = None
    series_description: str | None = None
    study_description: str | None = None
    contrast_bolus_agent: str | None = None
    patient_position: str | None = None
    convolution_kernel: str | None = None
    manufacturer: str | None = None
    series_number: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Slice:
    """One CT image as it came: stored values, how they become Hounsfield units, and where it lies.

    Attributes:
        pixels: (rows, cols) int16 or uint16, C-contiguous stored values. For an engine on a GPU
            they may lie there, in any array with ``__cuda_array_interface__`` or, on CUDA, DLPack.
        geometry: Place in the patient.
        rescale_slope: HU per stored value (RescaleSlope).
        rescale_intercept: HU of the stored value 0 (RescaleIntercept).
        padding: Inclusive range of stored values that mean "no data" (PixelPaddingValue,
            PixelPaddingRangeLimit), within -32768 and 65535.
        padding_ignored: Whether a padding was declared that is not used, as it would erase tissue.
        series: What the series says of itself.
        sop_instance_uid: Identity of the instance; empty for slices made of arrays.
        frame_number: 1-based frame of a multi-frame instance.
        acquisition_number: AcquisitionNumber, if known.
        source: Name for messages: a file name, or a description.

    Raises:
        GeometryError: ``pixels`` do not have the shape that ``geometry`` says, or a dtype other
            than int16 or uint16, or lie on a GPU with gaps between them; ``padding`` is no range
            of stored values; or the rescale is not finite, absurdly large, or its slope zero.
    """

    pixels: StoredPixels | DevicePixels
    geometry: SliceGeometry
    rescale_slope: float = 1.0
    rescale_intercept: float = 0.0
    padding: tuple[int, int] | None = None
    padding_ignored: bool = False
    series: SeriesInfo = SeriesInfo()
    sop_instance_uid: str = ""
    frame_number: int | None = None
    acquisition_number: int | None = None
    source: str = "slice"

    def __post_init__(self) -> None:
        """Check pixels against geometry."""
        shape = (self.geometry.rows, self.geometry.cols)
        object.__setattr__(self, "pixels", checked(self.pixels, shape, self.source))
        if self.padding is not None:
            low, high = self.padding
            if not INT16_MIN <= low <= high <= UINT16_MAX:
                raise GeometryError(
                    f"{self.source}: padding {self.padding} is no range of stored values: low "
                    f"and high, in this order, within {INT16_MIN} and {UINT16_MAX}",
                    code=Code.BAD_GEOMETRY,
                )
        slope, intercept = self.rescale_slope, self.rescale_intercept
        if not (MIN_SLOPE <= abs(slope) <= MAX_RESCALE and abs(intercept) <= MAX_RESCALE):
            raise GeometryError(
                f"{self.source}: rescale slope {slope}, intercept {intercept}: the slope must lie "
                f"within {MIN_SLOPE:g} and {MAX_RESCALE:g}, the intercept within {MAX_RESCALE:g}, "
                "whatever their sign",
                code=Code.BAD_GEOMETRY,
            )

    @property
    def host_pixels(self) -> StoredPixels:
        """The pixels, where the processor can read them.

        Raises:
            InputError: They lie on a GPU (``engine.invalid_input``).
        """
        return on_host(self.pixels, self.source)

    @property
    def position_um(self) -> int:
        """Position on the slice normal, in whole micrometres, growing to the head."""
        return self.geometry.position_um
