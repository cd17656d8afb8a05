"""Measuring the limits of checks: altered studies, outcomes, margins, going on where one was."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_bundles as toy
from strategies import study as noise_study
from typer.testing import CliRunner

from export import check_studies
from export import checks as command
from export.check_studies import MetalSettings, StudySettings, with_metal, with_noise
from export.checks import CheckSettings, margins, outcomes, run
from pe_infer.bundle import Bundle
from pe_infer.geometry import Slice

PADDING = -2000


@pytest.fixture(scope="module")
def pe() -> CheckSettings:
    return CheckSettings.load("pe")


def flat(count: int = 9, size: int = 64) -> list[Slice]:
    """40 HU, stored with an offset, with padding in a corner."""
    made = []
    for image in noise_study([5000 * i for i in range(count)], size=size):
        pixels = np.full((size, size), 1064, np.int16)
        pixels[0, 0] = PADDING
        padding = (PADDING, PADDING)
        made.append(replace(image, pixels=pixels, rescale_intercept=-1024.0, padding=padding))
    return made


def hu(image: Slice) -> Any:
    return image.host_pixels * image.rescale_slope + image.rescale_intercept


def test_added_noise_is_as_large_as_it_says() -> None:
    for before, after in zip(flat(), with_noise(flat(), 30.0, seed=1), strict=True):
        difference = (hu(after) - hu(before))[1:]
        assert difference.std() == pytest.approx(30, rel=0.05)
        assert after.host_pixels[0, 0] == PADDING


def test_metal_lies_in_the_middle_slices_with_streaks() -> None:
    metal = MetalSettings(
        radius_mm=3.0, length_mm=20.0, streak_hu=100.0, right_mm=0.0, back_mm=10.0
    )
    after = with_metal(flat(), metal)
    touched = [not np.array_equal(hu(a), hu(b)) for a, b in zip(flat(), after, strict=True)]
    assert touched == [False, False, True, True, True, True, True, False, False]
    metallic = hu(after[4]) > 3000
    assert metallic.sum() == pytest.approx(np.pi * 3**2, rel=0.2)
    assert np.argwhere(metallic).mean(axis=0) == pytest.approx([42, 32])
    assert hu(after[4])[1:].min() < 0
    assert after[4].host_pixels[0, 0] == PADDING


@pytest.mark.parametrize("system", ["pe", "ich"])
def test_the_configured_groups_are_for_declared_checks(system: str) -> None:
    settings = CheckSettings.load(system)
    aimed = {group.check for group in settings.studies.groups} - {None}
    assert aimed == {check.name for check in settings.checks}


def record(settings: CheckSettings, group: str, seed: int, **values: float) -> dict[str, Any]:
    (found,) = (g for g in settings.studies.groups if g.name == group)
    usual = {"opacification": 300.0, "noise": 10.0, "metal": 0.0}
    return {
        "group": group,
        "seed": seed,
        "digest": settings.digest(found),
        "values": {**usual, **values},
    }


def test_outcomes_and_margins_follow_from_the_limits_of_today(pe: CheckSettings) -> None:
    strict = replace(
        pe, checks=(pe.checks[0].model_copy(update={"refuse_below": 90.0, "flag_below": 120.0}),)
    )
    (group,) = (g for g in pe.studies.groups if g.name == "poor")
    values = {0: 50.0, 1: 100.0, 2: 119.0, 3: 130.0}
    records = [record(pe, "poor", seed, opacification=v) for seed, v in values.items()]
    assert outcomes(strict, group, records) == {"passed": 1, "flagged": 2, "refused": 1}
    text = command.markdown(strict, records)
    assert text.startswith("## Checks on phantoms made for them\n")
    assert "4 patients, seeds 0 to 3," in text
    assert "| poor | flagged | 1 | 2 | 1 |" in text
    assert margins(strict, records) == {
        "opacification, refuse_below": (90.0, 50.0, 100.0),
        "opacification, flag_below": (120.0, 119.0, 130.0),
    }


def test_what_was_measured_is_kept_and_what_was_measured_otherwise_is_not(
    pe: CheckSettings, tmp_path: Path
) -> None:
    one = replace(pe, studies=StudySettings(phantom="chest", groups=pe.studies.groups[:1]))
    stale = {**record(pe, "contrast", 2), "digest": "another measure"}
    out = tmp_path / "out.json"
    out.write_text(json.dumps({"studies": [record(pe, "contrast", 1), stale]}))
    assert [r["seed"] for r in run(one, [1], out)] == [1]
    assert [r["seed"] for r in json.loads(out.read_text())["studies"]] == [1]


def test_limits_do_not_make_measurements_stale(pe: CheckSettings) -> None:
    group = pe.studies.groups[0]
    other = pe.checks[0].model_copy(update={"refuse_below": 1.0})
    assert replace(pe, checks=(other, *pe.checks[1:])).digest(group) == pe.digest(group)
    wider = other.model_copy(update={"over": 0.1})
    assert replace(pe, checks=(wider, *pe.checks[1:])).digest(group) != pe.digest(group)


def test_another_phantom_makes_measurements_stale(
    pe: CheckSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = pe.studies.groups[0]
    before = pe.digest(group)
    monkeypatch.setattr(check_studies, "CHEST", replace(check_studies.CHEST, nodules_max=0))
    assert pe.digest(group) != before


def test_checks_of_a_configuration_are_stored_in_a_bundle(tmp_path: Path) -> None:
    toy.write_toy(tmp_path / "toy")
    config = command.CONFIGS / "ich-bundle.toml"
    arguments = ["store", "--bundle", tmp_path / "toy", "--config", config, "--version", "0.2.0"]
    done = CliRunner().invoke(command.app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    manifest = Bundle.load(tmp_path / "toy").manifest
    assert [check.name for check in manifest.checks] == ["noise", "metal"]
    assert manifest.version == "0.2.0"
