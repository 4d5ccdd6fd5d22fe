"""What the engine is tested against: random models and small tokenizers of transformers, saved as
checkpoints, and the method computed with none of the engine's code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.trainers import BpeTrainer

import dms
from checkpoint import load_model, save_model
from dms import DMSConfig

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
TIED_BIASES = dict(tie_word_embeddings=True, attention_bias=True)


def scaled(rope, **more):
    return dict(rope_parameters={**rope, **more})


FAMILIES = {  # name: model_type, and what differs from the sizes in `oracle`
    "llama": ("llama", {}),
    "llama tied, biases, head_dim": ("llama", dict(TIED_BIASES, mlp_bias=True, head_dim=24)),
    "llama one head per group": ("llama", dict(num_key_value_heads=4)),
    "llama llama3": ("llama", dict(scaled(LLAMA3), tie_word_embeddings=True)),
    "llama linear": ("llama", scaled(LINEAR)),
    "llama yarn": ("llama", scaled(YARN)),
    "qwen2": ("qwen2", {}),
    "qwen2 yarn": ("qwen2", dict(scaled(YARN_DEFAULTS), tie_word_embeddings=True)),
    "qwen3": ("qwen3", {}),
    "qwen3 tied, biases, head_dim": ("qwen3", dict(TIED_BIASES, head_dim=32)),
    "qwen3 theta": ("qwen3", scaled(DEFAULT)),
    "qwen3 yarn": ("qwen3", scaled(YARN)),
    "qwen3 yarn attention_factor": ("qwen3", scaled(YARN, attention_factor=0.7)),
    "qwen3 yarn mscale": ("qwen3", scaled(YARN, mscale=2.0, mscale_all_dim=0.6)),
    "qwen3 yarn mscale alone": ("qwen3", scaled(YARN, mscale=2.0)),
    "qwen3 yarn untruncated": ("qwen3", scaled(YARN, truncate=False)),
    # max_position_embeddings is the original context then
    "qwen3 yarn no original": (
        "qwen3", dict(scaled(dict(rope_type="yarn", factor=4.0)), max_position_embeddings=40)),
}


def oracle(kind="qwen3", seed=0, dtype=torch.float32, **changes):
    """A random model in which every weight matters: no norm is one, no bias is zero."""
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=80, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                 attn_implementation="eager", **({} if kind == "qwen2" else {"head_dim": 16}))
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            deviation = 0.4 if parameter.ndim == 1 else 1.5 * parameter.shape[1] ** -0.5
            parameter.normal_(0, deviation, generator=generator)
    return model.eval()


def saved(folder, kind="qwen3", shard="5GB", **changes):
    """`oracle`, also saved to the folder, in shards of that size: (model, folder)."""
    model = oracle(kind, **changes)
    model.save_pretrained(folder, max_shard_size=shard)
    return model, folder


reloaded = transformers.AutoModelForCausalLM.from_pretrained


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


def retrofitted(base, folder, seed=2, **settings):
    """A student of the checkpoint `base` with random adapters, which are saved to the folder."""
    student = dms.start_retrofit(load_model(base), DMSConfig(**{"window": 4, **settings}))
    torch.manual_seed(seed)
    for block in student.model.layers:
        torch.nn.init.normal_(block.self_attn.dms_proj_alpha.weight)
    save_model(student, folder, torch.float32, base=base)
    return student


# --------------------------------------------------- The method, with none of the engine's code


def plain_forward(folder, ids, dms):
    """Logits (T, V) in float64 of a checkpoint with plain RoPE, read and computed with none of the
    engine's code, and decisions (L, Hkv, T). dms: window, scale, offset, shift, per and separate
    (an adapter; otherwise the borrowed neuron)."""
    c = json.loads((folder / "config.json").read_text())
    w = {}
    for file in folder.rglob("*.safetensors"):
        w.update({k.removeprefix("model."): v.double() for k, v in load_file(file).items()})
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    T, D = len(ids), c["head_dim"]
    angle = torch.arange(T)[:, None] * c["rope_theta"] ** (-2 * torch.arange(D // 2).double() / D)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt() * weight

    def rotate(x):  # (T, H, D): channels i and i + D/2 as a complex number
        z = torch.complex(x[..., :D // 2], x[..., D // 2:]) * turn
        return torch.cat((z.real, z.imag), -1)

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
            q, k = (norm(y, p[f"self_attn.{n}_norm.weight"]) for y, n in ((q, "q"), (k, "k")))
        neuron = torch.zeros(heads, D, dtype=torch.bool)
        neuron[::heads // kv_heads, D - 1] = not dms["separate"]
        if dms["separate"]:
            normed = norm(x, p["self_attn.dms_proj_alpha_norm.weight"])
            s = linear(normed, "self_attn.dms_proj_alpha")
        else:
            s = q[:, neuron].clone()
        said = dms["scale"] * s - dms["offset"] > 0  # (T, Hkv)
        if dms["per"] == "layer":
            said = said[:, :1].expand_as(said)
        evict = torch.zeros(kv_heads, T, dtype=torch.bool)
        evict[:, :T - dms["shift"]] = said.T[:, dms["shift"]:]
        decided.append(evict)
        q = rotate(q.masked_fill(neuron, 0)).masked_fill(neuron, 0)
        seen = (j <= i) & (~evict[:, None] | (i - j <= dms["window"]))
        k, v, seen = (y.repeat_interleave(heads // kv_heads, 0)
                      for y in (rotate(k).transpose(0, 1), v.transpose(0, 1), seen))
        scores = (q.transpose(0, 1) @ k.transpose(1, 2) / D**0.5).masked_fill(~seen, -torch.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(0, 1).reshape(T, -1), "self_attn.o_proj")
        h = norm(x, p["post_attention_layernorm.weight"])
        gate = linear(h, "mlp.gate_proj")
        x = x + linear(gate * gate.sigmoid() * linear(h, "mlp.up_proj"), "mlp.down_proj")
    head = w.get("lm_head.weight", w["embed_tokens.weight"])
    return (norm(x, w["norm.weight"]) @ head.T).float(), torch.stack(decided)


# -------------------------------------------------------------------------------------- Tokenizers

TEXTS = [
    "", " ", "Hello,  World!\n\n\ttabs   and 12345 numbers", "naïve café — ☃ 漢字 🙂👍🏽", "a\r\nb",
    "e\u0301 against \u00e9", "<|im_start|>user\nhi<|im_end|>\n", "x<|eot_id|>y </s> <s>",
    "<think>\nhm\n</think>\n\n4", " before and after ", "\x00\x7f\u200b\ufeff", "don't we'll"]
SPECIAL = {  # what each style calls its special tokens
    "qwen": dict(pad_token="<|endoftext|>", start="<|im_start|>", eos_token="<|im_end|>"),
    "llama3": dict(bos_token="<|begin_of_text|>", end="<|end_of_text|>", eos_token="<|eot_id|>"),
    "llama2": dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>"),
}


def make_tokenizer(folder, style, **settings):
    """A small tokenizer in the manner of Qwen or Llama 3 (bytes), or of Llama 2 (with a fallback to
    bytes), saved by transformers, and returned. Its tokenizer_config.json has what the real ones
    have: an object for each added token, lists, and null."""
    specials = list(SPECIAL[style].values())
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
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        fast.train_from_iterator(TEXTS * 5, BpeTrainer(
            vocab_size=330, initial_alphabet=alphabet, special_tokens=specials,
            show_progress=False))
    fast.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    names = {name: token for name, token in SPECIAL[style].items() if name.endswith("_token")}
    if begin := names.get("bos_token"):
        fast.post_processor = processors.TemplateProcessing(
            f"{begin} $A", f"{begin} $A $B", [(begin, fast.token_to_id(begin))])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **names, **settings)
    theirs.save_pretrained(folder)
    added = {str(i): {"content": token.content, "special": token.special, "lstrip": False}
             for i, token in fast.get_added_tokens_decoder().items()}
    edit(folder / "tokenizer_config.json", lambda raw: raw.update(
        added_tokens_decoder=added, additional_special_tokens=specials, model_max_length=10**30,
        add_bos_token=True, sp_model_kwargs={}, sep_token=None))
    return theirs
