"""
Generate from a dense or DMS checkpoint with the compacting cache, and see what it forgets.

    python generate.py                                    # the last retrofit, or the shipped model
    python generate.py --model out/my-dms --prompt "How many primes are below 100?"
    python generate.py --prompt - < question.txt          # the prompt from standard input
    python generate.py --chat                             # several turns over one cache
    python generate.py -n 8 --temperature 1.0             # 8 chains that share one prompt, and vote
    python generate.py --requests in.jsonl --out out.jsonl   # many; goes on where it was stopped
    torchrun --nproc-per-node 8 generate.py --requests ...   # over GPUs: out.0-of-8.jsonl, ...
    python generate.py --show-evictions                   # each token by how many heads hold it
    python generate.py --show-evictions page.html         # and what each of them holds
    python generate.py --dense                            # the same, nothing evicted

A line of --requests is a JSON object with "prompt" or "messages". It may state options of its own
(REQUEST_OPTIONS, by the names that servers use, too), and for the chat template "tools",
"enable_thinking" and "chat_template_kwargs". Its row in --out has the answers under "generated",
then the request's own keys.

The text goes to standard output; the closing line with speed and memory goes to standard error.
Read it from top to bottom: how a token is sampled, the decode step, continuous batching, text out
of tokens, and the script.
"""

import functools
import hashlib
import json
import os
import re
import sys
import time
import weakref
from collections import Counter, deque, namedtuple
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock
from tqdm import tqdm

from checkpoint import (context_of, end_ids, generation_defaults, load_model, load_tokenizer,
                        resolve, say)
from common import (InputError, choose_device, parse_options, read_text, require, run_script,
                    torchrun_place)
from kv_cache import PLAIN, CacheFull, KVCache
from show import held_by_heads, show_evictions

SHIPPED = Path(__file__).resolve().parent / "toy" / "retrofitted"


# ---------------------------------------------------------------------------------------- Sampling


# How the next token of a sequence is sampled: arguments of `sample`
Sampling = namedtuple("Sampling", "temperature top_k top_p min_p repetition_penalty",
                      defaults=(0.0, 0, 1.0, 0.0, 1.0))


def sample(logits, uniform, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0,
           repetition_penalty=1.0, ids=()):
    """One token for each of B sequences: logits (B, V), uniform (B,) in [0, 1) -> (B,) int64.

    First the tokens that a sequence has already, ids [B][T], are made less likely by the penalty
    (Keskar et al. 1909.05858). At a temperature below 1e-5 the likeliest token is taken. Otherwise
    the distribution is cut to the top_k likeliest tokens (0: all), then to the fewest that hold
    top_p of the mass, then to those at least min_p times as likely as the first. The token is where
    the running sum of what is left passes `uniform`, in order of likelihood if it was sorted, else
    of token ids.
    """
    if repetition_penalty != 1:
        occurs = torch.zeros_like(logits, dtype=torch.bool)
        for row, sequence in zip(occurs, ids):
            row[list(set(sequence))] = True
        less = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(occurs, less, logits)
    if temperature < 1e-5:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    order = None  # the token ids of sorted logits
    if top_k > 0 or top_p < 1:
        V = logits.shape[-1]
        logits, order = logits.topk(min(int(top_k), V) if top_k > 0 else V)
    p = logits.softmax(-1)
    if top_p < 1:  # a token stays unless those before it suffice; the first always does
        p = p.where(p.cumsum(-1) - p < max(top_p, 1e-9), 0)
    p = p.where(p >= min_p * p.amax(-1, keepdim=True), 0)
    mass = p.double().cumsum(-1)
    point = uniform.double()[:, None] * mass[:, -1:]
    place = torch.searchsorted(mass, point, right=True)
    return (place if order is None else order.gather(1, place))[:, 0]


def next_tokens(sequences, logits):
    """The next token id of each Sequence: logits (n, V) -> [n ids]. Those of equal settings are
    sampled together; what runs beside a sequence changes nothing for it."""
    groups = {}
    for place, sequence in enumerate(sequences):
        groups.setdefault(sequence.sampling, []).append(place)
    tokens = torch.zeros(len(sequences), dtype=torch.int64, device=logits.device)
    for sampling, places in groups.items():
        uniform = torch.tensor([sequences[i].uniform() for i in places], device=logits.device)
        ids = [sequences[i].ids for i in places]
        tokens[places] = sample(logits[places], uniform, *sampling, ids)
    return tokens.tolist()


