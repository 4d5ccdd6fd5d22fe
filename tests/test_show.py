"""The page of what a cache holds: its numbers are the cache's, its text is only text."""
import html
import json
import re

import torch
from conftest import random_dms, small_model

import show
from checkpoint import load_tokenizer
from generate import SHIPPED
from kv_cache import KVCache


def parts(page):
    """(texts of the tokens, data) of a page."""
    paragraph = re.search(r'<p id="text">(.*?)</p>', page, re.DOTALL).group(1)
    spans = re.findall(r"<span>(.*?)</span>", paragraph, re.DOTALL)
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    return [html.unescape(span) for span in spans], json.loads(data.group(1))


def test_the_data_are_what_the_cache_holds(rng):
    for seed in range(8):
        model = small_model(seed, random_dms(rng), rng.choice([0.1, 0.5, 0.9]))
        cache = KVCache(model.config, 3, page_size=4)
        T = rng.randint(1, 90)
        model(torch.randint(67, (3, T)), cache=cache)
        row = rng.randrange(3)
        held = show.held_by_heads(cache, row)
        texts, data = parts(show.page([f"{i} " for i in range(T)], held))
        assert texts == [f"{i} " for i in range(T)]
        for layer in range(2):
            for head in range(2):
                positions = cache.positions(row, layer, head).tolist()
                assert data["held"][layer][head] == positions
        pairs = [[len(head) for head in layer] for layer in held]
        of_others = sum(len(cache.positions(b, layer, head))
                        for b in range(3) if b != row for layer in range(2) for head in range(2))
        assert sum(map(sum, pairs)) == cache.stats()["pairs"] - of_others


def test_text_is_escaped():
    texts = ["</p></script><script>alert(1)</script>", "&amp;", '"<span>', "TEXT", "DATA", "\n"]
    page = show.page(texts, [[[0, 5]]])
    assert parts(page) == (texts, {"held": [[[0, 5]]]})
    assert page.count("<script") == 2 and "alert(1)</script>" not in page
    assert not re.search(r"(src|href)=|https?:", page)  # nothing else is fetched


def test_tokens_together_are_the_text(tmp_path, capsys):
    tokenizer = load_tokenizer(SHIPPED)
    text = "The code of ann is 31. \u00e4\u00f6 \U0001f600 ."
    ids = tokenizer.encode(text)
    texts = show.texts_of(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts).replace("\u00b7", "") == text
    held = [[list(range(len(ids))), [0]]]
    show.show_evictions("-", tokenizer, ids, held)
    assert capsys.readouterr().out.startswith("The[10] code[5] of[5]")
    file = tmp_path / "page.html"
    show.show_evictions(file, tokenizer, ids, held)
    assert parts(file.read_text(encoding="utf-8")) == (texts, {"held": held})
