"""What the engine is tested against: random models and small tokenizers of transformers, saved as
checkpoints, and the method computed with none of the engine's code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as InTurn

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


# --------------------------------------------------- The method, with none of the engine's code


def plain_forward(folder, ids, dms=None):
    """Logits (T, V) in float64 of a checkpoint with plain RoPE, read and computed with none of the
    engine's code, and decisions (L, Hkv, T). dms: None, or window, scale, offset, shift, per and
    separate (an adapter; otherwise the borrowed neuron)."""
    c = json.loads((folder / "config.json").read_text())
    w = {}
    for file in folder.glob("*.safetensors"):
        w.update({k.removeprefix("model."): v.double() for k, v in load_file(file).items()})
    T = len(ids)
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    D = c.get("head_dim") or c["hidden_size"] // heads
    angle = torch.arange(T)[:, None] * c["rope_theta"] ** (-2 * torch.arange(D // 2).double() / D)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt() * weight

    def rotate(x):  # (T, H, D): channels i and i + D/2 as a complex number
        z = torch.complex(x[..., :D // 2], x[..., D // 2:]) * turn
        return torch.cat((z.real, z.imag), -1)

    neuron = bool(dms) and not dms["separate"]
    x = w["embed_tokens.weight"][ids]
    i, j = torch.arange(T)[:, None], torch.arange(T)
    decided = []
    for layer in range(c["num_hidden_layers"]):
        prefix = f"layers.{layer}."
        p = {k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)}

        def linear(x, name):
            return x @ p[name + ".weight"].T + p.get(name + ".bias", 0)

        h = norm(x, p["input_layernorm.weight"])
        q, k, v = (linear(h, f"self_attn.{n}_proj").view(T, -1, D) for n in "qkv")
        if "self_attn.q_norm.weight" in p:
            q = norm(q, p["self_attn.q_norm.weight"])
            k = norm(k, p["self_attn.k_norm.weight"])
        borrowed = q.view(T, kv_heads, -1, D)[:, :, 0, D - 1]
        evict = torch.zeros(kv_heads, T, dtype=torch.bool)
        if dms:
            s = borrowed.clone()
            if dms["separate"]:
                s = norm(x, p["self_attn.dms_proj_alpha_norm.weight"])
                s = linear(s, "self_attn.dms_proj_alpha")
            said = dms["scale"] * s - dms["offset"] > 0  # (T, Hkv)
            if dms["per"] == "layer":
                said = said[:, :1].expand_as(said)
            evict[:, :T - dms["shift"]] = said.T[:, dms["shift"]:]
        decided.append(evict)
        if neuron:
            borrowed.zero_()  # a view of q
        q = rotate(q)
        if neuron:
            q.view(T, kv_heads, -1, D)[:, :, 0, D - 1] = 0
        seen = (j <= i) & (~evict[:, None] | (i - j <= (dms or {"window": 0})["window"]))
        group = heads // kv_heads
        k, v, seen = (y.repeat_interleave(group, 0) for y in (rotate(k).transpose(0, 1),
                                                              v.transpose(0, 1), seen))
        scores = (q.transpose(0, 1) @ k.transpose(1, 2) / D**0.5).masked_fill(~seen, -torch.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(0, 1).reshape(T, -1), "self_attn.o_proj")
        h = norm(x, p["post_attention_layernorm.weight"])
        gate = linear(h, "mlp.gate_proj")
        x = x + linear(gate * gate.sigmoid() * linear(h, "mlp.up_proj"), "mlp.down_proj")
    head = w.get("lm_head.weight", w["embed_tokens.weight"])
    return (norm(x, w["norm.weight"]) @ head.T).float(), torch.stack(decided)


# -------------------------------------------------------------------------------------- Tokenizers

SPECIAL = {
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>"],
    "llama2": ["<unk>", "<s>", "</s>"],
}
NAMES = {
    "qwen": dict(eos_token="<|im_end|>", pad_token="<|endoftext|>"),
    "llama3": dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"),
    "llama2": dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>"),
}
TEXTS = [
    "", " ", "Hello,  World!\n\n\ttabs   and 12345 numbers", "naïve café — ☃ 漢字 🙂👍🏽", "a\r\nb",
    "e\u0301 against \u00e9", "<|im_start|>user\nhi<|im_end|>\n", "x<|eot_id|>y </s> <s>",
    "<think>\nhm\n</think>\n\n4", " before and after ", "\x00\x7f\u200b\ufeff", "don't we'll",
]
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def make_tokenizer(folder, style, **settings):
    """A small tokenizer in the manner of Qwen or Llama 3 (bytes), or of Llama 2 (with a fallback to
    bytes), saved by transformers, and returned. Its tokenizer_config.json has what the real ones
    have: an object for each added token, lists, and null."""
    specials = SPECIAL[style]
    begin = specials[1] if style == "llama2" else specials[0]
    if style == "llama2":
        words = [f"<0x{i:02X}>" for i in range(256)] + list("▁abcdehlnortuw,!123")
        vocab = {token: i for i, token in enumerate([*specials, *words, "▁a", "he"])}
        fast = FastTokenizer(models.BPE(vocab, [("▁", "a"), ("h", "e")], unk_token="<unk>",
                                        fuse_unk=True, byte_fallback=True))
        fast.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                          decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        fast.add_special_tokens(specials)
    else:
        fast = FastTokenizer(models.BPE())
        to_words = Split(Regex(PATTERN), "isolated")
        fast.pre_tokenizer = InTurn([to_words, ByteLevel(add_prefix_space=False, use_regex=False)])
        fast.decoder = decoders.ByteLevel()
        fast.train_from_iterator(TEXTS * 5, trainers.BpeTrainer(
            vocab_size=330, initial_alphabet=ByteLevel.alphabet(), special_tokens=specials,
            show_progress=False))
    fast.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    if style != "qwen":
        fast.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A $B",
            special_tokens=[(begin, fast.token_to_id(begin))])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **NAMES[style], **settings)
    theirs.save_pretrained(folder)
    added = {str(i): {"content": token.content, "special": token.special, "lstrip": False}
             for i, token in fast.get_added_tokens_decoder().items()}
    edit(folder / "tokenizer_config.json", lambda raw: raw.update(
        added_tokens_decoder=added, additional_special_tokens=specials, model_max_length=10**30,
        add_bos_token=True, sp_model_kwargs={}, sep_token=None))
    return theirs


# ------------------------------------------------------------------ Every published spelling of DMS


def change_tensors(file, change):
    """Rewrite a safetensors file through change(tensors), which changes them in place."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def checkpoint_of(folder, kind="qwen3", seed=0, **extra_keys):
    """A random dense checkpoint in which everything matters; its config.json with extra_keys."""
    from checkpoint import save_model
    from conftest import small_model

    model = small_model(seed, model_type=kind, tie_word_embeddings=kind != "llama")
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
        folder, dms_window_size=5, dms_alpha_scale=100.0, dms_initial_alpha_offset=5.0, dms_cr=8,
        dms_tau=0.1, dms_disable_eviction=False, auto_map={"AutoModelForCausalLM": "a.Never"})
    return dict(window=5, scale=100.0, offset=5.0, shift=1, per="head", separate=False), {}


