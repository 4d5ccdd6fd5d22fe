"""
Passkey and needle by depth and length: what of a long prompt a real model can still find.

    python experiments/real_model.py; python experiments/text.py        # once
    python experiments/real_retrieval.py                                # about 60 minutes

A number is said once, at one depth of a prompt of 512 to 4,096 tokens, and asked for at its end.
`passkey`: among sentences that repeat themselves (Mohtashami and Jaggi, 2023). `needle`: within
documentation, text that the model has to take seriously. The answer is greedy, and right if the
number is in it. Where the dense model finds nothing the others are not asked. The question is part
of what is compressed, and kvpress's methods see the whole prompt before they compress it; DMS and
the window go as they read.
"""

import itertools
import random

import torch
from real_methods import MODEL, mean_length, methods, real_arguments, texts
from shared import KVCache, Results, Sequence, generate, load_tokenizer, print_table

FILLER = ("The grass is green. The sky is blue. The sun is yellow. Here we go. "
          "There and back again. ")
FACT = "The pass key is {}. Remember it. {} is the pass key. "
QUESTION = "\n\nWhat is the pass key? The pass key is"
NEW_TOKENS = 8


def haystack(kind, tokenizer, length, rng):
    """`length` token ids to hide the number in."""
    text = FILLER * (length // 8)
    if kind == "needle":
        text = "".join(rng.sample(texts(), length // 1000 + 2))
    return tokenizer.encode(text)[:length]


def prompt(kind, tokenizer, length, depth, rng):
    """(token ids, `length` of them; the number asked for). depth: 0, at the beginning, to 1."""
    key = str(rng.randrange(10000, 100000))
    fact = tokenizer.encode("\n" + FACT.format(key, key))
    question = tokenizer.encode(QUESTION)
    hay = haystack(kind, tokenizer, length - len(fact) - len(question), rng)
    at = round(depth * len(hay))
    return hay[:at] + fact + hay[at:] + question, key


def by_engine(model, budget=None):
    """A function of token ids: (the new ids, the pairs that a head holds after the prompt), by our
    engine."""

    def run(ids):
        cache = KVCache(model.config, 1, budget=budget and (budget, len(ids)))
        sequence = Sequence(ids, NEW_TOKENS)
        pairs = None
        for _ in generate(model, cache, [sequence], set()):
            pairs = pairs or int(cache.rows.length.sum()) / (cache.layers * cache.kv_heads)
        return sequence.new, pairs

    return run


def by_press(model, press):
    """The same by transformers under one of kvpress's methods."""
    from transformers import DynamicCache

    def run(ids):
        cache = DynamicCache()
        with press(model):
            states = model.model(torch.tensor([ids]), past_key_values=cache).last_hidden_state
        pairs = mean_length(cache)
        new = []
        logits = model.lm_head(states[:, -1])
        for position in range(len(ids), len(ids) + NEW_TOKENS):
            new.append(int(logits.argmax()))
            logits = model(torch.tensor([[new[-1]]]), past_key_values=cache,
                           position_ids=torch.tensor([[position]])).logits[:, -1]
        return new, pairs

    return run


@torch.inference_mode()
def measure(run, tokenizer, kind, length, depth, trials):
    """{the share of right answers, the pairs that a head holds} of run(ids)."""
    right = 0
    held = 0
    for trial in range(trials):
        rng = random.Random(f"{kind} {length} {depth} {trial}")
        ids, key = prompt(kind, tokenizer, length, depth, rng)
        new, pairs = run(ids)
        right += key in tokenizer.decode(new)
        held += pairs
    return {"right": right / trials, "pairs": held / trials}


def main():
    p = real_arguments(__doc__, "real-retrieval.json", crs=[4, 8], dial=[2, 3, 4, 8])
    p.add_argument("--kinds", nargs="+", default=["passkey", "needle"])
    p.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    p.add_argument("--depths", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7, 0.9])
    p.add_argument("--trials", type=int, default=1)
    args = p.parse_args()
    results = Results(args)
    tokenizer = load_tokenizer(MODEL)
    for length in args.lengths:
        for method, cr, run in methods(args, length, by_engine, by_press):
            for kind, depth in itertools.product(args.kinds, args.depths):
                place = dict(kind=kind, length=length, depth=depth)
                known = results.has(method=method, cr=cr, **place)
                if not known and not results.has(method="dense", right=0.0, **place):
                    found = measure(run, tokenizer, kind, length, depth, args.trials)
                    results.add(method=method, cr=cr, **place, **found)
    print_table(results.data["rows"], "kind", "length", "depth", "method", "cr", "right", "pairs")


if __name__ == "__main__":
    main()
