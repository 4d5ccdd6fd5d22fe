"""The cache against the dense masked model: any cut of the input, any raggedness, any window."""
import copy
import math
import random
from dataclasses import replace

import pytest
import torch
from conftest import Life, check_pages, held_by, random_dms, small_config, small_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dms
from checkpoint import InputError
from dms import DMSConfig, decisions, visible
from generate import Sequence, generate
from kernels import block as kernels_block
from kernels import choose
from kv_cache import CacheFull, KVCache

PAGE_OF_4 = 4 * (2 * 8 * 4 + 5)  # bytes: k and v of 8 float32 each, a position and a decision


def oracle(model, ids):
    """Logits (T, V) of one sequence without a cache, and which pairs the rule leaves at its end,
    (L, Hkv, T)."""
    held = []
    masked = dms.masked_attention(model.config)

    def attend(layer, q, k, v, logits):
        T = q.shape[2]
        if logits is None:
            held.append(torch.ones(k.shape[1], T, dtype=torch.bool))
        else:
            evict = decisions(logits, model.config.dms.shift)[0]
            held.append(visible(T - 1, torch.arange(T), evict, model.config.dms.window))
        return masked(layer, q, k, v, logits)

    logits = model.lm_head(model.hidden(ids[None], attend))[0]
    return logits, torch.stack(held)


def check_held(cache, sequence, held):
    """The sequence's rows hold just the positions where held (L, Hkv, T) is set."""
    for layer, heads in enumerate(held):
        for head, is_held in enumerate(heads):
            positions = cache.positions(sequence, layer, head)
            assert positions.tolist() == is_held.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("seed", range(120))
def test_any_cut_equals_dense_masked_model(seed, monkeypatch):
    rng = random.Random(seed)
    config = random_dms(rng) if seed % 6 else None
    heads = rng.choice([1, 2, 4])
    model = small_model(seed, config, rng.choice([0.1, 0.5, 0.9]), num_key_value_heads=heads)
    B = rng.choice([1, 2, 4])
    longest = rng.choice([3, 20, 60, 120])
    lengths = [rng.randint(1, longest) for _ in range(B)]
    ids = torch.randint(0, 67, (B, longest), generator=torch.Generator().manual_seed(seed))
    page_size = rng.choice([1, 2, 4, 16])
    cache = KVCache(model.config, B, page_size=page_size, chunk=rng.choice([1, 5, 32, 512]))
    monkeypatch.setitem(kernels_block.SCORES_AT_A_TIME, "cpu", rng.choice([1, 2000, 2**29]))
    pieces = [[] for _ in range(B)]
    fed = [0] * B
    largest = rng.choice([1, 4, 30, 200])
    while fed != lengths:
        step = [rng.choice([0, 1, rng.randint(0, largest)]) for _ in range(B)]
        step = [min(step[b], lengths[b] - fed[b]) for b in range(B)]
        T = max(step) + rng.choice([0, 0, 2])
        if T == 0:
            continue
        new = torch.randint(0, 67, (B, T))  # padding is arbitrary
        for b in range(B):
            new[b, :step[b]] = ids[b, fed[b]:fed[b] + step[b]]
        logits = model(new, cache=cache, lengths=torch.tensor(step))
        for b in range(B):
            pieces[b].append(logits[b, :step[b]])
            fed[b] += step[b]
        check_pages(cache)
    for b in range(B):
        expected, held = oracle(model, ids[b, :lengths[b]])
        torch.testing.assert_close(torch.cat(pieces[b]), expected, atol=1e-4, rtol=1e-4)
        check_held(cache, b, held)
    cache.release(range(B))
    assert cache.stats()["pages"] == 0
    check_pages(cache)


