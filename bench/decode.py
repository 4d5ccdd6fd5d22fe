"""
Decoding: whole steps at several compressions, and the attention in them alone.

    python bench/decode.py                 # a GPU: Qwen3-8B's shape; a CPU: Qwen3-0.6B's, 8k x 4
    python bench/decode.py --memory 8 --batches      # tokens/s of the most sequences in 8 GB
    python bench/decode.py --shape tiny --contexts 256 --window 16

Weights are random. What a cache holds is made, not computed: every head has the length that a share
of the context gives it. The shares differ as those of real heads do, and pages are scattered over
the pool (dense: in order, as a prompt leaves them). Decisions then go on at about that share.
A step is a forward pass and greedy sampling, with the tokens read back at its end. The attention
alone is that of all layers, on a GPU one CUDA graph.

    floor = (bytes of the weights read + pairs held x 2 x D x bytes) / bandwidth of a large copy

The first batch of each compression is the largest whose pages fit into --memory GB, on a GPU by
default into 80% of what is free.
"""

from itertools import product

import torch
from measuring import GPU, WARM_UP, Results, compress, options, random_model, tidy, time_of

from common import run_script
from generate import DecodeStep
from kv_cache import KVCache, add_pages


def copy_bandwidth(device):
    """Bytes per second, read and written, of copying 1 GB (256 MB on a CPU)."""
    size = 2**30 if GPU else 2**28
    a = torch.zeros(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * size / time_of(lambda: b.copy_(a), 9)["fastest_ms"] * 1000


def held_pairs(shares, context, recent):
    """How many pairs each head holds after `context` tokens, (L, Hkv) int64: `recent` ones, and its
    share of those before."""
    return (recent + shares * (context - recent)).round().long()


def sequence_bytes(model, shares, context, steps):
    """The bytes of one sequence's pages, those included that the measured steps will need."""
    one = KVCache(model.config, 1, model.device, model.dtype, memory=1)
    length = held_pairs(shares, context, one.window + 1) + steps + WARM_UP + 1
    return int((length // one.page_size + 1).sum()) * one.page_bytes


@torch.inference_mode()
def filled_cache(model, shares, context, batch, steps):
    """A cache that holds what `context` tokens of every sequence leave."""
    memory = batch * sequence_bytes(model, shares, context, steps)
    cache = KVCache(model.config, batch, model.device, model.dtype, memory=memory)
    length = held_pairs(shares, context, cache.window + 1)
    cache.rows.widen(cache.chunk + int(length.max()), cache.page_size)  # as a prompt makes it
    cache.rows.seen.fill_(context)
    for layer in range(cache.layers):
        by_row = [x[layer].repeat(batch).to(cache.device) for x in (length, shares)]
        fill_layer(cache.rows.part(layer), cache.pool, context, *by_row)
    for slots in (cache.pool.keys, cache.pool.values):
        for pages in slots.split(4096):
            pages.normal_()
    return cache


def fill_layer(rows, pool, context, length, shares):
    """The rows of one layer; length, shares (N,). The recent tokens lie in a row's last slots, each
    evicted or not by the row's share. The pairs before them were kept."""
    device = length.device
    N, M = rows.table.shape
    recent = rows.ring.shape[1]
    add_pages(rows, pool, length)
    rows.length.copy_(length)
    is_page = rows.pages_in_use(pool.page_size)
    pages = rows.table[is_page].long()
    if bool((length < context).any()):
        pages = pages[torch.randperm(len(pages), device=device)]
        rows.table[is_page] = pages.int()

    slot = torch.arange(M * pool.page_size, dtype=torch.int32, device=device)
    skipped = (context - length).int()[:, None]  # positions that a row does not hold
    is_recent = slot >= (length - recent)[:, None]  # (N, M * page_size)
    position = torch.where(is_recent, slot + skipped, slot)
    leaves = torch.rand(is_recent.shape, device=device) >= shares[:, None]
    by_page = (N, M, pool.page_size)
    pool.position[pages] = position.view(by_page)[is_page]
    pool.evicted[pages] = (is_recent & leaves).view(by_page)[is_page]

    token = torch.arange(context - recent, context, device=device)
    rows.ring[:, token % recent] = (token - skipped).int()


def measure(model, shares, where, args, results, bandwidth):
    """Add the row of one compression, context and batch. Returns a function that makes a step."""
    batch = where["batch"]
    cache = filled_cache(model, shares, where["context"], batch, args.steps)
    cache.decode_step = DecodeStep(model, cache)
    tokens = dict.fromkeys(range(batch), 1)

    def step():
        return cache.decode_step(model, cache, tokens).argmax(-1).tolist()

    pair_bytes = 2 * model.config.head_dim * model.dtype.itemsize
    copy_ms = 1000 * cache.stats()["pairs"] * pair_bytes / bandwidth
    attention_ms = time_of(attention_alone(model, cache), 5)["ms"]
    times = time_of(step, args.steps)
    stats = cache.stats()
    floor = 1000 * (bytes_of_weights(model) + stats["pairs"] * pair_bytes) / bandwidth
    results.add("step", **where, **times, **{
        "tokens_per_s": 1000 * batch / times["ms"],
        "over_floor": times["ms"] / floor,
        "attention_ms": attention_ms,
        "attention_of_copy": copy_ms / attention_ms,
        "pairs": stats["pairs"],
        "compression": stats["compression_ratio"],
        "gb_in_pages": stats["page_bytes"] / 1e9,
    })
    return step


def attention_alone(model, cache):
    """A function that attends in every layer, as a CUDA graph where there is a GPU: without the
    time of the launches."""
    config = model.config
    N = cache.batch_size * cache.kv_heads
    group = config.num_attention_heads // cache.kv_heads
    q = torch.randn(N, group, config.head_dim, dtype=model.dtype, device=model.device)

    def attend():
        for layer in range(cache.layers):
            cache.kernels.attend_one(q, cache.rows.part(layer), cache.pool)

    if not GPU:
        return attend
    attend()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    return graph.replay


def bytes_of_weights(model):
    """Of those that a step reads whole. An embedding is not, unless it is the output layer too."""
    total = 0
    for name, p in model.named_parameters():
        if "embed_tokens" not in name or model.config.tie_word_embeddings:
            total += p.numel() * p.element_size()
    return total


def main():
    args = options(__doc__, contexts=[8192], batches=[1, 16] if GPU else [4], crs=[1.0, 8.0],
                   window=256, steps=20 if GPU else 15, memory=0.0)
    results = Results(args)
    bandwidth = copy_bandwidth(args.device)
    results.add("copy", gb_per_s=bandwidth / 1e9)
    model = random_model(args)
    tidy()
    memory = args.memory * 1e9
    if GPU and not memory:
        memory = 0.8 * torch.cuda.mem_get_info()[0]
    for context, cr, batch in product(args.contexts, args.crs, [0, *args.batches]):
        step = None  # the last one holds its cache
        tidy()
        shares = compress(model, context, cr, args.window)
        batch = batch or int(memory / sequence_bytes(model, shares, context, args.steps))
        where = dict(cr=cr, context=context, batch=batch)
        try:
            if batch:
                step = measure(model, shares, where, args, results, bandwidth)
        except torch.OutOfMemoryError:
            print(f"{where}: left out, no memory", flush=True)
    if step:
        results.add_kernels("last step's kernels", step)


if __name__ == "__main__":
    run_script(main)
