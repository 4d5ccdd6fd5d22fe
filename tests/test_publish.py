"""What publish.py writes can be loaded by others, says what it is
and tells nothing of this machine."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import small_model
from huggingface_hub import ModelCard
from oracle import edit, make_tokenizer
from safetensors.torch import load_file

import dms
import publish
from checkpoint import ADAPTER_FILE, BLOCK_SIZE, load_model, load_tokenizer, save_model
from common import InputError
from dms import DMSConfig

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "toy"
IDS = torch.arange(60)[None]
OF_A_RUN = {"README.md", "config.json", "metrics.jsonl", "results.json", "tokenizer.json",
            "tokenizer_config.json", "generation_config.json"}


def retrofitted(root, dtype=torch.float32, **settings):
    """root/base and root/adapters, as retrofit.py leaves them, and a tokenizer of usual shape."""
    save_model(small_model(), root / "base", dtype)
    make_tokenizer(root / "base", "qwen")
    edit(root / "base" / "tokenizer_config.json", lambda raw: raw.update(name_or_path=str(root)))
    edit(root / "base" / "config.json", lambda raw: raw.update(_name_or_path=str(root)))
    (root / "base" / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    student = dms.start_retrofit(load_model(root / "base"), DMSConfig(**{"window": 4, **settings}))
    torch.manual_seed(2)
    for block in student.model.layers:
        torch.nn.init.normal_(block.self_attn.dms_proj_alpha.weight)
    save_model(student, root / "adapters", torch.float32, base=root / "base")
    publish.copy_tokenizer(root / "base", root / "adapters")
    run = json.loads((TOY / "retrofitted" / "results.json").read_text())
    run["settings"].update(train="adapters", data=str(root / "private" / "data.jsonl"), lr=3e-5)
    (root / "adapters" / "results.json").write_text(json.dumps(run))
    (root / "adapters" / "metrics.jsonl").write_text('{"step": 1}\n')
    (root / "adapters" / "settings.json").write_text(json.dumps({"model": str(root / "base")}))
    return student


def call(model, out, *more):
    publish.main(["--model", str(model), "--out", str(out), *more])


def files_in(folder):
    return {file.name for file in folder.iterdir()}


def card_in(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_merged_release_is_base_and_adapters_bit_for_bit_and_needs_no_base(stored, tmp_path):
    expected = retrofitted(tmp_path, stored)(IDS)
    call(tmp_path / "adapters", tmp_path / "release", "--merge")
    call(tmp_path / "base", tmp_path / "other", "--merge", "--adapter", str(tmp_path / "adapters"))
    originals = {**load_file(tmp_path / "base" / "model.safetensors"),
                 **load_file(tmp_path / "adapters" / ADAPTER_FILE)}
    shutil.rmtree(tmp_path / "base")
    for name in ("release", "other"):
        assert files_in(tmp_path / name) == {*OF_A_RUN, "model.safetensors"}
        merged = load_file(tmp_path / name / "model.safetensors")
        assert merged.keys() == originals.keys()
        for key, tensor in merged.items():  # so that float32 adapters are not rounded
            assert tensor.dtype == originals[key].dtype and torch.equal(tensor, originals[key])
        torch.testing.assert_close(load_model(tmp_path / name)(IDS), expected)
        raw = json.loads((tmp_path / name / "config.json").read_text())
        assert not [key for key in raw if "base" in key]
        assert raw["torch_dtype"] == str(stored).removeprefix("torch.")
        assert raw["architectures"] == ["Qwen3ForCausalLMDMS"]
        assert load_tokenizer(tmp_path / name).encode("a")


def test_adapters_alone_are_released_for_a_base_on_the_hub(tmp_path):
    retrofitted(tmp_path)
    call(tmp_path / "adapters", tmp_path / "release", "--base", "owner/base")
    assert files_in(tmp_path / "release") == {*OF_A_RUN, ADAPTER_FILE}
    raw = json.loads((tmp_path / "release" / "config.json").read_text())
    assert raw["dms_base_model"] == "owner/base"
    one, other = (load_file(tmp_path / name / ADAPTER_FILE) for name in ("adapters", "release"))
    assert all(torch.equal(one[name], other[name]) for name in one | other)
    assert ModelCard(card_in(tmp_path / "release")).data.base_model == "owner/base"
    assert load_model(tmp_path / "base", adapter=tmp_path / "release").config.dms == DMSConfig(4)


@pytest.mark.parametrize("settings", [
    DMSConfig(5, shift=0), DMSConfig(300), DMSConfig(5, "neuron"), DMSConfig(5, "neuron", shift=0)])
def test_a_model_that_is_whole_is_released_whole(settings, tmp_path):
    model = small_model(3, settings)
    save_model(model, tmp_path / "whole", torch.float32)
    call(tmp_path / "whole", tmp_path / "release")
    released = load_model(tmp_path / "release")
    assert torch.equal(released(IDS), model(IDS))
    assert released.config.dms == settings
    assert files_in(tmp_path / "release") == {*files_in(tmp_path / "whole"), "README.md"}
    text = card_in(tmp_path / "release")
    assert "It has not been measured." in text and "Not known." in text


def test_the_card_says_what_it_is_what_came_out_and_how_it_was_made(tmp_path, capsys):
    retrofitted(tmp_path)
    call(tmp_path / "adapters", tmp_path / "alone", "--base", "owner/base", "--license", "mit")
    assert capsys.readouterr().out.splitlines()[-1] == f"hf upload owner/name {tmp_path / 'alone'}"
    text = card_in(tmp_path / "alone")
    assert ModelCard(text).data.to_dict() == {
        "base_model": "owner/base", "license": "mit", "tags": ["dms", "kv-cache-compression"]}
    for line in ("dense            DMS 8x      window of 56",
                 "needles                                99.5%", "- `steps`: `500`",
                 "- `lr`: `3e-05`", "- `data`: `data.jsonl`", "from checkpoint import load_model"):
        assert line in text
    assert "{" not in text
    call(tmp_path / "adapters", tmp_path / "merged", "--merge")
    call(tmp_path / "merged", tmp_path / "again")  # known from its results.json
    call(TOY / "retrofitted", tmp_path / "trained")
    unchanged = "the base's weights, unchanged, and the adapters"
    for name, held in {"merged": unchanged, "again": unchanged, "trained": "trained weights",
                       "alone": "the adapters alone"}.items():
        assert f"In this folder: {held}" in card_in(tmp_path / name)
    for name in ("alone", "merged"):  # no path of this machine
        for file in (tmp_path / name).iterdir():
            for part in (tmp_path.name, "private", "../base"):
                assert part.encode() not in file.read_bytes(), file


REFUSES = "refuses this folder, whose decisions it would shift"


@pytest.mark.parametrize("family, settings, nvidia, fastdms", [
    ("qwen3", dict(window=512), "computes the same from this folder\n", False),
    ("qwen3", dict(window=512, source="neuron"), "computes the same from this folder\n", False),
    ("qwen3", dict(window=256), "computes the same from this folder, on a CPU only\n", False),
    ("qwen3", dict(window=512, shift=0), REFUSES, False),
    ("llama", dict(window=512), "cannot be used", False),
    ("llama", dict(window=256, source="neuron", shift=0), "cannot be used", True),
    ("qwen3", dict(window=512, source="neuron", shift=0), REFUSES, True),
    ("qwen3", dict(window=256, source="neuron", shift=0, per="layer"), REFUSES, False),
])
def test_the_card_says_who_else_computes_the_same(family, settings, nvidia, fastdms, tmp_path):
    save_model(small_model(3, DMSConfig(**settings), model_type=family), tmp_path / "whole")
    call(tmp_path / "whole", tmp_path / "release")
    text = card_in(tmp_path / "release").split("Elsewhere:")[1]
    assert "transformers 4.57.3" in text
    assert f"(folder)`: {nvidia}" in text
    assert ("FastDMS): reads this folder" in text) == fastdms


def test_merged_adapters_without_shift_are_refused_by_nvidias_code(tmp_path):
    """Its configuration asserts that the block is smaller than the window."""
    expected = retrofitted(tmp_path, shift=0)(IDS)
    call(tmp_path / "adapters", tmp_path / "release", "--merge")
    raw = json.loads((tmp_path / "release" / "config.json").read_text())
    assert raw[BLOCK_SIZE] == raw["dms_window_size"] == 4
    torch.testing.assert_close(load_model(tmp_path / "release")(IDS), expected)


def test_what_cannot_be_released_is_refused_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    retrofitted(tmp_path)
    adapters, new = tmp_path / "adapters", tmp_path / "new" / "release"
    before = sorted(tmp_path.rglob("*"))
    for model, out, more, named in (
            (adapters, new, [], "is a folder here; give its hub id with --base"),
            (adapters, new, ["--base", "../base"], "no hub id"),
            (tmp_path / "base", new, [], "is a dense model"),
            (tmp_path / "nothing", new, [], "no such folder"),
            (adapters, adapters, ["--merge"], "already holds something"),
            (TOY / "retrofitted", new, ["--merge"], "is whole as it is; leave out --merge")):
        with pytest.raises(InputError, match=named):
            call(model, out, *more)
    (tmp_path / "new").rmdir()

    def full(*arguments, **options):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.save_torch_state_dict", full)
        with pytest.raises(OSError, match="no space left"):
            call(adapters, tmp_path / "release", "--merge")
    assert sorted(tmp_path.rglob("*")) == before
    call(adapters, tmp_path / "release", "--merge")
