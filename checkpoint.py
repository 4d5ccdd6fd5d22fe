"""
Everything on disk: a model folder's config.json, weights, DMS settings, tokenizer and template.

    model = load_model("Qwen/Qwen3-0.6B")           # folder or hub id; dense or DMS, as it says
    tokenizer = load_tokenizer("Qwen/Qwen3-0.6B")
    save_model(model, "out/mine")

Only safetensors and JSON are read; a chat template runs in jinja2's sandbox, as in transformers.
Where several files or keys state one thing, they rank as in transformers. A folder is refused where
they contradict each other and logits depend on it, and where it asks of the model what this engine
cannot do. What it asks beyond that is named in one line. This file knows nothing of how a model
computes, generates or is trained.
"""

import contextlib
import functools
import json
import os
import re
import shutil
import sys
import tempfile
import textwrap
from dataclasses import fields
from datetime import datetime
from pathlib import Path

import huggingface_hub
import jinja2.ext
import jinja2.sandbox
import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common import InputError, read_json, read_text, require, write_json
from dms import DMSConfig
from model import ROPE_KINDS, Model, ModelConfig, original_context, rope_frequencies

FAMILIES = ("llama", "qwen2", "qwen3")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_FILE = "dms_adapters.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "chat_template.jinja", "generation_config.json")
OTHER_FILES = ("config.json", "dms_metadata.json", "results.json", "metrics.jsonl", INDEX, WEIGHTS)


@functools.cache
def say(line):
    """Tell the user, once in a process."""
    print(line, file=sys.stderr)


def one_line(message):
    """What a library says, which may be long, and of several lines."""
    return textwrap.shorten(str(message), 300, placeholder=" ...")


def read_optional(file):
    return read_json(file) if file.exists() else {}


def read_fields(kinds, raw, where, keys=None):
    """{field: value} of what a parsed JSON file states, where null states nothing. Numbers get the
    type of their field, since 20.0 may be written for 20. kinds: {field: type}; keys: {field: key
    in the file}, where that has another name."""
    keys = keys or {name: name for name in kinds}
    stated = {name: raw[key] for name, key in keys.items() if raw.get(key) is not None}
    for name, value in stated.items():
        if kinds[name] in (int, float):
            require(type(value) in (int, float), f"{where}: {keys[name]} = {value!r} is no number")
            stated[name] = kinds[name](value)
    return stated


# ------------------------------------------------------------------------------------- config.json

CONFIG_KINDS = {f.name: f.type for f in fields(ModelConfig) if f.name not in ("dms", "extra")}
# what a saved model states anew, or what is untrue of it; all else is written back as it was
REWRITTEN = {*CONFIG_KINDS, "rope_parameters", "hidden_act", "torch_dtype", "dtype", "auto_map",
             "architectures", "_name_or_path"}


def parse_config(raw, where="config.json"):
    """The ModelConfig, but for its DMS settings, of a parsed config.json. Raises InputError naming
    what this engine would compute wrongly."""
    try:
        rope, theta = read_rope(raw, where)
        check_supported(raw, rope, where)
        rope = {"rope_scaling": rope, "rope_theta": theta}
        stated = read_fields(CONFIG_KINDS, {**raw, **rope}, where)
        # what transformers takes where the file does not say
        heads = stated["num_attention_heads"]
        is_128 = raw["model_type"] == "qwen3" and "head_dim" not in raw
        defaults = {"num_key_value_heads": heads,
                    "head_dim": 128 if is_128 else stated["hidden_size"] // heads,
                    "max_position_embeddings": 2048 if raw["model_type"] == "llama" else 32768}
        config = ModelConfig(**{**defaults, **stated})
        rope_frequencies(config)
    except (LookupError, TypeError, ArithmeticError) as e:
        raise InputError(f"{where}: something is missing there, or unusable: {e!r}") from e
    config.extra = {key: value for key, value in raw.items()
                    if key not in REWRITTEN and not key.startswith("dms_")}
    return config


