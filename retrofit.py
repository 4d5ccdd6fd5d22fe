"""
The retrofit: teach a dense model, by distillation from itself, which tokens each head can forget.

    loss = KL(teacher || student) + max(1 - 1/CR(step) - fraction let go, 0)

The teacher is the model as it was, the student the same with relaxed eviction decisions (dms.py).
Every step follows from (seed, step, weights, optimizer state) alone, so an interrupted run goes on
to the same result. Afterwards it measures, from the real cache: accuracy where the data brings a
checker, KL, compression, reads, bytes.

    python retrofit.py                                     # the shipped toy teacher, on a laptop
    python retrofit.py --model Qwen/Qwen3-8B --data openr1-math.jsonl
    python retrofit.py --resume --out out/teacher-dms-8x   # after any interruption
"""
import functools
import json
import os
import platform
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import dms
from checkpoint import (InputError, check_ids, choose_device, copy_tokenizer, load_model,
                        load_tokenizer, parse_options, read_json, read_lines, read_text, refusing,
                        resolve, run_script, save_model, write_atomic, write_json, write_text)
from kv_cache import KVCache

TEACHER = Path(__file__).resolve().parent / "toy" / "teacher"
TOY_DEFAULTS = dict(data="toy", window=16, train="all", steps=500, lr=1e-3, batch_size=4,
                    seq_len=512)
TEXT_DEFAULTS = dict(window=256, train="adapters", steps=1000, lr=3e-5, batch_size=8,
                     seq_len=8192)


@dataclass
class Options:
    """Of the command line: --batch-size 8 for batch_size."""

    model: str = os.path.relpath(TEACHER)  # folder or hub id (default: the toy teacher)
    data: str = None  # toy, or a .txt or .jsonl file (default: toy, for the toy teacher)
    out: str = None  # folder for the checkpoint (default: out/NAME-dms-CRx)
    resume: bool = False  # continue the interrupted run in --out
    target_cr: float = 8.0  # compression ratio to reach
    window: int = None  # tokens always readable (default: 16 for toy data, else 256)
    train: Literal["adapters", "all"] = None  # (default: all for toy data, else adapters)
    decision: Literal["adapter", "neuron"] = "adapter"  # where decisions come from
    shift: Literal[0, 1] = 1  # the logit at token t decides token t - shift
    per: Literal["head", "layer"] = "head"  # granularity of decisions
    steps: int = None  # (default: 500 for toy data, else 1000)
    lr: float = None  # (default: 1e-3 for toy data, else 3e-5)
    batch_size: int = None  # sequences per step (default: 4 for toy data, else 8)
    seq_len: int = None  # tokens per sequence (default: 512 for toy data, else 8192)
    compression_weight: float = 1.0  # of the compression loss
    reverse_kl: bool = False  # weigh the KL by the student's probabilities
    recompute: bool = False  # recompute blocks in backward: less memory, more time
    seed: int = 0
    save_every: int = 50  # steps between saved states
    eval_problems: int = 200  # held-out problems per task
    eval_batch: int = 100  # problems generated side by side
    eval_tokens: int = 256  # most new tokens of an answer
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = None  # of frozen weights (bfloat16 on a GPU)

    @property
    def torch_dtype(self):
        return getattr(torch, self.dtype)

    def settings(self):
        """What the result depends on, which a resumed run must not change."""
        return {k: v for k, v in vars(self).items() if k not in ("resume", "out", "device")}


# -------------------------------------------------------------------------------------------- Data


class TextData:
    """A .txt file (documents separated by blank lines) or .jsonl file ("text", or "messages" for
    the chat template), packed to full sequences. Every 50th document is held out."""

    def __init__(self, file, tokenizer, seq_len, batch_size, seed):
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        if str(file).endswith(".jsonl"):
            documents = [row.get("messages") or row.get("text") for row in read_lines(file)]
        else:
            text = read_text(file, f"{file}: not readable as text; give a .txt or .jsonl file")
            documents = text.split("\n\n")
        documents = [d for d in documents if d and (not isinstance(d, str) or d.strip())]
        if len(documents) < 2:
            raise InputError(f"{file}: has {len(documents)} usable documents; needed are at least "
                             f"2, as text parted by blank lines, or JSON lines with \"text\" or "
                             f"\"messages\"")
        self.kept_out = documents[1::50]
        self.documents = [d for i, d in enumerate(documents) if i % 50 != 1]

    def pack(self, documents, rng, rows):
        """Documents drawn at random, end to end: token ids (rows, seq_len), lengths (rows,)."""
        end = self.tokenizer.end_id
        ids = []
        while len(ids) < rows * self.seq_len:
            ids += self.tokenizer.encode(rng.choice(documents))
            if end is not None:
                ids.append(end)
            if not ids:
                raise InputError("the data gives no tokens; check the file and the tokenizer")
        ids = torch.tensor(ids[: rows * self.seq_len]).view(rows, -1)
        return ids, torch.full((rows,), self.seq_len)

    def batch(self, step):
        """Token ids (B, T) and real lengths (B,), a function of (seed, step)."""
        return self.pack(self.documents, random.Random(f"{self.seed} {step}"), self.batch_size)

    def held_out(self, rows):
        return self.pack(self.kept_out, random.Random("held out"), rows)


