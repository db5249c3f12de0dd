"""The accuracy and the speed of a patched model on labelled images, beside the dense model and guidance alone."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor

from tinydrop_kernels.engine.batches import labelled_batches
from tinydrop_kernels.engine.checks import check_classifier, check_eval, check_patched
from tinydrop_kernels.engine.stopwatch import timed, warm_up_calls
from tinydrop_kernels.ops.types import TimmModule
from tinydrop_kernels.policy.fingerprint import name_of
from tinydrop_kernels.report import Report

QUANTILE = 1.96  # of the normal distribution, for an interval of 95 %


@dataclass(frozen=True)
class Score:
    """The accuracy of one model on the images of an evaluation, and its cost. Shares are between 0 and 1.

    Attributes:
        model: timm's name. The patched model has the names of the target and of the guidance model.
        top1, top5: shares of the images whose label is the top class, or one of the five top classes.
        param_count: number of parameters. Folding has removed some of the guidance model's.
        img_size: width of the model's images in pixels.
        images_per_second: None for the guidance model, which is not timed alone.
        flops_saved: share of the dense model's FLOPs that was saved; negative if more were spent.
        exits: share of the images that the guidance model alone answered.
        agreement: share of the images with the dense model's top class.
    """

    model: str
    top1: float
    top5: float
    param_count: int
    img_size: int
    images_per_second: float | None
    flops_saved: float
    exits: float
    agreement: float


@dataclass(frozen=True)
class Evaluation:
    """The scores of the dense model, of the patched model and of guidance alone. ``str`` makes them a table.

    Attributes:
        images: number of images.
        dense: score of the dense model.
        patched: score of the patched model.
        guidance: score of the guidance model alone; None if its classes are not the target's.
        only_dense: number of images that the dense model classifies correctly and the patched model does not.
        only_patched: number of images that the patched model classifies correctly and the dense model does not.
        crop_pct, interpolation: preprocessing according to the target's ``pretrained_cfg``.
        report: sum of the reports of all batches, with the time of both models.

    Example:
        >>> model = tdk.patch(model, guidance, tdk.DropPolicy.fixed(0.5))
        >>> evaluation = tdk.evaluate(model, [(images, torch.tensor([3, 7]))])
        >>> evaluation.images, evaluation.dense.flops_saved, evaluation.patched.exits
        (2, 0.0, 0.0)
    """

    images: int
    dense: Score
    patched: Score
    guidance: Score | None
    only_dense: int
    only_patched: int
    crop_pct: float
    interpolation: str
    report: Report

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the patched model's top-1 accuracy minus the dense model's.

        It is the normal interval of the mean of the paired differences, which are -1, 0 or 1 for each image. As in
        McNemar's test, only images that exactly one of the models classifies correctly count. One such image of each
        kind is added, so that the interval is not empty if there are none (Bonett and Price, "Adjusted Wald confidence
        interval for a difference of binomial proportions based on paired data", J. Educ. Behav. Stat. 37, 2012).
        """
        images = self.images + 2
        lost, gained = (self.only_dense + 1) / images, (self.only_patched + 1) / images
        half = QUANTILE * math.sqrt((lost + gained - (gained - lost) ** 2) / images)
        return max(gained - lost - half, -1.0), min(gained - lost + half, 1.0)

    @property
    def verdict(self) -> str:
        """Speed and accuracy of the patched model against the dense model, in one sentence."""
        points = _points(self.patched.top1 - self.dense.top1)
        low, high = map(_points, self.interval)
        if points < 0:
            points, low, high = -points, -high + 0.0, -low + 0.0
            accurate = f"{points:.1f} points less accurate (95 % interval {low:.1f} to {high:.1f})"
        elif points > 0:
            accurate = f"{points:.1f} points more accurate (95 % interval {low:.1f} to {high:.1f})"
        else:
            accurate = f"as accurate (95 % interval of the difference {low:.1f} to {high:.1f} points)"
        speed_up = f"{self.report.speed_up:.2f} times as fast as dense"
        return f"Patched is {speed_up} and {accurate} on these {self.images} images."

    def as_dict(self) -> dict[str, list[Any]]:
        """Return the table as columns, with one value for each of dense, patched and guidance alone, in this order.

        The columns from ``model`` to ``interpolation`` have the names and units of the results of timm's validate.py:
        accuracies in percent, and ``param_count`` in millions. The others are ours, and shares are in percent too.

        Example:
            >>> evaluation = tdk.evaluate(tdk.patch(model, guidance), [(images, torch.tensor([3, 7]))])
            >>> columns = evaluation.as_dict()
            >>> columns["model"]
            ['vit_tiny_patch16_224.augreg_in21k_ft_in1k', '... + test_byobnet.r160_in1k', 'test_byobnet.r160_in1k']
            >>> list(columns)[:5]
            ['model', 'top1', 'top1_err', 'top5', 'top5_err']
        """
        rows = [self._row(score) for score in (self.dense, self.patched, self.guidance) if score]
        return {column: [row[column] for row in rows] for column in rows[0]}

    def _row(self, score: Score) -> dict[str, Any]:
        speed = score.images_per_second
        return {
            "model": score.model,
            "top1": round(100 * score.top1, 4),
            "top1_err": round(100 - 100 * score.top1, 4),
            "top5": round(100 * score.top5, 4),
            "top5_err": round(100 - 100 * score.top5, 4),
            "param_count": round(score.param_count / 1e6, 2),
            "img_size": score.img_size,
            "crop_pct": self.crop_pct,
            "interpolation": self.interpolation,
            "images_per_second": None if speed is None else round(speed, 2),
            "flops_saved": round(100 * score.flops_saved, 4),
            "exits": round(100 * score.exits, 4),
            "agreement": round(100 * score.agreement, 4),
        }

    def __str__(self) -> str:
        lines = [f"{'':14}{'top-1':>9}{'top-5':>9}{'images/s':>10}{'FLOPs saved':>13}{'exits':>9}{'agreement':>11}"]
        for name, score in (("dense", self.dense), ("patched", self.patched), ("guidance alone", self.guidance)):
            if score:
                speed = "-" if score.images_per_second is None else f"{score.images_per_second:.1f}"
                lines.append(
                    f"{name:14}{score.top1:>9.1%}{score.top5:>9.1%}{speed:>10}{score.flops_saved:>13.1%}"
                    f"{score.exits:>9.1%}{score.agreement:>11.1%}"
                )
        return "\n".join([*lines, self.verdict])


