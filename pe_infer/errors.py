"""Every exception pe_infer raises on purpose.

::

    PeInferError                     1
    ├── ConfigurationError           2   an argument or a setting makes no sense
    ├── InputError                   3   the data cannot be used
    │   ├── DicomError                   one file is not a CT image we can decode
    │   ├── GeometryError                one slice has no usable place in the patient
    │   └── SeriesError                  the slices do not form one volume
    ├── ScopeError                   4   the study is not what the bundle is for
    ├── BundleError                  5   a bundle is damaged, foreign or inconsistent
    ├── EngineError                  6   an inference runtime failed or is absent
    ├── StreamError                  7   a stream was used in a state that forbids it
    │   ├── StreamTimeoutError           (also a TimeoutError)
    │   └── StreamCancelledError
    └── NodeError                    8   the DICOM node cannot keep or send what it has to

The number is the exit code of the command line. Each error carries a stable ``code`` for programs;
its message names the file, the value, what was expected and the remedy, and never holds patient
data.
"""

from enum import StrEnum
from typing import Any, ClassVar


class Code(StrEnum):
    """Why something was refused. Values are stable: they appear in JSON and in logs."""

    # configuration
    INVALID_ARGUMENT = "configuration.invalid_argument"
    # one file
    UNREADABLE_FILE = "dicom.unreadable_file"
    NOT_CT = "dicom.not_ct"
    NOT_AXIAL_IMAGE = "dicom.not_axial_image"  # localizer, dose page, secondary capture
    MISSING_ATTRIBUTE = "dicom.missing_attribute"
    INVALID_ATTRIBUTE = "dicom.invalid_attribute"
    UNSUPPORTED_PIXELS = "dicom.unsupported_pixels"
    UNSUPPORTED_TRANSFER_SYNTAX = "dicom.unsupported_transfer_syntax"
    UNDECODABLE_PIXELS = "dicom.undecodable_pixels"
    # one slice
    NON_AXIAL = "geometry.non_axial"
    BAD_GEOMETRY = "geometry.invalid"
    # a series
    NO_CT_SERIES = "series.none_found"
    AMBIGUOUS_SERIES = "series.ambiguous"
    FOREIGN_SLICE = "series.foreign_slice"
    ORIENTATION_DIFFERS = "series.orientation_differs"
    DUPLICATE_POSITION = "series.duplicate_position"
    CONFLICTING_DUPLICATE = "series.conflicting_duplicate"
    GAP = "series.gap"
    CENTRE_DRIFT = "series.centre_drift"
    TOO_FEW_SLICES = "series.too_few_slices"
    TOO_FEW_SLABS = "series.too_few_slabs"
    TOO_MANY_SLICES = "series.too_many_slices"
    # scope
    OUT_OF_SCOPE = "scope.mismatch"
    UNDECIDED_BUNDLE = "scope.undecided"  # no bundle, or no single one, is what the series asks for
    # bundle
    BUNDLE_NOT_FOUND = "bundle.not_found"
    BUNDLE_INVALID = "bundle.invalid"
    BUNDLE_VERSION = "bundle.format_version"
    BUNDLE_ALTERED = "bundle.altered"
    BUNDLE_PATH = "bundle.path_outside"
    BUNDLE_GRAPH = "bundle.graph_mismatch"
    BUNDLE_SELF_TEST = "bundle.self_test"
    # engine
    ENGINE_UNAVAILABLE = "engine.unavailable"
    ENGINE_FAILED = "engine.failed"
    ENGINE_INPUT = "engine.invalid_input"
    ENGINE_UNTRUSTED = "engine.untrusted"  # a built engine is not whole, or others could write it
    ENGINE_STALE = "engine.stale"  # built from something else than what is there now
    ENGINE_UNFIT = "engine.unfit"  # built for another machine
    # stream
    STREAM_CLOSED = "stream.closed"
    STREAM_TIMEOUT = "stream.timeout"
    STREAM_CANCELLED = "stream.cancelled"
    # node
    NODE_STATE = "node.state"  # its folder or its ledger cannot be used
    NODE_NETWORK = "node.network"  # a port or a certificate cannot be used
    NODE_FULL = "node.full"  # a limit is reached; what was offered was not taken


class PeInferError(Exception):
    """Base class of every error raised on purpose.

    Attributes:
        code: Stable identifier of the reason.
        exit_code: Exit status of the command line for this class of error.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, code: Code) -> None:
        """Store the message and the reason."""
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        """Let errors be copied, and pickled between processes."""
        return _restored, (type(self), str(self), self.code)


def _restored(kind: type[PeInferError], message: str, code: Code) -> PeInferError:
    error = kind.__new__(kind)
    PeInferError.__init__(error, message, code=code)
    return error


class ConfigurationError(PeInferError):
    """An argument or a setting makes no sense."""

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, *, code: Code = Code.INVALID_ARGUMENT) -> None:
        """Store the message; the code is almost always the same."""
        super().__init__(message, code=code)


class InputError(PeInferError):
    """The data cannot be used."""

    exit_code: ClassVar[int] = 3


class DicomError(InputError):
    """One file is not a CT image that can be decoded."""


class GeometryError(InputError):
    """One slice has no usable place in the patient."""


class SeriesError(InputError):
    """The slices do not form one volume."""


class ScopeError(PeInferError):
    """The study is not what the bundle was made for."""

    exit_code: ClassVar[int] = 4

    def __init__(self, message: str, *, code: Code = Code.OUT_OF_SCOPE) -> None:
        """Store the message and the reason."""
        super().__init__(message, code=code)


class BundleError(PeInferError):
    """A bundle is damaged, of a foreign version, or inconsistent."""

    exit_code: ClassVar[int] = 5


class EngineError(PeInferError):
    """An inference runtime failed or is absent."""

    exit_code: ClassVar[int] = 6

    def __init__(self, message: str, *, code: Code = Code.ENGINE_FAILED) -> None:
        """Store the message and the reason."""
        super().__init__(message, code=code)


class StreamError(PeInferError):
    """A stream was used in a state that forbids it."""

    exit_code: ClassVar[int] = 7

    def __init__(self, message: str, *, code: Code = Code.STREAM_CLOSED) -> None:
        """Store the message and the reason."""
        super().__init__(message, code=code)


class StreamTimeoutError(StreamError, TimeoutError):
    """The work was not done in the time given; the stream is as it was and can be asked again."""

    def __init__(self, message: str) -> None:
        """Store the message."""
        super().__init__(message, code=Code.STREAM_TIMEOUT)


class StreamCancelledError(StreamError):
    """The stream was cancelled."""

    def __init__(self, message: str) -> None:
        """Store the message."""
        super().__init__(message, code=Code.STREAM_CANCELLED)


class NodeError(PeInferError):
    """The DICOM node cannot keep or send what it has to."""

    exit_code: ClassVar[int] = 8

    def __init__(self, message: str, *, code: Code = Code.NODE_STATE) -> None:
        """Store the message and the reason."""
        super().__init__(message, code=code)
