"""The retrofit: its step against the naive one, in one process or several, and the script, which
survives being killed and refuses what cannot work."""
import itertools
import json
import math
import multiprocessing
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as distributed
import torch.nn.functional as F
from conftest import OTHERS, REPOSITORY, small_config, small_model
from filelock import FileLock
from safetensors import safe_open

import dms
import evaluate
import retrofit
from checkpoint import load_model, save_model
from common import InputError, read_json
from data import split_documents
from kv_cache import KVCache
from model import Model
from retrofit import TEACHER, Distillation, Options

FORKS = multiprocessing.get_context("forkserver")  # a process of its own begins with these imports
FORKS.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "retrofit"])


def run_of(seed, train="adapters", shift=1, reverse_kl=False, **sizes):
    """The Distillation of a small random model that evicts about half."""
    settings = dms.DMSConfig(window=3, shift=shift, scale=10.0, offset=1.0, tau=0.5)
    student = dms.start_retrofit(small_model(seed, **sizes), settings)
    for name, parameter in student.named_parameters():
        if "dms_proj_alpha." in name:
            torch.nn.init.normal_(parameter, std=0.1)
        parameter.requires_grad_(train == "all" or "dms_proj_alpha" in name)
    teacher = student if train == "adapters" else small_model(seed)
    return Distillation(student, teacher, Options(steps=10, lr=0.01, reverse_kl=reverse_kl,
                                                  compression_weight=1.0))


def naive_sums(run, step, ids, documents):
    """KL and evicted fraction by the formulas, document by document, with (T, T) scores."""
    student, settings = run.student, run.student.config.dms
    seeds = [f"0 {step} {b}" for b in range(len(ids))]
    noise = dms.RelaxedAttention(settings, None, None, seeds).noise
    nats = evicted = 0
    for b, begin, n in documents:
        i = torch.arange(n)

        def attend(layer, q, k, v, logits):
            nonlocal evicted
            g = noise(layer, torch.zeros(len(ids), logits.shape[1], ids.shape[1]))[b]
            z = (logits[0] + g[:, begin : begin + n]) / settings.tau
            z = F.pad(z[:, 1:], (0, 1), value=-1e4) if settings.shift else z
            p = torch.sigmoid(z)
            hard = (z > 0).float() + p - p.detach()
            evicted = evicted + hard[:, : max(n - 1 - settings.window, 0)].sum(1).mean()
            bias = torch.where(i[:, None] - i > settings.window, F.logsigmoid(-z)[:, None], 0.0)
            bias = bias.masked_fill(i > i[:, None], -math.inf)
            bias, k, v = (x.repeat_interleave(2, 0) for x in (bias, k[0], v[0]))
            return ((q[0] @ k.mT / q.shape[3] ** 0.5 + bias).softmax(-1) @ v)[None]

        text = ids[b : b + 1, begin : begin + n]
        q = student.lm_head(student.hidden(text, attend)).log_softmax(-1)[0, :-1]
        with torch.no_grad():
            p = run.teacher.hidden(text, dms.document_attention(dms.Packing([[n]], n, "cpu")))
            p = run.teacher.lm_head(p).log_softmax(-1)[0, :-1]
        p, q = (q, p) if run.options.reverse_kl else (p, q)
        nats = nats + (p.exp() * (p - q)).sum()
    tokens = sum(n for _, _, n in documents)
    evicted = evicted / len(student.model.layers)
    return torch.stack((nats / (tokens - len(documents)), evicted / tokens))


@pytest.mark.parametrize("train", ["adapters", "all"])
@pytest.mark.parametrize("T, shift, reverse, evicted", [
    (40, 0, False, 0.74), (1400, 1, True, 0.0), (2100, 1, False, 0.76)])
