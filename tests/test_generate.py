"""Sampling, continuous batching, text out of tokens, the script as a user runs it, its pictures."""
import html
import io
import json
import math
import multiprocessing
import random
import re
import sys
import time
import weakref
from contextlib import contextmanager

import pytest
import tokenizers
import torch
from conftest import small_config, small_model
from tokenizers import decoders, models, normalizers

import generate as script
import show
from checkpoint import load_model, load_tokenizer, save_model
from common import InputError
from dms import DMSConfig
from generate import Sampling, Sequence, Stream, final_answer, generate, sample
from kv_cache import PLAIN, Kernels, KVCache
from model import Model
from toy import tasks

TEACHER = script.SHIPPED.parent / "teacher"


# -------------------------------------------------------------------------------- Choosing a token


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
    uniform = torch.rand(40000, generator=torch.Generator().manual_seed(0))
    uniform[:2] = torch.tensor([0.0, 1 - 2**-24])
    tokens = sample(logits.expand(40000, -1), uniform, **{"temperature": 1.0, **settings})
    share = torch.bincount(tokens, minlength=12) / 40000
    assert (share[expected == 0] == 0).all()
    assert (share - expected).abs().max() < 4 * 0.5 / 200  # four standard deviations


def test_temperature_zero_is_greedy_and_a_penalty_lowers_what_was_said():
    """A penalty divides a positive logit, and multiplies a negative one, as in transformers."""
    logits = torch.tensor([[2.0, 1.5, -1.0, 0.1], [2.0, 1.5, -1.0, 0.1]])
    for temperature in (0.0, 1e-300):
        assert sample(logits, torch.rand(2), temperature).tolist() == [0, 0]
    greedy = Sampling(repetition_penalty=4.0)
    assert sample(logits, torch.rand(2), *greedy, ids=[[0, 0, 3], [2]]).tolist() == [1, 0]
    uniform = (torch.arange(1000) + 0.5) / 1000
    settings = greedy._replace(temperature=1.0)
    tokens = sample(logits[:1].expand(1000, -1), uniform, *settings, ids=[[0, 2]] * 1000)
    expected = torch.softmax(torch.tensor([0.5, 1.5, -4.0, 0.1]), 0)
    torch.testing.assert_close(torch.bincount(tokens) / 1000, expected, atol=2e-3, rtol=0)


# ---------------------------------------------------------------------------- Continuous batching

MIXED = [Sampling(), Sampling(1.3, top_k=20), Sampling(0.8, repetition_penalty=1.5, top_p=0.9),
         Sampling(repetition_penalty=1.3)]


def random_ids(rng, count):
    return [rng.randrange(67) for _ in range(count)]


def sequences(count, seed=0, longest=60, new=25):
    rng = random.Random(seed)
    ids = [random_ids(rng, rng.randint(1, longest)) for _ in range(count)]
    return [Sequence(x, rng.randint(1, new), i, sampling=MIXED[i % 4]) for i, x in enumerate(ids)]


def alone(model, sequence, ends=()):
    """What a sequence says by itself, by the whole masked model on all its tokens, one by one."""
    ids = list(sequence.ids)
    new = []
    while len(new) < sequence.max_new_tokens and not (new and new[-1] in ends):
        uniform = torch.tensor([Sequence(ids, 1, sequence.seed, new=new).uniform()])
        logits = model(torch.tensor([ids]), last_only=True)[:, -1]
        new.append(int(sample(logits, uniform, *sequence.sampling, ids=[ids])))
        ids.append(new[-1])
    return new


def small_cache(model, places, pages=None, page_size=4):
    """Of so many pages, or of as many as the model's context may take."""
    page = KVCache(model.config, 1, page_size=page_size).page_bytes
    memory = pages and pages * page
    return KVCache(model.config, places, model.device, page_size=page_size, memory=memory)


