"""
A release: a folder of a retrofitted model that others can load, with a card that says what it is.

    python publish.py --model out/qwen3-8b-dms-8x --out release            # its adapters alone
    python publish.py --model out/qwen3-8b-dms-8x --out release --merge    # with the base's weights
    python publish.py --model Qwen/Qwen3-8B --adapter owner/adapters --merge --out merged

A model whose weights were all trained is one whole folder anyway. The release is written beside
--out and renamed when it is complete. Nothing is uploaded. The card's text is model_card.md.
"""

import json
import re
import shutil
import tempfile
import textwrap
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from checkpoint import (copy_tokenizer, find_adapters, has_metadata, load_model, read_optional,
                        resolve, save_model)
from common import parse_options, read_json, read_text, require, run_script, write_json, write_text
from evaluate import print_table

HUB_ID = r"\w[\w.-]*/\w[\w.-]*"
FASTDMS = ("llama default", "llama linear", "llama llama3", "qwen3 default")
HELD = {"adapters": "the base's weights, unchanged, and the adapters", "all": "trained weights",
        None: "all weights; whether the base's were trained is not known",
        "alone": "the adapters alone, to be laid over the base's weights, which are not here"}


@dataclass
class Options:
    """Of the command line."""

    model: str = None  # what retrofit.py wrote, or with --adapter the base: folder or hub id
    out: str = None  # folder for the release, a new one
    adapter: str = None  # DMS adapters that belong to --model: a file, a folder or a hub id
    merge: bool = False  # one whole folder: the base's weights and the adapters
    base: str = None  # the base by its hub id, where it is a folder here
    license: str = None  # for the card, such as apache-2.0


def results_of(run):
    """The results of a run as code in Markdown. run: what results.json holds, perhaps nothing."""
    if not run:
        return "It has not been measured."
    dms = f"DMS {run['settings']['target_cr']:g}x"
    titles = ("dense", dms, f"window of {run['window_tokens']}")
    with redirect_stdout(StringIO()) as printed:
        print_table(dict(zip(titles, run["results"].values())))
    return textwrap.indent(printed.getvalue(), "    ") + f"\nOn `{run['hardware']}`."


def read_by_others(config, is_whole):
    """What NVIDIA's package and FastDMS make of a release."""
    dms = config.dms
    nvidia = fastdms = "cannot be used with this folder"
    if is_whole and config.model_type == "qwen3" and dms.window > 1:
        nvidia = "computes the same from this folder" + ", on a CPU only" * (dms.window <= 256)
        if dms.shift == 0:
            nvidia = "refuses this folder, whose decisions it would shift by one token"
    kind = (config.rope_scaling or {}).get("rope_type", "default")
    if has_metadata(dms) and f"{config.model_type} {kind}" in FASTDMS:
        fastdms = ("reads this folder; it silences the borrowed channel before RoPE only, so that "
                   "its logits may differ a little")
    return {"nvidia": nvidia, "fastdms": fastdms}


def card(options, config, base, held, run):
    """README.md of a release. base: hub id or None; held: a key of HELD; run: what results.json
    holds, perhaps nothing."""
    tags = ["dms", "kv-cache-compression"]
    header = {"base_model": base, "license": options.license, "tags": tags}
    recipe = [f"- `{key}`: `{value}`" for key, value in run.get("settings", {}).items()]
    source = {"adapter": "an adapter of its layer", "neuron": "a channel of its first query head"}
    return read_text(Path(__file__).with_name("model_card.md")).format(
        header="\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items() if value),
        base=base or f"a {config.model_type} model", recipe="\n".join(recipe) or "Not known.",
        source=source[config.dms.source], window=config.dms.window, cr=config.dms.target_cr,
        results=results_of(run), weights=HELD[held], **read_by_others(config, held != "alone"))


def without_path(value):
    """A setting, but only the name of what may be a path of this machine: of all but a hub id."""
    is_path = isinstance(value, str) and not re.fullmatch(HUB_ID, value)
    return Path(value).name if is_path else value


def write_release(options, out):
    """Write the release into an empty folder, config.json last."""
    model = load_model(options.model, dtype=None, adapter=options.adapter)  # as it is stored
    folder = resolve(options.model)
    raw = read_json(folder / "config.json")
    # what the adapters belong to; None where the folder has weights of its own for everything
    adapted = raw.get("dms_base_model") or options.adapter and options.model
    is_alone = adapted and not options.merge
    is_here = adapted and ((folder / adapted).is_dir() or Path(adapted).is_dir())
    base = options.base or (None if is_here else adapted)  # by its hub id
    require(model.config.dms, f"{options.model}: is a dense model; retrofit it, or give --adapter")
    require(adapted or not options.merge, f"{folder}: is whole as it is; leave out --merge")
    require(base or not is_alone, f"{adapted}: is a folder here; give its hub id with --base")

    copy_tokenizer(folder, out)
    file = out / "tokenizer_config.json"
    if file.exists():  # older libraries note there where it lay
        places = ("name_or_path", "tokenizer_file")
        write_json(file, {k: v for k, v in read_json(file).items() if k not in places})
    run_folder = find_adapters(options.adapter).parent if options.adapter else folder
    if (run_folder / "metrics.jsonl").exists():
        shutil.copyfile(run_folder / "metrics.jsonl", out / "metrics.jsonl")
    run = read_optional(run_folder / "results.json")
    if run:
        run["settings"] = {key: without_path(value) for key, value in run["settings"].items()}
        write_json(out / "results.json", run)
    held = "adapters" if options.merge else run.get("settings", {}).get("train")
    text = card(options, model.config, base, "alone" if is_alone else held, run)
    write_text(out / "README.md", text)
    revision = raw.get("dms_base_revision") if base == adapted else ""
    save_model(model, out, None, base=base if is_alone else None, revision=revision)


def main(argv=None):
    options = Options(**parse_options(Options, argv))
    require(options.model and options.out, "give --model, and a new folder with --out")
    require(re.fullmatch(HUB_ID, options.base or "owner/name"),
            f"--base {options.base}: is no hub id; give owner/name")
    out = Path(options.out)
    require(not out.exists() or out.is_dir() and not any(out.iterdir()),
            f"{out}: already holds something; choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as place:
        release = Path(place) / out.name
        release.mkdir()
        write_release(options, release)
        if out.exists():
            out.rmdir()
        release.rename(out)
    print(f"{out}: written; read its README.md, put in the name of your repository, and\n"
          f"hf upload owner/name {out}")


if __name__ == "__main__":
    run_script(main)
