"""The cache against the dense masked computation: whatever the cut of the input, raggedness, forks
and releases, attention is each sequence's alone under the rule, and rows hold what that leaves."""
import itertools
import random
from unittest import mock

import pytest
import torch
from conftest import (OTHERS, SLOT, Life, close, everything, random_dms, rule, small_config,
                      small_model)

import dms
import kv_cache
from dms import DMSConfig
from kv_cache import PLAIN, KVCache


def oracle(model, ids, budget=None):
    """Logits (T, V) of a sequence without a cache, and where heads say to evict, (L, H, T) bool."""
    masked = dms.masked_attention(model.config)
    extra_offset, said = torch.zeros(len(ids)), []

    def attend(layer, q, k, v, logits):
        if logits is not None:
            logits = logits - extra_offset
        said.append(torch.zeros(k.shape[1:3]) > 0 if logits is None else logits[0] > 0)
        return masked(layer, q, k, v, logits)

    # with a rate each period's offset follows from what is held where it begins
    period = kv_cache.PERIOD if budget and model.config.dms else len(ids)
    for begin in range(0, len(ids), period):
        if begin:
            shift, window = model.config.dms.shift, model.config.dms.window
            rows = torch.stack(said).flatten(0, 1)[:, :begin]
            held = sum(len(rule(row, shift, window)[0]) for row in rows) / len(rows)
            W = window + 1
            keep_rate = max(budget[0] - W, 1) / max(budget[1] - W, 1)
            lacking = min(begin, W) + keep_rate * max(begin - W, 0) - held
            extra_offset[begin:] = 8 * lacking / (keep_rate * (period + W))
        said = []
        logits = model.lm_head(model.hidden(ids[None], attend))[0]
    return logits, torch.stack(said)


def check_held(cache, sequence, said):
    for layer, heads in enumerate(said):
        for h, at in enumerate(heads):
            held = cache.positions(sequence, layer, h).tolist()
            assert held == rule(at, cache.shift, cache.window)[0]


@pytest.mark.parametrize("seed", range(25))
def test_a_random_life_of_a_batch(seed):
    life = Life(seed)
    caches = [KVCache(**life.settings) for _ in range(2)]
    caches[0].kernels = PLAIN
    for cache in caches:  # slots that are not in use must not be read
        cache.pool.keys.fill_(torch.nan)
        cache.pool.values.fill_(torch.nan)
        cache.pool.position.fill_(0)
    for step in range(100):
        life.step(*caches)
        if step % 5 == 4:
            life.check(*caches)


@pytest.mark.parametrize("seed, family", [
    *((seed, "qwen3") for seed in range(24)), *itertools.product(range(25, 30), OTHERS)])
def test_any_cut_equals_the_dense_masked_model(seed, family, monkeypatch):
    monkeypatch.setattr(kv_cache, "PERIOD", 8)
    rng = random.Random(seed)
    config = random_dms(rng) if seed % 6 else None
    if "deepseek" in family:
        config.source = "adapter"
    heads = rng.choice([1, 2, 4])
    model = small_model(seed, config, rng.choice([0.1, 0.5, 0.9]), model_type=family,
                        num_key_value_heads=heads)
    B = rng.choice([1, 2, 4])
    lengths = [rng.randint(1, rng.choice([3, 60, 120])) for _ in range(B)]
    ids = torch.randint(0, 67, (B, max(lengths)))
    settings = dict(page_size=rng.choice([1, 2, 4, 16]), chunk=rng.choice([1, 2, 32]),
                    budget=rng.choice([None, (20, 60), (60, 120)]))
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
        order = rng.sample(range(B), B)
        cache.select(order)
        ids, found = ids[order], found[order]
        lengths = [lengths[b] for b in order]
    for b, length in enumerate(lengths):
        expected, said = oracle(model, ids[b, :length], settings["budget"])
        close(found[b, :length], expected)
        check_held(cache, b, said)


@pytest.mark.parametrize("family, heads, slot", [
    ("qwen3", 2, SLOT), ("deepseek_v2", 1, (16 + 8) * 4 + 5)])  # of latents one vector is stored
