"""The retrofit as a script: it learns, survives being killed, and refuses what cannot work."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import small_config
from safetensors import safe_open

import dms
import retrofit
from checkpoint import InputError, load_model, locked, save_model
from distillation import Distillation, learning_rate, load_pair
from dms import DMSConfig
from kv_cache import KVCache
from model import Model

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ROOT / "toy" / "teacher"


@pytest.fixture(scope="module")
def small_teacher(tmp_path_factory):
    """A random model of a few thousand weights with the toy tokenizer: for how things run, not for
    what is learned."""
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
    lines = [f"The river {i} passes the old stone and boat {i * 7}." for i in range(120)]
    file.write_text("\n\n".join(lines))
    return file


def arguments(teacher, data, out, *more):
    """Of a run of a few small steps, on the CPU."""
    settings = {
        "--model": teacher,
        "--data": data,
        "--out": out,
        "--steps": 30,
        "--batch-size": 2,
        "--seq-len": 96,
        "--window": 4,
        "--save-every": 3,
        "--lr": 0.01,
        "--eval-problems": 2,
        "--eval-tokens": 5,
        "--device": "cpu",
    }
    pairs = [text for pair in settings.items() for text in pair]
    return [str(text) for text in (*pairs, "--pack-across", *more)]  # as the documents are short


def start(given):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "retrofit.py"), *given],
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},  # others may need the processor
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(given):
    process = start(given)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def saved_step(out):
    """How many steps the state in a run's folder has behind it."""
    state = out / "state.safetensors"
    if not state.exists():
        return 0
    with safe_open(state, "pt") as saved:
        return int(saved.metadata()["step"])


def results_in(out):
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("train", ["adapters", "all"])
def test_killed_and_resumed_is_bit_for_bit_the_same(small_teacher, text_file, tmp_path, train):
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    run(arguments(small_teacher, text_file, whole, "--train", train))
    for least_steps in (3, 12):  # killed twice, each time at some moment after that many steps
        more = ["--resume"] if cut.exists() else []
        process = start(arguments(small_teacher, text_file, cut, "--train", train, *more))
        deadline = time.time() + 120
        while saved_step(cut) < least_steps and process.poll() is None and time.time() < deadline:
            time.sleep(0.005)
        process.kill()
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors
        assert least_steps <= saved_step(cut) < 30
        assert not (cut / "config.json").exists()
        with open(cut / "metrics.jsonl", "a") as log:  # what comes after the saved state is void
            log.write('{"step": 99}\n{"st')
    run(arguments(small_teacher, text_file, cut, "--train", train, "--resume"))
    weights = "model.safetensors" if train == "all" else "dms_adapters.safetensors"
    assert (whole / weights).read_bytes() == (cut / weights).read_bytes()
    metrics = (whole / "metrics.jsonl").read_text()
    assert metrics == (cut / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in metrics.splitlines()] == list(range(1, 31))
    results = results_in(whole)["results"]
    assert results == results_in(cut)["results"]
    assert set(results) == {"dense", "DMS", "window"}


def test_toy_data_brings_a_checker_and_the_neuron_source_trains(small_teacher, tmp_path, capsys):
    out = tmp_path / "run"
    more = ["--train", "all", "--decision", "neuron", "--steps", "3", "--seq-len", "512"]
    given = arguments(small_teacher, "toy", out, *more)
    retrofit.main(given)
    table = capsys.readouterr().out
    names = {"needles", "variables", "arithmetic"}
    for word in (*names, "compression ratio", "KV reads"):
        assert word in table
    model = load_model(out)
    assert model.config.dms.source == "neuron"
    assert model.config.dms.window == 4
    assert set(results_in(out)["results"]["DMS"]["accuracy"]) == names
    with pytest.raises(InputError, match="already holds something"):
        retrofit.main(given)
    with pytest.raises(InputError, match="another --lr"):
        retrofit.main([*given, "--resume", "--lr", "0.5"])
    with pytest.raises(InputError, match="already a DMS checkpoint"):
        retrofit.main(arguments(out, "toy", tmp_path / "again"))

    weights = (out / "model.safetensors").read_bytes()
    retrofit.main([*given, "--resume", "--eval-problems", "3"])  # measures once more
    assert results_in(out)["settings"]["eval_problems"] == 3
    assert (out / "model.safetensors").read_bytes() == weights


