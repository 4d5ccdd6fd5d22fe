"""What a step takes, by counting, against what it takes; and what is said before a run."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY

import estimate
import retrofit
from checkpoint import InputError
from model import ModelConfig

QWEN3_8B = ModelConfig(
    "qwen3", 151936, 4096, 12288, 36, 32, 8, 128, max_position_embeddings=40960
)
SHAPE = dict(vocab_size=8000, hidden_size=512, intermediate_size=1536, num_hidden_layers=6,
             num_attention_heads=8, num_key_value_heads=4, head_dim=64)  # fmt: skip


def memory(**changes):
    """{measured, estimated, ...} bytes of a step of a mid-size random model on the CPU."""
    command = [sys.executable, str(REPOSITORY / "tests" / "step_memory.py"), json.dumps({**SHAPE, **changes})]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


is_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")


@is_linux
@pytest.mark.parametrize(
    "changes",
    [
        dict(T=4096),
        dict(T=1024, intermediate_size=3072),
        dict(T=4096, vocab_size=50000, num_hidden_layers=3, hidden_size=768),
        dict(T=2048, train="all"),
        dict(T=4096, dtype="bfloat16"),
    ],
)
def test_the_estimate_of_memory_is_within_15_percent(changes):
    found = memory(**changes)
    assert found["estimated"] == pytest.approx(found["measured"], rel=0.15), found


@is_linux
def test_a_step_takes_less_than_a_fifth_of_the_naive_steps_memory():
    """Beyond its weights, at 4,096 tokens. Two layers, as the naive step takes a gigabyte for each."""
    few = dict(T=4096, num_hidden_layers=2)
    ours = memory(**few)
    naive = memory(**few, naive=True)
    weights = ours["weights"] + ours["adapters"]
    assert naive["measured"] - weights > 5 * (ours["measured"] - weights)


def options_for(config, **more):
    settings = dict(steps=1000, batch_size=8, seq_len=8192, train="adapters", dtype="bfloat16",
                    device="cpu")  # fmt: skip
    return retrofit.Options(**{**settings, **more})


def test_qwen3_8b_fits_a_gpu_of_80_gb_at_32k_and_one_of_40_gb_at_8k():
    options = options_for(QWEN3_8B)
    assert sum(estimate.step_memory(QWEN3_8B, options, 8192, 1).values()) < 40e9
    assert sum(estimate.step_memory(QWEN3_8B, options, 32768, 1).values()) < 80e9
    everything = options_for(QWEN3_8B, train="all")
    alone = sum(estimate.step_memory(QWEN3_8B, everything, 8192, 1).values())
    everything.shard = True
    assert alone > 140e9 > 8 * sum(estimate.step_memory(QWEN3_8B, everything, 512, 8).values()) / 8


def test_arithmetic_is_counted_as_for_qwen3_8b():
    """60.6 GFLOP a token in matrix products with the base frozen and blocks recomputed, and 10.9 in
    attention at 8,192 tokens."""
    every, multiplied = estimate.count_parameters(QWEN3_8B)
    assert every == 8_190_735_360
    assert multiplied == pytest.approx(7.57e9, rel=1e-3)
    flops = estimate.step_flops(QWEN3_8B, options_for(QWEN3_8B), 8192)
    assert flops == pytest.approx(60.5e9 + 10.9e9, rel=1e-2)
    short = estimate.step_flops(QWEN3_8B, options_for(QWEN3_8B), 1024)
    assert short == pytest.approx(45.4e9 + 1.4e9, rel=1e-2)


def test_a_step_without_room_is_refused_with_what_would_fit(monkeypatch, capsys):
    monkeypatch.setattr(estimate, "matmul_rate", lambda device, dtype: 1e14)
    monkeypatch.setattr(estimate, "free_memory", lambda device: 26e9)
    with pytest.raises(InputError, match="needs 29.7 GB .* of 26.0; --seq-len 4096 would fit"):
        estimate.check_memory(options_for(QWEN3_8B), QWEN3_8B, 1)
    monkeypatch.setattr(estimate, "free_memory", lambda device: 12e9)
    with pytest.raises(InputError, match="a shorter --seq-len does not help; --shard"):
        estimate.check_memory(options_for(QWEN3_8B), QWEN3_8B, 1)
    monkeypatch.setattr(estimate, "free_memory", lambda device: 80e9)
    estimate.check_memory(options_for(QWEN3_8B), QWEN3_8B, 1)
    estimate.announce(options_for(QWEN3_8B), QWEN3_8B, 1)
    assert "65.5 million tokens, 13.0 hours" in capsys.readouterr().out
    estimate.announce(options_for(QWEN3_8B), QWEN3_8B, 8)
    assert "1.6 hours" in capsys.readouterr().out
    short = dataclasses.replace(QWEN3_8B, max_position_embeddings=4096)
    with pytest.raises(InputError, match="longer than the model's context of 4096"):
        estimate.check_memory(options_for(short), short, 1)


def test_the_rate_of_products_is_measured():
    assert 1e8 < estimate.matmul_rate("cpu", torch.float32) < 1e14
