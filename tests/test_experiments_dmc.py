"""Merging: what is trained, what is defined, and what the cache holds are one thing."""

import random
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import shared  # noqa: E402
import dmc  # noqa: E402
import stepwise  # noqa: E402

import retrofit  # noqa: E402
from dms import Packing  # noqa: E402
from toy import tasks  # noqa: E402


def make_run(tmp_path, scale):
    """A run whose adapters decide at random, and its texts."""
    given = f"--window 0 --train all --steps 10 --device cpu --seq-len 200 --out {tmp_path}"
    options = retrofit.parse(["--model", str(dmc.TEACHER), *given.split()])
    run = dmc.start(options)
    torch.manual_seed(0)
    run.student.config.dms.offset = 0.0
    for block in run.student.model.layers:
        torch.nn.init.normal_(block.self_attn.dms_proj_alpha.weight, std=scale)
    return run


def test_pairs_are_merged_as_defined():
    """merge() beside the recurrence, one token after another."""
    torch.manual_seed(0)
    B, H, T, D = 2, 3, 40, 4
    k, v = torch.randn(2, B, H, T, D)
    gate = 3 * torch.randn(B, H, T)
    w = torch.rand(B, H, T)
    k2, v2 = dmc.merge(k, v, gate, w)
    a = torch.sigmoid(gate)
    sums = [torch.zeros(B, H, D)] * 2
    z = torch.zeros(B, H)
    for t in range(T):
        z = a[..., t] * z + w[..., t]
        sums = [a[..., t, None] * s + (w[..., t, None] * x[:, :, t]) for s, x in zip(sums, (k, v))]
        for s, merged in zip(sums, (k2, v2)):
            assert torch.allclose(s / z[..., None], merged[:, :, t], atol=1e-5)


def test_the_cache_is_what_is_trained(tmp_path):
    run = make_run(tmp_path, 0.05)
    model = run.student
    torch.manual_seed(1)
    ids = torch.randint(600, (3, 70))
    packing = Packing.of([[70]] * 3, 70, "cpu")
    with torch.inference_mode():
        states, let_go = run.student_states(ids, packing, None)
        cache = dmc.MergingCache(model.config, 3, 70)
        pieces = ids.split([20, *[1] * 50], dim=1)
        starts = [0, *range(20, 70)]
        by_step = [model.hidden(piece, cache, t) for piece, t in zip(pieces, starts)]
    assert torch.allclose(torch.cat(by_step, dim=1), states, atol=1e-4)
    held = 1 - let_go.item() / (3 * 70)
    assert 0.2 < held < 0.8
    assert cache.pairs() == pytest.approx(held * cache.dense_pairs())


def test_before_its_first_step_it_is_the_teacher(tmp_path):
    run = make_run(tmp_path, 0.0)
    run.student.config.dms.offset = 5.0
    ids = torch.randint(600, (2, 50))
    packing = Packing.of([[50]] * 2, 50, "cpu")
    with torch.inference_mode():
        states, let_go = run.student_states(ids, packing, None)
        logits = run.student.lm_head(states)
        assert torch.allclose(logits, run.teacher(ids), atol=1e-4)
    assert let_go.item() == 0


def test_answers_without_merging_are_the_engine_s(tmp_path):
    run = make_run(tmp_path, 0.0)
    run.student.config.dms.offset = 5.0
    model, tokenizer = shared.load(dmc.TEACHER)
    some = [tasks.make_problem(task, random.Random(task), "test", 110) for task in tasks.TASKS]
    theirs, _ = shared.answer(model, tokenizer, some, max_new_tokens=30)
    cache = dmc.MergingCache(run.student.config, len(some), 200)
    ours = stepwise.answer(run.student, tokenizer, some, cache, max_new_tokens=30)
    assert ours == [text for (text,) in theirs]
    assert cache.pairs() == cache.dense_pairs()
