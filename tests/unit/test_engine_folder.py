"""Only engines that nobody else can have written, that are whole, and that fit, are handed out."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_files as made_up
import pytest

from pe_infer.bundle import Bundle
from pe_infer.engine_folder import ENGINES, EngineFolder, prepare_folder, stored, write_engines
from pe_infer.engine_manifest import EngineManifest
from pe_infer.errors import Code, ConfigurationError, EngineError
from pe_infer.half import CONVERSION_VERSION
from pe_infer.machine import Machine

NODE = "encoder"


@pytest.fixture
def folder(bundle: Bundle, tmp_path: Path) -> Path:
    return made_up.write_made_up(tmp_path / "engines", bundle).folder


def engine_path(folder: Path, node: str = NODE) -> Path:
    return folder / EngineFolder.open(folder).manifest.engines[node].file


def read(folder: Path, bundle: Bundle, node: str = NODE) -> bytes:
    return EngineFolder.open(folder).read(node, bundle=bundle, machine=made_up.MACHINE)


def refusal(folder: Path, bundle: Bundle, node: str = NODE) -> EngineError:
    with pytest.raises(EngineError) as caught:
        read(folder, bundle, node)
    return caught.value


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((folder / ENGINES).read_text())
    change(document)
    (folder / ENGINES).write_text(json.dumps(document))


def test_every_engine_comes_back_as_it_was_written(folder: Path, bundle: Bundle) -> None:
    engines = EngineFolder.open(folder)
    assert engines.staleness(bundle) == {node: [] for node in engines.manifest.engines}
    for node in engines.manifest.engines:
        found = engines.read(node, bundle=bundle, machine=made_up.MACHINE)
        assert found == made_up.engine_bytes(node)


def test_what_is_written_is_private(bundle: Bundle, tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        folder = made_up.write_made_up(tmp_path / "a" / "engines", bundle).folder
    finally:
        os.umask(old)
    assert folder.stat().st_mode & 0o777 == 0o700
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600


def corrupt(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def swap(path: Path) -> None:
    path.write_bytes(made_up.engine_bytes("score"))


def link(path: Path) -> None:
    path.rename(moved := path.parent.parent / "elsewhere")
    path.symlink_to(moved)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (corrupt, "altered"),
        (truncate, "altered"),
        (lengthen, "at most"),
        (swap, "altered"),
        (link, "file of its own"),
        (pipe, "not a regular file"),
        (make_folder, "not a regular file"),
        (made_up.open_to_others, "others than its owner may write it"),
        (Path.unlink, "missing"),
    ],
)
def test_an_engine_that_is_not_whole_or_not_ours_is_refused(
    folder: Path, bundle: Bundle, damage: Callable[[Path], None], named: str
) -> None:
    damage(path := engine_path(folder))
    error = refusal(folder, bundle)
    assert error.code == Code.ENGINE_UNTRUSTED
    assert named in str(error)
    assert path.name in str(error)
    if damage is not made_up.open_to_others:
        assert read(folder, bundle, "score") == made_up.engine_bytes("score")


@pytest.mark.parametrize("damage", [link, pipe, make_folder, made_up.open_to_others])
def test_a_manifest_that_is_not_ours_is_refused(
    folder: Path, bundle: Bundle, damage: Callable[[Path], None]
) -> None:
    damage(folder / ENGINES)
    assert refusal(folder, bundle).code == Code.ENGINE_UNTRUSTED


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_can_write_is_refused(folder: Path, bundle: Bundle, mode: int) -> None:
    folder.chmod(mode)
    error = refusal(folder, bundle)
    assert error.code == Code.ENGINE_UNTRUSTED
    assert "may write it" in str(error)


def test_a_folder_that_was_opened_to_others_later_is_refused(folder: Path, bundle: Bundle) -> None:
    engines = EngineFolder.open(folder)
    made_up.open_to_others(folder)
    with pytest.raises(EngineError) as caught:
        engines.read(NODE, bundle=bundle, machine=made_up.MACHINE)
    assert caught.value.code == Code.ENGINE_UNTRUSTED


def test_what_belongs_to_someone_else_is_refused(
    folder: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = made_up.someone_else()
    monkeypatch.setattr(os, "geteuid", lambda: other)
    error = refusal(folder, bundle)
    assert error.code == Code.ENGINE_UNTRUSTED
    assert "belongs to user" in str(error)


def test_a_link_to_a_folder_is_refused(folder: Path, bundle: Bundle) -> None:
    (link_to := folder.parent / "link").symlink_to(folder)
    assert refusal(link_to, bundle).code == Code.ENGINE_UNTRUSTED


def test_an_unlisted_engine_is_never_read(folder: Path, bundle: Bundle) -> None:
    edit(folder, lambda document: document["engines"].pop(NODE))
    assert refusal(folder, bundle).code == Code.ENGINE_STALE
    assert refusal(folder, bundle, "nothing").code == Code.ENGINE_STALE


@pytest.mark.parametrize(
    "name", ["../elsewhere", "/etc/passwd", "encoder.engine", "a-0123456789ab.engine/x", ""]
)
def test_a_file_name_cannot_lead_outside(folder: Path, bundle: Bundle, name: str) -> None:
    edit(folder, lambda document: document["engines"][NODE].update(file=name))
    assert refusal(folder, bundle).code == Code.ENGINE_UNTRUSTED


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", '{"format_version": "1"}', "[" * 100_000])
def test_what_is_no_manifest_is_refused(folder: Path, bundle: Bundle, text: str) -> None:
    (folder / ENGINES).write_text(text)
    assert refusal(folder, bundle).code == Code.ENGINE_UNTRUSTED


def test_a_manifest_of_another_format_is_stale(folder: Path, bundle: Bundle) -> None:
    edit(folder, lambda document: document.update(format_version=2))
    error = refusal(folder, bundle)
    assert error.code == Code.ENGINE_STALE
    assert "pe-infer build" in str(error)


def test_a_manifest_larger_than_any_is_not_read(folder: Path, bundle: Bundle) -> None:
    with (folder / ENGINES).open("ab") as file:
        file.write(b" " * (1 << 20))
    assert refusal(folder, bundle).code == Code.ENGINE_UNTRUSTED


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_where_there_are_no_engines_the_command_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir(mode=0o700)
    with pytest.raises(EngineError, match="pe-infer build") as caught:
        EngineFolder.open(tmp_path / name)
    assert caught.value.code == Code.ENGINE_UNAVAILABLE


def test_engines_of_another_bundle_are_stale(folder: Path, both_ways: Bundle) -> None:
    error = refusal(folder, both_ways)
    assert error.code == Code.ENGINE_STALE
    assert "toy-bidirectional" in str(error)
    assert "built from another score.onnx" in "; ".join(
        EngineFolder.open(folder).staleness(both_ways)["score"]
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d["engines"][NODE].update(graph_sha256="0" * 64), "another encoder.onnx"),
        (lambda d: d["engines"][NODE].update(precision="float32"), "the bundle says reduced"),
        (lambda d: d.update(conversion_version=CONVERSION_VERSION + 1), "float16 rules"),
        (lambda d: d["bundle"].update(sha256="0" * 64), "built from bundle toy"),
    ],
)
def test_engines_of_something_else_are_stale(
    folder: Path, bundle: Bundle, change: Callable[[dict[str, Any]], Any], named: str
) -> None:
    edit(folder, change)
    error = refusal(folder, bundle)
    assert error.code == Code.ENGINE_STALE
    assert named in str(error)


def test_float32_engines_do_not_depend_on_the_float16_rules(bundle: Bundle, tmp_path: Path) -> None:
    made_up.write_made_up(tmp_path / "e", bundle, precision="fp32", conversion_version=99)
    assert read(tmp_path / "e", bundle) == made_up.engine_bytes(NODE)


def test_engines_for_another_machine_are_refused(folder: Path, bundle: Bundle) -> None:
    with pytest.raises(EngineError, match=r"8\.7") as caught:
        EngineFolder.open(folder).read(
            NODE, bundle=bundle, machine=Machine.parse("sm=87,tensorrt-rtx=1.7")
        )
    assert caught.value.code == Code.ENGINE_UNFIT


def rewritten(bundle: Bundle, folder: Path, data: bytes) -> EngineManifest:
    """Write engines where that of one node is another one."""
    manifest = made_up.engine_manifest(bundle)
    entry = manifest.engines[NODE].model_copy(update=stored(NODE, data).model_dump())
    manifest = manifest.model_copy(update={"engines": {**manifest.engines, NODE: entry}})
    files = {e.file: made_up.engine_bytes(n) for n, e in manifest.engines.items()}
    write_engines(folder, manifest, {**files, entry.file: data})
    return manifest


def test_new_engines_take_the_place_of_old_ones(folder: Path, bundle: Bundle) -> None:
    old = engine_path(folder)
    (folder / "notes.txt").write_text("of the user")

    manifest = rewritten(bundle, folder, b"new")

    assert read(folder, bundle) == b"new"
    assert not old.exists()
    listed = {entry.file for entry in manifest.engines.values()}
    assert {path.name for path in folder.iterdir()} == {*listed, ENGINES, "notes.txt"}


def test_what_killed_builds_have_left_goes_with_the_next(folder: Path, bundle: Bundle) -> None:
    for name in ("encoder-0123456789ab.engine", ".up-0123456789ab.engine.17.partial"):
        (folder / name).touch(mode=0o600)
    rewritten(bundle, folder, b"new")
    assert {path.name for path in folder.iterdir()} == {
        *(entry.file for entry in EngineFolder.open(folder).manifest.engines.values()),
        ENGINES,
    }


def test_two_builds_at_once_leave_the_engines_of_one(
    folder: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one wants what the first one removes: it waits."""
    real, second_is_done = os.replace, threading.Event()
    first = threading.Thread(target=rewritten, args=(bundle, folder, b"new"))

    def write_second() -> None:
        made_up.write_made_up(folder, bundle)
        second_is_done.set()

    second = threading.Thread(target=write_second)

    def replace(source: str, target: str, **folders: int) -> None:
        real(source, target, **folders)
        if threading.current_thread() is first and target == ENGINES:
            second.start()
            second_is_done.wait(0.5)

    monkeypatch.setattr(os, "replace", replace)
    first.start()
    first.join()
    second.join()
    assert read(folder, bundle) == made_up.engine_bytes(NODE)


