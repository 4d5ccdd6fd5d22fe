"""Sampling, continuous batching, text out of tokens, the script as a user runs it, its pictures."""
import gc
import html
import io
import itertools
import json
import math
import random
import re
import sys
import weakref
from contextlib import contextmanager
from unittest import mock

import pytest
import tokenizers
import torch
from conftest import DEVICE, SLOT, close, small_config, small_model
from tokenizers import decoders, models, normalizers

import generate as script
import show
from checkpoint import load_tokenizer, save_model
from dms import DMSConfig
from generate import Sampling, Sequence, Stream, generate, next_tokens, sample
from kv_cache import PLAIN, KVCache, held
from model import Model, ModelConfig
from toy import tasks

TEACHER = script.SHIPPED.parent / "teacher"
MIXED = [Sampling(), Sampling(1.3, top_k=20), Sampling(0.8, repetition_penalty=1.5, top_p=0.9),
         Sampling(repetition_penalty=1.3)]
TEMPLATE = ("{% if refuse is defined %}{{ raise_exception('no ' + refuse) }}{% endif %}"
            "{% for m in messages %}{{ m.content or m.tool_calls[0].name }};{% endfor %}"
            "{{ tools[0].function.name if tools else 'w' }}{{ 'k' if enable_thinking else '' }}")
ANSWER = '{"generated": {"line": 1, "texts": ["y"]}, "prompt": "x"}\n'  # a line of an answer file


@pytest.mark.parametrize("settings", [
    dict(), dict(top_k=4), dict(top_p=0.7), dict(min_p=0.2), dict(top_p=0.0),
    dict(top_k=7.0, top_p=0.8, min_p=0.1, temperature=0.7)])
def test_sampling_follows_its_textbook_distribution(settings):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 1.5
    p = torch.softmax(logits / settings.get("temperature", 1.0), 0).tolist()
    kept = sorted(range(12), key=lambda i: -p[i])[: int(settings.get("top_k", 12))]
    nucleus = settings.get("top_p", 1.0) * sum(p[i] for i in kept)
    kept = [i for n, i in enumerate(kept) if n == 0 or sum(p[j] for j in kept[:n]) < nucleus]
    kept = [i for i in kept if p[i] >= settings.get("min_p", 0.0) * max(p)]
    expected = torch.zeros(12)
    expected[kept] = torch.tensor([p[i] / sum(p[j] for j in kept) for i in kept])
    uniform = (torch.arange(40000) / 40000).clamp(max=1 - 2**-24)
    tokens = sample(logits.expand(40000, -1), uniform, Sampling(**{"temperature": 1.0, **settings}))
    assert ((torch.bincount(tokens, minlength=12) / 40000 - expected).abs() < 1e-4).all()


def test_a_penalty_lowers_what_was_said_and_nonsense_stops_nobody():
    """A penalty divides a positive logit, and multiplies a negative one, as in transformers."""
    logits = torch.tensor([2.0, 1.5, -1.0, 0.1])
    said = Sequence([0, 0, 2], 1, sampling=Sampling(1e-300, repetition_penalty=4.0))
    other = Sequence([0, 0, 2], 1)
    assert script.penalized(logits, said).tolist() == [0.5, 1.5, -4.0, logits[3].item()]
    assert next_tokens([said, other], logits.expand(2, 4)) == {said: 1, other: 0}
    for nonsense in ((1.0, 0, 1.0, 2.0), (math.nan,), (1.0, -1, -1.0)):
        sample(logits[None], torch.rand(1), Sampling(*nonsense))


def sequences(count, seed=0, longest=60, new=25):
    """Random prompts, several of them twice, each with sampling of its own."""
    rng = random.Random(seed)
    ids = [rng.choices(range(67), k=rng.randint(1, longest)) for _ in range(count)]
    ids[2::3] = ids[1::3]
    return [Sequence(x, rng.randint(1, new), i, sampling=MIXED[i % 4]) for i, x in enumerate(ids)]


def alone(model, sequence, ends=()):
    """What a sequence says by itself, by the whole masked model on all its tokens, one by one."""
    new = []
    while len(new) < sequence.max_new_tokens and not (new and new[-1] in ends):
        ids = sequence.ids + new
        one = Sequence(ids, 1, sequence.seed, sampling=sequence.sampling, new=new)
        logits = model(torch.tensor([ids]), last_only=True)[:, -1]
        new += next_tokens([one], logits).values()
    return new


