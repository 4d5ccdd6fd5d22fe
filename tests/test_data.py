"""Text for the retrofit: what a document is, their order, where they come from, what is refused."""
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import PIPE

import pyarrow
import pyarrow.parquet
import pytest

from checkpoint import InputError, load_tokenizer
from data import TextData, ahead, training_files

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = load_tokenizer(ROOT / "toy" / "teacher")
VOCABULARY = 10**6
SENTENCE = "There was a number on the door of the old house by the river."


def text_data(source, seq_len=8, batch_size=1, seed=0, **more):
    return TextData(str(source), TOKENIZER, VOCABULARY, seq_len, batch_size, seed, **more)


def texts(numbers):
    return [{"text": f"{number}. {SENTENCE}"} for number in numbers]


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_parquet(file, rows, group=20):
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=group)
    return file


def number_in(ids):
    return int(re.match(r"\d+", TOKENIZER.decode(ids.tolist()))[0])


def numbers(data, rows, place=None):
    """The numbers of the documents that so many batches of one row each begin with. A document is
    longer than the row, so that each has one row."""
    batches = itertools.islice(data.batches(0, place), rows)
    return [number_in(ids[0]) for ids, _, _ in batches]


def held_out_numbers(data, rows):
    return [number_in(row) for row in data.held_out(rows)[0]]


@pytest.fixture
def three_files(tmp_path):
    """A folder with 137 documents: files of different kinds, and row groups of different sizes."""
    write_parquet(tmp_path / "a.parquet", texts(range(70)), group=20)
    write_lines(tmp_path / "b.jsonl", texts(range(70, 100)))
    write_parquet(tmp_path / "c.parquet", texts(range(100, 137)), group=37)
    return tmp_path


# --------------------------------------------------------------------------------------- Documents

ASKED = {"role": "user", "content": "How many?"}
TOLD = {"role": "assistant", "content": "Six."}
SYSTEM = {"role": "system", "content": "Be brief."}
OPENR1 = {"problem": "How many?", "messages": [ASKED, {"role": "assistant", "content": "Nine."}]}


def openr1(generations, is_right, **more):
    return {**OPENR1, "generations": generations, "correctness_math_verify": is_right, **more}


SPELLINGS = [
    ({"text": SENTENCE}, SENTENCE),
    ({"messages": [SYSTEM, ASKED, TOLD]}, [SYSTEM, ASKED, TOLD]),
    ({"conversations": [SYSTEM, ASKED, TOLD]}, [SYSTEM, ASKED, TOLD]),
    ({"prompt": "How many?", "response": "Six."}, [ASKED, TOLD]),
    ({"prompt": [SYSTEM, ASKED], "response": "Six."}, [SYSTEM, ASKED, TOLD]),
    (openr1(["Five.", "Six.", "Seven."], [False, True, True]), [ASKED, TOLD]),
    (openr1(["Five.", "Six."], [None, True]), [ASKED, TOLD]),
    (openr1(["Five.", "Six."], [True, True], is_reasoning_complete=[False, True]), [ASKED, TOLD]),
    *(({"conversations": [{"from": who, "value": "How many?"}, {"from": answers, "value": "Six."}]},
       [ASKED, TOLD]) for who, answers in (("human", "gpt"), ("user", "assistant"))),
    ({"conversations": [{"from": "system", "value": "Be brief."},
                        {"from": "human", "value": "How many?"}]}, [SYSTEM, ASKED]),
]  # fmt: skip


@pytest.mark.parametrize("row, document", SPELLINGS)
@pytest.mark.parametrize("write", [write_lines, write_parquet])
def test_each_spelling_of_a_row_is_the_document_that_it_spells(row, document, write, tmp_path):
    kind = "jsonl" if write is write_lines else "parquet"
    data = text_data(write(tmp_path / f"rows.{kind}", [row, row]), seq_len=150)
    ids, lengths, _ = next(data.batches(0))
    expected = TOKENIZER.encode(document, enable_thinking=True) + [TOKENIZER.end_id]
    assert ids[0, :lengths[0][0]].tolist() == expected


