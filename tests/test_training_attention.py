"""
The relaxed attention of training: the plain function against the formula in float64, the kernels
against the plain function. As in test_kernels.py, kernels run on a GPU where there is one, and
under the interpreter in a process of its own (test_interpreter), or by hand:

    TRITON_INTERPRET=1 pytest tests/test_training_attention.py
"""
import importlib
import math
import random
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    DEVICE,
    INTERPRETED,
    check_no_spills,
    compiled,
    compiles,
    interprets,
    launched,
    launches,
    pointer,
    run_interpreted,
)

from kernels import training_attention as training
from kernels import triton
from kernels.training_attention import relaxed_attention, relaxed_attention_plain

needs_triton = pytest.mark.skipif(triton is None, reason="triton has no wheel for some platforms")


@needs_triton
@compiles
@interprets
def test_interpreter():
    run_interpreted(__file__)


def by_formula(q, k, v, bias, first, window):
    """Dense, a head at a time as far as the formula goes."""
    B, Hq, T, D = q.shape
    i = torch.arange(T, device=q.device)[:, None]
    j = torch.arange(T, device=q.device)
    y = torch.empty_like(q)
    for b in range(B):
        visible = (j <= i) & (j >= first[b][:, None])
        for head in range(Hq):
            h = head * k.shape[1] // Hq
            score = q[b, head] @ k[b, h].T / math.sqrt(D)
            score = score + torch.where(i - j > window, bias[b, h], 0)
            score = score.masked_fill(~visible, -math.inf)
            y[b, head] = score.softmax(dim=1) @ v[b, h]
    return y


def random_inputs(seed, T, D, G, documents=3, scores=1.0, device="cpu"):
    """q, k, v, bias and first. q, k, v are views of (B, T, heads, D), as a model has them."""
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    B = rng.choice([1, 2])
    Hkv = rng.choice([1, 2])

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device)

    q, k, v = (normal(B, T, heads, D).transpose(1, 2) for heads in (Hkv * G, Hkv, Hkv))
    bias = F.logsigmoid(normal(B, Hkv, T) * rng.choice([1, 10]))
    for value in (0.0, -1e4):  # kept for certain, and evicted for certain
        bias[torch.rand(B, Hkv, T, generator=generator).to(device) < 0.2] = value
    first = torch.zeros(B, T, dtype=torch.int32)
    for row in first:
        for start in sorted(rng.choices(range(T), k=documents - 1)):
            row[start:] = start
    return [q * scores, k, v, bias], first.to(device)


