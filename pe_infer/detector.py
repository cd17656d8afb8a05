"""The public API: a bundle on an engine, and studies put through it."""

import itertools
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self, cast

from pe_infer import dicom
from pe_infer.bundle import Bundle
from pe_infer.compiled import CompiledProgram
from pe_infer.conclusion import Background
from pe_infer.engines.base import AUTO, EngineOptions, select
from pe_infer.errors import ConfigurationError, StreamError
from pe_infer.geometry import Slice
from pe_infer.result import QualityFlag, StudyResult, Update
from pe_infer.stream import MAX_BATCH, Stream, StreamSetup

DECODERS: Final = 2  # threads that decode ahead of the kernel in `Detector.detect`
_AHEAD: Final = 8  # slices they may be ahead
_PLANE_CACHE: Final = 16
_FLOAT_BYTES: Final = 4
_STORED_BYTES: Final = 2


def default_cache_dir() -> Path:
    """Where compiled graphs are kept: ``$XDG_CACHE_HOME/pe_infer`` or ``~/.cache/pe_infer``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pe_infer"


class Detector:
    """A bundle, compiled for this machine, that any number of studies can be put through at once.

    Thread-safe. One worker thread runs the networks for all streams in turn. Close it, or use it as
    a context manager.
    """

    def __init__(
        self,
        bundle: str | Path = "pe",
        *,
        engine: str = AUTO,
        precision: Literal["default", "float32"] = "default",
        threads: int | None = None,
        operating_point: str | None = None,
        cache_dir: Path | Literal["default"] | None = "default",
        warm_up: bool = True,
    ) -> None:
        """Load, check, compile and warm up.

        Args:
            bundle: Name of a shipped bundle, or a bundle's folder.
            engine: ``"openvino"`` or ``"onnxruntime"``: that one or an error. ``"auto"``: the first
                of them installed.
            precision: ``"default"``: what the bundle allows and the processor does best;
                ``"float32"`` everywhere.
            threads: Threads of one inference; ``None`` is one per available core.
            operating_point: One of the bundle's; ``None`` is its default.
            cache_dir: Where compiled graphs are kept (see `default_cache_dir`); ``None`` keeps
                none.
            warm_up: Run every graph once, so that the first slab is as fast as the others.

        Raises:
            BundleError: The bundle is missing, altered or inconsistent.
            EngineError: The engine is absent or refuses a graph.
            ConfigurationError: An argument has no meaning.
        """
        loaded = Bundle.load(bundle)
        point = loaded.manifest.operating_point(operating_point)
        if point is None:
            names = [p.name for p in loaded.manifest.operating_points]
            raise ConfigurationError(
                f"operating_point={operating_point!r} is none of bundle {loaded.manifest.name!r}: "
                f"{names}"
            )
        cache = default_cache_dir() if cache_dir == "default" else cache_dir
        options = EngineOptions(precision=precision, threads=threads, cache_dir=cache)
        self._compiled = CompiledProgram.compile(loaded, select(engine, options))
        if warm_up:
            self._compiled.warm_up()
        self._background = Background(compiled=self._compiled, operating_point=point)
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._jobs: queue.SimpleQueue[Stream | None] = queue.SimpleQueue()
        self._closed = False
        self._worker = threading.Thread(
            target=_work, args=(self._jobs,), name="pe_infer worker", daemon=True
        )
        self._worker.start()

    def __enter__(self) -> Self:
        """Return the detector."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the detector."""
        self.close()

    @property
    def bundle(self) -> Bundle:
        """What it runs."""
        return self._compiled.bundle

    @property
    def compiled(self) -> CompiledProgram:
        """The program and its engines: which runtime, which arithmetic."""
        return self._compiled

    def open(self) -> Stream:
        """Start a study.

        Raises:
            StreamError: The detector is closed.
        """
        if self._closed:
            raise StreamError("the detector is closed; make a new one")
        setup = StreamSetup(background=self._background, convert=_convert, schedule=self._jobs.put)
        stream = Stream(setup)
        self._streams.add(stream)
        return stream

    def detect(
        self,
        source: dicom.Source | Sequence[Slice],
        *,
        series: str | int | None = None,
        on_slice: Callable[[int, int], None] | None = None,
        on_update: Callable[[Update], None] | None = None,
    ) -> StudyResult:
        """Read a study and judge it.

        Decoding runs ahead in threads, in the direction of arrival that leaves least to do at the
        end.

        Args:
            source: A folder, DICOM files or data sets, or `Slice` objects.
            series: SeriesInstanceUID or SeriesNumber where the source holds several.
            on_slice: Called with the slices taken so far and their number.
            on_update: Called with every update.

        Raises:
            InputError: The study cannot be used.
            ScopeError: It is not what the bundle is for.
            EngineError: The engine failed.
        """
        descending = self._compiled.program.best_arrival() == "down"
        with self.open() as stream:
            if (slices := _as_slices(source)) is not None:
                ordered = sorted(slices, key=lambda image: image.position_um, reverse=descending)
                flags: Sequence[QualityFlag] = ()
                images: Iterator[Sequence[Slice]] = ([image] for image in ordered)
                total = len(ordered)
            else:
                wants_contrast = self.bundle.manifest.scope.contrast != "forbidden"
                files = cast("dicom.Source", source)
                found = dicom.open_series(files, series, prefer_contrast=wants_contrast)
                flags, total = found.flags, len(found)
                images = _decoded(found, descending=descending)
            for count, image in enumerate(images, start=1):
                for update in stream.push_slices(image, flags):
                    if on_update is not None:
                        on_update(update)
                flags = ()
                if on_slice is not None:
                    on_slice(count, total)
            result = stream.finish()
            for update in stream.updates():
                if on_update is not None:
                    on_update(update)
            return result

    def memory_bound_bytes(self, *, slices: int, extent_mm: float) -> int:
        """The most memory that one stream holds, without decoded input and the engines' own.

        Args:
            slices: Number of slices of the study.
            extent_mm: Distance of its outermost slices.
        """
        grid = self.bundle.manifest.grid
        pixels = grid.rows * grid.cols
        slabs = min(slices, int(extent_mm * 1000 / (grid.pitch_um * grid.slab_step)) + 1)
        if grid.through_plane == "source":
            slabs = max(slabs, slices)
        return (
            slices * pixels * _STORED_BYTES
            + _PLANE_CACHE * pixels * _FLOAT_BYTES
            + 2 * MAX_BATCH * grid.channels * pixels * _FLOAT_BYTES
            + max(
                self._compiled.program.memory_bytes(2 * slabs, arrival)
                for arrival in ("down", "up")
            )
        )

    def close(self) -> None:
        """Cancel all open streams and stop the worker. Does nothing the second time."""
        if self._closed:
            return
        self._closed = True
        for stream in list(self._streams):
            stream.cancel()
        self._jobs.put(None)
        self._worker.join()


