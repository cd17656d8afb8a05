"""Bundles on disk: what is refused, and what is read."""

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_bundles as toy
from altered_bundles import edit_manifest, replace_file
from onnx import TensorProto, helper, load_model_from_string

from pe_infer import bundle as bundles
from pe_infer import bundle_check
from pe_infer.bundle import Bundle, GoldenData, write_bundle
from pe_infer.bundle_check import build_bundle, self_test
from pe_infer.compiled import CompiledProgram
from pe_infer.engines.base import EngineOptions, select
from pe_infer.errors import BundleError, Code, ConfigurationError
from pe_infer.onnx_scan import NotOnnxError, declared_names, external_tensors


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write_toy(tmp_path_factory.mktemp("bundles") / "toy").folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "toy")
    return tmp_path / "toy"


def refused(folder: Path, code: Code) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.load(folder)
    assert caught.value.code == code
    return str(caught.value)


def test_loads_what_was_written(folder: Path) -> None:
    loaded = Bundle.load(folder)

    assert loaded.manifest.name == "toy"
    assert (
        set(loaded.files)
        == set(loaded.manifest.files)
        == {
            *(
                f"{name}.onnx"
                for name in ("encoder", "project_down", "down", "project_up", "up", "score")
            ),
            "golden.npz",
        }
    )
    assert loaded.graph(loaded.manifest.nodes[0]) == (folder / "encoder.onnx").read_bytes()
    golden = loaded.golden()
    assert golden is not None
    assert golden.slabs.shape == (3, 3, 8, 8)
    assert golden.tensor(0).max() <= 1
    assert golden.outputs.keys() == loaded.manifest.outputs.keys()
    assert loaded.manifest.sequences["slab"].axes == ("channel", "row", "col")


def test_identity_is_that_of_the_contents_not_of_the_formatting(folder: Path) -> None:
    before = Bundle.load(folder).sha256
    path = folder / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7, sort_keys=True))
    assert Bundle.load(folder).sha256 == before
    edit_manifest(folder, lambda d: d.update(intended_use="something else"))
    assert Bundle.load(folder).sha256 != before


@pytest.mark.parametrize("name", ["encoder.onnx", "golden.npz"])
def test_refuses_an_altered_byte(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    assert name in refused(folder, Code.BUNDLE_ALTERED)


@pytest.mark.parametrize("name", ["encoder.onnx", "golden.npz"])
def test_refuses_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    message = refused(folder, Code.BUNDLE_ALTERED)
    assert name in message
    assert "missing" in message


def test_compiles_the_bytes_that_were_checked(folder: Path) -> None:
    loaded = Bundle.load(folder)
    for path in folder.iterdir():
        path.write_bytes(b"changed after loading")
    runtime = select("onnxruntime", EngineOptions(threads=1))
    assert self_test(loaded, runtime).passed


@pytest.mark.parametrize("key", ["format_version", "preprocessing_version"])
def test_refuses_foreign_versions(folder: Path, key: str) -> None:
    edit_manifest(folder, lambda d: d.update({key: 2}))
    assert "2" in refused(folder, Code.BUNDLE_VERSION)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"name": "a", "name": "b"}',
        '{"threshold": NaN}',
        '{"threshold": 1e999}',
        "[" * 100_000,
        '{"n": ' + "9" * 5000 + "}",
        '{"name": "\\ud800"}',
    ],
)
def test_refuses_broken_json(folder: Path, text: str) -> None:
    (folder / "bundle.json").write_text(text)
    assert "bundle.json" in refused(folder, Code.BUNDLE_INVALID)


def test_refuses_a_manifest_of_a_size_that_none_has(folder: Path) -> None:
    with (folder / "bundle.json").open("ab") as file:
        file.truncate(bundles.MAX_MANIFEST_BYTES + 1)
    assert "at most" in refused(folder, Code.BUNDLE_INVALID)


