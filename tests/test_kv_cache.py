"""
The cache against the dense masked computation: whatever the cut of the input, raggedness, forks
and releases, attention is each sequence's alone under the rule, and rows hold what the rule leaves.
"""

import functools
import random
from contextlib import nullcontext

import pytest
import torch
from conftest import check_pages, held_by, random_dms, rule, small_config, small_model

import dms
import kv_cache
from dms import DMSConfig
from kv_cache import PLAIN, CacheFull, KVCache

SLOT = 2 * 8 * 4 + 5  # bytes: k and v of 8 float32 each, a position and a decision
close = functools.partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)


def oracle(model, ids):
    """Logits (T, V) of a sequence without a cache, and where heads say to evict, (L, H, T) bool."""
    said = []
    masked = dms.masked_attention(model.config)

    def attend(layer, q, k, v, logits):
        said.append(torch.zeros(k.shape[1:3]) > 0 if logits is None else logits[0] > 0)
        return masked(layer, q, k, v, logits)

    logits = model.lm_head(model.hidden(ids[None], attend))[0]
    return logits, torch.stack(said)


def check_held(cache, sequence, said):
    """The sequence's rows hold just the positions that the rule leaves."""
    for layer, heads in enumerate(said):
        for h, at in enumerate(heads):
            held, _ = rule(at, cache.shift, cache.window)
            assert cache.positions(sequence, layer, h).tolist() == held


def everything(cache):
    """All that a cache holds, to the bit, and has counted."""
    pool = cache.pool
    tensors = (*vars(cache.rows).values(), *pool.slots, pool.free, pool.free_count)
    return [x.numpy().tobytes() for x in tensors], cache.stats()