def _work(jobs: "queue.SimpleQueue[Stream | None]") -> None:
    """Serve streams in turn until told to stop."""
    while (stream := jobs.get()) is not None:
        if stream.work():
            jobs.put(stream)
        del stream


def _convert(item: object) -> tuple[Sequence[Slice], Sequence[QualityFlag]]:
    if isinstance(item, Slice):
        return [item], []
    conversion = dicom.convert(item)
    return conversion.slices, conversion.flags


def _as_slices(source: object) -> list[Slice] | None:
    if isinstance(source, Slice):
        return [source]
    if isinstance(source, Sequence) and source and all(isinstance(item, Slice) for item in source):
        return list(source)
    return None


def _decoded(series: dicom.Series, *, descending: bool) -> Iterator[Sequence[Slice]]:
    """Slices in order of position, decoded a few ahead."""
    references = iter(reversed(series.references) if descending else series.references)
    with ThreadPoolExecutor(DECODERS, thread_name_prefix="pe_infer decoder") as pool:
        ahead: deque[Future[list[Slice]]] = deque(
            pool.submit(series.read, reference)
            for reference in itertools.islice(references, _AHEAD)
        )
        try:
            while ahead:
                slices = ahead.popleft().result()
                ahead.extend(pool.submit(series.read, r) for r in itertools.islice(references, 1))
                yield slices
        finally:
            pool.shutdown(cancel_futures=True)
