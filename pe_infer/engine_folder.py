"""Built engines on disk: an ``engines.json`` and the files that it lists, in a private folder.

Deserialising an engine runs what the file says, so its bytes are handed out only if nobody but this
user can have written them: folder and files belong to this user, nobody else may write them, no
symbolic link is followed, the file is listed, and its sha256 is that of the manifest. The bytes
that were hashed are the bytes that are returned. Nothing is deserialised here. The folders above do
not matter: whoever may move this one cannot make another that belongs to this user.

Files are named after their contents. One process at a time writes: new engines beside the old ones,
then the manifest in one step, then every engine that it does not list is removed. Whoever reads
meanwhile gets an engine of the manifest that was opened, or a refusal, never another one.
"""

import fcntl
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn, Self

from pydantic import ValidationError

from pe_infer.bundle import Bundle
from pe_infer.engine_manifest import ENGINE_FORMAT_VERSION, EngineManifest, StoredFile
from pe_infer.errors import Code, ConfigurationError, EngineError
from pe_infer.half import CONVERSION_VERSION
from pe_infer.machine import Machine
from pe_infer.manifest import ReduceNode

ENGINES: Final = "engines.json"
MAX_MANIFEST_BYTES: Final = 1 << 20
_PRIVATE_FOLDER: Final = 0o700
_PRIVATE_FILE: Final = 0o600
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_OURS: Final = re.compile(
    r"\.?([a-z][a-z0-9_]*-[0-9a-f]{12}\.(engine|cache)|engines\.json)(\.[0-9]+\.partial)?"
)
_REBUILD: Final = "Build the engines again (pe-infer build)."


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFolder:
    """A folder whose manifest was read and may be trusted.

    Attributes:
        folder: Where it is.
        manifest: What it says.
    """

    folder: Path
    manifest: EngineManifest

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read the manifest.

        Raises:
            EngineError: There is none (``engine.unavailable``); folder or manifest could be written
                by others, or it is not a manifest (``engine.untrusted``); its format version is not
                ours (``engine.stale``).
        """
        with _private(folder) as descriptor:
            try:
                text = _read(descriptor, folder, ENGINES, MAX_MANIFEST_BYTES)
            except FileNotFoundError as exc:
                raise EngineError(
                    f"{folder}: no engines here: {ENGINES} is missing. Build them (pe-infer "
                    "build).",
                    code=Code.ENGINE_UNAVAILABLE,
                ) from exc
        return cls(folder=folder, manifest=_manifest(text, folder / ENGINES))

    def staleness(self, bundle: Bundle) -> dict[str, list[str]]:
        """Per node of the bundle or of this folder: why its engine must be built again."""
        ours = self.manifest
        nodes = {n.name: n for n in bundle.manifest.nodes if not isinstance(n, ReduceNode)}
        reasons: dict[str, list[str]] = {name: [] for name in (*nodes, *ours.engines)}
        if ours.bundle.sha256 != bundle.sha256:
            changed = (
                f"built from bundle {ours.bundle.name} {ours.bundle.version} "
                f"({ours.bundle.sha256[:12]}), now it is {bundle.manifest.name} "
                f"{bundle.manifest.version} ({bundle.sha256[:12]})"
            )
            for each in reasons.values():
                each.append(changed)
        for name, found in reasons.items():
            if name not in ours.engines:
                found.append("no engine was built for this node")
                continue
            entry = ours.engines[name]
            if name not in nodes:
                found.append("the bundle has no such node")
            elif entry.graph_sha256 != bundle.manifest.files[nodes[name].graph].sha256:
                found.append(f"built from another {entry.graph}")
            elif entry.precision != nodes[name].precision:
                found.append(f"built as {entry.precision}, the bundle says {nodes[name].precision}")
            if ours.precision == "fp16" and ours.conversion_version != CONVERSION_VERSION:
                found.append(
                    f"built by version {ours.conversion_version} of the float16 rules, this "
                    f"pe_infer has version {CONVERSION_VERSION}"
                )
        return reasons

    def read(self, node: str, *, bundle: Bundle, machine: Machine) -> bytes:
        """The bytes of a node's engine, fit to be deserialised on a machine.

        Args:
            node: Of the bundle's program.
            bundle: What will be run.
            machine: Where.

        Raises:
            EngineError: The engine was built from something else (``engine.stale``) or for another
                machine (``engine.unfit``), or the file is missing, altered, or could be written by
                others (``engine.untrusted``).
        """
        stale = self.staleness(bundle).get(node, ["neither bundle nor engines have such a node"])
        if stale:
            raise EngineError(
                f"{self.folder}: engine of node {node!r}: {'; '.join(stale)}. {_REBUILD}",
                code=Code.ENGINE_STALE,
            )
        if misfits := self.manifest.misfits(machine):
            raise EngineError(
                f"{self.folder}: engine of node {node!r}: {'; '.join(misfits)}. Build the engines "
                "on this machine, or for it (pe-infer build).",
                code=Code.ENGINE_UNFIT,
            )
        return self.read_file(self.manifest.engines[node])

    def read_file(self, entry: StoredFile) -> bytes:
        """The bytes of a file that the manifest lists; says nothing of bundle and machine.

        Raises:
            EngineError: It is missing, altered, or could be written by others
                (``engine.untrusted``).
        """
        with _private(self.folder) as descriptor:
            try:
                data = _read(descriptor, self.folder, entry.file, entry.bytes)
            except FileNotFoundError as exc:
                _refuse(self.folder / entry.file, f"missing. {_REBUILD}", exc)
        if (found := hashlib.sha256(data).hexdigest()) != entry.sha256:
            _refuse(
                self.folder / entry.file,
                f"sha256 is {found}, {ENGINES} says {entry.sha256}: the file was altered. "
                f"{_REBUILD}",
            )
        return data


def stored(stem: str, data: bytes, kind: str = "engine") -> StoredFile:
    """What the manifest says of a file."""
    digest = hashlib.sha256(data).hexdigest()
    return StoredFile(file=f"{stem}-{digest[:12]}.{kind}", sha256=digest, bytes=len(data))


def prepare_folder(folder: Path) -> EngineFolder | None:
    """Make a private folder for engines, or see that an old one may be written to.

    Returns:
        What is there already, if it can be read and trusted.

    Raises:
        ConfigurationError: It cannot be made or written, is not private, or holds other things.
    """
    try:
        folder.mkdir(mode=_PRIVATE_FOLDER, parents=True)
    except FileExistsError:
        pass
    except OSError as exc:
        raise ConfigurationError(f"{folder}: cannot be made: {exc.strerror}") from exc
    else:
        return None
    try:
        with _private(folder) as descriptor:
            names = os.listdir(descriptor)  # noqa: PTH208  pathlib takes no descriptor
    except EngineError as exc:
        raise ConfigurationError(f"{exc} Or name a new folder.") from exc
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigurationError(f"{folder}: may not be written. Name another folder.")
    try:
        return EngineFolder.open(folder)
    except EngineError as exc:
        others = sum(not _OURS.fullmatch(name) for name in names)
        if others and exc.code != Code.ENGINE_STALE:
            raise ConfigurationError(
                f"{folder}: holds {others} files or folders that are no engines, and no "
                f"{ENGINES} that can be read. Name a new folder."
            ) from exc
        return None  # a build that was cut off, or damaged: made anew


def write_engines(
    folder: Path, manifest: EngineManifest, files: Mapping[str, bytes]
) -> EngineFolder:
    """Write engines and their manifest, and remove the engines that it does not list.

    Args:
        folder: See `prepare_folder`.
        manifest: Lists ``files``, and nothing else but files that are there already.
        files: Contents by file name, as `stored` names them.

    Raises:
        ConfigurationError: The folder cannot be used, or a file cannot be written. The old engines
            are still whole then, and nothing else is there.
    """
    prepare_folder(folder)
    with _private(folder) as descriptor:
        with suppress(OSError):  # NFS locks no folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # until it is closed
        try:
            _write_all(descriptor, manifest, files)
        except OSError as exc:
            raise ConfigurationError(f"{folder}: cannot be written: {exc.strerror}") from exc
        ours = filter(_OURS.fullmatch, os.listdir(descriptor))  # noqa: PTH208
        _remove(descriptor, {*ours} - {ENGINES} - _listed(manifest))
        return EngineFolder.open(folder)


def _write_all(descriptor: int, manifest: EngineManifest, files: Mapping[str, bytes]) -> None:
    before = os.listdir(descriptor)
    try:
        for name, data in files.items():
            _write(descriptor, name, data)
        _write(descriptor, ENGINES, (manifest.model_dump_json(indent=1) + "\n").encode())
    except BaseException:
        _remove(descriptor, files.keys() - before)
        raise
    os.fsync(descriptor)


def _remove(descriptor: int, names: Iterable[str]) -> None:
    for name in names:
        with suppress(OSError):
            os.unlink(name, dir_fd=descriptor)


def add_runtime_cache(engines: EngineFolder, data: bytes) -> EngineFolder:
    """Keep kernels that were compiled for the engines of a folder beside them.

    Does nothing if other engines have been written there meanwhile.

    Raises:
        ConfigurationError: They cannot be written.
        EngineError: The folder cannot be read or trusted any more.
    """
    if EngineFolder.open(engines.folder).manifest != engines.manifest:
        return engines
    cache = stored("runtime", data, "cache")
    manifest = engines.manifest.model_copy(update={"runtime_cache": cache})
    return write_engines(engines.folder, manifest, {cache.file: data})


def _listed(manifest: EngineManifest) -> set[str]:
    caches = (manifest.timing_cache, manifest.runtime_cache)
    return {entry.file for entry in (*manifest.engines.values(), *caches) if entry}


def _write(descriptor: int, name: str, data: bytes) -> None:
    """Put a file in place in one step, and on the disk."""
    partial = f".{name}.{os.getpid()}.partial"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with suppress(FileNotFoundError):
        os.unlink(partial, dir_fd=descriptor)
    try:
        with os.fdopen(os.open(partial, flags, _PRIVATE_FILE, dir_fd=descriptor), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, name, src_dir_fd=descriptor, dst_dir_fd=descriptor)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial, dir_fd=descriptor)
        raise


def _manifest(text: bytes, source: Path) -> EngineManifest:
    try:
        document = json.loads(text)
        found = document.get("format_version") if isinstance(document, dict) else None
        if isinstance(found, int) and found != ENGINE_FORMAT_VERSION:
            raise EngineError(
                f"{source}: format_version is {found}, this pe_infer reads "
                f"{ENGINE_FORMAT_VERSION}. {_REBUILD}",
                code=Code.ENGINE_STALE,
            )
        return EngineManifest.model_validate_json(text)
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        _refuse(source, f"not an engine manifest: {place}: {first['msg']}. {_REBUILD}", exc)
    except (ValueError, RecursionError) as exc:
        _refuse(source, f"not valid JSON: {exc}. {_REBUILD}", exc)


@contextmanager
def _private(folder: Path) -> Iterator[int]:
    """A descriptor of a folder that only this user can write."""
    try:
        descriptor = os.open(folder, _READ | os.O_DIRECTORY)
    except FileNotFoundError as exc:
        raise EngineError(
            f"{folder}: no engines here: there is no such folder. Build them (pe-infer build).",
            code=Code.ENGINE_UNAVAILABLE,
        ) from exc
    except OSError as exc:  # also a symbolic link
        _refuse(
            folder,
            f"cannot be opened as a folder: {exc.strerror}. Name the folder itself, no link to it.",
            exc,
        )
    try:
        _check_owner(os.fstat(descriptor), folder)
        yield descriptor
    finally:
        os.close(descriptor)


def _read(descriptor: int, folder: Path, name: str, max_bytes: int) -> bytes:
    """The contents of a file that only this user can write.

    Raises:
        FileNotFoundError: There is none.
        EngineError: It is a link, no regular file, too large, or others can write it.
    """
    path = folder / name
    try:
        file = os.open(name, _READ, dir_fd=descriptor)
    except FileNotFoundError:
        raise
    except OSError as exc:  # also a symbolic link
        _refuse(path, f"cannot be read as a file of its own: {exc.strerror}. {_REBUILD}", exc)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            _refuse(path, f"not a regular file. {_REBUILD}")
        _check_owner(status, path)
        if status.st_size > max_bytes:
            _refuse(path, f"{status.st_size} bytes, at most {max_bytes} expected. {_REBUILD}")
        with os.fdopen(file, "rb", closefd=False) as reader:
            return reader.read(max_bytes + 1)
    finally:
        os.close(file)


def _check_owner(status: os.stat_result, path: Path) -> None:
    if status.st_uid != (user := os.geteuid()):
        _refuse(
            path,
            f"belongs to user {status.st_uid}, this is user {user}: whoever may write an engine "
            "decides what runs here. Build the engines as this user.",
        )
    if status.st_mode & _OTHERS_WRITE:
        _refuse(
            path,
            f"others than its owner may write it (mode {stat.S_IMODE(status.st_mode):04o}), and so "
            "decide what runs here. Take the permission away and build the engines again.",
        )


def _refuse(path: Path, problem: str, cause: Exception | None = None) -> NoReturn:
    raise EngineError(f"{path}: {problem}", code=Code.ENGINE_UNTRUSTED) from cause
