"""
What the experiments share: retrofits that are made once, answers to toy problems, results files.

Every experiment is one command. It writes each row of its results file, experiments/results/*.json,
as it comes. Started again it goes on with the rows that are missing (--fresh: with none), and makes
no retrofit twice (they lie in out/experiments/).
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

from checkpoint import load_model, load_tokenizer  # noqa: E402
from common import read_json, write_json  # noqa: E402
from evaluate import kl_on_text, sliding_window  # noqa: E402
from generate import Sampling, Sequence, generate  # noqa: E402, F401
from kv_cache import KVCache  # noqa: E402
from toy import tasks  # noqa: E402
from toy.data import ToyData  # noqa: E402

RESULTS = ROOT / "experiments" / "results"
RETROFITS = ROOT / "out" / "experiments"
TEACHER = ROOT / "toy" / "teacher"
SHIPPED = ROOT / "toy" / "retrofitted"
STEPS = 250  # of retrofit.py on the toy


# -------------------------------------------------------------------------- Commands and their rows


def parser(description):
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def arguments(description, name):
    """A parser with what every experiment takes; its results go to RESULTS / name by default."""
    p = parser(description)
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
        if "retrofit" in settings:  # its name, not where it lies here
            settings["retrofit"] = settings["retrofit"].name
        # places in the repository are the same on every machine
        settings = json.loads(json.dumps(settings, default=str).replace(f"{ROOT}/", ""))
        self.file = args.out
        self.data = {"settings": settings, "machine": machine(), "rows": []}
        if self.file.exists() and not args.fresh:
            before = read_json(self.file)
            if before["settings"] != settings:
                sys.exit(
                    f"{self.file}: has rows of other settings; add --fresh, or give another --out")
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
        print(", ".join(f"{key} {as_text(value)}" for key, value in shown.items()), flush=True)


def as_text(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(rows, *columns):
    """Rows of results, one a line; what a row lacks is left out."""
    print("\n" + "".join(f"{column:>16}" for column in columns))
    for row in rows:
        print("".join(f"{as_text(row.get(column, '')):>16}" for column in columns))


def machine():
    cpu = platform.machine()
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.exists() else []:
        if line.startswith("model name"):
            cpu = line.split(":")[1].strip()
    return {"cpu": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d")}


def mean_and_spread(values):
    """The mean and the standard deviation over seeds."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def download(package, folder, *flags):
    """The path of a package's one file, fetched by pip into an empty folder."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    subprocess.run([*pip, *flags, package], check=True)
    [file] = Path(folder).iterdir()
    return file


# -------------------------------------------------------------------------------- Models of the toy


def load(folder, cr=None):
    """(model, tokenizer) of a folder. cr: another compression ratio than its own."""
    return load_model(folder, cr=cr), load_tokenizer(folder)


def window_of(pairs):
    """(the toy teacher in a sliding window of so many pairs, its tokenizer)."""
    teacher, tokenizer = load(TEACHER)
    return sliding_window(teacher, pairs), tokenizer


def retrofitted(name, *flags, problems=1, sequences=1):
    """The folder of a retrofit of the toy teacher. retrofit.py makes it with these flags unless it
    is there, and goes on with one that was interrupted. Its own measuring is cut short, unless more
    problems and sequences are asked for."""
    out = RETROFITS / name
    if not (out / "results.json").exists():  # retrofit.py's last file
        more = ["--resume"] if (out / "settings.json").exists() else []
        command = [sys.executable, ROOT / "retrofit.py", "--out", out, *flags, *more]
        command += ["--eval-problems", problems, "--eval-sequences", sequences]
        subprocess.run([str(word) for word in command], check=True)
    return out


def standard(cr, seed, steps=STEPS):
    """The folder of the retrofit by retrofit.py's own defaults but for its ratio, seed and steps.
    All experiments share it."""
    name = f"dms-{cr:g}x-seed{seed}"
    if steps != STEPS:
        name += f"-{steps}steps"
    return retrofitted(name, "--target-cr", cr, "--seed", seed, "--steps", steps)


# ----------------------------------------------------------------------- Problems and their answers


def make_problems(task, count, seed, level="easy"):
    """`count` test problems of a task, others for every seed."""
    rng = random.Random(f"experiment {task} {level} {seed}")
    return [tasks.make_problem(task, rng, "test", level) for _ in range(count)]


def prompt_ids(tokenizer, problem):
    """The token ids of a problem's prompt, to be answered."""
    return tokenizer.encode(tasks.messages(problem, False), add_generation_prompt=True)


def answer(model, tokenizer, problems, batch=100, max_new_tokens=256):
    """Free-running greedy answers by the engine: (texts, the cache that has counted what they
    took)."""
    cache = KVCache(model.config, min(batch, len(problems)), model.device, model.dtype)
    sequences = [Sequence(prompt_ids(tokenizer, problem), max_new_tokens) for problem in problems]
    for _ in generate(model, cache, sequences, {tokenizer.end_id}):
        pass
    texts = [tokenizer.decode(s.new, skip_special_tokens=True) for s in sequences]
    return texts, cache


def read_prompts(model, tokenizer, problems, batch=100):
    """A cache that has counted the prompts alone: with its first token, which is never appended, a
    sequence is over."""
    return answer(model, tokenizer, problems, batch, max_new_tokens=1)[1]


def accuracy(problems, texts):
    """The share of problems whose answer, one text each, is correct."""
    return sum(map(tasks.is_correct, problems, texts)) / len(problems)


def measure(model, tokenizer, count, seed=0, kl_sequences=32):
    """Accuracy of greedy answers to `count` problems of each task; the KL to the teacher in nats a
    token, on held-out problems with their answers; and over all answers the compression (tokens x
    heads / pairs held at the ends) and the reads that the cache counted."""
    row = {}
    tokens = 0
    pairs = 0
    reads = 0
    for task in tasks.TASKS:
        problems = make_problems(task, count, seed)
        texts, cache = answer(model, tokenizer, problems)
        row[task] = accuracy(problems, texts)
        tokens += cache.ended_tokens
        pairs += cache.ended_pairs
        reads += cache.stats()["reads"]
    data = ToyData(tokenizer, 512, 1, 0)
    row["kl"], _, _ = kl_on_text(model, load_model(TEACHER), data, kl_sequences)
    heads = cache.layers * cache.kv_heads
    return {**row, "compression": tokens * heads / pairs, "reads": reads}
