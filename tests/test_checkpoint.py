"""Folders that transformers, NVIDIA, shisa or we wrote are read: the same logits, decisions, tokens
and text. What contradicts itself or is not supported is refused by name."""
import shutil
from functools import partial
from unittest import mock

import huggingface_hub
import pytest
import torch
from conftest import OTHERS, close, small_model
from huggingface_hub.utils import filter_repo_objects
from oracle import (FAMILIES, TEXTS, YARN, edit, make_tokenizer, plain_forward, reloaded,
                    retrofitted, same_logits, saved, transformers)
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import (ADAPTER_FILE, base_keys, end_ids, generation_defaults, load_model,
                        load_tokenizer, parse_config, read_settings, resolve, save_model)
from common import InputError, read_json, write_json
from dms import DMSConfig
from kv_cache import KVCache

IDS = torch.arange(40)[None]
same = torch.testing.assert_close
BASE = dict(model_type="qwen3", vocab_size=64, hidden_size=64, intermediate_size=80,
            num_hidden_layers=2, head_dim=16, num_attention_heads=4, num_key_value_heads=2)
MAY_BE_ABSENT = ("num_key_value_heads", "attention_bias", "tie_word_embeddings", "layer_types",
                 "rope_parameters", "hidden_act", "rms_norm_eps", "sliding_window")
YARN4, LLAMA32 = (FAMILIES[f"{kind} published"]["rope_parameters"] for kind in ("qwen3", "llama"))
TWO = "rope_parameters, rope_scaling and rope_theta contradict"  # spellings of RoPE
NVIDIA = {"dms_window_size": 5, "dms_alpha_scale": 100.0, "dms_initial_alpha_offset": 5.0}
FLOATS = {**NVIDIA, "dms_window_size": 5.0, "dms_separate_alpha": True}
SHISA = {"window_size": 5, "alpha_scale": 100.0, "alpha_offset": 5.0}
SPELLINGS = {  # what config.json and dms_metadata.json state, and what plain_forward gets of it
    "nvidia neuron": ({**NVIDIA, "dms_cr": 8, "auto_map": {"AutoModelForCausalLM": "a.b"}}, {}, {}),
    "nvidia adapter": (FLOATS, {}, dict(separate=True)),
    "nvidia layer": ({**FLOATS, "dms_alpha_per": "layer"}, {}, dict(separate=True, per="layer")),
    "shisa": ({}, SHISA, dict(shift=0)),
    "shisa nested": ({}, {"config": SHISA, "step": 900}, dict(shift=0)),
    "overlay": (NVIDIA, {}, dict(separate=True))}  # the adapters alone, over a base model
TOOLS = [{"type": "function", "function": {"name": "look", "description": "<é> & 'so'"}}]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"x": "ü", "n": 1.5}}}
USER = {"role": "user", "content": " 2 + <2>? naïve ☃\n"}
ANSWER = {"role": "assistant"}
NAMED = [{"name": "default", "template": "b"}, {"name": "tool_use", "template": "c"}]
TEMPLATE = r"""{{- bos_token }}{{ tools | map('tojson') | join(strftime_now('%Y')) if tools }}
{% for message in messages %}
    {%- if loop.index0 > 50 %}{%- break %}{%- endif %}
    {{- '<|im_start|>' + message['role'] + '\n' }}{{ message.reasoning_content }}
    {%- generation %}{%- set content = 'x' %}{{ message.content }}{%- endgeneration %}
    {{- content is defined }}{{ message.tool_calls | tojson(indent=2) if message.tool_calls }}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>' }}{{ enable_thinking is false }}{%- endif %}
{{- unknown }}{{ pad_token is defined }}{{ add_bos_token is defined }}{{ documents is none }}"""


def refuse(call, *named):
    with pytest.raises(InputError) as e:
        call()
    for name in named:
        assert name in str(e.value), str(e.value)


