"""Models with a replaced head answer that head's classes or are refused. They never answer the guidance's classes."""

import copy

import pytest
import torch
from helpers import tiny_guidance, tiny_vit, with_random_weights
from timm import create_model
from torch import nn
from zoo import tiny_swin

import tinydrop_kernels as tdk
from tinydrop_kernels.engine import steps

EXIT_ALL = tdk.DropPolicy.cascade(1e-6)
KEEP_ALL = tdk.DropPolicy(tau=None, gamma=0.0, min_keep=1.0, blend=0.0, second_look=None)
MLP = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 5))


class FirstFive(nn.Linear):
    """A linear layer that answers fewer classes than its weight has rows."""

    def forward(self, x):
        return super().forward(x)[:, :5]


def plain(classes):
    return nn.Linear(32, classes)


def stale(head, name="head", model=None):
    """Return a model with a new head, and the ``num_classes`` of the old one."""
    model = tiny_vit(num_classes=10) if model is None else model
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, head)
    assert model.num_classes == 10
    return model


def distilled(head, head_dist):
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
    model = with_random_weights(create_model("deit_tiny_distilled_patch16_224", **options))
    return stale(head_dist, "head_dist", stale(head, model=model))


def swin():
    """Return a Swin Transformer whose pool doubles the width of the head's input."""
    return tiny_swin(img_size=128, window_size=4, num_classes=10, global_pool="catavgmax")


def shrunk_in_place():
    """Return a linear layer with a smaller weight and a stale ``out_features``."""
    head = plain(10)
    head.weight, head.bias = nn.Parameter(torch.randn(5, 32)), nn.Parameter(torch.randn(5))
    return head


MODELS = {
    "linear": lambda: stale(plain(5)),
    "weight exchanged": lambda: stale(shrunk_in_place()),
    "mlp": lambda: stale(copy.deepcopy(MLP)),
    "batch norm": lambda: stale(nn.Sequential(nn.BatchNorm1d(32), plain(5))),
    "subclass": lambda: stale(FirstFive(32, 10)),
    "distilled": lambda: distilled(plain(5), plain(5)),
    "distilled, broadcast": lambda: distilled(plain(5), plain(1)),
    "swin": lambda: stale(nn.Linear(256, 5), "head.fc", swin()),
    "swin, mlp": lambda: stale(nn.Sequential(nn.Linear(256, 5)), "head.fc", swin()),
}


def images_for(model):
    return torch.randn(3, 3, *model.patch_embed.img_size)


@pytest.mark.parametrize("key", MODELS)
@torch.inference_mode()
def test_the_head_is_believed_before_patching(key):
    model = MODELS[key]().eval()
    images = images_for(model)
    wanted = model(images)
    assert wanted.shape == (3, 5)
    tdk.patch(model, tiny_guidance(5))
    assert model.tinydrop.num_classes == 5
    for policy in (tdk.DropPolicy(), EXIT_ALL):
        model.tinydrop.policy = policy
        answer = model(images)
        assert answer.shape == (3, 5)
        torch.testing.assert_close(answer.exp().sum(1), torch.ones(3))
    assert model.tinydrop.last.exited.all()
    model.tinydrop.policy = KEEP_ALL
    torch.testing.assert_close(model(images), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("key", MODELS)
@pytest.mark.parametrize("policy", [tdk.DropPolicy(), EXIT_ALL], ids=["default", "all exit"])
def test_never_the_classes_of_the_guidance(key, policy):
    with pytest.raises(ValueError, match="^guidance: it knows 10 classes and the model 5"):
        tdk.patch(MODELS[key](), tiny_guidance(10), policy)


@pytest.mark.parametrize("policy", [tdk.DropPolicy(), EXIT_ALL], ids=["default", "all exit"])
@pytest.mark.parametrize("head", [plain(5), plain(1), nn.Identity(), MLP], ids=["5", "1", "none", "mlp"])
@torch.inference_mode()
def test_a_head_replaced_after_patching(head, policy, images):
    """A new head is refused while the policy mixes answers. With another policy the answer is timm's."""
    model = tdk.patch(tiny_vit(num_classes=10), tiny_guidance(10), policy)
    model(images)
    stale(copy.deepcopy(head), model=model)
    for call in (model, model.tinydrop.features):
        with pytest.raises(ValueError, match="^guidance: it knows 10 classes and the model (5|1|0)"):
            call(images)
    with pytest.raises(ValueError, match="^guidance: it knows 10 classes"):
        model.tinydrop.policy = policy
    model.tinydrop.policy = KEEP_ALL
    wanted = model.tinydrop.dense(images)
    torch.testing.assert_close(model(images), wanted, atol=1e-5, rtol=1e-4)
    stale(plain(10), model=model)
    model.tinydrop.policy = policy
    assert model(images).shape == (4, 10)


@pytest.mark.parametrize("head", [nn.Identity(), plain(1)], ids=["none", "one output"])
@torch.inference_mode()
def test_without_classes_the_default_mixes_nothing(head, images):
    model = stale(head)
    wanted = model(images)
    tdk.patch(model, tiny_guidance(10))
    assert not model.tinydrop.policy.mixes_answers
    assert model.tinydrop.num_classes == (1 if wanted.shape[1] == 1 else 0)
    assert model(images).shape == wanted.shape
    model.tinydrop.policy = KEEP_ALL
    torch.testing.assert_close(model(images), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: stale(nn.Sequential(plain(6), nn.Unflatten(1, (2, 3)))), r"a head that answers shape \(1, 2, 3\)"),
        (lambda: stale(None), "a head that fails on zeros"),
        (lambda: distilled(plain(7), plain(5)), "a head that fails on zeros"),
        (lambda: distilled(plain(5), nn.Identity()), "a head that fails on zeros"),
        (lambda: stale(plain(5), model=swin()), "a head of type Linear; supported is timm's"),
    ],
    ids=["three axes", "none at all", "two widths", "half a head", "no pool"],
)
def test_heads_that_answer_no_classes_are_refused(make, reason):
    with pytest.raises(tdk.UnsupportedModelError, match=f"^model: .* with {reason}"):
        tdk.patch(make(), tiny_guidance(5), KEEP_ALL)


