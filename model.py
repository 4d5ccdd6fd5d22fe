"""
The decoder: Llama, Qwen2, Qwen3, Qwen3-MoE and DeepSeek-V2 and V3 in one class.

    x = x + o_proj(attend(q, k, v))          q, k, v from norm(x); q and k rotated
    x = x + down(silu(gate(h)) * up(h))      h = norm(x)

In some layers a router chooses a few of many such MLPs for each token. DeepSeek's attention is that
of mla.py.

Module names are the checkpoints' own, so a state dict needs no table of names. `attend` is handed
in: masked attention over the tokens themselves, a KVCache, or what a trainer puts there. This file
knows nothing of where weights come from, nor of eviction, beyond asking dms.py for each layer's
decision logits and handing them to `attend` with q, k and v.

    model = load_model("Qwen/Qwen3-0.6B")         # from checkpoint.py
    logits = model(ids)                           # (B, T) -> (B, T, V)

References: Touvron et al. 2302.13971 (Llama), Yang et al. 2505.09388 (Qwen3), Su et al. 2104.09864
(RoPE), Peng et al. 2309.00071 (YaRN), Shazeer et al. 1701.06538 (experts). Letters are those of
dms.py.
"""

import functools
import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

import dms
from dms import DMSConfig
from mla import LatentAttention


@dataclass
class ModelConfig:
    """The architecture, under config.json's own names."""

    model_type: str  # one of checkpoint.py's FAMILIES
    vocab_size: int  # V
    hidden_size: int  # C
    intermediate_size: int
    num_hidden_layers: int  # L
    num_attention_heads: int  # Hq
    num_key_value_heads: int  # Hkv
    head_dim: int  # D; with latent attention, of the rotated part alone
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": one of ROPE_KINDS, ...}; None is "default"
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    # mixture of experts, None elsewhere; E is num_experts, or DeepSeek's n_routed_experts
    num_experts: int = None
    num_experts_per_tok: int = None
    moe_intermediate_size: int = None
    norm_topk_prob: bool = None
    decoder_sparse_step: int = None
    mlp_only_layers: list = None
    n_routed_experts: int = None
    n_shared_experts: int = None
    first_k_dense_replace: int = None
    routed_scaling_factor: float = None
    topk_method: str = None
    n_group: int = None
    topk_group: int = None
    # latent attention, None elsewhere
    kv_lora_rank: int = None
    q_lora_rank: int = None
    qk_nope_head_dim: int = None
    qk_rope_head_dim: int = None
    v_head_dim: int = None
    dms: DMSConfig | None = None  # None: a dense model
    extra: dict = field(default_factory=dict, compare=False)  # the bos, eos and pad ids, if stated

    @property
    def eviction(self):
        """The DMS settings in force: None where the model is dense or eviction is switched off."""
        if self.dms is None or self.dms.disable_eviction:
            return None
        return self.dms

    @property
    def kv_heads(self):
        """Hkv of what is cached: latent attention has one pair for all heads."""
        return 1 if self.kv_lora_rank else self.num_key_value_heads

    @property
    def key_dim(self):
        """The size of a cached key."""
        return self.head_dim + (self.kv_lora_rank or 0)

    def has_experts(self, layer):
        """Does the layer, counted from 0, have experts in place of one MLP?"""
        if layer < (self.first_k_dense_replace or 0) or layer in (self.mlp_only_layers or ()):
            return False
        return bool(self.num_experts_per_tok) and (layer + 1) % (self.decoder_sparse_step or 1) == 0

    @property
    def context(self):
        """The tokens that the model can take: max_position_embeddings, or under linear and yarn
        the original context times their factor, whichever is more. (Who follows Qwen's instructions
        adds the factor, and leaves max_position_embeddings as it was.)"""
        rope = self.rope_scaling or {}
        if rope.get("rope_type") not in ("linear", "yarn"):
            return self.max_position_embeddings
        scaled = original_context(self) * rope.get("factor", 1)
        return max(self.max_position_embeddings, int(scaled))


# an operator of PyTorch's own, which a build or a later version may lack
HAS_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """nn.Linear. On a CPU in float32 a decoding step takes the time of reading the weights, and
    MKL, PyTorch's choice, takes two to three times as long for large ones as oneDNN does."""

    def forward(self, x):
        is_large = self.weight.numel() >= 2**18
        is_float32 = x.dtype == self.weight.dtype == torch.float32
        is_covered = HAS_ONEDNN and is_large and is_float32 and x.device.type == "cpu"
        if torch.is_grad_enabled() or not is_covered:  # the operator has no gradient
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


