"""Folders that transformers, NVIDIA, shisa or we wrote are read: the same logits, decisions, tokens
and text. What contradicts itself or is not supported is refused in one line that names it."""

import json
import shutil
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import in_hub_cache, small_config, small_model
from huggingface_hub.utils import filter_repo_objects
from oracle import (CHATS, FAMILIES, TEMPLATE, TEXTS, TOOLS, USER, YARN, adapters, change_tensors,
                    checkpoint_of, edit, make_tokenizer, nvidia_adapter, nvidia_layer,
                    nvidia_neuron, overlay, plain_forward, reloaded, same_logits, saved, shisa,
                    shisa_nested, tokens, transformers)
from safetensors.torch import load_file, save_file

import checkpoint
import dms
from checkpoint import (ADAPTER_FILE, BLOCK_SIZE, INDEX, config_to_dict, context_of, end_ids,
                        generation_defaults, load_model, load_tokenizer, parse_config,
                        read_settings, save_model)
from common import InputError
from dms import DMSConfig
from kv_cache import KVCache

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "toy"
IDS = torch.arange(40)[None]


def config_in(folder):
    return json.loads((folder / "config.json").read_text())


def refuse(call, *named):
    """The call is refused in one line, in which these words stand."""
    with pytest.raises(InputError) as e:
        call()
    assert "\n" not in str(e.value)
    for name in named:
        assert name in str(e.value), str(e.value)


# ------------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_is_read_and_written_back_for_transformers_and_us(family, tmp_path):
    kind, changes = FAMILIES[family]
    theirs, folder = saved(tmp_path, kind, **changes)
    ours = load_model(folder)
    same_logits(ours, theirs)
    raw = {**config_to_dict(ours.config), "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(raw))
    assert parse_config(config_in(folder)) == ours.config
    again = reloaded(folder, attn_implementation="eager")
    torch.testing.assert_close(again(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rope_key", ["type", "rope_type", "both"])
@pytest.mark.parametrize("family", ["llama llama3", "llama linear", "qwen3 theta", "qwen3 yarn"])
def test_the_spelling_of_transformers_4_is_the_same_model(family, rope_key, tmp_path):
    kind, changes = FAMILIES[family]
    folder = saved(tmp_path, kind, **changes)[1]
    before = parse_config(config_in(folder))

    def spell_as_before(raw):
        rope = raw.pop("rope_parameters")
        raw["rope_theta"] = rope.pop("rope_theta", 10000.0)
        kind = rope.pop("rope_type")
        names = ["type", "rope_type"] if rope_key == "both" else [rope_key]
        raw["rope_scaling"] = None if kind == "default" else dict.fromkeys(names, kind) | rope
        raw["torch_dtype"] = raw.pop("dtype")

    edit(folder / "config.json", spell_as_before)
    raw = config_in(folder)
    assert parse_config(raw) == before
    # both spellings at once, which agree, and numbers as some programs write them
    rope = raw["rope_scaling"] or {"rope_type": "default"}
    both = {**rope, "rope_theta": raw["rope_theta"]}
    numbers = {key: float(raw[key]) for key in ("hidden_size", "vocab_size", "num_hidden_layers")}
    assert parse_config({**raw, "rope_parameters": both, **numbers}) == before


@pytest.mark.parametrize("changes", [
    dict(rope_parameters={**YARN, "rope_theta": 1e4}, rope_scaling={**YARN, "factor": 2.0}),
    # as NVIDIA's code saves a model whose theta it did not find in the newer spelling
    dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rope_theta=1e4),
    dict(rope_scaling={**YARN, "rope_theta": 1e6}, rope_theta=1e4),
])
def test_spellings_of_rope_that_contradict_each_other_are_refused(changes):
    refuse(lambda: parse_config({**BASE, **changes}), "rope_parameters, rope_scaling and")


def test_a_parameter_of_rope_that_nobody_reads_is_named_once(tmp_path, capsys):
    """As in DeepSeek-R1-0528-Qwen3-8B."""
    folder = saved(tmp_path, rope_parameters={**YARN, "attn_factor": 0.87})[1]
    same_logits(load_model(folder), reloaded(folder))
    load_model(folder)
    assert capsys.readouterr().err.count("attn_factor") == 1


@pytest.mark.parametrize("context, rope, tokens", [
    (40960, None, 40960),
    (40960, dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768), 131072),
    (131072, dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768), 131072),
    (163840, dict(rope_type="yarn", original_max_position_embeddings=4096), 163840),
    (4096, dict(type="linear", factor=4.0), 16384),
    (131072, dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                  original_max_position_embeddings=8192), 131072),
])
def test_the_context_is_what_the_scaling_makes_of_it(context, rope, tokens):
    raw = {**BASE, "max_position_embeddings": context, "rope_scaling": rope}
    assert context_of(parse_config(raw)) == tokens


