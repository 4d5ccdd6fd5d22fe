"""Text for the retrofit: documents, their order, their files; and how a retrofit is measured."""

import copy
import itertools
import json
import re
import subprocess
import sys
import threading
import time

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import torch
from conftest import REPOSITORY, in_hub_cache, small_model
from tokenizers import decoders, models, pre_tokenizers

import dms
import evaluate
from checkpoint import load_tokenizer
from common import InputError, read_json
from data import TextData, ahead, settling_sequences, training_files

TOKENIZER = load_tokenizer(REPOSITORY / "toy" / "teacher")
SENTENCE = "There was a number on the door of the old house by the river."
ASKED = {"role": "user", "content": "How many?"}
TOLD = {"role": "assistant", "content": "Six."}
SYSTEM = {"role": "system", "content": "Be brief."}


def text_data(source, seq_len=8, batch_size=1, seed=0, tokenizer=TOKENIZER, **more):
    return TextData(str(source), tokenizer, 10**6, seq_len, batch_size, seed, **more)


def texts(numbers):
    return [{"text": f"{number}. {SENTENCE}"} for number in numbers]


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_parquet(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=20)
    return file


def number_in(ids):
    return int(re.match(r"\d+", TOKENIZER.decode(ids.tolist()))[0])


def numbers(data, count, place=None):
    """The numbers of documents that are longer than a sequence, so that each has one."""
    return [number_in(ids[0]) for ids, _, _ in itertools.islice(data.batches(0, place), count)]


def held_out_numbers(data, count):
    return [number_in(sequence) for sequence in data.held_out(count)[0]]


def first_document(file, tokenizer=TOKENIZER):
    ids, lengths = text_data(file, 300, tokenizer=tokenizer).held_out(1)
    return ids[0, : lengths[0][0]].tolist()


@pytest.fixture
def three_files(tmp_path):
    write_parquet(tmp_path / "a.parquet", texts(range(70)))
    write_lines(tmp_path / "b.jsonl", texts(range(70, 100)))
    write_parquet(tmp_path / "c.parquet", texts(range(100, 137)))
    return tmp_path


# --------------------------------------------------------------------------------------- Documents


def openr1(generations, is_right, **more):
    wrong = {"problem": "How many?", "messages": [ASKED, {"role": "assistant", "content": "Nine."}]}
    return {**wrong, "generations": generations, "correctness_math_verify": is_right, **more}


def sharegpt(*turns):
    return {"conversations": [{"from": who, "value": value} for who, value in turns]}


CHAT = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\nSix.<|im_end|>"
BRIEF = "<|im_start|>system\nBe brief.<|im_end|>\n"
SPELLINGS = [
    ({"text": SENTENCE}, SENTENCE + "<|im_end|>"),
    ({"text": SENTENCE + "<|im_end|>"}, SENTENCE + "<|im_end|>"),
    ({"messages": [SYSTEM, ASKED, TOLD]}, BRIEF + CHAT),
    ({"messages": [SYSTEM, ASKED]}, (BRIEF + CHAT).rpartition("\n<|im_start|>")[0]),
    ({"messages": [{**ASKED, "tool_calls": None}, TOLD]}, CHAT),
    (sharegpt(("human", "How many?"), ("gpt", "Six.")), CHAT),
    (sharegpt(("system", "Be brief."), ("user", "How many?"), ("assistant", "Six.")), BRIEF + CHAT),
    ({"conversations": [ASKED, TOLD]}, CHAT),
    ({"prompt": "How many?", "response": "Six."}, CHAT),
    ({"prompt": [SYSTEM, ASKED], "response": "Six."}, BRIEF + CHAT),
    ({"prompt": "How many?", "completion": "Six."}, CHAT),
    ({"prompt": [ASKED], "completion": [TOLD]}, CHAT),
    ({"question": "How many?", "answer": "Six."}, CHAT),
    ({"instruction": "How many?", "input": "", "output": "Six."}, CHAT),
    ({"instruction": "How", "input": "many?", "output": "Six."}, CHAT.replace("How ", "How\n\n")),
    ({"instruction": "How many?", "output": "Six."}, CHAT),
    (openr1(["Five.", "Six.", "Seven."], [False, True, True]), CHAT),
    (openr1(["Five.", "Six."], [None, True]), CHAT),
    (openr1(["Five.", "Six."], [True, True], is_reasoning_complete=[False, True]), CHAT),
]