def test_the_paragraphs_of_a_txt_file_are_its_documents(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n\nOne.\nStill one.\n\n  \n\n  Two.\r\n\r\nThree.\n")
    data = text_data(file, seq_len=100)
    ids, lengths, _ = next(data.batches(0))
    found = {TOKENIZER.decode(row[:-1].tolist()) for row in ids[0].split(lengths[0])[:-1]}
    assert found == {"One.\nStill one.", "Three.\n"}
    held = data.held_out(1)
    assert TOKENIZER.decode(held[0][0, :held[1][0][0] - 1].tolist()) == "  Two."


def test_rows_without_a_verified_solution_are_left_out_without_a_word(tmp_path, capsys):
    rows = []
    for i in range(60):
        is_right = [[False, True], [False, False], [None, None], None][i % 4 if i > 1 else 0]
        rows.append(openr1([f"{i} is wrong.", f"{i} is right."], is_right))
    data = text_data(write_parquet(tmp_path / "rows.parquet", rows), seq_len=400)
    ids, _, _ = next(data.batches(0))
    said = TOKENIZER.decode(ids[0].tolist())
    drawn = [int(number) for number in re.findall(r"(\d+) is right", said)]
    assert len(drawn) > 10 and all(number % 4 == 0 for number in drawn)
    assert "is wrong" not in said and "Nine" not in said
    assert capsys.readouterr().err == ""


def test_an_end_token_is_appended_unless_it_is_there(tmp_path):
    end = TOKENIZER.decode([TOKENIZER.end_id])
    file = write_lines(tmp_path / "rows.jsonl", [{"text": "One."}, {"text": "Two." + end}] * 60)
    ids, lengths, _ = next(text_data(file, seq_len=200).batches(0))
    for document in ids[0].split(lengths[0])[:-1]:
        assert document.tolist().count(TOKENIZER.end_id) == 1
        assert document[-1] == TOKENIZER.end_id


def test_of_the_chat_template_thinking_is_asked_and_a_date_that_stays(tmp_path):
    """Templates of Llama 3 write the date of the day, unless they are given one: a run that is
    resumed tomorrow would see other text."""
    tokenizer = load_tokenizer(ROOT / "toy" / "teacher")
    tokenizer.template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ enable_thinking }} {{ messages[0].content }} {{ date_string }}"
    )
    file = write_lines(tmp_path / "rows.jsonl", [{"messages": [ASKED]}] * 2)
    ids, _, _ = next(TextData(str(file), tokenizer, VOCABULARY, 30, 1, 0).batches(0))
    assert tokenizer.decode(ids[0].tolist()).startswith("True How many? 26 Jul 2024")


def test_rows_that_cannot_be_used_are_skipped_and_named_once(tmp_path, capsys):
    half = "\ud800"  # half a character
    bad = [{"text": 5}, {"messages": [{"role": "user", "content": None}]}, {"messages": "text"},
           {"messages": ["x"]}, {"conversations": ["x"]}, {"conversations": [{"from": ["x"]}]},
           {"prompt": "a"}, {"prompt": 5, "response": "b"}, {"other": 1}, {"text": half},
           {"messages": [{"role": "user", "content": half}]}, {"text": ""}, {"messages": None},
           openr1(None, [True]), openr1(["a"], True)]  # fmt: skip
    file = write_lines(tmp_path / "rows.jsonl", [*bad, *texts(range(100))])
    data = text_data(file)
    assert set(numbers(data, 300)) == set(range(100)) - {51 - len(bad), 101 - len(bad)}
    held_out_numbers(data, 3)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(bad), said
    for line in range(1, len(bad) + 1):
        assert sum(f"rows.jsonl: line {line} is skipped" in text for text in said) == 1


def test_a_thousand_useless_rows_on_end_end_the_run(tmp_path):
    file = write_lines(tmp_path / "rows.jsonl", [{"text": 5}, *texts([1])])
    data = text_data(file)
    with pytest.raises(InputError, match="gives no tokens"):
        next(data.batches(0))
    tokens = TOKENIZER.encode(SENTENCE)
    with pytest.raises(InputError, match="gives no tokens"):
        TextData(str(write_lines(file, texts(range(9)))), TOKENIZER, max(tokens), 8, 1, 0)


# ------------------------------------------------------------------------------------------- Order


def test_every_epoch_is_a_permutation_of_what_is_not_held_out(three_files):
    data = text_data(three_files)
    held = {1, 51, 71, 101}
    assert held_out_numbers(data, 4) == sorted(held)
    drawn = numbers(data, 2 * 133)
    for epoch in (drawn[:133], drawn[133:]):
        assert sorted(epoch) == sorted(set(range(137)) - held)
        assert epoch != sorted(epoch)
    assert drawn[:133] != drawn[133:]


def test_the_order_is_a_function_of_the_seed_alone(three_files):
    drawn = [numbers(text_data(three_files, seed=seed), 133) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1]
    assert len(set(map(tuple, drawn))) == 3
    firsts = [numbers(text_data(three_files, seed=seed), 1)[0] for seed in range(12)]
    assert {(number >= 70) + (number >= 100) for number in firsts} == {0, 1, 2}  # files, too


