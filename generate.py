"""
Generate from a dense or DMS checkpoint with the compacting cache, and see what it forgets.

    python generate.py                                    # the last retrofit, or the shipped model
    python generate.py --model out/my-dms --prompt "How many primes are below 100?"
    python generate.py --chat                             # several turns over one cache
    python generate.py -n 8 --temperature 1.0             # 8 chains that share one prompt, and vote
    python generate.py --requests in.jsonl --out out.jsonl   # many; goes on where it was stopped
    torchrun --nproc-per-node 8 generate.py --requests ...   # over GPUs: out.0-of-8.jsonl, ...
    python generate.py --show-evictions                   # each token by how many heads hold it
    python generate.py --dense                            # the same, nothing evicted

The text goes to standard output; the closing line with speed and memory goes to standard error.
From here down: drawing a token, continuous batching, then the script. A row is a place in the
cache's batch, the index of a sequence there.
"""
import functools
import hashlib
import itertools
import json
import os
import re
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from tokenizers.decoders import DecodeStream
from tqdm import tqdm

from checkpoint import (InputError, check_ids, choose_device, load_model, load_tokenizer,
                        parse_options, read_json, read_lines, resolve, run_script, write_text)
from kernels import triton
from kv_cache import CacheFull, KVCache

SHIPPED = Path(__file__).resolve().parent / "toy" / "retrofitted"


# --------------------------------------------------------------------------------- Drawing a token