def finish(*arguments, **options):
    """Run generate() to its end, which must come. The list of what it yields."""
    steps = []
    for step in generate(*arguments, **options):
        steps.append(step)
        assert len(steps) < 1000
    return steps


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="steps are captured there")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("places", [1, 3, 12])
def test_sequences_side_by_side_say_what_each_says_alone(places, device):
    """More sequences than places, each with sampling of its own."""
    model = small_model(4, DMSConfig(window=3), 0.5)
    many = sequences(12)
    expected = [alone(model, s, {3, 5, 8}) for s in many]
    cache = small_cache(model.to(device), places)
    steps = finish(model, cache, many, {3, 5, 8})
    assert cache.decode_step.captures == (device == "cuda")
    assert [s.new for s in many] == expected
    for s in many:
        assert [token for step in steps for other, token in step if other is s] == s.new
        assert s.over and s.finish_reason == ("stop" if s.new[-1] in {3, 5, 8} else "length")
    assert cache.stats()["pages"] == 0 and cache.seen.tolist() == [0] * places


@pytest.mark.parametrize("pages", [48, 60, 100])
def test_when_pages_run_out_the_youngest_is_put_back_and_nothing_is_lost(pages):
    model = small_model(4, DMSConfig(window=3), 0.9)
    many = sequences(10, longest=30, new=40)
    expected = [alone(model, s) for s in many]
    cache = small_cache(model, 5, pages)
    prefills = []
    model.register_forward_pre_hook(lambda model, arguments: prefills.append(arguments))
    finish(model, cache, many)
    assert all(s.over and (s.error or s.new == new) for s, new in zip(many, expected))
    failed = [s.error for s in many if s.error]
    assert all("cache is full" in error for error in failed) and (pages == 48) == bool(failed)
    assert len(prefills) > len(many) or pages == 100  # some were put back
    assert cache.stats()["pages"] == 0 and int(cache.least_free_pages) >= 0


def test_chains_fork_one_prompt():
    model = small_model(4, DMSConfig(window=3), 0.5)
    prompt = random_ids(random.Random(1), 50)
    cache = small_cache(model, 4)
    chains = [Sequence(prompt, 12, i, sampling=Sampling(1.0)) for i in range(4)]
    expected = [alone(model, s) for s in chains]
    prefills = []
    model.register_forward_pre_hook(lambda model, arguments: prefills.append(arguments))
    finish(model, cache, chains, release=False)
    assert len(prefills) == 1 and cache.seen.tolist() == [61] * 4
    assert [s.new for s in chains] == expected and len({tuple(s.new) for s in chains}) > 1
    for release in (False, True):  # no place will ever be free
        with pytest.raises(InputError, match="release them"):
            next(generate(model, cache, sequences(5), release=release))
    cache.release([0])
    with pytest.raises(InputError, match="does not hold"):
        next(generate(model, cache, chains[:1]))


def say(conversation, ids):
    """The user's next turn."""
    conversation.ids += ids
    conversation.new = []
    conversation.over = False


@pytest.mark.parametrize("seed", range(3))
def test_turns_over_one_cache_equal_whole_histories_alone(seed):
    """Conversations, several of which begin alike. They keep their places after the first turn. In
    the second one joins that says at once what another has come to, and pages run out."""
    rng = random.Random(seed)
    model = small_model(4, DMSConfig(window=3), 0.9)
    words = random_ids(rng, 12)
    beginnings = [words, words, words, words + random_ids(rng, 5)]
    beginnings += [random_ids(rng, rng.randint(1, 20)) for _ in range(4)]
    talks = [Sequence(ids, rng.randint(4, 12), i, sampling=Sampling(1.3 * (seed > 0)))
             for i, ids in enumerate(beginnings)]
    cache = small_cache(model, 9, 180)
    put_back = set()
    for turn in range(3):
        for talk in talks if turn else []:
            say(talk, words[:turn] + random_ids(rng, rng.randint(1, 15)))
        if turn == 1:
            talks.append(Sequence(talks[-1].ids, 8, 8))
        expected = [talk.ids + alone(model, talk, {3, 5}) for talk in talks]
        for number, _ in enumerate(generate(model, cache, talks, {3, 5}, release=turn > 0)):
            assert number < 1000
            if turn == 1:
                put_back |= {t.seed for t in talks[:8] if t.index is None and not t.over}
        assert [talk.error for talk in talks] == [None] * len(talks)
        assert [talk.ids for talk in talks] == expected
        held = {talk.index: talk.fed for talk in talks if talk.index is not None}
        assert len(held) == (8 if turn == 0 else 0)
        assert cache.seen.tolist() == [held.get(i, 0) for i in range(9)]
    assert 1 <= len(put_back) < 8 and cache.stats()["pages"] == 0


