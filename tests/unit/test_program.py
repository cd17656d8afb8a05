"""Plans: what runs while slabs arrive, what waits, and which dataflows are refused."""

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from pe_infer.bundle import Bundle
from pe_infer.errors import BundleError, Code
from pe_infer.program import Program

Edit = Callable[[dict[str, Any]], object]


def names(nodes: Sequence[Any]) -> list[str]:
    return [node.name for node in nodes]


# plans


def test_head_first_arrival_leaves_only_the_second_half_for_later(bundle: Bundle) -> None:
    plan = Program(bundle.manifest).plan("down")

    assert names(plan.online.nodes) == ["encoder", "project_down", "down", "project_up"]
    assert [names(sweep.nodes) for sweep in plan.deferred] == [["up", "score"]]
    assert names(plan.study) == ["study_logit"]
    assert plan.online.kept == {"attention", "stage1_logit", "gates_up"}


def test_feet_first_arrival_still_encodes_and_projects(bundle: Bundle) -> None:
    plan = Program(bundle.manifest).plan("up")

    assert names(plan.online.nodes) == ["encoder", "project_down"]
    down, up = plan.deferred
    assert (down.direction, names(down.nodes)) == ("down", ["down"])
    assert (up.direction, names(up.nodes)) == ("up", ["project_up", "up", "score"])
    assert (down.kept, down.freed) == ({"hidden_down"}, set())
    assert (up.kept, up.freed) == ({"score"}, {"hidden_down"})
    assert plan.online.kept == {"attention", "stage1_logit", "gates_down"}


def test_a_free_order_is_the_one_with_more_work_online(bundle: Bundle, both_ways: Bundle) -> None:
    assert Program(bundle.manifest).plan().arrival == "down"
    assert Program(both_ways.manifest).best_arrival() == "down"  # no difference


def test_up_is_best_where_the_first_scan_goes_up(bundle: Bundle) -> None:
    nodes = tuple(
        node.model_copy(update={"direction": {"down": "up", "up": "down"}[node.direction]})
        if node.kind == "scan"
        else node
        for node in bundle.manifest.nodes
    )
    assert Program(bundle.manifest.model_copy(update={"nodes": nodes})).best_arrival() == "up"


def test_both_directions_are_online_in_their_own_arrival(both_ways: Bundle) -> None:
    program = Program(both_ways.manifest)
    for arrival, other in (("down", "backward"), ("up", "forward")):
        (sweep,) = program.plan(arrival).deferred
        assert names(sweep.nodes) == [other, "score"]


def test_the_order_of_nodes_in_the_manifest_does_not_matter(bundle: Bundle) -> None:
    reversed_nodes = tuple(reversed(bundle.manifest.nodes))
    program = Program(bundle.manifest.model_copy(update={"nodes": reversed_nodes}))
    assert names(program.plan("down").online.nodes) == [
        "encoder",
        "project_down",
        "down",
        "project_up",
    ]


def test_memory_is_counted_per_slab_and_at_the_largest_moment(bundle: Bundle) -> None:
    program = Program(bundle.manifest)
    row = 4 * 16  # one channel of a 4 x 4 map, float32
    kept = 4 + row + 4 * row  # logit, attention, the projection that the next scan reads
    states = 2 * 2 * row  # h and c of the online scan
    assert program.memory_bytes(10, "down") == 10 * (kept + states + 4)  # and the score
    kept, hidden = (
        4 + row + 4 * row,
        2 * row,
    )  # what the first scan writes, until the second has run
    assert program.memory_bytes(10, "up") == 10 * (kept + hidden + 4)


def test_a_map_that_shrinks_its_input_runs_with_its_writer(bundle: Bundle) -> None:
    def shrink(document: dict[str, Any]) -> None:
        document["sequences"]["gates_up"]["shape"] = [1, 4, 4]

    down, up = edited(bundle, shrink).plan("up").deferred
    assert names(down.nodes) == ["down", "project_up"]
    assert down.kept == {"gates_up"}
    assert names(up.nodes) == ["up", "score"]


