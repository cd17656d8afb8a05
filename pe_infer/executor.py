"""Runs a study program over the slabs of one stream.

An executor belongs to one stream and is not thread-safe. It owns the sequences, the recurrent
states and every copy that is made; engine sessions read and write its arrays in place. Whatever
fails leaves it as it was: work goes to rows behind the last valid one, and the number of valid rows
is set last.

All of it lies in the memory of the study's lane. Nothing here waits for a value but one fetch at
the end of a push, and one at the end of `Executor.finish` (another per graph behind a reduction).
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pe_infer.engines.base import Engine, Session
from pe_infer.engines.lane import HostLane, Lane, Tensor
from pe_infer.errors import Code, ConfigurationError, EngineError, StreamError
from pe_infer.manifest import SLAB, Direction, MapNode, Node, ReduceNode, ScanNode, State
from pe_infer.program import Plan, Program, Sweep

Checkpoint: TypeAlias = Callable[[], None]
StatePair: TypeAlias = tuple[Sequence[Tensor], Sequence[Tensor]]  # before a slab, and after it

FIRST_CAPACITY: Final = 64  # slabs that an executor makes room for at first


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StudyOutputs:
    """What a program says of a study.

    Attributes:
        positions_um: (T,) int64, strictly ascending: the slabs that were pushed.
        slabs: Outputs with a value per slab: (T, ...) float32 in the same order.
        study: Outputs with a value per study: float32 of the sequence's shape.
    """

    positions_um: NDArray[np.int64]
    slabs: Mapping[str, Tensor]
    study: Mapping[str, Tensor]


class _Rows:
    """An array that grows along its first axis; the executor knows how many rows are valid."""

    def __init__(self, shape: tuple[int, ...], lane: Lane) -> None:
        self._shape = shape
        self._lane = lane
        self._array = lane.empty((0, *shape))

    def reserve(self, count: int, valid: int) -> None:
        """Make room for ``count`` rows, keeping the first ``valid``."""
        if count > (capacity := len(self._array)):
            grown = self._lane.empty((max(count, 2 * capacity, FIRST_CAPACITY), *self._shape))
            grown[:valid] = self._array[:valid]
            self._array = grown

    def view(self, start: int, stop: int) -> Tensor:
        """Rows as one contiguous array, without a copy."""
        return self._array[start:stop]


class Executor:
    """One study: push slabs in the order of arrival, then finish."""

    def __init__(
        self,
        program: Program,
        engines: Mapping[str, Engine],
        *,
        arrival: Direction | None = None,
        lane: Lane | None = None,
    ) -> None:
        """Create the sessions.

        Args:
            program: What to run.
            engines: An engine for every graph node's name, checked against the manifest
                (`pe_infer.compiled`).
            arrival: Order in which slabs will come: ``down`` is by decreasing position. ``None``
                where the caller is free to choose: then push them as ``plan.arrival`` says.
            lane: Where the study's work is queued: `pe_infer.engines.base.Runtime.lane`; ``None``
                is the host.

        Raises:
            EngineError: A session cannot be created.
        """
        self.plan: Plan = program.plan(arrival)
        self._program = program
        self._engines = engines
        self._lane = lane or HostLane()
        self._sessions: dict[str, Session] = {
            node.name: engines[node.name].session(self._lane) for node in program.graph_nodes
        }
        self._kept = {
            name: _Rows(program.specs[name].shape, self._lane)
            for name in sorted(self.plan.online.kept)
        }
        self._states = {
            _state_key(node, state): _Rows(state.shape, self._lane)
            for node in self.plan.online.nodes
            if isinstance(node, ScanNode)
            for state in node.states
        }
        maps = [node.name for node in program.graph_nodes if isinstance(node, MapNode)]
        self._chunk = max((engines[name].batch_sizes[-1] for name in maps), default=1)
        self._read = {name for node in program.nodes for name in node.inputs.values()}
        self._scratch: dict[str, Tensor] = {}
        self._positions_um: list[int] = []
        self._seconds: dict[str, float] = dict.fromkeys((node.name for node in program.nodes), 0.0)
        self._closed = False

    @property
    def slab_count(self) -> int:
        """Slabs pushed and not dropped."""
        return len(self._positions_um)

    @property
    def seconds_by_node(self) -> Mapping[str, float]:
        """Time spent in each node so far, by what succeeded. On a device: in queueing it."""
        return MappingProxyType(self._seconds)

    def push(
        self, slabs: Sequence[tuple[int, Tensor]], *, checkpoint: Checkpoint | None = None
    ) -> dict[str, Tensor]:
        """Run the online nodes over new slabs.

        Args:
            slabs: Position of the middle plane in micrometres and the (channels, rows, cols)
                float32 tensor, on the host or of the lane, in the order of arrival. Gated slabs are
                not pushed.
            checkpoint: Called before every run of an engine; what it raises ends the push.

        Returns:
            The outputs that are online and have a value per slab: (number of new slabs, ...)
            float32 NumPy copies.

        Raises:
            ConfigurationError: A slab is not behind the previous one in the direction of arrival.
            EngineError: A slab has the wrong shape or type, or the runtime failed.
            StreamError: The study is finished.
        """
        self._refuse_closed()
        self._check_slabs(slabs)
        start, stop = self.slab_count, self.slab_count + len(slabs)
        seconds = dict(self._seconds)
        tensors = [tensor for _, tensor in slabs]
        with self._lane:
            for rows in (*self._kept.values(), *self._states.values()):
                rows.reserve(stop, start)
            for at in range(0, len(slabs), self._chunk):
                self._push_chunk(tensors[at : at + self._chunk], start + at, seconds, checkpoint)
            names = sorted(self._kept.keys() & self._program.outputs.values())
            found = self._fetch({name: self._kept[name].view(start, stop) for name in names})
        self._seconds = seconds
        self._positions_um += [position for position, _ in slabs]
        return {
            output: found[name].copy()
            for output, name in self._program.outputs.items()
            if name in found
        }

    def truncate(self, slab_count: int) -> None:
        """Drop all but the first ``slab_count`` slabs pushed, as if the others had never come.

        Raises:
            ConfigurationError: There are fewer.
            StreamError: The study is finished.
        """
        self._refuse_closed()
        if not 0 <= slab_count <= self.slab_count:
            raise ConfigurationError(
                f"slab_count={slab_count} must be between 0 and {self.slab_count}"
            )
        del self._positions_um[slab_count:]

    def finish(self, *, checkpoint: Checkpoint | None = None) -> StudyOutputs:
        """Run what is left and release everything.

        Args:
            checkpoint: Called before every run of an engine; what it raises ends the call.

        Raises:
            ConfigurationError: No slab was pushed.
            EngineError: The runtime failed. The executor is as it was: finish again, or push more.
            StreamError: The study is finished already.
        """
        self._refuse_closed()
        if not (count := self.slab_count):
            raise ConfigurationError("no slab was pushed: there is nothing to finish")
        seconds = dict(self._seconds)
        with self._lane:
            live = {name: rows.view(0, count) for name, rows in self._kept.items()}
            for sweep in self.plan.deferred:
                self._sweep(sweep, live, count, seconds, checkpoint)
            found = self._fetch({name: live[name] for name in self._asked_for() & live.keys()})
            for node in self.plan.study:
                began = time.perf_counter()
                self._run_once(node, found, checkpoint)
                seconds[node.name] += time.perf_counter() - began
        outputs = self._collect(found)
        self._seconds = seconds
        self._closed = True
        for owned in (self._sessions, self._kept, self._states, self._scratch):
            owned.clear()
        return outputs

    def _asked_for(self) -> set[str]:
        """Sequences of which the host needs the values."""
        reduced = {name for node in self.plan.study for name in node.inputs.values()}
        return reduced | set(self._program.outputs.values())

    def _fetch(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values on the host, to be read before the next fetch."""
        return dict(zip(arrays, self._lane.fetch(list(arrays.values())), strict=True))

    def _push_chunk(
        self,
        tensors: list[Tensor],
        start: int,
        seconds: dict[str, float],
        checkpoint: Checkpoint | None,
    ) -> None:
        """The online sweep over a few slabs, whose rows begin at ``start``."""

        def states(node: ScanNode, i: int) -> StatePair:
            row = start + i
            tracks = [self._states[_state_key(node, state)] for state in node.states]
            olds = [t.view(row - 1, row) for t in tracks] if row else self._initial(node)
            return olds, [t.view(row, row + 1) for t in tracks]

        stop = start + len(tensors)
        kept = {name: rows.view(start, stop) for name, rows in self._kept.items()}
        live = {SLAB: self._block_of(tensors, start)}
        self._run(self.plan.online, live, kept, range(len(tensors)), states, seconds, checkpoint)

    def _sweep(
        self,
        sweep: Sweep,
        live: dict[str, Tensor],
        count: int,
        seconds: dict[str, float],
        checkpoint: Checkpoint | None,
    ) -> None:
        """A deferred sweep; ``live`` gets what it keeps and loses what nobody needs any more."""
        empty = self._lane.empty
        kept = {name: empty((count, *self._program.specs[name].shape)) for name in sweep.kept}
        carried: dict[str, StatePair] = {
            node.name: (self._initial(node), [empty((1, *s.shape)) for s in node.states])
            for node in sweep.nodes
            if isinstance(node, ScanNode)
        }

        def states(node: ScanNode, _i: int) -> StatePair:
            olds, news = carried[node.name]
            carried[node.name] = news, olds
            return olds, news

        backwards = sweep.direction != self.plan.arrival
        for done in range(0, count, self._chunk):
            start, stop = done, min(done + self._chunk, count)
            rows = range(stop - start)
            if backwards:
                start, stop, rows = count - stop, count - start, rows[::-1]
            self._run(
                sweep,
                {name: array[start:stop] for name, array in live.items()},
                {name: array[start:stop] for name, array in kept.items()},
                rows,
                states,
                seconds,
                checkpoint,
            )
        live.update(kept)
        for name in sweep.freed:
            del live[name]

    def _run(
        self,
        sweep: Sweep,
        live: dict[str, Tensor],
        kept: Mapping[str, Tensor],
        rows: range,
        states: Callable[[ScanNode, int], StatePair],
        seconds: dict[str, float],
        checkpoint: Checkpoint | None,
    ) -> None:
        """The nodes of a sweep over one chunk of slabs.

        Args:
            sweep: What to run.
            live: The chunk of every sequence that is there; gets what the nodes write.
            kept: Where to write what is kept.
            rows: The rows of the chunk in the order of the sweep.
            states: Where a scan finds its states for a row and where it leaves the next ones;
                called once per row, in order.
            seconds: Time by node, added to.
            checkpoint: See `push`.
        """
        for node in sweep.nodes:
            began = time.perf_counter()
            reads = {tensor: live[name] for tensor, name in node.inputs.items()}
            writes = {
                tensor: kept[name] if name in kept else self._buffer(name, len(rows))
                for tensor, name in node.outputs.items()
                if name in kept or name in self._read
            }
            if isinstance(node, ScanNode):
                for row in rows:
                    self._step(node, reads, writes, row, states(node, row), checkpoint)
            else:
                self._map(node, reads, writes, len(rows), checkpoint)
            live.update({node.outputs[tensor]: array for tensor, array in writes.items()})
            seconds[node.name] += time.perf_counter() - began

    def _run_once(
        self, node: Node, found: dict[str, Tensor], checkpoint: Checkpoint | None
    ) -> None:
        """A reduction, or a map of reduced values; ``found`` is on the host."""
        if isinstance(node, ReduceNode):
            (name,), (result,) = node.inputs.values(), node.outputs.values()
            found[result] = self._reduce(node, found[name])
            return
        reads = {tensor: self._own(found[name][np.newaxis]) for tensor, name in node.inputs.items()}
        writes = {
            tensor: self._lane.empty((1, *self._program.specs[name].shape))
            for tensor, name in node.outputs.items()
        }
        self._map(node, reads, writes, 1, checkpoint)
        results = self._fetch({node.outputs[tensor]: array for tensor, array in writes.items()})
        found.update({name: array[0].copy() for name, array in results.items()})

    def _own(self, array: Tensor) -> Tensor:
        """An array where engines can use it: itself, or a copy in the lane."""
        if self._lane.holds(array):
            return array
        copy = self._lane.empty(array.shape)
        self._lane.copy(array, copy)
        return copy

    def _map(
        self,
        node: Node,
        reads: Mapping[str, Tensor],
        writes: Mapping[str, Tensor],
        count: int,
        checkpoint: Checkpoint | None,
    ) -> None:
        session = self._sessions[node.name]
        for start, stop in batches(count, self._engines[node.name].batch_sizes):
            if checkpoint:
                checkpoint()
            session.run(
                {tensor: array[start:stop] for tensor, array in reads.items()},
                {tensor: array[start:stop] for tensor, array in writes.items()},
            )

    def _step(
        self,
        node: ScanNode,
        reads: Mapping[str, Tensor],
        writes: Mapping[str, Tensor],
        row: int,
        states: StatePair,
        checkpoint: Checkpoint | None,
    ) -> None:
        """One slab of a scan; the next states are written in place."""
        if checkpoint:
            checkpoint()
        inputs = {tensor: array[row : row + 1] for tensor, array in reads.items()}
        out = {tensor: array[row : row + 1] for tensor, array in writes.items()}
        for state, old, new in zip(node.states, *states, strict=True):
            inputs[state.input] = old
            out[state.output] = new
        self._sessions[node.name].run(inputs, out)

    def _reduce(self, node: ReduceNode, values: Tensor) -> Tensor:
        """Sums run in double by ascending position: arrival does not change a bit."""
        ascending = values if self.plan.arrival == "up" else values[::-1]
        if node.reducer == "max":
            largest: Tensor = ascending.max(axis=0)
            return largest
        total = np.zeros(values.shape[1:], np.float64)
        for row in ascending:
            total += row
        mean: Tensor = (total / len(values)).astype(np.float32)
        return mean

    def _collect(self, found: Mapping[str, Tensor]) -> StudyOutputs:
        step = 1 if self.plan.arrival == "up" else -1
        slabs: dict[str, Tensor] = {}
        study: dict[str, Tensor] = {}
        for output, name in self._program.outputs.items():
            if self._program.sequences[name] == "slab":
                slabs[output] = found[name][::step].copy()
            else:
                study[output] = found[name].copy()
        return StudyOutputs(
            positions_um=np.array(self._positions_um[::step], np.int64),
            slabs=MappingProxyType(slabs),
            study=MappingProxyType(study),
        )

    def _block_of(self, tensors: list[Tensor], start: int) -> Tensor:
        """New slabs as one array; a single one that lies in the lane is not copied."""
        if SLAB in self._kept:
            block = self._kept[SLAB].view(start, start + len(tensors))
        elif len(tensors) == 1 and self._lane.holds(tensors[0]):
            return tensors[0][np.newaxis]
        else:
            block = self._buffer(SLAB, len(tensors))
        for row, tensor in enumerate(tensors):
            self._lane.copy(tensor, block[row])
        return block

    def _buffer(self, name: str, count: int) -> Tensor:
        """Room for ``count`` slabs of a sequence that is not kept."""
        if name not in self._scratch:
            self._scratch[name] = self._lane.empty((self._chunk, *self._program.specs[name].shape))
        return self._scratch[name][:count]

    def _initial(self, node: ScanNode) -> list[Tensor]:
        """The states before the first slab."""
        blocks = [self._lane.empty((1, *state.shape)) for state in node.states]
        for block, state in zip(blocks, node.states, strict=True):
            block.fill(state.initial)
        return blocks

    def _check_slabs(self, slabs: Sequence[tuple[int, Tensor]]) -> None:
        expected = self._program.specs[SLAB].shape
        sign = 1 if self.plan.arrival == "up" else -1
        last = self._positions_um[-1] if self._positions_um else None
        for position_um, tensor in slabs:
            if tensor.shape != expected or tensor.dtype != np.float32:
                raise EngineError(
                    f"slab at {position_um} um is {tensor.dtype} {tensor.shape}, expected float32 "
                    f"{expected}",
                    code=Code.ENGINE_INPUT,
                )
            if last is not None and sign * (position_um - last) <= 0:
                raise ConfigurationError(
                    f"slab at {position_um} um pushed after the one at {last} um, expected arrival "
                    f"{self.plan.arrival!r}: truncate to the slabs before it first"
                )
            last = position_um

    def _refuse_closed(self) -> None:
        if self._closed:
            raise StreamError("the study is finished: open a new executor")


def batches(count: int, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut ``range(count)`` into runs of the given batch sizes, largest first."""
    start = 0
    for size in reversed(sizes):
        while count - start >= size:
            yield start, start + size
            start += size


def _state_key(node: ScanNode, state: State) -> tuple[str, str]:
    return node.name, state.input
