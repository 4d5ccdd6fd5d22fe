"""
A training step of the retrofit: adapters on a frozen base of random weights, one sequence.

    python bench/retrofit_step.py                      # a GPU: Qwen3-8B's shape, 8,192 tokens
    python bench/retrofit_step.py --shape smollm2-135m

Counted are the operations that the step computes: a pass of the teacher, one of the student, one
backward through activations, and for long sequences the halves of each block again. `of_products`
is their rate relative to that of large products in the same run, `of_peak` relative to what an H100
(SXM) or H200 is sold for.
"""

import torch
from measuring import GPU, Results, options, peak_memory, random_model, tidy, time_of

import dms
import retrofit
from common import run_script

PEAK = 989e12  # operations a second: bfloat16, dense


def product_rate(device, dtype):
    """Operations a second of large matrix products."""
    n = 8192 if GPU else 1024
    x = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / time_of(lambda: x @ x, 9)["fastest_ms"] * 1000


def operations(model, T):
    """Of a step of one document of T tokens. Attention is causal: backward takes 2.5 forwards."""
    config = model.config
    head = model.lm_head.weight.numel()
    blocks = sum(p.numel() for p in model.model.layers.parameters() if p.ndim > 1)
    # what is computed again in backward counts once more
    multiplied = (4 if T > dms.KL_SLICE else 3) * head
    multiplied += (4 if T > dms.RECOMPUTE_ABOVE else 3) * blocks
    heads = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return T * (2 * multiplied + 4.5 * 2 * T * heads)


def measure(T, model, rate, args):
    """(a row for sequences of T tokens, a function that makes a step)."""
    options = retrofit.Options(train="adapters", steps=1000, lr=3e-5, batch_size=1, seq_len=T,
                               compression_weight=4.0, device=args.device, dtype=args.dtype)
    dms.start_retrofit(model, dms.DMSConfig(window=min(512, T // 16)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("dms_proj_alpha" in name)
    run = retrofit.Distillation(model, model, options)
    ids = torch.randint(0, model.config.vocab_size, (1, T))

    def step():
        run.step(0, ids, [[T]])

    times = time_of(step, args.repeat, warm_up=1)
    per_second = operations(model, T) / times["ms"] * 1000
    row = {**times, "tokens_per_s": 1000 * T / times["ms"], "tflops": per_second / 1e12,
           "of_products": per_second / rate, **peak_memory()}
    if GPU:
        row["of_peak"] = per_second / PEAK
    return row, step


def main():
    args = options(__doc__, lengths=[8192] if GPU else [1024], repeat=3)
    torch.set_float32_matmul_precision("medium")  # as retrofit.py does
    results = Results(args)
    rate = product_rate(args.device, getattr(torch, args.dtype))
    results.add("large products", tflops=rate / 1e12)
    model = random_model(args)
    for T in args.lengths:
        tidy()
        row, step = measure(T, model, rate, args)
        results.add("training step", tokens=T, **row)
    results.add_kernels("last step's kernels", step)


if __name__ == "__main__":
    run_script(main)
