"""The FLOP formula against ``torch.utils.flop_counter``, dense and packed."""

import pytest
import torch
from conftest import tiny_guidance
from test_families import MODELS, make
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tinydrop_kernels as tdk
from tinydrop_kernels.flops import guidance_flops, target_flops


def counted(call, *args) -> int:
    """Attention as its two products: torch 2.11's counter does not know the fused one on CPU."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call(*args)
    return counter.get_total_flops()


@pytest.mark.parametrize("key", MODELS)
def test_dense_and_packed(key):
    model, images = make(key)
    model.requires_grad_(False)  # the counter trips over a latent query that wants a gradient
    rows, columns = model.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
    dense = target_flops(model, [rows * columns] * len(images), (rows, columns), summary=False)
    assert dense == counted(model, images)
    for summary in (False, True):
        policy = tdk.DropPolicy(tau=0.5, gamma=1.0, min_keep=0.1, summary=summary)
        if model.num_classes == 0:
            policy = tdk.DropPolicy.fixed(0.5, summary=summary)
        tdk.patch(model, tiny_guidance(), policy)
        total = counted(model, images)
        report = model.tinydrop.report()
        assert report.dense_flops == dense
        # timm projects the latent query of a map pool for every image, the packed pool once; but this one projects
        # keys and values of the prefix tokens too, which it then leaves aside
        slack = 2 * model.embed_dim**2 * len(images) if model.global_pool == "map" else 0
        slack *= 1 if model.pool_include_prefix else max(1, 2 * model.num_prefix_tokens)
        assert report.flops == pytest.approx(total, rel=0, abs=slack)
        tdk.unpatch(model)


def test_guidance_is_counted():
    guidance = tdk.Guidance(tiny_guidance())
    image = torch.randn(1, 3, *guidance.input_size)
    assert guidance_flops(guidance) == counted(guidance.model, image)
    assert next(guidance.parameters()).device.type == "cpu", "counting leaves the model where it is"