MAY_BE_ABSENT = ("num_key_value_heads", "attention_bias", "tie_word_embeddings", "layer_types",
                 "rope_parameters", "hidden_act", "rms_norm_eps", "sliding_window")


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_what_may_be_absent_or_null(kind, tmp_path):
    theirs, folder = saved(tmp_path, kind, num_key_value_heads=4, head_dim=16)
    nothing = dict.fromkeys([*MAY_BE_ABSENT, "head_dim"])
    edit(folder / "config.json", lambda raw: raw.update(nothing))
    same_logits(load_model(folder), theirs, tokens(30))
    edit(folder / "config.json", lambda raw: [raw.pop(key) for key in MAY_BE_ABSENT])
    same_logits(load_model(folder), theirs, tokens(30))
    edit(folder / "config.json", lambda raw: raw.pop("head_dim"))
    assert parse_config(config_in(folder)).head_dim == (128 if kind == "qwen3" else 16)


@pytest.mark.parametrize("unused", [
    dict(use_sliding_window=False, max_window_layers=0), dict(max_window_layers=2),
    dict(layer_types=["full_attention"] * 2), dict(sliding_window=None, max_window_layers=0)])
def test_a_sliding_window_that_no_layer_uses_is_ignored(unused):
    assert parse_config({**BASE, "sliding_window": 4, "use_sliding_window": True, **unused})


BASE = dict(model_type="qwen3", vocab_size=64, hidden_size=64, intermediate_size=80,
            num_hidden_layers=2, head_dim=16, num_attention_heads=4, num_key_value_heads=2)


@pytest.mark.parametrize("changes, named", [
    (dict(use_sliding_window=True, sliding_window=4, max_window_layers=1), "sliding_window"),
    (dict(use_sliding_window=True, max_window_layers=1), "sliding_window"),  # its default is 4096
    (dict(layer_types=["full_attention", "sliding_attention"]), "sliding_attention"),
    *[(dict(model_type=kind), str(kind)) for kind in ("mistral", "qwen3_moe", "llama4", None)],
    *[(dict(rope_scaling={"type": kind, "factor": 2.0}), kind) for kind in ("dynamic", "longrope")],
    (dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "dynamic"),
    (dict(rope_parameters={"full_attention": {"rope_type": "yarn", "factor": 2.0}}), "yarn"),
    (dict(rope_scaling={"type": "linear"}), "factor"),
    (dict(rope_scaling={"type": "llama3", "factor": 8.0}), "low_freq_factor"),
    (dict(partial_rotary_factor=0.5), "partial rotary"),
    (dict(rope_parameters={"partial_rotary_factor": 0.5}), "partial rotary"),
    (dict(quantization_config={"quant_method": "awq", "bits": 4}), "quantized"),
    (dict(hidden_act="gelu"), "gelu"),
    (dict(hidden_size="64"), "hidden_size = '64'"),
    (dict(hidden_size=None), "hidden_size"),
    (dict(vocab_size=None), "vocab_size"),
])
def test_what_would_be_computed_wrongly_is_refused_by_name(changes, named):
    refuse(lambda: parse_config({**BASE, **changes}, "x/config.json"), "x/config.json: ", named)


