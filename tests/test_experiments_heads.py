"""Kinds of token are told rightly, and what is counted as kept is what the cache holds."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import heads  # noqa: E402
import plots_heads  # noqa: E402
from shared import load  # noqa: E402

from kv_cache import KVCache  # noqa: E402
from toy import tasks  # noqa: E402

SHIPPED = ROOT / "toy" / "retrofitted"


@pytest.mark.parametrize("task", tasks.TASKS)
def test_kinds(task, monkeypatch):
    tokenizer = load(SHIPPED)[1]
    said = []
    filler = tasks.filler
    monkeypatch.setattr(tasks, "filler", lambda rng: said.append(filler(rng)) or said[-1])
    problem = tasks.make_problem(task, random.Random(0), "test")
    ids, kinds = heads.kinds_of(problem, tokenizer)
    assert ids == tokenizer.encode(tasks.messages(problem))
    texts = [tokenizer.decode([token]) for token in ids]

    def text_of(place):
        chosen = [text for text, kind in zip(texts, kinds) if kind.startswith(place)]
        return "".join(chosen).split()

    assert sorted(text_of("filler")) == sorted(" ".join(said).split())
    assert text_of("answer") == problem.answer.split()
    assert text_of("question") == problem.prompt.split(". ")[-1].split()
    assert (
        text_of("template")
        == "<|im_start|>user <|im_end|> <|im_start|>assistant <|im_end|>".split()
    )
    words = {"digit": str.isdigit, "name": heads.NAMES.__contains__, "word": str.isalpha}
    for text, kind in zip(texts, kinds):
        place, _, what = kind.partition(": ")
        assert what not in words or words[what](text.strip())
        assert place != "filler" or what in ("word", "mark")


def test_what_is_kept():
    """Among the tokens that have left the window: together as many as the cache counts."""
    model, _ = load(SHIPPED)
    cache = KVCache(model.config, 1)
    counts = heads.Counts(cache)
    ids = torch.randint(600, (1, 60))
    model(ids, cache=cache)
    kinds = ["even", "odd"] * 30
    counts.add(cache, kinds)
    left = 60 - cache.window - 1
    assert counts.tokens == {"even": -(-left // 2), "odd": left // 2}
    held = sum(row["tokens"] * torch.tensor(row["kept_by_head"]) for row in counts.rows())
    pairs = torch.tensor(cache.stats()["pairs_per_head"]) - cache.window - 1
    assert torch.allclose(held, pairs.float(), atol=1e-3)


def test_the_command(tmp_path, monkeypatch, capsys):
    out = tmp_path / "heads.json"
    argv = "heads.py --problems 1 --every 200 --out".split() + [str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    heads.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["what"] for row in rows] == ["kept", "lengths"] * 3
    for row in rows[1::2]:
        last = row["pairs_by_head"][-1]
        assert row["tokens"][-1] >= row["prompt_tokens"]
        # far less is held than was fed, and no head holds less than the window
        assert 17 * 16 <= sum(map(sum, last)) < 16 * row["tokens"][-1] / 3
    plots_heads.draw(rows, tmp_path / "heads.png")
    assert (tmp_path / "heads.png").stat().st_size > 10_000
    heads.main()  # nothing is done again
    assert json.loads(out.read_text())["rows"] == rows
