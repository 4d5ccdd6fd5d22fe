"""Sampling, stopping, streaming, and the script as a user runs it."""
import io
import json
import os
import random
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import small_model

import generate as script
import model as engine
from dms import DMSConfig, InputError
from kv_cache import KVCache
from model import Sequence, generate, load_tokenizer, sample
from toy import tasks

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments, stdin=None, cwd=ROOT, **environment):
    return subprocess.run([sys.executable, str(ROOT / "generate.py"), *arguments], capture_output=True, text=True,
                          input=stdin, stdin=subprocess.DEVNULL if stdin is None else None, cwd=cwd,
                          env={**os.environ, **{k: str(v) for k, v in environment.items()}})


@pytest.mark.parametrize("settings", [dict(), dict(top_k=4), dict(top_p=0.7), dict(min_p=0.2),
                                      dict(top_k=7, top_p=0.8, min_p=0.1, temperature=0.7)])
def test_sampling_follows_its_textbook_distribution(settings):
    torch.manual_seed(1)
    logits, draws = torch.randn(12) * 1.5, 40000
    p = torch.softmax(logits / settings.get("temperature", 1.0), 0).tolist()
    order = sorted(range(12), key=lambda i: -p[i])
    kept = order[:settings.get("top_k", 12)]
    total, mass, nucleus = sum(p[i] for i in kept), 0.0, []
    for i in kept:
        if mass < settings.get("top_p", 1.0):
            nucleus.append(i)
        mass += p[i] / total
    kept = [i for i in nucleus if p[i] >= settings.get("min_p", 0.0) * p[order[0]]]
    expected = torch.zeros(12)
    for i in kept:
        expected[i] = p[i] / sum(p[j] for j in kept)
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(0))
    drawn = sample(logits.expand(draws, -1), uniform, **{"temperature": 1.0, **settings})
    counts = torch.bincount(drawn, minlength=12).float()
    assert counts[expected == 0].sum() == 0
    inside = expected > 0
    chi2 = ((counts - draws * expected)[inside].square() / (draws * expected)[inside]).sum().item()
    freedom = int(inside.sum()) - 1
    assert chi2 < freedom + 5 * (2 * max(freedom, 1)) ** 0.5  # far beyond the 99.9th percentile


def test_temperature_zero_is_greedy():
    logits = torch.randn(5, 30)
    assert torch.equal(sample(logits, torch.rand(5)), logits.argmax(-1))


def test_the_ends_of_the_unit_interval_draw_possible_tokens():
    logits = torch.tensor([[-1e30, 0.0, 1.0, -1e30]]).expand(2, -1)
    assert sample(logits, torch.tensor([0.0, 1 - 2**-24]), temperature=1.0).tolist() == [1, 2]


def sequences(count, seed=0, longest=60, new=25):
    rng = random.Random(seed)
    return [Sequence([rng.randrange(67) for _ in range(rng.randint(1, longest))], rng.randint(1, new), i)
            for i in range(count)]


def alone(model, sequence, ends=(), **sampling):
    """What a sequence gives by itself, by the whole model on all its tokens, one after another."""
    ids, new = list(sequence.ids), []
    while len(new) < sequence.max_new_tokens and not (new and new[-1] in ends):
        uniform = torch.tensor([Sequence(ids, 1, sequence.seed, new=new).uniform()])
        new.append(int(sample(model(torch.tensor([ids]), last_only=True)[:, -1], uniform, **sampling)))
        ids.append(new[-1])
    return new


@pytest.mark.parametrize("sampling", [{}, dict(temperature=1.3, top_k=20)])
@pytest.mark.parametrize("rows", [1, 3, 12])
def test_sequences_side_by_side_give_what_each_gives_alone(rows, sampling):
    """More sequences than rows: one takes the place of another as it ends."""
    model = small_model(4, DMSConfig(window=3), 0.5)
    some, expected = sequences(12), [alone(model, s, {3, 5, 8}, **sampling) for s in sequences(12)]
    cache = KVCache(model.config, rows, page_size=4)
    drawn = [(s, token) for step in generate(model, cache, some, {3, 5, 8}, sampling) for s, token in step]
    assert [s.new for s in some] == expected and all(s.over and s.error is None for s in some)
    for s in some:
        assert [token for other, token in drawn if other is s] == s.new
    assert cache.stats()["pages"] == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a captured decode step needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("sampling", [{}, dict(temperature=1.3, top_k=20, top_p=0.95, min_p=0.01)])
