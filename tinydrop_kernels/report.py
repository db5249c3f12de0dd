"""Records of what a call of a patched model did, and of its cost."""

from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from tinydrop_kernels.families import Family
from tinydrop_kernels.ops.types import Grid, Selection, TimmModule

CASCADE_MARGIN = 0.05  # fraction of FLOPs; saving less than this over exits alone is not worth the loss of accuracy
BEFORE_TARGET = ("guidance", "select", "pack")  # stages that dense does not have


@dataclass(frozen=True)
class Call:
    """What happened to the images of one call. Tensors are not copied and stay on the device of the call.

    Example:
        >>> model = tdk.patch(model, guidance, tdk.DropPolicy.fixed(0.5))
        >>> answers = model(images)
        >>> call = model.tinydrop.last
        >>> call.counts.tolist(), call.num_patches
        ([98, 98], 196)
        >>> call.saliency[0].shape
        torch.Size([14, 14])
    """

    selection: Selection
    levels: list[Grid]  # rows and columns of the target's grid at each level, dense first
    guidance_logits: Tensor  # (batch, the guidance model's classes)
    second_look: Tensor  # bool (batch,): whether the image went through the target a second time, dense
    seconds: dict[str, float] = field(default_factory=dict)  # by stage, filled if ``TinyDrop.timed``
    read_backs: int = 1  # number of times that the host waited to read from the device

    @property
    def num_patches(self) -> int:
        """Number of patches of the dense grid."""
        return self.levels[0][0] * self.levels[0][1]

    @property
    def counts(self) -> Tensor:
        """int32 ``(batch,)``: number of kept patches per image, 0 for an exit."""
        return self.selection.counts

    @property
    def exited(self) -> Tensor:
        """bool ``(batch,)``: whether the guidance model alone answered the image."""
        return self.selection.counts == 0

    @property
    def confidence(self) -> Tensor:
        """float32 ``(batch,)``: largest softmax probability of the guidance model."""
        return self.selection.confidence

    @property
    def grid_sizes(self) -> list[Grid]:
        """Rows and columns of each image's own grid."""
        return [self.levels[level] for level in self.selection.levels.tolist()]

    @property
    def kept(self) -> list[Tensor]:
        """Indices of each image's kept patches, in raster order on its own grid; empty for an exit."""
        return [row[row >= 0] for row in self.selection.indices]

    @property
    def saliency(self) -> list[Tensor]:
        """Saliency map of each image, float32 ``(rows, columns)`` on its own grid."""
        maps = zip(self.selection.saliency, self.grid_sizes, strict=True)
        return [row[: rows * columns].view(rows, columns) for row, (rows, columns) in maps]


