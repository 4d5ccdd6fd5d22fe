"""What several test files need: small random models, dense and DMS, that decide at random but
reproducibly; a random life of a cache, and what each of its rows must hold."""
import functools
import os
import random
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
from dms import DMSConfig, attention, visible  # noqa: E402
from kv_cache import CacheFull, held  # noqa: E402
from model import Model, ModelConfig  # noqa: E402

torch.set_num_threads(1)  # the models are tiny
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

close = functools.partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)
SLOT = 2 * 8 * 4 + 5  # bytes: k and v of 8 float32 each, a position and a decision
EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=12)
LATENT = dict(num_experts_per_tok=2, moe_intermediate_size=12, n_routed_experts=6,
              n_shared_experts=2, first_k_dense_replace=1, num_key_value_heads=4, kv_lora_rank=16,
              q_lora_rank=None, qk_nope_head_dim=12, head_dim=8, qk_rope_head_dim=8, v_head_dim=10)
GROUPS = dict(n_group=3, topk_group=2, q_lora_rank=20, routed_scaling_factor=1.5)
OTHERS = {  # families of another build than Qwen3's: what they add to small_config
    "qwen3_moe": dict(EXPERTS, norm_topk_prob=True), "deepseek_v2": LATENT,
    "deepseek_v3": {**LATENT, **GROUPS, "norm_topk_prob": True}}


def small_config(**changes):
    settings = dict(model_type="qwen3", vocab_size=67, hidden_size=32, intermediate_size=48,
                    head_dim=8, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                    max_position_embeddings=512, tie_word_embeddings=True)
    return ModelConfig(**{**settings, **OTHERS.get(changes.get("model_type"), {}), **changes})


def small_model(seed=0, dms=None, keep=0.5, **changes):
    """A random model in float32. keep: the fraction of tokens that it keeps, roughly."""
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


@pytest.fixture
def rng(request):
    return random.Random(request.node.name)


def random_dms(rng):
    shift = rng.choice([0, 1])
    return DMSConfig(
        window=rng.choice([shift, 1, 2, 3, 7, 16, 40]), shift=shift,
        source=rng.choice(["adapter", "neuron"]), per=rng.choice(["head", "head", "layer"]))


def rule(said, shift, window):
    """What the visibility rule leaves of T tokens: the positions held, ascending, and the decisions
    about them, two lists. said: (T,) bool, decided at each token about the one `shift` before."""
    T = len(said)
    evict = torch.zeros(T, dtype=torch.bool)
    evict[:max(T - shift, 0)] = said[shift:]
    held = visible(T - 1, torch.arange(T), evict, window).nonzero()[:, 0]
    return held.tolist(), evict[held].tolist()


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
                    close(y[real].cpu(), expected)

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
        for cache in caches:
            check_pages(cache)
            assert cache.seen.tolist() == [said.shape[2] for _, _, said in self.history]
            for b, history in enumerate(self.history):
                for row, (position, evicted) in enumerate(self.held(history)):
                    mine = held(cache.pool.slots, cache.rows.part(row // 2), b * 2 + row % 2)
                    order = mine[2].argsort()
                    k, v, *mine = (x[order].cpu() for x in mine)
                    assert [x.tolist() for x in mine] == [position, evicted]
                    assert torch.equal(k, history[0].flatten(0, 1)[row, position])
                    assert torch.equal(v, history[1].flatten(0, 1)[row, position])
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