def sample(logits, uniform, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0):
    """Draw one token per row: logits (B, V), uniform (B,) in [0, 1) -> (B,) int64.

    At temperature 0 the likeliest. Otherwise the distribution is cut to the top_k likeliest tokens
    (0: all), then to the fewest that hold top_p of the mass, then to those at least min_p times as
    likely as the first; the token is where the sum of what is left passes `uniform`.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p < 1:
        p, order = logits.softmax(-1).sort(descending=True, stable=True)
        drop = p.cumsum(-1) - p >= top_p  # the mass before it suffices...
        drop[:, 0] = False  # ...but never the first
        logits = logits.masked_fill(drop.scatter(1, order, drop), float("-inf"))
    p = logits.softmax(-1)
    p = p.where(p >= min_p * p.amax(-1, keepdim=True), 0)
    mass = p.double().cumsum(-1)
    return torch.searchsorted(mass, uniform.double()[:, None] * mass[:, -1:], right=True)[:, 0]


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
        text = f"{self.seed} {len(self.new)}"
        digest = hashlib.blake2b(text.encode(), digest_size=3).digest()
        return int.from_bytes(digest, "big") / 2**24


class DecodeStep:
    """One token for every sequence of a cache: forward pass and sampling. On a GPU it is captured
    as a CUDA graph the second time that it runs on the same tensors; nothing in it waits for the
    GPU, but for the tokens that come out."""

    def __init__(self, model, cache, sampling):
        self.model = model
        self.cache = cache
        self.sampling = sampling
        shape = (cache.batch_size, 3)  # of every row: token id, random number, 1 if it runs else 0
        self.inputs = torch.zeros(shape, dtype=torch.float64, device=cache.device)
        # the plain functions wait for the GPU, so only Triton's can be captured
        self.captures = cache.device.type == "cuda" and triton is not None
        self.graph = None
        self.table = None  # the page table that the last run used: the cache may replace it

    @torch.inference_mode()
    def __call__(self, inputs):
        """inputs: {row: (token id, random number in [0, 1))} for the rows that run -> {row: next
        token id}. Raises CacheFull, before anything has changed."""
        rows = range(len(self.inputs))
        inputs_of_all = [(*inputs[row], 1) if row in inputs else (0, 0, 0) for row in rows]
        self.inputs.copy_(torch.tensor(inputs_of_all, dtype=torch.float64))
        self.cache.reserve(self.inputs[:, 2].long())
        if not self.captures or self.table is not self.cache.rows.table:
            self.table = self.cache.rows.table
            self.graph = None
            self.run()
        else:
            if self.graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):  # records, and runs nothing
                    self.run()
                self.graph = graph
            self.graph.replay()
        drawn = self.next.tolist()
        return {row: drawn[row] for row in inputs}

    def run(self):
        token, uniform, count = self.inputs.unbind(1)
        with self.cache.append(count.long(), 1, reserve=False) as feed:
            x = self.model.hidden(token.long()[:, None], feed, feed.start)
        self.next = sample(self.model.lm_head(x)[:, -1], uniform, **self.sampling)


# ----------------------------------------------------------------------------- Continuous batching


class Scheduler:
    """Which sequence runs in which row of the cache, and which wait."""

    def __init__(self, model, cache, sequences, end_ids, sampling, release):
        self.model = model
        self.cache = cache
        self.end_ids = end_ids
        self.sampling = sampling
        self.release = release
        self.step = DecodeStep(model, cache, sampling)
        self.running = {}  # {row: sequence}, the youngest last
        self.waiting = deque(sorted(sequences, key=lambda s: s.row is None))  # those with a row first
        self.free_rows = self.find_free_rows()
        self.rows = cache.batch_size
        self.has_whole_cache = len(self.free_rows) == self.rows
        self.blocked_until_one_ends = False
        self.fork_limit = self.rows  # how many with the same prompt may start as one

    def find_free_rows(self):
        """The rows that hold nothing. Raises InputError if the sequences cannot have their rows."""
        seen = self.cache.seen.tolist()
        new = [sequence for sequence in self.waiting if sequence.row is None]
        for sequence in self.waiting:
            if sequence not in new and seen[sequence.row] != sequence.fed:
                raise InputError("the cache does not hold what a sequence has fed; feed it anew")
        free_rows = [row for row, tokens in enumerate(seen) if tokens == 0]
        if len(free_rows) < (min(len(new), 1) if self.release else len(new)):
            raise InputError(f"{len(new)} sequences cannot all stay in {len(free_rows)} free rows "
                             f"of the cache; release them, or others first")
        return free_rows

    def decode(self):
        """One more token for all that run, [(sequence, token id)]."""
        if not self.running:
            return []
        try:
            drawn = self.step({row: (s.ids[-1], s.uniform()) for row, s in self.running.items()})
        except CacheFull as e:
            youngest = next(reversed(self.running.values()))
            return self.put_back([youngest], e)
        return [(sequence, drawn[row]) for row, sequence in self.running.items()]

    def admit(self):
        """Start what waits while there is room; the first token of each, [(sequence, token id)]."""
        drawn = []
        while self.may_start():
            group = self.next_group()
            try:
                logits = self.feed(group)
            except CacheFull as e:
                self.fork_limit = max(len(group) // 2, 1)
                return drawn + self.put_back(group, e)
            uniform = torch.tensor([s.uniform() for s in group], device=logits.device)
            tokens = sample(logits.expand(len(group), -1), uniform, **self.sampling)
            drawn += zip(group, tokens.tolist())
        return drawn

    def may_start(self):
        """Is there a row for the first that waits, and are there pages for about what it is going
        to hold, by the compression seen so far?"""
        if not self.waiting or self.blocked_until_one_ends:
            return False
        first = self.waiting[0]
        if first.row is None and not self.free_rows:
            return False
        return not self.running or self.cache.has_room_for(len(first.ids) - first.fed)

    def next_group(self):
        """Take the first that waits, and the next ones if they begin with the same tokens, from
        the queue, and give them rows."""
        group = [self.waiting.popleft()]
        beginning = (group[0].ids, None)
        limit = min(len(self.free_rows), self.fork_limit)
        while self.waiting and len(group) < limit:
            if (self.waiting[0].ids, group[0].row) != beginning:
                break
            group.append(self.waiting.popleft())
        for sequence in group:
            if sequence.row is None:
                sequence.row = self.free_rows.pop(0)
            self.running[sequence.row] = sequence
        return group

    def feed(self, group):
        """Feed what a group shares once, and fork it. Returns logits (1, V) of the next token."""
        first = group[0]
        ids = torch.tensor([first.ids[first.fed :]], device=self.model.device)
        logits = self.model(ids, cache=self.cache, sequence=first.row, last_only=True)
        if len(group) > 1:
            sources = list(range(self.cache.batch_size))
            for sequence in group:
                sources[sequence.row] = first.row
            self.cache.select(sources)
        return logits[:, -1]

    def put_back(self, sequences, problem):
        """For want of pages: they wait to be fed again, first in line, with what they have drawn.
        One that does not fit by itself has failed: [(it, None)]."""
        self.take_out(sequences, release=True)
        self.waiting.extendleft(reversed(sequences))
        self.blocked_until_one_ends = bool(self.running)
        if self.running or len(sequences) > 1:
            return []
        failed = self.waiting.popleft()
        failed.over = True
        failed.error = str(problem)
        return [(failed, None)]

    def take_out(self, sequences, release):
        """Run them no longer. release: their rows and pages are free again."""
        rows = [sequence.row for sequence in sequences]
        for row in rows:
            del self.running[row]
        if release and rows:
            self.cache.release(rows)
            self.free_rows += rows
            for sequence in sequences:
                sequence.row = None
                sequence.fed = 0

    def record(self, drawn):
        for sequence, token in drawn:
            if token is None:
                continue
            sequence.fed = len(sequence.ids)
            sequence.ids.append(token)
            sequence.new.append(token)
            sequence.over = len(sequence.new) >= sequence.max_new_tokens or token in self.end_ids
            if token not in self.end_ids and sequence.stop is not None:
                sequence.over |= sequence.stop(token)

    def retire(self):
        """Take those that are over out of the batch."""
        over = [sequence for sequence in self.running.values() if sequence.over]
        if over:
            self.take_out(over, self.release)
            self.blocked_until_one_ends = False
            self.fork_limit = self.rows
            self.shrink()

    def shrink(self):
        """Compute fewer rows when nobody waits for the others."""
        is_small = 0 < len(self.running) <= self.cache.batch_size // 2
        if is_small and self.release and self.has_whole_cache and not self.waiting:
            self.cache.select(list(self.running))
            self.running = dict(enumerate(self.running.values()))
            for row, sequence in self.running.items():
                sequence.row = row
            self.step = DecodeStep(self.model, self.cache, self.sampling)

    def close(self):
        """Leave nothing of what is still running behind, and the cache with all its rows."""
        if self.release:
            self.take_out(list(self.running.values()), release=True)
        if self.cache.batch_size < self.rows:
            self.cache.select([0] * self.rows)


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
            scheduler.record(drawn)
            scheduler.retire()
            yield drawn
    finally:
        scheduler.close()


# -------------------------------------------------------------------------------------- The script


class Stream:
    """Tokens in, printable text out (`text`, and by pieces to `show`) as soon as it is certain:
    half a character and what may begin a stop string are held back. As a Sequence's `stop` it says
    whether a stop string has come."""

    def __init__(self, tokenizer, stop_strings=(), show=None):
        self.tokenizer = tokenizer
        self.stops = [text for text in stop_strings if text]
        self.show = show
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.ids = []
        self.decoded = ""
        self.text = ""  # as much of it as is certain
        self.stopped = False

    def __call__(self, token):
        self.ids.append(token)
        if self.stops or self.show:
            self.decoded += self.decoder.step(self.tokenizer.fast, token) or ""
            held_back = 0
            for stop in self.stops:
                begun = [n for n in range(1, len(stop)) if self.decoded.endswith(stop[:n])]
                held_back = max([held_back, *begun])
            self.let_out(len(self.decoded) - held_back)
        return self.stopped

    def finish(self):
        """Let out what was held back and turned out to be text after all."""
        if not self.stopped:
            self.decoded = self.tokenizer.decode(self.ids, skip_special_tokens=True)
            self.let_out(len(self.decoded))

    def let_out(self, end):
        """Make decoded[:end] the text, or what comes before a stop string."""
        found = [self.decoded.find(stop, len(self.text)) for stop in self.stops]
        found = [at for at in found if at >= 0]
        self.stopped = bool(found)
        end = min(found, default=end)
        if self.show:
            self.show(self.decoded[len(self.text) : end])
        self.text = self.decoded[: max(end, len(self.text))]


def final_answer(text):
    """What chains vote on: the contents of the last \\boxed{}, else the last number, else the last
    line; None for no text."""
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
    numbers = re.findall(r"-?\d[\d,]*\.?\d*", text)
    lines = [line for line in text.split("\n") if line.strip()]
    if numbers and not boxed:
        return numbers[-1].replace(",", "").rstrip(".")
    return (boxed or lines or [None])[-1]


def vote(chains, read=final_answer):
    """(the answer that most chains give, as `read` finds it in their texts, how many do)."""
    return Counter(read(chain.stop.text) for chain in chains).most_common(1)[0]


@dataclass
class Options:
    """Of the command line: --max-new-tokens 100 for max_new_tokens."""

    model: str = None  # folder or hub id (default: the last retrofit, else the shipped toy model)
    adapter: str = None  # DMS adapter tensors to lay over the model: a file or a folder
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
    show_evictions: bool = False  # print the text by how many heads hold each token
    compile: bool = False  # torch.compile what lies between attentions (for a GPU)
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = None  # (default: bfloat16 on a GPU)


class Session:
    """A loaded model, its tokenizer, and the options of a run."""

    def __init__(self, options):
        self.options = options
        folder = resolve(options.model)
        self.tokenizer = load_tokenizer(folder)
        dtype = getattr(torch, options.dtype)
        self.model = load_model(folder, options.device, dtype, adapter=options.adapter)
        if options.compile:
            self.model.compile()
        if options.dense and self.model.config.dms is not None:
            self.model.config.dms.disable_eviction = True
        file = folder / "generation_config.json"
        stated = read_json(file) if file.exists() else {}
        ends = stated.get("eos_token_id")
        ends = [*ends] if isinstance(ends, list) else [ends]
        self.end_ids = {end for end in [*ends, self.tokenizer.end_id] if isinstance(end, int)}
        if stated.get("do_sample") is False:
            stated["temperature"] = 0.0
        self.sampling = {}  # what sample() has no value for is left to its defaults
        for key in ("temperature", "top_k", "top_p", "min_p"):
            value = getattr(options, key)
            value = stated.get(key) if value is None else value
            if value is not None:
                self.sampling[key] = value
        self.sampling.setdefault("temperature", 1.0)
        self.cache = None
        self.tokens = 0
        self.seconds = 0.0

    def new_cache(self, rows):
        model = self.model
        memory = self.options.memory and self.options.memory * 1e9
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

    def chains(self, ids, max_new_tokens, seed, count=1, show=None):
        """Sequences that continue ids, each with a Stream as its `stop`."""
        chains = []
        for i in range(count):
            stream = Stream(self.tokenizer, self.options.stop, show)
            chains.append(Sequence(ids, max_new_tokens, f"{seed} {i}", stream))
        return chains

    def run(self, chains, release=True):
        """Generate; yields the chains that are over, after each step."""
        begin = time.perf_counter() - self.seconds
        steps = generate(self.model, self.cache, chains, self.end_ids, self.sampling, release)
        for drawn in steps:
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
                if chain.error:
                    raise InputError(chain.error)


def read_turns():
    """Turns of a conversation from standard input, a line each."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield {"role": "user", "content": line.rstrip("\n")}


