"""
Generate from a dense or DMS checkpoint with the compacting cache, and see what it forgets.

    python generate.py                                    # the last retrofit, or the shipped model
    python generate.py --model out/my-dms --prompt "How many primes are below 100?"
    python generate.py --chat                             # several turns over one cache
    python generate.py -n 8 --temperature 1.0             # 8 chains that share one prompt, and vote
    python generate.py --requests in.jsonl --out out.jsonl   # many; goes on where it was stopped
    torchrun --nproc-per-node 8 generate.py --requests ...   # over GPUs: out.0-of-8.jsonl, ...
    python generate.py --show-evictions                   # each token by how many heads hold it
    python generate.py --show-evictions page.html         # and what each of them holds
    python generate.py --dense                            # the same, nothing evicted

The text goes to standard output; the closing line with speed and memory goes to standard error.
First continuous batching, then the script. A row here is a place in the cache's batch.
"""
import hashlib
import itertools
import json
import os
import re
import sys
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from tokenizers.decoders import DecodeStream
from tqdm import tqdm

from checkpoint import (InputError, check_ids, checked, choose_device, load_model, load_tokenizer,
                        locked, parse_object, parse_options, read_json, read_lines, read_text,
                        refusing, require, resolve, run_script, torchrun_place)
from kernels.decode_step import DecodeStep, sample
from kv_cache import CacheFull, KVCache
from model import Model
from show import held_by_heads, show_evictions

SHIPPED = Path(__file__).resolve().parent / "toy" / "retrofitted"


# ----------------------------------------------------------------------------- Continuous batching


@dataclass(eq=False)
class Sequence:
    """A text in the making. What `generate` draws is added to ids and to new."""

    ids: list  # all of its tokens: given, then drawn
    max_new_tokens: int
    seed: object = 0
    stop: object = None  # (token id) -> bool, asked about every token drawn but an end token
    new: list = field(default_factory=list)  # drawn so far, an end token included
    over: bool = False
    error: str | None = None  # why it is over before its end
    row: int | None = None  # of the cache, which holds ids[:fed] there
    fed: int = 0

    def __post_init__(self):
        self.ids = list(self.ids)

    def uniform(self):
        """The random number in [0, 1), exact in float32, for its next token: of its seed and place
        alone, whatever runs beside it."""
        place = f"{self.seed} {len(self.new)}".encode()
        return int(hashlib.blake2b(place, digest_size=3).hexdigest(), 16) / 2**24


def check_sampling(sampling, where):
    """Raise InputError unless these can be arguments of `sample`."""
    for key in sampling:
        checked(sampling, key, int if key == "top_k" else float, where)


