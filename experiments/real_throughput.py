"""
Many prompts in the same memory: `generate.py --requests`, dense and DMS, tokens a second and bytes.

    python experiments/real_model.py; python experiments/text.py        # once
    python experiments/real_throughput.py                               # about 15 minutes

32 prompts of 1,000 to 4,000 tokens, documentation to be continued by 128 tokens, in a cache of
--memory GB. Every run is the command that a user would type; its own report has tokens, pairs,
bytes and seconds.
"""

import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from real_methods import MODEL, RETROFIT, texts
from shared import ROOT, Results, arguments, load_tokenizer



def write_prompts(file, count, shortest, longest):
    """Prompts of so many tokens, evenly spread, each from another place of the held-out text."""
    tokenizer = load_tokenizer(MODEL)
    rng = random.Random(0)
    documents = texts()
    rows = []
    for i in range(count):
        length = shortest + (longest - shortest) * i // max(count - 1, 1)
        text = "".join(rng.sample(documents, length // 1000 + 2))
        ids = tokenizer.encode(text)[:length]
        rows.append({"prompt": tokenizer.decode(ids)})
    rng.shuffle(rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def answer(model, prompts, args):
    """Run generate.py with the options that name the model; {seconds, new tokens, report}."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "answers.jsonl"
        command = [sys.executable, ROOT / "generate.py", *model, "--requests", prompts,
                   "--out", out, "--memory", args.memory, "--max-new-tokens", args.new_tokens]
        begin = time.time()
        done = subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, check=True)
        seconds = time.time() - begin
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    tokens = sum(sum(row["generated"]["tokens"]) for row in rows)
    [report] = re.findall(r"^\[(.*new tokens in.*)\]$", done.stderr, re.MULTILINE)
    return {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds,
            "answers": len(rows), "report": report}


def main():
    p = arguments(__doc__, "real-throughput.json")
    p.add_argument("--prompts", type=int, default=32)
    p.add_argument("--shortest", type=int, default=1000)
    p.add_argument("--longest", type=int, default=4000)
    p.add_argument("--new-tokens", type=int, default=128)
    p.add_argument("--memory", type=float, default=0.5, help="GB of cache")
    p.add_argument("--crs", type=float, nargs="*", default=[8, 4])
    args = p.parse_args()
    results = Results(args)
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        write_prompts(prompts, args.prompts, args.shortest, args.longest)
        models = {"dense": ["--model", MODEL]}
        models |= {f"DMS {cr:g}x": ["--model", RETROFIT, "--cr", cr] for cr in args.crs}
        for name, model in models.items():
            if not results.has(method=name):
                results.add(method=name, **answer(model, prompts, args))


if __name__ == "__main__":
    main()
