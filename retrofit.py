"""
The retrofit: teach a dense model, by distillation from itself, which tokens each KV head can forget.

    loss = KL(teacher || student) + max(1 - 1/CR(step) - fraction let go, 0)

The teacher is the model as it was, the student the same with relaxed eviction decisions (dms.py). Every step follows
from (seed, step, weights, optimizer state) alone, so an interrupted run continues to the same result.

    python retrofit.py                                     # the shipped toy teacher to 8x, on a laptop
    python retrofit.py --model Qwen/Qwen3-8B --data openr1-math.jsonl
    python retrofit.py --resume --out out/teacher-dms-8x   # after any interruption

Afterwards it measures, from the real cache: accuracy where the data brings a checker, KL, compression, reads, bytes.
"""
import argparse
import json
import os
import platform
import random
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import dms
from dms import DMSConfig, InputError, read_json, read_lines, refusing
from kv_cache import KVCache
from model import copy_tokenizer, load_model, load_tokenizer, resolve, save_model, write_atomic, write_json

TEACHER = Path(__file__).resolve().parent / "toy" / "teacher"


# ----------- Data: batch(step) -> token ids (B, T) and real lengths (B,), a function of (seed, step); held_out() alike


class TextData:
    """A .txt file (documents separated by blank lines) or .jsonl file ("text", or "messages" for the chat template),
    packed to full sequences. Every 50th document is held out."""

    def __init__(self, file, tokenizer, seq_len, batch_size, seed):
        self.tokenizer, self.seq_len, self.batch_size, self.seed = tokenizer, seq_len, batch_size, seed
        if str(file).endswith(".jsonl"):
            documents = [row.get("messages") or row.get("text") for row in read_lines(file)]
        else:
            with refusing(f"{file}: not readable as text; give a .txt or .jsonl file, or toy"):
                documents = Path(file).read_text(encoding="utf-8").split("\n\n")
        documents = [d for d in documents if d and (not isinstance(d, str) or d.strip())]
        if len(documents) < 2:
            raise InputError(f"{file}: has {len(documents)} usable documents; needed are at least 2, as text parted "
                             f"by blank lines, or JSON lines with \"text\" or \"messages\"")
        self.kept_out = documents[1::50]
        self.documents = [d for i, d in enumerate(documents) if i % 50 != 1]

    def pack(self, documents, rng, rows):
        end = self.tokenizer.token_id(self.tokenizer.special("eos_token"))
        ids, budget = [], rows * self.seq_len
        while len(ids) < budget:
            more = self.tokenizer.encode(rng.choice(documents)) + ([end] if end is not None else [])
            if not more and not ids:
                raise InputError("the data gives no tokens; check the file and the tokenizer")
            ids += more
        return torch.tensor(ids[:budget]).view(rows, self.seq_len), torch.full((rows,), self.seq_len)

    def batch(self, step):
        return self.pack(self.documents, random.Random(f"{self.seed} {step}"), self.batch_size)

    def held_out(self, rows):
        return self.pack(self.kept_out, random.Random("held out"), rows)


# ------------------------------------------------------------------------------------------------------------ Training


def train_step(student, teacher, data, optimizer, step, args):
    """One step; returns its metrics. teacher is None where the student without eviction is the teacher."""
    torch.manual_seed(args.seed * 1_000_003 + step)
    ids, lengths = (x.to(student.device) for x in data.batch(step))
    keep = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None] - 1  # the last token predicts nothing here
    config, cr = student.config, dms.scheduled_cr(step + 1, args.steps, args.target_cr)
    with torch.no_grad():
        config.dms.disable_eviction = teacher is None
        source = teacher or student
        target = source.hidden(ids, dms.masked_attention(source.config))
        config.dms.disable_eviction = False
    relaxed = dms.RelaxedAttention(config, lengths)
    states = student.hidden(ids, relaxed)
    kl = dms.distillation_loss(states, target, student.lm_head.weight, source.lm_head.weight, keep, args.reverse_kl)
    compression = dms.compression_loss(relaxed.gone(), cr)
    (kl + args.compression_weight * compression).backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = args.lr * min(1.0, (step + 1) / 20, (args.steps - step) / max(0.4 * args.steps, 1))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"step": step + 1, "kl": kl.item(), "compression_loss": compression.item(), "target_cr": round(cr, 4),
            "cr": 1 / (1 - min(relaxed.gone().item(), 1 - 1e-6)), "grad_norm": norm.item()}


