"""
Where the retrofit's text comes from: documents of a file, a folder or a hub dataset, as full rows.

    data = TextData("open-r1/OpenR1-Math-220k", tokenizer, vocab_size, 8192, 8, seed=0)
    for ids, documents, place in ahead(data.batches(0)):  # endless
        ...  # ids (B, T); documents: the lengths of each row's; place: where to go on after it

The order is a function of (seed, data): each epoch shuffles the files, each file its row groups,
each group its rows. One document in 50 is held out for measuring. Documents are laid end to end;
what does not fit into a row is cut off and dropped, so that every row begins with a new document,
and a place in the data is [epoch, file, row, files in all], file and row counted in the shuffled
order. Rows of
parquet files are read a group at a time, and made into Python objects when they are drawn.

This file knows nothing of models, steps or devices.
"""
import queue
import random
import re
import sys
import threading
from bisect import bisect
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import InputError, Tokenizer, one_line, read_lines, read_text, refusing, require

DEFAULT = "open-r1/OpenR1-Math-220k"
KINDS = (".txt", ".jsonl", ".parquet")
SOURCES = "give a .txt, .jsonl or .parquet file, a folder of these, or a hub dataset (owner/name)"
COLUMNS = ("problem", "generations", "correctness_math_verify", "is_reasoning_complete",
           "messages", "conversations", "prompt", "response", "text")  # fmt: skip
ROLES = {"human": "user", "gpt": "assistant"}  # where ShareGPT has words of its own
REMEDY = "check name and network, or give a local file"
# with thinking; and not with the date of the day, by which Llama 3's would change
TEMPLATE = dict(enable_thinking=True, date_string="26 Jul 2024")
HELD_OUT = 50  # one row in so many
NAMED = 20  # rows that are skipped
MISSES = 1000  # rows on end without a usable document, after which there is no hope


# ---------------------------------------------------------------------------------------- Documents


def document_of(row):
    """The document of a row, a dict: a text, or messages for the chat template; None if it is to be
    left out: OpenR1's without a solution that is verified, and complete where that is stated.
    Raises InputError."""
    with refusing("not a document in a known spelling", TypeError, LookupError, AttributeError):
        if "correctness_math_verify" in row:  # before OpenR1's "messages", which may be unverified
            is_right = row["correctness_math_verify"] or []
            is_whole = row.get("is_reasoning_complete", is_right) or []
            for solution, *flags in zip(row["generations"], is_right, is_whole):
                if flags == [True, True]:
                    return exchange(row["problem"], solution)
            return None
        if row.get("messages"):
            return list(row["messages"])  # no text passes for messages
        if row.get("conversations"):
            return [in_our_words(turn) for turn in row["conversations"]]
        if "response" in row:
            return exchange(row["prompt"], row["response"])
        return row["text"]


def is_held_out(number):
    """Is a row of a file, by its number, for measuring, not for training?"""
    return number % HELD_OUT == 1


def in_our_words(turn):
    """The message that a turn of a conversation is, be it in ShareGPT's words."""
    who = turn.get("from")
    return {"role": ROLES.get(who, who), "content": turn["value"]} if who else turn


def exchange(prompt, response):
    """The messages of a prompt, a text or itself messages, and the answer to it."""
    asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return [*asked, {"role": "assistant", "content": response}]


def thought_in(document):
    """What of a conversation's last answer lies within <think> and </think>; empty where none is."""
    answer = document[-1].get("content") if isinstance(document, list) and document else None
    found = re.search("<think>(.*)</think>", answer, re.DOTALL) if isinstance(answer, str) else None
    return found[1].strip() if found else ""


# -------------------------------------------------------------------------------------------- Files


def open_file(file):
    """(the numbers of the rows of each group, a list of ranges; a function that gives the row of a
    number: where it stands, and a dict) of a .txt file, its documents parted by blank lines, a
    .jsonl or a .parquet file. Raises InputError naming the file and its line."""
    if file.endswith(".parquet"):
        return open_parquet(file)
    if file.endswith(".jsonl"):
        rows = [(f"{file}: line {n}", row) for n, row in read_lines(file).items()]
    else:
        text = read_text(file, f"{file}: not readable as text; {SOURCES}")
        documents = enumerate(re.split(r"\n\s*\n", text), 1)
        rows = [(f"{file}: paragraph {n}", {"text": d}) for n, d in documents if d.strip()]
    return [range(len(rows))], rows.__getitem__


