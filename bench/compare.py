"""
Two checkouts side by side: a command in each of them in turn, with its time and its peak memory.

    python bench/compare.py ../before . "python retrofit.py --out {out}/toy" --rounds 3
    python bench/compare.py ../before . "python bench/decode.py" --number " ms ([0-9.,]+)"
    python bench/compare.py ../before . \
        "python generate.py --requests {in}/prompts.jsonl --out {out}/answers.jsonl"

{out} is a new empty folder for each run, {in} the folder that compare.py was started in. A second
command is for the second checkout, where its options differ. --number is a regular expression with
groups: the numbers that it finds in the output are compared, too, in order. The machine's speed
drifts, so rounds alternate which comes first, and what counts is the median of their ratios.
"""

import argparse
import os
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path


def run(folder, command, number):
    """{measure: value} of one run. Ends the script if the command fails."""
    with tempfile.TemporaryDirectory() as out, tempfile.TemporaryFile("w+") as log:
        command = command.replace("{out}", out).replace("{in}", os.getcwd())
        begin = time.perf_counter()
        process = subprocess.Popen(command, shell=True, cwd=folder, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        log.seek(0)
        text = log.read()
    if status != 0:
        raise SystemExit(f"{text[-2000:]}\n{folder}: {command}: failed")
    found = re.finditer(number, text) if number else []
    numbers = [float(match[match.lastindex].replace(",", "")) for match in found]
    measures = {"seconds": seconds, "peak RSS in GB": usage.ru_maxrss * 1024 / 1e9}
    return measures | {f"number {i + 1}": x for i, x in enumerate(numbers)}


def main():
    p = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    p.add_argument("checkouts", nargs=2, type=Path, metavar="CHECKOUT")
    p.add_argument("commands", nargs="+", metavar="COMMAND")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--number", metavar="REGEX", help="numbers in the output that are compared, too")
    args = p.parse_args()
    sides = list(zip(args.checkouts, [*args.commands, *args.commands]))
    rounds = []
    for turn in range(args.rounds):
        measured = [None, None]
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            measured[side] = run(*sides[side], args.number)
        rounds.append(measured)
        seconds = [f"{side['seconds']:.2f} s" for side in measured]
        print(f"round {turn + 1}: {' against '.join(seconds)}", flush=True)
    print(f"{'median':16} {'first':>10} {'second':>10} {'second / first':>16}")
    for name in rounds[0][0]:
        first, second = ([measured[side][name] for measured in rounds] for side in (0, 1))
        ratio = statistics.median(b / a for a, b in zip(first, second))
        medians = statistics.median(first), statistics.median(second)
        print(f"{name:16} {medians[0]:10.3f} {medians[1]:10.3f} {ratio:16.3f}")


if __name__ == "__main__":
    main()
