"""
A release: a folder of a retrofitted model that others can load, with a card that says what it is.

    python publish.py --model out/qwen3-8b-dms-8x --out release            # its adapters alone
    python publish.py --model out/qwen3-8b-dms-8x --out release --merge    # with the base's weights
    python publish.py --model Qwen/Qwen3-8B --adapter owner/adapters --merge --out merged

A model whose weights were all trained is one whole folder anyway. Everything is checked before
anything is written, and config.json is written last: a folder without it is not complete. Nothing
is uploaded. The card's text is model_card.md.
"""
import json
import os
import re
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from checkpoint import (BLOCK_SIZE, checked, config_to_dict, copy_tokenizer, find_adapters,
                        fingerprint, has_metadata, one_line, open_model, parse_options, path_or_id,
                        read_json, read_text, refusing, require, resolve, run_script, write_model,
                        write_json, write_text)
from evaluate import print_table

CARD = Path(__file__).resolve().parent / "model_card.md"
FASTDMS_READS = ("reads this folder; it silences the borrowed channel before RoPE only, so that its "
                 "logits may differ a little")
FASTDMS = (("llama", "default"), ("llama", "linear"), ("llama", "llama3"), ("qwen3", "default"))
WEIGHTS = {"adapters": "the base's weights, unchanged, and the adapters", "all": "trained weights"}
PLACES = ("name_or_path", "tokenizer_file")  # where older libraries note where a tokenizer lay
SOURCES = {"adapter": "an adapter of its layer", "neuron": "a channel of its first query head"}


@dataclass
class Options:
    """Of the command line."""

    model: path_or_id = None  # what retrofit.py wrote, or with --adapter the base: folder or hub id
    out: str = None  # folder for the release, a new one
    adapter: str = None  # DMS adapters that belong to --model: a file, a folder or a hub id
    merge: bool = False  # one whole folder: the base's weights and the adapters
    base: str = None  # the base by its hub id, where it is a folder here
    license: str = None  # for the card, such as apache-2.0


# ---------------------------------------------------------------------------------------- The card


def shown(value):
    """Any value as Markdown that is nothing but text: code, on one line."""
    return f"`{one_line(value).replace('`', '_') or ' '}`"


def without_path(value):
    """A setting's value; of what may be a path of this machine, and no hub id, only the name."""
    is_path = isinstance(value, str) and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", value)
    return Path(value).name if is_path else value


def read_run(folder):
    """What a retrofit left beside its model: (its settings, {file: text}, the table of results).
    No path of this machine is in them. Raises InputError."""
    texts = {}
    metrics = folder / "metrics.jsonl"
    if metrics.is_file() and not metrics.is_symlink():
        texts[metrics.name] = read_text(metrics, f"{metrics}: not readable; move it away")
    file = folder / "results.json"
    if not file.exists():
        return {}, texts, "It has not been measured."
    run = read_json(file)
    errors = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
    with refusing(f"{file}: not as retrofit.py writes it; move it away", *errors):
        settings = {key: without_path(value) for key, value in run["settings"].items()}
        titles = ("dense", f"DMS {settings['target_cr']:g}x", f"window of {run['window_tokens']:d}")
        columns = [run["results"][name] for name in ("dense", "DMS", "window")]
        with redirect_stdout(StringIO()) as printed:
            print_table(dict(zip(titles, columns)))
        # indented, a line is code, whatever is in it
        table = "".join(f"    {line}\n" for line in printed.getvalue().splitlines())
        texts[file.name] = json.dumps({**run, "settings": settings}, indent=2) + "\n"
    return settings, texts, f"{table}\nOn {shown(run.get('hardware'))}."