@dataclass(frozen=True)
class Report:
    """Counts, FLOPs and times of one call or of several. ``+`` adds two reports, and ``str`` makes one readable.

    Example:
        >>> model = tdk.patch(model, guidance, tdk.DropPolicy.fixed(0.5))
        >>> answers = model(images)
        >>> report = model.tinydrop.report()
        >>> report.images, report.exits, report.kept_patches, report.patches
        (2, 0, 196, 392)
        >>> (report + report).images
        4
    """

    images: int
    exits: int  # images that the guidance model alone answered
    second_looks: int  # images that went through the target a second time, dense
    coarser: int  # images that did not exit and were resized to a coarser grid than the dense one
    kept_patches: int
    patches: int  # patches of the dense grid, summed over the images that did not exit
    flops: int  # spent by the guidance model and the target together
    guidance_flops: int  # spent by the guidance model
    cascade_flops: int  # what a cascade would spend: guidance, and the target on all patches of images that do not exit
    dense_flops: int  # what the target would spend alone, on all patches of all images
    read_backs: int  # number of times that the host waited to read from the device
    calls: int
    seconds: dict[str, float]  # by stage, of the calls that were timed
    wall_seconds: float | None = None  # from images to answers, guidance included; None if not measured
    dense_seconds: float | None = None  # the same for the dense model on the same batches; None if not measured

    @classmethod
    def of(cls, call: Call, family: Family, model: TimmModule, guidance_flops: int) -> "Report":
        """Return the report of one call.

        Args:
            call: the call.
            family, model: the target.
            guidance_flops: FLOPs that the guidance model spends per image.
        """
        counts, levels = call.counts.tolist(), call.selection.levels.tolist()
        dense, exits, again = call.num_patches, counts.count(0), int(call.second_look.sum())
        flops = family.flops(model, [dense] * again, call.levels[0])
        for level, grid in enumerate(call.levels):
            of_level = [count for count, own in zip(counts, levels, strict=True) if own == level]
            flops += family.flops(model, of_level, grid)
        guidance = len(counts) * guidance_flops
        return cls(
            images=len(counts),
            exits=exits,
            second_looks=again,
            coarser=sum(count > 0 and level > 0 for count, level in zip(counts, levels, strict=True)),
            kept_patches=sum(counts),
            patches=(len(counts) - exits) * dense,
            flops=flops + guidance,
            guidance_flops=guidance,
            cascade_flops=family.flops(model, [dense] * (len(counts) - exits), call.levels[0]) + guidance,
            dense_flops=family.dense_flops(model, len(counts), call.levels[0]),
            read_backs=call.read_backs,
            calls=1,
            seconds=call.seconds,
        )

    @property
    def flops_saved(self) -> float:
        """Fraction of the dense model's FLOPs that was saved; negative if more were spent."""
        return 1 - self.flops / self.dense_flops

    @property
    def mean_keep(self) -> float:
        """Fraction of the patches that was kept of the images that did not exit; NaN if all images exited."""
        return self.kept_patches / self.patches if self.patches else float("nan")

    @property
    def speed_up(self) -> float | None:
        """Time of the dense model over that of the patched model; None if either was not measured."""
        return self.dense_seconds / self.wall_seconds if self.dense_seconds and self.wall_seconds else None

    @property
    def notes(self) -> list[str]:
        """Reasons in words why patching does not pay on these images. Time counts only if it was measured."""
        return [*self._guidance_note(), *self._time_note(), *self._rival_note()]

    def _guidance_note(self) -> list[str]:
        if self.guidance_flops < self.dense_flops:
            return []
        times = self.guidance_flops / self.dense_flops
        return [f"the guidance model alone costs {times:.1f} times the FLOPs of the dense model: take a smaller one"]

    def _time_note(self) -> list[str]:
        if not (self.wall_seconds and self.dense_seconds and self.wall_seconds > self.dense_seconds):
            return []
        ours, dense = self.images / self.wall_seconds, self.images / self.dense_seconds
        told = (
            f"the patched model is slower than dense here, in batches of {self.images / self.calls:.3g}: "
            f"{ours:.1f} against {dense:.1f} images/s"
        )
        if self.seconds:
            before, total = sum(self.seconds.get(stage, 0.0) for stage in BEFORE_TARGET), sum(self.seconds.values())
            told += f"; {before / total:.0%} of its time goes before the target, to guidance, selection and packing"
        return [told]

    def _rival_note(self) -> list[str]:
        if self.exits:
            rival, cost = "a plain cascade (exits alone, with a dense target)", self.cascade_flops
        else:
            rival, cost = "the dense model (no image exited)", self.dense_flops
        if self.flops <= (1 - CASCADE_MARGIN) * cost:
            return []
        return [f"{rival} would do as well: {cost / 1e9:.2f} GFLOPs against {self.flops / 1e9:.2f} on these images"]

    def __add__(self, other: "Report") -> "Report":
        sums = {
            f.name: _sum(getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.name != "seconds"
        }
        stages = [*self.seconds, *(stage for stage in other.seconds if stage not in self.seconds)]
        seconds = {stage: self.seconds.get(stage, 0.0) + other.seconds.get(stage, 0.0) for stage in stages}
        return Report(**sums, seconds=seconds)

    def __str__(self) -> str:
        kept = f"{self.mean_keep:.1%}" if self.patches else "all images exited"
        lines = [
            f"images {self.images}, exits {self.exits}, coarser {self.coarser}, second looks {self.second_looks}, "
            f"patches kept of images that stayed {kept}",
            f"GFLOPs {self.flops / 1e9:.2f} (guidance {self.guidance_flops / 1e9:.2f}; a multiply-add counts as two), "
            f"dense {self.dense_flops / 1e9:.2f}, exits alone {self.cascade_flops / 1e9:.2f}, "
            f"saved {self.flops_saved:.1%}",
            f"calls {self.calls}, read-backs {self.read_backs}",
        ]
        if self.seconds:
            lines.append("ms " + ", ".join(f"{stage} {1e3 * spent:.1f}" for stage, spent in self.seconds.items()))
        if self.wall_seconds:
            lines.append(f"images/s {self.images / self.wall_seconds:.1f}")
        if self.speed_up and self.dense_seconds:
            lines[-1] += f", dense {self.images / self.dense_seconds:.1f}, speed-up {self.speed_up:.2f} x"
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _sum(one: Any, other: Any) -> Any:
    """Return the sum of two numbers; None if either was not measured."""
    return None if one is None or other is None else one + other
