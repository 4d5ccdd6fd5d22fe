"""Sampling, continuous batching, stopping, streaming, and the script as a user runs it."""
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import small_model

import generate as script
from checkpoint import InputError, check_ids, load_tokenizer, locked
from dms import DMSConfig
from generate import DecodeStep, Sequence, generate, sample
from kernels import choose
from kernels.decode_step import FusedLayers
from kv_cache import KVCache
from toy import tasks

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ROOT / "toy" / "teacher"


# -------------------------------------------------------------------------------- Drawing a token


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(top_k=4),
        dict(top_p=0.7),
        dict(min_p=0.2),
        dict(top_k=7, top_p=0.8, min_p=0.1, temperature=0.7),
    ],
)
def test_sampling_follows_its_textbook_distribution(settings):
    torch.manual_seed(1)
    logits = torch.randn(12) * 1.5
    draws = 40000
    p = torch.softmax(logits / settings.get("temperature", 1.0), 0).tolist()
    order = sorted(range(12), key=lambda i: -p[i])
    kept = order[: settings.get("top_k", 12)]
    total = sum(p[i] for i in kept)
    mass = 0.0
    nucleus = []
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
    inside = expected > 0
    assert counts[~inside].sum() == 0
    off = counts - draws * expected
    chi2 = (off.square() / (draws * expected))[inside].sum().item()
    freedom = int(inside.sum()) - 1
    assert chi2 < freedom + 5 * (2 * max(freedom, 1)) ** 0.5  # far beyond the 99.9th percentile


def test_temperature_zero_is_greedy():
    logits = torch.randn(5, 30)
    assert torch.equal(sample(logits, torch.rand(5)), logits.argmax(-1))


def test_the_ends_of_the_unit_interval_draw_possible_tokens():
    logits = torch.tensor([[-1e30, 0.0, 1.0, -1e30]]).expand(2, -1)
    assert sample(logits, torch.tensor([0.0, 1 - 2**-24]), temperature=1.0).tolist() == [1, 2]



def test_joined_weights_stay_the_model_s():
    """Products as one: the state dict is as it was, joining again copies nothing, and the model can
    be trained afterwards."""
    model = small_model(1, None, 0.5, model_type="qwen2")
    model.requires_grad_()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    ids = torch.arange(8)[None]
    expected = model(ids)
    with torch.inference_mode():
        first = FusedLayers(model).products
        again = FusedLayers(model).products
    for layer, of_layer in zip(first, again):
        for joined, same in zip(layer, of_layer):
            assert joined[0].data_ptr() == same[0].data_ptr()
    assert first[0][0][1] is not None and first[0][1][1] is None  # qwen2 has biases on q, k and v
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], x) for name, x in before.items())
    model(ids).sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.any()
    torch.testing.assert_close(model(ids), expected)


# ---------------------------------------------------------------------------- Continuous batching


def random_ids(rng, count):
    return [rng.randrange(67) for _ in range(count)]


def sequences(count, seed=0, longest=60, new=25):
    rng = random.Random(seed)
    made = []
    for i in range(count):
        ids = random_ids(rng, rng.randint(1, longest))
        made.append(Sequence(ids, rng.randint(1, new), i))
    return made


def alone(model, sequence, ends=(), **sampling):
    """What a sequence draws by itself, by the whole masked model on all its tokens, one after
    another."""
    ids = list(sequence.ids)
    new = []
    while len(new) < sequence.max_new_tokens and not (new and new[-1] in ends):
        uniform = torch.tensor([Sequence(ids, 1, sequence.seed, new=new).uniform()])
        logits = model(torch.tensor([ids]), last_only=True)[:, -1]
        token = int(sample(logits, uniform, **sampling))
        new.append(token)
        ids.append(token)
    return new


def small_cache(model, rows, pages=None, page_size=4):
    """Of so many pages, or of as many as the model's context may take."""
    memory = None
    if pages is not None:
        memory = pages * KVCache(model.config, 1, page_size=page_size).page_bytes
    return KVCache(model.config, rows, page_size=page_size, memory=memory)


def finish(*arguments, **options):
    """Run generate() to its end, which must come."""
    for step, _ in enumerate(generate(*arguments, **options)):
        assert step < 1000