def test_captured_steps_draw_what_the_cpu_draws(sampling, compiled):
    model = small_model(4, DMSConfig(window=3), 0.5)
    expected = [alone(model, s, {3, 5, 8}, **sampling) for s in sequences(12, new=60)]
    some, cache = sequences(12, new=60), KVCache(model.config, 3, "cuda", page_size=4)
    assert cache.kernels
    if compiled:
        model.compile()
    for _ in generate(model.to("cuda"), cache, some, {3, 5, 8}, sampling):
        pass
    assert [s.new for s in some] == expected


@pytest.mark.parametrize("settings", [None, DMSConfig(window=3), DMSConfig(window=3, source="neuron")])
def test_compiled_blocks_draw_the_same(settings, monkeypatch):
    """Each half of a layer is one graph, made once for all layers, lengths and batches but those of 1."""
    monkeypatch.delattr(engine.Linear, "forward")  # as on a GPU, where it does nothing of its own
    model, graphs = small_model(4, settings, 0.5), []
    expected = [alone(model, s, {3, 5, 8}) for s in sequences(12)]
    torch._dynamo.reset()
    model.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward, fullgraph=True)
    for rows in (1, 3, 12):
        some = sequences(12)
        for _ in generate(model, KVCache(model.config, rows, page_size=4), some, {3, 5, 8}):
            pass
        assert [s.new for s in some] == expected
    assert 4 <= len(graphs) <= 8


def test_a_captured_step_never_outlives_its_tensors(monkeypatch):
    """A graph is simulated: recording leaves everything as it was, replaying finds the tensors that were recorded.
    The table grows, rows are forked and dropped under way."""
    counts = {"recorded": 0, "replayed": 0}

    def tensors(cache):
        return [x for x in vars(cache).values() if isinstance(x, torch.Tensor)]

    class Graph:
        def replay(self):
            counts["replayed"] += 1
            assert [id(x) for x in self.recorded] == [id(x) for x in tensors(self.step.cache)]
            self.step.run()

    class Step(engine.DecodeStep):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.captures, Step.newest = True, self

    @contextmanager
    def record(graph):
        counts["recorded"] += 1
        graph.step, graph.recorded = Step.newest, tensors(Step.newest.cache)
        before = [x.clone() for x in graph.recorded]
        yield
        for x, was in zip(graph.recorded, before):
            x.copy_(was)

    monkeypatch.setattr(engine, "DecodeStep", Step)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    model, many = small_model(4, DMSConfig(window=3), 0.5), sorted(sequences(10, new=60), key=lambda s: len(s.ids))
    many += [Sequence(many[0].ids, 60, i) for i in range(3)]
    expected = [alone(model, s, {3, 5}, temperature=1.0) for s in many]
    for _ in generate(model, KVCache(model.config, 4, page_size=8), many, {3, 5}, dict(temperature=1.0)):
        pass
    assert [s.new for s in many] == expected
    assert counts["replayed"] > 3 * counts["recorded"] > 10


@pytest.mark.parametrize("pages", [48, 60, 100])
def test_when_pages_run_out_the_youngest_is_put_back_and_nothing_is_lost(pages):
    model = small_model(4, DMSConfig(window=3), 0.9)
    some, expected = sequences(10, longest=30, new=40), [alone(model, s) for s in sequences(10, longest=30, new=40)]
    cache, fed = KVCache(model.config, 5, page_size=4, memory=pages * 256), []
    forward = model.forward
    model.forward = lambda ids, **rest: fed.append(ids.shape[1]) or forward(ids, **rest)
    for _ in generate(model, cache, some):
        assert cache.stats()["pages"] <= len(cache.free) == pages
    failed = [s for s in some if s.error]
    assert all("cache is full" in s.error for s in failed)
    assert [s.new for s in some if not s.error] == [e for s, e in zip(some, expected) if not s.error]
    assert len(fed) > len(some) or pages == 100  # some were fed again
    assert (pages == 48) == bool(failed) and cache.stats()["pages"] == 0


def test_chains_fork_one_prompt():
    model = small_model(4, DMSConfig(window=3), 0.5)
    prompt, fed = torch.randint(0, 67, (50,)).tolist(), []
    cache, some = KVCache(model.config, 4, page_size=4), [Sequence(prompt, 12, i) for i in range(4)]
    expected = [alone(model, s, temperature=1.0) for s in some]
    forward = model.forward
    model.forward = lambda ids, **rest: fed.append(ids.shape[1]) or forward(ids, **rest)
    for _ in generate(model, cache, some, sampling=dict(temperature=1.0), release=False):
        pass
    assert fed == [50] and cache.seen.tolist() == [61] * 4
    assert [s.new for s in some] == expected and len({tuple(s.new) for s in some}) > 1
    with pytest.raises(InputError, match="release them"):
        next(generate(model, cache, sequences(5), release=False))


