"""
Where the retrofit's text comes from: the documents of a file, a folder or a hub dataset, packed
into full sequences.

    data = TextData("open-r1/OpenR1-Math-220k", tokenizer, vocab_size, 8192, 8, seed=0)
    for ids, documents in data.batches(0):  # endless
        ...  # ids (B, T); documents: the lengths in each sequence

    sequence 0   | document | document      | docum    what does not fit is cut off and dropped, so
    sequence 1   | document      | document    | do    that every sequence begins with a document

A *record* is a row of a .parquet file, a line of a .jsonl file, or a paragraph of a .txt file.

The order is a function of (seed, data): each epoch shuffles the files, and each file's records. One
file at a time is in memory. One record in 50 is held out for measuring.

This file knows nothing of models, steps or devices.
"""

import itertools
import json
import random
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import huggingface_hub as hub
import torch

from common import explained, read_text, require, say

DEFAULT = "open-r1/OpenR1-Math-220k"
# The columns that make a document: the first group that is there in whole counts. OpenR1's comes
# before its "messages", whose answers may be wrong.
COLUMNS = (("problem", "generations", "correctness_math_verify"), ("messages",), ("conversations",),
           ("prompt", "response"), ("prompt", "completion"), ("question", "answer"),
           ("instruction", "output"), ("text",))
FURTHER = ("is_reasoning_complete", "input")  # what else is read where it is there
ROLES = {"human": "user", "observation": "tool",  # ShareGPT's words for them, and others'
         **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "function_call"), "assistant")}
HELD_OUT = 50  # one record in so many


# ---------------------------------------------------------------------------------------- Documents


def document_columns(columns):
    """The names of the columns that make the document, of those that are there."""
    names = next((names for names in COLUMNS if {*names} <= {*columns}), None)
    require(names, f"its columns are {list(columns)}; wanted are one of: {COLUMNS}")
    if ignored := {"system", "tools", "history"} & {*columns}:
        say(f"what the columns {sorted(ignored)} say has no effect")
    return [*names, *(name for name in FURTHER if name in columns)]


def document_of(record):
    """The document of a record, a dict: a text, or messages for the chat template. Empty for a
    problem without a verified solution."""
    names = document_columns(record)
    asked = record[names[0]]
    if names[0] == "text":
        return asked
    if names[0] in ("messages", "conversations"):
        require(isinstance(asked, list), f"{names[0]}: is no list of messages")
        return asked
    told = verified(record) if "generations" in names else record[names[1]]
    if names[0] == "instruction" and record.get("input"):
        asked += "\n\n" + record["input"]
    messages = []
    for role, content in (("user", asked), ("assistant", told)):
        messages += content if isinstance(content, list) else [{"role": role, "content": content}]
    return messages if told else []


def verified(record):
    """The first solution of a problem that is right, and complete where that is stated, or None."""
    is_right = record["correctness_math_verify"] or []  # a null: none counts as right
    is_complete = record.get("is_reasoning_complete", is_right) or []
    both = zip(record["generations"], is_right, is_complete)
    return next((solution for solution, *good in both if all(good)), None)


def split_thought(message):
    """(the thought, the text behind it) of a message, each "" where there is none."""
    content = message["content"] if isinstance(message.get("content"), str) else ""
    before, _, text = content.rpartition("</think>")  # without the mark `before` is empty
    return (message.get("reasoning_content") or before.replace("<think>", "")).strip(), text


def conversation(tokenizer, turns):
    """The text of a conversation, as the model would have seen and generated it:

        the prompt, by the template with add_generation_prompt   the answer   its end token

    As a rule that is what the template makes of all messages. But some templates (DeepSeek-R1's)
    end the prompt with <think>, and leave thoughts out of the messages that they show. Then the
    answer is put together from the last message's thought and text.
    """
    if "from" in turns[0]:  # ShareGPT's keys
        turns = [{"role": turn["from"], "content": turn["value"]} for turn in turns]
    turns = [turn | {"role": ROLES.get(turn["role"], turn["role"])} for turn in turns]
    *asked, last = turns
    thought, text = split_thought(last)
    # Llama 3.2's template asks for the date of the day. Here it stays the same, or a run that is
    # resumed tomorrow would see other text.
    template = partial(tokenizer.apply_chat_template, enable_thinking=bool(thought),
                       strftime_now=lambda form: "26 Jul 2024")
    whole = template(turns).rstrip()  # without the line break behind the end token
    # only the template can write a call of a tool
    if last["role"] != "assistant" or last.get("tool_calls") or not text:
        return whole
    prompt = template(asked, add_generation_prompt=True)
    if whole.startswith(prompt) and thought in whole:  # as most templates have it
        return whole
    # As DeepSeek-R1's have it: the prompt opens a thought, and the answer has to close it, even an
    # empty one.
    before = re.sub(r"<think>\s*$", "", prompt)
    if thought or before != prompt:
        text = f"<think>\n{thought}\n</think>\n\n{text.strip()}"
    return before + text


# -------------------------------------------------------------------------------------------- Files