def test_what_is_held_out_is_the_same_for_every_seed_and_repeated_if_it_is_little(three_files):
    for seed in range(3):
        assert held_out_numbers(text_data(three_files, seed=seed), 6) == [1, 51, 71, 101, 1, 51]


def test_from_every_place_the_stream_goes_on_as_if_uninterrupted(three_files, rng):
    for seq_len, batch_size in ((8, 1), (60, 2), (33, 3)):
        data = text_data(three_files, seq_len, batch_size, seed=5)
        whole = list(itertools.islice(data.batches(0), 160))
        for step in range(0, 150, 1 if batch_size == 1 else 7):
            place = json.loads(json.dumps(whole[step][2]))
            again = text_data(three_files, seq_len, batch_size, seed=5)
            rest = list(itertools.islice(again.batches(step, place), rng.randint(1, 8)))
            for (ids, lengths, place), expected in zip(rest, whole[step + 1:]):
                assert ids.equal(expected[0])
                assert (lengths, place) == expected[1:]


def test_nothing_before_a_place_is_made_into_tokens(three_files):
    data = text_data(three_files)
    *_, (_, _, place) = itertools.islice(data.batches(0), 100)
    asked = []
    encode = data.encode
    data.encode = lambda *row: asked.append(row) or encode(*row)
    next(data.batches(0, place))
    assert len(asked) == 1


# ----------------------------------------------------------------------------------------- Packing


def test_documents_lie_end_to_end_and_their_lengths_tell_where(tmp_path, rng):
    rows = []
    for _ in range(90):
        rows.append({"text": " ".join([SENTENCE] * rng.randint(1, 4))[rng.randrange(40):]})
    tokens = {tuple(TOKENIZER.encode(row["text"]) + [TOKENIZER.end_id]) for row in rows}
    data = text_data(write_lines(tmp_path / "rows.jsonl", rows), seq_len=100, batch_size=3)
    for ids, documents, _ in itertools.islice(data.batches(0), 40):
        assert ids.shape == (3, 100) and str(ids.dtype) == "torch.int64"
        assert [sum(lengths) for lengths in documents] == [100] * 3
        for row, lengths in zip(ids, documents):
            *whole, last = (tuple(part.tolist()) for part in row.split(lengths))
            assert all(part in tokens for part in whole)
            assert any(text[:len(last)] == last for text in tokens)
            assert all(n > 1 for n in lengths[:-1]) and lengths[-1] > 0


def test_packed_across_a_row_is_one_document(three_files):
    apart = text_data(three_files, seq_len=64, batch_size=2)
    across = text_data(three_files, seq_len=64, batch_size=2, pack_across=True)
    for one, other in zip(itertools.islice(apart.batches(0), 9), across.batches(0)):
        assert one[0].equal(other[0]) and one[2] == other[2]
        assert other[1] == [[64], [64]] != one[1]
    assert across.held_out(3)[1] == [[64]] * 3


# --------------------------------------------------------------------------------- What is refused


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("no.txt", None, "not found.*hub dataset"),
        ("no/no/no", None, "not found.*hub dataset"),
        ("some.csv", b"a,b", "another kind"),
        ("broken.jsonl", b'{"text": "a"}\nnot json\n', "broken.jsonl: line 2 is not a JSON object"),
        ("latin.txt", b"\xe9\n\n\xe9", "not readable as text"),
        ("empty.txt", b"\n\n  \n\n", "fewer than 2 usable documents"),
        ("one.txt", b"One.\n\n", "fewer than 2 usable documents"),
        ("none.jsonl", b"", "fewer than 2 usable documents"),
        ("damaged.parquet", b"PAR1" + bytes(100) + b"PAR1", "damaged.parquet: not a whole parquet"),
        ("text.parquet", b"text", "text.parquet: not a whole parquet"),
    ],
)
def test_sources_that_cannot_be_used_are_refused_at_once(name, content, message, tmp_path):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=message) as refused:
        text_data(file)
    assert "\n" not in str(refused.value)


def test_folders_and_parquet_files_without_documents_are_refused(tmp_path):
    with pytest.raises(InputError, match="not found, not readable"):
        text_data(tmp_path)
    write_parquet(tmp_path / "a.parquet", [{"a": 1}] * 3)
    with pytest.raises(InputError, match="a.parquet: has none of the columns"):
        text_data(tmp_path)
    write_parquet(tmp_path / "a.parquet", texts([1]))
    with pytest.raises(InputError, match="fewer than 2 usable documents"):
        text_data(tmp_path)


