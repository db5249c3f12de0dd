"""``patch`` and ``unpatch`` with all that users do to models: copies, dtypes, modes, checkpoints, and mistakes."""

import copy
import io
from contextlib import suppress

import pytest
import timm
import torch
from helpers import tiny_guidance, tiny_vit, varied_images

import tinydrop_kernels as tdk

DROP_HALF = tdk.DropPolicy.fixed(0.5)


def snapshot(model):
    """Return all attributes and tensors of a model, to find out what patching leaves behind."""
    modules = {name: set(vars(module)) for name, module in model.named_modules()}
    return modules, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(before, after):
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])


def test_unpatch_restores_the_bits(vit, images):
    before, wanted = snapshot(vit), vit(images)
    assert tdk.patch(vit, tiny_guidance(), DROP_HALF) is vit
    assert not torch.equal(vit(images), wanted)
    assert tdk.unpatch(vit) is vit
    assert torch.equal(vit(images), wanted)
    assert_same(before, snapshot(vit))


def test_unpatch_restores_the_bits_after_an_exception(vit, images):
    before, wanted = snapshot(vit), vit(images)
    tdk.patch(vit, tiny_guidance(), DROP_HALF)
    hook = vit.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vit(images)
    hook.remove()
    assert vit(images).shape == wanted.shape, "usable again"
    tdk.unpatch(vit)
    assert torch.equal(vit(images), wanted)
    assert_same(before, snapshot(vit))


def test_a_refused_patch_leaves_no_trace(vit):
    before = snapshot(vit)
    for bad in ({"guidance": tiny_guidance(6)}, {"guidance": vit}, {"guidance": 3}, {"policy": 0.5}):
        with pytest.raises((ValueError, TypeError)):
            tdk.patch(vit, **({"guidance": tiny_guidance(), "policy": tdk.DropPolicy()} | bad))
    assert_same(before, snapshot(vit))


def test_patching_twice_is_refused(patched, images):
    wanted = patched(images)
    with pytest.raises(ValueError, match="^model: it is patched already"):
        tdk.patch(patched, tiny_guidance(), DROP_HALF)
    assert torch.equal(patched(images), wanted)


def test_unpatching_what_is_not_patched_is_refused(vit):
    with pytest.raises(ValueError, match="^model: it is not patched"):
        tdk.unpatch(vit)


def test_state_dict_is_untouched(vit):
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    tdk.patch(vit, tiny_guidance(), DROP_HALF)
    after = vit.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert len(list(vit.parameters())) == len(list(tiny_vit().parameters()))
    file = io.BytesIO()
    torch.save(after, file)
    file.seek(0)
    tiny_vit().load_state_dict(torch.load(file))
    vit.load_state_dict(torch.load(io.BytesIO(file.getvalue())))


def test_deepcopy_is_independent(patched, images):
    wanted = patched(images)
    other = copy.deepcopy(patched)
    assert other.tinydrop is not patched.tinydrop and other.tinydrop.guidance is not patched.tinydrop.guidance
    tdk.unpatch(patched)
    assert torch.equal(other(images), wanted)
    other.tinydrop.policy = tdk.DropPolicy.fixed(1.0)
    torch.testing.assert_close(other(images), patched(images), atol=1e-5, rtol=1e-5)
    tdk.unpatch(other)
    assert torch.equal(other(images), patched(images))


