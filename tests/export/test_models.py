"""The two networks: shapes, sizes, the activation map, ConvLSTM against an explicit loop."""

import pytest
import torch
from torch.nn import functional

from export.models import ConvLstm, SlabClassifier, StudyNet
from export.models.base import mixed_precision
from pe_infer.engines.processor import Processor


def test_stage1_has_the_published_shapes_and_size() -> None:
    model = SlabClassifier().eval()
    assert sum(p.numel() for p in model.parameters()) == 11_171_010
    with torch.inference_mode():
        output = model(torch.rand(1, 5, 384, 384))
    assert output.features.shape == (1, 512, 24, 24)
    assert output.attention.shape == (1, 1, 24, 24)
    assert output.logits.shape == (1, 2)
    assert output.stage1_logit.shape == (1, 1)
    assert float(output.features.min()) >= 0.0


def test_activation_map_is_the_weighted_sum_of_features_and_its_mean_the_logit() -> None:
    torch.manual_seed(0)
    model = SlabClassifier(5, 0.125).eval()
    output = model(torch.rand(2, 5, 64, 64))
    weight, bias = model.head.weight[1], model.head.bias[1]
    expected = (output.features * weight[None, :, None, None]).sum(1, keepdim=True) + bias
    torch.testing.assert_close(output.attention, expected)
    pooled = model.head(output.features.mean(dim=(2, 3)))
    torch.testing.assert_close(output.logits, pooled)
    probability = torch.softmax(output.logits, dim=1)[:, 1:]
    torch.testing.assert_close(torch.sigmoid(output.stage1_logit), probability)


def test_activation_map_is_float32_under_autocast() -> None:
    model = SlabClassifier(5, 0.125).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(torch.rand(1, 5, 64, 64))
    assert output.features.dtype == torch.bfloat16
    assert output.attention.dtype == output.logits.dtype == torch.float32


@pytest.mark.parametrize("downwards", [True, False])
def test_conv_lstm_is_the_recurrence_written_out(downwards: bool) -> None:
    torch.manual_seed(1)
    layer = ConvLstm(3, 4, downwards=downwards)
    x = torch.randn(2, 5, 3, 6, 6)
    got = layer(x)
    h = c = torch.zeros(2, 4, 6, 6)
    for t in reversed(range(5)) if downwards else range(5):
        gates = functional.conv2d(x[:, t], layer.project.weight, layer.project.bias, padding=1)
        gates = gates + functional.conv2d(h, layer.cell.recurrent.weight, padding=1)
        i, f, g, o = gates.split(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        torch.testing.assert_close(got[:, t], h)


def test_conv_lstm_remembers_by_default() -> None:
    layer = ConvLstm(3, 4, downwards=True)
    assert layer.project.bias is not None
    assert layer.project.bias[4:8].tolist() == [1.0] * 4
    assert layer.project.bias[:4].abs().sum() == 0


def test_stage2_takes_any_length_and_ends_in_3456_values() -> None:
    model = StudyNet().eval()
    assert model.dense.in_features == 3456
    assert [model.down1.filters, model.up1.filters, model.down2.filters, model.up2.filters] == [
        48,
        48,
        96,
        96,
    ]
    assert [m.downwards for m in (model.down1, model.up1, model.down2, model.up2)] == [
        True,
        False,
        True,
        False,
    ]
    with torch.inference_mode():
        for length in (1, 4):
            assert model(torch.rand(2, length, 512, 24, 24)).shape == (2, 1)


def test_direction_matters() -> None:
    torch.manual_seed(2)
    model = StudyNet(8, (4, 6), 8).eval()
    features = torch.rand(1, 6, 8, 8, 8)
    assert not torch.allclose(model(features), model(features.flip(1)))


@pytest.mark.parametrize(
    ("vendor", "features", "chosen"),
    [
        ("GenuineIntel", ("avx512_bf16", "amx_bf16"), torch.bfloat16),
        ("GenuineIntel", ("avx512_bf16",), torch.float32),
        ("AuthenticAMD", ("avx512_bf16",), torch.bfloat16),
        ("", ("asimd", "bf16"), torch.bfloat16),
        ("GenuineIntel", ("avx2",), torch.float32),
    ],
)
def test_training_is_in_bfloat16_where_the_cpu_has_units_for_it(
    vendor: str, features: tuple[str, ...], chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Processor("a processor", vendor, features)
    monkeypatch.setattr("export.models.base.processor", lambda: here)
    with mixed_precision():
        product = torch.rand(2, 2) @ torch.rand(2, 2)
    assert product.dtype == chosen
