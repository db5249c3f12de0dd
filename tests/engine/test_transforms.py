"""Patched models under torch's function transforms, and their copies, give timm's answer or an error with a remedy."""

import copy
import pickle

import pytest
import timm
import torch
from helpers import tiny_guidance, tiny_vit, varied_images
from slow import mostly_slow
from torch import nn
from torch.autograd import forward_ad
from zoo import tiny_swin

import tinydrop_kernels as tdk
from tinydrop_kernels import ops
from tinydrop_kernels.torch_internals import transforms

KEEP_ALL = tdk.DropPolicy(tau=None, gamma=0.0, min_keep=1.0, blend=0.0, second_look=None)
DROP_HALF = tdk.DropPolicy.fixed(0.5)


@pytest.fixture
def timm_model(vit):
    """Return a model without fused attention, which torch cannot differentiate in forward mode or twice."""
    for block in vit.blocks:
        block.attn.fused_attn = False
    return vit


def of_parameters(transform):
    """Return a function that applies a transform with respect to the model's weights, by ``functional_call``."""

    def run(model, images):
        weights = {name: weight.detach() for name, weight in model.named_parameters()}
        found = transform(lambda given: torch.func.functional_call(model, given, (images,)).pow(2).sum(0))(weights)
        return found["blocks.0.attn.qkv.weight"]

    return run


REVERSE = {
    "grad": lambda model, images: torch.func.grad(lambda x: model(x).pow(2).sum())(images),
    "grad of weights": of_parameters(lambda f: torch.func.grad(lambda given: f(given).sum())),
    "vjp": lambda model, images: torch.func.vjp(model, images)[1](torch.ones(4, 5))[0],
    "jacrev": lambda model, images: torch.func.jacrev(lambda x: model(x).sum(0))(images),
    "jacrev of weights": of_parameters(torch.func.jacrev),
    "autograd's vjp": lambda model, images: torch.autograd.functional.vjp(model, images, torch.ones(4, 5))[1],
    "autograd's jacobian": lambda model, images: torch.autograd.functional.jacobian(lambda x: model(x).sum(0), images),
}


def with_dual_numbers(model, images):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(images, torch.ones_like(images)))).tangent


