"""
Hyper-scaling: more chains from the same budget. Hard arithmetic of the toy world, chains sampled at
temperature 1, majority vote; dense beside DMS. After the paper's sections 4 and 5.

    python experiments/hyperscaling.py                                     # 20 minutes on two cores
    python experiments/hyperscaling.py --steps 10 --ratios 8 --chains 4 --problems 2 --block 2

A point is (limit of new tokens, W chains in parallel, compression). For each problem 32 chains that
share its prompt are sampled once. Fewer chains are the mean over disjoint groups of them, and the
shorter limit is their beginning, as a chain's tokens follow from its seed and their place alone.
Half of the answers need more than 170 tokens, all of them less than 200.

What W chains take is added up from the cache's lengths after each step, chain by chain:

reads             the prompt's, once, then what each chain attends to for each new token: pairs of
                  the prompt count for every chain, since each one reads them
peak_pairs        the most pairs that chains which are not over hold at once; again each its own
peak_page_bytes   the most bytes of their pages, where pages that forks share count once. Dense
                  chains share nearly all of the prompt, DMS chains little: a page is 32 pairs

So peak_pairs favours compression, as the paper's peak tokens do, and peak_page_bytes is what a
machine needs. A problem scores 1 if most of the chains that answer are right, 1/k where k answers
are level. `unanswered` is the share of chains that were cut off, `tied` that of level votes.

A frontier is the best accuracy that a budget buys, over limits, W, and, for "DMS", compressions.
The gain is the area between two frontiers over the budgets that both have, on a logarithmic axis,
divided by its width: the mean gain in accuracy at an equal budget. Its spread is the jackknife's
standard error, leaving out one block of problems at a time.
"""

import itertools
import math
from collections import Counter
from dataclasses import dataclass

import torch

import shared
from shared import KVCache, Sampling, Sequence, generate, tasks

BUDGETS = ("reads", "peak_pairs", "peak_page_bytes")
MEANS = ("accuracy", "tied", "unanswered", *BUDGETS)  # of a point


@dataclass
class Chains:
    """What was sampled for one problem, and what it took. k counts a chain's new tokens."""

    answers: dict  # limit -> the answer of each chain, or None
    held: torch.Tensor  # (chains, k): pairs held as token k is sampled, 0 once the chain is over
    pages: torch.Tensor  # (chains, k): pages that hold them
    prompt_reads: int
    shared_pages: int  # of the prompt, that all chains share to their ends
    page_bytes: int


def sample_chains(model, tokenizer, problem, count, limits, temperature, seed):
    """Sample `count` chains for a problem, to the largest of the limits."""
    cache = KVCache(model.config, count, model.device, model.dtype)
    prompt = shared.prompt_ids(tokenizer, problem)
    hot = Sampling(temperature)
    chains = [Sequence(prompt, max(limits), f"{seed} {i}", sampling=hot) for i in range(count)]
    held = torch.zeros(count, max(limits), dtype=torch.int64)
    pages = torch.zeros_like(held)
    steps = generate(model, cache, chains, {tokenizer.end_id}, release=False)
    for k, new in enumerate(steps):
        if k == 0:
            prompt_reads = cache.stats()["reads"]
            shared_pages = count_shared_pages(cache)
        running = [chain.index for chain, _ in new]
        held[running, k] = of_sequences(cache.rows.length, cache)[running]
        in_use = cache.rows.pages_in_use(cache.page_size).sum(2)  # (L, N)
        pages[running, k] = of_sequences(in_use, cache)[running]
    assert cache.stats()["reads"] == prompt_reads + int(held[:, 1:].sum())
    answers = {limit: [] for limit in limits}
    for limit in limits:
        for chain in sorted(chains, key=lambda chain: chain.index):
            text = tokenizer.decode(chain.new[:limit], skip_special_tokens=True)
            answers[limit].append(tasks.final_answer(problem, text))
    return Chains(answers, held, pages, prompt_reads, shared_pages, cache.page_bytes)


def of_sequences(by_row, cache):
    """by_row: (L, N) counts. Returns (B,) int64."""
    return by_row.view(cache.layers, -1, cache.kv_heads).sum((0, 2))


