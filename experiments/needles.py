"""
Needles by depth and length: the toy teacher, its retrofit to 8x, and a sliding window that holds as
many pairs, on texts up to four times as long as those that any of them was trained on.

    python experiments/needles.py                                    # 10 minutes on two cores
    python experiments/needles.py --steps 10 --lengths 128 --depths 0 1 --problems 2    # a trial

A text is filler with four facts in it ("The code of rosa is 52."), and the question asks for one of
them. This one lies at a depth: 0 at the text's beginning, 1 right before the question; the other
three lie anywhere. Training asks for at least half of a text's facts, so it has seen no such text.

The dense teacher was trained on texts of up to 512 tokens: lengths where it fails by itself say
little about eviction, which may then do better or worse. For every length the window's budget is
what a head of the retrofit holds at the end, on average over the depths. The retrofit was trained
to 8x on other texts, with more facts; the rows say how far it compresses these.
"""

import random

import shared
from toy import tasks

RATIO = 8
FACTS = 4


def make_problem(rng, length, depth):
    """A text of about `length` tokens, template and answer included, with the fact at a depth."""
    names = rng.sample(tasks.NAMES, FACTS)
    codes = [f"{rng.randrange(100):02d}" for _ in names]
    asked, *others = [f"The code of {name} is {code}." for name, code in zip(names, codes)]
    question = f"Give the codes of {names[0]}."
    answer = f"{names[0]} is {codes[0]}."
    words = tasks.count_tokens(" ".join([asked, *others, question, answer]))
    room = length - words - tasks.TEMPLATE_TOKENS
    sentences = []
    while room >= 8:
        sentences.append(tasks.filler(rng))
        room -= tasks.count_tokens(sentences[-1])
    for other in others:
        sentences.insert(rng.randint(0, len(sentences)), other)
    sentences.insert(round(depth * len(sentences)), asked)
    text = " ".join([*sentences, question])
    return tasks.Problem("needles", text, answer, ((names[0], codes[0]),))


def add_point(results, keys, model, tokenizer, args):
    """Add the row of a method, a length and a depth."""
    rng = random.Random(f"needles {keys['length']} {keys['depth']} {keys['seed']}")
    problems = [make_problem(rng, keys["length"], keys["depth"]) for _ in range(args.problems)]
    # a cache's pool is as large as this says; there is nothing else that it limits
    model.config.max_position_embeddings = max(args.lengths) + 64
    texts, cache = shared.answer(model, tokenizer, problems, batch=16, max_new_tokens=16)
    held = cache.ended_pairs / len(problems) / (cache.layers * cache.kv_heads)
    results.add(
        **keys,
        accuracy=shared.accuracy(problems, texts),
        pairs_of_a_head=held,
        compression=cache.compression_ratio(),
        peak_page_bytes=cache.stats()["peak_page_bytes"],
    )


def add_depths(results, method, length, seed, model, args):
    """Add the rows of a method and a length that are not there. model: () -> (model, tokenizer)"""
    keys = {"method": method, "length": length, "seed": seed}
    missing = [depth for depth in args.depths if not results.has(**keys, depth=depth)]
    if not missing:
        return
    loaded = model()
    for depth in missing:
        add_point(results, {**keys, "depth": depth}, *loaded, args)


def budget_of(results, length, seed):
    """Pairs of a head that the retrofit held at the end, on average over the depths."""
    rows = results.find(method="DMS", length=length, seed=seed)
    return max(1, round(sum(row["pairs_of_a_head"] for row in rows) / len(rows)))


def main():
    p = shared.toy_arguments(__doc__, "needles.json", problems=30, seeds=3)
    p.add_argument("--lengths", type=int, nargs="*", default=[256, 512, 768, 1024, 1536, 2048])
    p.add_argument("--depths", type=float, nargs="*", default=[0.0, 0.25, 0.5, 0.75, 1.0])
    args = p.parse_args()
    results = shared.Results(args)
    for seed in range(args.seeds):
        folder = shared.standard(RATIO, seed, args.steps)
        for length in args.lengths:
            add_depths(results, "dense", length, seed, lambda: shared.load(shared.TEACHER), args)
            add_depths(results, "DMS", length, seed, lambda: shared.load(folder), args)
            budget = budget_of(results, length, seed)
            add_depths(results, "window", length, seed, lambda: shared.window_of(budget), args)
    columns = ("method", "length", "depth", "seed", "accuracy", "pairs_of_a_head", "compression")
    shared.print_table(results.data["rows"], *columns)


if __name__ == "__main__":
    main()