def read_rope(raw, where):
    """({"rope_type": ..., its parameters}, theta or None) from rope_parameters, which may hold
    theta, or the older rope_scaling with rope_theta beside it. Both may be there if they agree:
    otherwise it depends on the reader which one counts."""
    found = []
    thetas = {raw.get("rope_theta")}
    for spelling in filter(None, (raw.get("rope_parameters"), raw.get("rope_scaling"))):
        rope = {key: value for key, value in spelling.items() if value is not None}
        rope.setdefault("rope_type", rope.pop("type", "default"))  # "type" is the older name
        thetas.add(rope.pop("rope_theta", None))
        found.append(rope)
    thetas -= {None}
    require(len(thetas) < 2 and found[:1] == found[-1:],
            f"{where}: rope_parameters, rope_scaling and rope_theta contradict each other; remove "
            "what the model was not trained with")
    rope = found[0] if found else {"rope_type": "default"}
    if "attn_factor" in rope:
        say(f"{where}: RoPE's attn_factor is read by nobody, transformers included")
    return rope, max(thetas, default=None)


def check_supported(raw, rope, where):
    def support(condition, what):
        require(condition, f"{where}: {what} not supported; give a plain Llama, Qwen2 or Qwen3")

    for key, known in {"model_type": FAMILIES, "hidden_act": (None, "silu")}.items():
        support(raw.get(key) in known, f"{key} {raw.get(key)!r} is")
    support(not raw.get("quantization_config"), "quantized weights are")
    is_flat = not any(isinstance(value, dict) for value in rope.values())  # one for all layers
    support(is_flat and rope["rope_type"] in ROPE_KINDS, f"RoPE {rope} is")
    partial = rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor")
    support(partial in (None, 1), "partial rotary embeddings are")
    layer_types = {*(raw.get("layer_types") or ["full_attention"])}
    support(layer_types == {"full_attention"}, f"layer_types {layer_types} are")
    if raw.get("use_sliding_window") and not raw.get("layer_types"):
        full = raw.get("max_window_layers")
        full = 28 if full is None else full  # as in transformers
        support(full >= raw["num_hidden_layers"] or not raw.get("sliding_window", 4096),
                "layers with a sliding_window are")


def context_of(config):
    """The tokens that a model can take: as its RoPE is scaled, which may be more than config.json
    states. Qwen's instructions for YaRN leave max_position_embeddings as it was."""
    rope = config.rope_scaling or {}
    stated = config.max_position_embeddings
    if rope.get("rope_type") not in ("linear", "yarn"):
        return stated
    return max(stated, int(original_context(config) * rope.get("factor", 1)))


def config_to_dict(config):
    """The parsed config.json that parse_config, read_settings and transformers read back. The class
    in architectures is NVIDIA's: engines without DMS, which lack it, should refuse the model."""
    name = f"{config.model_type.title()}ForCausalLM{'DMS' if config.dms else ''}"
    raw = {"architectures": [name], **vars(config), "hidden_act": "silu"}
    raw |= raw.pop("extra")
    settings = raw.pop("dms")
    if (config.rope_scaling or {}).get("rope_type", "default") == "default":
        raw["rope_scaling"] = None
    if settings:
        raw |= {key: getattr(settings, name) for name, key in NVIDIA_KEYS.items()}
        raw[SEPARATE] = settings.source == "adapter"
        # NVIDIA's code refuses a block that is not smaller than the window, and wants 256 on a GPU.
        # It shifts decisions by one in any case, so that it must refuse a model without a shift.
        fitting = [2**n for n in range(9) if 2**n < settings.window]
        if settings.shift == 0 or raw.get(BLOCK_SIZE, settings.window) >= settings.window:
            raw[BLOCK_SIZE] = fitting[-1] if fitting and settings.shift else settings.window
    return raw


# ------------------------------------------------------------------------------------ DMS settings

# by the names of DMSConfig, the keys in config.json (dms_shift is ours: NVIDIA's code always shifts
# by one), and those in dms_metadata.json, which always belongs to a borrowed neuron
NVIDIA_KEYS = {
    "window": "dms_window_size", "scale": "dms_alpha_scale", "offset": "dms_initial_alpha_offset",
    "target_cr": "dms_cr", "per": "dms_alpha_per", "tau": "dms_tau", "shift": "dms_shift",
    "disable_eviction": "dms_disable_eviction"}