# --------------------------------------------------------------------------------- The decode step


class DecodeStep:
    """Appends one token to every sequence that runs, and gives the logits of the next.

    On a GPU it is captured as a CUDA graph the second time that it runs on the same page table, and
    replayed from then on: one launch in place of hundreds. cache.decode_step keeps it as long as
    the cache lives, so the turns of a conversation do not capture it anew.
    """

    def __init__(self, model, cache):
        self.model = model
        # weak: the cache holds its step, and a circle would keep its memory from being freed
        self.cache = weakref.proxy(cache)
        # plain kernels wait for the GPU, which a graph cannot do
        self.captures = cache.device.type == "cuda" and cache.kernels != PLAIN
        self.table = None  # the page table of the last run: the cache may replace it by a wider one

    @torch.inference_mode()
    def __call__(self, tokens):
        """tokens: {index in the batch: token id} of the sequences that run. Returns logits (B, V),
        which the next call may overwrite. Raises CacheFull before anything has changed."""
        every = range(self.cache.batch_size)
        inputs = [[tokens.get(i, 0) for i in every], [i in tokens for i in every]]
        inputs = torch.tensor(inputs, dtype=torch.int64, device=self.cache.device)
        self.cache.reserve(inputs[1])
        if not self.captures or self.table is not self.cache.rows.table:
            self.table = self.cache.rows.table
            self.inputs = inputs
            self.graph = None
            return self.run()
        self.inputs.copy_(inputs)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records, and runs nothing
                self.logits = self.run()
        self.graph.replay()
        return self.logits

    def run(self):
        token, count = self.inputs
        try:
            for ids, attend in self.cache.pieces(token[:, None], count):  # a single piece
                x = self.model.hidden(ids, attend, attend.start)
        except BaseException:  # one layer may have stored its token, and the next one has not
            self.cache.release(count.nonzero()[:, 0].tolist())
            raise
        return self.model.lm_head(x[:, 0])


# ----------------------------------------------------------------------------- Continuous batching


@dataclass(eq=False)
class Sequence:
    """A text in the making. `generate` adds what it samples to ids and to new."""

    ids: list  # all of its tokens: the prompt's, then its own
    max_new_tokens: int
    seed: object = 0
    stop: object = None  # (token id) -> bool, asked about every new token but an end token
    sampling: Sampling = Sampling()
    new: list = field(default_factory=list)  # its own so far, an end token included
    over: bool = False
    finish_reason: str = "length"  # once it is over: "stop", or "length" at max_new_tokens
    error: str | None = None  # why it could not be finished
    index: int | None = None  # in the cache's batch, while the cache holds ids[:fed]
    fed: int = 0

    def __post_init__(self):
        self.ids = list(self.ids)

    def uniform(self):
        """The random number in [0, 1), exact in float32, for its next token. It follows from the
        seed and the token's place alone."""
        place = f"{self.seed} {len(self.new)}".encode()
        return int(hashlib.blake2b(place, digest_size=3).hexdigest(), 16) / 2**24