@pytest.mark.parametrize("names", [["type"], ["rope_type"], ["type", "rope_type"]])
@pytest.mark.parametrize("family", ["llama llama3", "llama linear", "qwen3 theta", "qwen3 yarn"])
def test_the_spelling_of_transformers_4_is_the_same_model(family, names):
    raw = {**BASE, **FAMILIES[family], "model_type": family.split()[0]}
    before = parse_config(raw)
    both = raw.pop("rope_parameters")
    rope = {"rope_theta": 10000.0, **both}
    raw["rope_theta"], kind = rope.pop("rope_theta"), rope.pop("rope_type")
    raw["rope_scaling"] = None if kind == "default" else dict.fromkeys(names, kind) | rope
    assert parse_config(raw) == before
    assert parse_config({**raw, "rope_parameters": both}) == before  # both, which agree


@pytest.mark.parametrize("context, rope, tokens", [
    (40960, None, 40960), (40960, YARN4, 131072), (131072, YARN4, 131072),
    (163840, dict(rope_type="yarn", original_max_position_embeddings=4096), 163840),
    (4096, dict(type="linear", factor=4.0), 16384), (131072, LLAMA32, 131072)])
def test_the_context_is_what_the_scaling_makes_of_it(context, rope, tokens):
    raw = {**BASE, "max_position_embeddings": context, "rope_scaling": rope}
    assert parse_config(raw).context == tokens


@pytest.mark.parametrize("kind, head_dim", [("llama", 16), ("qwen3", 128)])
def test_what_may_be_absent_or_null(kind, head_dim, tmp_path):
    theirs, folder = saved(tmp_path, kind, num_key_value_heads=4, head_dim=16)
    raw = read_json(folder / "config.json")
    absent = {key: value for key, value in raw.items() if key not in MAY_BE_ABSENT}
    for changed in (raw | dict.fromkeys(MAY_BE_ABSENT), absent):
        write_json(folder / "config.json", changed)
        same_logits(load_model(folder), theirs)
    assert parse_config(absent | {"head_dim": None}).head_dim == head_dim
    for unused in (dict(use_sliding_window=False, max_window_layers=0), dict(max_window_layers=2),
                   dict(layer_types=["full_attention"] * 2)):
        parse_config({**BASE, "sliding_window": 4, "use_sliding_window": True, **unused})


@pytest.mark.parametrize("changes, named", [
    (dict(use_sliding_window=True, sliding_window=4, max_window_layers=1), "sliding_window"),
    (dict(use_sliding_window=True, max_window_layers=1), "sliding_window"),  # its default is 4096
    (dict(layer_types=["full_attention", "sliding_attention"]), "sliding_attention"),
    *[(dict(model_type=kind), kind or "model_type") for kind in ("mistral", "qwen3_next", None)],
    *[(dict(rope_scaling={"type": kind, "factor": 2.0}), kind) for kind in ("dynamic", "longrope")],
    (dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "dynamic"),
    (dict(rope_scaling={"type": "linear"}), "factor"),
    (dict(rope_scaling={"type": "llama3", "factor": 8.0}), "low_freq_factor"),
    (dict(partial_rotary_factor=0.5), "partial rotary"),
    (dict(rope_parameters={"partial_rotary_factor": 0.5}), "partial rotary"),
    (dict(rope_parameters={"full_attention": {"rope_type": "default"}}), "for each layer type"),
    (dict(rope_interleave=False), "rope_interleave"),
    (dict(hidden_act="gelu"), "gelu"), (dict(vocab_size=None), "vocab_size"),
    (dict(rope_parameters={**YARN, "rope_theta": 1e4}, rope_scaling={**YARN, "factor": 2.0}), TWO),
    # as NVIDIA's code saves a model whose theta it did not find in the newer spelling
    (dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rope_theta=1e4), TWO),
    (dict(rope_scaling={**YARN, "rope_theta": 1e6}, rope_theta=1e4), TWO)])
