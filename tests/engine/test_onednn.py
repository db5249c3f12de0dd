"""Linear layers run by oneDNN, prepacked or not, give torch's answers after any change of the weights."""

import copy
import io
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from helpers import packed_of, tiny_guidance, tiny_vit
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tinydrop_kernels as tdk
from tinydrop_kernels.ops import onednn
from tinydrop_kernels.ops.onednn import run_linear, run_prepacked
from tinydrop_kernels.torch_internals import has_onednn_linear, onednn_linear

DROP_HALF = tdk.DropPolicy.fixed(0.5)
needs_onednn = pytest.mark.skipif(not has_onednn_linear(torch.float32), reason="this torch has no oneDNN")


def check(layer, x, activation="none"):
    with torch.no_grad():
        wanted = type(layer).forward(layer, x)
        wanted = nn.functional.gelu(wanted) if activation == "gelu" else wanted
        tolerance = 1e-5 if x.dtype in (torch.float32, torch.float64) else 2e-2
        out = run_prepacked(layer, x, activation)
        torch.testing.assert_close(out, wanted, atol=tolerance, rtol=tolerance)
        if isinstance(layer, nn.Linear) and activation == "none":
            torch.testing.assert_close(run_linear(layer, x), wanted, atol=tolerance, rtol=tolerance)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_with_torch_and_packs_once(dtype, bias, monkeypatch):
    linear = nn.Linear(24, 40, bias).to(dtype)
    for rows in (50, 1, 7, 200):
        check(linear, torch.randn(rows, 24).to(dtype))
        known = packed_of(linear.weight)
    check(linear, torch.randn(2, 3, 24).to(dtype))
    check(linear, torch.randn(24, 50).to(dtype).T)
    check(linear, torch.randn(9, 48).to(dtype)[:, ::2])
    assert packed_of(linear.weight) is known


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


@needs_onednn
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pointwise_convolutions_and_gelu(dtype, activation):
    conv, linear = nn.Conv2d(24, 40, 1).to(dtype, memory_format=torch.channels_last), nn.Linear(24, 40).to(dtype)
    assert onednn.is_pointwise(conv)
    for shape in ((3, 24, 5, 7), (1, 24, 5, 7), (2, 24, 1, 1)):
        images = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
        check(conv, images, activation)
        with torch.no_grad():
            assert run_prepacked(conv, images, activation).is_contiguous(memory_format=torch.channels_last)
    check(linear, torch.randn(50, 24).to(dtype), activation)
    is_packed = has_onednn_linear(dtype)  # without AVX512 oneDNN has no bfloat16
    assert (packed_of(conv.weight) is not None) == (packed_of(linear.weight) is not None) == is_packed
    with torch.no_grad():
        conv.weight.mul_(2)
    check(conv, images, activation)
    other = nn.Conv2d(24, 40, 1).to(dtype)
    check(other, torch.randn(3, 24, 5, 7).to(dtype), activation)
    check(other.double(), torch.randn(3, 24, 5, 7).double(), activation)
    assert packed_of(other.weight) is None, "what is not channels-last, or float64, is torch's"


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 1}, {"groups": 2}], ids=str)
def test_what_is_no_linear_layer_of_each_pixel(options):
    assert not onednn.is_pointwise(nn.Conv2d(4, 4, 1, **options))


def test_no_other_convolution():
    class Scaled(nn.Conv2d):
        pass

    assert not onednn.is_pointwise(nn.Conv2d(4, 4, 3, padding="same"))
    assert not onednn.is_pointwise(Scaled(4, 4, 1))


@pytest.mark.slow
@needs_onednn
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor has no C++ compiler here")
def test_compiled_it_packs_too_and_sees_changed_weights():
    torch._dynamo.reset()
    linear = nn.Linear(24, 40)
    compiled = torch.compile(run_prepacked, fullgraph=True, dynamic=True)
    for rows in (50, 7):
        x = torch.randn(rows, 24)
        with torch.no_grad():
            torch.testing.assert_close(compiled(linear, x, "gelu"), nn.functional.gelu(linear(x)))
            known = packed_of(linear.weight)
            linear.weight.mul_(2)
            torch.testing.assert_close(compiled(linear, x, "gelu"), nn.functional.gelu(linear(x)))
            assert packed_of(linear.weight) is not known


@needs_onednn
def test_flops_are_counted_as_torch_counts_its_own():
    linear, x = nn.Linear(24, 40), torch.randn(2, 50, 24)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run_prepacked(linear, x)
        run_linear(linear, x)
    assert packed_of(linear.weight) is not None and counter.get_total_flops() == 2 * (2 * 2 * 50 * 24 * 40)


