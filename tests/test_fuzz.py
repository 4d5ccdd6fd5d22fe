"""Damaged checkpoints. Each case damages one file of a tiny sound folder at random, from a seed, and loads it: either
it works, or it raises InputError with one line. Never another exception, a panic, a long wait, much memory, or a look
at a file outside the folder."""
import copy
import json
import os
import random
import resource
import shutil
import struct
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import small_model
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import model as model_file
from dms import DMSConfig, InputError
from kv_cache import KVCache
from model import load_model, load_tokenizer, save_model

CASES = 220  # of each of the tests below
SECONDS = 5.0  # of processor time, the most that a case may take
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}{{ bos_token }}"
MESSAGES = [{"role": "user", "content": "héllo ☃"}]
OPENED = []  # every path that Python opens while it is a list that is being watched
WATCHING = [False]


def audit(event, arguments):
    if WATCHING[0] and event == "open" and not isinstance(arguments[0], int):
        OPENED.append(os.fsdecode(arguments[0]))


sys.addaudithook(audit)  # cannot be removed again; costs nothing unless WATCHING


def inside(path, folder):
    path = os.path.realpath(path)
    allowed = [folder, sys.prefix, sys.base_prefix, Path(model_file.__file__).parent, Path(torch.__file__).parents[1],
               "/proc/sys/kernel/random/boot_id"]  # the last by the hub client, where a base model has a hub id's form
    return any(path == str(a) or path.startswith(f"{a}{os.sep}") for a in map(os.path.realpath, allowed))


# ---------------------------------------------------------------------------------------------------------------------
# Sound folders


def write_tokenizer(folder):
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    fast.train_from_iterator(["hello hello world"], trainers.BpeTrainer(
        vocab_size=40, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=list("abcdehlorw")))
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "chat_template": TEMPLATE}))


def shard(folder):
    """Cut model.safetensors in two behind an index."""
    from safetensors.torch import load_file, save_file
    tensors = load_file(folder / "model.safetensors")
    names, weight_map = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """{layout: folder}: a dense model, one in shards, DMS models of both sources, adapters beside the base that they
    name, and a tokenizer whose template is a file of its own."""
    root = tmp_path_factory.mktemp("sound").resolve()
    size = dict(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=4)
    dense = small_model(**size)
    save_model(dense, root / "dense", torch.float32)
    save_model(small_model(model_type="llama", attention_bias=True, rope_scaling=dict(
        rope_type="yarn", factor=2.0, original_max_position_embeddings=16), **size), root / "shards")
    shard(root / "shards")
    student = small_model(dms=DMSConfig(window=2), **size)
    save_model(student, root / "dms", torch.float32)
    save_model(dense, root / "adapter" / "base", torch.float32)
    save_model(student, root / "adapter", torch.float32, base=root / "adapter" / "base")
    for folder in root.iterdir():
        write_tokenizer(folder)
    (root / "template").mkdir()
    write_tokenizer(root / "template")
    (root / "template" / "chat_template.jinja").write_text(TEMPLATE)
    save_model(small_model(dms=DMSConfig(window=2, source="neuron"), **size), root / "neuron", torch.float32)
    (root / "neuron" / "dms_metadata.json").write_text(json.dumps({"config": {"window_size": 2}, "shift": 1}))
    return {folder.name: folder for folder in root.iterdir()}


# ---------------------------------------------------------------------------------------------------------------------
# Damage

NUMBERS = [0, -1, 1, 2, 3, 7, 0.5, -0.0, 1e-300, 1e300, 2**31, 2**31 - 1, 2**40, 2**63, 10**30, 10**400, float("nan"),
           float("inf"), float("-inf")]
OTHERS = [None, True, False, "", "x", "16", "\x00", "a\nb", "é☃", "../x", "/etc/passwd", "silu", "x" * 5000, [], [1],
          [[]], {}, {"a": 1}, {"rope_type": "linear"}, [None] * 50, {"a": {"b": {"c": []}}}, "\ud800"]


