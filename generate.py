"""
Generate from a dense or DMS checkpoint with the compacting cache, and see what it forgets.

    python generate.py                                    # the last retrofit, or the shipped model
    python generate.py --model out/my-dms --prompt "How many primes are below 100?"
    python generate.py --prompt - < question.txt          # the prompt from standard input
    python generate.py --chat                             # several turns over one cache
    python generate.py -n 8 --temperature 1.0             # 8 chains that share one prompt
    python generate.py --requests in.jsonl --out out.jsonl   # many; goes on where it was stopped
    python generate.py --show-evictions                   # each token by how many heads hold it
    python generate.py --show-evictions page.html         # and what each of them holds
    python generate.py --dense                            # the same, nothing evicted

A line of --requests is a JSON object with "prompt" or "messages". It may state options of its own
(OWN_OPTIONS, by the names that servers use, too), and for the chat template "tools",
"enable_thinking" and "chat_template_kwargs". Its line in --out has the answers under "generated",
then the request's own keys.

The text goes to standard output; the closing line with speed and memory goes to standard error.
Read it from top to bottom: how a token is sampled, the decode step, continuous batching, text out
of tokens, and the script.
"""

import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock
from tqdm import tqdm

from checkpoint import (end_ids, generation_defaults, load_model, load_tokenizer, resolve,
                        without_nulls)
from common import (InputError, choose_device, explained, parse_options, read_text, require,
                    run_script, say)
from kv_cache import PLAIN, CacheFull, KVCache
from show import show_evictions

SHIPPED = Path(__file__).with_name("toy") / "retrofitted"


# ---------------------------------------------------------------------------------------- Sampling


