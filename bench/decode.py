"""
Decoding: the attention kernel alone, and whole steps at several compressions.

    python bench/decode.py                # a GPU: Qwen3-8B's shape; a CPU: Qwen3-0.6B's, 8k x 8
    python bench/decode.py --shape qwen3-0.6b --layers 4 --contexts 2048 --batches 1 8
    python bench/decode.py --memory 2 --dtype float32 --batches     # the most tokens/s from 2 GB
    python bench/decode.py --out ours.json --transformers theirs.json    # transformers_decode.py's

Weights are random; what a cache holds is made, not computed: every head has the length that a share
of the context gives it, the shares differing as those of real heads do (log-normal), in pages
scattered over the pool (dense: in order, as a prompt leaves them). Decisions then go on being drawn
at about that share. A step is a forward pass and greedy sampling, tokens read back at its end.

    floor = (bytes of the weights read + pairs held x 2 x D x bytes) / bandwidth of the largest copy

A GPU's times are between events on its stream, and the kernel's are of a CUDA graph of ten calls.
"""

import functools

import torch
from common import (
    WARM_UP,
    Results,
    arguments,
    environment,
    head_shares,
    model_config,
    random_model,
    tidy,
    time_of,
)
from compare import compare, kind_of, read_results

from checkpoint import InputError, choose_device, run_script
from generate import DecodeStep
from kernels.cache_write import add_pages
from kernels.choose import TRITON, choose_kernels
from kernels.pages import PagePool
from kv_cache import KVCache

GRAPH_CALLS = 10  # of the attention, in the CUDA graph that is timed


