"""Patients of an evaluation that a bundle refuses: counted, remembered, in no measure."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from cli_runs import chest
from strategies import REGULAR, body, study
from toy_bundles import make

from export.datasets.semisynthetic.painted import PaintedStudy
from export.evaluate import Pair, case_folder, evaluate_pair, run
from export.measures import RefusedPair, not_processed
from pe_infer import Detector
from pe_infer.errors import InputError

BRIGHTNESS = {
    "name": "brightness",
    "measure": {"kind": "level", "low_hu": -200, "high_hu": 1500, "quantile": 0.5, "cell_px": 1},
    "over": 0.5,
    "refuse_below": 20.0,
    "meaning": "dark",
}
DARK, SHORT = "check.brightness", "series.too_few_slabs"


@dataclass(frozen=True)
class Spot:
    """A lesion."""

    kind: str = "central"
    place: str = "right main"
    volume_mm3: float = 1000.0
    centre_mm: tuple[float, float, float] = (5.0, 5.0, 50.0)


class TinyPairs:
    """Pairs of small bodies with a spot, some studies of which are dark, and some short."""

    anatomy, lesion_name = "chest", "spots"

    def __init__(self, dark: set[tuple[int, bool]], short: set[tuple[int, bool]]) -> None:
        """Take seeds, and whether it is the positive study of the pair."""
        self.dark, self.short = dark, short

    def digest(self) -> str:
        """The same for all: no test changes them."""
        return "0" * 64

    def pair(self, seed: int) -> tuple[PaintedStudy, PaintedStudy]:
        """Without the spot, and with."""
        return self._made(seed, positive=False), self._made(seed, positive=True)

    def _made(self, seed: int, *, positive: bool) -> PaintedStudy:
        rng = np.random.default_rng(seed)
        images = chest(body(study(REGULAR), range(30_000, 70_001)))
        mask = np.zeros((len(images), 8, 8), np.bool_)
        mask[40:60, 4, 4] = positive
        level = -50 if (seed, positive) in self.dark else 40
        slices = []
        for image, spot in zip(images, mask, strict=True):
            noise = rng.integers(-5, 6, spot.shape)
            pixels = np.where(image.host_pixels == 40, level + noise, image.host_pixels)
            slices.append(replace(image, pixels=np.where(spot, 0, pixels).astype(np.int16)))
        return PaintedStudy(
            seed=seed,
            positive=positive,
            slices=tuple(slices[:3] if (seed, positive) in self.short else slices),
            lesion_mask=mask,
            lesions=(Spot(),) if positive else (),
            parameters={},
            source="made up",
            name="spot",
            lesion_name=self.lesion_name,
        )


@pytest.fixture
def detector(tmp_path: Path) -> Iterator[Detector]:
    """A bundle that refuses what is dark."""
    gate = {"low_hu": -950.0, "high_hu": -500.0, "min_fraction": 0.2}
    folder = make(tmp_path / "bundle", grid={"gate": gate}, min_slabs=2, checks=[BRIGHTNESS])
    with Detector(folder, engine="onnxruntime", cache_dir=None) as made:
        yield made


def test_patients_that_are_refused_are_counted_and_remembered(
    detector: Detector, tmp_path: Path
) -> None:
    phantom = TinyPairs({(5, True), (6, False), (7, True)}, {(7, False)})
    seeds = range(5, 9)
    asked: list[list[int]] = []

    def pairs_of(seeds: Sequence[int]) -> list[Pair]:
        asked.append(list(seeds))
        return [evaluate_pair(detector, seed, phantom) for seed in seeds]

    found = run(detector, seeds, tmp_path, phantom, pairs_of)
    path = tmp_path / case_folder(detector, phantom) / "studies.jsonl"
    whole = path.read_text()
    again = run(detector, seeds, tmp_path, phantom, pairs_of)
    lines = whole.splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[3], lines[4], lines[2][:-1]]))  # cut short
    after_a_cut = run(detector, seeds, tmp_path, phantom, pairs_of)
    with pytest.raises(InputError, match=rf"none of 3 patients .* {DARK} 3"):
        run(detector, seeds[:3], tmp_path, phantom, pairs_of)
    assert [(case.seed, case.positive) for case in found.studies] == [(8, True), (8, False)]
    assert found.refused == [
        RefusedPair(seed=5, positive=DARK, negative=None),
        RefusedPair(seed=6, positive=None, negative=DARK),
        RefusedPair(seed=7, positive=DARK, negative=SHORT),
    ]
    assert not_processed(found.refused) == {
        "patients": 3,
        "positive": 2,
        "negative": 2,
        "by_code": {
            DARK: {"patients": 3, "positive": 2, "negative": 1},
            SHORT: {"patients": 1, "positive": 0, "negative": 1},
        },
    }
    assert again == found
    assert asked == [list(seeds), [json.loads(lines[2])["seed"]]]
    assert after_a_cut.refused == found.refused


def test_nothing_refused_is_said_to_be_so() -> None:
    nobody = {"patients": 0, "positive": 0, "negative": 0, "by_code": {}}
    assert not_processed([]) == nobody
