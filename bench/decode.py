"""
Decoding: the attention kernel alone, whole steps at several compressions, and the same model in transformers.

    python bench/decode.py                                       # a GPU: Qwen3-8B's shape; a CPU: Qwen3-0.6B's, 8k x 8
    python bench/decode.py --shape qwen3-0.6b --layers 4 --contexts 2048 --batches 1 8 --out /tmp/decode.json
    python bench/decode.py --memory 2 --dtype float32 --batches --transformers     # the most tokens/s from 2 GB

Weights are random; what a cache holds is made, not computed: every head has the length that a share of the context
gives it, the shares differing as those of real heads do (log-normal, as in bench/common.py), in pages scattered over
the pool (dense: in order, as a prompt leaves them). Decisions then go on being drawn at that share. A step is a
forward pass and greedy sampling, tokens read back at the end of each. Times are medians over --steps steps after two
or three that are not counted.

    floor = (bytes of the weights read + pairs held x 2 x D x bytes) / bandwidth of the largest copy, read + written

Printed and written as JSON to --out, with hardware, versions and commit: copy bandwidth; kernel rows (bytes/s of the
attention over even and uneven lengths); step rows (tokens/s, time over floor, pairs, bytes), with --compile also
those of the model whose blocks torch.compile has fused; with --memory (a GPU: 80 % of what is free) the largest batch
whose cache fits there, dense and compressed, and so the tokens/s of each from the same memory; rows of transformers
(its best attention for the device, over the caches that it has); and on the steps at one batch a line fitted to time
against pairs.
"""
import argparse
import functools
import gc
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import environment, head_shares, random_model, shape  # noqa: E402

from kernels import cpu  # noqa: E402
from kernels.decode_attention import decode_attention, decode_attention_plain  # noqa: E402
from kv_cache import CacheFull, KVCache  # noqa: E402
from model import DecodeStep  # noqa: E402


def median_seconds(f, steps, device, warm_up=2):
    """Median time of f() in seconds, and the fastest."""
    times = []
    for i in range(warm_up + steps):
        begin = time.perf_counter()
        f()
        if device != "cpu":
            torch.cuda.synchronize()
        times += [time.perf_counter() - begin] if i >= warm_up else []
    return statistics.median(times), min(times)