# what is refused


def edited(bundle: Bundle, edit: Edit) -> Program:
    document = copy.deepcopy(bundle.manifest.model_dump(mode="json"))
    edit(document)
    return Program(type(bundle.manifest).model_validate_json(json.dumps(document)))


def node_of(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(node for node in document["nodes"] if node["name"] == name)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (
            lambda d: node_of(d, "score")["inputs"].update(x="hiden"),
            "'score' reads sequence 'hiden'",
        ),
        (lambda d: d["outputs"].update(attention="nothing"), "'nothing', which no node writes"),
        (
            lambda d: node_of(d, "score")["outputs"].update(logit="slab"),
            "'slab' is written by the grid",
        ),
        (
            lambda d: node_of(d, "score")["outputs"].update(logit="gates_up"),
            "'gates_up' is written by node 'project_up' and by node 'score'",
        ),
        (
            lambda d: node_of(d, "down")["inputs"].update(extra="hidden_up"),
            "nodes wait for each other: {'down': [\"node 'up'\"]",
        ),
        (lambda d: d["outputs"].pop("study_logit"), "needs the output 'study_logit'"),
        (
            lambda d: d["outputs"].update(study_logit="score", mean="study_logit"),
            "a value per slab",
        ),
        (lambda d: d["outputs"].update(slab_logit="study_logit"), "needs a value per slab"),
        (lambda d: d["outputs"].update(slab_logit="attention"), "must be one number"),
        (lambda d: d["sequences"].pop("gates_up"), "differing: ['gates_up']"),
        (
            lambda d: d["sequences"]["score"].update(per="study"),
            "value per study, it has one per slab",
        ),
        (lambda d: d["grid"].update(rows=9), "the grid gives (3, 9, 8)"),
    ],
)
def test_refuses_a_dataflow_that_cannot_work(bundle: Bundle, edit: Edit, named: str) -> None:
    with pytest.raises((BundleError, ValueError)) as caught:
        edited(bundle, edit)
    assert named in str(caught.value)


def add_head(document: dict[str, Any], reads: dict[str, str]) -> None:
    """A graph after the reduction."""
    node = {"name": "head", "kind": "map", "graph": "score.onnx", "inputs": reads}
    document["nodes"].append({**node, "outputs": {"logit": "final"}})
    document["sequences"]["final"] = {"shape": [1], "axes": ["value"], "per": "study"}
    document["outputs"]["study_logit"] = "final"


def test_refuses_to_join_slabs_with_the_study(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="joins sequences") as caught:
        edited(bundle, lambda d: add_head(d, {"x": "study_logit", "y": "score"}))
    assert caught.value.code == Code.BUNDLE_INVALID


@pytest.mark.parametrize("kind", ["reduce", "scan"])
def test_refuses_to_walk_over_one_value(bundle: Bundle, kind: str) -> None:
    def edit(document: dict[str, Any]) -> None:
        node = node_of(document, "study_logit" if kind == "reduce" else "up")
        extra = {**node, "name": "again", "inputs": {"x": "study_logit"}, "outputs": {"y": "final"}}
        document["nodes"].append(extra)
        document["sequences"]["final"] = {"shape": [1], "axes": ["value"], "per": "study"}
        document["outputs"]["study_logit"] = "final"

    with pytest.raises(BundleError, match="needs sequences with a value per slab"):
        edited(bundle, edit)


def test_refuses_a_node_that_nobody_reads(bundle: Bundle) -> None:
    def edit(document: dict[str, Any]) -> None:
        node = node_of(document, "score")
        document["nodes"].append({**node, "name": "idle", "outputs": {"logit": "ignored"}})
        document["sequences"]["ignored"] = document["sequences"]["score"]

    with pytest.raises(BundleError, match="nothing reads what node 'idle' writes"):
        edited(bundle, edit)
