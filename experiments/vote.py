"""
What the answers of `generate.py -n N --requests in.jsonl --out out.jsonl` agree on.

    python experiments/vote.py out.jsonl        # a JSON line for each request: answer, votes, of

Majority voting turns parallel chains into accuracy (the paper's hyper-scaling). This compares what
the chains end with; a benchmark's own checker may know better which answers are the same.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path

# the contents of a box, in which braces may be nested three deep: \frac{\sqrt{x_{1}}}{2}
BOXED = r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})+)\}"
# 12; -4, but not the -4 of 3-4; 12,345; 2.5e3; 1/2
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d*\.?\d+)(?:\.\d+)?"
NUMBER = rf"(?:(?<![\w.)])-)?{DIGITS}(?:[eE][+-]?\d+)?(?:/\d+)?"
SPELLINGS = {"\u2212": "-", "{,}": ",", r"\!": "", r"\$": "", "$": "", r"\dfrac": r"\frac"}


def final_answer(text):
    """What chains vote on: the contents of the last \\boxed{}, else the last number, else the last
    line. \\text{(A)} is A, and 12,345 is 12345."""
    for spelling, usual in SPELLINGS.items():
        text = text.replace(spelling, usual)
    found = re.findall(BOXED, text) or re.findall(NUMBER, text) or text.strip().split("\n")
    answer = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}", r"\1", found[-1]).strip()
    answer = re.sub(r"^\((\w)\)$", r"\1", answer)
    return answer.replace(",", "") if re.fullmatch(NUMBER, answer) else answer


def main(file):
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        generated = json.loads(line)["generated"]
        answers = Counter(map(final_answer, generated["texts"]))
        answer, votes = answers.most_common(1)[0]
        found = dict(line=generated["line"], answer=answer, votes=votes, of=len(generated["texts"]))
        print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