@pytest.mark.parametrize("seed", range(40))
def test_blocks_and_single_tokens_are_the_same_rule(seed, monkeypatch):
    """The same tokens and decisions as one block, token by token, and in random cuts: the same
    outputs of attention, and rows that hold the same pairs, positions and decisions."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    settings = None
    if seed % 5:
        settings = DMSConfig(window=rng.choice([0, 1, 3, 12, 40]), shift=rng.choice([0, 1]))
    config = small_config(dms=settings)
    T = rng.choice([2, 7, 40, 90])
    lengths = torch.tensor([rng.randint(0, T), T, rng.randint(1, T)])
    q = torch.randn(2, 3, 4, T, 8, generator=generator)  # layers, sequences, heads
    k = torch.randn(2, 3, 2, T, 8, generator=generator)
    v = torch.randn(2, 3, 2, T, 8, generator=generator)
    logits = torch.rand(2, 3, 2, T, generator=generator) - rng.choice([0.1, 0.5, 0.9])

    def feed(sizes, kernels=None):
        """A cache that was fed pieces of these sizes, and what attention gave, as q."""
        cache = KVCache(config, 3, page_size=rng.choice([1, 4, 16]))
        cache.kernels = kernels or cache.kernels
        monkeypatch.setitem(kernels_block.SCORES_AT_A_TIME, "cpu", rng.choice([1, 2**20]))
        y = torch.zeros_like(q)
        begin = 0
        for size in sizes:
            piece = slice(begin, begin + size)
            count = (lengths - begin).clamp(0, size)
            with torch.inference_mode(), cache.append(count, size) as attend:
                for i in range(2):
                    decision = logits[i, :, :, piece] if settings else None
                    new = (q[i, :, :, piece], k[i, :, :, piece], v[i, :, :, piece], decision)
                    y[i, :, :, piece] = attend(i, *new)
            begin += size
        check_pages(cache)
        return cache, y

    cuts = []
    while sum(cuts) < T:
        cuts.append(min(rng.choice([1, 1, 2, 5, 30]), T - sum(cuts)))
    block, expected = feed([T])
    for other, y in (feed([1] * T), feed([1] * T, choose.PLAIN), feed(cuts)):
        assert torch.equal(other.seen, block.seen)
        for b in range(3):
            real = slice(lengths[b])
            one = expected[:, b, :, real]
            torch.testing.assert_close(y[:, b, :, real], one, atol=1e-4, rtol=1e-4)
        for layer in range(2):
            for row in range(6):
                mine = held_by(other.rows.layer(layer), other.pool, row)
                its = held_by(block.rows.layer(layer), block.pool, row)
                assert all(torch.equal(a, b) for a, b in zip(mine, its))


def uneven_cache(seed=0, B=3, tokens=200, **settings):
    """A model whose heads keep very different shares, and a cache that has read random tokens."""
    model = small_model(seed, DMSConfig(window=8), 0.5)
    config = model.config
    for block in model.model.layers:
        keep = torch.linspace(-2.5, 0.5, config.num_key_value_heads)  # from nearly nothing to most
        block.self_attn.dms_proj_alpha = torch.nn.Linear(config.hidden_size, len(keep))
        torch.nn.init.normal_(block.self_attn.dms_proj_alpha.weight, std=0.05)
        block.self_attn.dms_proj_alpha.bias.data = -keep
    model.requires_grad_(False)
    cache = KVCache(config, B, **{"page_size": 16, **settings})
    ids = torch.randint(0, 67, (B, tokens), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        model(ids, cache=cache)
    return model, cache, ids


def check_last(model, logits, *pieces):
    """logits (n, V) are those of the last n tokens of all these, without a cache."""
    expected = model(torch.cat(pieces)[None])[0, -len(logits):]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scores", [1, 2**29])
def test_a_block_reads_no_slot_that_is_not_in_use(scores, monkeypatch):
    model, _, ids = uneven_cache()
    cache = KVCache(model.config, 3, page_size=16)
    monkeypatch.setitem(kernels_block.SCORES_AT_A_TIME, "cpu", scores)
    cache.pool.keys.fill_(float("nan"))
    cache.pool.values.fill_(float("nan"))
    cache.pool.position.fill_(0)  # every query would see it
    with torch.inference_mode():
        pieces = [model(ids[:, t:t + 50], cache=cache) for t in range(0, 200, 50)]
        logits = torch.cat(pieces, dim=1)
        length = cache.rows.length
        assert int(length.min()) < 16 < int(length.max())  # rows of very different lengths, as one
        for b in range(3):
            check_last(model, logits[b], ids[b])


class LargestTensor(TorchDispatchMode):
    """The bytes of the largest tensor that an operation makes anew."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        if not function.is_view and not function._schema.is_mutable:
            tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
            self.bytes = max(self.bytes, *(x.untyped_storage().nbytes() for x in tensors), 0)
        return result


