"""
Everything on disk: a model folder's config.json, weights, DMS settings, tokenizer and template.

    model = load_model("Qwen/Qwen3-0.6B")           # folder or hub id; dense or DMS, as it says
    tokenizer = load_tokenizer("Qwen/Qwen3-0.6B")
    save_model(model, "out/mine")

Only safetensors and JSON are read. Nothing in a folder is executed but the chat template, and that
by chat_template.py. Bad input is refused by an InputError, one line that says what is wrong and
what to do, before any long work. At the end, what the scripts share: their options, and how
they end.
"""
import argparse
import hashlib
import inspect
import json
import os
import re
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import get_args

import tokenizers
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from chat_template import render
from dms import DMSConfig
from kernels.cpu import use_onednn
from model import ROPE_KINDS, Model, ModelConfig, rope_frequencies

FAMILIES = ("llama", "qwen2", "qwen3")
ADAPTER_FILE = "dms_adapters.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                   "special_tokens_map.json", "generation_config.json")


# ------------------------------------------------------------------------------------------ Errors


class InputError(ValueError):
    """Something the user gave cannot be used. One line: what was wrong, and what to do."""

    def __init__(self, message):
        super().__init__(one_line(message, None))  # it may quote a path, or a library's message


def one_line(text, length=120):
    """The beginning of a text as a terminal may show it: line breaks made spaces, and what a
    terminal would obey, such as escape sequences, spelled out."""
    shown = (c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(text).split())[:length])
    return "".join(shown)


def require(condition, problem):
    """Raise InputError(problem) unless the condition holds."""
    if not condition:
        raise InputError(problem)


@contextmanager
def refusing(problem, *exceptions):
    """Turn these exceptions, raised within, into an InputError of one line that begins with
    `problem`. Name those that bad input raises, so that a bug still shows as what it is."""
    try:
        yield
    except exceptions as e:
        if InputError in exceptions and isinstance(e, InputError):
            raise InputError(f"{problem}: {e}") from e
        if isinstance(e, (InputError, KeyboardInterrupt, SystemExit)):
            raise
        raise InputError(f"{problem} ({type(e).__name__}: {one_line(e)})") from e


# --------------------------------------------------------------------------------- Text and JSON


def read_text(file, problem):
    with refusing(problem, OSError, ValueError, MemoryError):
        return Path(file).read_text(encoding="utf-8")


def parse_object(text, problem):
    """The JSON object that a text is, a dict. Raises InputError."""
    with refusing(problem, ValueError, RecursionError):
        value = json.loads(text)
        require(isinstance(value, dict), problem)
    return value


def read_json(file):
    """The JSON object in a file. Raises InputError naming the file if it is missing or damaged."""
    problem = f"{file}: not found or not a JSON object; is this a model folder, and a whole one?"
    require(os.path.isfile(file) or not os.path.exists(file), problem)  # a pipe may have no end
    return parse_object(read_text(file, problem), problem)


def read_lines(file):
    """The JSON objects of a file, one to a line: {number of the line, from 1: object}. Raises
    InputError naming file and line."""
    lines = read_text(file, f"{file}: not readable as text; give a file of JSON lines").split("\n")
    return {number: parse_object(line, f"{file}: line {number} is not a JSON object; fix it")
            for number, line in enumerate(lines, 1) if line.strip()}