@dataclass
class Scheduler:
    """Which sequence runs in which row of the cache, and which wait."""

    model: Model
    cache: KVCache
    sequences: list
    end_ids: set
    sampling: dict
    release: bool

    def __post_init__(self):
        self.cache.check_model(self.model)
        check_sampling(self.sampling, "sampling")
        seen = self.cache.seen.tolist()  # tokens of each row
        rows = [sequence.row for sequence in self.sequences if sequence.row is not None]
        require(len({*self.sequences}) == len(self.sequences) and len({*rows}) == len(rows),
                "a sequence, or the row of one, is given twice")
        for sequence in self.sequences:
            require(sequence.max_new_tokens > len(sequence.new), "max_new_tokens allows no new token")
            check_ids(self.model.config, sequence.ids)
            require(sequence.row is None or seen[sequence.row] == sequence.fed,
                    "the cache does not hold what a sequence has fed")
        self.step = DecodeStep(self.model, self.cache, self.sampling)
        self.free_rows = [row for row, n in enumerate(seen) if n == 0 and row not in rows]
        self.running = []  # the youngest last
        # neighbours with the same tokens are a group, which is fed once and forked
        sequences = sorted(self.sequences, key=lambda s: s.row is None)  # those with a row first
        groups = itertools.groupby(sequences, key=lambda s: (s.row, s.ids))
        self.waiting = deque(list(group) for _, group in groups)
        self.blocked_until_one_ends = False  # after pages ran out, nothing starts until then
        new = sum(sequence.row is None for sequence in sequences)
        # one row that is released can serve them all, one after another
        require(len(self.free_rows) >= (min(new, 1) if self.release else new),
                f"{new} sequences cannot all stay in the cache's free rows; release them")

    def decode(self):
        """One more token for all that run, [(sequence, token id)]."""
        inputs = {sequence.row: (sequence.ids[-1], sequence.uniform()) for sequence in self.running}
        try:
            drawn = self.step(inputs) if inputs else {}
        except CacheFull as e:
            return self.put_back(self.running[-1:], e)
        return self.record([(sequence, drawn[sequence.row]) for sequence in self.running])

    def admit(self):
        """Start groups while there is room; the first token of each, [(sequence, token id)]."""
        drawn = []
        while self.may_start():
            group = self.next_group()
            self.running += group
            try:
                logits = self.feed(group)
            except CacheFull as e:
                return drawn + self.put_back(group, e)
            uniform = torch.tensor([s.uniform() for s in group], device=logits.device)
            tokens = sample(logits.expand(len(group), -1), uniform, **self.sampling)
            drawn += self.record(list(zip(group, tokens.tolist())))
        return drawn

    def may_start(self):
        """Is there a row for the first that waits, and are there pages for about what it will hold
        once it is fed, by the compression seen so far? For what it draws later there may be none
        in the end: then the youngest is put back."""
        if not self.waiting or self.blocked_until_one_ends:
            return False
        first = self.waiting[0][0]
        if first.row is None and not self.free_rows:
            return False
        ratio, free = self.cache.ratio_and_free_pages()
        pairs = (len(first.ids) - first.fed) / (ratio or 1)
        # of each head; its last page is half empty on average, and half a page is a margin
        pages = self.cache.layers * self.cache.kv_heads * (pairs / self.cache.page_size + 1)
        return pages <= free or not self.running

    def next_group(self):
        """The first group that waits, or as much of it as there are rows for, with rows."""
        group = self.waiting.popleft()
        if group[0].row is None:
            if len(group) > len(self.free_rows):
                self.waiting.appendleft(group[len(self.free_rows) :])
                group = group[: len(self.free_rows)]
            for sequence in group:
                sequence.row = self.free_rows.pop(0)
        return group

    def feed(self, group):
        """Feed what a group shares once, and fork it. Returns logits (1, V) of the next token."""
        first = group[0]
        ids = torch.tensor([first.ids[first.fed :]], device=self.model.device)
        logits = self.model(ids, cache=self.cache, sequence=first.row, last_only=True)
        if len(group) > 1:
            rows = [sequence.row for sequence in group]
            every = range(self.cache.batch_size)
            self.cache.select([first.row if row in rows else row for row in every])
        return logits[:, -1]

    def put_back(self, sequences, problem):
        """They have not found their pages: give up what they have, and wait to be fed again, first
        in line, with what they have drawn. If nothing is left that could make room, the sequence
        does not fit by itself, and has failed: [(it, None)], as nothing was drawn."""
        self.take_out(sequences, release=True)
        self.blocked_until_one_ends = bool(self.running)
        holders = [s for group in self.waiting for s in group if s.row is not None]
        if len(sequences) == 1 and not self.running and not holders:
            sequences[0].over = True
            sequences[0].error = str(problem)
            return [(sequences[0], None)]
        # Half of a group's forks may fit where all of them do not: so it waits in two halves, the
        # first of them at the head of the queue (extendleft reverses).
        half = (len(sequences) + 1) // 2
        self.waiting.extendleft(part for part in (sequences[half:], sequences[:half]) if part)
        # where nobody runs, those that wait with a row and its pages must give them up, too
        if not self.running:
            self.take_out(holders, release=True)
        return []

    def take_out(self, sequences, release):
        """Run them no longer. release: their rows and pages are free again."""
        self.running = [s for s in self.running if s not in sequences]
        if release and sequences:
            rows = [sequence.row for sequence in sequences]
            self.cache.release(rows)
            self.free_rows += rows
            for sequence in sequences:
                sequence.row = None
                sequence.fed = 0

    def record(self, drawn):
        """Add what was drawn, [(sequence, token id)], to the sequences. Returns it."""
        for sequence, token in drawn:
            sequence.fed = len(sequence.ids)  # all but the token just drawn is in the cache
            sequence.ids.append(token)
            sequence.new.append(token)
            stops = token in self.end_ids or sequence.stop and sequence.stop(token)
            sequence.over = bool(stops) or len(sequence.new) >= sequence.max_new_tokens
        return drawn

    def retire(self):
        """Take those that are over out of the batch."""
        ended = [sequence for sequence in self.running if sequence.over]
        self.take_out(ended, self.release)
        if ended:
            self.blocked_until_one_ends = False


