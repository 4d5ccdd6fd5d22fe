"""
Everything on disk: a model folder's config.json, weights, DMS settings, tokenizer, chat template.

    model = load_model("Qwen/Qwen3-0.6B")                # folder or hub id; dense or DMS, as it says
    tokenizer = load_tokenizer("Qwen/Qwen3-0.6B")
    save_model(model, "out/mine")

Only safetensors and JSON are read, and nothing in a folder is ever executed. Bad input is refused
by an InputError, one line that says what is wrong and what to do, before any long work.
"""

import argparse
import functools
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import get_args

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dms import DMSConfig
from kernels.cpu import use_compiled_products
from model import ROPE_KINDS, Model, ModelConfig, rope_frequencies

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
RENAMED = {"rope_parameters", "torch_dtype", "dtype", "architectures", "auto_map"}  # not kept
ADAPTER_FILE = "dms_adapters.safetensors"


# ------------------------------------------------------------------------------------------ Errors


class InputError(ValueError):
    """Something the user gave cannot be used. One line: what was wrong, and what to do."""

    def __init__(self, message):
        super().__init__(" ".join(message.split()))  # a path or a library's message has line breaks


def one_line(text, length=120):
    """The beginning of a text, line breaks made spaces: what an InputError may quote."""
    return " ".join(str(text).split())[:length]


@contextmanager
def refusing(problem, *exceptions):
    """Turn these exceptions, raised within, into an InputError of one line that begins with
    `problem`. Name those that bad input raises, so that a bug still shows as what it is."""
    try:
        yield
    except exceptions as e:
        if isinstance(e, (InputError, KeyboardInterrupt, SystemExit)):
            raise
        raise InputError(f"{problem} ({type(e).__name__}: {one_line(e)})") from e


def run_script(main, when_stopped="stopped"):
    """Run a script's main(). An InputError ends it with its one line and exit code 2, an
    interruption with 130."""
    try:
        main()
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{when_stopped}", file=sys.stderr)
        sys.exit(130)


def parse_options(options, argv=None):
    """{field: value} of what the command line gives of a dataclass of options: --NAME VALUE for a
    field, --NAME alone for a bool. The comment behind a field is its help."""
    comments = re.findall(r"^    (\w+): .*# (.*)$", inspect.getsource(options), re.MULTILINE)
    comments = {name: text.replace("%", "%%") for name, text in comments}
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    for field in fields(options):
        flag = "--" + field.name.replace("_", "-") if len(field.name) > 1 else "-" + field.name
        choices = get_args(field.type)  # of a Literal
        how = dict(type=type(choices[0]), choices=choices) if choices else dict(type=field.type)
        if field.type is bool:
            how = dict(action="store_true")
        elif field.type is list:
            how = dict(action="append")
        parser.add_argument(flag, **how, help=comments.get(field.name))
    return vars(parser.parse_args(argv))


def choose_device(name):
    """Make the device of a script's --device the current one, and return its name: under torchrun
    "cuda" is this process's own GPU."""
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    problem = f"--device {name}: cannot be used; give cpu, or cuda where PyTorch finds a GPU"
    with refusing(problem, RuntimeError, AssertionError, NotImplementedError):
        torch.zeros(1, device=name)
        if name.startswith("cuda"):
            torch.cuda.set_device(name)
    return name


# -------------------------------------------------------------------------------------------- JSON


def parse_object(text, problem):
    """The JSON object that a text is, a dict. Raises InputError."""
    with refusing(problem, ValueError, RecursionError):
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError("not an object")
    return value


def read_text(file, problem):
    with refusing(problem, OSError, ValueError):
        return Path(file).read_text(encoding="utf-8")


def read_json(file):
    """The JSON object in a file. Raises InputError naming the file if it is missing or damaged."""
    problem = f"{file}: not found or not a JSON object; is this a model folder, and a whole one?"
    return parse_object(read_text(file, problem), problem)


def read_lines(file, cut=False):
    """The JSON objects of a file, one to a line. cut: the last line may have no end, if its writer
    was interrupted, and does not count then. Raises InputError naming file and line."""
    text = read_text(file, f"{file}: not readable as text; give a file of JSON lines")
    lines = text.split("\n")
    if cut:
        lines.pop()
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(parse_object(line, f"{file}: line {number} is not a JSON object; fix it"))
    return rows


