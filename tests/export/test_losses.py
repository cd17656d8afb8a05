"""The loss of stage 1, term by term, and its validation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from export.datasets.labels import UNSURE
from export.datasets.store import open_pairs
from export.models import SlabClassifier
from export.models.stage1 import Stage1Output
from export.training.config import DataSettings, Stage1Loss
from export.training.losses import Stage1Terms, normalised_attention, stage1_terms
from export.training.sampling import index_slabs
from export.training.validation import choose_slabs, peak_hits, score_slabs


def terms(attention: Tensor, labels: list[int], target: Tensor, weight: Tensor) -> Stage1Terms:
    count = len(labels)
    logits = torch.tensor([[0.0, 2.0]]).repeat(count, 1)
    output = Stage1Output(torch.zeros(count, 1, 2, 2), attention, logits)
    weights = Stage1Loss(cross_entropy=1.0, dice=2.0, focal=3.0)
    return stage1_terms(output, torch.tensor(labels), target, weight, weights)


@pytest.fixture
def target() -> Tensor:
    """One cell of four in every slab of two."""
    cells = torch.zeros(2, 1, 2, 2)
    cells[:, :, 0, 0] = 1.0
    return cells


def test_attention_is_divided_by_its_maximum() -> None:
    maps = torch.tensor([[[[-1.0, 2.0], [4.0, 0.0]]], [[[-3.0, -2.0], [-1.0, -4.0]]]])
    normal = normalised_attention(maps)
    torch.testing.assert_close(normal[0, 0], torch.tensor([[0.0, 0.5], [1.0, 0.0]]))
    assert not normal[1].any()


def test_dice_is_about_positive_slabs_only(target: Tensor) -> None:
    ones = torch.ones_like(target)
    right, wrong = target * 5.0, (1 - target) * 5.0
    assert float(terms(right, [1, 1], target, ones).dice) == pytest.approx(0.0, abs=1e-5)
    assert float(terms(wrong, [1, 1], target, ones).dice) == pytest.approx(0.8, abs=1e-5)
    mixed = torch.cat([right[:1], wrong[:1]])
    for label in (0, UNSURE):
        assert float(terms(mixed, [1, label], target, ones).dice) == pytest.approx(0.0, abs=1e-5)


def test_cells_without_weight_have_no_part_in_dice(target: Tensor) -> None:
    known = torch.ones_like(target)
    known[:, :, 1, 1] = 0.0
    also_there = target.clone()
    also_there[:, :, 1, 1] = 1.0
    assert float(terms(also_there * 5.0, [1, 1], target, known).dice) == pytest.approx(
        0.0, abs=1e-5
    )
    nowhere = 1.0 - target  # all that is positive is unsure
    assert float(terms((1 - target) * 5.0, [1, 1], target, nowhere).dice) == 0.0


def test_an_unsure_slab_has_no_class(target: Tensor) -> None:
    ones = torch.ones_like(target)
    alone = torch.nn.functional.cross_entropy(torch.tensor([[0.0, 2.0]]), torch.tensor([1]))
    assert float(terms(target, [1, UNSURE], target, ones).cross_entropy) == pytest.approx(
        float(alone)
    )
    assert float(terms(target, [1, 0], target, ones).cross_entropy) > float(alone)


def test_dense_loss_is_the_focal_loss_over_weighted_cells(target: Tensor) -> None:
    maps = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    weight = torch.ones_like(target)
    weight[1, 0, 1, 1] = 0.0
    got = terms(maps, [1, 1], target, weight)
    chance = torch.sigmoid(maps)
    agreed = torch.where(target > 0, chance, 1 - chance)
    cells = (1 - agreed) ** 2 * -torch.log(agreed) * weight
    assert float(got.focal) == pytest.approx(float(cells.sum() / 2), rel=1e-5)
    total = got.cross_entropy + 2 * got.dice + 3 * got.focal
    torch.testing.assert_close(got.total, total)


def test_a_positive_slab_without_a_mask_is_classified_only(target: Tensor) -> None:
    maps = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    weight = torch.ones_like(target)
    both = terms(maps, [1, 1], target, weight)
    weight[1] = 0.0
    one = terms(maps, [1, 1], target, weight)
    alone = terms(maps[:1], [1], target[:1], weight[:1])
    assert float(one.cross_entropy) == pytest.approx(float(both.cross_entropy))
    assert float(one.dice) == pytest.approx(float(alone.dice))
    assert float(one.focal) < float(both.focal)
    nothing = terms(maps, [1, 1], target, torch.zeros_like(weight))
    assert (float(nothing.dice), float(nothing.focal)) == (0.0, 0.0)


@pytest.mark.parametrize(("distance_px", "hit"), [(0, True), (13, True), (14, False)])
def test_a_hit_is_within_10_mm_of_the_clot(distance_px: int, hit: bool) -> None:
    attention = np.zeros((4, 4), np.float32)
    attention[2, 1] = 1.0  # its centre is pixel (40, 24)
    clot = np.zeros((64, 64), np.bool_)
    clot[40, 24 + distance_px] = True
    assert peak_hits(attention, clot, 0.75) is hit
    with pytest.raises(ValueError, match="no clot"):
        peak_hits(attention, np.zeros((64, 64), np.bool_), 0.75)


class Darkness(SlabClassifier):
    """Knows the truth of the tiny store: emboli are the only pixels of 50 HU."""

    def forward(self, slabs: Tensor) -> Stage1Output:
        dark = ((slabs[:, 2:3] - 1074 / 1524).abs() < 1e-3).float()
        maps = torch.nn.functional.avg_pool2d(dark, 16)
        mean = maps.mean(dim=(2, 3))
        return Stage1Output(maps, maps, torch.cat([-mean, mean], dim=1))


def test_validation_of_a_perfect_network(store: Path, data_settings: DataSettings) -> None:
    index = index_slabs(open_pairs(store, first_seed=0, pairs=3), 5)
    chosen = choose_slabs(index.positives, [], 2)
    assert [ref.study.record.seed for ref, _ in chosen] == [0, 0, 1, 1, 2, 2]
    assert len({(ref.study.folder, ref.middle) for ref, _ in chosen}) == 6
    assert all(other == ref.twin for ref, other in chosen)
    scores = score_slabs(Darkness(5, 0.0625), chosen, data_settings.grid)
    assert (scores.slabs, scores.auc, scores.peak_auc) == (6, 1.0, 1.0)
    blind = SlabClassifier(5, 0.0625)
    torch.nn.init.zeros_(blind.head.weight)
    scores = score_slabs(blind, chosen, data_settings.grid)
    assert (scores.auc, scores.peak_auc) == (0.5, 0.5)
    assert scores.hit == scores.control  # the same places, and a peak that does not depend on clot
