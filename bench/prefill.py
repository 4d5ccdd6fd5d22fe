"""
Prefill: reading a prompt into the cache, with DMS and dense, beside dense flash attention without a
cache.

    python bench/prefill.py                            # a GPU: Qwen3-8B's shape, 8k and 32k tokens
    python bench/prefill.py --layers 4 --lengths 2048 8192

Weights are random, and heads as uneven as real ones. The three are the same model.
"""

import torch
from measuring import GPU, Results, compress, options, peak_memory, random_model, tidy, time_of

from common import run_script
from dms import masked_attention
from kv_cache import KVCache


@torch.inference_mode()
def prefill(model, ids, engine):
    """Compute the last token's logits. Returns the compression: 1 where there is no cache."""
    if engine == "flash":
        states = model.hidden(ids, masked_attention(model.config))
        model.lm_head(states[:, -1:])
        return 1.0
    cache = KVCache(model.config, 1, model.device, model.dtype)
    model(ids, cache=cache, last_only=True)
    return cache.compression_ratio()


def main():
    args = options(__doc__, lengths=[8192, 32768] if GPU else [2048], cr=8.0, window=256, repeat=3)
    results = Results(args)
    model = random_model(args)
    for T in args.lengths:
        ids = torch.randint(0, model.config.vocab_size, (1, T), device=args.device)
        for engine in ("flash", "dense", "DMS"):
            compress(model, T, args.cr if engine == "DMS" else 1, args.window)
            tidy()
            compression = prefill(model, ids, engine)  # the first one compiles

            def run(ids=ids, engine=engine):
                prefill(model, ids, engine)

            times = time_of(run, args.repeat, warm_up=0)
            row = {**times, "tokens_per_s": 1000 * T / times["ms"], "compression": compression}
            results.add("prefill", tokens=T, engine=engine, **row, **peak_memory())
    results.add_kernels("last prefill's kernels", run)


if __name__ == "__main__":
    run_script(main)
