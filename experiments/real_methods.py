"""The methods that the real model's experiments compare, and what these share.

dense        the model as it is
DMS          its retrofit, experiments/smollm2-135m-dms, at each ratio by that one's offset
             (--retrofit: another one)
budget       the same with a budget: 1/ratio of the prompt's pairs where the prompt ends
window       a sliding window of 1/ratio of the prompt
KeyDiff ...  kvpress's methods: the prompt is compressed to 1/ratio once it has been read
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from shared import ROOT, arguments, load, sliding_window

MODEL = ROOT / "out" / "smollm2-135m"
TEXT = ROOT / "out" / "text" / "held_out.jsonl"
RETROFIT = ROOT / "experiments" / "smollm2-135m-dms"
PRESSES = ("StreamingLLM", "TOVA", "SnapKV", "ExpectedAttention", "KeyDiff", "Knorm")


def real_arguments(description, name, crs, dial):
    """The parser of an experiment on the real model, which has to be there."""
    if not MODEL.exists() or not TEXT.exists():
        sys.exit("run experiments/real_model.py and experiments/text.py first")
    p = arguments(description, name)
    p.add_argument("--crs", type=float, nargs="*", default=crs, help="compression ratios")
    p.add_argument("--dial", type=float, nargs="*", default=dial, help="those of DMS")
    p.add_argument("--presses", nargs="*", default=PRESSES, choices=PRESSES)
    # of results only another one than usual is a setting
    p.add_argument("--retrofit", type=Path, default=argparse.SUPPRESS, metavar="FOLDER",
                   help=f"another one than {RETROFIT.name}")
    return p


def texts():
    """The held-out documents."""
    return [json.loads(line)["text"] for line in TEXT.read_text().splitlines()]


def methods(args, prompt_tokens, by_engine, by_press):
    """(Name, ratio, run) of every method for prompts of so many tokens. run is what
    by_engine(model) or by_press(transformers' model, press) returns."""
    retrofit = getattr(args, "retrofit", RETROFIT)
    yield "dense", 1, by_engine(load(MODEL)[0])
    for cr in args.dial:
        yield "DMS", cr, by_engine(load(retrofit, cr)[0])
    for cr in args.crs:
        yield "budget", cr, by_engine(load(retrofit, cr)[0], prompt_tokens / cr)
    for cr in args.crs:
        window = sliding_window(load(MODEL)[0], round(prompt_tokens / cr))
        yield "window", cr, by_engine(window)
    if args.presses and args.crs:
        import kvpress
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        for cr in args.crs:
            for name in args.presses:
                press = getattr(kvpress, f"{name}Press")(compression_ratio=1 - 1 / cr)
                yield name, cr, by_press(theirs, press)


def mean_length(cache):
    """Pairs that a head of transformers' cache holds, the mean over layers."""
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    return sum(lengths) / len(lengths)