@torch.inference_mode()
def generate(model, cache, sequences, end_ids=(), sampling=None, release=True):
    """Continue sequences, a list of any length, in the rows of a cache: continuous batching.

    Yields after each step the list of (sequence, token id) drawn, None for the token of one that
    has failed. A sequence ends on an id of end_ids, when its stop(token) is true, after
    max_new_tokens, or because it cannot fit by itself. When pages run out the youngest gives its
    own back and is fed again later: nothing is lost or drawn twice. sampling: arguments of
    `sample`. release=False: ended sequences keep their rows, in which the cache holds all but
    their last token; to go on with one, add to its ids, reset `new` and `over`, and give it again.
    """
    scheduler = Scheduler(model, cache, sequences, end_ids, sampling or {}, release)
    try:
        while scheduler.waiting or scheduler.running:
            drawn = scheduler.decode() + scheduler.admit()
            scheduler.retire()
            yield drawn
    finally:  # the caller may leave early: nothing of what runs stays behind
        scheduler.take_out(scheduler.running, release)


# -------------------------------------------------------------------------------------- The script


class Stream:
    """Tokens in, printable text out (`text`, and by pieces to `show`) as soon as it is certain:
    half a character and what may begin a stop string are held back. As a Sequence's `stop` it says
    whether a stop string has come."""

    def __init__(self, tokenizer, stop_strings=(), show=None):
        self.tokenizer = tokenizer
        self.stops = list(filter(None, stop_strings))
        self.show = show
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.ids = []
        self.decoded = self.text = ""  # text: as much of it as is certain
        self.stopped = False

    def __call__(self, token):
        self.ids.append(token)
        if self.stops or self.show:
            self.decoded += self.decoder.step(self.tokenizer.fast, token) or ""
            beginnings = [stop[:n] for stop in self.stops for n in range(1, len(stop))]
            held_back = [len(text) for text in beginnings if self.decoded.endswith(text)]
            self.let_out(len(self.decoded) - max(held_back, default=0))
        return self.stopped

    def finish(self):
        """Let out what was held back and turned out to be text after all."""
        if not self.stopped:
            self.decoded = self.tokenizer.decode(self.ids, skip_special_tokens=True)
            self.let_out(len(self.decoded))

    def let_out(self, end):
        """Make decoded[:end] the text, or what comes before a stop string."""
        places = (self.decoded.find(stop, len(self.text)) for stop in self.stops)
        found = [place for place in places if place >= 0]
        self.stopped = bool(found)
        end = min(found) if found else max(end, len(self.text))  # what is out stays out
        certain = self.decoded[:end]
        if self.show:
            self.show(certain[len(self.text) :])
        self.text = certain


def final_answer(text):
    """What chains vote on: the contents of the last \\boxed{}, else the last number, else the last
    line; None for no text."""
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
    numbers = [x.replace(",", "").rstrip(".") for x in re.findall(r"-?\d[\d,]*\.?\d*", text)]
    lines = [line for line in text.split("\n") if line.strip()]
    return (boxed or numbers or lines or [None])[-1]


def show_now(text):
    print(text, end="", flush=True)