def open_file(file):
    """For each record of a file a function that gives it, a dict: so a broken line is one bad
    record, and a table's rows become Python objects one by one."""
    if file.endswith(".parquet"):
        # any Exception: the file is truncated, has an unsupported type, memory is short, ...
        with explained(file, Exception):
            import pyarrow.parquet

            parquet = pyarrow.parquet.ParquetFile(file)
            table = parquet.read(document_columns(parquet.schema_arrow.names))
        return [row.as_py for row in table.to_struct_array()]
    text = read_text(file).rstrip()
    if file.endswith(".jsonl"):
        return [partial(json.loads, line) for line in text.split("\n") if line.strip()]
    return [partial(dict, text=paragraph) for paragraph in re.split(r"\n\s*\n", text)]


def find_files(source):
    """(the files of a source, sorted; a function that gives the local path of one; the commit of a
    hub dataset, else None)."""
    path = Path(source)
    if not path.exists():
        return find_on_hub(*source.split("@", 1))
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [str(file) for file in files if file.suffix in (".txt", ".jsonl", ".parquet")]
    require(files, f"{source}: no .txt, .jsonl or .parquet file")
    return files, str, None  # str: a file's name is its path


def find_on_hub(name, revision=None):
    """The same of a hub dataset: its parquet files, each of which is fetched when it is reached.
    revision: None for the newest. Without network name the folder where its files are."""
    with explained(f"{name}: no file or folder here, and not on the hub", Exception):
        info = hub.dataset_info(name, revision=revision)
    files = sorted(x.rfilename for x in info.siblings if x.rfilename.endswith(".parquet"))
    require(files, f"{name}: no parquet files; try {name}@refs/convert/parquet")
    # of several splits those to train on, of several configs the main one
    files = [file for file in files if "train" in file] or files
    files = [file for file in files if file.startswith("data/")] or files
    fetch = partial(hub.hf_hub_download, name, repo_type="dataset", revision=info.sha)
    return files, fetch, info.sha


# ------------------------------------------------------------------------------------------ Packing


def split_documents(ids, documents):
    """The documents (1, n) of sequences ids (B, T), by the lengths in each; no padding."""
    for sequence, lengths in zip(ids, documents):
        yield from sequence[None, : sum(lengths)].split(lengths, dim=1)


def long_documents(data, least):
    """Endless: the documents (1, n) to train on, in order, that have `least` tokens or more."""
    for batch in data.batches(0):
        for ids in split_documents(*batch):
            if ids.shape[1] >= least:
                yield ids


@dataclass
class TextData:
    """Documents as full sequences. A record that the chat template, the tokenizer or the model does
    not take is skipped whenever it is reached, and named once.

    revision: the commit of a hub dataset; source@revision is the same data later.
    """

    source: str  # a file, a folder or a hub dataset: owner/name, or owner/name@commit
    tokenizer: object  # checkpoint.py's
    vocab_size: int
    seq_len: int
    batch_size: int
    seed: int

    def __post_init__(self):
        self.files, self.fetch, self.revision = find_files(self.source)
        self.held_out(1)  # so that what is wrong with the source shows at once

    def batches(self, step):
        """Endless: (ids (B, T) int64, documents) from a step on; what the steps before took is read
        again. documents: B lists of lengths whose sum is T; the last length of each may be 1."""
        stream = self.documents()
        every = (self.pack(stream, self.batch_size) for _ in itertools.count())
        return itertools.islice(every, step, None)

    def held_out(self, count):
        """(ids (count, T) int64, documents) of what is never trained on, the same for every seed;
        from its beginning again where that is too little."""
        return self.pack(self.documents(held_out=True), count)

    def pack(self, stream, count):
        """A stream of documents end to end, in `count` sequences: what batches yields."""
        ids = []
        lengths = [[] for _ in range(count)]
        for of_sequence in lengths:
            while room := self.seq_len - sum(of_sequence):
                document = next(stream)[:room]
                ids += document
                of_sequence.append(len(document))
        return torch.tensor(ids).view(count, -1), lengths

    def documents(self, held_out=False):
        """Endless: the token ids of each document, of those to train on shuffled, or of those held
        out as they stand."""
        for epoch in itertools.count():
            found_any = False
            shuffle = lambda x: random.Random(f"{self.seed} {epoch}").sample(x, len(x))
            order = sorted if held_out else shuffle
            for name in order(self.files):
                file = self.fetch(name)
                records = open_file(file)
                for n in order(range(len(records))):
                    # 1, not 0: a file's only record is trained on
                    is_ours = (n % HELD_OUT == 1) == held_out
                    if is_ours and (ids := self.encode(f"{file}: document {n + 1}", records[n])):
                        found_any = True
                        yield ids
            of_what = "to hold out (the 2nd of every 50)" if held_out else "to train on"
            require(found_any, f"{self.source}: no text and no verified solution {of_what}")

    def encode(self, where, read):
        """The token ids of a document with one end token; [] if it is left out, or skipped."""
        tokenizer = self.tokenizer
        try:
            document = document_of(read())
            if not document:
                return []
            is_text = isinstance(document, str)
            text = document if is_text else conversation(tokenizer, document)
            ids = tokenizer.encode(text, add_special_tokens=is_text)
            # a special token has no text: then the template has written the end token
            ends_in_text = tokenizer.decode(ids[-1:], skip_special_tokens=True)
            if ends_in_text and tokenizer.end_id is not None:
                ids.append(tokenizer.end_id)
            require(max(ids) < self.vocab_size, "it has a token that the model does not know")
            return ids
        except Exception as e:  # one bad record ends no run, whatever is wrong with it
            say(f"{where} is skipped: {e}")
            return []