def test_a_write_that_fails_leaves_the_old_engines(
    folder: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, before = os.replace, {path.name for path in folder.iterdir()}

    def full(source: str, target: str, **folders: int) -> None:
        if target == ENGINES:
            raise OSError(28, "No space left on device")
        real(source, target, **folders)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(ConfigurationError, match="No space left"):
            rewritten(bundle, folder, b"new")

    assert read(folder, bundle) == made_up.engine_bytes(NODE)
    assert {path.name for path in folder.iterdir()} == before


def test_a_first_build_that_was_cut_off_can_be_repeated(bundle: Bundle, tmp_path: Path) -> None:
    folder = made_up.write_made_up(tmp_path / "engines", bundle).folder
    (folder / ENGINES).rename(folder / ".engines.json.17.partial")
    (folder / ".encoder-0123456789ab.engine.17.partial").touch()
    made_up.write_made_up(folder, bundle)
    assert read(folder, bundle) == made_up.engine_bytes(NODE)


@pytest.mark.parametrize("damage", [cut, link, pipe, made_up.open_to_others])
def test_a_damaged_manifest_can_be_built_over(
    folder: Path, bundle: Bundle, damage: Callable[[Path], None]
) -> None:
    damage(folder / ENGINES)
    made_up.write_made_up(folder, bundle)
    assert read(folder, bundle) == made_up.engine_bytes(NODE)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_built(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda _, mode: not mode & os.W_OK)
    with pytest.raises(ConfigurationError, match="may not be written"):
        prepare_folder(folder)


@pytest.mark.parametrize("spoil", [made_up.open_to_others, lambda f: (f / "thesis.txt").touch()])
def test_engines_are_not_written_to_a_folder_of_other_things(
    bundle: Bundle, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    (folder := tmp_path / "documents").mkdir(mode=0o700)
    spoil(folder)
    with pytest.raises(ConfigurationError, match="ame a new folder"):
        made_up.write_made_up(folder, bundle)
    assert not list(folder.glob("*.engine"))


def test_engines_are_not_written_where_a_file_is(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "engines"):
        with pytest.raises(ConfigurationError):
            made_up.write_made_up(place, bundle)
