"""
The dense decoder: Llama, Qwen2 and Qwen3 from one config.json, and loading it from safetensors.

    x = x + o_proj(attend(q, k, v));   x = x + down(silu(gate(x)) * up(x))        (pre-norm, RoPE, grouped queries)

Module names are the checkpoints' own, so a state dict needs no table of names. `attend` is handed in: causal attention
over the tokens themselves, over a KVCache, or whatever a trainer wants to put there. This file knows nothing of pages,
of eviction beyond handing each layer's decision logits to `attend`, or of training.

    model = load_model("Qwen/Qwen3-0.6B")            # folder or hub id, dense or DMS, as the checkpoint says
    logits = model(ids)                              # (B, T) -> (B, T, V)

References: Touvron et al. 2302.13971 (Llama), Yang et al. 2505.09388 (Qwen3), Su et al. 2104.09864 (RoPE),
Peng et al. 2309.00071 (YaRN).
"""
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

import dms
from dms import DMSConfig, InputError, one_line, read_json, refusing
from kernels import cpu
from kv_cache import CacheFull

ROPE_KINDS = ("default", "linear", "llama3", "yarn")
ADAPTER_FILE = "dms_adapters.safetensors"
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclass
class ModelConfig:
    """What config.json says of the architecture, under its own names. Letters: C = hidden_size, L = num_hidden_layers,
    Hq = num_attention_heads, Hkv = num_key_value_heads, D = head_dim, V = vocab_size."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": one of ROPE_KINDS, ...}; None is "default"
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    dms: DMSConfig | None = None  # None: a dense model
    extra: dict = field(default_factory=dict)  # keys of config.json that mean nothing here but are written back

    @property
    def eviction(self):
        """The DMS settings in force: None for a dense model and for a DMS model whose eviction is switched off."""
        return self.dms if self.dms is not None and not self.dms.disable_eviction else None

    @classmethod
    def from_dict(cls, raw, where="config.json"):
        """Read a parsed config.json, in the older spelling (rope_theta, rope_scaling, torch_dtype) or the newer one
        (rope_parameters, dtype). Raises InputError naming whatever this engine would compute wrongly."""
        def refuse(problem, remedy="use a Llama, Qwen2 or Qwen3 checkpoint that this engine covers"):
            raise InputError(f"{where}: {problem}; {remedy}")

        def get(key, default=None, kind=int, least=1, most=2**24):
            value = default if raw.get(key) is None else raw[key]
            if value is None:
                refuse(f"{key} is missing", "the file is not a complete model config")
            if not (isinstance(value, bool) if kind is bool else
                    type(value) in (int, float) and least <= value <= most and kind(value) == value):
                refuse(f"{key} = {value!r:.80} is not of type {kind.__name__} and in range", "fix the config")
            return kind(value)

        kind, layer_types = raw.get("model_type"), raw.get("layer_types")
        if not isinstance(kind, str) or kind not in ARCHITECTURES:
            refuse(f"model_type {kind!r:.80} is not supported")
        if raw.get("quantization_config"):
            refuse("quantized weights are not supported", "use the bf16, fp16 or fp32 checkpoint")
        if raw.get("hidden_act") not in (None, "silu"):
            refuse(f"hidden_act {raw['hidden_act']!r:.80} is not supported")
        if layer_types is not None and (not isinstance(layer_types, list) or
                                        any(t != "full_attention" for t in layer_types)):
            refuse(f"layer_types {layer_types!r:.80} include attention that is not full")
        if raw.get("use_sliding_window") and raw.get("sliding_window", 4096) and layer_types is None:
            if get("max_window_layers", 28, least=0) < get("num_hidden_layers"):  # defaults of transformers
                refuse("use_sliding_window is true and layers use the sliding_window")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(rope, dict) or any(isinstance(v, dict) for v in rope.values()):
            refuse(f"rope parameters {rope!r:.80} are not one flat object")
        rope = {k: v for k, v in rope.items() if v is not None}
        older = rope.pop("type", "default")
        rope.setdefault("rope_type", older)
        raw = {**raw, "rope_theta": rope.pop("rope_theta", raw.get("rope_theta"))}
        if any(x.get("partial_rotary_factor") not in (None, 1.0) for x in (rope, raw)):
            refuse("partial rotary embeddings are not supported")
        if rope["rope_type"] not in ROPE_KINDS:
            refuse(f"RoPE kind {rope['rope_type']!r:.80} is not supported (known: {', '.join(ROPE_KINDS)})")

        sizes = {key: get(key) for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                           "num_attention_heads")}
        heads = sizes["num_attention_heads"]
        head_dim = 128 if kind == "qwen3" and "head_dim" not in raw else max(sizes["hidden_size"] // heads, 1)
        config = cls(
            model_type=kind, **sizes, num_key_value_heads=get("num_key_value_heads", heads),
            head_dim=get("head_dim", head_dim, most=2**12), rms_norm_eps=get("rms_norm_eps", 1e-6, float, 0),
            rope_theta=get("rope_theta", 10000.0, float, 1e-9, 1e29), rope_scaling=rope,
            max_position_embeddings=get("max_position_embeddings", 2048 if kind == "llama" else 32768),
            **{key: get(key, False, bool) for key in ("tie_word_embeddings", "attention_bias", "mlp_bias")})
        if heads % config.num_key_value_heads:
            refuse(f"{heads} attention heads are not a multiple of the key/value heads", "fix the config")
        if config.head_dim % 2:
            refuse(f"head_dim {config.head_dim} is odd, which RoPE cannot rotate", "fix the config")
        known = set(config.to_dict()) | {"rope_parameters", "torch_dtype", "dtype", "architectures", "auto_map"}
        config.extra = {k: v for k, v in raw.items() if k not in known and not k.startswith("dms_")}
        with refusing(f"{where}: RoPE kind {rope['rope_type']!r} has a missing or unusable parameter; fix the config"):
            freq, scale = rope_frequencies(config)
            if not (freq.isfinite().all() and math.isfinite(scale)):
                raise ValueError("not finite")
        return config

    def to_dict(self):
        """The parsed config.json that `from_dict`, and transformers, read back. DMS settings are dms.py's to add."""
        raw = {k: getattr(self, k) for k in self.__dataclass_fields__ if k not in ("dms", "extra")}
        raw["rope_scaling"] = None if (self.rope_scaling or {}).get("rope_type", "default") == "default" \
            else self.rope_scaling
        return {"architectures": [ARCHITECTURES[self.model_type]], **raw, "hidden_act": "silu", **self.extra}