def card(options, config, base, is_whole, settings, table):
    """README.md of a release. base: hub id or None. settings, table: as read_run gives them."""
    tags = ["dms", "kv-cache-compression"]
    header = {"base_model": base, "license": options.license, "tags": tags}
    weights = "the adapters alone, to be laid over the base's weights, which are not here"
    if is_whole:
        train = "adapters" if options.merge else settings.get("train")
        weights = WEIGHTS.get(train, "all weights; whether the base's were trained is not known")
    dms = config.dms
    block_size = config_to_dict(config).get(BLOCK_SIZE, 1)
    # who computes the same from these files; NVIDIA's code shifts by one, on a GPU with such blocks
    with_nvidia = config.model_type == "qwen3" and dms.shift == 1 and block_size % 256 == 0
    kind = (config.rope_scaling or {}).get("rope_type", "default")
    with_fastdms = has_metadata(dms) and (config.model_type, kind) in FASTDMS
    recipe = [f"- {shown(key)}: {shown(value)}" for key, value in settings.items()]
    reads = {True: "computes the same from this folder", False: "cannot be used with this folder"}
    return read_text(CARD, f"{CARD}: missing").format(
        header="\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items() if value),
        base=shown(base or f"a {config.model_type} model"), recipe="\n".join(recipe) or "Not known.",
        source=SOURCES[dms.source], window=dms.window, cr=dms.target_cr, results=table,
        weights=weights, nvidia=reads[is_whole and with_nvidia],
        fastdms=FASTDMS_READS if with_fastdms else reads[False])


# -------------------------------------------------------------------------------------- The script


def publish(options, stack):
    """Write the release. stack: an ExitStack for the files that are read. Raises InputError, before
    anything is written."""
    require(options.model and options.out, "give --model, and a new folder with --out")
    require(options.base is None or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", options.base),
            f"--base {options.base}: is no hub id; give owner/name")
    out = Path(options.out)
    require(not out.exists() or out.is_dir() and not any(out.iterdir()),
            f"{out}: already holds something; choose another --out")
    model, weights = open_model(options.model, stack, adapter=options.adapter)
    config = model.config
    require(config.dms, f"{options.model}: is a dense model; retrofit it, or give its --adapter")
    folder = resolve(options.model)
    named_base = checked(read_json(folder / "config.json"), "dms_base_model", str, folder)
    # what the adapters belong to; None where the folder has weights of its own for everything
    adapted = options.model if options.adapter else named_base
    is_whole = options.merge or adapted is None
    require(adapted or not options.merge, f"{folder}: is whole as it is; leave out --merge")
    require(config.dms.shift == 1 or not options.merge,
            "--merge: these adapters have shift 0, and NVIDIA's code would shift them by one all the "
            "same; leave it out: this engine can use them as they are")
    is_here = os.path.isdir(folder / (adapted or "."))
    base = options.base or (None if is_here else adapted)  # by its hub id
    require(is_whole or base, f"{adapted}: is a folder of this machine; give its hub id with --base")
    run_folder = find_adapters(options.adapter)[0].parent if options.adapter else folder
    settings, texts, table = read_run(run_folder)
    texts["README.md"] = card(options, config, base, is_whole, settings, table)

    out.mkdir(parents=True, exist_ok=True)
    copy_tokenizer(folder, out)
    file = out / "tokenizer_config.json"
    stated = read_json(file) if file.exists() else {}
    places = {key: without_path(stated[key]) for key in PLACES if key in stated}
    if places.items() - stated.items():
        write_json(file, {**stated, **places})
    for name, text in texts.items():
        write_text(out / name, text)
    # every tensor as it is stored, so that nothing is rounded
    tensors = {name: weights[name].get_tensor(name) for name, _ in model.named_parameters()
               if is_whole or "dms_proj_alpha" in name}
    more = {} if is_whole else {"dms_base_model": base, "dms_base_fingerprint": fingerprint(weights)}
    write_model(out, config, tensors, more)


def main(argv=None):
    options = Options(**parse_options(Options, argv))
    with ExitStack() as stack:
        publish(options, stack)
    print(f"{options.out}: written; read its README.md, put in the name of your repository, and\n"
          f"hf upload owner/name {options.out}")


if __name__ == "__main__":
    run_script(main)