@pytest.mark.parametrize("sampling", [{}, dict(temperature=1.3, top_k=20)])
@pytest.mark.parametrize("rows", [1, 3, 12])
def test_sequences_side_by_side_give_what_each_gives_alone(rows, sampling):
    """More sequences than rows: one takes the place of another as it ends."""
    model = small_model(4, DMSConfig(window=3), 0.5)
    some = sequences(12)
    expected = [alone(model, s, {3, 5, 8}, **sampling) for s in some]
    cache = small_cache(model, rows)
    drawn = []
    for step in generate(model, cache, some, {3, 5, 8}, sampling):
        drawn += step
    assert [s.new for s in some] == expected
    assert all(s.over and s.error is None for s in some)
    for s in some:
        assert [token for other, token in drawn if other is s] == s.new
    assert cache.stats()["pages"] == 0
    assert cache.seen.tolist() == [0] * rows


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a captured decode step needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("sampling", [{}, dict(temperature=1.3, top_k=20, top_p=0.95, min_p=0.01)])
def test_captured_steps_draw_what_the_cpu_draws(sampling, compiled):
    model = small_model(4, DMSConfig(window=3), 0.5)
    some = sequences(12, new=60)
    expected = [alone(model, s, {3, 5, 8}, **sampling) for s in some]
    cache = KVCache(model.config, 3, "cuda", page_size=4)
    assert cache.kernels is choose.TRITON
    if compiled:
        model.compile()
    finish(model.to("cuda"), cache, some, {3, 5, 8}, sampling)
    assert [s.new for s in some] == expected


@pytest.mark.parametrize(
    "settings", [None, DMSConfig(window=3), DMSConfig(window=3, source="neuron")]
)
def test_compiled_blocks_draw_the_same(settings):
    """Each half of a layer is one graph, made once for all layers, lengths and batches but those
    of 1."""
    model = small_model(4, settings, 0.5)
    expected = [alone(model, s, {3, 5, 8}) for s in sequences(12)]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model.compile(backend=backend, fullgraph=True)
    for rows in (1, 3, 12):
        some = sequences(12)
        finish(model, small_cache(model, rows), some, {3, 5, 8})
        assert [s.new for s in some] == expected
    assert 4 <= len(graphs) <= 8


def test_a_captured_step_never_outlives_its_tensors(monkeypatch):
    """A graph is simulated: recording leaves everything as it was, replaying finds the tensors that
    were recorded. The table grows, rows are forked and dropped under way."""
    counts = {"recorded": 0, "replayed": 0}
    steps = []

    def tensors(cache):
        state = [*vars(cache.rows).values(), *vars(cache.pool).values()]
        state += [cache.reads, cache.peak_pairs]
        assert all(isinstance(x, torch.Tensor) for x in state) and len(state) == 12
        return state

    class Step(DecodeStep):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.captures = True
            steps.append(self)

    class Graph:
        def replay(self):
            counts["replayed"] += 1
            found = tensors(self.step.cache)
            assert all(x is recorded for x, recorded in zip(found, self.recorded))
            self.step.run()

    @contextmanager
    def record(graph):
        counts["recorded"] += 1
        graph.step = steps[-1]
        graph.recorded = tensors(graph.step.cache)
        before = [x.clone() for x in graph.recorded]
        yield
        for x, was in zip(graph.recorded, before):
            x.copy_(was)

    monkeypatch.setattr(script, "DecodeStep", Step)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    model = small_model(4, DMSConfig(window=3), 0.5)
    many = sorted(sequences(10, new=60), key=lambda s: len(s.ids))
    many += [Sequence(many[0].ids, 60, i) for i in range(3)]
    expected = [alone(model, s, {3, 5}, temperature=1.0) for s in many]
    finish(model, small_cache(model, 4, page_size=2), many, {3, 5}, dict(temperature=1.0))
    assert [s.new for s in many] == expected
    assert counts["replayed"] > 3 * counts["recorded"] > 10


def test_only_kernels_that_never_wait_are_captured(monkeypatch):
    """The plain functions, which a GPU without Triton gets, ask it for numbers."""
    model = small_model(4, DMSConfig(window=3), 0.5)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, **_: zeros(*shape, dtype=dtype))
    for kernels, captures in ((choose.PLAIN, False), (choose.TRITON, True)):
        cache = KVCache(model.config, 1)
        cache.device = torch.device("cuda")  # simulated
        cache.kernels = kernels
        assert DecodeStep(model, cache, {}).captures == captures