def count_shared_pages(cache):
    """The pages that every sequence of the cache has."""
    shape = (cache.layers, cache.batch_size, cache.kv_heads, -1)
    table = cache.rows.table.view(shape)
    is_page = cache.rows.pages_in_use(cache.page_size).view(shape)
    is_shared = (table == table[:, :1]).all(1) & is_page.all(1)  # (L, Hkv, M)
    return int(is_shared.sum())


def cost(chains, group, limit):
    """What the chains of a group, a slice, take with a limit: {budget: number}."""
    held = chains.held[group, :limit]
    pages = chains.pages[group, :limit]
    running = (held > 0).sum(0)
    in_use = pages.sum(0) - (running - 1).clamp(min=0) * chains.shared_pages
    return {
        "reads": chains.prompt_reads + int(held[:, 1:].sum()),
        "peak_pairs": int(held.sum(0).max()),
        "peak_page_bytes": int(in_use.max()) * chains.page_bytes,
    }


def vote(answers, expected):
    """(The score of a majority vote, whether it was level) of chains' answers."""
    votes = Counter(answer for answer in answers if answer is not None)
    most = max(votes.values(), default=0)
    level = [answer for answer, count in votes.items() if count == most]
    score = 1 / len(level) if expected in level else 0.0
    return score, len(level) > 1


def point_of(chains, group, limit, expected):
    """What a group of chains, a slice, gives with a limit: {name: number}."""
    answers = chains.answers[limit][group]
    score, level = vote(answers, expected)
    return {
        "accuracy": score,
        "tied": float(level),
        "unanswered": answers.count(None) / len(answers),
        **cost(chains, group, limit),
    }


def points_of(problem, chains, places):
    """{(limit, W): the mean point over the groups of W chains} of one problem."""
    expected = tasks.final_answer(problem, problem.answer)
    points = {}
    for limit, width in places:
        starts = range(0, len(chains.held), width)
        groups = [slice(start, start + width) for start in starts]
        rows = [point_of(chains, group, limit, expected) for group in groups]
        points[limit, width] = mean_of(rows)
    return points


def mean_of(rows):
    """Of every name the mean over rows."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def frontier(points, budget):
    """[(cost, the best accuracy for at most that)], both ascending. points: rows."""
    steps = []
    for point in sorted(points, key=lambda point: point[budget]):
        if not steps or point["accuracy"] > steps[-1][1]:
            steps.append((point[budget], point["accuracy"]))
    return steps


def best(steps, cost):
    """What a frontier has for a cost."""
    return max(accuracy for least, accuracy in steps if least <= cost)


def mean_gain(ours, theirs, budget):
    """(The mean gain of our points over theirs, from, to), None where they share no budgets."""
    costs = [[point[budget] for point in points] for points in (ours, theirs)]
    low = max(map(min, costs))
    high = min(map(max, costs))
    if low >= high:
        return None
    frontiers = [frontier(points, budget) for points in (ours, theirs)]
    corners = {low, high}
    for steps in frontiers:
        corners |= {cost for cost, _ in steps if low < cost < high}
    corners = sorted(corners)
    area = 0.0
    for begin, end in zip(corners, corners[1:]):  # between corners both are level
        gain = best(frontiers[0], begin) - best(frontiers[1], begin)
        area += gain * math.log(end / begin)
    return area / math.log(high / low), low, high


def points_over(blocks):
    """The mean points of rows of blocks: [{"method", "limit", "width", ...}]."""
    groups = {}
    for row in blocks:
        groups.setdefault((row["method"], row["limit"], row["width"]), []).append(row)
    points = []
    for (method, limit, width), rows in groups.items():
        numbers = [{name: row[name] for name in MEANS} for row in rows]
        points.append({"method": method, "limit": limit, "width": width, **mean_of(numbers)})
    return points


def gain_of(blocks, methods, budget):
    """The mean gain of methods over the dense model."""
    points = points_over(blocks)
    ours = [point for point in points if point["method"] in methods]
    theirs = [point for point in points if point["method"] == "dense"]
    return mean_gain(ours, theirs, budget)


def spread_of_gain(blocks, methods, budget):
    """The jackknife's standard error of a gain: by leaving out one block at a time."""
    gains = []
    for place in sorted({(row["seed"], row["block"]) for row in blocks}):
        rest = [row for row in blocks if (row["seed"], row["block"]) != place]
        gain = gain_of(rest, methods, budget) if rest else None
        if gain:
            gains.append(gain[0])
    return jackknife(gains)


