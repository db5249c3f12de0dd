"""Tests that compare patched models with timm, for every family and every pool.

* With all patches kept, the logits are those of dense timm up to rounding.
* With a subset kept, they are those of dense timm with the dropped keys masked out of attention and pooling.

The models are built by timm with few blocks, channels and patches.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers import close, masked_features, tiny_guidance, tiny_vit, varied_images
from slow import mostly_slow
from zoo import MODELS, QUICK, make

import tinydrop_kernels as tdk

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("key", mostly_slow(MODELS, *QUICK))
def test_keep_everything_is_dense_timm(key):
    model, images = make(key)
    with torch.inference_mode():
        wanted = model(images)
        tdk.patch(model, tiny_guidance(), tdk.DropPolicy.fixed(1.0))
        close(model(images), wanted)


@pytest.mark.parametrize("key", MODELS)
def test_keep_a_subset_is_dense_timm_masked(key):
    model, images = make(key)
    rows, columns = model.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
    prefix, total = model.num_prefix_tokens, model.num_prefix_tokens + rows * columns
    tdk.patch(
        model,
        tiny_guidance(),
        tdk.DropPolicy(tau=None, gamma=1.0, min_keep=0.1, coarsen=0.0, blend=0.0, second_look=None),
    )
    with torch.inference_mode():
        out = model(images)
        kept = model.tinydrop.last.kept
        tdk.unpatch(model)
        for b, patches in enumerate(kept):
            seen = torch.zeros(total, dtype=torch.bool)
            seen[:prefix] = True
            seen[prefix + patches.long()] = True
            assert prefix < seen.sum() < total, "some are kept and some dropped, or nothing is tested"
            tokens = masked_features(model, images[b : b + 1], seen)
            close(out[b : b + 1], model.forward_head(tokens[:, seen]))


BEYOND_VIT = ["beit", "beit, both biases", "eva02", "dinov3", "rope, mixed", "pe core", "fewer key heads"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key", BEYOND_VIT)
def test_half_precision_is_dense_timm_in_it(key, dtype):
    model, images = make(key)
    with torch.inference_mode():
        wanted = model(images)
        tdk.patch(model.to(dtype), tiny_guidance(), tdk.DropPolicy.fixed(1.0))
        out = model(images.to(dtype)).float()
    assert (out - wanted).abs().max() <= 2e-2 * wanted.abs().max()


@pytest.mark.parametrize("key", BEYOND_VIT)
def test_unpatched_is_as_it_was(key):
    """Check that unpatching restores the model, also after a call with exits and second looks and a failed call."""
    model, images = make(key)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with torch.inference_mode():
        wanted = model(images)
        tdk.patch(model, tiny_guidance(), tdk.DropPolicy(0.6, 1.0, 0.1, 0.5, 0.2, (0.5, 0.9)))
        assert model(images).isfinite().all()
        with pytest.raises(ValueError, match="^images: got"):
            model(images[..., :-1])
        tdk.unpatch(model)
        assert {name: set(vars(module)) for name, module in model.named_modules()} == before
        assert torch.equal(model(images), wanted)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"global_pool": "avg", "reg_tokens": 2},
        {"global_pool": "max"},
        {"global_pool": "map"},
        {"global_pool": "map", "class_token": False},
    ],
    ids=str,
)
def test_every_image_as_if_alone(options):
    """Check that no image affects another: exits, other counts and NaN in the batch do not change its logits."""
    guidance = tiny_guidance()
    vit = tdk.patch(
        tiny_vit(**options),
        guidance,
        tdk.DropPolicy(tau=0.6, gamma=1.0, min_keep=0.1, coarsen=0.0, blend=0.0, second_look=None),
    )
    torch.manual_seed(0)  # so that every option gets the same images
    images = varied_images(12)
    images[5] = float("nan")
    with torch.inference_mode():
        together = vit(images)
        exited = vit.tinydrop.last.exited
        assert exited.any() and not exited.all()
        for b in range(12):
            alone = vit(images[b : b + 1])
            torch.testing.assert_close(together[b : b + 1], alone, atol=1e-5, rtol=1e-4, equal_nan=True)
    assert together[5].isnan().all() and not together[:5].isnan().any() and not together[6:].isnan().any()


def test_exits_answer_with_the_guidance_model():
    vit, guidance = tiny_vit(), tiny_guidance()
    images = torch.randn(6, 3, 32, 32)
    tdk.patch(vit, guidance, tdk.DropPolicy(tau=0.01))
    with torch.inference_mode():
        out = vit(images)
        assert vit.tinydrop.last.exited.all()
        resized = torch.nn.functional.interpolate(
            images, size=vit.tinydrop.guidance.input_size, mode="bilinear", antialias=True
        )
        std, mean = torch.tensor(vit.pretrained_cfg["std"]), torch.tensor(vit.pretrained_cfg["mean"])
        raw = resized * std[:, None, None] + mean[:, None, None]
        own = vit.tinydrop.guidance
        normalised = (raw - torch.tensor(own.mean)[:, None, None]) / torch.tensor(own.std)[:, None, None]
        torch.testing.assert_close(out, guidance(normalised).log_softmax(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("naflexvit_base_patch16_gap", "NaFlexVit"),
        ("resnet18", "ResNet"),
        ("vit_relpos_small_patch16_224", "VisionTransformerRelPos"),
    ],
)
def test_other_families_are_refused_by_name(name, reason):
    model = timm.create_model(name)
    before = dict(vars(model))
    with pytest.raises(tdk.UnsupportedModelError, match=f"got {reason}.*supported: VisionTransformer"):
        tdk.patch(model, tiny_guidance(1000))
    assert vars(model) == before


def parallel_scaling():
    from timm.models.vision_transformer import ParallelScalingBlock

    return tiny_vit(block_fn=ParallelScalingBlock)


def parallel_things():
    from timm.models.vision_transformer import ParallelThingsBlock

    return tiny_vit(block_fn=ParallelThingsBlock)


def overridden():
    class Other(timm.models.VisionTransformer):
        def forward_features(self, x, attn_mask=None, is_causal=False):
            return 2 * super().forward_features(x)

    return Other(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=5)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (parallel_scaling, "ParallelScalingBlock"),
        (parallel_things, "ParallelThingsBlock"),
        (lambda: tiny_vit(attn_layer="diff"), "DiffAttention"),
        (lambda: tiny_vit(global_pool="prr"), "prr"),
        (lambda: tiny_vit(global_pool=""), "global_pool=''"),
        (overridden, "forward_features that is not timm's"),
    ],
)
def test_unsupported_parts_are_refused_by_name(build, reason):
    model = build()
    with pytest.raises(tdk.UnsupportedModelError, match=reason):
        tdk.patch(model, tiny_guidance())
    assert "tinydrop" not in vars(model)


@pytest.mark.parametrize("part", ["patch_embed", "global_pool", "norm_pre", "fc_norm", "pos_drop"])
def test_a_part_that_timm_has_renamed_is_named(part):
    vit = tiny_vit()
    delattr(vit, part)
    with pytest.raises(tdk.UnsupportedModelError, match=f"VisionTransformer of timm .*{part}"):
        tdk.patch(vit, tiny_guidance())
    assert "tinydrop" not in vars(vit)


@pytest.mark.slow
def test_a_class_that_timm_has_renamed_costs_its_family_alone():
    script = """