@dataclass(unsafe_hash=True)
class Sampling:
    """How the next token of a sequence is sampled: see `sample` and `penalized`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def sample(logits, uniform, sampling):
    """One token for each of B sequences: logits (B, V), uniform (B,) in [0, 1) -> (B,) int64.

    At a temperature below 1e-5 the likeliest token is taken. Otherwise the distribution is cut to
    the top_k likeliest tokens (0: all), then to the fewest that hold top_p of the mass, then to
    those at least min_p times as likely as the first. What is left is sampled by its inverse
    distribution function: the token is where the running sum of the mass passes `uniform`. The sum
    runs in order of likelihood where the logits were sorted, else in order of token ids.
    """
    if not sampling.temperature >= 1e-5:  # NaN, too
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    order = None  # the token ids of sorted logits
    if sampling.top_k > 0 or sampling.top_p < 1:
        V = logits.shape[-1]
        logits, order = logits.topk(min(int(sampling.top_k), V) if sampling.top_k > 0 else V)
    p = logits.softmax(-1)
    if sampling.top_p < 1:  # a token stays unless those before it suffice; the first always does
        p = p.where(p.cumsum(-1) - p <= sampling.top_p, 0)
    p = p.where(p >= sampling.min_p * p.amax(-1, keepdim=True), 0)
    mass = p.double().cumsum(-1)
    place = torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True)
    place = place.clamp(max=p.shape[-1] - 1)  # where nonsense, as min_p = 2, leaves no token at all
    return (place if order is None else order.gather(1, place))[:, 0]


def penalized(logits, sequence):
    """Logits (V,) in which the tokens that the sequence has already are less likely: divided by the
    penalty, or multiplied where they are negative (Keskar et al. 1909.05858)."""
    penalty = sequence.sampling.repetition_penalty
    if penalty == 1:
        return logits
    ids = torch.tensor(sequence.ids, device=logits.device)
    had = logits[ids]
    return logits.scatter(0, ids, torch.where(had > 0, had / penalty, had * penalty))


def next_tokens(sequences, logits):
    """{Sequence: its next token id}, by logits (n, V). Those of equal settings are sampled
    together; what runs beside a sequence changes nothing for it."""
    tokens = {}
    for sampling in {s.sampling for s in sequences}:
        alike = {s: penalized(x, s) for s, x in zip(sequences, logits) if s.sampling == sampling}
        uniform = torch.tensor([s.uniform() for s in alike], device=logits.device)
        new = sample(torch.stack([*alike.values()]), uniform, sampling)
        tokens.update(zip(alike, new.tolist()))
    return tokens


# --------------------------------------------------------------------------------- The decode step


class DecodeStep:
    """Appends one token to every sequence that runs, and gives the logits of the next.

    On a GPU the first run on a page table is a plain one, the second is captured as a CUDA graph,
    and from then on the graph is replayed: one launch in place of hundreds. cache.decode_step keeps
    it as long as the cache lives, so the turns of a conversation do not capture it anew. It keeps
    no reference to the cache: in such a circle the cache's memory would not be free as soon as
    nobody uses it.
    """

    def __init__(self, model, cache):
        # plain kernels wait for the GPU, and so does a router, which a graph cannot do
        waits = cache.kernels == PLAIN or model.config.num_experts_per_tok
        self.captures = cache.device.type == "cuda" and not waits
        self.table = None  # the page table of the last run: the cache replaces it by wider ones
        self.graph = None  # what was captured on this table

    @torch.inference_mode()
    def __call__(self, model, cache, tokens):
        """tokens: {index in the batch: token id} of the sequences that run. Returns logits (B, V),
        which the next call may overwrite. Raises CacheFull before anything has changed."""
        inputs = torch.tensor([(tokens.get(i, 0), i in tokens) for i in range(cache.batch_size)],
                              device=cache.device)  # (B, 2) int64
        cache.begin_step(inputs[:, 1])
        if not self.captures:
            return self.run(model, cache, inputs)
        if self.table is not cache.rows.table:  # the first run compiles, which no capture may do
            self.table = cache.rows.table
            self.graph = None
            return self.run(model, cache, inputs)
        if self.graph is None:
            self.inputs = inputs  # the graph's own from now on, as its logits are
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records, and runs nothing
                self.logits = self.run(model, cache, inputs)
        self.inputs.copy_(inputs)
        self.graph.replay()
        return self.logits

    def run(self, model, cache, inputs):
        token, count = inputs.T
        return model.lm_head(cache.append_token(model.hidden, token[:, None], count)[:, 0])


# ----------------------------------------------------------------------------- Continuous batching


@dataclass(eq=False)
class Sequence:
    """A text in the making. `generate` adds what it samples to ids and to new."""

    ids: list  # all of its tokens: the prompt's, then its own
    max_new_tokens: int
    seed: object = 0
    # a Stream, or another function: it gets every new token but an end token, and says whether
    # that was the last
    stream: object = None
    sampling: Sampling = Sampling()
    new: list = field(default_factory=list)  # its own so far, an end token included
    finish_reason: str = None  # "stop", or "length" at max_new_tokens
    error: str = None  # why it could not be finished
    index: int = None  # in the cache's batch, while the cache holds ids[:fed]
    fed: int = 0

    @property
    def over(self):
        return bool(self.finish_reason or self.error)

    def uniform(self):
        """The random number in [0, 1), exact in float32, for its next token. It follows from the
        seed and the token's place alone."""
        place = f"{self.seed} {len(self.new)}".encode()
        return int(hashlib.blake2b(place, digest_size=3).hexdigest(), 16) / 2**24


