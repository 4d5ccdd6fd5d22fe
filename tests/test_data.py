"""Text for the retrofit: documents, their order, their files; and how a retrofit is measured."""
import copy
import itertools
import json
import re
from types import SimpleNamespace
from unittest import mock

import huggingface_hub
import pyarrow.parquet
import pytest
import torch
from conftest import REPOSITORY, small_model

import dms
import evaluate
from checkpoint import load_tokenizer
from common import InputError
from data import TextData, conversation

TOKENIZER = load_tokenizer(REPOSITORY / "toy" / "teacher")
SENTENCE = "There was a number on the door of the old house by the river."
ASKED = {"role": "user", "content": "How many?"}
TOLD = {"role": "assistant", "content": "Six."}
SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\nSix.<|im_end|>"
BRIEF = "<|im_start|>system\nBe brief.<|im_end|>\n"
WANTED = "its columns are .'id'.; wanted are one of: .*messages.*question', 'answer"
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
    "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<|A|>{{ m.role }}\n\n{{ m.content }}"
    "<|eot|>{% endfor %}{% if add_generation_prompt %}<|A|>assistant\n\n{% endif %}")
Q = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
L = "26 Jul 2024<|A|>user\n\nHow many?<|eot|><|A|>assistant\n\n"
R = "<|im_start|>How many?<|A|><think>\n"
THOUGHT = "<think>\nOkay\n\nso\n</think>\n\nSix."
APART = {"content": "Six.", "reasoning_content": "Okay\n\nso"}
OPEN = THOUGHT.removeprefix("<think>\n")


def text_data(source, seq_len=8, batch_size=1, seed=0):
    return TextData(str(source), TOKENIZER, 10**6, seq_len, batch_size, seed)


def texts(numbers):
    return [{"text": f"{number}. {SENTENCE}"} for number in numbers]


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(rows, bytes):
        file.write_bytes(rows)
    elif file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def numbers(batches, count):
    """The numbers of documents that are longer than a sequence, so that each has one."""
    ids = [ids[0] for ids, *_ in itertools.islice(batches, count)]
    return [int(re.match(r"\d+", TOKENIZER.decode(each.tolist()))[0]) for each in ids]


def first_document(file):
    ids, [[length, *_]] = text_data(file, 300).held_out(1)
    return TOKENIZER.decode(ids[0, :length].tolist())


def openr1(generations, is_right, **more):
    return {"problem": "How many?", "generations": generations, "correctness_math_verify": is_right,
            "messages": [ASKED, {"role": "assistant", "content": "Nine."}], **more}


@pytest.mark.parametrize("row, document", [
    ({"text": SENTENCE}, SENTENCE + "<|im_end|>"),
    ({"messages": [SYSTEM, ASKED, TOLD]}, BRIEF + CHAT),
    ({"messages": [SYSTEM, ASKED]}, (BRIEF + CHAT).rpartition("\n<|im_start|>")[0]),
    ({"messages": [{**ASKED, "tool_calls": None}, TOLD]}, CHAT),
    ({"conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Six."}]},
     CHAT),
    ({"conversations": [ASKED, {**TOLD, "role": "gpt"}]}, CHAT),
    ({"prompt": [SYSTEM, ASKED], "completion": [TOLD]}, BRIEF + CHAT),
    *[({asked: "How many?", told: "Six."}, CHAT) for asked, told in (
        ("prompt", "response"), ("prompt", "completion"), ("question", "answer"),
        ("instruction", "output"))],
    ({"instruction": "How many?", "input": "", "output": "Six."}, CHAT),
    ({"instruction": "How", "input": "many?", "output": "Six."}, CHAT.replace("How ", "How\n\n")),
    (openr1(["Five.", "Six.", "Seven."], [None, True, True]), CHAT),
    (openr1(["Five.", "Six."], [True, True], is_reasoning_complete=[False, True]), CHAT)])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_each_spelling_gives_its_document_with_one_end_token(row, document, kind, tmp_path):
    assert first_document(write(tmp_path / f"a.{kind}", [row, row])) == document


