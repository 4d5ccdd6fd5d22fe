"""
Retrofit a checkpoint with DMS by distillation.

    loss = KL(teacher || student) + weight * max(1 - 1/CR(step) - evicted fraction, 0)

The teacher is the model as it was, the student the same with relaxed eviction decisions (dms.py).
Adapters begin with a regression (warm_start.py); then the target holds from the first step on. At
the end the decisions' offset is settled on held-out text, for every ratio (evaluate.py). Here is
first the training step, in one process or several, then the loop around it and the script.

    python retrofit.py                                     # the shipped toy teacher, on a laptop
    python retrofit.py --model Qwen/Qwen3-8B               # OpenR1-Math-220k from the hub
    torchrun --nproc-per-node 8 retrofit.py --model Qwen/Qwen3-8B
    python retrofit.py --resume --out out/teacher-dms-8x   # after any interruption

A step follows from (seed, step, its sequences, weights, optimizer state, the fraction that the step
before evicted) alone. So an interrupted run goes on to the same result, and processes that share
the sequences of a step sum to the same gradients, up to the order of sums.
"""

import json
import math
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as distributed
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import dms
from checkpoint import (base_keys, copy_tokenizer, load_model, load_tokenizer, parse_config,
                        read_settings, resolve, save_model)
from common import (all_reduce, choose_device, is_sharded, parse_options, read_json, require, shard,
                    run_script, sharded_like, torchrun_place, whole, write_atomic, write_json)
from data import DEFAULT, TextData
from evaluate import MARGIN, evaluate, settle_offsets, settling_sequences
from warm_start import warm_start

TEACHER = Path(__file__).resolve().parent / "toy" / "teacher"
# Defaults, where the command line says nothing: for the toy data,
TOY_DEFAULTS = dict(data="toy", window=16, train="all", warm_start=64, steps=250, lr=1e-3,
                    batch_size=4, seq_len=512, compression_weight=1.0, eval_sequences=32)
# for text on a GPU,
GPU_DEFAULTS = dict(data=DEFAULT, train="adapters", warm_start=32, steps=200, batch_size=8,
                    seq_len=8192, compression_weight=4.0, eval_sequences=32)
# and for text on a CPU
CPU_DEFAULTS = dict(GPU_DEFAULTS, warm_start=24, batch_size=1, seq_len=1024, eval_sequences=8)
MAX_KL = 10.0  # nats; a step beyond it ends the run
TOKENS_AT_A_TIME = 4096  # of a step; its sequences are taken one by one, or a few if short


@dataclass
class Options:
    """The command line: --batch-size 8 for batch_size. None is filled in by `complete`."""

    model: str = str(TEACHER)  # folder or hub id (default: the toy teacher)
    data: str = None  # toy, a file, a folder, or a hub dataset: owner/name or owner/name@commit
    out: str = None  # folder for the checkpoint (default: out/NAME-dms-CRx)
    resume: bool = False  # continue the interrupted run in --out
    target_cr: float = 8.0  # compression ratio to reach
    window: int = None  # tokens that stay readable (default: 16 for toy, else up to 512)
    train: Literal["adapters", "all"] = None  # (default: all for toy data, else adapters)
    decision: Literal["adapter", "neuron"] = "adapter"  # where decisions come from
    warm_start: int = None  # documents that adapters are fitted to before the first step; 0: none
    shift: Literal[0, 1] = 0  # the logit at token t decides token t - shift
    per: Literal["head", "layer"] = "head"  # granularity of decisions
    steps: int = None  # (default: 250 for toy data, else 200)
    lr: float = None  # (default: 1e-3 for toy data, else 0.06 / hidden size, 1.5e-5 for 8B)
    batch_size: int = None  # sequences per step (default: 8, on a CPU 1, for toy data 4)
    seq_len: int = None  # tokens per sequence (default: 512 for toy, else 8192, on a CPU 1024)
    compression_weight: float = None  # of the compression loss (default: 4, for toy data 1)
    reverse_kl: bool = False  # weigh the KL by the student's probabilities
    shard: bool = False  # spread the weights over the GPUs of torchrun (FSDP2)
    seed: int = 0
    save_every: int = 50  # steps between saved states
    eval_sequences: int = None  # held-out sequences for the KL (default: 32, on a CPU 8)
    eval_problems: int = 200  # held-out problems of each toy task
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = None  # of frozen weights (GPU: bfloat16)

    def settings(self):
        """What is written down of a run: all but the options that --resume may change."""
        may_change = "resume out device shard".split()
        return {k: v for k, v in vars(self).items() if k not in may_change}


# ------------------------------------------------------------------------------------ Distillation