@dataclass
class Options:
    """Of the command line: --max-new-tokens 100 for max_new_tokens."""

    model: str = None  # folder or hub id (default: the last retrofit, else the shipped toy model)
    adapter: str = None  # DMS adapters to lay over the model: a file, a folder or a hub id
    prompt: str = None  # text, or - for standard input (default: a problem of the toy world)
    raw: bool = False  # feed the prompt as it is, without the chat template
    task: Literal["needles", "variables", "arithmetic"] = "needles"  # the toy problem to ask
    chat: bool = False  # several turns, a line each, over one cache
    n: int = 1  # parallel chains of each prompt
    requests: str = None  # a file of JSON lines with "prompt" or "messages"
    out: str = None  # JSON lines with their answers; those that it holds are not done again
    batch: int = None  # most chains side by side (default: 16 on a CPU, 64 on a GPU)
    memory: float = None  # GB of the cache (default: 80 % of what a GPU has free, or a machine has)
    max_new_tokens: int = 400
    temperature: float = None  # 0 is greedy (default: generation_config.json, else 1; toy: 0)
    top_k: int = None
    top_p: float = None
    min_p: float = None
    stop: list = ()  # a string that ends the text; may be repeated
    seed: int = 0
    dense: bool = False  # switch eviction off
    show_evictions: str = ""  # each token by how many heads hold it: printed, or a .html file
    compile: bool = False  # torch.compile what lies between attentions (for a GPU)
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = None  # (default: bfloat16 on a GPU)


class Session:
    """A loaded model, its tokenizer, and the options of a run."""

    def __init__(self, options):
        self.options = options
        folder = resolve(options.model)
        self.tokenizer = load_tokenizer(folder)
        self.model = load_model(folder, options.device, getattr(torch, options.dtype), options.adapter)
        if options.compile:
            self.model.compile()
        if options.dense and self.model.config.dms:
            self.model.config.dms.disable_eviction = True
        file = folder / "generation_config.json"
        stated = read_json(file) if file.exists() else {}
        ends = stated.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        self.end_ids = {end for end in (*ends, self.tokenizer.end_id) if isinstance(end, int)}
        if stated.get("do_sample") is False:
            stated["temperature"] = 0.0
        self.sampling = {"temperature": 1.0}
        for source in (stated, vars(options)):
            given = {key: source.get(key) for key in ("temperature", "top_k", "top_p", "min_p")}
            self.sampling |= {key: value for key, value in given.items() if value is not None}
        check_sampling(self.sampling, file)
        self.tokens, self.seconds = 0, 0.0

    def new_cache(self, rows):
        memory = self.options.memory and self.options.memory * 1e9
        model = self.model
        self.cache = KVCache(model.config, rows, model.device, model.dtype, memory=memory)

    def encode(self, prompt, max_new_tokens):
        """Text, or a list of messages -> token ids, through the chat template unless there is none
        or --raw. Raises InputError if there is no room for so many new tokens."""
        is_raw = self.options.raw or self.tokenizer.template is None
        if isinstance(prompt, str) and not is_raw:
            prompt = [{"role": "user", "content": prompt}]
        ids = self.tokenizer.encode(prompt, add_generation_prompt=True)
        check_ids(self.model.config, ids, max_new_tokens)
        return ids

    def chains(self, ids, max_new_tokens, seed, show=None):
        """-n sequences that continue ids, each with a Stream as its `stop`."""
        streams = [Stream(self.tokenizer, self.options.stop, show) for _ in range(self.options.n)]
        return [Sequence(ids, max_new_tokens, f"{seed} {i}", s) for i, s in enumerate(streams)]

    def run(self, chains, release=True):
        """Generate; yields the chains that are over, after each step."""
        begin = time.perf_counter() - self.seconds
        for drawn in generate(self.model, self.cache, chains, self.end_ids, self.sampling, release):
            self.tokens += sum(token is not None for _, token in drawn)
            self.seconds = time.perf_counter() - begin
            over = [chain for chain, _ in drawn if chain.over]
            for chain in over:
                chain.stop.finish()
            yield over

    def finish(self, chains, release=True):
        """Generate to the end. Raises InputError if a chain did not fit into the cache."""
        for over in self.run(chains, release):
            for chain in over:
                require(not chain.error, chain.error)


def read_turns():
    """Turns of a conversation from standard input, a line each."""
    prompt = "> " if sys.stdin.isatty() else ""
    with suppress(EOFError), refusing("standard input is not text", ValueError):
        while True:
            line = input(prompt)
            if line.strip():
                yield {"role": "user", "content": line}


