"""A release can be loaded by others, says what it is, and tells nothing of this machine."""
import os
import shutil
import sys
from unittest import mock

import pytest
import torch
import transformers
from conftest import OTHERS, REPOSITORY, close, small_model
from huggingface_hub import ModelCard
from oracle import edit, make_tokenizer, retrofitted
from safetensors.torch import load_file

import publish
from checkpoint import ADAPTER_FILE, copy_tokenizer, load_model, load_tokenizer, save_model
from common import InputError, read_json, read_text, write_json
from dms import DMSConfig
from generate import Sequence, generate
from kv_cache import KVCache

IDS = torch.arange(60)[None]
OF_A_RUN = {"README.md", "config.json", "results.json", "tokenizer.json", "tokenizer_config.json",
            "generation_config.json"}
CODE = {"dms.py", "kv_cache.py", "mla.py", "model.py", "modeling_dms.py"}


@pytest.fixture(params=[torch.float32])
def run(request, tmp_path):
    """A folder with base/ and adapters/, as retrofit.py leaves them, and a usual tokenizer."""
    base, adapters = tmp_path / "base", tmp_path / "adapters"
    save_model(small_model(), base, request.param)
    make_tokenizer(base)
    edit(base / "config.json", _name_or_path=str(tmp_path))
    write_json(base / "generation_config.json", {"eos_token_id": [1, 2]})
    retrofitted(base, adapters)
    copy_tokenizer(base, adapters)
    results = read_json(REPOSITORY / "toy" / "retrofitted" / "results.json")
    results["settings"].update(train="adapters", data="data.jsonl", lr=3e-5)
    write_json(adapters / "results.json", results)
    write_json(adapters / "settings.json", {"model": str(base)})
    return tmp_path


def call(model, out, *more):
    publish.main(["--model", str(model), "--out", str(out), *more])


@pytest.mark.parametrize("run", [torch.float32, torch.bfloat16], indirect=True)
def test_a_merged_release_is_base_and_adapters_bit_for_bit_and_needs_no_base(run):
    base, adapters, release = (run / name for name in ("base", "adapters", "release"))
    expected = load_model(adapters)(IDS)
    weights = load_file(base / "model.safetensors")
    stored = str(weights["model.norm.weight"].dtype)
    weights |= load_file(adapters / ADAPTER_FILE)
    call(adapters, release, "--merge")
    shutil.rmtree(base)
    assert set(os.listdir(release)) == {*OF_A_RUN, *CODE, "model.safetensors"}
    merged = load_file(release / "model.safetensors")
    assert merged.keys() == weights.keys()
    for key, tensor in merged.items():  # so that float32 adapters are not rounded
        assert tensor.dtype == weights[key].dtype and torch.equal(tensor, weights[key])
    torch.testing.assert_close(load_model(release)(IDS), expected)
    raw = read_json(release / "config.json")
    assert "base" not in str(raw) and raw["torch_dtype"] == stored.removeprefix("torch.")
    assert raw["architectures"] == ["Qwen3ForCausalLMDMS"] and raw["model_type"] == "dms"


@pytest.mark.parametrize("settings, block", [
    (DMSConfig(5, shift=0, per="layer"), 5), (DMSConfig(257), 256), (DMSConfig(3, "neuron"), 2),
    (DMSConfig(512, "neuron", shift=0), 512), (DMSConfig(2), 1),
    (DMSConfig(256, disable_eviction=True), 128)])
def test_a_model_that_is_whole_is_released_whole(settings, block, tmp_path):
    """block: a page size that suits NVIDIA's code, or with shift 0 one that it refuses."""
    whole, release = tmp_path / "whole", tmp_path / "release"
    model = small_model(3, settings)
    save_model(model, whole, torch.float32)
    call(whole, release)
    released = load_model(release)
    assert torch.equal(released(IDS), model(IDS))
    assert released.config.dms == settings
    assert read_json(release / "config.json")["dms_paged_attention_block_size"] == block
    assert set(os.listdir(release)) == {"config.json", "model.safetensors", "README.md", *CODE}
    text = read_text(release / "README.md")
    for line in (f"| window | {settings.window} |", f"| shift | {settings.shift} |",
                 f"by the {settings.source}", "It has not been measured.", "Not known."):
        assert line in text


