"""The method, step by step: a batch of images becomes answers.

1. :func:`ask`: the guidance model classifies the images. Its confidence decides which of them exit and how many patches
   each of the others keeps; its saliency map decides which patches.
2. :func:`decide`: the host reads the sizes of the packed batch from the device.
3. :func:`start`: the kept tokens of all images go through the target together. Its answers are blended with those of
   the guidance model.
4. :func:`finish`: images whose answer is doubtful go through the target again, dense. Exits take the guidance model's
   answer.

A :class:`~tinydrop_kernels.engine.Pipeline` runs step 1 of a batch beside step 3 of the batch before. Under
``torch.compile`` the models are compiled and these functions are not: they depend on numbers that differ from batch to
batch, so they would be compiled again for each.

Source: TinyDrop, arXiv 2509.03379, for exit, budget and saliency; grids, blend and second look are ours.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from tinydrop_kernels import ops
from tinydrop_kernels.engine.checks import check_answers
from tinydrop_kernels.engine.cuda_graphs import MOST_IMAGES, has_graphs
from tinydrop_kernels.engine.plan import BatchPlan, PendingPlan, RunningBatch
from tinydrop_kernels.engine.state import PatchedState
from tinydrop_kernels.engine.stopwatch import timed_stage
from tinydrop_kernels.engine.target import run_target
from tinydrop_kernels.engine.watch import Watch
from tinydrop_kernels.guidance.model import GuidanceOutput
from tinydrop_kernels.ops import Packed, Part, Selection
from tinydrop_kernels.ops.packing import Packing, lay_out, pack_alike
from tinydrop_kernels.ops.registry import forced_backend
from tinydrop_kernels.ops.types import Grid
from tinydrop_kernels.policy import DropPolicy
from tinydrop_kernels.policy.blend import combined_answers, in_doubt, log_probabilities
from tinydrop_kernels.report import Call
from tinydrop_kernels.torch_internals import eager_outside, hooks_of


@eager_outside
def classify(state: PatchedState, images: Tensor) -> Tensor:
    """Return the answers ``(batch, classes)`` for checked images, and remember what happened as ``state.last``."""
    plan = decide(state, ask(state, images))
    return finish(state, start(state, images, plan))


@eager_outside
def ask(
    state: PatchedState, images: Tensor, guided: GuidanceOutput | None = None, policy: DropPolicy | None = None
) -> PendingPlan:
    """Run guidance, selection and packing. On a GPU the host does not wait for them.

    Args:
        state: of the patched model.
        images: checked, ``(batch, channels, height, width)``.
        guided: the guidance model's output for these images, if it has been computed.
        policy: used in place of the model's own.

    Raises:
        ValueError: the policy mixes answers that cannot be mixed.
    """
    if policy is not None:
        state.check_policy(policy)
    policy, seconds = policy or state.policy, dict[str, float]()
    levels = state.levels(state.family.grid_size(state.model, images))
    replayed = None
    if guided is None and len(images) <= MOST_IMAGES and _can_replay(state, images):
        replayed = _replay_front(state, images, policy, levels)
    logits, selection, packing = replayed or _front(state, images, guided, policy, levels, seconds)
    return PendingPlan(policy, logits, selection, packing, seconds)


@eager_outside
def decide(state: PatchedState, pending: PendingPlan) -> BatchPlan:
    """Read back the sizes of the packed batch, for which the host waits."""
    policy, logits, selection, packing, seconds = pending
    if state.graphs is not None:
        state.graphs.blocks.check(state.check_model())  # while the device is still at work
    with _stage(state, seconds, "pack", logits):
        packed, parts = packing.read()
    return BatchPlan(policy, logits, selection, packing.grids, packed, parts, seconds)


@eager_outside
def start(state: PatchedState, images: Tensor, plan: BatchPlan) -> RunningBatch:
    """Run the target on the kept tokens. On a GPU the host does not wait for it."""
    logits = plan.guidance_logits
    if not plan.parts:
        kind = images.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else images.dtype
        return RunningBatch(images, plan, logits.new_empty(0, dtype=torch.long), logits[:0].to(dtype))
    staying = torch.cat([part.images for part in plan.parts]).long()
    reduced = _through_target(state, images, plan.selection.indices, plan.packed, plan.parts, plan.seconds)
    check_answers(plan.policy, reduced, logits)
    return RunningBatch(images, plan, staying, combined_answers(reduced, logits[staying], plan.policy))


@eager_outside
def finish(state: PatchedState, running: RunningBatch) -> Tensor:
    """Take a second look where the policy asks for one, which reads back again, and return all answers in order."""
    images, plan, staying, answers = running
    second_look = torch.zeros_like(plan.selection.counts, dtype=torch.bool)
    thresholds = plan.policy.second_look if plan.parts else None
    if thresholds is not None:
        with _stage(state, plan.seconds, "second look", images):
            answers, again = _look_again(state, images, answers, staying, plan, thresholds)
        second_look[staying] = again
    if len(staying) < len(images):
        exits = log_probabilities(plan.guidance_logits, answers.dtype)
    else:  # no row of the guidance model is used, and it may know other classes
        exits = torch.empty_like(answers)
    state.last = Call(
        selection=plan.selection,
        levels=plan.levels,
        guidance_logits=plan.guidance_logits,
        second_look=second_look,
        seconds=plan.seconds,
        read_backs=1 + (thresholds is not None),
    )
    return exits.index_copy(0, staying, answers)


def plan(
    state: PatchedState, images: Tensor, guided: GuidanceOutput | None = None, policy: DropPolicy | None = None
) -> BatchPlan:
    """Return :func:`decide` of :func:`ask`."""
    return decide(state, ask(state, images, guided, policy))


def run(state: PatchedState, images: Tensor, plan: BatchPlan) -> Tensor:
    """Return :func:`finish` of :func:`start`."""
    return finish(state, start(state, images, plan))


def guide(state: PatchedState, images: Tensor, policy: DropPolicy | None = None) -> GuidanceOutput:
    """Run the guidance model on images that are normalised for the target."""
    guided: GuidanceOutput = state.guidance(images, *state.normalization, (policy or state.policy).saliency)
    return guided


@eager_outside
def _front(
    state: PatchedState,
    images: Tensor,
    guided: GuidanceOutput | None,
    policy: DropPolicy,
    levels: list[Grid],
    seconds: dict[str, float],
) -> tuple[Tensor, Selection, Packing]:
    """Return the guidance model's logits, the selection and where the batch is packed."""
    if guided is None:
        with _stage(state, seconds, "guidance", images):
            guided = guide(state, images, policy)
    with _stage(state, seconds, "select", images), torch.no_grad():
        if guided.saliency is not None:
            selection = ops.select_from_saliency(guided.logits, guided.saliency, levels, policy.law)
        else:
            assert guided.features is not None
            weight, size = state.guidance.class_weight, state.guidance.feature_size
            selection = ops.select_tokens(
                guided.logits, guided.features, weight, size, levels, policy.law, policy.saliency
            )
    with _stage(state, seconds, "pack", images):
        prefix = state.family.num_prefix_tokens(state.model)
        return guided.logits, selection, lay_out(selection.counts, selection.levels, levels, prefix)


