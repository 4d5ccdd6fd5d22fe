"""kernels/cpu.py against the plain functions, and an engine without numba."""
import random
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import held_pairs, small_model

from dms import DMSConfig
from kernels import cpu
from kernels.decode_attention import decode_attention_plain
from kv_cache import KVCache
from model import Linear

compiled = pytest.mark.skipif(cpu.numba is None, reason="numba is not installed; it lags behind new Pythons")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3])
def test_decode_attention(dtype, count, threads):
    """With NaN wherever there is no pair, and scores so low or so high that a fixed offset would not do."""
    threads(count)
    for seed in range(60):
        rng = random.Random(f"{dtype} {seed}")
        page_size, D, G = 2 ** rng.randrange(8), rng.choice([8, 20, 64, 96, 128, 256]), rng.randint(1, 8)
        some = [0, 1, page_size, rng.randrange(30), rng.randrange(700)]
        arguments = held_pairs(rng.choices(some, k=rng.randint(1, 4)), G, D, page_size, dtype, seed)
        arguments[0].mul_(rng.choice([1, 1, 100, -100]))
        y, expected = cpu.decode_attention(*arguments), decode_attention_plain(*arguments)
        tolerance = 1e-4 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
        assert not y[arguments[4] == 0].any()


@compiled
def test_scores_far_below_zero():
    """The highest of them is what the weights are relative to, also where it lies in another thread's share."""
    q, k_pages, v_pages, table, length = held_pairs([9, 2], 2, 64, 2, torch.float32, seed=1)
    k_pages.fill_(-1000.0), q.fill_(10.0)
    expected = [v_pages[table[row, torch.arange(n) // 2], torch.arange(n) % 2].mean(0) for row, n in ((0, 9), (1, 2))]
    y = cpu.decode_attention(q, k_pages, v_pages, table, length)
    torch.testing.assert_close(y, torch.stack(expected)[:, None].expand(2, 2, 64))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(dtype):
    generator = torch.Generator().manual_seed(0)
    for R, C, O in ((1, 1, 1), (2, 7, 3), (3, 8, 5), (4, 64, 10), (5, 100, 33), (9, 130, 64), (300, 65, 7)):
        x, weight = (torch.randn(n, C, generator=generator).to(dtype) for n in (R, O))
        y = cpu.linear(x, weight)
        expected = (x.double() @ weight.double().T).to(dtype)
        torch.testing.assert_close(y, expected, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-4)
        torch.testing.assert_close(y[:1], cpu.linear(x[:1], weight), rtol=0, atol=0)  # whatever stands beside it
    x[1, 0] = float("nan")
    assert cpu.linear(x, weight)[1].isnan().all() and cpu.linear(x, weight)[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer(dtype, bias, monkeypatch):
    """Few rows of a large layer go to the kernel, if it is there; in any case the result is nn.Linear's."""
    layer, rows = Linear(512, 512, bias=bias).to(dtype), []
    multiply = cpu.linear
    monkeypatch.setattr(cpu, "linear", lambda x, *more: rows.append(len(x)) or multiply(x, *more))
    for shape in ((1, 1), (2, 1), (1, 7), (3, 11), (2, 20)):
        x = torch.randn(*shape, 512).to(dtype)
        with torch.inference_mode():
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=2e-2, atol=1e-4)
    many = [] if dtype == torch.float32 or torch.backends.cpu.get_cpu_capability() == "AVX512" else [33, 40]
    assert rows == ([] if cpu.numba is None else [2, 7, *many])
    y = layer(x[:1])
    y.sum().backward()
    assert layer.weight.grad is not None and len(rows) in (0, 2 + len(many))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_numba(dtype, monkeypatch):
    """The same logits, a prompt and then single tokens; so too where a dtype is not numba's."""
    model = small_model(1, DMSConfig(window=2), 0.5).to(dtype)
    ids, logits = torch.randint(0, 67, (2, 12)), []
    for numba in (cpu.numba, None):
        monkeypatch.setattr(cpu, "numba", numba)
        assert cpu.takes(ids.to(dtype)) == (numba is not None and dtype != torch.float16)
        cache = KVCache(model.config, 2, dtype=dtype, page_size=4)
        with torch.inference_mode():
            logits.append([model(piece, cache=cache) for piece in ids.split([6, 1, 1, 1, 1, 1, 1], dim=1)])
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for a, b in zip(*logits):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    monkeypatch.setitem(sys.modules, "numba", None)
    assert runpy.run_path(str(Path(cpu.__file__)))["numba"] is None