def test_adapters_alone_are_released_for_a_base_on_the_hub_and_cards_say_what_it_is(run, capsys):
    call(run / "adapters", run / "alone", "--base", "owner/base")
    assert capsys.readouterr().out.strip().endswith(f"hf upload owner/name {run / 'alone'}")
    assert set(os.listdir(run / "alone")) == {*OF_A_RUN, ADAPTER_FILE}
    assert read_json(run / "alone" / "config.json")["dms_base_model"] == "owner/base"
    one, other = (load_file(run / name / ADAPTER_FILE) for name in ("adapters", "alone"))
    assert all(torch.equal(one[name], other[name]) for name in one | other)
    assert load_model(run / "base", adapter=run / "alone").config.dms == DMSConfig(4)
    text = read_text(run / "alone" / "README.md")
    assert ModelCard(text).data.to_dict() == {
        "base_model": "owner/base", "license": "unknown", "tags": ["dms", "kv-cache-compression"]}
    for line in ("dense               DMS            window", "The window holds 55 pairs.",
                 "needles                                99.5%", "- `steps`: `250`",
                 "- `lr`: `3e-05`", "- `data`: `data.jsonl`", "from checkpoint import load_model"):
        assert line in text
    assert "{" not in text
    call(run / "adapters", run / "merged", "--merge")
    call(run / "merged", run / "again")  # of a folder that was itself released
    assert read_text(run / "again" / "README.md") == read_text(run / "merged" / "README.md")
    for name, held in {"merged": "all weights", "alone": "the adapters alone"}.items():
        assert f"In this folder: {held}" in read_text(run / name / "README.md")
        for file in (run / name).iterdir():  # no path of this machine
            for part in (run.name, "../base"):
                assert part.encode() not in file.read_bytes(), file


@pytest.mark.parametrize("family, shift", [
    ("qwen3", 1), ("llama", 0), *((family, 1) for family in OTHERS)])
def test_a_merged_release_works_and_compresses_in_transformers(
        family, shift, tmp_path, monkeypatch, rng):
    """From its folder alone, without our modules: greedy texts equal ours, one by one, in padded
    batches and in a pipeline, and the cache holds what ours does."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "hf")])
    run, folder = tmp_path / "run", tmp_path / "release"
    model = small_model(3, DMSConfig(4, shift=shift), model_type=family, vocab_size=360)
    save_model(model, run, torch.float32)
    make_tokenizer(run)
    call(run, folder)
    shutil.rmtree(run)
    loaded = dict(trust_remote_code=True, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, **loaded)
    assert type(theirs).__module__.startswith("transformers_modules")
    prompts = [rng.choices(range(3, 67), k=rng.randint(1, 40)) for _ in range(19)]
    prompts.append(load_tokenizer(folder).encode("hello"))
    ours = [Sequence(ids, 30) for ids in prompts]
    cache = KVCache(model.config, 20)
    list(generate(load_model(folder), cache, ours))
    greedy = dict(do_sample=False, max_new_tokens=30, eos_token_id=None, pad_token_id=0)
    for ids, sequence in zip(prompts, ours):
        assert theirs.generate(torch.tensor([ids]), **greedy)[0].tolist() == sequence.ids
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    batch = theirs.generate(padded, attention_mask=mask, return_dict_in_generate=True, **greedy)
    assert [row[longest:].tolist() for row in batch.sequences] == [s.new for s in ours]
    ratio = batch.cache.cache.compression_ratio()  # past_key_values before transformers 5.24
    assert ratio == pytest.approx(cache.compression_ratio()) and ratio > 1.4
    ids = padded.flip(1)[:, :9]  # behind the tokens padding does no harm either
    logits = theirs(ids, attention_mask=(ids > 0).long(), logits_to_keep=9).logits
    close(logits[ids > 0], model(ids)[ids > 0])
    ids = torch.tensor([ours[0].ids])
    begun = theirs(ids[:, :7], labels=ids[:, :7])
    logits = theirs(ids[:, 7:], past_key_values=begun.past_key_values).logits  # by hand
    close(logits, model(ids)[:, 7:])
    expected = torch.nn.functional.cross_entropy(model(ids)[0, :6], ids[0, 1:7]).item()
    assert begun.loss.item() == pytest.approx(expected, rel=1e-4)
    beams = theirs.generate(torch.tensor(prompts[:1]), num_beams=3, length_penalty=0.0,
                            return_dict_in_generate=True, output_scores=True, **greedy)
    log_p = model(beams.sequences)[0, -31:-1].log_softmax(-1)
    expected = log_p.gather(1, beams.sequences[0, -30:, None]).sum().item()
    assert beams.sequences_scores.item() == pytest.approx(expected, rel=1e-4)
    pipe = transformers.pipeline("text-generation", str(folder), **loaded)
    [said] = pipe("hello", return_tensors=True, **greedy)
    assert said["generated_token_ids"] == ours[-1].ids
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def test_what_cannot_be_released_is_refused_and_a_failure_leaves_nothing(run):
    adapters, new = run / "adapters", run / "new" / "release"
    before = sorted(run.rglob("*"))
    for model, out, more, named in (
            (adapters, new, [], "is a folder; give its hub id: --base"),
            (adapters, new, ["--base", str(run / "base")], "is a folder"),
            (run / "base", new, [], "is a dense model"), (run / "no", new, [], "no such folder"),
            (adapters, adapters, ["--merge"], "is already there")):
        with pytest.raises(InputError, match=named):
            call(model, out, *more)
    (run / "new").rmdir()
    full = mock.patch("huggingface_hub.save_torch_state_dict", side_effect=OSError("no space left"))
    with full, pytest.raises(OSError, match="no space left"):
        call(adapters, run / "release", "--merge")
    assert sorted(run.rglob("*")) == before
    call(adapters, run / "release", "--merge")
