"""
A training step of the retrofit, adapters on a frozen base, on random weights of a real shape: time
and memory of a step of one sequence, beside what estimate.py counts.

    python bench/retrofit_step.py --shape qwen3-8b --lengths 8192 32768 --out bench/results/step.json
    python bench/retrofit_step.py                     # on a CPU: 4 layers of Qwen3-0.6B, 1,024 tokens
    python bench/retrofit_step.py --shape smollm2-135m --layers 30 --dtype float32     # all of a small model

A token's time is that of a step over its tokens; MFU is counted operations (estimate.step_flops)
over time, relative to the rate of large products measured in the same run.
"""

import resource

import torch
from common import Results, arguments, model_config, random_model, seconds_of, tidy
from torch.nn.attention import sdpa_kernel

import dms
import estimate
import retrofit
from checkpoint import choose_device, run_script
from distillation import Distillation
from kernels.block import BACKENDS

TOKENS_TO_8X = 1000 * 8 * 8192  # of retrofit.py's defaults on a GPU, and of NVIDIA's recipe


def make_run(config, T, args):
    options = retrofit.Options(
        train="adapters", steps=1000, lr=3e-5, batch_size=1, seq_len=T, dtype=args.dtype,
        device=args.device)  # fmt: skip
    model = random_model(config, args.device, options.torch_dtype)
    dms.start_retrofit(model, dms.DMSConfig(window=min(512, T // 16)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("dms_proj_alpha" in name)
    if args.compile:
        model.compile()
    return Distillation(model, model, options)


def parts_of(run, ids, documents, device):
    """Seconds of the teacher's pass, the student's, and all of it with the KL and backward."""
    packing = dms.Packing.of(documents, ids.shape[1], ids.device)
    dense = dms.document_attention(documents)

    def teacher():
        with torch.no_grad(), sdpa_kernel(BACKENDS):
            run.teacher.hidden(ids, dense, -packing.first)

    return {
        "teacher": seconds_of(teacher, device),
        "student": seconds_of(lambda: run.student_states(ids, packing, [1]), device),
        "step": seconds_of(lambda: run.step(1, ids, documents), device),
    }


def length_row(T, config, rate, args):
    tidy(args.device)
    run = make_run(config, T, args)
    ids = torch.randint(0, config.vocab_size, (1, T), device=args.device)
    length = -(-T // args.documents)
    documents = [[min(length, T - begin) for begin in range(0, T, length)]]
    run.step(0, ids, documents)  # compiles
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    turns = [parts_of(run, ids, documents, args.device) for _ in range(args.repeat)]
    row = {"tokens": T, "documents": args.documents}
    for part in turns[0]:
        row[f"{part}_seconds"] = sorted(turn[part] for turn in turns)[args.repeat // 2]
    seconds = row["step_seconds"] / T
    flops = estimate.step_flops(config, run.options, T)
    row["ms_a_token"] = 1000 * seconds
    row["mfu"] = flops / seconds / rate
    row["gpu_hours_to_8x"] = seconds * TOKENS_TO_8X / 3600
    counted = estimate.step_memory(config, run.options, T, 1)
    row["estimated_gb"] = sum(counted.values()) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    row["peak_gb"] = (peak if args.device == "cpu" else torch.cuda.max_memory_allocated()) / 1e9
    return row


def main():
    gpu = torch.cuda.is_available()
    p = arguments(__doc__, "qwen3-8b" if gpu else "qwen3-0.6b", None if gpu else 4)
    p.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768] if gpu else [1024])
    p.add_argument("--documents", type=int, default=1, help="of equal length in the sequence")
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--compile", action="store_true")
    args = p.parse_args()
    choose_device(args)
    torch.set_float32_matmul_precision("medium")  # as retrofit.py does
    config = model_config(args.shape, args.layers)
    rate = estimate.matmul_rate(args.device, getattr(torch, args.dtype))
    results = Results(args, matmul_tflops=rate / 1e12)
    print(f"large products: {rate / 1e12:.2f} TFLOP/s")
    for T in args.lengths:
        try:
            row = length_row(T, config, rate, args)
        except torch.OutOfMemoryError:
            print(f"{T} tokens: no memory", flush=True)
            continue
        results.add("rows", row)
        print(f"{T} tokens: {row['ms_a_token']:.3f} ms a token ({row['teacher_seconds']:.2f} s teacher, "
              f"{row['student_seconds']:.2f} s student, {row['step_seconds']:.2f} s step), "
              f"MFU {row['mfu']:.0%}, peak {row['peak_gb']:.1f} GB (counted {row['estimated_gb']:.1f}), "
              f"{row['gpu_hours_to_8x']:.1f} hours to 8x", flush=True)


if __name__ == "__main__":
    run_script(main)