def outside(folder: Path) -> Path:
    """A perfectly good graph that is not in the bundle."""
    path = folder.parent / "outside.onnx"
    shutil.copy(folder / "encoder.onnx", path)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "../outside.onnx",
        "{absolute}",
        "a/../../outside.onnx",
        "./encoder.onnx",
        "a//b",
        "a\\b",
        "C:x",
    ],
)
def test_refuses_names_that_could_lead_outside(folder: Path, name: str) -> None:
    path = outside(folder)
    name = name.format(absolute=path)

    def edit(document: dict[str, Any]) -> None:
        document["nodes"][0]["graph"] = name
        document["files"][name] = document["files"].pop("encoder.onnx")

    edit_manifest(folder, edit)
    assert repr(name) in refused(folder, Code.BUNDLE_PATH)


@pytest.mark.parametrize("target", ["file", "folder", "manifest"])
def test_refuses_symbolic_links_that_lead_outside(folder: Path, target: str) -> None:
    path = outside(folder)
    name = "encoder.onnx"
    if target == "file":
        (folder / name).unlink()
        (folder / name).symlink_to(path)
    elif target == "manifest":
        name = "bundle.json"
        (folder / name).rename(path)
        (folder / name).symlink_to(path)
    else:
        (folder / "graphs").symlink_to(folder.parent)

        def edit(document: dict[str, Any]) -> None:
            document["nodes"][0]["graph"] = "graphs/outside.onnx"
            document["files"]["graphs/outside.onnx"] = document["files"].pop("encoder.onnx")

        edit_manifest(folder, edit)
        name = "graphs/outside.onnx"
    assert name in refused(folder, Code.BUNDLE_PATH)


def test_allows_symbolic_links_that_stay_inside(folder: Path, tmp_path: Path) -> None:
    (folder / "encoder.onnx").rename(folder / "real.onnx")
    (folder / "encoder.onnx").symlink_to("real.onnx")
    (tmp_path / "link").symlink_to(folder)
    assert Bundle.load(tmp_path / "link").manifest.name == "toy"


def test_refuses_a_loop_of_links(folder: Path) -> None:
    (folder / "encoder.onnx").unlink()
    (folder / "encoder.onnx").symlink_to("encoder.onnx")
    refused(folder, Code.BUNDLE_INVALID)


def test_does_not_wait_for_a_pipe(folder: Path) -> None:
    (folder / "encoder.onnx").unlink()
    os.mkfifo(folder / "encoder.onnx")
    assert "not a regular file" in refused(folder, Code.BUNDLE_INVALID)


