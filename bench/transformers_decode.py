"""
Decoding in transformers, for comparison: the shapes of bench/decode.py, over the caches it has.

    python bench/transformers_decode.py
    python bench/transformers_decode.py --caches static --contexts 2048 --batches 1 8 --layers 4

Weights are random, and so is what a cache holds: as many pairs in every head as there are tokens of
context. A step is a forward pass and greedy sampling, with the tokens read back at its end.
Attention is its "sdpa". On a GPU the static cache's forward pass is compiled, with CUDA graphs, for
a minute or more: it comes last. cuDNN's attention spends up to half a second on a plan for every
new shape, so it is switched off for the cache that grows.
"""

import itertools

import torch
import transformers
from measuring import GPU, WARM_UP, Results, model_config, options, tidy, time_of
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from checkpoint import config_to_dict
from common import run_script


def random_model(args):
    settings = AutoConfig.for_model(**config_to_dict(model_config(args)))
    settings._attn_implementation = "sdpa"
    with torch.device(args.device):
        dtype = getattr(torch, args.dtype)
        return AutoModelForCausalLM.from_config(settings, dtype=dtype).eval()


def filled_cache(kind, model, context, batch, steps):
    """A "static" cache with room for so many steps, or a "dynamic" one."""
    settings = model.config
    cache = DynamicCache(config=settings)
    if kind == "static":
        room = context + WARM_UP + steps
        cache = StaticCache(config=settings, max_cache_len=room + -room % 64)
    heads = (batch, settings.num_key_value_heads, context, settings.head_dim)
    for layer in range(settings.num_hidden_layers):
        pairs = torch.randn(heads, dtype=model.dtype, device=model.device)
        cache.update(pairs, pairs, layer)
    return cache


@torch.no_grad()
def measure(kind, model, context, batch, args):
    torch.backends.cuda.enable_cudnn_sdp(kind == "static")
    forward = model.forward
    if kind == "static" and GPU:
        forward = torch.compile(model.forward, mode="reduce-overhead")
    cache = filled_cache(kind, model, context, batch, args.steps)
    ids = torch.ones(batch, 1, dtype=torch.int64, device=model.device)
    positions = itertools.count(context)

    def step():
        position = torch.full_like(ids, next(positions))
        out = forward(input_ids=ids, past_key_values=cache, position_ids=position, use_cache=True)
        return out.logits[:, -1].argmax(-1).tolist()

    times = time_of(step, args.steps)
    return {**times, "tokens_per_s": 1000 * batch / times["ms"]}


def main():
    args = options(__doc__, caches=["dynamic", "static"], contexts=[8192],
                   batches=[1, 16] if GPU else [4], steps=20 if GPU else 3)
    results = Results(args)
    model = random_model(args)
    for cache, context, batch in itertools.product(args.caches, args.contexts, args.batches):
        where = dict(cache=cache, context=context, batch=batch)
        try:
            row = measure(cache, model, context, batch, args)
            results.add("step", transformers=transformers.__version__, **where, **row)
        except torch.OutOfMemoryError:
            print(f"{where}: left out, no memory", flush=True)
        if GPU:
            torch.compiler.reset()  # what was compiled holds on to its cache
        tidy()


if __name__ == "__main__":
    run_script(main)