def save_state(file, names, optimizer, step):
    """Weights in training and AdamW's moments, one safetensors file, replaced atomically."""
    tensors = {f"{key}.{name}": x.detach().contiguous().cpu() for name, p in names.items()
               for key, x in {"weight": p, **optimizer.state[p]}.items() if key != "step"}
    write_atomic(file, lambda scratch: save_file(tensors, scratch, {"step": str(step)}))


def load_state(file, names, optimizer):
    """The inverse of save_state; returns the number of steps done."""
    with refusing(f"{file}: does not belong to this run; start anew in another --out"), safe_open(file, "pt") as f:
        step = int(f.metadata()["step"])
        for name, p in names.items():
            p.data.copy_(f.get_tensor(f"weight.{name}"))
            moments = {key: f.get_tensor(f"{key}.{name}").to(p.device) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}
    return step


def train(args, out):
    """Run the steps that are still to do and write the checkpoint into `out`. Nothing is written before the model and
    the data have been loaded and checked."""
    data = make_data(args)
    student = load_model(args.model, args.device, torch.float32 if args.train == "all" else args.torch_dtype)
    teacher = load_model(args.model, args.device, args.torch_dtype) if args.train == "all" else None
    if args.seq_len > student.config.max_position_embeddings:
        raise InputError(f"--seq-len {args.seq_len} is longer than the model's context of "
                         f"{student.config.max_position_embeddings}; make it shorter")
    student.check_ids(data.batch(0)[0].unique().tolist())
    dms.start_retrofit(student, DMSConfig(window=args.window, source=args.decision, shift=args.shift, per=args.per,
                                          target_cr=args.target_cr))
    for name, p in student.named_parameters():
        p.requires_grad_(args.train == "all" or "dms_proj_alpha" in name)
    student.recompute = args.recompute
    names = {name: p for name, p in student.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(names.values(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "settings.json", args.settings)
    state, metrics = out / "state.safetensors", out / "metrics.jsonl"
    done = load_state(state, names, optimizer) if state.exists() else 0
    lines = metrics.read_text().splitlines(keepends=True)[:done] if metrics.exists() else []
    write_atomic(metrics, lambda scratch: scratch.write_text("".join(lines)))
    bar = tqdm(range(done, args.steps), initial=done, total=args.steps, desc="retrofit", dynamic_ncols=True)
    with open(metrics, "a") as log:
        for step in bar:
            row = train_step(student, teacher, data, optimizer, step, args)
            log.write(json.dumps(row) + "\n")
            bar.set_postfix_str(f"KL {row['kl']:.4f}, target {row['target_cr']:.2f}x, actual {row['cr']:.2f}x")
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                log.flush()
                save_state(state, names, optimizer, step + 1)
    copy_tokenizer(resolve(args.model), out)
    if args.train == "all":
        save_model(student, out, args.torch_dtype if args.torch_dtype != torch.float32 else torch.bfloat16)
    else:
        save_model(student, out, torch.float32, base=args.model)


# ----------------------------------------------------------------------------------------------------------- Measuring


@torch.inference_mode()
def measure(model, data, args, desc, reference=None):
    """KL to the reference model on held-out text with hard decisions; accuracy, where the data brings tasks; and the
    counts of the caches that answered them, or else have read that text."""
    result, cache = {}, lambda rows: KVCache(model.config, rows, model.device, model.dtype)
    ids, lengths = (x.to(model.device) for x in data.held_out(32))
    if reference is not None:
        keep = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None] - 1
        states = [m.hidden(ids, dms.masked_attention(m.config)) for m in (model, reference)]
        result["kl"] = dms.distillation_loss(*states, model.lm_head.weight, reference.lm_head.weight, keep).item()
    if hasattr(data, "answer_tasks"):
        result["accuracy"], caches = data.answer_tasks(model, cache, args, desc)
    else:
        result["accuracy"], caches = {}, [cache(1)]
        for row, n in zip(ids, lengths.tolist()):
            model(row[None, :n], cache=caches[0], last_only=True)
            caches[0].release([0])
    tokens, pairs = sum(c.ended_tokens for c in caches), sum(c.ended_pairs for c in caches)
    heads = model.config.num_hidden_layers * model.config.num_key_value_heads
    stats = [c.stats() for c in caches]
    return {**result, "compression_ratio": tokens * heads / pairs, "tokens": tokens, "pairs": pairs,
            "peak_pairs": max(s["peak_pairs"] for s in stats), "reads": sum(s["reads"] for s in stats),
            "peak_page_bytes": max(s["peak_page_bytes"] for s in stats)}


def evaluate(args, out):
    """Measure the dense model, the retrofitted one and a sliding window of the same budget."""
    data = make_data(args)
    teacher = load_model(args.model, args.device, args.torch_dtype)
    student = load_model(out, args.device, args.torch_dtype)
    results = {"dense": measure(teacher, data, args, "dense"), "DMS": measure(student, data, args, "DMS", teacher)}
    # a sliding window is a DMS model that evicts everything; its budget is what DMS held of an average sequence
    sequences = len(results["dense"]["accuracy"]) * args.eval_problems or 32
    budget = max(round(results["dense"]["tokens"] / sequences / results["DMS"]["compression_ratio"]), 1)
    sliding = load_model(args.model, args.device, args.torch_dtype)
    dms.start_retrofit(sliding, DMSConfig(window=budget - 1, offset=-1.0))
    results["window"] = measure(sliding.requires_grad_(False), data, args, f"window of {budget}", teacher)
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else \
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    write_json(out / "results.json", {"settings": args.settings, "hardware": hardware, "window_tokens": budget,
                                      "torch": torch.__version__, "results": results})
    rows = [("", ["dense", f"DMS {args.target_cr:g}x", f"window of {budget}"])]
    for task in results["dense"]["accuracy"]:
        rows.append((task, [f"{r['accuracy'][task]:.1%}" for r in results.values()]))
    for name, key, form in (("KL to the teacher, nats", "kl", ".4f"), ("peak pairs held", "peak_pairs", ","),
                            ("compression ratio", "compression_ratio", ".2f"), ("KV reads, pairs", "reads", ","),
                            ("peak bytes in pages", "peak_page_bytes", ",")):
        rows.append((name, [f"{r.get(key, 0):{form}}" for r in results.values()]))
    print("".join(f"\n{name:26}" + "".join(f"{value:>18}" for value in values) for name, values in rows))


# ---------------------------------------------------------------------------------------------------------- The script


def make_data(args):
    tokenizer = load_tokenizer(args.model)
    if args.data == "toy":
        from toy.data import ToyData
        return ToyData(tokenizer, args.seq_len, args.batch_size, args.seed)
    return TextData(args.data, tokenizer, args.seq_len, args.batch_size, args.seed)


def parse(argv=None):
    p = argparse.ArgumentParser(description="Retrofit a model with Dynamic Memory Sparsification.")
    p.add_argument("--model", default=os.path.relpath(TEACHER), help="folder or hub id (default: the toy teacher)")
    p.add_argument("--data", help="toy, or a .txt or .jsonl file (default: toy, for the toy teacher)")
    p.add_argument("--out", help="folder for the checkpoint (default: out/NAME-dms-CRx)")
    p.add_argument("--resume", action="store_true", help="continue the interrupted run in --out")
    p.add_argument("--target-cr", type=float, default=8.0, help="compression ratio to reach")
    p.add_argument("--window", type=int, help="tokens always readable (default: 16 for toy data, else 256)")
    p.add_argument("--train", choices=["adapters", "all"], help="(default: all for toy data, else adapters)")
    p.add_argument("--decision", choices=["adapter", "neuron"], default="adapter", help="where decisions come from")
    p.add_argument("--shift", type=int, choices=[0, 1], default=1, help="the logit at t decides token t - shift")
    p.add_argument("--per", choices=["head", "layer"], default="head", help="granularity of decisions")
    p.add_argument("--steps", type=int, help="(default: 500 for toy data, else 1000)")
    p.add_argument("--lr", type=float, help="(default: 1e-3 for toy data, else 3e-5)")
    p.add_argument("--batch-size", type=int, help="sequences per step (default: 4 for toy data, else 8)")
    p.add_argument("--seq-len", type=int, help="tokens per sequence (default: 512 for toy data, else 8192)")
    p.add_argument("--compression-weight", type=float, default=1.0, help="weight of the compression loss")
    p.add_argument("--reverse-kl", action="store_true", help="weigh the KL by the student's probabilities")
    p.add_argument("--recompute", action="store_true", help="recompute blocks in backward: less memory, more time")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--save-every", type=int, default=50, help="steps between saved states")
    p.add_argument("--eval-problems", type=int, default=200, help="held-out problems per task")
    p.add_argument("--eval-batch", type=int, default=100, help="problems generated side by side")
    p.add_argument("--eval-tokens", type=int, default=256, help="most new tokens of an answer")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                   help="of frozen weights (default: float32 on a CPU, bfloat16 on a GPU)")
    args = p.parse_args(argv)
    toy = args.data == "toy" or (args.data is None and Path(args.model).resolve() == TEACHER)
    out = Path(args.out or Path("out") / f"{Path(args.model).name}-dms-{args.target_cr:g}x")
    if args.resume:
        if not (out / "settings.json").exists():
            raise InputError(f"{out}: holds no run to resume; name its folder with --out, or leave --resume out")
        saved = read_json(out / "settings.json")
        p.set_defaults(**saved)
        args = p.parse_args(argv)
        changed = [k for k in saved if getattr(args, k, None) != saved[k] and not k.startswith("eval_")]
        if changed:
            raise InputError(f"{out}: was started with another --{changed[0].replace('_', '-')} "
                             f"({saved[changed[0]]!r}); resume it unchanged, or start another --out")
    for name, for_toy, otherwise in (("data", "toy", None), ("window", 16, 256), ("train", "all", "adapters"),
                                     ("steps", 500, 1000), ("lr", 1e-3, 3e-5), ("batch_size", 4, 8),
                                     ("seq_len", 512, 8192)):
        if getattr(args, name) is None:
            setattr(args, name, for_toy if toy else otherwise)
    args.out, args.device = str(out), dms.choose_device(args.device)
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    args.settings = {k: v for k, v in vars(args).items() if k not in ("resume", "out", "device")}
    args.torch_dtype = getattr(torch, args.dtype)
    return args