def write_atomic(file, write):
    """Call write(temporary path) and move the result to `file` in one step, so that no reader ever
    sees half of it."""
    file = Path(file)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(file, text):
    write_atomic(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(file, data):
    write_text(file, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------------------------- config.json

LIMITS = {  # of numbers in JSON files, where they are not 1 to 2**24
    "head_dim": (1, 2**12),
    "rms_norm_eps": (0, 1),
    "rope_theta": (1e-9, 1e29),
    "max_window_layers": (0, 2**24),
    "window": (0, 2**20),
    "shift": (0, 1),
    **dict.fromkeys(("scale", "offset", "tau", "target_cr"), (-1e9, 1e9)),
}
PER = ("head", "layer")


def checked(raw, key, kind, where, name=None):
    """raw[key], None where it is absent or null, if it is of that kind and within the LIMITS of
    that name. Raises InputError."""
    value = raw.get(key)
    if value is None:
        return None
    is_right = type(value) is kind
    if kind in (int, float):
        least, most = LIMITS.get(name or key, (1, 2**24))
        is_number = type(value) in (int, float)
        is_right = is_number and least <= value <= most and kind(value) == value
    if not is_right:
        raise InputError(f"{where}: {key} = {value!r:.80} is not of type {kind.__name__} and in "
                         f"range; fix that file")
    return kind(value)


def parse_config(raw, where="config.json"):
    """The ModelConfig, but for its DMS settings, of a parsed config.json, in the older spelling
    (rope_theta, rope_scaling, torch_dtype) or the newer one (rope_parameters, dtype). Raises
    InputError naming whatever this engine would compute wrongly."""
    check_supported(raw, where)
    rope = read_rope(raw, where)
    raw = {**raw, "rope_theta": rope.pop("rope_theta", raw.get("rope_theta"))}
    values = {"model_type": raw["model_type"], "rope_scaling": rope}
    for field in fields(ModelConfig):
        if field.type in (int, float, bool):
            values[field.name] = checked(raw, field.name, field.type, where)
    values = {name: value for name, value in values.items() if value is not None}
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                 "num_attention_heads"):
        if name not in values:
            raise InputError(f"{where}: {name} is missing; this is not a complete model config")
    heads = values["num_attention_heads"]
    head_dim = max(values["hidden_size"] // heads, 1)
    if raw["model_type"] == "qwen3" and "head_dim" not in raw:
        head_dim = 128
    context = 2048 if raw["model_type"] == "llama" else 32768
    defaults = dict(num_key_value_heads=heads, head_dim=head_dim, max_position_embeddings=context)
    config = ModelConfig(**{**defaults, **values})

    if heads % config.num_key_value_heads:
        raise InputError(f"{where}: {heads} attention heads are not a multiple of the key/value "
                         f"heads; fix the config")
    if config.head_dim % 2:
        raise InputError(f"{where}: head_dim {config.head_dim} is odd, which RoPE cannot rotate")
    problem = f"{where}: RoPE kind {rope['rope_type']!r} has a missing or unusable parameter"
    with refusing(problem, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError):
        freq, scale = rope_frequencies(config)
        if not freq.isfinite().all() or not math.isfinite(scale):
            raise ValueError("not finite")
    known = config_to_dict(config).keys() | RENAMED
    config.extra = {key: value for key, value in raw.items()
                    if key not in known and not key.startswith("dms_")}
    return config


def check_supported(raw, where):
    """Refuse what would be computed wrongly: other models, quantized weights, sliding windows."""

    def refuse(problem):
        raise InputError(f"{where}: {problem}; give a Llama, Qwen2 or Qwen3 model that is covered")

    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        refuse(f"model_type {kind!r:.80} is not supported")
    if raw.get("quantization_config"):
        refuse("quantized weights are not supported")
    if raw.get("hidden_act") not in (None, "silu"):
        refuse(f"hidden_act {raw['hidden_act']!r:.80} is not supported")
    layer_types = raw.get("layer_types")
    if layer_types is not None:
        is_list = isinstance(layer_types, list)
        if not is_list or any(kind != "full_attention" for kind in layer_types):
            refuse(f"layer_types {layer_types!r:.80} include attention that is not full")
    elif raw.get("use_sliding_window") and raw.get("sliding_window", 4096):
        full = checked(raw, "max_window_layers", int, where)
        layers = checked(raw, "num_hidden_layers", int, where) or 0
        if (28 if full is None else full) < layers:  # defaults of transformers
            refuse("use_sliding_window is true and layers use the sliding_window")


def read_rope(raw, where):
    """{"rope_type": ..., its parameters and perhaps rope_theta}, from either spelling."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise InputError(f"{where}: rope parameters {rope!r:.80} are not one flat object")
    rope = {key: value for key, value in rope.items() if value is not None}
    older_name = rope.pop("type", "default")
    rope.setdefault("rope_type", older_name)
    for place in (rope, raw):
        if place.get("partial_rotary_factor") not in (None, 1.0):
            raise InputError(f"{where}: partial rotary embeddings are not supported")
    if rope["rope_type"] not in ROPE_KINDS:
        raise InputError(f"{where}: RoPE kind {rope['rope_type']!r:.80} is not supported (known: "
                         f"{', '.join(ROPE_KINDS)})")
    return rope


def config_to_dict(config):
    """The parsed config.json that parse_config, and transformers, read back; no DMS settings."""
    raw = {"architectures": [ARCHITECTURES[config.model_type]], **vars(config)}
    del raw["dms"], raw["extra"]
    if (config.rope_scaling or {}).get("rope_type", "default") == "default":
        raw["rope_scaling"] = None
    return {**raw, "hidden_act": "silu", **config.extra}


# ------------------------------------------------------------------------------------ DMS settings

NVIDIA_KEYS = {  # in config.json, by the names of DMSConfig
    "window": "dms_window_size",
    "scale": "dms_alpha_scale",
    "offset": "dms_initial_alpha_offset",
    "target_cr": "dms_cr",
    "per": "dms_alpha_per",
    "tau": "dms_tau",
    "disable_eviction": "dms_disable_eviction",
    "shift": "dms_shift",  # ours: NVIDIA's code always shifts by one
}
SEPARATE = "dms_separate_alpha"  # true: adapters decide; false or absent: the borrowed neuron
METADATA_KEYS = {  # in dms_metadata.json, which always belongs to a borrowed neuron
    "window": "window_size",
    "scale": "alpha_scale",
    "offset": "alpha_offset",
    "target_cr": "target_cr",
    "shift": "shift",
}
METADATA_DEFAULTS = {"window": 256, "shift": 0}  # where they differ from DMSConfig's


def stated_settings(raw, keys, where):
    """{name in DMSConfig: value} of the keys that a parsed JSON file states. Raises InputError."""
    stated = {}
    for name, key in keys.items():
        kind = type(getattr(DMSConfig, name))
        value = checked(raw, key, kind, where, name)
        if value is not None:
            stated[name] = value
    return stated


def read_metadata(folder):
    """What dms_metadata.json states, as shisa's checkpoints have it, None where there is none."""
    file = Path(folder) / "dms_metadata.json"
    if not file.exists():
        return None
    raw = read_json(file)
    nested = raw.get("config")
    if isinstance(nested, dict):
        raw |= nested
    return stated_settings(raw, METADATA_KEYS, file)


def read_settings(folder, raw):
    """The DMSConfig of a checkpoint folder whose parsed config.json is `raw`, None for a dense
    model: from the dms_* keys there or from dms_metadata.json. Prints what it has to assume."""
    metadata = read_metadata(folder)
    if metadata is None and not any(key.startswith("dms_") for key in raw):
        return None
    settings = stated_settings(raw, NVIDIA_KEYS, folder)
    separate = checked(raw, SEPARATE, bool, folder)
    if settings.get("per", "head") not in PER:
        raise InputError(f"{folder}: unusable dms_alpha_per; it must be one of {PER}")
    if separate and metadata is not None:
        raise InputError(f"{folder}: config.json says that adapters decide, dms_metadata.json "
                         f"belongs to a borrowed neuron; remove the wrong one")
    for name, value in (metadata or {}).items():
        if settings.setdefault(name, value) != value:
            raise InputError(f"{folder}: config.json says {NVIDIA_KEYS[name]} = {settings[name]} "
                             f"and dms_metadata.json says {METADATA_KEYS[name]} = {value}; remove "
                             f"the wrong one")
    defaults = METADATA_DEFAULTS if metadata is not None else {}
    source = "adapter" if separate else "neuron"
    complete = DMSConfig(**{**defaults, **settings, "source": source})
    assumed = [f"{name} = {getattr(complete, name)}"
               for name in ("window", "scale", "offset", "shift") if name not in settings]
    if assumed:
        assumed = ", ".join(assumed)
        print(f"{folder}: not stated by the checkpoint, so assumed: {assumed}", file=sys.stderr)
    return complete


def settings_to_dict(settings):
    """The dms_* keys of config.json; empty for None."""
    if settings is None:
        return {}
    raw = {key: getattr(settings, name) for name, key in NVIDIA_KEYS.items()}
    return {**raw, SEPARATE: settings.source == "adapter"}


# ----------------------------------------------------------------------------------------- Weights


def resolve(path_or_hub_id, relative_to=None):
    """The local folder of a model: an existing folder (first tried relative to `relative_to`), or a
    hub repository's snapshot with its weights, configs and tokenizer only. Raises InputError."""
    candidates = [Path(path_or_hub_id)]
    if relative_to is not None:
        candidates.insert(0, Path(relative_to) / path_or_hub_id)
    for folder in candidates:
        if os.path.isdir(folder):
            return folder
    name = one_line(path_or_hub_id, 200)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise InputError(f"{name}: no such folder, and not a hub id (owner/name); check the path")
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.jinja"]
    problem = f"{name}: no local folder, and not to be had from the hub; check name and network"
    with refusing(problem, OSError, ValueError):
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=wanted))