def nvidia_adapter(folder, per="head"):
    """Adapters among the weights; numbers as some programs write them."""
    checkpoint_of(folder, dms_window_size=7.0, dms_alpha_scale=90, dms_initial_alpha_offset=2.5,
                  dms_separate_alpha=True, dms_alpha_per=per)
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


def overlay(folder):
    """Only the 2L tensors, to be laid over a base model; settings beside them."""
    checkpoint_of(folder, "qwen2")
    (folder / "adapters").mkdir()
    save_file(adapters(), folder / "adapters" / "any-name.safetensors")
    save_file(adapters(), folder / "a-copy.safetensors")  # for plain_forward, and no one else
    raw = {"dms_window_size": 4, "dms_alpha_scale": 100.0, "dms_initial_alpha_offset": 5.0}
    (folder / "adapters" / "config.json").write_text(json.dumps(raw))
    settings = dict(window=4, scale=100.0, offset=5.0, shift=1, per="head", separate=True)
    return settings, {"adapter": folder / "adapters"}

# ---------------------------------------------------------- What messages and templates may hold

TOOLS = [{"type": "function", "function": {
    "name": "look", "description": "<é> & 'so'", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"x": "ü", "n": 1.5}}}
USER = {"role": "user", "content": " 2 + <2>? naïve ☃\n"}
CHATS = {
    "plain": [{"role": "system", "content": " Be brief. "}, USER,
              {"role": "assistant", "content": "<think>\n\nIt's 4.\n</think>\n\n4"}, USER],
    "null": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
             {"role": "tool", "content": "7"}],
    "missing": [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": ""}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": text} for text in ("1", "2")]}],
    "reasoning": [USER, {"role": "assistant", "content": "4", "reasoning_content": "Hm."}, USER],
}
TEMPLATE = r"""{{- bos_token }}{%- if tools %}
    {{- '<tools>' + tools | map('tojson') | join('\n') + '</tools>' + strftime_now('%Y') }}
{%- endif %}
{%- set ns = namespace(n=0) %}
{% for message in messages %}
    {% if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{ raise_exception('no such role:\n' + message.role) }}
    {% endif %}
    {%- if loop.index0 > 50 %}{%- break %}{%- endif %}
    {%- set ns.n = ns.n + 1 %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message.reasoning_content is defined %}
        {{- '<think>' + message.reasoning_content + '</think>' }}
    {%- endif %}
    {%- generation %}{%- set content = 'x' %}{% if message.content is string %}
        {{- message.content | trim }}
    {%- elif message.content %}
        {{- message.content | map(attribute='text') | join(' ') }}
    {%- endif %}{%- endgeneration %}{{ content is defined }}
    {%- for call in message.tool_calls or [] %}
        {{- call.function.arguments | tojson(indent=2) }}{{ call | tojson(true, sort_keys=true) }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}{% if enable_thinking is false %}{{ '<think>' }}{% endif %}
{%- endif %}
{{- unknown }}{{ pad_token is defined }}{{ add_bos_token is defined }}{{ documents is none }}"""
