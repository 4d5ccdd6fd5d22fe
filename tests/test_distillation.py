"""The training step: its gradients are the naive ones, however it is cut; any number of processes."""

import json
import math
import os
import random
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, small_model
from test_retrofit import TEACHER, arguments, run, saved_step, text_file  # noqa: F401

import dms
import retrofit
from distillation import Distillation
from dms import DMSConfig
from kernels import choose


def options_for(model, **more):
    settings = dict(steps=10, lr=0.01, batch_size=4, seq_len=40, train="adapters", dtype="float32")
    return retrofit.Options(**{**settings, **more})


def student_of(seed, train="adapters", **settings):
    model = small_model(seed)
    dms.start_retrofit(model, DMSConfig(window=3, **{"scale": 10.0, "offset": 1.0, **settings}))
    for name, parameter in model.named_parameters():
        if "dms_proj_alpha." in name:
            torch.nn.init.normal_(parameter, std=0.1)
        parameter.requires_grad_(train == "all" or "dms_proj_alpha" in name)
    return model


def naive_loss(student, teacher, ids, documents, seeds, weight, reverse):
    """By the formulas, every document by itself: whole logits, whole (T, T) biases in float64."""
    config = student.config
    settings = config.dms
    packing = dms.Packing.of(documents, ids.shape[1], "cpu")
    noise = dms.RelaxedAttention(settings, packing, None, seeds).noise
    nats = 0
    let_go = {}
    for row, lengths in enumerate(documents):
        begin = 0
        for n in lengths:
            here = slice(begin, begin + n)

            def attend(layer, q, k, v, logits):
                of_row = noise(layer, torch.zeros(len(ids), logits.shape[1], ids.shape[1]))[row]
                z = (logits[0] + of_row[:, here]) / settings.tau
                if settings.shift:
                    z = F.pad(z[:, 1:], (0, 1), value=-1e4)
                i = torch.arange(n)
                outside = i[:, None] - i > settings.window
                bias = torch.where(outside, F.logsigmoid(-z)[:, None], 0.0)
                bias = bias.masked_fill(i > i[:, None], -math.inf).repeat_interleave(2, 0)
                k, v = (x[0].repeat_interleave(2, 0).double() for x in (k, v))
                score = q[0].double() @ k.transpose(1, 2) / math.sqrt(q.shape[3]) + bias
                p = torch.sigmoid(z)
                hard = (z > 0).float() + p - p.detach()
                gone = hard[:, : max(n - 1 - settings.window, 0)].sum(1).mean()
                let_go[layer] = let_go.get(layer, 0) + gone
                return (score.softmax(-1) @ v).float()[None]

            some = ids[row : row + 1, here]
            q = student.lm_head(student.hidden(some, attend)).log_softmax(-1)[0, :-1]
            with torch.no_grad():
                causal = dms.document_attention([[n]])
                p = teacher.lm_head(teacher.hidden(some, causal)).log_softmax(-1)[0, :-1]
            p, q = (q, p) if reverse else (p, q)
            nats = nats + (p.exp() * (p - q)).sum()
            begin += n
    tokens = sum(map(sum, documents))
    fraction = sum(let_go.values()) / len(let_go) / tokens
    return nats / (tokens - sum(map(len, documents))) - weight * fraction


@pytest.mark.parametrize("train", ["adapters", "all"])
@pytest.mark.parametrize("case", range(3))
def test_gradients_are_those_of_the_naive_loss(train, case, monkeypatch):
    """However many rows are taken at a time, blocks recomputed or not, the KL in slices."""
    rng = random.Random(case)
    shift = case % 2
    student = student_of(case, train, shift=shift)
    teacher = student if train == "adapters" else small_model(case)
    options = options_for(student, train=train, recompute=case > 0, reverse_kl=case == 2)
    run = Distillation(student, teacher, options)
    ids = torch.randint(0, 67, (4, 40), generator=torch.Generator().manual_seed(case))
    documents = [[40], [rng.randint(10, 30), 7], [5, 1, 30, 4], [33]]
    kl = dms.distillation_loss
    monkeypatch.setattr(dms, "distillation_loss", lambda *given: kl(*given, slice_size=13))
    monkeypatch.setattr("distillation.rows_at_a_time", lambda seq_len: case + 1)
    run.fraction_let_go = 0.0
    run.differentiate(5, ids, documents, cr=4.0)
    found = {name: p.grad.clone() for name, p in run.parameters.items() if p.grad is not None}
    student.zero_grad()
    seeds = [f"0 5 {row}" for row in range(4)]
    naive_loss(student, teacher, ids, documents, seeds, 1.0, options.reverse_kl).backward()
    assert any(gradient.abs().max() > 1e-3 for gradient in found.values())
    for name, gradient in found.items():
        expected = run.parameters[name].grad
        atol = 1e-5 * max(expected.abs().max().item(), 1)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=atol)


