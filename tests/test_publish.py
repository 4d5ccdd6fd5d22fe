"""What publish.py writes can be loaded by others, says what it is, and holds nothing of this machine."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import in_hub_cache, small_config, small_model
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import dms
import publish
from checkpoint import ADAPTER_FILE, InputError, load_model, load_tokenizer, save_model
from dms import DMSConfig
from model import Model
from oracle import edit

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "toy"
IDS = torch.arange(60)[None]


def base_model(folder, family="qwen3", dtype=torch.float32):
    """A random dense model that knows the toy tokenizer's tokens."""
    torch.manual_seed(0)
    model = Model(small_config(model_type=family, vocab_size=657, tie_word_embeddings=family != "llama"))
    for name, p in model.requires_grad_(False).named_parameters():
        p.normal_(1.0, 0.1) if "norm" in name else p.normal_(0, 0.4)
    save_model(model, folder, dtype)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOY / "teacher" / name, folder / name)


def run_of(**settings):
    """results.json of a retrofit with these settings."""
    run = json.loads((TOY / "retrofitted" / "results.json").read_text())
    run["settings"].update(train="adapters", **settings)
    return run


def retrofitted(root, run=None, **settings):
    """root/base and root/adapters, as retrofit.py leaves them."""
    if not (root / "base").exists():
        base_model(root / "base")
    student = dms.start_retrofit(load_model(root / "base"), DMSConfig(**{"window": 4, **settings}))
    torch.manual_seed(2)
    for block in student.model.layers:
        torch.nn.init.normal_(block.self_attn.dms_proj_alpha.weight)
    out = root / "adapters"
    save_model(student, out, torch.float32, base=root / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOY / "teacher" / name, out / name)
    (out / "results.json").write_text(json.dumps(run or run_of()))
    (out / "metrics.jsonl").write_text('{"step": 1}\n')
    (out / "settings.json").write_text(json.dumps({"model": str(root / "base")}))
    (out / "state.safetensors").write_bytes(b"of a run")
    return student


def call(model, out, *more):
    publish.main(["--model", str(model), "--out", str(out), *more])


def refused(model, out, *more, match):
    """In one line, and nothing is written."""
    before = sorted(out.rglob("*")) if out.is_dir() else out.exists()
    with pytest.raises(InputError, match=match) as e:
        call(model, out, *more)
    assert "\n" not in str(e.value)
    assert before == (sorted(out.rglob("*")) if out.is_dir() else out.exists())


def files_in(folder):
    return sorted(file.name for file in folder.iterdir())


