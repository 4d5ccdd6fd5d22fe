"""The kernels against the plain functions that they equal: on a GPU, where there is one (pytest
-n 12 shares the compiling), else under Triton's interpreter in processes of their own, or by hand:
TRITON_INTERPRET=1 pytest tests/test_kernels.py"""
import math
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, INTERPRETED, REPOSITORY, Life

import dms
import kernels
import kv_cache
from kv_cache import Kernels, KVCache, PagePool, Rows

try:
    import triton
except ImportError:  # it has no wheel for this platform
    triton = None
else:
    from kernels import attention, training

HAS_LAUNCHES = triton is not None and (DEVICE == "cuda" or INTERPRETED)
launches = pytest.mark.skipif(not HAS_LAUNCHES, reason="test_interpreter runs it")
compiles = pytest.mark.skipif(triton is None or INTERPRETED, reason="nothing is compiled here")
NOWHERE = 2**30  # an index that must never be used
# the interpreter multiplies bfloat16 as if it were integers
DTYPES = (torch.float32, torch.float16, torch.float32 if INTERPRETED else torch.bfloat16)
SIZES = (8, 64, 96, 128, 256)  # of heads
SHARED = {75: 65536, 80: 166912, 86: 101376, 90: 232448}  # bytes that a program may have


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs a row's programs one after another, those without work included."""
    if INTERPRETED:
        monkeypatch.setattr(attention, "parts_of", lambda rows: 3)


@compiles
@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU runs them")
@pytest.mark.parametrize("names", ["attention and not relaxed", "life", "relaxed"])
def test_interpreter(names):
    """Those tests in a process of their own, since Triton decides as it is imported."""
    import numpy
    is_old = [int(x) for x in triton.__version__.split(".")[:2]] < [3, 7]
    if is_old and numpy.__version__ >= "2.4":
        pytest.skip("this triton's interpreter needs numpy < 2.4 (triton-lang/triton#9171)")
    command = [sys.executable, *"-m pytest -p no:cacheprovider -n 0 -k".split(), names, __file__]
    run = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "TRITON_INTERPRET": "1"},
                         text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert run.returncode == 0, run.stdout


def filled_rows(rng, lengths, D, page_size, window, dtype):
    """Rows on DEVICE that have seen `lengths` tokens, and their pool. All unused is poison."""
    N, longest = len(lengths), max(*lengths, 1)
    columns = longest // page_size + 2
    zeros = torch.zeros(N, dtype=torch.int32, device=DEVICE)
    table, ring = (zeros[:, None].repeat(1, n) for n in (columns, window + 1))
    rows = Rows(zeros.long(), zeros.float(), zeros, table, ring + NOWHERE)
    pool = PagePool(N * columns, page_size, D, dtype, DEVICE)
    for slots in pool.slots:
        slots.fill_(math.nan if slots.is_floating_point() else NOWHERE)
    pool.free.copy_(torch.randperm(len(pool)))
    k, v = torch.randn(2, N, longest, D).to(DEVICE, dtype)
    evict = torch.rand(N, longest).to(DEVICE) < rng.choice([0, 0.1, 0.5, 0.9])
    new = torch.tensor(lengths, device=DEVICE)
    kv_cache.store(k, v, evict, new, rows, pool, window)
    rows.seen += new
    return rows, pool


def assert_near(y, expected):
    tolerance = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[y.dtype]
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


