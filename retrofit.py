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
import json
import math
import platform
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import dms
from checkpoint import (InputError, Tokenizer, check_options, choose_device, copy_tokenizer,
                        load_model, load_tokenizer, locked, one_line, parse_config, parse_object,
                        parse_options, path_or_id, read_json, read_lines, read_settings, read_text,
                        refusing, require, resolve, run_script, save_model, write_atomic,
                        write_json, write_text)
from kernels.pages import free_memory
from kernels.training_attention import relaxed_attention_plain
from kv_cache import KVCache

HELD_OUT_ROWS = 32  # of text, on which the KL is measured
TEACHER = Path(__file__).resolve().parent / "toy" / "teacher"
TOY_DEFAULTS = dict(data="toy", window=16, train="all", steps=500, lr=1e-3, batch_size=4, seq_len=512)
TEXT_DEFAULTS = dict(window=256, train="adapters", steps=1000, lr=3e-5, batch_size=8, seq_len=8192)


@dataclass
class Options:
    """Of the command line: --batch-size 8 for batch_size."""

    model: path_or_id = str(TEACHER)  # folder or hub id (default: the toy teacher)
    data: path_or_id = None  # toy, or a .txt or .jsonl file (default: toy, for the toy teacher)
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


def read_documents(file):
    """{where it stands: document} of a .txt file, parted by blank lines, or of a .jsonl file, each
    a "text" or the "messages" of a chat. Raises InputError."""
    if str(file).endswith(".jsonl"):
        found = {f"{file}: line {number}": row.get("messages") or row.get("text")
                 for number, row in read_lines(file).items()}
    else:
        text = read_text(file, f"{file}: not readable as text; give a .txt or .jsonl file")
        found = {f"{file}: paragraph {number}": document
                 for number, document in enumerate(text.split("\n\n"), 1) if document.strip()}
    require(len(found) >= 2,
            f"{file}: has {len(found)} usable documents, parted by blank lines or as JSON lines")
    return found


@dataclass
class TextData:
    """Documents packed to full sequences. Every 50th is held out. One that cannot be used, since the
    chat template or the model does not know it, is skipped whenever it is drawn."""

    documents: dict  # {where it stands: text or messages}
    vocab_size: int
    tokenizer: Tokenizer
    seq_len: int
    batch_size: int
    seed: int

    def __post_init__(self):
        self.places = list(self.documents)
        self.kept_out = self.places[1::50]
        del self.places[1::50]
        self.skipped = set()

    def encode(self, where):
        """The token ids of a document with an end token; none if it is skipped, which is said once."""
        try:
            ids = self.tokenizer.encode(self.documents[where])
            require(max(ids, default=0) < self.vocab_size,
                    "it has a token that the model does not know")
        except InputError as e:
            if where not in self.skipped:
                tqdm.write(one_line(f"{where} is skipped: {e}", None), file=sys.stderr)
            self.skipped.add(where)
            return []
        return ids if self.tokenizer.end_id is None else [*ids, self.tokenizer.end_id]

    def pack(self, places, rng, rows):
        """Documents drawn at random, end to end: token ids (rows, seq_len), lengths (rows,)."""
        ids = []
        misses = 0
        while len(ids) < rows * self.seq_len:
            found = self.encode(rng.choice(places))
            misses = 0 if found else misses + 1
            require(misses < 1000, "the data, or what is held out of it, gives no tokens; mend it")
            ids += found
        ids = torch.tensor(ids[: rows * self.seq_len]).view(rows, -1)
        return ids, torch.full((rows,), self.seq_len)

    def batch(self, step):
        """Token ids (B, T) and real lengths (B,), a function of (seed, step)."""
        return self.pack(self.places, random.Random(f"{self.seed} {step}"), self.batch_size)

    def held_out(self, rows):
        return self.pack(self.kept_out, random.Random("held out"), rows)


def make_data(options):
    sizes = (load_tokenizer(options.model), options.seq_len, options.batch_size, options.seed)
    if options.data == "toy":
        from toy.data import ToyData

        return ToyData(*sizes)
    return TextData(read_documents(options.data), config_of(options.model).vocab_size, *sizes)


