"""
What the heads have learned: how much each keeps, of what, and how long they grow (the paper's
section 5 looks at lengths by layer and head; the kinds of token are the toy world's own).

    python experiments/heads.py                       # the shipped retrofit: 1 to 2 minutes
    python experiments/heads.py --problems 5 --traces 1 --every 64      # a look

Rows of experiments/results/heads.json:
    kept     for a task and each kind of token, the share that is kept for good: the mean over
             heads, and for each layer and head. Counted where a text ends, from cache.positions,
             among the tokens that have left the window by then (the window holds all of its
             tokens, whatever was decided).
    lengths  for one text, the pairs that each head holds, while the prompt is read piece by piece
             and then while tokens are generated.

Kinds: where a token stands (filler, statement, question, the answer with its chain of thought,
template) and what it is (name, digit, mark, word).
"""

import re

import torch

import shared
from shared import KVCache, Results, Sequence, generate, make_problems, tasks

from common import run_script
from show import held_by_heads

NAMES = {*tasks.NAMES, *tasks.LETTERS}
FILLER = {"The", "the", ".", *tasks.ADJECTIVES, *tasks.NOUNS, *tasks.VERBS, *tasks.TIMES}


def is_filler(sentence):
    """Has a sentence only words that say nothing? "The code of" has another one."""
    return set(re.findall(r"\w+|[^\w\s]", sentence)) <= FILLER


def places_of(problem, text):
    """Where each character of the chat's text stands."""
    places = ["template"] * len(text)

    def mark(part, place, begin):
        begin = text.index(part, begin)
        places[begin : begin + len(part)] = [place] * len(part)
        return begin + len(part)

    *sentences, question = re.split(r"(?<=\.) ", problem.prompt)
    end = 0
    for sentence in sentences:
        end = mark(sentence, "filler" if is_filler(sentence) else "statement", end)
    end = mark(question, "question", end)
    mark(problem.answer, "answer", end)
    return places


def what(token):
    """What a token's text is."""
    if token.isdigit():
        return "digit"
    if token in NAMES:
        return "name"
    return "word" if token.isalpha() else "mark"


def kinds_of(problem, tokenizer):
    """(ids (T,), the kind of each token) of a problem with its answer."""
    text = tokenizer.apply_chat_template(tasks.messages(problem))
    encoded = tokenizer.fast.encode(text, add_special_tokens=False)
    places = places_of(problem, text)
    kinds = []
    for begin, end in encoded.offsets:
        kind = places[end - 1]  # a token begins with the space before it
        if kind != "template":
            token = text[begin:end].strip()
            kind = f"{kind}: {what(token)}"
        kinds.append(kind)
    return encoded.ids, kinds


class Counts:
    """How many tokens of each kind have left the window, and how often each head holds them."""

    def __init__(self, cache):
        self.heads = (cache.layers, cache.kv_heads)
        self.tokens = {}  # kind -> number
        self.held = {}  # kind -> (L, Hkv)

    def add(self, cache, kinds):
        """Count the text of sequence 0 of the cache."""
        out = len(kinds) - cache.window - 1  # as many tokens have left the window
        for kind in kinds[: max(out, 0)]:
            self.tokens[kind] = self.tokens.get(kind, 0) + 1
            self.held.setdefault(kind, torch.zeros(self.heads))
        for layer, heads in enumerate(held_by_heads(cache, 0)):
            for head, positions in enumerate(heads):
                for position in positions:
                    if position < out:
                        self.held[kinds[position]][layer, head] += 1

    def rows(self):
        for kind in sorted(self.tokens):
            tokens = self.tokens[kind]
            share = self.held[kind] / tokens
            yield {"kind": kind, "tokens": tokens, "kept": float(share.mean()),
                   "kept_by_head": share.tolist()}


@torch.inference_mode()
def count_kept(model, tokenizer, task, args):
    """([{kind, tokens, kept, kept_by_head}, ...] of a task, first for all of its tokens, as kind
    "all"; the compression ratio)."""
    cache = KVCache(model.config, 1, model.device, model.dtype)
    by_kind = Counts(cache)
    together = Counts(cache)
    for problem in make_problems(task, args.problems, args.seed):
        ids, kinds = kinds_of(problem, tokenizer)
        model(torch.tensor([ids]), cache=cache, last_only=True)
        by_kind.add(cache, kinds)
        together.add(cache, ["all"] * len(kinds))
        cache.release([0])
    return [*together.rows(), *by_kind.rows()], cache.compression_ratio()


@torch.inference_mode()
def trace(model, tokenizer, problem, every):
    """The pairs that each head holds while a text is read and generated: tokens so far [n], pairs
    [n][L][Hkv], and how many of the tokens are the prompt's."""
    cache = KVCache(model.config, 1, model.device, model.dtype)
    ids = shared.prompt_ids(tokenizer, problem)
    tokens = []
    pairs = []

    def note():
        tokens.append(int(cache.seen[0]))
        pairs.append(cache.stats()["pairs_per_head"])

    before = ids[:-1]  # generate appends the last one
    for piece in torch.tensor([before]).split(every, dim=1):
        model(piece, cache=cache, last_only=True)
        note()
    sequence = Sequence(ids, 256, index=0, fed=len(before))
    for _ in generate(model, cache, [sequence], {tokenizer.end_id}, release=False):
        if sequence.over or len(sequence.new) % every == 0:
            note()
    return dict(prompt_tokens=len(ids), tokens=tokens, pairs_by_head=pairs)


def main():
    p = shared.arguments(__doc__, "heads.json")
    p.add_argument("--model", default=str(shared.SHIPPED))
    p.add_argument("--problems", type=int, default=100, help="of each task, to count kinds in")
    p.add_argument("--traces", type=int, default=1, help="of each task, texts to follow")
    p.add_argument("--every", type=int, default=8, help="tokens between two looks")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    results = Results(args)
    model, tokenizer = shared.load(args.model)
    for task in tasks.TASKS:
        if not results.has(what="kept", task=task):
            rows, ratio = count_kept(model, tokenizer, task, args)
            results.add(what="kept", task=task, compression_ratio=ratio, kinds=rows)
            for row in rows:
                print(f"    {row['kind']:20} {row['tokens']:6} tokens, {row['kept']:6.1%} kept")
        for number, problem in enumerate(make_problems(task, args.traces, args.seed)):
            if not results.has(what="lengths", task=task, problem=number):
                lengths = trace(model, tokenizer, problem, args.every)
                results.add(what="lengths", task=task, problem=number, **lengths)


if __name__ == "__main__":
    run_script(main)