def weight_files(folder):
    """The safetensors files of a model folder, from its index or by the standard name."""
    index = Path(folder) / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index}: has no weight_map; download it again")
        names = list(dict.fromkeys(map(str, weight_map.values())))
    for name in names:
        if name != os.path.basename(name) or "\\" in name or not name.endswith(".safetensors"):
            raise InputError(f"{index}: unsafe shard name {name[:80]!r}; shards lie beside it")
        if not os.path.isfile(index.with_name(name)):
            raise InputError(
                f"{index.with_name(one_line(name))}: missing; download it again, and convert "
                f"pickled weights (.bin, .pt), which are never read, to safetensors"
            )
    return [index.with_name(name) for name in names]


def open_weights(files, stack, device="cpu"):
    """{tensor name: open safetensors file}. Files stay open as long as `stack`, an ExitStack."""
    weights = {}
    for file in files:
        problem = f"{file}: truncated or damaged safetensors file; download it again"
        with refusing(problem, SafetensorError, OSError, ValueError):
            handle = stack.enter_context(safe_open(file, framework="pt", device=str(device)))
            names = list(handle.keys())
        for name in names:
            if name in weights:
                raise InputError(
                    f"{file}: tensor {one_line(name)} is also in another shard; download the "
                    f"checkpoint again"
                )
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
                row = row.cpu().contiguous().view(torch.uint8)
                digest.update(bytes(row.flatten().tolist()))
    return digest.hexdigest()