def test_gradients_are_those_of_the_naive_loss(train, T, shift, reverse, evicted, monkeypatch):
    """Sequences one by one or not, halves of blocks recomputed or not, the KL in slices. While the
    step before met its target nothing is pulled. The shares of two processes sum to the whole: to
    the bit where sequences are computed one by one, as sums then come in the same order."""
    run = run_of(T, train, shift, reverse)
    run.evicted_fraction = evicted
    ids = torch.randint(0, 67, (2, T))
    long = min(T - 2, 300)  # several blocks of dms.relaxed_attention
    monkeypatch.setattr(dms, "KL_SLICE", 13 if T == 40 else 1024)

    def share(rank, world):
        monkeypatch.setattr(retrofit, "torchrun_place", lambda: (rank, world))
        run.student.zero_grad()
        sums = run.backward(5, ids, [[long], [5, 1, 23, 7]], cr=4.0)
        return [sums, *(p.grad for p in run.parameters.values() if p.grad is not None)]

    found = share(0, 1)
    for one, other, both in zip(share(0, 2), share(1, 2), found, strict=True):
        torch.testing.assert_close(one + other, both, rtol=1e-4, atol=1e-5)
        assert T < 2048 or torch.equal(one + other, both)
    run.student.zero_grad()
    documents = [(0, 0, long), (1, 0, 5), (1, 5, 1), (1, 6, 23), (1, 29, 7)]
    kl, fraction = sums = naive_sums(run, 5, ids, documents)
    torch.testing.assert_close(found[0], sums.detach(), rtol=1e-4, atol=1e-5)
    (kl - fraction * (evicted < 0.75)).backward()
    expected = [p.grad for p in run.parameters.values() if p.grad is not None]
    assert any(gradient.abs().max() > 1e-3 for gradient in expected)
    for gradient, naive in zip(found[1:], expected, strict=True):
        atol = 1e-5 * max(naive.abs().max().item(), 1)
        torch.testing.assert_close(gradient, naive, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("family", OTHERS)
def test_recomputed_halves_choose_the_same_experts(family):
    """And each expert gets a gradient, chosen or not."""
    model = small_model(1, model_type=family).requires_grad_()
    ids = torch.tensor([[3, 4]])
    found = []
    for recompute in (False, True):
        model.zero_grad()
        states = model.hidden(ids, dms.masked_attention(model.config), recompute=recompute)
        states.square().sum().backward()
        found.append([p.grad for name, p in model.named_parameters()
                      if "lm_head" not in name and "mlp.gate." not in name])
    assert sum(not gradient.any() for gradient in found[0]) >= 6
    torch.testing.assert_close(*found, rtol=0, atol=0)


def peak_memory(function, *given):
    """The bytes that tensors take at most, beyond those that were there before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function(*given)
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in changes))


def test_a_long_sequence_takes_little_memory(monkeypatch):
    """Halves of blocks are computed again, logits exist for a slice; then attention by itself."""
    T = 2100
    run = run_of(0, vocab_size=2000, intermediate_size=1024, num_hidden_layers=3)
    run.attention = lambda q, k, v, bias, *_: q * bias.mean()
    ids = torch.randint(0, 67, (1, T))
    ours = peak_memory(run.backward, 0, ids, [[T]], 4.0)
    hidden = run.student.hidden
    at_once = lambda ids, attend, start, recompute=False: hidden(ids, attend, start)
    for place, name, value in (dms, "KL_SLICE", T), (run.student, "hidden", at_once):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            assert peak_memory(run.backward, 0, ids, [[T]], 4.0) > 1.4 * ours, name
    q, k, v = (torch.randn(1, heads, T, 8, requires_grad=True) for heads in (4, 2, 2))
    inputs = (q, k, v, torch.randn(1, 2, T), torch.zeros(1, T, dtype=torch.int32), 9)
    both_ways = lambda: dms.relaxed_attention(*inputs).sum().backward()
    ours = peak_memory(both_ways)
    monkeypatch.setattr(dms, "computed", lambda function, *given, recompute: function(*given))
    assert peak_memory(both_ways) > 3 * ours


@pytest.fixture(scope="module")
def random_teacher(tmp_path_factory):
    """A few thousand weights and the toy tokenizer: for how things run, not what is learned."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    config = small_config(vocab_size=657, max_position_embeddings=64)
    save_model(Model(config), folder, torch.float32)
    retrofit.copy_tokenizer(TEACHER, folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text("\n\n".join(f"{f'{i} and a river by {i * 7} ' * 20}." for i in range(150)))
    return file


def arguments(model, data, out, more=""):
    return (f"--model {model} --data {data} --out {out} --steps 15 --batch-size 2 --seq-len 64 "
            "--window 4 --save-every 3 --lr 0.01 --eval-sequences 2 --eval-problems 1 --device cpu "
            f"--warm-start 4 {more}").split()


def child(place, rank, function, *given):
    os.environ.update(place, RANK=str(rank))
    torch.set_num_threads(1)
    evaluate.settling_sequences = retrofit.settling_sequences = lambda seq_len: 8  # fewer
    function(*given)


def run(function, *given, count=1, exitcode=0):
    """Call a function in a process of its own, or in `count` of them as torchrun starts them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    place = dict(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    processes = [FORKS.Process(target=child, args=(place, rank, function, *given), daemon=True)
                 for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == exitcode


def killed(name, call, argv):
    """retrofit.main, killed as the function of that name is called for the call-th time."""
    function = pkgutil.resolve_name(name)
    calls = itertools.count(1)
    with mock.patch(name, lambda *given: (
            os.kill(os.getpid(), signal.SIGKILL) if next(calls) == call else function(*given))):
        retrofit.main(argv)


def saved_step(out):
    with safe_open(out / "state.safetensors", "pt") as saved:
        return json.loads(saved.metadata()["notes"])["done"]


def metrics_in(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def results_in(out):
    return read_json(out / "results.json")["results"]


@pytest.mark.parametrize("train", ["adapters --target-cr 1", "adapters --warm-start 3", "all",
                                   "all --decision neuron --warm-start 0"])
def test_killed_and_resumed_is_bit_for_bit_the_same(random_teacher, text, tmp_path, train):
    whole, cut = (tmp_path / name for name in ("whole", "cut"))
    run(retrofit.main, arguments(random_teacher, text, whole, f"--train {train}"))
    argv = arguments(random_teacher, text, cut, f"--train {train}")
    if "3" in train:
        run(killed, "warm_start.needs", 3, argv, exitcode=-signal.SIGKILL)
        argv.append("--resume")
    run(killed, "retrofit.Distillation.backward", 8, argv, exitcode=-signal.SIGKILL)
    assert saved_step(cut) == 6 and len(metrics_in(cut)) == 7
    argv.append("--resume")
    run(killed, "retrofit.save_file", 2, argv, exitcode=-signal.SIGKILL)
    assert saved_step(cut) == 9 and not (cut / "config.json").exists()
    run(retrofit.main, argv)
    weights = "model.safetensors" if "all" in train else "dms_adapters.safetensors"
    for name in (weights, "metrics.jsonl", "config.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
    assert [row["step"] for row in metrics_in(cut)] == list(range(1, 16))
    assert results_in(whole) == results_in(cut) and not list(cut.glob(".*"))
    assert load_model(cut).config.dms.source == ("neuron" if "neuron" in train else "adapter")


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("train", ["adapters", "all"])
def test_a_run_of_each_family(family, train, text, tmp_path):
    """Of all but the router, which stays as it is, or of adapters alone."""
    folder, out = tmp_path / "model", tmp_path / "out"
    torch.manual_seed(0)
    model = Model(small_config(model_type=family, vocab_size=657))
    save_model(model, folder)
    retrofit.copy_tokenizer(TEACHER, folder)
    run(retrofit.main, arguments(folder, text, out, f"--train {train} --steps 4"))
    assert all(0 < found["kl"] < 10 for found in metrics_in(out))
    assert results_in(out)["DMS"]["compression_ratio"] > 4
    found = load_model(out).state_dict()
    changed = " ".join(name for name, weight in model.state_dict().items()
                       if not found[name].equal(weight.bfloat16().float()))
    assert ".mlp.gate." not in changed
    assert (".mlp.experts." in changed) == (train == "all")
    more = "--decision neuron --train all --warm-start 0"
    if "deepseek" in family:
        with pytest.raises(InputError, match="neuron: latent attention"):
            retrofit.main(arguments(folder, text, tmp_path / "neuron", more))


@pytest.mark.parametrize("train", ["adapters --warm-start 0", "all --warm-start 0", "all"])
@pytest.mark.parametrize("shard", ["", "--shard"])
def test_two_processes_do_what_one_does(text, tmp_path, train, shard):
    one, two = (tmp_path / name for name in ("one", "two"))
    more = f"--train {train} --steps 6 --save-every 1 --lr 0.0005"
    run(retrofit.main, arguments(TEACHER, text, one, more))
    argv = arguments(TEACHER, text, two, f"{more} {shard}")
    run(killed, "retrofit.Distillation.step", 5, argv, count=2, exitcode=-signal.SIGKILL)
    assert saved_step(two) == 4
    run(retrofit.main, [*argv, "--resume"], count=2 if shard else 1)
    for ours, theirs in zip(metrics_in(one), metrics_in(two), strict=True):
        bounds = (1e-5, 1e-2) if "0" in train else (2e-4, 0.1)  # a regression's sums come first
        assert theirs == pytest.approx(ours, rel=bounds[ours["step"] > 2])
    assert ours["grad_norm"] > 0 and ours["cr"] > 1
    ours, theirs = (load_model(out).state_dict() for out in (one, two))
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=0.02, atol=2e-3)


def test_torchrun_starts_processes(random_teacher, text, tmp_path):
    argv = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2".split(),
            REPOSITORY / "retrofit.py", *arguments(random_teacher, text, tmp_path, "--steps 1")]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count("compression_ratio") == 1 and len(metrics_in(tmp_path)) == 1


def test_a_model_and_a_text_are_enough(random_teacher, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    retrofit.main(["--model", str(random_teacher), "--data", str(text), "--device", "cpu"])
    assert "compression_ratio" in capsys.readouterr().out
    out = tmp_path / "out" / f"{random_teacher.name}-dms-8x"
    settings = read_json(out / "settings.json")
    assert len(metrics_in(out)) == settings["steps"] == 200
    assert load_model(out).config.dms.window == settings["window"] == 2


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """The folder of a few steps of the toy teacher at a high rate, and its data."""
    out = tmp_path_factory.mktemp("toy") / "out"
    argv = ("--train adapters --warm-start 0 --window 4 --steps 12 --lr 0.01 --seq-len 128 "
            f"--batch-size 2 --eval-sequences 8 --eval-problems 1 --device cpu --out {out}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "settling_sequences", lambda seq_len: 8)  # fewer than usual
        retrofit.main(argv.split())
        yield out, retrofit.make_data(retrofit.parse(argv.split()))


def test_compression_is_learned_and_the_offset_settled_just_above_the_target(toy_run):
    """What is kept is chosen: the KL stays far below that of a window of more memory."""
    out, data = toy_run
    first, *_, last = metrics_in(out)
    assert first["cr"] < 1.05 and first["kl"] < 0.05 and last["target_cr"] == 8 and last["cr"] > 6
    found = results_in(out)["DMS"]
    assert set(found["accuracy"]) == {"needles", "variables", "arithmetic"} and found["reads"] > 0
    window = evaluate.sliding_window(load_model(TEACHER), 16)
    assert found["kl"] < 0.5 * evaluate.kl_on_text(window, load_model(TEACHER), data, 8)[0]
    assert [cr for cr, _ in load_model(out).config.dms.offsets] == [2, 3, 4, 6, 8, 12]
    for target, within in ((6, 0.02), (2, 0.02), (5, 0.05)):  # 5 is between two of them
        model = load_model(out, cr=target)
        cache = KVCache(model.config, 1)
        for ids in split_documents(*data.held_out(8)):
            model.states(ids, cache)
            cache.release([0])
        assert cache.compression_ratio() == pytest.approx(1.03 * target, rel=within)
    with pytest.raises(InputError, match="20x: the model has settled these ratios: .2, 3"):
        load_model(out, cr=20)


def settle_apart(out, data, found):
    """settle_offsets in processes whose numbers differ, as rounding can make them."""
    distributed.init_process_group("gloo")
    model = load_model(out)
    model.config.dms.scale += 10 * distributed.get_rank()
    evaluate.settle_offsets(model, data, ())
    (found / str(model.config.dms.offset)).touch()
    distributed.destroy_process_group()


def test_all_processes_settle_on_one_offset(toy_run, tmp_path):
    run(settle_apart, *toy_run, tmp_path, count=2)
    assert len(list(tmp_path.iterdir())) == 1


def test_defaults_follow_from_device_context_and_width(tmp_path, monkeypatch):
    monkeypatch.setattr(retrofit, "choose_device", lambda options: None)
    for device, context, cr, *expected in (
            ("cuda", 40960, 8, 8192, 256, 200), ("cuda", 2048, 8, 2048, 64, 200),
            ("cpu", 40960, 8, 1024, 32, 200), ("cpu", 40960, 2, 1024, 128, 200)):
        save_model(Model(small_config(max_position_embeddings=context)), tmp_path)
        options = Options(model=str(tmp_path), device=device, target_cr=cr)
        retrofit.complete(options)
        assert [options.seq_len, options.window, options.steps] == expected
        assert options.lr == pytest.approx(0.06 / 32) and options.train == "adapters"
    toy = Options(device="cuda")
    retrofit.complete(toy)
    assert (toy.data, toy.train, toy.window) == ("toy", "all", 16)


def test_a_resumed_run_keeps_its_own_options_and_refuses_others(random_teacher, text, tmp_path):
    given = arguments(random_teacher, text, tmp_path)
    options = retrofit.parse(given)
    (tmp_path / "settings.json").write_text(json.dumps(options.settings()))
    shortly = ["--resume", "--out", str(tmp_path), "--device", "cpu"]
    for argv in (shortly, [*given, "--resume"]):
        assert retrofit.parse(argv).settings() == options.settings()
    for flag in ("--model toy/teacher", "--data toy", "--target-cr 4", "--window 5", "--train all",
                 "--decision neuron", "--shift 1", "--per layer", "--steps 31", "--lr 0.02",
                 "--batch-size 3", "--seq-len 63", "--compression-weight 2", "--reverse-kl",
                 "--seed 1", "--save-every 4", "--dtype bfloat16", "--eval-problems 7"):
        name = flag.split()[0][2:].replace("-", "_")
        with pytest.raises(InputError, match=f"was started with {name} = "):
            retrofit.parse([*shortly, *flag.split()])


@pytest.mark.parametrize("more, message", [
    ("--target-cr 64", "--window 4 is too much of 64"), ("--shard", "needs several processes"),
    ("--decision neuron", "neuron needs --train all"), ("--seq-len 5000", "the context is"),
    ("--model /no/such", "/no/such"), ("--data /no/such.txt", "/no/such.txt"),
    (f"--model {REPOSITORY}/toy/retrofitted", "already a DMS checkpoint"), ("", "holds something"),
    ("--data short.txt", "--window 4 is too much of documents so short"),
    ("--resume", "No such file.*settings.json"),
    ("--save-every 2", "out.lock")])  # as another process writes there
def test_what_cannot_work_ends_before_any_work(
        random_teacher, text, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("Three short words.\n\n" * 99)
    (tmp_path / "out").mkdir()
    if not more:
        (tmp_path / "out" / "a").write_text("kept")
    before = list((tmp_path / "out").iterdir())
    lock = FileLock("out.lock") if message == "out.lock" else nullcontext()
    with lock, pytest.raises((InputError, OSError), match=message):
        retrofit.main(arguments(random_teacher, text, "out", more))
    assert list((tmp_path / "out").iterdir()) == before


def test_a_run_that_diverges_ends_and_keeps_its_state(random_teacher, text, tmp_path, monkeypatch):
    backward = Distillation.backward
    for kl in (math.nan, 11):
        monkeypatch.setattr(Distillation, "backward", lambda self, step, *given: (
            backward(self, step, *given) + (kl if step == 7 else 0)))
        out = tmp_path / str(kl)
        with pytest.raises(InputError, match="step 8 diverged"):
            retrofit.main(arguments(random_teacher, text, out))
        assert saved_step(out) == 6 and len(metrics_in(out)) == 7
        assert not (out / "config.json").exists()


def test_out_of_memory_names_the_sequence_length(
        random_teacher, text, tmp_path, monkeypatch, capsys):
    full = mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory."))
    monkeypatch.setattr(dms, "distillation_loss", full)
    monkeypatch.setattr(sys, "argv", ["", *arguments(random_teacher, text, tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(REPOSITORY / "retrofit.py"), run_name="__main__")
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: take a shorter --seq-len") and "out of memory" in last
