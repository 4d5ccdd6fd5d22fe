"""
The retrofit: teach a dense model, by distillation from itself, which tokens each head can forget.

    loss = KL(teacher || student) + max(1 - 1/CR(step) - fraction let go, 0)

The teacher is the model as it was, the student the same with relaxed eviction decisions (dms.py).
A step (distillation.py) follows from what is saved, so an interrupted run goes on to the same
result, also with another number of processes, which share the sequences of a step. Afterwards it
measures (evaluate.py).

    python retrofit.py                                     # the shipped toy teacher, on a laptop
    python retrofit.py --model Qwen/Qwen3-8B               # OpenR1-Math-220k from the hub
    torchrun --nproc-per-node 8 retrofit.py --model Qwen/Qwen3-8B
    python retrofit.py --resume --out out/teacher-dms-8x   # after any interruption
"""
import json
import os
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as distributed
from tqdm import tqdm

from checkpoint import (check_options, choose_device, copy_tokenizer, load_tokenizer, locked,
                        parse_config, parse_object, parse_options, path_or_id, read_json,
                        read_settings, read_text, refusing, require, resolve, run_script,
                        save_model, torchrun_place, write_json, write_text)
from data import DEFAULT, TextData, ahead
from distillation import Distillation, load_pair, settling_rows
from estimate import announce, check_memory
from evaluate import draw_curves, evaluate, kl_on_text

TEACHER = Path(__file__).resolve().parent / "toy" / "teacher"
# of --data toy; and of text, on a GPU (the tokens of NVIDIA's recipe for 8x: 65 million) and on a
# CPU (1.2 million: some hours for a model of 135 million weights)
TOY_DEFAULTS = dict(data="toy", window=16, train="all", steps=500, lr=1e-3, batch_size=4,
                    seq_len=512, eval_rows=32)
GPU_DEFAULTS = dict(data=DEFAULT, train="adapters", steps=1000, batch_size=8, seq_len=8192, eval_rows=32)
CPU_DEFAULTS = dict(data=DEFAULT, train="adapters", steps=300, batch_size=4, seq_len=1024, eval_rows=8)


@dataclass
class Options:
    """Of the command line: --batch-size 8 for batch_size."""

    model: path_or_id = str(TEACHER)  # folder or hub id (default: the toy teacher)
    data: path_or_id = None  # toy, a file, or a dataset of the hub (default: toy, or OpenR1-Math-220k)
    data_revision: str = None  # commit of a hub dataset (default: the newest)
    out: str = None  # folder for the checkpoint (default: out/NAME-dms-CRx)
    resume: bool = False  # continue the interrupted run in --out
    target_cr: float = 8.0  # compression ratio to reach
    window: int = None  # tokens always readable (default: 16 for toy data, else 512 or what fits)
    train: Literal["adapters", "all"] = None  # (default: all for toy data, else adapters)
    decision: Literal["adapter", "neuron"] = "adapter"  # where decisions come from
    shift: Literal[0, 1] = 1  # the logit at token t decides token t - shift
    per: Literal["head", "layer"] = "head"  # granularity of decisions
    steps: int = None  # (default: 500 for toy data, else 1000, on a CPU 300)
    fade_steps: int = 0  # before these, in which a borrowed neuron is faded out of the scores
    lr: float = None  # (default: 1e-3 for toy data, else 0.12 / hidden size, which is 3e-5 for 8B)
    batch_size: int = None  # sequences per step (default: 8, for toy data or on a CPU 4)
    seq_len: int = None  # tokens per sequence (default: 512 for toy data, else 8192, on a CPU 1024)
    pack_across: bool = False  # attention crosses the borders of documents in a sequence
    compression_weight: float = 1.0  # of the compression loss
    reverse_kl: bool = False  # weigh the KL by the student's probabilities
    recompute: bool = False  # recompute blocks in backward, also for sequences up to 2048
    compile: bool = False  # let torch.compile fuse each half of every block
    shard: bool = False  # spread the weights over the GPUs of torchrun (FSDP2)
    max_kl: float = 10.0  # a step of more nats ends the run
    seed: int = 0
    save_every: int = 50  # steps between saved states
    eval_every: int = 0  # steps between measurements on held-out text (default: none)
    eval_rows: int = None  # held-out sequences for the KL (default: 32, for text on a CPU 8)
    eval_problems: int = 200  # held-out problems per task
    eval_batch: int = 100  # problems generated side by side
    eval_tokens: int = 256  # most new tokens of an answer
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = None  # of frozen weights (bfloat16 on a GPU)

    @property
    def torch_dtype(self):
        return getattr(torch, self.dtype)

    def settings(self):
        """What a resumed run must not change, but for what it measures afterwards."""
        changing = ("resume", "out", "device", "shard")
        return {k: v for k, v in vars(self).items() if k not in changing and v is not None}


