"""What several test files need: small random models, dense and DMS, that decide at random but
reproducibly; a random life of a cache, and what each of its rows must hold; how Triton's kernels
run without a GPU, and how they are compiled for one."""
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
from dms import DMSConfig, attention, visible  # noqa: E402
from kv_cache import CacheFull  # noqa: E402
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
    run = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", file,
                         "-k", names], cwd=REPOSITORY, env={**os.environ, "TRITON_INTERPRET": "1"},
                         text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert run.returncode == 0, run.stdout


# ------------------------------------------------------------------------------------ Small models

SLOT = 2 * 8 * 4 + 5  # bytes: k and v of 8 float32 each, a position and a decision


EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=12)
LATENT = dict(num_experts_per_tok=2, moe_intermediate_size=12, n_routed_experts=6,
              n_shared_experts=2, first_k_dense_replace=1, num_key_value_heads=4, kv_lora_rank=16,
              q_lora_rank=None, qk_nope_head_dim=12, head_dim=8, qk_rope_head_dim=8, v_head_dim=10)
GROUPS = dict(n_group=3, topk_group=2, q_lora_rank=20, routed_scaling_factor=1.5)
OTHERS = {  # families of another build than Qwen3's: what they add to small_config
    "qwen3_moe": dict(EXPERTS, norm_topk_prob=True), "deepseek_v2": LATENT,
    "deepseek_v3": {**LATENT, **GROUPS, "norm_topk_prob": True},
}


