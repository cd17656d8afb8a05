"""Studies, nodes and a PACS for the tests with real peers (``make test-node``)."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from node_peers import PATIENT, Node, Pacs, Study, checked, need, run

SEED = 3


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled graphs, for all nodes of a run."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def studies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Study]:
    """A positive and a negative head, made to say how many slices they have."""
    need("storescu", "echoscu", "dcmodify", "dcmdump")
    folder = tmp_path_factory.mktemp("studies")
    checked(
        sys.executable,
        "-m",
        "pe_infer",
        "phantom",
        folder,
        "--anatomy",
        "head",
        "--seed",
        SEED,
        "--slice-spacing",
        5,
    )
    found = {}
    for sign in ("positive", "negative"):
        files = folder / f"head-phantom-{SEED}-{sign}" / "dicom"
        slices = sorted(files.glob("*.dcm"))
        identity = [part for name, value in PATIENT.items() for part in ("-m", f"{name}={value}")]
        checked("dcmodify", "-nb", "-i", f"ImagesInAcquisition={len(slices)}", *identity, *slices)
        answer = files.parent / "expected.json"
        run(sys.executable, "-m", "pe_infer", "detect", files, "--json", answer)
        found[sign] = Study(files, json.loads(answer.read_text()))
    return found


@pytest.fixture(scope="session")
def positive(studies: dict[str, Study]) -> Study:
    assert studies["positive"].expected["positive"]  # type: ignore[index]
    return studies["positive"]


@pytest.fixture(scope="session")
def negative(studies: dict[str, Study]) -> Study:
    assert not studies["negative"].expected["positive"]  # type: ignore[index]
    return studies["negative"]


MakeNode = Callable[..., Node]


@pytest.fixture
def make_node(tmp_path: Path, cache: Path) -> Iterator[MakeNode]:
    """Nodes that end with the test; the log of the last one is printed if it fails."""
    made: list[Node] = []

    def make(**told: object) -> Node:
        made.append(Node(tmp_path / f"node-{len(made)}", cache, **told))
        return made[-1]

    yield make
    for node in made:
        node.close()
        if node.log.exists():
            print(node.log.read_text()[-20_000:])  # noqa: T201  pytest shows it if the test fails


@pytest.fixture
def node(make_node: MakeNode) -> Node:
    """A node that runs."""
    node = make_node()
    node.start()
    return node


@pytest.fixture
def make_pacs(tmp_path: Path) -> Iterator[Callable[[int], Pacs]]:
    need("Orthanc")
    made: list[Pacs] = []

    def make(node_port: int) -> Pacs:
        made.append(Pacs(tmp_path / f"pacs-{len(made)}", node_port))
        return made[-1]

    yield make
    for pacs in made:
        pacs.stop()
