"""What the engine is tested against: random models and small tokenizers of transformers, saved as
checkpoints, and the method computed with none of the engine's code."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import EXPERTS, GROUPS, LATENT, OTHERS, close
from safetensors.torch import load_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.trainers import BpeTrainer

import dms
from checkpoint import base_keys, load_model, save_model
from common import read_json, write_json
from dms import DMSConfig

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

LENGTH = 120  # tokens; far beyond the 32 that scaled RoPE calls the original context
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
YARN_DEFAULTS = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
YARN = dict(YARN_DEFAULTS, beta_fast=3.0, beta_slow=0.5)
PUBLISHED = dict(head_dim=128, max_position_embeddings=131072)
TIED_BIASES = dict(tie_word_embeddings=True, attention_bias=True)
TEXTS = [
    "", " ", "Hello,  World!\n\n\ttabs   and 12345 numbers", "naïve café — ☃ 漢字 🙂👍🏽", "a\r\nb",
    "e\u0301 against \u00e9", "<|im_start|>user\nhi<|im_end|>\n", "x<|eot_id|>y </s> <s>",
    "<think>\nhm\n</think>\n\n4", " before and after ", "\x00\x7f\u200b\ufeff", "don't we'll"]
SPECIAL = {  # what each style calls its special tokens
    "qwen": dict(pad_token="<|endoftext|>", start="<|im_start|>", eos_token="<|im_end|>"),
    "llama": dict(bos_token="<|begin_of_text|>", unk_token="<unk>", eos_token="<|eot_id|>")}


def scaled(rope, **more):
    return dict(rope_parameters={**rope, **more})


FAMILIES = {  # the name begins with the model_type: what differs from the sizes in `saved`
    "llama": {},
    "llama tied, biases, head_dim": dict(TIED_BIASES, mlp_bias=True, head_dim=24),
    "llama one head per group": dict(num_key_value_heads=4),
    "llama llama3": dict(scaled(LLAMA3), tie_word_embeddings=True),
    "llama linear": scaled(dict(rope_type="linear", factor=4.0)),
    "llama published": dict(PUBLISHED, **scaled(
        LLAMA3, rope_theta=5e5, factor=32.0, original_max_position_embeddings=8192)),
    "qwen2": {},
    "qwen2 yarn": dict(scaled(YARN_DEFAULTS), tie_word_embeddings=True),
    "qwen3": {},
    "qwen3 tied, biases, head_dim": dict(TIED_BIASES, head_dim=32),
    "qwen3 theta": dict(PUBLISHED, **scaled(dict(rope_type="default", rope_theta=1e6))),
    "qwen3 published": dict(PUBLISHED, **scaled(
        YARN_DEFAULTS, rope_theta=1e6, original_max_position_embeddings=32768)),
    "qwen3_moe": EXPERTS,
    "qwen3_moe normed": dict(EXPERTS, norm_topk_prob=True, mlp_only_layers=[0]),
    "qwen3_moe dense at first": dict(EXPERTS, decoder_sparse_step=2),
    "deepseek_v2": LATENT,
    "deepseek_v2 groups": {**LATENT, **GROUPS, "topk_method": "group_limited_greedy"},
    "deepseek_v2 yarn": dict(LATENT, **scaled(YARN, mscale=0.7, mscale_all_dim=0.7)),
    "deepseek_v3": OTHERS["deepseek_v3"],
    "deepseek_v3 yarn": dict(LATENT, n_group=1, topk_group=1, norm_topk_prob=False,
                             **scaled(YARN, mscale=1.0, mscale_all_dim=0.6)),
    "qwen3 yarn": scaled(YARN),
    "qwen3 yarn attention_factor": scaled(YARN, attention_factor=0.7),
    "qwen3 yarn mscale": scaled(YARN, mscale=2.0, mscale_all_dim=0.6),
    "qwen3 yarn mscale alone": scaled(YARN, mscale=2.0),
    "qwen3 yarn untruncated": scaled(YARN, truncate=False),
    "qwen3 yarn no original": dict(  # it is max_position_embeddings then
        scaled(dict(rope_type="yarn", factor=4.0)), max_position_embeddings=40)}


def saved(folder, kind="qwen3", seed=0, dtype=torch.float32, shard="5GB", **changes):
    """A random model in which every weight matters: no norm is one, no bias is zero. It is saved to
    the folder, in shards of that size: (model, folder)."""
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
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            buffer.uniform_(0, 0.5, generator=generator)
    model.eval().save_pretrained(folder, max_shard_size=shard)
    return mended(model), folder


def reloaded(folder, **more):
    return mended(transformers.AutoModelForCausalLM.from_pretrained(folder, **more))


def mended(model):
    """DeepSeek-V2 as DeepSeek's own code computes it. transformers 5.2 leaves yarn's part out of
    the softmax scale (its pull request 47435 mends that), and fails where experts are in groups."""
    config = model.config
    if config.model_type == "deepseek_v2":
        rope = config.rope_parameters
        mscale = 1 + 0.1 * rope.get("mscale_all_dim", 0) * math.log(rope.get("factor", 1))
        for layer in model.model.layers:
            layer.mlp.num_experts = config.n_routed_experts
            layer.self_attn.scaling = layer.self_attn.qk_head_dim**-0.5 * mscale**2
    return model


def tokens(batch=1):
    return torch.randint(0, 64, (batch, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def same_logits(ours, theirs):
    close(ours(tokens()), theirs(tokens()).logits.to(ours.dtype))


def edit(file, **changes):
    write_json(file, {**read_json(file), **changes})


def retrofitted(base, folder, seed=2):
    """A student of the checkpoint `base` with random adapters, which are saved to the folder."""
    student = dms.start_retrofit(load_model(base), DMSConfig(window=4))
    torch.manual_seed(seed)
    for block in student.model.layers:
        torch.nn.init.normal_(block.self_attn.dms_proj_alpha.weight)
    save_model(student, folder, torch.float32, base_keys(base, folder))
    return student


@torch.no_grad()
def plain_forward(folder, ids, shift=1, per="head", separate=False):
    """Logits (T, V) and decisions (L, Hkv, T) of a checkpoint of small_config's sizes, with a
    window of 5, a scale of 100 and an offset of 5: by transformers in float64, with the method put
    into its attention. separate: an adapter decides, otherwise the borrowed neuron."""
    weights = {}
    for file in folder.rglob("*.safetensors"):
        weights |= load_file(file)
    T = len(ids)
    i, j = torch.arange(T)[:, None], torch.arange(T)
    scores, decided = [], []  # of each layer, (Hkv, T)

    def read_adapter(module, inputs):
        name = f"model.layers.{len(decided)}.self_attn.dms_proj_alpha"
        norm, alpha = (weights[f"{name}{x}.weight"].double() for x in ("_norm", ""))
        normed = F.rms_norm(inputs[0][0], norm.shape, norm, model.config.rms_norm_eps)
        scores.append(alpha @ normed.T)

    def read_neuron(module, inputs, q):
        neuron = q.view(T, 4, -1)[:, ::2, -1]
        scores.append(neuron.T.clone())
        neuron.zero_()

    def attention(module, q, k, v, mask, **others):
        if not separate:
            q[:, ::2, :, -1] = 0  # to which RoPE has carried the other channel of the pair
        said = 100 * scores[-1] - 5 > 0
        if per == "layer":
            said = said[:1].expand_as(said)
        evict = F.pad(said[:, shift:], (0, shift))
        decided.append(evict)
        seen = (j <= i) & (~evict[:, None] | (i - j <= 5))
        k, v, seen = (x.repeat_interleave(2, -3) for x in (k, v, seen))
        return F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2), None

    transformers.AttentionInterface.register("dms", attention)
    model = reloaded(folder, dtype=torch.float64, attn_implementation="dms")
    for layer in model.model.layers:
        if separate:
            layer.input_layernorm.register_forward_pre_hook(read_adapter)
        else:
            q = getattr(layer.self_attn, "q_norm", layer.self_attn.q_proj)
            q.register_forward_hook(read_neuron)
    return model(ids[None]).logits[0].float(), torch.stack(decided)


def make_tokenizer(folder, style="qwen", **settings):
    """A small tokenizer in the manner of Qwen or Llama 3, as transformers reads it there."""
    specials = list(SPECIAL[style].values())
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(TEXTS * 5, BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=specials, show_progress=False))
    fast.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    names = {name: token for name, token in SPECIAL[style].items() if name.endswith("_token")}
    if begin := names.get("bos_token"):
        fast.post_processor = processors.TemplateProcessing(
            f"{begin} $A", f"{begin} $A $B", [(begin, fast.token_to_id(begin))])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **names, **settings)
    theirs.save_pretrained(folder)
    edit(folder / "tokenizer_config.json", add_bos_token=True, sep_token=None)  # as real ones have
    return type(theirs).from_pretrained(folder)