def find_adapters(path):
    """(file, DMSConfig, fingerprint of the base if it is known) of DMS adapter tensors: a
    safetensors file, or a folder with just one, with the settings that lie beside it if any do."""
    path = Path(path)
    files = [path]
    if not os.path.isfile(path):
        files = sorted(path.glob("*.safetensors")) if os.path.isdir(path) else []
    if len(files) != 1:
        raise InputError(f"{path}: {len(files)} safetensors files there; name the adapters' file")
    config = files[0].parent / "config.json"
    raw = read_json(config) if config.exists() else {}
    settings = read_settings(config.parent, {SEPARATE: True, **raw})
    settings.source = "adapter"
    return files[0], settings, raw.get("dms_base_fingerprint")


def load_model(path_or_hub_id, device="cpu", dtype=torch.float32, adapter=None):
    """Load a checkpoint, dense or DMS as it says of itself, straight onto `device` in `dtype`, one
    tensor at a time.

    adapter: a safetensors file, or a folder, that holds only DMS adapter tensors, to be laid over
    the model. Returns a Model in eval mode whose parameters do not require gradients. Raises
    InputError, before any weight is read, for a missing, truncated or unsafe file, an unsupported
    architecture, or a tensor of the wrong shape.
    """
    folder = resolve(path_or_hub_id)
    raw = read_json(folder / "config.json")
    config = parse_config(raw, folder / "config.json")
    base = checked(raw, "dms_base_model", str, folder / "config.json")
    if base and adapter is None:  # this folder holds adapters only, and names their base
        base = resolve(base, relative_to=folder)
        return load_model(base, device, dtype, adapter=folder / ADAPTER_FILE)
    config.dms = read_settings(folder, raw)
    if adapter is not None:
        adapter, config.dms, trained_on = find_adapters(adapter)
    with ExitStack() as stack:
        weights = open_weights(weight_files(folder), stack, device)
        if adapter is not None:
            check_fingerprint(weights, trained_on, adapter, folder)
            adapters = open_weights([adapter], stack, device)
            check_adapters(adapters, adapter)
            weights |= adapters
        if config.num_hidden_layers > len(weights):
            raise InputError(f"{folder}: config.json has {config.num_hidden_layers} layers, but "
                             f"there are only {len(weights)} tensors; download it again")
        with torch.device("meta"):
            model = Model(config)
        check_weights(weights, model, folder)
        for name in dict(model.named_parameters()):
            owner, leaf = name.rsplit(".", 1)
            tensor = weights[name].get_tensor(name).to(dtype)
            parameter = nn.Parameter(tensor, requires_grad=False)
            setattr(model.get_submodule(owner), leaf, parameter)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.rope_freq = model.rope_freq.to(device)
    use_compiled_products(model)
    return model.eval()