# -------------------------------------------------------------------------------------------- RoPE

ROPE_KINDS = ("default", "linear", "llama3", "yarn")


def rope_frequencies(config):
    """Inverse frequencies (D/2,) float32, and the factor by which cos and sin are multiplied."""
    rope = config.rope_scaling or {}
    kind = rope.get("rope_type")
    # on the CPU even where load_model builds the rest on "meta": no file holds these
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    freq = 1 / config.rope_theta ** (exponent / config.head_dim)
    if kind == "yarn":
        return yarn_frequencies(config, freq)
    if kind == "llama3":
        freq = llama3_frequencies(config, freq)
    if kind == "linear":
        freq = freq / rope["factor"]
    return freq, 1.0


def original_context(config):
    """The context that the model was trained for, before its frequencies were scaled."""
    stated = config.rope_scaling.get("original_max_position_embeddings")
    return stated or config.max_position_embeddings


def llama3_frequencies(config, freq):
    """Long wavelengths divided by `factor`, short ones kept, a ramp between."""
    rope = config.rope_scaling
    rotations = original_context(config) * freq / (2 * math.pi)
    low = rope["low_freq_factor"]
    high = rope["high_freq_factor"]
    keep = ((rotations - low) / (high - low)).clamp(0, 1)
    return freq * (keep + (1 - keep) / rope["factor"])