METADATA_KEYS = {"window": "window_size", "scale": "alpha_scale", "offset": "alpha_offset",
                 "target_cr": "target_cr", "shift": "shift"}
METADATA_DEFAULTS = {"window": 256, "shift": 0}  # where they differ from DMSConfig's
SEPARATE = "dms_separate_alpha"  # true: adapters decide; false or absent: the borrowed neuron
BLOCK_SIZE = "dms_paged_attention_block_size"
# of NVIDIA's inference alone: written back as they were read
INFERENCE_KEYS = (BLOCK_SIZE, "dms_compile_limit", "dms_chunked_prefill",
                  "dms_preallocate_for_tokens", "dms_manual_inference_mode")


def read_settings(folder, raw):
    """The DMSConfig of a checkpoint folder whose parsed config.json is `raw`, None for a dense
    model: from the dms_* keys there or from dms_metadata.json. Prints what it has to assume."""
    file = Path(folder) / "dms_metadata.json"
    metadata = read_optional(file)
    metadata |= metadata.get("config") or {}  # as shisa's may have it
    if not metadata and not any(key.startswith("dms_") for key in raw):
        return None
    kinds = DMSConfig.__annotations__
    stated = read_fields(kinds, raw, folder, NVIDIA_KEYS)
    others = read_fields(kinds, metadata, file, METADATA_KEYS)
    agree = {**stated, **others} == {**others, **stated} and not (metadata and raw.get(SEPARATE))
    require(agree, f"{folder}: config.json and dms_metadata.json contradict each other; remove one")
    source = "adapter" if raw.get(SEPARATE) else "neuron"
    defaults = METADATA_DEFAULTS if metadata else {}
    settings = DMSConfig(**{**defaults, **others, **stated, "source": source})
    if assumed := {"window", "scale", "offset", "shift"} - {*stated, *others}:
        assumed = ", ".join(f"{name} = {getattr(settings, name)}" for name in sorted(assumed))
        say(f"{folder}: not stated by the checkpoint, so assumed: {assumed}")
    return settings


# ----------------------------------------------------------------------------------------- Weights


def resolve(path_or_hub_id, relative_to=".", revision=None):
    """The local folder of a model: one that exists (first tried relative to `relative_to`), or a
    hub repository's snapshot."""
    for folder in (Path(relative_to) / path_or_hub_id, Path(path_or_hub_id)):
        if folder.is_dir():
            return folder
    return download(str(path_or_hub_id), revision)


@functools.cache
def download(repository, revision):
    """The snapshot of a hub repository, the same in the whole process; without network what the
    cache has of it. Nothing from its subfolders, and of weights model.safetensors, else the shards
    that the index names, else what is there: adapters may have any name."""
    fetch = functools.partial(
        huggingface_hub.snapshot_download, repository, revision=revision,
        local_files_only=huggingface_hub.constants.HF_HUB_OFFLINE)
    try:
        folder = Path(fetch(allow_patterns=[*TOKENIZER_FILES, *OTHER_FILES]))
        if not (folder / WEIGHTS).exists():
            shards = read_optional(folder / INDEX).get("weight_map", {"": "*.safetensors"})
            fetch(allow_patterns=[*set(shards.values())], ignore_patterns="*/*")
    except Exception as e:  # of its HTTP library, too, which differs between versions
        raise InputError(f"{repository}: no such folder, and not on the hub: {one_line(e)}") from e
    return folder


def weight_files(folder):
    """model.safetensors, else the shards of an index: as in transformers, which takes the file even
    beside an index. That may be from before the shards were merged."""
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return [folder / WEIGHTS]
    shards = read_json(folder / INDEX).get("weight_map", {}).values()
    return [folder / name for name in sorted(set(shards))]


def find_adapters(path_or_hub_id):
    """The safetensors file of adapters: a file, or the one in a folder or hub repository."""
    if Path(path_or_hub_id).is_file():
        return Path(path_or_hub_id)
    folder = resolve(path_or_hub_id)
    files = [*folder.glob(ADAPTER_FILE)] or [*folder.glob("*.safetensors")]
    require(len(files) == 1, f"{folder}: {len(files)} safetensors files; name the adapters' one")
    return files[0]


