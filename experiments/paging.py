"""
DMS beside paging: keep all pairs in slower memory and fetch pages by relevance, as Quest does (Tang
et al., arXiv 2406.10774).

    python experiments/paging.py       # about 15 minutes, 4 GB of disk for a while
    python experiments/paging.py --problems 3 --page-sizes 8 --contexts 2048 --layers 2 --steps 2 \\
        --fresh --out trial.json

Quest (quest.py) keeps the range of each channel for every page of keys, and attends to the pages in
which a query may score highest. Two measurements:

toy    On the dense toy teacher, greedy answers, free-running. It attends to as many pages as hold
       the pairs that DMS 8x reads a head and decode step on the same problems, by the engine's
       count, rounded up. Bounds are read, too, two vectors a page, which is as much as a pair: for
       "pairs and bounds" the pages are fewer, so that both together cost what DMS reads, but for
       the newest page, which is always read.
file   Time and bytes of a decode step's attention for Qwen3-0.6B's shape, one sequence, made-up
       queries and keys. All pairs lie in a file, mapped into memory, the bounds in memory; chosen
       pages are asked for at once, layer by layer. "cold": the system's copy of the file is dropped
       before every step (what the device delivered is counted where the system says so); "warm":
       the file was read through, and the system keeps as much of it in memory as it can. DMS 8x
       holds its pairs in the engine's pages, heads uneven. Neither projects nor stores anything.

What differs from that paper: pages are chosen for a KV head, by the highest bound of its query
heads, not for a query head; the newest page is always among them; its two first layers, which are
left dense there, are not; prompts are read densely there and here. Made-up queries have no memory:
every step chooses other pages than the step before. The toy part says which share is new there.
"""

import itertools

import shared
from paging_file import run_file
from quest import QuestCache
from shared import TEACHER, Results, load, tasks
from stepwise import answer_in_batches

from common import run_script

COUNTED = ("pairs", "pairs and bounds")  # as what DMS may read


def measure_quest(task, page_size, budget, count_bounds, args):
    model, tokenizer = load(TEACHER)
    config = model.config

    def make_cache(B):
        return QuestCache(config, B, page_size, budget, count_bounds)

    problems = shared.make_problems(task, args.problems, args.seed)
    texts, caches = answer_in_batches(model, tokenizer, problems, make_cache, args.batch)
    steps = sum(cache.steps for cache in caches)
    steps *= config.num_hidden_layers * config.num_key_value_heads
    return {
        "accuracy": shared.accuracy(problems, texts),
        "pairs_read": sum(cache.pairs for cache in caches) / steps,
        "bounds_read": sum(cache.bounds for cache in caches) / steps,
        "pairs_fetched": sum(cache.fetched for cache in caches) / steps,
    }


def measure_engine(folder, task, args):
    """The same by the engine's cache; what it reads of and for prompts is left out."""
    model, tokenizer = load(folder)
    problems = shared.make_problems(task, args.problems, args.seed)
    texts, cache = shared.answer(model, tokenizer, problems, args.batch)
    prompts = shared.read_prompts(model, tokenizer, problems, args.batch)
    reads = int((cache.reads - prompts.reads).sum())
    steps = (cache.ended_tokens - prompts.ended_tokens) * cache.layers * cache.kv_heads
    return {"accuracy": shared.accuracy(problems, texts), "pairs_read": reads / steps}


def run_toy(results, args):
    for task in args.tasks:
        for method, folder in (("dense", TEACHER), ("DMS", args.dms)):
            keys = dict(part="toy", task=task, method=method)
            if not results.has(**keys):
                results.add(**keys, **measure_engine(folder, task, args))
        [dms] = results.find(part="toy", task=task, method="DMS")
        for page_size, counted in itertools.product(args.page_sizes, COUNTED):
            keys = dict(part="toy", task=task, method="Quest", page_size=page_size)
            keys["counted"] = counted
            if not results.has(**keys):
                budget = dms["pairs_read"]
                with_bounds = counted == "pairs and bounds"
                row = measure_quest(task, page_size, budget, with_bounds, args)
                results.add(**keys, **row)


def main():
    p = shared.arguments(__doc__, "paging.json")
    p.add_argument("--tasks", nargs="*", default=tasks.TASKS, choices=tasks.TASKS)
    p.add_argument("--problems", type=int, default=200, help="of each task")
    p.add_argument("--batch", type=int, default=100)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--dms", default=str(shared.SHIPPED))
    p.add_argument("--page-sizes", type=int, nargs="*", default=[4, 8, 16], help="on the toy")
    p.add_argument("--contexts", type=int, nargs="*", default=[8192, 16384, 32768])
    p.add_argument("--layers", type=int, default=28)
    p.add_argument("--steps", type=int, default=9)
    p.add_argument("--cr", type=int, default=8)
    p.add_argument("--file-page-size", type=int, default=16)
    p.add_argument("--dtype", default="float32", choices=["float32"])  # what numba's kernel takes
    p.add_argument("--file", default=str(shared.RETROFITS / "pairs.bin"), help="removed at the end")
    args = p.parse_args()
    results = Results(args)
    run_toy(results, args)
    run_file(results, args)


if __name__ == "__main__":
    run_script(main)