# ---------------------------------------------------------------------------------------------------------------- RoPE


def rope_frequencies(config):
    """Inverse frequencies (D/2,) float32 and the factor by which cos and sin are multiplied.
    linear: all frequencies divided by `factor`; llama3: long wavelengths divided, short ones kept, a ramp between;
    yarn: the same in terms of rotations over the original context, and logits scaled by 0.1 ln(factor) + 1."""
    rope, D = config.rope_scaling or {}, config.head_dim
    kind = rope.get("rope_type", "default")
    freq = 1 / config.rope_theta ** (torch.arange(0, D, 2, dtype=torch.float32, device="cpu") / D)
    if kind == "default":
        return freq, 1.0
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if kind == "yarn" and "factor" not in rope:
        factor = config.max_position_embeddings / original
    else:
        factor = float(rope["factor"])
    if kind == "linear":
        return freq / factor, 1.0
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        rotations = original * freq / (2 * math.pi)
        keep = ((rotations - low) / (high - low)).clamp(0, 1)  # 1: high frequency, unchanged; 0: divided
        return freq * (keep + (1 - keep) / factor), 1.0

    def boundary(rotations):  # the dimension that turns this many times over the original context
        return D * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = boundary(rope.get("beta_fast", 32)), boundary(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    divide = ((torch.arange(D // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 0.001)).clamp(0, 1)

    def mscale(m):
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale = rope.get("attention_factor")
    if scale is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        scale = mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    return freq * (1 - divide + divide / factor), mscale(1) if scale is None else float(scale)


def apply_rope(x, cos, sin):
    """Rotate x (B, T, H, D) by cos, sin (B or 1, T, 1, D), pairing channel i with i + D/2."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


# --------------------------------------------------------------------------------------------------------- The decoder


class Linear(nn.Linear):
    """y = W x + b, on a CPU by kernels/cpu.py where that is faster: large layers, and few rows, such as a decode
    step's, or 16-bit numbers that the processor has no instructions for."""

    def forward(self, x):
        rows, W = x.shape[:-1].numel(), self.weight
        if rows == 1 or W.numel() < 2**18 or not cpu.takes(x) or torch.is_grad_enabled() or \
                torch.compiler.is_compiling() or \
                rows > 32 and (x.dtype == torch.float32 or torch.backends.cpu.get_cpu_capability() == "AVX512"):
            return super().forward(x)
        return cpu.linear(x.flatten(0, -2), W, self.bias).view(*x.shape[:-1], -1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, D, Hq, Hkv = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.config = config
        qwen2 = config.model_type == "qwen2"
        self.q_proj = Linear(C, Hq * D, bias=config.attention_bias or qwen2)
        self.k_proj = Linear(C, Hkv * D, bias=config.attention_bias or qwen2)
        self.v_proj = Linear(C, Hkv * D, bias=config.attention_bias or qwen2)
        self.o_proj = Linear(Hq * D, C, bias=config.attention_bias and not qwen2)
        if config.model_type == "qwen3":
            self.q_norm, self.k_norm = nn.RMSNorm(D, config.rms_norm_eps), nn.RMSNorm(D, config.rms_norm_eps)
        if config.dms is not None and config.dms.source == "adapter":
            self.add_adapter()

    def add_adapter(self):
        """The decision's own weights, set to decide nothing (s = 0)."""
        config = self.config
        self.dms_proj_alpha_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dms_proj_alpha = Linear(config.hidden_size, config.num_key_value_heads, bias=config.attention_bias)
        for p in self.dms_proj_alpha.parameters():
            nn.init.zeros_(p)

    def project(self, residual, x, rope):
        """residual, x: (B, T, C) before and after the input norm; rope: cos, sin (B or 1, T, 1, D) -> what `attend`
        takes: q (B, Hq, T, D), k and v (B, Hkv, T, D), decision logits (B, Hkv, T) or None."""
        config, (B, T, _) = self.config, x.shape
        neuron, s = config.dms is not None and config.dms.source == "neuron", None
        q = self.q_proj(x).view(B, T, -1, config.head_dim)  # (B, T, Hq, D)
        k = self.k_proj(x).view(B, T, -1, config.head_dim)  # (B, T, Hkv, D)
        v = self.v_proj(x).view(B, T, -1, config.head_dim)
        if config.model_type == "qwen3":
            q, k = self.q_norm(q), self.k_norm(k)
        if neuron:
            s, q = dms.borrow_neuron(q, config.num_key_value_heads)  # s (B, T, Hkv)
        elif config.eviction is not None:
            residual = residual.to(self.dms_proj_alpha.weight.dtype)  # float32 while it is trained
            s = self.dms_proj_alpha(self.dms_proj_alpha_norm(residual))
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if neuron:  # RoPE turned another channel into the borrowed one: silence it again
            q = dms.borrow_neuron(q, config.num_key_value_heads)[1]
        logits = None if config.eviction is None else config.dms.logits(s).transpose(1, 2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), logits


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, I = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(C, I, bias=config.mlp_bias)
        self.up_proj = Linear(C, I, bias=config.mlp_bias)
        self.down_proj = Linear(I, C, bias=config.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def before(self, x, rope):
        return self.self_attn.project(x, self.input_layernorm(x), rope)

    def after(self, x, y):
        x = x + self.self_attn.o_proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x, rope, attend):
        return self.after(x, attend(*self.before(x, rope)))


class Model(nn.Module):
    """A causal language model. `model(ids)` needs no cache: dense attention, or for a DMS model the dense masked
    computation with hard decisions. `model(ids, cache=cache)` appends ids to what the cache holds."""

    def __init__(self, config):
        super().__init__()
        self.config, V, C = config, config.vocab_size, config.hidden_size
        # nn.Embedding's own normal draw would import sympy or the compiler on "meta"
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(V, C, _weight=torch.rand(V, C)),
                                    "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
                                    "norm": nn.RMSNorm(C, config.rms_norm_eps)})
        self.lm_head = Linear(C, V, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        freq, self.rope_scale = rope_frequencies(config)
        self.register_buffer("rope_freq", freq, persistent=False)
        self.recompute = False  # training: keep only each block's input, compute the rest again in backward

    @property
    def device(self):
        return self.lm_head.weight.device

    @property
    def dtype(self):
        return self.lm_head.weight.dtype

    def compile(self, **options):
        """Let torch.compile, which gets the options, fuse what every block does before and after attention."""
        for block in self.model.layers:
            block.before, block.after = (torch.compile(f, dynamic=True, **options)
                                         for f in (block.before, block.after))

    def check_ids(self, ids, room=0):
        """Raise InputError unless the list of token ids can be fed and followed by `room` more tokens."""
        limit = self.config.max_position_embeddings
        if not ids:
            raise InputError("the prompt is empty; give at least one token")
        if len(ids) + room > limit:
            raise InputError(f"the prompt has {len(ids)} tokens and {room} more are to come, but the model's context "
                             f"is {limit}; shorten the prompt or ask for fewer new tokens")
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            raise InputError(f"token id {max(ids) if min(ids) >= 0 else min(ids)} is outside the model's vocabulary "
                             f"of {self.config.vocab_size}; the tokenizer belongs to another model")

    def hidden(self, ids, attend, start=None):
        """The final normed states (B, T, C) of ids (B, T) int64. start: position of each row's first token, (B,)
        int64 or None for 0. attend(layer, q, k, v, logits) -> (B, Hq, T, D), with q (B, Hq, T, D), k and v
        (B, Hkv, T, D), rotated, and the decision logits (B, Hkv, T) float32, or None where nothing is evicted."""
        position = torch.arange(ids.shape[1], device=ids.device)[None] + (0 if start is None else start[:, None])
        angle = position[:, :, None, None] * self.rope_freq.float()  # (B or 1, T, 1, D/2)
        angle = torch.cat((angle, angle), dim=-1)
        x = self.model.embed_tokens(ids)
        rope = [(f(angle) * self.rope_scale).to(x.dtype) for f in (torch.cos, torch.sin)]
        for layer, block in enumerate(self.model.layers):
            run = functools.partial(block, rope=rope, attend=functools.partial(attend, layer))
            again = self.recompute and torch.is_grad_enabled()
            x = checkpoint(run, x, use_reentrant=False) if again else run(x)
        return self.model.norm(x)

    def forward(self, ids, cache=None, lengths=None, last_only=False):
        """Next-token logits (B, T, V) of ids (B, T) int64 on the model's device; last_only: (B, 1, V), of each row's
        last token alone. cache: a KVCache; ids are appended to what it holds, in pieces of at most cache.chunk tokens.
        lengths (B,) int64, only with a cache: row b brings ids[b, :lengths[b]], the rest is padding, never stored."""
        if cache is None:
            x = self.hidden(ids, dms.masked_attention(self.config))
            return self.lm_head(x[:, -1:] if last_only else x)
        lengths, out = cache.check_lengths(ids.shape[1], lengths), []
        for t in range(0, ids.shape[1], cache.chunk):
            piece = ids[:, t:t + cache.chunk]
            with cache.append((lengths - t).clamp(0, piece.shape[1]), piece.shape[1]) as attend:
                x = self.hidden(piece, attend, cache.seen)
            if last_only:  # (B, 1, C): each row's last token, from whichever piece it lies in
                row = torch.arange(len(ids), device=ids.device)
                x = x[row, (lengths - 1 - t).clamp(0, piece.shape[1] - 1)][:, None]
                out = [x if t == 0 else torch.where((lengths > t)[:, None, None], x, out[0])]
            else:
                out.append(x)
        return self.lm_head(torch.cat(out, dim=1))


# ---------------------------------------------------------------------------------------------------------- Generation


def sample(logits, uniform, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0):
    """Draw one token per row: logits (B, V), uniform (B,) in [0, 1) -> (B,) int64; at temperature 0 the likeliest.
    Otherwise the distribution is cut to the top_k likeliest tokens (0: all), then to the fewest that hold top_p of the
    mass, then to those at least min_p times as likely as the first; the token is where its sum passes `uniform`."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:
        probabilities, order = logits.softmax(-1).sort(descending=True, stable=True)
        drop = probabilities.cumsum(-1) - probabilities >= top_p  # the mass before it suffices; never the first
        drop[:, 0] = False
        logits = logits.masked_fill(drop.scatter(1, order, drop), float("-inf"))
    probabilities = logits.softmax(-1)
    probabilities = probabilities.where(probabilities >= min_p * probabilities.amax(-1, keepdim=True), 0)
    mass = probabilities.double().cumsum(-1)
    return torch.searchsorted(mass, uniform.double()[:, None] * mass[:, -1:], right=True)[:, 0]


@dataclass(eq=False)
class Sequence:
    """What `generate` continues."""

    ids: list  # to be fed; what is drawn is added to it
    max_new_tokens: int
    seed: object = 0
    stop: object = None  # (token id) -> bool, asked about every token drawn that is not an end token
    new: list = field(default_factory=list)  # drawn so far, an end token included
    over: bool = False
    error: str | None = None  # why it is over before its end

    def __post_init__(self):
        self.ids = list(self.ids)

    def uniform(self):
        """The random number in [0, 1) for its next token: of its seed and place alone, whatever runs beside it; exact
        in float32."""
        digest = hashlib.blake2b(f"{self.seed} {len(self.new)}".encode(), digest_size=3).digest()
        return int.from_bytes(digest, "big") / 2**24


class DecodeStep:
    """One token for every sequence of a cache: forward pass and sampling. On a GPU it is captured as a CUDA graph the
    second time that it runs on the same tensors; nothing in it waits, but for the tokens that come out."""

    def __init__(self, model, cache, sampling):
        self.model, self.cache, self.sampling = model, cache, sampling
        self.tokens = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=cache.device)
        self.lengths = torch.zeros(cache.batch_size, dtype=torch.int64, device=cache.device)
        self.uniform = torch.zeros(cache.batch_size, device=cache.device)
        self.graph, self.table, self.captures = None, None, cache.device.type == "cuda"

    @torch.inference_mode()
    def __call__(self, tokens, uniform):
        """tokens: {row: token id}; uniform: {row: number in [0, 1)} -> the list of all rows' next tokens, of which
        those of the rows given mean something. Raises CacheFull, before anything has changed."""
        rows = range(len(self.lengths))
        self.lengths.copy_(torch.tensor([row in tokens for row in rows]))
        self.cache.reserve(self.lengths)
        self.tokens.copy_(torch.tensor([[tokens.get(row, 0)] for row in rows]))
        self.uniform.copy_(torch.tensor([uniform.get(row, 0.0) for row in rows]))
        if not self.captures or self.table is not self.cache.table:  # the only tensor that is ever replaced
            self.table, self.graph = self.cache.table, None
            self.run()
        else:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):  # records, and runs nothing
                    self.run()
            self.graph.replay()
        return self.next.tolist()

    def run(self):
        with self.cache.append(self.lengths, 1, reserve=False) as attend:
            x = self.model.hidden(self.tokens, attend, self.cache.seen)
        self.next = sample(self.model.lm_head(x)[:, -1], self.uniform, **self.sampling)


@torch.inference_mode()
def generate(model, cache, sequences, end_ids=(), sampling=None, release=True):
    """Continue sequences (a list of Sequence) in the rows of a cache, any number of them: continuous batching. Yields
    after each step the list of (sequence, token id) drawn, with None for a token where a sequence has failed. One ends
    on an id of end_ids, when its stop(token) is true, after max_new_tokens, or because it cannot fit by itself.

    A sequence starts as soon as a row is free and the cache has pages for about what it is going to hold, by the
    compression seen so far; neighbours with the same ids are fed once and forked. When pages run out, the youngest
    gives its own back and is fed again later with what it has drawn: nothing is lost or drawn twice. release=False:
    ended sequences keep their rows and pages, and the cache holds all but the last token of each, ready for more."""
    if not release and len(sequences) > cache.batch_size:
        raise InputError(f"{len(sequences)} sequences cannot all stay in a cache of {cache.batch_size}; release them")
    sampling, waiting, running = sampling or {}, deque(sequences), {}  # running: {row: sequence}, the youngest last
    step, rows = DecodeStep(model, cache, sampling), list(range(cache.batch_size))  # rows that are free
    blocked, most = False, cache.batch_size  # until one ends, nothing starts; how many may start as one
    while waiting or running:
        drawn, back = [], []  # back: rows whose sequences, the youngest, wait again for want of pages
        try:
            tokens = step({row: s.ids[-1] for row, s in running.items()},
                          {row: s.uniform() for row, s in running.items()}) if running else []
            drawn = [(s, tokens[row]) for row, s in running.items()]
        except CacheFull as e:
            back, problem = [next(reversed(running))], str(e)
        while waiting and rows and not (blocked or back) and (not running or cache.has_room_for(len(waiting[0].ids))):
            same = list(itertools.takewhile(lambda s: s.ids == waiting[0].ids,
                                            itertools.islice(waiting, min(len(rows), most))))
            new = [rows.pop(0) for _ in same]
            running.update({row: waiting.popleft() for row in new})
            try:
                ids = torch.tensor([same[0].ids], device=model.device)
                logits = model(ids, cache=cache.part(new[0], ids.shape[1]), last_only=True)[:, -1]
                if len(same) > 1:
                    cache.select([new[0] if row in new else row for row in range(cache.batch_size)])
            except CacheFull as e:
                back, problem, most = new, str(e), max(len(same) // 2, 1)
                break
            uniform = torch.tensor([s.uniform() for s in same], device=model.device)
            drawn += zip(same, sample(logits.expand(len(same), -1), uniform, **sampling).tolist())
        if back:
            waiting.extendleft(running.pop(row) for row in reversed(back))
            cache.release(back)
            rows.extend(back)
            blocked = bool(running)
            if not running and len(back) == 1:  # it is alone, and does not fit
                waiting[0].over, waiting[0].error = True, problem
                drawn.append((waiting.popleft(), None))
        for s, token in drawn:
            if token is not None:
                s.ids.append(token)
                s.new.append(token)
                s.over = token in end_ids or s.stop is not None and s.stop(token) or len(s.new) >= s.max_new_tokens
        over = [row for row, s in running.items() if s.over]
        running = {row: s for row, s in running.items() if not s.over}
        if over and release:
            cache.release(over)
            rows.extend(over)
            blocked, most = False, cache.batch_size
            if not waiting and running and len(running) <= cache.batch_size // 2:  # compute fewer rows
                cache.select(list(running))
                running, rows = dict(enumerate(running.values())), []
                step = DecodeStep(model, cache, sampling)
        yield drawn


# --------------------------- Loading and saving: safetensors and JSON only, nothing in a model folder is ever executed


def resolve(path_or_hub_id, relative_to=None):
    """The local folder of a model: an existing folder (also tried relative to `relative_to`), or a hub repository's
    snapshot with its weights, configs and tokenizer only. Raises InputError if it is neither."""
    for folder in ([Path(relative_to) / path_or_hub_id] if relative_to else []) + [Path(path_or_hub_id)]:
        if os.path.isdir(folder):
            return folder
    name = one_line(path_or_hub_id, 200)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise InputError(f"{name}: no such folder, and not a hub id of the form owner/name; check the path")
    from huggingface_hub import snapshot_download
    with refusing(f"{name}: not a local folder, and the hub did not give it; check the name, the network or HF_TOKEN"):
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=["*.safetensors", "*.json", "*.jinja"]))


def write_atomic(file, write):
    """Call write(temporary path) and move the result to `file` in one step, so that no reader sees half of it."""
    file = Path(file)
    scratch = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        write(scratch)
        scratch.chmod(0o644)
        os.replace(scratch, file)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(file, data):
    write_atomic(file, lambda scratch: scratch.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n"))


def weight_files(folder):
    """The safetensors files of a model folder, from its index or by the standard name."""
    index, names = Path(folder) / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise InputError(f"{index}: has no weight_map; download it again")
        names = list(dict.fromkeys(map(str, names.values())))
    for name in names:
        if name != os.path.basename(name) or "\\" in name or not name.endswith(".safetensors"):
            raise InputError(f"{index}: unsafe or unknown shard name {name[:80]!r}; shards lie beside their index")
        if not os.path.isfile(index.with_name(name)):
            raise InputError(f"{index.with_name(one_line(name))}: missing; download it again, and convert pickled "
                             f"weights (.bin, .pt), which are never read, to safetensors")
    return [index.with_name(name) for name in names]


def open_weights(files, stack, device="cpu"):
    """{tensor name: open safetensors file}. The files stay open as long as `stack`, an ExitStack, does."""
    where = {}
    for file in files:
        with refusing(f"{file}: truncated or damaged safetensors file; download it again"):
            handle = stack.enter_context(safe_open(file, framework="pt", device=str(device)))
            names = list(handle.keys())
        for name in names:
            if name in where:
                raise InputError(f"{file}: tensor {one_line(name)} is also in another shard; download the checkpoint "
                                 f"again")
            where[name] = handle
    return where


def load_model(path_or_hub_id, device="cpu", dtype=torch.float32, adapter=None):
    """Load a checkpoint, dense or DMS as it says of itself, straight onto `device` in `dtype`, one tensor at a time.
    adapter: a safetensors file, or a folder, that holds only DMS adapter tensors, to be laid over the model.
    Returns a Model in eval mode whose parameters do not require gradients. Raises InputError, before any weight is
    read, for a missing, truncated or unsafe file, an unsupported architecture, or a tensor of the wrong shape."""
    folder = resolve(path_or_hub_id)
    raw = read_json(folder / "config.json")
    config = ModelConfig.from_dict(raw, folder / "config.json")
    config.dms = dms.read_settings(folder, raw)
    base, overlay, trained_on = folder, [], None  # the last is the fingerprint of the weights that adapters belong to
    if raw.get("dms_base_model"):  # an adapter-only checkpoint: the weights are elsewhere
        if not isinstance(raw["dms_base_model"], str):
            raise InputError(f"{folder / 'config.json'}: dms_base_model is not a path or hub id; fix the config")
        base, overlay = resolve(raw["dms_base_model"], relative_to=folder), [folder / ADAPTER_FILE]
        trained_on = raw.get("dms_base_fingerprint", "missing")
    if adapter is not None:
        config.dms, *overlay, trained_on = dms.read_adapter_settings(adapter)

    def refuse(problem):
        raise InputError(f"{base}: {problem}; the checkpoint is incomplete, of a kind that is not supported, or not "
                         f"what its config.json describes")

    with ExitStack() as stack:
        where = open_weights(weight_files(base), stack, device)
        if config.num_hidden_layers > len(where):
            refuse(f"num_hidden_layers = {config.num_hidden_layers}, but there are only {len(where)} tensors")
        with torch.device("meta"):
            model = Model(config)
        if trained_on is not None and dms.fingerprint(where) != trained_on:
            raise InputError(f"{overlay[0]}: these adapters were trained on other weights than {base} holds (the "
                             f"fingerprint differs); give the base model that the config.json beside them names")
        adapters = open_weights(overlay, stack, device)
        for name in adapters:
            if "dms_proj_alpha" not in name:
                raise InputError(f"{overlay[0]}: tensor {one_line(name)} is not an adapter's; give a file that holds "
                                 f"only those, or load its folder as a model")
        where.update(adapters)
        wanted = dict(model.named_parameters())  # a tied head is not in it
        for name in where:
            if name not in wanted and not name.endswith("rotary_emb.inv_freq") and \
                    not (name == "lm_head.weight" and config.tie_word_embeddings):
                refuse(f"tensor {one_line(name)} has no place in a {config.model_type} model")
        for name, parameter in wanted.items():
            if name not in where:
                refuse(f"tensor {name} is missing")
            part = where[name].get_slice(name)
            shape = list(part.get_shape())
            if shape != list(parameter.shape):
                refuse(f"tensor {name} has shape {shape}, config.json makes it {list(parameter.shape)}")
            if part.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                refuse(f"tensor {name} is {part.get_dtype()}, and quantized weights are not read")
        for name in wanted:
            module, leaf = name.rsplit(".", 1)
            tensor = where[name].get_tensor(name).to(dtype)
            setattr(model.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.rope_freq = model.rope_freq.to(device)
    return model.eval()


def save_model(model, folder, dtype=torch.bfloat16, base=None):
    """Write config.json, DMS settings included, and model.safetensors with every weight, each atomically.
    base: path or hub id of the unchanged base model: then only the adapters are written, to ADAPTER_FILE, and
    config.json names the base and its fingerprint."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().to("cpu", dtype).contiguous() for name, p in model.named_parameters()
               if base is None or "dms_proj_alpha" in name}
    raw = {**model.config.to_dict(), **dms.settings_to_dict(model.config.dms),
           "torch_dtype": str(dtype).removeprefix("torch.")}
    if base is not None:
        with ExitStack() as stack:
            raw["dms_base_fingerprint"] = dms.fingerprint(open_weights(weight_files(resolve(base)), stack))
        raw["dms_base_model"] = os.path.relpath(base, folder) if os.path.isdir(base) else str(base)
    file = folder / (ADAPTER_FILE if base is not None else "model.safetensors")
    write_atomic(file, lambda scratch: save_file(tensors, scratch, {"format": "pt"}))
    write_json(folder / "config.json", raw)


# ----------------------------------------------------------------------------------------------------------- Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
                   "generation_config.json")


def copy_tokenizer(source, folder):
    """Put the files of a model folder that make its tokenizer and its defaults beside other weights."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            write_atomic(folder / name, lambda scratch: shutil.copyfile(source / name, scratch))


class Tokenizer:
    """The tokenizer of a model folder or hub id: tokenizer.json run by `tokenizers`, and the chat template run in
    jinja2's sandbox."""

    def __init__(self, path_or_hub_id):
        from tokenizers import Tokenizer as FastTokenizer
        folder = resolve(path_or_hub_id)
        file = folder / "tokenizer.json"
        if not file.exists():
            raise InputError(f"{file}: not found; only tokenizers in this format are read")
        with refusing(f"{file}: not a usable tokenizer, download it again"):
            self.fast = FastTokenizer.from_file(str(file))
            self.fast.no_truncation()
            self.fast.no_padding()
        settings = folder / "tokenizer_config.json"
        self.settings = read_json(settings) if settings.exists() else {}
        self.template = self.settings.get("chat_template")
        if (folder / "chat_template.jinja").exists():
            with refusing(f"{folder / 'chat_template.jinja'}: not readable, download it again"):
                self.template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        if isinstance(self.template, list):  # several named templates
            self.template = next((t.get("template") for t in self.template
                                  if isinstance(t, dict) and t.get("name") == "default"), None)

    def special(self, name):
        """The text of a special token such as "eos_token", or None."""
        token = self.settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else None

    def token_id(self, token):
        with refusing("the tokenizer failed on a token's text"):
            return None if token is None else self.fast.token_to_id(token)

    def encode(self, text, add_special_tokens=True, **template):
        """text, or messages for the chat template with its arguments, -> list of token ids; to a plain text
        add_special_tokens adds what the tokenizer file defines (Llama's begin of text)."""
        if isinstance(text, list):
            text, add_special_tokens = self.apply_chat_template(text, **template), False
        with refusing("the tokenizer failed on this text"):
            return self.fast.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids, skip_special_tokens=False):
        with refusing("the tokenizer failed on these token ids"):
            return self.fast.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages, add_generation_prompt=False, **variables):
        """[{"role": ..., "content": ...}, ...] -> the text the model expects; encode it with
        add_special_tokens=False. variables: what the template knows besides, such as enable_thinking."""
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        if not isinstance(self.template, str):
            raise InputError("this tokenizer has no chat template; give a plain prompt instead")

        def raise_exception(message):
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        environment.globals.update(raise_exception=raise_exception,
                                   strftime_now=lambda pattern: datetime.now().strftime(pattern))
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        special = {name: self.special(name) for name in names if self.special(name) is not None}
        # {% generation %} marks what a trainer takes as the answer: here it is just its contents
        template = re.sub(r"({%[-+]?\s*(?:end)?)generation(?=\s*[-+]?%})",
                          lambda tag: tag[1] + ("if" if tag[1].endswith("end") else "if true"), self.template)
        with refusing("the chat template failed on these messages"):
            return environment.from_string(template).render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None,
                **special, **variables)


load_tokenizer = Tokenizer
