"""The study program: which node reads what, and what can run while the scan is still on.

Static: no arrays, no engines. `pe_infer.executor` runs what is planned here.

A node is **online** when it can run as soon as a slab is there: a map of online sequences, or a
scan of online sequences whose direction is the direction of arrival. Everything else is
**deferred** until the last slab, and runs in as few sweeps over the study as possible.
"""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, NoReturn, TypeAlias

from pe_infer.errors import BundleError, Code
from pe_infer.manifest import (
    ONLINE_LOGIT,
    SLAB,
    SLAB_LOGIT,
    STUDY_LOGIT,
    ConsecutiveRule,
    Direction,
    GraphNode,
    Manifest,
    MapNode,
    Node,
    ReduceNode,
    ScanNode,
    SequenceSpec,
)

Kind: TypeAlias = Literal["slab", "study"]
FLOAT_BYTES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Nodes that run together, slab by slab, from one end of the study to the other.

    Attributes:
        direction: ``down`` is by decreasing position.
        nodes: In a working order.
        kept: Per-slab sequences written here that are needed after the sweep: kept for every slab.
            All others live for one batch.
        freed: Kept sequences of earlier deferred sweeps that nobody needs after this one.
    """

    direction: Direction
    nodes: tuple[GraphNode, ...]
    kept: frozenset[str]
    freed: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What runs when, for one direction of arrival.

    Attributes:
        arrival: Order in which slabs must be pushed: ``down`` is by decreasing position.
        online: Runs while slabs arrive. Its ``kept`` may name the slabs themselves.
        deferred: Run one after the other once all slabs are there.
        study: Nodes that run last, once per study: reductions, and maps of what they give.
    """

    arrival: Direction
    online: Sweep
    deferred: tuple[Sweep, ...]
    study: tuple[Node, ...]