def chat(session):
    """Turns over one cache: each feeds only what the template puts after an answer, the new turn
    included. What the model said stays as it was said, thoughts too, as the cache cannot unsay it.

    To get that text, the new turn is rendered behind a made-up exchange whose answer is a mark, and
    the result is cut at the mark.
    """
    options = session.options
    mark = "@ANSWER@"
    before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    session.new_cache(1)
    chain = Sequence([], options.max_new_tokens)
    for number, turn in enumerate(read_turns()):
        turns = [*before, turn] if number else [turn]
        text = session.tokenizer.apply_chat_template(turns, add_generation_prompt=True)
        if number:
            require(mark in text, "--chat needs a template that repeats the answers; this one does not")
            text = text.split(mark, 1)[1]
        if number and chain.ids[-1] in session.end_ids:
            chain.ids.pop()  # it was not fed yet, and the text begins with it
        ids = chain.ids + session.tokenizer.encode(text, add_special_tokens=False)
        check_ids(session.model.config, ids, options.max_new_tokens)
        chain = replace(chain, ids=ids, seed=f"{options.seed} {number} 0", new=[], over=False)
        chain.stop = Stream(session.tokenizer, options.stop, show_now)
        session.finish([chain], release=False)
        print(flush=True)


ROW = '{"generated": {"line": '  # how each row of --out begins


def answered_line(row, requests, problem):
    """The line of --requests, {line: request}, that a row of --out answers. Raises InputError with
    that problem if it answers none."""
    require(row.startswith(ROW), problem)
    request = parse_object(row, problem)
    line = request.pop("generated")["line"]
    # compared as texts, since NaN is not equal to itself
    require(json.dumps(request) == json.dumps(requests.get(line)), problem)
    return line


def answered_lines(out, requests):
    """The lines of --requests that a file has answers for. A last row without its line's end is cut
    off, and done again. Raises InputError if the file holds anything else."""
    problem = f"{out}: holds something else than whole answers to these requests; give another --out"
    *rows, cut = read_text(out, problem).split("\n")
    require(ROW.startswith(cut) or cut.startswith(ROW), problem)
    lines = {answered_line(row, requests, problem) for row in rows}
    try:
        json.loads(cut)
    except ValueError:
        pass  # nothing, or a part of a row
    else:  # a whole row: it must be an answer, too, or the file is not ours
        answered_line(cut, requests, problem)
    os.truncate(out, out.stat().st_size - len(cut.encode()))
    return lines


def chains_of_request(session, request, line):
    """The chains that answer a request. Raises InputError naming its line."""
    where = f"{session.options.requests}: line {line}"
    require("generated" not in request, f'{where}: "generated" is the key of answers; rename it')
    prompt = request.get("messages") or request.get("prompt")
    require(isinstance(prompt, (str, list)) and prompt, f'{where} needs "prompt" or "messages"; add one')
    most = checked(request, "max_new_tokens", int, where) or session.options.max_new_tokens
    with refusing(where, InputError):
        ids = session.encode(prompt, most)
    return session.chains(ids, most, f"{session.options.seed} {line}")


def serve(session):
    """Answer every line of --requests, many side by side, and append the answers to --out as they
    are finished. What is there already is not done again."""
    rank, world = torchrun_place()
    requests = dict(list(read_lines(session.options.requests).items())[rank::world])
    out = Path(session.options.out)
    if world > 1:
        out = Path(str(out).removesuffix(".jsonl") + f".{rank}-of-{world}.jsonl")
    require(out.is_file() or not out.exists(), f"{out}: is no file; give another --out")
    with locked(out):
        done = answered_lines(out, requests) if out.exists() else ()
        chains = {line: chains_of_request(session, request, line)
                  for line, request in requests.items() if line not in done}
        session.new_cache(min(session.options.batch, max(len(chains) * session.options.n, 1)))
        failed = answer(session, chains, requests, out)
    require(not failed, f"{len(failed)} requests are not answered, run again with more --memory: "
            f"{'; '.join(list(failed.values())[:3])}")