def check_attention(seed, dtype, D, module):
    """Rows of many parts, of one and of none. Blocks are ragged, with rows that rest."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    page_size = 2 ** rng.randrange(8)
    G = rng.choice([1, 2, 3, 4, 5, 8, 8, 17])
    some = [0, 1, page_size, rng.randrange(30), rng.randrange(200), rng.randrange(500)]
    lengths = rng.choices(some, k=rng.randint(1, 3))
    window = rng.choice([0, 1, 7, 60, 500])
    N, T = len(lengths), rng.choice([2, 5, 40, 70])
    rows, pool = filled_rows(rng, lengths, D, page_size, window, dtype)
    # scores so low or so high that a fixed offset would not do
    q = torch.randn(N, G, T, D).to(DEVICE, dtype) * rng.choice([1, 1, 30, -30])
    one = (q[:, :, 0], rows, pool)
    assert_near(module.attend_one(*one), kv_cache.attend_one(*one))
    if not hasattr(module, "attend_block"):
        return
    k, v = torch.randn(2, N, T, D).to(DEVICE, dtype)
    evict = torch.rand(N, T).to(DEVICE) < rng.choice([0, 0.1, 0.5, 0.9])
    new = torch.tensor([T, *(rng.randint(0, T) for _ in range(N - 1))], device=DEVICE)
    block = (k, v, evict, new, rows, pool, window)
    y = module.attend_block(q, *block)
    expected = kv_cache.attend_block(q, *block)
    assert y.isfinite().all()
    for row, n in enumerate(new.tolist()):
        assert_near(y[row, :, :n], expected[row, :, :n])


@launches
@pytest.mark.parametrize("case", range(15))
def test_attention(case):
    """Each dtype with each head size, and two choices of everything else."""
    for seed in (case, case + 15):
        check_attention(seed, DTYPES[case % 3], SIZES[case % 5], attention)


@pytest.mark.skipif(INTERPRETED, reason="it is not Triton's")
@pytest.mark.parametrize("threads", [1, 3])
def test_attention_by_numba(threads, monkeypatch, request):
    cpu = pytest.importorskip("kernels.cpu")
    monkeypatch.setattr(sys.modules[__name__], "DEVICE", "cpu")
    request.addfinalizer(lambda: torch.set_num_threads(1))  # as in conftest.py
    torch.set_num_threads(threads)
    for seed in range(40):
        check_attention(seed, torch.float32, (*SIZES, 20)[seed % 6], cpu)


@launches
@pytest.mark.parametrize("seed", range(1, 5))
def test_life_of_a_cache_that_uses_the_kernels(seed):
    """Beside one that does not: the same results, the same pairs held, and no page is lost."""
    life = Life(seed, layers=1, device=DEVICE)
    plain, cache = (KVCache(**life.settings) for _ in range(2))
    plain.kernels = kv_cache.PLAIN
    cache.kernels = Kernels(attention.attend_one, attention.attend_block)
    for step in range(40 if INTERPRETED else 125):
        life.step(plain, cache)
        if step % 8 == 7:
            life.check(plain, cache)


def training_inputs(rng, T, D, G, documents=3, scores=1, dtype=torch.float32):
    """q, k, v, bias and first. q, k, v are views of (B, T, heads, D), as a model has them."""
    torch.manual_seed(rng.randrange(2**32))
    B, Hkv = rng.choice([1, 2]), rng.choice([1, 2])
    q, k, v = (torch.randn(B, T, heads, D).transpose(1, 2) for heads in (Hkv * G, Hkv, Hkv))
    bias = F.logsigmoid(torch.randn(B, Hkv, T) * rng.choice([1, 10]))
    for value in (0.0, -1e4):  # kept for certain, and evicted for certain
        bias[torch.rand(B, Hkv, T) < 0.2] = value
    first = torch.zeros(B, T, dtype=torch.int32)
    for sequence in first:
        for start in sorted(rng.choices(range(T), k=documents - 1)):
            sequence[start:] = start
    inputs = [x.to(DEVICE, dtype) for x in (q * scores, k, v)]
    return [*inputs, bias.to(DEVICE)], first.to(DEVICE)


def gradients(attend, inputs, first, window, probe):
    """The output, and the gradients of q, k, v and bias for the loss (output * probe).sum()."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = attend(*inputs, first, window)
    return [y, *torch.autograd.grad(y, inputs, probe.to(y.dtype))]


@launches
@pytest.mark.parametrize("T, D, G, window, documents, scores, dtype", [
    *[(*sizes, torch.float32) for sizes in (
        (1, 16, 1, 0, 1, 1), (2, 8, 2, 0, 2, 1), (33, 16, 1, 500, 3, 1), (64, 24, 2, 16, 2, 1),
        (50, 16, 8, 5, 2, 1), (100, 16, 1, 40, 1, 1), (130, 16, 1, 31, 5, 30))],
    *[(40 if INTERPRETED else 300, SIZES[1 + i % 4], 1 + i % 2, 20, 3, 1, DTYPES[i % 3])
      for i in range(12)]])
def test_relaxed_attention(T, D, G, window, documents, scores, dtype, rng, monkeypatch):
    """Small heads in small blocks, so that there are many, and the walks' parts lie in different
    ones; the others in the blocks of their size and dtype."""
    if D < 64:
        monkeypatch.setattr(training, "block_sizes", lambda q, width: (32, 16, 16))
    inputs, first = training_inputs(rng, T, D, G, documents, scores, dtype)
    probe = torch.randn(inputs[0].shape).to(DEVICE)
    ours = gradients(training.relaxed_attention, inputs, first, window, probe)
    precise = [x.float() for x in inputs]
    expected = gradients(dms.relaxed_attention, precise, first, window, probe)
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    if scores > 1:  # the larger they are, the more float32 rounds them
        tolerance = 1e-4
    for x, y, like in zip(ours, expected, inputs[:1] + inputs):  # y, dq, dk, dv, dbias
        assert x.dtype == like.dtype
        torch.testing.assert_close(x.float(), y, atol=tolerance, rtol=tolerance)


