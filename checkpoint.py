"""
Everything on disk: a model folder's config.json, weights, DMS settings, tokenizer and template.

    model = load_model("Qwen/Qwen3-0.6B")           # folder or hub id; dense or DMS, as it says
    tokenizer = load_tokenizer("Qwen/Qwen3-0.6B")
    save_model(model, "out/mine")

Only safetensors and JSON are read; a chat template runs in jinja2's sandbox, as in transformers.
Where two places state one thing and the logits depend on it, they must agree, or the folder is
refused. Of others the one that transformers prefers counts. A folder is also refused if its config
asks for something that this engine would compute wrongly.

Settings that have no effect here are named in one line on stderr. This file knows nothing of how
models are run or trained.
"""

import functools
import itertools
import json
import math
import os
import re
import shutil
import time
from pathlib import Path

import huggingface_hub
import jinja2.sandbox
import tokenizers
import torch
from safetensors import SafetensorError, safe_open

from common import (InputError, explained, read_json, read_text, require, say, torchrun_place,
                    whole, write_json)
from dms import DMSConfig
from model import ROPE_KINDS, Model, ModelConfig, rope_frequencies

WEIGHTS = "model.safetensors"
ADAPTER_FILE = "dms_adapters.safetensors"
TOKENIZER_FILES = """tokenizer.json tokenizer_config.json special_tokens_map.json
    chat_template.jinja generation_config.json""".split()


def without_nulls(raw):
    """A parsed JSON object without its nulls, which state nothing."""
    return {key: value for key, value in raw.items() if value is not None}


def read_optional(file):
    return without_nulls(read_json(file)) if file.exists() else {}


# ------------------------------------------------------------------------------------- config.json

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3")
CONFIG_FIELDS = ModelConfig.__annotations__.keys() - {"dms", "extra"}


