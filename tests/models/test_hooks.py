"""Hooks on a patched model, and modules replaced in it: timm's answer, or a refusal that names the module."""

import pytest
import timm
import torch
from helpers import tiny_guidance, with_random_weights
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
    """In the place of a module: gives half of what it gives."""

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
    model.get_submodule(name).register_forward_hook(lambda module, args, output: halved(output))


def pre_hook(model, name):
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: tuple(map(halved, args)))


def own_forward(model, name):
    module = model.get_submodule(name)
    inner = module.forward
    module.forward = lambda *args, **kwargs: halved(inner(*args, **kwargs))


def replace(model, name):
    model.set_submodule(name, Half(model.get_submodule(name)))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", [hook, pre_hook, own_forward, replace])
@pytest.mark.parametrize("key", MODELS)
@torch.inference_mode()
@pytest.mark.filterwarnings("ignore:hooks on")
def test_every_module(key, change, when):
    """No third outcome: every module in turn, of a model that keeps everything, against the same change in timm's."""
    model, images, guidance = make(key), torch.randn(2, 3, 32, 32), tdk.Guidance(tiny_guidance())
    weights, plain, outcomes = model.state_dict(), model(images), {"refused": [], "as timm": [], "no effect": []}
    for name in [name for name, _ in model.named_modules() if name]:
        stock, own = make(key), make(key)
        stock.load_state_dict(weights)
        own.load_state_dict(weights)
        if when == "after":
            tdk.patch(own, guidance, KEEP_ALL)
            own(images)
        for changed in (stock, own):
            change(changed, name)
        try:
            wanted = stock(images)
        except (TypeError, AttributeError, NotImplementedError):
            continue  # timm does not survive the change either
        try:
            found = own(images) if when == "after" else tdk.patch(own, guidance, KEEP_ALL)(images)
        except tdk.UnsupportedModelError as error:
            if name not in str(error):
                print("UNNAMED", key, change.__name__, when, name, str(error)[:200])
            outcomes["refused"].append(name)
            continue
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        outcomes["no effect" if torch.equal(wanted, plain) else "as timm"].append(name)
    assert outcomes["refused"] and outcomes["as timm"], "or nothing is tested"
    print(key, change.__name__, when, outcomes)
