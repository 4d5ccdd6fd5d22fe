"""
The picture of heads.py: what each head keeps, of what, and how long it grows.

    python experiments/plots_heads.py        # experiments/results/heads.json -> heads.png beside it
"""

import argparse
import json
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parent / "results" / "heads.json"


def draw(rows, file):
    """rows: of heads.py; file: the picture's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.1, 1))
    kept = [row for row in rows if row["what"] == "kept"]
    draw_kinds(left.subplots(), kept)
    above, below = right.subplots(2, 1)
    draw_heads(figure, above, kept)
    draw_lengths(below, [row for row in rows if row["what"] == "lengths"])
    figure.savefig(file, dpi=110)


def draw_kinds(axes, kept):
    """Bars: of each kind of token the share kept, by task."""
    kinds = {kind["kind"] for row in kept for kind in row["kinds"]}
    kinds = sorted(kinds - {"all"}, reverse=True)
    height = 0.8 / len(kept)
    for number, row in enumerate(kept):
        share = {kind["kind"]: 100 * kind["kept"] for kind in row["kinds"]}
        bars = [share.get(kind, 0) for kind in kinds]
        first = 0.4 - (number + 0.5) * height
        places = [i + first for i in range(len(kinds))]
        label = f"{row['task']}, {row['compression_ratio']:.1f}x"
        axes.barh(places, bars, height, label=label)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("% kept for good, mean over heads")
    axes.legend()


def draw_heads(figure, axes, kept):
    """A map: of each layer and head the share kept, of the tokens of all tasks."""
    totals = [row["kinds"][0] for row in kept]
    tokens = sum(total["tokens"] for total in totals)
    held = 0
    for total in totals:
        held = held + total["tokens"] * np.array(total["kept_by_head"])  # (L, Hkv)
    image = axes.imshow(100 * held / tokens, cmap="viridis", vmin=0, aspect="auto")
    axes.set_xticks(range(held.shape[1]))
    axes.set_yticks(range(held.shape[0]))
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="% kept for good")


def draw_lengths(axes, lengths):
    """Lines: the pairs that each head holds while one text, the longest answer's, is made."""
    row = max(lengths, key=lambda row: row["tokens"][-1] - row["prompt_tokens"])
    pairs = np.array(row["pairs_by_head"])  # (n, L, Hkv)
    for layer in range(pairs.shape[1]):
        lines = axes.plot(row["tokens"], pairs[:, layer], color=f"C{layer}", linewidth=0.9)
        lines[0].set_label(f"layer {layer}")
    axes.axvline(row["prompt_tokens"], color="gray", linestyle=":")
    axes.set_xlabel(f"tokens of a text of {row['task']} (dotted: the answer begins)")
    axes.set_ylabel("pairs held by a head")
    axes.legend()


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    p.add_argument("results", type=Path, nargs="?", default=RESULTS)
    file = p.parse_args().results
    draw(json.loads(file.read_text())["rows"], file.with_suffix(".png"))


if __name__ == "__main__":
    main()