def test_forks_share_all_full_pages(family, heads, slot):
    model = small_model(0, model_type=family)
    cache = KVCache(model.config, 1, page_size=16)
    model(torch.randint(0, 67, (1, 200)), cache=cache)
    assert cache.stats()["pages"] == 2 * heads * 13  # layers, heads, pages of a row
    cache.select([0] * 5)
    stats = cache.stats()
    assert stats["pages"] == 2 * heads * (12 + 5)
    assert stats["peak_page_bytes"] == stats["page_bytes"] == stats["pages"] * 16 * slot


def test_a_latent_of_deepseek_v2_lite_takes_1152_bytes_a_token_and_layer():
    lite = small_config(model_type="deepseek_v2", kv_lora_rank=512, head_dim=64)
    cache = KVCache(lite, 1, dtype=torch.bfloat16, memory=1e6)
    assert cache.page_bytes == 64 * (1152 + 5)
    assert cache.pool.values.data_ptr() == cache.pool.keys.data_ptr()


def test_bytes_fall_with_compression_and_what_is_counted_is_what_is_stored():
    """At 8x, with very uneven heads, pages take at most a sixth of a dense cache's bytes."""
    cache = KVCache(small_config(num_key_value_heads=4, dms=DMSConfig(window=16)), 1)
    x = torch.randn(1, 4, 256, 8)
    keep, reads = torch.tensor([0.02, 0.05, 0.1, 0.3])[:, None], 0

    def hidden(ids, attend, start):
        for layer in range(2):
            y = attend(layer, *[x[:, :, :T]] * 3, torch.rand(1, 4, T) - keep)
        return y[:, 0]

    for T in [256] * 8 + [1] * 5:
        before = cache.stats()["pairs"]
        cache.append(hidden, torch.zeros(1, T, dtype=torch.int64))
        reads += cache.stats()["pairs"] if T == 1 else before + 8 * T
    stats = cache.stats()
    assert 7 < stats["compression_ratio"] < 9 and 6 * stats["page_bytes"] <= 2048 * 8 * SLOT
    assert stats["pairs"] == sum(map(sum, stats["pairs_per_head"]))
    assert stats["reads"] == reads
    cache.release([0])
    for name in ("compression_ratio", "peak_page_bytes", "reads"):
        assert cache.stats()[name] == stats[name]


def test_the_masks_of_a_block_are_of_one_row_at_a_time(monkeypatch):
    """So a long prompt's work fits beside a small pool, whatever the batch."""
    spy = mock.Mock(side_effect=lambda q, *others, **named: torch.zeros_like(q))
    monkeypatch.setattr(dms.F, "scaled_dot_product_attention", spy)
    model = small_model(0, DMSConfig(window=3))
    model(torch.zeros(3, 20, dtype=torch.int64), cache=KVCache(model.config, 3, chunk=8))
    shapes = [(len(q), mask.dim()) for (q, k, v, mask), _ in spy.call_args_list]
    assert shapes == [(1, 2)] * 3 * 3 * 2 * 2


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
    for message, misuse in (
            ("ids must be", lambda: model(torch.tensor([[67], [0]]), cache=cache)),
            ("ids must be", lambda: model(-one)),
            ("ids must be", lambda: model(two[:, :0], cache=cache)),
            ("2 are wanted", lambda: model(one, cache=cache)),
            ("0 to 1 tokens", lambda: model(two, cache=cache, lengths=[2, 1])),
            ("0 are wanted", lambda: model(one, cache=cache, sequence=2)),
            ("out of bounds", lambda: cache.release([2])),
            ("out of bounds", lambda: cache.select([0, 2]))):
        with pytest.raises((ValueError, IndexError), match=message):
            misuse()
    assert everything(cache) == before


@pytest.mark.parametrize("seed", range(8))
def test_a_short_soak(seed):
    from soak import Talks  # it imports this file
    assert Talks(seed).live()["texts compared"] > 0