def config_of(model):
    file = resolve(model) / "config.json"
    return parse_config(read_json(file), file)


# ---------------------------------------------------------------------------------------- Training


def learning_rate(step, steps, peak):
    """Linear from 0 over the first 20 steps, constant, linear to 0 over the last 40 %."""
    return peak * min(1.0, (step + 1) / 20, (steps - step) / max(0.4 * steps, 1))


def train_step(student, teacher, data, optimizer, step, options):
    """One step; returns its metrics. The teacher may be the student, asked not to evict."""
    torch.manual_seed(options.seed * 1_000_003 + step)
    ids, lengths = (x.to(student.device) for x in data.batch(step))
    token = torch.arange(ids.shape[1], device=ids.device)
    predicts = token < lengths[:, None] - 1  # (B, T): no padding, nor what nothing follows
    cr = dms.scheduled_cr(step + 1, options.steps, options.target_cr)

    with torch.no_grad():
        target = teacher.hidden(ids, dms.masked_attention(teacher.config, evict=False))
    relaxed = dms.RelaxedAttention(student.config.dms, lengths, relaxed_attention_plain)
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
    held = 1 - min(let_go.item(), 1 - 1e-6)
    return {"step": step + 1, "kl": kl.item(), "compression_loss": compression.item(),
            "target_cr": round(cr, 4), "cr": 1 / held, "grad_norm": norm.item()}


MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by their names in its state


MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by their names in its state


def save_state(file, parameters, optimizer, step):
    """Weights in training and AdamW's state, one safetensors file, replaced atomically.
    parameters: {name: parameter}."""
    tensors = {}
    for name, parameter in parameters.items():
        for key, tensor in {"weight": parameter, **optimizer.state[parameter]}.items():
            tensors[f"{key}.{name}"] = tensor.detach().cpu().contiguous()
    write_atomic(file, lambda temporary: save_file(tensors, temporary, {"step": str(step)}))


def load_state(file, parameters, optimizer):
    """The inverse of save_state; returns the number of steps done."""
    problem = f"{file}: does not belong to this run; start anew in another --out"
    with (refusing(problem, SafetensorError, OSError, ValueError, KeyError, RuntimeError, TypeError),
          safe_open(file, "pt") as saved):
        for name, parameter in parameters.items():
            parameter.data.copy_(saved.get_tensor(f"weight.{name}"))
            moments = {key: saved.get_tensor(f"{key}.{name}").to(parameter.device) for key in MOMENTS}
            optimizer.state[parameter] = {**moments, "step": saved.get_tensor(f"step.{name}")}
        return int(saved.metadata()["step"])


def load_pair(options):
    """The student, ready to be trained, and its teacher: one model where it serves as both."""
    train_all = options.train == "all"
    teacher = load_model(options.model, options.device, options.torch_dtype)
    student = load_model(options.model, options.device) if train_all else teacher
    settings = dms.DMSConfig(options.window, options.decision, options.shift, per=options.per,
                             target_cr=options.target_cr)
    dms.start_retrofit(student, settings)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(train_all or "dms_proj_alpha" in name)
    return student, teacher


def train(options, out):
    """Run the steps that are still to do and write the checkpoint into `out`. Nothing is written
    before the model and the data have been loaded and checked."""
    data = make_data(options)
    check_sizes(options, config_of(options.model))
    student, teacher = load_pair(options)
    last_id = int(data.held_out(HELD_OUT_ROWS)[0].max())
    require(last_id < student.config.vocab_size, f"the model has no token {last_id}, the data has")
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), betas=(0.9, 0.95), weight_decay=0.0)
    out.mkdir(parents=True, exist_ok=True)
    copy_tokenizer(resolve(options.model), out)
    write_json(out / "settings.json", options.settings())
    state, metrics = out / "state.safetensors", out / "metrics.jsonl"
    done, lines = 0, []
    if state.exists():
        done = load_state(state, parameters, optimizer)
        problem = f"{metrics}: not readable; put an empty file in its place to go on"
        lines = read_text(metrics, problem).splitlines()[:done]
        lines = [json.dumps(parse_object(line, problem)) + "\n" for line in lines]
        print(f"{out}: goes on after step {done}, on {torch.get_num_threads()} threads; with another "
              "number than before the result differs in its last bits")
    write_text(metrics, "".join(lines))
    bar = tqdm(range(done, options.steps), initial=done, total=options.steps, desc="retrofit")
    with open(metrics, "a") as log:
        for step in bar:
            row = train_step(student, teacher, data, optimizer, step, options)
            require(math.isfinite(row["kl"] + row["grad_norm"]),
                    f"step {step + 1} gave no finite loss; begin anew with a lower --lr")
            log.write(json.dumps(row) + "\n")
            bar.set_postfix_str(f"KL {row['kl']:.4f}, target {row['target_cr']:.2f}x, "
                                f"actual {row['cr']:.2f}x")
            if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
                log.flush()
                save_state(state, parameters, optimizer, step + 1)
    if teacher is student:
        save_model(student, out, torch.float32, base=options.model)
    else:
        # half precision, as published models have it; what was trained is float32
        save_model(student, out, torch.float16 if options.dtype == "float16" else torch.bfloat16)


