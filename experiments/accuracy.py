"""
Accuracy against compression on the toy tasks: dense, DMS, a sliding window, kvpress's presses.

    pip install -e ".[experiments]"
    python experiments/accuracy.py                  # on two cores an hour, after the retrofits' own
    python experiments/accuracy.py --problems 500   # the same with less noise: 10 hours

After the paper's section 4 (figure 3, table 1), with competitors that it does not have. Answers to
test problems are free-running and greedy; the question stands at the end of the compressed prompt.
Each seed has other problems, and retrofits of its own; all methods of a seed answer the same
problems. At each compression ratio every method may hold as much as DMS was measured to hold, or
the share that the ratio names, whichever is more:

    DMS                 our engine; heads keep different numbers of pairs, these are their mean
    window              our engine on the teacher: the last tokens, as many as DMS held at the end
    KeyDiff, ...        a press: the prompt is compressed to what DMS held at its end, the answer is
                        appended, so in the end it holds more than DMS (presses.py)
    KeyDiff, bounded    and again every 8 steps to what DMS held at the end of the answer

held: pairs of a head at the end of the prompt > the most while answering, the mean over heads and
problems: the engine's from its cache, a press's from the shapes of transformers' cache. They speak
of the time after the prompt: a press, unlike DMS, first holds one layer's whole prompt. KVzip only
masks what it drops, so it takes the memory of the dense model (stored_pairs). Level "hard" has the
length of "easy" and more to remember. Longer prompts cannot be used: the last table shows how the
dense teacher, trained on 512 tokens, answers them. An answer may be 8 tokens longer than the
longest reference answer of its problems. Where a method breaks down, its answers often end at once,
which makes its "most" small.
"""

import itertools
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial

import presses
import shared
from shared import tasks

CANDIDATES = 10  # problems made for one that is asked


@dataclass(frozen=True)
class Exam:
    """Problems that all methods are asked."""

    level: object
    seed: int
    task: str
    problems: tuple
    limit: int  # the most tokens of an answer

    def keys(self):
        return {"level": self.level, "seed": self.seed, "task": self.task}


def make_exam(tokenizer, level, seed, task, count):
    """Problems whose prompts have few lengths, since kvpress reads only prompts of one length side
    by side: of CANDIDATES times as many, those of the most frequent lengths."""
    lengths = defaultdict(list)
    for problem in shared.make_problems(task, CANDIDATES * count, seed, level):
        lengths[len(shared.prompt_ids(tokenizer, problem))].append(problem)
    groups = sorted(lengths.values(), key=len, reverse=True)
    problems = tuple(itertools.chain(*groups))[:count]
    return Exam(level, seed, task, problems, presses.answer_limit(tokenizer, problems))


def ask(results, exam, method, ratio, answer, **more):
    """The row of a method: the one that is there, or a new one. answer() -> (texts, counts)"""
    keys = {**exam.keys(), "ratio": ratio, "method": method}
    if not results.has(**keys):
        start = time.perf_counter()
        texts, counts = answer()
        accuracy = shared.accuracy(exam.problems, texts)
        seconds = time.perf_counter() - start
        results.add(**keys, **more, accuracy=accuracy, **counts, seconds=seconds)
    return results.find(**keys)[0]


def by_engine(tokenizer, exam, folder, window=None):
    """Answers by the model of a folder, perhaps in a sliding window of so many pairs: (texts,
    counts)."""
    model = shared.load_model(folder)
    if window:
        model = shared.sliding_window(model, window)
    texts, cache = shared.answer(model, tokenizer, exam.problems, max_new_tokens=exam.limit)
    prompts = shared.read_prompts(model, tokenizer, exam.problems)
    heads = cache.layers * cache.kv_heads * len(exam.problems)
    most = cache.ended_pairs / heads  # what a head holds does not shrink
    counts = {"prompt_pairs": prompts.ended_pairs / heads, "peak_pairs": most, "stored_pairs": most}
    return texts, counts