def test_what_would_be_computed_wrongly_is_refused_by_name(changes, named):
    refuse(lambda: parse_config({**BASE, **changes}, "x/config.json"), "x/config.json: ", named)


def checkpoint_of(folder, kind="qwen3", seed=0):
    model = small_model(seed, model_type=kind, tie_word_embeddings=kind != "llama")
    save_model(model, folder, torch.float32)


def adapters():
    torch.manual_seed(1)
    names = [f"model.layers.{layer}.self_attn.dms_proj_alpha" for layer in range(2)]
    tensors = {f"{name}.weight": torch.randn(2, 32) * 0.02 for name in names}
    return tensors | {f"{name}_norm.weight": torch.rand(32) + 0.5 for name in names}


@pytest.mark.parametrize("name", SPELLINGS)
def test_decisions_and_logits_of_every_spelling_equal_an_independent_computation(name, tmp_path):
    config, metadata, changes = SPELLINGS[name]
    checkpoint_of(tmp_path, "llama" if metadata else "qwen3")
    write_json(tmp_path / "dms_metadata.json", metadata)
    adapter = None
    if name == "overlay":
        adapter = tmp_path / "adapters"
        adapter.mkdir()
        write_json(adapter / "config.json", config)
        save_file(adapters(), adapter / "any-name.safetensors")
    else:
        edit(tmp_path / "config.json", **config)
        if "separate" in changes:
            file = tmp_path / "model.safetensors"
            save_file({**load_file(file), **adapters()}, file)
    model = load_model(tmp_path, adapter=adapter)
    ids = torch.randint(0, 67, (70,), generator=torch.Generator().manual_seed(3))
    expected, evict = plain_forward(tmp_path, ids, **changes)
    assert 0.05 < evict.float().mean() < 0.95  # the case decides something
    held = ~evict | (torch.arange(70) >= 64)
    cache = KVCache(model.config, 1)
    for logits in (model(ids[None])[0], model(ids[None], cache)[0]):
        close(logits, expected)
    assert cache.stats()["pairs_per_head"] == held.sum(-1).tolist()


def test_what_is_not_stated_is_assumed_and_what_contradicts_itself_refused(tmp_path, capsys):
    assert read_settings(tmp_path, {"model_type": "qwen3", "dms_cr": None}) is None
    assert capsys.readouterr().err == ""
    assert read_settings(tmp_path, {"dms_cr": 8}) == DMSConfig(source="neuron")
    assert "window = 512" in capsys.readouterr().err
    write_json(tmp_path / "dms_metadata.json", {"window_size": 128})
    assert read_settings(tmp_path, {}) == DMSConfig(128, source="neuron", shift=0)
    assert "offset = 5.0" in capsys.readouterr().err
    for raw in ({"dms_window_size": 512}, {"dms_separate_alpha": True}):
        refuse(lambda: read_settings(tmp_path, raw), "dms_metadata.json contradict")


def test_adapters_are_small_find_their_base_and_may_be_laid_over_it(tmp_path):
    base, one, other = (tmp_path / name for name in ("base", "one", "other"))
    checkpoint_of(base)
    student = retrofitted(base, one)
    retrofitted(base, other, seed=5)
    assert read_json(one / "config.json")["dms_base_model"] == "../base"
    assert sum(file.stat().st_size for file in one.iterdir()) < 4000
    for folder, adapter in ((one, None), (base, one), (one, one), (base, one / ADAPTER_FILE),
                            (other, one)):
        assert torch.equal(load_model(folder, adapter=adapter)(IDS), student(IDS))
    (one / ADAPTER_FILE).rename(one / "x.safetensors")
    (one / "config.json").unlink()
    assert load_model(base, adapter=one).config.dms == DMSConfig(512)
    refuse(lambda: load_model(base, adapter=tmp_path / "none"), "none: no such folder")
    name = "model.layers.1.self_attn.dms_proj_alpha.weight"
    save_file({**adapters(), name: torch.zeros(2, 64)}, one / "y.safetensors")
    refuse(lambda: load_model(base, adapter=one), "2 safetensors files")
    refuse(lambda: load_model(base, adapter=one / "y.safetensors"), name, "[2, 64]")