def make_data(options):
    tokenizer = load_tokenizer(options.model)
    if options.data == "toy":
        from toy.data import ToyData as Data
    else:
        Data = functools.partial(TextData, options.data)
    return Data(tokenizer, options.seq_len, options.batch_size, options.seed)


# ---------------------------------------------------------------------------------------- Training


def learning_rate(step, steps, peak):
    """Linear from 0 over the first 20 steps, constant, linear to 0 over the last 40 %."""
    warm_up = (step + 1) / 20
    decay = (steps - step) / max(0.4 * steps, 1)
    return peak * min(1.0, warm_up, decay)


def train_step(student, teacher, data, optimizer, step, options):
    """One step; returns its metrics. teacher is None where it is the student without eviction."""
    torch.manual_seed(options.seed * 1_000_003 + step)
    ids, lengths = data.batch(step)
    ids = ids.to(student.device)
    lengths = lengths.to(student.device)
    token = torch.arange(ids.shape[1], device=ids.device)
    predicts = token < lengths[:, None] - 1  # (B, T): no padding, nor what nothing follows
    cr = dms.scheduled_cr(step + 1, options.steps, options.target_cr)

    teacher = teacher or student
    with torch.no_grad():
        target = teacher.hidden(ids, dms.masked_attention(teacher.config, evict=False))
    relaxed = dms.RelaxedAttention(student.config, lengths)
    states = student.hidden(ids, relaxed, recompute=options.recompute)
    heads = (student.lm_head.weight, teacher.lm_head.weight)
    kl = dms.distillation_loss(states, target, *heads, predicts, options.reverse_kl)
    let_go = relaxed.fraction_let_go()
    compression = dms.compression_loss(let_go, cr)
    (kl + options.compression_weight * compression).backward()

    group = optimizer.param_groups[0]
    norm = torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    group["lr"] = learning_rate(step, options.steps, options.lr)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {
        "step": step + 1,
        "kl": kl.item(),
        "compression_loss": compression.item(),
        "target_cr": round(cr, 4),
        "cr": 1 / (1 - min(let_go.item(), 1 - 1e-6)),
        "grad_norm": norm.item(),
    }


def save_state(file, parameters, optimizer, step):
    """Weights in training and AdamW's moments, one safetensors file, replaced atomically.
    parameters: {name: parameter}."""
    tensors = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        tensors[f"weight.{name}"] = parameter.detach().contiguous().cpu()
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = state[moment].contiguous().cpu()
    metadata = {"step": str(step)}
    write_atomic(file, lambda temporary: save_file(tensors, temporary, metadata))


def load_state(file, parameters, optimizer):
    """The inverse of save_state; returns the number of steps done, 0 where there is no file."""
    if not file.exists():
        return 0
    problem = f"{file}: does not belong to this run; start anew in another --out"
    with refusing(problem, SafetensorError, OSError, ValueError, KeyError, RuntimeError):
        with safe_open(file, "pt") as saved:
            step = int(saved.metadata()["step"])
            for name, parameter in parameters.items():
                state = {"step": torch.tensor(float(step))}
                for moment in ("exp_avg", "exp_avg_sq"):
                    tensor = saved.get_tensor(f"{moment}.{name}")
                    state[moment] = tensor.to(parameter.device)
                optimizer.state[parameter] = state
                parameter.data.copy_(saved.get_tensor(f"weight.{name}"))
    return step