def write_atomic(file, write):
    """Call write(temporary path) and move the result to `file` in one step, so that no reader ever
    sees half of it. The temporary file of a writer that was killed is overwritten by the next."""
    temporary = Path(file).with_name(f".{Path(file).name}.tmp")
    problem = f"{file}: not written, what was there is still there"
    with refusing(problem, OSError, ValueError, SafetensorError):
        try:
            write(temporary)
            temporary.chmod(0o644)
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(file, text):
    write_atomic(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(file, data):
    write_text(file, json.dumps(data, indent=2) + "\n")


@contextmanager
def locked(file):
    """Be the only process that writes to a file or folder. Raises InputError where another one does.
    What is locked is an empty file beside it, or in a folder beside which none can be; it stays."""
    file = Path(os.path.realpath(file))
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = f"{file}.lock" if os.access(file.parent, os.W_OK) else file / ".lock"
    problem = f"{file}: another process writes there; wait for it, or choose another --out"
    with refusing(problem, Timeout), FileLock(lock, blocking=False):
        yield


# ------------------------------------------------------------------------------------- config.json

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# of numbers in JSON files and of options, by their names or kinds
LIMITS = {
    int: (1, 2**24), float: (-1e9, 1e9),
    "head_dim": (1, 2**12), "num_hidden_layers": (1, 1000),
    "rope_theta": (1e-9, 1e29), "rms_norm_eps": (0, 1), "max_window_layers": (0, 2**24),
    "window": (0, 2**20), "shift": (0, 1), "target_cr": (1, 1e6), "lr": (1e-12, 1e3),
    "compression_weight": (0, 1e6), "seed": (-(2**40), 2**40), "n": (1, 2**16), "batch_size": (1, 2**16),
    "seq_len": (2, 2**24), "fade_steps": (0, 2**24), "eval_every": (0, 2**24),
    "memory": (1e-6, 1e6),
    "temperature": (0, 1e3), "top_k": (0, 2**24), "top_p": (1e-9, 1), "min_p": (0, 1)}


def checked(raw, key, kind, where, name=None):
    """The value of a key of a parsed JSON file, or of options; None where it is absent or null.

    Raises InputError if it is not of that kind (int, float, bool or str), or not within its LIMITS.
    name: our name of what the key spells, by which the LIMITS go; None where it is the same.
    """
    value = raw.get(key)
    if value is None:
        return None
    is_right = type(value) is kind
    wanted = f"of type {kind.__name__}"
    if kind in (int, float):
        least, most = LIMITS.get(name or key, LIMITS[kind])
        is_right = type(value) in (int, float) and least <= value <= most and kind(value) == value
        wanted += f" and in range, {least} to {most}"
    require(is_right, f"{where}: {key} = {value!r:.80} is not {wanted}; change it")
    return kind(value)


def read_fields(cls, raw, keys, where):
    """Fields of the dataclass cls from a parsed JSON file, {field: checked value}. keys: {field: its
    key in the file}. Those that the file does not state are left out."""
    kinds = cls.__annotations__
    values = {name: checked(raw, key, kinds[name], where, name) for name, key in keys.items()}
    return {name: value for name, value in values.items() if value is not None}


def parse_config(raw, where="config.json"):
    """The ModelConfig, but for its DMS settings, of a parsed config.json, in the older spelling
    (rope_theta, rope_scaling, torch_dtype) or the newer one (rope_parameters, dtype). Raises
    InputError naming whatever this engine would compute wrongly."""
    check_supported(raw, where)
    rope = read_rope(raw, where)
    family = raw["model_type"]
    names = {f.name: f.name for f in fields(ModelConfig) if f.type in (int, float, bool)}
    stated = {**raw, "rope_theta": rope.pop("rope_theta", raw.get("rope_theta"))}
    values = read_fields(ModelConfig, stated, names, where)
    for name in REQUIRED:
        require(name in values, f"{where}: {name} is missing; this is no complete model config")
    heads = values["num_attention_heads"]
    kv_heads = values.setdefault("num_key_value_heads", heads)
    is_128 = family == "qwen3" and "head_dim" not in raw
    head_dim = 128 if is_128 else max(values["hidden_size"] // heads, 1)
    head_dim = values.setdefault("head_dim", head_dim)
    values.setdefault("max_position_embeddings", 2048 if family == "llama" else 32768)
    config = ModelConfig(family, rope_scaling=rope, **values)

    require(heads % kv_heads == 0, f"{where}: {heads} heads are not a multiple of {kv_heads} KV heads")
    require(head_dim % 2 == 0, f"{where}: head_dim {head_dim} is odd, which RoPE cannot rotate")
    problem = f"{where}: RoPE kind {rope['rope_type']!r} has a missing or unusable parameter"
    with refusing(problem, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError):
        freq, scale = rope_frequencies(config)
        require((freq * scale).isfinite().all(), problem)
    rewritten = {"rope_parameters", "torch_dtype", "dtype", "auto_map", "_name_or_path"}
    # what saving would not write by itself (config.extra is empty yet) is kept, to be written back
    known = config_to_dict(config).keys() | rewritten
    config.extra = {key: raw[key] for key in raw if key not in known and not key.startswith("dms_")}
    with refusing(f"{where}: is nested too deeply", RecursionError):
        json.dumps(config.extra, indent=2)  # as it will be written
    return config


def check_supported(raw, where):
    """Refuse what would be computed wrongly: other models, quantized weights, sliding windows."""

    def support(condition, what):
        require(condition, f"{where}: {what} not supported; give a plain Llama, Qwen2 or Qwen3 model")

    family = raw.get("model_type")
    support(isinstance(family, str) and family in FAMILIES, f"model_type {family!r:.80} is")
    support(not raw.get("quantization_config"), "quantized weights are")
    activation = raw.get("hidden_act")
    support(activation in (None, "silu"), f"hidden_act {activation!r:.80} is")
    layer_types = raw.get("layer_types") or []
    support(isinstance(layer_types, list) and set(map(str, layer_types)) <= {"full_attention"},
            f"layer_types {layer_types!r:.80} other than full_attention are")
    if not layer_types and raw.get("use_sliding_window") and raw.get("sliding_window", 4096):
        full = checked(raw, "max_window_layers", int, where)
        full = 28 if full is None else full  # as in transformers
        layers = checked(raw, "num_hidden_layers", int, where) or 0
        support(full >= layers, "layers with a sliding_window are")


def read_rope(raw, where):
    """{"rope_type": ..., its parameters and perhaps rope_theta}, from either spelling."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    require(isinstance(rope, dict) and not any(isinstance(v, dict) for v in rope.values()),
            f"{where}: rope parameters {rope!r:.80} are not one flat object")
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = rope.setdefault("rope_type", rope.pop("type", "default"))  # "type" is the older name
    for place in (rope, raw):
        require(place.get("partial_rotary_factor") in (None, 1.0),
                f"{where}: partial rotary embeddings are not supported")
    require(kind in ROPE_KINDS, f"{where}: RoPE kind {kind!r:.80} is none of {ROPE_KINDS}")
    return rope


def config_to_dict(config):
    """The parsed config.json that parse_config and read_settings, and transformers, read back.

    architectures names a class that engines without DMS do not have (it is NVIDIA's name for it),
    so that those which go by it refuse a DMS model rather than take it for a dense one.
    """
    name = f"{config.model_type.title()}ForCausalLM{'DMS' if config.dms else ''}"
    raw = {"architectures": [name], **vars(config), "hidden_act": "silu"}
    del raw["dms"], raw["extra"]
    if (config.rope_scaling or {}).get("rope_type", "default") == "default":
        raw["rope_scaling"] = None
    raw |= config.extra
    if config.dms:
        raw |= {key: getattr(config.dms, name) for name, key in NVIDIA_KEYS.items()}
        raw[SEPARATE] = config.dms.source == "adapter"
        # NVIDIA's code refuses a block that is not smaller than the window; on a GPU it wants 256
        sizes = [*(2**n for n in range(9)), raw.pop(BLOCK_SIZE, None) or 0]
        fitting = [size for size in sizes if 0 < size < config.dms.window]
        if fitting:
            raw[BLOCK_SIZE] = fitting[-1]  # what was stated, if it fits, else the largest that does
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
# of NVIDIA's inference code alone: checked, and written back as they were read
INFERENCE_KEYS = {BLOCK_SIZE: int, "dms_compile_limit": int, "dms_chunked_prefill": int,
                  "dms_preallocate_for_tokens": int, "dms_manual_inference_mode": bool}


def read_settings(folder, raw):
    """The DMSConfig of a checkpoint folder whose parsed config.json is `raw`, None for a dense
    model: from the dms_* keys there or from dms_metadata.json. Prints what it has to assume."""
    file = Path(folder) / "dms_metadata.json"
    has_file = file.exists()
    if not has_file and not any(key.startswith("dms_") for key in raw):
        return None
    metadata = read_json(file) if has_file else {}
    if isinstance(metadata.get("config"), dict):  # as shisa's may have it
        metadata |= metadata["config"]
    separate = checked(raw, SEPARATE, bool, folder)
    require(not (has_file and separate), f"{folder}: adapter in config.json, borrowed in dms_metadata.json")
    stated = read_fields(DMSConfig, metadata, METADATA_KEYS, file)
    for name, value in read_fields(DMSConfig, raw, NVIDIA_KEYS, folder).items():
        require(stated.setdefault(name, value) == value,
                f"{folder}: config.json says {NVIDIA_KEYS[name]} = {value} and dms_metadata.json "
                f"{stated[name]}; remove one")
    require(stated.get("per", "head") in ("head", "layer"), f"{folder}: unusable dms_alpha_per")

    # what is stated, in either file, over the defaults of the layout
    defaults = METADATA_DEFAULTS if has_file else {}
    complete = DMSConfig(**{**defaults, **stated, "source": "adapter" if separate else "neuron"})
    assumed = sorted({"window", "scale", "offset", "shift"} - stated.keys())
    if assumed:
        assumed = ", ".join(f"{name} = {getattr(complete, name)}" for name in assumed)
        print(one_line(f"{folder}: not stated by the checkpoint, so assumed: {assumed}", None), file=sys.stderr)
    return complete


# ----------------------------------------------------------------------------------------- Weights


def resolve(path_or_hub_id, relative_to="."):
    """The local folder of a model: an existing folder (first tried relative to `relative_to`), or a
    hub repository's snapshot with its weights, configs and tokenizer only. Raises InputError."""
    for folder in (Path(relative_to) / path_or_hub_id, Path(path_or_hub_id)):
        if os.path.isdir(folder):
            return folder
    name = one_line(path_or_hub_id, 200)
    require(re.fullmatch(r"[^/.~][^/]*/[^/]+", name), f"{name}: no such folder, nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    files = ["*.safetensors", "*.json", "*.jinja"]
    with refusing(f"{name}: the hub did not give it; check name and network", OSError, ValueError):
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=files))


def weight_files(folder):
    """The safetensors files of a model folder, from its index or by the standard name."""
    index = Path(folder) / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        require(isinstance(weight_map, dict) and weight_map, f"{index}: has no usable weight_map")
        names = dict.fromkeys(map(str, weight_map.values()))
    for name in names:
        require(re.fullmatch(r"[^/\\]+\.safetensors", name),
                f"{index}: unsafe shard name {name[:80]!r}; shards lie beside it")
        missing = f"{index.with_name(one_line(name))}: missing; pickled weights are never read"
        require(os.path.isfile(index.with_name(name)), missing)
    return [index.with_name(name) for name in names]


def open_weights(files, stack, device="cpu"):
    """{tensor name: open safetensors file}. Files stay open as long as `stack`, an ExitStack."""
    weights = {}
    for file in files:
        problem = f"{file}: truncated or damaged safetensors file; download it again"
        require(os.path.isfile(file), problem)
        with refusing(problem, SafetensorError, OSError, ValueError):
            handle = stack.enter_context(safe_open(file, framework="pt", device=str(device)))
        for name in handle.keys():
            require(name not in weights, f"{file}: tensor {one_line(name)} is in another shard, too")
            weights[name] = handle
    return weights


def fingerprint(weights):
    """sha256 over names, shapes, and first and last rows of base weights, as open_weights gives
    them. Tells one model's weights from another's, however sharded, without reading them all."""
    digest = hashlib.sha256()
    for name in sorted(name for name in weights if "dms_proj_alpha" not in name):
        tensor = weights[name].get_slice(name)
        shape = tensor.get_shape()
        digest.update(f"{name} {shape} {tensor.get_dtype()}".encode())
        if shape and shape[0]:
            for row in (tensor[:1], tensor[shape[0] - 1 :]):
                digest.update(row.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def find_adapters(path_or_hub_id):
    """(file, parsed config.json beside it, if any) of DMS adapter tensors: a safetensors file, or a
    folder or hub repository with just one. Raises InputError."""
    files = [Path(path_or_hub_id)]
    if not os.path.isfile(path_or_hub_id):
        folder = resolve(path_or_hub_id)
        files = list(folder.glob(ADAPTER_FILE)) or list(folder.glob("*.safetensors"))
        require(len(files) == 1, f"{folder}: {len(files)} safetensors files there; name the adapters'")
    config = files[0].with_name("config.json")
    raw = read_json(config) if config.exists() else {}
    # adapter tensors mean that adapters decide, even where no config.json says so
    return files[0], {**raw, SEPARATE: True}


def open_model(path_or_hub_id, stack, device="cpu", adapter=None):
    """What load_model would load, checked, but no weight read yet: (Model on the meta device,
    {tensor name: open safetensors file}). Files stay open as long as `stack`, an ExitStack. Raises
    InputError as load_model does."""
    folder = settings_from = resolve(path_or_hub_id)
    raw = read_json(folder / "config.json")
    config = parse_config(raw, folder / "config.json")
    base = checked(raw, "dms_base_model", str, folder / "config.json")
    if base and adapter is None:  # this folder holds adapters only, and names their base
        require(raw.get("dms_base_fingerprint"), f"{folder}: has no dms_base_fingerprint; damaged?")
        return open_model(resolve(base, folder), stack, device, adapter=folder)
    weights = open_weights(weight_files(folder), stack, device)
    # before anything is made of a damaged config.json's many layers, or of as many tensors
    layers = config.num_hidden_layers
    require(layers <= len(weights) <= 30 * (layers + 1),
            f"{folder}: {len(weights)} tensors cannot be those of {layers} layers")
    if adapter is not None:
        adapter, raw = find_adapters(adapter)
        settings_from = adapter.parent
        require(raw.get("dms_base_fingerprint") in (None, fingerprint(weights)),
                f"{adapter}: trained on other weights than {folder} has (fingerprint differs)")
        adapters = open_weights([adapter], stack, device)
        for name in adapters:
            require("dms_proj_alpha" in name, f"{adapter}: {one_line(name)} is not an adapter's; remove it")
        weights |= adapters
    config.dms = read_settings(settings_from, raw)
    config.extra |= {key: checked(raw, key, kind, settings_from)
                     for key, kind in INFERENCE_KEYS.items() if key in raw}
    with torch.device("meta"):
        model = Model(config)
    check_weights(weights, model, folder)
    return model, weights


def load_model(path_or_hub_id, device="cpu", dtype=torch.float32, adapter=None):
    """Load a checkpoint, dense or DMS as it says of itself, straight onto `device` in `dtype`, one
    tensor at a time.

    adapter: a safetensors file, or a folder or hub id, that holds only DMS adapter tensors, to be
    laid over the model. Returns a Model in eval mode whose parameters do not require gradients.
    Raises InputError, before any weight is read, for a missing, truncated or unsafe file, an
    unsupported architecture, or a tensor of the wrong shape.
    """
    with ExitStack() as stack:
        model, weights = open_model(path_or_hub_id, stack, device, adapter)
        for name in dict(model.named_parameters()):
            owner, leaf = name.rsplit(".", 1)
            tensor = weights[name].get_tensor(name).to(dtype)
            setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(tensor, requires_grad=False))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.rope_freq = model.rope_freq.to(device)
    use_onednn(model)
    return model.eval()


def check_weights(weights, model, folder):
    """Raise InputError unless the tensors are those of the model, in names, shapes and dtypes."""

    def fit(condition, problem):
        require(condition, f"{folder}: {problem}; is it incomplete, not supported, or damaged?")

    wanted = dict(model.named_parameters())  # a tied head is not in it
    tied = model.config.tie_word_embeddings
    for name in weights:
        is_leftover = name == "lm_head.weight" and tied or name.endswith("rotary_emb.inv_freq")
        fit(name in wanted or is_leftover, f"tensor {one_line(name)} has no place in such a model")
    for name, parameter in wanted.items():
        fit(name in weights, f"tensor {name} is missing")
        tensor = weights[name].get_slice(name)
        shape = list(tensor.get_shape())
        fit(shape == [*parameter.shape], f"tensor {name} has shape {shape}, not {[*parameter.shape]}")
        dtype = tensor.get_dtype()
        fit(dtype in ("F64", "F32", "F16", "BF16"), f"tensor {name} is {dtype}, as if quantized")


def has_metadata(settings):
    """Can dms_metadata.json state these settings? Who reads it assumes the rest."""
    is_neuron = settings is not None and settings.source == "neuron" and settings.shift == 0
    return is_neuron and settings.per == "head" and not settings.disable_eviction


def save_model(model, folder, dtype=torch.bfloat16, base=None):
    """Write the weights in dtype, and the config, DMS settings included. base: path or hub id of
    the unchanged base model: then only the adapters are written, and config.json names the base and
    its fingerprint."""
    tensors = {name: parameter.detach().to("cpu", dtype).contiguous()
               for name, parameter in model.named_parameters()
               if base is None or "dms_proj_alpha" in name}
    more = {}
    if base is not None:
        with ExitStack() as stack:
            more["dms_base_fingerprint"] = fingerprint(open_weights(weight_files(resolve(base)), stack))
        relative = os.path.relpath(os.path.realpath(base), os.path.realpath(folder))
        more["dms_base_model"] = relative if os.path.isdir(base) else str(base)
    write_model(folder, model.config, tensors, more)


def write_model(folder, config, tensors, more):
    """Write a model's tensors, dms_metadata.json where that can state the settings, and last
    config.json, each atomically. more: keys of config.json; those of adapters name their base."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (ADAPTER_FILE if "dms_base_model" in more else "model.safetensors")
    write_atomic(file, lambda temporary: save_file(tensors, temporary, {"format": "pt"}))
    metadata = folder / "dms_metadata.json"
    metadata.unlink(missing_ok=True)  # of what was there before
    if has_metadata(config.dms):
        write_json(metadata, {key: getattr(config.dms, name) for name, key in METADATA_KEYS.items()})
    some = next(iter(tensors.values()))
    dtype = str(some.dtype).removeprefix("torch.")
    write_json(folder / "config.json", {**config_to_dict(config), "torch_dtype": dtype, **more})


# --------------------------------------------------------------------------------------- Tokenizer


def copy_tokenizer(source, folder):
    """Put the files of a model folder that make its tokenizer and defaults beside other weights. A
    link may lead within that folder or the hub's cache: else we might publish a private file."""
    from huggingface_hub.constants import HF_HUB_CACHE

    places = tuple(os.path.realpath(place) + os.sep for place in (source, HF_HUB_CACHE))
    files = [source / name for name in TOKENIZER_FILES if os.path.isfile(source / name)]
    for file in files:
        require(os.path.realpath(file).startswith(places),
                f"{file}: links to a file elsewhere; put a copy there")
    for file in files:
        write_atomic(folder / file.name, lambda temporary: temporary.write_bytes(file.read_bytes()))


class Tokenizer:
    """The tokenizer of a model folder or hub id: tokenizer.json, run by `tokenizers`, and the chat
    template, run by chat_template.py."""

    def __init__(self, path_or_hub_id):
        folder = resolve(path_or_hub_id)
        file = folder / "tokenizer.json"
        require(file.is_file(), f"{file}: not found; only tokenizers in this format are read")
        # `tokenizers` raises bare Exceptions, and panics of its Rust code, which are not even that
        with refusing(f"{file}: not a usable tokenizer, download it again", BaseException):
            self.fast = tokenizers.Tokenizer.from_file(str(file))
            self.fast.no_truncation()
            self.fast.no_padding()
        file = folder / "tokenizer_config.json"
        self.settings = read_json(file) if file.exists() else {}
        self.template = self.read_template(folder / "chat_template.jinja")
        self.end_id = self.token_id(self.special("eos_token"))  # of the end of a sequence, or None

    def read_template(self, file):
        """The chat template's text: the file, or in tokenizer_config.json a string or the one of
        several that is named "default". None where there is none."""
        if file.is_file():
            return read_text(file, f"{file}: not readable, download it again")
        template = self.settings.get("chat_template")
        if isinstance(template, list):
            named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
            template = named[0].get("template") if named else None
        return template if isinstance(template, str) else None

    def special(self, name):
        """The text of a special token such as "eos_token", or None."""
        token = self.settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else None

    def token_id(self, token):
        """The id of a token's text, None if there is none or for None."""
        with refusing("the tokenizer failed on a token's text", BaseException):
            return None if token is None else self.fast.token_to_id(token)

    def encode(self, text, add_special_tokens=True, **template):
        """text, or messages for the chat template with its arguments -> list of token ids. To a
        text add_special_tokens adds what the file defines (Llama's begin of text)."""
        if isinstance(text, list):
            text = self.apply_chat_template(text, **template)
            add_special_tokens = False
        with refusing("the tokenizer failed on this text", BaseException):
            return self.fast.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids, skip_special_tokens=False):
        with refusing("the tokenizer failed on these token ids", BaseException):
            return self.fast.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages, add_generation_prompt=False, **variables):
        """[{"role": ..., "content": ...}, ...] -> the text the model expects, to be encoded with
        add_special_tokens=False. variables: what else the template knows, as enable_thinking."""
        require(self.template, "this tokenizer has no chat template; give a plain prompt instead")
        require(all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages),
                'a message is an object with "role" and "content", both texts')
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            if self.special(name) is not None:
                variables.setdefault(name, self.special(name))
        given = {"tools": None, "documents": None, **variables, "messages": messages,
                 "add_generation_prompt": add_generation_prompt}
        errors = (ValueError, TypeError, OSError, RecursionError)
        with refusing("the chat template failed on these messages", *errors):
            return render(self.template, given)