@pytest.mark.parametrize("release", [False, True])
def test_conversations_that_wait_do_not_hoard_pages(release):
    """Two hold 8 tokens each, of 20 that fit, and are going to hold 18. One after the other fits;
    side by side one must fail, and leave its pages to the other."""
    model = small_model(0)
    cache = small_cache(model, 2, pages=20)  # a token is a pair in each of 4 rows
    talks = [Sequence([i] * 7, 2, i) for i in range(2)]
    finish(model, cache, talks, release=False)
    for talk in talks:
        say(talk, [3] * 8)
    expected = [alone(model, talk) for talk in talks]
    finish(model, cache, talks, release=release)
    assert [bool(talk.error) for talk in talks].count(True) == (not release)
    assert all(talk.error or talk.new == new for talk, new in zip(talks, expected))


def test_leaving_early_leaves_nothing_behind():
    """What was left goes on where it stopped when it is handed in again."""
    model = small_model(4, DMSConfig(window=3), 0.5)
    cache = small_cache(model, 6)
    for last_step in (0, 3, 12):
        many = sequences(6, seed=last_step)
        expected = [alone(model, s) for s in many]
        steps = generate(model, cache, many)
        for _ in range(last_step + 1):
            next(steps)
        with pytest.raises(KeyboardInterrupt):
            steps.throw(KeyboardInterrupt())
        assert cache.stats()["pages"] == 0 and cache.seen.tolist() == [0] * 6
        finish(model, cache, [s for s in many if not s.over] + sequences(6, seed=1))
        assert [s.new for s in many] == expected


def test_a_captured_step_lives_as_long_as_the_cache_and_its_table(monkeypatch):
    """A graph is simulated: recording leaves everything as it was, replaying finds the tensors that
    were recorded. The table grows; sequences are forked, dropped, and followed by others."""
    graphs = []

    class Graph:
        def replay(self):
            assert all(x is y for x, y in zip(vars(cache.rows).values(), self.recorded))
            cache.decode_step.logits = cache.decode_step.run()
            self.replayed += 1

    @contextmanager
    def record(graph):
        graphs.append(graph)
        graph.replayed = 0
        graph.recorded = list(vars(cache.rows).values())
        pool = vars(cache.pool).values()
        changed = [*graph.recorded, *[x for x in pool if isinstance(x, torch.Tensor)]]
        before = [x.clone() for x in changed]
        yield
        for x, was in zip(changed, before):
            x.copy_(was)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    model = small_model(4, DMSConfig(window=3), 0.5)
    many = sequences(10, new=60)
    many += [Sequence(many[0].ids, 60, i) for i in range(3)]
    expected = [alone(model, s, {3, 5}) for s in many]
    cache = small_cache(model, 4, page_size=2)
    finish(model, cache, [Sequence([1, 2], 3)])
    step = cache.decode_step
    assert not step.captures and not graphs
    step.captures = True
    finish(model, cache, many, {3, 5})
    assert [s.new for s in many] == expected and cache.decode_step is step
    before = len(graphs)
    assert sum(graph.replayed for graph in graphs) > 3 * before
    finish(model, cache, [Sequence([1, 2], 9)])
    assert len(graphs) == before  # another call does not capture it again
    cache.device = torch.device("cuda")  # simulated
    for kernels, captures in ((PLAIN, False), (Kernels(1, 2, 3), True)):
        cache.kernels = kernels
        assert script.DecodeStep(model, cache).captures == captures
    gone = weakref.ref(cache)
    cache = None
    assert gone() is None  # its memory is free at once, without the garbage collector


# ------------------------------------------------------------------------------ Text out of tokens

