"""kernels/cpu.py against the plain functions, and an engine without numba."""
import math
import os
import random
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import check_cache_write, check_what_is_stored, held_pairs, small_model

from dms import DMSConfig
from kernels import choose, cpu
from kernels.decode_attention import decode_attention_plain
from kv_cache import KVCache

ROOT = Path(__file__).resolve().parent.parent
missing = "numba is not installed; it lags behind new Pythons"
compiled = pytest.mark.skipif(cpu.numba is None, reason=missing)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize("seed", range(16))
def test_cache_write(seed):
    """2,000 steps in all."""
    check_cache_write(cpu.cache_write, seed)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_write_stores(dtype):
    check_what_is_stored(cpu.cache_write, dtype, 96)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3])
def test_decode_attention(dtype, count, threads):
    """With NaN wherever there is no pair, and scores so low or so high that a fixed offset would
    not do."""
    threads(count)
    for seed in range(60):
        rng = random.Random(f"{dtype} {seed}")
        page_size = 2 ** rng.randrange(8)
        D = rng.choice([8, 20, 64, 96, 128, 256])
        G = rng.randint(1, 8)
        some = [0, 1, page_size, rng.randrange(30), rng.randrange(700)]
        lengths = rng.choices(some, k=rng.randint(1, 4))
        arguments = held_pairs(lengths, G, D, page_size, dtype, seed)
        arguments[0].mul_(rng.choice([1, 1, 100, -100]))
        y = cpu.decode_attention(*arguments)
        expected = decode_attention_plain(*arguments)
        tolerance = 1e-4 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
        assert not y[arguments[4] == 0].any()


@compiled
def test_scores_far_below_zero():
    """The highest of them is what the weights are relative to, also where it lies in another
    thread's share."""
    q, k_pages, v_pages, table, length = held_pairs([9, 2], 2, 64, 2, torch.float32, seed=1)
    k_pages.fill_(-1000.0)
    q.fill_(10.0)
    y = cpu.decode_attention(q, k_pages, v_pages, table, length)
    for row, n in ((0, 9), (1, 2)):
        slot = torch.arange(n)
        mean = v_pages[table[row, slot // 2], slot % 2].mean(0)
        torch.testing.assert_close(y[row], mean.expand(2, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_large_layer_is_onednns_in_float32_unless_a_gradient_is_asked_for(dtype, bias, monkeypatch):
    """In any case the result is nn.Linear's, and a NaN stays in its row."""
    model = nn.Sequential(nn.Linear(512, 512, bias=bias), nn.Linear(512, 511), nn.LayerNorm(511))
    before = model.to(dtype).state_dict()
    cpu.use_onednn(model)
    assert [type(layer) for layer in model] == [cpu.Linear, nn.Linear, nn.LayerNorm]
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], x) for name, x in before.items())

    layer = model[0]
    plain = []
    of_pytorch = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda *given: plain.append(1) or of_pytorch(*given))
    for shape in ((1, 1), (2, 1), (1, 7), (3, 11), (2, 20)):
        x = torch.randn(*shape, 512).to(dtype)
        expected = F.linear(x, layer.weight, layer.bias)
        with torch.inference_mode():
            torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert len(plain) == (0 if dtype == torch.float32 else 5)
    x[1, 3] = math.nan
    with torch.inference_mode():
        y = layer(x)
    assert y[1, 3].isnan().all() and y.isfinite().sum() == 39 * 512
    layer(x[:1]).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_numba(dtype, monkeypatch):
    """The same logits, a prompt and then single tokens; so too where a dtype is not numba's."""
    model = small_model(1, DMSConfig(window=2), 0.5).to(dtype)
    ids = torch.randint(0, 67, (2, 12))
    logits = []
    for numba in (cpu.numba, None):
        monkeypatch.setattr(cpu, "numba", numba)
        is_read = numba is not None and dtype != torch.float16
        assert cpu.can_read(ids.device, dtype) == is_read
        cache = KVCache(model.config, 2, dtype=dtype, page_size=4)
        assert cache.kernels == (choose.NUMBA if is_read else choose.PLAIN)
        with torch.inference_mode():
            for piece in ids.split([6, 1, 1, 1, 1, 1, 1], dim=1):
                logits.append(model(piece, cache=cache))
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for a, b in zip(logits[:7], logits[7:]):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    monkeypatch.setitem(sys.modules, "numba", None)
    assert runpy.run_path(str(Path(cpu.__file__)))["numba"] is None


@compiled
def test_without_a_folder_for_compiled_code_it_is_compiled_each_time(tmp_path):
    """As in a container where neither the installation nor a home can be written to."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "kernels" / "__pycache__").write_text("no folder")
    nowhere = {"HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none", "PYTHONDONTWRITEBYTECODE": "1"}
    environment = {**os.environ, **nowhere}
    environment.pop("NUMBA_CACHE_DIR", None)
    code = (
        "import torch, kernels.cpu as c; x = torch.ones(1, 2, 4); pages = 3 * torch.ones(1, 2, 4);"
        "one = torch.ones(1, dtype=torch.int64);"
        "print(c.decode_attention(x, pages, pages, one[None] - 1, one).sum())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.stdout == "tensor(24.)\n", done.stderr