def small_config(**changes):
    settings = dict(model_type="qwen3", vocab_size=67, hidden_size=32, intermediate_size=48,
                    head_dim=8, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                    max_position_embeddings=512, tie_word_embeddings=True)
    return ModelConfig(**{**settings, **OTHERS.get(changes.get("model_type"), {}), **changes})


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
    shift = rng.choice([0, 1])
    return DMSConfig(
        window=rng.choice([shift, 1, 2, 3, 7, 16, 40]), shift=shift,
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


def everything(cache):
    """All that a cache holds, to the bit, and has counted."""
    pool = cache.pool
    rows = vars(cache.rows)
    pages = rows["table"][cache.rows.pages_in_use(pool.page_size)]
    tensors = (*(rows | {"table": pages}).values(), *pool.slots, pool.free[: pool.free_count])
    return [x.cpu().numpy().tobytes() for x in tensors], cache.stats()


class Life:
    """A batch whose sequences begin, grow, fork and end at random, in several caches of equal pools
    at once. The whole history (k, v, said, each (L, H, T, ...)) of every sequence is kept, from
    which follows all that must be found."""

    def __init__(self, seed, layers=2, device="cpu"):
        rng = self.rng = random.Random(seed)
        torch.manual_seed(seed)
        settings = DMSConfig(window=rng.choice([seed % 2, 1, 2, 3, 7, 20]), shift=seed % 2)
        self.dms = settings if seed % 5 else None
        self.window, self.shift = (settings.window, settings.shift) if self.dms else (0, 0)
        self.rate = rng.choice([0.1, 0.5, 0.9])  # of eviction
        self.layers, self.device = layers, device
        self.settings = dict(
            config=small_config(dms=self.dms, num_hidden_layers=layers), batch_size=3,
            device=device, page_size=rng.choice([1, 2, 4, 8]), chunk=rng.choice([3, 8, 512]),
            memory=rng.choice([100, 400, 2000]) * SLOT)
        nothing = torch.zeros(layers, 2, 0, 8)
        self.nothing = (nothing, nothing, nothing[..., 0] > 0)
        self.history = [self.nothing] * 3
        self.is_disturbed = False  # by CacheFull or an interruption
        self.ended_tokens = self.ended_pairs = 0

    def held(self, history):
        return [rule(at, self.shift, self.window) for at in history[2].flatten(0, 1)]

    def pages(self, history):
        return sum(-(-len(held) // self.settings["page_size"]) for held, _ in self.held(history))

    def end(self, sequences):
        """Count what ends, and forget it."""
        for b in sequences:
            self.ended_tokens += self.history[b][2].shape[2]
            self.ended_pairs += sum(len(position) for position, _ in self.held(self.history[b]))
            self.history[b] = self.nothing

    def step(self, *caches):
        rng = self.rng
        B = len(self.history)
        action = rng.random()
        long = [b for b in range(B) if self.history[b][2].shape[2] > 70]
        if action < 0.06 or long:
            ended = long or [b for b in range(B) if rng.random() < 0.4]
            self.end(ended)
            for cache in caches:
                cache.release(ended)
        elif action < 0.14:
            self.fork(caches, rng.choices(range(B), k=rng.choice([B, B, rng.randint(1, 5)])))
        elif action < 0.3:
            T = rng.choice([1, 1, 5, 20])
            self.append(caches, T, [T], [rng.randrange(B)])
        else:
            T = rng.choice([1] * 9 + [3, 14])
            lengths = [rng.randint(0, T) if rng.random() < 0.3 else T for _ in range(B)]
            self.append(caches, T, lengths, range(B))

    def fork(self, caches, chosen):
        before = [everything(cache) for cache in caches]
        try:
            for cache in caches:
                cache.select(chosen)
        except CacheFull:  # in all, or they differ from now on
            assert [everything(cache) for cache in caches] == before
            return
        self.end(set(range(len(self.history))) - set(chosen))
        self.history = [self.history[b] for b in chosen]

    def append(self, caches, T, lengths, sequences):
        """Append random tokens. It takes the pages that the rule asks for, not one more. Whatever
        interrupts it releases its sequences, but CacheFull for single tokens changes nothing."""
        L, n = self.layers, len(lengths)
        q = torch.randn(L, n, 4, T, 8)
        k, v = torch.randn(2, L, n, 2, T, 8)
        logits = (self.rate if self.dms else 0) - torch.rand(L, n, 2, T)
        after = []
        needed = 0
        for i, b in enumerate(sequences):
            new = (x[:, i, :, : lengths[i]] for x in (k, v, logits > 0))
            after.append([torch.cat(pair, 2) for pair in zip(self.history[b], new)])
            needed += self.pages(after[i]) - self.pages(self.history[b])
        fits = needed <= caches[0].pool.free_count
        can_break = T > 1 or n < len(self.history)
        accident = can_break and self.rng.random() < 0.1 and self.rng.randrange(L * T + 1)
        inputs = [x.to(self.device) for x in (q, k, v, logits[..., None])]
        outputs = []
        for cache in caches:
            before = everything(cache) if T == 1 else None
            is_step = T == 1 and n == len(self.history) and cache is caches[-1]
            try:
                outputs.append(self.run(cache, lengths, sequences, inputs, accident, is_step))
            except CacheFull:
                assert not fits
                assert T > 1 or everything(cache) == before
                accident = False
            except KeyboardInterrupt:
                pass
        assert len(outputs) in (0, len(caches))
        if not outputs:
            self.is_disturbed = True
            if T > 1 or accident:
                self.end(b for b, length in zip(sequences, lengths) if length > 0)
            return
        assert fits
        for i, b in enumerate(sequences):
            self.history[b] = after[i]
            for layer in range(L):
                real = (layer, i, slice(None), slice(lengths[i]))
                expected = self.attention(q[real], *(x[layer] for x in after[i]))
                for y in outputs:
                    torch.testing.assert_close(y[real].cpu(), expected, atol=1e-4, rtol=1e-4)

    def run(self, cache, lengths, sequences, inputs, accident, is_step):
        """What attention gives, (L, n, Hq, T, D). is_step: append as DecodeStep does."""
        y = torch.zeros_like(inputs[0])
        ids = torch.zeros(y.shape[1], y.shape[3], dtype=torch.int64, device=self.device)
        is_alone = len(sequences) < len(self.history)
        begin = 0

        def hidden(piece, attend, start):
            nonlocal begin
            here = slice(begin, begin + piece.shape[1])
            begin = here.stop
            for layer in range(self.layers):
                if accident and self.layers * begin + layer > accident:
                    raise KeyboardInterrupt
                q, k, v, logits = (x[layer, :, :, here] for x in inputs)
                logits = logits[..., 0] if self.dms else None
                y[layer, :, :, here] = attend(layer, q, k, v, logits)
            return y[0, :, 0, here]

        if is_step:
            count = torch.tensor(lengths, device=self.device)
            cache.begin_step(count)
            with torch.inference_mode():
                cache.append_token(hidden, ids, count)
        else:
            cache.append(hidden, ids, lengths, sequences[0] if is_alone else None)
        return y

    def attention(self, q, k, v, said):
        """By the rule: q (Hq, n, D) of the last n tokens; k, v, said (H, T, ...)."""
        H, T = said.shape
        evict = torch.cat((said[:, self.shift :], torch.zeros(H, self.shift) > 0), 1)[:, :T]
        t = torch.arange(T)
        query = t[T - q.shape[1] :, None]
        mask = visible(query, t, evict[:, None], self.window).repeat_interleave(2, 0)
        return attention(q[None], k[None], v[None], mask[None])[0]

    def check(self, *caches):
        """Every row holds just what the rule leaves: pairs, positions and decisions."""
        for cache in caches:
            check_pages(cache)
            assert cache.seen.tolist() == [said.shape[2] for _, _, said in self.history]
            for b, history in enumerate(self.history):
                for row, (position, evicted) in enumerate(self.held(history)):
                    k, v = (x.flatten(0, 1)[row, position] for x in history[:2])
                    mine = held_by(cache.rows.part(row // 2), cache.pool, b * 2 + row % 2)
                    assert (mine[0].tolist(), mine[3].tolist()) == (position, evicted)
                    assert torch.equal(mine[1].cpu(), k) and torch.equal(mine[2].cpu(), v)
            stats = cache.stats()
            assert stats["pairs"] == sum(len(p) for x in self.history for p, _ in self.held(x))
            pairs = self.ended_pairs + stats["pairs"]
            tokens = self.ended_tokens + stats["tokens"]
            ratio = pairs and 2 * self.layers * tokens / pairs
            assert (stats["compression_ratio"] or 0) == pytest.approx(ratio) or self.is_disturbed


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
    free = pool.free[: pool.free_count].tolist()
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