@dataclass
class Scheduler:
    """Which sequence runs at which index of the cache's batch, and which wait."""

    model: object
    cache: KVCache
    waiting: list  # the next first
    end_ids: set
    release: bool
    running: list = field(default_factory=list)  # the youngest last
    blocked: bool = False  # after pages ran out, nothing starts until a sequence ends
    sampled: dict = None  # {sequence: token id} of this step, None for one that has failed

    def step(self):
        """One more token for all that run, and the first of those that start. Returns `sampled`."""
        self.sampled = {}
        try:
            if self.running:
                tokens = {sequence.index: sequence.ids[-1] for sequence in self.running}
                logits = self.cache.decode_step(self.model, self.cache, tokens)
                self.record(self.running, logits[list(tokens)])
            while self.may_start():
                self.start()
        except CacheFull as problem:
            # No page is left. The youngest (the one that was starting, if one was) gives its pages
            # back and goes to the front of the line, to be appended again with all it has said.
            youngest = self.running.pop()
            self.give_up_place(youngest)
            self.blocked = bool(self.running)
            if self.blocked:
                self.waiting.insert(0, youngest)
            else:  # nothing else runs: it does not fit by itself
                youngest.error = str(problem)
                self.sampled[youngest] = None
        return self.sampled

    def may_start(self):
        """May the first that waits start? One that the cache does not hold yet needs a place, and
        as many free pages as the running ones have on average. (If they do not suffice for what it
        says later, `step` puts the youngest back.)"""
        if not self.waiting or self.blocked:
            return False
        if not self.running or self.waiting[0].index is not None:
            return True
        free = self.cache.pool.free_count
        average = (len(self.cache.pool) - free) / len(self.running)
        return free >= average and 0 in self.cache.seen  # a place that has seen nothing is free

    def start(self):
        """Start the first that waits. Those behind it with the same prompt fork it."""
        first = self.take_place()
        prompt = list(first.ids)
        ids = torch.tensor([prompt[first.fed :]], device=self.cache.device)
        logits = self.model(ids, self.cache, sequence=first.index, last_only=True)[:, 0]
        self.record([first], logits)
        # as long as the cache holds the prompt: the first may have ended with its first token
        while first.index is not None and self.may_start() and self.waiting[0].ids == prompt:
            sequence = self.take_place()
            places = list(range(self.cache.batch_size))
            places[sequence.index] = first.index
            self.cache.select(places)
            self.record([sequence], logits)

    def take_place(self):
        """Make the first that waits the youngest that runs, at a place in the batch."""
        sequence = self.waiting.pop(0)
        if sequence.index is None:
            require(0 in self.cache.seen, "no place is free in the cache; ask for release=True")
            sequence.index = self.cache.seen.tolist().index(0)
        self.running.append(sequence)  # already here: if no page is left, `step` takes it off
        return sequence

    def record(self, sequences, logits):
        """Add to each sequence its next token, and end those that it completes."""
        new = next_tokens(sequences, logits)
        self.sampled |= new
        for sequence, token in new.items():
            sequence.fed = len(sequence.ids)  # the cache holds all but the new token
            sequence.ids.append(token)
            sequence.new.append(token)
            stops = token in self.end_ids
            if sequence.stream and not stops:
                stops = sequence.stream(token)
            if stops or len(sequence.new) == sequence.max_new_tokens:
                sequence.finish_reason = "stop" if stops else "length"
                self.running.remove(sequence)
                self.blocked = False
                if self.release:
                    self.give_up_place(sequence)

    def give_up_place(self, sequence):
        self.cache.release([sequence.index])
        sequence.index = None
        sequence.fed = 0


@torch.inference_mode()
def generate(model, cache, sequences, end_ids=(), release=True):
    """Continue sequences, a list of any length, in the cache's batch: continuous batching.

    Yields after each step the list of (sequence, new token id), None for the token of one that has
    failed. A sequence ends on an id of end_ids, when its stream says so, after max_new_tokens,
    or because it does not fit by itself. When pages run out the youngest gives its own back and is
    appended again later: nothing is lost, and nothing is sampled twice.

    release=False: ended sequences keep their places, where the cache holds all but their last
    token. To go on with one, add to its ids, reset `new` and `finish_reason`, and hand it in
    again. If the caller stops iterating, those that are not over lose their places.
    """
    for sequence in sequences:
        sequence.ids = list(sequence.ids)  # which continuations of one prompt may share until now
    # those that are in the cache go first: others may have to wait for their places
    waiting = sorted(sequences, key=lambda sequence: sequence.index is None)
    scheduler = Scheduler(model, cache, waiting, end_ids, release)
    cache.decode_step = cache.decode_step or DecodeStep(model, cache)
    try:
        while scheduler.waiting or scheduler.running:
            yield list(scheduler.step().items())
    finally:  # after an accident one layer may have stored a token, and the next one has not
        for sequence in scheduler.running:
            scheduler.give_up_place(sequence)


# ------------------------------------------------------------------------------ Text out of tokens


