"""Real studies on the grid: what a Detector sees, labels and masks of planes, the store."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from collection_layouts import (
    SIDE,
    blood_pixels,
    head,
    write_cq500,
    write_physionet,
    write_rsna,
)
from numpy.typing import NDArray
from toy_bundles import make
from typer import Typer
from typer.testing import CliRunner

from export.datasets import preprocess as command
from export.datasets.collections.base import Found, Fractions, IndexedStudy, unfollowed
from export.datasets.collections.gridded import plane_labels, to_grid
from export.datasets.collections.index import Index, split_studies, write_index
from export.datasets.collections.reading import RealStudy, accepted, read_study
from export.datasets.collections.registry import open_collection
from export.datasets.labels import slab_label
from export.datasets.store import UNKNOWN_PIXELS, UNLABELLED, StoredStudy
from pe_infer import Detector, preprocess
from pe_infer.errors import ConfigurationError, InputError, SeriesError
from pe_infer.geometry import Gate, PatientGrid, Window

GRID = PatientGrid(
    rows=SIDE,
    cols=SIDE,
    spacing_mm=6.0,
    pitch_um=5000,
    planes_per_slab=1,
    slab_step=1,
    through_plane="source",
    windows=(Window(low_hu=0, high_hu=80),),
    gate=Gate(low_hu=0, high_hu=100, min_fraction=0.03, enclosed_by_hu=150),
)
CONFIG = f"""
name = "tiny"
phantom = "head"
min_pixels = 2
[grid]
rows = {SIDE}
cols = {SIDE}
spacing_mm = 6.0
pitch_um = 5000
planes_per_slab = 1
slab_step = 1
through_plane = "source"
windows = [{{ low_hu = 0, high_hu = 80 }}]
gate = {{ low_hu = 0, high_hu = 100, min_fraction = 0.03, enclosed_by_hu = 150 }}
[train]
first_seed = 0
pairs = 1
[validation]
first_seed = 1
pairs = 1
[test]
first_seed = 2
pairs = 1
"""


def indexed(name: str, root: Path) -> Index:
    found = open_collection(name).index(root, workers=1, follow=unfollowed)
    return split_studies(name, root, found, Fractions(validation=0.0, test=0.0))


def read(index: Index, number: int = 0) -> tuple[IndexedStudy, RealStudy]:
    study = index.entries[number].study
    return study, read_study(open_collection(index.collection), study, index.root)


@pytest.fixture
def physionet(tmp_path: Path) -> Path:
    """Patient 49 bleeds in slices 5 to 7."""
    pytest.importorskip("nibabel", reason="NIfTI needs nibabel: pip install -e '.[export]'")
    write_physionet(tmp_path / "physionet", {49: [5, 6, 7], 50: []})
    return tmp_path / "physionet"


@pytest.mark.parametrize("through_plane", ["resample", "source"])
@pytest.mark.parametrize("name", ["cq500", "rsna-ich-2019"])
def test_slabs_are_those_that_a_detector_makes_of_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, through_plane: str
) -> None:
    root = tmp_path / "collection"
    if name == "cq500":
        write_cq500(root, {7: ["ICH", "ICH", ""]})
    else:
        write_rsna(root, {"p1": ["a"]}, slices=14, positive={"a": [5, 6]})
    index = indexed(name, root)
    study, real = read(index)
    grid = {"planes_per_slab": 3, "slab_step": 1, "through_plane": through_plane}
    bundle = make(tmp_path / "bundle", grid=grid, scope={"modality": ["CT"]}, min_slabs=1)
    seen: dict[int, NDArray[np.float32]] = {}
    made = preprocess.Volume.slabs

    def recorded(volume: preprocess.Volume, *arguments: Any) -> list[preprocess.Slab]:
        slabs = made(volume, *arguments)
        seen.update({slab.position_um: slab.tensor.copy() for slab in slabs})
        return slabs

    monkeypatch.setattr(preprocess.Volume, "slabs", recorded)
    with Detector(bundle, engine="onnxruntime", cache_dir=None, warm_up=False) as detector:
        if name == "cq500":
            detector.detect(root / study.files[0])
        else:
            detector.detect(real.slices)
        used = detector.bundle.manifest.grid
    ours = {s.position_um: s.tensor for s in preprocess.slabs(accepted(real.slices, used), used)}
    assert len(ours) > 8
    assert seen.keys() == ours.keys()
    for position, tensor in ours.items():
        np.testing.assert_array_equal(seen[position], tensor)
    gridded = to_grid(real, study, used)
    positions, hu = preprocess.planes(real.slices, used)
    np.testing.assert_array_equal(gridded.positions_um, positions)
    np.testing.assert_array_equal(gridded.hu, hu)


def test_a_volume_lies_where_its_affine_says(physionet: Path) -> None:
    _, real = read(indexed("physionet-ct-ich", physionet))
    first, last = real.slices[0], real.slices[-1]
    half = (SIDE - 1) / 2 * 6.0
    assert first.geometry.image_position_mm == pytest.approx((-half, -half, -30.0))
    assert first.geometry.row_direction == pytest.approx((1.0, 0.0, 0.0))
    assert last.position_um - first.position_um == 11 * 5000
    assert first.geometry.thickness_mm == pytest.approx(5.0)
    assert int(first.host_pixels.min()) == -1000
    assert (real.slices[4].host_pixels[blood_pixels()] == 70).all()


def test_a_mask_reaches_the_planes_of_its_scan(physionet: Path) -> None:
    study, real = read(indexed("physionet-ct-ich", physionet))
    gridded = to_grid(real, study, GRID)
    assert gridded.mask is not None
    assert gridded.labels is not None
    np.testing.assert_array_equal(gridded.mask.any(axis=(1, 2)), gridded.labels == 1)
    np.testing.assert_array_equal(np.flatnonzero(gridded.labels == 1), [4, 5, 6])
    np.testing.assert_array_equal(gridded.mask[5], blood_pixels())
    assert (gridded.hu[5][gridded.mask[5]] == 70).all()


def test_a_sheared_affine_is_a_tilted_scan(tmp_path: Path) -> None:
    pytest.importorskip("nibabel", reason="NIfTI needs nibabel: pip install -e '.[export]'")
    write_physionet(tmp_path / "t", {49: [5]}, tilt=-1.2)
    study, real = read(indexed("physionet-ct-ich", tmp_path / "t"))
    drift = real.slices[1].geometry.centre_mm[1] - real.slices[0].geometry.centre_mm[1]
    assert drift == pytest.approx(1.2)
    assert len(to_grid(real, study, GRID).positions_um) == 12


def test_a_volume_that_is_not_axial_in_hu_or_whole_is_refused(physionet: Path) -> None:
    import nibabel  # noqa: PLC0415

    path = physionet / "ct_scans/049.nii"
    index = indexed("physionet-ct-ich", physionet)
    good = nibabel.load(path, mmap=False)
    voxels = np.asarray(good.dataobj)
    rotated = good.affine[:, [2, 1, 0, 3]]
    nibabel.save(nibabel.Nifti1Image(voxels, rotated), path)
    with pytest.raises(InputError, match=r"049\.nii"):
        read(index)
    nibabel.save(nibabel.Nifti1Image(voxels + np.int16(1024), good.affine), path)
    with pytest.raises(InputError, match="no HU"):
        read(index)
    nibabel.save(nibabel.Nifti1Image(voxels, good.affine), path)
    path.write_bytes(path.read_bytes()[:-999])
    with pytest.raises(InputError, match="cannot be read"):
        read(index)


def test_a_mask_exchanged_after_indexing_is_refused(physionet: Path) -> None:
    import nibabel  # noqa: PLC0415

    index = indexed("physionet-ct-ich", physionet)
    other = nibabel.Nifti1Image(np.zeros((4, 4, 12), np.int16), np.eye(4))
    nibabel.save(other, physionet / "masks/049.nii")
    with pytest.raises(InputError, match="shape"):
        read(index)


def test_planes_between_slices_have_the_label_of_most_of_their_weight() -> None:
    slices = head(5, step_mm=4.0)
    thin = [replace(s, geometry=replace(s.geometry, thickness_mm=2.0)) for s in slices]
    labels = {image.sop_instance_uid: () for image in thin}
    labels[thin[2].sop_instance_uid] = ("subdural",)
    grid = replace(GRID, pitch_um=1000, through_plane="resample")
    positions = list(range(thin[0].position_um, thin[-1].position_um + 1, 1000))
    made = plane_labels(thin, labels, positions, grid)
    dropped = UNLABELLED
    assert made.tolist() == [0, 0, 0, 0, 0, dropped, 1, 1, 1, 1, 1, dropped, 0, 0, 0, 0, 0]
    del labels[thin[0].sop_instance_uid]
    assert plane_labels(thin, labels, positions, grid)[:5].tolist() == [*[dropped] * 4, 0]


def test_a_stream_would_refuse_what_is_refused_here() -> None:
    slices = head(12)
    with pytest.raises(SeriesError, match="missing"):
        accepted([*slices[:4], *slices[8:]], GRID)
    assert len(accepted([*slices, slices[3]], GRID)) == 12
    other = replace(slices[3], pixels=slices[4].pixels, sop_instance_uid="2.25.77")
    with pytest.raises(SeriesError, match="different slices"):
        accepted([*slices, other], GRID)


def app() -> Typer:
    app = Typer()
    app.command()(command.main)
    return app


def run_command(tmp_path: Path, *more: str) -> str:
    (tmp_path / "data.toml").write_text(CONFIG)
    arguments = ["--index", str(tmp_path / "index.jsonl"), "--config", str(tmp_path / "data.toml")]
    done = CliRunner().invoke(
        app(), [*arguments, "--out", str(tmp_path / "store"), "--workers", "1", *more]
    )
    assert done.exit_code == 0, done.output
    return done.output


def test_one_damaged_study_does_not_stop_the_others_and_is_tried_again(tmp_path: Path) -> None:
    root = tmp_path / "rsna"
    images = write_rsna(root, {"p1": ["a"], "p2": ["b"]}, slices=12, positive={"a": [4, 5]})
    index = indexed("rsna-ich-2019", root)
    write_index(tmp_path / "index.jsonl", index, Found())
    damaged = root / f"stage_2_train/{images[3]}.dcm"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-700])
    assert "dicom" in run_command(tmp_path)
    lines = (tmp_path / "store/failures.jsonl").read_text().splitlines()
    failures = [json.loads(line) for line in lines]
    assert [failure["study"] for failure in failures] == ["ID_a/ID_as"]
    assert images[3] in failures[0]["message"]
    assert [p.name for p in (tmp_path / "store").glob("0*")] == ["0000001-negative"]
    damaged.write_bytes(whole)
    assert "there already" in run_command(tmp_path)
    record = StoredStudy(tmp_path / "store/0000000-positive").record
    assert record.phantom["patient"] == "p1"
    assert record.plane_labels is not None
    assert sum(label == 1 for label in record.plane_labels) == 2
    assert not (tmp_path / "store/failures.jsonl").read_text()


def test_slices_said_to_bleed_have_unknown_pixels_and_never_pass_for_clean(tmp_path: Path) -> None:
    root = tmp_path / "rsna"
    write_rsna(root, {"p1": ["a"]}, slices=12, positive={"a": [4, 5]})
    write_index(tmp_path / "index.jsonl", indexed("rsna-ich-2019", root), Found())
    run_command(tmp_path)
    record = StoredStudy(tmp_path / "store/0000000-positive").record
    pixels = np.array(record.clot_pixels)
    assert (pixels[[4, 5]] == UNKNOWN_PIXELS).all()
    assert (np.delete(pixels, [4, 5]) == 0).all()
    labels = [slab_label(pixels, middle, 1, 2) for middle in (2, 3, 4, 5)]
    assert labels == ["negative", "dropped", "dropped", "dropped"]


def test_a_store_holds_rounded_planes_and_masks(tmp_path: Path, physionet: Path) -> None:
    index = indexed("physionet-ct-ich", physionet)
    write_index(tmp_path / "index.jsonl", index, Found())
    run_command(tmp_path, "--limit", "1")
    study, real = read(index)
    gridded = to_grid(real, study, GRID)
    stored = StoredStudy(tmp_path / "store/0000000-positive")
    np.testing.assert_array_equal(stored.planes_hu, np.rint(gridded.hu))
    np.testing.assert_array_equal(stored.slab_mask(5, 1)[0], blood_pixels())
    assert stored.record.clot_pixels[5] == blood_pixels().sum()
    assert stored.record.slab_planes == gridded.slab_planes
    assert len(gridded.slab_planes) == 12


def test_a_store_of_another_index_or_grid_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "rsna"
    write_rsna(root, {"p1": ["a"]}, slices=12)
    index = indexed("rsna-ich-2019", root)
    command.store_study(tmp_path / "store", index, index.entries[0], GRID)
    with pytest.raises(ConfigurationError, match="grid"):
        command.store_study(
            tmp_path / "store", index, index.entries[0], replace(GRID, spacing_mm=3.0)
        )
    entry = replace(index.entries[0], study=replace(index.entries[0].study, study="other"))
    with pytest.raises(ConfigurationError, match="study"):
        command.store_study(tmp_path / "store", index, entry, GRID)
    study = index.entries[0].study
    entry = replace(index.entries[0], study=replace(study, positive=not study.positive))
    with pytest.raises(ConfigurationError, match="another label in the index"):
        command.store_study(tmp_path / "store", index, entry, GRID)
