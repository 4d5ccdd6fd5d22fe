"""
Generate from a dense or DMS checkpoint with the compacting cache, and see what it forgets.

    python generate.py                                             # the last retrofit, or the shipped toy model
    python generate.py --model Qwen/Qwen3-8B-my-dms --prompt "How many primes are below 100?"
    python generate.py --chat                                      # several turns over one cache
    python generate.py -n 8 --temperature 1.0                      # 8 chains that share one prompt, and vote
    python generate.py --requests prompts.jsonl --out out.jsonl    # many, side by side; goes on where it was stopped
    torchrun --nproc-per-node 8 generate.py --requests ...         # split over GPUs: out.0-of-8.jsonl, ...
    python generate.py --show-evictions                            # each token shaded by how many heads still hold it
    python generate.py --dense                                     # the same, nothing evicted

The text goes to standard output; the closing line with speed and memory goes to standard error.
"""
import argparse
import functools
import json
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

import dms
from dms import InputError, read_json, read_lines
from kv_cache import KVCache
from model import Sequence, generate, load_model, load_tokenizer, resolve, write_atomic

SHIPPED = Path(__file__).resolve().parent / "toy" / "retrofitted"
show_now = functools.partial(print, end="", flush=True)


class Stream:
    """Tokens in, printable text out (`text`, and by pieces to `show`) as soon as it is certain: an incomplete UTF-8
    sequence and what may begin a stop string are held back. As a Sequence's `stop` it says whether one has come."""

    def __init__(self, tokenizer, stop_strings=(), show=None):
        self.tokenizer, self.stops, self.show = tokenizer, [s for s in stop_strings if s], show
        self.ids, self.read, self.whole, self.text, self.stopped = [], (0, 0), "", "", False

    def __call__(self, token):
        self.ids.append(token)
        if self.stops or self.show is not None:
            self._decode()
        return self.stopped

    def finish(self):
        """Let out what was held back and turned out to be text after all."""
        if not self.stopped:
            self._decode(last=True)

    def _decode(self, last=False):
        """Decode the ids that came since the last whole character, and those read with it: some decoders write the
        space before a word only where it is not the first."""
        before, since = self.read
        text = self.tokenizer.decode(self.ids[before:], skip_special_tokens=True)
        if last or not text.endswith("\ufffd"):
            start, known = len(self.whole), self.tokenizer.decode(self.ids[before:since], skip_special_tokens=True)
            self.whole, self.read = self.whole + text[len(known):], (since, len(self.ids))
            found = [self.whole.find(s, max(start - len(s), 0)) for s in self.stops]
            hold = max((n for s in self.stops for n in range(1, len(s)) if self.whole.endswith(s[:n])), default=0)
            self.stopped = max(found, default=-1) >= 0
            end = min(at for at in found if at >= 0) if self.stopped else len(self.whole) - (0 if last else hold)
            if self.show is not None:
                self.show(self.whole[len(self.text):end])
            self.text = self.whole[:max(end, len(self.text))]


def final_answer(text):
    """What chains vote on: the contents of the last \\boxed{}, else the last number, else the last line; or None."""
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
    numbers = re.findall(r"-?\d[\d,]*\.?\d*", text)
    lines = [line for line in text.split("\n") if line.strip()]
    return (boxed or [n.replace(",", "").rstrip(".") for n in numbers] or lines or [None])[-1]