class Program:
    """The checked dataflow of a manifest. Immutable and shared.

    Attributes:
        nodes: In a working order: every node after the writers of what it reads.
        sequences: Kind of every sequence: one value per slab, or one per study.
        specs: Shape of every sequence, as the manifest says.
        outputs: Output to sequence.
    """

    def __init__(self, manifest: Manifest) -> None:
        """Check the dataflow.

        Raises:
            BundleError: A sequence is unknown, written twice or not described, nodes wait for each
                other, a node reads kinds of sequences that do not fit, nobody reads a node, or the
                rule's output is of the wrong kind (``bundle.invalid``).
        """
        self._name = f"bundle {manifest.name!r}"
        self._batch = manifest.batch.max
        self.outputs: Mapping[str, str] = MappingProxyType(dict(manifest.outputs))
        writers = self._writers(manifest.nodes)
        self._check_names(manifest, writers)
        self.nodes: tuple[Node, ...] = self._ordered(manifest.nodes, writers)
        self.sequences: Mapping[str, Kind] = MappingProxyType(self._kinds())
        self._check_rule(manifest)
        self.specs: Mapping[str, SequenceSpec] = MappingProxyType(dict(manifest.sequences))
        self._check_specs(manifest)

    @property
    def graph_nodes(self) -> tuple[GraphNode, ...]:
        """The nodes that an engine runs."""
        return tuple(node for node in self.nodes if not isinstance(node, ReduceNode))

    def max_batch(self, node: GraphNode) -> int:
        """How many slabs the node's graph takes at once."""
        if isinstance(node, ScanNode) or self._kind_read(node) == "study":
            return 1
        return node.max_batch or self._batch

    def plan(self, arrival: Direction | None = None) -> Plan:
        """What runs when, for slabs by decreasing (``down``) or increasing (``up``) position.

        Args:
            arrival: ``None`` where the order is free, as in a study that is already there: the best
                one is chosen.
        """
        chosen = arrival or self.best_arrival()
        online = self._online(chosen)
        study = tuple(
            node
            for node in self.nodes
            if isinstance(node, ReduceNode) or self._kind_read(node) == "study"
        )
        waiting = tuple(
            node for node in self.graph_nodes if node not in online and node not in study
        )
        online_sweep = Sweep(
            direction=chosen,
            nodes=online,
            kept=frozenset(self._needed((*waiting, *study)) & {SLAB, *_written(online)}),
        )
        groups = self._sweeps(waiting)
        deferred: list[Sweep] = []
        held: set[str] = set()
        for at, (direction, nodes) in enumerate(groups):
            later = itertools.chain.from_iterable(group for _, group in groups[at + 1 :])
            needed = self._needed((*later, *study))
            kept = _written(nodes) & needed
            deferred.append(
                Sweep(
                    direction=direction,
                    nodes=nodes,
                    kept=frozenset(kept),
                    freed=frozenset(held - needed),
                )
            )
            held = (held | kept) & needed
        return Plan(arrival=chosen, online=online_sweep, deferred=tuple(deferred), study=study)

    def best_arrival(self) -> Direction:
        """The direction with more nodes online; ``down`` where it makes no difference."""
        return "up" if len(self._online("up")) > len(self._online("down")) else "down"

    def memory_bytes(self, slab_count: int, arrival: Direction | None = None) -> int:
        """The most that an executor's sequences and states hold at once, in bytes.

        Counts what is kept for every slab (sequences, and the online scans' states after each slab,
        which a late slice needs), and on top of it the largest moment of `Executor.finish`. Not
        counted: buffers of one batch, values per study, and what the engines themselves hold.
        """
        plan = self.plan(arrival)
        per_slab = self._bytes(plan.online.kept)
        for node in plan.online.nodes:
            if isinstance(node, ScanNode):
                per_slab += sum(math.prod(state.shape) * FLOAT_BYTES for state in node.states)
        live, peak = 0, 0
        for sweep in plan.deferred:
            live += self._bytes(sweep.kept)
            peak = max(peak, live)
            live -= self._bytes(sweep.freed)
        return slab_count * (per_slab + peak)

    def _bytes(self, names: Iterable[str]) -> int:
        """Of one value of each of these sequences."""
        return sum(math.prod(self.specs[name].shape) * FLOAT_BYTES for name in names)

    def _needed(self, nodes: Iterable[Node]) -> set[str]:
        """What ``nodes`` read, and the outputs."""
        return {*self.outputs.values(), *(name for node in nodes for name in node.inputs.values())}

    def _kind_read(self, node: Node) -> Kind:
        return self.sequences[next(iter(node.inputs.values()))]

    def _online(self, arrival: Direction) -> tuple[GraphNode, ...]:
        known = {SLAB}
        online: list[GraphNode] = []
        for node in self.graph_nodes:
            if not known.issuperset(node.inputs.values()):
                continue
            if isinstance(node, ScanNode) and node.direction != arrival:
                continue
            online.append(node)
            known.update(node.outputs.values())
        return tuple(online)

    def _sweeps(
        self, nodes: tuple[GraphNode, ...]
    ) -> list[tuple[Direction, tuple[GraphNode, ...]]]:
        """Share deferred nodes out among as few sweeps as their order allows.

        A map that writes more than it reads runs with its first reader: the less is kept.
        """
        directions: list[Direction] = []
        place: dict[str, int] = {}  # node to sweep
        written: dict[str, int] = {}  # sequence to sweep
        for node in nodes:
            at = max(written.get(name, 0) for name in node.inputs.values())
            if isinstance(node, ScanNode):
                same = (i for i in range(at, len(directions)) if directions[i] == node.direction)
                if (at := next(same, len(directions))) == len(directions):
                    directions.append(node.direction)
            place[node.name] = at
            written.update(dict.fromkeys(node.outputs.values(), at))
        for node in reversed(nodes):
            names = set(node.outputs.values())
            readers = {n.name for n in self.nodes if not names.isdisjoint(n.inputs.values())}
            grows = self._bytes(names) > self._bytes(set(node.inputs.values()))
            if isinstance(node, MapNode) and grows and readers and readers <= place.keys():
                place[node.name] = min(place[name] for name in readers)
        return [
            (direction, tuple(node for node in nodes if place[node.name] == at))
            for at, direction in enumerate(directions)
        ]

    def _writers(self, nodes: Iterable[Node]) -> dict[str, str]:
        writers = {SLAB: "the grid"}
        for node in nodes:
            for name in node.outputs.values():
                if name in writers:
                    self._refuse(
                        f"sequence {name!r} is written by {writers[name]} and by node {node.name!r}"
                    )
                writers[name] = f"node {node.name!r}"
        return writers

    def _check_names(self, manifest: Manifest, writers: Mapping[str, str]) -> None:
        for node in manifest.nodes:
            for tensor, name in node.inputs.items():
                if name not in writers:
                    self._refuse(
                        f"node {node.name!r} reads sequence {name!r} (tensor {tensor!r}), which no "
                        "node writes; "
                        f"written are {sorted(writers)}"
                    )
        for output, name in manifest.outputs.items():
            if name not in writers:
                self._refuse(
                    f"output {output!r} is sequence {name!r}, which no node writes; written: "
                    f"{sorted(writers)}"
                )
        used = {name for node in manifest.nodes for name in node.inputs.values()} | set(
            manifest.outputs.values()
        )
        for node in manifest.nodes:
            if used.isdisjoint(node.outputs.values()):
                self._refuse(
                    f"nothing reads what node {node.name!r} writes: {sorted(node.outputs.values())}"
                )

    def _ordered(self, nodes: Iterable[Node], writers: Mapping[str, str]) -> tuple[Node, ...]:
        """Keeps the manifest's order where it can."""
        ready = {SLAB}
        waiting, ordered = list(nodes), []
        while waiting:
            found = next((node for node in waiting if ready.issuperset(node.inputs.values())), None)
            if found is None:
                blocked = {
                    n.name: sorted({writers[s] for s in n.inputs.values() if s not in ready})
                    for n in waiting
                }
                self._refuse(f"nodes wait for each other: {blocked}")
            waiting.remove(found)
            ordered.append(found)
            ready.update(found.outputs.values())
        return tuple(ordered)

    def _kinds(self) -> dict[str, Kind]:
        kinds: dict[str, Kind] = {SLAB: "slab"}
        for node in self.nodes:
            read = {name: kinds[name] for name in node.inputs.values()}
            kind: Kind = "study" if "study" in read.values() else "slab"
            if not isinstance(node, MapNode) and kind == "study":
                self._refuse(
                    f"{node.kind} node {node.name!r} reads {read}: it needs sequences with a value "
                    "per slab"
                )
            if len(set(read.values())) > 1:
                self._refuse(
                    f"node {node.name!r} joins sequences of a value per slab with values per "
                    f"study: {read}"
                )
            kinds.update(
                dict.fromkeys(
                    node.outputs.values(), "study" if isinstance(node, ReduceNode) else kind
                )
            )
        return kinds

    def _check_rule(self, manifest: Manifest) -> None:
        expected: dict[str, Kind] = {
            STUDY_LOGIT: "study",
            SLAB_LOGIT: "slab",
            ONLINE_LOGIT: "slab",
        }
        for output, kind in expected.items():
            if (name := self.outputs.get(output)) and self.sequences[name] != kind:
                needed_by = (
                    f"rule {manifest.rule.kind!r}"
                    if isinstance(manifest.rule, ConsecutiveRule)
                    else "the result"
                )
                self._refuse(
                    f"output {output!r} is sequence {name!r}, a value per {self.sequences[name]}, "
                    f"but {needed_by} needs "
                    f"a value per {kind}"
                )
        online = {
            name
            for arrival in ("down", "up")
            for node in self._online(arrival)
            for name in node.outputs.values()
        }
        for output in (
            *((manifest.update_output,) if manifest.provisional_alert else ()),
            *((ONLINE_LOGIT,) if ONLINE_LOGIT in self.outputs else ()),
        ):
            if self.outputs[output] not in online:
                self._refuse(
                    f"output {output!r} is sequence {self.outputs[output]!r}, which waits for the "
                    "last slice whichever end comes first; the provisional alert and "
                    f"{ONLINE_LOGIT!r} are for what is known while slices arrive"
                )

    def _check_specs(self, manifest: Manifest) -> None:
        if difference := self.sequences.keys() ^ self.specs.keys():
            self._refuse(
                "'sequences' must describe exactly what nodes read and write; differing: "
                f"{sorted(difference)}"
            )
        for name, kind in self.sequences.items():
            if self.specs[name].per != kind:
                self._refuse(
                    f"sequence {name!r} is said to have a value per {self.specs[name].per}, it has "
                    f"one per {kind}"
                )
        grid = manifest.grid
        if self.specs[SLAB].shape != (slab := (grid.channels, grid.rows, grid.cols)):
            self._refuse(
                f"sequence {SLAB!r} has the shape {self.specs[SLAB].shape}, the grid gives {slab}"
            )
        for output, name in self.outputs.items():
            shape = self.specs[name].shape
            if output in {STUDY_LOGIT, SLAB_LOGIT, ONLINE_LOGIT} and math.prod(shape) != 1:
                self._refuse(f"output {output!r} must be one number, sequence {name!r} is {shape}")

    def _refuse(self, problem: str) -> NoReturn:
        raise BundleError(f"{self._name}: {problem}", code=Code.BUNDLE_INVALID)


def _written(nodes: Iterable[Node]) -> set[str]:
    return {name for node in nodes for name in node.outputs.values()}
