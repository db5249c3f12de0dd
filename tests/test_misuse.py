"""Unusual uses of a patched model give the right answer or a clear error, but never a wrong answer."""

import copy

import pytest
import torch
from helpers import tiny_guidance, tiny_vit
from zoo import SWIN_V2, tiny_swin

import tinydrop_kernels as tdk

DROP_HALF = tdk.DropPolicy.fixed(0.5)


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.Sequential], ids=["compiled", "Sequential"])
def test_unpatching_a_wrapper_says_what_to_unpatch(patched, images, wrap):
    wrapper = wrap(patched)
    with pytest.raises(ValueError, match="^model: the patched model is inside this .*; unpatch its "):
        tdk.unpatch(wrapper)
    assert patched.tinydrop.last is None and patched(images).shape == (4, 5), "the model inside still works"
    tdk.unpatch(patched)


def test_patching_a_compiled_model_says_to_patch_first(vit):
    with pytest.raises(tdk.UnsupportedModelError, match="^model: it is compiled; patch the model, then compile it"):
        tdk.patch(torch.compile(vit), tiny_guidance(), DROP_HALF)


def test_what_was_set_later_stays(patched, images):
    """``unpatch`` does not remove a ``forward`` or an ``_apply`` that the user has set."""
    mine = {"forward": lambda x: "mine", "_apply": lambda fn, recurse=True: patched}
    for name, value in mine.items():
        setattr(patched, name, value)
    tdk.unpatch(patched)
    assert vars(patched)["forward"] is mine["forward"] and vars(patched)["_apply"] is mine["_apply"]
    assert "tinydrop" not in vars(patched)


def test_a_block_taken_out_is_unpatched_too(patched):
    taken = patched.blocks[1]
    patched.blocks = patched.blocks[:1]
    tdk.unpatch(patched)
    assert "forward" not in vars(taken.attn) and "forward" not in vars(patched.blocks[0].attn)


def override_positions(vit):
    vit._pos_embed = lambda x: 2 * type(vit)._pos_embed(vit, x)


def override_features(vit):
    vit.forward_features = lambda x, **_: x


def replace_attention(vit):
    vit.blocks[0].attn = copy.deepcopy(tiny_vit().blocks[0].attn)


def hook_on_blocks(vit):
    vit.blocks.register_forward_hook(lambda module, args, out: 2 * out)


def own_patch_drop(vit):
    vit.patch_drop = torch.nn.ReLU()


def dropout_at_test_time(vit):
    vit.blocks[0].attn.attn_drop = torch.nn.Dropout(0.5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (override_positions, "a _pos_embed that is not timm's"),
        (override_features, "a forward_features that is not timm's"),
        (replace_attention, "an attention that was replaced"),
        (hook_on_blocks, "hooks or a forward of its own on blocks"),
        (own_patch_drop, "a patch_drop of type"),
        (dropout_at_test_time, r"blocks.0.attn.attn_drop \(Dropout\) random in train mode"),
    ],
)
def test_changes_after_patching_are_noticed(patched, images, change, reason):
    patched(images)
    change(patched)
    with pytest.raises(
        tdk.UnsupportedModelError, match=f"^model: since it was patched, it has (.* exchanged, and )?{reason}"
    ):
        patched(images)


def test_dropout_in_train_mode_under_eval_is_noticed(images):
    """Dropout that is active in eval mode, as in Monte-Carlo dropout, is refused."""
    vit = tdk.patch(tiny_vit(pos_drop_rate=0.5), tiny_guidance(), DROP_HALF)
    vit(images)
    vit.pos_drop.train()
    with pytest.raises(
        tdk.UnsupportedModelError, match=r"pos_drop \(Dropout\) random in train mode, though the model is in eval mode"
    ):
        vit(images)


def test_patched_in_inference_mode_then_trained(images):
    with torch.inference_mode():
        vit = tdk.patch(copy.deepcopy(tiny_vit()), tiny_guidance(), tdk.DropPolicy.fixed(0.3, coarsen=0.5))
    vit = copy.deepcopy(vit)
    images.requires_grad_()
    vit(images).sum().backward()
    assert images.grad.isfinite().all()


@pytest.mark.parametrize("way", ["jit.trace", "export", "fx"])
def test_tracers_are_refused(patched, images, way):
    with pytest.raises(Exception, match="a patched model cannot be traced"):
        if way == "jit.trace":
            torch.jit.trace(patched, images, check_trace=False)
        elif way == "export":
            torch.export.export(patched, (images,), strict=False)
        else:
            torch.fx.symbolic_trace(patched)


def test_a_single_class_is_never_sure(images):
    """With one class the confidence is always 1. With an exit threshold every image would exit."""
    vit = tdk.patch(tiny_vit(num_classes=1), tiny_guidance(1))
    assert not vit.tinydrop.policy.mixes_answers
    vit(images)
    assert not vit.tinydrop.last.exited.any()
    with pytest.raises(ValueError, match="^policy: the confidence of a single class is always 1"):
        vit.tinydrop.policy = tdk.DropPolicy()
    with pytest.raises(ValueError, match="^policy: the confidence of a single class"):
        tdk.patch(tdk.unpatch(vit), tiny_guidance(1), tdk.DropPolicy.cascade(0.9))


def test_repr_tells(patched):
    assert "tinydrop: guided by ByobNet, DropPolicy(tau=None" in repr(patched)
    assert "tinydrop" not in repr(tdk.unpatch(patched))


def test_guidance_larger_than_the_model_is_told(patched, images):
    patched(images)
    report = patched.tinydrop.report()
    assert report.flops_saved < 0
    assert "the guidance model alone costs" in str(report)


def test_reports_add_up(patched, images):
    patched.tinydrop.timed = True
    patched(images)
    one = patched.tinydrop.report()
    both = one + one
    assert (both.images, both.flops, both.kept_patches) == (8, 2 * one.flops, 2 * one.kept_patches)
    assert both.mean_keep == one.mean_keep and both.flops_saved == one.flops_saved
    assert both.seconds == {stage: 2 * spent for stage, spent in one.seconds.items()}


class Mean(torch.nn.Module):
    """A module that mixes tokens, so little that a trial in bfloat16 lets it pass."""

    def forward(self, x):
        return x - 0.003 * x.mean(dim=-2, keepdim=True)


@torch.inference_mode()
def test_what_passed_in_half_precision_is_tried_again_in_float32():
    model = tdk.patch(tiny_vit(), tiny_guidance(), tdk.DropPolicy.fixed(0.5)).bfloat16()
    images = torch.randn(2, 3, 32, 32)
    model.set_submodule("blocks.0.mlp.drop1", Mean())
    model(images.bfloat16())  # it passes, or nothing is tested
    model.float()
    with pytest.raises(tdk.UnsupportedModelError, match="mix tokens"):
        model(images)


class Double(torch.nn.Module):
    """A module that computes something else, token by token."""

    def forward(self, x):
        return 2 * x


@torch.no_grad()  # not inference mode, in which no value is kept
def test_a_value_is_computed_again_when_a_module_on_its_way_is_exchanged():
    model = tdk.patch(tiny_swin(SWIN_V2, img_size=128, window_size=4), tiny_guidance(), tdk.DropPolicy.fixed(1.0))
    images = torch.randn(2, 3, 128, 128)
    before = model(images)
    model.set_submodule("layers.1.blocks.0.attn.cpb_mlp.1", Double())
    with tdk.dense(model):
        wanted = model(images)
    assert (before - wanted).abs().max() > 1e-3
    torch.testing.assert_close(model(images), wanted, atol=1e-4, rtol=1e-4)