def check_fingerprint(weights, expected, adapter, base):
    if expected is not None and fingerprint(weights) != expected:
        raise InputError(f"{adapter}: these adapters were trained on other weights than {base} "
                         f"holds (the fingerprint differs); give the base model that the "
                         f"config.json beside them names")


def check_adapters(names, file):
    for name in names:
        if "dms_proj_alpha" not in name:
            raise InputError(f"{file}: tensor {one_line(name)} is not an adapter's; give a file "
                             f"that holds only those, or load its folder as a model")


def check_weights(weights, model, base):
    """Raise InputError unless the tensors are those of the model, in names, shapes and dtypes."""

    def refuse(problem):
        raise InputError(
            f"{base}: {problem}; the checkpoint is incomplete, of a kind that is not supported, or "
            f"not what its config.json describes"
        )

    config = model.config
    wanted = dict(model.named_parameters())  # a tied head is not in it
    for name in weights:
        is_tied_head = name == "lm_head.weight" and config.tie_word_embeddings
        is_leftover = is_tied_head or name.endswith("rotary_emb.inv_freq")
        if name not in wanted and not is_leftover:
            refuse(f"tensor {one_line(name)} has no place in a {config.model_type} model")
    for name, parameter in wanted.items():
        if name not in weights:
            refuse(f"tensor {name} is missing")
        tensor = weights[name].get_slice(name)
        shape = list(tensor.get_shape())
        if shape != list(parameter.shape):
            expected = list(parameter.shape)
            refuse(f"tensor {name} has shape {shape}, config.json makes it {expected}")
        if tensor.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            refuse(f"tensor {name} is {tensor.get_dtype()}, and quantized weights are not read")


def save_model(model, folder, dtype=torch.bfloat16, base=None):
    """Write config.json, DMS settings included, and model.safetensors with every weight, each
    atomically. base: path or hub id of the unchanged base model: then only the adapters are
    written, to ADAPTER_FILE, and config.json names the base and its fingerprint."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, parameter in model.named_parameters():
        if base is None or "dms_proj_alpha" in name:
            tensors[name] = parameter.detach().to("cpu", dtype).contiguous()
    raw = {**config_to_dict(model.config), **settings_to_dict(model.config.dms)}
    raw["torch_dtype"] = str(dtype).removeprefix("torch.")
    file = folder / "model.safetensors"
    if base is not None:
        file = folder / ADAPTER_FILE
        with ExitStack() as stack:
            weights = open_weights(weight_files(resolve(base)), stack)
            raw["dms_base_fingerprint"] = fingerprint(weights)
        is_local = os.path.isdir(base)
        raw["dms_base_model"] = os.path.relpath(base, folder) if is_local else str(base)
    write_atomic(file, lambda temporary: save_file(tensors, temporary, {"format": "pt"}))
    write_json(folder / "config.json", raw)


# --------------------------------------------------------------------------------------- Tokenizer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
)


def copy_tokenizer(source, folder):
    """Put the files of a model folder that make its tokenizer and defaults beside other weights."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            write_atomic(folder / name, functools.partial(shutil.copyfile, source / name))


