"""A patched model with hooks or replaced modules gives timm's answer, or an error that names the module."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from helpers import tiny_guidance, with_random_weights
from slow import mostly_slow
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode

import tinydrop_kernels as tdk

SMALL = {"num_classes": 5, "img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"num_classes": 5, "img_size": 32, "embed_dim": 16, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4}
MODELS = {
    "ViT": ("vit_tiny_patch16_224", SMALL | {"patch_size": 8}),
    "DeiT distilled": ("deit_tiny_distilled_patch16_224", SMALL | {"patch_size": 8}),
    "SigLIP": ("vit_base_patch16_siglip_224", SMALL | {"patch_size": 8}),
    "BEiT": ("beit_base_patch16_224", SMALL | {"patch_size": 8}),
    "EVA": ("eva02_tiny_patch14_224", SMALL | {"patch_size": 8}),
    "DINOv3": ("vit_small_patch16_dinov3", SMALL | {"patch_size": 8}),
    "Swin": ("swin_tiny_patch4_window7_224", SWIN),
    "SwinV2": ("swinv2_tiny_window8_256", SWIN),
}
KEEP_ALL = tdk.DropPolicy.fixed(1.0)


def make(key):
    name, options = MODELS[key]
    model = with_random_weights(timm.create_model(name, **options))
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # so that timm calls attn_drop
    return model


class Half(nn.Module):
    """A replacement of a module that returns half of its output."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args, **kwargs):
        return halved(self.inner(*args, **kwargs))


def halved(output):
    return output * 0.5 if isinstance(output, torch.Tensor) else output


def hook(model, name):
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: halved(output))
    return handle.remove


def pre_hook(model, name):
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: tuple(map(halved, args)))
    return handle.remove


def own_forward(model, name):
    module = model.get_submodule(name)
    before, inner = vars(module).get("forward"), module.forward
    module.forward = lambda *args, **kwargs: halved(inner(*args, **kwargs))

    def undo():
        del module.forward
        if before is not None:
            module.forward = before

    return undo


def replace(model, name):
    module = model.get_submodule(name)
    model.set_submodule(name, Half(module))
    return lambda: model.set_submodule(name, module)


@pytest.mark.parametrize("change", [hook, pre_hook, own_forward, replace])
@pytest.mark.parametrize("key", mostly_slow(MODELS, "ViT", "BEiT", "Swin"))
@torch.inference_mode()
@pytest.mark.filterwarnings("ignore:hooks on")
def test_every_module(key, change):
    """A change of any module gives timm's answer after the same change, or is refused. All patches are kept."""
    stock, images, outcomes = make(key), torch.randn(2, 3, 32, 32), {"refused": 0, "as timm": 0}
    model = tdk.patch(copy.deepcopy(stock), tiny_guidance(), KEEP_ALL)
    untouched = model(images)
    for name in [name for name, _ in stock.named_modules() if name]:
        undo_stock, undo = change(stock, name), change(model, name)
        try:
            wanted = stock(images)
        except (TypeError, AttributeError, NotImplementedError):  # timm itself fails after this change
            wanted = None
        if wanted is not None:
            try:
                found = model(images)
            except tdk.UnsupportedModelError as error:
                assert name in str(error)
                outcomes["refused"] += 1
            else:
                close(found, wanted, name)
                outcomes["as timm"] += 1
        undo_stock()
        undo()
    close(model(images), untouched, "after all")
    assert all(outcomes.values()), "or nothing is tested"


@pytest.mark.parametrize("change", [hook, replace])
@pytest.mark.parametrize("key", mostly_slow(["ViT", "BEiT", "SwinV2"], "ViT"))
@torch.inference_mode()
@pytest.mark.filterwarnings("ignore:hooks on")
def test_every_module_before_patching(key, change):
    stock, images, guidance = make(key), torch.randn(2, 3, 32, 32), tdk.Guidance(tiny_guidance())
    outcomes = {"refused": 0, "as timm": 0}
    for name in [name for name, _ in stock.named_modules() if name]:
        undo = change(stock, name)
        try:
            wanted = stock(images)
            found = tdk.patch(copy.deepcopy(stock), guidance, KEEP_ALL)(images)
        except tdk.UnsupportedModelError as error:
            assert name in str(error) or "not timm's" in str(error)  # the trial on noise names no module
            outcomes["refused"] += 1
        except (TypeError, AttributeError, NotImplementedError):
            pass
        else:
            close(found, wanted, name)
            outcomes["as timm"] += 1
        undo()
    assert all(outcomes.values()), "or nothing is tested"