def yarn_frequencies(config, freq):
    """The same with a ramp over channels, and cos and sin scaled by 0.1 ln(factor) + 1."""
    rope = config.rope_scaling
    D = config.head_dim
    original = original_context(config)
    factor = rope.get("factor", config.max_position_embeddings / original)

    def channel_with(rotations):
        """The channel, a fraction, that makes so many rotations over the original context:
        theta ** (2 channel / D) = original / (2 pi rotations), solved for the channel."""
        tokens_per_radian = original / (rotations * 2 * math.pi)
        return D * math.log(tokens_per_radian) / (2 * math.log(config.rope_theta))

    low = channel_with(rope.get("beta_fast", 32))
    high = channel_with(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, D - 1)
    channel = torch.arange(D // 2, dtype=torch.float32, device="cpu")
    keep = 1 - ((channel - low) / max(high - low, 0.001)).clamp(0, 1)
    freq = freq * (keep + (1 - keep) / factor)

    mscale = lambda m: 0.1 * m * math.log(max(factor, 1)) + 1.0
    scale = mscale(1)
    if rope.get("mscale") and rope.get("mscale_all_dim"):  # DeepSeek's
        scale = mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    return freq, rope.get("attention_factor", scale)


def apply_rope(x, cos, sin):
    """Rotate x (B, T, H, D), pairing channel i with i + D/2. cos, sin: see Model.rope."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


# ------------------------------------------------------------------------------------- The decoder


class Attention(nn.Module):
    """Everything of a layer's attention but the attention itself: q, k, v, decision logits, and the
    output projection."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        C = config.hidden_size
        Hq_D = config.num_attention_heads * config.head_dim
        Hkv_D = config.num_key_value_heads * config.head_dim
        qwen2 = config.model_type == "qwen2"  # has biases on q, k and v, whatever the config says
        bias = config.attention_bias or qwen2
        self.q_proj = Linear(C, Hq_D, bias=bias)
        self.k_proj = Linear(C, Hkv_D, bias=bias)
        self.v_proj = Linear(C, Hkv_D, bias=bias)
        self.o_proj = Linear(Hq_D, C, bias=config.attention_bias and not qwen2)
        norm = nn.RMSNorm if config.model_type in ("qwen3", "qwen3_moe") else nn.Identity
        self.q_norm = norm(config.head_dim, config.rms_norm_eps)
        self.k_norm = norm(config.head_dim, config.rms_norm_eps)

    def project(self, residual, x, rotate):
        """What `attend` takes: q (B, Hq, T, D), k and v (B, Hkv, T, D), rotated, and the decision
        logits (B, Hkv, T) float32, None where nothing is evicted.

        residual, x: (B, T, C) before and after the input norm; rotate: of Model.rope.
        """
        config = self.config
        projections = (self.q_proj, self.k_proj, self.v_proj)
        # q (B, T, Hq, D), k and v (B, T, Hkv, D)
        q, k, v = (proj(x).unflatten(2, (-1, config.head_dim)) for proj in projections)
        q = self.q_norm(q)
        logits = dms.decide(self, residual, q)
        # The borrowed channel, D - 1, must not reach a score, and RoPE mixes it with channel
        # D/2 - 1. It is zeroed before, so that it does not leak there, and again after, to remove
        # what has leaked from there.
        q = rotate(dms.without_borrowed(q, config))
        q = dms.without_borrowed(q, config)
        q, k, v = (heads.transpose(1, 2) for heads in (q, rotate(self.k_norm(k)), v))
        return q, k, v, logits

    def output(self, y):
        """y (B, Hq, T, D), the result of `attend` -> what the residual gains, (B, T, C)."""
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def output_weight(self):
        """The output projection by head, (Hq, C, D), for warm_start.py."""
        return self.o_proj.weight.unflatten(1, (-1, self.config.head_dim)).transpose(0, 1)


class MLP(nn.Module):
    def __init__(self, config, size):
        super().__init__()
        C = config.hidden_size
        self.gate_proj = Linear(C, size, bias=config.mlp_bias)
        self.up_proj = Linear(C, size, bias=config.mlp_bias)
        self.down_proj = Linear(size, C, bias=config.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """Many MLPs, of which a router chooses k for each token: their outputs are added, weighted."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        E = config.num_experts or config.n_routed_experts
        size = config.moe_intermediate_size
        self.gate = Linear(config.hidden_size, E, bias=False)
        self.experts = nn.ModuleList(MLP(config, size) for _ in range(E))
        if config.model_type == "deepseek_v3":
            self.gate.e_score_correction_bias = nn.Parameter(torch.zeros(E))
        if config.n_shared_experts:
            self.shared_experts = MLP(config, size * config.n_shared_experts)

    def route(self, x):
        """The weights (n, k) float32 and the numbers (n, k) of the experts of tokens x (n, C)."""
        config = self.config
        is_v3 = config.model_type == "deepseek_v3"
        score = F.linear(x.float(), self.gate.weight.float())  # (n, E)
        score = score.sigmoid() if is_v3 else score.softmax(-1)
        # the bias, which keeps all experts busy, counts in the choice alone
        rank = score + self.gate.e_score_correction_bias if is_v3 else score
        if config.n_group and config.topk_method != "greedy":  # only the best groups count
            # a group's score: that of its best expert (V2), or the sum of its best two (V3)
            groups = rank.unflatten(1, (config.n_group, -1))  # (n, groups, E / groups)
            best = groups.topk(2 if is_v3 else 1).values.sum(-1, keepdim=True)
            # the score of the last group that counts
            least = best.topk(config.topk_group, dim=1).values[:, -1:]
            rank = groups.where(best >= least, float("-inf")).flatten(1)
        expert = rank.topk(config.num_experts_per_tok).indices
        weight = score.gather(1, expert)
        if config.norm_topk_prob:
            weight = weight / weight.sum(-1, keepdim=True)
        return weight * (config.routed_scaling_factor or 1), expert

    def forward(self, x):
        tokens = x.flatten(0, 1)  # (n, C)
        weight, expert = self.route(tokens)
        choices = expert.flatten()  # n * k; choice i is of token i // k
        order = choices.argsort(stable=True)  # those of expert 0 first, then those of 1, ...
        inputs = tokens[order // expert.shape[1]]
        counts = choices.bincount(minlength=len(self.experts)).tolist()
        # In training an expert without tokens is computed, too. Its gradients are 0 then, and not
        # missing: processes that sum theirs need the same ones.
        outputs = [mlp(part) for mlp, part in zip(self.experts, inputs.split(counts))
                   if len(part) or torch.is_grad_enabled()]
        # back in the order of tokens: each one's k outputs are added in the same order in every run
        y = torch.cat(outputs)[order.argsort()]
        y = y.view(*expert.shape, -1) * weight[..., None]  # (n, k, C)
        y = y.sum(1).to(x.dtype).view_as(x)
        if self.config.n_shared_experts:
            y = y + self.shared_experts(x)
        return y


class Block(nn.Module):
    """A layer, in two halves with the attention between them."""

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = (LatentAttention if config.kv_lora_rank else Attention)(config)
        if config.dms is not None and config.dms.source == "adapter":
            dms.add_adapter(self.self_attn)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        size = config.intermediate_size
        self.mlp = Experts(config) if config.has_experts(layer) else MLP(config, size)

    def before(self, x, rotate):
        return self.self_attn.project(x, self.input_layernorm(x), rotate)

    def after(self, x, y):
        """x: (B, T, C), the residual; y: (B, Hq, T, D), what attention gave."""
        x = x + self.self_attn.output(y)
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x, rotate, attend, recompute=False):
        """recompute: keep only each half's inputs for backward, and compute the half again there.
        (`attend` stands outside: it decides for itself what it keeps.)"""
        y = attend(*dms.computed(self.before, x, rotate, recompute=recompute))
        return dms.computed(self.after, x, y, recompute=recompute)


class Model(nn.Module):
    """A causal language model. `model(ids)` is the dense computation, masked by hard decisions for
    a DMS model; `model(ids, cache=cache)` appends ids to what a KVCache holds."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        V = config.vocab_size
        C = config.hidden_size
        layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        # A ready weight, since load_model builds models on the "meta" device: there nn.Embedding's
        # own initialisation would import torch's compiler, which takes seconds.
        embed_tokens = nn.Embedding(V, C, _weight=torch.rand(V, C))
        norm = nn.RMSNorm(C, config.rms_norm_eps)
        self.model = nn.ModuleDict(dict(embed_tokens=embed_tokens, layers=layers, norm=norm))
        self.lm_head = Linear(C, V, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        freq, self.rope_scale = rope_frequencies(config)
        self.register_buffer("rope_freq", freq, persistent=False)

    @property
    def device(self):
        return self.lm_head.weight.device

    @property
    def dtype(self):
        return self.lm_head.weight.dtype

    def rope(self, T, start, dtype):
        """The function that rotates x (B, T, H, D), at the positions start + 0, 1, ... Angles are
        float32 whatever the model's dtype."""
        position = start + torch.arange(T, device=self.device)
        angle = position[..., None, None] * self.rope_freq.repeat(2)  # (B, T, 1, D)
        cos, sin = ((f(angle) * self.rope_scale).to(dtype) for f in (torch.cos, torch.sin))
        return functools.partial(apply_rope, cos=cos, sin=sin)

    def hidden(self, ids, attend, start=0, recompute=False):
        """The final normed states (B, T, C) of ids (B, T) int64.

        attend(layer, q, k, v, logits) -> (B, Hq, T, D), with what Attention.project gives. Token
        t's position is start + t. start: 0; (B, 1), what each sequence has seen; or (B, T),
        -Packing.first, so that positions begin anew in each document. recompute: see Block.
        """
        x = self.model.embed_tokens(ids)
        rotate = self.rope(ids.shape[1], start, x.dtype)
        for layer, block in enumerate(self.model.layers):
            x = block(x, rotate, functools.partial(attend, layer), recompute)
        return self.model.norm(x)

    def states(self, ids, cache=None, lengths=None, sequence=None):
        """The final normed states (B, T, C) of ids (B, T) int64 on the model's device.

        With a cache (a KVCache) the ids are appended to it, and nothing is differentiated. lengths
        (B,): sequence b brings ids[b, :lengths[b]], and the rest is padding, which is never stored.
        sequence: ids (1, T) belong to this one sequence of the cache, and the others rest.
        Raises ValueError for ids or lengths that do not fit, CacheFull where pages run out.
        """
        V = self.config.vocab_size
        if ids.dim() != 2 or not ids.numel() or not 0 <= ids.min() <= ids.max() < V:
            raise ValueError(f"ids must be (B, T), at least one, from 0 to {V - 1}")
        if cache is None:
            return self.hidden(ids, dms.masked_attention(self.config))
        # The cache cuts the ids into pieces, and calls self.hidden for each, with its `attend`.
        return cache.append(self.hidden, ids, lengths, sequence)

    def forward(self, ids, cache=None, lengths=None, sequence=None, last_only=False):
        """Next-token logits (B, T, V), or for last_only (B, 1, V), of column T - 1 alone, which is
        of use where no sequence has padding. The other arguments are those of `states`."""
        x = self.states(ids, cache, lengths, sequence)
        return self.lm_head(x[:, -1:] if last_only else x)
