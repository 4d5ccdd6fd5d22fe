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

from dms import DMSConfig, visible
from model import Model, ModelConfig

torch.set_num_threads(1)  # the models are tiny
NOWHERE = 2**30  # an index that must never be used


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


class Life:
    """A batch in which sequences begin, grow by one token or many, fork and end at random, fed to several caches at
    once; and what each of their rows must hold by the rule. A token's k is its own number, so that pairs tell."""

    def __init__(self, seed, layers=2, device="cpu"):
        self.rng, self.shape, self.device = random.Random(seed), (layers, 2, 8), device
        L, H, D = self.shape
        rng = self.rng
        self.dms = DMSConfig(window=rng.choice([0, 1, 3, 12]), shift=rng.choice([0, 1])) if seed % 4 else None
        config = small_config(dms=self.dms, num_hidden_layers=L, num_key_value_heads=H, head_dim=D)
        self.settings = dict(config=config, batch_size=3, page_size=rng.choice([1, 2, 4, 8]),
                             device=device)
        self.tokens, self.flags = [[], [], []], [[], [], []]  # of each sequence; flags (L, H) at each token
        self.count, self.rate = 0, rng.choice([0.3, 0.9])
        self.generator = torch.Generator().manual_seed(seed)

    def step(self, *caches):
        rng, B, action = self.rng, len(self.tokens), self.rng.random()
        if action < 0.04 or max(map(len, self.tokens)) > 60:
            ended = [b for b in range(B) if rng.random() < 0.4 or len(self.tokens[b]) > 60] or [0]
            for cache in caches:
                cache.release(ended)
            for b in ended:
                self.tokens[b], self.flags[b] = [], []
        elif action < 0.08:
            chosen = [rng.randrange(B) for _ in range(rng.choice([B, B, rng.randint(1, 4)]))]
            for cache in caches:
                cache.select(chosen)
            self.tokens, self.flags = ([list(x[b]) for b in chosen] for x in (self.tokens, self.flags))
        elif action < 0.14:  # one sequence alone
            b, T = rng.randrange(B), rng.choice([1, 5, 20])
            self.feed([cache.part(b, T) for cache in caches], T, [T], [b])
        else:
            T = rng.choice([1] * 9 + [3])
            self.feed(caches, T, [rng.randint(0, T) if rng.random() < 0.2 else T for _ in range(B)], range(B))

    def feed(self, caches, T, lengths, sequences):
        (L, H, D), n = self.shape, len(lengths)
        flags = torch.rand(L, n, H, T, generator=self.generator) < self.rate
        token = self.count + torch.arange(n * T, dtype=torch.float32).view(n, 1, T, 1)
        self.count = (self.count + n * T) % 2**20
        q = torch.randn(L, n, 2 * H, T, D, generator=self.generator).to(self.device)
        out, token, evict = [], token.to(self.device), flags.to(self.device).float() - 0.5
        for cache in caches:
            with torch.inference_mode(), cache.append(torch.tensor(lengths, device=self.device), T) as attend:
                k = token.expand(n, H, T, D).contiguous()
                out.append([attend(i, q[i] * 1e-3, k, -k, evict[i] if self.dms else None) for i in range(L)])
        for other in out[1:]:
            for layer, b in ((i, b) for i in range(L) for b in range(n)):
                torch.testing.assert_close(other[layer][b, :, :lengths[b]], out[0][layer][b, :, :lengths[b]])
        for i, b in enumerate(sequences):
            self.tokens[b] += token[i, 0, :lengths[i], 0].tolist()  # exact: numbers below 2^20
            self.flags[b] += flags[:, i, :, :lengths[i]].permute(2, 0, 1)

    def check(self, cache):
        """Every row holds exactly the tokens that the rule leaves."""
        for b, tokens in enumerate(self.tokens):
            T = len(tokens)
            assert int(cache.seen[b]) == T
            for layer, h in ((i, h) for i in range(cache.layers) for h in range(cache.kv_heads)):
                row, evict = b * cache.kv_heads + h, torch.zeros(T, dtype=torch.bool)
                if self.dms and T:
                    said = torch.stack(self.flags[b])[self.dms.shift:, layer, h]
                    evict[:len(said)] = said
                rule = visible(T - 1, torch.arange(T), evict, self.dms.window if self.dms else 0)
                slot = torch.arange(int(cache.length[layer, row]), device=self.device)
                page = cache.table[layer, row, slot // cache.page_size].long()
                k, v = (p[page, slot % cache.page_size, 0] for p in (cache.k_pages, cache.v_pages))
                assert torch.equal(k, -v) and sorted(k.tolist()) == sorted(x for x, r in zip(tokens, rule) if r)


def check_pages(cache):
    """Every page is free or in the table of a row that needs it, not both; and only rows that were forked share it,
    none of which is ever going to write to it."""
    W, P = cache.window + 1, len(cache.free)
    assert P == len(cache.k_pages) == len(cache.v_pages)
    free, taken = cache.free[:int(cache.top)].tolist(), set()
    for layer in range(cache.layers):
        having = {}
        for row, length in enumerate(cache.length[layer].tolist()):
            count, seen = -(-length // cache.page_size), int(cache.seen[row // cache.kv_heads])
            pages = cache.table[layer, row, :count].tolist()
            assert len(set(pages)) == count
            slots = [int(cache.ring_slot[layer, row, t % W]) for t in range(max(seen - W, 0), seen)
                     if cache.ring_evict[layer, row, t % W] or (cache.shift and t == seen - 1)]
            written = {slot // cache.page_size for slot in [*slots, *([length] if length % cache.page_size else [])]}
            for ordinal, page in enumerate(pages):
                having.setdefault(page, []).append((row, ordinal, ordinal in written))
        assert not taken & set(having)
        taken |= set(having)
        for sharers in having.values():
            assert len(sharers) == 1 or not any(written for _, _, written in sharers)
            assert len({ordinal for _, ordinal, _ in sharers}) == 1
    assert sorted([*free, *taken]) == list(range(P))


def held_pairs(lengths, G, D, page_size, dtype, seed, device="cpu"):
    """Arguments of decode_attention, on `device`: pages in random places, NaN in every slot that is not in use, and no
    index in the table where there is no page."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    counts = [-(-n // page_size) for n in lengths]
    free = rng.sample(range(sum(counts) + 3), sum(counts) + 3)
    columns = max(counts) + rng.randrange(3)
    integers = rng.choice([torch.int32, torch.int64])
    table = torch.full((len(lengths), columns + rng.randrange(3)), NOWHERE, dtype=integers)
    k_pages, v_pages = torch.full((2, len(free), page_size, D), math.nan, dtype=dtype)
    for row, (n, count) in enumerate(zip(lengths, counts)):
        table[row, :count] = torch.tensor([free.pop() for _ in range(count)])
        slot = torch.arange(n)
        for pool in (k_pages, v_pages):
            pool[table[row, slot // page_size], slot % page_size] = torch.randn(n, D, generator=generator).to(dtype)
    q = torch.randn(len(lengths), G, D, generator=generator).to(dtype)
    length = torch.tensor(lengths, dtype=rng.choice([torch.int32, torch.int64]))
    q, k_pages, v_pages, table, length = (x.to(device) for x in (q, k_pages, v_pages, table, length))
    return q, k_pages, v_pages, table[:, :columns], length


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
