"""FLOPs of the families whose blocks all keep one token per patch."""

from tinydrop_kernels.families.embedding import embeds_kept_only
from tinydrop_kernels.families.flops import count_flops, linear_flops
from tinydrop_kernels.ops.types import Grid, TimmModule


def flops_of(
    model: TimmModule,
    counts: list[int],
    grid: Grid,
    is_packed: bool,
    pool_skip: int = 0,
    last_reads_prefix: bool = False,
) -> int:
    """Return the FLOPs of a forward on images of one grid.

    Args:
        model: a model with ``patch_embed``, ``head``, and ``blocks``, each with an ``attn``.
        counts: kept patches per image, 0 for an image that exits.
        grid: rows and columns of patches.
        is_packed: whether to count the packed forward instead of timm's own.
        pool_skip: prefix tokens that an attention pool leaves out.
        last_reads_prefix: whether the last block computes only keys and values for patches.
    """
    pool, prefix, last = getattr(model, "attn_pool", None), model.num_prefix_tokens, model.blocks[-1]
    per_token = sum(linear_flops(m) for m in model.blocks.modules())
    per_pair = sum(4 * block.attn.proj.in_features for block in model.blocks)
    per_image = linear_flops(model.head) + linear_flops(getattr(model, "head_dist", None))
    is_plain = embeds_kept_only(model)
    if not is_plain:
        height, width = model.patch_embed.feat_ratio(as_scalar=False)
        per_image += count_flops(model.patch_embed, (model.in_chans, grid[0] * height, grid[1] * width))
    spared = 0  # FLOPs of linear layers that the last block saves per patch
    if last_reads_prefix:
        spared = sum(linear_flops(m) for m in last.modules()) - linear_flops(last.attn.qkv) * 2 // 3
    total = 0
    for patches in filter(None, counts):
        tokens = prefix + patches
        total += tokens * per_token + tokens**2 * per_pair + per_image
        if spared:
            total -= patches * (spared + tokens * 4 * last.attn.proj.in_features)
        if pool is not None:
            pooled = tokens - pool_skip
            once = sum(linear_flops(m) for name, m in pool.named_modules() if name != "kv") * pool.latent_len
            total += pooled * 4 * pool.latent_len * pool.num_heads * pool.head_dim + once
            total += (tokens if is_packed else pooled) * linear_flops(pool.kv)
        if is_plain:
            total += patches * 2 * model.patch_embed.proj.weight.numel()
    return total
