"""The decoder computes what transformers does: the same logits and greedy tokens. And the house
stands as drawn: imports go one way, and everything runs without kernels/."""

import ast
import itertools
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY, small_model
from oracle import DEFAULT, FAMILIES, LENGTH, LLAMA3, YARN_DEFAULTS, oracle, saved, scaled, tokens

from checkpoint import load_model
from dms import DMSConfig, masked_attention
from generate import Sequence, generate
from kv_cache import PLAIN, KVCache


def same(logits, expected):
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_and_greedy_tokens_equal_transformers(family, tmp_path):
    """At once, cached, token by token, and in ragged chunks."""
    kind, changes = FAMILIES[family]
    theirs, folder = saved(tmp_path, kind, **changes)
    ours = load_model(folder)
    ids = tokens(batch=3)
    expected = theirs(ids).logits
    same(ours(ids), expected)
    same(ours(ids, last_only=True)[:, 0], expected[:, -1])
    cache = KVCache(ours.config, 3, page_size=8, memory=1e6)
    same(torch.cat([ours(ids[:, t : t + 1], cache=cache) for t in range(LENGTH)], dim=1), expected)
    lengths = [LENGTH, 1, 77]
    cache = KVCache(ours.config, 3, chunk=16, memory=1e6)
    logits = ours(ids, cache=cache, lengths=lengths)
    for b, n in enumerate(lengths):
        same(logits[b, :n], expected[b, :n])
    cache.select([0])
    text = [ids[:1]]
    for _ in range(8):
        text.append(logits[:1, -1:].argmax(-1))
        logits = ours(text[-1], cache=cache)
    settings = dict(attention_mask=text[0] + 1 > 0, do_sample=False, eos_token_id=None)
    found = theirs.generate(text[0], max_new_tokens=8, **settings)
    assert torch.equal(torch.cat(text, dim=1), found)


def test_every_kind_of_rope_gives_its_own_logits():
    """With the same weights they differ by far more than the tolerance above."""
    logits = {}
    for name in FAMILIES.keys() - {"qwen2 yarn", "qwen3 yarn mscale alone"}:  # twins of others
        changes = FAMILIES[name][1]
        names = {"rope_parameters", "max_position_embeddings"} & set(changes)
        theirs = oracle(**{name: changes[name] for name in names})
        theirs.load_state_dict(oracle().state_dict())
        logits[str(changes.get("rope_parameters"))] = theirs(tokens()).logits
    assert len(logits) == 9
    assert all((x - y).abs().max() > 0.01 for x, y in itertools.combinations(logits.values(), 2))


@pytest.mark.parametrize("kind, rope", [
    ("llama", dict(rope_type="default", rope_theta=1e4)),
    ("llama", dict(LLAMA3, rope_theta=5e5, factor=32.0, original_max_position_embeddings=8192)),
    ("qwen3", DEFAULT),
    ("qwen3", dict(YARN_DEFAULTS, rope_theta=1e6, original_max_position_embeddings=32768)),
])
@torch.no_grad()
def test_published_frequencies_hold_at_far_positions(kind, rope, tmp_path):
    """Of the sizes in use: float32 rounds off a hundredth of a turn by 100,000 tokens."""
    sizes = dict(num_hidden_layers=1, head_dim=128, max_position_embeddings=131072)
    theirs, folder = saved(tmp_path, kind, **sizes, **scaled(rope))
    ours = load_model(folder)
    assert ours.rope_scale == theirs.model.rotary_emb.attention_scaling
    difference = ours.rope_freq.double() - theirs.model.rotary_emb.inv_freq.double()
    assert (131072 * difference).abs().max() < 1e-4
    states = ours.hidden(tokens(), masked_attention(ours.config), torch.tensor([[100_000]]))
    positions = 100_000 + torch.arange(LENGTH)[None]
    same(ours.lm_head(states), theirs(tokens(), position_ids=positions).logits)


IMPORTS = {  # module: what of ours it may import. Nothing imports upwards, and there are no circles
    "dms": "", "model": "dms", "common": "", "kv_cache": "dms kernels",
    "checkpoint": "common dms model kernels", "data": "common checkpoint",
    "evaluate": "checkpoint common data dms kv_cache", "publish": "checkpoint common evaluate",
    "show": "common", "generate": "checkpoint common kv_cache model show kernels toy",
    "retrofit": "checkpoint common data dms evaluate kernels toy",
}


def test_imports_go_one_way():
    ours = {file.stem for file in REPOSITORY.glob("*.py")} | {"kernels", "toy"}
    files = {REPOSITORY / f"{name}.py": allowed.split() for name, allowed in IMPORTS.items()}
    files |= {file: ["kernels"] for file in (REPOSITORY / "kernels").glob("*.py")}
    for file, allowed in files.items():
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            imported = {name.split(".")[0] for name in names} & ours
            assert imported <= set(allowed), f"{file.name}, line {node.lineno}: {imported}"
            assert getattr(node, "name", "") != "__getattr__", file.name


def test_everything_runs_without_kernels(monkeypatch):
    script = f"import sys; sys.modules['kernels'] = None; import {', '.join(IMPORTS)}"
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True)
    results = []
    model = small_model(0, DMSConfig(window=5))
    for _ in range(2):
        cache = KVCache(model.config, 2, page_size=4)
        sequences = [Sequence(range(n), 30) for n in (3, 20, 40)]
        list(generate(model, cache, sequences))
        results.append(([s.new for s in sequences], cache.stats()))
        monkeypatch.setitem(sys.modules, "kernels", None)  # importing it raises ImportError
    assert results[0] == results[1] and cache.kernels == PLAIN
