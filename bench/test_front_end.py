"""Benchmark of all steps from the guidance model's output to packed tokens, with their read-back from the device."""

from measure import CUDA, randn, size_of
from test_embed_tokens import DIM, PATCH_SIZES
from test_embed_tokens import user as embed
from test_select_tokens import CHANNELS, CLASSES, FEATURE_SIZES, sure_logits
from test_select_tokens import user as select

from tinydrop_kernels import ops


def test_front_end(case, compare):
    patch, feature_size = PATCH_SIZES[case.grid[0]], FEATURE_SIZES[case.grid[0]]
    class_weight = randn(CLASSES, CHANNELS)
    weight = randn(DIM, 3, patch, patch) / (3 * patch**2) ** 0.5
    bias, prefix, pos_embed = randn(DIM), randn(1, DIM), randn(case.num_patches, DIM)

    def make_arguments():
        images = randn(case.batch, 3, case.grid[0] * patch, case.grid[1] * patch)
        cells = feature_size[0] * feature_size[1]
        return images, sure_logits(case.batch), randn(case.batch, cells, CHANNELS)

    def own(images, logits, features):
        law = ops.Law(tau=None, gamma=0.0, min_keep=case.keep)
        selection = ops.select_tokens(logits, features, class_weight, feature_size, [case.grid], law)
        packed, _ = ops.pack(selection.counts, selection.levels, [(1, 1)], 1)
        packing = selection.indices, packed.cu_seqlens, packed.total
        return ops.embed_tokens(images, weight, bias, prefix, pos_embed, *packing)

    def eager(images, logits, features):
        kept, _, _ = select(logits, features, class_weight, feature_size, case.grid, case.kept)
        return embed(images, weight, bias, prefix, pos_embed, kept)

    _, logits, features = make_arguments()
    num_kept = case.batch * case.kept
    rows = num_kept * 3 * patch**2 + (num_kept + case.batch) * DIM
    moved_bytes = size_of(logits, features, weight, bias, prefix, pos_embed) + rows * weight.element_size()
    compare(
        *("front_end", own, eager, make_arguments, moved_bytes),
        flops=2 * num_kept * weight.numel(),
        agree=lambda ours, theirs: None,  # ties may keep different patches; each operator is checked by itself
        reads_back=CUDA and case.implementation == "tinydrop",
    )