class Scheduler:
    """Which sequence runs at which index of the cache's batch, and which wait."""

    def __init__(self, model, cache, sequences, end_ids, release):
        cache.check_model(model)
        cache.decode_step = cache.decode_step or DecodeStep(model, cache)
        self.model = model
        self.cache = cache
        self.end_ids = end_ids
        self.release = release
        self.running = []  # the youngest last
        self.blocked = False  # after pages ran out, nothing starts until a sequence ends
        # those that are in the cache go first: others may have to wait for their places
        self.waiting = deque(sorted(sequences, key=lambda s: s.index is None))
        seen = cache.seen.tolist()
        taken = {s.index: s.fed for s in sequences if s.index is not None}
        require(all(seen[i] == fed for i, fed in taken.items()),
                "the cache does not hold what a sequence has fed")
        self.free = [i for i, n in enumerate(seen) if n == 0 and i not in taken]
        fresh = len(sequences) - len(taken)
        require(fresh <= len(self.free) or release and (taken or self.free),
                "more sequences than the cache has places; release them as they end")

    def step(self):
        """One more token for all that run, and the first of those that start: [(sequence, id)]."""
        new = []
        try:
            if self.running:
                logits = self.cache.decode_step({s.index: s.ids[-1] for s in self.running})
                new = self.record(self.running, logits[[s.index for s in self.running]])
        except CacheFull as e:
            new = self.put_back(self.running[-1], e)
        source = None  # the last prompt that was computed: its ids, index and logits
        while self.may_start():
            sequence = self.waiting.popleft()
            if sequence.index is None:
                sequence.index = self.free.pop(0)
            self.running.append(sequence)
            try:
                if source and sequence.fed == 0 and sequence.ids == source[0]:  # fork it
                    every = range(self.cache.batch_size)
                    self.cache.select([source[1] if i == sequence.index else i for i in every])
                else:
                    ids = torch.tensor([sequence.ids[sequence.fed :]], device=self.model.device)
                    at = sequence.index
                    logits = self.model(ids, cache=self.cache, sequence=at, last_only=True)[:, -1]
                    source = (list(sequence.ids), at, logits)
            except CacheFull as e:
                new += self.put_back(sequence, e)
                break
            new += self.record([sequence], source[2])
        for sequence in [s for s in self.running if s.over]:
            self.running.remove(sequence)
            self.blocked = False
            if self.release:
                self.give_up_place(sequence)
        return new

    def may_start(self):
        """Is there a place for the first that waits, and are there pages for what it will hold
        after its prompt, if it compresses as others have so far? There may be none for what it says
        later: then the youngest is put back."""
        if not self.waiting or self.blocked or self.waiting[0].index is None and not self.free:
            return False
        pairs = len(self.waiting[0].ids) - self.waiting[0].fed
        pairs /= self.cache.compression_ratio() or 1
        # A head that holds n pairs has ceil(n / page_size) pages. Over many heads that is
        # n / page_size + 1/2 on average, as the last page is half full. Another half is a margin.
        pages = self.cache.layers * self.cache.kv_heads * (pairs / self.cache.page_size + 1)
        return pages <= int(self.cache.pool.free_count) or not self.running

    def put_back(self, sequence, problem):
        """It has found no page: it gives up those that it has, and waits to be appended again with
        all that it has said, first in line. If no other can make room it has failed: [(it, None)].
        """
        self.running.remove(sequence)
        # where nothing runs, conversations that wait for their turn must give up theirs
        others = self.running or [s for s in self.waiting if s.index is not None]
        for each in [sequence] if self.running else [sequence, *others]:
            self.give_up_place(each)
        self.blocked = bool(self.running)
        if others:
            self.waiting.appendleft(sequence)
            return []
        sequence.over = True
        sequence.error = str(problem)
        return [(sequence, None)]

    def give_up_place(self, sequence):
        self.cache.release([sequence.index])
        self.free.append(sequence.index)
        sequence.index = None
        sequence.fed = 0

    def record(self, sequences, logits):
        new = list(zip(sequences, next_tokens(sequences, logits)))
        for sequence, token in new:
            sequence.fed = len(sequence.ids)  # the cache holds all but the new token
            sequence.ids.append(token)
            sequence.new.append(token)
            stops = token in self.end_ids or bool(sequence.stop and sequence.stop(token))
            sequence.finish_reason = "stop" if stops else "length"
            sequence.over = stops or len(sequence.new) >= sequence.max_new_tokens
        return new


@torch.inference_mode()
def generate(model, cache, sequences, end_ids=(), sampling=None, release=True):
    """Continue sequences, a list of any length, in the cache's batch: continuous batching.

    Yields after each step the list of (sequence, new token id), None for the token of one that has
    failed. A sequence ends on an id of end_ids, when its stop(token) is true, after max_new_tokens,
    or because it does not fit by itself. When pages run out the youngest gives its own back and is
    appended again later: nothing is lost, and nothing is sampled twice. sampling: {field of
    Sampling: value}, for all of them. release=False: ended sequences keep their places, where the
    cache holds all but their last token. To go on with one, add to its ids, reset `new` and `over`,
    and hand it in again.
    """
    for sequence in sequences:
        sequence.sampling = sequence.sampling._replace(**sampling or {})
    scheduler = Scheduler(model, cache, sequences, end_ids, release)
    try:
        while scheduler.waiting or scheduler.running:
            yield scheduler.step()
    finally:  # the caller may leave early: nothing of what runs stays behind
        for sequence in scheduler.running if release else []:
            scheduler.give_up_place(sequence)


