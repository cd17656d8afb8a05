"""Bundles on disk: ``bundle.json``, ONNX graphs, golden data, certificate; checked when loaded.

Every file is read once; the bytes whose sha256 was checked are the bytes that are compiled later,
so a file that is changed in between changes nothing.
"""

import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Final, NoReturn, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from pe_infer.certificate import CERTIFICATE_FILE, Certificate
from pe_infer.errors import BundleError, Code, ConfigurationError
from pe_infer.manifest import (
    FORMAT_VERSION,
    PREPROCESSING_VERSION,
    Check,
    GraphNode,
    Manifest,
    ReduceNode,
)
from pe_infer.onnx_scan import NotOnnxError, external_tensors

MANIFEST: Final = "bundle.json"
SHIPPED: Final = Path(__file__).parent / "bundles"
MAX_MANIFEST_BYTES: Final = 4 << 20
MAX_GOLDEN_BYTES: Final = 2 << 20

_OUTPUT: Final = "output."  # before the name of an output in golden data
_SLAB_AXES: Final = 4  # slabs, channels, rows, cols
_SHOWN_CHARACTERS: Final = 80


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GoldenData:
    """Slabs and the outputs that the program must give for them.

    On disk: ``slabs`` uint8 (T, channels, rows, cols), a slab being value / 255; ``positions_um``
    int64 (T,) ascending; ``output.<name>`` float32, (T, ...) in ascending position or (...) of the
    study.

    Attributes:
        slabs: (T, channels, rows, cols) uint8 in ascending position.
        positions_um: (T,) int64, strictly ascending.
        outputs: Expected values by output name, float32.
    """

    slabs: NDArray[np.uint8]
    positions_um: NDArray[np.int64]
    outputs: Mapping[str, NDArray[np.float32]]

    def tensor(self, index: int) -> NDArray[np.float32]:
        """One slab as the program takes it: (channels, rows, cols) float32 in [0, 1]."""
        tensor: NDArray[np.float32] = self.slabs[index].astype(np.float32)
        tensor /= 255
        return tensor

    def to_bytes(self) -> bytes:
        """The compressed ``.npz`` file.

        Raises:
            ConfigurationError: It would be larger than ``MAX_GOLDEN_BYTES``.
        """
        arrays: dict[str, NDArray[Any]] = {"slabs": self.slabs, "positions_um": self.positions_um}
        arrays.update({f"{_OUTPUT}{name}": values for name, values in self.outputs.items()})
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        data = buffer.getvalue()
        if len(data) > MAX_GOLDEN_BYTES:
            raise ConfigurationError(
                f"golden data of {self.slabs.shape[0]} slabs take {len(data)} bytes, at most "
                f"{MAX_GOLDEN_BYTES} are expected: use fewer or smoother slabs"
            )
        return data

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> Self:
        """Read what `to_bytes` wrote.

        Raises:
            BundleError: It is not such a file (``bundle.invalid``).
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                slabs, positions = arrays["slabs"], arrays["positions_um"]
                outputs = {
                    name.removeprefix(_OUTPUT): arrays[name]
                    for name in arrays.files
                    if name.startswith(_OUTPUT)
                }
        except Exception as exc:  # zipfile, zlib and NumPy each raise their own for damaged data
            raise BundleError(
                f"{source}: not golden data: {type(exc).__name__}: {exc}. Export the bundle again.",
                code=Code.BUNDLE_INVALID,
            ) from exc
        if slabs.dtype != np.uint8 or slabs.ndim != _SLAB_AXES or not len(slabs):
            _refuse(
                source,
                f"slabs are {slabs.dtype} {slabs.shape}, expected uint8 (slabs, channels, rows, "
                "cols)",
                None,
            )
        if (
            positions.dtype != np.int64
            or positions.shape != slabs.shape[:1]
            or (np.diff(positions) <= 0).any()
        ):
            _refuse(
                source,
                f"positions_um are {positions.dtype} {positions.shape}, expected int64, one per "
                f"slab of {len(slabs)}, strictly ascending",
                None,
            )
        for name, values in outputs.items():
            if values.dtype != np.float32:
                _refuse(source, f"output {name!r} is {values.dtype}, expected float32", None)
        return cls(slabs=slabs, positions_um=positions, outputs=MappingProxyType(outputs))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bundle:
    """A bundle whose files have been checked.

    Attributes:
        manifest: What ``bundle.json`` says.
        folder: Where it was loaded from.
        sha256: Hash of the manifest, and so of every file that it lists: the identity of the
            bundle.
        files: Contents of the listed files.
        certificate: What float16 costs, if that was measured.
    """

    manifest: Manifest
    folder: Path
    sha256: str
    files: Mapping[str, bytes]
    certificate: Certificate | None

    @classmethod
    def load(cls, name_or_folder: str | Path) -> Self:
        """Load and check a shipped bundle by name, or any bundle by its folder.

        A ``Path``, or a string with a path separator, is a folder. A plain name is a shipped
        bundle; only where none is shipped under that name, it is a folder of the current directory.
        Write ``./name`` to mean the folder.

        Raises:
            BundleError: Nothing is there, the manifest or a file is not as it must be, a path leads
                outside, or the certificate is of another bundle.
        """
        folder = find_bundle(name_or_folder)
        document = _document(folder)
        manifest = validate(document, folder / MANIFEST)
        files: dict[str, bytes] = {}
        for name, entry in manifest.files.items():
            data = _read_inside(folder, name)
            if (found := hashlib.sha256(data).hexdigest()) != entry.sha256:
                raise BundleError(
                    f"{folder / name}: sha256 is {found}, the manifest says {entry.sha256}: the "
                    "file was altered or belongs to another version. Install the bundle again.",
                    code=Code.BUNDLE_ALTERED,
                )
            files[name] = data
        for node in manifest.nodes:
            if not isinstance(node, ReduceNode):
                _refuse_foreign_data(files[node.graph], folder / node.graph)
        return cls(
            manifest=manifest,
            folder=folder,
            sha256=_identity(document),
            files=MappingProxyType(files),
            certificate=_certificate(manifest, files, folder),
        )

    def graph(self, node: GraphNode) -> bytes:
        """The ONNX file of a node."""
        return self.files[node.graph]

    def golden(self) -> GoldenData | None:
        """The golden data, if the bundle has any.

        Raises:
            BundleError: The file is not golden data.
        """
        golden = self.manifest.golden
        return (
            GoldenData.from_bytes(self.files[golden.file], str(self.folder / golden.file))
            if golden
            else None
        )


def read_manifest(name_or_folder: str | Path) -> Manifest:
    """The manifest of a bundle (named as in `Bundle.load`), whose other files are not looked at.

    Raises:
        BundleError: Nothing is there, or the manifest is not as it must be.
    """
    folder = find_bundle(name_or_folder)
    return validate(_document(folder), folder / MANIFEST)


def shipped() -> tuple[str, ...]:
    """Names of the bundles that came with this package."""
    if not SHIPPED.is_dir():
        return ()
    return tuple(sorted(entry.name for entry in SHIPPED.iterdir() if (entry / MANIFEST).is_file()))


def find_bundle(name_or_folder: str | Path) -> Path:
    """The folder that a name or a path stands for (the rules of `Bundle.load`).

    Raises:
        BundleError: There is no such bundle (``bundle.not_found``).
    """
    text = str(name_or_folder)
    if isinstance(name_or_folder, str) and not set(text) & {"/", "\\"} and text in shipped():
        return SHIPPED / text
    folder = Path(name_or_folder)
    problem = ""
    try:
        if text and (folder / MANIFEST).is_file():
            return folder
    except OSError as exc:  # a folder that may not be entered, a name that is too long
        problem = f" ({exc.strerror})"
    raise BundleError(
        f"no bundle {_shortened(repr(text))}{problem}: it is neither a folder with a {MANIFEST} "
        f"nor one of the shipped bundles {list(shipped())}",
        code=Code.BUNDLE_NOT_FOUND,
    )


def validate(document: Mapping[str, Any], source: Path | str) -> Manifest:
    """A manifest from its JSON document.

    Raises:
        BundleError: Its format or preprocessing version is not ours (``bundle.format_version``), or
            it is not valid (``bundle.invalid``).
    """
    for key, ours in (
        ("format_version", FORMAT_VERSION),
        ("preprocessing_version", PREPROCESSING_VERSION),
    ):
        if isinstance(found := document.get(key), int) and found != ours:
            raise BundleError(
                f"{source}: {key} is {found}, this pe_infer reads {ours}: install the pe_infer "
                "that the bundle was made for, or the bundle made for this one",
                code=Code.BUNDLE_VERSION,
            )
    try:
        return Manifest.model_validate_json(json.dumps(document))
    except ValidationError as exc:
        _refuse(
            source, "; ".join(_one_error(error) for error in exc.errors(include_url=False)[:5]), exc
        )
    except ConfigurationError as exc:  # raised by the grid's own checks
        _refuse(source, f"grid: {exc}", exc)


def write_bundle(
    folder: Path, document: Mapping[str, Any], files: Mapping[str, bytes | Path]
) -> Bundle:
    """Write a bundle and load it again.

    Args:
        folder: Made if it is not there; files of the same names are replaced, ``bundle.json`` last.
            The certificate of a bundle that was there before is removed.
        document: The manifest without ``files``.
        files: Contents, or where to read them, of every file that the manifest names, and of any
            others to be listed.

    Returns:
        The bundle, as loaded from ``folder``.

    Raises:
        BundleError: What would be written could not be loaded. Where a file's name, the manifest or
            the certificate is at fault, nothing has been written.
    """
    contents = {
        name: data if isinstance(data, bytes) else data.read_bytes() for name, data in files.items()
    }
    hashes = {
        name: {"sha256": hashlib.sha256(data).hexdigest()}
        for name, data in sorted(contents.items())
    }
    manifest = validate({**document, "files": hashes}, folder / MANIFEST)
    for name in contents:
        _check_name(folder, name)
        if name == MANIFEST:
            _refuse(folder / name, "is written from the manifest: it cannot be a file too", None)
    _certificate(manifest, contents, folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, data)
    _replace(
        folder / MANIFEST, (json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n").encode()
    )
    if CERTIFICATE_FILE not in contents:
        (folder / CERTIFICATE_FILE).unlink(missing_ok=True)
    return Bundle.load(folder)


def add_certificate(bundle: Bundle, certificate: Certificate) -> Bundle:
    """Put a certificate into a bundle's folder, in the place of an earlier one.

    Graphs stay as they are. The bundle's own sha256 changes, so engines that were built from it are
    stale.

    Raises:
        BundleError: It is a certificate of another bundle (``bundle.invalid``): nothing is changed.
    """
    return _rewritten(
        bundle,
        {"certificate": {"file": CERTIFICATE_FILE}},
        {CERTIFICATE_FILE: certificate.to_bytes()},
    )


def set_checks(bundle: Bundle, checks: Sequence[Check], version: str) -> Bundle:
    """Give a bundle in its folder other checks of the images, and another version.

    Graphs, golden data and certificate stay as they are: checks look at planes before any network
    does. The bundle's own sha256 changes, so engines that were built from it are stale.

    Raises:
        BundleError: The manifest would not be valid (``bundle.invalid``): nothing is changed.
    """
    documents = [check.model_dump(mode="json") for check in checks]
    return _rewritten(bundle, {"checks": documents, "version": version}, {})


def _rewritten(
    bundle: Bundle, changes: Mapping[str, Any], added: Mapping[str, bytes | Path]
) -> Bundle:
    """The bundle with other values in its manifest and other or further files, in its folder."""
    document = bundle.manifest.model_dump(mode="json", exclude={"files"})
    earlier = bundle.manifest.certificate if CERTIFICATE_FILE in added else None
    kept = {
        name: data for name, data in bundle.files.items() if earlier is None or name != earlier.file
    }
    return write_bundle(bundle.folder, {**document, **changes}, {**kept, **added})


def _certificate(
    manifest: Manifest, files: Mapping[str, bytes], folder: Path
) -> Certificate | None:
    if manifest.certificate is None:
        return None
    source = folder / manifest.certificate.file
    try:
        certificate = Certificate.model_validate_json(files[manifest.certificate.file])
    except ValidationError as exc:
        errors = "; ".join(_one_error(error) for error in exc.errors(include_url=False)[:5])
        _refuse(source, f"not a certificate: {errors}", exc)
    if problem := certificate.misfit(manifest):
        _refuse(
            source,
            f"the certificate does not belong to this bundle: {problem}. Measure this bundle with "
            "'python -m export.certify'.",
            None,
        )
    return certificate


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)


def _check_name(folder: Path, name: str) -> None:
    path = PurePosixPath(name)
    if (
        path.is_absolute()
        or set(path.parts) & {"..", "."}
        or any(c in name for c in "\\:\0")
        or str(path) != name
    ):
        raise BundleError(
            f"{folder / MANIFEST}: file name {name!r} must be a plain relative path inside the "
            "bundle, such as 'graphs/encoder.onnx'",
            code=Code.BUNDLE_PATH,
        )


def _read_inside(folder: Path, name: str, max_bytes: int | None = None) -> bytes:
    _check_name(folder, name)
    try:
        path = (folder / name).resolve(strict=True)
        if not path.is_relative_to(folder.resolve()):
            raise BundleError(
                f"{folder / name}: leads to {path}, outside the bundle's folder. Put the file "
                "itself into the bundle.",
                code=Code.BUNDLE_PATH,
            )
        if not path.is_file():
            raise BundleError(f"{folder / name}: not a regular file", code=Code.BUNDLE_INVALID)
        if max_bytes is not None and path.stat().st_size > max_bytes:
            raise BundleError(
                f"{folder / name}: {path.stat().st_size} bytes, at most {max_bytes} expected",
                code=Code.BUNDLE_INVALID,
            )
        return path.read_bytes()
    except FileNotFoundError as exc:
        raise BundleError(
            f"{folder / name}: missing. Install the bundle again.", code=Code.BUNDLE_ALTERED
        ) from exc
    except (OSError, RuntimeError) as exc:  # RuntimeError: a loop of symbolic links
        raise BundleError(
            f"{folder / name}: cannot be read: {exc}", code=Code.BUNDLE_INVALID
        ) from exc


def _document(folder: Path) -> dict[str, Any]:
    return _parse(_read_inside(folder, MANIFEST, MAX_MANIFEST_BYTES), folder / MANIFEST)


def _parse(text: bytes, source: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"a key is there twice among {names}")
        return found

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            raise ValueError(f"number {number} is not finite")
        return value

    try:
        document = json.loads(
            text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite
        )
    except (ValueError, RecursionError) as exc:
        _refuse(source, f"not valid JSON: {exc}", exc)
    if not isinstance(document, dict):
        _refuse(source, "not a JSON object", None)
    return document


def _identity(document: Mapping[str, Any]) -> str:
    """Hash of the manifest's canonical form: sorted keys, no spaces, UTF-8."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _refuse_foreign_data(graph: bytes, source: Path) -> None:
    try:
        foreign = external_tensors(graph)
    except NotOnnxError as exc:
        raise BundleError(f"{source}: not an ONNX model: {exc}", code=Code.BUNDLE_GRAPH) from exc
    if foreign:
        raise BundleError(
            f"{source}: {len(foreign)} tensors ({', '.join(foreign[:3])}) keep their values in "
            "another file, which a bundle may not do. Save the model as one file.",
            code=Code.BUNDLE_PATH,
        )


def _one_error(error: Mapping[str, Any]) -> str:
    place = ".".join(str(part) for part in error["loc"])
    shown = _shortened(repr(error["input"]))
    return f"{place or 'manifest'}: {error['msg']} (found {shown})"


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def _refuse(source: Path | str, problem: str, cause: Exception | None) -> NoReturn:
    raise BundleError(f"{source}: {problem}", code=Code.BUNDLE_INVALID) from cause