class Life:
    """A batch whose sequences begin, grow, fork and end at random in two caches of equal pools: one
    plain, one with kernels, each with its own chunk. The whole history (k, v, said, each (L, H, T,
    ...)) of every sequence is kept, from which follows all that must be found."""

    def __init__(self, seed):
        rng = self.rng = random.Random(seed)
        torch.manual_seed(seed)
        settings = DMSConfig(window=rng.choice([0, 1, 2, 3, 7, 20]), shift=seed % 2)
        self.dms = settings if seed % 5 else None
        self.rate = rng.choice([0.1, 0.5, 0.9])  # of eviction
        self.page_size = rng.choice([1, 2, 4, 8])
        settings = dict(page_size=self.page_size, memory=rng.choice([100, 400, 2000]) * SLOT)
        chunks = [rng.choice([3, 8, 512]) for _ in range(2)]
        config = small_config(dms=self.dms)
        self.caches = [KVCache(config, 3, chunk=chunk, **settings) for chunk in chunks]
        self.caches[0].kernels = PLAIN
        for cache in self.caches:  # slots that are not in use must not be read
            cache.pool.keys.fill_(torch.nan)
            cache.pool.values.fill_(torch.nan)
            cache.pool.position.fill_(0)
        self.shift, self.window = self.caches[0].shift, self.caches[0].window
        nothing = torch.zeros(2, 2, 0, 8)
        self.nothing = (nothing, nothing, nothing[..., 0] > 0)
        self.history = [self.nothing] * 3
        self.is_disturbed = False  # by CacheFull or an interruption
        self.ended_tokens = self.ended_pairs = 0

    def held(self, history):
        return [rule(at, self.shift, self.window) for at in history[2].flatten(0, 1)]

    def pages(self, history):
        return sum(-(-len(held) // self.page_size) for held, _ in self.held(history))

    def end(self, sequences):
        """Count what ends, and forget it."""
        for b in sequences:
            self.ended_tokens += self.history[b][2].shape[2]
            self.ended_pairs += sum(len(position) for position, _ in self.held(self.history[b]))
            self.history[b] = self.nothing

    def step(self):
        rng = self.rng
        B = len(self.history)
        action = rng.random()
        long = [b for b in range(B) if self.history[b][2].shape[2] > 70]
        if action < 0.06 or long:
            ended = long or [b for b in range(B) if rng.random() < 0.4]
            self.end(ended)
            for cache in self.caches:
                cache.release(b for b in ended)
        elif action < 0.14:
            self.fork([rng.randrange(B) for _ in range(rng.choice([B, B, rng.randint(1, 5)]))])
        elif action < 0.3:
            T = rng.choice([1, 1, 5, 20])
            self.append(T, [T], [rng.randrange(B)])
        else:
            T = rng.choice([1] * 9 + [3, 14])
            lengths = [rng.randint(0, T) if rng.random() < 0.3 else T for _ in range(B)]
            self.append(T, lengths, range(B))

    def fork(self, chosen):
        before = [everything(cache) for cache in self.caches]
        try:
            self.caches[0].select(chosen)
            self.caches[1].select(chosen)
        except CacheFull:  # in both, or they differ from now on
            assert [everything(cache) for cache in self.caches] == before
            return
        self.end(set(range(len(self.history))) - set(chosen))
        self.history = [self.history[b] for b in chosen]

    def append(self, T, lengths, sequences):
        """Append random tokens. It takes the pages that the rule asks for, not one more. Whatever
        interrupts it releases its sequences, but CacheFull for single tokens changes nothing."""
        n = len(lengths)
        q = torch.randn(2, n, 4, T, 8)
        k, v = torch.randn(2, 2, n, 2, T, 8)
        logits = (self.rate if self.dms else 0) - torch.rand(2, n, 2, T)
        after = []
        needed = 0
        for i, b in enumerate(sequences):
            new = (x[:, i, :, : lengths[i]] for x in (k, v, logits > 0))
            after.append([torch.cat(pair, 2) for pair in zip(self.history[b], new)])
            needed += self.pages(after[i]) - self.pages(self.history[b])
        fits = needed <= int(self.caches[0].pool.free_count)
        can_break = T > 1 or n < len(self.history)
        accident = can_break and self.rng.random() < 0.1 and self.rng.randrange(2 * T + 1)
        inputs = (q, k, v, logits[..., None])
        outputs = []
        for cache in self.caches:
            before = everything(cache) if T == 1 else None
            try:
                outputs.append(self.run(cache, lengths, sequences, inputs, accident))
            except CacheFull:
                # with shift 1 and window 0 reserve may ask for a page too many, as is said there
                assert not fits or (T, self.shift, self.window) == (1, 1, 0)
                assert T > 1 or everything(cache) == before
                accident = False
            except KeyboardInterrupt:
                pass
        assert len(outputs) in (0, 2)
        if not outputs:
            self.is_disturbed = True
            if T > 1 or accident:
                self.end(b for b, length in zip(sequences, lengths) if length > 0)
            return
        assert fits
        for i, b in enumerate(sequences):
            self.history[b] = after[i]
            for layer in range(2):
                real = (layer, i, slice(None), slice(lengths[i]))
                expected = self.attention(q[real], *(x[layer] for x in after[i]))
                for y in outputs:
                    close(y[real], expected)

    def run(self, cache, lengths, sequences, inputs, accident):
        """What attention gives, (L, n, Hq, T, D). One cache takes a token as DecodeStep does."""
        y = torch.zeros_like(inputs[0])
        ids = torch.zeros(y.shape[1], y.shape[3], dtype=torch.int64)
        is_alone = len(sequences) < len(self.history)
        append = cache.append(ids, lengths, sequences[0] if is_alone else None)
        if ids.shape[1] == 1 and not is_alone and cache is self.caches[1]:
            count = torch.tensor(lengths)
            cache.reserve(count)
            append = nullcontext(cache.pieces(ids, count))
        with torch.inference_mode(), append as pieces:
            begin = 0
            for piece, attend in pieces:
                here = slice(begin, begin + piece.shape[1])
                begin = here.stop
                for layer in range(2):
                    if accident and 2 * begin + layer > accident:
                        raise KeyboardInterrupt
                    q, k, v, logits = (x[layer, :, :, here] for x in inputs)
                    logits = logits[..., 0] if self.dms else None
                    y[layer, :, :, here] = attend(layer, q, k, v, logits)
        return y

    def attention(self, q, k, v, said):
        """By the rule: q (Hq, n, D) of the last n tokens; k, v, said (H, T, ...)."""
        H, T = said.shape
        evict = torch.cat((said[:, self.shift :], torch.zeros(H, self.shift) > 0), 1)[:, :T]
        t = torch.arange(T)
        query = t[T - q.shape[1] :, None]
        mask = dms.visible(query, t, evict[:, None], self.window).repeat_interleave(2, 0)
        return dms.attention(q[None], k[None], v[None], mask[None])[0]

    def check(self):
        for cache in self.caches:
            check_pages(cache)
            assert cache.seen.tolist() == [said.shape[2] for _, _, said in self.history]
            for b, history in enumerate(self.history):
                for row, (position, evicted) in enumerate(self.held(history)):
                    k, v = (x.flatten(0, 1)[row, position] for x in history[:2])
                    mine = held_by(cache.rows.layer(row // 2), cache.pool, b * 2 + row % 2)
                    assert (mine[0].tolist(), mine[3].tolist()) == (position, evicted)
                    assert torch.equal(mine[1], k) and torch.equal(mine[2], v)
            stats = cache.stats()
            assert stats["pairs"] == sum(len(p) for x in self.history for p, _ in self.held(x))
            pairs = self.ended_pairs + stats["pairs"]
            ratio = pairs and 4 * (self.ended_tokens + stats["tokens"]) / pairs
            assert (stats["compression_ratio"] or 0) == pytest.approx(ratio) or self.is_disturbed


@pytest.mark.parametrize("seed", range(25))
def test_a_random_life_of_a_batch(seed):
    life = Life(seed)
    for step in range(100):
        life.step()
        if step % 5 == 4:
            life.check()


@pytest.mark.parametrize("seed", range(24))
def test_any_cut_equals_the_dense_masked_model(seed):
    rng = random.Random(seed)
    config = random_dms(rng) if seed % 6 else None
    heads = rng.choice([1, 2, 4])
    model = small_model(seed, config, rng.choice([0.1, 0.5, 0.9]), num_key_value_heads=heads)
    B = rng.choice([1, 2, 4])
    lengths = [rng.randint(1, rng.choice([3, 60, 120])) for _ in range(B)]
    ids = torch.randint(0, 67, (B, max(lengths)))
    settings = dict(page_size=rng.choice([1, 2, 4, 16]), chunk=rng.choice([1, 2, 32]))
    cache = KVCache(model.config, B, **settings)
    cache.kernels = rng.choice([PLAIN, cache.kernels])
    found = torch.zeros(*ids.shape, 67)
    largest = rng.choice([1, 4, 30, 200])
    while (seen := cache.seen.tolist()) != lengths:
        step = [rng.choice([0, 1, rng.randint(0, largest)]) for _ in range(B)]
        step = [min(n, length - at) for n, length, at in zip(step, lengths, seen)]
        new = torch.randint(0, 67, (B, max(*step, rng.choice([1, 3]))))  # padding is arbitrary
        parts = [slice(at, at + n) for at, n in zip(seen, step)]
        for b, part in enumerate(parts):
            new[b, : step[b]] = ids[b, part]
        logits = model(new, cache=cache, lengths=step)
        for b, part in enumerate(parts):
            found[b, part] = logits[b, : step[b]]
    for b, length in enumerate(lengths):
        expected, said = oracle(model, ids[b, :length])
        close(found[b, :length], expected)
        check_held(cache, b, said)


@pytest.mark.parametrize("shift", [0, 1])
def test_a_token_that_reuses_a_slot_needs_no_page(shift):
    model = small_model(0, DMSConfig(window=3, shift=shift))
    model.config.dms.offset = -1e6
    cache = KVCache(model.config, 1, page_size=4, memory=6 * 4 * SLOT)
    for _ in range(20):  # all is evicted: the window fills the one page of each of four rows
        model(torch.randint(0, 67, (1, 1)), cache=cache)
    assert cache.stats()["pages"] == 4 and cache.stats()["pairs"] == 16


def test_forks_share_all_full_pages():
    model = small_model(0)
    cache = KVCache(model.config, 1, page_size=16)
    model(torch.randint(0, 67, (1, 200)), cache=cache)
    assert cache.stats()["pages"] == 2 * 2 * 13  # layers, heads, pages of a row
    cache.select([0] * 5)
    stats = cache.stats()
    assert stats["pages"] == 2 * 2 * (12 + 5)
    assert stats["peak_page_bytes"] == stats["page_bytes"] == stats["pages"] * 16 * SLOT


def test_bytes_fall_with_compression_and_what_is_counted_is_what_is_stored():
    """At 8x over 2,048 tokens, with heads that keep very different shares, pages take at most a
    sixth of a dense cache's bytes."""
    cache = KVCache(small_config(num_key_value_heads=4, dms=DMSConfig(window=16)), 1)
    x = torch.randn(1, 4, 256, 8)
    keep, reads = torch.tensor([0.02, 0.05, 0.1, 0.3])[:, None], 0
    for T in [256] * 8 + [1] * 5:
        before = cache.stats()["pairs"]
        with cache.append(torch.zeros(1, T, dtype=torch.int64)) as pieces:
            for _, attend in pieces:
                for layer in range(2):
                    attend(layer, *[x[:, :, :T]] * 3, torch.rand(1, 4, T) - keep)
        reads += cache.stats()["pairs"] if T == 1 else before + 8 * T
    stats = cache.stats()
    assert 7 < stats["compression_ratio"] < 9 and 6 * stats["page_bytes"] <= 2048 * 8 * SLOT
    assert stats["peak_pairs"] == stats["pairs"] == sum(map(sum, stats["pairs_per_head"]))
    assert stats["reads"] == reads
    cache.release([0])
    for name in ("compression_ratio", "peak_pairs", "peak_page_bytes", "reads"):
        assert cache.stats()[name] == stats[name]


def test_the_masks_of_a_block_are_of_one_row_at_a_time(monkeypatch):
    """So a long prompt's work fits beside a small pool, whatever the batch."""
    shapes = []

    def spy(q, k, v, mask, **named):
        assert mask is None or mask.dim() == 2  # None: causal
        shapes.append(len(q))
        return torch.zeros_like(q)

    monkeypatch.setattr(dms.F, "scaled_dot_product_attention", spy)
    model = small_model(0, DMSConfig(window=3))
    model(torch.zeros(3, 20, dtype=torch.int64), cache=KVCache(model.config, 3, chunk=8))
    assert shapes == [1] * 3 * 3 * 2 * 2


@pytest.mark.parametrize("limit", ["", "max", "1000000"])
def test_usable_memory_is_the_containers_limit_if_that_is_lower(limit, monkeypatch, tmp_path):
    file = tmp_path / "memory.max"
    if limit:
        file.write_text(limit + "\n")
    monkeypatch.setattr(kv_cache, "Path", lambda path: file)
    machine = kv_cache.usable_memory(torch.device("cpu"))
    assert machine == 1e6 if limit == "1000000" else machine > 1e8
    pool = len(KVCache(small_config(max_position_embeddings=16000), 1, page_size=16).pool)
    assert pool == (4000 if limit != "1000000" else 800_000 // (16 * SLOT))


def test_misuse_is_said_and_changes_nothing():
    model = small_model(0, DMSConfig(window=3))
    cache = KVCache(model.config, 2)
    one, two = torch.tensor([[1]]), torch.tensor([[1], [2]])
    model(two, cache=cache)
    before = everything(cache)
    for message, misuse in [
        ("ids must be", lambda: model(torch.tensor([[67], [0]]), cache=cache)),
        ("ids must be", lambda: model(-one)),
        ("ids must be", lambda: model(two[:, :0], cache=cache)),
        ("must be of", lambda: model(one, cache=cache)),
        ("must be of", lambda: model(two, cache=cache, lengths=[2, 1])),
        ("must be of", lambda: model(one, cache=cache, sequence=2)),
        ("out of bounds", lambda: cache.release([2])),
        ("out of bounds", lambda: cache.select([0, 2])),
    ]:
        with pytest.raises((ValueError, IndexError), match=message):
            misuse()
    assert everything(cache) == before


@pytest.mark.parametrize("seed", range(4))
def test_a_short_soak(seed):
    from soak import live  # it imports this file

    assert live(seed)["texts compared"] > 0
