"""Tests of the choice of an implementation, by machine, by arguments and by forced backend."""

import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tinydrop_kernels import ops
from tinydrop_kernels.ops import OPERATORS, cuda_extension, registry, use_backend

from .cases import cu_seqlens_of, integers, ragged

ATTENTION = OPERATORS["varlen_attention"]


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    """Force no backend, and clear the caches so that no test sees what another one pretended."""
    monkeypatch.delenv("TINYDROP_BACKEND", raising=False)
    registry._preference.cache_clear()
    registry._forced_by_environment.cache_clear()
    yield
    registry._preference.cache_clear()
    registry._forced_by_environment.cache_clear()


def opcheck_cases():
    """Return arguments for every registered operator, with images that exit, keep some patches and keep all."""
    indices, cu_seqlens, total = ragged([3, 0, 16], 16, 1)
    qkv = torch.randn(total, 3, 2, 8)
    law, grids = (0.8, 2.0, 0.1, 0.5), (4, 4, 3, 3)
    counts, levels = torch.tensor([3, 0, 16], dtype=torch.int32), torch.tensor([1, 0, 0], dtype=torch.int32)
    images, prefix, pos_embed = torch.randn(3, 3, 8, 8), torch.randn(1, 6), torch.randn(16, 6)
    return {
        "select_tokens": (
            *(torch.randn(3, 5), integers(3, 4, 7), integers(5, 7), (2, 2), grids, *law),
            *(2, 0.5, 0.25),
        ),
        "select_from_saliency": (torch.randn(3, 5), torch.rand(3, 4, 4), grids, *law),
        "pack": (counts, levels, 2, 1),
        "embed_tokens": (images, torch.randn(6, 3, 2, 2), None, prefix, pos_embed, indices, cu_seqlens, total),
        "gather_tokens": (torch.randn(3, 16, 6), torch.randn(3, 1, 6), indices, cu_seqlens, total),
        "varlen_attention": (
            *(*qkv.unbind(1), cu_seqlens, cu_seqlens, 17, 17, 0.3),
            *(torch.randn(49 + 3, 2), torch.randint(-1, 16, (total,)).int(), (4, 4), 0),
        ),
        "segment_pool": (torch.randn(total, 6), cu_seqlens, "mean", 1),
    }


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.tinydrop, name).default, opcheck_cases()[name])


@pytest.mark.parametrize("name", OPERATORS)
def test_shapes_are_those_that_tracing_sees(backend, name):
    arguments = [a.to(backend.device) if torch.is_tensor(a) else a for a in opcheck_cases()[name]]
    operator = getattr(torch.ops.tinydrop, name).default
    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(a) if torch.is_tensor(a) else a for a in arguments))
    real = operator(*arguments)
    for one, other in zip(*(t if isinstance(t, tuple) else (t,) for t in (fake, real)), strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.parametrize("name", OPERATORS)
def test_the_reference_is_last_and_takes_everything(name):
    *others, last = OPERATORS[name].implementations
    assert last.name == "reference" and last.missing_on("cpu") is None and last.missing_on("xpu") is None
    assert all(implementation.name in registry.BACKENDS[2:] for implementation in others)


@pytest.mark.parametrize("key", ["CPU", "CUDA", "MPS", "XPU", "HPU", "PrivateUse1"])
def test_every_device_has_every_operator(key):
    has_kernel = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    assert [name for name in OPERATORS if not has_kernel(f"tinydrop::{name}", key)] == []


def test_a_backend_is_forced_by_context():
    operator = OPERATORS["gather_tokens"]
    assert operator.on("cpu")[0].name == "reference"
    with use_backend("reference"):
        assert operator.on("cuda")[0].name == "reference"
        with use_backend("auto"):
            assert registry.forced_backend() == "auto"
        assert registry.forced_backend() == "reference"
    assert registry.forced_backend() == "auto"
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert registry.forced_backend() == "auto"


def test_a_backend_is_forced_in_its_own_thread_alone():
    seen, inside, done = {}, threading.Event(), threading.Event()

    def other():
        seen["before"] = registry.forced_backend()
        with use_backend("torch"):
            inside.set()
            done.wait(10)
            seen["within"] = registry.forced_backend()

    with use_backend("reference"):
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(10)
        seen["here"] = registry.forced_backend()
        done.set()
        thread.join()
    assert seen == {"before": "auto", "within": "torch", "here": "reference"}


def test_a_backend_is_forced_by_the_environment(monkeypatch):
    monkeypatch.setenv("TINYDROP_BACKEND", "reference")
    assert ATTENTION.on("cuda")[0].name == "reference"
    with use_backend("auto"):  # the context overrides the environment
        assert registry.forced_backend() == "auto"
    monkeypatch.setenv("TINYDROP_BACKEND", "cudnn")
    registry._forced_by_environment.cache_clear()
    message = "^TINYDROP_BACKEND: got 'cudnn', expected one of auto, reference, triton, cuda, torch$"
    with pytest.raises(ValueError, match=message):
        ops.segment_pool(torch.randn(3, 2), cu_seqlens_of([3]), "mean")


def test_what_is_no_backend_is_refused():
    message = "^backend: got 'fast', expected one of auto, reference, triton, cuda, torch$"
    with pytest.raises(ValueError, match=message), use_backend("fast"):
        pass


def test_a_forced_backend_that_is_missing_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tokens, cu_seqlens = torch.randn(3, 2), cu_seqlens_of([3])
    monkeypatch.setattr(registry, "HAS_TRITON", True)
    with use_backend("triton"):
        assert OPERATORS["segment_pool"].on("cuda")[0].name == "triton"
        with pytest.raises(RuntimeError, match="^backend: triton is forced, but Triton does not run on cpu$"):
            ops.segment_pool(tokens, cu_seqlens, "mean")
    registry._preference.cache_clear()
    monkeypatch.setattr(registry, "HAS_TRITON", False)
    assert OPERATORS["segment_pool"].on("cuda")[0].name == "reference"
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match="^backend: triton is forced, but Triton is not installed$"),
    ):
        ops.segment_pool(tokens, cu_seqlens, "mean")


