"""The decoder computes the logits that transformers does. And the house stands as drawn: imports go
one way, and everything runs without kernels/."""
import ast
import functools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import REPOSITORY
from oracle import FAMILIES, LENGTH, reloaded, saved, tokens

from checkpoint import config_to_dict, load_model, parse_config
from common import read_json, write_json
from dms import masked_attention
from generate import Sequence, generate
from kv_cache import KVCache
from model import HAS_ONEDNN, Linear

same = functools.partial(torch.testing.assert_close, atol=1e-4, rtol=0)
IMPORTS = {  # module: what of ours it may import. Nothing imports upwards, and there are no circles
    "dms": "", "mla": "dms", "model": "dms mla", "common": "", "kv_cache": "dms kernels",
    "checkpoint": "common dms model", "data": "common",
    "evaluate": "checkpoint common data dms kv_cache", "publish": "checkpoint common evaluate",
    "show": "common", "generate": "checkpoint common kv_cache model show kernels toy",
    "warm_start": "common data dms",
    "retrofit": "checkpoint common data dms evaluate kernels toy warm_start"}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_transformers_and_it_reads_what_is_written_back(family, tmp_path):
    """At once, cached, token by token, in ragged chunks, in greedy texts, and with the sizes in use
    far on: by 100,000 tokens float32 rounds off a hundredth of a turn."""
    theirs, folder = saved(tmp_path, family.split()[0], **FAMILIES[family])
    ours = load_model(folder)
    ids = tokens(batch=3)
    expected = theirs(ids).logits
    same(ours(ids), expected)
    same(ours(ids, last_only=True)[:, 0], expected[:, -1])
    cache = KVCache(ours.config, 3, page_size=8, memory=4e6)
    same(torch.cat([ours(ids[:, t : t + 1], cache=cache) for t in range(LENGTH)], dim=1), expected)
    lengths = [LENGTH, 1, 77]
    logits = ours(ids, KVCache(ours.config, 3, chunk=16, memory=4e6), lengths)
    for b, n in enumerate(lengths):
        same(logits[b, :n], expected[b, :n])
    sequences = [Sequence(ids[0, :n].tolist(), 40) for n in (1, 20)]
    list(generate(ours, KVCache(ours.config, 2, memory=4e6), sequences))
    for sequence in sequences:
        likeliest = theirs(torch.tensor([sequence.ids])).logits.argmax(-1)
        assert sequence.new == likeliest[0, -41:-1].tolist()
    if ours.config.head_dim == 128:
        states = ours.hidden(ids, masked_attention(ours.config), torch.tensor([[100_000]]))
        far = 100_000 + torch.arange(LENGTH)[None]
        same(ours.lm_head(states), theirs(ids, position_ids=far).logits)
        difference = ours.rope_freq.double() - theirs.model.rotary_emb.inv_freq.double()
        assert (131072 * difference).abs().max() < 1e-4
    write_json(folder / "config.json", {**config_to_dict(ours.config), "torch_dtype": "float32"})
    assert parse_config(read_json(folder / "config.json")) == ours.config
    again = reloaded(folder, attn_implementation="eager")
    torch.testing.assert_close(again(ids).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_large_layer_is_onednns_in_float32_unless_a_gradient_is_asked_for(dtype, monkeypatch):
    large, small = (Linear(512, n).to(dtype) for n in (512, 511))
    plain, forward = [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda *inputs: plain.append(1) or forward(*inputs))
    for shape in ((1, 1), (3, 11), (2, 20)):
        x = torch.randn(*shape, 512).to(dtype)
        x[-1, -1] = math.nan
        for layer in (large, small):
            expected = F.linear(x, layer.weight, layer.bias)
            with torch.inference_mode():
                torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert len(plain) == (3 if dtype == torch.float32 and HAS_ONEDNN else 6)
    large(x).sum().backward()
    assert large.weight.grad is not None


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


def test_everything_runs_without_kernels():
    script = f"""if True:
        import sys
        sys.modules["kernels"] = None  # importing it raises ImportError
        import torch, {', '.join(IMPORTS)}
        generate.main(["--max-new-tokens", "5", "--device", "cpu"])
        assert kv_cache.choose_kernels(torch.device("cpu"), torch.float32, 64) == kv_cache.PLAIN"""
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True)