TEMPLATE = ("{% if refuse is defined %}{{ raise_exception('no ' + refuse) }}{% endif %}"
            "{% for m in messages %}{{ m.content or m.tool_calls[0].name }};{% endfor %}"
            "{{ tools[0].function.name if tools else 'w' }}{{ 'k' if enable_thinking else '' }}")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model that says after each character the next of ASCII, and </s> after ~. Its tokenizer has
    the shape of Llama 2's: bytes for what it lacks, and a first space that decoding drops."""
    folder = tmp_path_factory.mktemp("scripted")
    characters = [chr(i) for i in range(33, 127)]
    special = ["<unk>", "<s>", "</s>", "<|cut|>"]
    names = special + [f"<0x{i:02X}>" for i in range(256)] + ["\u2581", "\u00e9"] + characters
    vocabulary = {name: i for i, name in enumerate(names)}
    t = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    t.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    t.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(),
                                   decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    t.add_special_tokens(special)
    t.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": {"content": "</s>", "special": True}, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    V = len(names)
    model = Model(small_config(vocab_size=V, hidden_size=V, tie_word_embeddings=False))
    for name, p in model.named_parameters():
        torch.nn.init.constant_(p, 1.0 if "norm" in name else 0.0)
    torch.nn.init.eye_(model.model.embed_tokens.weight)
    for a, b in zip(characters, [*characters[1:], "</s>"]):
        model.lm_head.weight.data[vocabulary[b], vocabulary[a]] = 1.0
    save_model(model, folder, torch.float32)
    return folder


def test_streamed_text_is_the_whole_text_decoded_at_once(folder, rng):
    """Bytes that are no text, alone and side by side, special tokens between them, a first space,
    ids that the tokenizer does not know. (On the first one tokenizers' DecodeStream raises.)"""
    for tokenizer in (load_tokenizer(folder), load_tokenizer(TEACHER)):
        size = tokenizer.fast.get_vocab_size()
        byte = [tokenizer.fast.token_to_id(f"<0x{i:02X}>") or i for i in range(256)]
        streams = [[byte[0xC2], byte[0xA0], byte[0xC2], size - 1]]
        for _ in range(700):
            words = rng.choice(["\u2603", " a", "\n", "  ", "\U0001f600!", "\u00e9"])
            parts = [[rng.randrange(size + 9)], [rng.choice(byte)], tokenizer.encode(words)]
            streams.append(sum(rng.choices(parts, k=rng.randint(1, 12)), []))
        for ids in streams:
            for skip in (True, False):
                shown = []
                stream = Stream(tokenizer, ["never"], shown.append, skip_special_tokens=skip)
                assert not any([stream(token) for token in ids])
                stream.finish()
                whole = tokenizer.decode(ids, skip_special_tokens=skip)
                assert "".join(shown) == stream.text == whole


def test_stream_holds_back_half_characters_and_half_stop_strings():
    tokenizer = load_tokenizer(TEACHER)
    for text, said in (("\u00ef \u2603 STOP never", "\u00ef \u2603 "), ("a ST", "a ST")):
        shown = []
        stream = Stream(tokenizer, ["STOP", ""], show=shown.append)
        stopped = [stream(i) for i in tokenizer.encode(text, add_special_tokens=False)]
        assert not any("\ufffd" in piece or "S" in piece for piece in shown)
        stream.finish()
        assert "".join(shown) == stream.text == said
        assert any(stopped) == stream.stopped == (said != text)


@pytest.mark.parametrize("text, answer", [
    ("so \\boxed{12} and \\boxed{7}.", "7"), ("it is 1,234.5.", "1234.5"), ("yes\nno\n", "no"),
    ("", None), ("\n", None), ("a -3 b", "-3"), ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{\\text{(A)}} or so, 3 of 4", "A"), ("\\boxed{ (A) }", "A"), ("\\boxed{ 7 }", "7"),
    ("\\boxed{12,345}", "12345"), ("12,345", "12345"), ("1/2", "1/2"), ("so 2.5e3.", "2.5e3"),
    ("3-4", "4"), ("f(2)-4", "4"), ("x=-4", "-4"), ("\\boxed{7}. I checked it 3 times.", "7"),
    ("\\boxed{(1,2)}", "(1,2)"), ("1,2", "2"), ("cut \\boxed{9", "9"), ("\\boxed{x_{1}}", "x_{1}")])
def test_final_answer(text, answer):
    assert final_answer(text) == answer


# -------------------------------------------------------------------------------------- The script


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


