"""Every published spelling of a DMS checkpoint: settings, decisions and logits against an independent computation."""
import json

import pytest
import torch
from conftest import plain_forward, small_config
from safetensors.torch import save_file

import dms
from dms import InputError, read_settings
from kv_cache import KVCache
from model import Model, load_model, save_model

BASE_KEYS = {"qwen3": dict(model_type="qwen3"), "llama": dict(model_type="llama", tie_word_embeddings=False),
             "qwen2": dict(model_type="qwen2")}


def base(folder, family, seed=0, **extra_keys):
    """A random dense checkpoint in which everything matters; its config.json with `extra_keys`. Returns the Model."""
    torch.manual_seed(seed)
    model = Model(small_config(**BASE_KEYS[family])).requires_grad_(False)
    for name, p in model.named_parameters():
        p.normal_(1.0 if "norm" in name else 0.0, 0.1 if "norm" in name or "bias" in name else 0.4)
    save_model(model, folder, torch.float32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **extra_keys}))
    return model


def adapters(seed=1, layers=2, C=32, heads=2):
    torch.manual_seed(seed)
    return {f"model.layers.{i}.self_attn.{name}": value for i in range(layers) for name, value in
            (("dms_proj_alpha.weight", torch.randn(heads, C) * 0.02),
             ("dms_proj_alpha_norm.weight", torch.rand(C) + 0.5))}


def nvidia_neuron(folder):  # as nvidia/Qwen3-8B-DMS-8x: keys in config.json, no dms_separate_alpha
    base(folder, "qwen3", dms_window_size=5, dms_alpha_scale=100.0, dms_initial_alpha_offset=5.0, dms_cr=8,
         dms_tau=0.1, dms_disable_eviction=False, auto_map={"AutoModelForCausalLM": "modeling.Never"})
    return folder, dict(window=5, scale=100.0, offset=5.0, shift=1, per="head", separate=False), {}


def nvidia_adapter(folder, per="head"):
    model = base(folder, "qwen3", dms_window_size=7, dms_alpha_scale=90, dms_initial_alpha_offset=2.5,
                 dms_separate_alpha=True, dms_alpha_per=per)
    save_file({**{k: p.contiguous() for k, p in model.named_parameters()}, **adapters()},
              folder / "model.safetensors")
    return folder, dict(window=7, scale=90.0, offset=2.5, shift=1, per=per, separate=True), {}


def nvidia_layer(folder):
    return nvidia_adapter(folder, "layer")


def shisa(folder, nested=False):  # as shisa-ai/Llama-3.2-1B-DMS-8x: dms_metadata.json beside the weights, no shift
    base(folder, "llama")
    settings = {"window_size": 6, "alpha_scale": 50.0, "alpha_offset": 4.0, "target_cr": 8.0}
    (folder / "dms_metadata.json").write_text(json.dumps({"config": settings, "step": 900} if nested else settings))
    return folder, dict(window=6, scale=50.0, offset=4.0, shift=0, per="head", separate=False), {}


def shisa_nested(folder):
    return shisa(folder, True)


def overlay(folder):  # only the 2L tensors, to be laid over a base model; settings beside them
    base(folder, "qwen2")
    (folder / "adapters").mkdir()
    save_file(adapters(), folder / "adapters" / "any-name.safetensors")
    (folder / "adapters" / "config.json").write_text(json.dumps(
        {"dms_window_size": 4, "dms_alpha_scale": 100.0, "dms_initial_alpha_offset": 5.0, "dms_separate_alpha": True}))
    (folder / "adapter.safetensors").write_bytes((folder / "adapters" / "any-name.safetensors").read_bytes())
    return folder, dict(window=4, scale=100.0, offset=5.0, shift=1, per="head", separate=True), \
        {"adapter": folder / "adapters"}


FORMATS = [nvidia_neuron, nvidia_adapter, nvidia_layer, shisa, shisa_nested, overlay]


@pytest.mark.parametrize("make", FORMATS)
def test_decisions_and_logits(make, tmp_path):
    folder, settings, options = make(tmp_path)
    model = load_model(folder, **options)
    ids = torch.randint(0, 67, (70,), generator=torch.Generator().manual_seed(3))
    expected, evict = plain_forward(folder, ids, settings)
    share = evict.float().mean().item()
    assert 0.05 < share < 0.95  # the case decides something
    decided = []
    masked = dms.masked_attention(model.config)

    def attend(layer, q, k, v, logits):
        decided.append(dms.decisions(logits, model.config.dms.shift)[0])
        return masked(layer, q, k, v, logits)

    def close(logits):
        torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=1e-4)

    close(model.lm_head(model.hidden(ids[None], attend)))
    assert torch.equal(torch.stack(decided), evict)
    close(model(ids[None]))
    w = model.config.dms.window
    cuts = [[70], [1] * 70, [w, 1, w + 1, 1, 16 - 2 * w % 16, 1] + [1] * 3, [33, 1, 1, 20]]
    for cut in cuts:  # a prompt, token by token, across the window's and the pages' edges, a mix
        cache = KVCache(model.config, 1, page_size=8)
        bounds = [0]
        for n in cut + [70]:
            bounds.append(min(bounds[-1] + n, 70))
        close(torch.cat([model(ids[None, a:b], cache=cache) for a, b in zip(bounds, bounds[1:]) if b > a], dim=1))
        held = (~evict | (torch.arange(70) >= 70 - 1 - w)).sum(-1)
        assert cache.stats()["pairs_per_head"] == held.tolist()


