"""Which phantom a bundle is shown."""

from pathlib import Path

import pytest
import toy_bundles

from pe_infer.bundle import Bundle
from pe_infer.errors import ConfigurationError
from pe_infer.phantom import ANATOMIES, open_phantom
from pe_infer.synthetic import phantom_for


@pytest.mark.parametrize(
    ("scope", "anatomy"),
    [
        ({"body_part": ["CHEST"], "contrast": "required"}, "chest"),
        ({"body_part": ["HEAD", "BRAIN"]}, "head"),
        ({"contrast": "required", "body_part": ["CHEST", "HEAD"]}, None),
        ({"contrast": "forbidden"}, "head"),
        ({}, None),
        ({"body_part": ["KNEE"]}, None),
    ],
)
def test_a_bundle_is_shown_the_phantom_that_its_scope_accepts(
    scope: dict[str, object], anatomy: str | None, tmp_path: Path
) -> None:
    manifest = Bundle.load(toy_bundles.make(tmp_path / "bundle", scope=scope)).manifest
    if anatomy is None:
        with pytest.raises(ConfigurationError, match=r"fits? its scope"):
            phantom_for(manifest)
    else:
        assert phantom_for(manifest).anatomy == anatomy


@pytest.mark.parametrize("anatomy", ANATOMIES)
def test_studies_say_what_their_phantom_announces(anatomy: str) -> None:
    phantom = open_phantom(anatomy).with_spacing(5.0)
    study = phantom.generate(3, positive=True)
    said = study.slices[0].series
    for name in ("modality", "body_part_examined", "contrast_bolus_agent", "protocol_name"):
        assert getattr(said, name) == getattr(phantom.series, name)
    assert study.lesions[0].volume_mm3 == max(lesion.volume_mm3 for lesion in study.lesions)
    assert study.lesion_mask.any()
    assert {name: mask.shape for name, mask in study.masks().items()} == {
        next(iter(study.masks())): study.lesion_mask.shape
    }
    assert study.truth()["parameters"] == study.parameters