def test_looking_at_a_head_leaves_it_as_it_was(images):
    """Counting a head's classes changes no mode, statistic or gradient, even if the model is in training mode."""
    model = stale(nn.Sequential(nn.BatchNorm1d(32), nn.Dropout(0.5), plain(5))).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tdk.patch(model, tiny_guidance(5))
    assert all(module.training for module in model.modules())
    model.eval()
    model.head[0].train()
    model.tinydrop.inspect_head()
    assert model.head[0].training and not model.head[2].training
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_hook_that_makes_the_answer_wider_is_noticed(images):
    """A hook on a linear head can change its width. The call compares the answer with the guidance model's classes."""
    model = tdk.patch(tiny_vit(), tiny_guidance(), tdk.DropPolicy(tau=None))
    model.head.register_forward_hook(lambda module, inputs, out: torch.cat((out, out), dim=1))
    with pytest.raises(ValueError, match="^model: it answered 10 classes, expected the guidance's 5"):
        model(images)


def test_on_meta():
    """A head's classes are counted on the meta device too."""
    model = stale(copy.deepcopy(MLP)).to("meta")
    assert tdk.patch(model, tdk.Guidance(tiny_guidance())).tinydrop.num_classes == 5


def test_policies_for_other_classes_than_the_plan_was_made_with(images):
    model = tdk.patch(tiny_vit(), tiny_guidance(7), KEEP_ALL)
    with pytest.raises(ValueError, match="^guidance: it knows 7 classes and the model 5"):
        steps.plan(model.tinydrop, images, policy=tdk.DropPolicy())


def test_a_policy_file_is_for_the_real_classes(tmp_path):
    """A policy that was calibrated with a replaced head is refused for another head."""
    model, guidance = stale(plain(5)), tiny_guidance(5)
    loader = [(torch.randn(8, 3, 32, 32), torch.arange(8) % 5)]
    with pytest.raises(ValueError, match="^loader: got labels 0 to 5, expected 0 to 4"):
        tdk.calibrate(model, guidance, [(loader[0][0], torch.arange(8) % 6)], progress=False)
    found = tdk.calibrate(model, guidance, loader, progress=False)
    assert found.target.classes == 5
    found.save(tmp_path / "policy.json")
    tdk.unpatch(tdk.patch(model, guidance, tmp_path / "policy.json"))
    model.head = plain(6)
    with pytest.raises(tdk.PolicyFileError, match="^policy: it was calibrated for a target of 5 classes, got 6"):
        tdk.patch(model, guidance, tmp_path / "policy.json")
