"""Values computed from weights are cached while the weights are unchanged, and never stale after any change."""

import copy

import pytest
import timm
import torch
from helpers import tiny_guidance, tiny_vit, with_random_weights
from slow import mostly_slow

import tinydrop_kernels as tdk
from tinydrop_kernels.ops import derived as derived_module
from tinydrop_kernels.ops.derived import derived, settle

SMALL = {"num_classes": 5, "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"num_classes": 5, "img_size": 64, "embed_dim": 16, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4}
MODELS = {
    "ViT": ("vit_tiny_patch16_224", SMALL),
    "BEiT": ("beit_base_patch16_224", SMALL),
    "mixed rotary": ("vit_small_patch16_rope_mixed_224", SMALL),
    "SwinV2": ("swinv2_tiny_window8_256", SWIN),
}
COARSER = tdk.DropPolicy.fixed(0.4, coarsen=1.0)


def make(key):
    torch.manual_seed(0)
    name, options = MODELS[key]
    return with_random_weights(timm.create_model(name, **options))


def images_for(model):
    return torch.randn(4, 3, *model.patch_embed.img_size)


def train(model, images, optimizer):
    model.train()
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
    optimizer.step()
    model.eval()


@torch.no_grad()
def assert_fresh(model, key, images):
    """Assert that a model answers as a new model does that is patched now and has the same weights."""
    fresh = make(key)
    fresh.load_state_dict(model.state_dict())
    tdk.patch(fresh, model.tinydrop.guidance, model.tinydrop.policy)
    torch.testing.assert_close(model(images), fresh(images), atol=1e-4, rtol=1e-4)


def fused(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, fused=True)


def foreach(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, foreach=True)


def one_by_one(parameters):
    return torch.optim.Adam(parameters, lr=0.01, foreach=False)


class Own(torch.optim.Optimizer):
    """An optimizer that writes through ``.data``, as in code from before torch 1.0."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.data.add_(parameter.grad, alpha=-0.1)


@pytest.mark.parametrize("prepack", [False, True], ids=["plain", "prepacked"])
@pytest.mark.parametrize("optimizer", mostly_slow([fused, foreach, one_by_one, Own], fused))
@pytest.mark.parametrize("key", MODELS)
def test_training_with_validation_in_between(key, optimizer, prepack):
    model = tdk.patch(make(key), tiny_guidance(), COARSER, prepack=prepack)
    images, stepper = images_for(model), optimizer(model.parameters())
    for _ in range(2):
        assert_fresh(model, key, images)
        train(model, images, stepper)
    assert_fresh(model, key, images)
    model.tinydrop.refresh()
    assert_fresh(model, key, images)


def load(model, other):
    model.load_state_dict(other.state_dict())


def assign(model, other):
    model.load_state_dict(other.state_dict(), assign=True)


@torch.no_grad()
def average(model, other):
    """Average weights as timm's ModelEmaV3 does."""
    torch._foreach_lerp_([*model.parameters()], [*other.parameters()], 0.5)


@torch.no_grad()
def merge(model, other):
    """Change weights through ``.data``, as merging adapters does."""
    for own, others in zip(model.parameters(), other.parameters(), strict=True):
        own.data += 0.5 * others


@pytest.mark.parametrize("trained", [False, True], ids=["never trained", "trained"])
@pytest.mark.parametrize("change", mostly_slow([load, assign, average, merge], load, merge))
@pytest.mark.parametrize("key", MODELS)
def test_weights_from_elsewhere(key, change, trained):
    """Every change is noticed in a process that has trained. Otherwise writes through ``.data`` need ``refresh``."""
    model = tdk.patch(make(key), tiny_guidance(), COARSER, prepack=True)
    images, other = images_for(model), make(key)
    if trained:
        train(model, images, fused(model.parameters()))
    with torch.no_grad():
        before = model(images)
    for tensor in other.parameters():
        tensor.data.mul_(1.5)
    change(model, other)
    if change is merge and not trained:
        model.tinydrop.refresh()
    assert_fresh(model, key, images)
    with torch.no_grad():
        assert not torch.allclose(model(images), before, atol=1e-3)


def test_copies_of_a_model_in_training():
    """A running average is right after each update through ``.data``, though it was evaluated before."""
    model = tdk.patch(make("ViT"), tiny_guidance(), COARSER, prepack=True)
    images, stepper, average = images_for(model), fused(model.parameters()), copy.deepcopy(model)
    for _ in range(2):
        train(model, images, stepper)
        assert_fresh(average, "ViT", images)
        for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
            mean.data.lerp_(parameter.data, 0.5)
        assert_fresh(average, "ViT", images)


def test_is_kept_while_nothing_changes():
    weight, made = torch.nn.Parameter(torch.ones(3)), []

    def make():
        made.append(1)
        return weight.detach() * 2

    def times():
        with torch.no_grad():
            assert torch.equal(derived(weight, "twice", make), weight * 2)
        return len(made)

    assert times() == times() == 1
    with torch.no_grad():
        weight.add_(1)
    assert times() == times() == 2, "by version"
    weight.data = weight.data.clone()
    assert times() == times() == 3, "by address"
    derived_module.note_training()
    assert times() == 4 and times() == 5, "nothing is kept of what may be in training"
    module = torch.nn.Module()
    module.weight = weight
    settle(module)
    assert times() == times() == 6
    assert derived(weight, "thrice", lambda: weight * 3).requires_grad, "a gradient reaches the weight"


def test_another_weight_in_the_place_of_one():
    """A value made of several weights is made again if one of them is another tensor with equal values."""
    first, second = torch.ones(3), torch.ones(3)
    assert derived((first, second), "sum", lambda: 1) == derived((first, second), "sum", lambda: 2) == 1
    assert derived((first, second.clone()), "sum", lambda: 3) == 3


def test_patching_ends_training():
    """A model that is patched after training caches values."""
    model = tiny_vit()
    derived_module.note_training()
    tdk.patch(model, tiny_guidance(), COARSER)
    images = images_for(model)
    with torch.no_grad():
        model(images)
    kept = derived_module._kept[model.pos_embed].values
    assert len(kept) == 1
    (made,) = kept.values()
    with torch.no_grad():
        model(images)
    assert next(iter(kept.values())) is made