def test_adapters_find_the_commit_of_their_base_in_the_hubs_cache(tmp_path, monkeypatch):
    """Offline, and although the base has changed since."""
    base, folder = (tmp_path / name for name in ("base", "adapters"))
    checkpoint_of(base)
    student = retrofitted(base, folder)
    commit = "0123456789" * 4
    edit(folder / "config.json", dms_base_model="owner/base", dms_base_revision=commit)
    for source in (folder, base):
        place = tmp_path / f"models--owner--{source.name}"
        shutil.copytree(source, place / "snapshots" / commit)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for changed in (False, True):
        checkpoint.download.cache_clear()
        same(load_model("owner/adapters")(IDS), student(IDS))
        over_main = load_model("owner/base", adapter="owner/adapters")
        assert changed != torch.allclose(over_main(IDS), student(IDS), atol=1e-4)
        save_model(over_main, tmp_path / "again", base=base_keys("owner/base", tmp_path))
        raw = read_json(tmp_path / "again" / "config.json")
        commit = (place / "refs" / "main").read_text()
        assert (raw["dms_base_model"], raw["dms_base_revision"]) == ("owner/base", commit)
        (place / "refs" / "main").write_text("newer")
        checkpoint_of(place / "snapshots" / "newer", seed=5)
    refuse(lambda: load_model("owner/absent"), "owner/absent: no such folder, and not on the hub")
    checkpoint.download.cache_clear()


def test_of_a_hub_repository_only_what_is_read_is_fetched(tmp_path, monkeypatch):
    wanted = ("config.json tokenizer.json chat_template.jinja dms_metadata.json model.safetensors "
              "model.safetensors.index.json model-00001-of-00002.safetensors "
              "dms_adapters.safetensors").split()
    others = ("original/consolidated.safetensors checkpoint-500/model.safetensors fp16/config.json "
              "consolidated.safetensors pytorch_model.bin model.fp16.safetensors README.md").split()
    fetch = mock.Mock(return_value="folder")
    monkeypatch.setattr(checkpoint, "download", fetch)
    resolve("owner/name")
    patterns = {key: fetch.call_args[1][key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(wanted + others, **patterns)) == wanted


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_one_file_counts_before_the_shards_of_an_index(stored, tmp_path):
    folder = saved(tmp_path, "qwen2", shard="40KB", dtype=stored)[1]
    assert load_model(folder, dtype=None).dtype == stored
    same_logits(load_model(folder), reloaded(folder, dtype=torch.float32))
    other, whole = saved(tmp_path / "whole", "qwen2", seed=1)
    shutil.copy(whole / "model.safetensors", folder)
    same_logits(load_model(folder), reloaded(folder, dtype=torch.float32))
    for shard in folder.glob("model-*-of-*.safetensors"):
        shard.unlink()  # the index is from before
    same_logits(load_model(folder), other)
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="model-00001-of-"):
        load_model(folder)


@pytest.mark.parametrize("family", OTHERS)
def test_experts_are_read_as_the_hub_and_as_transformers_5_spell_them(family, tmp_path, capsys):
    theirs, folder = saved(tmp_path, family, **FAMILIES[family])
    in_hubs = load_file(folder / "model.safetensors")
    theirs.save_pretrained(folder, save_original_format=False)
    stacked = load_file(folder / "model.safetensors")
    assert stacked.keys() != in_hubs.keys()
    mtp = {"model.layers.2.enorm.weight": torch.ones(9)}
    save_file(stacked | mtp, folder / "model.safetensors")
    edit(folder / "config.json", num_nextn_predict_layers=0)
    refuse(lambda: load_model(folder), "layers.2.enorm")
    edit(folder / "config.json", num_nextn_predict_layers=1)
    ours = load_model(folder)
    assert "(MTP), and is not used" in capsys.readouterr().err
    save_model(ours, folder, torch.float32)
    same(load_file(folder / "model.safetensors"), in_hubs, rtol=0, atol=0)
    same_logits(load_model(folder), theirs)
    same_logits(ours, reloaded(folder))