def spy_on_feeding(model):
    """The list of how many tokens each call of the model is going to bring."""
    fed = []
    forward = model.forward

    def spy(ids, **rest):
        fed.append(ids.shape[1])
        return forward(ids, **rest)

    model.forward = spy
    return fed


@pytest.mark.parametrize("pages", [48, 60, 100])
def test_when_pages_run_out_the_youngest_is_put_back_and_nothing_is_lost(pages):
    model = small_model(4, DMSConfig(window=3), 0.9)
    some = sequences(10, longest=30, new=40)
    expected = [alone(model, s) for s in some]
    cache = small_cache(model, 5, pages)
    fed = spy_on_feeding(model)
    for _ in generate(model, cache, some):
        assert cache.stats()["pages"] <= len(cache.pool) == pages
    failed = [s for s in some if s.error]
    assert all("cache is full" in s.error for s in failed)
    for s, new in zip(some, expected):
        assert s.over and (s.error or s.new == new)
    assert len(fed) > len(some) or pages == 100  # some were fed again
    assert (pages == 48) == bool(failed)
    assert cache.stats()["pages"] == 0


def test_chains_fork_one_prompt():
    model = small_model(4, DMSConfig(window=3), 0.5)
    prompt = torch.randint(0, 67, (50,)).tolist()
    cache = small_cache(model, 4)
    some = [Sequence(prompt, 12, i) for i in range(4)]
    expected = [alone(model, s, temperature=1.0) for s in some]
    fed = spy_on_feeding(model)
    finish(model, cache, some, sampling=dict(temperature=1.0), release=False)
    assert fed == [50]
    assert cache.seen.tolist() == [61] * 4
    assert [s.new for s in some] == expected
    assert len({tuple(s.new) for s in some}) > 1
    with pytest.raises(InputError, match="release them"):
        next(generate(model, cache, sequences(5), release=False))


def say(conversation, ids):
    """The user's next turn."""
    conversation.ids += ids
    conversation.new = []
    conversation.over = False


@pytest.mark.parametrize("sampling", [{}, dict(temperature=1.3)])
@pytest.mark.parametrize("seed", range(3))
def test_turns_over_one_cache_equal_whole_histories_alone(seed, sampling):
    """Several conversations, some of which begin with the same words. They keep their rows after
    the first turn; in the second, in which one joins them that says at once what another has come
    to, pages run out and some are put back."""
    rng = random.Random(seed)
    model = small_model(4, DMSConfig(window=3), 0.9)
    words = random_ids(rng, 12)
    beginnings = [words, words, words, words + random_ids(rng, 5)]
    beginnings += [random_ids(rng, rng.randint(1, 20)) for _ in range(4)]
    talks = [Sequence(ids, rng.randint(4, 12), i) for i, ids in enumerate(beginnings)]
    cache = small_cache(model, 9, 180)
    put_back = set()
    for turn in range(3):
        if turn > 0:
            for talk in talks:
                say(talk, words[:turn] + random_ids(rng, rng.randint(1, 15)))
        if turn == 1:
            talks.append(Sequence(talks[-1].ids, 8, 8))
        histories = [list(talk.ids) for talk in talks]
        expected = [alone(model, talk, {3, 5}, **sampling) for talk in talks]
        steps = generate(model, cache, talks, {3, 5}, sampling, release=turn > 0)
        for number, _ in enumerate(steps):
            assert number < 1000  # the run ends
            if turn == 1:
                gone = [talk for talk in talks[:8] if talk.row is None and not talk.over]
                put_back |= {talk.seed for talk in gone}
        assert [talk.error for talk in talks] == [None] * len(talks)
        assert [talk.new for talk in talks] == expected
        assert [talk.ids for talk in talks] == [a + b for a, b in zip(histories, expected)]
        held = {talk.row: talk.fed for talk in talks if talk.row is not None}
        assert len(held) == (8 if turn == 0 else 0)
        assert cache.seen.tolist() == [held.get(row, 0) for row in range(9)]
    assert 1 <= len(put_back) < 8
    assert cache.stats()["pages"] == 0