@launches
def test_relaxed_attention_of_any_layout_and_again(rng):
    """q, k, v contiguous as (B, heads, T, D), and a gradient that is an expanded number: equal to
    the bit, as any two runs are."""
    inputs, first = training_inputs(rng, 50, 16, 2)
    expected = gradients(training.relaxed_attention, inputs, first, 5, torch.ones_like(inputs[0]))
    inputs = [x.detach().contiguous().requires_grad_() for x in inputs]
    y = training.relaxed_attention(*inputs, first, 5)
    ours = [y, *torch.autograd.grad(y.sum(), inputs)]
    assert all(torch.equal(x, e) for x, e in zip(ours, expected))
    assert y.transpose(1, 2).is_contiguous()  # as the output projection takes it


@pytest.mark.skipif(INTERPRETED, reason="it launches nothing")
@pytest.mark.parametrize("numba", [None, mock.Mock(njit=mock.Mock(side_effect=RuntimeError))])
def test_a_cache_works_without_numba_and_where_that_finds_no_folder(numba, monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", numba)  # None: importing it raises ImportError
    monkeypatch.delitem(sys.modules, "kernels.cpu", raising=False)
    monkeypatch.delattr(kernels, "cpu", raising=False)
    for place, D in ("cpu", 64), ("cuda", 320):  # wider than Triton's kernels cover
        assert kv_cache.choose_kernels(torch.device(place), torch.float32, D) == kv_cache.PLAIN


def spilled(kernel):
    """The bytes of local memory that a thread of a compiled kernel has, for registers it lacks."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    stack, local = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", usage.stdout + usage.stderr).groups()
    return int(stack) + int(local)


def launch(kind, dtype, D):
    """Of a model with 8 KV heads and 4 query heads to each."""
    if kind == "training":
        q, k, v = (torch.empty(1, 4096, n, D, dtype=dtype).transpose(1, 2) for n in (32, 8, 8))
        bias = torch.empty(1, 8, 4096)
        inputs = [x.requires_grad_() for x in (q, k, v, bias)]
        first = torch.empty(1, 4096, dtype=torch.int32)
        y = training.relaxed_attention(*inputs, first, 512)
        y.backward(torch.empty_like(y))
        return
    seen = torch.empty(8, dtype=torch.int64)
    integers = [torch.empty(8, *M, dtype=torch.int32) for M in ((), (128,), (513,))]
    cache = Rows(seen, seen, *integers), PagePool(100, 64, D, dtype, "meta")
    T = {"prefill": (2048,)}.get(kind, ())
    q, k = (torch.empty(8, *shape, D, dtype=dtype) for shape in ((4, *T), T))
    block = (k, k, torch.empty(8, *T, dtype=torch.bool), seen, *cache)
    if kind == "decode":
        attention.attend_one(q, *cache)
    else:
        attention.attend_block(q, *block, 512)


@compiles
@pytest.mark.parametrize("kind", ["decode", "prefill", "training"])
@pytest.mark.parametrize("arch, dtype, D", [
    (75, torch.float16, 128), (80, torch.bfloat16, 128), (86, torch.bfloat16, 256),
    (90, torch.bfloat16, 128), (90, torch.float32, 64)])
def test_compiles(arch, dtype, D, kind, monkeypatch):
    """Each kernel fits into the shared memory of its GPU. Up to 128 channels a thread spills at
    most 8 registers, and what a walk reads comes in asynchronous copies."""
    if arch == 75 and kind == "training":
        pytest.skip("it does not fit there")
    monkeypatch.setattr(kernels, "capability", lambda x: arch // 10)
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    gpu = dict(get_current_device=lambda: target, get_current_target=lambda: target)
    monkeypatch.setattr(triton.runtime.jit, "driver", mock.Mock(active=mock.Mock(**gpu)))
    made = []

    def compiled(kernel, grid):
        return lambda *given, **options: made.append(kernel.warmup(*given, grid=grid, **options))
    monkeypatch.setattr(triton.JITFunction, "__getitem__", compiled)
    with torch.device("meta"):
        launch(kind, dtype, D)
    assert made
    for kernel in made:
        assert kernel.metadata.shared <= SHARED[arch]
        if arch >= 80 and D <= 128:
            assert spilled(kernel) <= 32
            assert "cp.async.c" in kernel.asm["ptx"]