def test_works_at_once_with_the_shipped_model(run):
    code, text, errors = run("--max-new-tokens", 60)
    assert code == 0 and text
    assert all(words in errors for words in ("tokens/s", "compression", "1 of 1 right"))
    assert "compression 1.00x" in run("--max-new-tokens", 60, "--dense")[2]
    several = ("-n", 3, "--temperature", 1.5, "--max-new-tokens", 20, "--seed")
    first = run(*several, 7)
    assert first[1] == run(*several, 7)[1] != run(*several, 8)[1]
    assert first[1].count("\n[") >= 2 and "[cut at --max-new-tokens: " in first[2]


def test_chat_remembers_earlier_turns_as_if_they_were_read_at_once(run, monkeypatch):
    caches, seen = [], []

    class Spy(KVCache):
        def pieces(self, ids, *rest):
            caches.append(self)
            seen.extend(ids[0].tolist())
            return super().pieces(ids, *rest)

    monkeypatch.setattr(script, "KVCache", Spy)
    turns = ["The code of ann is 31. Give the codes of ann.",
             "The code of tom is 52. Give the codes of tom, ann.",
             "The @ANSWER@ crosses the road. Give the codes of tom."]
    chat = ("--chat", "--temperature", 0, "--max-new-tokens", 40, "--model", TEACHER)
    text = run(*chat, stdin="\n\n".join(turns))[1]
    assert text.splitlines() == ["ann is 31.", "tom is 52, ann is 31.", "tom is 52."]
    model = load_model(TEACHER)
    whole = KVCache(model.config, 1)
    model(torch.tensor([seen]), cache=whole)
    assert torch.equal(whole.rows.length, caches[0].rows.length)
    said = load_tokenizer(TEACHER).decode(seen)
    assert said.count("<|im_start|>user") == 3 and said.count("<|im_end|>") == 5
    assert all(said.count(f"<|im_start|>user\n{turn}<|im_end|>\n") == 1 for turn in turns)


@pytest.mark.parametrize("arguments, message", [
    (["--prompt", ""], "prompt"), (["--prompt", "river " * 2000], "context is 1024"),
    (["--model", "/no/such/folder"], "no such folder"), (["--prompt", "x", "--chat"], "exclude"),
    (["--max-new-tokens", "0"], "max_new_tokens = 0"), (["--chat", "-n", "2"], "--chat reads its"),
    (["--top-p", "1.5"], "top_p = 1.5"), (["--temperature", "nan"], "temperature = nan"),
    (["--out", "x"], "belong together"), (["--requests", "none", "--out", "out"], "none")])
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, run):
    code, text, errors = run(*arguments)
    assert code == 2 and message in errors and text == "" and errors.count("\n") == 1


# ------------------------------------------------------------------------------------ Many requests


def write_lines(file, *lines):
    file.write_text("".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines))


def answers_in(file):
    """{line: row} of an answer file, in which each line is answered once."""
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    answers = {row["generated"]["line"]: row for row in rows}
    assert len(answers) == len(rows)
    return answers


def test_requests(run, tmp_path, monkeypatch):
    """Side by side, killed and gone on in too little memory, and split in two: always the same."""
    rng = random.Random(5)
    made = [tasks.make_problem(rng.choice(tasks.TASKS), rng, "test") for _ in range(5)]
    write_lines(tmp_path / "in", *[{"prompt": p.prompt, "id": f"p{i}"} for i, p in enumerate(made)])
    arguments = ("--requests", "in", "--temperature", "0", "--max-new-tokens", "250", "--out")
    code, _, errors = run(*arguments, "out")
    assert code == 0 and "tokens/s" in errors
    whole = answers_in(tmp_path / "out")
    assert sorted(whole) == list(range(1, 6))
    assert all(row["id"] == f"p{line - 1}" for line, row in whole.items())
    texts = [whole[line]["generated"]["texts"][0] for line in range(1, 6)]
    assert sum(map(tasks.is_correct, made, texts)) >= 4
    killed = tmp_path / "killed"
    command = [*arguments, "killed", "--batch", "2"]
    process = multiprocessing.get_context("fork").Process(target=script.main, args=(command,))
    process.start()
    while process.is_alive() and not (killed.exists() and killed.stat().st_size):
        time.sleep(0.01)
    process.kill()
    process.join()
    before = killed.read_text()
    before = before[: before.rfind("\n") + 1]
    with open(killed, "a") as file:
        file.write('{"generated": {"line": 7, "te')
    code, _, errors = run(*arguments, "killed", "--batch", 5, "--memory", 0.0009)
    assert code == 0 and f"{5 - len(before.splitlines())}/" in errors
    assert killed.read_text().startswith(before) and answers_in(killed) == whole
    halves = {}
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert run(*arguments, "sub/split.jsonl")[0] == 0
        halves |= answers_in(tmp_path / "sub" / f"split.{rank}-of-2.jsonl")
    assert halves == whole