# --------------------------------------------------------------------------------------- Measuring


@torch.inference_mode()
def kl_on_text(model, reference, data):
    """(KL to the reference model on held-out text that is read through a cache, that cache)."""
    cache = KVCache(model.config, 1, model.device, model.dtype)
    heads = (model.lm_head.weight, reference.lm_head.weight)
    ids, lengths = data.held_out(HELD_OUT_ROWS)
    nats = 0.0
    for row, n in zip(ids.to(model.device), lengths.tolist()):
        states = model.states(row[None, :n], cache)[:, :-1]
        target = reference.states(row[None, :n])[:, :-1]
        every = torch.ones(1, n - 1, dtype=torch.bool)
        nats += dms.distillation_loss(states, target, *heads, every).item() * (n - 1)
        require(math.isfinite(nats), "no finite KL: begin anew with another --dtype or a lower --lr")
        cache.release([0])
    return nats / int((lengths - 1).sum()), cache


def measure(model, reference, data, options, desc):
    """KL to the reference model; accuracy, where the data brings tasks; and the counts of the cache
    that answered these, or of the one that read the held-out text where there are none."""
    kl, cache = kl_on_text(model, reference, data)
    accuracy = {}
    sequences = HELD_OUT_ROWS
    if hasattr(data, "answer_tasks"):
        rows = min(options.eval_batch, options.eval_problems)
        cache = KVCache(model.config, rows, model.device, model.dtype)
        accuracy = data.answer_tasks(model, cache, options, desc)
        sequences = len(accuracy) * options.eval_problems
    ended = {"tokens": cache.ended_tokens, "pairs": cache.ended_pairs, "sequences": sequences}
    return {"kl": kl, "accuracy": accuracy, **cache.stats(), **ended}


def evaluate(options, out):
    """Measure the dense model, the retrofitted one and a sliding window of the same budget."""
    data = make_data(options)
    dense, compressed, window = (load_model(model, options.device, options.torch_dtype)
                                 for model in (options.model, out, options.model))
    results = {"dense": measure(dense, dense, data, options, "dense"),
               "DMS": measure(compressed, dense, data, options, "DMS")}
    # A sliding window is a DMS model that evicts everything (s = 0 from a fresh adapter, so z = 1).
    # Its budget is what DMS held at the end of an average sequence.
    held = results["DMS"]["pairs"] / results["DMS"]["sequences"]
    heads = window.config.num_hidden_layers * window.config.num_key_value_heads
    budget = max(round(held / heads), 1)
    dms.start_retrofit(window, dms.DMSConfig(window=budget - 1, offset=-1.0))
    results["window"] = measure(window, dense, data, options, f"window of {budget}")
    on_cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    hardware = on_cpu if options.device == "cpu" else torch.cuda.get_device_name()
    settings = {**options.settings(), "model": Path(options.model).name}
    write_json(out / "results.json", {
        "settings": settings, "hardware": hardware, "torch": torch.__version__,
        "window_tokens": budget, "results": results})  # fmt: skip
    titles = ("dense", f"DMS {options.target_cr:g}x", f"window of {budget}")
    print_table(dict(zip(titles, results.values())))


