"""Linear layers with packed weights: torch's answers, after whatever happens to the weights."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from helpers import tiny_guidance, tiny_vit
from torch import nn

import tinydrop_kernels as tdk
from tinydrop_kernels.prepacking import _packed, packed_linear

DROP_HALF = tdk.DropPolicy.fixed(0.5)
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def check(linear, x):
    with torch.no_grad():
        wanted = nn.functional.linear(x, linear.weight, linear.bias)
        tolerance = 1e-5 if x.dtype in (torch.float32, torch.float64) else 2e-2
        torch.testing.assert_close(packed_linear(linear, x), wanted, atol=tolerance, rtol=tolerance)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_with_torch_and_packs_once(dtype, bias, monkeypatch):
    linear = nn.Linear(24, 40, bias).to(dtype)
    for rows in (50, 1, 7, 200):
        check(linear, torch.randn(rows, 24).to(dtype))
        known = _packed[linear]
    check(linear, torch.randn(2, 3, 24).to(dtype))
    check(linear, torch.randn(24, 50).to(dtype).T)
    check(linear, torch.randn(9, 48).to(dtype)[:, ::2])
    assert _packed[linear] is known


@needs_onednn
def test_changed_weights_are_packed_again():
    linear, x = nn.Linear(24, 40), torch.randn(50, 24)
    check(linear, x)
    with torch.no_grad():
        linear.weight.mul_(2)
        check(linear, x)
        linear.bias.add_(1)
        check(linear, x)
    linear.load_state_dict(nn.Linear(24, 40).state_dict())
    check(linear, x)
    linear.weight = nn.Parameter(torch.randn(40, 24))
    check(linear, x)
    check(linear.bfloat16(), x.bfloat16())
    check(linear.float(), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_precisions_are_left_to_torch(dtype):
    linear = nn.Linear(24, 40).to(dtype)
    check(linear, torch.randn(50, 24).to(dtype))
    assert linear not in _packed


def test_what_else_is_left_to_torch():
    linear, x = nn.Linear(24, 40), torch.randn(50, 24)
    packed_linear(linear, x).sum().backward()
    assert linear.weight.grad is not None
    check(linear, x[:0])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert packed_linear(linear, x).dtype == torch.bfloat16
    with torch.inference_mode():
        made = nn.Linear(24, 40)
        check(made, x)
    assert linear not in _packed and made not in _packed


@needs_onednn
def test_a_patched_model(images):
    vit = tiny_vit()
    wanted = tdk.patch(copy.deepcopy(vit), tiny_guidance(), DROP_HALF)
    before = {name: set(vars(module)) for name, module in vit.named_modules()}
    model = tdk.patch(vit, wanted.tinydrop.guidance, DROP_HALF, prepack=True)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    others = copy.deepcopy(model), torch.load(file, weights_only=False)
    with torch.inference_mode():
        expected = wanted(images)
        for other in (model, *others):
            torch.testing.assert_close(other(images), expected)
            assert other.blocks[0].mlp.fc1 in _packed
        assert model.tinydrop.report().flops == wanted.tinydrop.report().flops
        with ThreadPoolExecutor(4) as threads:
            for answer in threads.map(model, [images] * 16):
                torch.testing.assert_close(answer, expected)
    torch.save(model, file)
    assert copy.deepcopy(model).blocks[0].mlp.fc1 not in _packed, "packed weights are nobody's to copy"
    tdk.unpatch(model)
    assert before == {name: set(vars(module)) for name, module in vit.named_modules()}


def test_stages_of_blocks_are_refused():
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, embed_dim=8, depths=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="^prepack: got True for a SwinTransformer"):
        tdk.patch(swin, tiny_guidance(), prepack=True)
    assert "tinydrop" not in vars(swin)


def test_a_model_made_in_inference_mode_is_refused():
    """It would silently run without packed weights."""
    with torch.inference_mode():
        vit = tiny_vit()
    with pytest.raises(ValueError, match="^prepack: got a model made in inference mode"):
        tdk.patch(vit, tiny_guidance(), DROP_HALF, prepack=True)
    assert tdk.patch(vit, tiny_guidance(), DROP_HALF)
