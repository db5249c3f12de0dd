"""Tests that folding keeps the logits, and that a model is not folded otherwise."""

import copy
import pickle

import pytest
import timm
import torch
from helpers import packed_of, tiny_guidance, with_random_weights
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tinydrop_kernels.guidance.folding import folded


def norms(model):
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


@pytest.mark.parametrize(
    "name",
    [
        "test_byobnet",
        "efficientformer_l1",
        "mobilenetv2_100",
        "mobilenetv4_conv_small",
        "levit_128s",
        "repvit_m1",
        "fastvit_t8",
    ],
)
def test_every_norm_goes_and_the_answers_stay(name):
    model = with_random_weights(timm.create_model(name, num_classes=7))
    images = torch.randn(2, 3, *model.pretrained_cfg["input_size"][1:])
    before = norms(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    small = folded(model, images)
    assert norms(small) == 0 < before[0]
    other = torch.randn_like(images)
    with torch.no_grad():
        wanted = model(other)
        torch.testing.assert_close(small(other), wanted, atol=1e-4 * wanted.abs().max().item(), rtol=0)
    assert norms(model) == before[0], "the original is left alone"
    assert all(torch.equal(before[1][key], tensor) for key, tensor in model.state_dict().items())


class Pair(nn.Module):
    """A convolution with a norm, which the classes below vary."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward_features(self, images):
        return self.norm(self.conv(images))

    def forward_head(self, features):
        return self.fc(features.mean((2, 3)))


class Twice(Pair):
    """A model that uses the convolution's output also without the norm, so folding would change the logits."""

    def forward_features(self, images):
        before = self.conv(images)
        return self.norm(before) + before


class Shared(Pair):
    """A model with one norm behind two convolutions."""

    def __init__(self):
        super().__init__()
        self.other = nn.Conv2d(4, 4, 1)

    def forward_features(self, images):
        return self.norm(self.other(self.norm(self.conv(images))))


class AddedInPlace(Pair):
    """A model that adds in place between convolution and norm, too little for the comparison on noise to notice."""

    def forward_features(self, images):
        x = self.conv(images)
        x += 1e-4
        return self.norm(x)


class OwnFuse(Pair):
    """A model with a method ``fuse`` that is not timm's."""

    def __init__(self):
        super().__init__()
        self.conv.fuse = lambda x, y: x + y


def doubled(model):
    model.conv.register_forward_hook(lambda module, arguments, output: 2 * output)
    return model


def by_batch(model):
    model.norm = nn.BatchNorm2d(4, track_running_stats=False)
    return model


class WithGelu(nn.Module):
    """A convolution with a GELU, and a linear layer with the activation ``second``."""

    def __init__(self, second):
        super().__init__()
        self.conv, self.first = nn.Conv2d(3, 8, 1), nn.GELU()
        self.fc, self.second, self.last = nn.Linear(8, 4), second, nn.Linear(4, 5)

    def forward_features(self, images):
        return self.second(self.fc(self.first(self.conv(images)).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    def forward_head(self, features):
        return self.last(features.mean((2, 3)))


@pytest.mark.parametrize(
    ("second", "stays"), [(nn.GELU(), False), (nn.GELU("tanh"), True), (nn.ReLU(), True)], ids=["gelu", "tanh", "relu"]
)
def test_gelu_is_the_layers_before_it(second, stays):
    model = with_random_weights(WithGelu(second))
    images = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    small = folded(model, images)
    assert type(small.first) is nn.Identity and (type(small.second) is not nn.Identity) == stays
    again = folded(copy.deepcopy(small), images)
    with torch.no_grad():
        wanted = model.forward_features(images)
        for other in (small, again, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
            torch.testing.assert_close(other.forward_features(images), wanted, atol=1e-5, rtol=1e-5)
            assert packed_of(other.conv.weight) is not None
        for dtype in (torch.bfloat16, torch.float64):
            out = small.to(dtype).forward_features(images.to(dtype))
            torch.testing.assert_close(out.float(), wanted, atol=3e-2, rtol=3e-2)
    features = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    small.forward_features(features).sum().backward()
    assert features.grad is not None, "gradients go through torch's own"


@pytest.mark.parametrize(
    ("make", "is_folded"),
    [
        (Pair, True),
        (Twice, False),
        (Shared, False),
        (AddedInPlace, False),
        (OwnFuse, False),
        (lambda: doubled(Pair()), False),
        (lambda: by_batch(Pair()), False),
    ],
    ids=["pair", "used twice", "shared norm", "added in place", "another fuse", "hook", "statistics of the batch"],
)
def test_what_is_not_a_norm_behind_its_convolution_is_not_folded(make, is_folded):
    model = with_random_weights(make())
    images = torch.randn(2, 3, 8, 8)
    small = folded(model, images)
    assert (norms(small) == 0) == is_folded
    with torch.no_grad():
        for part in (model.forward_features, small.forward_features):
            torch.testing.assert_close(part(images), model.forward_features(images), atol=1e-5, rtol=1e-5)


def test_no_bias_and_no_affine_weights():
    model = Pair()
    model.conv, model.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, affine=False)
    model = with_random_weights(model)
    images = torch.randn(2, 3, 8, 8)
    small = folded(model, images)
    assert norms(small) == 0
    with torch.no_grad():
        torch.testing.assert_close(small.forward_features(images), model.forward_features(images))


def test_in_half_precision_it_is_folded_in_float32():
    """Check that a half-precision model is folded in float32, so that its weights are rounded only once."""
    import tinydrop_kernels as tdk

    model = tiny_guidance().half()
    half = tdk.Guidance(model).model.state_dict()
    wide = tdk.Guidance(model.float()).half().model.state_dict()
    assert all(torch.equal(half[name], wide[name]) for name in wide)