def check(args):
    """What can be known to be wrong before anything is loaded."""
    folder = resolve(args.model)
    if any(k.startswith("dms_") for k in read_json(folder / "config.json")):
        raise InputError(f"{folder}: is already a DMS checkpoint; give the dense model that it came from")
    if args.data is None:
        raise InputError("--data is missing; give a .txt or .jsonl file of text like what the model will be used for")
    dms.check_target(args.target_cr, args.window, args.seq_len)
    for name in ("steps", "batch_size", "seq_len", "save_every", "eval_problems", "eval_batch", "eval_tokens"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1")
    if args.window < 0 or not args.lr > 0:
        raise InputError("--window must be 0 or more and --lr positive")
    if args.decision == "neuron" and args.train == "adapters":
        raise InputError("--decision neuron has no adapters to train; add --train all")
    out = Path(args.out)
    if not args.resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: already holds something; continue it with --resume, or choose another --out")


def main(argv=None):
    args = parse(argv)
    check(args)
    out = Path(args.out)
    begin = time.time()
    if not (out / "config.json").exists():  # written last: the checkpoint is complete
        train(args, out)
        print(f"{out}: checkpoint written, {time.time() - begin:.0f} s")
    evaluate(args, out)
    print(f"\n{out / 'results.json'}: written, {time.time() - begin:.0f} s in all")


if __name__ == "__main__":
    dms.run_script(main, "stopped; continue with --resume")