def load_pair(options):
    """(student, ready to be trained; teacher)."""
    settings = dms.DMSConfig(options.window, options.decision, options.shift, per=options.per,
                             target_cr=options.target_cr)
    device = "cpu" if options.shard else options.device  # shard() moves it, piece by piece
    teacher = load_model(options.model, device, getattr(torch, options.dtype))
    if options.shard:
        shard(teacher)
    if options.train == "adapters":
        # One model, which is its own teacher when attention ignores the decisions. The small
        # adapters are added after sharding, so every process has them in whole.
        student = dms.start_retrofit(teacher, settings)
        trained = [p for name, p in student.named_parameters() if "dms_proj_alpha" in name]
    else:
        student = dms.start_retrofit(load_model(options.model, device), settings)  # in float32
        if options.shard:
            shard(student)
        # all but routers: a router and its experts were trained for one another's choices
        trained = [p for name, p in student.named_parameters() if ".mlp.gate." not in name]
    for parameter in trained:  # load_model has frozen all others
        parameter.requires_grad_(True)
    return student, teacher


class Distillation:
    """A student, its teacher and AdamW. `step` is the training step."""

    def __init__(self, student, teacher, options):
        self.student = student
        self.teacher = teacher
        self.options = options
        self.attention = dms.relaxed_attention
        if student.device.type == "cuda" and student.config.key_dim <= 256:
            with suppress(ImportError):  # without Triton, or without kernels/
                from kernels.training import relaxed_attention

                self.attention = relaxed_attention
        self.parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), betas=(0.9, 0.95), weight_decay=0.0)
        # What the last step evicted, which `backward` compares with the target. Before the first
        # step it is what the warm start was settled to.
        self.evicted_fraction = 1 - 1 / options.target_cr if options.warm_start else 0.0

    def step(self, step, ids, documents):
        """Step number `step`, on ids (B, T) and the lengths of each sequence's documents. All
        processes are given the same. Returns metrics. Raises InputError, before weights change, if
        the step diverges."""
        options = self.options
        if options.warm_start:  # the target is reached; a margin, as other text is compressed less
            cr = MARGIN * options.target_cr
        else:  # cold adapters, or the neuron, are led there
            cr = dms.scheduled_cr(step + 1, options.steps, options.target_cr)
        sums = all_reduce(self.backward(step, ids, documents, cr))
        kl, self.evicted_fraction = sums.tolist()  # the latter for the next step
        for parameter in self.parameters.values():
            if not is_sharded(parameter.grad):  # FSDP has summed what it shards
                all_reduce(parameter.grad)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)).item()
        require(kl <= MAX_KL and math.isfinite(norm),  # NaN is not below it either
                f"step {step + 1} diverged (KL {kl:.3g}); begin anew with a lower --lr")
        self.optimizer.param_groups[0]["lr"] = learning_rate(step, options.steps, options.lr)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return dict(step=step + 1, kl=kl, target_cr=round(cr, 4),
                    cr=1 / max(1 - self.evicted_fraction, 1e-6),  # all may be evicted
                    grad_norm=norm)

    def backward(self, step, ids, documents, cr):
        """Make the gradients of this process's share of a step. Returns its share of the KL and of
        the evicted fraction, (2,)."""
        rank, world = torchrun_place()
        tokens = sum(map(sum, documents))
        predictions = tokens - sum(map(len, documents))  # a document's last token predicts none
        sums = torch.zeros(2, device=self.student.device)
        B, T = ids.shape
        for part in torch.arange(rank, B, world).split(max(TOKENS_AT_A_TIME // T, 1)):
            part = part.tolist()
            packing = dms.Packing([documents[b] for b in part], T, sums.device)
            seeds = [f"{self.options.seed} {step} {b}" for b in part]
            kl, evicted = self.compare(ids[part].to(sums.device), packing, seeds)
            shares = torch.stack((kl / predictions, evicted / tokens))
            # Whether the target is missed depends on the whole step, of which these sequences are
            # only a part. So the fraction has the value of the step before, and the gradient of
            # these. (Gradients of all parts add up.)
            fraction = dms.straight_through(self.evicted_fraction, shares[1])
            compression = dms.compression_loss(fraction, cr)
            (shares[0] + self.options.compression_weight * compression).backward()
            sums += shares.detach()
        return sums

    def compare(self, ids, packing, seeds):
        """(the KL, summed over tokens; the pairs evicted, the mean over heads), with gradients."""
        start = -packing.first  # positions count from where a document begins
        with torch.no_grad():
            target = self.teacher.hidden(ids, dms.document_attention(packing), start)
        relaxed = dms.RelaxedAttention(self.student.config.dms, packing, self.attention, seeds)
        is_long = ids.shape[1] > dms.RECOMPUTE_ABOVE
        states = self.student.hidden(ids, relaxed, start, recompute=is_long)
        # read here and not before: FSDP2 has put these weights together for the forward pass
        heads = (self.student.lm_head.weight, self.teacher.lm_head.weight)
        counts = packing.precedes(1)
        kl = dms.distillation_loss(states, target, *heads, counts, self.options.reverse_kl)
        return kl, relaxed.evicted_pairs()

    def save(self, file, step):
        """Weights in training and AdamW's state, one safetensors file, replaced atomically. step:
        how many are done. To be called in all processes."""
        tensors = {}
        for name, parameter in self.parameters.items():
            for key, tensor in {"weight": parameter, **self.optimizer.state[parameter]}.items():
                tensors[f"{key}.{name}"] = whole(tensor.detach()).cpu().contiguous()
        notes = dict(done=step, evicted_fraction=self.evicted_fraction,
                     offset=self.student.config.dms.offset)
        if torchrun_place()[0] == 0:
            write_atomic(file, lambda new: save_file(tensors, new, {"notes": json.dumps(notes)}))

    def load(self, file):
        """The inverse of save; returns the step. Tensors go by name and are sharded anew, as the
        number of processes may be another one."""
        with safe_open(file, "pt") as saved:
            for key in saved.keys():
                kind, name = key.split(".", 1)
                tensor = saved.get_tensor(key)
                if kind != "step":  # AdamW's own, a number for each tensor
                    tensor = sharded_like(tensor, self.parameters[name])
                if kind == "weight":
                    self.parameters[name].data.copy_(tensor)
                else:
                    self.optimizer.state[self.parameters[name]][kind] = tensor
            notes = json.loads(saved.metadata()["notes"])
        self.evicted_fraction = notes["evicted_fraction"]
        self.student.config.dms.offset = notes["offset"]
        return notes["done"]


def learning_rate(step, steps, peak):
    """Linear from 0 over the first steps (an eighth, 20 at most), constant, linear to 0 over the
    last 40%."""
    return peak * min(1.0, (step + 1) / min(20, steps / 8), (steps - step) / (0.4 * steps))


# ---------------------------------------------------------------------------------------- The loop


def make_data(options):
    """Where sequences come from: .batches(step), .held_out(count)."""
    tokenizer = load_tokenizer(options.model)
    sizes = (options.seq_len, options.batch_size, options.seed)
    if options.data == "toy":
        from toy.data import ToyData

        return ToyData(tokenizer, *sizes)
    return TextData(options.data, tokenizer, config_of(options.model).vocab_size, *sizes)


def train(options, data, out):
    """Run the steps that are still to do, and write the checkpoint into `out`: adapters with the
    name of their base, or all weights."""
    is_main = torchrun_place()[0] == 0
    if is_main:
        write_json(out / "settings.json", options.settings())
        copy_tokenizer(resolve(options.model), out)
    run = Distillation(*load_pair(options), options)
    state = out / "state.safetensors"
    done = 0
    if state.exists():
        done = run.load(state)
    elif options.warm_start:
        warm_start(run.student, data, options.warm_start)
        # for the target alone
        settle_offsets(run.student, data, ratios=(), biased_attention=run.attention)
        run.save(state, 0)
    log = out / "metrics.jsonl"
    if is_main:
        lines = log.read_text().splitlines(keepends=True)[:done] if done else []
        log.write_text("".join(lines))  # what comes after the saved state will come again
    bar = tqdm(range(done, options.steps), "retrofit", options.steps,
               initial=done, disable=not is_main)
    for step, (ids, documents) in zip(bar, data.batches(done)):
        begin = time.time()
        metrics = run.step(step, ids, documents)
        if is_main:
            with open(log, "a") as file:
                print(json.dumps(metrics), file=file)
        speed = sum(map(sum, documents)) / (time.time() - begin)
        peak = torch.cuda.max_memory_allocated() / 1e9  # 0 on a CPU
        bar.set_postfix_str(f"KL {metrics['kl']:.4f}, target {metrics['target_cr']:.2f}x, actual "
                            f"{metrics['cr']:.2f}x, {speed:,.0f} tokens/s, GPU {peak:.1f} GB")
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            run.save(state, step + 1)
    settle_offsets(run.student, data, biased_attention=run.attention)
    if options.train == "adapters":
        save_model(run.student, out, torch.float32, base_keys(options.model, out))
    else:
        save_model(run.student, out, torch.bfloat16)


# -------------------------------------------------------------------------------------- The script


def config_of(model):
    file = resolve(model) / "config.json"
    return parse_config(read_json(file), file)


def complete(options):
    """Fill in what the command line leaves open, by the data, device, context and width."""
    choose_device(options)
    if options.data == "toy" or options.data is None and Path(options.model).resolve() == TEACHER:
        defaults = TOY_DEFAULTS
    else:
        config = config_of(options.model)
        defaults = CPU_DEFAULTS if options.device == "cpu" else GPU_DEFAULTS
        seq_len = options.seq_len or min(defaults["seq_len"], config.context)
        # a quarter of what the target leaves, rounded down to a power of two
        window = min(512, 2 ** (max(int(seq_len / options.target_cr / 4), 1).bit_length() - 1))
        # AdamW moves each of an adapter's C weights by lr in a step, so its score by up to about
        # lr * C: the same in models of any width
        defaults = dict(defaults, seq_len=seq_len, window=window, lr=0.06 / config.hidden_size)
    if options.decision == "neuron":  # there are no adapters to fit
        defaults = dict(defaults, warm_start=0)
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def parse(argv=None):
    """The Options: what the command line states, then a resumed run's own, then defaults."""
    stated = parse_options(Options, argv)
    options = Options(**stated)  # for the folder alone, which follows from --model and --target-cr
    out = options.out or f"out/{Path(options.model).name}-dms-{options.target_cr:g}x"
    if options.resume:
        saved = read_json(Path(out) / "settings.json")
        changed = [f"{k} = {saved[k]}" for k in stated if saved.get(k, stated[k]) != stated[k]]
        require(not changed, f"{out}: was started with {', '.join(changed)}; keep that")
        options = Options(**{**saved, **stated})
    options.out = out
    complete(options)
    return options


def check(options):
    """Refuse what would fail, or be wrong, only after long work."""
    folder = resolve(options.model)
    require(read_settings(folder, read_json(folder / "config.json")) is None,
            f"{folder}: is already a DMS checkpoint; give the model that it came from")
    config = config_of(options.model)
    require(options.seq_len <= config.context, f"--seq-len: the context is {config.context} tokens")
    require((options.window + 1) * options.target_cr <= options.seq_len,
            f"--window {options.window} is too much of {options.seq_len} tokens; take less")
    if options.decision == "neuron":
        require(not config.kv_lora_rank, "neuron: latent attention has no groups to borrow from")
        require(options.train == "all" and not options.warm_start,
                "neuron needs --train all, and no --warm-start")
    require(not options.device.startswith("cuda") or torch.cuda.get_device_capability()[0] >= 8,
            "no kernel trains on a GPU before Ampere (sm_80); use --device cpu")
    world = torchrun_place()[1]
    require(options.batch_size % world == 0, f"--batch-size: give a multiple of {world} processes")
    require(world > 1 or not options.shard, "--shard needs several processes; use torchrun")
    require(options.resume or not any(Path(options.out).glob("*")),
            f"{options.out}: holds something; continue it with --resume, or choose another --out")


def check_window(options, data):
    """Refuse a window that alone holds more of the settling text than the target leaves."""
    _, documents = data.held_out(settling_sequences(options.seq_len))
    lengths = sum(documents, [])
    in_windows = sum(min(n, options.window + 1) for n in lengths)
    require(sum(lengths) / in_windows > MARGIN * options.target_cr,
            f"--window {options.window} is too much of documents so short; take less")


def main(argv=None):
    options = parse(argv)
    check(options)
    rank, world = torchrun_place()
    if world > 1:
        distributed.init_process_group("gloo" if options.device == "cpu" else "nccl")
        distributed.barrier()  # all have looked at --out before anything is written there
    out = Path(options.out)
    begin = time.time()
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{out}.lock", timeout=0) if rank == 0 else nullcontext():
        data = make_data(options)
        if data.revision and "@" not in options.data:
            options.data += f"@{data.revision}"  # settings.json keeps the commit for --resume
        if not (out / "config.json").exists():  # which is written last, so there is more to train
            check_window(options, data)
            # "medium" allows less than float32 inside products: a GPU takes TF32, a CPU oneDNN
            torch.set_float32_matmul_precision("medium")
            train(options, data, out)
            torch.set_float32_matmul_precision("highest")
        if world > 1:
            distributed.barrier()  # a process that ends while others still send may abort
            distributed.destroy_process_group()
        if rank == 0:
            evaluate(data, options, out)
            print(f"\n{out / 'results.json'}: written, {time.time() - begin:.0f} s in all")


if __name__ == "__main__":
    run_script(main, "stopped; continue with --resume", "take a shorter --seq-len, or --shard")