def test_with_a_model_and_no_other_argument_it_runs_to_its_table(tmp_path):
    """On verified solutions of the hub's default dataset, here from the hub's cache without network;
    sizes follow the model's context."""
    rows = []
    for i in range(300):
        solutions = [f"<think>{f'{i} and ' * 80}</think>It is {2 * i}.", "wrong"]
        flags = [i % 3 > 0, False]
        rows.append({"problem": f"What is {i} + {i}?", "generations": solutions,
                     "correctness_math_verify": flags, "messages": None})  # fmt: skip
    commit = "0123456789" * 4
    dataset = tmp_path / "cache" / "datasets--open-r1--OpenR1-Math-220k"
    (dataset / "refs").mkdir(parents=True)
    (dataset / "refs" / "main").write_text(commit)
    (dataset / "snapshots" / commit / "data").mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    for i in range(2):
        file = dataset / "snapshots" / commit / "data" / f"train-0000{i}-of-00002.parquet"
        pyarrow.parquet.write_table(table.slice(150 * i, 150), file, row_group_size=40)
    torch.manual_seed(0)
    vocabulary = json.loads((TEACHER / "config.json").read_text())["vocab_size"]
    save_model(Model(small_config(vocab_size=vocabulary, max_position_embeddings=256)), tmp_path / "tiny")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "tiny" / name).write_bytes((TEACHER / name).read_bytes())

    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "retrofit.py"), "--model", "tiny"],
        cwd=tmp_path, env=environment, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "compression ratio" in done.stdout
    assert "memory" in done.stdout and "million tokens" in done.stdout
    out = tmp_path / "out" / "tiny-dms-8x"
    settings = json.loads((out / "settings.json").read_text())
    assert settings["data"] == "open-r1/OpenR1-Math-220k" and settings["data_revision"] == commit
    assert settings["seq_len"] == 256 and settings["window"] == 16
    assert settings["lr"] == pytest.approx(0.12 / 32)
    assert load_model(out).config.dms.window == 16
    assert len((out / "metrics.jsonl").read_text().splitlines()) == settings["steps"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_text_gets_by_default_follows_from_device_context_and_width(tmp_path):
    sizes = dict(vocab_size=64, hidden_size=64)
    expected = {
        ("cuda", 40960, "8"): dict(seq_len=8192, window=512, batch_size=8, steps=1000),
        ("cuda", 2048, "8"): dict(seq_len=2048, window=128, batch_size=8, steps=1000),
        ("cuda", 40960, "4"): dict(seq_len=8192, window=512, batch_size=8, steps=1000),
        ("cpu", 40960, "8"): dict(seq_len=1024, window=64, batch_size=4, steps=300),
        ("cpu", 40960, "2"): dict(seq_len=1024, window=256, batch_size=4, steps=300),
    }
    for (device, context, cr), values in expected.items():
        folder = tmp_path / str(context)
        save_model(Model(small_config(**sizes, max_position_embeddings=context)), folder)
        options = retrofit.Options(model=str(folder), device=device, target_cr=float(cr))
        found = retrofit.text_defaults(options)
        assert values.items() <= found.items(), (device, context, cr)
        assert found["lr"] == pytest.approx(0.12 / 64)


def test_held_out_text_is_measured_on_the_way(small_teacher, text_file, tmp_path):
    given = ["--steps", "4", "--eval-every", "2", "--eval-rows", "2"]
    retrofit.main(arguments(small_teacher, text_file, tmp_path / "out", *given))
    rows = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    measured = ["held_out_kl" in json.loads(row) for row in rows]
    assert measured == [False, True, False, True]
    assert json.loads(rows[1])["held_out_cr"] >= 1


def test_a_neuron_is_faded_out_before_it_decides(tmp_path):
    """The target is asked for only afterwards; killed in between, the run goes on the same."""
    given = ["--train", "all", "--decision", "neuron", "--fade-steps", "4", "--steps", "4"]
    given += ["--lr", "0.001", "--eval-problems", "1"]
    for name, more in (("whole", []), ("cut", ["--save-every", "1"])):
        out = tmp_path / name
        process = start(arguments(TEACHER, "toy", out, *given, *more))
        while name == "cut" and saved_step(out) < 4 and process.poll() is None:
            time.sleep(0.005)
        if name == "cut":
            process.kill()
        process.communicate()
    assert 4 <= saved_step(tmp_path / "cut") < 8
    run(arguments(TEACHER, "toy", tmp_path / "cut", *given, "--save-every", "1", "--resume"))
    whole, cut = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut"))
    assert whole == cut
    rows = [json.loads(row) for row in whole.splitlines()]
    assert [row["target_cr"] for row in rows[:4]] == [1] * 4
    assert [row["cr"] for row in rows[:4]] == [1] * 4
    assert rows[4]["target_cr"] > 1 and rows[0]["kl"] < 1e-5 < rows[1]["kl"]
    model = load_model(tmp_path / "whole")
    assert model.config.dms.source == "neuron"


def started_run(small_teacher, text_file, folder):
    """The options of a run that has been started in a folder, without its steps."""
    options = retrofit.parse(arguments(small_teacher, text_file, folder))
    (folder / "settings.json").write_text(json.dumps(options.settings()))
    return options


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--model", "toy/teacher"),
        ("--data", "toy"),
        ("--target-cr", "4"),
        ("--window", "5"),
        ("--train", "all"),
        ("--decision", "neuron"),
        ("--shift", "0"),
        ("--per", "layer"),
        ("--steps", "31"),
        ("--lr", "0.02"),
        ("--batch-size", "3"),
        ("--seq-len", "97"),
        ("--compression-weight", "2"),
        ("--reverse-kl", None),
        ("--recompute", None),
        ("--seed", "1"),
        ("--save-every", "4"),
        ("--dtype", "bfloat16"),
    ],
)
def test_a_resumed_run_refuses_options_that_differ(small_teacher, text_file, tmp_path, flag, value):
    started_run(small_teacher, text_file, tmp_path)
    given = [flag] if value is None else [flag, value]
    with pytest.raises(InputError, match=f"another {flag} "):
        retrofit.parse(["--resume", "--out", str(tmp_path), "--device", "cpu", *given])