def test_whole_model_is_saved_and_loaded(patched, images):
    file = io.BytesIO()
    torch.save(patched, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(images), patched(images))
    tdk.unpatch(loaded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype_follows_the_model(patched, images, dtype):
    patched.tinydrop.policy = tdk.DropPolicy.fixed(0.5)
    wanted = patched(images)
    kept = patched.tinydrop.last.selection.indices
    patched.to(dtype)
    assert next(patched.tinydrop.guidance.parameters()).dtype == dtype
    out = patched(images.to(dtype))
    assert out.dtype == dtype
    same = (patched.tinydrop.last.selection.indices == kept).all(dim=1)  # rounding may swap near-equal patches
    assert same.any()
    torch.testing.assert_close(out[same].to(wanted.dtype), wanted[same], atol=0.1, rtol=0.1)


def test_half_before_patching(images):
    vit = tdk.patch(tiny_vit().bfloat16(), tiny_guidance(), DROP_HALF)
    assert vit(images.bfloat16()).dtype == torch.bfloat16


def test_guidance_keeps_its_weights_when_the_model_goes_through_meta(images):
    """A model may be built and patched on meta, then given memory and weights, as large models are loaded."""
    source = tiny_vit()
    wanted = tdk.patch(copy.deepcopy(source), tiny_guidance(), DROP_HALF)
    torch.manual_seed(0)
    loaded = tdk.patch(copy.deepcopy(source).to("meta"), wanted.tinydrop.guidance, DROP_HALF)
    with pytest.raises(ValueError, match="^model: it is on the meta device"):
        loaded(images.to("meta"))
    loaded.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(loaded(images), wanted(images))


@pytest.mark.parametrize("tau", [1e-6, 1.0], ids=["all exit", "none exits"])
def test_answers_have_the_dtype_of_the_model(tau, images):
    """Answers are in the model's dtype, though the guidance model's logits are in float32 even if that is half."""
    vit = tdk.patch(tiny_vit(), tiny_guidance(), tdk.DropPolicy(tau=tau))
    with torch.autocast("cpu", torch.bfloat16):
        assert vit(images).dtype == torch.bfloat16
    for dtype in (torch.float64, torch.bfloat16):
        assert vit.to(dtype)(images.to(dtype)).dtype == dtype


def test_guidance_size(images):
    vit = tdk.patch(tiny_vit(), tiny_guidance(), DROP_HALF)
    small = tdk.patch(tiny_vit(), tiny_guidance(), DROP_HALF, guidance_size=64)
    oblong = tdk.patch(tiny_vit(), tiny_guidance(), DROP_HALF, guidance_size=(96, 64))
    assert small.tinydrop.guidance.input_size == (64, 64) and oblong.tinydrop.guidance.feature_size == (3, 2)
    for model in (vit, small, oblong):
        model(images)
    assert small.tinydrop.report().guidance_flops < vit.tinydrop.report().guidance_flops
    with pytest.raises(ValueError, match="^guidance_size: got one beside a Guidance, which has its own"):
        tdk.patch(tiny_vit(), vit.tinydrop.guidance, guidance_size=64)
    for bad in (0, (64,), (64, 0)):
        with pytest.raises(ValueError, match="^input_size: got .*expected a number >= 1"):
            tdk.patch(tiny_vit(), tiny_guidance(), guidance_size=bad)
    with pytest.raises(tdk.GuidanceError, match="fails on images of"):
        tdk.patch(tiny_vit(), timm.create_model("efficientformer_l1", num_classes=5), guidance_size=160)


def test_moves_inside_a_larger_module(patched):
    torch.nn.Sequential(patched).bfloat16()
    assert next(patched.tinydrop.guidance.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{}, {"global_pool": "map", "class_token": False}], ids=["token", "map pool"])
def test_norms_that_answer_in_float32(images, options):
    """Norms may answer in float32, as layer norms do under autocast on CUDA but not on CPU."""
    vit = tdk.patch(tiny_vit(qk_norm=True, **options).bfloat16(), tiny_guidance(), DROP_HALF)
    with torch.inference_mode():
        wanted = vit(images.bfloat16())
        for name, module in vit.named_modules():
            if name.endswith(("q_norm", "k_norm")):
                module.register_forward_hook(lambda module, inputs, out: out.float())
        torch.testing.assert_close(vit(images.bfloat16()), wanted)


def test_autocast(patched, images):
    patched.tinydrop.policy = tdk.DropPolicy.fixed(0.5)
    wanted = patched(images)
    with torch.autocast("cpu", torch.bfloat16):
        out = patched(images)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), wanted, atol=0.1, rtol=0.1)