def test_the_compression_loss_pulls_only_while_the_step_before_missed_its_target():
    student = student_of(1)
    run = Distillation(student, student, options_for(student))
    ids = torch.randint(0, 67, (4, 40))
    gradients = []
    for let_go in (0.0, 0.74, 0.76):
        run.fraction_let_go = let_go
        student.zero_grad()
        run.differentiate(0, ids, [[40]] * 4, cr=4.0)
        gradients.append(torch.cat([p.grad.flatten() for p in run.parameters.values()]))
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.allclose(gradients[0], gradients[2])
    run.options.compression_weight = 0.0
    student.zero_grad()
    run.fraction_let_go = 0.0
    run.differentiate(0, ids, [[40]] * 4, cr=4.0)
    alone = torch.cat([p.grad.flatten() for p in run.parameters.values()])
    assert torch.equal(alone, gradients[2])


def test_the_attention_is_tritons_on_a_gpu_and_plain_elsewhere():
    gpu = choose.choose_training_attention(torch.device("cuda"))
    assert gpu.__name__ == ("relaxed_attention_plain" if choose.triton is None else "relaxed_attention")
    plain = choose.choose_training_attention(torch.device("cpu"))
    assert plain.__name__ == "relaxed_attention_plain"


# ------------------------------------------------------------------------------- Several processes


def start_processes(count, given):
    """As torchrun starts them, each with one thread, as `run` has with OMP_NUM_THREADS=1."""
    place = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
             "MASTER_PORT": str(random.randrange(20000, 60000))}  # fmt: skip
    command = [sys.executable, str(REPOSITORY / "retrofit.py"), *given]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    every = [{**os.environ, **place, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(count)]
    return [subprocess.Popen(command, env=environment, **pipes) for environment in every]


def run_processes(count, given):
    for process in start_processes(count, given):
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-5000:]


def test_torchrun_starts_them(text_file, tmp_path):  # noqa: F811
    given = arguments(TEACHER, text_file, tmp_path / "out", "--steps", "1")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--master-port", str(random.randrange(20000, 60000))]  # fmt: skip
    done = subprocess.run([*command, str(REPOSITORY / "retrofit.py"), *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count("compression ratio") == 1
    assert len(metrics_in(tmp_path / "out")) == 1


def metrics_in(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_shares_of_two_processes_sum_to_the_whole_to_the_bit(monkeypatch):
    """As a sum of two rows' gradients is the same whoever has made them. (With more rows sums come
    in another order.)"""
    student = student_of(2)
    run = Distillation(student, student, options_for(student, batch_size=2))
    ids = torch.randint(0, 67, (2, 40), generator=torch.Generator().manual_seed(1))
    documents = [[40], [25, 10]]
    monkeypatch.setattr("distillation.rows_at_a_time", lambda seq_len: 1)

    def share(rank, world):
        monkeypatch.setattr("distillation.torchrun_place", lambda: (rank, world))
        student.zero_grad()
        sums = run.differentiate(3, ids, documents, cr=4.0)
        return [sums, *(p.grad.clone() for p in run.parameters.values())]

    whole = share(0, 1)
    for one, other, both in zip(share(0, 2), share(1, 2), whole, strict=True):
        assert torch.equal(one + other, both)
    assert whole[0][1] > 0


@pytest.mark.parametrize("train", ["adapters", "all"])
def test_two_processes_do_what_one_does_and_one_goes_on_where_two_were_killed(
    text_file, tmp_path, train, monkeypatch  # noqa: F811
):
    """Up to the order of sums: by a hundred-thousandth in the first two steps, and by less than two
    hundredths after eight."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    given = ["--train", train, "--steps", "8", "--save-every", "1", "--eval-rows", "1", "--lr", "0.0005"]

    def into(name, *more):
        return arguments(TEACHER, text_file, tmp_path / name, *given, *more)

    def check_is_same(name):
        for ours, theirs in zip(one, metrics_in(tmp_path / name), strict=True):
            drift = 1e-5 if ours["step"] <= 2 else 2e-2
            for key, value in ours.items():
                assert theirs[key] == pytest.approx(value, rel=drift), key

    run(into("one"))
    one = metrics_in(tmp_path / "one")
    assert any(row["grad_norm"] > 0 for row in one) and one[-1]["cr"] > 1
    run_processes(2, into("two"))
    check_is_same("two")

    processes = start_processes(2, into("cut"))
    while saved_step(tmp_path / "cut") < 2 and processes[0].poll() is None:
        time.sleep(0.002)
    for process in processes:
        process.kill()
        process.communicate()
    assert 2 <= saved_step(tmp_path / "cut") < 8
    run(into("cut", "--resume"))
    check_is_same("cut")


@pytest.mark.parametrize("train", ["adapters", "all"])
def test_sharded_weights_give_the_same_up_to_rounding(train, text_file, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    given = ["--train", train, "--steps", "4", "--eval-rows", "1", "--eval-every", "2"]
    run(arguments(TEACHER, text_file, tmp_path / "one", *given))
    run_processes(2, arguments(TEACHER, text_file, tmp_path / "shard", *given, "--shard"))
    both = [metrics_in(tmp_path / name) for name in ("one", "shard")]
    for ours, theirs in zip(*both, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert theirs[key] == pytest.approx(value, rel=2e-3), key
    both = [json.loads((tmp_path / name / "results.json").read_text())["results"]["DMS"]
            for name in ("one", "shard")]
    assert both[1]["kl"] == pytest.approx(both[0]["kl"], rel=0.02)
    assert both[1]["pairs"] == pytest.approx(both[0]["pairs"], rel=0.02)