def open_parquet(file):
    """The same of a .parquet file. One row group is held at a time, and of that a row becomes a
    dict, with the columns that matter, when it is asked for."""
    with refusing(f'{file}: to read parquet, pip install -e ".[data]"', ImportError):
        import pyarrow.parquet
    damaged = f"{file}: not a whole parquet file; download it again"
    errors = (pyarrow.ArrowException, OSError, ValueError)
    with refusing(damaged, *errors):
        opened = pyarrow.parquet.ParquetFile(file)
        columns = set(COLUMNS).intersection(opened.schema_arrow.names)
        sizes = [opened.metadata.row_group(g).num_rows for g in range(opened.num_row_groups)]
    require(columns, f"{file}: has none of the columns {', '.join(COLUMNS)}")
    ends = list(accumulate(sizes))
    groups = [range(end - size, end) for size, end in zip(sizes, ends)]
    read_group = lru_cache(maxsize=1)(lambda g: opened.read_row_group(g, sorted(columns)))

    def read(number):
        g = bisect(ends, number)
        with refusing(damaged, *errors):
            [row] = read_group(g).slice(number - groups[g].start, 1).to_pylist()
        return f"{file}: row {number}", row

    return groups, read


def find_files(source):
    """(the files of a source, sorted; a function that gives the local path of one; the commit of a
    hub dataset, else None). Raises InputError."""
    path = Path(source)
    files = sorted(path.rglob("[!.]*")) if path.is_dir() else [path]
    files = [str(file) for file in files if file.is_file() and file.suffix in KINDS]
    if files:
        return files, str, None
    hub_id = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:@(\S+))?", source)
    is_there = hub_id and not path.exists() and path.suffix not in KINDS
    require(is_there, f"{source}: not found, not readable, or of another kind; {SOURCES}")
    return find_on_hub(*hub_id.groups())