def test_what_a_forced_backend_does_not_know_runs_as_ever():
    """Check that operators without a "cuda" or "torch" implementation run as with "auto"."""
    pool = OPERATORS["segment_pool"]
    for name in ("cuda", "torch"):
        with use_backend(name):
            assert [i.name for i in pool.on("cpu")] == ["reference"]
            assert pool.on("cuda")[-1].name == "reference"


@pytest.mark.parametrize("name", OPERATORS)
def test_float64_goes_to_the_reference(triton, name):
    operator = OPERATORS[name]
    given = opcheck_cases()[name]
    assert operator.choose(*(a.to(triton.device) if torch.is_tensor(a) else a for a in given)).name == "triton"
    if given[0].is_floating_point():
        given = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in given]
        assert operator.choose(*(a.to(triton.device) if torch.is_tensor(a) else a for a in given)).name == "reference"


def test_explain(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(registry, "HAS_TRITON", True)
    pool = OPERATORS["segment_pool"]
    assert pool.explain("cpu") == ("reference", "plain PyTorch; Triton does not run on cpu")
    assert pool.explain("cuda") == ("triton", "Triton kernel")
    assert ATTENTION.explain("cpu") == ("reference", "scaled_dot_product_attention; Triton does not run on cpu")
    with use_backend("reference"):
        assert pool.explain("cuda") == ("reference", "plain PyTorch; forced")
    registry._preference.cache_clear()
    monkeypatch.setattr(registry, "HAS_TRITON", False)
    assert pool.explain("cuda") == ("reference", "plain PyTorch; Triton is not installed")


def test_the_interpreter_may_be_switched_on_later(monkeypatch):
    monkeypatch.setattr(registry, "HAS_TRITON", True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_backend("triton"):
        with pytest.raises(RuntimeError):
            ATTENTION.on("cpu")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert ATTENTION.on("cpu")[0].name == "triton"


def first_that_fits(head_dim: int, dtype: torch.dtype, biased: bool = False, skip_keys: int = 0) -> str:
    """Return the name of the implementation that would run on CUDA. This needs no GPU."""
    with FakeTensorMode():
        query, key, value = torch.empty(9, 3, 2, head_dim, dtype=dtype, device="cuda").unbind(1)
        cu_seqlens = torch.empty(2, dtype=torch.int32, device="cuda")
        bias = (None, None, (1, 1))
        if biased:
            bias = torch.empty(120, 2, dtype=dtype, device="cuda"), torch.empty(9, device="cuda").int(), (5, 7)
        lengths = cu_seqlens, cu_seqlens, 9, 9
        return ATTENTION.choose(query, key, value, *lengths, None, *bias, skip_keys).name


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_which_attention_runs(monkeypatch):
    monkeypatch.setattr(registry, "HAS_TRITON", True)
    monkeypatch.setattr(cuda_extension, "WHY_NOT", "it is not built")
    assert first_that_fits(64, torch.bfloat16) == "triton"
    assert first_that_fits(64, torch.float64) == "reference"
    assert first_that_fits(256, torch.float16) == "torch"
    assert first_that_fits(256, torch.float16, skip_keys=1) == "reference"
    assert first_that_fits(256, torch.float32) == "reference"
    assert first_that_fits(256, torch.float16, biased=True) == "reference"
    with use_backend("reference"):
        assert first_that_fits(64, torch.bfloat16) == "reference"
    with use_backend("torch"):
        assert first_that_fits(64, torch.bfloat16) == "torch"
        assert first_that_fits(64, torch.float32) == "triton"  # the next one that takes float32


def test_which_attention_runs_with_the_extension(monkeypatch):
    monkeypatch.setattr(registry, "HAS_TRITON", False)
    monkeypatch.setattr(cuda_extension, "WHY_NOT", "it is not built")
    with (
        use_backend("cuda"),
        pytest.raises(RuntimeError, match="^backend: cuda is forced, but the CUDA extension is not available: it is n"),
    ):
        ATTENTION.on("cuda")
    monkeypatch.setattr(cuda_extension, "WHY_NOT", "")
    monkeypatch.setattr(cuda_extension, "_gpu", lambda index: (True, True))
    registry._preference.cache_clear()
    with use_backend("cuda"):
        with pytest.raises(RuntimeError, match="^backend: cuda is forced, but the CUDA extension does not run on cpu$"):
            ATTENTION.on("cpu")
        assert first_that_fits(64, torch.float16) == "cuda"
        assert first_that_fits(64, torch.float16, biased=True) == "cuda"
        assert first_that_fits(64, torch.float16, skip_keys=1) == "reference"
        assert first_that_fits(256, torch.float16) == "torch"
    assert first_that_fits(64, torch.float16) == "cuda"
    monkeypatch.setattr(registry, "HAS_TRITON", True)
    registry._preference.cache_clear()
    assert first_that_fits(64, torch.bfloat16) == "triton"
    assert first_that_fits(64, torch.float32) == "triton"
    with use_backend("cuda"):
        assert first_that_fits(64, torch.bfloat16) == "cuda"
    assert first_that_fits(64, torch.float16, skip_keys=1) == "triton"