def test_the_work_of_a_long_prompt_fits_beside_a_small_pool(monkeypatch):
    """On a small card the pool is most of the memory: masks and copies of a plain prefill do not
    grow with the batch, nor much with what is held."""
    monkeypatch.setitem(kernels_block.SCORES_AT_A_TIME, "cpu", 2**16)
    sizes = dict(num_key_value_heads=4, max_position_embeddings=4096)
    model = small_model(0, DMSConfig(window=16), 0.5, **sizes)
    ids = torch.randint(0, 67, (4, 2048))
    cache = KVCache(model.config, 4, chunk=64, memory=1200 * 32 * (2 * 8 * 4 + 5))
    with torch.inference_mode(), LargestTensor() as largest:
        model(ids, cache=cache, last_only=True)
    entry = 8  # bytes, of an int64
    all_rows = len(cache.rows.seen) * 64 * int(cache.rows.length.max()) * entry
    pool = len(cache.pool) * cache.page_bytes
    assert largest.bytes <= 2 * 2**16 * entry < pool < all_rows


def test_a_block_is_not_given_to_cudnn(monkeypatch):
    """It would spend up to half a second on a plan for each of the many shapes of a prefill."""
    attention = torch.nn.functional.scaled_dot_product_attention
    allowed = []

    def spy(*arguments, **named):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*arguments, **named)

    monkeypatch.setattr(kernels_block.F, "scaled_dot_product_attention", spy)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    model = small_model(0, DMSConfig(window=3))
    model(torch.arange(20)[None], cache=KVCache(model.config, 1, chunk=8))
    assert allowed == [False] * (3 * model.config.num_hidden_layers)
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_pages_fall_with_compression_at_2048_tokens():
    """At 8x with uneven heads, the pages' bytes are at most a sixth of the dense cache's."""
    sizes = dict(num_key_value_heads=4, max_position_embeddings=4096)
    model = small_model(0, DMSConfig(window=16), 0.5, **sizes)
    ids = torch.randint(0, 67, (1, 2048))
    shares = torch.tensor([0.02, 0.05, 0.1, 0.3])  # each head keeps; 8x on average with the window
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(model.config, 1)
    dense = KVCache(small_config(**sizes), 1)

    def attend_sparsely(layer, q, k, v, logits):
        keep = torch.rand(logits.shape, generator=generator) < shares[:, None]
        return feed(layer, q, k, v, 0.5 - keep.float())

    def attend_densely(layer, q, k, v, logits):
        return feed(layer, q, k, v, None)

    with torch.inference_mode():
        for t in range(0, 2048, 256):
            piece = ids[:, t:t + 256]
            with cache.append(torch.tensor([256]), 256) as feed:
                model.hidden(piece, attend_sparsely, feed.start)
            with dense.append(torch.tensor([256]), 256) as feed:
                model.hidden(piece, attend_densely, feed.start)
    sparse = cache.stats()
    full = dense.stats()
    assert 7.5 < sparse["compression_ratio"] < 8.5 and full["compression_ratio"] == 1
    assert sparse["page_bytes"] * 6 <= full["page_bytes"]
    assert full["page_bytes"] == 2048 * 2 * 4 * (2 * 8 * 4 + 5)  # T L Hkv (k, v in float32, and 5)
    assert sparse["peak_pairs"] == sparse["pairs"] == sum(map(sum, sparse["pairs_per_head"]))


