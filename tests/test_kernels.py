"""
The kernels against their plain twins, and the cache's bookkeeping against the visibility rule.

Triton decides as it is imported whether kernels are compiled or interpreted. So the comparisons run on a GPU where
there is one, and under the interpreter in a process of its own (test_interpreter), or by hand:

    TRITON_INTERPRET=1 pytest tests/test_kernels.py
"""
import math
import os
import random
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed; it has no wheel for some platforms")

from conftest import NOWHERE, Life, held_pairs, small_model  # noqa: E402
from conftest import check_pages as check_cache  # noqa: E402

from dms import DMSConfig, visible  # noqa: E402
from kernels import cache_write as writing  # noqa: E402
from kernels import decode_attention as attending  # noqa: E402
from kernels.cache_write import cache_write, cache_write_plain  # noqa: E402
from kernels.decode_attention import decode_attention, decode_attention_plain  # noqa: E402
from kv_cache import KVCache  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
launches = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="test_interpreter runs it")
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
integer = [torch.int32, torch.int64]


def version(module):
    return tuple(map(int, module.__version__.split(".")[:2]))


@compiles
@pytest.mark.skipif(version(triton) < (3, 7) and version(numpy) >= (2, 4),
                    reason="this triton's interpreter needs numpy < 2.4 (triton-lang/triton#9171)")
def test_interpreter():
    run = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__], cwd=REPOSITORY,
                         env={**os.environ, "TRITON_INTERPRET": "1"}, text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT)
    assert run.returncode == 0, run.stdout


# ------------------------------------------------------------------------------------------------ decode attention


def compare(arguments):
    y = decode_attention(*arguments)
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}[y.dtype]
    expected = decode_attention_plain(*arguments)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    assert not y[arguments[4] == 0].any()


@launches
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("D", [8, 64, 96, 128, 256])
def test_decode_attention(dtype, D):
    for seed in range(25):
        rng = random.Random(f"{dtype} {D} {seed}")
        page_size = 2 ** rng.randrange(8)
        some = [0, 1, page_size, rng.randrange(30), rng.randrange(200), rng.randrange(200)]
        lengths = rng.choices(some, k=rng.choice([1, 1, 1, 3]))
        G = 16 if seed == 0 else min(rng.randint(1, 16) for _ in range(4))  # a head costs the interpreter dearly
        compare(held_pairs(lengths, G, D, page_size, dtype, seed, device=DEVICE))


@launches
def test_many_splits():
    """More splits than the merge takes at a time, beside rows of one, two and none. The last splits weigh most."""
    q, k_pages, v_pages, table, length = held_pairs([2500, 3, 0, 129], 5, 64, 64, torch.float32, seed=1, device=DEVICE)
    k_pages[table[0, -5:].clamp(max=len(k_pages) - 1)] *= 4
    compare((q, k_pages, v_pages, table, length))


