"""experiments/needles.py: where the fact lies, and what each method holds."""

import random
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY


@pytest.fixture(scope="module")
def script():
    """It imports from its own folder, as scripts do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "experiments")
        import needles

        yield needles


@pytest.mark.parametrize("length", [128, 1000])
def test_the_fact_lies_at_its_depth(script, length):
    for depth in (0.0, 0.5, 1.0):
        problem = script.make_problem(random.Random(f"{length} {depth}"), length, depth)
        [(name, code)] = problem.expected
        before, after = problem.prompt.split(f"The code of {name} is {code}.")
        words = [script.tasks.count_tokens(text) for text in (before, after)]
        assert words[0] / sum(words) == pytest.approx(depth, abs=0.1)
        assert problem.prompt.count("The code of") == script.FACTS
        assert script.tasks.is_correct(problem, problem.answer)
        whole = script.tasks.count_tokens(problem.prompt + problem.answer)
        assert length - 8 < whole + script.tasks.TEMPLATE_TOKENS <= length


def test_a_window_holds_its_budget(script, tmp_path):
    """As long as the text it is the dense model; a short one holds what it says, sees the fact
    right before the question, and not the one before that."""
    arguments = SimpleNamespace(out=tmp_path / "needles.json", fresh=False)
    results = script.shared.Results(arguments)
    given = SimpleNamespace(problems=6, lengths=[128], depths=[0.0, 1.0])
    models = {
        "dense": lambda: script.shared.load(script.shared.TEACHER),
        "all": lambda: script.window_of(300),
        "short": lambda: script.window_of(40),
    }
    for name, model in models.items():
        script.add_depths(results, name, 128, 0, model, given)
    for depth in given.depths:
        [dense], [whole], [short] = [results.find(method=name, depth=depth) for name in models]
        assert whole["accuracy"] == dense["accuracy"] == 1
        assert whole["pairs_of_a_head"] == dense["pairs_of_a_head"] > 100
        assert short["pairs_of_a_head"] == 40
        assert (short["accuracy"] > 0.5) == (depth == 1)
    rows = len(results.data["rows"])
    script.add_depths(results, "short", 128, 0, models["short"], given)
    assert len(results.data["rows"]) == rows == 6