def test_select_forks_drops_and_reorders():
    model, cache, ids = uneven_cache()
    chosen = [2, 0, 2, 2]
    pages = (-(-cache.rows.length // 16)).view(2, 3, 2).sum((0, 2)).tolist()  # of each sequence
    cache.select(chosen)
    forked = cache.stats()["pages"]
    assert pages[0] + pages[2] < forked < pages[0] + 2 * pages[2]  # the three forks share most
    check_pages(cache)
    more = torch.randint(0, 67, (4, 60))
    with torch.inference_mode():
        pieces = [model(more[:, :20], cache=cache)]
        pieces += [model(more[:, t:t + 1], cache=cache) for t in range(20, 60)]
        logits = torch.cat(pieces, dim=1)
        for row, b in enumerate(chosen):
            check_last(model, logits[row], ids[b], more[row])
    check_pages(cache)
    for wrong in ([4], [-1], [0, 0.7]):
        with pytest.raises(InputError, match="indices below 4"):
            cache.select(wrong)
    with pytest.raises(InputError, match="at least one"):
        cache.select([])


def test_forks_that_do_not_fit_change_nothing():
    """Neither those that are named nor those that would be dropped: all go on as before, to the
    same results, and fewer forks fit."""
    model, cache, ids = uneven_cache(page_size=4, memory=450 * PAGE_OF_4)
    state = (*vars(cache.rows).values(), *vars(cache.pool).values())
    before = [x.clone() for x in state]
    stats = cache.stats()
    with pytest.raises(CacheFull, match="of its 450 would be free"):
        cache.select([2] * 50)
    for x, y in zip(state, before):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)  # unused slots may be NaN
    assert cache.stats() == stats and cache.batch_size == 3
    check_pages(cache)
    with torch.inference_mode():
        more = torch.randint(0, 67, (3, 4))
        logits = [model(more[:, :1], cache=cache), model(more[:, 1:], cache=cache)]
        logits = torch.cat(logits, dim=1)
        for b in range(3):
            check_last(model, logits[b], ids[b], more[b])
        cache.select([2, 2])
        logits = model(ids[:2, :1], cache=cache)
        for row in range(2):
            check_last(model, logits[row], ids[2], more[2], ids[row, :1])
    check_pages(cache)


def test_released_pages_serve_the_next_sequence():
    model, cache, ids = uneven_cache()
    before = cache.stats()
    cache.release([1])
    check_pages(cache)
    freed = before["pages"] - cache.stats()["pages"]
    assert freed > 0
    with torch.inference_mode():
        logits = model(ids, cache=cache, lengths=torch.tensor([0, 150, 0]))
        check_last(model, logits[1, :150], ids[1, :150])
        assert cache.stats()["peak_page_bytes"] == before["page_bytes"]
        one_more = model(ids[:, :1], cache=cache)
        check_last(model, one_more[0], ids[0], ids[0, :1])
    check_pages(cache)


def test_forks_of_a_dense_cache_share_all_full_pages():
    model = small_model(0)
    cache = KVCache(model.config, 1, page_size=16)
    model(torch.randint(0, 67, (1, 200)), cache=cache)
    assert cache.stats()["pages"] == 2 * 2 * 13  # layers, heads, pages of a row
    cache.select([0] * 5)
    stats = cache.stats()
    assert stats["pages"] == 2 * 2 * (12 + 5)
    assert stats["peak_page_bytes"] == stats["page_bytes"]  # never so many before
    check_pages(cache)


def test_one_sequence_can_be_fed_alone():
    """A prompt fed to one sequence of several, the others in the middle of theirs; the table grows
    under way."""
    model, cache, ids = uneven_cache(tokens=40)
    cache.release([1])
    prompt = torch.randint(0, 67, (1, 300))
    with torch.inference_mode():
        model(ids[:, :1], cache=cache, lengths=torch.tensor([1, 0, 1]))
        logits = model(prompt, cache=cache, sequence=1)
        check_last(model, logits[0], prompt[0])
        check_pages(cache)
        assert cache.seen.tolist() == [41, 300, 41]
        one_more = model(ids[:, :1], cache=cache)
        for b, before in ((0, torch.cat((ids[0], ids[0, :1]))), (1, prompt[0])):
            check_last(model, one_more[b], before, ids[b, :1])
    check_pages(cache)


def test_a_full_cache_says_so_before_it_writes():
    """One token at a time until no page is left. Asking again is refused again; and the same
    sequence goes on when another one has made room."""
    model = small_model(0, DMSConfig(window=3), 0.9)
    six_for_each_row = 2 * 2 * 2 * 6 * PAGE_OF_4
    cache = KVCache(model.config, 2, page_size=4, memory=six_for_each_row)
    ids = torch.randint(0, 67, (2, 80))
    fed = 0
    with torch.inference_mode():
        with pytest.raises(CacheFull, match="full: of its 48 pages"):
            while fed < 80:
                logits = model(ids[:, fed:fed + 1], cache=cache)
                fed += 1
        assert 16 < fed < 40
        check_last(model, logits[0], ids[0, :fed])
        for _ in range(2):
            assert cache.seen.tolist() == [fed, fed]
            check_pages(cache)
            with pytest.raises(CacheFull, match="full: of its 48 pages"):
                model(ids[:, fed:fed + 1], cache=cache)
        cache.release([1])
        logits = model(ids[:, fed:fed + 1], cache=cache, lengths=torch.tensor([1, 0]))
        check_last(model, logits[0], ids[0, :fed + 1])
    check_pages(cache)


def test_a_block_that_does_not_fit_ends_the_sequence_it_is_for():
    """It may be stored in half of the layers by then. The other sequences go on as before."""
    model, cache, ids = uneven_cache(page_size=4, memory=450 * PAGE_OF_4)
    with torch.inference_mode():
        with pytest.raises(CacheFull, match="full: of its 450 pages"):
            model(torch.randint(0, 67, (1, 500)), cache=cache, sequence=1)
        assert cache.seen.tolist() == [200, 0, 200]
        assert not cache.rows.length[:, 2:4].any()
        check_pages(cache)
        logits = model(ids[:, :2], cache=cache)
        check_last(model, logits[0], ids[0], ids[0, :2])
        check_last(model, logits[1], ids[1, :2])
    check_pages(cache)


@pytest.mark.parametrize("seed", range(20))
def test_10_000_steps_of_random_life(seed):
    """No page leaks, has two owners or is written to while shared, and every row holds what the
    rule leaves."""
    life = Life(seed)
    cache = KVCache(**life.settings)
    for step in range(500):
        life.step(cache)
        if step % 10 == 9:
            life.check(cache)
            check_pages(cache)


def test_random_life_of_a_batch():
    """Append, end, begin anew and fork at random: no page leaks or has two owners, and every
    sequence stays right."""
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
                expected = expected[-step[b]:]
                torch.testing.assert_close(logits[b, :step[b]], expected, atol=1e-4, rtol=1e-4)
                check_held(cache, b, held)


def test_wrong_calls_say_what_is_wrong():
    model = small_model(0, None)
    with pytest.raises(InputError, match="at least 1"):
        KVCache(model.config, 0)
    with pytest.raises(InputError, match="power of two"):
        KVCache(model.config, 1, page_size=24)
    cache = KVCache(model.config, 2, page_size=4, memory=8 * PAGE_OF_4)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(InputError, match="2 numbers from 0 to 3"):
        model(ids, cache=cache, lengths=torch.tensor([4, 1]))
    with pytest.raises(InputError, match="1 numbers from 0 to 3"):
        model(ids, cache=cache, sequence=1)
    with pytest.raises(InputError, match="full: of its 8 pages 8 are free and 32 needed"):
        model(torch.zeros(2, 30, dtype=torch.int64), cache=cache)


# ---------------------------------------------------------------------------- Misuse and accidents


def test_a_cache_of_another_config_is_refused():
    model = small_model(0, DMSConfig(window=3), 0.5)
    ids = torch.tensor([[1, 2, 3]])
    for change in (dict(window=4), dict(shift=0), dict(disable_eviction=True), dict(offset=1.0)):
        cache = KVCache(model.config, 1)
        model(ids, cache=cache)
        before = copy.deepcopy(model.config.dms)
        model.config.dms = replace(before, **change)
        with pytest.raises(InputError, match="another config"):
            model(ids, cache=cache)
        with pytest.raises(InputError, match="another config"):
            next(generate(model, cache, [Sequence([1], 2)]))
        model.config.dms = before
        model(ids, cache=cache)
        assert cache.seen.tolist() == [6]
    dense = small_model(0)
    with pytest.raises(InputError, match="another config"):
        dense(ids, cache=KVCache(model.config, 1))
    with pytest.raises(InputError, match="stores torch.float32, the model gives torch.bfloat16"):
        dense.bfloat16()(ids, cache=KVCache(dense.config, 1))


@pytest.mark.parametrize(
    "misuse, message",
    [
        (lambda model, cache: model(torch.tensor([[1.0]]), cache=cache), "ids must be"),
        (lambda model, cache: model(torch.tensor([[67]]), cache=cache), "ids must be"),
        (lambda model, cache: model(torch.tensor([[-1]])), "ids must be"),
        (lambda model, cache: model(torch.zeros(2, 0).long(), cache=cache), "ids must be"),
        (lambda model, cache: model(torch.tensor([1, 2]), cache=cache), "ids must be"),
        (lambda model, cache: model(torch.tensor([[1]]), cache=cache), "lengths must be"),
        (lambda model, cache: model(torch.tensor([[1]]), cache=cache, sequence=2), "indices below 2"),
        (lambda model, cache: model(torch.tensor([[1]]), cache=cache, sequence=-1), "indices below 2"),
        (lambda model, cache: cache.release([-1]), "indices below 2"),
        (lambda model, cache: cache.release([0.7]), "indices below 2"),
        (lambda model, cache: cache.positions(2, 0, 0), "indices below 2"),
        (lambda model, cache: cache.positions(0, 0, 2), "2 layers of 2 KV heads"),
        (lambda model, cache: cache.positions(0, -1, 0), "2 layers of 2 KV heads"),
        (lambda model, cache: KVCache(model.config, 1, memory=-5), "memory above 0"),
        (lambda model, cache: KVCache(model.config, 1, memory=math.nan), "memory"),
        (lambda model, cache: KVCache(model.config, 1, memory=math.inf), "no memory"),
        (lambda model, cache: KVCache(model.config, 0), "at least 1"),
        (lambda model, cache: KVCache(model.config, 1, chunk=-1), "at least 1"),
        (lambda model, cache: next(generate(model, cache, [Sequence([1], 0)])), "new"),
        (lambda model, cache: next(generate(model, cache, [Sequence([], 1)])), "empty"),
        (lambda model, cache: next(generate(model, cache, [Sequence([67], 1)])), "token id 67"),
        (lambda model, cache: next(generate(model, cache, [Sequence([1], 2)] * 2)), "given twice"),
        (
            lambda model, cache: next(
                generate(model, cache, [Sequence([1], 2)], sampling=dict(temperature=math.nan))
            ),
            "temperature = nan",
        ),
    ],
)
def test_misuse_gets_one_clear_error_and_changes_nothing(misuse, message):
    model = small_model(0, DMSConfig(window=3), 0.5)
    cache = KVCache(model.config, 2)
    model(torch.tensor([[1, 2], [3, 4]]), cache=cache)
    stats = cache.stats()
    with pytest.raises(ValueError, match=message):
        misuse(model, cache)
    assert cache.stats() == stats


def test_release_takes_any_iterable():
    model = small_model(0)
    cache = KVCache(model.config, 2)
    model(torch.tensor([[1, 2], [3, 4]]), cache=cache)
    cache.release(b for b in [1])
    assert cache.seen.tolist() == [2, 0]


@pytest.mark.parametrize("T", [1, 5, 9, 17])  # a step, a piece, and pieces of which one is a token
def test_whatever_is_raised_on_the_way_leaves_no_half_of_an_input(T):
    """Sequences that were being fed are released; the others are as they were."""
    model = small_model(0, DMSConfig(window=3), 0.5)
    cache = KVCache(model.config, 3, chunk=8, page_size=4)
    for layer in range(2):
        cache.release(range(3))
        model(torch.randint(0, 67, (3, 7)), cache=cache)
        others = [cache.positions(1, i, h).tolist() for i in range(2) for h in range(2)]
        mlp = model.model.layers[layer].mlp
        forward = mlp.forward
        calls = []

        def interrupt(x):
            calls.append(x)
            if len(calls) * 8 >= T:
                raise KeyboardInterrupt
            return forward(x)

        mlp.forward = interrupt
        with pytest.raises(KeyboardInterrupt):
            model(torch.randint(0, 67, (3, T)), cache=cache, lengths=[T, 0, min(T, 2)])
        mlp.forward = forward
        assert cache.seen.tolist() == [0, 7, 0]
        assert others == [cache.positions(1, i, h).tolist() for i in range(2) for h in range(2)]
        check_pages(cache)
        ids = torch.randint(0, 67, (1, 20))
        logits = model(ids, cache=cache, sequence=0)
        torch.testing.assert_close(logits, model(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("T, chunk", [(8, 8), (9, 8), (10, 8), (16, 8), (17, 8), (9, 1), (17, 2)])
def test_an_input_that_does_not_fit_is_held_wholly_or_not_at_all(T, chunk):
    model = small_model(0)
    cache = KVCache(model.config, 2, chunk=chunk, page_size=2)
    memory = 40 * cache.page_bytes
    cache = KVCache(model.config, 2, chunk=chunk, page_size=2, memory=memory)
    model(torch.randint(0, 67, (1, 12)), cache=cache, sequence=1)
    ids = torch.randint(0, 67, (1, T))
    if T > 8:
        with pytest.raises(CacheFull):
            model(ids, cache=cache, sequence=0)
        assert cache.seen.tolist() == [0, 12]
        cache.release([1])
    logits = model(ids, cache=cache, sequence=0)
    torch.testing.assert_close(logits, model(ids), atol=1e-4, rtol=1e-4)