def read_tensors(files, device, dtype):
    """{name: tensor} of safetensors files, straight onto the device."""
    tensors = {}
    for file in files:
        try:
            stored = load_file(file, str(device))
        except (SafetensorError, OSError) as e:
            problem = "missing or damaged; only whole safetensors are read"
            raise InputError(f"{file}: {problem} ({e})") from e
        for name, tensor in stored.items():
            require(tensor.is_floating_point() and tensor.itemsize > 1,
                    f"{file}: {name} is {tensor.dtype}; quantized weights are not supported")
            tensors[name] = stored[name] = tensor.to(dtype or tensor.dtype)
    return tensors


def load_model(path_or_hub_id, device="cpu", dtype=torch.float32, adapter=None):
    """Load a checkpoint, dense or DMS as it says of itself, onto `device` in `dtype` (None: as it
    is stored). adapter: a safetensors file, or a folder or hub id, of DMS adapters to be laid over
    the model. Returns a Model in eval mode whose parameters do not require gradients."""
    folder = settings_from = resolve(path_or_hub_id)
    raw = read_json(folder / "config.json")
    if "dms_base_model" in raw:  # adapters alone, which name their base
        base = resolve(raw["dms_base_model"], folder, raw.get("dms_base_revision") or None)
        return load_model(base, device, dtype, adapter or folder)
    config = parse_config(raw, folder / "config.json")
    files = weight_files(folder)
    if adapter is not None:
        files.append(find_adapters(adapter))
        settings_from = files[-1].parent
        # its tensors say that adapters decide, even where no config.json does
        raw = {**read_optional(settings_from / "config.json"), SEPARATE: True}
    config.dms = read_settings(settings_from, raw)
    config.extra |= {key: raw[key] for key in INFERENCE_KEYS if key in raw}
    with torch.device("meta"):
        model = Model(config)
    tensors = {name: tensor for name, tensor in read_tensors(files, device, dtype).items()
               if not name.endswith("rotary_emb.inv_freq")}  # some older files have it
    if config.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as e:  # it lists what is missing, unexpected or of another shape
        problem = one_line(str(e).partition("\n")[2])
        raise InputError(f"{folder}: the tensors do not fit its config.json: {problem}") from e
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.rope_freq = model.rope_freq.to(device)
    with contextlib.suppress(ImportError):
        from kernels.onednn import use_onednn
        use_onednn(model)
    return model.requires_grad_(False).eval()


def has_metadata(settings):
    """Can dms_metadata.json state these settings? Who reads it assumes the rest."""
    is_neuron = settings is not None and settings.source == "neuron" and settings.shift == 0
    return is_neuron and settings.per == "head" and not settings.disable_eviction


