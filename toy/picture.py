"""Pictures of a retrofit: its training curve, and what each head keeps of the toy's test problems.

    python toy/picture.py out/teacher-dms-8x    # draw training.png from that run's metrics.jsonl
    python toy/picture.py --count               # count what the shipped retrofit's heads hold
    python toy/picture.py                       # draw the shipped retrofit's pictures

All files lie in the run's folder. --count writes heads.json, and heads.png is drawn where that is.
Drawing needs matplotlib: pip install -e ".[plots]"
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from checkpoint import load_model, load_tokenizer  # noqa: E402
from common import read_json, read_text, run_script, write_json  # noqa: E402
from kv_cache import KVCache  # noqa: E402
from toy.data import ToyData  # noqa: E402

PROBLEMS = 60


def count_heads(folder):
    """Pairs held by each head at the end of test problems, over the tokens read: [L][Hkv]."""
    model = load_model(folder)
    data = ToyData(load_tokenizer(folder), seq_len=512, batch_size=1, seed=0)
    ids, documents = data.held_out(PROBLEMS)
    lengths = torch.tensor([sum(sequence) for sequence in documents])
    cache = KVCache(model.config, PROBLEMS)
    model(ids, cache=cache, lengths=lengths)
    pairs = torch.tensor(cache.stats()["pairs_per_head"])
    write_json(folder / "heads.json", {
        "problems": PROBLEMS,
        "tokens": int(lengths.sum()),
        "compression_ratio": cache.stats()["compression_ratio"],
        "shares": (pairs / lengths.sum()).tolist(),
    })


def draw_heads(folder):
    from matplotlib.figure import Figure

    counted = read_json(folder / "heads.json")
    shares = torch.tensor(counted["shares"])  # (L, Hkv)
    figure = Figure(figsize=(4.2, 3.2), layout="tight")
    axes = figure.subplots()
    image = axes.imshow(100 * shares, cmap="viridis", vmin=0)
    for layer, by_head in enumerate(shares.tolist()):
        for head, share in enumerate(by_head):
            color = "white" if share < 0.6 * float(shares.max()) else "black"
            axes.text(head, layer, f"{share:.0%}", ha="center", va="center", color=color)
    axes.set_xticks(range(shares.shape[1]))
    axes.set_yticks(range(shares.shape[0]))
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    axes.set_title(f"share of tokens held, {counted['compression_ratio']:.1f}x in all")
    figure.colorbar(image, label="%")
    figure.savefig(folder / "heads.png", dpi=110)


def draw_training(folder):
    """KL and compression by step."""
    from matplotlib.figure import Figure

    metrics = [json.loads(line) for line in read_text(folder / "metrics.jsonl").splitlines()]
    figure = Figure(figsize=(5.4, 3.2), layout="tight")
    left = figure.subplots()
    right = left.twinx()
    left.set_yscale("log")
    left.set_xlabel("step")
    left.set_ylabel("KL to the teacher, nats", color="tab:blue")
    right.set_ylabel("compression: target (dashed), actual", color="tab:red")
    curves = (
        (left, "kl", dict(color="tab:blue", linewidth=0.8)),
        (right, "target_cr", dict(color="tab:gray", linestyle="--")),
        (right, "cr", dict(color="tab:red", linewidth=0.8)),
    )
    for axes, key, style in curves:
        points = [(row["step"], row[key]) for row in metrics if key in row]
        if points:
            axes.plot(*zip(*points), **style)
    figure.savefig(folder / "training.png", dpi=110)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("folder", nargs="?", type=Path, default=ROOT / "toy" / "retrofitted")
    p.add_argument("--count", action="store_true", help="count what heads hold, and draw nothing")
    args = p.parse_args()
    if args.count:
        return count_heads(args.folder)
    draw_training(args.folder)
    drawn = [args.folder / "training.png"]
    if (args.folder / "heads.json").exists():
        draw_heads(args.folder)
        drawn.append(args.folder / "heads.png")
    print(*drawn, sep="\n")


if __name__ == "__main__":
    run_script(main)