def tidy(device):
    """Give memory back before the next measurement takes its own."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def copy_bandwidth(device):
    """Bytes per second, read and written, of copying 1 GB (256 MB on a CPU)."""
    a = torch.empty(2**28 if device == "cpu" else 2**30, dtype=torch.uint8, device=device).zero_()
    b = torch.empty_like(a)
    return 2 * a.numel() / median_seconds(lambda: b.copy_(a), 9, device)[1]


def kept_pairs(config, context, cr):
    """What `context` tokens leave: the window, the share of what is outside it that each head (L, Hkv) keeps, and the
    pairs that each head holds, context / cr on average."""
    window = min(config.dms.window + 1, int(context / cr)) if cr > 1 else context
    shares = head_shares(config, (context - window) / max(context / cr - window, 1)) if cr > 1 else \
        torch.ones(config.num_hidden_layers, config.num_key_value_heads)
    return window, shares, (window + shares * (context - window)).round().long()


def fill(cache, context, config, cr):
    """Make the cache hold what `context` tokens of every sequence leave."""
    window, shares, kept = kept_pairs(config, context, cr)
    kept = kept.to(cache.device)
    cache._widen(int(kept.max()), 4096)
    with torch.inference_mode():
        for layer in range(cache.layers):
            length = kept[layer].repeat(cache.batch_size)
            need, table, W = cache._pages(length), cache.table[layer], cache.window + 1
            total, held = int(need.sum()), torch.arange(table.shape[1], device=cache.device) < need[:, None]
            cache._need(total)
            cache.top -= total
            table[held] = cache.free[cache.top:][:total].flip(0)
            cache.length[layer] = length.int()
            for pool in (cache.k_pages, cache.v_pages):
                for pages in pool[int(table[held].min()):int(table[held].max()) + 1].split(4096):
                    pages.normal_()
            if cr > 1:  # pages in any order; the window's slots are the last ones; most of their tokens leave
                table[held] = table[held][torch.randperm(int(held.sum()), device=cache.device)]
                recent = torch.arange(context - window, context, device=cache.device)
                slot = length[:, None] - window + torch.arange(window, device=cache.device)
                cache.ring_slot[layer][:, recent % W] = slot.int()
                leave = torch.rand(slot.shape, device=cache.device) >= shares[layer].to(cache.device).repeat(
                    cache.batch_size)[:, None]
                cache.ring_evict[layer][:, recent % W] = leave
    cache.seen[:] = context


def whole_step(model, context, batch, cr, args, engine, memory=None):
    """A row of results for one compression, context and batch; None where memory does not suffice."""
    config = model.config
    try:
        cache = KVCache(config, batch, args.device, model.dtype, args.page_size, memory=memory)
        fill(cache, context, config, cr)
        step = DecodeStep(model, cache, {})
        tokens = {row: 1 for row in range(batch)}
        uniform = dict.fromkeys(tokens, 0.0)
        seconds, fastest = median_seconds(lambda: step(tokens, uniform), args.steps, args.device, warm_up=3)
    except (CacheFull, torch.OutOfMemoryError):
        return None
    stats = cache.stats()
    weights = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "embed_tokens" not in name
                  or config.tie_word_embeddings)
    pair = 2 * config.head_dim * model.dtype.itemsize
    floor = (weights + stats["pairs"] * pair) / args.bandwidth
    return {"engine": engine, "cr": cr, "context": context, "batch": batch, "pairs": stats["pairs"],
            "measured_compression": stats["compression_ratio"], "cache_bytes": stats["page_bytes"],
            "pool_bytes": stats["pool_bytes"], "weight_bytes": weights, "seconds": seconds, "fastest": fastest,
            "tokens_per_second": batch / seconds, "floor": floor, "over_floor": seconds / floor}


def transformers_rows(config, context, batch, args, dtype):
    """The same shape in transformers: its caches, filled with random numbers to the same length."""
    import transformers
    from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
    settings = transformers.AutoConfig.for_model(**{**config.to_dict(), "dms": None})
    settings._attn_implementation = "sdpa"
    with torch.device(args.device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        model = AutoModelForCausalLM.from_config(settings).eval()
        torch.set_default_dtype(default)
    rows = []
    for name in args.transformers:
        try:
            kv = (batch, config.num_key_value_heads, context, config.head_dim)
            if name == "static":
                cache = StaticCache(config=settings, max_cache_len=context + 64)
            else:
                cache = DynamicCache()
            for layer in range(config.num_hidden_layers):
                some = torch.randn(kv, dtype=dtype, device=args.device)
                cache.update(some, some, layer, {"cache_position": torch.arange(context, device=args.device)})
            ids = torch.ones(batch, 1, dtype=torch.int64, device=args.device)
            position = [context]
            forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=False) \
                if name == "static" and args.device != "cpu" else model.forward

            def step(cache=cache):
                at = torch.tensor([position[0]], device=args.device)
                out = forward(input_ids=ids, past_key_values=cache, position_ids=at[None].expand(batch, 1),
                              cache_position=at, use_cache=True)
                position[0] += 1
                return out.logits[:, -1].argmax(-1).tolist()

            with torch.inference_mode():
                seconds, fastest = median_seconds(step, args.transformers_steps, args.device, warm_up=2)
        except torch.OutOfMemoryError:
            continue
        rows.append({"engine": f"transformers {transformers.__version__}, {name} cache", "cr": 1, "context": context,
                     "batch": batch, "seconds": seconds, "fastest": fastest, "tokens_per_second": batch / seconds})
        show(rows[-1])
        del cache
        tidy(args.device)
    return rows


def kernel_rows(args, dtype, G=4, H=8, D=128):
    """The attention alone: bytes per second over even and very uneven lengths that hold the same number of pairs."""
    attend, rows = decode_attention, []
    if args.device == "cpu":
        attend = cpu.decode_attention if cpu.takes(torch.empty(0, dtype=dtype)) else decode_attention_plain
    for batch in args.kernel_batches:
        for kind in ("even", "uneven"):
            N, total = batch * H, args.kernel_bytes // (2 * D * dtype.itemsize)
            share = torch.exp(torch.randn(N, generator=torch.Generator().manual_seed(0)) * 1.2) if kind == "uneven" \
                else torch.ones(N)
            length = (share / share.sum() * total).long().clamp(min=1)
            pages = -(-length // args.page_size)
            P, M = int(pages.sum()), int(pages.max())
            table = torch.zeros(N, M, dtype=torch.int32)
            table[torch.arange(M) < pages[:, None]] = (torch.arange(P) if args.device == "cpu" else
                                                       torch.randperm(P)).int()
            pools = [torch.empty(P, args.page_size, D, dtype=dtype, device=args.device).normal_() for _ in range(2)]
            q = torch.randn(N, G, D, dtype=dtype, device=args.device)
            table, held = table.to(args.device), length.int().to(args.device)
            seconds, _ = median_seconds(lambda pools=pools: attend(q, *pools, table, held),
                                        3 if args.device == "cpu" else 20, args.device)
            moved = int(length.sum()) * 2 * D * dtype.itemsize
            rows.append({"batch": batch, "lengths": kind, "longest": int(length.max()), "bytes": moved,
                         "seconds": seconds, "bytes_per_second": moved / seconds,
                         "of_copy": moved / seconds / args.bandwidth})
            print(f"attention alone, batch {batch:3}, {kind:6} lengths (longest {int(length.max()):7,}): "
                  f"{moved / seconds / 1e9:8.1f} GB/s, {rows[-1]['of_copy']:.2f} of copy", flush=True)
            del pools
    return rows


def show(r):
    extra = f", {r['over_floor']:5.2f} of floor, {r['pairs']:,} pairs, {r['cache_bytes'] / 1e9:.2f} GB in pages" \
        if "pairs" in r else ""
    print(f"{r['engine']:34} CR {r['cr']:g}, {r['context']:6} tokens x {r['batch']:3}: {r['seconds'] * 1e3:9.2f} ms, "
          f"{r['tokens_per_second']:9.2f} tokens/s{extra}", flush=True)


def largest_batch(model, context, cr, args, engine):
    """The row of the largest batch whose cache fits into --memory, with a page to spare for every head; None if not
    even one sequence does."""
    config = model.config
    memory = args.memory * 1e9 if args.memory else 0.8 * torch.cuda.mem_get_info()[0]
    pages = int((-(-kept_pairs(config, context, cr)[2] // args.page_size) + 1).sum())
    batch = int(memory / (pages * args.page_size * 2 * config.head_dim * model.dtype.itemsize))
    row = whole_step(model, context, batch, cr, args, engine, memory) if batch else None
    return row and {**row, "largest": True, "memory": memory}


def linear_fit(rows):
    """Seconds against pairs, least squares: fixed seconds, seconds per pair, and R squared."""
    x, y = ([float(r[key]) for r in rows] for key in ("pairs", "seconds"))
    slope, fixed = statistics.linear_regression(x, y)
    return {"fixed_seconds": fixed, "seconds_per_pair": slope, "r_squared": statistics.correlation(x, y) ** 2}


def compare(result, rows, args):
    """Ratios to transformers, to dense and, where both took what fits into the same memory, to dense there; and the
    lines fitted."""
    for engine, context in itertools.product(dict.fromkeys(r["engine"] for r in rows), args.contexts):
        ours = [r for r in rows if (r["engine"], r["context"]) == (engine, context)]
        for batch in [*args.batches, "largest"]:
            same = {r["cr"]: r for r in ours if batch == ("largest" if "largest" in r else r["batch"])}
            theirs = [r for r in result["transformers"] if (r["context"], r["batch"]) == (context, batch)]
            for cr, r in same.items():
                says = f"{engine}, CR {cr:g}, {context} x {r['batch']}:"
                if theirs:
                    best = max(theirs, key=lambda r: r["tokens_per_second"])
                    r["over_transformers"] = r["tokens_per_second"] / best["tokens_per_second"]
                    print(f"{says} {r['over_transformers']:.2f} times the tokens/s of {best['engine']}")
                if 1 in same and cr > 1:
                    r["over_dense"] = r["tokens_per_second"] / same[1]["tokens_per_second"]
                    print(f"{says} {r['over_dense']:.2f} times the tokens/s of dense x {same[1]['batch']}"
                          f"{' in the same memory' if batch == 'largest' else ''}")
    for engine, batch in itertools.product(dict.fromkeys(r["engine"] for r in rows), args.batches):
        same = [r for r in rows if (r["engine"], r["batch"]) == (engine, batch) and "largest" not in r]
        if len(same) > 2:
            fit = result.setdefault("fits", {})[f"{engine}, batch {batch}"] = linear_fit(same)
            print(f"{engine}, batch {batch}: seconds = {fit['fixed_seconds']:.4f} + {fit['seconds_per_pair']:.3e} x "
                  f"pairs, R^2 = {fit['r_squared']:.4f}")


def main():
    gpu = torch.cuda.is_available()
    p = argparse.ArgumentParser(description="Decode benchmark.")
    p.add_argument("--shape", default="qwen3-8b" if gpu else "qwen3-0.6b")
    p.add_argument("--layers", type=int, help="fewer than the shape has")
    p.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768] if gpu else [8192])
    p.add_argument("--batches", type=int, nargs="*", default=[1, 8, 64] if gpu else [8])
    p.add_argument("--crs", type=float, nargs="+", default=[1, 4, 8])
    p.add_argument("--window", type=int, default=256)
    p.add_argument("--page-size", type=int, default=64)
    p.add_argument("--steps", type=int, default=30 if gpu else 5)
    p.add_argument("--memory", type=float, help="GB of cache to be filled with as many sequences as fit")
    p.add_argument("--compile", action="store_true", default=gpu, help="also with torch.compile")
    p.add_argument("--transformers", nargs="*", default=["static", "dynamic"], help="its caches to compare with")
    p.add_argument("--transformers-steps", type=int, default=20 if gpu else 2)
    p.add_argument("--kernel-batches", type=int, nargs="*", default=[1, 8, 64])
    p.add_argument("--kernel-bytes", type=int, default=2**30 if gpu else 2**27)
    p.add_argument("--device", default="cuda" if gpu else "cpu")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--out", type=Path, help="JSON file for the results")
    args = p.parse_args()
    dtype = getattr(torch, args.dtype)
    args.bandwidth = copy_bandwidth(args.device)
    print(f"{environment()}\ncopy: {args.bandwidth / 1e9:.1f} GB/s, read and written", flush=True)
    result = {"settings": {**vars(args), "out": None}, **environment(), "copy_bytes_per_second": args.bandwidth}
    result["kernel"] = kernel_rows(args, dtype)
    rows, engines = result.setdefault("steps", []), ["ours", "ours, compiled"] if args.compile else ["ours"]
    for cr in args.crs:
        model = random_model(shape(args.shape, args.layers), args.device, dtype, cr, args.window)
        for engine in engines:
            if engine != "ours":
                model.compile()
            for context in args.contexts:
                measured = [functools.partial(whole_step, model, context, batch, cr, args, engine)
                            for batch in args.batches]
                if args.memory or gpu:
                    measured.append(functools.partial(largest_batch, model, context, cr, args, engine))
                for measure in measured:
                    row = measure()
                    tidy(args.device)
                    if row is not None:
                        rows.append(row)
                        show(row)
        del model
        tidy(args.device)
    result["transformers"] = []
    for context, batch in itertools.product(args.contexts, args.batches if args.transformers else []):
        result["transformers"] += transformers_rows(shape(args.shape, args.layers), context, batch, args, dtype)
    compare(result, rows, args)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