# ------------------------------------------------------------------------------ Text out of tokens


class Stream:
    """Tokens in, text out (`text`, and by pieces to `show`) as soon as no later token can change
    it. In the end it is what the tokenizer makes of all tokens at once, up to a stop string. As a
    Sequence's `stop` it says whether one has come.
    """

    def __init__(self, tokenizer, stops=(), show=lambda text: None, skip_special_tokens=True):
        self.decode = functools.partial(tokenizer.decode, skip_special_tokens=skip_special_tokens)
        self.name_of = tokenizer.fast.id_to_token
        self.stops = [stop for stop in stops if stop]
        # a special token is no part of the text, so as a stop string it is an end token
        ids = [tokenizer.fast.token_to_id(stop) for stop in self.stops]
        self.end_ids = {id for id in ids if id is not None and not self.decode([id, id])}
        self.show = show
        # The last tokens whose text is out. A text's first token is decoded differently (Llama 2's
        # loses its space), so the next ones must not be taken for it.
        self.before = []
        self.held_back = []  # tokens whose text may still change
        self.text = ""
        self.rest = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def __call__(self, token):
        if token in self.end_ids:
            self.finish()
            self.stopped = True
        elif self.decode([token, token]):  # not a special token (twice: a first space is dropped)
            self.held_back.append(token)
            # The first bytes of a character are decoded as U+FFFD. Tokens of one byte, <0x0A>, are
            # decoded with their neighbours: a wrong byte makes U+FFFD of all that lie side by side.
            is_byte = self.name_of(token).startswith("<0x")
            if not is_byte and not self.undecided().endswith("\ufffd"):
                self.let_out(self.undecided())
                self.before, self.held_back = self.held_back, []
        return self.stopped

    def undecided(self):
        """The text of the tokens that are held back."""
        return self.decode(self.before + self.held_back)[len(self.decode(self.before)) :]

    def finish(self):
        """Let out what was held back, and turned out to be text after all."""
        if not self.stopped:
            self.let_out(self.undecided(), is_last=True)
            self.held_back = []

    def let_out(self, text, is_last=False):
        self.rest += text
        ends = [self.rest.find(stop) for stop in self.stops if stop in self.rest]
        begun = [n for stop in self.stops for n in range(len(stop)) if self.rest.endswith(stop[:n])]
        held_back = 0 if is_last else max(begun, default=0)
        certain = self.rest[: min(ends, default=len(self.rest) - held_back)]
        self.stopped = bool(ends)
        self.rest = self.rest[len(certain) :]
        self.text += certain
        self.show(certain)


NUMBER = r"(?:(?<![\w.)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:e[+-]?\d+)?(?:/\d+)?"


def final_answer(text):
    """What chains vote on: the contents of the last \\boxed{}, else the last number, else the last
    line; None for no text. \\text{(A)} is A, and 12,345 is 12345."""
    *_, answer = None, *re.findall(r".*\S.*", text)
    *_, answer = answer, *re.findall(NUMBER, text)
    _, boxed, rest = text.rpartition("\\boxed{")
    depth = list(accumulate((character == "{") - (character == "}") for character in rest))
    if boxed and -1 in depth:
        answer = rest[: depth.index(-1)]
    if answer is not None:
        answer = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}", r"\1", answer).strip()
        answer = re.sub(r"^\((\w)\)$", r"\1", answer)
        answer = answer.replace(",", "") if re.fullmatch(NUMBER, answer) else answer
    return answer


# -------------------------------------------------------------------------------------- The script


show_now = functools.partial(print, end="", flush=True)