def load_pair(options):
    """The student, ready to be trained, and its teacher, None where one model serves as both."""
    train_all = options.train == "all"
    teacher = load_model(options.model, options.device, options.torch_dtype)
    student = teacher
    if train_all:
        student = load_model(options.model, options.device, torch.float32)
    settings = dms.DMSConfig(window=options.window, source=options.decision, shift=options.shift,
                             per=options.per, target_cr=options.target_cr)
    dms.start_retrofit(student, settings)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(train_all or "dms_proj_alpha" in name)
    return student, teacher if train_all else None


def train(options, out):
    """Run the steps that are still to do and write the checkpoint into `out`. Nothing is written
    before the model and the data have been loaded and checked."""
    data = make_data(options)
    student, teacher = load_pair(options)
    context = student.config.max_position_embeddings
    if options.seq_len > context:
        raise InputError(f"--seq-len {options.seq_len} is longer than the model's context of "
                         f"{context}; make it shorter")
    check_ids(student.config, data.batch(0)[0][0].tolist())
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), betas=(0.9, 0.95), weight_decay=0.0)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "settings.json", options.settings())
    state = out / "state.safetensors"
    metrics = out / "metrics.jsonl"
    done = load_state(state, parameters, optimizer)
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    write_text(metrics, "".join(lines[:done]))
    bar = tqdm(range(done, options.steps), initial=done, total=options.steps, desc="retrofit")
    with open(metrics, "a") as log:
        for step in bar:
            row = train_step(student, teacher, data, optimizer, step, options)
            log.write(json.dumps(row) + "\n")
            bar.set_postfix_str(f"KL {row['kl']:.4f}, target {row['target_cr']:.2f}x, "
                                f"actual {row['cr']:.2f}x")
            if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
                log.flush()
                save_state(state, parameters, optimizer, step + 1)
    copy_tokenizer(resolve(options.model), out)
    if teacher is None:
        save_model(student, out, torch.float32, base=options.model)
    else:
        half = torch.bfloat16 if options.torch_dtype == torch.float32 else options.torch_dtype
        save_model(student, out, half)


# --------------------------------------------------------------------------------------- Measuring


@torch.inference_mode()
def measure(model, reference, data, options, desc):
    """KL to the reference model, None for itself, on held-out text read through the cache; accuracy
    where the data brings tasks; and the counts of the caches that answered them, or else have read
    that text."""

    def new_cache(rows):
        return KVCache(model.config, rows, model.device, model.dtype)

    cache = new_cache(1)
    nats = 0.0
    ids, lengths = data.held_out(32)
    for row, n in zip(ids.to(model.device), lengths.tolist()):
        states = model.states(row[None, :n], cache)[:, :-1]
        cache.release([0])
        if reference is not None:
            target = reference.states(row[None, :n])[:, :-1]
            every = torch.ones(1, n - 1, dtype=torch.bool)
            heads = (model.lm_head.weight, reference.lm_head.weight)
            nats += (n - 1) * dms.distillation_loss(states, target, *heads, every).item()
    result = {"kl": nats / int((lengths - 1).sum()), "accuracy": {}}
    caches = [cache]
    if hasattr(data, "answer_tasks"):
        result["accuracy"], caches = data.answer_tasks(model, new_cache, options, desc)
    heads = model.config.num_hidden_layers * model.config.num_key_value_heads
    stats = [cache.stats() for cache in caches]
    tokens = sum(cache.ended_tokens for cache in caches)
    pairs = sum(cache.ended_pairs for cache in caches)
    return {
        **result,
        "compression_ratio": tokens * heads / pairs,
        "tokens": tokens,
        "pairs": pairs,
        "peak_pairs": max(s["peak_pairs"] for s in stats),
        "reads": sum(s["reads"] for s in stats),
        "peak_page_bytes": max(s["peak_page_bytes"] for s in stats),
    }


def evaluate(options, out):
    """Measure the dense model, the retrofitted one and a sliding window of the same budget."""
    data = make_data(options)
    teacher = load_model(options.model, options.device, options.torch_dtype)
    student = load_model(out, options.device, options.torch_dtype)
    dense = measure(teacher, None, data, options, "dense")
    compressed = measure(student, teacher, data, options, "DMS")
    # a sliding window is a DMS model that evicts everything; its budget is what DMS held of an
    # average sequence
    sequences = len(dense["accuracy"]) * options.eval_problems or 32
    budget = dense["tokens"] / sequences / compressed["compression_ratio"]
    budget = max(round(budget), 1)
    model = load_model(options.model, options.device, options.torch_dtype)
    dms.start_retrofit(model, dms.DMSConfig(window=budget - 1, offset=-1.0))
    model.requires_grad_(False)
    window = measure(model, teacher, data, options, f"window of {budget}")
    results = {"dense": dense, "DMS": compressed, "window": window}
    hardware = (torch.cuda.get_device_name() if torch.cuda.is_available() else
                f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, "
                f"{torch.get_num_threads()} threads")
    write_json(out / "results.json", {"settings": options.settings(), "hardware": hardware,
                                      "window_tokens": budget, "torch": torch.__version__,
                                      "results": results})
    print_table(results, ["dense", f"DMS {options.target_cr:g}x", f"window of {budget}"])