class Stream:
    """Tokens in, text out (added to `text`, and printed if asked for) as soon as no later token can
    change it. In the end it is what the tokenizer makes of all tokens at once, up to a stop string.
    As a Sequence's `stream` it says whether one has come.
    """

    def __init__(self, tokenizer, stops=(), show=False, skip_special_tokens=True):
        self.decode = lambda ids: tokenizer.decode(ids, skip_special_tokens)
        self.name_of = tokenizer.fast.id_to_token
        self.stops = [str(stop) for stop in stops if stop]
        self.show = show
        self.text = ""
        self.stopped = False
        # The last token whose text is out, then those that wait. Without that one in front some
        # decoders (Llama 2's) would drop a space at the beginning of the text that waits.
        self.pending = []
        self.out = 0  # characters of the text of `pending` that are out

    def __call__(self, token):
        self.pending.append(token)
        text = self.decode(self.pending)
        name = str(self.name_of(token))
        has_no_text = not self.decode([token])
        # A later token may still change the text
        # - after a token without text: a special one may stand between two bytes of a character,
        # - after a token that is one byte, <0x0A>: an invalid byte makes U+FFFD of all its run,
        # - after the first bytes of a character, which are U+FFFD until it is whole.
        may_change = has_no_text or name.startswith("<0x") or text.endswith("\ufffd")
        if has_no_text and name in self.stops:
            self.stopped = True
        elif not may_change:
            self.let_out()
        return self.stopped

    def let_out(self, is_last=False):
        """Let out the text held back, unless it ends like the beginning of a stop string."""
        text = self.decode(self.pending)[self.out :]
        ends = [text.find(stop) for stop in self.stops if stop in text]
        beginnings = tuple(stop[:n] for stop in self.stops for n in range(1, len(stop)))
        if ends or is_last or not text.endswith(beginnings):
            self.stopped |= bool(ends)
            text = text[: min(ends, default=None)]  # up to the first stop string, if there is one
            self.text += text
            if self.show:
                print(text, end="", flush=True)
            self.pending = self.pending[-1:]
            self.out = len(self.decode(self.pending))


# -------------------------------------------------------------------------------------- The script


@dataclass
class Options(Sampling):
    """Of the command line: --max-new-tokens 100 for max_new_tokens."""

    model: str = None  # folder or hub id (default: the last retrofit, else the shipped toy model)
    adapter: str = None  # DMS adapters to lay over the model: a file, a folder or a hub id
    prompt: str = None  # text, or - for standard input (default: a problem of the toy world)
    raw: bool = False  # take the prompt as it is, without the chat template
    chat: bool = False  # several turns, a line each, over one cache
    n: int = 1  # parallel chains of each prompt
    requests: str = None  # a file of JSON lines with "prompt" or "messages"
    out: str = None  # JSON lines with their answers; those that it holds are not made again
    batch: int = 64 if torch.cuda.is_available() else 16  # most chains side by side
    memory: float = None  # GB of the cache (default: 80% of what a GPU has free, or a machine has)
    max_new_tokens: int = 400
    # generation_config.json may have another default for this, and for the rest of Sampling
    temperature: float = 1.0  # 0 is greedy
    stop: list = ()  # a string or special token that ends the text; may be repeated
    seed: int = 0  # of sampling, and of the toy problem
    cr: float = None  # compression ratio, of those that the retrofit has settled, or between
    budget: int = None  # pairs a head holds on average where the longest text ends
    dense: bool = False  # switch eviction off
    show_evictions: str = ""  # each token by how many heads hold it: printed, or a .html file
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = None  # (default: bfloat16 on a GPU)


# what a request may set for itself, of which type (JSON may have "5" or 5.0 for 5)
OWN_OPTIONS = dict(n=int, max_new_tokens=int, seed=int, stop=list, **Sampling.__annotations__)
# what else is known there
OF_PROMPT = "prompt messages tools enable_thinking chat_template_kwargs".split()
ALIASES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}


