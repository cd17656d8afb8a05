"""Streaming CNN + RNN inference beside a CT scanner. See `Detector`."""

from pe_infer.bundle import Bundle
from pe_infer.choice import BundleChoice, choose_bundle
from pe_infer.detector import Detector
from pe_infer.errors import (
    BundleError,
    ConfigurationError,
    DicomError,
    EngineError,
    GeometryError,
    InputError,
    PeInferError,
    ScopeError,
    SeriesError,
    StreamCancelledError,
    StreamError,
    StreamTimeoutError,
)
from pe_infer.geometry import PatientGrid, SeriesInfo, Slice, SliceGeometry, Window
from pe_infer.result import Flag, QualityFlag, StudyResult, Update
from pe_infer.stream import Stream

__all__ = [
    "Bundle",
    "BundleChoice",
    "BundleError",
    "ConfigurationError",
    "Detector",
    "DicomError",
    "EngineError",
    "Flag",
    "GeometryError",
    "InputError",
    "PatientGrid",
    "PeInferError",
    "QualityFlag",
    "ScopeError",
    "SeriesError",
    "SeriesInfo",
    "Slice",
    "SliceGeometry",
    "Stream",
    "StreamCancelledError",
    "StreamError",
    "StreamTimeoutError",
    "StudyResult",
    "Update",
    "Window",
    "choose_bundle",
]