def chat(session):
    """Turns over one cache: each feeds only what the template puts after an answer, the new turn
    included. What the model said stays as it was said, thoughts too, as the cache cannot unsay it.
    """
    options = session.options
    mark = "@ANSWER@"
    before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    show = functools.partial(print, end="", flush=True)
    chain = Sequence([], 0)
    session.new_cache(1)
    for number, turn in enumerate(read_turns()):
        turns = [*before, turn] if number else [turn]
        text = session.tokenizer.apply_chat_template(turns, add_generation_prompt=True)
        if number:
            text = text.split(mark, 1)[1]  # from what ends an answer on
        ids = chain.ids
        if ids and ids[-1] in session.end_ids:
            ids = ids[:-1]  # drawn, but not fed: the template ends the answer itself
        ids = ids + session.tokenizer.encode(text, add_special_tokens=False)
        check_ids(session.model.config, ids, options.max_new_tokens)
        seed = f"{options.seed} {number}"
        history = chain
        chain = session.chains(ids, options.max_new_tokens, seed, show=show)[0]
        chain.row = history.row
        chain.fed = history.fed
        session.finish([chain], release=False)
        print(flush=True)


def serve(session):
    """Answer every line of --requests, many side by side, and append the results to --out as they
    are finished. What is there already is not done again."""
    options = session.options
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    out = Path(options.out)
    if world > 1:
        out = out.with_suffix(f".{rank}-of-{world}.jsonl")
    done = {}
    if out.exists():
        done = {row.get("line"): row for row in read_lines(out, cut=True)}
    todo = {}  # {chain: (its request, all the request's chains)}
    for line, request in list(enumerate(read_lines(options.requests), 1))[rank::world]:
        prompt, most = check_request(request, line, options)
        if line not in done:
            ids = session.encode(prompt, most)
            chains = session.chains(ids, most, f"{options.seed} {line}", options.n)
            todo |= dict.fromkeys(chains, ({**request, "line": line}, chains))
        elif not request.items() <= done[line].items():
            raise InputError(f"{out}: its line {line} answers another request; choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "".join(json.dumps(row) + "\n" for row in done.values()))
    session.new_cache(min(options.batch, max(len(todo), 1)))
    with open(out, "a") as file, tqdm(total=len(todo), desc="chains", disable=rank > 0) as bar:
        for over in session.run(list(todo)):
            for chain in over:
                request, chains = todo.pop(chain)
                if not any(other in todo for other in chains):
                    file.write(json.dumps(answer_of(request, chains)) + "\n")
                    file.flush()
            bar.update(len(over))
            bar.set_postfix_str(f"{session.tokens / session.seconds:.1f} tokens/s", refresh=False)


def check_request(request, line, options):
    """(its prompt, its max_new_tokens). Raises InputError naming the line."""
    prompt = request.get("messages", request.get("prompt"))
    most = request.get("max_new_tokens", options.max_new_tokens)
    if not prompt or not isinstance(prompt, (str, list)) or type(most) is not int or most < 1:
        raise InputError(f'{options.requests}: line {line} needs "prompt" (text) or "messages" (a '
                         f"list), and max_new_tokens, if it is there, of at least 1; fix it")
    return prompt, most


def answer_of(request, chains):
    """The line of --out about a request: its chains' texts, and what most of them answer."""
    answer, votes = vote(chains)
    texts = [chain.stop.text for chain in chains]
    tokens = [len(chain.new) for chain in chains]
    row = {**request, "texts": texts, "answer": answer, "votes": votes, "tokens": tokens}
    for chain in chains:
        if chain.error:
            row["error"] = chain.error
    return row


def one_prompt(session, text, read=final_answer, expected=None):
    """Answer a text, in -n chains, and say what they voted for, as `read` finds it in them."""
    options = session.options
    ids = session.encode(text, options.max_new_tokens)
    if expected is not None:
        print(f"{text}\n", file=sys.stderr)
    show = functools.partial(print, end="", flush=True) if options.n == 1 else None
    session.new_cache(options.n)
    chains = session.chains(ids, options.max_new_tokens, options.seed, options.n, show)
    session.finish(chains, release=not options.show_evictions)
    if options.n > 1:
        for i, chain in enumerate(chains, 1):
            print(f"[{i}] {chain.stop.text}")
    print(flush=True)
    answer, votes = vote(chains, read)
    if expected is not None:
        right = sum(read(chain.stop.text) == expected for chain in chains)
        agree = f"expected {expected}; {right} of {options.n} right"
    else:
        agree = f"{votes} of {options.n} agree"
    if expected is not None or options.n > 1:
        print(f"[answer {answer}, {agree}]", file=sys.stderr)
    if options.show_evictions:
        show_evictions(session, chains[0])


def show_evictions(session, chain):
    """Print the text that the cache has read, each token shaded by the share of (layer, head) pairs
    that still hold it: bright for all, dark for few; where the output is no terminal, the share in
    tenths follows each token in brackets."""
    cache = session.cache
    heads = list(itertools.product(range(cache.layers), range(cache.kv_heads)))
    holders = torch.zeros(chain.fed)
    for layer, head in heads:
        holders[cache.positions(chain.row, layer, head).long()] += 1
    shares = holders / len(heads)
    for token, share in zip(chain.ids, shares.tolist()):
        text = session.tokenizer.decode([token])
        if sys.stdout.isatty():
            grey = 236 + int(share * 19)  # of the 256 colours, 232 to 255 are greys
            text = f"\x1b[38;5;{grey}m{text}\x1b[0m"
        else:
            text = f"{text}[{int(share * 10)}]"
        print(text, end="")
    print()


def parse(argv=None):
    options = Options(**parse_options(Options, argv))
    check(options)
    options.device = choose_device(options.device)
    on_cpu = options.device == "cpu"
    options.dtype = options.dtype or ("float32" if on_cpu else "bfloat16")
    options.batch = options.batch or (16 if on_cpu else 64)
    if options.model is None:
        runs = [file.parent / "config.json" for file in Path("out").glob("*/settings.json")]
        runs = [file for file in runs if file.exists()]
        options.model = max(runs, key=os.path.getmtime).parent if runs else SHIPPED
    return options


def check(options):
    """What can be known to be wrong before anything is loaded."""
    for name in ("n", "max_new_tokens", "batch"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1")
    if options.memory is not None and not options.memory > 0:
        raise InputError("--memory must be above 0")
    if options.temperature is not None and options.temperature < 0:
        raise InputError("--temperature must be 0 or more")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise InputError("--top-p must be above 0 and at most 1")
    has_prompt = options.prompt is not None
    if options.chat and (options.n > 1 or has_prompt):
        raise InputError("--chat reads its turns from standard input; leave out -n and --prompt")
    if bool(options.requests) != bool(options.out):
        raise InputError("--requests and --out belong together")
    if options.requests and (options.chat or has_prompt):
        raise InputError("--requests does without --prompt and --chat")


def main(argv=None):
    options = parse(argv)
    toy_answer = ()
    if options.prompt == "-":
        options.prompt = sys.stdin.read()
    elif options.prompt is None and not options.chat and not options.requests:
        from toy.tasks import question

        options.prompt, *toy_answer = question(options.task, options.seed)
        if options.temperature is None and options.n == 1:
            options.temperature = 0.0
    if options.prompt is not None and not options.prompt.strip():
        raise InputError("the prompt is empty; give some text with --prompt")
    session = Session(options)
    if options.chat:
        chat(session)
    elif options.requests:
        serve(session)
    else:
        one_prompt(session, options.prompt, *toy_answer)
    if session.tokens:
        print_speed(session)


def print_speed(session):
    stats = session.cache.stats()
    print(f"[{session.tokens} tokens in {session.seconds:.2f} s, prompts included, "
          f"{session.tokens / session.seconds:.1f} tokens/s; "
          f"compression {stats['compression_ratio'] or 1:.2f}x; "
          f"at most {stats['peak_pairs']:,} pairs held, in {stats['peak_page_bytes']:,} bytes of "
          f"a pool of {stats['pool_bytes']:,}]", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