def make_data(options):
    """Where sequences come from: .batches(step, place), .held_out(rows)."""
    sizes = (options.seq_len, options.batch_size, options.seed)
    tokenizer = load_tokenizer(options.model)
    if options.data == "toy":
        from toy.data import ToyData

        return ToyData(tokenizer, *sizes)
    vocab_size = config_of(options.model).vocab_size
    source = "@".join(filter(None, (options.data, options.data_revision)))
    return TextData(source, tokenizer, vocab_size, *sizes, options.pack_across)


def config_of(model):
    file = resolve(model) / "config.json"
    return parse_config(read_json(file), file)


# ---------------------------------------------------------------------------------------- Training


def train(options, data, out):
    """Run the steps that are still to do and write the checkpoint into `out`. Nothing is written
    before the model and the data have been loaded and checked."""
    is_first = torchrun_place()[0] == 0
    options.data_revision = getattr(data, "revision", None)  # what a resumed run goes on with
    run = Distillation(*load_pair(options), options)
    check_data(options, data, run.student.config.vocab_size)
    state = out / "state.safetensors"
    done, place = run.load(state) if state.exists() else (0, None)
    metrics = out / "metrics.jsonl" if is_first else Path(os.devnull)
    if is_first:
        begin_folder(options, out, done)
        announce(options, run.student.config, torchrun_place()[1])
    steps = options.fade_steps + options.steps
    bar = tqdm(range(done, steps), "retrofit", initial=done, total=steps, disable=not is_first)
    with open(metrics, "a") as log, closing(ahead(data.batches(done, place))) as batches:
        for step in bar:
            begin = time.time()
            ids, documents, place = next(batches)
            row = run.step(step, ids, documents)
            if options.eval_every and (step + 1) % options.eval_every == 0:
                kl, _, cache = kl_on_text(run.student, run.teacher, data, options.eval_rows)
                row |= {"held_out_kl": kl, "held_out_cr": cache.compression_ratio()}
            log.write(json.dumps(row) + "\n")
            speed = sum(map(sum, documents)) / (time.time() - begin)
            bar.set_postfix_str(f"KL {row['kl']:.4f}, target {row['target_cr']:.2f}x, "
                                f"actual {row['cr']:.2f}x, {speed:,.0f} tokens/s")
            if (step + 1) % options.save_every == 0 or step + 1 == steps:
                log.flush()
                run.save(state, step + 1, place)
    ratio = run.settle_offset(data)
    if is_first:
        short = "" if ratio >= options.target_cr else "; more --steps, or a higher --lr, may give more"
        print(f"{ratio:.2f}x on held-out text, by hard decisions{short}")
        write_checkpoint(run, options, out)
        draw_curves(out)


def check_data(options, data, vocab_size):
    """Refuse held-out text with tokens that the model lacks, or too short for the target."""
    ids, documents = data.held_out(settling_rows(options.seq_len))
    last_id = int(ids.max())
    require(last_id < vocab_size, f"the model has no token {last_id}, the data has")
    lengths = [n for row in documents for n in row]
    # with nothing kept for good
    most = sum(lengths) / sum(min(n, options.window + 1) for n in lengths)
    require(most >= options.target_cr, f"target CR {options.target_cr:g} is impossible: the documents "
            f"are so short that the window alone holds 1 / {most:.1f} of them; use longer ones, a "
            "smaller --window or --target-cr, or --pack-across")