@pytest.mark.parametrize("row, document", SPELLINGS)
@pytest.mark.parametrize("write", [write_lines, write_parquet])
def test_each_spelling_gives_its_document_with_one_end_token(row, document, write, tmp_path):
    kind = "jsonl" if write is write_lines else "parquet"
    assert TOKENIZER.decode(first_document(write(tmp_path / f"a.{kind}", [row, row]))) == document


def test_the_paragraphs_of_a_txt_file_are_its_documents(tmp_path):
    (tmp_path / "a.txt").write_text("One.\nStill one.\n\n  \n\n  Two.\r\n\r\nThree.\n\n")
    data = text_data(tmp_path / "a.txt", 40)
    ids, lengths, _ = next(data.batches(0))
    found = {TOKENIZER.decode(part[:-1].tolist()) for part in ids[0].split(lengths[0])[:-1]}
    assert found == {"One.\nStill one.", "Three."}
    assert TOKENIZER.decode(first_document(tmp_path / "a.txt")) == "  Two.<|im_end|>"


def test_rows_without_a_verified_solution_are_left_out_without_a_word(tmp_path, capsys):
    cases = ([False, True], [False, False], [None, None], None)
    rows = [openr1([f"{i} bad", f"{i} good"], cases[i % 4 if i > 1 else 0]) for i in range(60)]
    ids, _, _ = next(text_data(write_parquet(tmp_path / "a.parquet", rows), 400).batches(0))
    text = TOKENIZER.decode(ids[0].tolist())
    found = [int(number) for number in re.findall(r"(\d+) good", text)]
    assert len(found) > 10 and all(number % 4 == 0 for number in found)
    assert "bad" not in text and "Nine" not in text and capsys.readouterr().err == ""


def test_rows_that_cannot_be_used_are_skipped_and_named_once(tmp_path, capsys):
    half = "\ud800"  # half a character
    bad = [{"text": 5}, {"messages": "text"}, {"messages": ["x"]}, {"messages": []},
           {"messages": [{"role": "user", "content": None}]}, {"conversations": [{"from": ["x"]}]},
           {"prompt": "a"}, {"prompt": 5, "response": "b"}, {"other": 1}, ["text"], {"text": half},
           {"messages": [{"role": "user", "content": half}]}, {"text": ""}, {"messages": None},
           openr1(None, [True]), openr1(["a"], True)]  # fmt: skip
    file = write_lines(tmp_path / "a.jsonl", [*texts([0, 1]), *bad, *texts(range(2, 100))])
    file.write_text(file.read_text() + "no JSON\n")
    data = text_data(file)
    assert set(numbers(data, 300)) == set(range(100)) - {1, *(n - len(bad) for n in (51, 101))}
    held_out_numbers(data, 3)
    said = capsys.readouterr().err.splitlines()
    lines = [*range(3, 3 + len(bad)), 101 + len(bad)]
    named = [int(re.search(r"a.jsonl: document (\d+) is skipped: ", line)[1]) for line in said]
    assert sorted(named) == lines


# ----------------------------------------------------------------------- At the edges of a template

QWEN = (  # Qwen3's shape
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set parts = m.content.split('</think>') %}"
    "{% set thought = m.reasoning_content or parts[0].split('<think>')[-1] if parts[1:] or "
    "m.reasoning_content else '' %}{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{{ thought.strip('\n') }}\n</think>\n\n{% endif %}{{ parts[-1].lstrip('\n') }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}")