def test_a_later_file_that_is_damaged_is_named_when_it_is_reached(three_files):
    (three_files / "d.parquet").write_bytes(b"PAR1 and no more")
    data = text_data(three_files)
    with pytest.raises(InputError, match="d.parquet: not a whole parquet file; download it again"):
        numbers(data, 200)


def test_a_parquet_file_whose_pages_are_damaged_is_named(tmp_path, rng):
    """Whatever bytes are damaged: it is refused by name, or read."""
    file = write_parquet(tmp_path / "a.parquet", texts(range(200)))
    sound = file.read_bytes()
    refused = 0
    for _ in range(100):
        content = bytearray(sound)
        for _ in range(rng.choice([1, 1, 20])):
            content[rng.randrange(len(content) - 9)] = rng.randrange(256)
        file.write_bytes(content)
        try:
            list(itertools.islice(text_data(file).batches(0), 190))
        except InputError as e:
            assert "a.parquet" in str(e)
            refused += 1
    assert refused > 5


def test_without_pyarrow_only_parquet_files_are_refused(three_files, monkeypatch):
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r'a\.parquet.*pip install -e "\.\[data\]"'):
        text_data(three_files)
    assert held_out_numbers(text_data(three_files / "b.jsonl"), 1) == [71]


# --------------------------------------------------------------------------------------- The hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
INFO = "/api/datasets/owner/name"
TRAIN = [f"data/train-0000{i}-of-00003.parquet" for i in range(3)]
OTHERS = ["all/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "README.md"]
READ = """
import itertools
import json
import os
from pathlib import Path
from checkpoint import InputError
from test_data import COMMIT, held_out_numbers, number_in, text_data

cache = Path(os.environ["HF_HUB_CACHE"])
data = text_data("owner/name")
drawn = []
for ids, _, _ in itertools.islice(data.batches(0), 2 * 87):
    drawn.append((number_in(ids[0]), sorted(file.name for file in cache.rglob("train-*.parquet"))))
pinned = text_data("owner/name@" + COMMIT)
assert (pinned.revision, pinned.files) == (data.revision, data.files)
refused = []
for name in ("owner/other", "owner/name@other", "owner--name/x"):
    try:
        text_data(name)
    except InputError as e:
        refused.append(str(e))
print(json.dumps([data.revision, data.files, drawn, held_out_numbers(data, 3), refused]))
"""


def read_two_epochs(**environment):
    """Let a process of its own read the dataset, since the hub's library reads its settings when it
    is imported. Returns [(a document's number, the files that were in the cache by then), ...] and
    what it said on stderr."""
    process = subprocess.run(
        [sys.executable, "-c", READ],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 0, process.stderr
    revision, names, drawn, held_out, refused = json.loads(process.stdout)
    assert revision == COMMIT and names == TRAIN and held_out == [1, 31, 61]
    numbers = [number for number, _ in drawn]
    expected = sorted(set(range(90)) - {1, 31, 61})
    assert sorted(numbers[:87]) == sorted(numbers[87:]) == expected
    assert len(refused) == 3
    for line, name in zip(refused, ("owner/other", "owner/name", "owner--name/x")):
        assert line.startswith(f"{name}: neither from the hub") and "\n" not in line
        assert "check name and network, or give a local file" in line
    return drawn, process.stderr


@pytest.fixture
def files(tmp_path):
    """{name: content} of a dataset's files."""
    contents = {}
    for i, name in enumerate(TRAIN):
        file = write_parquet(tmp_path / "source" / name, texts(range(30 * i, 30 * i + 30)))
        contents[name] = file.read_bytes()
    return {**contents, **dict.fromkeys(OTHERS, b"not to be read")}


class Hub(BaseHTTPRequestHandler):
    """What of the hub its library asks for; `server.asked` counts what was downloaded."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        files = self.server.files
        if path == f"{INFO}/tree/{COMMIT}":
            tree = [{"type": "file", "path": name, "size": len(content), "oid": str(i) * 40}
                    for i, (name, content) in enumerate(files.items())]
            return self.answer(json.dumps(tree).encode())
        if path in (INFO, f"{INFO}/revision/main", f"{INFO}/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in files]
            info = {"id": "owner/name", "sha": COMMIT, "siblings": siblings}
            return self.answer(json.dumps(info).encode())
        prefix = f"/datasets/owner/name/resolve/{COMMIT}/"
        name = path.removeprefix(prefix)
        if not path.startswith(prefix) or name not in files:
            return self.answer(b"", 404)
        if self.command == "GET":
            self.server.asked.append(name)
        tag = str(list(files).index(name)) * 40
        self.answer(files[name], ETag=f'"{tag}"', **{"X-Repo-Commit": COMMIT})

    def answer(self, content, status=200, **headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(files):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = files
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.address = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


def test_a_dataset_s_files_are_fetched_when_they_are_reached_and_kept(hub, tmp_path):
    cache = str(tmp_path / "cache")
    drawn, _ = read_two_epochs(HF_ENDPOINT=hub.address, HF_HUB_CACHE=cache)
    reached = {Path(TRAIN[0]).name}  # by what is held out
    for number, fetched in drawn:
        reached.add(Path(TRAIN[number // 30]).name)
        assert set(fetched) == reached
    assert sorted(hub.asked) == sorted(["README.md", *TRAIN])

    without, said = read_two_epochs(HF_HUB_OFFLINE="1", HF_HUB_CACHE=cache)
    assert [number for number, _ in without] == [number for number, _ in drawn]
    assert "owner/name: no answer from the hub; its cache has 3 files" in said


def test_without_network_a_dataset_is_what_the_cache_holds(files, tmp_path):
    """In the hub's layout: blobs, and snapshots of links to them."""
    dataset = tmp_path / "cache" / "datasets--owner--name"
    (dataset / "blobs").mkdir(parents=True)
    (dataset / "refs").mkdir()
    (dataset / "refs" / "main").write_text(COMMIT)
    for i, (name, content) in enumerate(files.items()):
        if name != "README.md":
            blob = dataset / "blobs" / (str(i) * 64)
            blob.write_bytes(content)
            link = dataset / "snapshots" / COMMIT / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    nowhere = "http://127.0.0.1:9"
    _, said = read_two_epochs(HF_HUB_CACHE=str(tmp_path / "cache"), HF_ENDPOINT=nowhere)
    assert "no answer from the hub; its cache has 5 files" in said


def test_the_training_files_of_a_repository_with_several_configs_are_chosen():
    assert training_files("name", [*TRAIN, *OTHERS][::-1]) == TRAIN
    files = ["b/train/1.parquet", "data/test.parquet", "a-train.parquet", "train.md"]
    assert training_files("name", files) == ["a-train.parquet", "b/train/1.parquet"]
    files = ["b.parquet", "README.md", "a/c.parquet"]
    assert training_files("name", files) == ["a/c.parquet", "b.parquet"]
    with pytest.raises(InputError, match="name: no parquet files"):
        training_files("name", ["README.md", "train.json"])


# ------------------------------------------------------------------------------------------ Ahead


def is_alone(threads, seconds=5):
    """Whether there are only these threads, or will be soon."""
    end = time.time() + seconds
    while threading.enumerate() != threads and time.time() < end:
        time.sleep(0.01)
    return threading.enumerate() == threads


def test_items_come_in_their_order_and_the_thread_ends_with_them():
    before = threading.enumerate()
    assert list(ahead(iter(range(100)))) == list(range(100))
    assert is_alone(before)


def test_one_or_two_items_are_made_ahead_but_no_more():
    made = []
    items = ahead(made.append(i) or i for i in itertools.count())
    for i in range(10):
        assert next(items) == i
        time.sleep(0.02)
        assert i + 2 <= len(made) <= i + 3
    items.close()


def test_an_exception_comes_after_the_items_before_it():
    def fails():
        yield from range(3)
        raise InputError("no more")

    before = threading.enumerate()
    got = []
    with pytest.raises(InputError, match="no more"):
        for item in ahead(fails()):
            got.append(item)
    assert got == [0, 1, 2]
    assert is_alone(before)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closed_early_it_leaves_no_thread(taken):
    before = threading.enumerate()
    items = ahead(itertools.count())
    assert list(itertools.islice(items, taken)) == list(range(taken))
    assert threading.enumerate() != before or not taken
    items.close()
    assert threading.enumerate() == before


def test_interrupted_a_process_ends_though_its_threads_are_at_work():
    """One of them makes items, another one hangs, and the process waits for its item."""
    code = """
import itertools, time
import data
busy = data.ahead(sum(range(10**6)) for _ in itertools.count())
hangs = data.ahead(time.sleep(1000 * i) for i in itertools.count())
print(next(busy), next(hangs), flush=True)
next(hangs)
"""
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGINT
    assert errors.splitlines()[-1] == "KeyboardInterrupt"
