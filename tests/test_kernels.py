"""
The kernels against their plain twins, and the cache's bookkeeping against the visibility rule.

Triton decides as it is imported whether kernels are compiled or interpreted. So the comparisons run
on a GPU where there is one, and under the interpreter in a process of its own (test_interpreter),
or by hand:

    TRITON_INTERPRET=1 pytest tests/test_kernels.py

On a GPU most of the time goes into compiling; with pytest-xdist several processes share it:

    pytest -n 12 tests/test_kernels.py
"""
import copy
import dataclasses
import importlib
import math
import random
import re
import sys

import pytest
import torch

reason = "triton is not installed; it has no wheel for some platforms"
pytest.importorskip("triton", reason=reason)

from conftest import (  # noqa: E402
    DEVICE,
    INTERPRETED,
    NOWHERE,
    Life,
    check_cache_write,
    check_no_spills,
    check_pages,
    check_what_is_stored,
    compiled,
    compiles,
    empty_cache,
    held_pairs,
    interprets,
    launched,
    launches,
    pointer,
    run_interpreted,
    small_config,
    small_model,
)

from dms import DMSConfig  # noqa: E402
from kernels import cache_write as writing  # noqa: E402
from kernels import choose  # noqa: E402
from kernels import decode_attention as attending  # noqa: E402
from kernels import feed_token as feeding  # noqa: E402
from kernels import block  # noqa: E402
from kernels.block import block_attention, block_attention_plain  # noqa: E402
from kernels.cache_write import cache_write  # noqa: E402
from kernels.decode_step import FusedLayers  # noqa: E402
from kernels.decode_attention import decode_attention, decode_attention_plain  # noqa: E402
from kernels.pages import PagePool, Rows  # noqa: E402
from kv_cache import KVCache  # noqa: E402
from model import Attention  # noqa: E402



@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs a row's programs one after another, those without work, too."""
    if INTERPRETED:
        monkeypatch.setattr(attending, "splits_of", lambda rows: 3)


@compiles
@interprets
def test_interpreter():
    run_interpreted(__file__)


# -------------------------------------------------------------------------------- decode attention


def compare(arguments):
    y = decode_attention(*arguments)
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}[y.dtype]
    expected = decode_attention_plain(*arguments)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    assert not y[arguments[4] == 0].any()