def test_inference_mode_and_no_grad_agree(patched, images):
    wanted = patched(images)
    with torch.no_grad():  # uses oneDNN, but with gradients torch's own products are used
        without = patched(images)
    torch.testing.assert_close(without, wanted.detach(), atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        assert torch.equal(patched(images), without)


def test_gradients_flow_through_the_target(patched, images):
    images.requires_grad_()
    patched(images).sum().backward()
    assert images.grad.isfinite().all() and patched.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_train_mode_is_dense(vit, images):
    wanted = vit(images)
    tdk.patch(vit, tiny_guidance(), DROP_HALF)
    vit.train()
    assert torch.equal(vit(images), wanted)  # this ViT has no dropout
    assert not vit.tinydrop.guidance.training, "the guidance model stays in eval mode"
    vit.eval()
    assert not torch.equal(vit(images), wanted)


def test_features_and_intermediates_stay_dense(vit, images):
    wanted = vit.forward_features(images), vit.forward_intermediates(images)[1], vit.forward_head(torch.ones(2, 17, 32))
    tdk.patch(vit, tiny_guidance(), DROP_HALF)
    assert torch.equal(vit.forward_features(images), wanted[0])
    assert all(map(torch.equal, vit.forward_intermediates(images)[1], wanted[1]))
    assert torch.equal(vit.forward_head(torch.ones(2, 17, 32)), wanted[2])


def test_mask_of_a_dense_sequence_is_refused(patched, images):
    with pytest.raises(ValueError, match="^attn_mask"):
        patched(images, attn_mask=torch.ones(1, 1, 17, 17, dtype=torch.bool))


def test_feature_extractor_takes_guidance_of_any_classes(images):
    vit = tiny_vit(num_classes=0)
    assert tdk.patch(vit, tiny_guidance(7)).tinydrop.policy.tau is None
    assert vit(images).shape == (4, 32)
    with pytest.raises(ValueError, match="^guidance: it knows 7 classes and the model 0"):
        vit.tinydrop.policy = tdk.DropPolicy(tau=0.5)


def test_policy_can_change_between_calls(patched, images):
    patched.tinydrop.policy = tdk.DropPolicy.fixed(0.25)
    patched(images)
    assert patched.tinydrop.last.counts.tolist() == [4] * 4
    patched.tinydrop.policy = tdk.DropPolicy.fixed(0.75)
    patched(images)
    assert patched.tinydrop.last.counts.tolist() == [12] * 4
    with pytest.raises(TypeError, match="^policy: got float"):
        patched.tinydrop.policy = 0.5


def test_new_classes_are_noticed(vit, images):
    tdk.patch(vit, tiny_guidance(), tdk.DropPolicy(tau=0.9))
    vit.reset_classifier(9)
    with pytest.raises(ValueError, match="^guidance: it knows 5 classes and the model 9"):
        vit(images)


def test_non_contiguous_images(patched, images):
    wanted = patched(images)
    torch.testing.assert_close(patched(images.contiguous(memory_format=torch.channels_last)), wanted)
    wide = torch.randn(4, 3, 32, 64)
    wide[..., ::2] = images
    torch.testing.assert_close(patched(wide[..., ::2]), wanted)


def test_last_call_is_told(images):
    vit = tdk.patch(
        tiny_vit(), tiny_guidance(), tdk.DropPolicy(tau=0.6, gamma=1.0, min_keep=0.1, coarsen=0.5, second_look=None)
    )
    with pytest.raises(RuntimeError, match="no image has gone"):
        vit.tinydrop.report()
    images = varied_images(16)
    vit(images)
    last = vit.tinydrop.last
    assert 0 < last.exited.sum() < 16
    assert torch.equal(last.exited, last.confidence > 0.6)
    assert [len(k) for k in last.kept] == last.counts.tolist()
    assert [tuple(m.shape) for m in last.saliency] == last.grid_sizes
    report = vit.tinydrop.report()
    assert report.images == 16 and report.exits == last.exited.sum() and report.seconds == {}
    staying = last.counts[last.counts > 0].float()
    assert report.mean_keep == pytest.approx(staying.mean().item() / 16)
    vit.tinydrop.timed = True
    vit(images)
    seconds = vit.tinydrop.report().seconds
    assert list(seconds) == ["guidance", "select", "pack", "embed", "blocks", "head"] and min(seconds.values()) > 0
    assert "blocks" in str(vit.tinydrop.report())


def test_unpatch_after_an_attention_was_replaced(patched):
    patched.blocks[1].attn = copy.deepcopy(tiny_vit().blocks[1].attn)
    tdk.unpatch(patched)
    assert not hasattr(patched, "tinydrop") and "forward" not in vars(patched.blocks[0].attn)


def test_data_parallel_is_refused(patched):
    with pytest.raises(RuntimeError, match="DataParallel"):
        patched._replicate_for_data_parallel()


def test_stock_model_by_name_without_a_hub():
    model = timm.create_model("vit_tiny_patch16_224").eval()
    before = snapshot(model)
    with pytest.raises(tdk.CheckpointError, match="^guidance: the weights of 'efficientformer_l1.*NAME=FILE"):
        tdk.patch(model)
    assert_same(before, snapshot(model))


def test_patched_for_a_block():
    """Check that the model is as it was after the block, after an exception in it, and if it was unpatched there."""
    model = tiny_vit()
    before = dict(vars(model))
    images = torch.randn(2, 3, 32, 32)
    with tdk.patched(model, tiny_guidance(), tdk.DropPolicy.fixed(0.5)) as same:
        assert same is model and tdk.is_patched(model)
        assert model(images).shape == (2, 5) and model.tinydrop.last.counts.tolist() == [8, 8]
    assert not tdk.is_patched(model) and vars(model).keys() == before.keys()
    with suppress(ZeroDivisionError), tdk.patched(model, tiny_guidance()):
        raise ZeroDivisionError
    assert not tdk.is_patched(model)
    with tdk.patched(model, tiny_guidance()):
        tdk.unpatch(model)
    assert not tdk.is_patched(model)