def test_a_resumed_run_goes_on_with_its_own_options(small_teacher, text_file, tmp_path):
    """Whether they are given again or not. What is measured afterwards may change."""
    options = started_run(small_teacher, text_file, tmp_path)
    shortly = ["--resume", "--out", str(tmp_path), "--device", "cpu"]
    again = [*arguments(small_teacher, text_file, tmp_path), "--resume"]
    for given in (shortly, again):
        resumed = retrofit.parse(given)
        assert resumed.resume
        assert resumed.settings() == options.settings()
        changes = ["--eval-problems", "7", "--eval-batch", "3", "--eval-tokens", "9"]
        resumed = retrofit.parse([*given, *changes])
        changed = dict(eval_problems=7, eval_batch=3, eval_tokens=9)
        assert resumed.settings() == {**options.settings(), **changed}


def test_the_learning_rate_rises_stays_and_falls():
    """Over 20 steps from 0, and over the last 40 % to 0."""
    rates = [learning_rate(step, 1000, 0.5) for step in range(1001)]
    assert rates[:20] == pytest.approx([0.5 * n / 20 for n in range(1, 21)])
    assert rates[20:601] == pytest.approx([0.5] * 581)
    assert rates[600:] == pytest.approx([0.5 * n / 400 for n in range(400, -1, -1)])
    # in a run of a few steps the two meet below the peak
    short = [learning_rate(step, 10, 0.5) for step in range(11)]
    rising = [0.5 * n / 20 for n in range(1, 10)]
    assert short == pytest.approx([*rising, 0.5 / 4, 0])


