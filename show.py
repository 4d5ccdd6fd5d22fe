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

from common import read_text, write_text

TEMPLATE = Path(__file__).with_name("page.html")


def held_by_heads(cache, sequence):
    """The positions that each head holds of a sequence, an index of the batch: [L][Hkv][n]."""
    heads = range(cache.kv_heads)
    return [[cache.positions(sequence, layer, head).tolist() for head in heads]
            for layer in range(cache.layers)]


def show_evictions(file, stream, ids, held):
    """Show ids, which the cache has seen, by what held_by_heads says: printed for "-", otherwise
    written to an HTML file. stream: a new Stream (generate.py) that keeps special tokens."""
    if file == "-":
        print_tokens(texts_of(stream, ids), held)
    else:
        write_text(file, page(texts_of(stream, ids), held))


def texts_of(stream, ids):
    """The text of each token. What several tokens make together stands at the first place where it
    is certain; the others are dots."""
    ends = [stream(token) or len(stream.text) for token in ids]
    stream.finish()
    ends[-1] = len(stream.text)
    return [stream.text[begin:end] or "\u00b7" for begin, end in zip([0, *ends], ends)]


def print_tokens(texts, held):
    """Each token shaded by the share of heads that hold it: bright for all, dark for few. Where the
    output is no terminal, the share in tenths follows the token in brackets."""
    heads = [set(positions) for layer in held for positions in layer]
    for position, text in enumerate(texts):
        share = sum(position in head for head in heads) / len(heads)
        shaded = f"\x1b[38;5;{236 + int(share * 19)}m{text}\x1b[0m"  # 232 to 255 are greys
        print(shaded if sys.stdout.isatty() else f"{text}[{int(share * 10)}]", end="")
    print()


def page(texts, held):
    """The page: the tokens as escaped text, and as data nothing but numbers."""
    spans = "".join(f"<span>{html.escape(text)}</span>" for text in texts)
    before, after = read_text(TEMPLATE).split("TEXT")
    return before + spans + after.replace("DATA", json.dumps({"held": held}))
