"""Damaged checkpoints. Each case damages one file of a tiny sound folder at random, from a seed,
and loads it: either it works, or it raises InputError with one line. Never another exception, a
panic, a long wait, much memory, or a look at a file outside the folder."""

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
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import checkpoint
from checkpoint import InputError, load_model, load_tokenizer, save_model
from dms import DMSConfig
from kv_cache import KVCache

CASES = 220  # of each of the tests below
SECONDS = 5.0  # of processor time, the most that a case may take
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}{{ bos_token }}"
)
MESSAGES = [{"role": "user", "content": "héllo ☃"}]

OPENED = []  # every path that Python opens while WATCHING[0]
WATCHING = [False]


def audit(event, arguments):
    if WATCHING[0] and event == "open" and not isinstance(arguments[0], int):
        OPENED.append(os.fsdecode(arguments[0]))


sys.addaudithook(audit)  # cannot be removed again; costs nothing unless WATCHING


def may_be_opened(path, folder):
    """The folder itself, and what Python, torch and this project import on the way."""
    allowed = [
        folder,
        sys.prefix,
        sys.base_prefix,
        Path(checkpoint.__file__).parent,
        Path(torch.__file__).parents[1],
        os.devnull,  # where the process of the chat template writes its errors
        "/proc/sys/kernel/random/boot_id",  # by the hub client, for a base that looks like a hub id
    ]
    path = os.path.realpath(path)
    for place in map(os.path.realpath, allowed):
        if path == place or path.startswith(place + os.sep):
            return True
    return False


# ----------------------------------------------------------------------------------- Sound folders


def write_tokenizer(folder):
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=40,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
        initial_alphabet=list("abcdehlorw"),
    )
    fast.train_from_iterator(["hello hello world"], trainer)
    begin = [("<s>", 0)]
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=begin)
    fast.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "special": True},
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def shard(folder):
    """Cut model.safetensors in two behind an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for file, part in (
        ("model-00001-of-00002.safetensors", names[::2]),
        ("model-00002-of-00002.safetensors", names[1::2]),
    ):
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """{layout: folder}: a dense model, one in shards, DMS models of both sources, adapters beside
    the base that they name, and a tokenizer whose template is a file of its own."""
    root = tmp_path_factory.mktemp("sound").resolve()
    sizes = dict(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=4
    )
    dense = small_model(**sizes)
    save_model(dense, root / "dense", torch.float32)

    yarn = dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=16)
    llama = dict(model_type="llama", attention_bias=True, rope_scaling=yarn)
    save_model(small_model(**llama, **sizes), root / "shards")
    shard(root / "shards")

    student = small_model(dms=DMSConfig(window=2), **sizes)
    save_model(student, root / "dms", torch.float32)
    save_model(dense, root / "adapter" / "base", torch.float32)
    save_model(student, root / "adapter", torch.float32, base=root / "adapter" / "base")

    neuron = small_model(dms=DMSConfig(window=2, source="neuron"), **sizes)
    save_model(neuron, root / "neuron", torch.float32)
    metadata = {"config": {"window_size": 2}, "shift": 1}
    (root / "neuron" / "dms_metadata.json").write_text(json.dumps(metadata))

    write_tokenizer(root / "dense")
    (root / "template").mkdir()
    write_tokenizer(root / "template")
    (root / "template" / "chat_template.jinja").write_text(TEMPLATE)
    return {folder.name: folder for folder in root.iterdir()}


# ------------------------------------------------------------------------------------------ Damage

NUMBERS = [
    0, -1, 1, 2, 3, 7, 0.5, -0.0, 1e-300, 1e300, 2**31, 2**31 - 1, 2**40, 2**63, 10**30, 10**400,
    float("nan"), float("inf"), float("-inf"),
]  # fmt: skip
OTHERS = [
    None, True, False, "", "x", "16", "\x00", "a\nb", "é☃", "../x", "/etc/passwd", "silu",
    "x" * 5000, "\ud800", [], [1], [[]], [None] * 50, {}, {"a": 1}, {"rope_type": "linear"},
    {"a": {"b": {"c": []}}},
]  # fmt: skip


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
        if rng.random() < 0.5:
            return old + rng.choice([-1, 1, 0.5])
        return old * rng.choice([-1, 2, 1000, 10**12])
    if isinstance(old, str):
        i = rng.randrange(len(old) + 1)
        j = i + rng.randrange(2)
        return old[:i] + rng.choice(["\n", "\x00", "../", "%", "{{", "é", ""]) + old[j:]
    return wrong_value(rng)


def places(data):
    """Every (container, key) within parsed JSON."""
    items = []
    if isinstance(data, dict):
        items = list(data.items())
    elif isinstance(data, list):
        items = list(enumerate(data))
    found = []
    for key, value in items:
        found.append((data, key))
        found += places(value)
    return found


def damage_structure(rng, data):
    """Change one to three places of parsed JSON; returns it, or what has taken its place."""
    if rng.random() < 0.02:
        return wrong_value(rng)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        found = places(data)
        if not found:
            return data
        container, key = rng.choice(found)
        deed = rng.random()
        if deed < 0.15:
            del container[key]
        elif deed < 0.2 and isinstance(container, dict):
            other = rng.choice(["", "x", "model_type", "a\nb", key + " "])
            container[other] = container.pop(key)
        elif deed < 0.25:  # exchange with another place
            other, name = rng.choice(found)
            mine = copy.deepcopy(container[key])
            its = copy.deepcopy(other[name])
            other[name] = mine
            container[key] = its
        else:
            container[key] = wrong_value(rng, container[key])
    return data


def damage_bytes(rng, data):
    """Truncate, flip, insert, remove or repeat bytes."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        i = rng.randrange(len(data) + 1)
        n = rng.choice([1, 1, 2, 8, 50])
        deed = rng.random()
        if deed < 0.2:
            del data[i:]
        elif deed < 0.5 and i < len(data):
            data[i] ^= 1 << rng.randrange(8)
        elif deed < 0.7:
            some = [rng.randbytes(n), b"9" * n, b"{" * n, b"[" * 20000]
            some += [b'"', b"\n", b"\xff", b"\\ud800"]
            data[i:i] = rng.choice(some)
        elif deed < 0.85:
            del data[i : i + n]
        else:
            data[i:i] = data[max(i - n, 0) : i] * rng.choice([1, 3])
    return bytes(data)


