"""
A release: a folder of a retrofitted model that others can load, with a card that says what it is.

    python publish.py --model out/qwen3-8b-dms-8x --out release            # its adapters alone
    python publish.py --model out/qwen3-8b-dms-8x --out release --merge    # with the base's weights

A model whose weights were all trained is one whole folder anyway. The release is written beside
--out and renamed when it is complete. Nothing is uploaded. The card's text is model_card.md.
"""

import re
import tempfile
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path

from checkpoint import copy_tokenizer, load_model, read_optional, resolve, save_model
from common import parse_options, read_json, read_text, require, run_script, write_json
from evaluate import table_of


@dataclass
class Options:
    """Of the command line."""

    model: str = None  # what retrofit.py wrote: folder or hub id
    out: str = None  # folder for the release, a new one
    merge: bool = False  # one whole folder: the base's weights and the adapters
    base: str = None  # the base by its hub id, where it is a folder here


def card(config, base, weights, run):
    """README.md of a release. base: hub id or None; run: what results.json holds, or nothing."""
    recipe = [f"- `{key}`: `{value}`" for key, value in run.get("settings", {}).items()]
    results = "It has not been measured."
    if "settings" in run:
        results = textwrap.indent(table_of(run), "    ")
    facts = dict(base_model=f"base_model: {base}\n" if base else "", weights=weights,
                 base=base or f"a {config.model_type} model", family=config.model_type,
                 recipe="\n".join(recipe) or "Not known.", results=results, **vars(config.dms))
    return read_text(Path(__file__).with_name("model_card.md")).format(**facts)


def add_remote_code(config, out):
    """What transformers needs to load the folder with trust_remote_code=True, and only so: a
    model_type of our own, and our code, whose files import one another as parts of a package."""
    for name in ("dms", "mla", "model", "kv_cache", "modeling_dms"):
        text = read_text(Path(__file__).with_name(f"{name}.py"))
        # from dms import ... becomes from .dms import ...
        text = re.sub(r"^from (dms|mla|model|kv_cache) imp", r"from .\1 imp", text, flags=re.M)
        text = re.sub(r"^import dms$", "from . import dms", text, flags=re.M)
        (out / f"{name}.py").write_text(text, encoding="utf-8")
    classes = dict(AutoConfig="DMSEngineConfig", AutoModelForCausalLM="DMSForCausalLM")
    raw = read_json(out / "config.json")
    raw |= {"model_type": "dms", "dms_engine": asdict(config),
            "auto_map": {auto: f"modeling_dms.{ours}" for auto, ours in classes.items()}}
    write_json(out / "config.json", raw)


def write_release(options, out):
    """Write the release into an empty folder."""
    model = load_model(options.model, dtype=None)  # as it is stored
    require(model.config.dms, f"{options.model}: is a dense model; retrofit it")
    folder = resolve(options.model)
    raw = read_json(folder / "config.json")
    only_adapters = "dms_base_model" in raw and not options.merge
    base = options.base or raw.get("dms_base_model")
    if base and ((folder / base).is_dir() or Path(base).is_dir()):  # no other machine has it
        require(not only_adapters, f"{base}: is a folder; give its hub id: --base")
        base = None
    # the commit, unless it may belong to another repository
    revision = None if options.base else raw.get("dms_base_revision")
    base_keys = {"dms_base_model": base, "dms_base_revision": revision} if only_adapters else None

    copy_tokenizer(folder, out)
    run = read_optional(folder / "results.json")
    if "settings" in run:  # else it is another program's
        write_json(out / "results.json", run)
    weights = "the adapters alone, to be laid over the base" if only_adapters else "all weights"
    (out / "README.md").write_text(card(model.config, base, weights, run))
    save_model(model, out, None, base_keys)
    if not only_adapters:
        add_remote_code(model.config, out)


def main(argv=None):
    options = Options(**parse_options(Options, argv))
    require(options.model and options.out, "give --model, and a new folder with --out")
    out = Path(options.out)
    require(not out.exists(), f"{out}: is already there; choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as place:
        release = Path(place) / out.name
        release.mkdir()
        write_release(options, release)
        release.rename(out)
    print(f"{out}: written; read its README.md, and then: hf upload owner/name {out}")


if __name__ == "__main__":
    run_script(main)