def with_external_data(graph: bytes, location: str, *, nested: bool = False) -> bytes:
    """The graph with a weight whose values are in another file."""
    tensor = TensorProto(name="leak", data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    model = load_model_from_string(graph)
    if nested:
        model.graph.node.append(helper.make_node("Constant", [], ["leak"], value=tensor))
    else:
        model.graph.initializer.append(tensor)
    return model.SerializeToString()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("location", ["/etc/hostname", "../outside.bin", "beside.bin"])
def test_refuses_graphs_that_read_other_files(folder: Path, location: str, nested: bool) -> None:
    graph = with_external_data((folder / "encoder.onnx").read_bytes(), location, nested=nested)
    replace_file(folder, "encoder.onnx", graph)
    assert "leak" in refused(folder, Code.BUNDLE_PATH)


@pytest.mark.parametrize("data", [b"", b"\x00", b"not an ONNX file at all", b"\x3a\xff\xff"])
def test_refuses_files_that_are_no_graphs(folder: Path, data: bytes) -> None:
    replace_file(folder, "encoder.onnx", data)
    assert "encoder.onnx" in refused(folder, Code.BUNDLE_GRAPH)


def test_reads_names_from_the_wire() -> None:
    assert declared_names(toy.recurrence(4)) == (["x", "h", "c"], ["y", "h_next", "c_next"])
    assert external_tensors(toy.recurrence(4)) == []
    with pytest.raises(NotOnnxError):
        external_tensors(toy.recurrence(4)[:-5])


def other_graphs() -> dict[str, tuple[str, bytes, str]]:
    add = helper.make_node("Add", ["x", "x"], ["y"])
    return {
        "another input name": ("project_up.onnx", _conv("z", ["N", 2, 4, 4]), "['z']"),
        "another shape": ("project_up.onnx", toy.project(5, 3), "(None, 3, 4, 4)"),
        "another output shape": ("project_up.onnx", toy.project(5, 2, out=6), "(None, 6, 4, 4)"),
        "a fixed batch": ("project_up.onnx", _conv("x", [2, 2, 4, 4]), "is 2, expected free"),
        "fixed for one": ("project_up.onnx", _conv("x", [1, 2, 4, 4]), "is 1, expected free"),
        "a free size": ("project_up.onnx", _conv("x", ["N", 2, "rows", 4]), "None, 4)"),
        "another type": (
            "project_up.onnx",
            toy.graph([add], {"x": ["N", 2]}, {"y": ["N", 2]}, dtype=TensorProto.DOUBLE),
            "float64, expected float32",
        ),
        "no states": ("up.onnx", toy.project(5, 4), "the inputs of the graph are ['x']"),
        "a free batch in a scan": ("up.onnx", _free_recurrence(), "expected 1"),
        "another slab": ("encoder.onnx", _slab_of(5), "(None, 5, 8, 8)"),
    }


def _conv(name: str, shape: list[int | str]) -> bytes:
    node = helper.make_node("Conv", [name, "w"], ["y"], pads=[1, 1, 1, 1])
    return toy.graph(
        [node], {name: shape}, {"y": [shape[0], 4, *shape[2:]]}, {"w": toy.weights(1, 4, 2, 3, 3)}
    )


def _free_recurrence() -> bytes:
    model = load_model_from_string(toy.recurrence(6))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    return model.SerializeToString()


def _slab_of(channels: int) -> bytes:
    model = load_model_from_string(toy.encoder())
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = channels
    weights = next(t for t in model.graph.initializer if t.name == "w1_half")
    weights.CopyFrom(
        helper.make_tensor(
            "w1_half", TensorProto.FLOAT16, [4, channels, 3, 3], [0.5] * 36 * channels
        )
    )
    return model.SerializeToString()


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("kind", other_graphs())
def test_refuses_graphs_of_another_bundle(folder: Path, kind: str, engine: str) -> None:
    name, graph, named = other_graphs()[kind]
    replace_file(folder, name, graph)
    loaded = Bundle.load(folder)
    with pytest.raises(BundleError) as caught:
        CompiledProgram.compile(loaded, select(engine, EngineOptions(threads=1)))
    assert caught.value.code == Code.BUNDLE_GRAPH
    assert name in str(caught.value)
    assert named in str(caught.value)


def test_a_batch_of_one_may_be_fixed(folder: Path) -> None:
    replace_file(folder, "project_up.onnx", _conv("x", [1, 2, 4, 4]))
    edit_manifest(folder, lambda d: d["nodes"][3].update(max_batch=1))
    CompiledProgram.compile(Bundle.load(folder), select("onnxruntime", EngineOptions(threads=1)))


# names


def test_a_plain_name_is_a_shipped_bundle_first(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(original, tmp_path / "package" / "toy")
    shutil.copytree(original, tmp_path / "here" / "toy")
    shutil.copytree(original, tmp_path / "here" / "own")
    edit_manifest(tmp_path / "here" / "toy", lambda d: d.update(version="9.9"))
    monkeypatch.setattr(bundles, "SHIPPED", tmp_path / "package")
    monkeypatch.chdir(tmp_path / "here")

    assert bundles.shipped() == ("toy",)
    assert Bundle.load("toy").manifest.version == "0.1.0"
    for folder in ("./toy", Path("toy"), tmp_path / "here" / "toy"):
        assert Bundle.load(folder).manifest.version == "9.9"
    assert Bundle.load("own").folder == Path("own")


@pytest.mark.parametrize(
    "name", ["nothing", "", "no/where", Path("/nonexistent"), "../toy", "a\0b", "long" * 1000]
)
def test_says_which_bundles_there_are(
    name: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match="shipped bundles") as caught:
        Bundle.load(name)
    assert caught.value.code == Code.BUNDLE_NOT_FOUND
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", bundles.shipped())
def test_every_shipped_bundle_loads_and_compiles(name: str) -> None:
    loaded = Bundle.load(name)
    assert loaded.manifest.name == name
    assert loaded.manifest.golden is not None
    CompiledProgram.compile(loaded, select("auto", EngineOptions(threads=1)))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", bundles.shipped())
def test_every_shipped_bundle_gives_its_golden_outputs(name: str, engine: str) -> None:
    assert self_test(Bundle.load(name), select(engine, EngineOptions(threads=1))).passed


# making bundles


def test_the_same_inputs_make_the_same_bundle(original: Path, tmp_path: Path) -> None:
    again = toy.write_toy(tmp_path / "again")
    assert again.manifest.files.keys() == Bundle.load(original).manifest.files.keys()
    assert again.manifest.sequences == Bundle.load(original).manifest.sequences


def test_a_bundle_may_do_without_golden_data(tmp_path: Path) -> None:
    document, files = toy.pe_like()
    bundle = build_bundle(tmp_path / "plain", document, files)
    assert bundle.golden() is None
    with pytest.raises(BundleError, match="no golden data") as caught:
        self_test(bundle, select("onnxruntime", EngineOptions(threads=1)))
    assert caught.value.code == Code.BUNDLE_SELF_TEST


def test_does_not_write_outside_the_folder(original: Path, tmp_path: Path) -> None:
    loaded = Bundle.load(original)
    document = loaded.manifest.model_dump(mode="json")
    with pytest.raises(BundleError) as caught:
        write_bundle(tmp_path / "new", document, {**loaded.files, "../escaped": b"x"})
    assert caught.value.code == Code.BUNDLE_PATH
    assert not list(tmp_path.iterdir())  # nor half a bundle inside it


def test_the_manifest_is_no_file_of_its_own(original: Path, tmp_path: Path) -> None:
    loaded = Bundle.load(original)
    document = loaded.manifest.model_dump(mode="json")
    with pytest.raises(BundleError, match=r"bundle\.json: is written from the manifest"):
        write_bundle(tmp_path / "new", document, {**loaded.files, "bundle.json": b"x"})
    assert not list(tmp_path.iterdir())


def test_sequences_that_are_given_are_kept(original: Path, tmp_path: Path) -> None:
    document, files = toy.pe_like()
    given = Bundle.load(original).manifest.model_dump(mode="json")["sequences"]
    given["slab"]["axes"] = ["plane", "row", "col"]
    made = build_bundle(tmp_path / "new", {**document, "sequences": given}, files)
    assert made.manifest.sequences["slab"].axes == ("plane", "row", "col")


@pytest.mark.parametrize(
    ("node", "change", "code"),
    [
        ("score", {"graph": "nowhere.onnx"}, Code.BUNDLE_INVALID),
        ("score", {"outputs": {"no_such": "score"}}, Code.BUNDLE_GRAPH),
    ],
)
def test_says_what_a_new_bundle_lacks(
    tmp_path: Path, node: str, change: dict[str, Any], code: Code
) -> None:
    document, files = toy.pe_like()
    next(n for n in document["nodes"] if n["name"] == node).update(change)
    with pytest.raises(BundleError, match=node) as caught:
        build_bundle(tmp_path / "new", document, files)
    assert caught.value.code == code


def test_golden_data_that_grew_too_large_are_refused() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 5, 512, 512), np.uint8)
    golden = GoldenData(slabs=noise, positions_um=np.arange(3), outputs={})
    with pytest.raises(ConfigurationError, match="use fewer"):
        golden.to_bytes()