@dataclass
class Options:
    """Of the command line: --max-new-tokens 100 for max_new_tokens."""

    model: str = None  # folder or hub id (default: the last retrofit, else the shipped toy model)
    adapter: str = None  # DMS adapters to lay over the model: a file, a folder or a hub id
    prompt: str = None  # text, or - for standard input (default: a problem of the toy world)
    raw: bool = False  # take the prompt as it is, without the chat template
    task: Literal["needles", "variables", "arithmetic"] = "needles"  # the toy problem to ask
    chat: bool = False  # several turns, a line each, over one cache
    n: int = 1  # parallel chains of each prompt
    requests: str = None  # a file of JSON lines with "prompt" or "messages"
    out: str = None  # JSON lines with their answers; those that it holds are not made again
    batch: int = None  # most chains side by side (default: 16 on a CPU, 64 on a GPU)
    memory: float = None  # GB of the cache (default: 80% of what a GPU has free, or a machine has)
    max_new_tokens: int = 400
    temperature: float = None  # 0 is greedy (default: generation_config.json, else 1; toy: 0)
    top_k: int = None
    top_p: float = None
    min_p: float = None
    repetition_penalty: float = None
    stop: list = ()  # a string or special token that ends the text; may be repeated
    seed: int = 0
    dense: bool = False  # switch eviction off
    show_evictions: str = ""  # each token by how many heads hold it: printed, or a .html file
    compile: bool = False  # torch.compile what lies between attentions (for a GPU)
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = None  # (default: bfloat16 on a GPU)


# the least and the most of a number that a request may state, too
RANGES = {"n": (1, 1000), "max_new_tokens": (1, 2**31), "temperature": (0, 1000), "top_p": (0, 1),
          "top_k": (-1, 2**31), "min_p": (0, 1), "repetition_penalty": (0.01, 100)}


class Session:
    """A loaded model, its tokenizer, and the options of a run."""

    def __init__(self, options):
        self.options = options
        folder = resolve(options.model)
        self.defaults = {"temperature": 1.0} | generation_defaults(folder)
        self.tokenizer = load_tokenizer(folder)
        dtype = getattr(torch, options.dtype)
        self.model = load_model(folder, options.device, dtype, options.adapter)
        if options.compile:
            self.model.compile()
        if options.dense and self.model.config.dms:
            self.model.config.dms.disable_eviction = True
        config = self.model.config
        self.stated_context = config.max_position_embeddings
        config.max_position_embeddings = context_of(config)  # the cache must have room for it
        self.end_ids = end_ids(folder, self.tokenizer)
        self.cache = None
        self.tokens = 0
        self.seconds = 0.0

    def encode(self, prompt, **template):
        """Text, or a list of messages -> token ids, through the chat template with these variables
        unless there is none or --raw."""
        if isinstance(prompt, str) and self.tokenizer.template and not self.options.raw:
            prompt = [{"role": "user", "content": prompt}]
        return self.tokenizer.encode(prompt, add_generation_prompt=True, **template)

    def chains(self, ids, options, seed, show=lambda text: None):
        """-n sequences that continue ids, each with a Stream as its `stop`. Raises InputError if
        the options are out of range, or the model's context is too short for them."""
        for name, (low, high) in RANGES.items():
            value = getattr(options, name)
            fits = value is None or isinstance(value, (int, float)) and low <= value <= high
            require(fits, f"{name} = {value!r}: give a number from {low} to {high}")
        context = self.model.config.max_position_embeddings
        require(0 < len(ids) <= context - options.max_new_tokens,
                f"{len(ids)} tokens in the prompt and {options.max_new_tokens} to come, but the "
                f"model's context is {context}; shorten it or ask for less")
        if len(ids) + options.max_new_tokens > self.stated_context:
            say("warning: longer than the context that config.json states, as its RoPE allows")
        stated = {name: getattr(options, name) for name in Sampling._fields}
        stated = {name: value for name, value in stated.items() if value is not None}
        sampling = Sampling(**self.defaults | stated)
        streams = [Stream(self.tokenizer, options.stop, show) for _ in range(options.n)]
        return [Sequence(ids, options.max_new_tokens, f"{seed} {i}", stream, sampling)
                for i, stream in enumerate(streams)]

    def run(self, chains, release=True):
        """Generate, in a cache that is made once; yields each chain when it is over."""
        if self.cache is None:
            memory = self.options.memory and self.options.memory * 1e9
            places = min(self.options.batch, len(chains) or 1)
            like = (self.model.device, self.model.dtype)
            self.cache = KVCache(self.model.config, places, *like, memory=memory)
        begin = time.perf_counter() - self.seconds
        for new in generate(self.model, self.cache, chains, self.end_ids, release=release):
            self.tokens += len(new)
            self.seconds = time.perf_counter() - begin
            for chain in [chain for chain, _ in new if chain.over]:
                chain.stop.finish()  # which may find a stop string in what was held back
                chain.finish_reason = "stop" if chain.stop.stopped else chain.finish_reason
                yield chain

    def finish(self, chains, release=True):
        """Generate to the end. Raises InputError if a chain did not fit into the cache."""
        for chain in self.run(chains, release):
            require(not chain.error, chain.error)
        cut = sum(chain.finish_reason == "length" for chain in chains)
        if cut:
            print(f"\n[cut at --max-new-tokens: {cut} of {len(chains)}]", file=sys.stderr)