# ------------------------------------------------------------------ Every published spelling of DMS


@pytest.mark.parametrize("make", [
    nvidia_neuron, nvidia_adapter, nvidia_layer, shisa, shisa_nested, overlay])
def test_decisions_and_logits_of_every_spelling_equal_an_independent_computation(make, tmp_path):
    settings, options = make(tmp_path)
    model = load_model(tmp_path, **options)
    ids = torch.randint(0, 67, (70,), generator=torch.Generator().manual_seed(3))
    expected, evict = plain_forward(tmp_path, ids, settings)
    assert 0.05 < evict.float().mean() < 0.95  # the case decides something
    w = model.config.dms.window
    held = ~evict | (torch.arange(70) >= 69 - w)
    close = partial(torch.testing.assert_close, expected=expected, atol=1e-4, rtol=1e-4)
    close(model(ids[None])[0])
    for cut in ([70], [1] * 70, [w, 1, w + 1, 1, 67 - 2 * w]):
        cache = KVCache(model.config, 1, page_size=8)
        close(torch.cat([model(piece[None], cache)[0] for piece in ids.split(cut)]))
        assert cache.stats()["pairs_per_head"] == held.sum(-1).tolist()


def test_what_is_not_stated_has_its_default_and_is_printed(tmp_path, capsys):
    assert read_settings(tmp_path, {"dms_cr": 8}) == DMSConfig(source="neuron")
    assert "window = 512" in capsys.readouterr().err
    (tmp_path / "dms_metadata.json").write_text(json.dumps({"window_size": 128}))
    assert read_settings(tmp_path, {}) == DMSConfig(128, source="neuron", shift=0)
    assert "shift = 0" in capsys.readouterr().err
    (tmp_path / "dms_metadata.json").unlink()
    assert read_settings(tmp_path, {"model_type": "qwen3"}) is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("config, metadata, named", [
    ({"dms_window_size": 512}, {"window_size": 256}, "dms_metadata.json contradict"),
    ({"dms_separate_alpha": True}, {"window_size": 256}, "dms_metadata.json contradict"),
    ({"dms_window_size": "512"}, None, "dms_window_size = '512'"),
])
def test_contradictory_or_unknown_settings_are_refused(config, metadata, named, tmp_path):
    if metadata is not None:
        (tmp_path / "dms_metadata.json").write_text(json.dumps(metadata))
    refuse(lambda: read_settings(tmp_path, config), named)


@pytest.mark.parametrize("settings", [
    DMSConfig(7, shift=0, per="layer"), DMSConfig(3, "neuron"), DMSConfig(6, "neuron", shift=0),
    DMSConfig(6, "neuron", shift=0, per="layer"), DMSConfig(6, disable_eviction=True), None])
def test_a_checkpoint_comes_back_as_it_was_saved(settings, tmp_path, capsys):
    model = small_model(2, settings)
    save_model(model, tmp_path, torch.float32)
    again = load_model(tmp_path)
    assert again.config.dms == settings
    torch.testing.assert_close(again(IDS), model(IDS))
    assert config_in(tmp_path)["architectures"] == ["Qwen3ForCausalLM" + "DMS" * bool(settings)]
    # metadata says of itself that a neuron decides, for each head, without shift
    states_it_all = settings == DMSConfig(6, "neuron", shift=0, scale=1.0, offset=0.0)
    assert (tmp_path / "dms_metadata.json").exists() == states_it_all
    if states_it_all:
        keys = [key for key in config_in(tmp_path) if key.startswith("dms_")]
        edit(tmp_path / "config.json", lambda raw: [raw.pop(key) for key in keys])
        assert load_model(tmp_path).config.dms == settings
        save_model(small_model(4), tmp_path, torch.float32)  # a dense one stays dense
        assert load_model(tmp_path).config.dms is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("window, shift, stated, size", [
    (1, 1, None, 1), (2, 1, None, 1), (3, 1, None, 2), (256, 1, None, 128), (257, 1, None, 256),
    (4096, 1, None, 256), (193, 1, 192, 192), (192, 1, 192, 128), (512, 0, None, 512),
    (512, 0, 256, 512)])