@torch.inference_mode()
def evaluate(model: TimmModule, loader: Iterable[Any]) -> Evaluation:
    """Return the accuracy and the speed of a patched model and of the same model dense, on labelled images.

    Both run on each batch in turn. The guidance model's answers are those of the patched model's calls. The first batch
    runs once more before, or twice with CUDA graphs, to warm up. Loading is not timed.

    Args:
        model: a patched classifier in eval mode, with one label per image. Its own policy is evaluated.
        loader: batches of images, floating ``(batch, channels, height, width)``, normalised for the target, and labels,
            whole numbers ``(batch,)``. They are moved to the model's device, and images to its dtype.

    Raises:
        ValueError: the model is not patched, has no classes or is multi-label, there are no images, or labels are not
            one class for each image.
        TypeError: a batch is not a pair of images and labels, or its images are not floating.
        RuntimeError: the model is in training mode.

    Example:
        >>> model = tdk.patch(model, guidance)
        >>> evaluation = tdk.evaluate(model, [(images, torch.tensor([3, 7]))])
        >>> print(evaluation)  # doctest: +SKIP
                          top-1    top-5  images/s  FLOPs saved    exits  agreement
        dense             95.0%    99.5%       9.9         0.0%     0.0%     100.0%
        ...
        >>> evaluation.images, len(evaluation.as_dict()["top1"])
        (2, 3)
    """
    check_patched(model)
    check_eval(model)
    tinydrop, weight = model.tinydrop, next(model.parameters())
    classes = tinydrop.num_classes
    check_classifier(classes)
    if tinydrop.multi_label:
        raise ValueError("model: it is multi-label, expected a model with one label per image")
    report, truth, width = None, list[Tensor](), 0
    dense, patched, guidance = list[Tensor](), list[Tensor](), list[Tensor]()
    for images, labels in labelled_batches(loader, classes):
        if labels is None:
            raise TypeError("loader: got images without labels, expected (images, labels)")
        if not len(images):
            raise ValueError("loader: got a batch without images")
        truth.append(torch.from_numpy(labels))
        images = images.to(weight.device, weight.dtype)
        tinydrop.check(images)
        if report is None:
            width = images.shape[3]
            for _ in range(warm_up_calls(model)):
                model(images)
            tinydrop.dense(images)
        answers, seconds = timed(model, images)
        call = tinydrop.last
        dense_logits, dense_seconds = timed(tinydrop.dense, images)
        for tops, logits in ((dense, dense_logits), (patched, answers), (guidance, call.guidance_logits)):
            tops.append(logits.float().topk(min(5, logits.shape[1])).indices.cpu())
        own = replace(tinydrop.report(call), wall_seconds=seconds, dense_seconds=dense_seconds)
        report = own if report is None else report + own
    if report is None:
        raise ValueError("loader: got no images")
    return _evaluation(model, report, width, torch.cat(truth), *map(torch.cat, (dense, patched, guidance)))


