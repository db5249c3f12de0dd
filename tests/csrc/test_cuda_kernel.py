"""Tests of the CUDA C++ attention kernel without a GPU.

The kernel's own source is compiled for the host, run by an emulator (tests/csrc/cuda_emulator) and compared with
float64. The tests are skipped if there is no compiler.
"""

import ctypes
import importlib.util
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import tiny_guidance, tiny_vit, varied_images
from ops.attention_oracle import exact

import tinydrop_kernels as tdk
from tinydrop_kernels.ops import OPERATORS, registry

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).parent / "cuda_emulator"
SHARED = {"a100": 164 * 1024, "h100": 228 * 1024, "none": 0}  # bytes a multiprocessor; 0: all keys are streamed
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative error in norm
GUARD = 3  # rows of NaN around every tensor, which must be neither read nor written

# Lengths 0 and 1, lengths around the limits of a 16-row mma, a 32-key step and one, two and four 64-key tiles, and the
# lengths that ViTs have.
LENGTHS = [0, 1, 2, 15, 16, 17, 31, 32, 33, 49, 50, 63, 64, 65, 0, 99, 127, 128, 129, 197, 198, 257]
SHORT = [33, 0, 1, 16, 65, 17]


def toolkit_headers() -> Path | None:
    """Return a folder with cuda_fp16.h, from the toolkit or from torch's pip dependencies; None if there is none."""
    named = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [Path(name) / "include" for name in [*named, "/usr/local/cuda"]]
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec and spec.submodule_search_locations else ():
        folders += sorted(Path(folder).glob("cu*/include")) + sorted(Path(folder).glob("cuda_runtime/include"))
    return next((folder for folder in folders if (folder / "cuda_fp16.h").is_file()), None)


class View(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("row_stride", ctypes.c_int64), ("head_stride", ctypes.c_int64))

    @classmethod
    def of(cls, tensor):
        return cls(tensor.data_ptr(), *tensor.stride()[:2])


class LaunchPlan(ctypes.Structure):
    _fields_ = (
        ("warps", ctypes.c_int),
        ("row_blocks_per_warp", ctypes.c_int),
        ("query_blocks", ctypes.c_int64),
        ("key_capacity", ctypes.c_int),
        ("streams_keys", ctypes.c_bool),
        ("shared_bytes", ctypes.c_int64),
    )


class Arguments(ctypes.Structure):
    """The struct ``AttentionArguments`` of csrc/varlen_attention.cuh."""

    _fields_ = (
        ("query", View),
        ("key", View),
        ("value", View),
        ("out", ctypes.c_void_p),
        ("cu_seqlens_q", ctypes.c_void_p),
        ("cu_seqlens_k", ctypes.c_void_p),
        ("bias_table", View),
        ("positions", ctypes.c_void_p),
        ("grid_rows", ctypes.c_int),
        ("grid_columns", ctypes.c_int),
        ("class_token_entries", ctypes.c_int),
        ("heads", ctypes.c_int),
        ("head_dim", ctypes.c_int),
        ("scale_log2", ctypes.c_float),
        ("plan", LaunchPlan),
    )