@torch.no_grad()
def kl_of_a_window(window, ids, documents):
    """To the teacher, of the teacher that evicts everything outside a window."""
    teacher = load_model(TEACHER)
    blind = dms.start_retrofit(load_model(TEACHER), DMSConfig(window=window, offset=-1.0))
    predicts = dms.Packing.of(documents, ids.shape[1], "cpu").predicts()
    states = (blind.states(ids), teacher.states(ids))
    heads = (blind.lm_head.weight, teacher.lm_head.weight)
    return dms.distillation_loss(*states, *heads, predicts).item() / predicts.sum().item()


def test_compression_is_learned():
    """A few steps at a high rate: what is let go follows the target, and what is kept is chosen, so
    that the KL stays far below that of a window of the same memory. Then the offset is settled:
    hard decisions let go of what was asked for."""
    given = {
        "--model": TEACHER,
        "--data": "toy",
        "--train": "adapters",
        "--window": 4,
        "--steps": 12,
        "--lr": 0.01,
        "--seq-len": 128,
        "--batch-size": 2,
        "--device": "cpu",
    }
    options = retrofit.parse([str(text) for pair in given.items() for text in pair])
    data = retrofit.make_data(options)
    run = Distillation(*load_pair(options), options)
    rows = []
    for step, (ids, documents, _) in zip(range(12), data.batches(0)):
        rows.append(run.step(step, ids, documents))
        assert run.optimizer.param_groups[0]["lr"] == learning_rate(step, 12, 0.01)
    first = rows[0]
    last = rows[-1]
    assert first["cr"] < 1.05
    assert first["kl"] < 0.05
    assert last["target_cr"] == 8
    assert last["cr"] > 6
    as_much = round(sum(map(sum, documents)) / len(documents) / last["cr"])
    assert as_much > 4
    assert last["kl"] < 0.5 * kl_of_a_window(as_much, ids, documents)
    assert last["kl"] < 0.25 * kl_of_a_window(4, ids, documents)

    for target in (4, 6, 2):  # from more and from less than that
        options.target_cr = target
        run.student.config.dms.offset = 5.0
        ratio = run.settle_offset(data)
        assert target <= ratio < 1.05 * target, target
        cache = KVCache(run.student.config, 1)
        for row, [n] in list(zip(*data.held_out(64)))[32:]:
            run.student(row[None, :n], cache=cache)
            cache.release([0])
        assert cache.compression_ratio() == pytest.approx(ratio, rel=2e-2)


def target(cr, window, length, teacher, out):
    """Check the options of a run with such a target."""
    sizes = ["--target-cr", str(cr), "--window", str(window), "--seq-len", str(length)]
    retrofit.check(retrofit.parse(arguments(teacher, "toy", out, *sizes)))


def test_impossible_targets_are_refused(small_teacher, tmp_path):
    target(8, 16, 512, small_teacher, tmp_path)
    target(8, 63, 512, small_teacher, tmp_path)
    target(1, 16, 512, small_teacher, tmp_path)
    with pytest.raises(InputError, match="window alone holds 65"):
        target(8, 64, 512, small_teacher, tmp_path)
    for cr in ("0.5", "nan"):
        with pytest.raises(InputError, match=f"target_cr = {cr} is not"):
            target(cr, 16, 512, small_teacher, tmp_path)


def rows_of(file, *rows):
    """A .jsonl file of these rows, and of some that are sound."""
    sound = [{"text": f"The river {i} passes the old stone."} for i in range(120)]
    file.write_text("".join(json.dumps(row) + "\n" for row in (*rows, *sound)))
    return file


def test_documents_too_short_for_the_target_are_refused_before_training(text_file, tmp_path):
    given = arguments(TEACHER, text_file, tmp_path / "out", "--window", "6")
    given.remove("--pack-across")
    with pytest.raises(InputError, match="so short that the window alone holds 1 / [23].[0-9] of them"):
        retrofit.main(given)
    assert not (tmp_path / "out").exists()