def damage_text(rng, file):
    file.write_bytes(damage_bytes(rng, file.read_bytes()))


def damage_json(rng, file):
    if rng.random() < 0.3:
        damage_text(rng, file)
        return
    data = damage_structure(rng, json.loads(file.read_text()))
    text = json.dumps(data, ensure_ascii=rng.random() < 0.5)
    if isinstance(data, dict) and data and rng.random() < 0.1:  # a key twice
        key = json.dumps(rng.choice(list(data)))
        text = text[:-1] + f", {key}: {json.dumps(wrong_value(rng))}" + "}"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))


def damage_safetensors(rng, file):
    """A safetensors file is the length of its header, the header in JSON, and the weights."""
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length]
    weights = data[8 + length :]
    deed = rng.random()
    if deed < 0.15:
        wrong = [0, 1, length - 1, length + 1, length + 8, len(data), len(data) - 8, 10**8]
        wrong += [10**8 + 1, 2**31, 2**63, 2**64 - 1, rng.randrange(2 * length)]
        file.write_bytes(struct.pack("<Q", rng.choice(wrong)) + header + weights)
    elif deed < 0.3:
        file.write_bytes(data[: 8 + length] + damage_bytes(rng, weights))
    elif deed < 0.35:
        file.write_bytes(damage_bytes(rng, data))
    else:
        if deed < 0.55:
            header = damage_bytes(rng, header)
        else:
            entries = damage_entries(rng, json.loads(header), len(weights))
            header = json.dumps(entries).encode("utf-8", "surrogatepass")
            if rng.random() < 0.1:
                header = b'{"x": 1, ' + header[1:]
        file.write_bytes(struct.pack("<Q", len(header)) + header + weights)


DTYPES = [
    "F32", "F16", "BF16", "F64", "I8", "U8", "I64", "U64", "BOOL", "F4", "F8_E4M3", "F8_E5M2",
    "F8_E8M0", "F6_E2M3", "C64", "f32", "", "X", 3, None,
]  # fmt: skip
NAMES = [
    "x", "", "a\nb", "../x", "__metadata__", "lm_head.weight",
    "model.layers.0.self_attn.rotary_emb.inv_freq",
]  # fmt: skip


def damage_entries(rng, entries, size):
    """Change what a header, parsed, says of one tensor; size: bytes of all of them."""
    name = rng.choice(sorted(entries))
    entry = entries[name]
    deed = rng.random()
    if deed < 0.3:
        entry["dtype"] = rng.choice(DTYPES)
    elif deed < 0.5:
        offsets = entry.get("data_offsets", [0, 0])
        i = rng.randrange(2)
        wrong = [0, -1, offsets[i] + 1, offsets[i] - 1, offsets[1 - i], size, size + 1]
        wrong += [2**62, 2**64, 1e9, "0", None]
        offsets[i] = rng.choice(wrong)
        several = [offsets, offsets, offsets[::-1], offsets[:1], offsets * 2]
        entry["data_offsets"] = rng.choice(several)
    elif deed < 0.75:
        shape = entry.get("shape", [1])
        wrong = [shape[::-1], shape + [1], shape[:-1], [1] + shape, [shape[0] * 2] + shape[1:]]
        wrong += [[2**32, 2**32], [2**63], [], [-1], [0], [1.5], [rng.randrange(40)], "x", None]
        entry["shape"] = rng.choice(wrong)
    elif deed < 0.85:
        entries[rng.choice([*NAMES, name + ".x"])] = entries.pop(name)
    else:
        entries = damage_structure(rng, entries)
    return entries