def emulator(folder: Path, csrc: Path, optimise: str = "-O2"):
    """Return the emulated kernel of the given sources: ``run(query, key, value, seqlens_q, ...) -> out, plan``."""
    compiler, headers = shutil.which("g++"), toolkit_headers()
    if compiler is None or headers is None:
        pytest.skip("the emulator needs g++ and CUDA's headers")
    library = folder / "varlen_attention.so"
    sources = [EMULATOR / "emulator.cpp", EMULATOR / "varlen_attention.cpp"]
    flags = ["-std=c++17", optimise, "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    folders = [f"-I{EMULATOR}", f"-I{csrc}", "-isystem", headers]
    done = subprocess.run([compiler, *flags, *folders, *sources, "-o", library], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    function = ctypes.CDLL(str(library)).emulate_varlen_attention
    function.restype = ctypes.c_char_p
    integers = [ctypes.c_int, *[ctypes.c_int64] * 4, ctypes.c_int]
    function.argtypes = [ctypes.POINTER(Arguments), *integers]

    def run(
        query, key, value, seqlens_q, seqlens_k, scale=None, bias=None, multiprocessor="h100", early=False, longest=None
    ):
        total, heads, head_dim = query.shape
        guarded = torch.full((total + 2 * GUARD, heads, head_dim), float("nan"), dtype=query.dtype)
        out = guarded[GUARD : GUARD + total]
        cu_seqlens = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (seqlens_q, seqlens_k)]
        arguments = Arguments(
            query=View.of(query),
            key=View.of(key),
            value=View.of(value),
            out=out.data_ptr(),
            cu_seqlens_q=cu_seqlens[0].data_ptr(),
            cu_seqlens_k=cu_seqlens[1].data_ptr(),
            grid_rows=1,
            grid_columns=1,
            heads=heads,
            head_dim=head_dim,
            scale_log2=(head_dim**-0.5 if scale is None else scale) * math.log2(math.e),
        )
        if bias is not None:
            table, positions, (arguments.grid_rows, arguments.grid_columns) = bias
            arguments.bias_table, arguments.positions = View.of(table), positions.data_ptr()
            distances = (2 * arguments.grid_rows - 1) * (2 * arguments.grid_columns - 1)
            arguments.class_token_entries = len(table) > distances
        longest = longest or [max(lengths, default=0) for lengths in (seqlens_q, seqlens_k)]
        shared = SHARED[multiprocessor]
        bfloat16 = query.dtype == torch.bfloat16
        error = function(ctypes.byref(arguments), bfloat16, len(seqlens_q), *longest, shared, early)
        assert error == b"", error.decode()
        assert guarded[:GUARD].isnan().all() and guarded[GUARD + total :].isnan().all(), "rows around out were written"
        return out, arguments.plan

    return run


@pytest.fixture(scope="session")
def emulate(tmp_path_factory):
    return emulator(tmp_path_factory.mktemp("emulator"), ROOT / "csrc")


def packed_qkv(seqlens, heads, head_dim, dtype, spread=1.0):
    """Return query, key and value as views of timm's projection ``(total, 3, heads, head_dim)``, with NaN around it."""
    total = sum(seqlens)
    guarded = torch.full((total + 2 * GUARD, 3, heads, head_dim), float("nan"), dtype=dtype)
    guarded[GUARD : GUARD + total] = spread * torch.randn(total, 3, heads, head_dim)
    return guarded[GUARD : GUARD + total].unbind(1)


def guarded_bias(table, positions, grid):
    """Return a bias surrounded by values that must not be read: NaN, and patches far beyond the table."""
    tables = table.new_full((len(table) + 2 * GUARD, *table.shape[1:]), float("nan"))
    tables[GUARD:-GUARD] = table
    patches = torch.full((len(positions) + 2 * GUARD,), 2**30, dtype=torch.int32)
    patches[GUARD:-GUARD] = positions
    return tables[GUARD:-GUARD], patches[GUARD:-GUARD], grid


def check(emulate, query, key, value, seqlens_q, seqlens_k, **options):
    out, plan = emulate(query, key, value, seqlens_q, seqlens_k, **options)
    expected = exact(query, key, value, seqlens_q, seqlens_k, options.get("scale"), options.get("bias"))
    assert out.isfinite().all()
    error = (out.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    print(f"relative error {error:.1e}")
    assert error <= TOLERANCE[query.dtype]
    return plan


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp16", "bf16"])
@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
def test_every_length(emulate, dtype, early):
    query, key, value = packed_qkv(LENGTHS, 2, 64, dtype)
    plan = check(emulate, query, key, value, LENGTHS, LENGTHS, early=early)
    assert not plan.streams_keys and plan.query_blocks == 1 and plan.row_blocks_per_warp == 3


# The compiled head dimensions except 64, which is tested above. Then padded ones: 72 (SO400M), 88 (ViT-g), 104 (ViT-G)
# and the smallest.
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp16", "bf16"])
@pytest.mark.parametrize("multiprocessor", ["h100", "none"], ids=["resident", "streamed"])
@pytest.mark.parametrize("head_dim", [16, 32, 80, 96, 128, 72, 88, 104, 8])
def test_every_head_dim(emulate, head_dim, multiprocessor, dtype):
    query, key, value = packed_qkv(SHORT, 3, head_dim, dtype)
    plan = check(emulate, query, key, value, SHORT, SHORT, multiprocessor=multiprocessor)
    assert plan.streams_keys == (multiprocessor == "none")


@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
def test_streamed_keys(emulate, early):
    query, key, value = packed_qkv(LENGTHS, 1, 64, torch.float16)
    plan = check(emulate, query, key, value, LENGTHS, LENGTHS, multiprocessor="none", early=early)
    assert plan.streams_keys and plan.query_blocks == 3


@pytest.mark.parametrize(("seqlens", "multiprocessor"), [([577], "h100"), ([577, 20], "a100"), ([1370], "h100")])
def test_long_segments(emulate, seqlens, multiprocessor):
    query, key, value = packed_qkv(seqlens, 1, 64, torch.bfloat16)
    assert check(emulate, query, key, value, seqlens, seqlens, multiprocessor=multiprocessor).streams_keys


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp16", "bf16"])
def test_large_scores(emulate, dtype):
    query, key, value = packed_qkv(SHORT, 2, 64, dtype, spread=40.0)
    scores = torch.einsum("qhd,khd->hqk", query.double(), key.double())
    assert scores.abs().max() > 1e4
    check(emulate, query, key, value, SHORT, SHORT, scale=1.0)


def test_growing_scores(emulate):
    """Check scores whose maximum grows at each step, at first by less than a step tolerates, then by more."""
    query, key, value = packed_qkv([257], 1, 64, torch.float16)
    query = torch.ones_like(query)
    key = (torch.arange(257)[:, None, None] ** 2 / 4096 + 0.1 * key).half()
    check(emulate, query, key, value, [257], [257])


def test_equal_scores_average_the_values(emulate):
    query, key, value = packed_qkv([50, 197], 2, 64, torch.float16)
    key = torch.zeros_like(key)
    out, _ = emulate(query, key, value, [50, 197], [50, 197])
    torch.testing.assert_close(out[0].double(), value[:50].double().mean(0), atol=2e-4, rtol=2e-3)
    check(emulate, query, key, value, [50, 197], [50, 197])


@pytest.mark.parametrize("multiprocessor", ["h100", "none"], ids=["resident", "streamed"])
def test_cross_attention(emulate, multiprocessor):
    """Check one or a few queries per segment, as in a map pool, and queries whose segment has no keys."""
    seqlens_q, seqlens_k = [1, 1, 2, 1, 0, 150], [65, 0, 197, 3, 40, 20]
    _, key, value = packed_qkv(seqlens_k, 2, 64, torch.float16)
    query = torch.randn(sum(seqlens_q), 2, 64).half()
    check(emulate, query, key, value, seqlens_q, seqlens_k, multiprocessor=multiprocessor)
    out, _ = emulate(query, key, value, seqlens_q, seqlens_k, multiprocessor=multiprocessor)
    assert (out[1] == 0).all()


def test_keys_beyond_the_bound_are_not_read(emulate):
    """Check that a max_seqlen_k that is too small does not make the kernel overwrite the rest of shared memory."""
    query, key, value = packed_qkv([50, 100], 2, 64, torch.float16)
    out, plan = emulate(query, key, value, [50, 100], [50, 100], longest=[100, 40])
    assert plan.key_capacity == 64 and not plan.streams_keys
    expected = exact(query[50:], key[50:114], value[50:114], [100], [64])
    torch.testing.assert_close(out[50:].double(), expected, atol=2e-3, rtol=2e-3)


def test_offsets_beyond_32_bits(emulate):
    """Check rows that are 256 MB apart. They span 5 GB of addresses, but only a few pages are touched."""
    rows, stride = 20, 2**27
    try:
        memory = torch.empty((rows - 1) * stride + 64, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("5 GB of addresses are refused here")
    far = memory.as_strided((rows, 1, 64), (stride, 64, 1)).copy_(torch.randn(rows, 1, 64))
    check(emulate, far, far, far, [18, 2], [18, 2])


def test_no_keys_at_all(emulate):
    query, nothing = torch.randn(20, 2, 64).half(), torch.empty(0, 2, 64).half()
    out, _ = emulate(query, nothing, nothing, [17, 3], [0, 0])
    assert (out == 0).all()


@pytest.mark.parametrize("seqlens", [[], [0], [0, 0, 0]])
def test_nothing_to_do(emulate, seqlens):
    query, key, value = packed_qkv(seqlens, 2, 64, torch.float16)
    emulate(query, key, value, seqlens, seqlens)


def test_every_operand_has_its_own_strides(emulate):
    seqlens = [20, 0, 70]
    query = torch.randn(2, 90, 64).half().transpose(0, 1)  # heads outermost
    key = torch.randn(90, 2, 3, 64).half()[:, :, 1]
    value = torch.randn(90, 5, 72).half()[:, 1:3, :64]
    check(emulate, query, key, value, seqlens, seqlens)


@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("multiprocessor", ["h100", "none"], ids=["resident", "streamed"])
@pytest.mark.parametrize("class_token", [True, False], ids=["class", "patches"])
def test_bias(emulate, class_token, multiprocessor, early):
    heads, grid = 2, (7, 20)
    seqlens = [50, 0, 1, 132, 16]
    positions = []
    for length in seqlens:
        patches = torch.randperm(grid[0] * grid[1])[: length - 1 if class_token and length else length].sort().values
        positions += [torch.tensor([-1])[: min(length, 1)], patches] if class_token else [patches]
    positions = torch.cat(positions).int()
    table = torch.randn((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3 * class_token, heads).bfloat16()
    query, key, value = packed_qkv(seqlens, heads, 64, torch.bfloat16)
    options = {"bias": guarded_bias(table, positions, grid), "multiprocessor": multiprocessor, "early": early}
    check(emulate, query, key, value, seqlens, seqlens, **options)


def check_hidden_keys(emulate, multiprocessor="h100"):
    """Check a bias of -inf that hides keys more than two rows above. From the last rows it hides two whole tiles."""
    grid = rows, columns = 20, 8
    table = torch.randn(2 * rows - 1, 2 * columns - 1, 1)
    table[rows + 2 :] = -math.inf
    bias = guarded_bias(table.flatten(0, 1).half(), torch.arange(rows * columns).int(), grid)
    query, key, value = packed_qkv([rows * columns], 1, 64, torch.float16)
    check(emulate, query, key, value, [160], [160], bias=bias, multiprocessor=multiprocessor)


@pytest.mark.parametrize("multiprocessor", ["h100", "none"], ids=["resident", "streamed"])
def test_bias_that_hides_keys(emulate, multiprocessor):
    check_hidden_keys(emulate, multiprocessor)


@pytest.mark.parametrize("head_dim", [16, 32, 80, 96, 128])
def test_bias_at_every_head_dim(emulate, head_dim):
    seqlens, grid = [5, 40], (6, 8)
    positions = torch.tensor([*range(-1, 4), *range(-1, 39)]).int()
    table = torch.randn(2, 11 * 15 + 3).half().t()  # columns contiguous
    query, key, value = packed_qkv(seqlens, 2, head_dim, torch.float16)
    check(emulate, query, key, value, seqlens, seqlens, bias=(table, positions, grid))


def test_launches_fill_their_blocks(emulate):
    """Check plans by hand. 197 rows are 13 row blocks, two for each of 7 warps, and an H100 holds two such blocks."""
    query, key, value = packed_qkv([197], 1, 64, torch.float16)
    _, plan = emulate(query, key, value, [197], [197])
    assert (plan.warps, plan.row_blocks_per_warp, plan.query_blocks) == (7, 2, 1)
    assert 2 * (plan.shared_bytes + 1024) <= SHARED["h100"]
    query, key, value = packed_qkv([100], 1, 64, torch.float16)  # four such blocks fit, of four warps each
    _, plan = emulate(query, key, value, [100], [100])
    assert (plan.warps, plan.row_blocks_per_warp, plan.query_blocks) == (4, 2, 1)
    assert 4 * (plan.shared_bytes + 1024) <= SHARED["h100"]
    _, plan = emulate(query[:1], key, value, [1], [100])  # a pool's query: two warps copy its keys
    assert (plan.warps, plan.row_blocks_per_warp, plan.query_blocks) == (2, 1, 1)


@pytest.mark.parametrize("options", [{}, {"global_pool": "map", "class_token": False}], ids=["token", "map pool"])
def test_patched_model(emulate, monkeypatch, options):
    """Check a whole patched ViT whose attention runs on the emulated kernel, with exits and varied token counts."""

    launches = []

    def launch(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, *others):
        launches.append(len(query))
        lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        return emulate(query, key, value, *lengths, scale=scale)[0]

    vit = tiny_vit(**options).bfloat16()
    tdk.patch(
        vit, tiny_guidance(), tdk.DropPolicy(tau=0.5, gamma=1.0, min_keep=0.1, coarsen=0.0, blend=0.0, second_look=None)
    )
    images = varied_images(6).bfloat16()
    with torch.inference_mode():
        wanted = vit(images)
        monkeypatch.setattr(OPERATORS["varlen_attention"], "implementations", (registry.reference(launch),))
        registry._preference.cache_clear()  # it remembers the implementations
        try:
            out = vit(images)
        finally:
            registry._preference.cache_clear()
    counts = vit.tinydrop.last.counts.tolist()
    assert 0 in counts and len(set(counts)) > 2
    assert len(launches) == len(vit.blocks) + (vit.attn_pool is not None)
    torch.testing.assert_close(out, wanted, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize(
    ("line", "instead", "complaint"),
    [
        ("wait_for_copies(ahead - 1);", "wait_for_copies(ahead);", "before a barrier|isfinite"),
        ("        __syncthreads();\n", "", "another"),
        ("chunk ^ row", "chunk ^ 0 * row", "share banks"),
        ("origin[2] = {-FLT_MAX, -FLT_MAX}", "origin[2] = {-INFINITY, -INFINITY}", "isfinite"),
        ("num_keys = min(num_keys, a.plan.key_capacity)", "(void)0", "beyond"),
    ],
    ids=["wait", "barrier", "swizzle", "origin", "capacity"],
)
def test_the_emulator_catches_what_is_missing(tmp_path, line, instead, complaint):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    kernel = tmp_path / "csrc" / "varlen_attention.cuh"
    assert kernel.read_text().count(line) == 1
    kernel.write_text(kernel.read_text().replace(line, instead))
    emulate = emulator(tmp_path, tmp_path / "csrc", optimise="-O0")
    query, key, value = packed_qkv([197], 1, 64, torch.float16)
    with pytest.raises(AssertionError, match=complaint):
        check(emulate, query, key, value, [197], [197], multiprocessor="none")
        check_hidden_keys(emulate)
        emulate(query, key, value, [197], [197], longest=[197, 40])