TABLE = {"kl": "KL to the teacher, nats", "peak_pairs": "peak pairs held",
         "compression_ratio": "compression ratio", "reads": "KV reads, pairs",
         "peak_page_bytes": "peak bytes in pages"}  # what of a measurement is printed


def print_table(columns):
    """columns: {title: what measure gives}."""
    print(f"{'':26}" + "".join(f"{title:>18}" for title in columns))
    columns = columns.values()
    for task in list(columns)[0]["accuracy"]:
        print(f"{task:26}" + "".join(f"{column['accuracy'][task]:18.1%}" for column in columns))
    for key, name in TABLE.items():
        decimals = {"kl": 4, "compression_ratio": 2}.get(key, 0)
        print(f"{name:26}" + "".join(f"{column[key]:18,.{decimals}f}" for column in columns))


# -------------------------------------------------------------------------------------- The script


def parse(argv=None):
    """The Options: defaults, for toy data or text, then a resumed run's own, then those given."""
    given = parse_options(Options, argv)
    options = Options(**given)  # enough to find the run's folder
    out = Path(options.out or f"out/{Path(options.model).name}-dms-{options.target_cr:g}x")
    saved = {}
    if options.resume:
        file = out / "settings.json"
        require(file.exists(), f"{out}: holds no run to resume; name its folder with --out")
        saved = read_json(file)
        check_options(Options, saved, file)
    for key, value in saved.items():
        started = f"was started with another --{key.replace('_', '-')} ({value!r})"
        require(key.startswith("eval_") or given.get(key, value) == value,
                f"{out}: {started}; resume it as it is")
    options = Options(**{**saved, **given})  # enough to know which defaults apply
    is_teacher = options.data is None and Path(options.model).resolve() == TEACHER
    defaults = TOY_DEFAULTS if options.data == "toy" or is_teacher else TEXT_DEFAULTS
    options = Options(**{**defaults, **saved, **given})
    options.out = str(out)
    choose_device(options)
    return options


def check(options):
    """What can be known to be wrong before anything is loaded."""
    folder = resolve(options.model)
    require(read_settings(folder, read_json(folder / "config.json")) is None,
            f"{folder}: is already a DMS checkpoint; give the model that it came from")
    require(options.data is not None, "--data is missing; give a .txt or .jsonl file")
    least = (options.window + 1) * options.target_cr
    require(least <= options.seq_len, f"target CR {options.target_cr:g} is impossible: the window alone "
            f"holds {options.window + 1} of {options.seq_len} tokens; use a smaller --window or "
            "--target-cr, or longer sequences")
    require(options.decision == "adapter" or options.train == "all",
            "--decision neuron has no adapters to train; add --train all")
    out = Path(options.out)
    is_new = not out.exists() or out.is_dir() and not [*out.glob("[!.]*")]  # but for the lock
    require(is_new or options.resume,
            f"{out}: already holds something; continue it with --resume, or choose another --out")


def check_sizes(options, config):
    """Refuse sequences that the model has no positions for, or a step that has no room."""
    require(options.seq_len <= config.max_position_embeddings, "--seq-len is longer than the "
            f"model's context of {config.max_position_embeddings}; shorten it")
    # of each layer at least its input is kept for the backward pass, and the MLP's inner tensors
    numbers = config.hidden_size + (0 if options.recompute else 4 * config.intermediate_size)
    tokens = options.batch_size * options.seq_len
    size = tokens * config.num_hidden_layers * numbers * options.torch_dtype.itemsize
    problem = f"a step needs more than {size / 1e9:.0f} GB, which are not there"
    require(size <= free_memory(torch.device(options.device)),
            f"{problem}; lower --batch-size or --seq-len, or add --recompute")


def main(argv=None):
    options = parse(argv)
    check(options)
    out = Path(options.out)
    begin = time.time()
    with locked(out):
        if not (out / "config.json").exists():  # it is written last: the checkpoint is complete
            train(options, out)
            print(f"{out}: checkpoint written, {time.time() - begin:.0f} s")
        evaluate(options, out)
    print(f"\n{out / 'results.json'}: written, {time.time() - begin:.0f} s in all")


if __name__ == "__main__":
    run_script(main, "stopped; continue with --resume")
