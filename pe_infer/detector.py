"""The public API: a bundle on an engine, and studies put through it."""

import itertools
import math
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self, cast

from pe_infer import dicom
from pe_infer.bundle import Bundle
from pe_infer.checks import plane_measure
from pe_infer.compiled import CompiledProgram
from pe_infer.conclusion import Background
from pe_infer.cuda.preprocess import DeviceSliceResampler, DeviceVolume
from pe_infer.engine_store import stored_engines
from pe_infer.engines.base import AUTO, EngineOptions, select
from pe_infer.engines.tensorrt import TensorRtRuntime
from pe_infer.engines.tensorrt_vendor import FLAVOURS
from pe_infer.errors import ConfigurationError, StreamError
from pe_infer.executor import FIRST_CAPACITY
from pe_infer.geometry import Slice
from pe_infer.preprocess import CACHED_PLANES, Resampler, SlabMaker, SliceResampler, Volume
from pe_infer.program import FLOAT_BYTES
from pe_infer.result import QualityFlag, StudyResult, Update
from pe_infer.stream import MAX_BATCH, Stream, StreamSetup

DECODERS: Final = 2  # threads that decode ahead of the kernel in `Detector.detect`
_AHEAD: Final = 8  # slices they may be ahead
_STORED_BYTES: Final = 2


def default_cache_dir() -> Path:
    """Where compiled graphs are kept: ``$XDG_CACHE_HOME/pe_infer`` or ``~/.cache/pe_infer``."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "pe_infer"
    try:
        return Path.home() / ".cache" / "pe_infer"
    except RuntimeError as exc:
        raise ConfigurationError(
            "this user has no home folder for compiled graphs: set XDG_CACHE_HOME, or pass "
            "cache_dir=None"
        ) from exc


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
        engines: Path | None = None,
        warm_up: bool = True,
    ) -> None:
        """Load, check, compile and warm up.

        Args:
            bundle: Name of a shipped bundle, or a bundle's folder.
            engine: ``"openvino"``, ``"onnxruntime"``, ``"tensorrt"`` or ``"tensorrt-rtx"``: that
                one or an error. ``"auto"``: the first of the former two installed; a GPU is used
                only where it is asked for.
            precision: ``"default"``: what the bundle allows and the processor does best;
                ``"float32"`` everywhere.
            threads: Threads of one inference; ``None`` is one per available core.
            operating_point: One of the bundle's; ``None`` is its default.
            cache_dir: Where compiled graphs and TensorRT engines are kept (see
                `default_cache_dir`); ``None`` keeps none.
            engines: With TensorRT: a folder of ``pe-infer build``, which is only read. ``None``:
                those in ``cache_dir``, built there where they are missing or do not fit any more,
                which takes minutes and is logged.
            warm_up: Run every graph once, so that the first slab is as fast as the others.

        Raises:
            BundleError: The bundle is missing, altered or inconsistent.
            EngineError: The engine or its GPU is absent (``engine.unavailable``), it refuses a
                graph, or ``engines`` cannot be used (``engine.stale``, ``engine.unfit``,
                ``engine.untrusted``).
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
        self._compiled = _compiled(loaded, engine, options, engines, warm_up=warm_up)
        self._background = Background(compiled=self._compiled, operating_point=point)
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._jobs: queue.SimpleQueue[Stream | None] = queue.SimpleQueue()
        self._opening = threading.Lock()  # guards _streams and _closed
        self._closed = False
        worker = threading.Thread(
            target=_work, args=(self._jobs,), name="pe_infer worker", daemon=True
        )
        worker.start()
        # Also when nobody holds the detector or a stream any more, and when Python ends: a thread
        # that is inside the kernel then could bring the process down.
        self._stop = weakref.finalize(self, _end, self._jobs, worker)

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

    def open(self, *, producer_stream: object | None = None) -> Stream:
        """Start a study.

        Args:
            producer_stream: With an engine on a GPU, the CUDA stream on which slices that lie there
                are made: an object with ``__cuda_stream__``, a stream of PyCUDA, CuPy or PyTorch,
                or a handle. The study waits for it, on the GPU, before it reads a slice that does
                not name a stream itself, as PyTorch's and PyCUDA's do not; ``None`` is CUDA's
                default stream.

        Raises:
            ConfigurationError: ``producer_stream`` is no stream, or the engine is not on a GPU.
            EngineError: The GPU has no room for another study.
            StreamError: The detector is closed.
        """
        lane = self._compiled.runtime.lane()
        grid = self.bundle.manifest.grid
        measure = plane_measure(self.bundle.manifest.checks, grid)
        resample: Resampler
        volume: SlabMaker
        if lane.stream is not None:
            resample = DeviceSliceResampler(grid, lane.stream, producer_stream)
            volume = DeviceVolume(grid, lane.stream, measure)
        elif producer_stream is None:
            resample, volume = SliceResampler(grid), Volume(grid, measure)
        else:
            raise ConfigurationError(
                f"producer_stream={producer_stream!r} with engine {self._compiled.info.name!r}: it "
                "reads slices from memory; leave it out, or choose an engine on the GPU"
            )
        setup = StreamSetup(
            background=self._background,
            lane=lane,
            resample=resample,
            volume=volume,
            convert=_convert,
            schedule=self._schedule,
        )
        stream = Stream(setup)
        with self._opening:
            if self._closed:
                raise StreamError("the detector is closed; make a new one")
            self._streams.add(stream)
        return stream

    def detect(
        self,
        source: dicom.Source | dicom.Series | Sequence[Slice],
        *,
        series: str | int | None = None,
        on_slice: Callable[[int, int], None] | None = None,
        on_update: Callable[[Update], None] | None = None,
    ) -> StudyResult:
        """Read a study and judge it.

        Decoding runs ahead in threads, in the direction of arrival that leaves least to do at the
        end.

        Args:
            source: A folder, DICOM files or data sets, `Slice` objects, or a series that is open,
                such as that of `choose_bundle`.
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
                images: Generator[Sequence[Slice]] = ([image] for image in ordered)
                total = len(ordered)
            else:
                if isinstance(source, dicom.Series):
                    found = source
                else:
                    wants_contrast = self.bundle.manifest.scope.contrast != "forbidden"
                    files = cast("dicom.Source", source)
                    found = dicom.open_series(files, series, prefer_contrast=wants_contrast)
                flags, total = found.flags, len(found)
                images = _decoded(found, descending=descending)
            with closing(images):  # ends the decoders
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

        Counted are arrays: resampled slices, planes, slabs, sequences and states. Python's own
        objects come on top, some kB per slice.

        Args:
            slices: Number of slices of the study.
            extent_mm: Distance of its outermost slices.
        """
        grid, program = self.bundle.manifest.grid, self._compiled.program
        pixels = grid.rows * grid.cols
        slabs = int(extent_mm * 1000 / (grid.pitch_um * grid.slab_step)) + 1
        if grid.through_plane == "source":
            slabs = max(slabs, slices)
        # Arrays grow twofold, beside the old one; at the end, outputs are copied.
        rows = max(FIRST_CAPACITY, 2 * slabs) + slabs
        kept = max(program.memory_bytes(rows, arrival) for arrival in ("down", "up"))
        batch = max(MAX_BATCH, *(program.max_batch(node) for node in program.graph_nodes))
        one_slab = sum(math.prod(spec.shape) for spec in program.specs.values())
        return (
            slices * pixels * _STORED_BYTES
            + (CACHED_PLANES + 1) * pixels * FLOAT_BYTES
            + (MAX_BATCH * grid.channels * pixels + batch * one_slab) * FLOAT_BYTES
            + kept
        )

    def close(self) -> None:
        """Cancel all open streams and stop the worker. Does nothing the second time."""
        with self._opening:
            self._closed = True
            streams = list(self._streams)
        for stream in streams:
            stream.cancel()
        self._stop()

    def _schedule(self, stream: Stream) -> None:
        """Queue a stream; being a method, it keeps the detector while there is a stream."""
        self._jobs.put(stream)


