"""The cache against the dense masked model: any cut of the input, any raggedness, any window."""
import random

import pytest
import torch
from conftest import Life, check_pages, random_dms, small_config, small_model

import dms
from dms import DMSConfig, InputError, decisions, visible
from kv_cache import CacheFull, KVCache


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


@pytest.mark.parametrize("seed", range(120))
def test_any_cut_equals_dense_masked_model(seed):
    rng = random.Random(seed)
    config = random_dms(rng) if seed % 6 else None
    model = small_model(seed, config, rng.choice([0.1, 0.5, 0.9]), num_key_value_heads=rng.choice([1, 2, 4]))
    B, longest = rng.choice([1, 2, 4]), rng.choice([3, 20, 60, 120])
    lengths = [rng.randint(1, longest) for _ in range(B)]
    ids = torch.randint(0, 67, (B, longest), generator=torch.Generator().manual_seed(seed))
    cache = KVCache(model.config, B, page_size=rng.choice([1, 2, 4, 16]), chunk=rng.choice([1, 5, 32, 512]))
    cache.scores = rng.choice([1, 2000, 2**29])  # rows of a block at a time
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
    assert cache.stats()["pages"] == 0
    check_pages(cache)


def uneven_cache(seed=0, B=3, tokens=200, dms=None, **changes):
    """A model whose heads keep very different shares, and a cache that has read random tokens."""
    model = small_model(seed, dms or DMSConfig(window=8), 0.5, **changes)
    for block in model.model.layers:
        keep = torch.linspace(-2.5, 0.5, model.config.num_key_value_heads)  # from nearly nothing to most
        block.self_attn.dms_proj_alpha = torch.nn.Linear(model.config.hidden_size, len(keep))
        torch.nn.init.normal_(block.self_attn.dms_proj_alpha.weight, std=0.05)
        block.self_attn.dms_proj_alpha.bias.data = -keep
    model.requires_grad_(False)
    cache = KVCache(model.config, B, page_size=16)
    ids = torch.randint(0, 67, (B, tokens), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        model(ids, cache=cache)
    return model, cache, ids


@pytest.mark.parametrize("scores", [1, 2**29])
def test_a_block_reads_no_slot_that_is_not_in_use(scores):
    model, _, ids = uneven_cache()
    cache = KVCache(model.config, 3, page_size=16)
    cache.scores = scores
    for pool in (cache.k_pages, cache.v_pages):
        pool.fill_(float("nan"))
    with torch.inference_mode():
        logits = torch.cat([model(ids[:, t:t + 50], cache=cache) for t in range(0, 200, 50)], dim=1)
        assert int(cache.length.min()) < 16 < int(cache.length.max())  # rows of very different lengths, as one
        for b in range(3):
            torch.testing.assert_close(logits[b], oracle(model, ids[b])[0], atol=1e-4, rtol=1e-4)


def test_pages_fall_with_compression_at_2048_tokens():
    """At 8x with uneven heads, the pages' bytes are at most a sixth of the dense cache's."""
    model = small_model(0, DMSConfig(window=16), 0.5, num_key_value_heads=4, max_position_embeddings=4096)
    ids = torch.randint(0, 67, (1, 2048))
    shares = torch.tensor([0.02, 0.05, 0.1, 0.3])  # kept by each head; 8x on average with the window
    generator = torch.Generator().manual_seed(0)

    def attend_with(decide):
        def attend(layer, q, k, v, logits):
            keep = torch.rand(logits.shape, generator=generator) < shares[:, None]
            return decide(layer, q, k, v, 0.5 - keep.float())
        return attend

    cache = KVCache(model.config, 1)
    dense = KVCache(small_config(num_key_value_heads=4, max_position_embeddings=4096), 1)
    with torch.inference_mode():
        for t in range(0, 2048, 256):
            with cache.append(torch.tensor([256]), 256) as attend:
                model.hidden(ids[:, t:t + 256], attend_with(attend), cache.seen)
            with dense.append(torch.tensor([256]), 256) as attend:
                model.hidden(ids[:, t:t + 256], lambda *qkv: attend(*qkv[:4], None), dense.seen)
    sparse, full = cache.stats(), dense.stats()
    assert 7.5 < sparse["compression_ratio"] < 8.5 and full["compression_ratio"] == 1
    assert sparse["page_bytes"] * 6 <= full["page_bytes"]
    assert full["page_bytes"] == 2048 * 2 * 4 * 2 * 8 * 4  # T * L * Hkv * (k, v) * D * float32
    assert sparse["peak_pairs"] == sparse["pairs"] == sum(map(sum, sparse["pairs_per_head"]))


def test_select_forks_drops_and_reorders():
    model, cache, ids = uneven_cache()
    chosen = [2, 0, 2, 2]
    pages = [int((-(-cache.length[:, 2 * b:2 * b + 2] // 16)).sum()) for b in range(3)]
    cache.select(chosen)
    assert pages[0] + pages[2] < cache.stats()["pages"] < pages[0] + 2 * pages[2]  # the three forks share most
    check_pages(cache)
    more = torch.randint(0, 67, (4, 60))
    with torch.inference_mode():
        logits = torch.cat([model(more[:, :20], cache=cache)] +
                           [model(more[:, t:t + 1], cache=cache) for t in range(20, 60)], dim=1)
        for row, b in enumerate(chosen):
            expected = model(torch.cat((ids[b], more[row]))[None])[0, ids.shape[1]:]
            torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-4)
    check_pages(cache)
    for wrong in ([], [4], [-1]):
        with pytest.raises(InputError, match="indices below 4"):
            cache.select(wrong)


def test_released_pages_serve_the_next_sequence():
    model, cache, ids = uneven_cache()
    before = cache.stats()
    cache.release([1])
    check_pages(cache)
    freed = before["pages"] - cache.stats()["pages"]
    assert freed > 0
    with torch.inference_mode():
        logits = model(ids, cache=cache, lengths=torch.tensor([0, 150, 0]))
        torch.testing.assert_close(logits[1, :150], model(ids[1:2, :150])[0], atol=1e-4, rtol=1e-4)
        assert cache.stats()["peak_page_bytes"] == before["page_bytes"]
        one_more = model(ids[:, :1], cache=cache)
        expected = model(torch.cat((ids[0], ids[0, :1]))[None])[0, -1]
        torch.testing.assert_close(one_more[0, 0], expected, atol=1e-4, rtol=1e-4)
    check_pages(cache)


def test_forks_of_a_dense_cache_share_all_full_pages():
    model = small_model(0)
    cache = KVCache(model.config, 1, page_size=16)
    model(torch.randint(0, 67, (1, 200)), cache=cache)
    assert cache.stats()["pages"] == 2 * 2 * 13  # layers, heads, pages of a row
    cache.select([0] * 5)
    assert cache.stats()["pages"] == 2 * 2 * (12 + 5)
    check_pages(cache)


def test_a_part_is_the_same_cache():
    """A prompt fed to one sequence of several, the others in the middle of theirs; the table grows under way."""
    model, cache, ids = uneven_cache(tokens=40)
    cache.release([1])
    prompt = torch.randint(0, 67, (1, 300))
    with torch.inference_mode():
        model(ids[:, :1], cache=cache, lengths=torch.tensor([1, 0, 1]))
        logits = model(prompt, cache=cache.part(1, 300))
        torch.testing.assert_close(logits, model(prompt), atol=1e-4, rtol=1e-4)
        check_pages(cache)
        assert cache.seen.tolist() == [41, 300, 41]
        one_more = model(ids[:, :1], cache=cache)
        for b, before in ((0, torch.cat((ids[0], ids[0, :1]))), (1, prompt[0])):
            expected = model(torch.cat((before, ids[b, :1]))[None])[0, -1]
            torch.testing.assert_close(one_more[b, 0], expected, atol=1e-4, rtol=1e-4)
    check_pages(cache)


def test_a_full_cache_says_so_before_it_writes():
    """One token at a time until no page is left: the same sequence goes on when another one has made room."""
    model = small_model(0, DMSConfig(window=3), 0.9)
    cache = KVCache(model.config, 2, page_size=4, memory=2 * 2 * 2 * 6 * 256)  # 6 pages for each of the rows
    ids, fed = torch.randint(0, 67, (2, 80)), 0
    with torch.inference_mode():
        with pytest.raises(CacheFull, match="full: of its 48 pages"):
            while fed < 80:
                logits = model(ids[:, fed:fed + 1], cache=cache)
                fed += 1
        assert 16 < fed < 40 and cache.seen.tolist() == [fed, fed]
        torch.testing.assert_close(logits[0, 0], model(ids[:1, :fed])[0, -1], atol=1e-4, rtol=1e-4)
        check_pages(cache)
        cache.release([1])
        logits = model(ids[:, fed:fed + 1], cache=cache, lengths=torch.tensor([1, 0]))
        torch.testing.assert_close(logits[0, 0], model(ids[:1, :fed + 1])[0, -1], atol=1e-4, rtol=1e-4)
    check_pages(cache)


@pytest.mark.parametrize("seed", range(20))
def test_10_000_steps_of_random_life(seed):
    """No page leaks, has two owners or is written to while shared, and every row holds what the rule leaves."""
    life = Life(seed)
    cache = KVCache(**life.settings)
    for step in range(500):
        life.step(cache)
        if step % 10 == 9:
            life.check(cache)
            check_pages(cache)


def test_random_life_of_a_batch():
    """Append, end, begin anew and fork at random: no page leaks or has two owners, and every sequence stays right."""
    rng = random.Random(11)
    model, cache, ids = uneven_cache(tokens=30)
    fed = [row.tolist() for row in ids]
    with torch.inference_mode():
        for _ in range(60):
            action = rng.random()
            if action < 0.1:
                ended = rng.sample(range(len(fed)), rng.randint(1, len(fed)))
                cache.release(ended)
                fed = [[] if b in ended else row for b, row in enumerate(fed)]
            elif action < 0.2:
                chosen = [rng.randrange(len(fed)) for _ in range(rng.randint(1, 5))]
                cache.select(chosen)
                fed = [list(fed[b]) for b in chosen]
            T = rng.choice([1, 1, 1, 2, 9])
            step = [rng.randint(0, T) if rng.random() < 0.3 else T for _ in fed]
            new = torch.tensor([[rng.randrange(67) for _ in range(T)] for _ in fed])
            logits = model(new, cache=cache, lengths=torch.tensor(step))
            fed = [row + new[b, :step[b]].tolist() for b, row in enumerate(fed)]
            check_pages(cache)
            b = rng.randrange(len(fed))
            if step[b]:
                expected, held = oracle(model, torch.tensor(fed[b]))
                torch.testing.assert_close(logits[b, :step[b]], expected[-step[b]:], atol=1e-4, rtol=1e-4)
                assert torch.equal(cache.length.view(cache.layers, len(fed), -1)[:, b], held)


def test_wrong_calls_say_what_is_wrong():
    model = small_model(0, None)
    with pytest.raises(InputError, match="at least 1"):
        KVCache(model.config, 0)
    with pytest.raises(InputError, match="power of two"):
        KVCache(model.config, 1, page_size=24)
    cache = KVCache(model.config, 2, page_size=4, memory=8 * 256)
    with pytest.raises(InputError, match="2 numbers from 0 to 3"):
        model(torch.zeros(2, 3, dtype=torch.int64), cache=cache, lengths=torch.tensor([4, 1]))
    with pytest.raises(InputError, match="full: of its 8 pages 8 are free and 32 needed"):
        model(torch.zeros(2, 30, dtype=torch.int64), cache=cache)