def test_options_of_the_script_and_of_a_request_are_obeyed(run, folder, tmp_path, monkeypatch):
    """The model goes on from w: xyz{|}~ and its end token. generation_config.json says greedy."""
    monkeypatch.setattr(script, "generation_defaults", lambda folder: {"temperature": 0.0})
    at = ("--model", folder)
    assert run(*at, "--prompt", "?")[1] == "xyz{|}~\n"
    assert run(*at, "--prompt", "?", "--stop", "{|")[1] == "xyz\n"
    code, text, errors = run(*at, "--prompt", "?", "--max-new-tokens", 3)
    assert text == "xyz\n" and "cut at --max-new-tokens" in errors
    assert run(*at, "--raw", "--prompt", "-", stdin="x")[1] == "yz{|}~\n"
    monkeypatch.setattr(script, "context_of", lambda config: 4096)  # RoPE is scaled, as by YaRN
    code, text, errors = run(*at, "--prompt", "?" * 600)
    assert text == "xyz{|}~\n" and "longer than the context that config.json states" in errors
    stream = Stream(load_tokenizer(folder), ["<|cut|>", "\u00e9"])
    assert not stream(300) and stream(3) and stream.stopped  # a special token ends the text
    assert stream.end_ids == {3}  # a character that is a token is text
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    requests = [
        {"prompt": "?", "max_tokens": 3, "seed": None}, {"prompt": "?", "stop": "|", "top_k": 20.0},
        {"prompt": "?", "stop": ["~", "y"], "n": 2, "min_p": 1, "id": 7, "logprobs": False},
        {"prompt": "?", "temperature": 9, "seed": 5, "max_new_tokens": 20},
        {"prompt": "?", "temperature": 9, "seed": 5, "max_new_tokens": 20, "metadata": {}},
        {"prompt": "?", "top_p": 1e-4, "repetition_penalty": 1.2, "stream": True},
        {"messages": [{"role": "user", "content": "1"}, call], "max_tokens": 1,
         "presence_penalty": 1, "tools": [{"function": {"name": "f"}}]},
        {"prompt": "?", "max_tokens": 1, "chat_template_kwargs": {"enable_thinking": True}}]
    write_lines(tmp_path / "in", *requests)
    code, _, errors = run(*at, "--requests", "in", "--out", "out")
    assert code == 0 and "in: presence_penalty is not" in errors and "in: stream is not" in errors
    assert errors.count("is not obeyed") == 2
    rows = answers_in(tmp_path / "out")
    said = [rows[i].pop("generated") for i in range(1, 9)]
    assert [rows[i] for i in range(1, 9)] == requests
    texts = [each["texts"] for each in said]
    assert texts[:3] == [["xyz"], ["xyz{"], ["x", "x"]] and said[2]["votes"] == 2
    assert [each["finish_reason"][0] for each in said[:3]] == ["length", "stop", "stop"]
    assert texts[3] == texts[4] and texts[5:] == [["xyz{|}~"], ["g"], ["l"]]
    # the same by itself: nothing that ran beside it mattered
    same = ("--prompt", "?", "--seed", 5, "--temperature", 9, "--max-new-tokens", 20)
    assert run(*at, *same)[1] == texts[3][0] + "\n"