def test_stream_holds_back_half_characters_and_half_stop_strings():
    tokenizer, pieces = load_tokenizer(ROOT / "toy" / "teacher"), []
    ids = tokenizer.encode("naïve ☃ snow STOP never", add_special_tokens=False)
    stream = script.Stream(tokenizer, ["STOP"], show=pieces.append)
    assert any(stream(i) for i in ids)
    assert "".join(pieces) == stream.text == "naïve ☃ snow " and stream.stopped
    assert not any("\ufffd" in p or "S" in p for p in pieces)
    stream = script.Stream(tokenizer, ["STOP"])
    assert not any(stream(i) for i in tokenizer.encode("a ST")) and stream.text == "a "
    stream.finish()
    assert stream.text == "a ST"


@pytest.mark.parametrize("seed", range(5))
def test_stream_reads_what_the_tokenizer_reads_at_once(seed):
    tokenizer, rng, pieces = load_tokenizer(ROOT / "toy" / "teacher"), random.Random(seed), []
    stream = script.Stream(tokenizer, ["QQ never QQ"], show=pieces.append)
    ids = [i for _ in range(60) for i in rng.choice([tokenizer.encode(rng.choice(["☃", "é", " is 7", "QQ", "code"])),
                                                     [rng.randrange(600)]])]
    for token in ids:
        assert not stream(token)
    stream.finish()
    assert "".join(pieces) == stream.text == tokenizer.decode(ids, skip_special_tokens=True)


def test_works_at_once_with_the_shipped_model(tmp_path):
    done = run("--max-new-tokens", "60", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr and "compression" in done.stderr and "1 of 1 right" in done.stderr
    dense = run("--max-new-tokens", "60", "--dense", cwd=tmp_path)
    assert "compression 1.00x" in dense.stderr


def test_same_seed_same_text_and_several_chains(tmp_path):
    arguments = ("-n", "3", "--temperature", "1.5", "--seed", "7", "--max-new-tokens", "20")
    first, second = run(*arguments, cwd=tmp_path), run(*arguments, cwd=tmp_path)
    assert first.stdout == second.stdout and first.stdout.count("\n[") >= 2
    assert run(*arguments[:-3], "8", *arguments[-2:], cwd=tmp_path).stdout != first.stdout


def test_chat_and_show_evictions(tmp_path):
    done = run("--chat", "--temperature", "0", "--max-new-tokens", "30", cwd=tmp_path,
               stdin="The code of ann is 31. Give the codes of ann.\nThe code of tom is 52. Give the codes of tom.\n")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) == 2
    shown = run("--show-evictions", "--max-new-tokens", "60", cwd=tmp_path)
    assert shown.returncode == 0 and "[10]" in shown.stdout and ("[0]" in shown.stdout or "[1]" in shown.stdout)


def test_a_chat_turn_equals_the_whole_conversation_at_once(monkeypatch):
    args = script.parse(["--chat", "--temperature", "0", "--max-new-tokens", "40"])
    session = script.Session(args)
    turns = ["The code of ann is 31. Give the codes of ann.", "The code of tom is 52. Give the codes of tom, ann."]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(turns)))
    fed = []
    model, hidden = session.model, session.model.hidden

    def spy(ids, *rest):
        fed.extend(ids[0].tolist())
        return hidden(ids, *rest)

    model.hidden = spy
    script.chat(session)
    del model.hidden
    expected = KVCache(model.config, 1)
    logits = model(torch.tensor([fed]), cache=expected, last_only=True)
    assert torch.equal(expected.length, session.cache.length)
    again = model(torch.tensor([[5]]), cache=session.cache), model(torch.tensor([[5]]), cache=expected)
    torch.testing.assert_close(*again, atol=1e-4, rtol=1e-4)
    assert logits.shape[1] == 1
    text = session.tokenizer.decode(fed)
    assert text.count("<|im_start|>user") == 2 and text.count("<|im_end|>") == 3


@pytest.mark.parametrize("arguments, message", [
    (["--prompt", ""], "prompt is empty"),
    (["--prompt", "river " * 2000], "context is 1024"),
    (["--model", "/no/such/folder"], "no such folder"),
    (["--max-new-tokens", "0"], "at least 1"),
    (["--chat", "-n", "2"], "--chat reads its turns"),
    (["--top-p", "0"], "--top-p"),
    (["--device", "gpu"], "--device gpu: cannot be used"),
])
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_tokens_outside_the_vocabulary_are_refused():
    model = small_model(0)
    model.check_ids([0, 66])
    for ids, room, message in (([67], 0, "token id 67"), ([-1], 0, "id -1"), ([], 0, "empty"), ([1], 512, "context")):
        with pytest.raises(InputError, match=message):
            model.check_ids(ids, room)