def nest(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


def wrong_value(rng, old=None):
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(NUMBERS)
    if kind < 0.8:
        return copy.deepcopy(rng.choice(OTHERS))
    if kind < 0.85:
        return nest(rng.choice([10, 100]))
    if isinstance(old, bool):
        return not old
    if isinstance(old, (int, float)):
        return old + rng.choice([-1, 1, 0.5]) if rng.random() < 0.5 else old * rng.choice([-1, 2, 1000, 10**12])
    if isinstance(old, str):
        i = rng.randrange(len(old) + 1)
        return old[:i] + rng.choice(["\n", "\x00", "../", "%", "{{", "é", ""]) + old[i + rng.randrange(2):]
    return wrong_value(rng)


def places(data, at=()):
    """Every (container, key) within parsed JSON."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield data, key
        yield from places(value)


def damage_structure(rng, data):
    """Change one to three places of parsed JSON; returns it, or what has taken its place."""
    if rng.random() < 0.02:
        return wrong_value(rng)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        found = list(places(data))
        if not found:
            return data
        container, key = rng.choice(found)
        deed = rng.random()
        if deed < 0.15:
            del container[key]
        elif deed < 0.2 and isinstance(container, dict):
            container[rng.choice(["", "x", "model_type", "a\nb", key + " "])] = container.pop(key)
        elif deed < 0.25:  # exchange with another place
            other, name = rng.choice(found)
            other[name], container[key] = copy.deepcopy(container[key]), copy.deepcopy(other[name])
        else:
            container[key] = wrong_value(rng, container[key])
    return data


def damage_bytes(rng, data):
    """Truncate, flip, insert, remove or repeat bytes."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        i, n = rng.randrange(len(data) + 1), rng.choice([1, 1, 2, 8, 50])
        deed = rng.random()
        if deed < 0.2:
            del data[i:]
        elif deed < 0.5 and i < len(data):
            data[i] ^= 1 << rng.randrange(8)
        elif deed < 0.7:
            data[i:i] = rng.choice([rng.randbytes(n), b"9" * n, b"{" * n, b"[" * 20000, b'"', b"\n", b"\xff",
                                    b"\\ud800"])
        elif deed < 0.85:
            del data[i:i + n]
        else:
            data[i:i] = data[max(i - n, 0):i] * rng.choice([1, 3])
    return bytes(data)


def damage_json(rng, file):
    text = file.read_text()
    if rng.random() < 0.3:
        return file.write_bytes(damage_bytes(rng, text.encode()))
    data = damage_structure(rng, json.loads(text))
    text = json.dumps(data, ensure_ascii=rng.random() < 0.5)
    if isinstance(data, dict) and data and rng.random() < 0.1:  # a key twice
        text = text[:-1] + f", {json.dumps(rng.choice(list(data)))}: {json.dumps(wrong_value(rng))}" + "}"
    return file.write_bytes(text.encode("utf-8", "surrogatepass"))


def damage_safetensors(rng, file):
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, body = data[8:8 + length], data[8 + length:]
    deed = rng.random()
    if deed < 0.15:  # the length of the header
        length = rng.choice([0, 1, length - 1, length + 1, length + 8, len(data), len(data) - 8, 10**8, 10**8 + 1,
                             2**31, 2**63, 2**64 - 1, rng.randrange(2 * length)])
        return file.write_bytes(struct.pack("<Q", length) + header + body)
    if deed < 0.35:
        header = damage_bytes(rng, header)
    elif deed < 0.5:  # the weights, or their end
        return file.write_bytes(data[:8 + length] + damage_bytes(rng, body))
    elif deed < 0.55:
        return file.write_bytes(damage_bytes(rng, data))
    else:
        entries = json.loads(header)
        name = rng.choice(sorted(entries))
        entry, deed = entries[name], rng.random()
        if deed < 0.3:
            entry["dtype"] = rng.choice(["F32", "F16", "BF16", "F64", "I8", "U8", "I64", "U64", "BOOL", "F4",
                                         "F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "C64", "f32", "", "X", 3, None])
        elif deed < 0.5:
            offsets = entry.get("data_offsets", [0, 0])
            i = rng.randrange(2)
            offsets[i] = rng.choice([0, -1, offsets[i] + 1, offsets[i] - 1, offsets[1 - i], len(body), len(body) + 1,
                                     2**62, 2**64, 1e9, "0", None])
            entry["data_offsets"] = rng.choice([offsets, offsets, offsets[::-1], offsets[:1], offsets * 2])
        elif deed < 0.75:
            shape = entry.get("shape", [1])
            entry["shape"] = rng.choice([shape[::-1], shape + [1], shape[:-1], [1] + shape, [2**32, 2**32], [2**63],
                                         [], [-1], [0], [rng.randrange(40)], [shape[0] * 2] + shape[1:], "x", None,
                                         [1.5]])
        elif deed < 0.85:
            entries[rng.choice(["x", "", "a\nb", "../x", "__metadata__", name + ".x", "lm_head.weight",
                                "model.layers.0.self_attn.rotary_emb.inv_freq"])] = entries.pop(name)
        else:
            entries = damage_structure(rng, entries)
        header = json.dumps(entries).encode("utf-8", "surrogatepass")
        if rng.random() < 0.1:
            header = b'{"x": 1, ' + header[1:]
    return file.write_bytes(struct.pack("<Q", len(header)) + header + body)


# ---------------------------------------------------------------------------------------------------------------------
# A case


def use_model(folder):
    model = load_model(folder)
    ids = torch.tensor([[1, 2, 3]]) % model.config.vocab_size
    model(ids)
    model(ids, cache=KVCache(model.config, 1))


def use_tokenizer(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.decode(tokenizer.encode("hello wörld <s>"))
    tokenizer.decode([0, 1, 39, 10**6], skip_special_tokens=True)
    tokenizer.token_id(tokenizer.special("eos_token"))
    tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)


def attempt(use, folder, what, limit=SECONDS):
    """Run use(folder); returns whether it worked, fails the test if it ended in any way but one of the two allowed."""
    OPENED.clear()
    begin, outcome = time.process_time(), None
    WATCHING[0] = True
    try:
        use(folder)
    except InputError as e:
        outcome = str(e)
    except BaseException as e:  # a panic of Rust code is no Exception
        if isinstance(e, KeyboardInterrupt):
            raise
        WATCHING[0] = False
        pytest.fail(f"{what}: {type(e).__name__}: {e}")
    finally:
        WATCHING[0] = False
    seconds = time.process_time() - begin
    assert seconds < limit, f"{what}: {seconds:.1f} s"
    elsewhere = [path for path in OPENED if not inside(path, folder)]
    assert not elsewhere, f"{what}: opened {elsewhere}"
    assert outcome is None or (outcome and "\n" not in outcome and len(outcome) < 2000), f"{what}: {outcome!r}"
    return outcome is None


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """A folder that names a hub id is not looked up, nor in a cache that this machine may have."""
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))


def fuzz(sound, tmp_path, layout, name, damage, use):
    """CASES times: damage one of the files of that name in a copy of the folder, use it, mend it. Both endings must
    occur, or the damage was of one kind."""
    folder = tmp_path / "case"
    shutil.copytree(sound[layout], folder)
    clean = {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert attempt(use, folder, f"{layout}, undamaged", 60), "the sound folder must load"  # torch imports on the way
    before, worked = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for seed in range(CASES):
        rng = random.Random(f"{layout} {name} {seed}")
        file = rng.choice(sorted(folder.glob(name)))
        damage(rng, file)
        worked += attempt(use, folder, f"{layout}, {name}, seed {seed}")
        file.write_bytes(clean[file.relative_to(folder)])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 300e6, f"loading damaged files took {grown:,} bytes"
    assert 0 < worked < CASES, f"{worked} of {CASES} worked"


@pytest.mark.parametrize("layout, name", [
    ("dense", "config.json"), ("shards", "config.json"), ("dms", "config.json"), ("adapter", "config.json"),
    ("neuron", "dms_metadata.json"), ("shards", "model.safetensors.index.json")])
def test_damaged_settings(sound, tmp_path, layout, name):
    fuzz(sound, tmp_path, layout, name, damage_json, use_model)


@pytest.mark.parametrize("layout, name", [
    ("dense", "model.safetensors"), ("shards", "model-*.safetensors"), ("dms", "model.safetensors"),
    ("adapter", "dms_adapters.safetensors"), ("adapter", "base/model.safetensors")])
def test_damaged_weights(sound, tmp_path, layout, name):
    fuzz(sound, tmp_path, layout, name, damage_safetensors, use_model)


@pytest.mark.parametrize("name, damage", [
    ("dms_adapters.safetensors", damage_safetensors), ("config.json", damage_json)])
def test_damaged_adapters_laid_over_a_model(sound, tmp_path, name, damage):
    fuzz(sound, tmp_path, "adapter", name, damage, lambda folder: load_model(folder / "base", adapter=folder))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_tokenizers(sound, tmp_path, name):
    fuzz(sound, tmp_path, "dense", name, damage_json, use_tokenizer)


def test_damaged_templates(sound, tmp_path):
    fuzz(sound, tmp_path, "template", "chat_template.jinja",
         lambda rng, file: file.write_bytes(damage_bytes(rng, file.read_bytes())), use_tokenizer)
