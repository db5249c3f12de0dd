"""float32 on devices that round it, a GPU to TF32 or a CPU to bfloat16. The tests round the operands themselves.

cuDNN rounds by default. cuBLAS and oneDNN round if ``torch.set_float32_matmul_precision`` allows it.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch
from helpers import tiny_guidance, tiny_vit, with_random_weights
from slow import mostly_slow
from tensor_float32 import RoundingProducts, rounded
from torch.nn.modules.batchnorm import _BatchNorm
from zoo import make, tiny_swin

import tinydrop_kernels as tdk
from tinydrop_kernels.families import family_of, find_mismatch
from tinydrop_kernels.torch_internals import ieee_float32

TESTS = Path(__file__).parents[1]


@pytest.fixture(params=["highest", "high", "medium, on a CPU"])
def rounding(request):
    """Return a context that rounds as a device does, under each setting that the user may have made."""
    precision, _, on_cpu = request.param.partition(",")
    torch.set_float32_matmul_precision(precision)
    if on_cpu:
        torch.backends.mkldnn.conv.fp32_precision = "bf16"
    yield RoundingProducts(bool(on_cpu))
    torch.set_float32_matmul_precision("highest")
    torch.backends.mkldnn.conv.fp32_precision = "none"


def test_rounding_is_to_nearest():
    ulp = 2.0**-10
    values = torch.tensor([1 + ulp, 1 + 0.49 * ulp, -1 - 0.5 * ulp, 3 + ulp, 0.0, float("inf")])
    assert rounded(values, 10).tolist() == [1 + ulp, 1.0, -1 - ulp, 3 + 2 * ulp, 0.0, float("inf")]


@pytest.mark.parametrize("key", ["augreg", "siglip map", "beit", "dinov3", "deep", "swin"])
def test_models_are_patched(rounding, key):
    """Patching tries a model without rounding. A trial with rounding would refuse the model."""
    special = {"deep": lambda: tiny_vit(depth=24), "swin": tiny_swin}
    model = special[key]() if key in special else make(key)[0]
    with rounding:
        tdk.patch(model, tiny_guidance())
        assert rounding.rounded == 0
        with torch.inference_mode():
            assert "a patch embedding" in find_mismatch.__wrapped__(family_of(model), model)
    assert rounding.rounded > 0


@pytest.mark.parametrize(
    "name", mostly_slow(["test_byobnet", "efficientformer_l1", "deit_tiny_patch16_224"], "test_byobnet")
)
def test_guidance_is_probed_and_folded(rounding, name):
    """A guidance model made where products are rounded equals, bit by bit, one made elsewhere."""
    model = with_random_weights(timm.create_model(name, num_classes=5))
    wanted = tdk.Guidance(model)
    with rounding:
        found = tdk.Guidance(model)
        assert rounding.rounded == 0
    assert found.cam == wanted.cam and (found.class_weight is None) == (wanted.class_weight is None)
    assert not any(isinstance(module, _BatchNorm) for module in found.model.modules())
    for (place, tensor), (other_place, other) in zip(
        found.state_dict().items(), wanted.state_dict().items(), strict=True
    ):
        assert place == other_place and torch.equal(tensor, other)


@pytest.mark.slow
def test_where_a_gpu_is_tested_tolerances_are_wide_enough():
    """One case of each comparison passes with rounded convolutions (``rounding_where_a_gpu_would`` in conftest.py)."""
    cases = (
        "engine/test_cuda_graphs.py::test_same_answers[once-token]",
        "engine/test_pipeline.py::test_same_answers_in_order[once-True]",
        "engine/test_kernels_end_to_end.py::test_same_answers_as_the_reference[augreg]",
        "families/test_swin.py::test_same_answers_on_the_kernels[swin_tiny_patch4_window7_224]",
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *cases]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["TINYDROP_TF32"] = "1"
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and f"{len(cases)} passed" in done.stdout, done.stdout[-2000:]


SETTINGS = """
import sys, warnings
import torch
from tinydrop_kernels.torch_internals import ieee_float32

warnings.simplefilter("ignore")  # torch's, of its older settings
backends = torch.backends

def now():
    settings = backends, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul
    settings += backends.mkldnn, backends.mkldnn.conv, backends.mkldnn.matmul
    return [setting.fp32_precision for setting in settings], older(torch.get_float32_matmul_precision), \\
        older(lambda: backends.cudnn.allow_tf32), older(lambda: backends.cuda.matmul.allow_tf32)

def older(read):
    try:
        return read()
    except RuntimeError:
        return "neither"

def enter():
    if sys.argv[1] == "with":
        try:
            with ieee_float32(), ieee_float32():
                exact = {backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.conv, backends.mkldnn.matmul}
                assert {setting.fp32_precision for setting in exact} == {"ieee"}
                raise KeyError
        except KeyError:
            pass

def change(setting, value, name="fp32_precision"):
    setattr(setting, name, value)

for step in (
    lambda: None,
    lambda: change(backends.cudnn, "ieee"),  # what has not been set follows it
    lambda: change(backends.cudnn, "none"),
    lambda: torch.set_float32_matmul_precision("high"),
    lambda: torch.set_float32_matmul_precision("medium"),
    lambda: change(backends, "bf16"),
    lambda: change(backends, "tf32"),
    lambda: change(backends.cuda.matmul, "none"),
    lambda: change(backends, "none"),
    lambda: change(backends.cudnn, False, "allow_tf32"),
    lambda: change(backends.cudnn, True, "allow_tf32"),
    lambda: torch.set_float32_matmul_precision("highest"),
    lambda: change(backends.mkldnn.conv, "bf16"),
    lambda: change(backends.cudnn.conv, "none"),
    lambda: change(backends, "ieee"),
):
    step()
    enter()
    print(now())
"""


@pytest.mark.slow
def test_settings_are_what_they_were():
    """Settings are restored, also after an exception, and later settings have the same effects as usual."""
    lines = []
    for entered in ("with", "without"):
        done = subprocess.run([sys.executable, "-c", SETTINGS, entered], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        lines.append(done.stdout.splitlines())
    assert lines[0] == lines[1] and len(set(lines[0])) > 8


def test_one_thread_does_not_end_what_another_is_in():
    entered, seen = threading.Event(), []

    def other():
        entered.set()
        with ieee_float32():
            seen.append(torch.backends.cudnn.conv.fp32_precision)

    with ieee_float32():
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(10)
        thread.join(0.2)
        assert thread.is_alive() and torch.backends.cudnn.conv.fp32_precision == "ieee"
    thread.join()
    assert seen == ["ieee"]
