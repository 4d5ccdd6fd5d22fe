"""
What the test files share: small random models, dense and DMS, that decide at random but
reproducibly; a random life of a cache, and what each of its rows must hold; how Triton's kernels
are run without a GPU, and compiled for one.
"""
import copy
import json
import math
import os
import random
import shutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dms import DMSConfig, visible
from kernels import triton
from kernels.cache_write import cache_write_plain
from kernels.pages import PagePool, Rows
from model import Model, ModelConfig

torch.set_num_threads(1)  # the models are tiny
REPOSITORY = Path(__file__).resolve().parent.parent
NOWHERE = 2**30  # an index that must never be used
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
is_elsewhere = DEVICE == "cpu" and not INTERPRETED
launches = pytest.mark.skipif(is_elsewhere, reason="test_interpreter runs it")
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


def interprets(test):
    """The mark of a test that runs kernels under the interpreter."""
    import numpy

    def version(module):
        return tuple(map(int, module.__version__.split(".")[:2]))

    fails = triton is None or version(triton) < (3, 7) and version(numpy) >= (2, 4)
    reason = "this triton's interpreter needs numpy < 2.4 (triton-lang/triton#9171)"
    return pytest.mark.skipif(fails, reason=reason)(test)


def run_interpreted(file):
    """The tests of a file in a process of their own, since Triton decides as it is imported."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", file],
        cwd=REPOSITORY,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert run.returncode == 0, run.stdout


def small_config(**changes):
    settings = dict(
        model_type="qwen3",
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    return ModelConfig(**{**settings, **changes})


def small_model(seed=0, dms=None, keep=0.5, **changes):
    """A random model in float32. keep: about this fraction of tokens is kept, through the
    decisions' offset."""
    torch.manual_seed(seed)
    model = Model(small_config(dms=dms, **changes))
    for name, p in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, 1.0, 0.1)
        else:
            torch.nn.init.normal_(p, 0.0, 0.4 if "proj" in name else 1.0)
    if dms is not None:
        dms.scale = 1.0
        dms.offset = {0.1: -2.0, 0.5: 0.0, 0.9: 2.0}[keep]
    return model.requires_grad_(False).eval()


