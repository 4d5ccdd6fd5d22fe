"""What the test files share: small random models, dense and DMS, that decide at random but reproducibly."""
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dms import DMSConfig
from model import Model, ModelConfig

torch.set_num_threads(1)  # the models are tiny


def small_config(**changes):
    settings = dict(model_type="qwen3", vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
                    tie_word_embeddings=True)
    return ModelConfig(**{**settings, **changes})


def small_model(seed=0, dms=None, keep=0.5, **changes):
    """A random model in float32. keep: about this fraction of tokens is kept, through the decisions' offset."""
    torch.manual_seed(seed)
    model = Model(small_config(dms=dms, **changes))
    for name, p in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, 1.0, 0.1)
        else:
            torch.nn.init.normal_(p, 0.0, 0.4 if "proj" in name else 1.0)
    if dms is not None:
        dms.scale, dms.offset = 1.0, {0.1: -2.0, 0.5: 0.0, 0.9: 2.0}[keep]
    return model.requires_grad_(False).eval()


@pytest.fixture
def rng(request):
    return random.Random(request.node.name)


def random_dms(rng):
    return DMSConfig(window=rng.choice([0, 1, 2, 3, 7, 16, 40]), shift=rng.choice([0, 1]),
                     source=rng.choice(["adapter", "neuron"]), per=rng.choice(["head", "head", "layer"]))


def plain_forward(folder, ids, dms=None):
    """Logits (T, V) of a checkpoint with plain RoPE, read and computed with none of the project's code: one head, one
    query, one complex pair of channels at a time where that is what the definition says; and decisions (L, Hkv, T).
    dms: None, or window, scale, offset, shift, per and separate (an adapter; otherwise the borrowed neuron)."""
    c, w = json.loads((folder / "config.json").read_text()), {}
    for file in folder.glob("*.safetensors"):
        w.update({k.removeprefix("model."): v.double() for k, v in load_file(file).items()})
    T, C, eps = len(ids), c["hidden_size"], c["rms_norm_eps"]
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    D = c.get("head_dim") or C // heads
    theta = c.get("rope_theta") or c["rope_parameters"]["rope_theta"]

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    def rotate(x):  # (T, D): channels i and i + D/2 as one complex number, turned by t * theta^(-2i/D)
        z = torch.complex(x[:, :D // 2], x[:, D // 2:])
        angle = torch.arange(T)[:, None] * theta ** (-2 * torch.arange(D // 2).double() / D)
        z = z * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((z.real, z.imag), -1)

    x = w["embed_tokens.weight"][ids]
    decided = []
    for layer in range(c["num_hidden_layers"]):
        p = {k.removeprefix(f"layers.{layer}."): v for k, v in w.items() if k.startswith(f"layers.{layer}.")}

        def linear(x, name):
            y = x @ p[name + ".weight"].T
            return y + p[name + ".bias"] if name + ".bias" in p else y

        h = norm(x, p["input_layernorm.weight"])
        q, k, v = (linear(h, f"self_attn.{n}_proj").view(T, -1, D) for n in "qkv")
        if "self_attn.q_norm.weight" in p:
            q, k = norm(q, p["self_attn.q_norm.weight"]), norm(k, p["self_attn.k_norm.weight"])
        evict = torch.zeros(kv_heads, T, dtype=torch.bool)
        borrowed = [h * heads // kv_heads for h in range(kv_heads)] if dms and not dms["separate"] else []
        if dms:
            s = linear(norm(x, p["self_attn.dms_proj_alpha_norm.weight"]), "self_attn.dms_proj_alpha") \
                if dms["separate"] else torch.stack([q[:, head, D - 1] for head in borrowed], -1)
            z = dms["scale"] * s - dms["offset"]
            for g in range(kv_heads):
                for t in range(T - dms["shift"]):
                    evict[g, t] = z[t + dms["shift"], 0 if dms["per"] == "layer" else g] > 0
        decided.append(evict)
        out = torch.zeros(T, heads, D, dtype=torch.float64)
        for head in range(heads):
            g = head * kv_heads // heads
            query = q[:, head].clone()
            if head in borrowed:
                query[:, D - 1] = 0
            query = rotate(query)
            if head in borrowed:
                query[:, D - 1] = 0
            scores = query @ rotate(k[:, g]).T / math.sqrt(D)
            for i in range(T):
                seen = [j for j in range(i + 1) if not evict[g, j] or i - j <= dms["window"]]
                out[i, head] = torch.softmax(scores[i, seen], 0) @ v[seen, g]
        x = x + linear(out.view(T, -1), "self_attn.o_proj")
        h = norm(x, p["post_attention_layernorm.weight"])
        gate = linear(h, "mlp.gate_proj")
        x = x + linear(gate * torch.sigmoid(gate) * linear(h, "mlp.up_proj"), "mlp.down_proj")
    head = w.get("lm_head.weight", w["embed_tokens.weight"])
    return (norm(x, w["norm.weight"]) @ head.T).float(), torch.stack(decided)