class Session:
    """A loaded model, its tokenizer, and the options of a run."""

    def __init__(self, options):
        self.options = options
        self.tokenizer = load_tokenizer(options.model)
        self.end_ids = end_ids(options.model, self.tokenizer)
        dtype = getattr(torch, options.dtype)
        self.model = load_model(options.model, options.device, dtype, options.adapter, options.cr)
        self.cache = None
        if options.dense and self.model.config.dms:
            self.model.config.dms.disable_eviction = True
        eviction = self.model.config.eviction
        if eviction and options.budget is not None:
            W = eviction.window + 1
            require(options.budget > W, f"--budget: the window alone holds {W} pairs; give more")

    def options_of(self, request, seed):
        """The run's Options, with what a request (a dict without nulls) states for itself."""
        own = {ALIASES.get(key, key): value for key, value in request.items()}
        if isinstance(own.get("stop"), str):
            own["stop"] = [own["stop"]]
        if unknown := own.keys() - {*OWN_OPTIONS, *OF_PROMPT}:
            say(f"what requests say about {', '.join(sorted(unknown))} has no effect")
        typed = {key: kind(own[key]) for key, kind in OWN_OPTIONS.items() if key in own}
        return replace(self.options, **({"seed": seed} | typed))

    def prompt_ids(self, request):
        """The token ids of a request's "messages" or "prompt". A prompt goes through the chat
        template, unless there is none or --raw."""
        prompt = request.get("messages") or request.get("prompt")
        require(prompt, 'a request needs "prompt" or "messages"')
        if isinstance(prompt, str) and self.tokenizer.template and not self.options.raw:
            prompt = [{"role": "user", "content": prompt}]
        variables = {key: request[key] for key in ("tools", "enable_thinking") if key in request}
        variables |= {"add_generation_prompt": True} | request.get("chat_template_kwargs", {})
        return self.tokenizer.encode(prompt, **variables)

    def sequences(self, ids, options):
        """-n sequences that continue a prompt's ids, each with a Stream."""
        length = len(ids) + options.max_new_tokens
        config = self.model.config
        require(min(options.n, options.max_new_tokens) > 0, "n, max_new_tokens: give 1 or more")
        require(0 < len(ids) and length <= config.context,
                f"{len(ids)} + {options.max_new_tokens} tokens: the context has {config.context}")
        require(max(ids) < config.vocab_size, "it has a token that the model does not know")
        if length > config.max_position_embeddings:
            say("warning: longer than the context that config.json states, as its RoPE allows")
        sampling = Sampling(**{name: getattr(options, name) for name in Sampling.__annotations__})
        # a single text is shown as it comes
        return [Sequence(ids, options.max_new_tokens, f"{options.seed} {i}",
                         Stream(self.tokenizer, options.stop,
                                options.n == 1 and not options.requests), sampling)
                for i in range(options.n)]

    def run(self, requests, release=True):
        """Generate for requests, {key: its sequences}, in a cache that is made once. Yields each
        key when its sequences are over, and reports in the end."""
        key_of = {sequence: key for key, every in requests.items() for sequence in every}
        model = self.model
        if self.cache is None:
            places = max(min(self.options.batch, len(key_of)), 1)
            longest = max((len(x.ids) + x.max_new_tokens for x in key_of), default=0)
            if self.options.chat:  # later turns make it longer
                longest = model.config.context
            self.cache = KVCache(
                model.config, places, model.device, model.dtype,
                memory=self.options.memory and self.options.memory * 1e9,
                budget=self.options.budget and (self.options.budget, longest))
        begin = time.perf_counter()
        for new in generate(model, self.cache, list(key_of), self.end_ids, release):
            for key in {key_of[sequence] for sequence, _ in new if sequence.over}:
                if all(sequence.over for sequence in requests[key]):
                    yield key
        tokens = sum(len(sequence.new) for sequence in key_of)
        cut = sum(sequence.finish_reason == "length" for sequence in key_of)
        stats = self.cache.stats()
        say(f"\n[{tokens} new tokens in {time.perf_counter() - begin:.2f} s, {cut} of {len(key_of)}"
            f" cut at --max-new-tokens; {stats['compression_ratio'] or 1:.2f}x compressed, "
            f"{stats['peak_page_bytes']:,} bytes in pages at most]")

    def finish(self, sequences, release):
        """Generate for one request. Returns its answer."""
        for _ in self.run({0: sequences}, release):
            pass
        return answer_of(sequences)


def chat(session):
    """Turns over one cache. What the model said stays as it was said, thoughts too: the cache
    cannot unsay it. So each turn appends only what the template puts after an answer:

        all that was said before, and the answer    end token    line break, question, ...
        held by the cache                           `after_answer`

    To get that text, the conversation is rendered with a mark for each answer, and cut at the last.
    """
    mark = "\ue000"  # a private character, which nobody types
    turns = []
    last = Sequence([], 1)  # the sequence of the turn before
    for line in filter(str.strip, sys.stdin):
        turns.append({"role": "user", "content": line.rstrip("\n")})
        text = session.tokenizer.apply_chat_template(turns, add_generation_prompt=True)
        after_answer = text.split(mark)[-1]
        # The cache does not hold the last token of last.ids yet. If that is the end token, it is
        # part of `after_answer`; if the answer was cut, it is one of the answer's own.
        has_end = last.ids and last.ids[-1] in session.end_ids
        said = last.ids[:-1] if has_end else last.ids
        ids = said + session.tokenizer.encode(after_answer, add_special_tokens=False)
        [turn] = session.sequences(ids, replace(session.options, n=1))
        last = replace(turn, index=last.index, fed=last.fed)  # where the last turn lies
        session.finish([last], release=False)
        turns.append({"role": "assistant", "content": mark})
        print()