import sys, timm
beit = timm.create_model("beit_base_patch16_224", depth=1)
del timm.models.beit.Attention
sys.path.insert(0, "tests")
from helpers import tiny_guidance, tiny_vit
import tinydrop_kernels as tdk
tdk.patch(tiny_vit(), tiny_guidance())
try:
    tdk.patch(beit, tiny_guidance())
except tdk.UnsupportedModelError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert "got Beit, supported: VisionTransformer" in done.stdout, done.stderr
    assert f"cannot be imported with timm {timm.__version__}: beit: cannot import name 'Attention'" in done.stdout


class DoubledConv(torch.nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled_projection(vit):
    projection = DoubledConv(3, 32, 8, stride=8)
    projection.load_state_dict(vit.patch_embed.proj.state_dict())
    vit.patch_embed.proj = projection


def hook_on_projection(vit):
    vit.patch_embed.register_forward_hook(lambda module, args, out: 2 * out)


class Doubled(torch.nn.Module):
    def forward(self, x):
        return 2 * x


def drop_of_its_own(vit):
    vit.patch_drop = Doubled()


def hook_on_patch_drop(vit):
    vit.patch_drop.register_forward_hook(lambda module, args, out: 2 * out)


def hook_on_blocks(vit):
    vit.blocks.register_forward_hook(lambda module, args, out: 2 * out)


def nearly_nothing(vit):
    vit.blocks[0].mlp.register_forward_hook(lambda module, args, out: out * 1.0008 if out.ndim == 2 else out)


def nearly_nothing_in_half(vit):
    """Change the output of the last layer, because the rounding of later layers would hide it in half precision."""
    vit.bfloat16().norm.register_forward_hook(lambda module, args, out: out * 1.03 if out.ndim == 2 else out)


def not_a_number(vit):
    vit.blocks[1].mlp.fc1.weight.data[0] = float("nan")


def mlp_that_mixes_tokens(vit):
    vit.blocks[1].mlp.register_forward_hook(lambda module, args, out: out + out.mean(dim=-2, keepdim=True))


def hook_on_pool(vit):
    vit.attn_pool.register_forward_hook(lambda module, args, out: 2 * out)


@pytest.mark.parametrize("change", [doubled_projection, hook_on_projection])
@pytest.mark.parametrize("after", [False, True], ids=["before patching", "after"])
def test_a_projection_that_is_more_than_its_weight_is_called(change, after):
    vit, images = tiny_vit(), torch.randn(2, 3, 32, 32)
    if after:
        tdk.patch(vit, tiny_guidance(), tdk.DropPolicy.fixed(1.0))
        change(vit)
    else:
        change(vit)
        tdk.patch(vit, tiny_guidance(), tdk.DropPolicy.fixed(1.0))
    with torch.inference_mode():
        close(vit(images), vit.tinydrop.dense(images))


@pytest.mark.parametrize(
    ("options", "change", "reason"),
    [
        ({}, mlp_that_mixes_tokens, "blocks that are not timm's"),
        ({"global_pool": "map"}, hook_on_pool, "on attn_pool,"),
        ({}, hook_on_blocks, "hooks or a forward of its own on blocks"),
        ({}, drop_of_its_own, "patch_drop of type Doubled"),
        ({}, hook_on_patch_drop, "on patch_drop,"),
        ({}, nearly_nothing, "blocks that are not timm's"),
        ({}, nearly_nothing_in_half, "blocks that are not timm's"),
        ({}, not_a_number, "weights that are not finite"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_what_no_list_could_name_is_found_by_trying(options, change, reason, training):
    vit = tiny_vit(**options)
    change(vit)
    vit.train(training).blocks[0].eval()
    before = {name: (set(vars(module)), module.training) for name, module in vit.named_modules()}
    with pytest.raises(tdk.UnsupportedModelError, match=reason):
        tdk.patch(vit, tiny_guidance(), tdk.DropPolicy.fixed(1.0))
    assert {name: (set(vars(module)), module.training) for name, module in vit.named_modules()} == before