def copy_bandwidth(device):
    """Bytes per second, read and written, of copying 1 GB (256 MB on a CPU)."""
    size = 2**28 if device == "cpu" else 2**30
    a = torch.zeros(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * size / time_of(lambda: b.copy_(a), 9, device)["fastest"]


# ------------------------------------------------------------------------------- The kernel alone


def kernel_row(config, batch, lengths, args, bandwidth):
    """The attention of one layer over --kernel-bytes of keys and values: bytes per second."""
    dtype = getattr(torch, args.dtype)
    D = config.head_dim
    N = batch * config.num_key_value_heads
    share = torch.ones(N)
    if lengths == "uneven":
        share = torch.exp(torch.randn(N, generator=torch.Generator().manual_seed(0)) * 1.2)
    pair_bytes = 2 * D * dtype.itemsize
    total = args.kernel_bytes // pair_bytes
    length = (share / share.sum() * total).long().clamp(min=1)

    pages = -(-length // args.page_size)
    P = int(pages.sum())
    M = int(pages.max())
    table = torch.zeros(N, M, dtype=torch.int32)
    table[torch.arange(M) < pages[:, None]] = torch.randperm(P).int()
    table = table.to(args.device)
    held = length.int().to(args.device)
    keys = torch.randn(P, args.page_size, D, dtype=dtype, device=args.device)
    values = torch.randn_like(keys)
    group = config.num_attention_heads // config.num_key_value_heads
    q = torch.randn(N, group, D, dtype=dtype, device=args.device)

    attend = choose_kernels(torch.device(args.device), dtype).decode_attention
    call = functools.partial(attend, q, keys, values, table, held)
    if attend is TRITON.decode_attention:
        seconds = time_of(graph_of(call), 20, args.device)["seconds"] / GRAPH_CALLS
    else:
        seconds = time_of(call, 5, args.device)["seconds"]
    moved = int(length.sum()) * pair_bytes
    return {
        "batch": batch,
        "lengths": lengths,
        "longest": int(length.max()),
        "bytes": moved,
        "seconds": seconds,
        "bytes_per_second": moved / seconds,
        "of_copy": moved / seconds / bandwidth,
    }


def graph_of(call):
    """A function that runs GRAPH_CALLS calls as one CUDA graph: without their launchers' time."""
    call()  # the first one compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            call()
    return graph.replay


def show_kernel(row):
    print(
        f"attention alone, batch {row['batch']:3}, {row['lengths']:6} lengths "
        f"(longest {row['longest']:7,}): {row['bytes_per_second'] / 1e9:8.1f} GB/s, "
        f"{row['of_copy']:.2f} of copy",
        flush=True,
    )


# ---------------------------------------------------------------------------- What a cache holds


def held_after(config, context, cr):
    """What `context` tokens leave in a cache: the number of recent ones that every head holds, the
    share of those before that each head (L, Hkv) keeps, and the pairs that each head holds."""
    window = config.eviction.window if config.eviction else 0
    recent = min(window + 1, context)
    earlier = context - recent
    if config.eviction and earlier:
        kept = max(context / cr - recent, 1)  # of the earlier ones, on average
        shares = head_shares(config, earlier / kept)
    else:
        shares = torch.ones(config.num_hidden_layers, config.num_key_value_heads)
    return recent, shares, (recent + shares * earlier).round().long()


@torch.inference_mode()
def fill(cache, config, context, cr):
    """Make an empty cache hold what `context` tokens of every sequence leave."""
    recent, shares, length = held_after(config, context, cr)
    cache.widen_tables(cache.chunk, int(length.max()))  # about as wide as a prompt makes it
    cache.rows.seen.fill_(context)
    for layer in range(cache.layers):
        heads = (length[layer], shares[layer])
        heads = [x.repeat(cache.batch_size).to(cache.device) for x in heads]
        fill_layer(cache.rows.layer(layer), cache.pool, context, recent, *heads)
    in_use = len(cache.pool) - int(cache.pool.free_count)  # the first ones: it was empty
    for slots in (cache.pool.keys, cache.pool.values):
        for pages in slots[:in_use].split(4096):
            pages.normal_()


def fill_layer(rows, pool, context, recent, length, shares):
    """The rows of one layer. length, shares (N,): of each row. The recent tokens lie in a row's
    last slots, each evicted or not by the row's share; the pairs before them are some that were
    kept."""
    device = length.device
    page_size = pool.keys.shape[1]
    N, M = rows.table.shape
    add_pages(rows, pool, length)
    rows.length.copy_(length)
    is_page = torch.arange(M, device=device) < -(-length // page_size)[:, None]
    pages = rows.table[is_page]
    if bool((length < context).any()):
        pages = pages[torch.randperm(len(pages), device=device)]
        rows.table[is_page] = pages

    slot = torch.arange(M * page_size, dtype=torch.int32, device=device)
    skipped = (context - length).int()[:, None]  # positions that a row does not hold
    is_recent = slot >= (length - recent)[:, None]  # (N, M * page_size)
    position = torch.where(is_recent, slot + skipped, slot)
    leaves = torch.rand(is_recent.shape, device=device) >= shares[:, None]
    by_page = (N, M, page_size)
    pool.position[pages.long()] = position.view(by_page)[is_page]
    pool.evicted[pages.long()] = (is_recent & leaves).view(by_page)[is_page]

    token = torch.arange(context - recent, context, device=device)
    rows.ring[:, token % rows.ring.shape[1]] = (token - skipped).int()


# ------------------------------------------------------------------------------------ Whole steps


def step_row(model, cr, context, batch, args, bandwidth, memory=None):
    """A row of results for one compression, context and batch; None where memory does not
    suffice."""
    config = model.config
    try:
        cache = KVCache(config, batch, args.device, model.dtype, args.page_size, memory=memory)
        fill(cache, config, context, cr)
        step = DecodeStep(model, cache, sampling={})
        inputs = {row: (1, 0.0) for row in range(batch)}  # a token id, and a number not used
        times = time_of(lambda: step(inputs), args.steps, args.device)
    except (InputError, torch.OutOfMemoryError) as e:  # the cache's own errors are InputErrors
        print(f"CR {cr:g}, {context} tokens x {batch}: left out: {str(e)[:100]}", flush=True)
        return None
    stats = cache.stats()
    pair_bytes = 2 * config.head_dim * model.dtype.itemsize
    weight_bytes = bytes_of_weights(model)
    floor = (weight_bytes + stats["pairs"] * pair_bytes) / bandwidth
    return {
        "cr": cr,
        "context": context,
        "batch": batch,
        "pairs": stats["pairs"],
        "measured_compression": stats["compression_ratio"],
        "cache_bytes": stats["page_bytes"],
        "pool_bytes": stats["pool_bytes"],
        "weight_bytes": weight_bytes,
        **times,
        "tokens_per_second": batch / times["seconds"],
        "floor": floor,
        "over_floor": times["seconds"] / floor,
    }


def bytes_of_weights(model):
    """Of those that a step reads whole: an embedding is not, unless it is the output layer too."""
    total = 0
    for name, p in model.named_parameters():
        if "embed_tokens" not in name or model.config.tie_word_embeddings:
            total += p.numel() * p.element_size()
    return total


def largest_batch_row(model, cr, context, args, bandwidth):
    """The row of the largest batch whose cache fits into --memory, with pages to spare for the
    steps; None if not even one sequence does."""
    config = model.config
    if args.memory:
        memory = args.memory * 1e9
    else:
        memory = 0.8 * torch.cuda.mem_get_info()[0]
    length = held_after(config, context, cr)[2]
    pages = -(-length // args.page_size) + -(-(args.steps + WARM_UP) // args.page_size)
    page_bytes = PagePool.page_bytes(args.page_size, config.head_dim, model.dtype)
    batch = int(memory / (int(pages.sum()) * page_bytes))
    if batch == 0:
        return None
    row = step_row(model, cr, context, batch, args, bandwidth, memory)
    return row and {**row, "largest": True, "memory": memory}


def show_step(row):
    print(
        f"{row['engine']:14} CR {row['cr']:g}, {row['context']:6} tokens x {row['batch']:3}: "
        f"{row['seconds'] * 1e3:9.2f} ms, {row['tokens_per_second']:9.2f} tokens/s, "
        f"{row['over_floor']:5.2f} of floor, {row['pairs']:,} pairs "
        f"({row['measured_compression']:.2f}x), {row['cache_bytes'] / 1e9:.2f} GB in pages",
        flush=True,
    )


def measure_steps(cr, args, results):
    """All step rows of one compression."""
    config = model_config(args.shape, args.layers)
    dtype = getattr(torch, args.dtype)
    model = random_model(config, args.device, dtype, cr, args.window)
    bandwidth = results.data["copy_bytes_per_second"]
    for context in args.contexts:
        measurements = [functools.partial(step_row, batch=batch) for batch in args.batches]
        if args.memory or args.device != "cpu":
            measurements.append(largest_batch_row)
        for measure in measurements:
            row = measure(model, cr, context, args=args, bandwidth=bandwidth)
            tidy(args.device)
            if row is not None:
                row = {"engine": "ours", **row}
                show_step(row)
                results.add("steps", row)


def parse():
    gpu = torch.cuda.is_available()
    p = arguments("Decode benchmark.", "qwen3-8b" if gpu else "qwen3-0.6b")
    add = p.add_argument
    add("--contexts", type=int, nargs="+", default=[8192, 32768] if gpu else [8192])
    add("--batches", type=int, nargs="*", default=[1, 8, 64] if gpu else [8])
    add("--crs", type=float, nargs="+", default=[1, 4, 8])
    add("--window", type=int, default=256)
    add("--page-size", type=int, default=64, choices=[16, 32, 64, 128, 256])
    add("--steps", type=int, default=30 if gpu else 5)
    add("--memory", type=float, help="GB of cache to be filled with as many sequences as fit")
    add("--kernel-batches", type=int, nargs="*", default=[1, 8, 64])
    add("--kernel-bytes", type=int, default=2**30 if gpu else 2**27)
    add("--transformers", nargs="*", default=[], metavar="FILE", help="results to compare with")
    args = p.parse_args()
    choose_device(args)
    return args


def main():
    args = parse()
    results = Results(args, kernel=[], steps=[])
    theirs = read_results(args.transformers, kind_of(results.data))[1]
    bandwidth = copy_bandwidth(args.device)
    results.data["copy_bytes_per_second"] = bandwidth
    print(f"{environment()}\ncopy: {bandwidth / 1e9:.1f} GB/s, read and written", flush=True)
    config = model_config(args.shape, args.layers)
    for batch in args.kernel_batches:
        for lengths in ("even", "uneven"):
            row = kernel_row(config, batch, lengths, args, bandwidth)
            tidy(args.device)
            show_kernel(row)
            results.add("kernel", row)
    for cr in args.crs:
        measure_steps(cr, args, results)
        tidy(args.device)
    results.data["fits"] = compare(results.data["steps"], theirs)
    results.write()


if __name__ == "__main__":
    run_script(main)