load_tokenizer = Tokenizer


def check_ids(config, ids, new_tokens=None):
    """Raise InputError unless a list of token ids can be fed, and is followed by new_tokens more
    within the model's context, if that is asked for."""
    require(ids, "the prompt is empty; give at least one token")
    for token in (min(ids), max(ids)):
        require(0 <= token < config.vocab_size,
                f"token id {token} is not in the model's vocabulary of {config.vocab_size}")
    require(new_tokens is None or len(ids) + new_tokens <= config.max_position_embeddings,
            f"{len(ids)} tokens in the prompt and {new_tokens} to come, but the model's context is "
            f"{config.max_position_embeddings}; shorten it or ask for less")


# ----------------------------------------------------------------------- What the scripts share


def path_or_id(text):
    """What an option takes for a path or a hub id: the absolute path of a file or model folder that
    is there, any other text as it is."""
    is_there = os.path.isfile(text) or os.path.isfile(f"{text}/config.json")
    return os.path.abspath(text) if is_there else text


def parse_options(options, argv=None):
    """{field: value} of what the command line gives of a dataclass of options: --NAME VALUE for a
    field, --NAME alone for a bool; for one whose default is "" that is "-". The comment behind a
    field is its help."""
    source = inspect.getsource(options).replace("%", "%%")  # which argparse reads as %
    comments = dict(re.findall(r"^    (\w+): .*# (.*)$", source, re.MULTILINE))
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    for field in fields(options):
        choices = get_args(field.type)  # of a Literal
        how = dict(type=type(choices[0]), choices=choices) if choices else dict(type=field.type)
        if field.type in (bool, list):
            how = dict(action="store_true" if field.type is bool else "append")
        if field.default == "":  # its value may be left out
            how = dict(nargs="?", const="-")
        flag = f"{'-' if len(field.name) == 1 else '--'}{field.name}".replace("_", "-")
        parser.add_argument(flag, **how, help=comments.get(field.name))
    given = vars(parser.parse_args(argv))
    check_options(options, given, "the command line")
    return given