# ------------------------------------------------------------------------------------------ A case


def use_model(folder):
    model = load_model(folder)
    ids = torch.tensor([[1, 2, 3]]) % model.config.vocab_size
    model(ids)
    model(ids, cache=KVCache(model.config, 1))


def use_adapters(folder):
    load_model(folder / "base", adapter=folder)


def use_tokenizer(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.decode(tokenizer.encode("hello wörld <s>"))
    tokenizer.decode([0, 1, 39, 10**6], skip_special_tokens=True)
    tokenizer.token_id(tokenizer.special("eos_token"))
    tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)


def attempt(use, folder, what, limit=SECONDS):
    """Run use(folder); returns whether it worked, and fails the test if it ended in any way but
    one of the two allowed."""
    OPENED.clear()
    refusal = None
    begin = time.process_time()
    WATCHING[0] = True
    try:
        use(folder)
    except InputError as e:
        refusal = str(e)
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # a panic of Rust code is no Exception
        raise AssertionError(f"{what}: {type(e).__name__}: {e}") from e
    finally:
        WATCHING[0] = False
    seconds = time.process_time() - begin
    assert seconds < limit, f"{what}: {seconds:.1f} s"
    elsewhere = [path for path in OPENED if not may_be_opened(path, folder)]
    assert not elsewhere, f"{what}: opened {elsewhere}"
    if refusal is None:
        return True
    assert refusal, what
    assert "\n" not in refusal, f"{what}: {refusal!r}"
    assert len(refusal) < 2000, f"{what}: {refusal!r}"
    return False


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """A folder that names a hub id is not looked up, nor in a cache that this machine may have."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))


def most_memory():
    """Bytes that this process has held at once so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def fuzz(source, tmp_path, name, damage, use):
    """CASES times: damage one of the files of that name in a copy of the folder, use it, mend it.
    Both endings must occur, or the damage was of one kind."""
    folder = shutil.copytree(source, tmp_path / "case")
    files = sorted(folder.glob(name))
    sound = {file: file.read_bytes() for file in files}
    what = f"{source.name}, {name}"
    # torch imports on the way
    assert attempt(use, folder, f"{what}, undamaged", limit=60), "the sound folder must load"
    before = most_memory()
    worked = 0
    for seed in range(CASES):
        rng = random.Random(f"{source.name} {name} {seed}")
        file = rng.choice(files)
        damage(rng, file)
        worked += attempt(use, folder, f"{what}, seed {seed}")
        file.write_bytes(sound[file])
    grown = most_memory() - before
    assert grown < 300e6, f"loading damaged files took {grown:,} bytes"
    assert 0 < worked < CASES, f"{worked} of {CASES} worked"


@pytest.mark.parametrize("layout, name", [
    ("dense", "config.json"),
    ("shards", "config.json"),
    ("dms", "config.json"),
    ("adapter", "config.json"),
    ("neuron", "dms_metadata.json"),
    ("shards", "model.safetensors.index.json"),
])
def test_damaged_settings(sound, tmp_path, layout, name):
    fuzz(sound[layout], tmp_path, name, damage_json, use_model)


@pytest.mark.parametrize("layout, name", [
    ("dense", "model.safetensors"),
    ("shards", "model-*.safetensors"),
    ("dms", "model.safetensors"),
    ("adapter", "dms_adapters.safetensors"),
    ("adapter", "base/model.safetensors"),
])
def test_damaged_weights(sound, tmp_path, layout, name):
    fuzz(sound[layout], tmp_path, name, damage_safetensors, use_model)


@pytest.mark.parametrize("name, damage", [
    ("dms_adapters.safetensors", damage_safetensors),
    ("config.json", damage_json),
])
def test_damaged_adapters_laid_over_a_model(sound, tmp_path, name, damage):
    fuzz(sound["adapter"], tmp_path, name, damage, use_adapters)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_tokenizers(sound, tmp_path, name):
    fuzz(sound["dense"], tmp_path, name, damage_json, use_tokenizer)


def test_damaged_templates(sound, tmp_path):
    fuzz(sound["template"], tmp_path, "chat_template.jinja", damage_text, use_tokenizer)
