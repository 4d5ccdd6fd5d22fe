"""
A real model's loss under compression: DMS, a sliding window, and kvpress's methods.

    python experiments/real_model.py; python experiments/text.py        # once
    python experiments/real_quality.py                                  # about 40 minutes

Each held-out document is read for 768 tokens, the prompt, and then for 256 more. Measured on these:
the KL of their next-token distributions to the dense model's, and the perplexity. kvpress's methods
compress the prompt once, when it has been read, and hold all of the 256; DMS and the window do it
as they go. So rows say how many pairs a head holds, on average, after the prompt and at the end:
ours from the cache's own count, theirs from the tensors of transformers' cache.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from real_methods import MODEL, mean_length, methods, real_arguments, texts
from shared import KVCache, Results, load, load_tokenizer, mean_and_spread, print_table

PROMPT = 768
CONTINUATION = 256


def documents(tokenizer, count):
    """The first PROMPT + CONTINUATION token ids of documents, (1, T) each."""
    needed = PROMPT + CONTINUATION
    every = (tokenizer.encode(text) for text in texts())
    long = (ids for ids in every if len(ids) >= needed)
    return [torch.tensor([ids[:needed]]) for ids in itertools.islice(long, count)]


def by_engine(model, budget=None):
    """A function of token ids: (logits (CONTINUATION, V), the pairs that a head holds after the
    prompt, and at the end), by our engine."""

    def run(ids):
        cache = KVCache(model.config, 1, budget=budget and (budget, PROMPT))
        heads = cache.layers * cache.kv_heads
        model.states(ids[:, :PROMPT], cache)
        after_prompt = cache.stats()["pairs"] / heads
        logits = model(ids[:, PROMPT:], cache=cache)
        return logits[0], after_prompt, cache.stats()["pairs"] / heads

    return run


def by_press(model, press):
    """The same by transformers under one of kvpress's methods."""
    from transformers import DynamicCache

    def run(ids):
        cache = DynamicCache()
        with press(model):
            model.model(ids[:, :PROMPT], past_key_values=cache)
        after_prompt = mean_length(cache)
        # the mask follows from what the cache holds, RoPE from where the tokens really are
        positions = torch.arange(PROMPT, ids.shape[1])[None]
        logits = model(ids[:, PROMPT:], past_key_values=cache, position_ids=positions).logits
        return logits[0], after_prompt, mean_length(cache)

    return run


@torch.inference_mode()
def measure(run, rows, references):
    """{kl, its standard error, perplexity, pairs} of run(ids); references: dense logits."""
    kl = []
    nats = []
    pairs = []
    for ids, reference in zip(rows, references):
        logits, *held = run(ids)
        log_q = F.log_softmax(logits[:-1].float(), dim=-1)
        log_p = F.log_softmax(reference[:-1].float(), dim=-1)
        kl.append(F.kl_div(log_q, log_p, log_target=True, reduction="batchmean").item())
        nats.append(F.nll_loss(log_q, ids[0, PROMPT + 1 :]).item())
        pairs.append(held)
    mean, spread = mean_and_spread(kl)
    after_prompt, at_end = (sum(column) / len(column) for column in zip(*pairs))
    return {
        "kl": mean,
        "kl_error": spread / math.sqrt(len(kl)),
        "perplexity": math.exp(sum(nats) / len(nats)),
        "pairs_after_prompt": after_prompt,
        "pairs_at_end": at_end,
    }


def main():
    p = real_arguments(__doc__, "real-quality.json", crs=[2, 4, 8], dial=[2, 3, 4, 6, 8, 12])
    p.add_argument("--documents", type=int, default=16)
    args = p.parse_args()
    results = Results(args)
    rows = documents(load_tokenizer(MODEL), args.documents)
    dense = by_engine(load(MODEL)[0])
    with torch.inference_mode():
        references = [dense(ids)[0] for ids in rows]
    for method, cr, run in methods(args, PROMPT, by_engine, by_press):
        if not results.has(method=method, cr=cr):
            results.add(method=method, cr=cr, **measure(run, rows, references))
    columns = ("method", "cr", "kl", "kl_error", "perplexity", "pairs_after_prompt", "pairs_at_end")
    print_table(results.data["rows"], *columns)


if __name__ == "__main__":
    main()