def test_nvidias_code_gets_a_block_that_fits_and_refuses_what_it_would_shift(
        window, shift, stated, size):
    """Its Qwen3ConfigDMS asserts that the block is smaller than the window."""
    extra = {BLOCK_SIZE: stated, "dms_chunked_prefill": 4096} if stated else {}
    raw = config_to_dict(small_config(dms=DMSConfig(window, shift=shift), extra=extra))
    assert raw[BLOCK_SIZE] == size
    assert (size < window) == (shift == 1 and window > 1)
    assert extra.keys() <= raw.keys()


# ------------------------------------------------------------------ Adapters in files of their own


def retrofitted(base, folder, seed=2):
    """A student of the checkpoint `base`, its adapters saved to the folder."""
    student = dms.start_retrofit(load_model(base), DMSConfig(window=4))
    torch.manual_seed(seed)
    for block in student.model.layers:
        torch.nn.init.normal_(block.self_attn.dms_proj_alpha.weight)
    save_model(student, folder, torch.float32, base=base)
    return student


def test_adapters_are_small_find_their_base_and_may_be_laid_over_it(tmp_path):
    checkpoint_of(tmp_path / "base")
    one, other = tmp_path / "one", tmp_path / "other"
    student = retrofitted(tmp_path / "base", one)
    retrofitted(tmp_path / "base", other, seed=5)
    assert config_in(one)["dms_base_model"] == "../base"
    assert sum(file.stat().st_size for file in one.iterdir()) < 4000
    edit(one / "config.json", lambda raw: raw.update({BLOCK_SIZE: 3}))
    for folder, adapter in ((one, None), (tmp_path / "base", one), (one, one),
                            (tmp_path / "base", one / ADAPTER_FILE), (other, one)):
        model = load_model(folder, adapter=adapter)
        assert torch.equal(model(IDS), student(IDS))
        assert config_to_dict(model.config)[BLOCK_SIZE] == 3
    (one / ADAPTER_FILE).rename(one / "x.safetensors")
    (one / "config.json").unlink()
    assert load_model(tmp_path / "base", adapter=one).config.dms == DMSConfig(512)
    refuse(lambda: load_model(tmp_path / "base", adapter=tmp_path / "none"), "none: no such folder")
    shutil.copy(one / "x.safetensors", one / "y.safetensors")
    refuse(lambda: load_model(tmp_path / "base", adapter=one), "2 safetensors files")
    name = "model.layers.1.self_attn.dms_proj_alpha.weight"
    save_file({**adapters(), name: torch.zeros(2, 64)}, one / "y.safetensors")
    refuse(lambda: load_model(tmp_path / "base", adapter=one / "y.safetensors"), name, "[2, 64]")


def test_adapters_find_the_commit_of_their_base_in_the_hubs_cache(tmp_path, monkeypatch):
    """Offline, and although the base has changed since."""
    commit = "0123456789" * 4
    checkpoint_of(tmp_path / "base")
    student = retrofitted(tmp_path / "base", tmp_path / "adapters")
    edit(tmp_path / "adapters" / "config.json",
         lambda raw: raw.update(dms_base_model="owner/base", dms_base_revision=commit))
    in_hub_cache(tmp_path / "cache", base=tmp_path / "base", adapters=tmp_path / "adapters")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    place = tmp_path / "cache" / "models--owner--base"
    for expected in (student(IDS), None):
        checkpoint.download.cache_clear()
        torch.testing.assert_close(load_model("owner/adapters")(IDS), student(IDS))
        over_main = load_model("owner/base", adapter="owner/adapters")
        assert (expected is not None) == torch.allclose(over_main(IDS), student(IDS), atol=1e-4)
        save_model(over_main, tmp_path / "again", base="owner/base")
        raw = config_in(tmp_path / "again")
        assert raw["dms_base_model"] == "owner/base"
        assert raw["dms_base_revision"] == (place / "refs" / "main").read_text()
        (place / "refs" / "main").write_text("newer")
        checkpoint_of(place / "snapshots" / "newer", seed=5)
    refuse(lambda: load_model("owner/absent"), "owner/absent: no such folder, and not on the hub: ")
    checkpoint.download.cache_clear()