def by_press(tokenizer, exam, name, budget, bounded):
    """Answers by transformers with a press of kvpress: (texts, counts)."""
    return presses.answer(name, tokenizer, exam.problems, budget, bounded, exam.limit)


def compare(results, tokenizer, exam, ratio, folder):
    """The rows of all methods at one ratio; folder: the DMS model."""
    engine = partial(by_engine, tokenizer, exam)
    press = partial(by_press, tokenizer, exam)
    dense = ask(results, exam, "dense", 1, lambda: engine(shared.TEACHER))
    held = ask(results, exam, "DMS", ratio, lambda: engine(folder))

    def budget(key):
        return round(max(dense[key] / ratio, held[key]))

    most = budget("peak_pairs")
    ask(results, exam, "window", ratio, lambda: engine(shared.TEACHER, most), budget=most)
    prompt = budget("prompt_pairs")
    for name in presses.PRESSES:
        ask(results, exam, name, ratio, lambda: press(name, prompt, False), budget=prompt)
    for name in presses.BOUNDED:
        method = f"{name}, bounded"
        ask(results, exam, method, ratio, lambda: press(name, most, True), budget=most)


def mean(rows, key):
    return shared.mean_and_spread([row[key] for row in rows])[0]


def cells(rows):
    """A method's accuracy on a task and its spread over seeds, and what it held."""
    if not rows:
        return " " * 25
    accuracy, spread = shared.mean_and_spread([100 * row["accuracy"] for row in rows])
    held = f"{mean(rows, 'prompt_pairs'):5.0f} >{mean(rows, 'peak_pairs'):4.0f}"
    return f"{accuracy:9.1f} ±{spread:4.1f}{held}"


def print_table(results, level, ratio, methods):
    """Rows of methods, columns of tasks, of one level and ratio."""
    titles = "".join(f"{task:>25}" for task in tasks.TASKS)
    print(f"\n{f'{level}, {ratio:g}x':28}{titles}")
    print(" " * 28 + f"{'% right':>16}{'held':>9}" * len(tasks.TASKS))
    for method in methods:
        line = f"{method:28}"
        for task in tasks.TASKS:
            keys = {"level": level, "task": task, "method": method}
            line += cells(results.find(**keys, ratio=1 if method == "dense" else ratio))
        print(line)


def parse():
    p = shared.toy_arguments(__doc__, "accuracy.json", problems=40, seeds=3)
    p.add_argument("--ratios", type=float, nargs="+", default=[2, 4, 8, 12])
    p.add_argument("--levels", nargs="*", default=["easy", "hard"])
    p.add_argument("--longer", type=int, nargs="*", default=[640, 768, 1000],
                   help="tokens of the problems that only the dense model is asked")  # fmt: skip
    return p.parse_args()


def ask_all(args, results, seed):
    """The rows of one seed."""
    tokenizer = shared.load_tokenizer(shared.TEACHER)
    folders = {}
    for ratio in args.ratios if args.levels else []:
        folders[ratio] = shared.standard(ratio, seed, args.steps)
    for level in args.levels + args.longer:
        for task in tasks.TASKS:
            exam = make_exam(tokenizer, level, seed, task, args.problems)
            if level in args.longer:
                ask(results, exam, "dense", 1, lambda: by_engine(tokenizer, exam, shared.TEACHER))
                continue
            for ratio, folder in folders.items():
                compare(results, tokenizer, exam, ratio, folder)


def main():
    args = parse()
    results = shared.Results(args)
    for seed in range(args.seeds):
        ask_all(args, results, seed)
    methods = ["dense", "DMS", "window", *presses.PRESSES]
    methods += [f"{name}, bounded" for name in presses.BOUNDED]
    for level in args.levels:
        for ratio in args.ratios:
            print_table(results, level, ratio, methods)
    for tokens in args.longer:
        print_table(results, tokens, 1, ["dense"])


if __name__ == "__main__":
    main()
