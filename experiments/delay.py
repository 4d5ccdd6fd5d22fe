"""
Delayed eviction: how long must an evicted pair stay readable? After the paper's ablation of the
window, and its comparison with immediate eviction by training steps.

    python experiments/delay.py                                        # 30 minutes on two cores
    python experiments/delay.py --windows 16 64 --steps 10 --samples 5 --problems 2    # a trial

Two parts, at 8x on the toy world, with retrofit.py's own defaults but for what is said:

window    windows of 0 (immediate eviction) to 32 tokens. Where retrofit.py refuses, since the
          window alone would hold more than 1/8 of a text, the row has its reason and no numbers.
samples   accuracy against training steps, with a window of 16 and with immediate eviction. Every
          point is a retrofit of its own, whose schedule reaches 8x after 70% of its steps.

A row has the accuracy on each task (of 200 problems: a share of 95% has a standard error of 1.5
points), the KL to the teacher in nats, and the compression that the cache counted while answering.
A model that has not learned to forget in so few steps shows there.
"""

import shared
from common import InputError
from retrofit import check, make_data, parse

RATIO = 8
USUAL = 16  # the window of retrofit.py on the toy


def flags_of(window, steps, seed):
    return ["--target-cr", RATIO, "--window", window, "--steps", steps, "--seed", seed]


def why_refused(window, steps, seed):
    """What retrofit.py would say against such a retrofit, None for nothing."""
    flags = [*flags_of(window, steps, seed), "--out", shared.RETROFITS / "refused"]
    options = parse([str(flag) for flag in flags])
    try:
        check(options)
    except InputError as e:
        return str(e)
    lengths = sum(make_data(options).held_out(32)[1], [])
    in_windows = sum(min(n, window + 1) for n in lengths)
    if sum(lengths) / in_windows < RATIO:
        return f"the window alone holds {in_windows} of {sum(lengths)} tokens"
    return None


def retrofit_of(window, steps, seed):
    """The folder of a retrofit with a window."""
    if window == USUAL:
        return shared.standard(RATIO, seed, steps)
    name = f"dms-{RATIO}x-window{window}-seed{seed}-{steps}steps"
    return shared.retrofitted(name, *flags_of(window, steps, seed))


def add_point(results, part, window, steps, seed, problems):
    """Add one row, unless it is there."""
    keys = {"part": part, "window": window, "steps": steps, "seed": seed}
    if results.has(**keys):
        return
    refused = why_refused(window, steps, seed)
    if refused:
        results.add(**keys, refused=refused)
        return
    model, tokenizer = shared.load(retrofit_of(window, steps, seed))
    results.add(**keys, **shared.measure(model, tokenizer, problems, seed))


def main():
    p = shared.toy_arguments(__doc__, "delay.json", problems=200, seeds=1)
    p.add_argument("--windows", type=int, nargs="*", default=[0, 4, 16, 32, 64])
    p.add_argument("--samples", type=int, nargs="*", default=[50, 125, 250, 500], help="steps")
    p.add_argument("--sample-windows", type=int, nargs="*", default=[0, USUAL])
    args = p.parse_args()
    results = shared.Results(args)
    for seed in range(args.seeds):
        for window in args.windows:
            add_point(results, "window", window, args.steps, seed, args.problems)
        for steps in args.samples:
            for window in args.sample_windows:
                add_point(results, "samples", window, steps, seed, args.problems)
    columns = (*shared.tasks.TASKS, "kl", "compression", "refused")
    shared.print_table(results.data["rows"], "part", "window", "steps", "seed", *columns)


if __name__ == "__main__":
    main()