SHARDS = "model.safetensors.index.json model-1.safetensors model-2.safetensors"


@pytest.mark.parametrize("files, wanted", [
    ("model.safetensors model.fp16.safetensors", "model.safetensors"),
    (f"{SHARDS} consolidated.safetensors", SHARDS), ("any.safetensors", "any.safetensors")])
def test_of_a_hub_repository_only_what_is_read_is_fetched(files, wanted, tmp_path, monkeypatch):
    small = "config.json tokenizer.json tokenizer_config.json chat_template.jinja dms_metadata.json"
    others = ("original/consolidated.safetensors checkpoint-500/model.safetensors fp16/config.json "
              "checkpoint-500/any.safetensors onnx/tokenizer.json pytorch_model.bin README.md")
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}

    def snapshot(repository, allow_patterns, ignore_patterns=None, **options):
        options = dict(allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        for name in filter_repo_objects(f"{small} {others} {files}".split(), **options):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(json.dumps({"weight_map": weight_map}))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path.parent)
    assert checkpoint.download.__wrapped__("owner/name", None) == tmp_path
    fetched = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert fetched == {*small.split(), *wanted.split()}


# ----------------------------------------------------------------------------------------- Weights


def test_one_file_counts_before_the_shards_of_an_index(tmp_path):
    theirs, folder = saved(tmp_path, "qwen2", shard="40KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 4
    same_logits(load_model(folder), theirs)
    other, whole = saved(tmp_path / "whole", "qwen2", seed=1)
    shutil.copy(whole / "model.safetensors", folder)
    same_logits(load_model(folder), other)
    same_logits(load_model(folder), reloaded(folder))
    for shard in folder.glob("model-*-of-*.safetensors"):
        shard.unlink()  # the index is from before
    same_logits(load_model(folder), other)
    (folder / "model.safetensors").unlink()
    refuse(lambda: load_model(folder), "model-00001-of-", "missing")


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_converted_when_they_are_read_or_left_as_they_are(stored, tmp_path):
    folder = saved(tmp_path, "llama", dtype=stored, attention_bias=True, shard="30KB")[1]
    for wanted, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.3), (None, None)):
        ours = load_model(folder, dtype=wanted)
        assert {parameter.dtype for parameter in ours.parameters()} == {wanted or stored}
        if wanted:
            theirs = reloaded(folder, dtype=wanted, attn_implementation="eager")
            same_logits(ours, theirs, tokens(50), tolerance)


def test_leftovers_of_older_checkpoints_are_ignored(tmp_path):
    theirs, folder = saved(tmp_path, "llama", tie_word_embeddings=True)
    change_tensors(folder / "model.safetensors", lambda tensors: tensors.update({
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "lm_head.weight": torch.zeros(64, 64)}))
    same_logits(load_model(folder), theirs, tokens(20))


