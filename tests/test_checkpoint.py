"""Folders that transformers, NVIDIA, shisa or we wrote are read: the same logits, decisions, tokens
and text. Damaged or unsupported ones are refused in one line that names what is wrong."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import in_hub_cache, plain_forward, small_config, small_model
from oracle import FAMILIES, YARN, edit, reloaded, same_logits, saved, tokens, transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as InTurn

import chat_template
import dms
from checkpoint import (
    ADAPTER_FILE,
    InputError,
    config_to_dict,
    copy_tokenizer,
    load_model,
    load_tokenizer,
    one_line,
    parse_config,
    read_json,
    read_lines,
    read_settings,
    refusing,
    save_model,
    weight_files,
    write_atomic,
    write_json,
)
from dms import DMSConfig
from kv_cache import KVCache
from model import Model, ModelConfig
from toy import tasks

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "toy"
INDEX = "model.safetensors.index.json"


# ------------------------------------------------------------------------------------------ Errors


@pytest.mark.parametrize("error", [KeyError("a key"), json.JSONDecodeError("bad", "text", 0)])
def test_refusing_turns_the_exceptions_it_names_into_input_errors_and_keeps_the_cause(error):
    with pytest.raises(InputError) as e:
        with refusing("file.json: not readable", LookupError, ValueError):
            raise error
    assert str(e.value).startswith(f"file.json: not readable ({type(error).__name__}: ")
    assert e.value.__cause__ is error


def test_a_refusal_is_one_line_whatever_a_library_says():
    with pytest.raises(InputError) as e:
        with refusing("two\nlines:", OSError):
            raise OSError("one\r\n\n  another\u2028third" + "x" * 5000)
    assert str(e.value).startswith("two lines: (OSError: one another third")
    assert len(str(e.value)) < 200
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize("error", [TypeError("a bug"), AssertionError("a bug"), KeyboardInterrupt])
def test_refusing_leaves_exceptions_of_other_kinds_as_they_are(error):
    with pytest.raises(error if isinstance(error, type) else type(error)) as e:
        with refusing("not readable", ValueError, OSError):
            raise error
    assert not isinstance(e.value, InputError)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_refusing_everything_still_lets_an_interruption_through(error):
    with pytest.raises(error):
        with refusing("not readable", BaseException):
            raise error


def test_refusing_does_not_wrap_an_input_error_in_another():
    with pytest.raises(InputError, match="^the first$"):
        with refusing("the second", ValueError):
            raise InputError("the first")


def test_a_damaged_file_is_refused_with_the_librarys_error_as_the_cause(tmp_path):
    folder = saved(tmp_path)[1]
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(InputError) as e:
        load_model(folder)
    assert isinstance(e.value.__cause__, SafetensorError)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError) as e:
        load_model(folder)
    assert isinstance(e.value.__cause__, json.JSONDecodeError)
    (folder / "config.json").unlink()
    with pytest.raises(InputError) as e:
        load_model(folder)
    assert isinstance(e.value.__cause__, FileNotFoundError)


def test_a_bug_within_the_loader_shows_as_what_it_is(tmp_path, monkeypatch):
    folder = saved(tmp_path)[1]

    def bug(*arguments, **settings):
        raise AttributeError("a bug")

    for name in ("safe_open", "rope_frequencies"):
        with monkeypatch.context() as patch:
            patch.setattr(f"checkpoint.{name}", bug)
            with pytest.raises(AttributeError, match="a bug"):
                load_model(folder)


# --------------------------------------------------------------------------------- Files in general


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    file = tmp_path / "results.json"
    write_json(file, {"é": 1})
    assert read_json(file) == {"é": 1}

    def write_half(temporary):
        temporary.write_text("{")
        raise OSError("no space left")

    with pytest.raises(InputError, match="results.json: not written.*no space left"):
        write_atomic(file, write_half)
    assert read_json(file) == {"é": 1}
    assert list(tmp_path.iterdir()) == [file]
    write_json(file, {"a": 2})
    assert read_json(file) == {"a": 2}


def test_lines_are_read_one_object_each_and_a_bad_one_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n\n{"b": 2}\n')
    assert read_lines(file) == {1: {"a": 1}, 3: {"b": 2}}
    file.write_text('{"a": 1}\n{"b": 2}\n{"c"')
    with pytest.raises(InputError, match=r"rows\.jsonl: line 3 is not a JSON object"):
        read_lines(file)
    file.write_text('{"a": 1}\n[2]\n')
    with pytest.raises(InputError, match=r"rows\.jsonl: line 2 is not a JSON object"):
        read_lines(file)


# ------------------------------------------------------------------- config.json in both spellings


def spell_as_before(raw, rope_key):
    """Change what transformers 5 wrote to what transformers 4 wrote."""
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta", 10000.0)
    kind = rope.pop("rope_type")
    raw["rope_scaling"] = None if kind == "default" else {rope_key: kind, **rope}
    raw["torch_dtype"] = raw.pop("dtype")
    raw.pop("layer_types", None)


@pytest.mark.parametrize("rope_key", ["type", "rope_type"])
@pytest.mark.parametrize("family", [
    "llama", "llama llama3", "llama linear", "qwen2 yarn", "qwen3 theta", "qwen3 yarn mscale",
])
def test_both_spellings_of_config_json_are_one_model(family, rope_key, tmp_path):
    kind, changes = FAMILIES[family]
    theirs, folder = saved(tmp_path, kind, **changes)
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    assert "rope_parameters" in raw
    assert "dtype" in raw
    assert "rope_scaling" not in raw
    edit(file, lambda raw: spell_as_before(raw, rope_key))
    same_logits(load_model(folder), theirs)

    def name_the_kind_twice(raw):  # as some files do
        if raw["rope_scaling"]:
            kind = raw["rope_scaling"][rope_key]
            raw["rope_scaling"].update(type=kind, rope_type=kind)

    edit(file, name_the_kind_twice)
    same_logits(load_model(folder), theirs)


@pytest.mark.parametrize("value", ["absent", None])
@pytest.mark.parametrize("key", [
    "head_dim", "num_key_value_heads", "rope_scaling", "rope_parameters", "mlp_bias",
    "attention_bias", "tie_word_embeddings", "partial_rotary_factor", "layer_types",
    "sliding_window", "quantization_config", "hidden_act", "rms_norm_eps",
])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_what_may_be_absent_or_null(kind, key, value, tmp_path):
    sizes = dict(num_hidden_layers=1, num_key_value_heads=4)
    if kind != "qwen2":
        sizes["head_dim"] = 16
    if (kind, key, value) == ("qwen3", "head_dim", "absent"):
        sizes["head_dim"] = 128  # Qwen3's own default
    theirs, folder = saved(tmp_path, kind, **sizes)
    if value == "absent":
        edit(folder / "config.json", lambda raw: raw.pop(key, None))
    else:
        edit(folder / "config.json", lambda raw: raw.update({key: value}))
    same_logits(load_model(folder), theirs, tokens(30))


def test_yarn_takes_its_factor_from_the_context_where_it_is_null(tmp_path):
    theirs, folder = saved(tmp_path, rope_parameters={**YARN, "factor": 16.0})
    rope = {**YARN, "factor": None, "rope_theta": 10000.0}
    edit(folder / "config.json", lambda raw: raw.update(rope_parameters=rope))
    same_logits(load_model(folder), theirs)
    same_logits(load_model(folder), reloaded(folder))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_config_written_back_is_read_by_transformers_and_by_us(family, tmp_path):
    kind, changes = FAMILIES[family]
    theirs, folder = saved(tmp_path, kind, **changes)
    file = folder / "config.json"
    config = parse_config(json.loads(file.read_text()))
    file.write_text(json.dumps({**config_to_dict(config), "torch_dtype": "float32"}))
    assert parse_config(json.loads(file.read_text())) == config
    again = reloaded(folder, attn_implementation="eager")
    ids = tokens(60)
    torch.testing.assert_close(again(ids).logits, theirs(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("settings", [
    dict(sliding_window=4, use_sliding_window=False, max_window_layers=0),
    dict(sliding_window=4, use_sliding_window=True, max_window_layers=2),
    dict(sliding_window=4, use_sliding_window=True, max_window_layers=1,
         layer_types=["full_attention"] * 2),
    dict(sliding_window=None, use_sliding_window=True, max_window_layers=0),
])
def test_a_sliding_window_that_no_layer_uses_is_ignored(kind, settings, tmp_path):
    theirs, folder = saved(tmp_path, kind, use_sliding_window=False)
    edit(folder / "config.json", lambda raw: raw.pop("layer_types", None))
    edit(folder / "config.json", lambda raw: raw.update(settings))
    same_logits(load_model(folder), theirs)
    same_logits(load_model(folder), reloaded(folder))


BASE = dict(model_type="qwen3", vocab_size=64, hidden_size=64, intermediate_size=80,
            num_hidden_layers=2, head_dim=16, num_attention_heads=4, num_key_value_heads=2)
SLIDING = dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)
MIXED = ["full_attention", "sliding_attention"]
OTHER_MODELS = ["mistral", "gemma2", "qwen3_moe", "gpt2", "llama4"]
OTHER_ROPE = ["dynamic", "longrope", "proportional", "su"]


def rope(kind, **more):
    return dict(rope_parameters={"rope_type": kind, **more})


@pytest.mark.parametrize("changes, named", [
    (SLIDING, "sliding_window"),
    (dict(use_sliding_window=True, max_window_layers=1), "sliding_window"),  # its default is 4096
    (dict(SLIDING, model_type="qwen2"), "sliding_window"),
    (dict(layer_types=MIXED, sliding_window=4), "sliding_attention"),
    *[(dict(model_type=kind), kind) for kind in OTHER_MODELS],
    (dict(model_type=None), "model_type"),
    *[(dict(rope_scaling={"type": kind, "factor": 2.0}), kind) for kind in OTHER_ROPE],
    *[(dict(rope_scaling={"rope_type": kind, "factor": 2.0}), kind) for kind in OTHER_ROPE],
    (rope("dynamic", rope_theta=1e4, factor=2.0), "dynamic"),
    (dict(rope_parameters={"full_attention": {"rope_type": "default"}}), "rope parameters"),
    (dict(rope_scaling={"type": "linear"}), "factor"),
    (dict(rope_scaling={"type": "linear", "factor": 0}), "linear"),
    (dict(rope_scaling={"type": "llama3", "factor": 8.0}), "low_freq_factor"),
    (dict(partial_rotary_factor=0.5), "partial rotary"),
    (rope("default", partial_rotary_factor=0.5), "partial rotary"),
    (dict(quantization_config={"quant_method": "awq", "bits": 4}), "quantized"),
    (dict(hidden_act="gelu"), "gelu"),
    (dict(num_key_value_heads=3), "not a multiple"),
    (dict(head_dim=15), "odd"),
    (dict(hidden_size="64"), "hidden_size"),
    (dict(hidden_size=None), "hidden_size"),
    (dict(num_hidden_layers=10**10), "num_hidden_layers"),
    (dict(vocab_size=2**40), "vocab_size"),
    (dict(head_dim=2**30), "head_dim"),
    (dict(rms_norm_eps=float("nan")), "rms_norm_eps"),
    (dict(rope_theta=float("nan")), "rope_theta"),
    (dict(rope_theta="1e6"), "rope_theta"),
    (dict(rope_theta=1e30), "rope_theta"),
    (dict(tie_word_embeddings="yes"), "tie_word_embeddings"),
    (dict(attention_bias=0), "attention_bias = 0"),
    (dict(mlp_bias=""), "mlp_bias = ''"),
])
def test_what_would_be_computed_wrongly_is_refused_by_name(changes, named):
    with pytest.raises(InputError) as e:
        parse_config({**BASE, **changes}, "folder/config.json")
    assert named in str(e.value)
    assert str(e.value).startswith("folder/config.json: ")
    assert "\n" not in str(e.value)


# ------------------------------------------------------------------ Every published spelling of DMS


def checkpoint_of(folder, kind="qwen3", seed=0, **extra_keys):
    """A random dense checkpoint in which everything matters; its config.json with extra_keys."""
    model = Model(small_config(model_type=kind, tie_word_embeddings=kind != "llama"))
    torch.manual_seed(seed)
    for name, parameter in model.requires_grad_(False).named_parameters():
        mean = 1.0 if "norm" in name else 0.0
        deviation = 0.1 if "norm" in name or "bias" in name else 0.4
        parameter.normal_(mean, deviation)
    save_model(model, folder, torch.float32)
    edit(folder / "config.json", lambda raw: raw.update(extra_keys))
    return model


def adapters(layers=2, C=32, Hkv=2):
    torch.manual_seed(1)
    tensors = {}
    for layer in range(layers):
        name = f"model.layers.{layer}.self_attn.dms_proj_alpha"
        tensors[f"{name}.weight"] = torch.randn(Hkv, C) * 0.02
        tensors[f"{name}_norm.weight"] = torch.rand(C) + 0.5
    return tensors


def nvidia_neuron(folder):
    """As nvidia/Qwen3-8B-DMS-8x: keys in config.json, no dms_separate_alpha."""
    checkpoint_of(
        folder,
        dms_window_size=5,
        dms_alpha_scale=100.0,
        dms_initial_alpha_offset=5.0,
        dms_cr=8,
        dms_tau=0.1,
        dms_disable_eviction=False,
        auto_map={"AutoModelForCausalLM": "modeling.Never"},
    )
    return dict(window=5, scale=100.0, offset=5.0, shift=1, per="head", separate=False), {}


def nvidia_adapter(folder, per="head"):
    """Adapters among the weights."""
    checkpoint_of(
        folder,
        dms_window_size=7,
        dms_alpha_scale=90,
        dms_initial_alpha_offset=2.5,
        dms_separate_alpha=True,
        dms_alpha_per=per,
    )
    change_tensors(folder / "model.safetensors", lambda tensors: tensors.update(adapters()))
    return dict(window=7, scale=90.0, offset=2.5, shift=1, per=per, separate=True), {}


def nvidia_layer(folder):
    return nvidia_adapter(folder, per="layer")


SHISA = {"window_size": 6, "alpha_scale": 50.0, "alpha_offset": 4.0, "target_cr": 8.0}


def shisa(folder, metadata=SHISA):
    """As shisa-ai/Llama-3.2-1B-DMS-8x: dms_metadata.json beside the weights, no shift."""
    checkpoint_of(folder, "llama")
    (folder / "dms_metadata.json").write_text(json.dumps(metadata))
    return dict(window=6, scale=50.0, offset=4.0, shift=0, per="head", separate=False), {}


def shisa_nested(folder):
    return shisa(folder, {"config": SHISA, "step": 900})


OVERLAY_SETTINGS = {
    "dms_window_size": 4,
    "dms_alpha_scale": 100.0,
    "dms_initial_alpha_offset": 5.0,
    "dms_separate_alpha": True,
}


def overlay(folder):
    """Only the 2L tensors, to be laid over a base model; settings beside them."""
    checkpoint_of(folder, "qwen2")
    (folder / "adapters").mkdir()
    save_file(adapters(), folder / "adapters" / "any-name.safetensors")
    save_file(adapters(), folder / "a-copy.safetensors")  # for plain_forward, and no one else
    (folder / "adapters" / "config.json").write_text(json.dumps(OVERLAY_SETTINGS))
    settings = dict(window=4, scale=100.0, offset=5.0, shift=1, per="head", separate=True)
    return settings, {"adapter": folder / "adapters"}


def check_against_definition(model, ids, cuts, expected, evict):
    """The model's logits and what a cache holds are those of the independent computation, in
    whatever pieces, of cuts[i] tokens each, the ids are fed."""

    def close(logits):
        torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=1e-4)

    close(model(ids[None]))
    window = model.config.dms.window if model.config.dms else 0
    T = len(ids)
    held = ~evict | (torch.arange(T) >= T - 1 - window)
    for cut in cuts:
        cache = KVCache(model.config, 1, page_size=8)
        close(torch.cat([model(piece[None], cache=cache) for piece in ids.split(cut)], dim=1))
        assert cache.stats()["pairs_per_head"] == held.sum(-1).tolist()


@pytest.mark.parametrize(
    "make", [nvidia_neuron, nvidia_adapter, nvidia_layer, shisa, shisa_nested, overlay]
)
def test_decisions_and_logits_of_every_spelling_equal_an_independent_computation(make, tmp_path):
    settings, options = make(tmp_path)
    model = load_model(tmp_path, **options)
    ids = torch.randint(0, 67, (70,), generator=torch.Generator().manual_seed(3))
    expected, evict = plain_forward(tmp_path, ids, settings)
    share = evict.float().mean().item()
    assert 0.05 < share < 0.95  # the case decides something

    masked = dms.masked_attention(model.config)
    decided = []

    def attend(layer, q, k, v, logits):
        decided.append(dms.decisions(logits, model.config.dms.shift)[0])
        return masked(layer, q, k, v, logits)

    model.hidden(ids[None], attend)
    assert torch.equal(torch.stack(decided), evict)

    w = model.config.dms.window
    across_edges = [w, 1, w + 1, 1, 16 - 2 * w % 16, 1, 1, 1, 1]  # the window's and the pages'
    across_edges.append(70 - sum(across_edges))
    cuts = [[70], [1] * 70, across_edges, [33, 1, 1, 20, 15]]
    check_against_definition(model, ids, cuts, expected, evict)


@pytest.mark.parametrize("name", ["teacher", "retrofitted"])
def test_shipped_models_equal_an_independent_computation(name):
    tokenizer = load_tokenizer(TOY / name)
    model = load_model(TOY / name)
    problem = tasks.make_problem("needles", random.Random(5), "test", 220)
    text = tokenizer.apply_chat_template(tasks.messages(problem))
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    settings = None
    if name == "retrofitted":
        raw = json.loads((TOY / name / "config.json").read_text())
        settings = {
            "window": raw["dms_window_size"],
            "scale": raw["dms_alpha_scale"],
            "offset": raw["dms_initial_alpha_offset"],
            "shift": raw["dms_shift"],
            "per": raw["dms_alpha_per"],
            "separate": raw["dms_separate_alpha"],
        }
    expected, evict = plain_forward(TOY / name, ids, settings)
    assert evict.any() == (name == "retrofitted")
    check_against_definition(model, ids, [[len(ids)]], expected, evict)


def test_switched_off_eviction_is_dense(tmp_path):
    nvidia_adapter(tmp_path)
    edit(tmp_path / "config.json", lambda raw: raw.update(dms_disable_eviction=True))
    model = load_model(tmp_path)
    ids = torch.randint(0, 67, (1, 40))
    expected = plain_forward(tmp_path, ids[0])[0]
    torch.testing.assert_close(model(ids)[0], expected, atol=1e-4, rtol=1e-4)
    cache = KVCache(model.config, 1)
    model(ids, cache=cache)
    assert cache.stats()["compression_ratio"] == 1


def test_what_config_json_does_not_state_has_its_default_and_is_printed(tmp_path, capsys):
    assert read_settings(tmp_path, {"dms_cr": 8}) == DMSConfig(
        window=512, source="neuron", shift=1, scale=100.0, offset=5.0, per="head", target_cr=8.0
    )
    shown = capsys.readouterr().err
    assert "window = 512" in shown
    assert shown.count("\n") == 1


def test_what_dms_metadata_json_does_not_state_has_its_own_default_and_is_printed(tmp_path, capsys):
    (tmp_path / "dms_metadata.json").write_text(json.dumps({"window_size": 128}))
    settings = read_settings(tmp_path, {})
    assert (settings.window, settings.shift, settings.source) == (128, 0, "neuron")
    shown = capsys.readouterr().err
    assert "shift = 0" in shown
    assert "window" not in shown
    assert shown.count("\n") == 1
    (tmp_path / "dms_metadata.json").write_text(json.dumps({"shift": 1}))
    settings = read_settings(tmp_path, {})
    assert (settings.window, settings.shift, settings.source) == (256, 1, "neuron")


def test_a_dense_checkpoint_has_no_settings(tmp_path, capsys):
    assert read_settings(tmp_path, {"model_type": "qwen3"}) is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("config, metadata, message", [
    ({"dms_window_size": 512}, {"window_size": 256}, "config.json says dms_window_size = 512 and"),
    ({"dms_window_size": -1}, None, "dms_window_size = -1 is not of type int and in range"),
    ({"dms_window_size": "512"}, None, "dms_window_size = '512' is not of type int"),
    ({"dms_alpha_per": "token"}, None, "unusable dms_alpha_per"),
    ({"dms_shift": 2}, None, "dms_shift = 2 is not of type int and in range"),
    ({"dms_window_size": 2**20 + 1}, None, "dms_window_size = 1048577 is not of type int"),
    ({"dms_disable_eviction": 1}, None, "dms_disable_eviction = 1 is not of type bool"),
    ({"dms_alpha_scale": float("nan")}, None, "dms_alpha_scale = nan is not of type float"),
    ({}, {"window_size": -1}, "dms_metadata.json: window_size = -1 is not of type int"),
    ({"dms_separate_alpha": True}, {"window_size": 256}, "adapter.*borrowed"),
])
def test_contradictory_or_unusable_settings_are_refused(config, metadata, message, tmp_path):
    if metadata is not None:
        (tmp_path / "dms_metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(InputError, match=message):
        read_settings(tmp_path, config)


@pytest.mark.parametrize("settings", [
    DMSConfig(window=7, shift=0, per="layer"),
    DMSConfig(source="neuron", window=3),
])
def test_a_merged_checkpoint_comes_back_as_it_was_saved(tmp_path, settings):
    model = small_model(2, settings)
    save_model(model, tmp_path, torch.float32)
    again = load_model(tmp_path)
    assert again.config.dms == settings
    ids = torch.randint(0, 67, (1, 40))
    torch.testing.assert_close(again(ids), model(ids))
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["dms_separate_alpha"] == (settings.source == "adapter")


BLOCK_SIZE = "dms_paged_attention_block_size"


def config_in(folder):
    return json.loads((folder / "config.json").read_text())


def saved_again(folder, again):
    """The config.json of what was read from a folder and saved to another."""
    save_model(load_model(folder), again, torch.float32)
    return config_in(again)


@pytest.mark.parametrize("window, size", [
    (0, None), (1, None), (2, 1), (3, 2), (5, 4), (256, 128), (257, 256), (512, 256), (4096, 256),
])
def test_nvidias_block_size_is_written_smaller_than_the_window(window, size, tmp_path):
    save_model(small_model(dms=DMSConfig(window=window)), tmp_path / "one", torch.float32)
    raw = config_in(tmp_path / "one")
    assert raw.get(BLOCK_SIZE) == size
    if size is not None:  # as NVIDIA's Qwen3ConfigDMS asserts
        assert 0 < raw[BLOCK_SIZE] < raw["dms_window_size"]
    assert (BLOCK_SIZE in raw) == (window >= 2)
    assert saved_again(tmp_path / "one", tmp_path / "two") == raw


NVIDIAS = {BLOCK_SIZE: 192, "dms_compile_limit": None, "dms_chunked_prefill": 4096,
           "dms_preallocate_for_tokens": 8192, "dms_manual_inference_mode": True}


@pytest.mark.parametrize("source", ["adapter", "neuron"])
def test_what_only_nvidias_inference_reads_is_written_again_as_it_was(source, tmp_path):
    save_model(small_model(dms=DMSConfig(window=512, source=source)), tmp_path / "one", torch.float32)
    edit(tmp_path / "one" / "config.json", lambda raw: raw.update(NVIDIAS, dms_unheard_of=1))
    again = saved_again(tmp_path / "one", tmp_path / "two")
    assert {key: again[key] for key in NVIDIAS} == NVIDIAS
    assert "dms_unheard_of" not in again


@pytest.mark.parametrize("window, size", [(193, 192), (192, 128), (100, 64), (1, None)])
def test_a_block_size_that_does_not_fit_the_window_is_replaced(window, size, tmp_path):
    save_model(small_model(dms=DMSConfig(window=window)), tmp_path / "one", torch.float32)
    edit(tmp_path / "one" / "config.json", lambda raw: raw.update({BLOCK_SIZE: 192}))
    assert saved_again(tmp_path / "one", tmp_path / "two").get(BLOCK_SIZE) == size


def test_a_block_size_beside_adapters_is_kept_when_they_are_merged(tmp_path):
    checkpoint_of(tmp_path / "base")
    retrofitted(tmp_path / "base", tmp_path / "adapters")
    assert config_in(tmp_path / "adapters")[BLOCK_SIZE] == 2
    edit(tmp_path / "adapters" / "config.json", lambda raw: raw.update({BLOCK_SIZE: 3}))
    assert saved_again(tmp_path / "adapters", tmp_path / "merged")[BLOCK_SIZE] == 3
    overlaid = load_model(tmp_path / "base", adapter=tmp_path / "adapters" / ADAPTER_FILE)
    save_model(overlaid, tmp_path / "overlaid")
    assert config_in(tmp_path / "overlaid")[BLOCK_SIZE] == 3


@pytest.mark.parametrize("key, value", [
    (BLOCK_SIZE, 0), (BLOCK_SIZE, -256), (BLOCK_SIZE, "256"), (BLOCK_SIZE, 1.5), (BLOCK_SIZE, True),
    (BLOCK_SIZE, [256]), ("dms_manual_inference_mode", 1), ("dms_chunked_prefill", {}),
])
def test_unusable_settings_of_nvidias_inference_are_refused(key, value, tmp_path):
    save_model(small_model(dms=DMSConfig(window=9)), tmp_path, torch.float32)
    edit(tmp_path / "config.json", lambda raw: raw.update({key: value}))
    refuse(tmp_path, f"{key} = {value!r} is not of type")


@pytest.mark.parametrize("family, name", [("llama", "Llama"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3")])
def test_architectures_says_whether_a_checkpoint_is_dms(family, name, tmp_path):
    save_model(small_model(model_type=family), tmp_path / "dense")
    assert config_in(tmp_path / "dense")["architectures"] == [f"{name}ForCausalLM"]
    save_model(small_model(model_type=family, dms=DMSConfig(window=3)), tmp_path / "dms")
    assert config_in(tmp_path / "dms")["architectures"] == [f"{name}ForCausalLMDMS"]
    edit(tmp_path / "dms" / "config.json", lambda raw: raw.update(architectures="whatever"))
    assert saved_again(tmp_path / "dms", tmp_path / "again")["architectures"] == [f"{name}ForCausalLMDMS"]


@torch.no_grad()
def test_transformers_takes_a_merged_checkpoint_for_a_dense_one(tmp_path):
    """So the model card says: its class goes by model_type, and it only reports the adapters."""
    model = small_model(3, DMSConfig(window=3))
    save_model(model, tmp_path, torch.float32)
    theirs, report = reloaded(tmp_path, output_loading_info=True, dtype=torch.float32)
    adapters = {name for name, _ in model.named_parameters() if "dms_proj_alpha" in name}
    assert set(report["unexpected_keys"]) == adapters
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    ids = torch.randint(0, 67, (1, 40))
    assert not torch.allclose(model(ids), theirs(ids).logits, atol=0.1)
    model.config.dms.disable_eviction = True
    torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_borrowed_neuron_without_shift_has_its_metadata_beside_it(tmp_path, capsys):
    model = small_model(4, DMSConfig(window=6, source="neuron", shift=0, target_cr=4.0))
    save_model(model, tmp_path, torch.float32)
    expected = {"window_size": 6, "alpha_scale": 1.0, "alpha_offset": 0.0, "target_cr": 4.0, "shift": 0}
    assert json.loads((tmp_path / "dms_metadata.json").read_text()) == expected
    again = load_model(tmp_path)
    assert again.config.dms == model.config.dms
    ids = torch.randint(0, 67, (1, 40))
    torch.testing.assert_close(again(ids), model(ids))
    assert saved_again(tmp_path, tmp_path / "again") == config_in(tmp_path)
    assert json.loads((tmp_path / "again" / "dms_metadata.json").read_text()) == expected
    # it says all that there is to say
    edit(tmp_path / "config.json", lambda raw: [raw.pop(key) for key in [*raw] if key[:4] == "dms_"])
    assert load_model(tmp_path).config.dms == model.config.dms
    assert capsys.readouterr().err == ""
    save_model(small_model(4), tmp_path, torch.float32)  # a dense model in its place stays dense
    assert load_model(tmp_path).config.dms is None


@pytest.mark.parametrize("settings", [
    DMSConfig(window=6, source="neuron", shift=1), DMSConfig(window=6, shift=0), None,
    DMSConfig(window=6, source="neuron", shift=0, per="layer"),
    DMSConfig(window=6, source="neuron", shift=0, disable_eviction=True),
])
def test_others_have_no_metadata_which_their_readers_would_take_for_a_neuron_without_shift(settings, tmp_path):
    save_model(small_model(4, settings), tmp_path, torch.float32)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


# ------------------------------------------------------------------ Adapters in files of their own


def retrofitted(base, folder):
    """A student of the checkpoint `base`, its adapters saved to the folder."""
    student = dms.start_retrofit(load_model(base), DMSConfig(window=4))
    torch.manual_seed(2)
    for block in student.model.layers:
        torch.nn.init.normal_(block.self_attn.dms_proj_alpha.weight)
    save_model(student, folder, torch.float32, base=base)
    return student


def test_an_adapter_checkpoint_is_small_and_finds_its_base(tmp_path):
    checkpoint_of(tmp_path / "base")
    student = retrofitted(tmp_path / "base", tmp_path / "adapters")
    assert sum(file.stat().st_size for file in (tmp_path / "adapters").iterdir()) < 4000
    ids = torch.randint(0, 67, (1, 40))
    torch.testing.assert_close(load_model(tmp_path / "adapters")(ids), student(ids))
    overlaid = load_model(tmp_path / "base", adapter=tmp_path / "adapters")
    assert overlaid.config.dms.window == 4
    assert torch.equal(overlaid(ids), student(ids))


def test_an_adapter_checkpoint_refuses_a_base_that_has_changed(tmp_path):
    base = checkpoint_of(tmp_path / "base")
    retrofitted(tmp_path / "base", tmp_path / "adapters")
    base.model.layers[1].mlp.up_proj.weight[-1, 0] += 1
    save_model(base, tmp_path / "base", torch.float32)
    with pytest.raises(InputError, match="fingerprint"):
        load_model(tmp_path / "adapters")


def test_an_adapter_checkpoint_without_its_adapters_is_refused(tmp_path):
    checkpoint_of(tmp_path / "base")
    retrofitted(tmp_path / "base", tmp_path / "adapters")
    (tmp_path / "adapters" / ADAPTER_FILE).unlink()
    refuse(tmp_path / "adapters", "0 safetensors files")


FROM_HUB = """
import sys
import torch
from checkpoint import load_model
models = load_model("owner/base", adapter="owner/adapters"), load_model(sys.argv[1]), load_model("owner/adapters")
torch.save([(model.config.dms.window, model(torch.arange(40)[None])) for model in models], sys.argv[2])
"""


def test_a_model_and_its_adapters_are_found_in_the_hubs_cache(tmp_path):
    """Offline; the adapters by their id, and a base that is named by its id."""
    checkpoint_of(tmp_path / "base")
    student = retrofitted(tmp_path / "base", tmp_path / "adapters")
    edit(tmp_path / "adapters" / "config.json", lambda raw: raw.update(dms_base_model="owner/base"))
    environment = in_hub_cache(tmp_path / "cache", base=tmp_path / "base", adapters=tmp_path / "adapters")
    command = [sys.executable, "-c", FROM_HUB, str(tmp_path / "adapters"), str(tmp_path / "logits")]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    for window, logits in torch.load(tmp_path / "logits"):
        assert window == 4
        torch.testing.assert_close(logits, student(torch.arange(40)[None]))


def test_adapters_laid_over_other_weights_than_their_own_are_refused(tmp_path):
    checkpoint_of(tmp_path / "base")
    checkpoint_of(tmp_path / "other", seed=5)
    retrofitted(tmp_path / "base", tmp_path / "adapters")
    for path in (tmp_path / "adapters", tmp_path / "adapters" / ADAPTER_FILE):
        with pytest.raises(InputError, match="trained on other weights"):
            load_model(tmp_path / "other", adapter=path)


def test_an_adapter_file_without_settings_gets_the_defaults(tmp_path, capsys):
    checkpoint_of(tmp_path)
    (tmp_path / "alone").mkdir()
    save_file(adapters(), tmp_path / "alone" / "x.safetensors")
    settings = load_model(tmp_path, adapter=tmp_path / "alone" / "x.safetensors").config.dms
    assert (settings.source, settings.window, settings.shift) == ("adapter", 512, 1)
    assert "window = 512" in capsys.readouterr().err


def test_adapters_that_are_not_one_sound_file_are_refused(tmp_path):
    checkpoint_of(tmp_path)
    (tmp_path / "alone").mkdir()
    save_file(adapters(), tmp_path / "alone" / "x.safetensors")
    (tmp_path / "alone" / "y.safetensors").write_bytes(b"")
    refuse(tmp_path, "2 safetensors files", adapter=tmp_path / "alone")
    refuse(tmp_path, "y.safetensors", "damaged", adapter=tmp_path / "alone" / "y.safetensors")
    refuse(tmp_path, "none", "no such folder", adapter=tmp_path / "none")
    refuse(tmp_path, "no such folder", adapter="x" * 5000)
    (tmp_path / "empty").mkdir()
    refuse(tmp_path, "0 safetensors files", adapter=tmp_path / "empty")


def test_adapters_of_another_model_are_refused(tmp_path):
    overlay(tmp_path)
    file = tmp_path / "adapters" / "any-name.safetensors"
    projection = "model.layers.1.self_attn.dms_proj_alpha.weight"
    norm = "model.layers.1.self_attn.dms_proj_alpha_norm.weight"
    save_file({**adapters(), projection: torch.zeros(2, 64)}, file)
    refuse(tmp_path, f"{projection} has shape [2, 64]", "[2, 32]", adapter=file)
    save_file({**adapters(), norm: torch.zeros(64)}, file)
    refuse(tmp_path, f"{norm} has shape [64]", "[32]", adapter=file)
    save_file(adapters(layers=1), file)
    refuse(tmp_path, "layers.1.self_attn.dms_proj_alpha", "missing", adapter=file)
    without_norm = adapters()
    del without_norm[norm]
    save_file(without_norm, file)
    refuse(tmp_path, norm, "missing", adapter=file)


def test_an_adapter_file_may_hold_adapters_only(tmp_path):
    overlay(tmp_path)
    file = tmp_path / "adapters" / "any-name.safetensors"
    save_file({**adapters(), "model.norm.weight": torch.zeros(32)}, file)
    refuse(tmp_path, "any-name.safetensors", "model.norm.weight", adapter=file)


# ----------------------------------------------------------------------------------- Sound weights


def change_tensors(file, change):
    """Rewrite a safetensors file through change(tensors), which changes them in place."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_shards_are_read_as_one_model(tmp_path):
    theirs, folder = saved(tmp_path, "qwen2", shard="40KB")
    shards = list(folder.glob("model-*-of-*.safetensors"))
    assert len(shards) > 4
    assert not (folder / "model.safetensors").exists()
    assert sorted(weight_files(folder)) == sorted(shards)
    same_logits(load_model(folder), theirs)


