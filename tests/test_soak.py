"""A short piece of soak.py; `python tests/soak.py --seconds 600` is the long one."""
import pytest
from soak import live


@pytest.mark.parametrize("seed", range(1000, 1012))
def test_a_random_life_of_a_cache(seed):
    counts = live(seed)
    assert counts["rows compared"] > 0
