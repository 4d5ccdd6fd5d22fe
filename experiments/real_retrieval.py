"""
Passkey and needle by depth and length: what of a long prompt a real model can still find.

    python experiments/real_model.py; python experiments/text.py        # once
    python experiments/real_retrieval.py                                # some 60 minutes

A number is said once, at some depth of a prompt of 512 to 4,096 tokens, and asked for at its end.
`passkey`: among sentences that repeat themselves (Mohtashami and Jaggi, 2023). `needle`: within
documentation, text that the model has to take seriously. The answer is greedy, and right if the
number is in it. The dense model says how hard it is; the question is part of what is compressed.
kvpress's methods see the whole prompt before they compress it; DMS and the window go as they read.
"""

import random
import sys

import torch
from shared import ROOT, Results, arguments, load
from real_quality import MODEL, PRESSES, RETROFIT, TEXT, mean_length, texts_of, window_model

from generate import Sequence, generate
from kv_cache import KVCache

FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
FACT = "The pass key is {}. Remember it. {} is the pass key. "
QUESTION = "\n\nWhat is the pass key? The pass key is"
NEW_TOKENS = 8


def haystack(kind, tokenizer, length, rng):
    """`length` token ids to hide the number in."""
    text = FILLER * (length // 8)
    if kind == "needle":
        documents = texts_of(TEXT)
        text = "".join(rng.sample(documents, length // 1000 + 2))
    return tokenizer.encode(text)[:length]


def prompt(kind, tokenizer, length, depth, rng):
    """(token ids, `length` of them; the number asked for). depth: 0, at the beginning, to 1."""
    key = str(rng.randrange(10000, 100000))
    fact = tokenizer.encode("\n" + FACT.format(key, key))
    question = tokenizer.encode(QUESTION)
    hay = haystack(kind, tokenizer, length - len(fact) - len(question), rng)
    at = round(depth * len(hay))
    return hay[:at] + fact + hay[at:] + question, key


def by_engine(model, tokenizer):
    """A function of token ids: (the answer's text, pairs a head holds after the prompt)."""

    def run(ids):
        cache = KVCache(model.config, 1)
        sequence = Sequence(ids, NEW_TOKENS)
        pairs = None
        for _ in generate(model, cache, [sequence], {tokenizer.end_id}):
            pairs = pairs or int(cache.rows.length.sum()) / (cache.layers * cache.kv_heads)
        return tokenizer.decode(sequence.new), pairs

    return run


def by_press(model, press, tokenizer):
    """The same of transformers under one of kvpress's methods."""
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
            if new[-1] == tokenizer.end_id:
                break
            given = dict(past_key_values=cache, position_ids=torch.tensor([[position]]))
            logits = model(torch.tensor([[new[-1]]]), **given).logits[:, -1]
        return tokenizer.decode(new), pairs

    return run


@torch.inference_mode()
def measure(method, cr, run, tokenizer, lengths, args, results):
    """The rows of one method: the share of right answers at each kind, length and depth."""
    for kind in args.kinds:
        for length in lengths:
            for depth in args.depths:
                where = dict(method=method, cr=cr, kind=kind, length=length, depth=depth)
                if results.has(**where):
                    continue
                right = []
                held = []
                for trial in range(args.trials):
                    rng = random.Random(f"{kind} {length} {depth} {trial}")
                    ids, key = prompt(kind, tokenizer, length, depth, rng)
                    text, pairs = run(ids)
                    right.append(key in text)
                    held.append(pairs)
                results.add(**where, right=sum(right) / len(right), pairs=sum(held) / len(held))


def main():
    p = arguments(__doc__, "real-retrieval.json")
    p.add_argument("--kinds", nargs="+", default=["passkey", "needle"])
    p.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    p.add_argument("--depths", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7, 0.9])
    p.add_argument("--trials", type=int, default=2)
    p.add_argument("--crs", type=float, nargs="+", default=[4, 8])
    p.add_argument("--presses", nargs="*", default=list(PRESSES), choices=list(PRESSES))
    args = p.parse_args()
    if not MODEL.exists() or not TEXT.exists():
        sys.exit("run experiments/real_model.py and experiments/text.py first")
    results = Results(args)
    dense, tokenizer = load(MODEL)
    measure("dense", 1, by_engine(dense, tokenizer), tokenizer, args.lengths, args, results)
    for cr in args.crs:
        folder = ROOT / "experiments" / RETROFIT.format(cr)
        if folder.exists():
            run = by_engine(load(folder)[0], tokenizer)
            measure("DMS", cr, run, tokenizer, args.lengths, args, results)
        measure_window(cr, tokenizer, args, results)
    if args.presses:
        measure_presses(tokenizer, args, results)


def measure_window(cr, tokenizer, args, results):
    """A window of the budget that the length gives it, so another model for each length."""
    for length in args.lengths:
        run = by_engine(window_model(round(length / cr)), tokenizer)
        measure("window", cr, run, tokenizer, [length], args, results)


def measure_presses(tokenizer, args, results):
    """kvpress's rows."""
    import kvpress
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    for cr in args.crs:
        for name in args.presses:
            press = getattr(kvpress, PRESSES[name])(compression_ratio=1 - 1 / cr)
            run = by_press(theirs, press, tokenizer)
            measure(name, cr, run, tokenizer, args.lengths, args, results)


if __name__ == "__main__":
    main()
