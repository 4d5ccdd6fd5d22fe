"""Checkpoints, tokenizers and chat templates that transformers wrote, read by us: the same logits, tokens and text.
Damaged or unsupported ones are refused in one line that names what is wrong."""
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer

from bench.loading import make_checkpoint, measure
from dms import InputError, masked_attention
from kv_cache import KVCache
from model import ModelConfig, Sequence, generate, load_model, load_tokenizer, weight_files

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

ROOT = Path(__file__).resolve().parent.parent
LENGTH = 120  # tokens; far beyond the 32 that scaled RoPE calls the original context
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
LINEAR = dict(rope_type="linear", factor=4.0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=3.0, beta_slow=0.5)
FAMILIES = {
    "llama": ("llama", {}),
    "llama tied": ("llama", dict(tie_word_embeddings=True)),
    "llama biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama head_dim": ("llama", dict(head_dim=24)),
    "llama one head per group": ("llama", dict(num_key_value_heads=4)),
    "llama llama3": ("llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "llama linear": ("llama", dict(rope_parameters=LINEAR)),
    "llama yarn": ("llama", dict(rope_parameters=YARN)),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2 yarn": ("qwen2", dict(rope_parameters={k: v for k, v in YARN.items() if "beta" not in k})),
    "qwen3": ("qwen3", {}),
    "qwen3 tied, biases": ("qwen3", dict(tie_word_embeddings=True, attention_bias=True)),
    "qwen3 head_dim": ("qwen3", dict(head_dim=32)),
    "qwen3 theta": ("qwen3", dict(rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen3 yarn": ("qwen3", dict(rope_parameters=YARN)),
    "qwen3 yarn attention_factor": ("qwen3", dict(rope_parameters={**YARN, "attention_factor": 0.7})),
    "qwen3 yarn mscale": ("qwen3", dict(rope_parameters={**YARN, "mscale": 2.0, "mscale_all_dim": 0.6})),
    "qwen3 yarn mscale alone": ("qwen3", dict(rope_parameters={**YARN, "mscale": 2.0})),
    "qwen3 yarn untruncated": ("qwen3", dict(rope_parameters={**YARN, "truncate": False})),
    "qwen3 yarn no original": ("qwen3", dict(rope_parameters={"rope_type": "yarn", "factor": 4.0},
                                             max_position_embeddings=40)),
}


def oracle(kind="qwen3", seed=0, dtype=torch.float32, **changes):
    """A random transformers model in which every weight matters: no norm is one, no bias is zero."""
    settings = dict(vocab_size=64, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=16, max_position_embeddings=512, attn_implementation="eager")
    if kind == "qwen2":
        del settings["head_dim"]
    config = transformers.AutoConfig.for_model(kind, **{**settings, **changes})
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.tie_weights()
    for name, p in model.named_parameters():
        with torch.no_grad():
            if "norm" in name:
                p.uniform_(0.5, 1.5, generator=generator)
            else:
                p.normal_(0, 0.4 if p.ndim == 1 else 1.5 * p.shape[1] ** -0.5, generator=generator)
    return model.requires_grad_(False).eval()


def saved(folder, kind="qwen3", seed=0, dtype=torch.float32, shard=None, **changes):
    """`oracle`, also saved to the folder: (model, folder)."""
    model = oracle(kind, seed, dtype, **changes)
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    return model, folder


def tokens(n=LENGTH, seed=1, batch=1, vocabulary=64):
    return torch.randint(0, vocabulary, (batch, n), generator=torch.Generator().manual_seed(seed))


def edit(file, change):
    """Rewrite a JSON file through change(data)."""
    data = json.loads(Path(file).read_text())
    data = change(data) or data
    Path(file).write_text(json.dumps(data))


def same_logits(model, expected_model, ids=None, tolerance=1e-4):
    ids = tokens() if ids is None else ids
    with torch.no_grad():
        torch.testing.assert_close(model(ids), expected_model(ids).logits.to(model.dtype), atol=tolerance, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The same logits and tokens as transformers


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_and_greedy_tokens_equal_transformers(family, tmp_path):
    kind, changes = FAMILIES[family]
    theirs, folder = saved(tmp_path, kind, **changes)
    ours = load_model(folder)
    ids = tokens()
    expected = theirs(ids).logits
    assert expected.std() > 0.3  # the comparison is of something
    torch.testing.assert_close(ours(ids), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours(ids, cache=KVCache(ours.config, 1, memory=1e6)), expected, atol=1e-4, rtol=0)
    cache = KVCache(ours.config, 1, page_size=8, memory=1e6)
    steps = torch.cat([ours(ids[:, t:t + 1], cache=cache) for t in range(LENGTH)], dim=1)
    torch.testing.assert_close(steps, expected, atol=1e-4, rtol=0)

    prompts, greedy = tokens(40, seed=2, batch=2), []
    out = theirs(prompts, use_cache=True)
    for _ in range(12):
        greedy.append(out.logits[:, -1].argmax(-1))
        out = theirs(greedy[-1][:, None], past_key_values=out.past_key_values, use_cache=True)
    some = [Sequence(prompt, 12) for prompt in prompts.tolist()]
    for _ in generate(ours, KVCache(ours.config, 2), some):
        pass
    assert [s.new for s in some] == torch.stack(greedy, dim=1).tolist()


@pytest.mark.parametrize("family", [f for f in FAMILIES if "rope_parameters" in FAMILIES[f][1]])
@torch.no_grad()
def test_rope_scaling_is_felt_at_the_tested_length(family, tmp_path):
    """Without the scaling the logits differ, by far more than the tolerance above."""
    kind, changes = FAMILIES[family]
    theirs = oracle(kind, **changes)
    plain = oracle(kind, **{k: v for k, v in changes.items() if k != "rope_parameters"})
    plain.load_state_dict(theirs.state_dict())
    assert (theirs(tokens()).logits - plain(tokens()).logits).abs().max() > 0.05


def test_every_variant_of_yarn_gives_its_own_logits():
    """So that no test above passes for want of a difference."""
    variants = [f for f in FAMILIES if f.startswith("qwen3 yarn") and f != "qwen3 yarn mscale alone"]
    logits = [oracle(*FAMILIES[f][:1], **FAMILIES[f][1])(tokens()).logits for f in variants]
    for i in range(len(logits)):
        for j in range(i):
            assert (logits[i] - logits[j]).abs().max() > 0.01, (variants[i], variants[j])


@pytest.mark.parametrize("kind, changes", [
    ("llama", {}),
    ("llama", dict(rope_parameters={**LLAMA3, "rope_theta": 5e5, "factor": 32.0,
                                    "original_max_position_embeddings": 8192})),
    ("qwen3", dict(rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    ("qwen3", dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e6, factor=4.0,
                                        original_max_position_embeddings=32768))),
])
@torch.no_grad()
def test_published_frequencies_hold_at_far_positions(kind, changes, tmp_path):
    """Frequencies of the sizes in use: what float32 rounds in them is a hundredth of a turn by 100,000 tokens."""
    changes = {**changes, "head_dim": 128, "max_position_embeddings": 131072}
    theirs, folder = saved(tmp_path, kind, num_hidden_layers=1, **changes)
    ours, rotary = load_model(folder), theirs.model.rotary_emb
    assert ours.rope_scale == rotary.attention_scaling
    assert ((ours.rope_freq.double() - rotary.inv_freq.double()) * 131072).abs().max() < 1e-4
    ids, far = tokens(), 100_000
    x = ours.lm_head(ours.hidden(ids, masked_attention(ours.config), torch.tensor([far])))
    expected = theirs(ids, position_ids=torch.arange(far, far + LENGTH)[None]).logits
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_ragged_batches_and_chunks_equal_transformers_row_by_row(tmp_path):
    theirs, folder = saved(tmp_path, "llama", rope_parameters=LLAMA3)
    ours, ids, lengths = load_model(folder), tokens(batch=3), torch.tensor([120, 1, 77])
    cache = KVCache(ours.config, 3, chunk=16)
    logits = ours(ids, cache=cache, lengths=lengths)
    for row, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(logits[row, :n], theirs(ids[row:row + 1, :n]).logits[0], atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# config.json in both spellings


def older(raw, rope_key="rope_type"):
    """The config.json that transformers 5 wrote as transformers 4 spelt it."""
    rope = dict(raw.pop("rope_parameters"))
    raw["rope_theta"] = rope.pop("rope_theta", 10000.0)
    kind = rope.pop("rope_type")
    raw["rope_scaling"] = None if kind == "default" else {rope_key: kind, **rope}
    raw["torch_dtype"] = raw.pop("dtype")
    raw.pop("layer_types", None)
    return raw


@pytest.mark.parametrize("rope_key", ["type", "rope_type"])
@pytest.mark.parametrize("family", ["llama", "llama llama3", "llama linear", "qwen2 yarn", "qwen3 theta",
                                    "qwen3 yarn mscale"])
def test_both_spellings_of_config_json_are_one_model(family, rope_key, tmp_path):
    kind, changes = FAMILIES[family]
    theirs, folder = saved(tmp_path, kind, **changes)
    raw = json.loads((folder / "config.json").read_text())
    assert "rope_parameters" in raw and "dtype" in raw and "rope_scaling" not in raw
    edit(folder / "config.json", lambda raw: older(raw, rope_key))
    same_logits(load_model(folder), theirs)
    edit(folder / "config.json", lambda raw: raw["rope_scaling"] and raw["rope_scaling"].update(
        type=raw["rope_scaling"].get("type") or raw["rope_scaling"]["rope_type"], rope_type=changes[
            "rope_parameters"]["rope_type"]))  # some files have both
    same_logits(load_model(folder), theirs)


@pytest.mark.parametrize("value", ["absent", None])
@pytest.mark.parametrize("key", ["head_dim", "num_key_value_heads", "rope_scaling", "rope_parameters", "mlp_bias",
                                 "attention_bias", "tie_word_embeddings", "partial_rotary_factor", "layer_types",
                                 "sliding_window", "quantization_config", "hidden_act", "rms_norm_eps"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_what_may_be_absent_or_null(kind, key, value, tmp_path):
    head_dim = 128 if (kind, key, value) == ("qwen3", "head_dim", "absent") else 16  # 128 is Qwen3's own default
    sizes = {} if kind == "qwen2" else dict(head_dim=head_dim)
    theirs, folder = saved(tmp_path, kind, num_hidden_layers=1, num_key_value_heads=4, **sizes)
    edit(folder / "config.json", lambda raw: raw.pop(key, None) and None if value == "absent"
         else raw.update({key: value}))
    same_logits(load_model(folder), theirs, tokens(30))


def test_yarn_takes_its_factor_from_the_context_where_it_is_null(tmp_path):
    rope = {**YARN, "factor": None, "rope_theta": 10000.0}
    theirs = oracle(rope_parameters={**YARN, "factor": 16.0})
    theirs.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", lambda raw: raw.update(rope_parameters=rope))
    same_logits(load_model(tmp_path), theirs)
    same_logits(load_model(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path))


def test_config_written_back_is_read_by_transformers_and_by_us(tmp_path):
    for family, (kind, changes) in FAMILIES.items():
        theirs, folder = saved(tmp_path / family, kind, **changes)
        config = ModelConfig.from_dict(json.loads((folder / "config.json").read_text()))
        (folder / "config.json").write_text(json.dumps({**config.to_dict(), "torch_dtype": "float32"}))
        assert ModelConfig.from_dict(json.loads((folder / "config.json").read_text())) == config
        again = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        torch.testing.assert_close(again(tokens(60)).logits, theirs(tokens(60)).logits, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_shards(tmp_path):
    theirs, folder = saved(tmp_path, "qwen2", shard="40KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 4 and not (folder / "model.safetensors").exists()
    same_logits(load_model(folder), theirs)
    assert len(weight_files(folder)) == len(list(folder.glob("model-*-of-*.safetensors")))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_converted_when_they_are_read(stored, tmp_path):
    folder = saved(tmp_path, "llama", dtype=stored, attention_bias=True, shard="30KB")[1]
    for wanted, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.3)):
        ours = load_model(folder, dtype=wanted)
        assert {p.dtype for p in ours.parameters()} == {wanted}
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=wanted, attn_implementation="eager")
        same_logits(ours, theirs, tokens(50), tolerance)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_sliding_window_that_no_layer_uses_is_ignored(kind, tmp_path):
    theirs, folder = saved(tmp_path, kind, use_sliding_window=False)
    for settings in (dict(sliding_window=4, use_sliding_window=False, max_window_layers=0),
                     dict(sliding_window=4, use_sliding_window=True, max_window_layers=2),
                     dict(sliding_window=4, use_sliding_window=True, max_window_layers=1,
                          layer_types=["full_attention"] * 2),
                     dict(sliding_window=None, use_sliding_window=True, max_window_layers=0)):
        raw = json.loads((folder / "config.json").read_text())
        raw.pop("layer_types", None)
        (folder / "config.json").write_text(json.dumps({**raw, **settings}))
        same_logits(load_model(folder), theirs)
        same_logits(load_model(folder), transformers.AutoModelForCausalLM.from_pretrained(folder))


BASE = dict(model_type="qwen3", vocab_size=64, hidden_size=64, intermediate_size=80, num_hidden_layers=2, head_dim=16,
            num_attention_heads=4, num_key_value_heads=2)
QUANTIZED = {"quant_method": "awq", "bits": 4}


@pytest.mark.parametrize("changes, named", [
    (dict(use_sliding_window=True, sliding_window=4, max_window_layers=1), "sliding_window"),
    (dict(use_sliding_window=True, max_window_layers=1), "sliding_window"),  # its default is 4096
    (dict(use_sliding_window=True, sliding_window=4, max_window_layers=1, model_type="qwen2"), "sliding_window"),
    (dict(layer_types=["full_attention", "sliding_attention"], sliding_window=4), "sliding_attention"),
    *[(dict(model_type=kind), kind) for kind in ("mistral", "gemma2", "qwen3_moe", "gpt2", "llama4")],
    (dict(model_type=None), "model_type"),
    *[(dict(rope_scaling={key: kind, "factor": 2.0}), kind) for kind in ("dynamic", "longrope", "proportional", "su")
      for key in ("type", "rope_type")],
    (dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "dynamic"),
    (dict(rope_parameters={"full_attention": {"rope_type": "default"}}), "rope parameters"),
    (dict(rope_scaling={"type": "linear"}), "factor"),
    (dict(rope_scaling={"type": "linear", "factor": 0}), "linear"),
    (dict(rope_scaling={"type": "llama3", "factor": 8.0}), "low_freq_factor"),
    (dict(partial_rotary_factor=0.5), "partial rotary"),
    (dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "partial rotary"),
    (dict(quantization_config=QUANTIZED), "quantized"),
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
        ModelConfig.from_dict({**BASE, **changes}, "folder/config.json")
    assert named in str(e.value) and str(e.value).startswith("folder/config.json: ") and "\n" not in str(e.value)


# ---------------------------------------------------------------------------------------------------------------------
# Damaged folders


def refuse(folder, *named, **arguments):
    with pytest.raises(InputError) as e:
        load_model(folder, **arguments)
    assert "\n" not in str(e.value), str(e.value)
    for name in named:
        assert name in str(e.value), str(e.value)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("sharded"), shard="40KB")[1]


@pytest.fixture
def broken(sharded, tmp_path):
    """A copy of a sound sharded checkpoint, to be broken: its folder and the names of its shards."""
    for file in sharded.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path, sorted(file.name for file in tmp_path.glob("*.safetensors"))


def test_a_missing_shard(broken):
    folder, shards = broken
    (folder / shards[2]).unlink()
    refuse(folder, shards[2], "missing")


@pytest.mark.parametrize("size", [0, 5, 8, 100, -1])
def test_a_truncated_shard(broken, size):
    folder, shards = broken
    data = (folder / shards[1]).read_bytes()
    (folder / shards[1]).write_bytes(data[:size])
    refuse(folder, shards[1], "truncated")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/../b.safetensors", "..", "", 7, None,
                                  "C:\\m.safetensors", "..\\m.safetensors", "config.json", "no\nbreak",
                                  "x" * 300 + ".safetensors", "\x00.safetensors"])
def test_a_shard_elsewhere(broken, name):
    folder, _ = broken
    save_file({"a": torch.zeros(1)}, folder.parent / "model.safetensors")
    edit(folder / "model.safetensors.index.json", lambda raw: raw["weight_map"].update({"lm_head.weight": name}))
    refuse(folder, "missing" if str(name)[:1] in ("x", "\x00") else "model.safetensors.index.json")


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{", "", "\xff", "null"])
def test_a_damaged_index(broken, index):
    folder, _ = broken
    (folder / "model.safetensors.index.json").write_text(index, encoding="latin-1")
    refuse(folder, "model.safetensors.index.json")


def change_tensors(folder, shard, change):
    tensors = load_file(folder / shard)
    change(tensors)
    save_file(tensors, folder / shard, {"format": "pt"})


def test_a_tensor_in_two_shards(broken):
    folder, shards = broken
    change_tensors(folder, shards[0], lambda t: t.update({"model.norm.weight": torch.ones(64)}))
    refuse(folder, "model.norm.weight", "another shard")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.q_norm.weight", "lm_head.weight"])
def test_a_missing_tensor(broken, name):
    folder, shards = broken
    for shard in shards:
        change_tensors(folder, shard, lambda t: t.pop(name, None))
    refuse(folder, name, "missing")


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "odd",
                                  "model.layers.0.self_attn.dms_proj_alpha.weight", "two\nlines"])
def test_a_tensor_without_a_place(broken, name):
    folder, shards = broken
    change_tensors(folder, shards[0], lambda t: t.update({name: torch.ones(1)}))
    refuse(folder, name.splitlines()[0], "no place")


@pytest.mark.parametrize("shape", [(64,), (65, 64), (64, 64, 1), (0, 64), ()])
def test_a_tensor_of_another_shape(broken, shape):
    folder, shards = broken
    shard = next(s for s in shards if "lm_head.weight" in safe_open(folder / s, "pt").keys())
    change_tensors(folder, shard, lambda t: t.update({"lm_head.weight": torch.ones(shape)}))
    refuse(folder, "lm_head.weight", "shape", "[64, 64]")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_a_tensor_of_whole_numbers(broken, dtype):
    folder, shards = broken
    shard = next(s for s in shards if "lm_head.weight" in safe_open(folder / s, "pt").keys())
    change_tensors(folder, shard, lambda t: t.update({"lm_head.weight": torch.ones(64, 64).to(dtype)}))
    refuse(folder, "lm_head.weight", "not supported")


def test_an_adapter_file_may_hold_adapters_only(tmp_path):
    folder = saved(tmp_path / "base")[1]
    adapters = {f"model.layers.{i}.self_attn.dms_proj_alpha{part}.weight": torch.ones(shape)
                for i in range(2) for part, shape in (("", (2, 64)), ("_norm", (64,)))}
    save_file(adapters, tmp_path / "adapters.safetensors")
    assert load_model(folder, adapter=tmp_path / "adapters.safetensors").config.dms is not None
    save_file({**adapters, "model.norm.weight": torch.zeros(64)}, tmp_path / "adapters.safetensors")
    refuse(folder, "adapters.safetensors", "model.norm.weight", adapter=tmp_path / "adapters.safetensors")
    adapters.popitem()
    save_file(adapters, tmp_path / "adapters.safetensors")
    refuse(folder, "missing", "dms_proj_alpha_norm", adapter=tmp_path / "adapters.safetensors")
    refuse(folder, "0 safetensors files", adapter=tmp_path / "none")
    refuse(folder, "0 safetensors files", adapter="x" * 5000)


def test_leftovers_of_older_checkpoints_are_ignored(tmp_path):
    theirs, folder = saved(tmp_path, "llama", tie_word_embeddings=True)
    change_tensors(folder, "model.safetensors", lambda t: t.update({
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    same_logits(load_model(folder), theirs, tokens(20))


def test_a_pickle_is_named_and_never_opened(tmp_path, monkeypatch):
    trap = b"cos\nsystem\n(S'touch %s'\ntR." % str(tmp_path / "executed").encode()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BASE))
    (folder / "pytorch_model.bin").write_bytes(trap)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    refuse(folder, "pickle", str(folder))
    (folder / "model.safetensors").write_bytes(trap)  # under a safe name it is no safer
    refuse(folder, "model.safetensors")
    assert not (tmp_path / "executed").exists()


def test_not_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "none", tmp_path / "file", "/", "", ".", "a/b/c", "~", "../x", "owner/", "/owner",
                 "\x00/a", "a" * 5000, "a/" + "b" * 5000, "two\nlines"):
        refuse(path)
        with pytest.raises(InputError):
            load_tokenizer(path)


def test_a_hub_id_offline_is_refused_at_once(tmp_path):
    code = ("import time, model\nfor load in (model.load_model, model.load_tokenizer):\n"
            "  begin = time.perf_counter()\n  try:\n    load('owner/name-of-no-model')\n"
            "  except model.InputError as e:\n    print(time.perf_counter() - begin, e)")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("owner/name-of-no-model: " in line for line in lines), done
    assert all(float(line.split()[0]) < 30 for line in lines)  # the import included; no waiting for a network


def test_folders_of_another_size_are_refused_without_allocating(sharded, tmp_path):
    begin = time.process_time()
    for key, value in (("vocab_size", 2**31 - 1), ("hidden_size", 2**20), ("intermediate_size", 2**31 - 1),
                       ("num_hidden_layers", 4000), ("num_attention_heads", 2**16), ("head_dim", 2**12)):
        for file in sharded.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        edit(tmp_path / "config.json", lambda raw: raw.update({key: value}))
        refuse(tmp_path)
    assert time.process_time() - begin < 20


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """210 MB of random bf16 in seven shards, the largest tensor 33 MB."""
    folder = tmp_path_factory.mktemp("big")
    make_checkpoint(folder, ModelConfig(
        model_type="qwen3", vocab_size=16384, hidden_size=1024, intermediate_size=4096, num_hidden_layers=5,
        num_attention_heads=8, num_key_value_heads=4, head_dim=128, tie_word_embeddings=True), shard_bytes=2**25)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="private memory is read from /proc/self/status")
@pytest.mark.parametrize("dtype, size", [("bfloat16", 2), ("float32", 4)])
def test_loading_holds_no_second_copy(dtype, size, big):
    parameters = json.loads((big / "model.safetensors.index.json").read_text())["metadata"]["total_size"] // 2
    result = measure(big, dtype)
    assert result["bytes"] == size * parameters > 190e6
    assert result["peak"] < 1.1 * result["bytes"] + 100e6  # the allowance: modules that torch imports on the way


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers and chat templates

TEXTS = ["", " ", "hello world", "Hello,  World!\n\n\ttabs   and 12345 numbers", "naïve café — ☃ 漢字 🙂👍🏽",
         "a\r\nb", "e\u0301 against \u00e9", "<|im_start|>user\nhi<|im_end|>\n", "x<|eot_id|>y <|begin_of_text|>",
         "don't we'll", "<think>\nhm\n</think>\n\n4", " before and after ", "\x00\x7f\u200b\ufeff",
         "def f(x):\n    return x ** 2"]
CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
          "'<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
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
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
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
        {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {%- if reasoning and (loop.index0 > ns.last or loop.last) %}
        {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + content }}
    {%- endif %}
    {%- if message.meta is defined %}{{- message.meta | tojson }}{{- message.meta | tojson(indent=2) }}{%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if tools %}{{- 'TOOLS' }}{%- endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
CHAT = [{"role": "system", "content": "  Be <brief> & \"good\". "}, {"role": "user", "content": "2 + 2?\n"},
        {"role": "assistant", "content": "<think>\n\nIt's 4.\n</think>\n\n4"}, {"role": "user", "content": "naïve ☃?"}]


SPECIAL = {"qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
           "llama": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]}
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
           r"\s+(?!\S)|\s+")


def make_tokenizer(folder, style, **settings):
    """A small byte-level BPE tokenizer in the manner of Qwen or of Llama 3, saved by transformers, and returned."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"),
                                                  pre_tokenizers.ByteLevel(False, use_regex=False)])
    fast.decoder = decoders.ByteLevel()
    fast.train_from_iterator(TEXTS * 5, trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=SPECIAL[style],
        show_progress=False))
    if style == "qwen":
        fast.normalizer = normalizers.NFC()
        fast.post_processor = processors.ByteLevel(trim_offsets=False)
        fast.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
        names = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    else:
        begin = "<|begin_of_text|>"
        fast.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1",
                                          special_tokens=[(begin, fast.token_to_id(begin))])])
        names = dict(bos_token=begin, eos_token="<|eot_id|>")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **names, **settings)
    theirs.save_pretrained(folder)
    return theirs


def same_text(ours, theirs, messages=CHAT, **variables):
    for add_generation_prompt in (False, True):
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt,
                                          **variables)
        assert ours.apply_chat_template(messages, add_generation_prompt, **variables) == text
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("settings", [dict(), dict(add_bos_token=True), dict(add_bos_token=False),
                                      dict(add_bos_token=True, add_eos_token=True)])
@pytest.mark.parametrize("style", ["qwen", "llama"])
def test_ids_and_text_equal_transformers(style, settings, tmp_path):
    """Where there is a tokenizer.json, add_bos_token and add_eos_token beside it mean nothing."""
    make_tokenizer(tmp_path, style)
    edit(tmp_path / "tokenizer_config.json", lambda raw: raw.update(settings))
    ours, theirs = load_tokenizer(tmp_path), transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs(text, add_special_tokens=special)["input_ids"] == theirs.encode(
                text, add_special_tokens=special)
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip, clean_up_tokenization_spaces=False)
    begins = theirs.convert_tokens_to_ids("<|begin_of_text|>") if style == "llama" else None
    assert ours.encode("hello")[0] == begins or style == "qwen"
    assert ours.encode("hello", add_special_tokens=False)[0] != begins
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert ours.special(name) == getattr(theirs, name)
    assert ours.token_id(ours.special("eos_token")) == theirs.eos_token_id and ours.token_id(None) is None


def test_half_a_character_decodes_as_in_transformers(tmp_path):
    theirs, ids = make_tokenizer(tmp_path, "qwen"), None
    ours = load_tokenizer(tmp_path)
    ids = ours.encode("☃漢🙂")
    for i in range(len(ids)):
        for j in range(i, len(ids)):
            assert ours.decode(ids[i:j]) == theirs.decode(ids[i:j])


def test_truncation_and_padding_in_the_file_do_not_apply(tmp_path):
    """As in transformers, which resets both at every call."""
    make_tokenizer(tmp_path, "qwen")
    edit(tmp_path / "tokenizer.json", lambda raw: raw.update(
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        padding={"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "<|endoftext|>"}))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).encode(TEXTS[3]) == theirs(TEXTS[3])["input_ids"]


def test_a_special_token_may_be_an_object(tmp_path):
    make_tokenizer(tmp_path, "qwen")
    edit(tmp_path / "tokenizer_config.json", lambda raw: raw.update(
        eos_token={"content": "<|im_end|>", "lstrip": False, "__type": "AddedToken"}, bos_token=None))
    ours = load_tokenizer(tmp_path)
    assert ours.special("eos_token") == "<|im_end|>" and ours.special("bos_token") is None


@pytest.mark.parametrize("style, template", [("qwen", CHATML), ("llama", LLAMA3_CHAT), ("qwen", THINKING)])
def test_chat_templates_render_as_in_transformers(style, template, tmp_path):
    theirs = make_tokenizer(tmp_path, style, chat_template=template)
    ours = load_tokenizer(tmp_path)
    for messages in (CHAT, CHAT[1:], CHAT[:3], CHAT[1:2], CHAT + CHAT[1:] * 20):
        same_text(ours, theirs, messages)
    for enable_thinking in (True, False):
        same_text(ours, theirs, CHAT, enable_thinking=enable_thinking)
    meta = {"ünï": ["<a>", 1.5, None, {"b": "'&"}]}
    same_text(ours, theirs, [{**m, "meta": meta} for m in CHAT], date_string="1 Jan")


@pytest.mark.parametrize("template", [
    "{% for m in messages %}\n  {% if loop.first %}\n    {{ m.content }}\n  {% endif %}\n{% endfor %}\n",
    "{{ messages | map(attribute='role') | join }}{{ messages | selectattr('role', 'eq', 'user') | list | length }}",
    "{{ messages | tojson(indent=4) }}|{{ {'b': 1, 'a': 'é<'} | tojson(sort_keys=true, separators=(',', ':')) }}",
    "{{ 'é' | tojson(ensure_ascii=true) }}{{ strftime_now('%Y') }}{{ bos_token is defined }}{{ pad_token }}",
    "{% macro row(m) %}[{{ m.role | upper }}]{% endmacro %}{% for m in messages %}{{ row(m) }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}{{ dict(a=1).items() | list }}",
    "{{ tools is none }}{{ documents is none }}{{ range(3) | list }}{{ unknown }}{{ unknown is defined }}",
])
def test_corners_of_jinja_render_as_in_transformers(template, tmp_path):
    theirs = make_tokenizer(tmp_path, "qwen", chat_template=template)
    same_text(load_tokenizer(tmp_path), theirs)


@pytest.mark.parametrize("place", ["string", "list", "jinja", "jinja over string"])
def test_the_places_of_a_template(place, tmp_path):
    make_tokenizer(tmp_path, "qwen")
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    named = [{"name": "tool_use", "template": "wrong"}, {"name": "default", "template": CHATML}]
    if place in ("string", "list", "jinja over string"):
        value = {"string": CHATML, "list": named, "jinja over string": "wrong"}[place]
        edit(tmp_path / "tokenizer_config.json", lambda raw: raw.update(chat_template=value))
    if place.startswith("jinja"):
        (tmp_path / "chat_template.jinja").write_text(CHATML)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    same_text(load_tokenizer(tmp_path), theirs)


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
    "{{ namespace.__init__.__globals__ }}", "{{ dict.__mro__[1] }}", "{{ dict.mro() }}", "{{ range(10**9) | list }}",
    "{% for m in messages %}", "{{ raise_exception('two\nlines') }}", "{{ 1 / 0 }}", "{{ none.x.y }}", "{{ 1 + 'a' }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{" + "(" * 3000 + ")" * 3000 + "}}",
])
def test_a_template_that_breaks_out_or_breaks_down_is_refused(template, tmp_path, monkeypatch):
    make_tokenizer(tmp_path, "qwen", chat_template=template)
    monkeypatch.chdir(tmp_path)
    tokenizer, messages = load_tokenizer(tmp_path), [dict(m) for m in CHAT]
    with pytest.raises(InputError) as e:
        tokenizer.apply_chat_template(messages)
    assert "\n" not in str(e.value) and "chat template" in str(e.value)
    assert messages == CHAT and not (tmp_path / "executed").exists()


def test_no_template_and_no_tokenizer(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer\.json: not found"):
        load_tokenizer(tmp_path)
    make_tokenizer(tmp_path, "qwen")
    with pytest.raises(InputError, match="no chat template"):
        load_tokenizer(tmp_path).apply_chat_template(CHAT)
    (tmp_path / "tokenizer_config.json").unlink()  # it is a help, not a need
    assert load_tokenizer(tmp_path).encode("a b") and load_tokenizer(tmp_path).special("eos_token") is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: not a usable tokenizer"):
        load_tokenizer(tmp_path)