def test_weights_that_are_not_the_models_are_named_and_leftovers_ignored(tmp_path, capsys):
    """A parameter of RoPE that nobody reads is named, too, and once."""
    rope = {**YARN, "attn_factor": 0.87}
    theirs, folder = saved(tmp_path, tie_word_embeddings=True, rope_parameters=rope)
    file = folder / "model.safetensors"
    sound = load_file(file)
    name = "model.layers.1.self_attn.q_norm.weight"
    rotary = "model.layers.0.self_attn.rotary_emb.inv_freq"
    head = {"lm_head.weight": sound["model.embed_tokens.weight"].clone()}
    save_file({**sound, rotary: torch.ones(8), **head}, file)
    same_logits(load_model(folder), theirs)
    save_file({**sound, "lm_head.weight": torch.zeros(64, 64)}, file)
    refuse(lambda: load_model(folder), "lm_head is not tied")
    for changes, named in (({"odd": torch.ones(1)}, 'Unexpected key(s) in state_dict: "odd"'),
                           ({name: torch.ones(5)}, "shape torch.Size([5])"),
                           ({name: torch.ones(16).to(torch.float8_e4m3fn)}, "quantized"),
                           ({name: torch.ones(16).to(torch.int8)}, "torch.int8; not supported")):
        save_file({**sound, **changes}, file)
        refuse(lambda: load_model(folder), str(folder), named)
    save_file({"odd": torch.ones(1)}, file)
    refuse(lambda: load_model(folder), "Missing key(s)")
    file.write_bytes(file.read_bytes()[:-1])
    refuse(lambda: load_model(folder), "model.safetensors: damaged")
    assert capsys.readouterr().err.count("attn_factor") == 1


def test_large_models_are_saved_in_shards_and_a_failed_save_is_never_whole(tmp_path, monkeypatch):
    model, save = small_model(0, DMSConfig(3)), huggingface_hub.save_torch_state_dict
    save_model(small_model(9), tmp_path, torch.float32)
    in_shards = partial(save, max_shard_size="10KB")
    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", in_shards)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(checkpoint, "write_json", mock.Mock(side_effect=OSError("no space left")))
        save_model(model, tmp_path, torch.float32)
    assert not (tmp_path / "config.json").exists()
    save_model(model, tmp_path, torch.float32)
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert not (tmp_path / "model.safetensors").exists()
    same(load_model(tmp_path)(IDS), model(IDS))


@pytest.mark.parametrize("style", ["qwen", "llama"])
def test_ids_text_and_special_tokens_equal_transformers(style, tmp_path):
    make_tokenizer(tmp_path, style)
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    edit(tmp_path / "tokenizer.json", truncation=cut)  # nobody obeys it
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs(text, add_special_tokens=special)["input_ids"]
            assert ours.decode(ids, special) == theirs.decode(
                ids, special, clean_up_tokenization_spaces=False)
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert ours.special(name) == getattr(theirs, name)
    token = {"__type": "AddedToken", "content": theirs.eos_token, "lstrip": False}  # as DeepSeek's
    for stated, end in ((theirs.eos_token, theirs.eos_token_id), (token, theirs.eos_token_id),
                        (None, None)):
        edit(tmp_path / "tokenizer_config.json", eos_token=stated)
        assert load_tokenizer(tmp_path).end_id == end
    (tmp_path / "tokenizer.json").write_text("{}")
    refuse(lambda: load_tokenizer(tmp_path), "tokenizer.json: not a tokenizer")


