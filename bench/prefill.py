"""
Prefill: its time and memory with DMS at 8x against dense, on random weights of a real shape.

    python bench/prefill.py                     # 4 layers of Qwen3-0.6B's shape, 2k and 8k tokens
    python bench/prefill.py --layers 28 --lengths 2048 8192 32768 --out bench/results/prefill.json
    python bench/prefill.py --models DMS --lengths 2048 8192 32768 --repeat 1    # how memory grows
"""

import resource

import torch
from common import Results, arguments, model_config, random_model, seconds_of, tidy

from checkpoint import choose_device, run_script
from kv_cache import KVCache


@torch.inference_mode()
def prefill(model, ids, device):
    """(seconds, the cache's stats) of reading ids (1, T) into a fresh cache."""
    tidy(device)  # a GPU's free memory is what the pool takes its size from
    cache = KVCache(model.config, 1, device, model.dtype)
    seconds = seconds_of(lambda: model(ids, cache=cache, last_only=True), device)
    return seconds, cache.stats()


def length_row(models, T, args):
    """A row of results for prompts of T tokens."""
    ids = torch.randint(0, 100000, (1, T), device=args.device)
    times = {name: [] for name in models}
    stats = {}
    for turn in range(args.repeat + 1):  # in turns, so that drift hits all
        for name, model in models.items():
            seconds, stats[name] = prefill(model, ids, args.device)
            if turn > 0:  # the first is a warm-up
                times[name].append(seconds)
    row = {"tokens": T, "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    if args.device != "cpu":  # weights and work: the pool is as large as there is memory
        pool = max(s["pool_bytes"] for s in stats.values())
        row["peak_gpu_mb_without_pool"] = (torch.cuda.max_memory_allocated() - pool) // 2**20
    for name in models:
        row[name] = {
            "seconds": sorted(times[name])[args.repeat // 2],
            "compression_ratio": stats[name]["compression_ratio"],
            "page_bytes": stats[name]["page_bytes"],
        }
    if len(models) == 2:
        row["ratio"] = row["DMS"]["seconds"] / row["dense"]["seconds"]
    return row


def show(row, models):
    parts = []
    for name in models:
        r = row[name]
        parts.append(f"{name} {r['seconds']:.2f} s, {r['compression_ratio']:.2f}x, "
                     f"{r['page_bytes'] / 1e6:.0f} MB in pages")
    if "ratio" in row:
        parts.append(f"DMS takes {row['ratio']:.2f}x the time")
    parts.append(f"peak memory of the process so far {row['peak_rss_mb']} MB")
    print(f"{row['tokens']:7} tokens: {'; '.join(parts)}", flush=True)


def main():
    p = arguments("Prefill benchmark.", "qwen3-0.6b", layers=4, dtype="float32")
    p.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    p.add_argument("--models", nargs="+", default=["dense", "DMS"], choices=["dense", "DMS"])
    p.add_argument("--cr", type=float, default=8.0)
    p.add_argument("--window", type=int, default=256)
    p.add_argument("--repeat", type=int, default=3)
    args = p.parse_args()
    choose_device(args)
    results = Results(args, rows=[])
    dtype = getattr(torch, args.dtype)
    models = {}
    for name in args.models:
        config = model_config(args.shape, args.layers)
        cr = args.cr if name == "DMS" else 1.0
        models[name] = random_model(config, args.device, dtype, cr, args.window)
    for T in args.lengths:
        row = length_row(models, T, args)
        show(row, models)
        results.add("rows", row)


if __name__ == "__main__":
    run_script(main)