@launches
@pytest.mark.parametrize("case", range(15))
def test_decode_attention(case):
    """Each dtype with each head size, many numbers of heads and all page sizes; of which a GPU,
    which compiles each, gets one and two to a case."""
    dtype = (torch.float32, torch.float16, torch.bfloat16)[case % 3]
    D = (8, 64, 96, 128, 256)[case % 5]
    for seed in range(16):
        variant = seed if INTERPRETED else seed % 2
        page_size = 2 ** ((case + 5 * variant) % 8)
        G = 1 + 7 * (case + variant // 2) % 16
        rng = random.Random(f"{case} {seed}")
        some = [0, 1, page_size, rng.randrange(30), rng.randrange(200), rng.randrange(200)]
        lengths = rng.choices(some, k=rng.choice([1, 1, 1, 3]))
        compare(held_pairs(lengths, G, D, page_size, dtype, seed, device=DEVICE))


@launches
@pytest.mark.parametrize("splits", [16, 64, 128])
def test_many_splits(splits, monkeypatch):
    """More parts than the merge takes at a time, beside rows of one, two and none, whatever number
    of programs a row has; called again, the counters being in use. The last splits weigh most."""
    monkeypatch.setattr(attending, "splits_of", lambda rows: splits)
    lengths = [19 * splits + 68, 3, 0, attending.LEAST + 1]
    arguments = held_pairs(lengths, 5, 64, 64, torch.float32, seed=1, device=DEVICE)
    k_pages, table = arguments[1], arguments[3]
    last = table[0, : -(-lengths[0] // 64)][-5:].long()
    k_pages[last] *= 4
    compare(arguments)
    compare(arguments)


@compiles
@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("context", [8192, 32768])
def test_programs_have_work(batch, context):
    """Qwen3-8B at 8x, the heads as uneven as real ones, none shorter than its window: four programs
    of five have work, and those of a batch together are enough for a GPU."""
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(8 * batch, generator=generator) ** 3 * 0.5  # 1/8 on average
    length = (513 + share * (context - 513)).int()
    splits = attending.splits_of(len(length))
    programs = -(-length // (-(-length // splits)).clamp(min=attending.LEAST))
    assert programs.sum() >= 0.8 * splits * len(length)
    assert programs.sum() >= 200


@pytest.mark.parametrize("lengths, D, page_size", [([70, 0, 1], 64, 16), ([16384, 5], 256, 64)])
def test_plain_twin(lengths, D, page_size):
    """Against softmax attention over a row's pairs laid end to end."""
    q, k_pages, v_pages, table, length = held_pairs(lengths, 3, D, page_size, torch.float32, seed=2)
    y = decode_attention_plain(q, k_pages, v_pages, table, length)
    for row, n in enumerate(lengths):
        pages = table[row, : -(-n // page_size)].long()
        k, v = (slots[pages].view(-1, D)[:n] for slots in (k_pages, v_pages))
        weight = (q[row] @ k.T / math.sqrt(D)).softmax(-1)
        torch.testing.assert_close(y[row], weight @ v, atol=1e-5, rtol=1e-4)
        assert n > 0 or not y[row].any()


# ------------------------------------------------------------------------------ attention of a block


def fed_rows(rng, N, D, page_size, window, dtype):
    """Rows that have been fed tokens, and their pool, on DEVICE; what is not in use is poisoned."""
    longest = rng.choice([0, 1, 20, 150])
    rows, pool = empty_cache(N, D, window + 1, page_size, longest // page_size + 2, dtype)
    rows = rows.layer(0)
    new = torch.tensor([rng.randint(0, longest) for _ in range(N)])
    k = torch.randn(N, max(longest, 1), D).to(dtype)
    v = torch.randn(N, max(longest, 1), D).to(dtype)
    evict = torch.rand(N, max(longest, 1)) < rng.choice([0.1, 0.5, 0.9])
    writing.write_block(k, v, evict, new, rows, pool, window)
    rows.seen += new
    rows.table.masked_fill_(rows.table == NOWHERE, 0)  # any page: the plain twin looks it up
    for thing in (rows, pool):
        for name, x in vars(thing).items():
            setattr(thing, name, x.to(DEVICE))
    return rows, pool


@launches
@pytest.mark.parametrize("case", range(15))
def test_block_attention(case):
    """Each dtype with each head size, many numbers of heads and all page sizes; ragged, with rows
    that rest; dense, too."""
    dtype = (torch.float32, torch.float16, torch.bfloat16)[case % 3]
    D = (8, 64, 96, 128, 256)[case % 5]
    for seed in range(4 if INTERPRETED else 2):
        rng = random.Random(f"{case} {seed}")
        torch.manual_seed(100 * case + seed)
        N = rng.choice([1, 3])
        G = 1 + 7 * (case + seed) % 16
        T = rng.choice([2, 5, 40, 90])
        window = rng.choice([0, 1, 7, 60, 500])
        rows, pool = fed_rows(rng, N, D, 2 ** ((case + seed) % 8), window, dtype)
        q = torch.randn(N, G, T, D, device=DEVICE).to(dtype)
        k, v = torch.randn(2, N, T, D, device=DEVICE).to(dtype)
        evict = torch.rand(N, T, device=DEVICE) < 0.6 if seed % 3 else None
        if evict is None:
            pool.evicted.fill_(False)
        new = torch.tensor([rng.randint(0, T) for _ in range(N)], device=DEVICE)
        arguments = (q, k, v, evict, new, rows, pool, window)
        y = block_attention(*arguments)
        expected = block_attention_plain(*arguments)
        assert y.isfinite().all()
        tolerance = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
        for row, n in enumerate(new.tolist()):
            torch.testing.assert_close(
                y[row, :, :n], expected[row, :, :n], rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------- cache write


@launches
@pytest.mark.parametrize("seed", range(8))
def test_cache_write(seed):
    """1,000 steps in all."""
    check_cache_write(cache_write, seed, DEVICE)


@launches
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("D", [64, 96, 128, 256])
def test_cache_write_stores(dtype, D):
    check_what_is_stored(cache_write, dtype, D, DEVICE)


@launches
@pytest.mark.parametrize("seed", range(8))
def test_1_000_steps_of_a_cache_that_uses_the_kernels(seed):
    """Beside one that does not: the same results, the same pairs held, and no page is lost."""
    life = Life(seed, layers=1, device=DEVICE)
    plain = KVCache(**life.settings)
    plain.kernels = choose.PLAIN
    cache = KVCache(**life.settings)
    cache.kernels = choose.TRITON
    for step in range(125):
        life.step(plain, cache)
        if step % 5 == 4:
            life.check(plain)
            life.check(cache)
            check_pages(cache)
            assert torch.equal(plain.rows.length, cache.rows.length)


@launches
@pytest.mark.parametrize(
    "settings", [None, dict(), dict(per="layer", shift=0), dict(source="neuron")]
)
def test_a_model_that_decodes_by_the_kernels(settings):
    """A prompt, then single tokens, two sequences of different lengths: the dense masked model's
    logits."""
    dms = None if settings is None else DMSConfig(window=2, **settings)
    model = small_model(1, dms, 0.5).to(DEVICE)
    cache = KVCache(model.config, 2, DEVICE, page_size=4)
    cache.kernels = choose.TRITON
    ids = torch.randint(0, 67, (2, 21), device=DEVICE)
    with torch.inference_mode():
        model(ids[:, :13], cache=cache, lengths=torch.tensor([13, 12]))
        steps = [torch.stack((ids[0, t:t + 1], ids[1, t - 1:t])) for t in range(13, 21)]
        logits = torch.cat([model(step, cache=cache) for step in steps], dim=1)
        for row, b in enumerate((ids[:1, :21], ids[1:, :20])):
            torch.testing.assert_close(logits[row], model(b)[0, -8:], atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------- decode step

KINDS = {
    "dense": (None, dict()),
    "adapter": (DMSConfig(window=2), dict(num_key_value_heads=2)),
    "adapter with biases": (DMSConfig(window=0), dict(model_type="llama", attention_bias=True)),
    "own token": (DMSConfig(window=3, shift=0), dict(model_type="qwen2")),
    "per layer": (DMSConfig(window=2, per="layer"), dict(num_key_value_heads=2, head_dim=12)),
    "neuron": (DMSConfig(window=2, source="neuron", scale=10), dict(num_key_value_heads=1)),
    "neuron per layer": (
        DMSConfig(window=1, source="neuron", scale=10, per="layer"),
        dict(num_key_value_heads=2),
    ),
    "switched off": (DMSConfig(source="neuron", disable_eviction=True), dict()),
}


def decided_model(kind):
    """A small model whose heads decide differently, all weights random."""
    dms, changes = KINDS[kind]
    model = small_model(1, dms, 0.5, **changes).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or name.endswith("dms_proj_alpha.weight"):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(DEVICE)
    return model


@launches
@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_of_a_decode_step(kind):
    """Beside the model's own layers over a cache that uses no kernels: the same states, and the same
    pairs held, while sequences rest at times."""
    model = decided_model(kind)
    plain = KVCache(model.config, 2, DEVICE, page_size=4)
    plain.kernels = choose.PLAIN
    cache = KVCache(model.config, 2, DEVICE, page_size=4)
    cache.kernels = choose.TRITON
    layers = FusedLayers(model)
    generator = torch.Generator().manual_seed(0)
    held = []
    with torch.inference_mode():
        for step in range(8):
            token = torch.randint(0, 67, (2,), generator=generator).to(DEVICE)
            count = torch.tensor([1, step % 3 > 0], device=DEVICE)
            with plain.append(count, 1) as feed:
                expected = model.hidden(token[:, None], feed, feed.start)[:, 0]
            with cache.append(count, 1) as feed:
                states = layers.hidden(token, feed)
            fed = count > 0
            torch.testing.assert_close(states[fed], expected[fed], atol=1e-4, rtol=1e-4)
            assert torch.equal(plain.rows.length, cache.rows.length)
            held.append(cache.rows.length.sum())
    if model.config.eviction:
        assert not torch.equal(cache.rows.length.amin(1), cache.rows.length.amax(1)) or "layer" in kind
        assert held[-1] < 0.9 * cache.layers * cache.rows.seen.sum()


@launches
def test_launches_of_a_layer():
    """At most 14 in a captured step. On a GPU each call of PyTorch that is no view is one launch."""
    views = {"view", "chunk", "split", "flatten", "unbind", "__getitem__", "__get__", "size", "dim",
             "__len__", "stride", "data_ptr", "is_contiguous", "element_size", "contiguous", "to",
             "empty_like", "empty", "new_empty", "detach", "float", "transpose", "unsqueeze", "item"}  # fmt: skip
    per_layer = []

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            if function.__name__ not in views:
                calls.append(function.__name__)
            return function(*arguments, **(options or {}))

    def counted(launcher):
        def call(*arguments):
            calls.append(launcher.__name__)
            with torch._C.DisableTorchFunction():
                return launcher(*arguments)

        return call

    for layers in (1, 3):
        model = small_model(1, DMSConfig(window=2), 0.5, num_hidden_layers=layers).to(DEVICE)
        cache = KVCache(model.config, 2, DEVICE, page_size=4)
        cache.kernels = choose.Kernels(*map(counted, choose.TRITON))
        fused = FusedLayers(model)
        calls = []
        one_each = torch.ones(2, dtype=torch.int64, device=DEVICE)
        with torch.inference_mode(), cache.append(one_each, 1) as feed, Count():
            fused.hidden(torch.tensor([3, 5], device=DEVICE), feed)
        per_layer.append(len(calls))
    assert "rms_norm" in calls and "feed_token" in calls
    assert 10 <= (per_layer[1] - per_layer[0]) / 2 <= 14


# ---------------------------------------------------------------------------------------- refusals


def check_refusal(says, launcher, *arguments):
    with pytest.raises(AssertionError, match=says) as error:
        launcher(*arguments)
    assert "\n" not in str(error.value)


def test_refusals(monkeypatch):
    """One line each, before anything is launched."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    names = ("q", "k_pages", "v_pages", "table", "length")
    some = held_pairs([5, 2], 2, 64, 4, torch.float32, seed=3, device=DEVICE)
    q, k_pages, _, _, length = some
    for change, says in (
        (dict(q=q.repeat(1, 1, 5)), "decode_attention: D=320, .* not covered"),
        (dict(q=q[:, :1].expand(-1, 17, -1)), "decode_attention: D=64, G=17, .* not covered"),
        (dict(k_pages=k_pages[:, :3].contiguous()), "decode_attention: .* page_size=3, .* not covered"),
        (dict(q=q.double()), "decode_attention: q and pages differ in dtype"),
        (dict(k_pages=k_pages.half()), "decode_attention: q and pages differ in dtype"),
        (dict(length=length.to("meta")), "decode_attention: tensors on several devices"),
        (dict(k_pages=k_pages.mT.contiguous().mT), "decode_attention: .* contiguous"),
    ):
        arguments = {**dict(zip(names, some)), **change}
        check_refusal(says, decode_attention, *arguments.values())

    rows, pool = empty_cache(2, 8, 4, 4, 2, device=DEVICE)
    rows = rows.layer(0)
    k = torch.ones(2, 8, device=DEVICE)
    evict = torch.ones(2, dtype=torch.bool, device=DEVICE)
    new = torch.ones(2, dtype=torch.int64, device=DEVICE)
    gaps = copy.copy(pool)
    gaps.free = pool.free[::2]
    elsewhere = dataclasses.replace(rows, seen=rows.seen.to("meta"))
    for says, *arguments in (
        ("cache_write: k, v and the pool differ in dtype", k.half(), k, evict, new, rows, pool, 0),
        ("cache_write: shift is 0 or 1", k, k, evict, new, rows, pool, 2),
        ("cache_write: tensors must be contiguous", k, k, evict, new, rows, gaps, 0),
        ("cache_write: tensors on several devices", k, k, evict, new, elsewhere, pool, 0),
    ):
        check_refusal(says, cache_write, *arguments)
    assert not rows.length.any() and int(pool.free_count) == len(pool)

    if DEVICE == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        check_refusal("TRITON_INTERPRET=1", decode_attention, *some)
        check_refusal("TRITON_INTERPRET=1", cache_write, k, k, evict, new, rows, pool, 0)


def test_without_triton(monkeypatch):
    """The files can be imported, the plain functions work and are what a cache uses on a GPU, and
    the launchers say what is missing."""
    for name in [name for name in sys.modules if name.split(".")[0] == "kernels"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("triton", "triton.language"):
        monkeypatch.setitem(sys.modules, name, None)
    without = importlib.import_module("kernels.choose")
    plain = without.choose_kernels(torch.device("cuda"), torch.float32)
    assert plain == without.PLAIN
    arguments = held_pairs([5, 2], 2, 64, 4, torch.float32, seed=3)
    y = plain.decode_attention(*arguments)
    torch.testing.assert_close(y, decode_attention_plain(*arguments))
    check_cache_write(plain.cache_write, seed=3)
    with pytest.raises(ImportError, match="decode_attention needs triton"):
        without.TRITON.decode_attention(*arguments)
    with pytest.raises(ImportError, match="cache_write needs triton"):
        check_cache_write(without.TRITON.cache_write, seed=3)


# ------------------------------------------------------------------------------------- compilation


@compiles
@pytest.mark.parametrize(
    "arch, dtype",
    [(80, torch.bfloat16), (90, torch.bfloat16), (100, torch.bfloat16), (90, torch.float32)],
)
def test_decode_attention_compiles(arch, dtype):
    """Qwen3-8B at batch 64: no spills, no local memory, and keys and values come in asynchronous
    16-byte copies."""
    pool = pointer(100_000, 64, 128, dtype=dtype)
    table = pointer(512, 128, dtype=torch.int32)
    length = pointer(512, dtype=torch.int32)
    arguments = (decode_attention, pointer(512, 4, 128, dtype=dtype), pool, pool, table, length)
    calls = launched(attending, *arguments)
    kernel = compiled(attending._attend, *calls["_attend"][0], arch)
    check_no_spills(kernel)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global.*", kernel.asm["ptx"])
    assert copies and all("], 0x10" in line for line in copies)
    assert "v4" in "".join(re.findall(r"ld\.global.*", kernel.asm["ptx"]))  # q


@compiles
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("evicts", [True, False])
def test_block_attention_compiles(arch, evicts, monkeypatch):
    """Qwen3-8B, 2,048 tokens: no spills, no local memory."""
    monkeypatch.setattr(block, "capability", lambda q: arch // 10)
    rows = Rows.empty(1, 8, 513, "meta").layer(0)
    rows.table = pointer(8, 128, dtype=torch.int32)
    pool = PagePool(100_000, 64, 128, torch.bfloat16, "meta")
    k = pointer(8, 2048, 128)
    evict = pointer(8, 2048, dtype=torch.bool) if evicts else None
    new = pointer(8, dtype=torch.int64)
    arguments = (block_attention, pointer(8, 4, 2048, 128), k, k, evict, new, rows, pool, 512)
    calls = launched(block, *arguments)["_attend_block"]
    check_no_spills(compiled(block._attend_block, *calls[0], arch))


@compiles
@pytest.mark.parametrize("D", [32, 64])
def test_block_attention_compiles_in_float32(D):
    """For small heads, as the toy's: no spills on an H100."""
    rows = Rows.empty(1, 4, 17, "meta").layer(0)
    rows.table = pointer(4, 128, dtype=torch.int32)
    pool = PagePool(100_000, 32, D, torch.float32, "meta")
    k = pointer(4, 2048, D, dtype=torch.float32)
    new = pointer(4, dtype=torch.int64)
    arguments = (block_attention, k[:, None], k, k, pointer(4, 2048, dtype=torch.bool))
    calls = launched(block, *arguments, new, rows, pool, 16)["_attend_block"]
    check_no_spills(compiled(block._attend_block, *calls[0], 90))


@compiles
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("source", ["adapter", "neuron"])
def test_feed_token_compiles(arch, source):
    """Qwen3-8B at batch 64: no spills, no local memory."""
    sizes = dict(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    with torch.device("meta"):
        config = small_config(dms=DMSConfig(source=source), model_type="qwen3", **sizes)
        attention = Attention(config).bfloat16()
    rows = Rows.empty(1, 512, 513, "meta").layer(0)
    rows.table = pointer(512, 128, dtype=torch.int32)
    pool = PagePool(100_000, 64, 128, torch.bfloat16, "meta")
    angles = pointer(64, 128)
    new = pointer(512, dtype=torch.int64)
    arguments = (pointer(64, 48 * 128), pointer(64, 4096), angles, angles, attention, new, rows, pool)
    calls = launched(feeding, feeding.feed_token, *arguments)["_feed"]
    check_no_spills(compiled(feeding._feed, *calls[0], arch))


@compiles
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_cache_write_compiles(arch):
    """Likewise. A warp moves a row of 256 bytes in one go, 8 bytes a thread."""
    rows = Rows.empty(1, 512, 513, "meta").layer(0)
    rows.table = pointer(512, 128, dtype=torch.int32)
    pool = PagePool(100_000, 64, 128, torch.bfloat16, "meta")
    k = pointer(512, 128)
    evict = pointer(512, dtype=torch.bool)
    new = pointer(512, dtype=torch.int64)
    arguments = (cache_write, k, k, evict, new, rows, pool, 1)
    kernel = compiled(writing._write, *launched(writing, *arguments)["_write"][0], arch)
    check_no_spills(kernel)
    assert "v2.b32" in "".join(re.findall(r"ld\.global.*", kernel.asm["ptx"]))
    assert "v2.b32" in "".join(re.findall(r"st\.global.*", kernel.asm["ptx"]))