def test_plain_twin_of_many_pairs():
    """So many that it takes a row at a time."""
    q, k_pages, v_pages, table, length = held_pairs([16384, 5], 2, 256, 64, torch.float32, seed=4, device=DEVICE)
    y = decode_attention_plain(q, k_pages, v_pages, table, length)
    for row, n in enumerate(length.tolist()):
        k, v = (pool[table[row, :-(-n // 64)].long()].view(-1, 256)[:n] for pool in (k_pages, v_pages))
        torch.testing.assert_close(y[row], (q[row] @ k.T / 16).softmax(-1) @ v, atol=1e-5, rtol=1e-4)


def test_plain_twin():
    """Against softmax attention over a row's pairs laid end to end."""
    q, k_pages, v_pages, table, length = held_pairs([70, 0, 1], 3, 64, 16, torch.float32, seed=2, device=DEVICE)
    y = decode_attention_plain(q, k_pages, v_pages, table, length)
    k, v = (pool[table[0, :5]].view(-1, 64)[None, :70].expand(3, -1, -1) for pool in (k_pages, v_pages))
    torch.testing.assert_close(y[0], torch.nn.functional.scaled_dot_product_attention(q[0, :, None], k, v)[:, 0])
    torch.testing.assert_close(y[2], v_pages[table[2, 0], 0].expand(3, -1))
    assert not y[1].any()


def test_splits_follow_from_shapes():
    assert [attending._split(8, n) for n in (0, 64, 8192, 32768)] == [128] * 4
    assert [attending._split(512, n) for n in (1024, 4096, 8192, 131072)] == [128, 256, 512, 512]


# ------------------------------------------------------------------------------------------------ cache write


def empty_cache(B, heads, D, W, page_size, columns, P, dtype=torch.float32, integers=torch.int32):
    """The state that cache_write works on, by the names of its arguments. All that is not in use is poisoned."""
    def state(*shape, fill=0, dtype=integers):
        return torch.full(shape, fill, dtype=dtype, device=DEVICE)

    N = B * heads
    return dict(
        seen=state(N, dtype=torch.int64), length=state(N), ring_slot=state(N, W, fill=NOWHERE),
        ring_evict=state(N, W, fill=True, dtype=torch.bool), table=state(N, columns, fill=NOWHERE),
        free=torch.randperm(P, device=DEVICE).to(integers), top=state(1, fill=P),
        k_pages=state(P, page_size, D, fill=math.nan, dtype=dtype),
        v_pages=state(P, page_size, D, fill=math.nan, dtype=dtype))


def pages_of(cache):
    """How many pages each row has, a list."""
    return (-(-cache["length"] // cache["k_pages"].shape[1])).tolist()


def finish(cache, b, heads):
    """Sequence b ends: its pages go back to the stack."""
    for row in range(b * heads, (b + 1) * heads):
        n, count = pages_of(cache)[row], int(cache["top"])
        cache["free"][count:count + n] = cache["table"][row, :n]
        cache["top"] += n
        cache["table"][row], cache["length"][row] = NOWHERE, 0
        cache["ring_evict"][row], cache["ring_slot"][row], cache["seen"][row] = True, NOWHERE, 0


def held(cache, row):
    """The row's pairs as a sorted list: (row, token), which each pair's k says itself, and -v as well."""
    slot, page_size = torch.arange(int(cache["length"][row]), device=DEVICE), cache["k_pages"].shape[1]
    page = cache["table"][row, slot // page_size].long()
    k, v = (cache[pool][page, slot % page_size, :2] for pool in ("k_pages", "v_pages"))
    assert torch.equal(k, -v)
    return sorted(map(tuple, k.tolist()))


def check_pages(cache):
    """Every page of the pool is free or some row's, once."""
    pages = cache["free"][:int(cache["top"])].tolist()
    for row, n in enumerate(pages_of(cache)):
        pages += cache["table"][row, :n].tolist()
    assert sorted(pages) == list(range(len(cache["free"])))


@launches
@pytest.mark.parametrize("seed", range(8))
def test_cache_write(seed):
    """1,000 steps in all. Page numbers may differ, since rows come in any order; everything else is equal."""
    rng = random.Random(seed)
    B, heads, W, shift = rng.randint(1, 2), rng.randint(1, 2), (1, 2, 3, rng.randint(4, 20))[seed // 2], seed % 2
    page_size, D, rate = 2 ** rng.randrange(5), rng.choice([2, 6, 8]), rng.choice([0.3, 0.9])
    columns = max(2, 40 // page_size)
    N, most = B * heads, columns * page_size
    cache = empty_cache(B, heads, D, W, page_size, columns, P=N * columns, integers=rng.choice(integer))
    plain = {name: x.clone() for name, x in cache.items()}
    decided = [[] for _ in range(N)]  # at each token
    for _ in range(125):
        for b in range(B):
            rows = range(b * heads, (b + 1) * heads)
            if rng.random() < 0.01 or int(cache["length"][b * heads:(b + 1) * heads].max()) == most:
                finish(cache, b, heads)
                finish(plain, b, heads)
                for row in rows:
                    decided[row] = []
        evict = [rng.random() < rate for _ in range(N)]
        active = [rng.random() < 0.9 for _ in range(B)]
        token = torch.tensor([[row, int(cache["seen"][row]), *[0] * (D - 2)] for row in range(N)],
                             dtype=torch.float32, device=DEVICE)
        token = token[:, None]
        news = dict(evict=torch.tensor(evict, device=DEVICE)[:, None],
                    lengths=torch.tensor(active, device=DEVICE).long().repeat_interleave(heads))
        cache_write(token, -token, **news, **cache, shift=shift)
        cache_write_plain(token, -token, **news, **plain, shift=shift)
        for state in (cache, plain):
            state["seen"] += news["lengths"]
        for name in ("length", "ring_slot", "ring_evict", "top"):
            assert torch.equal(cache[name], plain[name]), name
        for row in range(N):
            if active[row // heads]:
                decided[row].append(evict[row])
            T, known = len(decided[row]), decided[row][shift:] + [False] * shift
            rule = visible(T - 1, torch.arange(T), torch.tensor(known[:T], dtype=torch.bool), W - 1)
            assert held(cache, row) == held(plain, row) == [(row, j) for j in range(T) if rule[j]]
        check_pages(cache)


@launches
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("D", [64, 96, 128, 256])
def test_cache_write_stores(dtype, D):
    """What is stored is bit for bit what was given, and nothing beside it is touched."""
    cache = empty_cache(2, 3, D, W=4, page_size=4, columns=2, P=12, dtype=dtype)
    k, v = torch.randn(2, 6, D).to(dtype).to(DEVICE)
    cache_write(k[:, None], v[:, None], torch.ones(6, 1, dtype=torch.bool, device=DEVICE),
                torch.tensor([1] * 3 + [0] * 3, device=DEVICE), **cache, shift=0)
    page = cache["table"][:3, 0].long()
    assert torch.equal(cache["k_pages"][page, 0], k[:3]) and torch.equal(cache["v_pages"][page, 0], v[:3])
    for pool in ("k_pages", "v_pages"):
        assert int((~cache[pool].isnan()).sum()) == 3 * D
    assert cache["length"].tolist() == [1, 1, 1, 0, 0, 0]
    assert (cache["table"][3:] == NOWHERE).all() and (cache["ring_slot"][3:] == NOWHERE).all()


@launches
@pytest.mark.parametrize("seed", range(8))
def test_1_000_steps_of_a_cache_that_uses_the_kernels(seed):
    """Beside one that does not: the same results, the same pairs held, and no page is lost."""
    life = Life(seed, layers=1, device=DEVICE)
    plain, cache = (KVCache(**life.settings) for _ in range(2))
    plain.kernels, cache.kernels = False, True
    for step in range(125):
        life.step(plain, cache)
        if step % 5 == 4:
            life.check(plain)
            life.check(cache)
            check_cache(cache)
            assert torch.equal(plain.length, cache.length)


@launches
@pytest.mark.parametrize("settings", [None, dict(), dict(per="layer", shift=0), dict(source="neuron")])
def test_a_model_that_decodes_by_the_kernels(settings):
    """A prompt, then single tokens, two sequences of different lengths: the dense masked model's logits."""
    model = small_model(1, None if settings is None else DMSConfig(window=2, **settings), 0.5).to(DEVICE)
    cache = KVCache(model.config, 2, DEVICE, page_size=4)
    cache.kernels, ids = True, torch.randint(0, 67, (2, 21), device=DEVICE)
    with torch.inference_mode():
        model(ids[:, :13], cache=cache, lengths=torch.tensor([13, 12]))
        steps = [torch.stack((ids[0, t:t + 1], ids[1, t - 1:t])) for t in range(13, 21)]
        logits = torch.cat([model(step, cache=cache) for step in steps], dim=1)
        for row, b in enumerate((ids[:1, :21], ids[1:, :20])):
            torch.testing.assert_close(logits[row], model(b)[0, -8:], atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ refusals


def test_refusals(monkeypatch):
    """One line each, before anything is launched."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q, k_pages, v_pages, table, length = held_pairs([5, 2], 2, 64, 4, torch.float32, seed=3, device=DEVICE)
    for change, says in ((dict(q=q.repeat(1, 1, 5)), "D = 320"), (dict(q=q[:, :1].expand(-1, 17, -1)), "G = 17"),
                         (dict(k_pages=k_pages[:, :3].contiguous()), "page_size = 3"), (dict(q=q.double()), "dtype"),
                         (dict(k_pages=k_pages.half()), "dtype"), (dict(length=length.to("meta")), "meta"),
                         (dict(k_pages=k_pages.transpose(0, 1)[:2].transpose(0, 1)), "contiguous")):
        arguments = dict(q=q, k_pages=k_pages, v_pages=v_pages, table=table, length=length)
        with pytest.raises(ValueError, match=says) as error:
            decode_attention(**{**arguments, **change})
        assert "\n" not in str(error.value)
    cache, k = empty_cache(1, 2, 8, 4, 4, 2, 4), torch.ones(2, 1, 8, device=DEVICE)
    for change, says in ((dict(k=k.half()), "dtype"), (dict(shift=2), "shift"),
                         (dict(k=k.expand(2, 3, 8), v=k.expand(2, 3, 8)), "T = 1"),
                         (dict(free=cache["free"][::2]), "contiguous"), (dict(seen=cache["seen"].to("meta")), "meta")):
        yes, one = torch.ones(2, 1, dtype=torch.bool, device=DEVICE), torch.ones(2, dtype=torch.int64, device=DEVICE)
        with pytest.raises(ValueError, match=says) as error:
            cache_write(**{**dict(k=k, v=k, evict=yes, lengths=one, **cache, shift=0), **change})
        assert "\n" not in str(error.value)
    if DEVICE == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
            decode_attention(q, k_pages, v_pages, table, length)
        with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
            cache_write(k, k, yes, one, **cache, shift=0)


def test_without_triton(monkeypatch):
    """The files can be imported, the plain functions work, and the launchers say what is missing."""
    for name in ("triton", "triton.language"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "kernels")
    for file, count in (("decode_attention", 5), ("cache_write", 14)):
        names = runpy.run_path(str(REPOSITORY / "kernels" / f"{file}.py"))
        assert callable(names[file + "_plain"])
        with pytest.raises(ImportError, match="needs triton"):
            names[file](*[torch.zeros(1)] * count)


# ------------------------------------------------------------------------------------------------ compilation


def launched(module, name, launcher, *arguments, **more):
    """Arguments and options with which `launcher` launches the kernel `name`, given tensors without memory."""
    calls = {}

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *values, **options: calls.update({self.kernel: (values, options)})

    with pytest.MonkeyPatch.context() as patch:
        for kernel in {"_attend", "_merge", "_write"} & vars(module).keys():
            patch.setattr(module, kernel, Recorder(kernel))
        launcher(*arguments, **more)
    return calls[name]


def compiled(kernel, values, options, arch):
    """The kernel as the JIT would compile it for these arguments: pointers and integers divisible by 16 are known to
    be, unless the kernel says otherwise."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32",
             torch.int64: "*i64", torch.bool: "*i1", int: "i32", float: "fp32"}
    names = kernel.arg_names
    constants = {name: value for name, value in options.items() if name in names}
    options = {name: value for name, value in options.items() if name not in names}
    signature, hints = dict.fromkeys(names, "constexpr"), {}
    for i, (name, value) in enumerate(zip(names, values)):
        signature[name] = types[value.dtype if isinstance(value, torch.Tensor) else type(value)]
        general = kernel.params[i].do_not_specialize
        if isinstance(value, torch.Tensor) or isinstance(value, int) and value % 16 == 0 and not general:
            hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def check_no_spills(kernel):
    assert not re.search(r"\.local\b", kernel.asm["ptx"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if tool.exists():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
        assert re.search(r"STACK:0 .*LOCAL:0 ", usage.stdout + usage.stderr), usage


def pointer(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


@compiles
@pytest.mark.parametrize("arch,dtype", [(80, torch.bfloat16), (90, torch.bfloat16), (90, torch.float32)])
def test_decode_attention_compiles(arch, dtype):
    """Qwen3-8B at batch 64: no spills, no local memory, and keys and values come in asynchronous 16-byte copies."""
    pool = pointer(100_000, 64, 128, dtype=dtype)
    arguments = (pointer(512, 4, 128, dtype=dtype), pool, pool, pointer(512, 128, dtype=torch.int32),
                 pointer(512, dtype=torch.int32))
    kernel = compiled(attending._attend, *launched(attending, "_attend", decode_attention, *arguments), arch)
    check_no_spills(kernel)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global.*", kernel.asm["ptx"])
    assert copies and all("], 0x10" in line for line in copies)
    assert "v4" in "".join(re.findall(r"ld\.global.*", kernel.asm["ptx"]))  # q
    check_no_spills(compiled(attending._merge, *launched(attending, "_merge", decode_attention, *arguments), arch))


@compiles
@pytest.mark.parametrize("arch", [80, 90])
def test_cache_write_compiles(arch):
    """Likewise. A warp moves a row of 256 bytes in one go, 8 bytes a thread."""
    i32, flag = torch.int32, torch.bool
    kernel = compiled(writing._write, *launched(
        writing, "_write", cache_write, pointer(512, 1, 128), pointer(512, 1, 128), pointer(512, 1, dtype=flag),
        pointer(512, dtype=torch.int64), pointer(512, dtype=torch.int64), pointer(512, dtype=i32),
        pointer(512, 513, dtype=i32), pointer(512, 513, dtype=flag), pointer(512, 128, dtype=i32),
        pointer(100_000, dtype=i32), pointer(1, dtype=i32), pointer(100_000, 64, 128), pointer(100_000, 64, 128),
        shift=1), arch)
    check_no_spills(kernel)
    assert "v2.b32" in "".join(re.findall(r"ld\.global.*", kernel.asm["ptx"]))
    assert "v2.b32" in "".join(re.findall(r"st\.global.*", kernel.asm["ptx"]))