FORWARD = {
    "jvp": lambda model, images: torch.func.jvp(model, (images,), (torch.ones_like(images),))[1],
    "jacfwd": lambda model, images: torch.func.jacfwd(lambda s: model(s * images))(torch.ones(())),
    "linearize": lambda model, images: torch.func.linearize(model, images)[1](torch.ones_like(images)),
    "hessian": lambda model, images: torch.func.hessian(lambda s: model(s * images).sum())(torch.ones(())),
    "vmap": lambda model, images: torch.func.vmap(lambda x: model(x[None])[0])(images),
    "vmap of grad": lambda model, images: torch.func.vmap(torch.func.grad(lambda x: model(x[None]).sum()))(images),
    "functionalize": lambda model, images: torch.func.functionalize(model)(images),
    "dual numbers": with_dual_numbers,
    "autograd's forward mode": lambda model, images: torch.autograd.functional.jacobian(
        lambda s: model(s * images), torch.ones(1), strategy="forward-mode", vectorize=True
    ),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("name", REVERSE)
def test_reverse_mode_is_timms(timm_model, images, name, mode):
    patched = tdk.patch(copy.deepcopy(timm_model), tiny_guidance(), KEEP_ALL)
    with mode():
        wanted = REVERSE[name](timm_model, images)
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(REVERSE[name](patched, images), wanted, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("mode", mostly_slow([torch.enable_grad, torch.no_grad], torch.no_grad))
@pytest.mark.parametrize("name", mostly_slow(FORWARD, *(name for name in FORWARD if name != "linearize")))
def test_what_the_operators_have_no_formula_for_is_refused(timm_model, images, name, mode):
    """timm answers, but a patched model must refuse, because some derivatives would be zero. Dense it works."""
    patched = tdk.patch(copy.deepcopy(timm_model), tiny_guidance(), DROP_HALF)
    with mode():
        wanted = FORWARD[name](timm_model, images)
        with pytest.raises(
            RuntimeError, match="^model: a patched model does not work under .*; use reverse mode .*unpatch"
        ):
            FORWARD[name](patched, images)
        patched(images)
        torch.testing.assert_close(FORWARD[name](patched.train(), images), wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(FORWARD[name](tdk.unpatch(patched).eval(), images), wanted, atol=1e-5, rtol=1e-4)


def test_features_too_are_refused(patched, images):
    with pytest.raises(RuntimeError, match="^model: a patched model does not work under jvp"):
        torch.func.jvp(lambda x: patched.tinydrop.features(x)[0], (images,), (images,))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_byobnet", "mobilenetv3_small_050", "efficientvit_b0", "test_vit"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_reverse_mode_with_every_kind_of_guidance(name, mode):
    """Gradients of the target are right with each kind of guidance, though some kinds compute a gradient themselves."""
    size = (160, 160) if name == "test_vit" else (64, 64)
    guidance = tdk.Guidance(timm.create_model(name, num_classes=5).eval(), size)
    policy = tdk.DropPolicy(None, 1.0, 0.1, 0.5, blend=0.2, second_look=(0.3, 0.6))
    model, images = tdk.patch(tiny_vit(img_size=64), guidance, policy), varied_images(4, 64)
    leaf = images.clone().requires_grad_()
    model(leaf).pow(2).sum().backward()
    kept = model.tinydrop.last.selection.indices
    with mode():
        found = torch.func.grad(lambda x: model(x).pow(2).sum())(images)
    assert torch.equal(model.tinydrop.last.selection.indices, kept)
    assert leaf.grad.abs().max() > 1e-5
    torch.testing.assert_close(found, leaf.grad, atol=1e-6, rtol=1e-3)


CU_SEQLENS = torch.tensor([0, 4, 10], dtype=torch.int32)
OPERATORS = {
    "varlen_attention": lambda x: ops.varlen_attention(x, x, x, CU_SEQLENS, CU_SEQLENS, 6, 6, 0.3),
    "segment_pool": lambda x: ops.segment_pool(x.flatten(1), CU_SEQLENS, "mean"),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_by_themselves(name):
    """An operator refuses forward mode, where torch would give zeros, and runs a vmap as a loop."""
    operator, x = OPERATORS[name], torch.randn(2, 10, 2, 8)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(RuntimeError, match=f"^{name}: it has no forward-mode derivative; use reverse mode"):
            torch.func.jvp(operator, (x[0],), (x[1],))
    torch.testing.assert_close(torch.func.vmap(operator)(x), torch.stack([operator(one) for one in x]))
    leaf = x[0].clone().requires_grad_()
    operator(leaf).pow(2).sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda x: operator(x).pow(2).sum())(x[0]), leaf.grad)


def test_the_names_of_what_is_at_work():
    seen = []

    def look(x):
        seen.append(transforms())
        return x.sin()

    x = torch.ones(3)
    look(x)
    torch.func.grad(lambda x: look(x).sum())(x)
    torch.func.jvp(look, (x,), (x,))
    torch.func.vmap(look)(x)
    torch.func.hessian(lambda x: look(x).sum())(x)
    torch.func.functionalize(look)(x)
    with forward_ad.dual_level():
        look(x)
    look(x)
    hessian = ["forward_ad", "vmap", "jvp", "grad"]
    names = [[], ["grad"], ["forward_ad", "jvp"], ["vmap"], hessian, ["functionalize"], ["forward_ad"], []]
    assert seen == names


@pytest.mark.parametrize("missing", [(torch._C, "_functorch"), (torch._C._functorch, "get_interpreter_stack")], ids=str)
def test_a_torch_without_it_is_a_torch_that_says_nothing(monkeypatch, missing, patched, images):
    monkeypatch.delattr(*missing)
    monkeypatch.delattr(forward_ad, "_current_level")
    assert transforms() == []
    patched(images)


def test_scripting_is_refused(patched, images):
    for module in (patched, nn.Sequential(patched)):
        with pytest.raises(
            RuntimeError, match="^model: a patched model cannot be scripted by torch.jit; use torch.comp"
        ):
            torch.jit.script(module)
    assert patched(images).shape == (4, 5)


@pytest.mark.slow
def test_one_graph_is_refused(patched, images):
    compiled = torch.compile(patched, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="compile without fullgraph=True, or unpatch the model"):
        compiled(images)
    torch._dynamo.reset()
    wanted = patched(images)
    torch.testing.assert_close(torch.compile(patched, backend="eager")(images), wanted)
    torch._dynamo.reset()


def test_a_shallow_copy_is_refused_when_called(patched, images):
    """A shallow copy is refused even with a head of its own, because it would answer as the original."""
    wanted = patched(images)
    shallow = copy.copy(patched)
    shallow._modules = dict(shallow._modules)
    shallow.head = nn.Linear(32, 5)
    for one in (shallow, copy.deepcopy(shallow), shallow.train()):
        with pytest.raises(
            RuntimeError, match="^model: this is a shallow copy of a patched model.*; use copy.deepcopy"
        ):
            one(images)
    with pytest.raises(ValueError, match="^model: it is not patched"):
        tdk.unpatch(shallow)
    shallow.half()
    patched.float()
    patched.eval()
    torch.testing.assert_close(patched(images), wanted, atol=1e-2, rtol=1e-2)


def test_a_shallow_copy_made_before_patching_or_behind_it_is_timms(vit, images):
    wanted, before = vit(images), copy.copy(vit)
    tdk.patch(vit, tiny_guidance(), DROP_HALF)
    assert torch.equal(before(images), wanted)
    tdk.unpatch(vit)
    assert torch.equal(copy.copy(vit)(images), wanted)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_other_copies_carry_the_patch(patched, images, protocol):
    loaded = pickle.loads(pickle.dumps(patched, protocol))
    again = copy.deepcopy(pickle.loads(pickle.dumps(loaded, protocol)))
    for one in (loaded, again):
        assert one.tinydrop.model is one and "__setstate__" not in vars(one)
        assert torch.equal(one(images), patched(images))
        assert vars(tdk.unpatch(one)).keys() == vars(tiny_vit()).keys()


def test_a_patched_model_may_guide(vit, images):
    """A patched model can be the guidance model of another. Guidance makes shallow copies of it but calls none."""
    guidance = tdk.patch(tiny_vit(), tiny_guidance(), DROP_HALF)
    plain = tdk.patch(copy.deepcopy(vit), tdk.unpatch(copy.deepcopy(guidance)), tdk.DropPolicy(tau=0.5))
    torch.testing.assert_close(tdk.patch(vit, guidance, tdk.DropPolicy(tau=0.5))(images), plain(images))


def test_blocks_of_a_patched_model_are_refused_by_another(vit, images):
    other = tiny_vit()
    other.blocks = vit.blocks
    wanted = other(images)
    tdk.patch(vit, tiny_guidance(), DROP_HALF)
    torch.testing.assert_close(other(images), wanted)  # this model is not patched, so the shared blocks run timm's code
    for blocks in (vit.blocks, copy.deepcopy(vit.blocks)):
        other.blocks = blocks
        with pytest.raises(
            tdk.UnsupportedModelError, match="^model: its blocks are shared with or copied from a model that is pa"
        ):
            tdk.patch(other, tiny_guidance(), DROP_HALF)
    other.blocks = vit.blocks
    tdk.unpatch(vit)
    tdk.patch(other, tiny_guidance(), KEEP_ALL)
    torch.testing.assert_close(other(images), wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(vit(images), type(vit).forward(vit, images))


def test_stages_that_two_models_share():
    """Two Swin Transformers that share stages can both be patched, because their attention is not replaced."""
    one, images = tiny_swin(), torch.randn(2, 3, 128, 128)
    other = tiny_swin()
    other.layers = one.layers
    wanted = one(images), other(images)
    for model in (one, other):
        tdk.patch(model, tiny_guidance(), KEEP_ALL)
    for _ in range(2):
        for model, answer in zip((one, other), wanted, strict=True):
            torch.testing.assert_close(model(images), answer, atol=1e-4, rtol=1e-4)
        if "tinydrop" in vars(one):
            tdk.unpatch(one)
