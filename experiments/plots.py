"""
Pictures of accuracy.json and real-quality.json, methods beside each other.

    python experiments/plots.py        # accuracy.png, real-quality.png beside them
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
TASKS = ("needles", "variables", "arithmetic")
# DMS stands out; what is bounded while answering, too, has its press's colour
STYLES = {
    "DMS": dict(color="black", linewidth=2.5, zorder=3),
    "budget": dict(color="black", linestyle="--"),
    "window": dict(color="gray", linestyle="--"),
    "KeyDiff": dict(color="tab:blue"),
    "KVzip": dict(color="tab:green"),
    "ExpectedAttention": dict(color="tab:orange"),
    "TOVA": dict(color="tab:red"),
    "SnapKV": dict(color="tab:purple"),
    "Knorm": dict(color="tab:brown"),
    "ObservedAttention": dict(color="tab:pink"),
    "StreamingLLM": dict(color="tab:cyan"),
}


def style_of(method):
    name, *bounded = method.split(", ")
    return {**STYLES[name], **({"linestyle": ":"} if bounded else {})}


def mean_points(rows, x, y):
    """{method: [(x, y), ...], ascending}, the means over all rows of a method and ratio."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["method"], row.get("ratio", row.get("cr"))].append((row[x], row[y]))
    points = defaultdict(list)
    for (method, _), pairs in groups.items():
        xs, ys = zip(*pairs)
        points[method].append((sum(xs) / len(xs), sum(ys) / len(ys)))
    return {method: sorted(pairs) for method, pairs in points.items()}


def draw_lines(axes, rows, x, y):
    """A line for each method, the dense model as a level one."""
    points = mean_points(rows, x, y)
    [(_, dense)] = points.pop("dense")
    axes.axhline(dense, color="black", linewidth=0.8, label="dense")
    for method in sorted(points, key=lambda method: list(STYLES).index(method.split(",")[0])):
        xs, ys = zip(*points[method])
        axes.plot(xs, ys, marker=".", label=method, **style_of(method))


def draw_accuracy(rows, file):
    """The hard problems of each task: accuracy against the pairs of a head, the most at once."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(TASKS), sharey=True), TASKS):
        asked = [row for row in rows if row["task"] == task and row["level"] == "hard"]
        draw_lines(axes, asked, "peak_pairs", "accuracy")
        axes.set_xscale("log", base=2)
        axes.set_title(task)
        axes.set_xlabel("pairs that a head holds at most, the mean")
    figure.axes[0].set_ylabel("accuracy")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=8)
    figure.savefig(file, dpi=110)


def draw_quality(rows, file):
    """KL to the dense model, against the pairs held after the prompt and at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    when = {"pairs_after_prompt": "after the prompt", "pairs_at_end": "at the end"}
    for axes, (pairs, words) in zip(figure.subplots(1, 2, sharey=True), when.items()):
        draw_lines(axes, rows, pairs, "kl")
        axes.set_xscale("log", base=2)
        axes.set_xlabel(f"pairs that a head holds {words}, the mean")
    figure.axes[0].set_ylabel("KL to the dense model, nats a token")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=110)


def main():
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for name, draw in {"accuracy": draw_accuracy, "real-quality": draw_quality}.items():
        file = RESULTS / f"{name}.json"
        if file.exists():
            draw(json.loads(file.read_text())["rows"], file.with_suffix(".png"))


if __name__ == "__main__":
    main()
