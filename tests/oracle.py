"""Random models of transformers, which this engine is tested against, saved as checkpoints."""

import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

LENGTH = 120  # tokens; far beyond the 32 that scaled RoPE calls the original context
DEFAULT = dict(rope_type="default", rope_theta=1e6)
LINEAR = dict(rope_type="linear", factor=4.0)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
YARN_DEFAULTS = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
YARN = dict(YARN_DEFAULTS, beta_fast=3.0, beta_slow=0.5)
YARN_OF_CONTEXT = dict(rope_type="yarn", factor=4.0)  # max_position_embeddings is the original one


def scaled(rope, **more):
    return dict(rope_parameters={**rope, **more})


FAMILIES = {  # name: model_type, and what differs from the sizes in `oracle`
    "llama": ("llama", {}),
    "llama tied": ("llama", dict(tie_word_embeddings=True)),
    "llama biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama head_dim": ("llama", dict(head_dim=24)),
    "llama one head per group": ("llama", dict(num_key_value_heads=4)),
    "llama llama3": ("llama", dict(scaled(LLAMA3), tie_word_embeddings=True)),
    "llama linear": ("llama", scaled(LINEAR)),
    "llama yarn": ("llama", scaled(YARN)),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2 yarn": ("qwen2", scaled(YARN_DEFAULTS)),
    "qwen3": ("qwen3", {}),
    "qwen3 tied, biases": ("qwen3", dict(tie_word_embeddings=True, attention_bias=True)),
    "qwen3 head_dim": ("qwen3", dict(head_dim=32)),
    "qwen3 theta": ("qwen3", scaled(DEFAULT)),
    "qwen3 yarn": ("qwen3", scaled(YARN)),
    "qwen3 yarn attention_factor": ("qwen3", scaled(YARN, attention_factor=0.7)),
    "qwen3 yarn mscale": ("qwen3", scaled(YARN, mscale=2.0, mscale_all_dim=0.6)),
    "qwen3 yarn mscale alone": ("qwen3", scaled(YARN, mscale=2.0)),
    "qwen3 yarn untruncated": ("qwen3", scaled(YARN, truncate=False)),
    "qwen3 yarn no original": ("qwen3", dict(scaled(YARN_OF_CONTEXT), max_position_embeddings=40)),
}


def oracle(kind="qwen3", seed=0, dtype=torch.float32, **changes):
    """A random model in which every weight matters: no norm is one, no bias is zero."""
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=80, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                 max_position_embeddings=512, attn_implementation="eager")
    if kind == "qwen2":
        del sizes["head_dim"]
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **changes})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.tie_weights()
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            deviation = 0.4 if parameter.ndim == 1 else 1.5 * parameter.shape[1] ** -0.5
            parameter.normal_(0, deviation, generator=generator)
    return model.eval()


def saved(folder, kind="qwen3", shard=None, **changes):
    """`oracle`, also saved to the folder, in shards of that size: (model, folder)."""
    model = oracle(kind, **changes)
    if shard is None:
        model.save_pretrained(folder)
    else:
        model.save_pretrained(folder, max_shard_size=shard)
    return model, folder


def reloaded(folder, **settings):
    """What transformers reads from a folder."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **settings)


def tokens(n=LENGTH, seed=1, batch=1):
    return torch.randint(0, 64, (batch, n), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def same_logits(ours, theirs, ids=None, tolerance=1e-4):
    ids = tokens() if ids is None else ids
    expected = theirs(ids).logits.to(ours.dtype)
    torch.testing.assert_close(ours(ids), expected, atol=tolerance, rtol=1e-4)


def edit(file, change):
    """Rewrite a JSON file through change(data), which changes it in place."""
    data = json.loads(Path(file).read_text())
    change(data)
    Path(file).write_text(json.dumps(data))
