"""Paging: bounds are bounds, what is chosen is what is attended to and counted, a file's pages are
what was written."""

import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import shared  # noqa: E402
import paging  # noqa: E402
import paging_file  # noqa: E402
import stepwise  # noqa: E402
from quest import QuestCache, bounds, choose  # noqa: E402

from toy import tasks  # noqa: E402


def some_problems():
    return [tasks.make_problem(task, random.Random(task), "test", 110) for task in tasks.TASKS]


def test_bounds():
    torch.manual_seed(0)
    keys = torch.randn(2, 3, 5, 4, 8)  # (B, Hkv, P, page_size, D)
    q = torch.randn(2, 3, 2, 8)
    score = torch.einsum("bhgd,bhpsd->bhgps", q, keys)
    bound = bounds(q, keys.amin(3), keys.amax(3))
    assert (bound >= score.amax((2, 4)) - 1e-5).all()
    single = keys[:, :, :, :1]  # of pages of one pair the bound is the score
    assert torch.allclose(
        bounds(q, single[:, :, :, 0], single[:, :, :, 0]), score[..., 0].amax(2), atol=1e-5
    )
    chosen = choose(bound, 3)
    assert (chosen == 4).any(-1).all() and chosen.shape == (2, 3, 3)


def test_with_room_for_all_pages_answers_are_the_engine_s():
    model, tokenizer = shared.load(shared.TEACHER)
    some = some_problems()
    theirs, cache = shared.answer(model, tokenizer, some, max_new_tokens=30)
    quest = QuestCache(model.config, len(some), 8, budget=10_000)
    assert stepwise.answer(model, tokenizer, some, quest, 30) == [text for (text,) in theirs]
    # every step of an answer reads every pair before it
    heads = cache.layers * cache.kv_heads
    args = type("Args", (), dict(problems=3, batch=2, seed=0))
    dense = paging.measure_engine(shared.TEACHER, "needles", args)
    all_pages = paging.measure_quest("needles", 8, 10_000, False, args)
    assert dense["accuracy"] == all_pages["accuracy"]
    assert dense["pairs_read"] == pytest.approx(all_pages["pairs_read"])
    assert quest.pairs < quest.bounds * 8 and quest.bounds % heads == 0


def test_only_chosen_pages_are_read():
    """Beside attention over the chosen pairs, chosen here."""
    model, _ = shared.load(shared.TEACHER)
    config = model.config
    torch.manual_seed(0)
    page_size, budget, T = 4, 10, 30
    cache = QuestCache(config, 1, page_size, budget)
    cache.active = cache.answering = torch.ones(1, dtype=torch.bool)
    k, v = torch.randn(2, 1, 4, T, 32)
    q = torch.randn(1, 8, T, 32)
    cache(0, q[:, :, :-1], k[:, :, :-1], v[:, :, :-1], None)
    y = cache(0, q[:, :, -1:], k[:, :, -1:], v[:, :, -1:], None)
    for head in range(4):
        pages = [k[0, head, i : i + page_size] for i in range(0, T, page_size)]
        of_group = q[0, 2 * head : 2 * head + 2, -1]
        score = [
            max(torch.maximum(x * p.amin(0), x * p.amax(0)).sum() for x in of_group) for p in pages
        ]
        best = sorted(range(7), key=lambda i: -score[i])[:2] + [7]  # the newest, of 2 pairs
        held = [i for i in range(T) if i // page_size in best]
        for g in range(2):
            weight = (k[0, head, held] @ of_group[g] / math.sqrt(32)).softmax(0)
            assert torch.allclose(weight @ v[0, head, held], y[0, 2 * head + g, 0], atol=1e-5)
    assert (cache.pairs, cache.bounds, cache.steps) == (4 * 10, 4 * 8, 1)
    assert cache.fetched == 4 * 3 * page_size


def test_pages_of_a_file(tmp_path):
    slow = paging_file.SlowPages(tmp_path / "pairs", 2, 256, 16, torch.float32)
    chosen = torch.randint(16, (8, 3))
    slow.drop()
    for layer in range(2):
        keys, values = slow.fetch(layer, chosen)
        of_layer = slow.pages[layer].view(8, 16, 2, 16, 128)
        for head in range(8):
            for i, page in enumerate(chosen[head].tolist()):
                assert torch.equal(keys[3 * head + i], of_layer[head, page, 0])
                assert torch.equal(values[3 * head + i], of_layer[head, page, 1])
                least = slow.least[layer][head, page]
                assert torch.equal(keys[3 * head + i].amin(0), least)
    assert slow.pages.nbytes == (tmp_path / "pairs").stat().st_size == 2 * 8 * 256 * 2 * 128 * 4


def test_lengths_are_those_of_the_compression():
    length = paging_file.uneven_lengths(28, 8192, 8)
    assert float(length.float().mean()) == pytest.approx(1024, rel=0.01)
    assert int(length.max()) <= 8192 and int(length.max()) > 4 * 1024


def test_the_command(tmp_path, monkeypatch):
    out = tmp_path / "paging.json"
    sizes = "--tasks needles --problems 1 --page-sizes 8 --contexts 256 --layers 1 --steps 1"
    argv = ["paging.py", *sizes.split(), "--file", str(tmp_path / "pairs"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    paging.main()
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 4 + 3
    for row in rows[:4]:
        if row.get("counted") == "pairs":
            [dms] = [r for r in rows if r["method"] == "DMS" and r.get("task") == row["task"]]
            assert dms["pairs_read"] - 8 < row["pairs_read"] < dms["pairs_read"] + 8
    for row in rows[5:]:
        assert row["bytes_fetched"] == row["bytes_in_file"] / 8
    assert not (tmp_path / "pairs").exists()
