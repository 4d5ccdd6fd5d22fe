"""The retrofit as a script: it learns, survives being killed, and refuses what cannot work."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import small_config

import retrofit
from dms import InputError
from model import Model, load_model, save_model

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ROOT / "toy" / "teacher"


@pytest.fixture(scope="module")
def small_teacher(tmp_path_factory):
    """A random model of a few thousand weights with the toy tokenizer: for how things run, not for what is learned."""
    folder = tmp_path_factory.mktemp("teacher")
    vocabulary = json.loads((TEACHER / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    save_model(Model(small_config(vocab_size=vocabulary)), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TEACHER / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text("\n\n".join(f"The river {i} passes the old stone and boat {i * 7}." for i in range(120)))
    return file


def command(model, data, out, *more):
    return [sys.executable, str(ROOT / "retrofit.py"), "--model", str(model), "--data", str(data), "--out", str(out),
            "--steps", "14", "--batch-size", "2", "--seq-len", "96", "--window", "4", "--save-every", "3",
            "--eval-problems", "2", "--eval-tokens", "5", "--device", "cpu", "--lr", "0.01", *more]


@pytest.mark.parametrize("train", ["adapters", "all"])
def test_killed_and_resumed_is_bit_for_bit_the_same(small_teacher, text_file, tmp_path, train):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = subprocess.run(command(small_teacher, text_file, whole, "--train", train), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for lines in (5, 10):  # kill it twice, each time at some moment after that many steps
        more = ["--resume"] if cut.exists() else []
        process = subprocess.Popen(command(small_teacher, text_file, cut, "--train", train, *more),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        state, deadline = cut / "state.safetensors", time.time() + 120
        while time.time() < deadline and process.poll() is None:
            if state.exists() and retrofit.safe_open(state, "pt").metadata()["step"] >= str(lines - 2):
                break
            time.sleep(0.005)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(command(small_teacher, text_file, cut, "--train", train, "--resume"), capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    weights = "model.safetensors" if train == "all" else "dms_adapters.safetensors"
    assert (whole / weights).read_bytes() == (cut / weights).read_bytes()
    assert (whole / "metrics.jsonl").read_text() == (cut / "metrics.jsonl").read_text()
    assert len((whole / "metrics.jsonl").read_text().splitlines()) == 14
    first, second = (json.loads((out / "results.json").read_text())["results"] for out in (whole, cut))
    assert first == second and set(first) == {"dense", "DMS", "window"}


def test_toy_data_brings_a_checker_and_the_neuron_source_trains(small_teacher, tmp_path, capsys):
    out = tmp_path / "run"
    retrofit.main(command(small_teacher, "toy", out, "--train", "all", "--decision", "neuron", "--steps", "3",
                          "--seq-len", "512")[2:])
    table = capsys.readouterr().out
    assert all(word in table for word in ("needles", "variables", "arithmetic", "compression ratio", "KV reads"))
    model = load_model(out)
    assert model.config.dms.source == "neuron" and model.config.dms.window == 4
    results = json.loads((out / "results.json").read_text())
    assert set(results["results"]["DMS"]["accuracy"]) == {"needles", "variables", "arithmetic"}
    with pytest.raises(InputError, match="already holds something"):
        retrofit.main(command(small_teacher, "toy", out)[2:])
    with pytest.raises(InputError, match="another --lr"):
        retrofit.main(command(small_teacher, "toy", out, "--train", "all", "--decision", "neuron", "--steps", "3",
                              "--seq-len", "512", "--resume", "--lr", "0.5")[2:])
    with pytest.raises(InputError, match="already a DMS checkpoint"):
        retrofit.main(command(out, "toy", tmp_path / "again")[2:])


def test_compression_is_learned():
    """A few steps at a high rate: the fraction let go follows the target, and the KL stays finite."""
    args = retrofit.parse(["--model", str(TEACHER), "--steps", "12", "--lr", "0.01", "--seq-len", "128",
                           "--batch-size", "2", "--train", "adapters", "--data", "toy", "--window", "4"])
    student = load_model(TEACHER)
    retrofit.dms.start_retrofit(student, retrofit.DMSConfig(window=4))
    trained = [p.requires_grad_() for n, p in student.named_parameters() if "dms_proj_alpha" in n]
    optimizer = torch.optim.AdamW(trained, lr=args.lr)
    data = retrofit.make_data(args)
    rows = [retrofit.train_step(student, None, data, optimizer, step, args) for step in range(12)]
    assert rows[0]["cr"] < 1.05 and rows[-1]["cr"] > 1.5 and rows[0]["kl"] < 0.05 and rows[-1]["kl"] < 20


@pytest.mark.parametrize("arguments, message", [
    (["--target-cr", "64"], "impossible"),
    (["--decision", "neuron", "--train", "adapters"], "neuron has no adapters"),
    (["--steps", "0"], "--steps must be at least 1"),
    (["--model", "/no/such"], "no such folder"),
    (["--data", "/no/such.txt"], "not readable"),
    (["--data", "{empty}"], "usable documents"),
    (["--data", "{broken}"], "line 2 is not a JSON object"),
    (["--seq-len", "5000"], "longer than the model's context"),
    (["--resume"], "holds no run"),
])
def test_bad_input_ends_before_any_work(arguments, message, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n  \n\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\nnot json\n')
    arguments = [a.format(empty=tmp_path / "empty.txt", broken=tmp_path / "broken.jsonl") for a in arguments]
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, str(ROOT / "retrofit.py"), "--out", str(out), *arguments],
                          capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not out.exists()
