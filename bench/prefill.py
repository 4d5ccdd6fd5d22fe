"""Prefill time and memory at 8x against dense, on random weights of a real shape.

    python bench/prefill.py                                  # Qwen3-0.6B's shape, 4 of its layers, 2k and 8k tokens
    python bench/prefill.py --shape qwen3-0.6b --layers 28 --lengths 2048 8192 32768 --out bench/results/prefill.json
    python bench/prefill.py --models DMS --lengths 2048 8192 32768 --repeat 1      # how its memory grows
"""
import argparse
import json
import resource
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import environment, random_model, shape  # noqa: E402

from kv_cache import KVCache  # noqa: E402


@torch.inference_mode()
def prefill(model, ids, device):
    """(seconds, the cache's stats) of reading ids (1, T) into a fresh cache."""
    cache = KVCache(model.config, 1, device, model.dtype)
    begin = time.perf_counter()
    model(ids, cache=cache, last_only=True)
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, cache.stats()


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--shape", default="qwen3-0.6b")
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    p.add_argument("--models", nargs="+", default=["dense", "DMS"], choices=["dense", "DMS"])
    p.add_argument("--cr", type=float, default=8.0)
    p.add_argument("--window", type=int, default=256)
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--out", help="JSON file for the results")
    args = p.parse_args()
    dtype = getattr(torch, args.dtype)
    models = {name: random_model(shape(args.shape, args.layers), args.device, dtype,
                                 args.cr if name == "DMS" else 1.0, args.window) for name in args.models}
    rows = []
    for T in args.lengths:
        ids = torch.randint(0, 100000, (1, T), device=args.device)
        times, stats = {name: [] for name in models}, {}
        for turn in range(args.repeat + 1):  # in turns, so that drift hits all; the first is a warm-up
            for name, model in models.items():
                seconds, stats[name] = prefill(model, ids, args.device)
                times[name] += [seconds] if turn else []
        row = {"tokens": T, "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
        for name in models:
            row[name] = {"seconds": sorted(times[name])[args.repeat // 2], **{
                key: stats[name][key] for key in ("compression_ratio", "page_bytes")}}
        if len(models) == 2:
            row["ratio"] = row["DMS"]["seconds"] / row["dense"]["seconds"]
        rows.append(row)
        print(f"{T:7} tokens: " + "; ".join(
                  f"{name} {row[name]['seconds']:.2f} s, {row[name]['compression_ratio']:.2f}x, "
                  f"{row[name]['page_bytes'] / 1e6:.0f} MB in pages" for name in models) +
              (f"; DMS takes {row['ratio']:.2f}x the time" if "ratio" in row else "") +
              f"; peak memory of the process so far {row['peak_rss_mb']} MB")
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps({"settings": vars(args), **environment(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