R1 = (  # that of DeepSeek's distilled models, whose prompt begins the thought
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}<|A|>"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|A|><think>\n{% endif %}")
LLAMA = (  # Llama 3.2's, which writes the date
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ date_string }}{% for m in messages %}<|A|>{{ m.role }}\n\n{{ m.content }}<|eot|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|A|>assistant\n\n{% endif %}")
OTHER = QWEN.replace("<think>\n{{", "[THINK]{{").replace("\n</think>\n\n{%", "[/THINK]{%")
Q = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
L = "26 Jul 2024<|A|>user\n\nHow many?<|eot|><|A|>assistant\n\n"
R = "<|im_start|>How many?<|A|><think>\n"
THOUGHT = "<think>\nOkay\n\nso\n</think>\n\nSix."
INLINE = {"content": THOUGHT}
APART = {"content": "Six.", "reasoning_content": "Okay\n\nso"}
OPEN = THOUGHT.removeprefix("<think>\n")
EDGES = [
    (QWEN, INLINE, Q, THOUGHT + "<|im_end|>"),
    (QWEN, APART, Q, THOUGHT + "<|im_end|>"),
    (QWEN, {"content": OPEN}, Q, THOUGHT + "<|im_end|>"),  # as a server gives R1's answers
    (QWEN, {"content": "Six."}, Q + "<think>\n\n</think>\n\n", "Six.<|im_end|>"),
    (R1, INLINE, R, OPEN + "<|im_end|>"),
    (R1, APART, R, OPEN + "<|im_end|>"),
    (R1, {"content": OPEN}, R, OPEN + "<|im_end|>"),
    (R1, {"content": "<think>Okay</think>Six."}, R, "Okay</think>Six.<|im_end|>"),
    (R1, {"content": "Six."}, R, "\n</think>\n\nSix.<|im_end|>"),  # as R1 does without a thought
    (R1, {"content": "\n" + THOUGHT}, R, OPEN + "<|im_end|>"),
    (LLAMA, INLINE, L, THOUGHT + "<|eot|>"),
    (LLAMA, APART, L, THOUGHT + "<|im_end|>"),
    (LLAMA, {"content": "\nSix."}, L, "\nSix.<|eot|>"),  # no token across the edge
    (OTHER, APART, Q, "[THINK]Okay\n\nso[/THINK]Six.<|im_end|>"),
]