@pytest.mark.parametrize("style", ["qwen", "llama"])
@pytest.mark.parametrize("messages", [
    [{"role": "system", "content": " Be brief. "}, USER, {**ANSWER, "content": "4"}, USER],
    [USER, {**ANSWER, "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "7"}],
    [USER, {**ANSWER, "tool_calls": [CALL]}],
    [{"role": "user", "content": [{"type": "text", "text": text} for text in ("1", "2")]}],
    [USER, {**ANSWER, "content": "4", "reasoning_content": "Hm."}, USER]])
def test_templates_render_as_in_transformers_whatever_they_get(style, messages, tmp_path):
    theirs = make_tokenizer(tmp_path, style, chat_template=TEMPLATE)
    ours = load_tokenizer(tmp_path)
    for more in ({}, {"tools": TOOLS}, {"enable_thinking": False, "tools": []}):
        for prompt in (False, True):
            more["add_generation_prompt"] = prompt
            text = theirs.apply_chat_template(messages, tokenize=False, **more)
            assert ours.apply_chat_template(messages, **more) == text
            ids = theirs(text, add_special_tokens=False)["input_ids"]
            assert ours.encode(messages, **more) == ids


@pytest.mark.parametrize("stated, file", [("a", ""), (NAMED, ""), (NAMED, "d"), (None, "d")])
def test_the_template_is_found_where_transformers_finds_it(stated, file, tmp_path):
    make_tokenizer(tmp_path)
    refuse(lambda: load_tokenizer(tmp_path).apply_chat_template([USER]), "no chat template")
    edit(tmp_path / "tokenizer_config.json", chat_template=stated)
    if file:
        (tmp_path / "chat_template.jinja").write_text(file)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for tools in (None, TOOLS):
        text = theirs.apply_chat_template([USER], tokenize=False, tools=tools)
        assert load_tokenizer(tmp_path).apply_chat_template([USER], tools=tools) == text


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% include '/etc/passwd' %}",
    "{% set _ = messages.append(1) %}", "{{ raise_exception('no') }}", "{{ none.x.y }}"])
def test_what_a_template_refuses_is_an_input_error(template, tmp_path):
    make_tokenizer(tmp_path, chat_template=template)
    refuse(lambda: load_tokenizer(tmp_path).apply_chat_template([USER]), "chat template refused")


def test_defaults_of_generation_are_taken_or_named(tmp_path, capsys):
    names = "temperature top_k top_p min_p repetition_penalty".split()
    assert generation_defaults(tmp_path, names) == {}
    file = tmp_path / "generation_config.json"
    write_json(file, {
        "do_sample": True, "top_k": 20.0, "top_p": 0.8, "temperature": 1, "min_p": None,
        "repetition_penalty": 1.05, "typical_p": 1.0, "num_beams": 1, "suppress_tokens": []})
    defaults = dict(top_k=20, top_p=0.8, temperature=1, repetition_penalty=1.05)
    assert generation_defaults(tmp_path, names) == defaults
    assert capsys.readouterr().err == ""
    odd = dict(typical_p=0.9, no_repeat_ngram_size=3, suppress_tokens=[5], num_beams=4)
    edit(file, do_sample=False, **odd)
    assert generation_defaults(tmp_path, names) == {**defaults, "temperature": 0}
    line, = capsys.readouterr().err.splitlines()
    assert all(key in line for key in odd)


@pytest.mark.parametrize("generation, config, expected", [
    ({}, None, {2}), ({}, 7, {2, 7}), ({}, [7, 8], {2, 7, 8}), ({"eos_token_id": 9}, [7], {2, 9}),
    ({"eos_token_id": [9, 7]}, 8, {2, 7, 9}), ({"eos_token_id": None}, 7, {2, 7}),
    ({"eos_token_id": 0}, 7, {0, 2})])
def test_what_ends_an_answer_is_stated_in_three_places(generation, config, expected, tmp_path):
    make_tokenizer(tmp_path)
    write_json(tmp_path / "config.json", {"eos_token_id": config})
    write_json(tmp_path / "generation_config.json", generation)
    assert end_ids(tmp_path, load_tokenizer(tmp_path)) == expected
