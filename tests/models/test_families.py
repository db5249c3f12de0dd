"""Patched models against timm itself, for every family and every pool.

* Keep everything: dense timm, to rounding.
* Keep a subset: dense timm with the dropped keys masked out of attention and pooling.

The models are timm's own constructors, made small (few blocks, few channels, few patches) so that all of them run.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers import masked_features, tiny_guidance, tiny_vit, varied_images, with_random_weights
from timm.models.vision_transformer import ResPostBlock

import tinydrop_kernels as tdk

ROOT = Path(__file__).parents[2]
SMALL = {"num_classes": 5, "embed_dim": 32, "depth": 2, "num_heads": 2}

# name of the timm model, options, image size
MODELS = {
    "augreg": ("vit_small_patch16_224", {"img_size": 64}, (64, 64)),
    "not square": ("vit_small_patch16_224", {"img_size": (64, 96)}, (64, 96)),
    "patch 32": ("vit_base_patch32_224", {"img_size": 96}, (96, 96)),
    "deit": ("deit_small_patch16_224", {"img_size": 64}, (64, 64)),
    "deit distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 64}, (64, 64)),
    "deit-3": ("deit3_small_patch16_224", {"img_size": 64}, (64, 64)),
    "dinov2": ("vit_small_patch14_dinov2", {"img_size": 70}, (70, 70)),
    "dinov2 at 518": ("vit_small_patch14_dinov2", {"depth": 1}, (518, 518)),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 70}, (70, 70)),
    "clip": ("vit_base_patch16_clip_224", {"img_size": 64}, (64, 64)),
    "clip quickgelu": ("vit_base_patch32_clip_quickgelu_224", {"img_size": 96}, (96, 96)),
    "siglip map": ("vit_base_patch16_siglip_224", {"img_size": 64}, (64, 64)),
    "siglip gap": ("vit_base_patch16_siglip_gap_224", {"img_size": 64}, (64, 64)),
    "siglip2, whole patches do not fill the image": ("vit_so400m_patch14_siglip_gap_378", {"img_size": 75}, (75, 75)),
    "flexivit": ("flexivit_small", {"img_size": 64}, (64, 64)),
    "gap": ("vit_medium_patch16_gap_240", {"img_size": 64}, (64, 64)),
    "gap and registers": ("vit_medium_patch16_reg4_gap_256", {"img_size": 64}, (64, 64)),
    "beit3, norm inside": ("beit3_base_patch16_224", {"img_size": 64}, (64, 64)),
    "aimv2": ("aimv2_large_patch14_224", {"img_size": 70}, (70, 70)),
    "max": ("vit_small_patch16_224", {"img_size": 64, "global_pool": "max"}, (64, 64)),
    "avgmax": ("vit_small_patch16_224", {"img_size": 64, "global_pool": "avgmax", "class_token": False}, (64, 64)),
    "avg with prefix": (
        "vit_small_patch16_224",
        {"img_size": 64, "global_pool": "avg", "pool_include_prefix": True},
        (64, 64),
    ),
    "map with class token": ("vit_small_patch16_224", {"img_size": 64, "global_pool": "map"}, (64, 64)),
    "qk norm": ("vit_small_patch16_224", {"img_size": 64, "qk_norm": True, "scale_attn_norm": True}, (64, 64)),
    "dynamic size": ("vit_small_patch16_224", {"img_size": 64, "dynamic_img_size": True}, (48, 112)),
    "dynamic size and pad": ("vit_small_patch16_224", {"dynamic_img_size": True, "dynamic_img_pad": True}, (50, 71)),
    "no positions": ("vit_small_patch16_224", {"img_size": 64, "pos_embed": "none"}, (64, 64)),
    "no classes": ("vit_small_patch16_224", {"img_size": 64, "num_classes": 0}, (64, 64)),
    "gated": ("vit_small_patch16_224", {"img_size": 64, "gated": True}, (64, 64)),
    "norm after": ("vit_small_patch16_224", {"img_size": 64, "block_fn": ResPostBlock}, (64, 64)),
    "stem without projection": ("vitamin_small_224", {"img_size": 128, "embed_dim": 384, "num_heads": 6}, (128, 128)),
    "beit": ("beit_base_patch16_224", {"img_size": 64}, (64, 64)),
    "beit, not square": ("beit_base_patch16_224", {"img_size": (64, 96)}, (64, 96)),
    "beitv2": ("beitv2_base_patch16_224", {"img_size": 64}, (64, 64)),
    "beit, shared bias": (
        "beit_base_patch16_224",
        {"img_size": 64, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
        (64, 64),
    ),
    "beit, both biases": ("beit_base_patch16_224", {"img_size": 64, "use_shared_rel_pos_bias": True}, (64, 64)),
    "beit, positions alone": (
        "beit_base_patch16_224",
        {"img_size": 64, "use_rel_pos_bias": False, "use_abs_pos_emb": True, "global_pool": "token"},
        (64, 64),
    ),
    "eva": ("eva_giant_patch14_224", {"img_size": 70}, (70, 70)),
    "eva02": ("eva02_base_patch14_224", {"img_size": 70}, (70, 70)),
    "eva02, not square": ("eva02_small_patch14_224", {"img_size": (70, 98)}, (70, 98)),
    "eva02, norm after, clip": ("eva02_enormous_patch14_clip_224", {"img_size": 70}, (70, 70)),
    "dinov3": ("vit_small_patch16_dinov3", {}, (96, 64)),
    "dinov3, biased, swiglu": ("vit_huge_plus_patch16_dinov3_qkvb", {}, (64, 64)),
    "dinov3, max": ("vit_small_patch16_dinov3", {"global_pool": "max"}, (64, 64)),
    "dinov3, avgmax": ("vit_small_patch16_dinov3", {"global_pool": "avgmax"}, (64, 64)),
    "pe core": ("vit_pe_core_base_patch16_224", {"img_size": 64, "attn_pool_num_heads": 2}, (64, 64)),
    "pe spatial": ("vit_pe_spatial_base_patch16_512", {"img_size": 64}, (64, 64)),
    "rope": ("vit_small_patch16_rope_224", {"img_size": 64}, (64, 64)),
    "rope and positions": ("vit_small_patch16_rope_ape_224", {"img_size": 64}, (64, 64)),
    "rope, mixed": ("vit_small_patch16_rope_mixed_224", {"img_size": 64}, (64, 64)),
    "rope, mixed, and positions": ("vit_small_patch16_rope_mixed_ape_224", {"img_size": (64, 96)}, (64, 96)),
    "rope, registers, gap": ("vit_medium_patch16_rope_reg1_gap_256", {"img_size": 64}, (64, 64)),
    "rope, map": ("vit_small_patch16_rope_224", {"img_size": 64, "global_pool": "map"}, (64, 64)),
    "mrope": (
        "vit_small_patch16_rope_224",
        {"img_size": 64, "rope_type": "mrope", "rope_grid_indexing": "ij"},
        (64, 64),
    ),
    "fewer key heads": ("vit_base_patch16_sapiens2", {"num_heads": 4, "num_kv_heads": 2}, (64, 64)),
    "lingbot": ("vit_small_patch16_lingbot", {}, (64, 64)),
    "convolutional stem": ("vit_small_r26_s32_224", {"img_size": 128}, (128, 128)),
}


def make(key):
    name, options, size = MODELS[key]
    options = SMALL | options
    gated = options.pop("gated", False)  # an option of timm's attention that none of its ViTs hands on yet
    model = with_random_weights(timm.create_model(name, **options))
    for block in model.blocks if gated else ():
        block.attn.gate = torch.nn.Linear(model.embed_dim, block.attn.attn_dim)
    return model, torch.randn(3, 3, *size)


def close(out, wanted):
    """Within 1e-4 of the largest logit, the bound the project promises in float32."""
    assert out.shape == wanted.shape
    assert (out - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("key", MODELS)
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
    """Also after a call that went wrong; exits, blend and second look work meanwhile."""
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
    """Nothing of one image reaches another: exits, other counts and NaN beside it change no bit that matters."""
    guidance = tiny_guidance()
    vit = tdk.patch(
        tiny_vit(**options),
        guidance,
        tdk.DropPolicy(tau=0.6, gamma=1.0, min_keep=0.1, coarsen=0.0, blend=0.0, second_look=None),
    )
    torch.manual_seed(0)  # the same images for every option
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
    assert f"not with timm {timm.__version__}: beit: cannot import name 'Attention'" in done.stdout


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
    """Of all layers the last, where what is seen is not the rounding of those before it."""
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
