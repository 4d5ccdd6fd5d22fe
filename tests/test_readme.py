"""The README's map from equations to lines points where it says."""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_equations_are_where_the_readme_says():
    entries = re.findall(r"`([\w/]+\.py):(\d+)` `([^`]+)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(entries) >= 10
    for file, line, code in entries:
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        assert code in lines[int(line) - 1], f"README: {file}:{line} does not hold {code!r}"