def tokenizer_with(template, folder):
    """Bytes, two line breaks as one token, as real ones have it, and special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE({word: i for i, word in enumerate([*alphabet, "ĊĊ"])}, [("Ċ", "Ċ")])
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|A|>", "<|eot|>"])
    fast.add_tokens(["<think>", "</think>"])
    fast.save(str(folder / "tokenizer.json"))
    config = {"eos_token": {"content": "<|im_end|>"}, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


@pytest.mark.parametrize("template, answer, prompt, generated", EDGES)
def test_a_document_is_what_the_model_would_have_seen_and_generated(
        template, answer, prompt, generated, tmp_path):
    tokenizer = tokenizer_with(template, tmp_path)
    row = {"messages": [ASKED, {"role": "assistant", **answer}]}
    ids = first_document(write_lines(tmp_path / "a.jsonl", [row, row]), tokenizer)
    expected = [tokenizer.encode(text, add_special_tokens=False) for text in (prompt, generated)]
    assert tokenizer.decode(ids) == prompt + generated
    assert ids == sum(expected, [])


def test_messages_reach_the_template_as_they_are(tmp_path):
    call = {"function": {"name": "f", "arguments": "{}"}}
    messages = [ASKED, {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": [{"type": "text", "text": "6"}]}, {"role": "assistant"}]
    tokenizer = tokenizer_with("{% for m in messages %}{{ m | tojson }};{% endfor %}", tmp_path)
    ids = first_document(write_lines(tmp_path / "a.jsonl", [{"messages": messages}] * 2), tokenizer)
    *seen, end = tokenizer.decode(ids).split(";")
    assert [json.loads(message) for message in seen] == messages and end == "<|im_end|>"


# ------------------------------------------------------------------------------- Order and packing


def test_every_epoch_is_a_permutation_of_what_is_not_held_out(three_files):
    data = text_data(three_files)
    held = {1, 51, 71, 101}
    assert held_out_numbers(data, 6) == [1, 51, 71, 101, 1, 51]
    found = numbers(data, 2 * 133)
    for epoch in (found[:133], found[133:]):
        assert sorted(epoch) == sorted(set(range(137)) - held) != epoch
    assert found[:133] != found[133:]


def test_the_order_is_a_function_of_the_seed_alone(three_files):
    found = [numbers(text_data(three_files, seed=seed), 133) for seed in (0, 0, 1, 2)]
    assert found[0] == found[1]
    assert len(set(map(tuple, found))) == 3
    firsts = [numbers(text_data(three_files, seed=seed), 1)[0] for seed in range(12)]
    assert {(number >= 70) + (number >= 100) for number in firsts} == {0, 1, 2}  # files, too
    assert held_out_numbers(text_data(three_files, seed=3), 4) == [1, 51, 71, 101]


def test_from_every_place_the_stream_goes_on_as_if_uninterrupted(three_files, rng):
    for seq_len, batch_size in ((8, 1), (60, 2), (33, 3)):
        data = text_data(three_files, seq_len, batch_size, seed=5)
        whole = list(itertools.islice(data.batches(0), 160))
        for step in range(0, 150, 5 if batch_size == 1 else 7):
            place = json.loads(json.dumps(whole[step][2]))
            encode = data.encode
            asked = []
            data.encode = lambda *row: asked.append(row) or encode(*row)
            rest = list(itertools.islice(data.batches(step, place), rng.randint(1, 8)))
            data.encode = encode
            assert len(asked) == len(rest) or seq_len > 8  # nothing before the place is encoded
            for (ids, lengths, place), expected in zip(rest, whole[step + 1 :]):
                assert ids.equal(expected[0]) and (lengths, place) == expected[1:]
    write_lines(three_files / "d.jsonl", texts([1, 2]))
    with pytest.raises(InputError, match="4 files, but 3 when the run began"):
        next(text_data(three_files).batches(0, place))


def test_documents_lie_end_to_end_and_their_lengths_tell_where(tmp_path, rng):
    rows = [{"text": (SENTENCE * rng.randint(1, 4))[rng.randrange(40) :]} for _ in range(90)]
    tokens = {tuple(TOKENIZER.encode(row["text"]) + [TOKENIZER.end_id]) for row in rows}
    file = write_lines(tmp_path / "a.jsonl", rows)
    across = text_data(file, 100, 3, pack_across=True)
    batches = zip(text_data(file, 100, 3).batches(0), across.batches(0))
    for (ids, documents, place), other in itertools.islice(batches, 40):
        assert other[0].equal(ids) and other[1:] == ([[100]] * 3, place)
        assert ids.shape == (3, 100) and ids.dtype == torch.int64
        assert [sum(lengths) for lengths in documents] == [100] * 3
        for sequence, lengths in zip(ids, documents):
            *whole, last = (tuple(part.tolist()) for part in sequence.split(lengths))
            assert all(part in tokens for part in whole)
            assert any(text[: len(last)] == last for text in tokens)
    assert across.held_out(2)[1] == [[100]] * 2


# ------------------------------------------------------------------------------------------- Files


@pytest.mark.parametrize("name, content, message", [
    ("no.txt", None, "no.txt: not a file or folder here"),
    ("some.csv", b"a,b", "some.csv: no .txt, .jsonl, .parquet file"),
    ("", None, "no .txt, .jsonl, .parquet file"),
    ("a.jsonl", b"{}\nno JSON\n", "no usable document; .*a.jsonl: document 2 is skipped"),
    ("a.txt", b"\xe9\n\n\xe9", "a.txt: not readable as text"),
    ("a.txt", b"One.\n\n", "a.txt: fewer than 2 documents"),
    ("a.parquet", b"PAR1 and no more", "a.parquet: pyarrow cannot read it"),
    ("a.jsonl", b'{"chosen": 1, "id": 2}\n' * 200,
     "its columns are .'chosen', 'id'.; wanted are one of: .*messages; .*question . answer"),
])  # fmt: skip
def test_a_source_that_cannot_be_used_is_refused_at_once(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as refused:
        text_data(tmp_path / name)
    assert "\n" not in str(refused.value)


def test_what_is_wrong_with_parquet_is_said_as_it_is(tmp_path, monkeypatch):
    file = write_parquet(tmp_path / "a.parquet", [{"chosen": "a", "id": 1}] * 3)
    with pytest.raises(InputError, match="a.parquet: its columns are .'chosen', 'id'.; wanted"):
        text_data(file)
    for error in (pyarrow.ArrowMemoryError("malloc of size 9 failed"),
                  pyarrow.ArrowNotImplementedError("Unsupported type")):
        def read(*_, error=error):
            raise error
        monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read", read)
        with pytest.raises(InputError, match=f"a.parquet: .*{error}") as refused:
            text_data(write_parquet(file, texts([1, 2])))
        assert "download" not in str(refused.value)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r'a\.parquet.*pip install -e "\.\[data\]"'):
        text_data(file)


TRAIN = [f"data/train-0000{i}-of-00003.parquet" for i in range(3)]
OTHERS = ["all/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "README.md"]


def test_the_training_files_of_a_repository_with_several_configs_are_chosen():
    assert training_files("name", [*TRAIN, *OTHERS][::-1]) == TRAIN
    files = ["b/train/1.parquet", "data/test.parquet", "a-train.parquet", "train.md"]
    assert training_files("name", files) == ["a-train.parquet", "b/train/1.parquet"]
    assert training_files("name", ["b.parquet", "a/c.parquet"]) == ["a/c.parquet", "b.parquet"]
    with pytest.raises(InputError, match="name: no parquet files"):
        training_files("name", ["README.md", "train.json"])


@pytest.fixture
def dataset(tmp_path):
    for i, name in enumerate(TRAIN):
        write_parquet(tmp_path / "source" / name, texts(range(30 * i, 30 * i + 30)))
    return tmp_path / "source"


def test_a_hub_dataset_s_files_are_fetched_when_they_are_reached(dataset, monkeypatch):
    asked = []

    class Hub:
        def snapshot_download(self, name, revision, **_):
            return f"cache/{revision or 'commit'}"

        def list_repo_files(self, name, revision, **_):
            assert revision == "commit"
            return [*TRAIN, *OTHERS]

        def hf_hub_download(self, name, file, revision, **_):
            assert revision == "commit"
            asked.append(file)
            return str(dataset / file)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    data = text_data("owner/name")
    assert (data.revision, asked) == ("commit", TRAIN[:1])
    found = []
    for ids, _, _ in itertools.islice(data.batches(0), 87):
        found.append(number_in(ids[0]))
        assert {TRAIN[number // 30] for number in found} == set(asked[1:])
    assert sorted(found) == sorted(set(range(90)) - {1, 31, 61})
    assert numbers(text_data("owner/name@commit"), 87) == found


def test_without_network_a_dataset_is_what_the_cache_holds(dataset, tmp_path):
    """In a process of its own: the hub's library reads the environment when it is imported."""
    environment = in_hub_cache(tmp_path, name=dataset)
    (tmp_path / "models--owner--name").rename(tmp_path / "datasets--owner--name")
    code = """
from test_data import InputError, TRAIN, held_out_numbers, text_data
data = text_data("owner/name")
assert data.files == TRAIN and held_out_numbers(data, 3) == [1, 31, 61]
assert text_data("owner/name@" + data.revision).files == TRAIN
for name in ("owner/other", "owner/name@other", "no/no/no"):
    try:
        text_data(name)
    except InputError as e:
        print(e)
"""
    environment["PYTHONPATH"] = f"{REPOSITORY}:{REPOSITORY / 'tests'}"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    assert "owner/name: no answer from the hub; its cache has 3 files" in run.stderr
    refused = run.stdout.splitlines()
    assert len(refused) == 3 and all("check name and network" in line for line in refused)


