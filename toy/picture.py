"""Two pictures of the shipped retrofit: what each head keeps, and the training curve.

    python toy/picture.py --count     # count what heads hold of 60 test problems: heads.json
    python toy/picture.py             # draw heads.png and training.png from heads.json and metrics.jsonl

All files lie in toy/retrofitted. Drawing needs matplotlib: pip install -e ".[plots]"
"""
import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from checkpoint import load_model, load_tokenizer, read_json, read_lines, write_json  # noqa: E402
from kv_cache import KVCache  # noqa: E402
from toy.data import ToyData  # noqa: E402

FOLDER = ROOT / "toy" / "retrofitted"
PROBLEMS = 60


def count_heads():
    """Pairs held by each head at the end of test problems, over the tokens read: [L][Hkv]."""
    model = load_model(FOLDER)
    data = ToyData(load_tokenizer(FOLDER), seq_len=512, batch_size=1, seed=0)
    ids, documents = data.held_out(PROBLEMS)
    lengths = torch.tensor([sum(row) for row in documents])
    cache = KVCache(model.config, PROBLEMS)
    model(ids, cache=cache, lengths=lengths, last_only=True)
    pairs = torch.tensor(cache.stats()["pairs_per_head"])
    shares = (pairs / lengths.sum()).tolist()
    compression = cache.stats()["compression_ratio"]
    tokens = int(lengths.sum())
    write_json(FOLDER / "heads.json", {
        "problems": PROBLEMS, "tokens": tokens, "compression_ratio": compression, "shares": shares})


def draw_heads(plt):
    counted = read_json(FOLDER / "heads.json")
    shares = torch.tensor(counted["shares"])  # (L, Hkv)
    figure, axes = plt.subplots(figsize=(4.2, 3.2))
    image = axes.imshow(100 * shares, cmap="viridis", vmin=0)
    for layer, row in enumerate(shares.tolist()):
        for head, share in enumerate(row):
            light = share < 0.6 * float(shares.max())
            axes.text(head, layer, f"{share:.0%}", ha="center", va="center",
                      color="white" if light else "black")
    axes.set_xticks(range(shares.shape[1]))
    axes.set_yticks(range(shares.shape[0]))
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    axes.set_title(f"share of tokens held, {counted['compression_ratio']:.1f}x in all")
    figure.colorbar(image, label="%")
    figure.tight_layout()
    figure.savefig(FOLDER / "heads.png", dpi=110)


def draw_training(plt):
    rows = read_lines(FOLDER / "metrics.jsonl").values()
    steps = [row["step"] for row in rows]
    figure, left = plt.subplots(figsize=(5.4, 3.2))
    left.plot(steps, [row["kl"] for row in rows], color="tab:blue", linewidth=0.8)
    left.set_yscale("log")
    left.set_xlabel("step")
    left.set_ylabel("KL to the teacher, nats", color="tab:blue")
    right = left.twinx()
    right.plot(steps, [row["target_cr"] for row in rows], color="tab:gray", linestyle="--")
    right.plot(steps, [row["cr"] for row in rows], color="tab:red", linewidth=0.8)
    right.set_ylabel("compression: target (dashed), actual", color="tab:red")
    figure.tight_layout()
    figure.savefig(FOLDER / "training.png", dpi=110)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--count", action="store_true", help="count what heads hold, and draw nothing")
    if p.parse_args().count:
        return count_heads()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    draw_heads(pyplot)
    draw_training(pyplot)
    print(json.dumps({"written": ["heads.png", "training.png"], "in": str(FOLDER)}))


if __name__ == "__main__":
    main()