def finish(*arguments, **options):
    steps = list(itertools.islice(generate(*arguments, **options), 999))
    assert len(steps) < 999
    return steps


@pytest.mark.parametrize("places, pages", [(1, None), (3, None), (12, None), (5, 40), (5, 75)])
def test_sequences_side_by_side_say_what_each_says_alone(places, pages):
    """More sequences than places, or than pages: the youngest is put back, and nothing is lost."""
    model = small_model(4, DMSConfig(window=3), 0.9 if pages else 0.5)
    many = sequences(12, longest=35, new=40)
    ends = () if pages else (3, 5, 8)
    expected = [alone(model, s, ends) for s in many]
    memory = pages and pages * 4 * SLOT
    cache = KVCache(model.to(DEVICE).config, places, DEVICE, page_size=4, memory=memory)
    prefills = []
    model.register_forward_pre_hook(lambda model, arguments: prefills.append(arguments))
    steps = finish(model, cache, many, ends)
    assert cache.decode_step.captures == (DEVICE == "cuda")
    assert len(prefills) > 12 if pages else len(prefills) < 12 or places < 12  # put back, or forked
    for s, new in zip(many, expected):
        said = [token for step in steps for other, token in step if other is s]
        if s.error:
            assert "cache is full" in s.error and said[-1] is None
        else:
            assert said == s.new == new
            assert s.finish_reason == ("stop" if s.new[-1] in ends else "length")
    assert all(s.over for s in many) and any(s.error for s in many) == (pages == 40)
    assert cache.stats()["pages"] == 0 and cache.seen.tolist() == [0] * places