def parse_config(raw, where="config.json"):
    """The ModelConfig, but for its DMS settings, of a parsed config.json. Raises InputError naming
    what this engine would compute wrongly."""
    raw = without_nulls(raw)
    with explained(f"{where}: missing or unusable", LookupError, TypeError, ArithmeticError):
        # a release (publish.py) has model_type "dms", and the base's under "dms_engine"
        raw["model_type"] = raw.get("dms_engine", raw)["model_type"]
        rope = read_rope(raw, where)
        check_supported(raw, rope, where)
        raw["rope_theta"] = rope.pop("rope_theta")
        raw["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        # what transformers takes where the file does not say
        heads = raw["num_attention_heads"]
        raw.setdefault("num_key_value_heads", heads)
        head_dim = 128 if raw["model_type"] == "qwen3" else raw["hidden_size"] // heads
        raw.setdefault("head_dim", raw.get("qk_rope_head_dim", head_dim))
        raw.setdefault("num_experts", raw.get("num_local_experts"))  # transformers 5's name
        config = ModelConfig(**{name: raw[name] for name in CONFIG_FIELDS & raw.keys()})
        rope_frequencies(config)  # so that a parameter of RoPE that is missing fails here
    written_back = ("bos_token_id", "eos_token_id", "pad_token_id")
    config.extra = {key: raw[key] for key in written_back if key in raw}
    return config


def read_rope(raw, where):
    """{"rope_type": ..., "rope_theta": ..., other parameters} from rope_parameters or the older
    rope_scaling. If both are there, or theta stands in two places, they must agree: otherwise it
    depends on the reader which one counts."""
    original = "original_max_position_embeddings"

    def complete(rope):
        """A rope, filled in by what may stand beside it in config.json."""
        rope = without_nulls(rope)
        kind = rope.pop("type", "default")  # the older name of rope_type
        beside = {original: raw[original]} if original in raw else {}  # it wins over rope's own
        return {"rope_type": kind, "rope_theta": raw.get("rope_theta", 10000.0)} | rope | beside

    found = [complete(raw[key]) for key in ("rope_parameters", "rope_scaling") if key in raw]
    rope = found[0] if found else complete({})
    # a rope's own theta has won over the one beside it, which must be the same
    theta = raw.get("rope_theta", rope["rope_theta"])
    require(theta == rope["rope_theta"] and all(other == rope for other in found),
            f"{where}: rope_parameters, rope_scaling and rope_theta contradict each other")
    if "attn_factor" in rope:
        say(f"{where}: RoPE's attn_factor is read by nobody, transformers included")
    return rope


def check_supported(raw, rope, where):
    """Refuse by name what would be computed wrongly."""
    layer_types = {*raw.get("layer_types", [])}
    slides = bool(layer_types - {"full_attention"})
    if raw.get("use_sliding_window") and not layer_types:  # defaults as in transformers
        slides = raw.get("max_window_layers", 28) < raw["num_hidden_layers"]
    refused = {
        f"model_type {raw['model_type']}": raw["model_type"] not in FAMILIES,
        f"hidden_act {raw.get('hidden_act')}": raw.get("hidden_act", "silu") != "silu",
        f"RoPE {rope}": rope["rope_type"] not in ROPE_KINDS,
        "a RoPE for each layer type": dict in map(type, rope.values()),
        "partial rotary embeddings": (raw | rope).get("partial_rotary_factor", 1) != 1,
        "rope_interleave false": not raw.get("rope_interleave", True),
        f"a sliding_window, {layer_types or ''}": slides}
    for what, is_there in refused.items():
        require(not is_there, f"{where}: not supported: {what}; give one of {', '.join(FAMILIES)}")


def config_to_dict(config):
    """The parsed config.json that parse_config, read_settings and transformers read back. The class
    in architectures is NVIDIA's: engines without DMS, which lack it, should refuse the model."""
    name = f"{config.model_type.title()}ForCausalLM{'DMS' if config.dms else ''}"
    raw = {"architectures": [name.replace("_", "")]} | without_nulls(vars(config))
    raw |= {"hidden_act": "silu"} | raw.pop("extra")
    if config.kv_lora_rank:  # here null means none, and a missing key would mean 1536
        raw["q_lora_rank"] = config.q_lora_rank
    if settings := raw.pop("dms", None):
        raw |= {key: getattr(settings, name) for name, key in NVIDIA_KEYS.items()}
        raw[SEPARATE] = settings.source == "adapter"
        raw["dms_paged_attention_block_size"] = nvidia_block(settings)
    return raw


def nvidia_block(settings):
    """The page size in config.json, which only NVIDIA's code reads: the largest power of two below
    the window, 256 at most. That code always shifts by one, and would compute a model with shift 0
    wrongly. It refuses a page as large as the window: so that is what such a model states."""
    if settings.shift == 0:
        return settings.window
    return min(256, 2 ** (max(settings.window - 1, 1).bit_length() - 1))


# ------------------------------------------------------------------------------------ DMS settings

# DMSConfig's name -> config.json's key (dms_offsets and dms_shift are ours: NVIDIA's always is 1)
NVIDIA_KEYS = {"window": "dms_window_size", "scale": "dms_alpha_scale", "tau": "dms_tau",
               "offset": "dms_initial_alpha_offset", "target_cr": "dms_cr", "shift": "dms_shift",
               "per": "dms_alpha_per", "disable_eviction": "dms_disable_eviction",
               "offsets": "dms_offsets"}
# dms_metadata.json's key -> config.json's key; that file always belongs to a borrowed neuron
METADATA_KEYS = {"window_size": "dms_window_size", "alpha_offset": "dms_initial_alpha_offset",
                 "alpha_scale": "dms_alpha_scale", "shift": "dms_shift", "target_cr": "dms_cr"}
SEPARATE = "dms_separate_alpha"  # true: adapters decide; false or absent: the borrowed neuron


def read_settings(folder, raw):
    """The DMSConfig of a checkpoint folder whose parsed config.json is `raw`, None for a dense
    model: from the dms_* keys there or from dms_metadata.json. Prints what it has to assume."""
    raw = without_nulls(raw)
    metadata = read_optional(folder / "dms_metadata.json")
    metadata |= metadata.get("config", {})  # nested in some published folders (shisa-ai's)
    of_metadata = {key: metadata[name] for name, key in METADATA_KEYS.items() if name in metadata}
    if metadata:
        # defaults of the program that writes this file
        of_metadata = {"dms_window_size": 256, "dms_shift": 0, SEPARATE: False} | of_metadata
    elif not any(key.startswith("dms_") for key in raw):
        return None
    both = of_metadata | raw
    require(both == raw | of_metadata,  # equal only if no key has two values
            f"{folder}: config.json and dms_metadata.json contradict each other; remove one")
    known = {name: both[key] for name, key in NVIDIA_KEYS.items() if key in both}
    settings = DMSConfig(**known, source="adapter" if both.get(SEPARATE) else "neuron")
    settings.window = int(settings.window)  # 512.0 may be written for 512
    if assumed := {"window", "scale", "offset", "shift"} - known.keys():
        assumed = ", ".join(f"{name} = {getattr(settings, name)}" for name in sorted(assumed))
        say(f"{folder}: not stated by the checkpoint, so assumed: {assumed}")
    return settings


# ----------------------------------------------------------------------------------------- Weights

download = functools.cache(huggingface_hub.snapshot_download)  # the same commit in one process


def resolve(path_or_hub_id, relative_to=".", revision=None):
    """The local folder of a model: one that exists (first tried relative to `relative_to`), or the
    snapshot of a hub repository, with HF_HUB_OFFLINE=1 what the cache has of it. Nothing is fetched
    from its subfolders, and no weights in formats that are not read."""
    for folder in (Path(relative_to) / path_or_hub_id, Path(path_or_hub_id)):
        if folder.is_dir():
            return folder
    # any Exception, since the errors of its HTTP library differ between versions
    with explained(f"{path_or_hub_id}: no such folder, and not on the hub", Exception):
        return Path(download(
            str(path_or_hub_id), revision=revision, ignore_patterns="*/*",
            allow_patterns=("*.json", "*.jinja", WEIGHTS,
                            "*-of-*.safetensors", "*adapter*.safetensors"),
            local_files_only=huggingface_hub.constants.HF_HUB_OFFLINE))


def find_adapters(path_or_hub_id):
    """The safetensors file of adapters: a file, or the one in a folder or hub repository."""
    if Path(path_or_hub_id).is_file():
        return Path(path_or_hub_id)
    folder = resolve(path_or_hub_id)
    files = [*folder.glob(ADAPTER_FILE)] or [*folder.glob("*.safetensors")]
    require(len(files) == 1, f"{folder}: {len(files)} safetensors files; name the adapters' one")
    return files[0]


def weight_files(folder):
    """The safetensors files of a model: one, or the shards of an index. As in transformers, an
    index does not count beside the file: it may be from before its shards were merged."""
    file = folder / WEIGHTS
    index = folder / f"{WEIGHTS}.index.json"
    if file.exists() or not index.exists():
        return [file]
    return sorted({folder / name for name in read_json(index)["weight_map"].values()})


def unstacked(name, tensor):
    """Yields the (name, tensor) pairs of a stored tensor, by the hub's names: itself, or each
    expert's weights where transformers 5 has stacked them, (E, ...), gate_proj above up_proj."""
    layer, _, kind = name.rpartition(".")
    if not layer.endswith(".experts"):
        yield name, tensor
        return
    kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
    for e, expert in enumerate(tensor):
        for one, part in zip(kinds, expert.chunk(len(kinds))):
            yield f"{layer}.{e}.{one}.weight", part


def read_tensors(files, device, dtype, unused=()):
    """{name: tensor} of safetensors files, straight onto the device. unused: how names begin whose
    tensors are left out."""
    tensors = {}
    for file in files:
        damaged = explained(f"{file}: damaged, or not a safetensors file", SafetensorError)
        with damaged, safe_open(file, "pt", str(device)) as stored:
            for name in stored.keys():
                if name.endswith("rotary_emb.inv_freq") or name.startswith(unused):
                    continue  # the first is computed here, though some older files store it
                tensor = stored.get_tensor(name)
                require(tensor.is_floating_point() and tensor.itemsize > 1,
                        f"{file}: {name} is {tensor.dtype}; not supported: quantized weights")
                # rounded, the bias on a router's scores would choose other experts
                kept = torch.float32 if name.endswith("e_score_correction_bias") else dtype
                parts = unstacked(name, tensor.to(device, kept))
                # Parameters, which load_state_dict takes as they are, so that tied ones stay one
                tensors |= {name: torch.nn.Parameter(part) for name, part in parts}
    return tensors


def offset_for(settings, cr):
    """The offset at which a retrofit compresses by cr: of those that it has settled, or between
    two of them, linear in the logarithm of the ratio."""
    offsets = settings.offsets if settings else []
    for (low, offset), (high, next_offset) in itertools.pairwise(offsets):
        if low <= cr <= high:
            return offset + (next_offset - offset) * math.log(cr / low) / math.log(high / low)
    raise InputError(f"{cr:g}x: the model has settled these ratios: {[x for x, _ in offsets]}")


def load_model(path_or_hub_id, device="cpu", dtype=torch.float32, adapter=None, cr=None):
    """Load a checkpoint, dense or DMS as it says of itself, onto `device` in `dtype` (None: as it
    is stored). adapter: a safetensors file, or a folder or hub id, of DMS adapters to be laid over
    the model. cr: another compression ratio than its own. Returns a Model in eval mode whose
    parameters do not require gradients."""
    folder = resolve(path_or_hub_id)
    raw = read_json(folder / "config.json")
    if "dms_base_model" in raw:  # adapters alone, which name their base
        base = resolve(raw["dms_base_model"], folder, raw.get("dms_base_revision"))
        return load_model(base, device, dtype, adapter or folder, cr)
    config = parse_config(raw, folder / "config.json")
    unused = ()
    if raw.get("num_nextn_predict_layers"):
        unused = f"model.layers.{config.num_hidden_layers}."
        say(f"{folder}: {unused} predicts a second token ahead (MTP), and is not used")
    files = weight_files(folder)
    if adapter:
        file = find_adapters(adapter)
        files.append(file)
        # its tensors say that adapters decide, even where no config.json does
        beside = read_optional(file.parent / "config.json") | {SEPARATE: True}
        config.dms = read_settings(file.parent, beside)
    else:
        config.dms = read_settings(folder, raw)
    if cr:
        config.dms.offset = offset_for(config.dms, cr)
    with torch.device("meta"):
        model = Model(config)
    tensors = read_tensors(files, device, dtype, unused)
    if config.tie_word_embeddings:  # one of the two is stored, or both
        embedding = tensors.setdefault("model.embed_tokens.weight", tensors.get("lm_head.weight"))
        head = tensors.get("lm_head.weight", embedding)
        require(head is embedding or head.equal(embedding),
                f"{folder}: its lm_head is not tied; set tie_word_embeddings to false")
        tensors["lm_head.weight"] = embedding
    # the error lists what is missing, unexpected or of another shape
    with explained(f"{folder}: does not fit its config.json", RuntimeError):
        model.load_state_dict(tensors, assign=True)
    model.rope_freq = model.rope_freq.to(device)
    return model.requires_grad_(False).eval()


def base_keys(path_or_hub_id, folder):
    """How config.json in `folder` names the base of adapters: a folder from there, or a hub id and
    the commit that was loaded."""
    if os.path.isdir(path_or_hub_id):
        base = os.path.realpath(path_or_hub_id)
        return {"dms_base_model": os.path.relpath(base, os.path.realpath(folder))}
    snapshot = resolve(path_or_hub_id)  # its folder is named by its commit
    return {"dms_base_model": str(path_or_hub_id), "dms_base_revision": snapshot.name}


def save_model(model, folder, dtype=torch.bfloat16, base=None):
    """Write a checkpoint with its weights in dtype (None: as they are). base: what `base_keys` says
    of the unchanged base model: then only the adapters are written. Where the weights are sharded,
    every process calls this. config.json comes last: a folder without it is not whole."""
    folder = Path(folder)
    rank, _ = torchrun_place()
    # The other processes only help to gather: "meta". A copy, since what was gathered is a view of
    # something larger, which safetensors refuses.
    tensors = {name: whole(p.detach()).to("meta" if rank else "cpu", dtype).clone()
               for name, p in model.named_parameters() if not base or "dms_proj_alpha" in name}
    if rank:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    pattern = (ADAPTER_FILE if base else WEIGHTS).replace(".", "{suffix}.")
    huggingface_hub.save_torch_state_dict(tensors, folder, filename_pattern=pattern)
    named_dtype = str(dtype or model.dtype).removeprefix("torch.")
    raw = config_to_dict(model.config) | {"torch_dtype": named_dtype} | (base or {})
    write_json(folder / "config.json", raw)


# --------------------------------------------------------------------------------------- Tokenizer


def copy_tokenizer(source, folder):
    """Put the files of a model folder that make its tokenizer and defaults beside other weights."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


@functools.cache
def compile_template(text):
    """A chat template as transformers runs it, in jinja2's sandbox."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    sandbox.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    # defaults: what render() gets counts before them
    sandbox.globals.update(raise_exception=raise_exception, strftime_now=time.strftime, tools=None,
                           documents=None, add_generation_prompt=False)
    # {% generation %} marks what a trainer takes as the answer. Here it becomes {% with %}, which
    # only opens a scope.
    text = re.sub(r"({%[-+]?\s*)(end)?generation(?=\s*[-+]?%})", r"\1\2with", text)
    return sandbox.from_string(text)


class Tokenizer:
    """The tokenizer of a model folder or hub id: tokenizer.json, and the chat template."""

    def __init__(self, path_or_hub_id):
        folder = resolve(path_or_hub_id)
        file = folder / "tokenizer.json"
        with explained(f"{file}: not a tokenizer in this format", Exception):
            self.fast = tokenizers.Tokenizer.from_file(str(file))
        self.fast.no_truncation()
        self.fast.no_padding()
        # the map is from older versions of transformers
        self.settings = read_optional(folder / "special_tokens_map.json")
        self.settings |= read_optional(folder / "tokenizer_config.json")
        template = self.settings.get("chat_template")
        if (folder / "chat_template.jinja").exists():
            template = read_text(folder / "chat_template.jinja")
        if not isinstance(template, list):
            template = [{"name": "default", "template": template}]
        named = {t["name"]: t["template"] for t in template}
        self.template = named.get("default")
        self.tool_template = named.get("tool_use", self.template)
        self.end_id = self.fast.token_to_id(self.special("eos_token") or "")

    def special(self, name):
        """The text of a special token such as "eos_token", or None."""
        token = self.settings.get(name)
        return token["content"] if isinstance(token, dict) else token

    def encode(self, text, add_special_tokens=True, **template):
        """text, or messages for the chat template with its arguments -> list of token ids. To a
        text add_special_tokens adds what the file defines (Llama's begin of text)."""
        if isinstance(text, list):
            text = self.apply_chat_template(text, **template)
            add_special_tokens = False
        with explained("not a text", TypeError):  # or bytes that are not UTF-8
            return self.fast.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids, skip_special_tokens=False):
        return self.fast.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages, **variables):
        """[{"role": ..., "content": ...}, ...] -> the text the model expects, to be encoded with
        add_special_tokens=False. The template gets the messages as they are, but for nulls, which
        it would write out. variables: what else it knows, as add_generation_prompt, tools or
        enable_thinking. Raises InputError with what it says of them."""
        require(self.template, "the model has no chat template; give plain text, or another model")
        names = "bos_token eos_token unk_token pad_token".split()
        known = without_nulls({name: self.special(name) for name in names}) | variables
        with explained("the chat template refused these messages", Exception):
            messages = [without_nulls(message) for message in messages]
            template = self.tool_template if known.get("tools") else self.template
            return compile_template(template).render(known, messages=messages)


load_tokenizer = Tokenizer


# -------------------------------------------------------------------------------------- Generation

# keys of generation_config.json that are read, or that change no answer here
KNOWN = """do_sample eos_token_id bos_token_id pad_token_id max_length max_new_tokens use_cache
    transformers_version _from_model_config""".split()


def generation_defaults(folder, names):
    """{name: value} of what generation_config.json states under these names. What else it asks for
    is named on stderr."""
    raw = read_optional(folder / "generation_config.json")
    # but for values that switch a thing off, such as 1 beam or a penalty of 1.0
    asked = {key for key, value in raw.items() if value is True or value not in (0, 1, [], {}, "")}
    if ignored := sorted(asked.difference(KNOWN, names)):
        say(f"{folder}: generation_config.json asks for {', '.join(ignored)}, which is not done")
    if raw.get("do_sample") is False:
        raw["temperature"] = 0.0
    return {name: float(raw[name]) for name in names if name in raw}


def end_ids(folder, tokenizer):
    """The ids that end an answer: those of generation_config.json, else of config.json, and the
    tokenizer's own."""
    raw = read_optional(folder / "config.json") | read_optional(folder / "generation_config.json")
    ends = raw.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return {*ends, tokenizer.end_id} - {None}
