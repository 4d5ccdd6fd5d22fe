"""
What a step of the retrofit takes, by counting: how it is cut, its memory and its arithmetic.

Memory is counted from the shapes, for one GPU or process; tests/test_estimate.py holds it against
what steps really take on a CPU.
"""
import time
from dataclasses import replace

import torch

from checkpoint import InputError, require
from dms import KL_SLICE
from kernels.pages import free_memory
from kernels.training_attention import KEEPS_SCORES
from model import Model

# measured
DECISION_NUMBERS = 22  # float32, of a token and KV head: logits, noise, decisions, their gradients
LOGIT_BYTES = {4: 22, 2: 28}  # of a token and word, in the KL, by the itemsize of the weights


def rows_at_a_time(seq_len):
    """How many of a step's sequences are taken through the model side by side."""
    return max(4096 // seq_len, 1)


def recomputes(seq_len):
    """Are blocks computed again in backward? Short sequences have the memory to do without."""
    return seq_len > 2048


def count_parameters(config):
    """(all parameters, those in matrix products with every token), of the dense model."""
    with torch.device("meta"):
        model = Model(replace(config, dms=None))
    every = sum(parameter.numel() for parameter in model.parameters())
    table = model.lm_head.weight.numel()  # the embedding is looked up, not multiplied
    return every, every if config.tie_word_embeddings else every - table


def step_memory(config, options, seq_len, world):
    """Bytes on each GPU at the most, {what for: bytes}."""
    trains_all = options.train == "all"
    every, _ = count_parameters(config)
    frozen = options.torch_dtype.itemsize
    itemsize = 4 if trains_all else frozen  # of the student's numbers
    weights = every * (frozen + 16 * trains_all)  # 16: weight, gradient and AdamW's two moments
    per_layer = config.hidden_size * (config.num_key_value_heads + 1)  # projection and norm
    adapters = config.num_hidden_layers * per_layer

    rows = min(rows_at_a_time(seq_len), max(options.batch_size // world, 1))
    tokens = rows * seq_len
    C = config.hidden_size
    inner = config.intermediate_size
    q_and_y = 2 * config.num_attention_heads * config.head_dim
    k_and_v = 2 * config.num_key_value_heads * config.head_dim
    # a token's input of a layer, q, k, v and y; and what decisions are made of
    kept = (C + q_and_y + k_and_v) * itemsize + 4 * DECISION_NUMBERS * config.num_key_value_heads
    # the MLP of one block, computed again, and its gradients: measured
    inside = (6 * inner + 4 * C) * itemsize
    if not (options.recompute or recomputes(seq_len)):
        # what products and norms keep, more of it if weights are trained: measured
        kept += (3 + trains_all) * (inner + C) * itemsize
        inside = 2 * inner * itemsize
    if options.device == "cpu" and seq_len <= KEEPS_SCORES:  # a query's scores: half the keys
        kept += 4 * config.num_attention_heads * (seq_len + 128) / 2
    logits = LOGIT_BYTES[itemsize] * min(KL_SLICE, tokens) * config.vocab_size
    logits += trains_all * 2 * 4 * config.vocab_size * C  # the head's gradient: of a slice, of all
    return {"weights": weights / (world if options.shard else 1),
            "adapters": 16 * adapters,
            "kept for backward": config.num_hidden_layers * tokens * kept,
            "at work": max(tokens * inside, logits) + 4 * tokens * C * itemsize}


def step_flops(config, options, seq_len):
    """Floating-point operations a token, on average over a sequence of one document: a pass of the
    teacher, one of the student, one again if blocks are recomputed, and backward, which is one more
    for activations, and another for weights that are trained. Attention: 1 + 1 + 2.5 forwards."""
    _, multiplied = count_parameters(config)
    passes = 3 + (options.recompute or recomputes(seq_len)) + (options.train == "all")
    heads = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 2 * passes * multiplied + 4.5 * 2 * seq_len * heads


def matmul_rate(device, dtype):
    """Operations a second of large matrix products, measured for a moment."""
    n = 1024 if device == "cpu" else 8192
    x = torch.randn(n, n, device=device, dtype=dtype)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        (x @ x)[0, 0].item()  # waits for the GPU
        seconds.append(time.perf_counter() - begin)
    return 2 * n**3 / min(seconds)


def check_memory(options, config, world):
    """Refuse sequences that the model has no positions for, and steps that have no room."""
    context = config.max_position_embeddings
    require(options.seq_len <= context,
            f"--seq-len is longer than the model's context of {context}; shorten it")
    free = free_memory(torch.device(options.device))
    parts = step_memory(config, options, options.seq_len, world)
    need = sum(parts.values())
    if need <= free:
        return
    shorter = [options.seq_len >> n for n in range(1, 12) if options.seq_len >> n > 1]
    fitting = [n for n in shorter if sum(step_memory(config, options, n, world).values()) <= free]
    advice = f"--seq-len {fitting[0]} would fit" if fitting else "a shorter --seq-len does not help"
    raise InputError(f"a step needs {need / 1e9:.1f} GB ({listed(parts)}) of {free / 1e9:.1f}; "
                     f"{advice}; --shard over several GPUs needs less")


def listed(parts):
    return ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())


def announce(options, config, world):
    """Print what a run will take."""
    parts = step_memory(config, options, options.seq_len, world)
    tokens = (options.fade_steps + options.steps) * options.batch_size * options.seq_len
    rate = matmul_rate(options.device, options.torch_dtype) * world
    hours = tokens * step_flops(config, options, options.seq_len) / rate / 3600
    print(f"memory {sum(parts.values()) / 1e9:.1f} GB ({listed(parts)}); {tokens / 1e6:,.1f} million "
          f"tokens, {hours:.1f} hours of matrix products: expect two to three times that")