def test_a_bad_line_does_not_stop_the_others(run, folder, tmp_path):
    bad = ["no JSON\n", "[1]\n", {"text": "x"}, {"prompt": ""}, {"prompt": "x" * 600},
           {"prompt": "x", "temperature": "hot"}, {"prompt": "x", "temperature": math.nan},
           {"prompt": "x", "max_tokens": 0}, {"prompt": "x", "n": 1.5},
           {"prompt": "x", "generated": 1}, {"prompt": "x", "max_tokens": "many"},
           {"messages": [{"role": "user"}], "chat_template_kwargs": {"refuse": "way"}},
           {"prompt": "x", "chat_template_kwargs": "x"}, {"prompt": "x", "stop": [1]},
           {"messages": ["y"]}, {"prompt": "x" * 300, "max_tokens": 5}]
    good = {"prompt": "x", "max_tokens": 5, "score": math.nan, "line": 7, "texts": 1}
    write_lines(tmp_path / "in", good, "\n", *bad, good)
    arguments = ("--model", folder, "--temperature", 0, "--requests", "in", "--out", "out")
    code, _, errors = run(*arguments, "--memory", 0.00006)
    assert code == 2 and f"{len(bad)} of {len(bad) + 2} requests" in errors
    for line in range(3, 3 + len(bad)):
        assert len(re.findall(f"^error: in: line {line}: .+$", errors, re.MULTILINE)) == 1
    assert "line 14: the chat template refused" in errors and "no way" in errors
    assert "line 18: the cache is full" in errors
    assert sorted(answers_in(tmp_path / "out")) == [1, 3 + len(bad)]
    # mended, they are taken up again, and nothing else is
    write_lines(tmp_path / "in", good, "\n", *[{"prompt": "y", "max_tokens": 2}] * len(bad), good)
    code, _, errors = run(*arguments)
    assert code == 0 and f"{len(bad)}/{len(bad)}" in errors
    assert len(answers_in(tmp_path / "out")) == len(bad) + 2


ANSWER = '{"generated": {"line": 1, "texts": ["y"]}, "prompt": "x"}\n'


@pytest.mark.parametrize("content, ours", [
    ('{"prompt": "x"}\n', False), ('{"prompt": "x"}', False), (ANSWER.replace('"x"', '"y"'), False),
    (ANSWER.replace("1", "2"), False), (ANSWER + "notes", False), (ANSWER + "\n", False),
    ("notes", False), ("\n", False), (ANSWER[:30] + "\n", False), ("\ufeff\u2603", False),
    (ANSWER.strip(), True), (ANSWER[:-3], True), (ANSWER[:40], True), ("{", True), ("", True)])
def test_a_cut_row_is_made_again_and_other_files_stay(content, ours, run, tmp_path, folder):
    write_lines(tmp_path / "in", {"prompt": "x"})
    write_lines(tmp_path / "out", content)
    arguments = ("--model", folder, "--requests", "in", "--out", "out")
    code, _, errors = run(*arguments)
    text = (tmp_path / "out").read_text()
    if ours:
        assert code == 0 and answers_in(tmp_path / "out")[1]["generated"]["texts"] != ["y"]
    else:
        assert code == 2 and "out: holds something else" in errors and errors.count("\n") == 1
        assert text == content
    with script.FileLock("out.lock"):
        code, _, errors = run(*arguments)
    assert code == 2 and "out.lock" in errors and (tmp_path / "out").read_text() == text


# ---------------------------------------------------------------------------- What the cache holds


def parts(page):
    """(texts of the tokens, data) of a page."""
    paragraph = re.search(r'<p id="text">(.*?)</p>', page, re.DOTALL).group(1)
    spans = re.findall(r"<span>(.*?)</span>", paragraph, re.DOTALL)
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
    assert parts(page) == (texts, {"held": held})
    assert page.count("<script") == 2 and "alert(1)</script>" not in page
    assert not re.search(r"(src|href)=|https?:", page)  # nothing else is loaded


def test_show_evictions(run, tmp_path):
    code, text, _ = run("--show-evictions", "--max-new-tokens", 60)
    assert code == 0 and "[10]" in text and ("[0]" in text or "[1]" in text)
    code, text, _ = run("--show-evictions", "page.html", "--max-new-tokens", 6)
    assert code == 0 and "[10]" not in text
    texts, data = parts((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert " code" in texts and len(data["held"][0][0]) > 1
    tokenizer = load_tokenizer(TEACHER)
    words = "The code of ann is 31. \u00e4\u00f6 \U0001f600 ."
    ids = tokenizer.encode(words)
    texts = show.texts_of(Stream(tokenizer, skip_special_tokens=False), ids)
    assert len(texts) == len(ids) and "".join(texts).replace("\u00b7", "") == words