@pytest.mark.parametrize("wanted, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.3)])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_converted_when_they_are_read(stored, wanted, tolerance, tmp_path):
    folder = saved(tmp_path, "llama", dtype=stored, attention_bias=True, shard="30KB")[1]
    ours = load_model(folder, dtype=wanted)
    assert {parameter.dtype for parameter in ours.parameters()} == {wanted}
    theirs = reloaded(folder, dtype=wanted, attn_implementation="eager")
    same_logits(ours, theirs, tokens(50), tolerance)


def test_leftovers_of_older_checkpoints_are_ignored(tmp_path):
    theirs, folder = saved(tmp_path, "llama", tie_word_embeddings=True)

    def add_leftovers(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change_tensors(folder / "model.safetensors", add_leftovers)
    same_logits(load_model(folder), theirs, tokens(20))


@pytest.fixture(scope="module")
def loading():
    """bench/loading.py, which imports from its own folder as scripts do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "bench")
        import loading

        yield loading


@pytest.fixture(scope="module")
def big(loading, tmp_path_factory):
    """210 MB of random bf16 in seven shards, the largest tensor 33 MB: its folder, and how many
    numbers it holds."""
    folder = tmp_path_factory.mktemp("big") / "model"
    sizes = dict(vocab_size=16384, hidden_size=1024, intermediate_size=4096, num_hidden_layers=5,
                 num_attention_heads=8, num_key_value_heads=4, head_dim=128)
    config = ModelConfig(model_type="qwen3", tie_word_embeddings=True, **sizes)
    loading.make_checkpoint(folder, config, shard_bytes=2**25)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Model(config).parameters())
    yield folder, parameters
    shutil.rmtree(folder)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("dtype, size", [("bfloat16", 2), ("float32", 4)])
def test_loading_holds_no_second_copy(dtype, size, loading, big):
    folder, parameters = big
    result = loading.measure(folder, dtype)
    assert result["bytes"] == size * parameters
    assert result["bytes"] > 190e6
    modules = 100e6  # that torch imports on the way
    assert result["peak"] < 1.1 * result["bytes"] + modules


# --------------------------------------------------------------------------------- Damaged folders


def refuse(folder, *named, **options):
    """load_model refuses it in one line, in which these words stand."""
    with pytest.raises(InputError) as e:
        load_model(folder, **options)
    assert "\n" not in str(e.value), str(e.value)
    for name in named:
        assert name in str(e.value), str(e.value)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("sharded"), shard="40KB")[1]


@pytest.fixture
def broken(sharded, tmp_path):
    """A copy of a sound checkpoint in shards, to be broken: its folder and its shards."""
    folder = shutil.copytree(sharded, tmp_path / "broken")
    return folder, sorted(folder.glob("*.safetensors"))


def shard_with(shards, name):
    """The one that holds the tensor."""
    for shard in shards:
        with safe_open(shard, "pt") as tensors:
            if name in tensors.keys():
                return shard


def test_a_missing_shard_is_named(broken):
    folder, shards = broken
    shards[2].unlink()
    refuse(folder, shards[2].name, "missing")


@pytest.mark.parametrize("size", [0, 5, 8, 100, -1])
def test_a_truncated_shard_is_named(broken, size):
    folder, shards = broken
    shards[1].write_bytes(shards[1].read_bytes()[:size])
    refuse(folder, shards[1].name, "truncated")


@pytest.mark.parametrize("name, named", [
    ("../model.safetensors", INDEX),
    ("/etc/passwd", INDEX),
    ("a/../b.safetensors", INDEX),
    ("..", INDEX),
    ("", INDEX),
    (7, INDEX),
    (None, INDEX),
    ("C:\\m.safetensors", INDEX),
    ("..\\m.safetensors", INDEX),
    ("config.json", INDEX),
    ("no\nbreak", INDEX),
    ("x" * 300 + ".safetensors", "missing"),
    ("\x00.safetensors", "missing"),
])
def test_a_shard_is_never_looked_for_elsewhere(broken, name, named):
    folder, _ = broken
    save_file({"lm_head.weight": torch.zeros(64, 64)}, folder.parent / "model.safetensors")
    index = folder / INDEX
    edit(index, lambda raw: raw["weight_map"].update({"lm_head.weight": name}))
    refuse(folder, named)


@pytest.mark.parametrize("index", [
    "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{", "", "\xff", "null",
])
def test_a_damaged_index_is_named(broken, index):
    folder, _ = broken
    (folder / INDEX).write_text(index, encoding="latin-1")
    refuse(folder, INDEX)


def test_a_tensor_in_two_shards_is_named(broken):
    folder, shards = broken
    name = "model.norm.weight"
    other = next(shard for shard in shards if shard != shard_with(shards, name))
    change_tensors(other, lambda tensors: tensors.update({name: torch.ones(64)}))
    refuse(folder, name, "another shard")


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.self_attn.q_norm.weight", "lm_head.weight"]
)
def test_a_missing_tensor_is_named(broken, name):
    folder, shards = broken
    change_tensors(shard_with(shards, name), lambda tensors: tensors.pop(name))
    refuse(folder, name, "missing")


@pytest.mark.parametrize("name", [
    "model.layers.2.mlp.up_proj.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "odd",
    "model.layers.0.self_attn.dms_proj_alpha.weight",
    "two\nlines",
])
def test_a_tensor_without_a_place_is_named(broken, name):
    folder, shards = broken
    change_tensors(shards[0], lambda tensors: tensors.update({name: torch.ones(1)}))
    refuse(folder, name.splitlines()[0], "no place")


@pytest.mark.parametrize("shape", [(64,), (65, 64), (64, 64, 1), (0, 64), ()])
def test_a_tensor_of_another_shape_is_named_with_both_shapes(broken, shape):
    folder, shards = broken
    name = "lm_head.weight"
    wrong = {name: torch.ones(shape)}
    change_tensors(shard_with(shards, name), lambda tensors: tensors.update(wrong))
    refuse(folder, name, "shape", str(list(shape)), "[64, 64]")


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int64, torch.bool]
)
def test_a_tensor_of_whole_numbers_is_named(broken, dtype):
    folder, shards = broken
    name = "lm_head.weight"
    wrong = {name: torch.ones(64, 64).to(dtype)}
    change_tensors(shard_with(shards, name), lambda tensors: tensors.update(wrong))
    refuse(folder, name, "not supported")


def test_a_pickle_is_named_and_never_opened(tmp_path, monkeypatch):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    trap = pickle.dumps(Trap())
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BASE))
    (folder / "pytorch_model.bin").write_bytes(trap)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    refuse(folder, "pickle", str(folder))
    (folder / "model.safetensors").write_bytes(trap)  # under a safe name it is no safer
    refuse(folder, "model.safetensors")
    assert not (tmp_path / "executed").exists()
    pickle.loads(trap)
    assert (tmp_path / "executed").exists()  # so it is a trap


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "none", tmp_path / "file", "/", "", ".", "a/b/c", "~", "../x",
                 "owner/", "/owner", "\x00/a", "a" * 5000, "a/" + "b" * 5000, "two\nlines"):
        refuse(path)
        with pytest.raises(InputError):
            load_tokenizer(path)


OFFLINE = """
import time
import checkpoint
for load in (checkpoint.load_model, checkpoint.load_tokenizer):
    begin = time.perf_counter()
    try:
        load('owner/name-of-no-model')
    except checkpoint.InputError as e:
        print(time.perf_counter() - begin, e)
"""


def test_a_hub_id_offline_is_refused_at_once(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", OFFLINE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done
    for line in lines:
        assert "owner/name-of-no-model: " in line
        assert float(line.split()[0]) < 30  # the import included; no waiting for a network


@pytest.mark.parametrize("key, value", [
    ("vocab_size", 2**31 - 1),
    ("hidden_size", 2**20),
    ("intermediate_size", 2**31 - 1),
    ("num_hidden_layers", 4000),
    ("num_attention_heads", 2**16),
    ("head_dim", 2**12),
])
def test_a_folder_of_another_size_is_refused_without_allocating(broken, key, value):
    folder, _ = broken
    edit(folder / "config.json", lambda raw: raw.update({key: value}))
    begin = time.process_time()
    refuse(folder)
    assert time.process_time() - begin < 3


# -------------------------------------------------------------------------------------- Tokenizers

TEXTS = [
    "",
    " ",
    "hello world",
    "Hello,  World!\n\n\ttabs   and 12345 numbers",
    "naïve café — ☃ 漢字 🙂👍🏽",
    "a\r\nb",
    "e\u0301 against \u00e9",
    "<|im_start|>user\nhi<|im_end|>\n",
    "x<|eot_id|>y <|begin_of_text|>",
    "don't we'll",
    "<think>\nhm\n</think>\n\n4",
    " before and after ",
    "\x00\x7f\u200b\ufeff",
    "def f(x):\n    return x ** 2",
]
SPECIAL = {
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
              "<|eot_id|>"],
}
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def make_tokenizer(folder, style, **settings):
    """A small byte-level BPE tokenizer in the manner of Qwen or of Llama 3, saved by transformers,
    and returned."""
    fast = FastTokenizer(models.BPE())
    to_words = Split(Regex(PATTERN), "isolated")
    to_bytes = ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = InTurn([to_words, to_bytes])
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=ByteLevel.alphabet(),
        special_tokens=SPECIAL[style],
        show_progress=False,
    )
    fast.train_from_iterator(TEXTS * 5, trainer)
    byte_level = processors.ByteLevel(trim_offsets=False)
    if style == "qwen":
        fast.normalizer = normalizers.NFC()
        fast.post_processor = byte_level
        for text in ("<think>", "</think>"):
            fast.add_tokens([AddedToken(text, special=False, normalized=False)])
        names = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    else:
        begin = "<|begin_of_text|>"
        template = processors.TemplateProcessing(
            single=f"{begin} $A",
            pair=f"{begin} $A {begin}:1 $B:1",
            special_tokens=[(begin, fast.token_to_id(begin))],
        )
        fast.post_processor = processors.Sequence([byte_level, template])
        names = dict(bos_token=begin, eos_token="<|eot_id|>")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **names, **settings)
    theirs.save_pretrained(folder)
    return theirs


def their_tokenizer(folder):
    """What transformers reads from a folder."""
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("settings", [
    dict(),
    dict(add_bos_token=True),
    dict(add_bos_token=False),
    dict(add_bos_token=True, add_eos_token=True),
])
@pytest.mark.parametrize("style", ["qwen", "llama"])
def test_ids_and_text_equal_transformers(style, settings, tmp_path):
    """Where there is a tokenizer.json, add_bos_token and add_eos_token beside it mean nothing."""
    make_tokenizer(tmp_path, style)
    edit(tmp_path / "tokenizer_config.json", lambda raw: raw.update(settings))
    ours = load_tokenizer(tmp_path)
    theirs = their_tokenizer(tmp_path)
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs(text, add_special_tokens=special)["input_ids"]
            assert ids == theirs.encode(text, add_special_tokens=special)
            for skip in (True, False):
                expected = theirs.decode(ids, skip, clean_up_tokenization_spaces=False)
                assert ours.decode(ids, skip) == expected


def test_begin_of_text_is_added_as_the_file_says_and_only_when_asked(tmp_path):
    theirs = make_tokenizer(tmp_path, "llama")
    ours = load_tokenizer(tmp_path)
    begin = theirs.convert_tokens_to_ids("<|begin_of_text|>")
    assert ours.encode("hello")[0] == begin
    assert ours.encode("hello", add_special_tokens=False)[0] != begin


@pytest.mark.parametrize("style", ["qwen", "llama"])
def test_special_tokens_equal_transformers(style, tmp_path):
    theirs = make_tokenizer(tmp_path, style)
    ours = load_tokenizer(tmp_path)
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert ours.special(name) == getattr(theirs, name)
    assert ours.token_id(ours.special("eos_token")) == theirs.eos_token_id
    assert ours.end_id == theirs.eos_token_id
    assert ours.token_id(None) is None
    assert ours.token_id("no such token") is None


def test_half_a_character_decodes_as_in_transformers(tmp_path):
    theirs = make_tokenizer(tmp_path, "qwen")
    ours = load_tokenizer(tmp_path)
    ids = ours.encode("☃漢🙂")
    for i in range(len(ids)):
        for j in range(i, len(ids)):
            assert ours.decode(ids[i:j]) == theirs.decode(ids[i:j])


def test_truncation_and_padding_in_the_file_do_not_apply(tmp_path):
    """As in transformers, which resets both at every call."""
    make_tokenizer(tmp_path, "qwen")
    truncation = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    padding = {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    both = {"truncation": truncation, "padding": padding}
    edit(tmp_path / "tokenizer.json", lambda raw: raw.update(both))
    ids = load_tokenizer(tmp_path).encode(TEXTS[3])
    assert ids == their_tokenizer(tmp_path)(TEXTS[3])["input_ids"]
    assert len(ids) > 3


def test_a_special_token_may_be_an_object(tmp_path):
    make_tokenizer(tmp_path, "qwen")
    token = {"content": "<|im_end|>", "lstrip": False, "__type": "AddedToken"}
    edit(
        tmp_path / "tokenizer_config.json",
        lambda raw: raw.update(eos_token=token, bos_token=None),
    )
    ours = load_tokenizer(tmp_path)
    assert ours.special("eos_token") == "<|im_end|>"
    assert ours.special("bos_token") is None


def test_a_folder_without_a_usable_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer\.json: not found"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: not a usable tokenizer") as e:
        load_tokenizer(tmp_path)
    assert e.value.__cause__ is not None


def test_tokenizer_config_json_is_a_help_and_not_a_need(tmp_path):
    make_tokenizer(tmp_path, "qwen")
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a b")
    assert tokenizer.special("eos_token") is None
    assert tokenizer.end_id is None


# ---------------------------------------------------------------------------------- Chat templates

CHAT = [
    {"role": "system", "content": "  Be <brief> & \"good\". "},
    {"role": "user", "content": "2 + 2?\n"},
    {"role": "assistant", "content": "<think>\n\nIt's 4.\n</think>\n\n4"},
    {"role": "user", "content": "naïve ☃?"},
]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_CHAT = """{{- bos_token }}
{%- set date_string = strftime_now("%d %b") %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Today: " + date_string + "\n\n" }}
{{- system_message }}{{- "<|eot_id|>" }}
{% for message in messages %}
    {% if message.role not in ['user', 'assistant'] %}
        {{ raise_exception('no such role: ' + message.role) }}
    {% endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{% endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
THINKING = r"""{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, searching=true, n=0) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{%- continue %}{%- endif %}
    {%- if loop.index0 > 50 %}{%- break %}{%- endif %}
    {%- set ns.n = ns.n + 1 %}
    {%- set content = message.content if message.content is string else '' %}
    {%- set reasoning = '' %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set reasoning = content.split('</think>')[0].rstrip('\n') %}
        {%- set reasoning = reasoning.split('<think>')[-1].lstrip('\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if reasoning and (loop.index0 > ns.last or loop.last) %}
        {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content }}
    {%- else %}
        {{- content }}
    {%- endif %}
    {%- if message.meta is defined %}
        {{- message.meta | tojson }}{{- message.meta | tojson(indent=2) }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if tools %}{{- 'TOOLS' }}{%- endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""


def same_text(ours, theirs, messages=CHAT, **variables):
    """Both render the messages to the same text, and read that as the same tokens."""
    for prompt in (False, True):
        text = theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, **variables
        )
        assert ours.apply_chat_template(messages, prompt, **variables) == text
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(messages, add_generation_prompt=prompt, **variables) == ids


@pytest.mark.parametrize(
    "style, template", [("qwen", CHATML), ("llama", LLAMA3_CHAT), ("qwen", THINKING)]
)
def test_chat_templates_render_as_in_transformers(style, template, tmp_path):
    theirs = make_tokenizer(tmp_path, style, chat_template=template)
    ours = load_tokenizer(tmp_path)
    for messages in (CHAT, CHAT[1:], CHAT[:3], CHAT[1:2], CHAT + CHAT[1:] * 20):
        same_text(ours, theirs, messages)
    for enable_thinking in (True, False):
        same_text(ours, theirs, CHAT, enable_thinking=enable_thinking)
    meta = {"ünï": ["<a>", 1.5, None, {"b": "'&"}]}
    same_text(ours, theirs, [{**message, "meta": meta} for message in CHAT], date_string="1 Jan")


@pytest.mark.parametrize("template", [
    "{% for m in messages %}\n  {% if loop.first %}\n    {{ m.content }}\n  {% endif %}\n"
    "{% endfor %}\n",
    "{{ messages | map(attribute='role') | join }}"
    "{{ messages | selectattr('role', 'eq', 'user') | list | length }}",
    "{{ messages | tojson(indent=4) }}|"
    "{{ {'b': 1, 'a': 'é<'} | tojson(sort_keys=true, separators=(',', ':')) }}",
    "{{ 'é' | tojson(ensure_ascii=true) }}{{ strftime_now('%Y') }}"
    "{{ bos_token is defined }}{{ pad_token }}",
    "{% macro row(m) %}[{{ m.role | upper }}]{% endmacro %}"
    "{% for m in messages %}{{ row(m) }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}"
    "{{ dict(a=1).items() | list }}",
    "{{ tools is none }}{{ documents is none }}{{ range(3) | list }}"
    "{{ unknown }}{{ unknown is defined }}",
])
def test_corners_of_jinja_render_as_in_transformers(template, tmp_path):
    theirs = make_tokenizer(tmp_path, "qwen", chat_template=template)
    same_text(load_tokenizer(tmp_path), theirs)


@pytest.mark.parametrize("place", ["string", "list", "jinja", "jinja over string"])
def test_a_template_is_found_in_each_of_its_places(place, tmp_path):
    make_tokenizer(tmp_path, "qwen")
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    in_settings = {
        "string": CHATML,
        "list": [
            {"name": "tool_use", "template": "wrong"},
            {"name": "default", "template": CHATML},
        ],
        "jinja over string": "wrong",
    }
    if place in in_settings:
        template = in_settings[place]
        edit(tmp_path / "tokenizer_config.json", lambda raw: raw.update(chat_template=template))
    if place.startswith("jinja"):
        (tmp_path / "chat_template.jinja").write_text(CHATML)
    same_text(load_tokenizer(tmp_path), their_tokenizer(tmp_path))


def test_a_tokenizer_without_a_template_says_so(tmp_path):
    make_tokenizer(tmp_path, "qwen")
    with pytest.raises(InputError, match="no chat template"):
        load_tokenizer(tmp_path).apply_chat_template(CHAT)


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch executed') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['os'].system('touch executed') }}",
    "{{ strftime_now.__globals__['datetime'] }}",
    "{{ strftime_now.__code__.co_consts }}",
    "{{ (''|attr('format'))('{0.__class__}', 1) ~ ('x'|attr('__class__')).mro() }}",
    "{{ lipsum.__globals__.os.popen('touch executed').read() }}",
    "{{ '{0.__class__.__mro__}'.format(messages).mro() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch executed') }}",
    "{{ os.system('touch executed') }}",
    "{{ open('/etc/passwd').read() }}",
    "{% set _ = messages.append(1) %}",
    "{% set _ = messages[0].update(role='x') %}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.__class__.__mro__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ dict.__mro__[1] }}",
    "{{ dict.mro() }}",
    "{{ range(10**9) | list }}",
    "{% for m in messages %}",
    "{{ raise_exception('two\nlines') }}",
    "{{ 1 / 0 }}",
    "{{ none.x.y }}",
    "{{ 1 + 'a' }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{" + "(" * 3000 + ")" * 3000 + "}}",
])
def test_a_template_that_breaks_out_or_breaks_down_is_refused(template, tmp_path, monkeypatch):
    make_tokenizer(tmp_path, "qwen", chat_template=template)
    monkeypatch.chdir(tmp_path)
    chat_template.PROCESSES.clear()  # one that starts here
    tokenizer = load_tokenizer(tmp_path)
    messages = [dict(message) for message in CHAT]
    with pytest.raises(InputError) as e:
        tokenizer.apply_chat_template(messages)
    assert "\n" not in str(e.value)
    assert "chat template" in str(e.value)
    assert messages == CHAT
    assert not (tmp_path / "executed").exists()


BURNING = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 2 ** (2 ** 40) }}",
    "{{ 3 ** (2 ** 27) }}",
    "{{ 'x' * 10 ** 11 }}",
    "{{ 'x'|center(10 ** 11) }}",
    "{{ '%99999999999d' % 1 }}",
    "{% set ns = namespace(s='xx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% macro m(n) %}{% for i in range(99) %}{{ m(n - 1) if n }}{% endfor %}{% endmacro %}{{ m(9) }}",
    "{{ 'a b ' * 5000000 }}",  # within the limits of the process, but what would read it?
]


@pytest.mark.parametrize("template", BURNING)
def test_a_template_that_burns_time_or_memory_is_stopped(template, tmp_path):
    make_tokenizer(tmp_path, "qwen", chat_template=template)
    begin = time.time()
    with pytest.raises(InputError, match="chat template"):
        load_tokenizer(tmp_path).apply_chat_template(CHAT)
    assert time.time() - begin < 60  # 5 seconds of processor time, which others may want, too
    assert chat_template.render("{{ a }}", {"a": "well"}) == "well"


def test_the_limit_of_time_is_on_each_text_not_on_all():
    """Time of the system, which long texts take for their way through the pipe, counts as well."""
    text = "x" * 2**20
    begin = time.time()
    used = 0
    while used < chat_template.SECONDS + 2 and time.time() - begin < 100:
        assert len(chat_template.render("{{ a }}", {"a": text})) == len(text)
        stat = Path(f"/proc/{chat_template.PROCESSES[os.getpid()].pid}/stat").read_text()
        used = sum(map(int, stat.rsplit(")", 1)[1].split()[11:13])) / os.sysconf("SC_CLK_TCK")


def test_templates_of_several_threads_are_not_mixed_up():
    def render_many(number):
        for i in range(200):
            assert chat_template.render("{{ a }}", {"a": f"{number} {i}"}) == f"{number} {i}"
        return number

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(render_many, range(4))) == [0, 1, 2, 3]


def test_a_forked_process_has_templates_of_its_own():
    """Even if it was forked while another thread was at it."""
    assert chat_template.render("{{ a }}", {"a": 1}) == "1"
    with chat_template.ONE_AT_A_TIME:
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            os._exit(chat_template.render("{{ a }}", {"a": 2}) != "2")
    assert os.waitpid(child, 0)[1] == 0
    assert chat_template.render("{{ a }}", {"a": 3}) == "3"


def test_a_template_process_that_died_or_was_left_is_replaced(monkeypatch):
    assert chat_template.render("{{ a }}", {"a": 1}) == "1"
    process = chat_template.PROCESSES[os.getpid()]
    process.kill()
    process.wait()
    assert chat_template.render("{{ a }}", {"a": 2}) == "2"

    class Stdout:
        def readline(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(chat_template.PROCESSES[os.getpid()], "stdout", Stdout())
    with pytest.raises(KeyboardInterrupt):
        chat_template.render("{{ a }}", {"a": 3})
    assert chat_template.render("{{ a }}", {"a": 4}) == "4"


@pytest.mark.parametrize("text", ["naïve ☃ \u2028 \x85 \\ \" \n\t", "half \ud83d a character", ""])
def test_every_text_passes_through_a_template(text):
    assert chat_template.render("[{{ a }}]", {"a": text}) == f"[{text}]"


# ------------------------------------------------------------------------------- Odd model folders


def test_what_an_error_quotes_cannot_steer_a_terminal(tmp_path):
    evil = "\x1b]0;owned\x07\x1b[31m\u202e\r"
    folder = saved(tmp_path)[1]
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, f"model.{evil}": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"x1b\]0;owned") as e:
        load_model(folder)
    assert str(e.value).isprintable()
    with pytest.raises(InputError) as e:
        load_model(f"no/such{evil}")
    assert str(e.value).isprintable()


def test_pipes_and_devices_in_a_model_folder_are_not_read(tmp_path):
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    folder = saved(tmp_path / "sound")[1]
    make_tokenizer(folder, "qwen")
    for number, name in enumerate(names):
        odd = shutil.copytree(folder, tmp_path / str(number))
        (odd / name).unlink()
        os.mkfifo(odd / name)
        with pytest.raises(InputError):
            load_model(odd)
            load_tokenizer(odd)


def test_layers_and_tensors_beyond_reason_are_refused_at_once(tmp_path):
    folder = saved(tmp_path)[1]
    begin = time.time()
    edit(folder / "config.json", lambda raw: raw.update(num_hidden_layers=10**6))
    with pytest.raises(InputError, match="num_hidden_layers = 1000000"):
        load_model(folder)
    edit(folder / "config.json", lambda raw: raw.update(num_hidden_layers=1000, layer_types=None))
    save_file({f"t{i}": torch.zeros(0) for i in range(40000)}, folder / "model.safetensors")
    with pytest.raises(InputError, match="40000 tensors cannot be those of 1000 layers"):
        load_model(folder)
    assert time.time() - begin < 30


def test_links_of_a_tokenizer_are_followed_within_its_folder_or_the_hubs_cache(tmp_path, monkeypatch):
    source = tmp_path / "source"
    make_tokenizer(source, "qwen")
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (source / "real.json").write_text('{"a": 1}')
    (source / "special_tokens_map.json").unlink(missing_ok=True)
    (source / "special_tokens_map.json").symlink_to("real.json")
    out = tmp_path / "out"
    out.mkdir()
    copy_tokenizer(source, out)
    assert (out / "special_tokens_map.json").read_text() == '{"a": 1}'
    (source / "generation_config.json").symlink_to(secret)
    with pytest.raises(InputError, match="generation_config.json: links to a file elsewhere"):
        copy_tokenizer(source, out)
    assert not (out / "generation_config.json").exists()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    copy_tokenizer(source, out)
    assert (out / "generation_config.json").read_text() == "{}"


def test_keys_of_config_json_that_could_not_be_written_again(tmp_path):
    """Half a character can; what is nested too deeply is refused when it is read."""
    model, folder = saved(tmp_path)
    odd = dict(odd="\ud800 ☃", dms=1, extra={"extra": 2})  # some are our own names for other things
    edit(folder / "config.json", lambda raw: raw.update(odd))
    save_model(load_model(folder), tmp_path / "again")
    assert odd.items() <= read_json(tmp_path / "again" / "config.json").items()
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"odd":', '"deep": ' + "[" * 990 + "]" * 990 + ', "odd":'))
    with pytest.raises(InputError):
        load_model(folder)


def test_adapters_name_their_base_through_links(tmp_path):
    folder = saved(tmp_path / "base")[1]
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    model = dms.start_retrofit(load_model(folder), DMSConfig(window=3))
    save_model(model, tmp_path / "link" / "out", torch.float32, base=folder)
    load_model(tmp_path / "link" / "out")


def test_one_line_spells_out_what_a_terminal_would_obey():
    assert one_line("a\x1b\n b\u202e") == "a\\x1b b\\u202e"
    assert one_line("x" * 200) == "x" * 120


def test_only_the_head_itself_is_left_over_in_a_tied_model(tmp_path):
    folder = saved(tmp_path, tie_word_embeddings=True)[1]
    weights = load_file(folder / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors")
    load_model(folder)
    save_file({**weights, "other.lm_head.weight": head}, folder / "model.safetensors")
    with pytest.raises(InputError, match="other.lm_head.weight has no place"):
        load_model(folder)
