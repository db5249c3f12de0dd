"""Benchmark of ``select_tokens``, from the guidance model's output to kept patches, at EfficientFormer-L1's sizes."""

import torch
import torch.nn.functional as F
from measure import DTYPE, randn, size_of

from tinydrop_kernels import ops

CHANNELS, CLASSES = 448, 1000
FEATURE_SIZES = {14: (7, 7), 24: (12, 12), 37: (17, 17)}  # the guidance model's grid at 224, 384 and 518 pixels


def sure_logits(batch):
    """Return random logits in which one class is clearly the largest, because bfloat16 values often tie."""
    logits = randn(batch, CLASSES)
    raised = torch.randint(CLASSES, (batch, 1), device=logits.device)
    return logits.scatter_add_(1, raised, torch.full_like(logits[:, :1], 8.0))


def user(logits, features, class_weight, feature_size, grid, kept):
    """Keep a fixed fraction of every image, and return the kept patches, the confidence and the saliency.

    The operator does more. It applies a law that gives each image its own count and grid, and handles exits. It orders
    equal scores and NaN, and computes in float32 from half-precision features.
    """
    confidence, predicted = logits.float().softmax(dim=1).max(dim=1)
    saliency = torch.bmm(features, class_weight[predicted][:, :, None]).relu().float()
    saliency = saliency.view(len(logits), 1, *feature_size)
    resized = F.interpolate(saliency, size=grid, mode="bilinear", align_corners=False).flatten(1)
    return resized.topk(kept, dim=1, sorted=False).indices.sort(dim=1).values, confidence, resized


def agree(ours, theirs):
    """Check that both keep the same total saliency, because ties may keep different patches."""
    kept, confidence, saliency = theirs
    assert ours.counts.eq(kept.shape[1]).all()
    torch.testing.assert_close(ours.confidence, confidence)
    tolerance = 1e-4 if DTYPE == torch.float32 else 3e-2
    torch.testing.assert_close(ours.saliency, saliency, atol=tolerance * saliency.amax().item(), rtol=0)
    sums = [saliency.gather(1, i.long()).sum(dim=1) for i in (ours.indices[:, : kept.shape[1]], kept)]
    torch.testing.assert_close(*sums, atol=0, rtol=tolerance)


def test_select_tokens(case, compare):
    feature_size = FEATURE_SIZES[case.grid[0]]
    cells = feature_size[0] * feature_size[1]
    class_weight = randn(CLASSES, CHANNELS)

    def make_arguments():
        return sure_logits(case.batch), randn(case.batch, cells, CHANNELS), class_weight

    def own(logits, features, class_weight):
        # A gamma of 0 keeps min_keep of every image, as the baseline does.
        law = ops.Law(tau=None, gamma=0.0, min_keep=case.keep)
        return ops.select_tokens(logits, features, class_weight, feature_size, [case.grid], law)

    def eager(logits, features, class_weight):
        return user(logits, features, class_weight, feature_size, case.grid, case.kept)

    logits, features, _ = make_arguments()
    rows = class_weight[: min(case.batch, CLASSES)]
    results = 4 * case.batch * (2 * case.num_patches + 3)  # indices, saliency, counts, levels, confidence
    compare("select_tokens", own, eager, make_arguments, size_of(logits, features, rows) + results, agree=agree)