def jackknife(values):
    """The standard error of a mean, from its values with one part left out at a time."""
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    squares = sum((value - mean) ** 2 for value in values)
    return math.sqrt((n - 1) / n * squares)


def add_gains(results):
    """The points and the gains over all blocks, as rows; those that are there are replaced."""
    blocks = results.find(part="block")
    results.data["rows"] = list(blocks)
    for point in points_over(blocks):
        results.add(part="point", **point)
    methods = dict.fromkeys(row["method"] for row in blocks if row["method"] != "dense")
    members = {method: [method] for method in methods}
    members["DMS"] = list(methods)
    for name, budget in itertools.product(members, BUDGETS):
        keys = {"part": "gain", "method": name, "budget": budget}
        gain = gain_of(blocks, members[name], budget)
        if gain is None:
            results.add(**keys, gain=None)
            continue
        spread = spread_of_gain(blocks, members[name], budget)
        results.add(**keys, gain=gain[0], spread=spread, low=gain[1], high=gain[2])


def add_block(results, keys, model, tokenizer, problems, args):
    """The rows of a block that are not there: a mean point for each limit and W."""
    places = itertools.product(args.limits, widths_of(args))
    missing = [(l, w) for l, w in places if not results.has(**keys, limit=l, width=w)]
    if not missing:
        return
    points = []
    for problem in problems:
        seed = f"{keys['seed']} {problem.prompt}"
        chains = sample_chains(
            model, tokenizer, problem, args.chains, args.limits, args.temperature, seed)
        points.append(points_of(problem, chains, missing))
    for limit, width in missing:
        mean = mean_of([of_problem[limit, width] for of_problem in points])
        results.add(**keys, limit=limit, width=width, **mean)


def widths_of(args):
    """1, 2, 4, ... chains."""
    return [2**i for i in range(args.chains.bit_length())]


def draw(results, file):
    """The points and the frontiers, a panel for each budget. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    points = results.find(part="point")
    for axes, budget in zip(figure.subplots(1, len(BUDGETS), sharey=True), BUDGETS):
        for method in dict.fromkeys(point["method"] for point in points):
            of_method = [point for point in points if point["method"] == method]
            costs, accuracies = zip(*frontier(of_method, budget))
            [line] = axes.step(costs, accuracies, where="post", label=method)
            everywhere = [[point[name] for point in of_method] for name in (budget, "accuracy")]
            axes.scatter(*everywhere, s=12, color=line.get_color())
        axes.set_xscale("log")
        axes.set_xlabel(f"{budget.replace('_', ' ')} of a problem")
    figure.axes[0].set_ylabel("accuracy of the vote")
    figure.axes[0].legend()
    figure.savefig(file)


def main():
    p = shared.toy_arguments(__doc__, "hyperscaling.json", problems=120, seeds=1)
    p.add_argument("--ratios", type=int, nargs="*", default=[4, 8])
    p.add_argument("--chains", type=int, default=32, help="a power of two")
    p.add_argument("--limits", type=int, nargs="*", default=[170, 256], help="of new tokens")
    p.add_argument("--temperature", type=float, default=1.0)
    p.add_argument("--block", type=int, default=20, help="problems of one row")
    args = p.parse_args()
    if args.problems % args.block:
        p.error("--problems must be a multiple of --block")
    results = shared.Results(args)
    for seed in range(args.seeds):
        folders = {"dense": shared.TEACHER}
        for ratio in args.ratios:
            folders[f"DMS {ratio}x"] = shared.standard(ratio, seed, args.steps)
        problems = shared.make_problems("arithmetic", args.problems, seed, "hard")
        for method, folder in folders.items():
            loaded = shared.load(folder)
            for block in range(0, args.problems, args.block):
                keys = {"part": "block", "method": method, "seed": seed, "block": block}
                of_block = problems[block : block + args.block]
                add_block(results, keys, *loaded, of_block, args)
    add_gains(results)
    draw(results, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