def golden_with(**changes: Any) -> bytes:
    good = {"slabs": toy.golden_slabs(), "positions_um": np.arange(3, dtype=np.int64) * 5000}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{**good, **changes})
    return buffer.getvalue()


def one_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, toy.golden_slabs())
    return buffer.getvalue()


def damaged() -> bytes:
    """Golden data with a byte of the compressed stream changed."""
    data = bytearray(golden_with())
    data[100] ^= 0xFF
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        b"no zip file",
        golden_with(slabs=np.zeros((3, 3, 8, 8), np.float32)),
        golden_with(slabs=np.zeros((3, 8, 8), np.uint8)),
        golden_with(slabs=np.zeros((0, 3, 8, 8), np.uint8), positions_um=np.arange(0)),
        golden_with(positions_um=np.arange(2)),
        golden_with(positions_um=np.arange(3) * 0.5),
        golden_with(positions_um=np.arange(3)[::-1]),
        golden_with(positions_um=np.zeros(3, np.int64)),
        golden_with(**{"output.study_logit": np.zeros(1)}),
        one_array(),
        damaged(),
        golden_with(slabs=np.array([object()], dtype=object)),
    ],
)
def test_refuses_what_is_not_golden_data(folder: Path, data: bytes) -> None:
    replace_file(folder, "golden.npz", data)
    loaded = Bundle.load(folder)
    with pytest.raises(BundleError, match=r"golden\.npz") as caught:
        loaded.golden()
    assert caught.value.code == Code.BUNDLE_INVALID