def test_conversations_that_keep_their_rows_share_too_few_pages():
    """One that finds no pages left fails and leaves its own to the others, which are right."""
    model = small_model(4, DMSConfig(window=3), 0.9)
    talks = [Sequence(random_ids(random.Random(i), 12), 8, i) for i in range(6)]
    cache = small_cache(model, 6, 120)
    finish(model, cache, talks, release=False)
    assert [talk.error for talk in talks] == [None] * 6
    for talk in talks:
        say(talk, [talk.seed] * 9)
    expected = [alone(model, talk) for talk in talks]
    finish(model, cache, talks, release=False)
    failed = [talk for talk in talks if talk.error]
    assert 1 <= len(failed) < 6
    assert all("cache is full" in talk.error and talk.row is None for talk in failed)
    for talk, new in zip(talks, expected):
        assert talk.over and (talk.error or talk.new == new)
    held = {talk.row: talk.fed for talk in talks if talk.row is not None}
    assert cache.seen.tolist() == [held.get(row, 0) for row in range(6)]


def test_a_turn_that_fits_by_itself_does_not_fail_for_pages_of_turns_that_wait():
    """Two conversations hold 8 tokens each, of 20 that fit, and are going to hold 18."""
    model = small_model(0)
    cache = small_cache(model, 2, pages=20)  # a token is a pair in each of 4 rows
    talks = [Sequence([i] * 7, 2, i) for i in range(2)]
    finish(model, cache, talks, release=False)
    assert cache.stats()["pages"] == 16
    for talk in talks:
        say(talk, [3] * 8)
    expected = [alone(model, talk) for talk in talks]
    finish(model, cache, talks)
    assert [talk.error for talk in talks] == [None, None]
    assert [talk.new for talk in talks] == expected


@pytest.mark.parametrize("leave", ["break", "close", "throw"])
def test_leaving_early_leaves_nothing_behind(leave):
    """What was left goes on where it stopped when it is given again."""
    model = small_model(4, DMSConfig(window=3), 0.5)
    sampling = dict(temperature=1.3)
    cache = small_cache(model, 6)
    for last_step in (0, 3, 12):
        some = sequences(6, seed=last_step)
        expected = [alone(model, s, **sampling) for s in some]
        steps = generate(model, cache, some, sampling=sampling)
        for step, _ in enumerate(steps):
            if step == last_step:
                break
        if leave == "break":
            del steps
        elif leave == "close":
            steps.close()
        else:
            with pytest.raises(KeyboardInterrupt):
                steps.throw(KeyboardInterrupt())
        assert cache.stats()["pages"] == 0
        assert cache.seen.tolist() == [0] * 6  # and all rows are there
        left = [s for s in some if not s.over]
        assert left
        finish(model, cache, left + sequences(6, seed=1), sampling=sampling)
        assert [s.new for s in some] == expected


def test_a_row_that_a_sequence_names_is_not_given_to_another():
    """As after an accident while it was fed for the first time."""
    model = small_model(4, DMSConfig(window=3), 0.5)
    some = sequences(2)
    expected = [alone(model, s) for s in some]
    some[0].row = 0
    finish(model, small_cache(model, 2), some, release=False)
    assert [s.new for s in some] == expected
    assert {s.row for s in some} == {0, 1}


def test_a_history_that_the_cache_does_not_hold_is_refused():
    """And nothing happens to the sequence whose row it names."""
    model = small_model(0)
    cache = small_cache(model, 1)
    first, second = sequences(2)
    finish(model, cache, [first], release=False)
    cache.release([first.row])
    finish(model, cache, [second], release=False)
    assert first.row == second.row and first.fed != second.fed
    say(first, [1, 2])
    with pytest.raises(InputError, match="does not hold what a sequence has fed"):
        next(generate(model, cache, [first]))
    assert cache.seen.tolist() == [second.fed]


# --------------------------------------------------------------------------------------- Streams


def test_stream_holds_back_half_characters_and_half_stop_strings():
    tokenizer = load_tokenizer(TEACHER)
    pieces = []
    ids = tokenizer.encode("naïve ☃ snow STOP never", add_special_tokens=False)
    stream = script.Stream(tokenizer, ["STOP"], show=pieces.append)
    assert any(stream(i) for i in ids)
    assert "".join(pieces) == stream.text == "naïve ☃ snow "
    assert stream.stopped
    assert not any("\ufffd" in p or "S" in p for p in pieces)
    stream = script.Stream(tokenizer, ["STOP"])
    assert not any(stream(i) for i in tokenizer.encode("a ST"))
    assert stream.text == "a "
    stream.finish()
    assert stream.text == "a ST"


