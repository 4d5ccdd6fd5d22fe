"""
What a cache still holds of a text: in the terminal, or as one HTML page that needs nothing else.

    python generate.py --show-evictions              # each token by how many heads still hold it
    python generate.py --show-evictions page.html    # the same, and head by head

All of it comes from cache.positions, what is really held. A head is a pair of layer and KV head.
Knows nothing of models, nor of how a decision was made.
"""

import html
import json
import sys

from tokenizers.decoders import DecodeStream

from checkpoint import write_text

PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>What the cache holds</title>
<style>
body { max-width: 60em; margin: 2em auto; padding: 0 1em; font: 16px/1.7 sans-serif; }
#text { white-space: pre-wrap; font-family: monospace; border-top: 1px solid #aaa; }
#heads { border-spacing: 2px; }
#heads td { width: 2.6em; text-align: center; font-size: 12px; line-height: 1.5; cursor: pointer; }
#heads .chosen { outline: 2px solid #c30; }
input { width: 100%; }
</style>
<p id="said"></p>
<input id="head" type="range" min="-1" value="-1" aria-label="layer and KV head">
<table id="heads"></table>
<p id="text">TEXT</p>
<script id="data" type="application/json">DATA</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent);
const tokens = document.querySelectorAll("#text span");
const slider = document.getElementById("head");
const table = document.getElementById("heads");
const heads = data.held.flat();  // of each head the positions that it holds
const perLayer = data.held[0].length;
const holders = new Array(tokens.length).fill(0);
heads.forEach(held => held.forEach(position => holders[position]++));
const percent = share => Math.round(100 * share) + " %";
const paint = (element, share) => {
  element.style.background = `rgba(30, 110, 200, ${share.toFixed(3)})`;
  element.style.color = share > 0.6 ? "white" : "black";
};

function show(chosen) {  // the number of a head, or -1 for all of them
  const held = new Set(heads[chosen] ?? []);
  tokens.forEach((token, position) => {
    const share = chosen < 0 ? holders[position] / heads.length : Number(held.has(position));
    paint(token, share);
    token.title = `token ${position}: held by ${holders[position]} of ${heads.length} heads`;
  });
  const pairs = chosen < 0 ? heads.flat().length / heads.length : held.size;
  const name = chosen < 0 ? `All ${heads.length} heads, the darker the more`
    : `Layer ${Math.floor(chosen / perLayer)}, head ${chosen % perLayer}`;
  document.getElementById("said").textContent =
    `${name}: ${+pairs.toFixed(1)} of ${tokens.length} tokens held (${percent(pairs / tokens.length)})`;
  slider.value = chosen;
  table.querySelectorAll("td").forEach((cell, i) => cell.classList.toggle("chosen", i === chosen));
}

data.held.forEach((layer, number) => {
  const row = table.insertRow();
  layer.forEach((held, head) => {
    const cell = row.insertCell();
    const chosen = number * perLayer + head;
    cell.textContent = percent(held.length / tokens.length);
    cell.title = `layer ${number}, head ${head}`;
    paint(cell, held.length / tokens.length);
    cell.onclick = () => show(chosen === Number(slider.value) ? -1 : chosen);
  });
});
slider.max = heads.length - 1;
slider.oninput = () => show(Number(slider.value));
show(-1);
</script>
</html>
"""


def held_by_heads(cache, row):
    """The positions that each head holds of the sequence in a row of the cache, [L][Hkv][n]."""
    heads = range(cache.kv_heads)
    return [[cache.positions(row, layer, head).tolist() for head in heads]
            for layer in range(cache.layers)]


def texts_of(tokenizer, ids):
    """The text of each token. A character of several tokens is the last one's, the others are dots."""
    decoder = DecodeStream(skip_special_tokens=False)
    return [decoder.step(tokenizer.fast, token) or "\u00b7" for token in ids]


def show_evictions(file, tokenizer, ids, held):
    """Show ids (the tokens that the cache has read) by what held_by_heads says: written to an HTML
    file, or for "-" printed."""
    texts = texts_of(tokenizer, ids)
    if file == "-":
        print_tokens(texts, held)
    else:
        write_text(file, page(texts, held))


def print_tokens(texts, held):
    """Each token shaded by the share of heads that hold it: bright for all, dark for few; where the
    output is no terminal, the share in tenths follows it in brackets."""
    heads = [set(positions) for layer in held for positions in layer]
    for position, text in enumerate(texts):
        share = sum(position in head for head in heads) / len(heads)
        shaded = f"\x1b[38;5;{236 + int(share * 19)}m{text}\x1b[0m"  # 232 to 255 are greys
        print(shaded if sys.stdout.isatty() else f"{text}[{int(share * 10)}]", end="")
    print()


def page(texts, held):
    """The page: tokens as escaped text, and as data nothing but numbers."""
    spans = "".join(f"<span>{html.escape(text)}</span>" for text in texts)
    before, after = PAGE.split("TEXT")
    return before + spans + after.replace("DATA", json.dumps({"held": held}))
