"""
What a cache still holds of a text: in the terminal, or as one HTML page that needs nothing else.

    python generate.py --show-evictions              # each token by how many heads still hold it
    python generate.py --show-evictions page.html    # the same, and head by head

All of it comes from cache.positions, what is really held. A head is a pair of layer and KV head.
The page's template is page.html. This file knows nothing of models or tokenizers, nor of how a
decision was made.
"""

import html
import json
import sys
from pathlib import Path

from common import read_text

def held_by_heads(cache, index):
    """The positions that each head holds of a sequence, at an index of the batch: [L][Hkv][n]."""
    return [[cache.positions(index, layer, head).tolist() for head in range(cache.kv_heads)]
            for layer in range(cache.layers)]


def show_evictions(file, cache, sequence, stream):
    """Show what the cache holds of a Sequence: printed for "-", otherwise written to an HTML file.
    stream: a new Stream (generate.py) that keeps special tokens."""
    held = held_by_heads(cache, sequence.index)
    texts = texts_of(stream, sequence.ids[: sequence.fed])
    if file == "-":
        print_tokens(texts, held)
    else:
        Path(file).write_text(page(texts, held), encoding="utf-8")


def texts_of(stream, ids):
    """Yield the text of each token. Where several make one character, as the bytes of an emoji do,
    it stands at the last of them, and the others are dots."""
    for token in ids:
        begin = len(stream.text)
        stream(token)
        yield stream.text[begin:] or "\u00b7"


def print_tokens(texts, held):
    """Each token is the brighter, the more heads hold it, which stands out on a dark terminal. If
    the output is no terminal, the share of heads in tenths follows in brackets."""
    heads = [set(positions) for layer in held for positions in layer]
    for position, text in enumerate(texts):
        share = sum(position in head for head in heads) / len(heads)
        shaded = f"\x1b[38;5;{236 + int(share * 19)}m{text}\x1b[0m"  # 232 to 255 are greys
        print(shaded if sys.stdout.isatty() else f"{text}[{int(share * 10)}]", end="")
    print()


def page(texts, held):
    """The page: as data nothing but numbers, and the tokens as escaped text."""
    spans = "".join(f"<span>{html.escape(text)}</span>" for text in texts)
    template = read_text(Path(__file__).with_name("page.html"))
    return template.replace("DATA", json.dumps(held)).replace("TEXT", spans)
