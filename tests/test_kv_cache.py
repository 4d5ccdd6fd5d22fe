"""The cache against the dense masked model: any cut of the input, any raggedness, any window."""
import random

import pytest
import torch
from conftest import random_dms, small_model

import dms
from dms import InputError, decisions, visible
from kv_cache import KVCache, paged_attention


def oracle(model, ids):
    """Logits (T, V) of one sequence without a cache, and the pairs that the rule leaves at its end, (L, Hkv)."""
    held = []
    masked = dms.masked_attention(model.config)

    def attend(layer, q, k, v, logits):
        T = q.shape[2]
        if logits is None:
            held.append(torch.full((k.shape[1],), T))
        else:  # what a further token, at position T, could see if it evicted nothing more; the oldest has just left
            evict = decisions(logits, model.config.dms.shift)[0]
            held.append(visible(T - 1, torch.arange(T), evict, model.config.dms.window).sum(-1))
        return masked(layer, q, k, v, logits)

    logits = model.lm_head(model.hidden(ids[None], attend))[0]
    return logits, torch.stack(held)


def check_pages(cache):
    """Every page has one owner or none, and every row's table names its own pages, in order."""
    for layer in range(cache.layers):
        owner = cache.owner[layer]
        assert torch.equal((owner >= 0).nonzero()[:, 0][-1:] + 1, torch.tensor([cache.used[layer]] * (owner >= 0).any()))
        for row in range(cache.length.shape[1]):
            pages = cache.table[layer][row, :cache.pages[layer, row]]
            assert len(pages) == -(-int(cache.length[layer, row]) // cache.page_size)
            assert (owner[pages] == row).all() and int((owner == row).sum()) == len(pages)
            assert cache.ordinal[layer][pages].tolist() == list(range(len(pages)))


@pytest.mark.parametrize("seed", range(120))
def test_any_cut_equals_dense_masked_model(seed):
    rng = random.Random(seed)
    config = random_dms(rng) if seed % 6 else None
    model = small_model(seed, config, rng.choice([0.1, 0.5, 0.9]), num_key_value_heads=rng.choice([1, 2, 4]))
    B, longest = rng.choice([1, 2, 4]), rng.choice([3, 20, 60, 120])
    lengths = [rng.randint(1, longest) for _ in range(B)]
    ids = torch.randint(0, 67, (B, longest), generator=torch.Generator().manual_seed(seed))
    cache = KVCache(model.config, B, page_size=rng.choice([1, 2, 4, 16]), chunk=rng.choice([1, 5, 32, 512]))
    pieces, fed = [[] for _ in range(B)], [0] * B
    largest = rng.choice([1, 4, 30, 200])
    while fed != lengths:
        step = [min(rng.choice([0, 1, rng.randint(0, largest)]), n - f) for n, f in zip(lengths, fed)]
        T = max(step) + rng.choice([0, 0, 2])
        if T == 0:
            continue
        rows = torch.randint(0, 67, (B, T))  # padding is arbitrary
        for b in range(B):
            rows[b, :step[b]] = ids[b, fed[b]:fed[b] + step[b]]
        logits = model(rows, cache=cache, lengths=torch.tensor(step))
        for b in range(B):
            pieces[b].append(logits[b, :step[b]])
            fed[b] += step[b]
        check_pages(cache)
    for b in range(B):
        expected, held = oracle(model, ids[b, :lengths[b]])
        torch.testing.assert_close(torch.cat(pieces[b]), expected, atol=1e-4, rtol=1e-4)
        H = model.config.num_key_value_heads
        assert torch.equal(cache.length.view(cache.layers, B, H)[:, b], held)
    cache.release(range(B))
    assert cache.stats()["pages"] == 0 and all((owner < 0).all() for owner in cache.owner)