class Session:
    """A loaded model, its tokenizer and the settings of a run."""

    def __init__(self, args):
        self.args = args
        folder = resolve(args.model)
        self.tokenizer = load_tokenizer(folder)
        self.model = load_model(folder, args.device, getattr(torch, args.dtype), adapter=args.adapter)
        if args.compile:
            self.model.compile()
        if args.dense and self.model.config.dms is not None:
            self.model.config.dms.disable_eviction = True
        file = folder / "generation_config.json"
        defaults = read_json(file) if file.exists() else {}
        ends, end = defaults.get("eos_token_id"), self.tokenizer.token_id(self.tokenizer.special("eos_token"))
        self.ends = {e for e in (*(ends if isinstance(ends, list) else [ends]), end) if isinstance(e, int)}
        self.sampling = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
        greedy = {"temperature": 0.0} if defaults.get("do_sample") is False else {}
        for source in (defaults, greedy, vars(args)):
            self.sampling.update({k: source[k] for k in self.sampling if source.get(k) is not None})
        self.cache, self.tokens, self.seconds = None, 0, 0.0

    def new_cache(self, rows):
        self.cache = KVCache(self.model.config, rows, self.model.device, self.model.dtype,
                             memory=self.args.memory and self.args.memory * 1e9)

    def encode(self, prompt):
        """Text, or a list of messages -> token ids, through the chat template unless there is none or --raw."""
        if isinstance(prompt, str) and not self.args.raw and self.tokenizer.template is not None:
            prompt = [{"role": "user", "content": prompt}]
        return self.tokenizer.encode(prompt, add_generation_prompt=True)

    def chains(self, ids, seed, count=1, show=None, max_new_tokens=None):
        """Sequences that continue ids, each with a Stream as its `stop`."""
        return [Sequence(ids, max_new_tokens or self.args.max_new_tokens, f"{seed} {i}",
                         Stream(self.tokenizer, self.args.stop, show if i == 0 else None))
                for i in range(count)]

    def run(self, sequences, release=True):
        """Generate; yields the sequences that are over, after each step."""
        begin, before = time.perf_counter(), self.seconds
        for drawn in generate(self.model, self.cache, sequences, self.ends, self.sampling, release):
            self.tokens += sum(token is not None for _, token in drawn)
            self.seconds = before + time.perf_counter() - begin
            over = [s for s, _ in drawn if s.over]
            for sequence in over:
                sequence.stop.finish()
            yield over

    def finish(self, chains, release=True):
        """Generate to the end. Raises InputError if a sequence did not fit into the cache."""
        for _ in self.run(chains, release):
            pass
        if chains[0].error:
            raise InputError(chains[0].error)


def chat(session):
    """Turns from standard input over one cache: each feeds only what the template puts after an answer, the new turn
    included. What the model said stays as it was said, thoughts too, as the cache cannot unsay it."""
    template, mark, pending = session.tokenizer.apply_chat_template, "@ANSWER@", None
    session.new_cache(1)
    ask = functools.partial(print, "> " if sys.stdin.isatty() else "", end="", file=sys.stderr, flush=True)
    for number, line in enumerate(iter(lambda: ask() or sys.stdin.readline(), "")):
        if not line.strip():
            continue
        turn = {"role": "user", "content": line.rstrip("\n")}
        if pending is None:
            text, pending = template([turn], add_generation_prompt=True), []
        else:
            before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
            text = template([*before, turn], add_generation_prompt=True).rsplit(mark, 1)[-1]
        ids = pending + session.tokenizer.encode(text, add_special_tokens=False)
        session.model.check_ids(ids, int(session.cache.seen) + session.args.max_new_tokens)
        chain = session.chains(ids, f"{session.args.seed} {number}", show=show_now)[0]
        session.finish([chain], release=False)
        # the last token is not yet fed; the template itself ends the turn
        pending = [] if chain.new[-1] in session.ends else chain.new[-1:]
        print(flush=True)


