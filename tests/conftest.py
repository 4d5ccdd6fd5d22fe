"""
What several test files need: small random models, dense and DMS, that decide at random but
reproducibly; a random life of a cache, and what each of its rows must hold; how Triton's kernels
run without a GPU, and how they are compiled for one.
"""
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

try:
    import triton
except ImportError:  # it has no wheel for this platform
    triton = None

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
from dms import DMSConfig, visible  # noqa: E402
from model import Model, ModelConfig  # noqa: E402

torch.set_num_threads(1)  # the models are tiny

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
HAS_LAUNCHES = triton is not None and (DEVICE == "cuda" or INTERPRETED)
launches = pytest.mark.skipif(not HAS_LAUNCHES, reason="test_interpreter runs it")
compiles = pytest.mark.skipif(triton is None or INTERPRETED, reason="nothing is compiled here")


def run_interpreted(file, names):
    """Run a file's tests whose names match under Triton's interpreter. It takes a process of its
    own, since Triton decides as it is imported."""
    import numpy

    is_old = [int(x) for x in triton.__version__.split(".")[:2]] < [3, 7]
    if is_old and numpy.__version__ >= "2.4":
        pytest.skip("this triton's interpreter needs numpy < 2.4 (triton-lang/triton#9171)")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", file, "-k", names],
        cwd=REPOSITORY, env={**os.environ, "TRITON_INTERPRET": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert run.returncode == 0, run.stdout


# ------------------------------------------------------------------------------------ Small models


def small_config(**changes):
    settings = dict(
        model_type="qwen3", vocab_size=67, hidden_size=32, intermediate_size=48, head_dim=8,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, tie_word_embeddings=True)
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
        window=rng.choice([0, 1, 2, 3, 7, 16, 40]), shift=rng.choice([0, 1]),
        source=rng.choice(["adapter", "neuron"]), per=rng.choice(["head", "head", "layer"]))


# -------------------------------------------------------------------------- What a cache must hold


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
    slot = torch.arange(int(rows.length[row]), device=rows.length.device)
    page = rows.table[row, slot // pool.page_size].long()
    place = slot % pool.page_size
    position, order = pool.position[page, place].sort()
    by_position = [x[page, place][order] for x in (pool.keys, pool.values, pool.evicted)]
    return position, *by_position


class Life:
    """A batch whose sequences begin, grow by one token or many, fork and end at random, in several
    caches at once, and what each of their rows must hold by the rule. A token's k is its own
    number, so that pairs tell whose they are."""

    def __init__(self, seed, layers=2, device="cpu"):
        rng = self.rng = random.Random(seed)
        self.device = device
        self.shape = (layers, 2, 8)  # L, Hkv, D
        self.dms = None
        if seed % 4:
            self.dms = DMSConfig(window=rng.choice([0, 1, 3, 12]), shift=rng.choice([0, 1]))
        self.settings = dict(config=small_config(dms=self.dms, num_hidden_layers=layers),
                             batch_size=3, page_size=rng.choice([1, 2, 4, 8]), device=device)
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
                self.tokens[b], self.flags[b] = [], []
        elif action < 0.08:
            chosen = rng.choices(range(B), k=rng.choice([B, B, rng.randint(1, 4)]))
            for cache in caches:
                cache.select(chosen)
            self.tokens = [list(self.tokens[b]) for b in chosen]
            self.flags = [list(self.flags[b]) for b in chosen]
        elif action < 0.14:  # one sequence alone
            T = rng.choice([1, 5, 20])
            self.append(caches, T, [T], sequence=rng.randrange(B))
        else:
            T = rng.choice([1] * 9 + [3])
            lengths = [rng.randint(0, T) if rng.random() < 0.2 else T for _ in range(B)]
            self.append(caches, T, lengths)

    def append(self, caches, T, lengths, sequence=None):
        L, H, D = self.shape
        n = len(lengths)
        flags = torch.rand(L, n, H, T, generator=self.generator) < self.rate
        token = self.count + torch.arange(n * T, dtype=torch.float32).view(n, 1, T, 1)
        self.count = (self.count + n * T) % 2**20  # so that float32 counts exactly
        q = torch.randn(L, n, 2 * H, T, D, generator=self.generator).to(self.device) * 1e-3
        k = token.expand(n, H, T, D).contiguous().to(self.device)
        logits = (flags.float() - 0.5).to(self.device)
        ids = torch.zeros(n, T, dtype=torch.int64, device=self.device)
        outputs = []
        for cache in caches:
            with torch.inference_mode(), cache.append(ids, lengths, sequence) as pieces:
                for _, attend in pieces:  # there is one
                    said = logits if self.dms else [None] * L
                    outputs.append([attend(i, q[i], k, -k, said[i]) for i in range(L)])
        for i, b in enumerate(range(n) if sequence is None else [sequence]):
            real = slice(lengths[i])
            real_outputs = [[y[i, :, real] for y in by_layer] for by_layer in outputs]
            for other in real_outputs:
                torch.testing.assert_close(other, real_outputs[0])
            self.tokens[b] += token[i, 0, real, 0].tolist()
            self.flags[b] += flags[:, i, :, real].permute(2, 0, 1)

    def check(self, cache):
        """Every row holds exactly the tokens that the rule leaves, and knows each one's position
        and what was decided about it. With a shift of 1 nothing is decided about the newest yet."""
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
    """Every page is free, or in the table of a row that needs it, not both. Only forks share pages,
    in the same place of their tables, and only those that none of them will ever write to."""
    rows, pool, W = cache.rows, cache.pool, cache.window + 1
    taken = set()
    for layer in range(cache.layers):
        owners = {}  # page: [(its place in a row's table, whether the row may still write to it)]
        for row, length in enumerate(rows.length[layer].tolist()):
            seen = int(rows.seen[row])
            pages = rows.table[layer, row, :-(-length // pool.page_size)].tolist()
            written = {length // pool.page_size} if length % pool.page_size else set()
            for t in range(max(seen - W, 0), seen):
                slot = int(rows.ring[layer, row, t % W])
                place = slot // pool.page_size
                undecided = cache.shift == 1 and t == seen - 1
                if undecided or pool.evicted[pages[place], slot % pool.page_size]:
                    written.add(place)
            for place, page in enumerate(pages):
                owners.setdefault(page, []).append((place, place in written))
        assert not taken & set(owners)
        taken |= set(owners)
        assert all(len(x) == 1 or set(x) == {(x[0][0], False)} for x in owners.values())
    free = pool.free[:int(pool.free_count)].tolist()
    assert sorted([*free, *taken]) == list(range(len(pool)))


# ------------------------------------------------------------------------------ Compiling for a GPU


def pointer(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def launched(module, launcher, *arguments):
    """What `launcher` launches of a module's kernels, given tensors without memory: for each
    kernel's name the (arguments, options) of its launches, in order."""
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


TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
         torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1", int: "i32", float: "fp32"}


def compiled(kernel, values, options, arch):
    """The kernel as the JIT would compile it for these arguments. It knows of pointers and integers
    that are divisible by 16, unless the kernel says otherwise."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    options = dict(options)
    names = kernel.arg_names
    constants = {name: options.pop(name) for name in names if name in options}
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


def spilled(kernel):
    """The bytes of local memory that a thread of a compiled kernel has, for registers it lacks."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    stack, local = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", usage.stdout + usage.stderr).groups()
    return int(stack) + int(local)