# the self-test


@pytest.mark.parametrize("kind", ["pe_like", "radnet_like"])
@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("precision", ["default", "float32"])
def test_golden_outputs_are_met_everywhere(
    tmp_path: Path, kind: str, engine: str, precision: Any
) -> None:
    bundle = toy.write_toy(tmp_path / kind, kind)
    found = self_test(bundle, select(engine, EngineOptions(threads=1, precision=precision)))
    assert found.passed, found
    assert found.deviations.keys() == bundle.manifest.outputs.keys()
    if precision == "float32":
        assert set(found.engine.precision.values()) == {"float32"}
        assert found.tolerance == bundle.manifest.golden.tolerance.float32  # type: ignore[union-attr]


def test_the_self_test_notices_other_weights(folder: Path) -> None:
    replace_file(
        folder,
        "score.onnx",
        toy.graph(
            [
                helper.make_node("Flatten", ["x"], ["flat"]),
                helper.make_node("Gemm", ["flat", "w"], ["logit"]),
            ],
            {"x": ["N", 2, 4, 4]},
            {"logit": ["N", 1]},
            {"w": toy.weights(77, 32, 1)},
        ),
    )
    found = self_test(Bundle.load(folder), select("onnxruntime", EngineOptions(threads=1)))
    assert not found.passed
    assert found.deviations["study_logit"] > found.tolerance
    assert found.deviations["slab_logit"] == 0


def test_the_self_test_notices_values_that_are_not_numbers(folder: Path) -> None:
    golden = Bundle.load(folder).golden()
    assert golden is not None
    broken = GoldenData(
        slabs=golden.slabs,
        positions_um=golden.positions_um,
        outputs={**golden.outputs, "study_logit": np.array([np.nan], np.float32)},
    )
    replace_file(folder, "golden.npz", broken.to_bytes())
    assert not self_test(
        Bundle.load(folder), select("onnxruntime", EngineOptions(threads=1))
    ).passed


@pytest.mark.parametrize("arrival", ["down", "up"])
def test_a_nan_in_either_replay_is_no_pass(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, arrival: str
) -> None:
    golden = bundle.golden()
    assert golden is not None

    def replay(_compiled: object, _golden: object, direction: str) -> dict[str, Any]:
        return {
            name: values * np.float32(np.nan if direction == arrival else 1)
            for name, values in golden.outputs.items()
        }

    monkeypatch.setattr(bundle_check, "replay", replay)
    found = self_test(bundle, select("onnxruntime", EngineOptions(threads=1)))
    assert not found.passed
    assert set(found.deviations.values()) == {float("inf")}


def test_golden_slabs_of_another_grid_are_refused(folder: Path) -> None:
    replace_file(folder, "golden.npz", golden_with(slabs=np.zeros((3, 3, 4, 4), np.uint8)))
    with pytest.raises(BundleError, match=r"golden\.npz: slabs are \(3, 4, 4\), the program takes"):
        self_test(Bundle.load(folder), select("onnxruntime", EngineOptions(threads=1)))


def test_golden_data_of_another_program_are_refused(folder: Path) -> None:
    golden = Bundle.load(folder).golden()
    assert golden is not None
    partial = GoldenData(slabs=golden.slabs, positions_um=golden.positions_um, outputs={})
    replace_file(folder, "golden.npz", partial.to_bytes())
    with pytest.raises(BundleError, match="program gives"):
        self_test(Bundle.load(folder), select("onnxruntime", EngineOptions(threads=1)))