def in_hub_cache(cache, **folders):
    """The environment of a process without network for which owner/NAME of the hub is a folder.
    folders: {NAME: folder}."""
    commit = "0123456789" * 4
    for name, folder in folders.items():
        place = cache / f"models--owner--{name}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text(commit)
        shutil.copytree(folder, place / "snapshots" / commit)
    return {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def rng(request):
    return random.Random(request.node.name)


def random_dms(rng):
    return DMSConfig(
        window=rng.choice([0, 1, 2, 3, 7, 16, 40]),
        shift=rng.choice([0, 1]),
        source=rng.choice(["adapter", "neuron"]),
        per=rng.choice(["head", "head", "layer"]),
    )


def rule(said, shift, window):
    """What the visibility rule leaves of T tokens: the positions held, ascending, and the decisions
    about them, two lists. said: (T,) bool, decided at each token about the one `shift` before."""
    T = len(said)
    evict = torch.zeros(T, dtype=torch.bool)
    evict[:max(T - shift, 0)] = said[shift:]
    held = visible(T - 1, torch.arange(T), evict, window).nonzero()[:, 0]
    return held.tolist(), evict[held].tolist()


def held_by(rows, pool, row):
    """What a row holds, by position: positions (n,), keys and values (n, D), and decisions (n,).
    rows: those of one layer."""
    page_size = pool.keys.shape[1]
    slot = torch.arange(int(rows.length[row]), device=rows.length.device)
    page = rows.table[row, slot // page_size].long()
    place = slot % page_size
    position, order = pool.position[page, place].sort()
    by_position = [x[page, place][order] for x in (pool.keys, pool.values, pool.evicted)]
    return position, *by_position


class Life:
    """A batch in which sequences begin, grow by one token or many, fork and end at random, fed to
    several caches at once; and what each of their rows must hold by the rule. A token's k is its
    own number, so that pairs tell."""

    def __init__(self, seed, layers=2, device="cpu"):
        rng = self.rng = random.Random(seed)
        self.device = device
        self.shape = (layers, 2, 8)  # L, Hkv, D
        self.dms = None
        if seed % 4:
            self.dms = DMSConfig(window=rng.choice([0, 1, 3, 12]), shift=rng.choice([0, 1]))
        config = small_config(
            dms=self.dms, num_hidden_layers=layers, num_key_value_heads=2, head_dim=8
        )
        page_size = rng.choice([1, 2, 4, 8])
        self.settings = dict(config=config, batch_size=3, page_size=page_size, device=device)
        self.tokens = [[], [], []]  # of each sequence
        self.flags = [[], [], []]  # (L, Hkv) at each of its tokens
        self.count = 0
        self.rate = rng.choice([0.3, 0.9])
        self.generator = torch.Generator().manual_seed(seed)

    def step(self, *caches):
        rng = self.rng
        B = len(self.tokens)
        action = rng.random()
        if action < 0.04 or max(map(len, self.tokens)) > 60:
            ended = [b for b in range(B) if rng.random() < 0.4 or len(self.tokens[b]) > 60] or [0]
            for cache in caches:
                cache.release(ended)
            for b in ended:
                self.tokens[b] = []
                self.flags[b] = []
        elif action < 0.08:
            chosen = [rng.randrange(B) for _ in range(rng.choice([B, B, rng.randint(1, 4)]))]
            for cache in caches:
                cache.select(chosen)
            self.tokens = [list(self.tokens[b]) for b in chosen]
            self.flags = [list(self.flags[b]) for b in chosen]
        elif action < 0.14:  # one sequence alone
            b = rng.randrange(B)
            T = rng.choice([1, 5, 20])
            self.feed(caches, T, [T], sequence=b)
        else:
            T = rng.choice([1] * 9 + [3])
            lengths = [rng.randint(0, T) if rng.random() < 0.2 else T for _ in range(B)]
            self.feed(caches, T, lengths)

    def feed(self, caches, T, lengths, sequence=None):
        L, H, D = self.shape
        n = len(lengths)
        flags = torch.rand(L, n, H, T, generator=self.generator) < self.rate
        logits = (flags.float() - 0.5).to(self.device)
        token = self.count + torch.arange(n * T, dtype=torch.float32).view(n, 1, T, 1)
        self.count = (self.count + n * T) % 2**20
        k = token.expand(n, H, T, D).contiguous().to(self.device)
        q = torch.randn(L, n, 2 * H, T, D, generator=self.generator).to(self.device) * 1e-3
        count = torch.tensor(lengths, device=self.device)
        outputs = []
        for cache in caches:
            with torch.inference_mode(), cache.append(count, T, sequence=sequence) as feed:
                y = [feed(i, q[i], k, -k, logits[i] if self.dms else None) for i in range(L)]
                outputs.append(y)
        for other in outputs[1:]:
            for layer in range(L):
                for b in range(n):
                    real = slice(lengths[b])
                    one = outputs[0][layer][b, :, real]
                    torch.testing.assert_close(other[layer][b, :, real], one)
        for i, b in enumerate(range(n) if sequence is None else [sequence]):
            self.tokens[b] += token[i, 0, :lengths[i], 0].tolist()  # exact: numbers below 2^20
            self.flags[b] += flags[:, i, :, :lengths[i]].permute(2, 0, 1)

    def check(self, cache):
        """Every row holds exactly the tokens that the rule leaves, and knows each one's position
        and what was decided about it; for a shift of 1 nothing is about the newest yet."""
        for b, tokens in enumerate(self.tokens):
            T = len(tokens)
            assert int(cache.seen[b]) == T
            for layer in range(cache.layers):
                for h in range(cache.kv_heads):
                    said = torch.zeros(T, dtype=torch.bool)
                    if self.dms and T:
                        said = torch.stack(self.flags[b])[:, layer, h]
                    held, evict = rule(said, cache.shift, cache.window)
                    row = b * cache.kv_heads + h
                    position, k, v, evicted = held_by(cache.rows.layer(layer), cache.pool, row)
                    assert position.tolist() == held
                    assert cache.positions(b, layer, h).tolist() == held
                    assert k[:, 0].tolist() == [tokens[j] for j in held]
                    assert torch.equal(k, -v)
                    assert evicted.tolist() == evict


def check_pages(cache):
    """Every page is free or in the table of a row that needs it, not both; and only rows that were
    forked share it, none of which is ever going to write to it."""
    rows = cache.rows
    pool = cache.pool
    page_size = cache.page_size
    W = cache.window + 1
    P = len(pool)
    assert P == len(pool.free) == len(pool.keys) == len(pool.values)
    assert P == len(pool.position) == len(pool.evicted)
    free = pool.free[:int(pool.free_count)].tolist()
    evicted = pool.evicted.tolist()
    rings = rows.ring.tolist()
    taken = set()
    for layer in range(cache.layers):
        having = {}
        for row, length in enumerate(rows.length[layer].tolist()):
            seen = int(rows.seen[row])
            pages = rows.table[layer, row, :-(-length // page_size)].tolist()
            assert len(set(pages)) == len(pages)
            written = set()  # ordinals of pages
            if length % page_size:
                written.add(length // page_size)
            for t in range(max(seen - W, 0), seen):
                slot = rings[layer][row][t % W]
                ordinal = slot // page_size
                undecided = cache.shift == 1 and t == seen - 1
                if undecided or evicted[pages[ordinal]][slot % page_size]:
                    written.add(ordinal)
            for ordinal, page in enumerate(pages):
                having.setdefault(page, []).append((row, ordinal, ordinal in written))
        assert not taken & set(having)
        taken |= set(having)
        for sharers in having.values():
            assert len(sharers) == 1 or not any(is_written for _, _, is_written in sharers)
            assert len({ordinal for _, ordinal, _ in sharers}) == 1
    assert sorted([*free, *taken]) == list(range(P))


def empty_cache(N, D, W, page_size, columns, dtype=torch.float32, device="cpu"):
    """Rows, of one layer, and a pool with pages enough for them, in random order. All that is not
    in use is poisoned."""
    P = N * columns
    rows = Rows.empty(1, N, W, device)
    rows.table = torch.full((1, N, columns), NOWHERE, dtype=torch.int32, device=device)
    rows.ring.fill_(NOWHERE)
    pool = PagePool(P, page_size, D, dtype, device)
    pool.keys.fill_(math.nan)
    pool.values.fill_(math.nan)
    pool.position.fill_(NOWHERE)
    pool.evicted.fill_(True)
    pool.free.copy_(torch.randperm(P))
    return rows, pool


def check_cache_write(cache_write, seed, device="cpu"):
    """125 random steps, beside the plain twin and by the rule. Page numbers may differ, since rows
    come in any order; everything else is equal."""
    rng = random.Random(seed)
    B = rng.randint(1, 2)
    heads = rng.randint(1, 2)
    N = B * heads
    W = (1, 2, 3, rng.randint(4, 20))[seed // 2 % 4]
    shift = seed % 2
    page_size = 2 ** rng.randrange(5)
    D = rng.choice([2, 6, 8])
    rate = rng.choice([0.3, 0.9])
    columns = max(2, 40 // page_size)
    rows, pool = empty_cache(N, D, W, page_size, columns, device=device)
    plain_rows, plain_pool = copy.deepcopy((rows, pool))
    plain_rows.table.fill_(0)  # unlike a kernel it loads, but does not use, such pages
    said = [[] for _ in range(N)]  # at each token
    for _ in range(125):
        for b in range(B):
            of_b = slice(b * heads, (b + 1) * heads)
            is_full = int(rows.length[0, of_b].max()) == columns * page_size
            if is_full or rng.random() < 0.01:  # it ends
                for r, p in ((rows, pool), (plain_rows, plain_pool)):
                    r.length[0, of_b] = 0
                    r.ring[0, of_b] = NOWHERE
                    r.seen[of_b] = 0
                    p.free_all_but(r.pages_in_use(page_size))
                rows.table[0, of_b] = NOWHERE
                said[of_b] = [[] for _ in range(heads)]
        is_fed = [rng.random() < 0.9 for _ in range(B)]
        new = torch.tensor(is_fed, device=device).long().repeat_interleave(heads)
        evict = torch.tensor([rng.random() < rate for _ in range(N)], device=device)
        k = torch.zeros(N, D, device=device)
        k[:, 0] = torch.arange(N)  # each token's k says whose it is
        k[:, 1] = rows.seen
        cache_write(k, -k, evict, new, rows.layer(0), pool, shift)
        cache_write_plain(k, -k, evict, new, plain_rows.layer(0), plain_pool, shift)
        rows.seen += new
        plain_rows.seen += new
        assert torch.equal(rows.length, plain_rows.length)
        assert torch.equal(rows.ring, plain_rows.ring)
        assert torch.equal(pool.free_count, plain_pool.free_count)
        for row in range(N):
            if new[row]:
                said[row].append(bool(evict[row]))
            held, decided = rule(torch.tensor(said[row], dtype=torch.bool), shift, W - 1)
            for r, p in ((rows, pool), (plain_rows, plain_pool)):
                position, k, v, evicted = held_by(r.layer(0), p, row)
                assert position.tolist() == held
                assert k[:, :2].tolist() == [[row, j] for j in held]
                assert torch.equal(k, -v)
                assert evicted.tolist() == decided
        pages = pool.free[:int(pool.free_count)].tolist() + rows.pages_in_use(page_size).tolist()
        assert sorted(pages) == list(range(len(pool)))  # each is free or some row's, once


def check_what_is_stored(cache_write, dtype, D, device="cpu"):
    """It is bit for bit what was given, and nothing beside it is touched."""
    rows, pool = empty_cache(6, D, W=4, page_size=4, columns=2, dtype=dtype, device=device)
    k, v = torch.randn(2, 6, D).to(dtype).to(device)
    evict = torch.ones(6, dtype=torch.bool, device=device)
    new = torch.tensor([1, 1, 1, 0, 0, 0], device=device)
    cache_write(k, v, evict, new, rows.layer(0), pool, 0)
    page = rows.table[0, :3, 0].long()
    assert torch.equal(pool.keys[page, 0], k[:3])
    assert torch.equal(pool.values[page, 0], v[:3])
    assert not pool.position[page, 0].any()
    for slots in (pool.keys, pool.values):
        assert int((~slots.isnan()).sum()) == 3 * D
    assert int((pool.position != NOWHERE).sum()) == 3
    assert rows.length.tolist() == [[1, 1, 1, 0, 0, 0]]
    assert (rows.table[0, 3:] == NOWHERE).all()
    assert (rows.ring[0, 3:] == NOWHERE).all()


def held_pairs(lengths, G, D, page_size, dtype, seed, device="cpu"):
    """Arguments of decode_attention, on `device`: pages in random places, NaN in every slot that is
    not in use, and no index in the table where there is no page."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    integers = (torch.int32, torch.int64)  # a GPU compiles for each: one to these sizes
    of_length = integers[(G + D // 8) % 2]
    of_table = integers[page_size.bit_length() % 2]
    counts = [-(-n // page_size) for n in lengths]
    pages = sum(counts) + 3
    free = rng.sample(range(pages), pages)
    columns = max(counts) + rng.randrange(3)
    wider = columns + rng.randrange(3)
    table = torch.full((len(lengths), wider), NOWHERE, dtype=of_table)
    k_pages, v_pages = torch.full((2, pages, page_size, D), math.nan, dtype=dtype)
    for row, (n, count) in enumerate(zip(lengths, counts)):
        table[row, :count] = torch.tensor([free.pop() for _ in range(count)])
        slot = torch.arange(n)
        where = (table[row, slot // page_size], slot % page_size)
        for slots in (k_pages, v_pages):
            slots[where] = torch.randn(n, D, generator=generator).to(dtype)
    q = torch.randn(len(lengths), G, D, generator=generator).to(dtype)
    length = torch.tensor(lengths, dtype=of_length)
    arguments = (q, k_pages, v_pages, table, length)
    q, k_pages, v_pages, table, length = (x.to(device) for x in arguments)
    return q, k_pages, v_pages, table[:, :columns], length


def plain_forward(folder, ids, dms=None):
    """Logits (T, V) of a checkpoint with plain RoPE, read and computed with none of the project's
    code: one head, one query, one complex pair of channels at a time where that is what the
    definition says; and decisions (L, Hkv, T). dms: None, or window, scale, offset, shift, per and
    separate (an adapter; otherwise the borrowed neuron)."""
    c = json.loads((folder / "config.json").read_text())
    w = {}
    for file in folder.glob("*.safetensors"):
        w.update({k.removeprefix("model."): v.double() for k, v in load_file(file).items()})
    T = len(ids)
    C = c["hidden_size"]
    eps = c["rms_norm_eps"]
    heads = c["num_attention_heads"]
    kv_heads = c["num_key_value_heads"]
    D = c.get("head_dim") or C // heads
    theta = c.get("rope_theta") or c["rope_parameters"]["rope_theta"]

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    def rotate(x):  # (T, D): channels i and i + D/2 as a complex number, by t theta^(-2i/D)
        z = torch.complex(x[:, :D // 2], x[:, D // 2:])
        angle = torch.arange(T)[:, None] * theta ** (-2 * torch.arange(D // 2).double() / D)
        z = z * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((z.real, z.imag), -1)

    borrowed = []  # query heads
    if dms and not dms["separate"]:
        borrowed = [h * heads // kv_heads for h in range(kv_heads)]
    x = w["embed_tokens.weight"][ids]
    decided = []
    for layer in range(c["num_hidden_layers"]):
        prefix = f"layers.{layer}."
        p = {k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)}

        def linear(x, name):
            y = x @ p[name + ".weight"].T
            return y + p[name + ".bias"] if name + ".bias" in p else y

        h = norm(x, p["input_layernorm.weight"])
        q, k, v = (linear(h, f"self_attn.{n}_proj").view(T, -1, D) for n in "qkv")
        if "self_attn.q_norm.weight" in p:
            q = norm(q, p["self_attn.q_norm.weight"])
            k = norm(k, p["self_attn.k_norm.weight"])
        evict = torch.zeros(kv_heads, T, dtype=torch.bool)
        if dms:
            if dms["separate"]:
                h = norm(x, p["self_attn.dms_proj_alpha_norm.weight"])
                s = linear(h, "self_attn.dms_proj_alpha")
            else:
                s = torch.stack([q[:, head, D - 1] for head in borrowed], -1)
            z = dms["scale"] * s - dms["offset"]
            for g in range(kv_heads):
                for t in range(T - dms["shift"]):
                    evict[g, t] = z[t + dms["shift"], 0 if dms["per"] == "layer" else g] > 0
        decided.append(evict)
        out = torch.zeros(T, heads, D, dtype=torch.float64)
        for head in range(heads):
            g = head * kv_heads // heads
            query = q[:, head].clone()
            if head in borrowed:
                query[:, D - 1] = 0
            query = rotate(query)
            if head in borrowed:
                query[:, D - 1] = 0
            scores = query @ rotate(k[:, g]).T / math.sqrt(D)
            for i in range(T):
                seen = [j for j in range(i + 1) if not evict[g, j] or i - j <= dms["window"]]
                out[i, head] = torch.softmax(scores[i, seen], 0) @ v[seen, g]
        x = x + linear(out.view(T, -1), "self_attn.o_proj")
        h = norm(x, p["post_attention_layernorm.weight"])
        gate = linear(h, "mlp.gate_proj")
        gate = gate * torch.sigmoid(gate)
        x = x + linear(gate * linear(h, "mlp.up_proj"), "mlp.down_proj")
    head = w.get("lm_head.weight", w["embed_tokens.weight"])
    return (norm(x, w["norm.weight"]) @ head.T).float(), torch.stack(decided)


# ------------------------------------------------------------------------------ Compiling for a GPU


def launched(module, launcher, *arguments):
    """With what `launcher` launches the kernels of `module`, given tensors without memory: for each
    kernel's name, the (arguments, options) of its launches in their order."""
    calls = {}

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            record = calls.setdefault(self.name, [])
            return lambda *values, **options: record.append((values, options))

    with pytest.MonkeyPatch.context() as patch:
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.runtime.jit.JITFunction):
                patch.setattr(module, name, Recorder(name))
        launcher(*arguments)
    return calls


TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
    int: "i32",
    float: "fp32",
}


def compiled(kernel, values, options, arch):
    """The kernel as the JIT would compile it for these arguments: pointers and integers divisible
    by 16 are known to be, unless the kernel says otherwise."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    constants = {name: value for name, value in options.items() if name in names}
    options = {name: value for name, value in options.items() if name not in names}
    signature = dict.fromkeys(names, "constexpr")
    hints = {}
    for i, (name, value) in enumerate(zip(names, values)):
        is_pointer = isinstance(value, torch.Tensor)
        signature[name] = TYPES[value.dtype if is_pointer else type(value)]
        is_special = isinstance(value, int) and not kernel.params[i].do_not_specialize
        if is_pointer or is_special and value % 16 == 0:
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
            command = [tool, "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True)
        assert re.search(r"STACK:0 .*LOCAL:0 ", usage.stdout + usage.stderr), usage


def pointer(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")