def answer(session, chains, requests, out):
    """Run chains, {line: those of its request}, to their ends. Returns {line: error} of requests
    that could not be answered."""
    line_of = {chain: line for line, group in chains.items() for chain in group}
    left = Counter(line_of.values())
    failed = {}
    with open(out, "a") as file, tqdm(total=len(line_of), desc=out.name) as bar:
        for over in session.run(list(line_of)):
            for chain in over:
                line = line_of[chain]
                left[line] -= 1
                if chain.error:
                    failed[line] = f"line {line}: {chain.error}"
                if left[line] == 0 and line not in failed:
                    row = {"generated": {"line": line, **answer_of(chains[line])}, **requests[line]}
                    print(json.dumps(row), file=file, flush=True)
            bar.update(len(over))
            bar.set_postfix_str(f"{session.tokens / session.seconds:.1f} tokens/s", refresh=False)
    return failed


def answer_of(chains):
    """What --out says of a request: its chains' texts, and what most of them answer."""
    texts = [chain.stop.text for chain in chains]
    answer, votes = Counter(map(final_answer, texts)).most_common(1)[0]
    tokens = [len(chain.new) for chain in chains]
    return {"texts": texts, "answer": answer, "votes": votes, "tokens": tokens}


def one_prompt(session, prompt, check=None):
    """Answer a prompt in -n chains, and say what they voted for, or what check(texts) says."""
    options = session.options
    ids = session.encode(prompt, options.max_new_tokens)
    if check:
        print(f"{prompt}\n", file=sys.stderr)
    session.new_cache(options.n)
    chains = session.chains(ids, options.max_new_tokens, options.seed, show_now if options.n == 1 else None)
    session.finish(chains, release=not options.show_evictions)
    said = answer_of(chains)
    if options.n > 1:
        print("".join(f"[{i}] {text}\n" for i, text in enumerate(said["texts"], 1)), end="")
    print(flush=True)
    if options.n > 1 or check:
        verdict = f"answer {said['answer']}; {said['votes']} of {options.n} agree"
        print(f"[{check(said['texts']) if check else verdict}]", file=sys.stderr)
    if options.show_evictions:
        chain = chains[0]
        held = held_by_heads(session.cache, chain.row)
        show_evictions(options.show_evictions, session.tokenizer, chain.ids[: chain.fed], held)


def parse(argv=None):
    options = Options(**parse_options(Options, argv))
    modes = (options.prompt is not None) + options.chat + (options.requests is not None)
    require(modes <= 1, "--prompt, --chat and --requests exclude each other")
    require(not options.chat or options.n == 1, "--chat reads its turns one by one; leave out -n")
    require(bool(options.requests) == bool(options.out), "--requests and --out belong together")
    choose_device(options)
    options.batch = options.batch or (16 if options.device == "cpu" else 64)
    if options.model is None:
        finished = list(Path("out").glob("*/results.json"))
        options.model = max(finished, key=os.path.getmtime).parent if finished else SHIPPED
    return options


def main(argv=None):
    options = parse(argv)
    check = None
    if options.prompt == "-":
        with refusing("standard input is not text", ValueError):
            options.prompt = sys.stdin.read()
    elif options.prompt is None and not options.chat and not options.requests:
        from toy.tasks import question

        options.prompt, check = question(options.task, options.seed)
        if options.n == 1 and options.temperature is None:
            options.temperature = 0.0
    require(options.prompt is None or options.prompt.strip(), "the prompt is empty; give some text")
    session = Session(options)
    if options.chat:
        chat(session)
    elif options.requests:
        serve(session)
    else:
        one_prompt(session, options.prompt, check)
    if session.tokens:
        s = session.cache.stats()
        speed = f"in {session.seconds:.2f} s, {session.tokens / session.seconds:.1f} tokens/s"
        held = f"at most {s['peak_pairs']:,} pairs held, in {s['peak_page_bytes']:,} bytes"
        print(f"[{session.tokens} tokens, prompts included, {speed}; compression "
              f"{s['compression_ratio'] or 1:.2f}x; {held}]", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