def begin_folder(options, out, done):
    """What a run's folder holds from the first step on. done: steps that it has behind it."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "settings.json", options.settings())
    copy_tokenizer(resolve(options.model), out)
    metrics = out / "metrics.jsonl"
    lines = []
    if done > 0:
        problem = f"{metrics}: not readable; put an empty file in its place to go on"
        lines = read_text(metrics, problem).splitlines()[:done]  # what comes after the state is void
        lines = [json.dumps(parse_object(line, problem)) + "\n" for line in lines]
        print(f"{out}: goes on after step {done}, on {torch.get_num_threads()} threads; with another "
              "number than before the result differs in its last bits")
    write_text(metrics, "".join(lines))


def write_checkpoint(run, options, out):
    """Adapters with the name of their base, or all weights."""
    if options.shard:  # its weights lie in pieces: they are made anew from the last state
        offset = run.student.config.dms.offset
        options = replace(options, shard=False, device="cpu")
        run = Distillation(*load_pair(options), options)
        run.load(out / "state.safetensors")
        run.student.config.dms.offset = offset
    if options.train == "adapters":
        save_model(run.student, out, torch.float32, base=options.model)
    else:
        # half precision, as published models have it; what was trained is float32
        dtype = torch.float16 if options.dtype == "float16" else torch.bfloat16
        save_model(run.student, out, dtype)


# -------------------------------------------------------------------------------------- The script


def text_defaults(options):
    """For text: by the device, and by the model's context and width."""
    config = config_of(options.model)
    defaults = CPU_DEFAULTS if options.device == "cpu" else GPU_DEFAULTS
    seq_len = options.seq_len or min(defaults["seq_len"], config.max_position_embeddings)
    fits = max(int(seq_len / options.target_cr) - 1, 1)  # the window alone must leave room
    window = min(512, 2 ** (fits.bit_length() - 1))
    # A step moves a logit by about lr * C: as much as in NVIDIA's recipe, 3e-5 for C = 4096.
    return {**defaults, "seq_len": seq_len, "window": window, "lr": 0.12 / config.hidden_size}


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
        require(key.startswith(("eval_", "max_kl")) or given.get(key, value) == value,
                f"{out}: {started}; resume it as it is")
    options = Options(**{**saved, **given})  # enough to know which defaults apply
    is_teacher = options.data is None and Path(options.model).resolve() == TEACHER
    is_toy = options.data == "toy" or is_teacher
    options = Options(**{**(TOY_DEFAULTS if is_toy else text_defaults(options)), **saved, **given})
    options.out = str(out)
    choose_device(options)
    return options


def check(options):
    """What can be known to be wrong before anything is loaded."""
    folder = resolve(options.model)
    require(read_settings(folder, read_json(folder / "config.json")) is None,
            f"{folder}: is already a DMS checkpoint; give the model that it came from")
    least = (options.window + 1) * options.target_cr
    require(least <= options.seq_len, f"target CR {options.target_cr:g} is impossible: the window alone "
            f"holds {options.window + 1} of {options.seq_len} tokens; use a smaller --window or "
            "--target-cr, or longer sequences")
    is_neuron = options.decision == "neuron"
    require(not is_neuron or options.train == "all",
            "--decision neuron has no adapters to train; add --train all")
    require(options.fade_steps == 0 or is_neuron and not options.shard,
            "--fade-steps is for --decision neuron, without --shard")
    world = torchrun_place()[1]
    require(options.batch_size % world == 0,
            f"--batch-size {options.batch_size} cannot be shared by {world} processes; give a multiple")
    require(world > 1 or not options.shard, "--shard needs several processes; use torchrun")
    out = Path(options.out)
    is_new = not out.exists() or out.is_dir() and not [*out.glob("[!.]*")]  # but for the lock
    require(is_new or options.resume,
            f"{out}: already holds something; continue it with --resume, or choose another --out")
    check_memory(options, config_of(options.model), world)


def main(argv=None):
    options = parse(argv)
    check(options)
    rank, world = torchrun_place()
    if world > 1:
        distributed.init_process_group("gloo" if options.device == "cpu" else "nccl")
        distributed.barrier()  # all have looked at --out before anything is written there
    out = Path(options.out)
    begin = time.time()
    with locked(out) if rank == 0 else nullcontext():
        data = make_data(options)
        if not (out / "config.json").exists():  # it is written last: the checkpoint is complete
            # the fastest products: on a GPU TF32, on most CPUs float32 by oneDNN
            torch.set_float32_matmul_precision("medium")
            train(options, data, out)
            torch.set_float32_matmul_precision("highest")
        if world > 1:
            distributed.destroy_process_group()
        if rank == 0:
            print(f"{out}: checkpoint written, {time.time() - begin:.0f} s")
            problem = f"{out}: is written, but there is no memory to measure it"
            with refusing(problem, torch.OutOfMemoryError):
                evaluate(data, options, out)
            print(f"\n{out / 'results.json'}: written, {time.time() - begin:.0f} s in all")


if __name__ == "__main__":
    run_script(main, "stopped; continue with --resume")
