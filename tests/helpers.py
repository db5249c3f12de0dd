"""Small models of timm's own classes, and images that a random guidance model classifies differently."""

import timm
import torch

from tinydrop_kernels.ops import derived


def tiny_vit(**options) -> torch.nn.Module:
    """Return a small ViT of timm's own class: 4 x 4 patches of 8 pixels, 2 blocks, 5 classes."""
    options = {"num_classes": 5, "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2} | options
    return with_random_weights(timm.create_model("vit_tiny_patch16_224", **options))


def tiny_guidance(num_classes: int = 5, in_chans: int = 3, sharpness: float = 12.0) -> torch.nn.Module:
    """Return timm's smallest convolutional classifier with a head that is linear after average pooling.

    Args:
        num_classes: number of classes.
        in_chans: number of image channels.
        sharpness: factor on the head's weights that spreads the confidences. Without it they are all about equal.
    """
    model = with_random_weights(timm.create_model("test_byobnet", num_classes=num_classes, in_chans=in_chans))
    model.head.fc.weight.data.mul_(sharpness)
    return model


def with_random_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Set the model to eval mode and give every parameter and running statistic an effect on the output.

    timm initialises some of them to zero or one, so noise is added. The weights of queries and keys are scaled up,
    because with timm's initialisation every key gets nearly the same attention.
    """
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim <= 1 or any(part in name for part in ("token", "pos_embed", "latent", "bias_table")):
                tensor.add_(0.2 * torch.randn_like(tensor))
            if name.endswith((".qkv.weight", ".q_proj.weight", ".k_proj.weight")):
                tensor.mul_(10)
        for name, tensor in model.named_buffers():
            if name.endswith("running_mean"):
                tensor.add_(0.2 * torch.randn_like(tensor))
            if name.endswith("running_var"):
                tensor.mul_(0.5 + torch.rand_like(tensor))
    return model.eval()


def masked_features(model, images: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Return timm's ``forward_features`` with some tokens masked in attention. ``seen`` is bool ``(tokens,)``."""
    mask = seen.expand(1, 1, len(seen), len(seen))
    if not isinstance(model, timm.models.Beit):
        return model.forward_features(images, attn_mask=mask)
    patches = model.patch_embed(images)  # BEiT's forward takes no mask, so pass the mask as the shared bias
    x = torch.cat((model.cls_token.expand(len(patches), -1, -1), patches), dim=1)
    x = x if model.pos_embed is None else x + model.pos_embed
    hidden = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    for block in model.blocks:
        x = block(x, shared_rel_pos_bias=hidden if model.rel_pos_bias is None else hidden + model.rel_pos_bias())
    return model.norm(x)


def varied_images(batch: int, size: int = 32) -> torch.Tensor:
    """Return images that differ in colour and coarse shape, so that a random guidance model can distinguish them."""
    coarse = torch.nn.functional.interpolate(torch.randn(batch, 3, 4, 4), size=size, mode="nearest")
    return 2 * coarse + 2 * torch.randn(batch, 3, 1, 1) + 0.1 * torch.randn(batch, 3, size, size)


def packed_of(weight):
    """Return the cached copy of a weight in oneDNN's layout, or None if there is none."""
    kept = derived._kept.get(weight)
    return kept and kept.values.get("prepacked")


def close(out, wanted):
    """Assert that two outputs differ by at most 1e-4 of the largest logit, the bound that is promised for float32."""
    assert out.shape == wanted.shape
    assert (out - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def spread_confidence(module, args, guided):
    """Replace the logits by ones whose confidences rise from near 0 to near 1 over the batch (a forward hook)."""
    batch = len(guided.logits)
    logits = torch.zeros_like(guided.logits)
    logits[:, 0] = torch.linspace(0.0, 6.0, batch)
    return guided._replace(logits=logits)