def _evaluation(
    model: TimmModule, report: Report, width: int, labels: Tensor, dense: Tensor, patched: Tensor, guidance: Tensor
) -> Evaluation:
    """Return the evaluation.

    Args:
        model: the patched model.
        report: sum over all batches, with the times of both models.
        width: width of the images in pixels.
        labels: int32 ``(images,)``.
        dense, patched, guidance: the five top classes of each image, ``(images, 5)``, fewer if there are fewer classes.
    """
    tinydrop, images, config = model.tinydrop, report.images, resolve_model_data_config(model)
    tiny = tinydrop.guidance
    target_name, guidance_name = name_of(model), tiny.fingerprint.name
    target_size, guidance_size = (sum(parameter.numel() for parameter in each.parameters()) for each in (model, tiny))
    assert report.wall_seconds and report.dense_seconds  # every batch was timed

    def score(tops: Tensor, **others: Any) -> Score:
        hits = tops == labels[:, None]
        return Score(
            top1=int(hits[:, 0].sum()) / images,
            top5=int(hits.sum()) / images,
            agreement=int((tops[:, 0] == dense[:, 0]).sum()) / images,
            **others,
        )

    of_dense = score(
        dense,
        model=target_name,
        param_count=target_size,
        img_size=width,
        images_per_second=images / report.dense_seconds,
        flops_saved=0.0,
        exits=0.0,
    )
    of_patched = score(
        patched,
        model=f"{target_name} + {guidance_name}",
        param_count=target_size + guidance_size,
        img_size=width,
        images_per_second=images / report.wall_seconds,
        flops_saved=report.flops_saved,
        exits=report.exits / images,
    )
    of_guidance = score(
        guidance,
        model=guidance_name,
        param_count=guidance_size,
        img_size=tiny.input_size[1],
        images_per_second=None,
        flops_saved=1 - report.guidance_flops / report.dense_flops,
        exits=1.0,
    )
    dense_right, patched_right = dense[:, 0] == labels, patched[:, 0] == labels
    return Evaluation(
        images=images,
        dense=of_dense,
        patched=of_patched,
        guidance=of_guidance if tiny.num_classes == tinydrop.num_classes else None,
        only_dense=int((dense_right & ~patched_right).sum()),
        only_patched=int((patched_right & ~dense_right).sum()),
        crop_pct=config["crop_pct"],
        interpolation=config["interpolation"],
        report=report,
    )


def _points(share: float) -> float:
    """Return percentage points to one decimal, with 0.0 in place of -0.0."""
    return round(100 * share, 1) + 0.0
