"""The README's table of equations names the code that computes them."""
import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROW = re.compile(r"\| .+ \| `([\w/]+\.py)` `([\w.]+)`: `(.+)` \|")


def definitions(source):
    """{name, or Class.method: its source lines} of a file's functions and classes."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.setdefault(node.name, ast.get_source_segment(source, node))
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    name = f"{node.name}.{method.name}"
                    found[name] = ast.get_source_segment(source, method)
    return found


def test_equations_are_where_the_readme_says():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("\n| equation | ")[1].split("\n\n")[0]
    rows = table.splitlines()[2:]  # below the header and its rule
    assert len(rows) >= 10
    for row in rows:
        named = ROW.fullmatch(row)
        assert named, f"README: not of the form | ... | `FILE` `SYMBOL`: `CODE` |: {row}"
        file, symbol, code = named.groups()
        code = code.replace("\\|", "|")  # within a table a bar is escaped
        found = definitions((ROOT / file).read_text(encoding="utf-8"))
        assert symbol in found, f"README: {file} does not define {symbol}"
        assert code in found[symbol], f"README: {file} {symbol} does not hold {code!r}"