def _replay_front(
    state: PatchedState, images: Tensor, policy: DropPolicy, levels: list[Grid]
) -> tuple[Tensor, Selection, Packing] | None:
    """Return :func:`_front` from a CUDA graph; None if no graph can serve this call."""
    guidance, prefix = state.guidance, state.family.num_prefix_tokens(state.model)
    if state.graphs is None or any(hooks_of(guidance)):
        return None
    watch = state.guidance_watch
    if watch is None or watch.model is not guidance or not (watch.same_parts() and watch.same_state()):
        watch = state.guidance_watch = Watch(guidance, lambda: (guidance.mean, guidance.std, guidance.input_size))
    state.graphs.front.check(watch)
    kind = (images.shape, images.dtype, policy.law, policy.saliency, guidance, state.normalization)
    return state.graphs.front.answer(  # type: ignore[no-any-return]
        (*kind, tuple(levels), prefix),
        lambda static: _front(state, static, None, policy, levels, {}),
        lambda: (torch.zeros_like(images),),
        lambda static: static.copy_(images),
    )


@eager_outside
def _through_target(
    state: PatchedState, images: Tensor, indices: Tensor, packed: Packed, parts: list[Part], seconds: dict[str, float]
) -> Tensor:
    """Return the target's logits ``(segments, classes)`` for the images of the parts, one part after the other."""
    graphs = state.graphs.blocks if state.graphs is not None and _can_replay(state, images) else None
    stage = partial(_stage, state, seconds, images=images)
    return run_target(state.model, state.family, images, indices, packed, parts, state.compiled, graphs, stage)


@eager_outside
def _look_again(
    state: PatchedState,
    images: Tensor,
    answers: Tensor,
    staying: Tensor,
    plan: BatchPlan,
    thresholds: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Replace doubtful answers by dense ones. Also return which they were, bool ``(segments,)``. Reads back once."""
    guided, grid = plan.guidance_logits, plan.levels[0]
    dense = grid[0] * grid[1]
    again = (plan.selection.counts[staying] < dense) & in_doubt(answers, guided[staying], thresholds)
    doubtful = again.nonzero()[:, 0]
    if len(doubtful) == 0:
        return answers, again
    chosen = staying[doubtful]
    prefix = state.family.num_prefix_tokens(state.model)
    everything, packed, parts = pack_alike(len(chosen), dense, grid, prefix, images.device)
    logits = _through_target(state, images[chosen], everything, packed, parts, {})
    return answers.index_copy(0, doubtful, combined_answers(logits, guided[chosen], plan.policy)), again


def _can_replay(state: PatchedState, images: Tensor) -> bool:
    """Return whether CUDA graphs may serve the call. They hold no gradients, no autocast and no timing of stages, and
    the reference implementations read back, which no graph can hold."""
    kind = images.device.type
    is_reference = images.dtype == torch.float64 or forced_backend() == "reference"
    asks_for_more = state.timed or torch.is_grad_enabled() or torch.is_autocast_enabled(kind)
    return state.graphs is not None and has_graphs(kind) and not (is_reference or asks_for_more)


def _stage(state: PatchedState, seconds: dict[str, float], name: str, images: Tensor) -> AbstractContextManager[None]:
    return timed_stage(seconds, name, images.device) if state.timed else nullcontext()
