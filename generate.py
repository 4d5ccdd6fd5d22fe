"""
Generate from a dense or DMS checkpoint with the compacting cache, and see what it forgets.

    python generate.py                                             # the last retrofit, or the shipped toy model
    python generate.py --model Qwen/Qwen3-8B-my-dms --prompt "How many primes are below 100?"
    python generate.py --chat                                      # several turns over one cache
    python generate.py -n 8 --temperature 1.0                      # 8 chains that share one prompt
    python generate.py --show-evictions                            # each token shaded by how many heads still hold it
    python generate.py --dense                                     # the same, nothing evicted

The text goes to standard output; the closing line with speed and memory goes to standard error.
"""
import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch

import dms
from dms import InputError, read_json
from kv_cache import KVCache
from model import generate, load_model, load_tokenizer, resolve, sample

HERE = Path(__file__).resolve().parent
SHIPPED = HERE / "toy" / "retrofitted"


def default_model():
    """The newest finished retrofit under out/, else the retrofitted toy model that the repository ships."""
    finished = [file.parent for file in Path("out").glob("*/config.json") if (file.parent / "settings.json").exists()]
    return str(max(finished, key=lambda folder: (folder / "config.json").stat().st_mtime, default=SHIPPED))


def toy_problem(task, seed):
    sys.path.insert(0, str(HERE))
    from toy import tasks
    return tasks, tasks.make_problem(task, random.Random(f"generate {seed}"), "test")