def test_switched_off_eviction_is_dense(tmp_path):
    folder, *_ = nvidia_adapter(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dms_disable_eviction": True}))
    model, ids = load_model(folder), torch.randint(0, 67, (1, 40))
    torch.testing.assert_close(model(ids)[0], plain_forward(folder, ids[0])[0], atol=1e-4, rtol=1e-4)
    cache = KVCache(model.config, 1)
    model(ids, cache=cache)
    assert cache.stats()["compression_ratio"] == 1


def test_missing_fields_have_their_defaults_and_are_printed(tmp_path, capsys):
    settings = read_settings(tmp_path, {"dms_cr": 8})
    assert (settings.window, settings.scale, settings.offset, settings.shift) == (512, 100.0, 5.0, 1)
    assert (settings.source, settings.per) == ("neuron", "head")
    assert "window = 512" in capsys.readouterr().err
    (tmp_path / "dms_metadata.json").write_text(json.dumps({"window_size": 128}))
    settings = read_settings(tmp_path, {})
    assert (settings.window, settings.shift, settings.source) == (128, 0, "neuron")
    shown = capsys.readouterr().err
    assert "shift = 0" in shown and "window" not in shown and shown.count("\n") == 1
    assert read_settings(tmp_path / "elsewhere", {"model_type": "qwen3"}) is None


@pytest.mark.parametrize("config, metadata, message", [
    ({"dms_window_size": 512}, {"window_size": 256}, "config.json says dms_window_size = 512 and"),
    ({"dms_window_size": -1}, None, "unusable"),
    ({"dms_window_size": "512"}, None, "not of type int"),
    ({"dms_alpha_per": "token"}, None, "unusable"),
    ({"dms_shift": 2}, None, "unusable"),
    ({"dms_alpha_scale": float("nan")}, None, "unusable"),
    ({"dms_separate_alpha": True}, {"window_size": 256}, "adapter.*borrowed|borrowed.*adapter"),
])
def test_contradictory_or_unusable_settings_are_refused(config, metadata, message, tmp_path):
    if metadata is not None:
        (tmp_path / "dms_metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(InputError, match=message):
        read_settings(tmp_path, config)


def test_adapter_file_without_settings_gets_the_defaults(tmp_path, capsys):
    folder, *_ = overlay(tmp_path)
    (folder / "alone").mkdir()
    (folder / "adapter.safetensors").rename(folder / "alone" / "x.safetensors")
    model = load_model(folder, adapter=folder / "alone" / "x.safetensors")
    assert (model.config.dms.source, model.config.dms.window, model.config.dms.shift) == ("adapter", 512, 1)
    assert "window = 512" in capsys.readouterr().err
    (folder / "alone" / "y.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="2 safetensors files"):
        load_model(folder, adapter=folder / "alone")
    with pytest.raises(InputError, match="damaged"):
        load_model(folder, adapter=folder / "alone" / "y.safetensors")


def test_adapters_of_another_model_are_refused(tmp_path):
    folder, *_ = overlay(tmp_path)
    save_file(adapters(C=64), folder / "adapters" / "any-name.safetensors")
    with pytest.raises(InputError, match=r"dms_proj_alpha_norm.weight has shape \[64\]"):
        load_model(folder, adapter=folder / "adapters")
    save_file(adapters(layers=1), folder / "adapters" / "any-name.safetensors")
    with pytest.raises(InputError, match="layers.1.self_attn.dms_proj_alpha"):
        load_model(folder, adapter=folder / "adapters")


def test_adapters_laid_over_other_weights_than_their_own_are_refused(tmp_path):
    model, other = base(tmp_path / "base", "qwen3"), base(tmp_path / "other", "qwen3", seed=5)
    dms.start_retrofit(model, dms.DMSConfig(window=4))
    save_model(model, tmp_path / "adapters", torch.float32, base=tmp_path / "base")
    assert load_model(tmp_path / "base", adapter=tmp_path / "adapters").config.dms.window == 4
    assert other.config.dms is None
    for path in (tmp_path / "adapters", tmp_path / "adapters" / "dms_adapters.safetensors"):
        with pytest.raises(InputError, match="trained on other weights"):
            load_model(tmp_path / "other", adapter=path)