def save_model(model, folder, dtype=torch.bfloat16, base=None, revision=None):
    """Write a checkpoint with its weights in dtype (None: as they are). base: path or hub id of the
    unchanged base model: then only the adapters are written, and config.json names the base, and of
    a hub id the commit (None: the one that was loaded). What was in the folder is replaced when the
    weights are complete, and config.json comes last: a folder without it is not whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: parameter.detach().to("cpu", dtype)
               for name, parameter in model.named_parameters()
               if base is None or "dms_proj_alpha" in name}
    raw = config_to_dict(model.config)
    raw["torch_dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    if base is not None and os.path.isdir(base):
        raw["dms_base_model"] = os.path.relpath(os.path.realpath(base), os.path.realpath(folder))
    elif base is not None:
        commit = resolve(base).name if revision is None else revision
        raw |= {"dms_base_model": str(base), "dms_base_revision": commit}
    pattern = WEIGHTS if base is None else ADAPTER_FILE
    with tempfile.TemporaryDirectory(dir=folder) as new:
        huggingface_hub.save_torch_state_dict(
            tensors, new, filename_pattern=pattern.replace(".", "{suffix}."))
        for name in ("config.json", "dms_metadata.json", WEIGHTS):
            (folder / name).unlink(missing_ok=True)
        for file in Path(new).iterdir():
            file.replace(folder / file.name)
    if has_metadata(model.config.dms):
        write_json(folder / "dms_metadata.json",
                   {key: getattr(model.config.dms, name) for name, key in METADATA_KEYS.items()})
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

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    sandbox.filters["tojson"] = tojson
    sandbox.globals["raise_exception"] = raise_exception
    sandbox.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    # {% generation %} marks what a trainer takes as the answer: here it is a scope, nothing else
    text = re.sub(r"({%[-+]?\s*)(end)?generation(?=\s*[-+]?%})", r"\1\2with", text)
    return sandbox.from_string(text)


class Tokenizer:
    """The tokenizer of a model folder or hub id: tokenizer.json, and the chat template."""

    def __init__(self, path_or_hub_id):
        folder = resolve(path_or_hub_id)
        file = folder / "tokenizer.json"
        try:
            self.fast = tokenizers.Tokenizer.from_file(str(file))
        except Exception as e:  # it has no kinds of its own
            raise InputError(f"{file}: not a tokenizer in this format ({one_line(e)})") from e
        self.fast.no_truncation()
        self.fast.no_padding()
        self.settings = read_optional(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in self.settings:  # an older one, which has this beside it
            self.settings |= read_optional(folder / "special_tokens_map.json")
        file = folder / "chat_template.jinja"
        templates = read_text(file) if file.is_file() else self.settings.get("chat_template")
        if not isinstance(templates, list):
            templates = [{"name": "default", "template": templates}]
        self.templates = {each["name"]: each["template"] for each in templates}
        self.template = self.templates.get("default")
        end = self.special("eos_token")
        self.end_id = None if end is None else self.fast.token_to_id(end)

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
        return self.fast.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids, skip_special_tokens=False):
        return self.fast.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages, add_generation_prompt=False, **variables):
        """[{"role": ..., "content": ...}, ...] -> the text the model expects, to be encoded with
        add_special_tokens=False. The template gets the messages as they are. variables: what else
        it knows, as tools or enable_thinking. Raises InputError with what it says of them."""
        known = {name: self.special(name) for name in self.settings if name.endswith("_token")}
        known = {name: text for name, text in known.items() if isinstance(text, str)}
        known |= {"tools": None, "documents": None, **variables, "messages": messages}
        known["add_generation_prompt"] = add_generation_prompt
        name = "tool_use" if known["tools"] and "tool_use" in self.templates else "default"
        require(self.templates.get(name), "there is no chat template; give a plain prompt instead")
        try:
            return compile_template(self.templates[name]).render(known)
        except Exception as e:  # a template may raise anything
            raise InputError(f"the chat template refused these messages: {one_line(e)}") from e


load_tokenizer = Tokenizer


# -------------------------------------------------------------------------------------- Generation

SAMPLING = {"temperature": float, "top_k": int, "top_p": float, "min_p": float,
            "repetition_penalty": float}
NOT_DONE = """num_beams no_repeat_ngram_size typical_p min_length min_new_tokens suppress_tokens
    begin_suppress_tokens bad_words_ids sequence_bias stop_strings penalty_alpha guidance_scale
    presence_penalty frequency_penalty epsilon_cutoff eta_cutoff top_h""".split()


def generation_defaults(folder):
    """{name: value} of what generation_config.json states of SAMPLING. What else would change the
    answers is named on stderr."""
    file = Path(folder) / "generation_config.json"
    raw = read_optional(file)
    if ignored := [key for key in NOT_DONE if raw.get(key) not in (None, 0, 1, [], {})]:
        say(f"{file}: asks for {', '.join(ignored)}, which this engine does not do")
    stated = read_fields(SAMPLING, raw, file)
    return stated | {"temperature": 0.0} if raw.get("do_sample") is False else stated


def end_ids(folder, tokenizer):
    """The ids that end an answer: those of generation_config.json, else of config.json, and the
    tokenizer's own."""
    for name in ("generation_config.json", "config.json"):
        ends = read_optional(Path(folder) / name).get("eos_token_id")
        if ends is not None:
            break
    ends = ends if isinstance(ends, list) else [ends]
    return {int(end) for end in (*ends, tokenizer.end_id) if end is not None}
