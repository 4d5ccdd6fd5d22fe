"""
Drift: how much one threshold compresses text of other kinds and lengths than it was settled on.

    python experiments/real_model.py; python experiments/text.py        # once
    python experiments/real_drift.py                                    # about 10 minutes

The offset of the real model's retrofit was settled on documentation of 1,024 tokens, at 8x. Here it
reads other text, and the cache counts: tokens over the pairs that a head holds at the end, the mean
over heads and samples.

documentation   SymPy's, by other authors than those trained on
code            Python's standard library
German          Django's messages, translated
numbers         a list of random integers
filler          five short sentences, again and again
"""

import random
import re
import tarfile
import tempfile
import textwrap
from pathlib import Path

import torch
from real_methods import MODEL, RETROFIT, texts
from real_retrieval import FILLER
from shared import KVCache, Results, arguments, download, load, load_tokenizer, print_table


def german():
    """The translations in Django's .po files, as one text."""
    with tempfile.TemporaryDirectory() as folder:
        file = download("django==5.2", folder, "--no-binary", ":all:", "--no-build-isolation")
        with tarfile.open(file) as archive:
            members = [x for x in archive.getmembers() if re.search(r"/de/.*\.po$", x.name)]
            raw = "\n".join(archive.extractfile(x).read().decode() for x in members)
    joined = raw.replace('"\n"', "")  # a string may take several lines
    return " ".join(re.findall(r'^msgstr(?:\[\d\])? "(.{20,})"$', joined, re.MULTILINE))


def kinds():
    """{kind: a text of more tokens than are read}."""
    rng = random.Random(0)
    code = "".join(Path(module.__file__).read_text() for module in (tarfile, textwrap, random, re))
    return {"documentation": "".join(texts()[:60]), "code": code, "German": german(),
            "numbers": ", ".join(str(rng.randrange(10**6)) for _ in range(9000)),
            "filler": FILLER * 1500}


def main():
    p = arguments(__doc__, "real-drift.json")
    p.add_argument("--cr", type=float, default=8)
    p.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    p.add_argument("--samples", type=int, default=2)
    args = p.parse_args()
    results = Results(args)
    tokenizer = load_tokenizer(MODEL)
    model, _ = load(RETROFIT, args.cr)
    for kind, text in kinds().items():
        ids = tokenizer.encode(text)
        for length in args.lengths:
            if results.has(kind=kind, length=length):
                continue
            found = {}
            budgets = {"compression": None, "with_budget": (length / args.cr, length)}
            for name, budget in budgets.items():
                cache = KVCache(model.config, 1, budget=budget)
                for sample in range(args.samples):
                    start = sample * max(len(ids) - length, 0) // args.samples
                    model.states(torch.tensor([ids[start : start + length]]), cache)
                    cache.release([0])
                found[name] = cache.compression_ratio()
            results.add(kind=kind, length=length, **found)
    print_table(results.data["rows"], "kind", "length", "compression", "with_budget")


if __name__ == "__main__":
    main()
