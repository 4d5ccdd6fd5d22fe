"""
Takes a training step of a random model on the CPU and prints how much its memory grew at most, in
bytes; then what estimate.py says. For tests/test_estimate.py, a process for each:

    MALLOC_MMAP_THRESHOLD_=65536 python tests/step_memory.py '{"T": 4096, "naive": true, ...}'

(With that setting glibc gives memory back at once, so that what the process has is what tensors
need.)
"""
import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import distillation
import dms
import estimate
import retrofit
from distillation import Distillation
from model import Model, ModelConfig


def resident():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024


def be_naive():
    """Whole logits, whole (T, T) scores, nothing computed twice."""

    def attention(q, k, v, bias, first, window):
        i = torch.arange(q.shape[2])
        bias = torch.where(i[:, None] - i > window, bias[:, :, None], 0.0)
        bias = bias.masked_fill(i > i[:, None], float("-inf"))
        group = q.shape[1] // k.shape[1]
        bias, k, v = (x.repeat_interleave(group, 1) for x in (bias, k, v))
        return (q @ k.mT / q.shape[3] ** 0.5 + bias).softmax(-1) @ v

    def loss(student, teacher, student_head, teacher_head, keep, reverse):
        by_token = (x.flatten(0, 1) for x in (student, teacher, keep))
        return dms.slice_kl(*by_token, student_head, teacher_head, reverse)

    distillation.choose_training_attention = lambda device: attention
    distillation.recomputes = lambda seq_len: False
    dms.distillation_loss = loss


def main(shape):
    T = shape.pop("T")
    naive = shape.pop("naive", False)
    options = retrofit.Options(
        seq_len=T, batch_size=1, steps=10, lr=1e-3, train=shape.pop("train", "adapters"),
        recompute=shape.pop("recompute", False), dtype=shape.pop("dtype", "float32"), max_kl=1e9)
    config = ModelConfig("qwen3", **shape, max_position_embeddings=T, tie_word_embeddings=True)
    teacher = Model(config).to(options.torch_dtype).requires_grad_(False)
    trains_all = options.train == "all"
    student = Model(replace(config)).requires_grad_(True) if trains_all else teacher
    dms.start_retrofit(student, dms.DMSConfig(window=64))
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(trains_all or "dms_proj_alpha" in name)
    run = Distillation(student, teacher, options)
    if naive:
        be_naive()
    done = threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.003)

    run.step(0, torch.zeros(1, 100, dtype=torch.int64), [[100]])  # for what libraries take once
    before = resident()
    peak = [before]
    watcher = threading.Thread(target=watch)
    watcher.start()
    run.step(1, torch.randint(0, config.vocab_size, (1, T)), [[T]])
    done.set()
    watcher.join()
    parts = estimate.step_memory(config, options, T, 1)
    kept = [*student.parameters(), *(teacher.parameters() if trains_all else [])]
    kept += [moment for state in run.optimizer.state.values() for moment in state.values()]
    kept = sum(tensor.numel() * tensor.itemsize for tensor in kept)
    print(json.dumps({"measured": peak[0] - before + kept, "estimated": sum(parts.values()), **parts}))


main(json.loads(sys.argv[1]))