def refusing_tokenizer(problem):
    """`tokenizers` raises bare Exceptions, and panics of its Rust code, which are no Exceptions."""
    return refusing(problem, BaseException)


class Tokenizer:
    """The tokenizer of a model folder or hub id: tokenizer.json, run by `tokenizers`, and the chat
    template, run in jinja2's sandbox."""

    def __init__(self, path_or_hub_id):
        from tokenizers import Tokenizer as FastTokenizer

        folder = resolve(path_or_hub_id)
        file = folder / "tokenizer.json"
        if not file.exists():
            raise InputError(f"{file}: not found; only tokenizers in this format are read")
        with refusing_tokenizer(f"{file}: not a usable tokenizer, download it again"):
            self.fast = FastTokenizer.from_file(str(file))
            self.fast.no_truncation()
            self.fast.no_padding()
        file = folder / "tokenizer_config.json"
        self.settings = read_json(file) if file.exists() else {}
        self.template = self.read_template(folder)

    def read_template(self, folder):
        """The chat template's text: its own file, or a string, or the one of several that is named
        "default", in tokenizer_config.json. None where there is none."""
        file = folder / "chat_template.jinja"
        if file.exists():
            return read_text(file, f"{file}: not readable, download it again")
        template = self.settings.get("chat_template")
        if isinstance(template, list):
            named = [entry for entry in template if isinstance(entry, dict)]
            named = [entry for entry in named if entry.get("name") == "default"]
            template = named[0].get("template") if named else None
        return template if isinstance(template, str) else None

    def special(self, name):
        """The text of a special token such as "eos_token", or None."""
        token = self.settings.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        return token if isinstance(token, str) else None

    def token_id(self, token):
        """The id of a token's text, None if there is none or for None."""
        if token is None:
            return None
        with refusing_tokenizer("the tokenizer failed on a token's text"):
            return self.fast.token_to_id(token)

    @property
    def end_id(self):
        """The id of the end-of-sequence token, or None."""
        return self.token_id(self.special("eos_token"))

    def encode(self, text, add_special_tokens=True, **template):
        """text, or messages for the chat template with its arguments -> list of token ids. To a
        text add_special_tokens adds what the file defines (Llama's begin of text)."""
        if isinstance(text, list):
            text = self.apply_chat_template(text, **template)
            add_special_tokens = False
        with refusing_tokenizer("the tokenizer failed on this text"):
            return self.fast.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids, skip_special_tokens=False):
        with refusing_tokenizer("the tokenizer failed on these token ids"):
            return self.fast.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages, add_generation_prompt=False, **variables):
        """[{"role": ..., "content": ...}, ...] -> the text the model expects, to be encoded with
        add_special_tokens=False. variables: what else the template knows, as enable_thinking."""
        if self.template is None:
            raise InputError("this tokenizer has no chat template; give a plain prompt instead")
        special = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            if self.special(name) is not None:
                special[name] = self.special(name)
        # a template is a stranger's program: it may raise anything
        with refusing("the chat template failed on these messages", Exception):
            return compile_template(self.template).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **special,
                **variables,
            )


@functools.lru_cache
def compile_template(text):
    """A chat template as transformers runs it, in jinja2's sandbox."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    # {% generation %} marks what a trainer takes as the answer: here it is just its contents
    text = re.sub(r"({%[-+]?\s*)generation(?=\s*[-+]?%})", r"\1if true", text)
    text = re.sub(r"({%[-+]?\s*)endgeneration(?=\s*[-+]?%})", r"\1endif", text)
    return environment.from_string(text)


load_tokenizer = Tokenizer


def check_ids(config, ids, new_tokens=0):
    """Raise InputError unless a list of token ids can be fed and followed by new_tokens more."""
    limit = config.max_position_embeddings
    if not ids:
        raise InputError("the prompt is empty; give at least one token")
    if len(ids) + new_tokens > limit:
        raise InputError(
            f"the prompt has {len(ids)} tokens and {new_tokens} more are to come, but the model's "
            f"context is {limit}; shorten the prompt or ask for fewer new tokens"
        )
    for token in (min(ids), max(ids)):
        if not 0 <= token < config.vocab_size:
            raise InputError(
                f"token id {token} is outside the model's vocabulary of {config.vocab_size}; the "
                f"tokenizer belongs to another model"
            )