# ------------------------------------------------------------------------------------------ Ahead


def test_items_are_made_ahead_in_their_order_and_errors_come_in_their_turn():
    before = threading.active_count()
    made = []

    def make():
        for i in range(6):
            made.append(i)
            yield i
        raise InputError("no more")

    items = ahead(make())
    for i in range(6):
        assert next(items) == i
        time.sleep(0.02)
        assert len(made) == min(i + 2, 6)
    with pytest.raises(InputError, match="no more"):
        next(items)
    items = ahead(itertools.count())
    assert list(itertools.islice(items, 5)) == list(range(5))
    items.close()
    assert threading.active_count() == before


# --------------------------------------------------------------------------------------- Measuring


class Documents:
    """Random held-out documents, two to a sequence."""

    seq_len = 2048

    def held_out(self, count):
        ids = torch.randint(67, (count, 60), generator=torch.Generator().manual_seed(0))
        return ids, [[25 + i, 30 - i] for i in range(count)]


@pytest.mark.parametrize("shift", [0, 1])
def test_the_kl_is_that_of_the_masked_computation_after_the_settling_sequences(shift):
    model = small_model(dms=dms.DMSConfig(window=4, shift=shift), keep=0.5)
    reference = copy.deepcopy(model)
    reference.config.dms.disable_eviction = True
    ids, documents = Documents().held_out(11)
    assert settling_sequences(2048) == 8
    nats = []
    for sequence, lengths in zip(ids[8:], documents[8:]):
        for document in sequence[: sum(lengths)].split(lengths):
            log_q, log_p = (m(document[None]).log_softmax(-1)[0, :-1] for m in (model, reference))
            nats.append((log_p.exp() * (log_p - log_q)).sum(-1))
    kl, count, cache = evaluate.kl_on_text(model, reference, Documents(), 3)
    assert count == 6 and cache.compression_ratio() > 1.2 and kl > 0.01
    assert kl == pytest.approx(torch.cat(nats).mean().item(), rel=1e-3)
    kl, _, _ = evaluate.kl_on_text(reference, model, Documents(), 3)  # the reference never evicts
    assert abs(kl) < 1e-5


def test_a_sliding_window_holds_so_many_pairs():
    model = evaluate.sliding_window(small_model(), 7)
    _, documents, cache = evaluate.kl_on_text(model, model, Documents(), 3)
    assert cache.ended_pairs == 7 * documents * 2 * 2


def test_the_offset_is_settled_on_a_little_more_than_the_target():
    model = small_model(dms=dms.DMSConfig(window=1, target_cr=3.0), keep=0.1)
    model.config.dms.offset = -30.0  # evicts everything
    ratio = evaluate.settle_offset(model, Documents())
    assert 1.02 * 3 <= ratio < 3.2 and model.config.dms.offset > -30  # from 20: few texts
    model.config.dms.target_cr = 9.0
    model.config.dms.offset = 3.0
    ratio = evaluate.settle_offset(model, Documents())  # out of reach
    assert ratio < 9 and model.config.dms.offset == 3.0


def test_the_table_of_the_shipped_results_is_printed(capsys):
    columns = read_json(REPOSITORY / "toy" / "retrofitted" / "results.json")["results"]
    evaluate.print_table(columns)
    said = capsys.readouterr().out
    assert all(name in said for name in ("needles", "KL to the teacher", "peak bytes in pages"))