def chat(session):
    """Turns over one cache. Each appends only what the template puts after an answer, the new turn
    included. What the model said stays as it was said, thoughts too: the cache cannot unsay it.

    To get that text, the new turn is rendered behind a made-up exchange whose answer is a mark, and
    the result is cut at the mark.
    """
    mark = "@ANSWER@"
    before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    cue = "> " if sys.stdin.isatty() else ""
    chain = Sequence([], 1)
    show_now(cue)
    for number, line in enumerate(filter(str.strip, sys.stdin)):
        turns = [*before * bool(number), {"role": "user", "content": line.rstrip("\n")}]
        text = session.tokenizer.apply_chat_template(turns, add_generation_prompt=True)
        if number:
            require(mark in text, "--chat needs a template that repeats the model's answers")
            text = text.split(mark, 1)[1]
            if chain.ids[-1] in session.end_ids:
                chain.ids.pop()  # it was not appended yet, and the text begins with it
        ids = chain.ids + session.tokenizer.encode(text, add_special_tokens=False)
        seed = f"{session.options.seed} {number}"
        [turn] = session.chains(ids, session.options, seed, show_now)
        chain = replace(turn, index=chain.index, fed=chain.fed)
        session.finish([chain], release=False)
        show_now(f"\n{cue}")


def one_prompt(session, prompt, check=None):
    """Answer a prompt in -n chains, and say what they voted for, or what check(texts) says."""
    options = session.options
    show = show_now if options.n == 1 else lambda text: None
    chains = session.chains(session.encode(prompt), options, options.seed, show)
    if check:
        print(f"{prompt}\n", file=sys.stderr)
    session.finish(chains, release=not options.show_evictions)
    said = answer_of(chains)
    texts = [f"[{i}] {text}\n" for i, text in enumerate(said["texts"], 1)]
    print("".join(texts) if options.n > 1 else "", flush=True)
    if options.n > 1 or check:
        verdict = f"answer {said['answer']}; {said['votes']} of {options.n} agree"
        print(f"[{check(said['texts']) if check else verdict}]", file=sys.stderr)
    if options.show_evictions:
        chain = chains[0]
        held = held_by_heads(session.cache, chain.index)
        stream = Stream(session.tokenizer, skip_special_tokens=False)
        show_evictions(options.show_evictions, stream, chain.ids[: chain.fed], held)


def answer_of(chains):
    """What --out says of a request: its chains' texts, and what most of them answer."""
    texts = [chain.stop.text for chain in chains]
    answer, votes = Counter(map(final_answer, texts)).most_common(1)[0]
    return {"texts": texts, "answer": answer, "votes": votes,
            "tokens": [len(chain.new) for chain in chains],
            "finish_reason": [chain.finish_reason for chain in chains]}


ROW = '{"generated": {"line": '  # how each row of --out begins
# what a line of --requests may set for itself, and what other servers obey, but this one does not
REQUEST_OPTIONS = [*RANGES, "stop", "seed"]
ALIASES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
NOT_OBEYED = """best_of echo frequency_penalty function_call functions guided_choice guided_json
    guided_regex ignore_eos length_penalty logit_bias logprobs min_tokens no_repeat_ngram_size
    num_beams presence_penalty prompt_logprobs response_format stop_token_ids stream suffix
    suppress_tokens tool_choice top_logprobs typical_p""".split()


