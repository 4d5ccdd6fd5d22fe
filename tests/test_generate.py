"""Sampling, stopping, streaming, and the script as a user runs it."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import small_model

import generate as script
from dms import DMSConfig, InputError
from kv_cache import KVCache
from model import generate, load_tokenizer, sample

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments, stdin=None, cwd=ROOT):
    return subprocess.run([sys.executable, str(ROOT / "generate.py"), *arguments], capture_output=True, text=True,
                          input=stdin, stdin=subprocess.DEVNULL if stdin is None else None, cwd=cwd)


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
    generator = torch.Generator().manual_seed(0)
    settings = {"temperature": 1.0, **settings}
    drawn = sample(logits.expand(draws, -1), generator=generator, **settings)
    counts = torch.bincount(drawn, minlength=12).float()
    assert counts[expected == 0].sum() == 0
    inside = expected > 0
    chi2 = ((counts - draws * expected)[inside].square() / (draws * expected)[inside]).sum().item()
    freedom = int(inside.sum()) - 1
    assert chi2 < freedom + 5 * (2 * max(freedom, 1)) ** 0.5  # far beyond the 99.9th percentile


def test_temperature_zero_is_greedy():
    logits = torch.randn(5, 30)
    assert torch.equal(sample(logits), logits.argmax(-1))


@pytest.mark.parametrize("release", [False, True])
def test_a_batch_of_prompts_gives_what_each_gives_alone(release):
    model = small_model(4, DMSConfig(window=3), 0.5)
    prompts = [torch.randint(0, 67, (n,)).tolist() for n in (1, 7, 40)]

    def tokens(prompts):
        out = [[] for _ in prompts]
        cache = KVCache(model.config, len(prompts))
        for drawn in generate(model, cache, prompts, 25, end_ids={3, 5, 8}, release=release):
            for chain, token in drawn:
                out[chain].append(token)
        return out, cache

    together, cache = tokens(prompts)
    assert together == [tokens([p])[0][0] for p in prompts]
    assert all(len(t) == 25 or t[-1] in {3, 5, 8} for t in together)
    if release:
        assert cache.stats()["pages"] == 0
    else:
        assert cache.seen.tolist() == [len(p) + len(t) - 1 for p, t in zip(prompts, together)]


def test_chains_fork_one_prompt():
    model = small_model(4, DMSConfig(window=3), 0.5)
    cache = KVCache(model.config, 1)
    prompt = torch.randint(0, 67, (50,)).tolist()
    out = [[] for _ in range(4)]
    generator = torch.Generator().manual_seed(0)
    for drawn in generate(model, cache, [prompt], 12, chains=4, choose=lambda x: sample(x, 1.0, generator=generator)):
        for chain, token in drawn:
            out[chain].append(token)
    assert cache.seen.tolist() == [61] * 4 and len({tuple(o) for o in out}) > 1
    for row, chain in enumerate(out):  # what the forked cache holds is what feeding the chain from the start gives
        expected = model(torch.tensor([prompt + chain]))[0, -1]
        step = torch.tensor([[c[-1]] for c in out])
        if row == 0:
            logits = model(step, cache=cache)
        torch.testing.assert_close(logits[row, 0], expected, atol=1e-4, rtol=1e-4)


def test_stream_holds_back_half_characters_and_half_stop_strings():
    tokenizer = load_tokenizer(ROOT / "toy" / "teacher")
    ids = tokenizer.encode("naïve ☃ snow STOP never", add_special_tokens=False)
    stream = script.Stream(tokenizer, ["STOP"])
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) == "naïve ☃ snow " and stream.stopped
    assert not any("\ufffd" in p or "S" in p for p in pieces)
    stream = script.Stream(tokenizer, ["STOP"])
    assert "".join([stream.push(i) for i in tokenizer.encode("a ST")] + [stream.finish()]) == "a ST"


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


def test_a_chat_turn_equals_the_whole_conversation_at_once():
    args = script.parse(["--chat", "--temperature", "0", "--max-new-tokens", "40"])
    args.temperature_given = 0.0
    session = script.Session(args)
    turns = ["The code of ann is 31. Give the codes of ann.", "The code of tom is 52. Give the codes of tom, ann."]
    lines = iter(turns)
    original, script.prompt_line = script.prompt_line, lambda mark: next(lines, None)
    fed = []
    model, forward = session.model, session.model.forward

    def spy(ids, cache=None, **rest):
        fed.extend(ids[0].tolist())
        return forward(ids, cache=cache, **rest)

    model.forward = spy
    try:
        script.chat(session)
    finally:
        script.prompt_line = original
    del model.forward
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
    args.temperature_given = None
    assert set(settings["eos_token_id"]) <= script.Session(args).ends