def test_end_tokens_come_from_generation_config(tmp_path):
    settings = json.loads((ROOT / "toy" / "teacher" / "generation_config.json").read_text())
    args = script.parse(["--model", str(ROOT / "toy" / "teacher"), "--prompt", "x"])
    assert set(settings["eos_token_id"]) <= script.Session(args).ends


def write_requests(folder, count, **more):
    rng = random.Random(5)
    made = [tasks.make_problem(rng.choice(tasks.TASKS), rng, "test") for _ in range(count)]
    lines = [{"prompt": p.prompt, "id": f"p{i}", **more} for i, p in enumerate(made)]
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return made


def answers(file):
    return {row["line"]: row for row in map(json.loads, file.read_text().splitlines())}


def test_requests(tmp_path):
    """Side by side, in too little memory, interrupted and continued, and split in two: always the same answers."""
    made = write_requests(tmp_path, 12)
    arguments = ("--requests", str(tmp_path / "in.jsonl"), "--temperature", "0", "--max-new-tokens", "250")
    done = run(*arguments, "--out", str(tmp_path / "out.jsonl"), cwd=tmp_path)
    assert done.returncode == 0 and "tokens/s" in done.stderr, done.stderr
    whole = answers(tmp_path / "out.jsonl")
    assert sorted(whole) == list(range(1, 13)) and all(row["id"] == f"p{line - 1}" for line, row in whole.items())
    right = [tasks.is_correct(p, whole[i]["texts"][0]) for i, p in enumerate(made, 1)]
    assert sum(right) >= 10
    # another batch, and a cache that holds about two of them; the first half of an earlier run is there, cut in a line
    lines = (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "small.jsonl").write_text("".join(lines[:5]) + lines[5][:40])
    done = run(*arguments, "--out", str(tmp_path / "small.jsonl"), "--batch", "5", "--memory", "0.0009", cwd=tmp_path)
    assert done.returncode == 0 and "7/7" in done.stderr, done.stderr
    assert answers(tmp_path / "small.jsonl") == whole
    for rank in range(2):
        done = run(*arguments, "--out", str(tmp_path / "split.jsonl"), cwd=tmp_path, RANK=rank, WORLD_SIZE=2)
        assert done.returncode == 0, done.stderr
    assert {**answers(tmp_path / "split.0-of-2.jsonl"), **answers(tmp_path / "split.1-of-2.jsonl")} == whole


def test_requests_vote_and_report_what_does_not_fit(tmp_path):
    write_requests(tmp_path, 2, max_new_tokens=100)
    arguments = ("--requests", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl"), "-n", "3")
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for row in answers(tmp_path / "out.jsonl").values():
        assert len(row["texts"]) == 3 and 1 <= row["votes"] <= 3 and row["answer"]
        assert sum(script.final_answer(text) == row["answer"] for text in row["texts"]) == row["votes"]
    done = run(*arguments[:3], str(tmp_path / "tiny.jsonl"), "--memory", "0.0001", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all("cache is full" in row["error"] for row in answers(tmp_path / "tiny.jsonl").values())


@pytest.mark.parametrize("lines, message", [
    ('{"text": "x"}\n', "line 1 needs"), ('[1]\n', "line 1 is not a JSON"),
    ('{"prompt": "x", "max_new_tokens": 0}\n', "at least 1"),
    ('{"prompt": "x"}\n{"prompt": "' + "river " * 2000 + '"}\n', "context is 1024"),
])
def test_bad_requests_are_refused_before_any_work(lines, message, tmp_path):
    (tmp_path / "in.jsonl").write_text(lines)
    done = run("--requests", "in.jsonl", "--out", "out.jsonl", cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_an_answer_file_of_other_requests_is_refused(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "out.jsonl").write_text('{"prompt": "y", "line": 1}\n')
    done = run("--requests", "in.jsonl", "--out", "out.jsonl", cwd=tmp_path)
    assert done.returncode == 2 and "answers another request" in done.stderr
    assert (tmp_path / "out.jsonl").read_text() == '{"prompt": "y", "line": 1}\n'


@pytest.mark.parametrize("text, answer", [("so \\boxed{12} and \\boxed{7}.", "7"), ("it is 1,234.5.", "1234.5"),
                                          ("yes\nno\n", "no"), ("", None), ("a -3 b", "-3")])
def test_final_answer(text, answer):
    assert script.final_answer(text) == answer