def test_a_captured_step_lives_as_long_as_the_cache_and_its_table(monkeypatch):
    """A graph is simulated: recording leaves everything as it was, replaying finds the tensors that
    were recorded. The table grows; sequences are forked, dropped, and followed by others."""
    class Graph:
        def replay(self):
            assert all(x is y for x, y in zip(vars(cache.rows).values(), self.recorded))
            step.logits = step.run(model, cache, step.inputs)

    graphs = []

    @contextmanager
    def record(graph):
        graphs.append(graph)
        graph.recorded = list(vars(cache.rows).values())
        changed = [*graph.recorded, *cache.pool.slots, cache.pool.free]
        before = [x.clone() for x in changed]
        yield
        [x.copy_(was) for x, was in zip(changed, before)]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    model = small_model(4, DMSConfig(window=3), 0.5)
    many = sequences(10, new=60)
    expected = [alone(model, s, {3, 5}) for s in many]
    cache = KVCache(model.config, 4, page_size=2)
    step = cache.decode_step = script.DecodeStep(model, cache)
    assert step.captures == (DEVICE == "cuda" and cache.kernels != PLAIN)
    step.captures = True
    finish(model, cache, many, {3, 5})
    count = len(graphs)
    assert [s.new for s in many] == expected and 0 < count < 8
    finish(model, cache, [Sequence([1, 2], 9)])
    assert len(graphs) == count and cache.decode_step is step  # it is not captured again
    gone = weakref.ref(cache)
    gc.collect()  # the frames that other libraries keep in circles
    cache = None
    assert gone() is None  # its memory is free at once, without the garbage collector


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model that says after each character the next of ASCII, and </s> after ~. Its tokenizer has
    the shape of Llama 2's: bytes for what it lacks, and a first space that decoding drops."""
    folder = tmp_path_factory.mktemp("scripted")
    special = ["</s>", "<s>", "<unk>", "<|cut|>"]
    names = special + [f"<0x{i:02X}>" for i in range(256)] + ["\u2581", "\u00e9"]
    names += [chr(i) for i in range(33, 127)]
    bpe = models.BPE({x: i for i, x in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    t = tokenizers.Tokenizer(bpe)
    space = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    t.normalizer = normalizers.Sequence(space)
    t.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(),
                                   decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    t.add_special_tokens([*special, "<|new|>"])  # the last of them beyond the model's vocabulary
    t.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": {"content": "</s>", "special": True}, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    V = len(names)
    model = Model(small_config(vocab_size=V, hidden_size=V, tie_word_embeddings=False))
    for name, p in model.named_parameters():
        torch.nn.init.constant_(p, 1.0 if "norm" in name else 0.0)
    torch.nn.init.eye_(model.model.embed_tokens.weight)
    model.lm_head.weight.data = torch.eye(V).roll(1, 0)  # the next id; after the last one </s>
    save_model(model, folder, torch.float32)
    return folder


def streamed(tokenizer, ids, stops, **options):
    """(text, whether a stop has come) after these ids. No text that is out may change later."""
    stream = Stream(tokenizer, stops, **options)
    out = [""]
    for token in itertools.takewhile(lambda token: not stream.stopped, ids):
        stream(token)
        out.append(stream.text)
    stream.let_out(is_last=True)
    assert all(stream.text.startswith(text) for text in out)
    return stream.text, stream.stopped


def test_streamed_text_is_the_whole_text_decoded_at_once(folder, rng):
    """Bytes that are no text, special tokens between them, a first space, and unknown ids."""
    for tokenizer in (load_tokenizer(folder), load_tokenizer(TEACHER)):
        size = tokenizer.fast.get_vocab_size()
        byte = [tokenizer.fast.token_to_id(f"<0x{i:02X}>") or i for i in range(256)]
        streams = [[byte[0xC2], byte[0xA0], byte[0xC2], size - 1]]
        for _ in range(700):
            words = rng.choice(["\u2603", " a", "\n", "  ", "\U0001f600!", "\u00e9"])
            parts = [[rng.randrange(size + 9)], [rng.choice(byte)], tokenizer.encode(words)]
            streams.append(sum(rng.choices(parts, k=rng.randint(1, 12)), []))
        for ids in streams:
            for skip in (False, True):
                whole = tokenizer.decode(ids, skip_special_tokens=skip)
                options = dict(stops=["never"], skip_special_tokens=skip)
                assert streamed(tokenizer, ids, **options) == (whole, False)
            stop = whole[len(whole) // 2 :][: rng.randint(1, 4)]
            if stop and "\ufffd" not in whole:
                before = whole[: whole.find(stop)]
                assert streamed(tokenizer, ids, ["", "zz", stop]) == (before, True)


def test_stream_holds_back_half_characters_and_half_stop_strings(folder, capsys):
    tokenizer = load_tokenizer(TEACHER)
    for text, said in (("\u00ef \u2603 STOP never", "\u00ef \u2603 "), ("a ST", "a ST")):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert streamed(tokenizer, ids, ["STOP"], show=True) == (said, said != text)
        assert capsys.readouterr().out == said
    for stop in (3, 261):  # a special token, or a character that is a token
        ids = [300, stop, 300]
        assert streamed(load_tokenizer(folder), ids, ["<|cut|>", "\u00e9"]) == ("G", True)


@pytest.fixture
def run(capfd, tmp_path, monkeypatch):
    """run(argument, ...) runs the script in an empty folder -> (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = 0
        try:
            script.run_script(lambda: script.main(["--dtype", "float32", *map(str, arguments)]))
        except SystemExit as e:
            code = e.code
        return code, *capfd.readouterr()
    return run


def test_works_at_once_with_the_shipped_model_and_shows_what_it_holds(run, tmp_path):
    code, text, errors = run("--max-new-tokens", 60)
    assert code == 0 and text and "expected: 75 99 77 32" in errors
    assert "1.00x compressed" in run("--max-new-tokens", 60, "--dense")[2]
    budgets = (run("--max-new-tokens", 60, "--budget", pairs)[2] for pairs in (60, 220))
    ratios = [float(re.search(r"([\d.]+)x compressed", errors)[1]) for errors in budgets]
    assert ratios[0] > 7 > 6 > ratios[1]
    assert "the window alone holds 17 pairs" in run("--budget", 17)[2]
    several = ("-n", 3, "--temperature", 1.5, "--max-new-tokens", 20, "--seed")
    assert "no such folder" in run("--model", "/no/such/folder")[2]
    first = run(*several, 7)
    assert first[1] == run(*several, 7)[1] != run(*several, 8)[1]
    assert first[1].count("\n---\n") == 2 and " of 3 cut at" in first[2]
    text = run("--show-evictions", "--max-new-tokens", 60)[1]
    assert "[10]" in text and ("[0]" in text or "[1]" in text)
    assert "[10]" not in run("--show-evictions", "page.html", "--max-new-tokens", 6)[1]
    texts, held = parts((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert " code" in texts and 1 < len(held[0][0]) < len(texts)


def test_chat_remembers_earlier_turns_as_if_they_were_read_at_once(run, monkeypatch):
    spy = mock.create_autospec(script.Session.finish, side_effect=script.Session.finish)
    monkeypatch.setattr(script.Session, "finish", spy)
    turns = ["The code of ann is 31. Give the codes of ann.",
             "The code of tom is 52. Give the codes of tom, ann.",
             "The @ANSWER@ crosses the road. Give the codes of tom."]
    chat = ("--chat", "--temperature", 0, "--max-new-tokens", 40, "--model", TEACHER)
    answers = ["ann is 31.", "tom is 52, ann is 31.", "tom is 52."]
    assert run(*chat, stdin="\n\n".join(turns))[1].splitlines() == answers
    session, [last] = spy.call_args.args
    seen = last.ids[: last.fed]
    whole = KVCache(session.model.config, 1)
    session.model(torch.tensor([seen]), cache=whole)
    rows = [held(x.pool.slots, x.rows.part(1), 0) for x in (session.cache, whole)]
    close(*rows)
    said = [f"<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
            for turn, answer in zip(turns, answers)]
    assert load_tokenizer(TEACHER).decode(seen) in "".join(said)


def write_lines(file, *lines):
    file.write_text("".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines))


def answers_in(file):
    """{line: row} of an answer file, in which each line is answered once."""
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    answers = {row["generated"]["line"]: row for row in rows}
    assert len(answers) == len(rows)
    return answers


def test_requests(run, tmp_path):
    """Side by side, or killed and gone on in too little memory: always the same."""
    rng = random.Random(5)
    made = [tasks.make_problem(rng.choice(tasks.TASKS), rng, "test") for _ in range(5)]
    write_lines(tmp_path / "in", *[{"prompt": p.prompt, "id": f"p{i}"} for i, p in enumerate(made)])
    arguments = ("--requests", "in", "--temperature", "0", "--max-new-tokens", "250", "--out")
    assert run(*arguments, "out")[0] == 0
    whole = answers_in(tmp_path / "out")
    assert {line: row["id"] for line, row in whole.items()} == {i + 1: f"p{i}" for i in range(5)}
    texts = [whole[line]["generated"]["texts"][0] for line in range(1, 6)]
    assert sum(map(tasks.is_correct, made, texts)) >= 4
    killed = tmp_path / "killed"
    begun = "".join((tmp_path / "out").read_text().splitlines(keepends=True)[:2])
    killed.write_text(begun + '{"generated": {"line": 7, "te')
    code, _, errors = run(*arguments, "killed", "--batch", 3, "--memory", 0.0009)
    assert code == 0 and "3/3" in errors
    assert killed.read_text().startswith(begun) and answers_in(killed) == whole


def test_options_of_the_script_and_of_a_request_are_obeyed(run, folder, tmp_path, monkeypatch):
    """The model goes on from w: xyz{|}~ and its end token. generation_config.json says greedy."""
    monkeypatch.setattr(script, "generation_defaults", lambda *given: {"temperature": 0.0})
    at = ("--model", folder)
    assert run(*at, "--prompt", "?", "--stop", "{|")[1] == "xyz\n"
    assert run(*at, "--raw", "--prompt", "-", stdin="x")[1] == "yz{|}~\n"
    monkeypatch.setattr(ModelConfig, "context", 4096)  # RoPE is scaled, as by YaRN
    code, text, errors = run(*at, "--prompt", "?" * 600)
    assert text == "xyz{|}~\n" and "longer than the context that config.json states" in errors
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    tools = {"messages": [{"role": "user", "content": "1"}, call],
             "tools": [{"function": {"name": "f"}}]}
    hot = {"prompt": "?", "temperature": 9, "seed": 5, "max_new_tokens": 20}
    requests = [
        {"prompt": "?", "max_tokens": 3, "seed": None}, {"prompt": "?", "stop": "|", "top_k": 20.0},
        {"prompt": "?", "stop": ["~", "y"], "n": 2, "min_p": 1, "id": 7}, hot,
        {**hot, "presence_penalty": 1}, {"prompt": "?", "top_p": 1e-4, "repetition_penalty": 1.2},
        tools, {"prompt": "?", "chat_template_kwargs": {"enable_thinking": True}}]
    write_lines(tmp_path / "in", *requests)
    code, _, errors = run(*at, "--requests", "in", "--out", "out")
    assert code == 0 and "presence_penalty has no effect" in errors
    rows = answers_in(tmp_path / "out")
    said = [rows[i].pop("generated") for i in range(1, 9)]
    assert [rows[i] for i in range(1, 9)] == requests
    texts = [each["texts"] for each in said]
    assert texts[:3] == [["xyz"], ["xyz{"], ["x", "x"]]
    assert [each["finish_reason"][0] for each in said[:3]] == ["length", "stop", "stop"]
    assert texts[3] == texts[4] and [text[0] for [text] in texts[5:]] == ["x", "g", "l"]
    # the same by itself: nothing that ran beside it mattered
    same = ("--prompt", "?", "--seed", 5, "--temperature", 9, "--max-new-tokens", 20)
    assert run(*at, *same)[1] == texts[3][0] + "\n"


def test_a_bad_line_does_not_stop_the_others(run, folder, tmp_path):
    bad = ["no JSON\n", "[1]\n", {"prompt": "<|new|>"}, {"prompt": ""}, {"prompt": "x" * 600},
           {"prompt": "x", "temperature": "hot"}, {"prompt": "x", "n": 0}, {"prompt": 5},
           {"prompt": "x", "max_tokens": 0}, {"prompt": "x", "generated": 1},
           {"prompt": "x", "chat_template_kwargs": "x"},
           {"messages": [{"role": "user"}], "chat_template_kwargs": {"refuse": "way"}},
           {"prompt": "x" * 300, "max_tokens": 5}]
    good = {"prompt": "x", "max_tokens": 5, "score": math.nan, "line": 7, "texts": 1}
    write_lines(tmp_path / "in", good, "\n", *bad, good)
    arguments = ("--model", folder, "--temperature", 0, "--requests", "in", "--out", "out")
    code, _, errors = run(*arguments, "--memory", 0.00006)
    assert code == 2 and "13 of 15 requests" in errors
    said = dict(re.findall(r"^error: in: line (\d+): (.+)$", errors, re.MULTILINE))
    assert sorted(map(int, said)) == list(range(3, 16))
    assert "no way" in said["14"] and "the cache is full" in said["15"]
    assert sorted(answers_in(tmp_path / "out")) == [1, 16]
    # mended, they are taken up again, and nothing else is
    write_lines(tmp_path / "in", good, "\n", *[{"prompt": "y", "max_tokens": 2}] * 13, good)
    code, _, errors = run(*arguments)
    assert code == 0 and "13/13" in errors and len(answers_in(tmp_path / "out")) == 15


@pytest.mark.parametrize("content, ours", [
    ('{"prompt": "x"}\n', False), ('{"prompt": "x"}', False), (ANSWER.replace('"x"', '"y"'), False),
    (ANSWER.replace("1", "2"), False), (ANSWER + "notes", False), (ANSWER + "\n", False),
    ("\ufeff\u2603", False), (ANSWER[:-3], True), (ANSWER[:9], True), ("", True)])
def test_a_cut_row_is_made_again_and_other_files_stay(content, ours, run, tmp_path, folder):
    write_lines(tmp_path / "in", {"prompt": "x"})
    write_lines(tmp_path / "out", content)
    arguments = ("--model", folder, "--requests", "in", "--out", "out")
    with script.FileLock("out.lock"):
        assert "out.lock" in run(*arguments)[2]
    code, _, errors = run(*arguments)
    if ours:
        assert code == 0 and answers_in(tmp_path / "out")[1]["generated"]["texts"] != ["y"]
    else:
        assert code == 2 and "out: holds more than answers" in errors and errors.count("\n") == 1
        assert (tmp_path / "out").read_text() == content


def parts(page):
    """(texts of the tokens, the positions held) of a page."""
    spans = re.findall(r"<span>(.*?)</span>", page, re.DOTALL)
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    return [html.unescape(span) for span in spans], json.loads(data.group(1))


def test_the_page_shows_what_the_cache_holds_and_text_is_only_text():
    model = small_model(3, DMSConfig(window=3), 0.5)
    cache = KVCache(model.config, 3, page_size=4)
    model(torch.randint(67, (3, 50)), cache=cache)
    held = show.held_by_heads(cache, 1)
    assert held == [[cache.positions(1, i, h).tolist() for h in range(2)] for i in range(2)]
    texts = ["</p></script><script>alert(1)</script>", "&amp;", '"<span>', "TEXT", "DATA", "\n"]
    page = show.page(texts, held)
    assert parts(page) == (texts, held)
    assert page.count("<script") == 2 and "alert(1)</script>" not in page
    assert not re.search(r"(src|href)=|https?:", page)  # nothing else is loaded
    tokenizer = load_tokenizer(TEACHER)
    words = "The code of ann is 31. \u00e4\u00f6 \U0001f600 ."
    ids = tokenizer.encode(words)
    texts = list(show.texts_of(Stream(tokenizer, skip_special_tokens=False), ids))
    assert len(texts) == len(ids) and "".join(texts).replace("\u00b7", "") == words