class Stream:
    """Token ids in, printable text out as soon as it is certain: an incomplete UTF-8 sequence is held back, and so is
    what might be the beginning of a stop string. `text` is all that has been let out."""

    def __init__(self, tokenizer, stop_strings=()):
        self.tokenizer, self.stops = tokenizer, [s for s in stop_strings if s]
        self.ids, self.text = [], ""
        self.stopped = self.ended = False  # by a stop string; by an end token

    def push(self, token):
        """Take one token; returns the new text, "" while undecided."""
        if self.stopped:
            return ""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        cuts = [text.find(s) for s in self.stops if s in text]
        if cuts:
            self.stopped, text = True, text[:min(cuts)]
            return self._let_out(text)
        hold = max((n for s in self.stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        hold = max(hold, len(text) - len(text.rstrip("\ufffd")))
        return self._let_out(text[:len(text) - hold])

    def finish(self):
        """What was held back and turned out to be text after all."""
        return "" if self.stopped else self._let_out(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _let_out(self, text):
        new, self.text = text[len(self.text):], max(self.text, text, key=len)
        return new


class Session:
    """A loaded model, its tokenizer, the settings of a run, and one cache."""

    def __init__(self, args):
        self.args = args
        folder = resolve(args.model)
        self.tokenizer = load_tokenizer(folder)
        self.model = load_model(folder, args.device, getattr(torch, args.dtype), adapter=args.adapter)
        if args.dense and self.model.config.dms is not None:
            self.model.config.dms.disable_eviction = True
        file = folder / "generation_config.json"
        defaults = read_json(file) if file.exists() else {}
        ends = defaults.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        ends.append(self.tokenizer.token_id(self.tokenizer.special("eos_token")))
        self.ends = {e for e in ends if isinstance(e, int)}
        for name, fallback in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
            if getattr(args, name) is None:
                stated = defaults.get(name)
                setattr(args, name, fallback if stated is None else stated)
        if defaults.get("do_sample") is False and args.temperature_given is None:
            args.temperature = 0.0
        self.generator = torch.Generator(args.device).manual_seed(args.seed)
        self.cache = KVCache(self.model.config, 1, args.device, self.model.dtype, args.page_size)
        self.steps = self.seconds = 0

    def choose(self, logits):
        a = self.args
        return sample(logits, a.temperature, a.top_k, a.top_p, a.min_p, self.generator)

    def run(self, prompt, chains=1, show=print):
        """Continue the cache with prompt (token ids); returns the chains' Streams. show takes chain 0's text."""
        seen = int(self.cache.seen.max())
        self.model.check_ids(prompt, seen + self.args.max_new_tokens)
        streams = [Stream(self.tokenizer, self.args.stop) for _ in range(chains)]
        begin = time.perf_counter()

        def stop(chain, token):
            stream = streams[chain]
            stream.ended = token in self.ends
            new = "" if stream.ended else stream.push(token)
            if chain == 0:
                show(new)
            return stream.stopped or stream.ended

        for drawn in generate(self.model, self.cache, [prompt], self.args.max_new_tokens, choose=self.choose,
                              stop=stop, chains=chains):
            self.steps += len(drawn)
        show(streams[0].finish())
        for stream in streams[1:]:
            stream.finish()
        self.seconds += time.perf_counter() - begin
        return streams

    def closing_line(self):
        s = self.cache.stats()
        return (f"[{self.steps} tokens in {self.seconds:.2f} s, {self.steps / max(self.seconds, 1e-9):.1f} tokens/s, "
                f"prompt included; {s['pairs']:,} pairs held, dense {s['dense_pairs']:,}; "
                f"compression {s['compression_ratio']:.2f}x; {s['page_bytes']:,} bytes in pages, "
                f"{s['pool_bytes']:,} allocated]")


def show_now(text):
    print(text, end="", flush=True)


def chat(session):
    """Turns from standard input over one cache: each feeds only what the template puts after an answer, the new turn
    included. What the model said stays as it was said, thoughts too, as the cache cannot unsay it."""
    template, mark, pending = session.tokenizer.apply_chat_template, "@ANSWER@", None
    for line in iter(lambda: prompt_line("> "), None):
        if not line.strip():
            continue
        turn = {"role": "user", "content": line}
        if pending is None:
            text, pending = template([turn], add_generation_prompt=True), []
        else:
            before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
            text = template([*before, turn], add_generation_prompt=True).rsplit(mark, 1)[-1]
        stream = session.run(pending + session.tokenizer.encode(text, add_special_tokens=False), show=show_now)[0]
        pending = [] if stream.ended else stream.ids[-1:]  # drawn but not yet fed; the template itself ends the turn
        print(flush=True)


def prompt_line(mark):
    if sys.stdin.isatty():
        print(mark, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


SHADES = (231, 252, 248, 244, 240, 237)  # 256-colour codes, from held by all heads to held by few


@torch.inference_mode()
def show_evictions(session, ids, out=sys.stdout):
    """Print the text with each token shaded by the share of (layer, head) pairs that still hold it at the end: bright
    for all, dark for few; without a terminal the share in tenths follows each token in brackets."""
    model, T = session.model, len(ids)
    model.check_ids(ids)
    held = torch.zeros(T, device=model.device)
    masked = dms.masked_attention(model.config)

    def attend(layer, q, k, v, logits):
        position = torch.arange(T, device=k.device)
        if logits is None:
            held.add_(k.shape[1])
        else:
            evict = dms.decisions(logits, model.config.dms.shift)[0]
            held.add_(dms.visible(T - 1, position, evict, model.config.dms.window).sum(0))
        return masked(layer, q, k, v, logits)

    model.hidden(torch.tensor([ids], device=model.device), attend)
    share = (held / (model.config.num_hidden_layers * model.config.num_key_value_heads)).tolist()
    for token, part in zip(ids, share):
        text = session.tokenizer.decode([token])
        if out.isatty() or session.args.color:
            shade = SHADES[min(int((1 - part) * len(SHADES)), len(SHADES) - 1)]
            print(f"\x1b[38;5;{shade}m{text}\x1b[0m", end="", file=out)
        else:
            print(f"{text}[{int(part * 10)}]", end="", file=out)
    print(file=out)


def parse(argv=None):
    p = argparse.ArgumentParser(description="Generate with a compacting KV cache.")
    p.add_argument("--model", help="folder or hub id (default: the last retrofit, else the shipped toy model)")
    p.add_argument("--adapter", help="DMS adapter tensors to lay over the model: a safetensors file or a folder")
    p.add_argument("--prompt", help="text, or - for standard input (default: a problem of the toy world)")
    p.add_argument("--raw", action="store_true", help="feed the prompt as it is, without the chat template")
    p.add_argument("--task", default="needles", choices=["needles", "variables", "arithmetic"],
                   help="the toy problem to ask where no prompt is given")
    p.add_argument("--chat", action="store_true", help="several turns, a line each, over one cache")
    p.add_argument("-n", type=int, default=1, metavar="W", help="parallel chains of one prompt")
    p.add_argument("--max-new-tokens", type=int, default=400)
    p.add_argument("--temperature", type=float, help="0 is greedy (default: generation_config.json, else 1; toy: 0)")
    p.add_argument("--top-k", type=int)
    p.add_argument("--top-p", type=float)
    p.add_argument("--min-p", type=float)
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop string; may be repeated")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--dense", action="store_true", help="switch eviction off")
    p.add_argument("--show-evictions", action="store_true", help="print the text shaded by how many heads hold it")
    p.add_argument("--color", action="store_true", help="shade even if the output is not a terminal")
    p.add_argument("--page-size", type=int, default=32)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                   help="(default: float32 on a CPU, bfloat16 on a GPU)")
    args = p.parse_args(argv)
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    if args.n < 1 or args.max_new_tokens < 1:
        raise InputError("-n and --max-new-tokens must be at least 1")
    if (args.temperature or 0) < 0 or not 0 < (1 if args.top_p is None else args.top_p) <= 1:
        raise InputError("--temperature must be 0 or more, and --top-p above 0 and at most 1")
    if args.chat and (args.n > 1 or args.prompt is not None):
        raise InputError("--chat reads its turns from standard input; leave out -n and --prompt")
    args.model = args.model or default_model()
    return args


def main(argv=None):
    args = parse(argv)
    args.temperature_given = args.temperature
    task = problem = None
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    if text is None and not args.chat and piped():
        text = sys.stdin.read() or None
    if text is None and not args.chat:
        task, problem = toy_problem(args.task, args.seed)
        text = problem.prompt
        if args.temperature is None and args.n == 1:
            args.temperature = 0.0
    if text is not None and not text.strip():
        raise InputError("the prompt is empty; give some text with --prompt or on standard input")
    session = Session(args)
    if args.chat:
        chat(session)
    else:
        tokenizer = session.tokenizer
        templated = not args.raw and tokenizer.template is not None
        if templated:
            text = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=not templated)
        if problem is not None:
            print(f"{problem.prompt}\n", file=sys.stderr)
        streams = session.run(ids, args.n, show_now if args.n == 1 else lambda text: None)
        print("".join(f"[{i + 1}] {s.text}\n" for i, s in enumerate(streams)) if args.n > 1 else "", flush=True)
        if problem is not None:
            votes = Counter(task.final_answer(problem, s.text) for s in streams)
            expected = task.final_answer(problem, problem.answer)
            print(f"[answer {votes.most_common(1)[0][0]}, expected {expected}; {votes[expected]} of {args.n} right]",
                  file=sys.stderr)
        if args.show_evictions:
            show_evictions(session, ids + streams[0].ids)
    if session.steps:
        print(session.closing_line(), file=sys.stderr)


def piped():
    """Is there text on standard input, rather than a terminal or nothing?"""
    import os
    import stat
    mode = os.fstat(sys.stdin.fileno()).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


if __name__ == "__main__":
    try:
        main()
    except InputError as e:
        sys.exit(print(f"error: {e}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("\nstopped", file=sys.stderr) or 130)
