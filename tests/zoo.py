"""Small models of timm's own families, with few blocks, channels and patches. A key says what is special about each."""

import timm
import torch
from helpers import with_random_weights
from timm.models.vision_transformer import ResPostBlock

SMALL = {"num_classes": 5, "embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL_SWIN = {"num_classes": 5, "embed_dim": 16, "depths": (2, 1, 2, 1), "num_heads": (1, 2, 2, 4)}
SWIN, SWIN_V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"

# key -> name of the timm model, options, image size
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

# key -> name of the timm model, options
SWINS = {
    "v1": (SWIN, {"img_size": 128, "window_size": 4, "num_heads": (2, 2, 4, 4)}),
    "v1 at its size": (SWIN, {"depths": (2, 1, 1, 1)}),
    "v1, not square": (SWIN, {"img_size": (128, 192), "window_size": (4, 6)}),
    "v1, a window a stage": ("swin_s3_tiny_224", {"img_size": 128, "window_size": (4, 8, 8, 4)}),
    "v1, shifted one way": (SWIN, {"img_size": (32, 128), "window_size": (4, 8), "depths": (1, 2, 2)}),
    "v1, always partitioned": (SWIN, {"img_size": 128, "window_size": 4, "always_partition": True}),
    "v1, wide heads": (SWIN, {"img_size": 128, "window_size": 4, "head_dim": 24}),
    "v1, no biases": (SWIN, {"img_size": 128, "window_size": 4, "qkv_bias": False}),
    "v1, max": (SWIN, {"img_size": 128, "window_size": 4, "global_pool": "max"}),
    "v1, avgmax": (SWIN, {"img_size": 128, "window_size": 4, "global_pool": "avgmax"}),
    "v1, catavgmax": (SWIN, {"img_size": 128, "window_size": 4, "global_pool": "catavgmax"}),
    "v1, no classes": (SWIN, {"img_size": 128, "window_size": 4, "num_classes": 0}),
    "v1, patches of 2": (SWIN, {"img_size": 64, "window_size": 4, "patch_size": 2}),
    "v2": (SWIN_V2, {"img_size": 128, "window_size": 4}),
    "v2, a larger window": ("swinv2_tiny_window16_256", {"img_size": 128, "window_size": 8}),
    "v2, from another window": (
        "swinv2_base_window12to16_192to256",
        {"img_size": 128, "window_size": 8, "pretrained_window_sizes": (6, 6, 6, 3)},
    ),
    "v2, no biases": (SWIN_V2, {"img_size": 128, "window_size": 4, "qkv_bias": False}),
}
# Of every family, pool and kind of attention one, for the default run; the others are marked slow.
QUICK = (
    "augreg",
    "deit distilled",
    "dinov2 registers",
    "siglip map",
    "gap",
    "max",
    "avg with prefix",
    "dynamic size and pad",
    "gated",
    "norm after",
    "stem without projection",
    "beit",
    "beit, both biases",
    "eva02",
    "dinov3",
    "rope, mixed",
    "mrope",
    "fewer key heads",
    "convolutional stem",
)


def make(key):
    name, options, size = MODELS[key]
    options = SMALL | options
    gated = options.pop("gated", False)  # set below, because no ViT of timm passes this option on to its attention yet
    model = with_random_weights(timm.create_model(name, **options))
    for block in model.blocks if gated else ():
        block.attn.gate = torch.nn.Linear(model.embed_dim, block.attn.attn_dim)
    return model, torch.randn(3, 3, *size)


def tiny_swin(name=SWIN, **options):
    """Return a Swin with random weights. Its biases, scales and relative positions have a visible effect on the logits.

    By default it has 4 x 4 cells of 32 pixels.
    """
    options = SMALL_SWIN | ({"img_size": 128, "window_size": 4} if not options else {}) | options
    options["num_heads"] = options["num_heads"][: len(options["depths"])]
    model = with_random_weights(timm.create_model(name, **options))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "cpb_mlp" in parameter_name or "relative_position_bias_table" in parameter_name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            if "logit_scale" in parameter_name:
                # Values above log(100) = 4.6 are clamped by SwinV2.
                parameter.copy_(torch.linspace(1.0, 5.0, parameter.numel()).view_as(parameter))
    return model


def make_swin(key):
    name, options = SWINS[key]
    model = tiny_swin(name, **options)
    return model, torch.randn(3, 3, *model.patch_embed.img_size)
