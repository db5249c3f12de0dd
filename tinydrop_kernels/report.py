"""What happened in a call, and what it cost."""

from dataclasses import dataclass, field

from torch import Tensor

from tinydrop_kernels.ops.types import Grid, Selection


@dataclass(frozen=True)
class Call:
    """What happened to the images of one call. Tensors stay where they were computed; nothing is copied to be kept."""

    selection: Selection
    levels: list[Grid]  # rows and columns of the target's grid at each level, dense first
    second_look: Tensor  # bool (batch,): whether the image went through the target a second time, dense
    seconds: dict[str, float] = field(default_factory=dict)  # by stage, filled when ``TinyDrop.timed``

    @property
    def num_patches(self) -> int:
        """Patches of the dense grid."""
        return self.levels[0][0] * self.levels[0][1]

    @property
    def counts(self) -> Tensor:
        """int32 ``(batch,)``: patches kept of each image, 0 for one that exited."""
        return self.selection.counts

    @property
    def exited(self) -> Tensor:
        """bool ``(batch,)``."""
        return self.selection.counts == 0

    @property
    def confidence(self) -> Tensor:
        """float32 ``(batch,)``: the guidance model's."""
        return self.selection.confidence

    @property
    def grid_sizes(self) -> list[Grid]:
        """Rows and columns of each image's own grid."""
        return [self.levels[level] for level in self.selection.levels.tolist()]

    @property
    def kept(self) -> list[Tensor]:
        """For each image the kept patches' numbers in raster order on its own grid; empty for one that exited."""
        return [row[row >= 0] for row in self.selection.indices]

    @property
    def saliency(self) -> list[Tensor]:
        """For each image float32 ``(rows, columns)`` on its own grid."""
        maps = zip(self.selection.saliency, self.grid_sizes, strict=True)
        return [row[: rows * columns].view(rows, columns) for row, (rows, columns) in maps]


@dataclass(frozen=True)
class Report:
    """Calls in numbers; reports add up, and ``str`` of one is for reading."""

    images: int
    exits: int
    second_looks: int
    coarser: int  # images that stayed, at a coarser grid than the dense one
    kept_patches: int
    patches: int  # what the images that stayed have at the dense grid
    flops: int  # guidance and target
    guidance_flops: int
    dense_flops: int  # the target alone, on all patches of all images
    seconds: dict[str, float]  # by stage, of calls that were timed

    @property
    def flops_saved(self) -> float:
        """Fraction of the dense FLOPs that was not spent."""
        return 1 - self.flops / self.dense_flops

    @property
    def mean_keep(self) -> float:
        """Fraction of the dense patches of images that did not exit; NaN where all did."""
        return self.kept_patches / self.patches if self.patches else float("nan")

    def __add__(self, other: "Report") -> "Report":
        names = ("images", "exits", "second_looks", "coarser", "kept_patches", "patches", "flops", "guidance_flops")
        sums = {name: getattr(self, name) + getattr(other, name) for name in (*names, "dense_flops")}
        stages = [*self.seconds, *(stage for stage in other.seconds if stage not in self.seconds)]
        seconds = {stage: self.seconds.get(stage, 0.0) + other.seconds.get(stage, 0.0) for stage in stages}
        return Report(**sums, seconds=seconds)

    def __str__(self) -> str:
        kept = f"{self.mean_keep:.1%}" if self.patches else "none stayed"
        lines = [
            f"images {self.images}, exits {self.exits}, coarser {self.coarser}, second looks {self.second_looks}, "
            f"patches kept of those that stayed {kept}",
            f"GFLOPs {self.flops / 1e9:.2f}, dense {self.dense_flops / 1e9:.2f}, saved {self.flops_saved:.1%}",
        ]
        if self.guidance_flops >= self.dense_flops:
            ratio = self.guidance_flops / self.dense_flops
            lines.append(f"the guidance model alone costs {ratio:.1f} times the dense model: take a smaller one")
        if self.seconds:
            lines.append("ms " + ", ".join(f"{stage} {1e3 * spent:.1f}" for stage, spent in self.seconds.items()))
        return "\n".join(lines)