def answered_lines(out, requests):
    """The numbers of the lines, {number: text}, that a file has answers for. A last row without its
    line's end is cut off, to be made again. Raises InputError if the file holds anything else."""
    *rows, cut = read_text(out).split("\n")
    answered = set()
    try:
        for row in rows:
            answer = json.loads(row)
            number = answer.pop("generated")["line"]
            # compared as texts, since NaN is not equal to itself
            request = json.loads(requests[number])
            require(json.dumps(answer) == json.dumps(request), f"line {number} has changed")
            answered.add(number)
        require(cut[: len(ROW)] == ROW[: len(cut)], "no row")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        problem = "holds something else than answers to these requests; give another --out"
        raise InputError(f"{out}: {problem} ({e})") from e
    os.truncate(out, out.stat().st_size - len(cut))  # rows are written in ASCII
    return answered


def chains_of_request(session, number, text):
    """The chains that answer a line of --requests, by the options that it states for itself."""
    request = json.loads(text)
    require(isinstance(request, dict) and "generated" not in request,
            'a request is a JSON object without the key "generated"')
    prompt = request.get("messages") or request.get("prompt")
    require(prompt and isinstance(prompt, (str, list)), 'it needs "prompt" or "messages"')
    stated = {ALIASES.get(name, name): x for name, x in request.items() if x is not None}
    for name in filter(stated.get, NOT_OBEYED):
        say(f"{session.options.requests}: {name} is not obeyed")
    own = {name: stated[name] for name in REQUEST_OPTIONS if name in stated}
    if isinstance(own.get("stop"), str):
        own["stop"] = [own["stop"]]
    options = replace(session.options, **own)
    template = {name: stated[name] for name in ("tools", "enable_thinking") if name in stated}
    ids = session.encode(prompt, **template | stated.get("chat_template_kwargs", {}))
    return session.chains(ids, options, own.get("seed", f"{options.seed} {number}"))


def serve(session):
    """Answer every line of --requests, many side by side, and append the answers to --out as they
    are finished. What is there already is not made again. A line that cannot be answered does not
    stop the others."""
    rank, world = torchrun_place()
    out = Path(session.options.out)
    if world > 1:
        out = out.with_name(f"{out.name.removesuffix('.jsonl')}.{rank}-of-{world}.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = enumerate(read_text(session.options.requests).split("\n"), 1)
    requests = dict([(number, text) for number, text in lines if text.strip()][rank::world])
    chains, failed = {}, {}  # by the number of a line
    with FileLock(f"{out}.lock", blocking=False), open(out, "a") as file:
        answered = answered_lines(out, requests)
        for number in [number for number in requests if number not in answered]:
            try:
                chains[number] = chains_of_request(session, number, requests[number])
            except json.JSONDecodeError as e:
                failed[number] = f"no JSON ({e})"
            except (ValueError, TypeError) as e:
                failed[number] = e
        answer(session, chains, requests, failed, file)
    for number, problem in sorted(failed.items()):
        print(f"error: {session.options.requests}: line {number}: {problem}", file=sys.stderr)
    require(not failed, f"{len(failed)} of {len(requests)} requests are not answered; mend them, "
            "or give more --memory, and run again")


def answer(session, chains, requests, failed, file):
    """Run chains, {number of a line: its own}, to their ends, and write a row for each line, or why
    it has none to `failed`."""
    number_of = {chain: number for number, group in chains.items() for chain in group}
    left = Counter(number_of.values())
    for chain in tqdm(session.run(list(number_of)), total=len(number_of), unit="chain"):
        number = number_of[chain]
        left[number] -= 1
        if chain.error:
            failed[number] = chain.error
        elif left[number] == 0 and number not in failed:
            row = {"generated": {"line": number, **answer_of(chains[number])}}
            print(json.dumps(row | json.loads(requests[number])), file=file, flush=True)


def main(argv=None):
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
    check = None
    if options.prompt == "-":
        options.prompt = sys.stdin.read()
    elif modes == 0:
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
        stats = session.cache.stats()
        print(f"[{session.tokens} tokens, prompts included, in {session.seconds:.2f} s, "
              f"{session.tokens / session.seconds:.1f} tokens/s; compression "
              f"{stats['compression_ratio']:.2f}x; at most {stats['peak_pairs']:,} pairs held, in "
              f"{stats['peak_page_bytes']:,} bytes]", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