def test_weights_that_are_more_than_their_numbers_are_left_to_torch():
    class Doubled(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            out = super().__torch_function__(function, types, args, kwargs)
            return 2 * out.as_subclass(Tensor) if function is nn.functional.linear else out

    linear, x = nn.Linear(24, 40, bias=False).requires_grad_(False), torch.randn(50, 24)
    wanted = 2 * linear(x)
    linear.weight = nn.Parameter(linear.weight.data.as_subclass(Doubled), requires_grad=False)
    torch.testing.assert_close(run_linear(linear, x), wanted)
    torch.testing.assert_close(run_prepacked(linear, x), wanted)


@needs_onednn
def test_every_patched_model_runs_by_onednn(images, monkeypatch):
    model = tdk.patch(tiny_vit(), tiny_guidance(), DROP_HALF)
    with torch.inference_mode():
        expected = model(images)
        assert packed_of(model.blocks[0].mlp.fc1.weight) is None
        monkeypatch.setattr(onednn, "has_onednn_linear", lambda dtype: False)
        torch.testing.assert_close(model(images), expected)
        monkeypatch.setattr(onednn, "onednn_linear", lambda *_: pytest.fail("called"))
        model(images)
        monkeypatch.setattr(onednn, "has_onednn_linear", lambda dtype: True)
        model.tinydrop.dense(images)  # timm's own
        with pytest.raises(pytest.fail.Exception, match="called"):
            model.blocks[0].mlp(torch.randn(5, 32))  # packed tokens


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_precisions_are_left_to_torch(dtype):
    linear = nn.Linear(24, 40).to(dtype)
    check(linear, torch.randn(50, 24).to(dtype))
    assert packed_of(linear.weight) is None


def test_what_else_is_left_to_torch():
    linear, x = nn.Linear(24, 40), torch.randn(50, 24)
    run_prepacked(linear, x).sum().backward()
    assert linear.weight.grad is not None
    check(linear, x[:0])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert run_prepacked(linear, x).dtype == torch.bfloat16
    with torch.inference_mode():
        made = nn.Linear(24, 40)
        check(made, x)
    assert packed_of(linear.weight) is None and packed_of(made.weight) is None


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
            assert packed_of(other.blocks[0].mlp.fc1.weight) is not None
        assert model.tinydrop.report().flops == wanted.tinydrop.report().flops
        with ThreadPoolExecutor(4) as threads:
            for answer in threads.map(model, [images] * 16):
                torch.testing.assert_close(answer, expected)
    torch.save(model, file)
    assert packed_of(copy.deepcopy(model).blocks[0].mlp.fc1.weight) is None, "a copy has no prepacked weights"
    tdk.unpatch(model)
    assert before == {name: set(vars(module)) for name, module in vit.named_modules()}


@needs_onednn
def test_stages_of_blocks():
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, embed_dim=8, depths=(1, 1, 1, 1)).eval()
    guidance = tdk.Guidance(tiny_guidance())
    images = torch.randn(2, 3, 224, 224)
    wanted = tdk.patch(copy.deepcopy(swin), guidance, DROP_HALF)
    model = tdk.patch(swin, guidance, DROP_HALF, prepack=True)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), wanted(images))
    assert all(packed_of(layer.weight) is not None for layer in model.layers.modules() if type(layer) is nn.Linear)


def test_a_model_made_in_inference_mode_is_refused():
    """A model made in inference mode is refused, because otherwise it would silently run without prepacked weights."""
    with torch.inference_mode():
        vit = tiny_vit()
    with pytest.raises(ValueError, match="^prepack: got a model made in inference mode"):
        tdk.patch(vit, tiny_guidance(), DROP_HALF, prepack=True)
    assert tdk.patch(vit, tiny_guidance(), DROP_HALF)


ELSEWHERE = {
    "renamed": "torch.ops.__dict__['mkldnn'] = types.SimpleNamespace()",
    "refused": "torch.ops.__dict__['mkldnn'] = types.SimpleNamespace(_reorder_linear_weight=refuse)",
    "counted by torch": (
        "torch.utils.flop_counter.register_flop_formula(torch.ops.mkldnn._linear_pointwise, get_raw=True)(print)"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ELSEWHERE)
def test_another_torch(kind):
    """Models are patched even if torch's private operators are missing, fail, or have their FLOPs counted by torch."""
    program = f"""
import types, torch, torch.utils.flop_counter
def refuse(*_):
    raise RuntimeError("could not create a primitive descriptor")
{ELSEWHERE[kind]}
import tinydrop_kernels as tdk, timm
from tinydrop_kernels.torch_internals import has_onednn_linear
assert has_onednn_linear(torch.float32) == ({kind!r} == "counted by torch")
model = timm.create_model("test_vit", num_classes=5).eval()
images = torch.randn(2, 3, 160, 160)
with torch.no_grad():
    wanted = model(images)
    tdk.patch(model, timm.create_model("test_byobnet", num_classes=5), tdk.DropPolicy.fixed(1.0), prepack=True)
    torch.testing.assert_close(model(images), wanted, atol=1e-4, rtol=1e-4)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("way", ["before", "after"])
def test_bfloat16_where_onednn_has_none(images, monkeypatch, way):
    """Layers in bfloat16 are torch's if oneDNN has no bfloat16, as on a CPU without AVX512-BF16 and AMX."""

    def product(x, *others):
        assert x.dtype != torch.bfloat16
        return onednn_linear(x, *others)

    monkeypatch.setattr(onednn, "has_onednn_linear", lambda dtype: dtype != torch.bfloat16)
    monkeypatch.setattr(onednn, "onednn_linear", product)
    vit, guidance = tiny_vit(), tiny_guidance()
    if way == "before":
        vit, guidance = vit.bfloat16(), guidance.bfloat16()
    tdk.patch(vit, guidance, tdk.DropPolicy.fixed(1.0), prepack=True).bfloat16()
    with torch.no_grad():
        out, dense = vit(images.bfloat16()), vit.tinydrop.dense(images.bfloat16())
    torch.testing.assert_close(out, dense, atol=0.05, rtol=0.05)
