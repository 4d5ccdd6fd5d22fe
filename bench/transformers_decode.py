"""
Decoding in transformers, for comparison: the same shapes, over the caches that it has.

    python bench/transformers_decode.py --out theirs.json        # defaults as for bench/decode.py
    python bench/transformers_decode.py --caches static --contexts 2048 --batches 1 8 --layers 4

Weights are random, and so is what a cache holds: as many pairs in every head as there are tokens of
context. A step is a forward pass and greedy sampling, tokens read back at its end, as there.
Attention is its "sdpa", which is the best for the device; on a GPU the static cache's forward pass
is compiled with CUDA graphs. PyTorch's cuDNN attention, which spends up to half a second on a plan
for every new shape, is switched off for the cache that grows.
"""

import itertools

import torch
import transformers
from common import (
    WARM_UP,
    Results,
    arguments,
    environment,
    model_config,
    tidy,
    time_of,
)
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from checkpoint import choose_device, config_to_dict, run_script


def random_model(args):
    dtype = getattr(torch, args.dtype)
    settings = AutoConfig.for_model(**config_to_dict(model_config(args.shape, args.layers)))
    settings._attn_implementation = "sdpa"
    with torch.device(args.device):
        return AutoModelForCausalLM.from_config(settings, dtype=dtype).eval()


def filled_cache(kind, model, context, batch, steps):
    """A "static" cache with room for so many steps, or a "dynamic" one."""
    settings = model.config
    if kind == "static":
        room = context + WARM_UP + steps
        cache = StaticCache(config=settings, max_cache_len=room + -room % 64)
    else:
        cache = DynamicCache(config=settings)
    heads = (batch, settings.num_key_value_heads, context, settings.head_dim)
    for layer in range(settings.num_hidden_layers):
        some = torch.randn(heads, dtype=model.dtype, device=model.device)
        cache.update(some, some, layer)
    return cache


def decode_step(forward, cache, context, batch, device):
    """A function that makes one step with `forward`, the model's own or a compiled one."""
    ids = torch.ones(batch, 1, dtype=torch.int64, device=device)
    positions = itertools.count(context)

    def step():
        position = torch.full_like(ids, next(positions))
        out = forward(input_ids=ids, past_key_values=cache, position_ids=position, use_cache=True)
        return out.logits[:, -1].argmax(-1).tolist()

    return step


@torch.no_grad()
def step_row(kind, model, context, batch, args):
    """A row of results for one cache, context and batch; None where memory does not suffice."""
    torch.backends.cuda.enable_cudnn_sdp(kind == "static")
    forward = model.forward
    if kind == "static" and args.device != "cpu":
        forward = torch.compile(model.forward, mode="reduce-overhead")
    try:
        cache = filled_cache(kind, model, context, batch, args.steps)
        step = decode_step(forward, cache, context, batch, args.device)
        times = time_of(step, args.steps, args.device)
    except torch.OutOfMemoryError as e:
        print(f"{kind} cache, {context} tokens x {batch}: left out: {str(e)[:100]}", flush=True)
        return None
    return {
        "engine": f"transformers {transformers.__version__}, {kind} cache",
        "cr": 1,
        "context": context,
        "batch": batch,
        **times,
        "tokens_per_second": batch / times["seconds"],
    }


def parse():
    gpu = torch.cuda.is_available()
    p = arguments("Decoding in transformers.", "qwen3-8b" if gpu else "qwen3-0.6b")
    add = p.add_argument
    add("--caches", nargs="+", default=["static", "dynamic"], choices=["static", "dynamic"])
    add("--contexts", type=int, nargs="+", default=[8192, 32768] if gpu else [8192])
    add("--batches", type=int, nargs="+", default=[1, 8, 64] if gpu else [8])
    add("--steps", type=int, default=20 if gpu else 2)
    args = p.parse_args()
    choose_device(args)
    return args


def main():
    args = parse()
    results = Results(args, transformers=[])
    print(environment(), flush=True)
    model = random_model(args)
    for kind, context, batch in itertools.product(args.caches, args.contexts, args.batches):
        row = step_row(kind, model, context, batch, args)
        if args.device != "cpu":
            torch.compiler.reset()  # what was compiled holds on to its cache
        tidy(args.device)
        if row is not None:
            print(
                f"{row['engine']}, {context:6} tokens x {batch:3}: "
                f"{row['seconds'] * 1e3:9.2f} ms, {row['tokens_per_second']:9.2f} tokens/s",
                flush=True,
            )
            results.add("transformers", row)


if __name__ == "__main__":
    run_script(main)
