"""experiments/accuracy.py and presses.py: what they count is what the methods hold."""

import json
import sys

import pytest
from conftest import REPOSITORY

pytest.importorskip("kvpress")
sys.path.insert(0, str(REPOSITORY / "experiments"))

import accuracy  # noqa: E402
import shared  # noqa: E402
import presses  # noqa: E402

TOKENIZER = shared.load_tokenizer(shared.TEACHER)


def make_exam(task, count=2, level="easy"):
    return accuracy.make_exam(TOKENIZER, level, 0, task, count)


@pytest.mark.parametrize("name", ["KeyDiff", "SnapKV", "ObservedAttention", "KVzip"])
def test_a_press_that_keeps_all_gives_the_dense_models_answers(name):
    exam = make_exam("needles", 3)
    expected, dense = accuracy.by_engine(TOKENIZER, exam, shared.TEACHER)
    texts, counts = accuracy.by_press(TOKENIZER, exam, name, 1000, False)
    assert texts == expected
    assert counts == pytest.approx(dense)


@pytest.mark.parametrize("name", ["KeyDiff", "ExpectedAttention", "KVzip"])
def test_a_press_holds_its_budget_and_the_answer(name):
    exam = make_exam("variables")
    texts, counts = accuracy.by_press(TOKENIZER, exam, name, 40, False)
    fed = [len(TOKENIZER.encode(text)) for text in texts]  # but the end token is not fed
    assert counts["prompt_pairs"] == pytest.approx(40, abs=1)
    assert counts["peak_pairs"] == pytest.approx(counts["prompt_pairs"] + sum(fed) / len(fed))
    assert (counts["stored_pairs"] > 400) == (name == "KVzip")


def test_bounded_answers_stay_within_the_budget_and_an_interval():
    exam = make_exam("arithmetic", 1)
    _, counts = accuracy.by_press(TOKENIZER, exam, "KeyDiff", 40, True)
    assert counts["prompt_pairs"] == 40
    assert counts["peak_pairs"] == 40 + presses.INTERVAL


def test_a_window_holds_what_it_claims_and_dense_holds_all():
    exam = make_exam("needles")
    _, window = accuracy.by_engine(TOKENIZER, exam, shared.TEACHER, 30)
    assert window == {"prompt_pairs": 30, "peak_pairs": 30, "stored_pairs": 30}
    _, dense = accuracy.by_engine(TOKENIZER, exam, shared.TEACHER)
    tokens = [len(presses.prompt_ids(TOKENIZER, problem)) for problem in exam.problems]
    assert dense["prompt_pairs"] == sum(tokens) / len(tokens)


def test_the_command_writes_each_row_once_and_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shared, "retrofitted", lambda *flags: shared.ROOT / "toy" / "retrofitted")
    monkeypatch.setattr(presses, "PRESSES", {"Knorm": presses.PRESSES["Knorm"]})
    monkeypatch.setattr(presses, "BOUNDED", ["Knorm"])
    out = tmp_path / "accuracy.json"
    words = "accuracy.py --problems 2 --seeds 1 --ratios 8 --levels easy --longer --out".split()
    monkeypatch.setattr(sys, "argv", [*words, str(out)])
    accuracy.main()
    rows = json.loads(out.read_text())["rows"]
    methods = ["dense", "DMS", "window", "Knorm", "Knorm, bounded"]
    assert [row["method"] for row in rows] == methods * 3
    dense, dms, window, press, bounded = rows[:5]
    # no press gets less than DMS needed, nor less than the ratio allows
    assert press["prompt_pairs"] >= max(dms["prompt_pairs"], dense["prompt_pairs"] / 8) - 1
    assert bounded["budget"] == window["peak_pairs"] >= dms["peak_pairs"] - 1
    table = capsys.readouterr().out
    assert all(f"\n{method} " in table for method in methods)
    accuracy.main()
    assert json.loads(out.read_text())["rows"] == rows