def test_rows_that_cannot_be_used_are_skipped_and_named(small_teacher, tmp_path, capsys):
    """Wherever they are: among those that are held out, too (line 2)."""
    unknown = "\ud800"  # half a character
    bad = [{"text": 5}, {"messages": [{"role": "user", "content": None}]}, {"messages": ["x"]}]
    bad += [{"text": unknown}, {"messages": [{"role": "user", "content": unknown}]}]
    data = rows_of(tmp_path / "rows.jsonl", *bad)
    out = tmp_path / "out"
    retrofit.main(arguments(small_teacher, data, out, "--steps", "6"))
    said = capsys.readouterr().err
    for line in range(1, 6):
        assert said.count(f"rows.jsonl: line {line} is skipped") <= 2  # training, then measuring
    assert "line 2 is skipped" in said
    assert results_in(out)["results"]["DMS"]["kl"] >= 0


def test_data_without_a_usable_row_to_hold_out_ends_before_training(small_teacher, tmp_path):
    data = rows_of(tmp_path / "rows.jsonl", {"text": "a"}, {"text": 5})
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:40]))
    with pytest.raises(InputError, match="gives no tokens"):
        retrofit.main(arguments(small_teacher, data, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_tokens_that_the_model_lacks_are_found_before_training(tmp_path):
    torch.manual_seed(0)
    model = Model(small_config(vocab_size=100))  # the tokenizer has more
    save_model(model, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((TEACHER / name).read_bytes())
    data = rows_of(tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match="gives no tokens"):
        retrofit.main(arguments(tmp_path / "model", data, tmp_path / "out"))
    with pytest.raises(InputError, match="the model has no token"):
        retrofit.main(arguments(tmp_path / "model", "toy", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kl", [math.nan, 11])
def test_a_run_that_diverges_ends_and_keeps_its_state(
    small_teacher, text_file, tmp_path, monkeypatch, kl
):
    differentiate = Distillation.differentiate

    def diverge(self, step, *given):
        return differentiate(self, step, *given) + (kl if step == 7 else 0)

    monkeypatch.setattr(Distillation, "differentiate", diverge)
    with pytest.raises(InputError, match="step 8 diverged"):
        retrofit.main(arguments(small_teacher, text_file, tmp_path / "out"))
    assert saved_step(tmp_path / "out") == 6
    assert not (tmp_path / "out" / "config.json").exists()
    rows = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 7


def test_two_runs_do_not_share_a_folder(small_teacher, text_file, tmp_path):
    given = arguments(small_teacher, text_file, tmp_path / "out")
    with locked(tmp_path / "out"):
        with pytest.raises(InputError, match="another process writes there"):
            retrofit.main(given)
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_from_another_folder(small_teacher, text_file, tmp_path, monkeypatch, capsys):
    """With the model and the data that it was started with, though these were relative paths."""
    monkeypatch.chdir(small_teacher)
    given = arguments(".", os.path.relpath(text_file), tmp_path / "out", "--steps", "4")
    monkeypatch.setattr(retrofit, "evaluate", lambda *_: None)
    retrofit.main(given)
    (tmp_path / "out" / "config.json").unlink()  # as if it was stopped just before its end
    monkeypatch.chdir(tmp_path)
    retrofit.main(["--resume", "--out", "out", "--device", "cpu"])
    assert (tmp_path / "out" / "config.json").exists()
    assert "goes on after step 4, on 1 threads" in capsys.readouterr().out


def test_a_full_disk_says_so_and_loses_nothing(small_teacher, text_file, tmp_path):
    """The limit is on the size of files: a state does not fit, then it does."""
    whole = tmp_path / "whole"
    out = tmp_path / "out"
    given = ["--train", "all", "--steps", "6"]
    run(arguments(small_teacher, text_file, whole, *given))
    size = (whole / "state.safetensors").stat().st_size
    command = [sys.executable, str(ROOT / "retrofit.py")]
    command += arguments(small_teacher, text_file, out, *given)
    limited = ["bash", "-c", f'ulimit -f {size // 2048}; exec "$@"', "bash", *command]
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "state.safetensors: not written" in last
    left = {file.name for file in out.iterdir()}
    assert "settings.json" in left and not any(name.endswith(".tmp") for name in left)
    (out / ".state.safetensors.tmp").write_bytes(b"left by a writer that was killed")
    run(arguments(small_teacher, text_file, out, *given, "--resume"))
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not list(out.glob(".*"))


def test_an_out_that_cannot_be_made_ends_before_any_training(small_teacher, text_file, tmp_path):
    (tmp_path / "file").write_text("")
    process = start(arguments(small_teacher, text_file, tmp_path / "file" / "out"))
    _, errors = process.communicate()
    assert process.returncode == 2
    assert errors.startswith("error: ") and errors.count("\n") == 1


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("settings.json", b"{", "settings.json: not found or not"),
        ("settings.json", b'{"dtype": "int8"}', "dtype = 'int8' is no such"),
        ("settings.json", b'{"steps": "many"}', "steps = 'many'"),
        ("settings.json", b'{"colour": 1}', "colour = 1 is no such"),
        ("settings.json", b'{"lr": Infinity}', "lr = inf"),
        ("metrics.jsonl", b"\xff\n", "metrics.jsonl: not readable"),
        ("state.safetensors", b"{", "state.safetensors: does not belong"),
    ],
)
def test_a_garbled_file_of_a_run_is_named_and_kept(
    small_teacher, text_file, tmp_path, name, content, message, monkeypatch
):
    out = tmp_path / "out"
    monkeypatch.setattr(retrofit, "evaluate", lambda *_: None)
    retrofit.main(arguments(small_teacher, text_file, out, "--steps", "4"))
    (out / "config.json").unlink()
    (out / name).write_bytes(content)
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.name != "settings.json"}
    with pytest.raises(InputError, match=message):
        retrofit.main(["--resume", "--out", str(out), "--device", "cpu"])
    assert (out / name).read_bytes() == content
    assert all((out / name).read_bytes() == was for name, was in before.items())


@pytest.mark.parametrize(
    "given, message",
    [
        (["--target-cr", "64"], "impossible"),
        (["--decision", "neuron", "--train", "adapters"], "neuron has no adapters"),
        (["--steps", "0"], "steps = 0 is not"),
        (["--model", "/no/such"], "no such folder"),
        (["--data", "/no/such.txt"], "not readable"),
        (["--data", "{empty}"], "usable documents"),
        (["--data", "{broken}"], "line 2 is not a JSON object"),
        (["--seq-len", "5000"], "longer than the model's context"),
        (["--batch-size", "10000000"], "batch_size = 10000000 is not"),
        (["--fade-steps", "10"], "--fade-steps is for --decision neuron"),
        (["--shard"], "--shard needs several processes"),
        (["--data", "no/such"], "neither from the hub"),
        (["--data", "/no/such"], "not found, not readable"),
        (["--lr", "inf"], "lr = inf"),
        (["--lr", "1e300"], "lr = 1e+300"),
        (["--seed", "18446744073709551616"], "seed = 1844"),
        (["--compression-weight", "nan"], "compression_weight = nan"),
        (["--resume"], "holds no run"),
    ],
)
def test_bad_input_ends_before_any_work(given, message, tmp_path):
    empty = tmp_path / "empty.txt"
    broken = tmp_path / "broken.jsonl"
    empty.write_text("\n\n  \n\n")
    broken.write_text('{"text": "a"}\nnot json\n')
    out = tmp_path / "out"
    given = [text.format(empty=empty, broken=broken) for text in given]
    process = start(["--out", str(out), *given])
    _, errors = process.communicate()
    assert process.returncode == 2 and message in errors, errors
    assert errors.count("\n") == 1
    assert not out.exists()