def serve(session):
    """Answer every line of --requests, many side by side, and append the results to --out as they are finished. What
    is there already is not done again."""
    args, rank, world = session.args, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    out = Path(args.out) if world == 1 else Path(args.out).with_suffix(f".{rank}-of-{world}.jsonl")
    done = {row.get("line"): row for row in (read_lines(out, cut=True) if out.exists() else [])}
    todo = {}  # {chain: (request, its chains)}
    for line, request in list(enumerate(read_lines(args.requests), 1))[rank::world]:
        prompt = request.get("messages", request.get("prompt"))
        most = request.get("max_new_tokens", args.max_new_tokens)
        if not prompt or not isinstance(prompt, (str, list)) or type(most) is not int or most < 1:
            raise InputError(f"{args.requests}: line {line} needs \"prompt\" (text) or \"messages\" (a list), and "
                             f"max_new_tokens, if it is there, of at least 1; fix it")
        if line not in done:
            ids = session.encode(prompt)
            session.model.check_ids(ids, most)
            chains = session.chains(ids, f"{args.seed} {line}", args.n, max_new_tokens=most)
            todo.update((chain, ({**request, "line": line}, chains)) for chain in chains)
        elif any(done[line].get(key) != value for key, value in request.items()):
            raise InputError(f"{out}: its line {line} answers another request; give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, lambda scratch: scratch.write_text("".join(json.dumps(row) + "\n" for row in done.values())))
    session.new_cache(min(args.batch, max(len(todo), 1)))
    with open(out, "a") as file, tqdm(total=len(todo), desc="chains", disable=rank > 0) as bar:
        for over in session.run(list(todo)):
            for chain in over:
                request, chains = todo.pop(chain)
                if not any(other in todo for other in chains):
                    answer, votes = Counter(final_answer(c.stop.text) for c in chains).most_common(1)[0]
                    errors = [{"error": c.error} for c in chains if c.error]
                    file.write(json.dumps({**request, "texts": [c.stop.text for c in chains], "answer": answer,
                                           "votes": votes, "tokens": [len(c.new) for c in chains],
                                           **(errors or [{}])[0]}) + "\n")
                    file.flush()
            bar.update(len(over))
            bar.set_postfix_str(f"{session.tokens / session.seconds:.1f} tokens/s", refresh=False)


@torch.inference_mode()
def show_evictions(session, ids):
    """Print the text with each token shaded by the share of (layer, head) pairs that still hold it at the end: bright
    for all, dark for few; where the output is no terminal, the share in tenths follows each token in brackets."""
    model, settings, held = session.model, session.model.config.dms, []
    masked, position = dms.masked_attention(model.config), torch.arange(len(ids), device=model.device)

    def attend(layer, q, k, v, logits):
        held.append(torch.ones(k.shape[1:3], device=k.device) if logits is None else dms.visible(
            len(ids) - 1, position, dms.decisions(logits, settings.shift)[0], settings.window))
        return masked(layer, q, k, v, logits)

    model.hidden(torch.tensor([ids], device=model.device), attend)
    for token, part in zip(ids, torch.cat(held).float().mean(0).tolist()):
        text = session.tokenizer.decode([token])
        grey = 236 + int(part * 19)  # of the 256 colours, 232 to 255 are greys
        show_now(f"\x1b[38;5;{grey}m{text}\x1b[0m" if sys.stdout.isatty() else f"{text}[{int(part * 10)}]")
    print()


def parse(argv=None):
    p = argparse.ArgumentParser(description="Generate with a compacting KV cache.")
    p.add_argument("--model", help="folder or hub id (default: the last retrofit, else the shipped toy model)")
    p.add_argument("--adapter", help="DMS adapter tensors to lay over the model: a safetensors file or a folder")
    p.add_argument("--prompt", help="text, or - for standard input (default: a problem of the toy world)")
    p.add_argument("--raw", action="store_true", help="feed the prompt as it is, without the chat template")
    p.add_argument("--task", default="needles", choices=["needles", "variables", "arithmetic"],
                   help="the toy problem to ask where no prompt is given")
    p.add_argument("--chat", action="store_true", help="several turns, a line each, over one cache")
    p.add_argument("-n", type=int, default=1, metavar="W", help="parallel chains of each prompt")
    p.add_argument("--requests", metavar="FILE", help="JSON lines with \"prompt\" or \"messages\"")
    p.add_argument("--out", help="JSON lines with the requests' answers; those that it holds are not done again")
    p.add_argument("--batch", type=int, help="most chains side by side (default: 16 on a CPU, 64 on a GPU)")
    p.add_argument("--memory", type=float, metavar="GB",
                   help="the cache's memory (default: 80%% of what a GPU has free, or a CPU's machine has in all)")
    p.add_argument("--max-new-tokens", type=int, default=400)
    p.add_argument("--temperature", type=float, help="0 is greedy (default: generation_config.json, else 1; toy: 0)")
    p.add_argument("--top-k", type=int)
    p.add_argument("--top-p", type=float)
    p.add_argument("--min-p", type=float)
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop string; may be repeated")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--dense", action="store_true", help="switch eviction off")
    p.add_argument("--show-evictions", action="store_true", help="print the text shaded by how many heads hold it")
    p.add_argument("--compile", action="store_true", help="torch.compile what lies between attentions (for a GPU)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                   help="(default: float32 on a CPU, bfloat16 on a GPU)")
    args = p.parse_args(argv)
    args.device = dms.choose_device(args.device)
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    args.batch = args.batch or (16 if args.device == "cpu" else 64)
    if args.n < 1 or args.max_new_tokens < 1 or args.batch < 1 or not (args.memory or 1) > 0:
        raise InputError("-n, --max-new-tokens and --batch must be at least 1, and --memory above 0")
    if (args.temperature or 0) < 0 or not 0 < (1 if args.top_p is None else args.top_p) <= 1:
        raise InputError("--temperature must be 0 or more, and --top-p above 0 and at most 1")
    if args.chat and (args.n > 1 or args.prompt is not None):
        raise InputError("--chat reads its turns from standard input; leave out -n and --prompt")
    if (args.requests is None) != (args.out is None) or args.requests and (args.chat or args.prompt is not None):
        raise InputError("--requests and --out belong together, without --prompt and --chat")
    if args.model is None:
        finished = [file for file in Path("out").glob("*/config.json") if (file.parent / "settings.json").exists()]
        args.model = str(max(finished, key=os.path.getmtime).parent if finished else SHIPPED)
    return args


def one_prompt(session, text, read=final_answer, expected=None):
    """Answer a text, in -n chains, and say what they voted for, as `read` finds it in what they say."""
    args, ids = session.args, session.encode(text)
    if expected is not None:
        print(f"{text}\n", file=sys.stderr)
    session.model.check_ids(ids, args.max_new_tokens)
    session.new_cache(args.n)
    chains = session.chains(ids, args.seed, args.n, show_now if args.n == 1 else None)
    session.finish(chains)
    print("".join(f"[{i}] {chain.stop.text}\n" for i, chain in enumerate(chains, 1)) if args.n > 1 else "", flush=True)
    votes = Counter(read(chain.stop.text) for chain in chains)
    answer, count = votes.most_common(1)[0]
    if expected is not None:
        print(f"[answer {answer}, expected {expected}; {votes[expected]} of {args.n} right]", file=sys.stderr)
    elif args.n > 1:
        print(f"[answer {answer}; {count} of {args.n} agree]", file=sys.stderr)
    if args.show_evictions:
        show_evictions(session, chains[0].ids)


def main(argv=None):
    args = parse(argv)
    text, problem = sys.stdin.read() if args.prompt == "-" else args.prompt, ()
    if text is None and not args.chat and not args.requests:
        from toy.tasks import question
        text, *problem = question(args.task, args.seed)
        args.temperature = 0.0 if args.temperature is None and args.n == 1 else args.temperature
    if text is not None and not text.strip():
        raise InputError("the prompt is empty; give some text with --prompt, or on standard input with --prompt -")
    session = Session(args)
    if args.chat:
        chat(session)
    elif args.requests:
        serve(session)
    else:
        one_prompt(session, text, *problem)
    if session.tokens:
        s = session.cache.stats()
        print(f"[{session.tokens} tokens in {session.seconds:.2f} s, prompts included, "
              f"{session.tokens / session.seconds:.1f} tokens/s; compression {s['compression_ratio'] or 1:.2f}x; "
              f"at most {s['peak_pairs']:,} pairs held, in {s['peak_page_bytes']:,} bytes of a pool of "
              f"{s['pool_bytes']:,}]", file=sys.stderr)


if __name__ == "__main__":
    dms.run_script(main)
