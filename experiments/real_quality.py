"""
A real model's loss under compression: DMS, a sliding window, and kvpress's methods.

    python experiments/real_model.py; python experiments/text.py        # once
    python experiments/real_quality.py                                  # some 40 minutes

Each held-out document is read for 768 tokens, the prompt, and then for 256 more. Of these: the KL
of their next-token distributions to the dense model's, and the perplexity. kvpress's methods
compress the prompt once, when it has been read, and hold all of the 256; DMS and the window do it
as they go. So rows say how many pairs a head holds, on average, after the prompt and at the end:
ours from the cache's own count, theirs from the tensors of transformers' cache.
"""

import itertools
import json
import math
import sys

import torch
import torch.nn.functional as F
from shared import ROOT, Results, arguments, load, mean_and_spread, sliding_window

from kv_cache import KVCache

MODEL = ROOT / "out" / "smollm2-135m"
TEXT = ROOT / "out" / "text" / "held_out.jsonl"
RETROFIT = "smollm2-135m-dms-{:g}x"  # in experiments/
PRESSES = {"StreamingLLM": "StreamingLLMPress", "TOVA": "TOVAPress", "SnapKV": "SnapKVPress",
           "ExpectedAttention": "ExpectedAttentionPress", "KeyDiff": "KeyDiffPress",
           "Knorm": "KnormPress"}  # fmt: skip
PROMPT = 768
CONTINUATION = 256


def texts_of(file):
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


def documents(tokenizer, count):
    """The first PROMPT + CONTINUATION token ids of documents, (1, T) each."""
    needed = PROMPT + CONTINUATION
    every = (tokenizer.encode(text) for text in texts_of(TEXT))
    long = (ids for ids in every if len(ids) >= needed)
    return [torch.tensor([ids[:needed]]) for ids in itertools.islice(long, count)]


def by_engine(model, ids):
    """(logits (CONTINUATION, V), pairs a head holds after the prompt, and at the end) of our engine."""
    cache = KVCache(model.config, 1)
    heads = cache.layers * cache.kv_heads
    model.states(ids[:, :PROMPT], cache)
    after_prompt = cache.stats()["pairs"] / heads
    logits = model(ids[:, PROMPT:], cache=cache)
    return logits[0], after_prompt, cache.stats()["pairs"] / heads


def by_press(model, press, ids):
    """The same of transformers under one of kvpress's methods."""
    from transformers import DynamicCache

    cache = DynamicCache()
    with press(model):
        model.model(ids[:, :PROMPT], past_key_values=cache)
    after_prompt = mean_length(cache)
    # the mask follows from what the cache holds, RoPE from where the tokens really are
    positions = torch.arange(PROMPT, ids.shape[1])[None]
    logits = model(ids[:, PROMPT:], past_key_values=cache, position_ids=positions).logits
    return logits[0], after_prompt, mean_length(cache)


def mean_length(cache):
    """Pairs that a head holds, the mean over layers."""
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    return sum(lengths) / len(lengths)


@torch.inference_mode()
def measure(run, texts, references):
    """{kl, its spread over documents, perplexity, pairs} of run(ids); references: dense logits."""
    kl = []
    nats = []
    pairs = []
    for ids, reference in zip(texts, references):
        logits, *held = run(ids)
        log_q = F.log_softmax(logits[:-1].float(), dim=-1)
        log_p = F.log_softmax(reference[:-1].float(), dim=-1)
        kl.append(F.kl_div(log_q, log_p, log_target=True, reduction="batchmean").item())
        nats.append(F.nll_loss(log_q, ids[0, PROMPT + 1 :]).item())
        pairs.append(held)
    mean, spread = mean_and_spread(kl)
    after_prompt, at_end = (sum(column) / len(column) for column in zip(*pairs))
    return {"kl": mean, "kl_spread": spread, "perplexity": math.exp(sum(nats) / len(nats)),
            "pairs_after_prompt": after_prompt, "pairs_at_end": at_end}  # fmt: skip


def window_model(pairs):
    """The dense model with a sliding window of so many pairs."""
    return sliding_window(load(MODEL)[0], pairs)


def main():
    p = arguments(__doc__, "real-quality.json")
    p.add_argument("--documents", type=int, default=32)
    p.add_argument("--crs", type=float, nargs="+", default=[2, 4, 8])
    p.add_argument("--presses", nargs="*", default=list(PRESSES), choices=list(PRESSES))
    args = p.parse_args()
    if not MODEL.exists() or not TEXT.exists():
        sys.exit("run experiments/real_model.py and experiments/text.py first")
    results = Results(args)
    dense, tokenizer = load(MODEL)
    texts = documents(tokenizer, args.documents)
    with torch.inference_mode():
        references = [by_engine(dense, ids)[0] for ids in texts]

    def note(method, cr, run):
        results.add(method=method, cr=cr, **measure(run, texts, references))

    if not results.has(method="dense"):
        note("dense", 1, lambda ids: by_engine(dense, ids))
    for cr in args.crs:
        folder = ROOT / "experiments" / RETROFIT.format(cr)
        if folder.exists() and not results.has(method="DMS", cr=cr):
            student = load(folder)[0]
            note("DMS", cr, lambda ids, student=student: by_engine(student, ids))
        if not results.has(method="window", cr=cr):
            window = window_model(round(PROMPT / cr))
            note("window", cr, lambda ids, window=window: by_engine(window, ids))
    if args.presses:
        measure_presses(args, results, note)


def measure_presses(args, results, note):
    """kvpress's rows."""
    import kvpress
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    for cr in args.crs:
        for name in args.presses:
            if results.has(method=name, cr=cr):
                continue
            press = getattr(kvpress, PRESSES[name])(compression_ratio=1 - 1 / cr)
            note(name, cr, lambda ids, press=press: by_press(theirs, press, ids))


if __name__ == "__main__":
    main()