def close(found, wanted, name):
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4, msg=lambda text: f"{name}: {text}")


@pytest.fixture
def vit():
    return tdk.patch(make("ViT"), tiny_guidance(), KEEP_ALL)


@torch.inference_mode()
def test_hooks_that_see_packed_rows_are_named_once(vit):
    """Hooks on packed rows are allowed with a warning, because a hook that works token by token is right on them."""
    images, shapes = torch.randn(4, 3, 32, 32), []
    vit.norm.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    with pytest.warns(UserWarning, match=r"^hooks on norm of a patched model are given packed rows.*dense\(model\)"):
        vit(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vit(images)
    with tdk.dense(vit):
        vit(images)
    assert shapes == 2 * [(4, 32)] + [(4, 17, 32)]


@torch.inference_mode()
def test_a_summary_that_hooks_every_module_is_shown_the_way_out(vit):
    images, seen = torch.randn(2, 3, 32, 32), set()
    for name, module in vit.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: seen.add(name))
    with pytest.raises(tdk.UnsupportedModelError, match=r"within tinydrop_kernels.dense\(model\), or unpatch it"):
        vit(images)
    stock = type(vit).forward(vit, images)
    seen.clear()
    with tdk.dense(vit):
        assert torch.equal(vit(images), stock)
        assert {"", "blocks", "blocks.0.attn.attn_drop", "head"} <= seen


def test_dense_is_of_a_thread_and_ends_with_an_exception(vit):
    images = torch.randn(2, 3, 32, 32)
    vit.tinydrop.policy = tdk.DropPolicy.fixed(0.25)
    with torch.no_grad():
        dropped, dense = vit(images), vit.tinydrop.dense(images)
        with pytest.raises(ZeroDivisionError), tdk.dense(vit):
            with ThreadPoolExecutor(1) as pool:
                assert torch.equal(pool.submit(torch.no_grad()(vit), images).result(), dropped)
            torch.testing.assert_close(vit(images), dense, atol=1e-5, rtol=1e-5)
            1 / 0  # noqa: B018
        assert torch.equal(vit(images), dropped)
    with pytest.raises(ValueError, match="^model: .*is not patched"), tdk.dense(make("ViT")):
        pass


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
@torch.inference_mode()
def test_hooks_on_all_modules_are_refused(vit, register):
    images = torch.randn(2, 3, 32, 32)
    vit(images)
    handle = register(lambda *_: None)
    try:
        with pytest.raises(tdk.UnsupportedModelError, match="since it was patched, it has hooks on every module"):
            vit(images)
        with pytest.raises(tdk.UnsupportedModelError, match="with hooks on every module"):
            tdk.patch(make("ViT"), tiny_guidance(), KEEP_ALL)
    finally:
        handle.remove()
    vit(images)


def test_the_flop_counter_may_look(vit):
    """``FlopCounterMode`` hooks every module, and is allowed because its hooks change nothing."""
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vit(images)
    assert counter.get_total_flops() == vit.tinydrop.report().flops


@pytest.mark.parametrize("kind", ["drop_path", "proj_drop", "attn_drop"])
@torch.inference_mode()
def test_what_is_random_in_an_eval_model_is_refused(kind):
    name, options = MODELS["ViT"]
    model = timm.create_model(name, **options, **{f"{kind}_rate": 0.5}).eval()
    tdk.patch(model, tiny_guidance(), KEEP_ALL)
    for name, module in model.named_modules():
        if name.endswith(("drop_path1", "mlp.drop1", "attn.attn_drop")):
            module.train()
    with pytest.raises(tdk.UnsupportedModelError, match=r"blocks\.\d\.\S+ \(Drop\w+\) random in train mode"):
        model(torch.randn(2, 3, 32, 32))
    model.eval()
    model(torch.randn(2, 3, 32, 32))