def test_weights_that_are_not_the_models_are_named(tmp_path):
    folder = saved(tmp_path)[1]
    file = folder / "model.safetensors"
    sound = load_file(file)
    name = "model.layers.1.self_attn.q_norm.weight"
    for tensors, named in (
            ({k: sound[k] for k in sound.keys() - {name}}, f'in state_dict: "{name}'),
            ({**sound, "odd": torch.ones(1)}, 'Unexpected key(s) in state_dict: "odd"'),
            ({**sound, name: torch.ones(5)}, "shape torch.Size([5])"),
            ({**sound, name: torch.ones(16).to(torch.float8_e4m3fn)}, "quantized"),
            ({**sound, name: torch.ones(16).to(torch.int8)}, "torch.int8; quantized"),
            ({"odd": torch.ones(1)}, "Missing key(s)")):
        save_file(tensors, file)
        refuse(lambda: load_model(folder), str(folder), named)
    file.write_bytes(file.read_bytes()[:-1])
    refuse(lambda: load_model(folder), "model.safetensors: missing or damaged")
    file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    refuse(lambda: load_model(folder), "model.safetensors: missing or damaged")
    refuse(lambda: load_model(tmp_path / "none"), "none: no such folder")


def test_large_models_are_saved_in_shards_and_a_failed_save_is_never_whole(tmp_path, monkeypatch):
    model, save = small_model(0, DMSConfig(3)), huggingface_hub.save_torch_state_dict
    save_model(small_model(9), tmp_path, torch.float32)

    def full(*arguments, **options):
        if options:
            save(*arguments, **options)
        raise OSError("no space left")

    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", full)
    with pytest.raises(OSError, match="no space left"):
        save_model(model, tmp_path, torch.float32)
    torch.testing.assert_close(load_model(tmp_path)(IDS), small_model(9)(IDS))  # as it was before
    in_shards = partial(save, max_shard_size="10KB")
    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", in_shards)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", full)
        with pytest.raises(OSError, match="no space left"):
            save_model(model, tmp_path, torch.float32)
    assert not (tmp_path / "config.json").exists()
    save_model(model, tmp_path, torch.float32)
    assert (tmp_path / INDEX).exists()
    torch.testing.assert_close(load_model(tmp_path)(IDS), model(IDS))


# ------------------------------------------------------------------------ Tokenizers and templates


@pytest.mark.parametrize("style", ["qwen", "llama3", "llama2"])
def test_ids_text_and_special_tokens_equal_transformers(style, tmp_path):
    make_tokenizer(tmp_path, style)
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    edit(tmp_path / "tokenizer.json", lambda raw: raw.update(truncation=cut))  # nobody obeys it
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs(text, add_special_tokens=special)["input_ids"]
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(
                    ids, skip, clean_up_tokenization_spaces=False)
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert ours.special(name) == getattr(theirs, name)
    assert ours.end_id == theirs.eos_token_id


def test_where_special_tokens_are_stated(tmp_path):
    """As objects (DeepSeek), in special_tokens_map.json (older files), or nowhere."""
    make_tokenizer(tmp_path, "llama2")
    token = {"__type": "AddedToken", "content": "</s>", "lstrip": False}
    file = tmp_path / "tokenizer_config.json"
    edit(file, lambda raw: raw.update(eos_token=token))
    assert load_tokenizer(tmp_path).end_id == 2
    edit(file, lambda raw: [raw.pop("eos_token"), raw.pop("added_tokens_decoder")])
    assert load_tokenizer(tmp_path).end_id is None
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": token}))
    assert load_tokenizer(tmp_path).end_id == 2
    file.unlink()
    assert load_tokenizer(tmp_path).end_id == 2
    (tmp_path / "tokenizer.json").write_text("{}")
    refuse(lambda: load_tokenizer(tmp_path), "tokenizer.json: not a tokenizer")


@pytest.mark.parametrize("style", ["qwen", "llama3", "llama2"])
def test_templates_render_as_in_transformers_whatever_is_in_the_messages(style, tmp_path):
    make_tokenizer(tmp_path, style, chat_template=TEMPLATE)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    for messages in CHATS.values():
        for variables in ({}, {"tools": TOOLS}, {"enable_thinking": False, "tools": []}):
            for prompt in (False, True):
                text = theirs.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt, **variables)
                assert ours.apply_chat_template(messages, prompt, **variables) == text
                ids = theirs(text, add_special_tokens=False)["input_ids"]
                assert ours.encode(messages, add_generation_prompt=prompt, **variables) == ids