def one_prompt(session):
    """Answer --prompt, -n times."""
    options = session.options
    sequences = session.sequences(session.prompt_ids({"prompt": options.prompt}), options)
    answer = session.finish(sequences, release=not options.show_evictions)
    print("\n---\n".join(answer["texts"]) if options.n > 1 else "")  # or it was printed as it came
    if options.show_evictions:
        show_evictions(options.show_evictions, session.cache, sequences[0],
                       Stream(session.tokenizer, skip_special_tokens=False))


def answer_of(sequences):
    """What --out says of a request: its texts, of which the rest is let out, their lengths and
    ends. Raises InputError if one of them did not fit into the cache."""
    for sequence in sequences:
        require(not sequence.error, sequence.error)
        sequence.stream.let_out(is_last=True)
    return {"texts": [sequence.stream.text for sequence in sequences],
            "tokens": [len(sequence.new) for sequence in sequences],
            "finish_reason": [sequence.finish_reason for sequence in sequences]}


BEGINNING = '{"generated": {"line": '  # of each line of --out


def line_of(generated, request):
    """A line of --out, which goes on with what the request has."""
    return json.dumps({"generated": generated} | json.loads(request))


def answered_lines(out, requests):
    """The set of numbers of requests that the file `out` answers already. requests: {number: its
    line}. A last answer without its line's end is cut off, to be made again. Raises InputError if
    the file holds anything else."""
    *lines, unfinished = read_text(out).split("\n")
    # which also explains an InputError, as it is a ValueError
    with explained(f"{out}: holds more than answers to these requests; give another --out",
                   LookupError, TypeError, ValueError):
        answers = [json.loads(line)["generated"] for line in lines]
        require(lines == [line_of(answer, requests[answer["line"]]) for answer in answers], "lines")
        # the rest is nothing, or the beginning of a line of ours
        require(BEGINNING.startswith(unfinished[: len(BEGINNING)]), "the last line")
    os.truncate(out, out.stat().st_size - len(unfinished))  # lines are written in ASCII
    return {answer["line"] for answer in answers}


def serve(session):
    """Answer every line of --requests, many side by side, and append the answers to --out as they
    are finished. What is there already is not made again. A line that cannot be answered does not
    stop the others."""
    options = session.options
    out = Path(options.out)
    lines = enumerate(read_text(options.requests).split("\n"), 1)
    requests = {n: line for n, line in lines if line.strip()}
    sequences = {}
    failed = {}
    with FileLock(f"{out}.lock", blocking=False), open(out, "a") as file:
        for number in sorted(requests.keys() - answered_lines(out, requests)):
            try:
                request = json.loads(requests[number])
                require(isinstance(request, dict), "a request is a JSON object")
                require("generated" not in request, 'a request must not have a key "generated"')
                request = without_nulls(request)
                own = session.options_of(request, f"{options.seed} {number}")
                sequences[number] = session.sequences(session.prompt_ids(request), own)
            except Exception as e:  # as there may be anything
                failed[number] = e
        for number in tqdm(session.run(sequences), total=len(sequences)):
            try:
                generated = {"line": number, **answer_of(sequences[number])}
                print(line_of(generated, requests[number]), file=file, flush=True)
            except InputError as e:
                failed[number] = e
    for number, problem in failed.items():
        print(f"error: {options.requests}: line {number}: {problem}", file=sys.stderr)
    require(not failed, f"{len(failed)} of {len(requests)} requests are not answered; mend them")


def main(argv=None):
    given = parse_options(Options, argv)
    finished = [*Path("out").glob("*/results.json")] or [SHIPPED / "results.json"]
    folder = resolve(given.get("model") or max(finished, key=os.path.getmtime).parent)
    defaults = generation_defaults(folder, Sampling.__annotations__)
    options = Options(**(defaults | given | {"model": folder}))
    require(options.out or not options.requests, "--requests needs --out, a file for the answers")
    choose_device(options)
    if options.prompt == "-":
        options.prompt = sys.stdin.read()
    elif not {"prompt", "chat", "requests"} & given.keys():
        from toy.tasks import question

        options.prompt, expected = question(options.seed)
        print(f"{options.prompt}\n[expected: {expected}]\n", file=sys.stderr)
        if options.n == 1 and "temperature" not in given:
            options.temperature = 0.0
    mode = chat if options.chat else serve if options.requests else one_prompt
    mode(Session(options))


if __name__ == "__main__":
    run_script(main)
