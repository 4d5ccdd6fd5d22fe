"""experiments/delay.py and recipes.py: what is refused, and what is measured of a model."""

from types import SimpleNamespace

import pytest
from conftest import REPOSITORY


@pytest.fixture(scope="module")
def scripts():
    """They import from their own folder, as scripts do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "experiments")
        import delay
        import recipes

        yield delay, recipes


def test_windows_without_room_are_refused(scripts):
    """64 by the length of a row, 62 by the texts' own."""
    delay, _ = scripts
    assert all(delay.why_refused(window, 500, 0) is None for window in (0, 4, 16, 32, 48))
    assert "window" in delay.why_refused(64, 500, 0)
    assert "window" in delay.why_refused(62, 500, 0)


def test_a_refused_window_is_a_row(scripts, tmp_path):
    delay, _ = scripts
    arguments = SimpleNamespace(out=tmp_path / "delay.json", fresh=False)
    results = delay.shared.Results(arguments)
    for _ in range(2):
        delay.add_point(results, "window", 64, 500, 0, 1)
    [row] = results.data["rows"]
    assert "impossible" in row["refused"]


def test_measuring(scripts):
    """A window over everything is the dense model; one of 40 holds 40 pairs of each head."""
    delay, _ = scripts
    shared = delay.shared
    teacher, tokenizer = shared.load(shared.TEACHER)
    dense = shared.measure(teacher, tokenizer, 1, kl_rows=1)
    whole = shared.sliding_window(shared.load_model(shared.TEACHER), 1000)
    everything = shared.measure(whole, tokenizer, 1, kl_rows=1)
    assert dense["compression"] == everything["compression"] == 1
    assert abs(dense["kl"]) < 1e-4 and abs(everything["kl"]) < 1e-4
    assert {**dense, "kl": 0} == {**everything, "kl": 0}
    assert dense["needles"] == dense["variables"] == 1
    short = shared.measure(
        shared.sliding_window(shared.load_model(shared.TEACHER), 40), tokenizer, 1, kl_rows=1
    )
    fed = short["compression"] * 40 * 3  # to three sequences, with answers to 256 tokens
    assert fed == pytest.approx(round(fed)) and 3 * 270 < fed < 3 * 736
    assert short["kl"] > 0.1 and short["needles"] == 0
    assert short["reads"] < dense["reads"] / 5


def test_recipes_are_what_they_say(scripts):
    """retrofit.py takes each, and each differs from the usual one in what its name says."""
    delay, recipes = scripts
    from retrofit import check, parse

    usual = parse([])
    names = {}
    for recipe in recipes.NAMES:
        flags = recipes.flags_of(recipe, 200)
        options = parse([*flags, "--out", str(delay.shared.RETROFITS / "nowhere")])
        check(options)
        different = {k for k, v in vars(options).items() if v != getattr(usual, k)} - {"out"}
        names[recipe] = different
    assert names == {
        "usual": set(),
        "frozen": {"train"},
        "neuron": {"decision", "fade_steps"},
        "neuron-unfaded": {"decision"},
        "reverse-kl": {"reverse_kl"},
        "shift-0": {"shift"},
        "per-layer": {"per"},
        "paper": {"decision", "fade_steps", "shift"},
        "nvidia": {"train", "reverse_kl"},
    }
