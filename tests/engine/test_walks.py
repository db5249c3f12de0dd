"""Random walks of changes to a patched model. After each change it answers as the same model patched afresh.

The default number of walks takes about 6 s. They are the same walks in every run. ``TINYDROP_WALKS=2000`` runs 2000
other ones.
"""

import copy
import io
import os
import warnings
from contextlib import suppress

import hypothesis.strategies as st
import timm
import torch
from helpers import tiny_guidance, with_random_weights
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import nn

import tinydrop_kernels as tdk
from tinydrop_kernels.ops import derived

SMALL = {"num_classes": 5, "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"num_classes": 5, "img_size": 64, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
MODELS = {
    "vit_tiny_patch16_224": SMALL,
    "beit_base_patch16_224": SMALL,
    "vit_small_patch16_rope_mixed_224": SMALL,
    "swinv2_tiny_window8_256": SWIN,
}
POLICIES = [
    tdk.DropPolicy(),
    tdk.DropPolicy.fixed(0.5),
    tdk.DropPolicy.fixed(0.4, coarsen=1.0),
    tdk.DropPolicy(tau=0.6, gamma=1.0, min_keep=0.2, coarsen=0.5, second_look=None),
]
GUIDANCES = [tdk.Guidance(tiny_guidance(classes)) for classes in (5, 5, 4)]
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 0.1}


def optimizer(kind, parameters):
    if kind == "fused":
        return torch.optim.AdamW(parameters, lr=0.01, fused=True)
    return torch.optim.SGD(parameters, lr=0.1, foreach=kind == "foreach")


class Double(nn.Module):
    """A replacement of a module that works token by token."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, *args, **kwargs):
        return 2 * self.inner(x, *args, **kwargs)


class Mean(nn.Module):
    """A module that mixes the tokens of an image, and so gives wrong results on packed rows."""

    def forward(self, x, *args, **kwargs):
        return x - x.mean(dim=-2, keepdim=True)


class Walk(RuleBasedStateMachine):
    """Actions of a user on a patched model, in random order."""

    @initialize(name=st.sampled_from(sorted(MODELS)), prepack=st.booleans(), seed=st.integers(0, 99))
    def start(self, name, prepack, seed):
        derived._training = 0  # because other tests may have trained in this process
        torch.manual_seed(seed)
        self.make = lambda: with_random_weights(timm.create_model(name, **MODELS[name]))
        self.prepack, self.hooks = prepack, []
        self.model = tdk.patch(self.make(), GUIDANCES[0], POLICIES[2], prepack=prepack)
        self.images = torch.randn(3, 3, *self.model.patch_embed.img_size)

    @rule(kind=st.sampled_from(["fused", "foreach", "plain"]))
    def train(self, kind):
        weight = next(self.model.parameters())
        if weight.dtype == torch.bfloat16 or self.hooks:
            return
        self.model.train()
        logits = timm.models.VisionTransformer.__call__(self.model, self.images.to(weight.dtype))
        logits.square().mean().backward()
        optimizer(kind, self.model.parameters()).step()
        self.model.zero_grad()
        self.model.eval()

    @rule(dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    def cast(self, dtype):
        self.model.to(dtype)

    @rule()
    def load(self):
        state = self.make().state_dict()
        self.model.load_state_dict({k: v for k, v in state.items() if "head" not in k}, strict=False)

    @rule(assign=st.booleans())
    def scale(self, assign):
        state = {k: v * 1.1 if v.is_floating_point() else v for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(state, assign=assign)

    @rule(width=st.sampled_from([5, 5, 4]))
    def exchange_head(self, width):
        weight = next(self.model.parameters())
        head = self.model.head if isinstance(self.model.head, nn.Linear) else getattr(self.model.head, "fc", None)
        if isinstance(head, nn.Linear):
            new = nn.Linear(head.in_features, width, device=weight.device, dtype=weight.dtype)
            self.model.set_submodule("head" if head is self.model.head else "head.fc", new)

    @rule(data=st.data(), pre=st.booleans())
    def hook(self, data, pre):
        names = [name for name, _ in self.model.named_modules() if name]
        module = self.model.get_submodule(data.draw(st.sampled_from(names)))
        if pre:
            self.hooks.append(module.register_forward_pre_hook(scaled_inputs))
        else:
            self.hooks.append(module.register_forward_hook(scaled_output))

    @rule()
    def unhook(self):
        while self.hooks:
            self.hooks.pop().remove()

    @rule(data=st.data(), to=st.sampled_from([Double, Mean]))
    def exchange(self, data, to):
        names = [name for name, module in self.model.named_modules() if not list(module.children())]
        names.remove("rope") if "rope" in names else None  # because timm calls other methods of it than forward
        name = data.draw(st.sampled_from(names))
        module = self.model.get_submodule(name)
        keeps_shape = isinstance(module, nn.LayerNorm | nn.Identity | nn.Dropout | nn.GELU)
        self.model.set_submodule(name, Mean() if to is Mean and keeps_shape else Double(module))
        if data.draw(st.booleans()):  # put the module back after a call
            self.call()
            self.model.set_submodule(name, module)

    @rule(policy=st.sampled_from(POLICIES))
    def exchange_policy(self, policy):
        with suppress(ValueError):  # because the guidance model or the head may have other classes
            self.model.tinydrop.policy = policy

    @rule(guidance=st.sampled_from(GUIDANCES))
    def exchange_guidance(self, guidance):
        weight = next(self.model.parameters())
        self.model.tinydrop.guidance = copy.deepcopy(guidance).to(weight.device, weight.dtype)

    @rule(pickled=st.booleans())
    def copy(self, pickled):
        self.hooks = [] if self.hooks else self.hooks
        if not pickled:
            self.model = copy.deepcopy(self.model)
            return
        file = io.BytesIO()
        torch.save(self.model, file)
        file.seek(0)
        self.model = torch.load(file, weights_only=False)

    @invariant()
    def call(self):
        """Assert that the model answers as if it were patched now, or that both raise an error."""
        if not hasattr(self, "model"):
            return
        fresh, tinydrop = copy.deepcopy(self.model), self.model.tinydrop
        tdk.unpatch(fresh)
        images = self.images.to(next(self.model.parameters()).dtype)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted, found = (
                answer_of(lambda: tdk.patch(fresh, tinydrop.guidance, tinydrop.policy, prepack=self.prepack)(images)),
                answer_of(lambda: self.model(images)),
            )
        if isinstance(wanted, str) or isinstance(found, str):
            assert isinstance(wanted, str) and isinstance(found, str), (wanted, found)
            return
        tolerance = TOLERANCES[images.dtype]
        torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


def answer_of(call):
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def scaled_output(module, args, output):
    return 0.9 * output if isinstance(output, torch.Tensor) else output


def scaled_inputs(module, args):
    return tuple(0.9 * arg if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg for arg in args)


TestWalks = Walk.TestCase
TestWalks.settings = settings(
    max_examples=int(os.environ.get("TINYDROP_WALKS", 8)),
    stateful_step_count=8,
    derandomize="TINYDROP_WALKS" not in os.environ,  # the default run is the same everywhere
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