def card_in(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


OF_A_RUN = ["README.md", "config.json", "metrics.jsonl", "results.json", "tokenizer.json",
            "tokenizer_config.json"]


# --------------------------------------------------------------------------------------- Releases


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_merged_release_is_base_and_adapters_bit_for_bit_and_needs_no_base(family, tmp_path):
    base_model(tmp_path / "base", family)
    retrofitted(tmp_path)
    expected = load_model(tmp_path / "adapters")(IDS)
    call(tmp_path / "adapters", tmp_path / "release", "--merge")
    assert files_in(tmp_path / "release") == sorted([*OF_A_RUN, "model.safetensors"])
    shutil.rmtree(tmp_path / "base")
    shutil.rmtree(tmp_path / "adapters")
    shutil.move(tmp_path / "release", tmp_path / "elsewhere")
    merged = load_model(tmp_path / "elsewhere")
    torch.testing.assert_close(merged(IDS), expected)
    assert merged.config.dms == DMSConfig(window=4)
    raw = json.loads((tmp_path / "elsewhere" / "config.json").read_text())
    assert not [key for key in raw if "base" in key]
    assert raw["torch_dtype"] == "float32"  # the base's
    assert raw["architectures"] == [{"qwen3": "Qwen3", "llama": "Llama"}[family] + "ForCausalLMDMS"]
    assert load_tokenizer(tmp_path / "elsewhere").encode("a")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_merged_release_has_every_tensor_as_it_was_stored(stored, tmp_path):
    """So the float32 adapters are not rounded to the base's dtype."""
    base_model(tmp_path / "base", dtype=stored)
    retrofitted(tmp_path)
    call(tmp_path / "adapters", tmp_path / "release", "--merge")
    merged = load_file(tmp_path / "release" / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    adapters = load_file(tmp_path / "adapters" / "dms_adapters.safetensors")
    assert merged.keys() == base.keys() | adapters.keys()
    for name, tensor in merged.items():
        original = {**base, **adapters}[name]
        assert tensor.dtype == original.dtype and torch.equal(tensor, original)
    for dtype in (torch.float32, torch.bfloat16):
        one, other = (load_model(tmp_path / name, dtype=dtype) for name in ("adapters", "release"))
        torch.testing.assert_close(one(IDS), other(IDS))


def test_adapters_found_elsewhere_are_merged(tmp_path):
    expected = retrofitted(tmp_path)(IDS)
    call(tmp_path / "base", tmp_path / "release", "--merge", "--adapter", str(tmp_path / "adapters"))
    torch.testing.assert_close(load_model(tmp_path / "release")(IDS), expected)
    assert (tmp_path / "release" / "results.json").exists()  # from beside the adapters


ELSEWHERE = """
import torch
import generate
import publish
from checkpoint import load_model
models = [load_model(name) for name in ("release", "owner/adapters")]
torch.save([model(torch.arange(60)[None]) for model in models], "logits")
generate.main("--model owner/base --adapter owner/adapters --prompt a --raw --max-new-tokens 3 "
              "--device cpu".split())
publish.main("--model owner/adapters --out again".split())
"""


def test_adapters_alone_are_released_for_a_base_on_the_hub(tmp_path):
    """Offline, without the local base, they and that base are found in the hub's cache."""
    expected = retrofitted(tmp_path)(IDS)
    call(tmp_path / "adapters", tmp_path / "release", "--base", "owner/base")
    assert files_in(tmp_path / "release") == sorted([*OF_A_RUN, ADAPTER_FILE])
    raw = json.loads((tmp_path / "release" / "config.json").read_text())
    before = json.loads((tmp_path / "adapters" / "config.json").read_text())
    assert raw["dms_base_model"] == "owner/base"
    assert raw["dms_base_fingerprint"] == before["dms_base_fingerprint"]
    one, other = (load_file(tmp_path / name / ADAPTER_FILE) for name in ("adapters", "release"))
    assert all(torch.equal(one[name], other[name]) for name in one | other)

    environment = in_hub_cache(tmp_path / "cache", base=tmp_path / "base", adapters=tmp_path / "release")
    shutil.move(tmp_path / "base", tmp_path / "no-longer-here")
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", ELSEWHERE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert "compression" in done.stderr, done.stderr
    assert done.stdout.splitlines()[-1] == "hf upload owner/name again", done.stderr
    for logits in torch.load(tmp_path / "logits"):
        assert torch.equal(logits, expected)
    # released again: it was known that its base is on the hub
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == raw
    assert ModelCard(card_in(tmp_path / "again")).data.base_model == "owner/base"


@pytest.mark.parametrize("settings", [
    DMSConfig(window=5, shift=0), DMSConfig(window=300), DMSConfig(window=5, source="neuron"),
    DMSConfig(window=5, source="neuron", shift=0),
])
def test_a_model_that_is_whole_is_released_whole(settings, tmp_path):
    model = small_model(3, settings)
    save_model(model, tmp_path / "whole", torch.float32)
    call(tmp_path / "whole", tmp_path / "release")
    released = load_model(tmp_path / "release")
    assert torch.equal(released(IDS), model(IDS))
    assert released.config.dms == settings
    names = {*files_in(tmp_path / "release")} - {"README.md"}
    assert names == {*files_in(tmp_path / "whole")}


def test_the_shipped_model_can_be_released(tmp_path, capsys):
    call(TOY / "retrofitted", tmp_path / "release", "--license", "mit")
    assert capsys.readouterr().out.splitlines()[-1] == f"hf upload owner/name {tmp_path / 'release'}"
    one, other = (load_file(folder / "model.safetensors") for folder in (TOY / "retrofitted", tmp_path / "release"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    results = (tmp_path / "release" / "results.json").read_text()
    assert json.loads(results) == json.loads((TOY / "retrofitted" / "results.json").read_text())


# -------------------------------------------------------------------------------------- The card


def test_the_card_says_what_it_is_what_came_out_and_how_it_was_made(tmp_path, capsys):
    run = run_of(data="open-r1/OpenR1-Math-220k", steps=1234, lr=3e-5, seed=7)
    run["window_tokens"] = 55
    run["results"]["DMS"]["accuracy"]["needles"] = 0.985
    run["results"]["DMS"]["compression_ratio"] = 8.1
    run["results"]["window"]["compression_ratio"] = 7.82
    retrofitted(tmp_path, run)
    call(tmp_path / "adapters", tmp_path / "release", "--base", "owner/base", "--license", "apache-2.0")
    text = card_in(tmp_path / "release")
    assert ModelCard(text).data.to_dict() == {
        "base_model": "owner/base", "license": "apache-2.0", "tags": ["dms", "kv-cache-compression"]}
    for row in ("dense            DMS 8x      window of 55",
                "needles                                99.5%             98.5%",
                "compression ratio                       1.00              8.10              7.82",
                "- `data`: `open-r1/OpenR1-Math-220k`", "- `steps`: `1234`", "- `lr`: `3e-05`",
                "- `batch_size`: `4`", "- `seq_len`: `512`", "- `window`: `16`", "- `target_cr`: `8.0`",
                "- `seed`: `7`", "python generate.py --model owner/name", "from model import load_model"):
        assert row in text
    assert "the adapters alone" in text
    assert "{" not in text


def test_what_was_not_measured_is_said_to_be_so(tmp_path):
    save_model(small_model(3, DMSConfig(window=5)), tmp_path / "whole", torch.float32)
    (tmp_path / "whole" / "metrics.jsonl").write_text('{"step": 1}\n')
    call(tmp_path / "whole", tmp_path / "release")
    assert (tmp_path / "release" / "metrics.jsonl").read_text() == '{"step": 1}\n'
    text = card_in(tmp_path / "release")
    assert "It has not been measured." in text
    assert "Not known." in text
    assert "KL to the teacher" not in text
    assert not {"base_model", "license"} & ModelCard(text).data.to_dict().keys()


def test_the_card_says_what_an_engine_without_dms_makes_of_it(tmp_path):
    retrofitted(tmp_path)
    call(tmp_path / "adapters", tmp_path / "merged", "--merge")
    call(TOY / "retrofitted", tmp_path / "trained")
    call(tmp_path / "merged", tmp_path / "again")  # known from its results.json
    call(tmp_path / "adapters", tmp_path / "alone", "--base", "owner/base")
    unchanged = "the base's weights, unchanged, and the adapters"
    alone = "the adapters alone, to be laid over the base's weights, which are not here"
    held = {"merged": unchanged, "again": unchanged, "trained": "trained weights", "alone": alone}
    for name, weights in held.items():
        text = card_in(tmp_path / name)
        assert f"In this folder: {weights}.\n" in text
        assert "`AutoModelForCausalLM`" in text
        assert "if they were trained, the answers are worse than the original's" in text


@pytest.mark.parametrize("family, settings, nvidia, fastdms", [
    ("qwen3", dict(window=512), True, False),
    ("qwen3", dict(window=257, per="layer"), True, False),
    ("qwen3", dict(window=512, source="neuron"), True, False),
    ("qwen3", dict(window=256), False, False),
    ("qwen3", dict(window=512, shift=0), False, False),
    ("llama", dict(window=512), False, False),
    ("llama", dict(window=256, source="neuron", shift=0), False, True),
    ("qwen3", dict(window=512, source="neuron", shift=0), False, True),
    ("qwen2", dict(window=256, source="neuron", shift=0), False, False),
    ("qwen3", dict(window=256, source="neuron", shift=0, per="layer"), False, False),
])
def test_the_card_names_other_engines_only_where_they_compute_the_same(family, settings, nvidia, fastdms, tmp_path):
    save_model(small_model(3, DMSConfig(**settings), model_type=family), tmp_path / "whole")
    call(tmp_path / "whole", tmp_path / "release")
    text = card_in(tmp_path / "release").split("Elsewhere:")[1]
    assert ("(folder)`: computes the same" in text) == nvidia
    assert ("FastDMS): reads this folder" in text) == fastdms
    assert text.count("cannot be used") == 2 - nvidia - fastdms


def test_adapters_alone_are_for_this_engine_only(tmp_path):
    retrofitted(tmp_path, window=512)
    call(tmp_path / "adapters", tmp_path / "release", "--base", "owner/base")
    assert card_in(tmp_path / "release").count("cannot be used with this folder") == 2


def test_where_a_tokenizer_lay_is_not_in_a_release(tmp_path):
    retrofitted(tmp_path)
    file = tmp_path / "adapters" / "tokenizer_config.json"
    stated = json.loads(file.read_text())
    file.write_text(json.dumps({**stated, "name_or_path": "/home/me/base", "tokenizer_file": None}))
    call(tmp_path / "adapters", tmp_path / "release", "--merge")
    released = json.loads((tmp_path / "release" / "tokenizer_config.json").read_text())
    assert released == {**stated, "name_or_path": "base", "tokenizer_file": None}


def test_no_path_of_this_machine_is_in_a_release(tmp_path):
    base_model(tmp_path / "base")
    edit(tmp_path / "base" / "config.json", lambda raw: raw.update(_name_or_path=str(tmp_path)))
    retrofitted(tmp_path, run_of(data=str(tmp_path / "private" / "data.jsonl")))
    call(tmp_path / "adapters", tmp_path / "one", "--base", "owner/base")
    call(tmp_path / "adapters", tmp_path / "two", "--merge")
    for file in (*(tmp_path / "one").iterdir(), *(tmp_path / "two").iterdir()):
        for part in (tmp_path.name, "private", "../base"):
            assert part.encode() not in file.read_bytes(), file
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert results["settings"]["data"] == "data.jsonl"
    assert "data.jsonl" in card_in(tmp_path / "one")


EVIL = "x`|\n---\nlicense: evil\n# evil\n    <script>\x1b[2J{0}"


def test_what_a_results_file_says_cannot_leave_its_place_in_the_card(tmp_path):
    run = run_of()
    for column in run["results"].values():
        column["accuracy"] = {EVIL: 0.5, "a\rlicense: evil\u2028---": 0.25}
    run["hardware"] = run["torch"] = EVIL
    run["settings"].update({"data": EVIL, EVIL: [EVIL]})
    retrofitted(tmp_path, run)
    call(tmp_path / "adapters", tmp_path / EVIL.replace("/", ""), "--base", "owner/base")
    text = card_in(tmp_path / EVIL.replace("/", ""))
    assert ModelCard(text).data.to_dict() == {"base_model": "owner/base", "tags": ["dms", "kv-cache-compression"]}
    lines = text.splitlines()
    assert sum(line.startswith("---") for line in lines) == 2  # the header's
    assert [line for line in lines if line.startswith("# ")] == [lines[4]]
    for line in lines:
        if "evil" in line or "script" in line:
            is_code = line.startswith("    ") or line.count("`") % 2 == 0 and line.count("`") >= 2
            assert is_code, line
    assert "50.0%" in text


# -------------------------------------------------------------------------------------- Refusals


def test_what_cannot_be_released_is_refused_before_anything_is_written(tmp_path):
    retrofitted(tmp_path)
    adapters = tmp_path / "adapters"
    new = tmp_path / "release"
    refused(adapters, new, match="folder of this machine; give its hub id with --base")
    for name in ("base", "../base", "a/b/c", "a b/c", "a/b\nc"):
        refused(adapters, new, "--base", name, match="no hub id")
    refused(tmp_path / "base", new, match="is a dense model")
    refused(tmp_path / "nothing", new, match="no such folder")
    refused(tmp_path / "base", new, "--adapter", str(tmp_path / "nothing"), match="no such folder")
    refused(adapters, adapters, "--merge", match="already holds something")
    refused(adapters, adapters / "config.json", "--merge", match="already holds something")
    refused(TOY / "retrofitted", new, "--merge", match="is whole as it is; leave out --merge")
    with pytest.raises(InputError, match="--model"):
        publish.main(["--out", str(new)])
    with pytest.raises(InputError, match="--out"):
        publish.main(["--model", str(adapters)])
    assert not new.exists()


def test_adapters_without_shift_are_not_merged_but_released_as_they_are(tmp_path):
    expected = retrofitted(tmp_path, shift=0)(IDS)
    refused(tmp_path / "adapters", tmp_path / "release", "--merge", match="shift 0.*leave it out: this engine can")
    call(tmp_path / "adapters", tmp_path / "release", "--base", "owner/base")
    released = load_model(tmp_path / "base", adapter=tmp_path / "release")
    assert released.config.dms.shift == 0
    assert torch.equal(released(IDS), expected)


def test_a_base_that_has_changed_is_refused(tmp_path):
    retrofitted(tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, file, {"format": "pt"})
    refused(tmp_path / "adapters", tmp_path / "release", "--base", "owner/base", match="fingerprint")
    refused(tmp_path / "adapters", tmp_path / "release", "--merge", match="fingerprint")


@pytest.mark.parametrize("damage", [
    lambda run: run.pop("results"),
    lambda run: run.pop("window_tokens"),
    lambda run: run.update(settings=[]),
    lambda run: run["results"].update(DMS=None),
    lambda run: run["results"]["DMS"].update(kl="0"),
    lambda run: run["results"]["DMS"].update(accuracy={}),
    lambda run: run["results"]["dense"].update(reads=10**400),
    lambda run: run["settings"].update(target_cr="8"),
])
def test_results_that_are_not_as_they_were_written_are_refused(damage, tmp_path):
    run = run_of()
    damage(run)
    retrofitted(tmp_path, run)
    refused(tmp_path / "adapters", tmp_path / "release", "--base", "a/b", match="results.json: not as retrofit.py")


def test_results_nested_without_end_are_refused(tmp_path):
    retrofitted(tmp_path)
    file = tmp_path / "adapters" / "results.json"
    file.write_text(file.read_text().replace('"seed":', '"deep": ' + "[" * 985 + "]" * 985 + ', "seed":'))
    refused(tmp_path / "adapters", tmp_path / "release", "--base", "a/b", match="results.json")


@pytest.mark.parametrize("more", [["--merge"], ["--base", "owner/base"]])
def test_a_release_that_was_cut_off_does_not_look_whole(more, tmp_path, monkeypatch):
    retrofitted(tmp_path)

    def full(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr("checkpoint.save_file", full)
    with pytest.raises(InputError, match="no space left"):
        call(tmp_path / "adapters", tmp_path / "release", *more)
    assert not (tmp_path / "release" / "config.json").exists()
    assert not [file for file in os.listdir(tmp_path / "release") if "safetensors" in file]
    with pytest.raises(InputError):
        load_model(tmp_path / "release")
    refused(tmp_path / "adapters", tmp_path / "release", *more, match="already holds something")