def print_table(results, titles):
    rows = [("", titles)]
    for task in results["dense"]["accuracy"]:
        rows.append((task, [f"{r['accuracy'][task]:.1%}" for r in results.values()]))
    for name, key, form in (
        ("KL to the teacher, nats", "kl", ".4f"),
        ("peak pairs held", "peak_pairs", ","),
        ("compression ratio", "compression_ratio", ".2f"),
        ("KV reads, pairs", "reads", ","),
        ("peak bytes in pages", "peak_page_bytes", ","),
    ):
        rows.append((name, [f"{r[key]:{form}}" for r in results.values()]))
    for name, values in rows:
        print(f"\n{name:26}" + "".join(f"{value:>18}" for value in values), end="")
    print()


# -------------------------------------------------------------------------------------- The script


def parse(argv=None):
    """The Options: defaults, for toy data or text, then a resumed run's own, then those given."""
    given = parse_options(Options, argv)
    options = Options(**given)
    name = f"{Path(options.model).name}-dms-{options.target_cr:g}x"
    out = Path(options.out or Path("out") / name)
    saved = {}
    if options.resume:
        if not (out / "settings.json").exists():
            raise InputError(f"{out}: holds no run to resume; name its folder with --out, or leave "
                             f"--resume out")
        saved = read_json(out / "settings.json")
    for key, value in saved.items():
        if not key.startswith("eval_") and given.get(key, value) != value:
            flag = key.replace("_", "-")
            raise InputError(f"{out}: was started with another --{flag} ({value!r}); resume it "
                             f"unchanged, or start another --out")
    is_teacher = options.data is None and Path(options.model).resolve() == TEACHER
    defaults = TOY_DEFAULTS if options.data == "toy" or is_teacher else TEXT_DEFAULTS
    options = Options(**{**defaults, **saved, **given})
    options.out = str(out)
    options.device = choose_device(options.device)
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    return options


def check(options):
    """What can be known to be wrong before anything is loaded."""
    folder = resolve(options.model)
    if any(key.startswith("dms_") for key in read_json(folder / "config.json")):
        raise InputError(f"{folder}: is already a DMS checkpoint; give the dense model that it "
                         f"came from")
    if options.data is None:
        raise InputError("--data is missing; give a .txt or .jsonl file of text like what the "
                         "model will be used for")
    check_target(options.target_cr, options.window, options.seq_len)
    for name in ("steps", "batch_size", "seq_len", "save_every", "eval_problems", "eval_batch",
                 "eval_tokens"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1")
    if options.window < 0 or not options.lr > 0:
        raise InputError("--window must be 0 or more and --lr positive")
    if options.decision == "neuron" and options.train == "adapters":
        raise InputError("--decision neuron has no adapters to train; add --train all")
    out = Path(options.out)
    if not options.resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: already holds something; continue it with --resume, or choose "
                         f"another --out")


def check_target(target_cr, window, length):
    """Refuse what sequences of this many tokens cannot reach: the window alone is too much."""
    if not target_cr >= 1:
        raise InputError(f"target CR {target_cr} is not a compression; give 1 or more")
    if (window + 1) * target_cr > length:
        raise InputError(f"target CR {target_cr:g} is impossible for sequences of {length} tokens: "
                         f"the window alone holds {window + 1} of them, and 1/{target_cr:g} is "
                         f"{length / target_cr:.0f}; use a smaller --window, a smaller --target-cr "
                         f"or longer sequences")


def main(argv=None):
    options = parse(argv)
    check(options)
    out = Path(options.out)
    begin = time.time()
    if not (out / "config.json").exists():  # it is written last: the checkpoint is complete
        train(options, out)
        print(f"{out}: checkpoint written, {time.time() - begin:.0f} s")
    evaluate(options, out)
    print(f"\n{out / 'results.json'}: written, {time.time() - begin:.0f} s in all")


if __name__ == "__main__":
    run_script(main, "stopped; continue with --resume")