@pytest.mark.parametrize("seed", range(5))
def test_stream_reads_what_the_tokenizer_reads_at_once(seed):
    tokenizer = load_tokenizer(TEACHER)
    rng = random.Random(seed)
    pieces = []
    stream = script.Stream(tokenizer, ["QQ never QQ"], show=pieces.append)
    ids = []
    for _ in range(60):
        words = tokenizer.encode(rng.choice(["☃", "é", " is 7", "QQ", "code"]))
        ids += rng.choice([words, [rng.randrange(600)]])
    for token in ids:
        assert not stream(token)
    stream.finish()
    assert "".join(pieces) == stream.text == tokenizer.decode(ids, skip_special_tokens=True)


# ------------------------------------------------------------------------------------ The script


def run(*arguments, stdin=None, cwd=ROOT, **environment):
    environment = {key: str(value) for key, value in environment.items()}
    given = dict(input=stdin) if stdin is not None else dict(stdin=subprocess.DEVNULL)
    return subprocess.run(
        # float32: on a GPU, too, texts must not depend on what runs beside them
        [sys.executable, str(ROOT / "generate.py"), "--dtype", "float32", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        # passive: others may need the processor
        env={**os.environ, "OMP_WAIT_POLICY": "passive", **environment},
        **given,
    )


def test_works_at_once_with_the_shipped_model(tmp_path):
    done = run("--max-new-tokens", "60", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("tokens/s", "compression", "1 of 1 right"):
        assert words in done.stderr
    dense = run("--max-new-tokens", "60", "--dense", cwd=tmp_path)
    assert "compression 1.00x" in dense.stderr


def test_same_seed_same_text_and_several_chains(tmp_path):
    arguments = ("-n", "3", "--temperature", "1.5", "--max-new-tokens", "20", "--seed")
    first = run(*arguments, "7", cwd=tmp_path)
    second = run(*arguments, "7", cwd=tmp_path)
    other = run(*arguments, "8", cwd=tmp_path)
    assert first.returncode == second.returncode == other.returncode == 0, first.stderr
    assert first.stdout == second.stdout != other.stdout
    assert first.stdout.count("\n[") >= 2


def test_show_evictions(tmp_path):
    shown = run("--show-evictions", "--max-new-tokens", "60", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "[10]" in shown.stdout
    assert "[0]" in shown.stdout or "[1]" in shown.stdout
    page = run("--show-evictions", "page.html", "--max-new-tokens", "6", cwd=tmp_path)
    assert page.returncode == 0, page.stderr
    assert "[10]" not in page.stdout
    assert "<span> code</span>" in (tmp_path / "page.html").read_text(encoding="utf-8")


CONVERSATION = [
    "The code of ann is 31. Give the codes of ann.",
    "The code of tom is 52. Give the codes of tom, ann.",
    "The @ANSWER@ crosses the road. Give the codes of tom.",
]
CHAT = ("--device", "cpu", "--chat", "--temperature", "0", "--max-new-tokens", "40")


def test_chat_remembers_earlier_turns(tmp_path):
    """To the letter by the teacher. The shipped retrofit, which has seen no conversations, says in
    the third turn more than it was asked for."""
    answers = ["ann is 31.", "tom is 52, ann is 31.", "tom is 52."]
    said = []
    for model in (["--model", str(ROOT / "toy" / "teacher")], []):
        done = run(*CHAT, *model, cwd=tmp_path, stdin="\n".join(CONVERSATION) + "\n")
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.splitlines())
    assert said[0] == answers
    assert said[1][:2] == answers[:2] and said[1][2].startswith("tom is 52")


def shell(command, folder, **environment):
    """Run a shell's command line, in which generate.py is $RUN."""
    command = f"set -o pipefail; {command}"
    return subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        cwd=folder,
        env={
            **os.environ,
            "OMP_WAIT_POLICY": "passive",
            "STRICT": "env PYTHONIOENCODING=utf-8:strict",
            "RUN": f"{sys.executable} {ROOT / 'generate.py'} --device cpu --max-new-tokens 8",
            **environment,
        },
    )


@pytest.mark.parametrize(
    "command, code, message",
    [
        ("$RUN --help | true", None, b""),
        ("$RUN | true", 2, b""),
        ("$RUN >&-", 0, b"tokens/s"),
        ("$RUN > /dev/full", 2, b"No space left"),
        ("$RUN --prompt - <&-", 2, b"prompt is empty"),
        ("$RUN --chat <&-", 0, b""),
        (r"printf '\xff\xfe' | $STRICT $RUN --prompt -", 2, b"standard input is not text"),
        (r"printf '\xff\xfe\n' | $STRICT $RUN --chat", 2, b"standard input is not text"),
        ("$RUN --out out.jsonl --requests in.jsonl", 2, b"in.jsonl: not readable"),
        ("touch a; echo '{\"prompt\": \"x\"}' > in; $RUN --requests in --out a/b", 2, b"a"),
    ],
)
def test_an_odd_shell_gets_no_traceback(command, code, message, tmp_path):
    done = shell(command, tmp_path)
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr, done.stderr
    assert code is None or done.returncode == code, done.stderr
    assert message in done.stderr


def test_a_console_that_lacks_a_character_gets_its_number(tmp_path):
    command = "import checkpoint; checkpoint.run_script(lambda: print('a \\u2603'))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    out = subprocess.check_output([sys.executable, "-c", command], cwd=ROOT, env=environment)
    assert out == b"a \\u2603\n"


@pytest.mark.parametrize(
    "options, message",
    [
        ("--temperature nan", "temperature = nan"),
        ("--temperature inf", "temperature = inf"),
        ("--temperature -1", "temperature = -1"),
        ("--top-p 1.5", "top_p = 1.5"),
        ("--top-k -1", "top_k = -1"),
        ("--min-p nan", "min_p = nan"),
        ("--memory inf", "memory = inf"),
        ("--memory -1", "memory = -1"),
        ("--memory 0", "memory = 0"),
        ("--seed 99999999999999999999999", "seed = 9999"),
        ("-n 1000000000", "n = 1000000000"),
        ("--batch 0", "batch = 0"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        script.parse(options.split())


def test_the_smallest_temperature_is_greedy():
    logits = torch.randn(5, 30)
    assert torch.equal(sample(logits, torch.rand(5), temperature=1e-300), logits.argmax(-1))


@pytest.mark.parametrize(
    "stated, message",
    [
        ({"temperature": "hot"}, "temperature = 'hot'"),
        ({"top_k": [1]}, r"top_k = \[1\]"),
        ({"top_p": math.nan}, "top_p = nan"),
        ({"min_p": -1}, "min_p = -1"),
    ],
)
def test_generation_config_is_checked(stated, message, tmp_path):
    folder = shutil.copytree(TEACHER, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(stated))
    with pytest.raises(InputError, match=f"generation_config.json: {message}"):
        script.Session(script.parse(["--model", str(folder), "--prompt", "x"]))


@pytest.mark.parametrize(
    "environment", [{"RANK": "x"}, {"RANK": "1"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "-1"}]
)
def test_an_odd_rank_is_refused(environment, tmp_path):
    write_requests(tmp_path, 2)
    done = run("--requests", "in.jsonl", "--out", "out.jsonl", cwd=tmp_path, **environment)
    assert done.returncode == 2 and "RANK" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def test_two_processes_do_not_write_to_one_file(tmp_path):
    write_requests(tmp_path, 2)
    arguments = ("--requests", "in.jsonl", "--out", "out.jsonl", "--max-new-tokens", "3")
    with locked(tmp_path / "out.jsonl"):
        done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and "another process writes there" in done.stderr
    assert not (tmp_path / "out.jsonl").exists()
    assert run(*arguments, cwd=tmp_path).returncode == 0
    assert len(answers_in(tmp_path / "out.jsonl")) == 2


def test_a_chat_turn_equals_the_whole_conversation_at_once(monkeypatch):
    session = script.Session(script.parse([*CHAT, "--model", str(script.SHIPPED)]))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(CONVERSATION)))
    model = session.model
    hidden = model.hidden
    fed = []

    def spy(ids, *rest):
        fed.extend(ids[0].tolist())
        return hidden(ids, *rest)

    model.hidden = spy
    script.chat(session)
    model.hidden = hidden
    expected = KVCache(model.config, 1)
    model(torch.tensor([fed]), cache=expected)
    assert torch.equal(expected.rows.length, session.cache.rows.length)
    next_token = torch.tensor([[5]])
    logits = [model(next_token, cache=cache) for cache in (session.cache, expected)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    text = session.tokenizer.decode(fed)
    assert text.count("<|im_start|>user") == 3
    assert text.count("<|im_end|>") == 5
    for turn in CONVERSATION:
        assert text.count(f"<|im_start|>user\n{turn}<|im_end|>\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", "river " * 2000], "context is 1024"),
        (["--model", "/no/such/folder"], "no such folder"),
        (["--max-new-tokens", "0"], "max_new_tokens = 0 is not"),
        (["--chat", "-n", "2"], "--chat reads its turns"),
        (["--top-p", "0"], "top_p = 0.0 is not"),
        (["--device", "gpu"], "--device gpu: cannot be used"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    "ids, new_tokens, message",
    [
        ([67], 0, "token id 67"),
        ([-1], 0, "id -1"),
        ([], 0, "empty"),
        ([1], 512, "context"),
    ],
)
def test_tokens_that_the_model_cannot_take_are_refused(ids, new_tokens, message):
    config = small_model(0).config
    check_ids(config, [0, 66])
    check_ids(config, [1], 511)
    with pytest.raises(InputError, match=message):
        check_ids(config, ids, new_tokens)


def test_end_tokens_come_from_generation_config():
    settings = json.loads((TEACHER / "generation_config.json").read_text())
    session = script.Session(script.parse(["--model", str(TEACHER), "--prompt", "x"]))
    assert set(settings["eos_token_id"]) <= session.end_ids


def write_requests(folder, count, **more):
    rng = random.Random(5)
    made = [tasks.make_problem(rng.choice(tasks.TASKS), rng, "test") for _ in range(count)]
    lines = [{"prompt": p.prompt, "id": f"p{i}", **more} for i, p in enumerate(made)]
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return made


def answers_in(file):
    """{line: row} of an answer file, in which each line is answered once."""
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    answers = {row["generated"]["line"]: row for row in rows}
    assert len(answers) == len(rows)
    return answers


def test_requests(tmp_path):
    """Side by side, in too little memory, interrupted and continued, and split in two: always the
    same answers."""
    made = write_requests(tmp_path, 12)
    out = tmp_path / "out.jsonl"
    small = tmp_path / "small.jsonl"
    arguments = ["--requests", str(tmp_path / "in.jsonl"), "--temperature", "0"]
    arguments += ["--max-new-tokens", "250", "--out"]
    done = run(*arguments, str(out), cwd=tmp_path)
    assert done.returncode == 0 and "tokens/s" in done.stderr, done.stderr
    whole = answers_in(out)
    assert sorted(whole) == list(range(1, 13))
    assert all(row["id"] == f"p{line - 1}" for line, row in whole.items())
    texts = {line: row["generated"]["texts"][0] for line, row in whole.items()}
    right = [tasks.is_correct(p, texts[line]) for line, p in enumerate(made, 1)]
    assert sum(right) >= 10

    # another batch, and a cache that holds about two of them; the first half of an earlier run is
    # there, cut in a line
    lines = out.read_text().splitlines(keepends=True)
    small.write_text("".join(lines[:5]) + lines[5][:40])
    little = ("--batch", "5", "--memory", "0.0009")
    done = run(*arguments, str(small), *little, cwd=tmp_path)
    assert done.returncode == 0 and "7/7" in done.stderr, done.stderr
    assert answers_in(small) == whole

    halves = {}
    for rank in range(2):
        split = str(tmp_path / "split.jsonl")
        done = run(*arguments, split, cwd=tmp_path, RANK=rank, WORLD_SIZE=2)
        assert done.returncode == 0, done.stderr
        halves |= answers_in(tmp_path / f"split.{rank}-of-2.jsonl")
    assert halves == whole


def test_chains_vote_and_what_does_not_fit_is_asked_again_with_more_memory(tmp_path):
    write_requests(tmp_path, 2, max_new_tokens=100)
    out = tmp_path / "out.jsonl"
    arguments = ("--requests", str(tmp_path / "in.jsonl"), "--out", str(out), "-n", "3")
    done = run(*arguments, "--memory", "0.0001", cwd=tmp_path)
    assert done.returncode == 2
    assert "2 requests are not answered" in done.stderr
    assert "line 1: the cache is full" in done.stderr
    assert out.read_text() == ""
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = answers_in(out)
    assert sorted(rows) == [1, 2]
    for row in rows.values():
        said = row["generated"]
        assert len(said["texts"]) == 3
        assert 1 <= said["votes"] <= 3
        assert said["answer"]
        same = [script.final_answer(text) == said["answer"] for text in said["texts"]]
        assert sum(same) == said["votes"]


@pytest.mark.parametrize(
    "lines, message",
    [
        ('{"text": "x"}\n', "line 1 needs"),
        ("[1]\n", "line 1 is not a JSON"),
        ('{"prompt": "x", "max_new_tokens": 0}\n', "line 1: max_new_tokens = 0 is not"),
        ('{"prompt": "x"}\n\n{"prompt": "' + "river " * 2000 + '"}\n', "line 3: 2"),
        ('{"prompt": "x"}\n{"messages": ["y"]}\n', "line 2: a message is an object"),
        ('{"prompt": "x"}\n{"prompt": "x", "generated": 1}\n', 'line 2: "generated" is the key'),
    ],
)
def test_bad_requests_are_refused_before_any_work(lines, message, tmp_path):
    (tmp_path / "in.jsonl").write_text(lines)
    done = run("--requests", "in.jsonl", "--out", "out.jsonl", cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


ANSWER = '{"generated": {"line": 1, "texts": ["y"]}, "prompt": "x"}\n'


@pytest.mark.parametrize(
    "content",
    [
        '{"prompt": "x"}\n',  # the requests themselves
        '{"prompt": "x"}',
        ANSWER.replace('"x"', '"y"'),  # of another request
        ANSWER.replace("1", "2"),
        '{"prompt": "x", "generated": {"line": 1}}\n',
        ANSWER + "notes",
        ANSWER.replace('"x"', '"y"').strip(),  # but for its line's end
        ANSWER + "\n",
        "notes",
        "\n",
    ],
)
def test_a_file_of_other_content_is_never_written_to(content, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    for name in ("out.jsonl", "elsewhere.jsonl"):
        (tmp_path / name).write_text(content)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    for name in ("out.jsonl", "link.jsonl"):
        done = run("--requests", "in.jsonl", "--out", name, cwd=tmp_path)
        assert done.returncode == 2
        assert "holds something else" in done.stderr
        assert done.stderr.count("\n") == 1
        assert (tmp_path / name).read_text() == content
    assert (tmp_path / "link.jsonl").is_symlink()


@pytest.mark.parametrize("left", [ANSWER.strip(), ANSWER[:-3], ANSWER[:40], ANSWER[:5], "{", ""])
def test_a_row_that_was_cut_is_made_again(left, tmp_path):
    """Also one that is whole but for its line's end, or that ends with a bracket by chance."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "out.jsonl").write_text(left)
    done = run("--requests", "in.jsonl", "--out", "out.jsonl", "--max-new-tokens", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    row = answers_in(tmp_path / "out.jsonl")[1]
    assert row["generated"]["texts"] != ["y"] and row["prompt"] == "x"


def test_requests_as_their_own_answers_are_refused(tmp_path):
    write_requests(tmp_path, 2)
    before = (tmp_path / "in.jsonl").read_text()
    done = run("--requests", "in.jsonl", "--out", "in.jsonl", cwd=tmp_path)
    assert done.returncode == 2 and "holds something else" in done.stderr
    assert (tmp_path / "in.jsonl").read_text() == before
    assert run("--requests", "in.jsonl", "--out", "/dev/null", cwd=tmp_path).returncode == 2
    assert not Path("/dev/null").is_file()


def test_keys_of_a_request_stay_what_they_are(tmp_path):
    """Whatever their names are, and NaN; a second run finds them answered."""
    request = {"prompt": "x", "answer": "42", "texts": 1, "votes": None, "line": 7, "score": math.nan}
    (tmp_path / "in.jsonl").write_text("\n" + json.dumps(request) + "\n")
    arguments = ("--requests", "in.jsonl", "--out", "sub/out.jsonl", "--max-new-tokens", "3")
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "sub" / "out.jsonl").read_text()
    row = json.loads(text)
    said = row.pop("generated")
    assert json.dumps(row) == json.dumps(request)
    assert said["line"] == 2  # of the file
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sub" / "out.jsonl").read_text() == text
    (tmp_path / "in.jsonl").write_text('{"prompt": "x", "generated": 1}\n')
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2


@pytest.mark.parametrize(
    "text, answer",
    [
        ("so \\boxed{12} and \\boxed{7}.", "7"),
        ("it is 1,234.5.", "1234.5"),
        ("yes\nno\n", "no"),
        ("", None),
        ("a -3 b", "-3"),
    ],
)
def test_final_answer(text, answer):
    assert script.final_answer(text) == answer
