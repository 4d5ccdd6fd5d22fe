"""experiments/hyperscaling.py: what W chains take, and the area between frontiers."""

import itertools
import math
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY


@pytest.fixture(scope="module")
def script():
    """It imports from its own folder, as scripts do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "experiments")
        import hyperscaling

        yield hyperscaling


@pytest.mark.parametrize("folder", ["teacher", "retrofitted"])
def test_costs_are_those_of_the_engine(script, folder):
    """What is added up for a group of chains is what the cache counts that runs them alone, ended
    chains giving back their pages."""
    shared = script.shared
    model, tokenizer = shared.load(shared.ROOT / "toy" / folder)
    [problem] = shared.problems("arithmetic", 1, 0, "hard")
    sampling = {"temperature": 2.0}  # so that they end at different times
    chains = script.sample_chains(model, tokenizer, problem, 3, (30, 200), 2.0, "seed")
    ends = (chains.held > 0).sum(1)
    assert len(set(ends.tolist())) > 1
    messages = shared.tasks.messages(problem, False)
    prompt = tokenizer.encode(messages, add_generation_prompt=True)
    for limit, width in [(200, 3), (30, 3), (200, 1)]:
        cache = script.KVCache(model.config, width)
        alone = [script.Sequence(prompt, limit, f"seed {i}") for i in range(width)]
        steps = script.generate(model, cache, alone, {tokenizer.end_id}, sampling)
        assert sum(map(len, steps)) == (chains.held[:width, :limit] > 0).sum()
        stats = cache.stats()
        taken = script.cost(chains, slice(0, width), limit)
        assert taken == {budget: stats[budget] for budget in script.BUDGETS}


def test_votes(script):
    assert script.vote(["3", "4", "3", None], "3") == (1.0, False)
    assert script.vote(["3", "4", "4", "3", None], "3") == (0.5, True)
    assert script.vote(["4", None, None, None], "3") == (0.0, False)
    assert script.vote([None], "3") == (0.0, False)


def test_the_area_between_frontiers(script):
    """Ours has 0.6 from 1 on and 0.8 from 10 on, theirs 0.5 from 1, a worse point at 30, and 0.9 at
    100: over [1, 100] the gain is 0.1 for the first half of the logarithmic axis, 0.3 for the
    second."""

    def points(pairs):
        return [{"reads": cost, "accuracy": accuracy} for cost, accuracy in pairs]

    ours = points([(1, 0.6), (10, 0.8), (1000, 0.7)])
    theirs = points([(1, 0.5), (30, 0.4), (100, 0.9)])
    gain, low, high = script.mean_gain(ours, theirs, "reads")
    assert (low, high) == (1, 100)
    assert gain == pytest.approx(0.2)
    back, _, _ = script.mean_gain(theirs, ours, "reads")
    assert back == pytest.approx(-0.2)
    assert script.mean_gain(ours, points([(2000, 1.0)]), "reads") is None
    assert script.mean_gain(ours, ours, "reads")[0] == 0


def test_jackknife(script):
    """Left out of a mean one at a time, values give the mean's own standard error."""
    values = [1.0, 2.0, 4.0, 9.0]
    without = [(sum(values) - value) / 3 for value in values]
    deviation = script.shared.statistics.stdev(values)
    assert script.jackknife(without) == pytest.approx(deviation / math.sqrt(4))


def test_gains_are_made_anew_from_blocks(script, tmp_path):
    """Half the reads for the same accuracy: dense gains nothing by more chains, and the gain over
    the shared budgets is what two blocks differ in."""
    arguments = SimpleNamespace(out=tmp_path / "hyperscaling.json", fresh=False)
    results = script.shared.Results(arguments)
    for method, block, width in itertools.product(["dense", "DMS 8x"], [0, 1], [1, 4]):
        numbers = dict.fromkeys(script.MEANS, 0.5)
        for budget in script.BUDGETS:
            numbers[budget] = width * (2.0 if method == "dense" else 1.0)
        if method != "dense":
            numbers["accuracy"] = 0.6 + 0.2 * block
        keys = {"method": method, "seed": 0, "block": block, "width": width}
        results.add(part="block", limit=256, **keys, **numbers)
    for _ in range(2):
        script.add_gains(results)
        assert len(results.find(part="block")) == 8
        assert len(results.find(part="point")) == 4
        gains = results.find(part="gain")
        assert len(gains) == 2 * len(script.BUDGETS)
        for row in gains:
            assert (row["low"], row["high"]) == (2, 4)
            assert row["gain"] == pytest.approx(0.2)  # 0.1 and 0.3
            assert row["spread"] == pytest.approx(0.1)