def find_on_hub(name, revision):
    """The same of a hub dataset: its parquet files, each of which is fetched when it is needed;
    without network, those that the hub's cache holds. revision: None for the newest."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # of its client; where that is httpx, no OSError

    hub = HfApi()
    kind = dict(repo_id=name, repo_type="dataset")
    # RuntimeError: the library that transfers large files has no other
    errors = (HTTPError, OSError, ValueError, RuntimeError)
    try:
        commit = hub.repo_info(**kind, revision=revision).sha
        files = hub.list_repo_files(**kind, revision=commit)
        # notes in the cache, too, which commit the revision is, for a run without network
        hub.snapshot_download(**kind, revision=revision, allow_patterns="README.md")
    except errors as e:
        problem = f"{name}: neither from the hub ({type(e).__name__}) nor from its cache; {REMEDY}"
        kind.update(revision=revision, local_files_only=True)
        with refusing(problem, *errors):  # no patterns: a cache without README.md will do
            folder = Path(hub.snapshot_download(**kind, allow_patterns=[]))
        commit = folder.name
        files = [file.relative_to(folder).as_posix() for file in folder.rglob("*.parquet")]
        tqdm.write(f"{name}: no answer from the hub; its cache has {len(files)} files", sys.stderr)

    def fetch(file):
        with refusing(f"{name}: {file} did not come from the hub; {REMEDY}", *errors):
            return hub.hf_hub_download(name, file, repo_type="dataset", revision=commit)

    return training_files(name, files), fetch, commit


def training_files(name, files):
    """Of a dataset's files the parquet ones to train on, sorted. There may be several configs and
    splits, told by folder or by name; the main one is in data/ as a rule."""
    for where in ("data/.*train[^/]*", ".*train.*", ".*"):
        found = [file for file in files if re.fullmatch(where + "[.]parquet", file)]
        if found:
            return sorted(found)
    raise InputError(f"{name}: no parquet files; try {name}@refs/convert/parquet, or {SOURCES}")


# ------------------------------------------------------------------------------------------ Packing


def shuffled(things, key):
    return random.Random(key).sample(things, len(things))


@dataclass
class TextData:
    """Documents as full rows. A row of the source that cannot be used, since the chat template, the
    tokenizer or the model does not take it, is skipped whenever it is drawn.

    revision: the commit of a hub dataset; source@revision is the same data later. Raises InputError
    for what shows before the first batch: no such source, a damaged file, too few documents, or
    none that can be used.
    """

    source: str  # a file, a folder or a hub dataset: owner/name, or owner/name@commit
    tokenizer: Tokenizer
    vocab_size: int
    seq_len: int
    batch_size: int
    seed: int
    pack_across: bool = False  # a row counts as one document

    def __post_init__(self):
        self.skipped = set()  # where each of them stands
        self.problem = "none is a verified solution"  # of the last one
        self.files, self.fetch, self.revision = find_files(self.source)
        groups, _ = open_file(self.fetch(self.files[0]))
        require(groups and groups[-1].stop > 1, f"{self.files[0]}: fewer than 2 usable documents, "
                "parted by blank lines, or JSON lines, or rows; one in 50 is held out")
        self.held_out(1)

    def batches(self, step, place=None):
        """An endless generator of (ids (B, T) int64, documents, the place after it), from a place
        on, None for the beginning. documents: B lists of lengths whose sum is T; the last one of a
        row may be 1. step: not used; other data goes by it. Raises InputError."""
        *place, files = place or [len(self.files)]
        require(files == len(self.files), f"{self.source}: has {len(self.files)} files now, and had "
                f"{files} when the run began; resume it with the same")
        documents = self.documents(*place)
        while True:
            yield self.pack(documents, self.batch_size)

    def held_out(self, rows):
        """(ids (rows, T) int64, documents) of what is never trained on, the same for every seed;
        from its beginning again where that is too little. Raises InputError."""
        return self.pack(self.documents(held_out=True), rows)[:2]

    def pack(self, documents, rows):
        """`documents` end to end, in so many rows: what batches yields."""
        ids = []
        lengths = []
        for _ in range(rows):
            row = []
            cut = []
            while len(row) < self.seq_len:
                document, place = next(documents)
                cut.append(min(len(document), self.seq_len - len(row)))
                row += document[:cut[-1]]
            ids.append(row)
            lengths.append([self.seq_len] if self.pack_across else cut)
        return torch.tensor(ids), lengths, place

    def documents(self, epoch=0, first=0, begin=0, held_out=False):
        """Endless: (token ids, the place after it) of each document from a place on; those to train
        on shuffled, or those held out as they stand."""
        misses = 0
        while True:
            key = f"{self.seed} {epoch}"
            files = self.files if held_out else shuffled(self.files, key)
            for f in range(first, len(files)):
                groups, read = open_file(self.fetch(files[f]))
                if not held_out:
                    groups = shuffled(groups, f"{key} {f}")
                    groups = [shuffled(group, f"{key} {f} {group}") for group in groups]
                numbers = [n for group in groups for n in group if is_held_out(n) == held_out]
                for r in range(begin, len(numbers)):
                    ids = self.encode(*read(numbers[r]))
                    misses = 0 if ids else misses + 1
                    require(misses < MISSES, f"{self.source}: gives no tokens for {MISSES} rows on "
                            f"end, of those to train on or those held out; mend it ({self.problem})")
                    if ids:
                        yield ids, [epoch, f, r + 1, len(files)]
                begin = 0
            first = 0
            epoch += 1

    def encode(self, where, row):
        """The token ids of a row's document with an end token; None if it is left out, or skipped,
        which is said once."""
        try:
            document = document_of(row)
            if document is None:
                return None
            ids = self.tokenizer.encode(document, **TEMPLATE)
            thought = thought_in(document)
            if thought and thought not in self.tokenizer.decode(ids):  # some templates leave it out
                text = self.with_thought(document)
                ids = self.tokenizer.encode(text, add_special_tokens=False)
            end = self.tokenizer.end_id
            if end not in (None, *ids[-1:]):
                ids.append(end)
            require(len(ids) > 1, "it is empty")
            require(max(ids) < self.vocab_size, "it has a token that the model does not know")
            return ids
        except InputError as e:
            self.problem = e
            if where not in self.skipped and len(self.skipped) < NAMED:
                tqdm.write(one_line(f"{where} is skipped: {e}", None), sys.stderr)
            self.skipped.add(where)

    def with_thought(self, messages):
        """The last answer as it stands behind what the template makes of all before it."""
        *asked, answer = messages
        asked = self.tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, **TEMPLATE)
        begun = asked.rstrip().endswith("<think>")
        return asked + (answer["content"].lstrip().removeprefix("<think>") if begun else answer["content"])


def ahead(iterator):
    """What an iterator yields, asked for up to two items ahead by a thread of its own: so text is
    made into tokens while a GPU is at work. What it raises is raised here, in its turn. The thread
    ends when this generator is closed."""
    items = queue.Queue()
    wanted = threading.Semaphore(2)

    def work():
        try:
            while wanted.acquire():
                items.put(next(iterator))
        except BaseException as e:  # StopIteration, too
            items.put(e)

    thread = threading.Thread(target=work, daemon=True)  # which no exit waits for
    thread.start()
    try:
        while not isinstance(item := items.get(), BaseException):
            yield item
            wanted.release()
        if not isinstance(item, StopIteration):
            raise item
    finally:
        iterator = iter([])  # all that the thread finds when it wakes up
        wanted.release()
        thread.join(timeout=2)  # one at work while Python ends may crash it
