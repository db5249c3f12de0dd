"""All answers are log-probabilities if the policy mixes answers. Otherwise they are the target's own logits."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from helpers import spread_confidence, tiny_guidance, tiny_vit, varied_images
from recording import replay_on_cpu

import tinydrop_kernels as tdk
from tinydrop_kernels.engine import cuda_graphs as graphs
from tinydrop_kernels.engine import steps
from tinydrop_kernels.policy.blend import blended

LAW = {"gamma": 1.0, "min_keep": 0.1, "coarsen": 0.5}
UNMIXED = tdk.DropPolicy(tau=None, blend=0.0, second_look=None, **LAW)
MIXING = {
    "exits": replace(UNMIXED, tau=0.6),
    "blends": replace(UNMIXED, blend=0.3),
    "looks twice": replace(UNMIXED, second_look=(0.3, 0.6)),
    "all of them": tdk.DropPolicy(tau=0.6, blend=0.2, second_look=(0.3, 0.6), **LAW),
}


@pytest.fixture
def model():
    """Return a model whose logits are far from log-probabilities, with guidance of various confidences."""
    vit = tiny_vit(img_size=64)
    vit.head.bias.data += 7.0
    tdk.patch(vit, tiny_guidance(), UNMIXED)
    vit.tinydrop.guidance.register_forward_hook(spread_confidence)
    return vit


def expected(model, images):
    """Return the answer, the expected answer from both models' raw logits, and which images did not exit."""
    answer, policy, last = model(images), model.tinydrop.policy, model.tinydrop.last
    model.tinydrop.policy = replace(policy, blend=0.0, second_look=None, tau=None)
    plan = steps.plan(model.tinydrop, images, policy=policy)._replace(policy=model.tinydrop.policy)
    raw = torch.zeros_like(answer)
    for part in plan.parts:
        raw[part.images.long()] = 1.0
    staying = raw[:, 0].bool()
    running = steps.start(model.tinydrop, images, plan)
    raw = raw.index_copy(0, running.staying, running.answers)
    raw = torch.where(last.second_look[:, None], model.tinydrop.dense(images), raw)
    model.tinydrop.policy = policy
    guided = last.guidance_logits.double().softmax(1)
    mixture = (1 - policy.blend) * raw.double().softmax(1) + policy.blend * guided
    return answer, torch.where(staying[:, None], mixture, guided).log(), staying


