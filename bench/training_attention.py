"""
Attention in training, one layer of a real shape: the relaxed attention, forward and backward,
beside causal attention without a bias (PyTorch's flash attention), for scale.

    python bench/training_attention.py --out bench/results/training_attention.json
    python bench/training_attention.py --lengths 32768 --documents 8

On a CPU it measures the plain function, on a reduced shape.
"""

import contextlib

import torch
import torch.nn.functional as F
from common import Results, arguments, model_config, tidy, time_of
from torch.nn.attention import SDPBackend, sdpa_kernel

from checkpoint import choose_device, run_script
from kernels.training_attention import relaxed_attention, relaxed_attention_plain


def random_layer(config, T, documents, device, dtype):
    """q (1, Hq, T, D), k and v (1, Hkv, T, D), views of (1, T, heads, D) as in a model; bias
    (1, Hkv, T) of pairs of which half are evicted; and first (1, T) int32 of even documents."""
    torch.manual_seed(0)
    Hkv = config.num_key_value_heads
    inputs = []
    for heads in (config.num_attention_heads, Hkv, Hkv):
        x = torch.randn(1, T, heads, config.head_dim, device=device, dtype=dtype)
        inputs.append(x.transpose(1, 2).requires_grad_())
    bias = F.logsigmoid(10 * torch.randn(1, Hkv, T, device=device)).requires_grad_()
    length = -(-T // documents)
    first = torch.arange(T, dtype=torch.int32, device=device) // length * length
    return [*inputs, bias], first[None]


def flash(q, k, v, bias, first, window):
    """Causal attention with neither bias nor documents; by flash attention on a GPU."""
    only = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if q.is_cuda else contextlib.nullcontext()
    with only:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def length_row(name, attend, T, config, args):
    """A row of results. TFLOP/s by what a causal matrix takes: two products forward, five backward,
    of T * T / 2 pairs, whatever the documents."""
    tidy(args.device)
    dtype = getattr(torch, args.dtype)
    inputs, first = random_layer(config, T, args.documents, args.device, dtype)
    with torch.no_grad():
        forward = time_of(lambda: attend(*inputs, first, args.window), args.repeat, args.device)
    y = attend(*inputs, first, args.window)
    probe = torch.randn_like(y)
    used = inputs if attend is not flash else inputs[:3]

    def differentiate():
        return torch.autograd.grad(y, used, probe, retain_graph=True)

    backward = time_of(differentiate, args.repeat, args.device)
    product = T * T * config.num_attention_heads * config.head_dim / 1e12
    row = {"attention": name, "tokens": T, "forward": forward, "backward": backward}
    row["forward_tflops"] = 2 * product / forward["seconds"]
    row["backward_tflops"] = 5 * product / backward["seconds"]
    if args.device != "cpu":
        row["peak_gpu_mb"] = torch.cuda.max_memory_allocated() // 2**20
    return row


def show(row):
    parts = []
    for way in ("forward", "backward"):
        milliseconds = 1000 * row[way]["seconds"]
        parts.append(f"{way} {milliseconds:8.2f} ms, {row[way + '_tflops']:.3g} TFLOP/s")
    print(f"{row['tokens']:7} tokens, {row['attention']:7}: {'; '.join(parts)}", flush=True)


def main():
    gpu = torch.cuda.is_available()
    p = arguments(
        "Training attention benchmark.",
        shape="qwen3-8b" if gpu else "qwen3-0.6b",
        dtype="bfloat16" if gpu else "float32",
    )
    p.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768] if gpu else [512, 2048])
    p.add_argument("--window", type=int, default=512 if gpu else 256)
    p.add_argument("--documents", type=int, default=1, help="of equal length, in the one row")
    p.add_argument("--repeat", type=int, default=10 if gpu else 3)
    args = p.parse_args()
    choose_device(args)
    relaxed = relaxed_attention_plain if args.device == "cpu" else relaxed_attention
    results = Results(args, rows=[])
    config = model_config(args.shape)
    for T in args.lengths:
        for name, attend in (("relaxed", relaxed), ("causal", flash)):
            if args.device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            try:
                row = length_row(name, attend, T, config, args)
            except torch.OutOfMemoryError:
                print(f"{T:7} tokens, {name}: no memory", flush=True)
                continue
            show(row)
            results.add("rows", row)


if __name__ == "__main__":
    run_script(main)