def test_the_paragraphs_of_a_txt_file_are_its_documents(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("One.\nStill one.\n\n  \n\n  Two.\r\n\r\n")
    ids, [[length, *_]] = next(text_data(file, 40).batches(0))
    assert TOKENIZER.decode(ids[0, :length].tolist()) == "One.\nStill one.<|im_end|>"
    assert first_document(file) == "  Two.<|im_end|>"


def test_rows_without_a_verified_solution_are_left_out_without_a_word(tmp_path, capsys):
    cases = ([False, True], [False, False], [None, None], None)
    rows = [openr1([f"{i} bad", f"{i} good"], cases[i % 4 if i > 1 else 0]) for i in range(60)]
    ids, _ = next(text_data(write(tmp_path / "a.parquet", rows), 400).batches(0))
    text = TOKENIZER.decode(ids[0].tolist())
    assert {int(number) % 4 for number in re.findall(r"(\d+) good", text)} == {0}
    assert "bad" not in text and "Nine" not in text and capsys.readouterr().err == ""


def test_rows_that_cannot_be_used_are_skipped_and_named_once(tmp_path, capsys):
    bad = [{"text": 5}, {"messages": "text"}, {"messages": ["x"]}, {"other": 1}, ["text"],
           {"messages": [{"role": "user", "content": None}]}, {"conversations": [{"from": ["x"]}]},
           {"prompt": "a"}, {"prompt": 5, "response": "b"}, {"messages": None}, {"text": "\ud800"},
           {"messages": [{"role": "user", "content": "\ud800"}]}, openr1(None, [True])]
    file = write(tmp_path / "a.jsonl", [*texts([0, 1]), *bad, *texts(range(2, 30))])
    file.write_text(file.read_text() + "no JSON\n")
    assert set(numbers(text_data(file).batches(0), 90)) == {0, *range(2, 30)}
    said = capsys.readouterr().err.splitlines()
    named = [int(re.search(r"a.jsonl: document (\d+) is skipped: ", line)[1]) for line in said]
    assert sorted(named) == [*range(3, 3 + len(bad)), 31 + len(bad)]


def tokenizer_with(template, folder):
    (folder / "tokenizer.json").symlink_to(REPOSITORY / "toy" / "teacher" / "tokenizer.json")
    (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)


@pytest.mark.parametrize("template, answer, prompt, generated", [
    (QWEN, {"content": THOUGHT}, Q, THOUGHT + "<|im_end|>"),
    (QWEN, {"content": OPEN}, Q, THOUGHT + "<|im_end|>"),  # as a server gives R1's answers
    (QWEN, APART, Q, THOUGHT + "<|im_end|>"),
    (QWEN, {"content": "Six."}, Q + "<think>\n\n</think>\n\n", "Six.<|im_end|>"),
    (R1, {"content": "\n" + THOUGHT}, R, OPEN),
    (R1, {"content": OPEN}, R, OPEN),
    (R1, APART, R, OPEN),
    (R1, {"content": "<think>Okay</think>Six."}, R, "Okay\n</think>\n\nSix."),
    (R1, {"content": "Six."}, R, "\n</think>\n\nSix."),  # as R1 does without a thought
    (LLAMA, {"content": THOUGHT}, L, THOUGHT + "<|eot|>"),
    (LLAMA, APART, L, THOUGHT)])
def test_a_document_is_what_the_model_would_have_seen_and_generated(
        template, answer, prompt, generated, tmp_path):
    turns = [ASKED, {"role": "assistant", **answer}]
    assert conversation(tokenizer_with(template, tmp_path), turns) == prompt + generated


def test_messages_reach_the_template_as_they_are(tmp_path):
    call = {"function": {"name": "f", "arguments": "{}"}}
    messages = [ASKED, {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": [{"type": "text", "text": "6"}]}, {"role": "assistant"}]
    tokenizer = tokenizer_with("{% for m in messages %}{{ m | tojson }}\n{% endfor %}", tmp_path)
    for end in range(1, 5):
        seen = conversation(tokenizer, messages[:end]).split("\n")
        expected = [{k: v for k, v in m.items() if v is not None} for m in messages[:end]]
        assert [json.loads(message) for message in seen] == expected


@pytest.fixture
def three_files(tmp_path):
    write(tmp_path / "a.parquet", texts(range(70)))
    write(tmp_path / "b.jsonl", texts(range(70, 100)))
    write(tmp_path / "c.parquet", texts(range(100, 137)))
    return tmp_path


def test_every_epoch_is_a_permutation_that_the_seed_decides(three_files):
    found, again, *others = (numbers(text_data(three_files, seed=seed).batches(0), 2 * 133)
                             for seed in (0, 0, 1, 2, 3, 4, 5))
    for epoch in (found[:133], found[133:]):
        assert sorted(epoch) == sorted(set(range(137)) - {1, 51, 71, 101}) != epoch
    assert found == again and found[:133] != found[133:] and found not in others
    assert len({(other[0] >= 70) + (other[0] >= 100) for other in others}) > 1  # files, too
    held_out = text_data(three_files, seed=3).held_out(6)[0]
    assert numbers(held_out[:, None, None], 6) == [1, 51, 71, 101, 1, 51]


@pytest.mark.parametrize("seq_len, batch_size", [(8, 1), (60, 2), (33, 3)])
def test_from_every_step_the_stream_goes_on_as_if_uninterrupted(three_files, seq_len, batch_size):
    data = text_data(three_files, seq_len, batch_size, seed=5)
    whole = list(itertools.islice(data.batches(0), 160))
    for step in (0, 1, 7, 80, 150):
        rest = itertools.islice(data.batches(step), 5)
        for (ids, lengths), expected in zip(rest, whole[step:]):
            assert ids.equal(expected[0]) and lengths == expected[1]


def test_documents_lie_end_to_end_and_their_lengths_tell_where(tmp_path, rng):
    rows = [{"text": (SENTENCE * rng.randint(1, 4))[rng.randrange(40) :]} for _ in range(90)]
    tokens = {tuple(TOKENIZER.encode(row["text"]) + [TOKENIZER.end_id]) for row in rows}
    data = text_data(write(tmp_path / "a.jsonl", rows), 100, 3)
    for ids, documents in itertools.islice(data.batches(0), 40):
        for sequence, lengths in zip(ids, documents):
            *whole, last = (tuple(part.tolist()) for part in sequence.split(lengths))
            assert all(part in tokens for part in whole)
            assert any(text[: len(last)] == last for text in tokens)


@pytest.mark.parametrize("name, content, message", [
    ("no.txt", None, "no.txt: no file or folder here"),
    ("some.csv", b"a,b", "some.csv: no .txt, .jsonl or .parquet file"),
    ("", None, "no .txt, .jsonl or .parquet file"),
    ("a.txt", b"\xe9\n\n\xe9", "a.txt: not readable as text"),
    ("a.txt", b"One.\n\n", "a.txt: no text .* to hold out"),  # none that may be held out
    ("a.parquet", b"PAR1 and no more", "a.parquet .*magic bytes"),
    ("a.parquet", [{"id": 2}], "a.parquet .*" + WANTED),
    ("a.jsonl", [{"id": 2}] * 200, "document 2 is skipped: " + WANTED)])
def test_a_source_that_cannot_be_used_is_refused_at_once(name, content, message, tmp_path, capsys):
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(InputError) as refused:
        text_data(tmp_path / name)
    assert re.search(message, f"{refused.value}{capsys.readouterr().err}")


@pytest.mark.parametrize("files, chosen", [
    (["all/train-0.parquet", "data/train-1.parquet", "data/train-0.parquet", "data/test.parquet"],
     ["data/train-0.parquet", "data/train-1.parquet"]),  # of several configs and splits
    (["b/train/1.parquet", "data/a.parquet", "a-train.parquet", "train.md"],
     ["a-train.parquet", "b/train/1.parquet"]),
    (["b.parquet", "a/c.parquet"], ["a/c.parquet", "b.parquet"])])
def test_a_hub_dataset_s_files_are_fetched_when_they_are_reached(
        files, chosen, tmp_path, monkeypatch):
    for i, file in enumerate(files):
        write(tmp_path / file, texts(range(30 * i, 30 * i + 30)))
    siblings = [SimpleNamespace(rfilename=file) for file in files]
    info = mock.Mock(return_value=SimpleNamespace(sha="commit", siblings=siblings))
    fetch = mock.Mock(side_effect=lambda name, file, **more: str(tmp_path / file))
    monkeypatch.setattr(huggingface_hub, "dataset_info", info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    data = text_data("owner/name")
    assert (data.files, data.revision) == (chosen, "commit")
    fetch.assert_called_once_with("owner/name", chosen[0], repo_type="dataset", revision="commit")
    found = numbers(data.batches(0), 58)
    assert sorted({number // 30 for number in found}) == sorted(map(files.index, chosen))
    asked = [call.args[1] for call in fetch.mock_calls]
    assert asked[1] == files[found[0] // 30] and set(asked[1:]) == set(chosen)
    assert numbers(text_data("owner/name@commit").batches(0), 58) == found
    info.assert_called_with("owner/name", revision="commit")


@pytest.mark.parametrize("shift", [0, 1])
def test_the_kl_is_that_of_the_masked_computation_after_the_settling_sequences(shift):
    model = small_model(dms=dms.DMSConfig(window=4, shift=shift))
    dense = copy.deepcopy(model)
    dense.config.dms.disable_eviction = True
    ids = torch.randint(67, (20, 60), generator=torch.Generator().manual_seed(0))
    documents = [[25 + i, 30 - i] for i in range(20)]
    data = SimpleNamespace(seq_len=2048, held_out=lambda count: (ids[:count], documents[:count]))
    assert evaluate.settling_sequences(2048) == 8
    nats = []
    for sequence, lengths in zip(ids[8:11], documents[8:11]):
        for document in sequence[: sum(lengths)].split(lengths):
            log_q, log_p = (m(document[None]).log_softmax(-1)[0, :-1] for m in (model, dense))
            nats.append((log_p.exp() * (log_p - log_q)).sum(-1))
    kl, count, cache = evaluate.kl_on_text(model, dense, data, 3)
    assert count == 6 and cache.compression_ratio() > 1.2 and kl > 0.01
    assert kl == pytest.approx(torch.cat(nats).mean().item(), rel=1e-3)
    assert abs(evaluate.kl_on_text(dense, model, data, 3)[0]) < 1e-5  # it never evicts
    window = evaluate.sliding_window(small_model(), 7)
    assert evaluate.kl_on_text(window, window, data, 3)[2].ended_pairs == 7 * count * 2 * 2