def check_options(options, values, where):
    """Raise InputError unless values, {field: value}, can be those of a dataclass of options."""
    kinds = options.__annotations__
    for name, value in values.items():
        kind = str if kinds.get(name) is path_or_id else kinds.get(name)
        choices = get_args(kind) or (value,)
        require(kind and value is not None and value in choices,
                f"{where}: {name} = {value!r:.80} is no such option; change it")
        if kind in (int, float, bool, str):
            checked(values, name, kind, where)


def torchrun_place():
    """This process's number among those that torchrun started, and how many they are: 0 and 1
    without torchrun. Raises InputError."""
    with refusing("RANK and WORLD_SIZE must be numbers, as torchrun sets them", ValueError):
        world = int(os.environ.get("WORLD_SIZE", 1))
        rank = int(os.environ.get("RANK", 0 if world == 1 else -1))
    require(0 <= rank < world, f"RANK is {rank} of WORLD_SIZE {world}; let torchrun set both")
    return rank, world


def choose_device(options):
    """Make --device the current device, and settle --dtype: under torchrun "cuda" is this process's
    own GPU."""
    if options.device == "cuda":
        options.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    problem = f"--device {options.device}: cannot be used; give cpu, or cuda where there is a GPU"
    with refusing(problem, RuntimeError, AssertionError, NotImplementedError):
        if torch.zeros(1, device=options.device).is_cuda:
            torch.cuda.set_device(options.device)
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")


def run_script(main, when_stopped="stopped"):
    """Run a script's main(). What is not our own fault ends it with one line: an InputError, and
    what the system refuses, with exit code 2, an interruption with 130."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before we began
            setattr(sys, name, open(os.devnull, "r+"))
    sys.stdout.reconfigure(errors="backslashreplace")  # a console may not know every character
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except (InputError, OSError, KeyboardInterrupt) as e:
        was_stopped = isinstance(e, KeyboardInterrupt)
        if not isinstance(e, BrokenPipeError):  # who reads the output may have enough of it
            print(f"\n{when_stopped}" if was_stopped else f"error: {one_line(e, None)}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing more is written to standard output
        sys.exit(130 if was_stopped else 2)