def gradients(attend, inputs, first, window, probe):
    """The output, and the gradients of q, k, v and bias for the loss (output * probe).sum()."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = attend(*inputs, first, window)
    return [y, *torch.autograd.grad(y, inputs, probe.to(y.dtype))]


def compare(attend, expected, inputs, first, window, tolerance=1e-5):
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(inputs[0].shape, generator=generator).to(first.device)
    ours = gradients(attend, inputs, first, window, probe)
    precise = torch.float64 if expected is by_formula else torch.float32
    theirs = gradients(expected, [x.to(precise) for x in inputs], first, window, probe)
    names = ("y", "dq", "dk", "dv", "dbias")
    for name, x, y, given in zip(names, ours, theirs, inputs[:1] + inputs):
        assert x.dtype == given.dtype, name
        torch.testing.assert_close(
            x.to(precise), y, atol=tolerance, rtol=tolerance, msg=lambda text: f"{name}: {text}"
        )


# ------------------------------------------------------------------------------ The plain function


@compiles
@pytest.mark.parametrize("seed", range(40))
def test_the_plain_function_is_the_formula(seed):
    rng = random.Random(seed)
    T = rng.choice([1, 2, 9, 40, 130])
    window = rng.choice([0, 1, 7, 200])
    inputs, first = random_inputs(seed, T, 8, rng.choice([1, 2, 3]), rng.choice([1, 2, 5]))
    block = rng.choice([6, 128])

    def attend(*arguments):
        return relaxed_attention_plain(*arguments, block=block)

    compare(attend, by_formula, inputs, first, window)


@compiles
def test_the_plain_function_computes_the_scores_of_long_sequences_twice():
    inputs, first = random_inputs(1, 1100, 8, 2)
    compare(relaxed_attention_plain, by_formula, inputs, first, window=9)


@compiles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_plain_function_rounds_nothing_but_its_results(dtype):
    """16-bit inputs give what the same numbers give in float64, rounded once; bias is float32."""
    inputs, first = random_inputs(3, 300, 16, 2)
    inputs = [x.to(dtype) for x in inputs[:3]] + inputs[3:]
    probe = torch.randn(inputs[0].shape).to(dtype)
    ours = gradients(relaxed_attention_plain, inputs, first, 5, probe)
    theirs = gradients(by_formula, [x.double() for x in inputs], first, 5, probe)
    assert ours[4].dtype == torch.float32
    for x, y in zip(ours, theirs):
        torch.testing.assert_close(x.double(), y, atol=1e-5, rtol=torch.finfo(dtype).eps)


# ------------------------------------------------------------------------------------- The kernels

CASES = [  # T, D, G, window, documents, what scores are multiplied by
    (1, 16, 1, 0, 1, 1.0),
    (2, 8, 2, 0, 2, 1.0),
    (17, 16, 1, 1, 1, 1.0),
    (31, 16, 3, 0, 4, 1.0),
    (32, 32, 2, 7, 1, 1.0),
    (33, 16, 1, 500, 3, 1.0),
    (64, 24, 2, 16, 2, 1.0),
    (65, 16, 4, 1, 9, 1.0),
    (80, 16, 8, 5, 2, 1.0),
    (130, 16, 2, 40, 1, 1.0),
    (130, 16, 1, 31, 3, 30.0),
    (150, 16, 2, 0, 1, 30.0),
    (200, 16, 1, 64, 5, 1.0),
]


@needs_triton
@launches
@pytest.mark.parametrize("T, D, G, window, documents, scores", CASES)
def test_the_kernels_are_the_plain_function(T, D, G, window, documents, scores, monkeypatch):
    """In small blocks, so that there are many, and the band's parts lie in different ones."""
    own = 32 if T < 70 else 64
    monkeypatch.setattr(training, "block_sizes", lambda q: (own, own // 2, own // 2))
    inputs, first = random_inputs(T + window, T, D, G, documents, scores, DEVICE)
    tolerance = 1e-5 if scores == 1 else 1e-4  # the larger scores are, the more float32 rounds them
    compare(relaxed_attention, relaxed_attention_plain, inputs, first, window, tolerance)


@needs_triton
@launches
@pytest.mark.parametrize("D", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernels_with_the_blocks_of_each_head_size_and_dtype(D, dtype):
    inputs, first = random_inputs(D, 40 if INTERPRETED else 300, D, 2, device=DEVICE)
    inputs = [x.to(dtype) for x in inputs[:3]] + inputs[3:]
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    compare(relaxed_attention, relaxed_attention_plain, inputs, first, 20, tolerance)


@needs_triton
@launches
def test_without_bias_and_with_one_document_it_is_causal_attention():
    (q, k, v, bias), _ = random_inputs(5, 90, 16, 2, device=DEVICE)
    first = torch.zeros(len(q), 90, dtype=torch.int32, device=DEVICE)
    y = relaxed_attention(q, k, v, torch.zeros_like(bias), first, 4)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


@needs_triton
@launches
def test_two_runs_are_equal_to_the_bit():
    inputs, first = random_inputs(6, 140, 16, 2, device=DEVICE)
    runs = [gradients(relaxed_attention, inputs, first, 20, inputs[0]) for _ in range(2)]
    for x, y in zip(*runs):
        assert torch.equal(x, y)


@needs_triton
@launches
def test_a_document_is_what_it_is_alone():
    """Its output and its gradients to the bit, whatever stands in front of it, when blocks begin
    where it does."""
    inputs, _ = random_inputs(7, 256, 16, 2, device=DEVICE)
    B = len(inputs[0])
    first = torch.zeros(B, 256, dtype=torch.int32, device=DEVICE)
    first[:, 128:] = 128
    alone = [x[:, :, 128:] for x in inputs]
    probe = inputs[0]
    packed = gradients(relaxed_attention, inputs, first, 30, probe)
    single = gradients(relaxed_attention, alone, first[:, :128] * 0, 30, probe[:, :, 128:])
    for x, y in zip(packed, single):
        assert torch.equal(x[:, :, 128:], y)


@needs_triton
@launches
def test_any_layout_will_do():
    """q, k and v contiguous as (B, heads, T, D), and a gradient that is an expanded number."""
    inputs, first = random_inputs(8, 50, 16, 2, device=DEVICE)
    expected = gradients(relaxed_attention, inputs, first, 5, torch.ones_like(inputs[0]))
    inputs = [x.detach().contiguous().requires_grad_() for x in inputs]
    y = relaxed_attention(*inputs, first, 5)
    ours = [y, *torch.autograd.grad(y.sum(), inputs)]
    for x, e in zip(ours, expected):
        assert torch.equal(x, e)
    assert y.transpose(1, 2).is_contiguous()  # the output projection takes it as it is


@needs_triton
def test_refusals(monkeypatch):
    """One line each, before anything is launched."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (q, k, v, bias), first = random_inputs(9, 4, 16, 1)
    with pytest.raises(AssertionError, match="relaxed_attention: .* too large"):
        relaxed_attention(q.repeat(1, 1, 1, 17), k, v, bias, first, 1)
    with pytest.raises(AssertionError, match="relaxed_attention: tensors on several devices"):
        relaxed_attention(q, k, v, bias.to("meta"), first, 1)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(AssertionError, match="TRITON_INTERPRET=1"):
        relaxed_attention(q, k, v, bias, first, 1)


def test_without_triton(monkeypatch):
    """The file can be imported, the plain function works, and the launcher says what is missing."""
    for name in [name for name in sys.modules if name.split(".")[0] == "kernels"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("triton", "triton.language"):
        monkeypatch.setitem(sys.modules, name, None)
    without = importlib.import_module("kernels.training_attention")
    inputs, first = random_inputs(10, 20, 8, 2)
    compare(without.relaxed_attention_plain, by_formula, inputs, first, window=3)
    with pytest.raises(ImportError, match="relaxed_attention needs triton"):
        without.relaxed_attention(*inputs, first, 3)


def forward_and_backward(q, k, v, bias, first, window):
    y = relaxed_attention(q, k, v, bias, first, window)
    y.backward(torch.empty_like(y))


@needs_triton
@compiles
@pytest.mark.parametrize("D", [32, 64])
def test_the_kernels_compile_in_float32(D):
    """For small heads, as the toy's: no spills on an H100."""
    q = pointer(1, 4, 2048, D, dtype=torch.float32).requires_grad_()
    bias = pointer(1, 4, 2048, dtype=torch.float32).requires_grad_()
    first = pointer(1, 2048, dtype=torch.int32)
    calls = launched(training, forward_and_backward, q, q, q, bias, first, 16)
    for name, made in calls.items():
        for values, options in made:
            check_no_spills(compiled(getattr(training, name), values, options, 90))


@needs_triton
@compiles
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_kernels_compile(arch, D, monkeypatch):
    """For Qwen3-8B's heads in bfloat16: no spills, shared memory that an A100, an H100 and a B200
    have, and what the walks load comes in asynchronous copies of 8 bytes at least."""
    monkeypatch.setattr(training, "capability", lambda q: arch // 10)
    q, k, v = (
        pointer(1, 8192, heads, D).transpose(1, 2).requires_grad_() for heads in (32, 8, 8)
    )
    bias = pointer(1, 8, 8192, dtype=torch.float32).requires_grad_()
    first = pointer(1, 8192, dtype=torch.int32)
    calls = launched(training, forward_and_backward, q, k, v, bias, first, 512)
    assert {name: len(made) for name, made in calls.items()} == {"_by_queries": 2, "_by_keys": 1}
    for name, made in calls.items():
        for values, options in made:
            kernel = compiled(getattr(training, name), values, options, arch)
            check_no_spills(kernel)
            assert kernel.metadata.shared <= {80: 160, 90: 227, 100: 227}[arch] * 1024
            assert re.search(r"cp\.async\.c[ag]\.shared\.global.*\], 0x(8|10)\b", kernel.asm["ptx"])
            assert ("wgmma" in kernel.asm["ptx"]) == (arch == 90)