PLACES = {
    "string": "{{ 'default' }}", "none": None,
    "list": [{"name": "default", "template": "{{ 'default' }}"},
             {"name": "tool_use", "template": "{{ 'tools' }}"}],
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("jinja", [False, True])
def test_the_template_is_found_where_transformers_finds_it(place, jinja, tmp_path):
    make_tokenizer(tmp_path, "qwen")
    edit(tmp_path / "tokenizer_config.json", lambda raw: raw.update(chat_template=PLACES[place]))
    if jinja:
        (tmp_path / "chat_template.jinja").write_text("{{ 'file' }}")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    if place == "none" and not jinja:
        return refuse(lambda: ours.apply_chat_template([USER]), "no chat template")
    for tools in (None, TOOLS):
        text = theirs.apply_chat_template([USER], tokenize=False, tools=tools)
        assert ours.apply_chat_template([USER], tools=tools) == text


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% include '/etc/passwd' %}",
    "{{ raise_exception.__globals__['os'] }}", "{% set _ = messages.append(1) %}",
    "{% for m in messages %}", "{{ raise_exception('two\nlines') }}", "{{ none.x.y }}",
    "{{ range(10**9) | list }}", "{{ messages[0].content + messages[1].content }}"])
def test_what_a_template_refuses_is_an_error_of_one_line(template, tmp_path):
    make_tokenizer(tmp_path, "qwen", chat_template=template)
    messages = [USER, {"role": "assistant", "content": None}]
    refuse(lambda: load_tokenizer(tmp_path).apply_chat_template(messages), "chat template refused")


# -------------------------------------------------------------------------------------- Generation


def test_defaults_of_generation_are_taken_or_named(tmp_path, capsys):
    assert generation_defaults(tmp_path) == {}
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({
        "do_sample": True, "top_k": 20.0, "top_p": 0.8, "temperature": 1, "min_p": None,
        "repetition_penalty": 1.05, "typical_p": 1.0, "num_beams": 1, "suppress_tokens": [],
        "max_new_tokens": 100, "transformers_version": "4.51"}))
    defaults = generation_defaults(tmp_path)
    assert defaults == dict(top_k=20, top_p=0.8, temperature=1.0, repetition_penalty=1.05)
    assert [type(defaults[name]) for name in ("top_k", "temperature")] == [int, float]
    assert capsys.readouterr().err == ""
    edit(file, lambda raw: raw.update(do_sample=False, typical_p=0.9, no_repeat_ngram_size=3,
                                      suppress_tokens=[5], num_beams=4))
    assert generation_defaults(tmp_path)["temperature"] == 0
    assert generation_defaults(tmp_path)["repetition_penalty"] == 1.05
    line, = capsys.readouterr().err.splitlines()
    for key in ("typical_p", "no_repeat_ngram_size", "suppress_tokens", "num_beams"):
        assert key in line
    edit(file, lambda raw: raw.update(top_k="20"))
    refuse(lambda: generation_defaults(tmp_path), "generation_config.json: top_k = '20'")


@pytest.mark.parametrize("generation, config, expected", [
    (None, None, {2}), (None, 7, {2, 7}), (None, [7, 8], {2, 7, 8}), (9, [7, 8], {2, 9}),
    ([9, 7.0], 8, {2, 7, 9}), ("null", 7, {2, 7}), (0, 7, {0, 2})])
def test_what_ends_an_answer_is_stated_in_three_places(generation, config, expected, tmp_path):
    make_tokenizer(tmp_path, "llama2")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    if generation is not None:
        stated = {"eos_token_id": None if generation == "null" else generation}
        (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    assert end_ids(tmp_path, load_tokenizer(tmp_path)) == expected