@pytest.mark.parametrize("name", MIXING)
@torch.inference_mode()
def test_every_row_is_log_probabilities(model, name):
    model.tinydrop.policy = MIXING[name]
    answer, wanted, staying = expected(model, varied_images(16, 64))
    last = model.tinydrop.last
    assert not staying.all() or model.tinydrop.policy.tau is None, "some exit, or nothing is tested"
    assert last.second_look.any() == (model.tinydrop.policy.second_look is not None)
    torch.testing.assert_close(answer.exp().sum(1), torch.ones(16))
    torch.testing.assert_close(answer.double(), wanted, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_policy_that_mixes_nothing_leaves_the_bits(model):
    """Without mixing, answers are bit for bit the target's logits."""
    images = varied_images(8, 64)
    plan = steps.plan(model.tinydrop, images)
    running = steps.start(model.tinydrop, images, plan)
    assert torch.equal(model(images), torch.empty_like(running.answers).index_copy(0, running.staying, running.answers))
    assert (running.answers.logsumexp(1) > 5).all(), "no log-probabilities"
    model.tinydrop.policy = tdk.DropPolicy(tau=None, gamma=0.0, min_keep=1.0, blend=0.0, second_look=None)
    wanted = type(model).forward(model, images)
    torch.testing.assert_close(model(images), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", [UNMIXED, *MIXING.values(), tdk.DropPolicy.cascade(1e-6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_dtype_and_scale_of_every_dtype(policy, dtype):
    """Dtype and scale are right also for an empty batch and if all images exit, up to rounding in half precision."""
    model = tdk.patch(tiny_vit().to(dtype), tiny_guidance(), policy)
    model.head.bias.data += 7.0
    for number in (0, 6):
        answer = model(varied_images(number).to(dtype))
        assert answer.dtype == dtype and answer.shape == (number, 5)
        total = answer.double().exp().sum(1)
        bound = 8 * torch.finfo(dtype).eps  # because answers are at most 8
        assert ((total - 1).abs() < bound).all() if policy.mixes_answers else (total > 100).all()


@torch.inference_mode()
def test_float64_is_not_rounded_to_float32(model):
    model.double().tinydrop.policy = MIXING["all of them"]
    answer = model(varied_images(8, 64).double())
    assert (answer.exp().sum(1) - 1).abs().max() < 1e-12
    target, guidance = torch.randn(2, 3, 5, dtype=torch.float64)
    wanted = (0.7 * target.softmax(1) + 0.3 * guidance.softmax(1)).log()
    torch.testing.assert_close(blended(target, guidance, 0.3), wanted, atol=1e-14, rtol=1e-14)


def test_a_blend_is_finite_where_probabilities_are_not():
    """A probability may be too small for float32, but its logarithm is finite."""
    logits = torch.tensor([[0.0, -150.0, -200.0]])
    answer = blended(logits, logits - 3.0, 0.2)
    torch.testing.assert_close(answer, logits)


@torch.inference_mode()
def test_under_autocast(model):
    images = varied_images(6, 64)
    for policy in (MIXING["all of them"], tdk.DropPolicy.cascade(1e-6)):
        model.tinydrop.policy = policy
        with torch.autocast("cpu", torch.bfloat16):
            answer = model(images)
        assert answer.dtype == torch.bfloat16
        assert (answer.float().exp().sum(1) - 1).abs().max() < 8 * torch.finfo(torch.bfloat16).eps


def test_gradients_are_those_of_log_probabilities(model):
    """Gradients of the cross entropy are the same for log-probabilities as for logits."""
    images, labels = varied_images(6, 64), torch.arange(6) % 5
    gradients = []
    for policy in (UNMIXED, replace(UNMIXED, second_look=(0.0, 0.0))):
        model.tinydrop.policy = policy
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        gradients.append(model.blocks[0].attn.qkv.weight.grad.clone())
    assert gradients[0].abs().max() > 1e-4
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", MIXING)
@torch.inference_mode()
def test_pipeline_and_graphs_are_on_the_same_scale(model, name, monkeypatch):
    if not torch.cuda.is_available():
        replay_on_cpu(monkeypatch)
    model.tinydrop.policy = MIXING[name]
    images = varied_images(8, 64)
    wanted = model(images)
    for overlap in (False, True):
        (answered,) = tdk.Pipeline(model, overlap)([images])
        torch.testing.assert_close(answered.logits, wanted)
    model.tinydrop.guidance._forward_hooks.clear()
    wanted, model.tinydrop.graphs = model(images), graphs.Graphs()
    for _ in range(3):
        torch.testing.assert_close(model(images), wanted, atol=1e-5, rtol=1e-4)
    assert model.tinydrop.graphs.front.replayed == 2


def test_train_mode_answers_logits(model):
    model.tinydrop.policy = MIXING["all of them"]
    images = varied_images(3, 64)
    assert torch.equal(model.train()(images), tdk.unpatch(model)(images))


@torch.inference_mode()
def test_many_labels_are_read_class_by_class():
    """With every patch kept, scores are timm's. Under the default policy no image exits and no answer is blended."""
    model, images = tiny_vit(), varied_images(8)
    wanted = model(images)
    tdk.patch(model, tiny_guidance(7), multi_label=True)
    policy = model.tinydrop.policy
    assert policy == tdk.DropPolicy(tau=None, blend=0.0, second_look=None), "the default reduction"
    assert model(images).exp().sum(1).sub(1).abs().max() > 0.1 and not model.tinydrop.last.exited.any()
    model.tinydrop.policy = replace(policy, min_keep=1.0)
    torch.testing.assert_close(model(images).sigmoid(), wanted.sigmoid(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MIXING)
def test_many_labels_take_no_policy_that_mixes(name, images):
    match = (
        "^policy: got DropPolicy.*, but with multi_label=True there are no exits.*expected tau=None, blend=0.0, second"
    )
    with pytest.raises(ValueError, match=match):
        tdk.patch(tiny_vit(), tiny_guidance(), MIXING[name], multi_label=True)
    model = tdk.patch(tiny_vit(), tiny_guidance(), UNMIXED, multi_label=True)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert one.tinydrop.multi_label
        with pytest.raises(ValueError, match=match):
            one.tinydrop.policy = MIXING[name]
        with pytest.raises(ValueError, match=match):
            steps.plan(one.tinydrop, images, policy=MIXING[name])
        assert one(images).shape == (4, 5)