def _work(jobs: "queue.SimpleQueue[Stream | None]") -> None:
    """Serve streams in turn until told to stop."""
    while (stream := jobs.get()) is not None:
        if stream.work():
            jobs.put(stream)
        del stream


def _end(jobs: "queue.SimpleQueue[Stream | None]", worker: threading.Thread) -> None:
    """Let the worker finish the jobs it has, and wait for it."""
    jobs.put(None)
    if worker is not threading.current_thread():
        worker.join()


def _compiled(
    bundle: Bundle, engine: str, options: EngineOptions, engines: Path | None, *, warm_up: bool
) -> CompiledProgram:
    """A bundle's program, compiled or loaded."""
    if engines is not None and engine not in FLAVOURS:
        raise ConfigurationError(
            f"engines={str(engines)!r} with engine={engine!r}: built engines belong to one of "
            f"{list(FLAVOURS)}; name it, or leave them out"
        )
    runtime = select(engine, options)
    stored = None
    if isinstance(runtime, TensorRtRuntime):
        stored = stored_engines(bundle, runtime, folder=engines, cache_dir=options.cache_dir)
    compiled = CompiledProgram.compile(bundle, runtime, stored.load if stored else None)
    if warm_up:
        compiled.warm_up()
        if stored:
            stored.keep_kernels()
    return compiled


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


def _decoded(series: dicom.Series, *, descending: bool) -> Generator[Sequence[Slice]]:
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
