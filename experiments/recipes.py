"""
Recipes: what a retrofit is made of, one thing changed at a time, all to 8x on the toy world.

    python experiments/recipes.py                                     # 40 minutes on two cores
    python experiments/recipes.py --steps 10 --fade-steps 2 --problems 2    # a trial

The usual recipe is retrofit.py's for the toy: decisions from adapters, all weights trained, forward
KL, a shift of one, decisions per head, a window of 16. Two recipes differ in more than one thing:
the paper's, a borrowed neuron that decides about its own token, and NVIDIA's later one, adapters on
a frozen base with reverse KL; both at the toy's learning rate and length. A borrowed neuron is
faded out of the model first (section 3.2), in 200 steps before the others.

A row has the accuracy on each task (of 200 problems: a share of 95 % has a standard error of 1.5
points), the KL to the teacher in nats, always forward and on the same text, and the compression
that the cache counted while answering.
"""

import shared

RATIO = 8
NAMES = (
    "usual",
    "frozen",
    "neuron",
    "neuron-unfaded",
    "reverse-kl",
    "shift-0",
    "per-layer",
    "paper",
    "nvidia",
)


def flags_of(recipe, fade_steps):
    """What retrofit.py is told besides ratio, steps and seed."""
    neuron = ["--decision", "neuron", "--train", "all"]
    faded = [*neuron, "--fade-steps", str(fade_steps)]
    return {
        "usual": [],
        "frozen": ["--train", "adapters"],
        "neuron": faded,
        "neuron-unfaded": neuron,
        "reverse-kl": ["--reverse-kl"],
        "shift-0": ["--shift", "0"],
        "per-layer": ["--per", "layer"],
        "paper": [*faded, "--shift", "0"],
        "nvidia": ["--train", "adapters", "--reverse-kl"],
    }[recipe]


def retrofit_of(recipe, steps, fade_steps, seed):
    """The folder of a retrofit by a recipe."""
    if recipe == "usual":
        return shared.standard(RATIO, seed, steps)
    name = f"dms-{RATIO}x-{recipe}-seed{seed}-{steps}steps"
    if recipe in ("neuron", "paper"):
        name += f"-{fade_steps}faded"
    flags = ["--target-cr", RATIO, "--seed", seed, "--steps", steps]
    return shared.retrofitted(name, *flags, *flags_of(recipe, fade_steps))


def main():
    p = shared.toy_arguments(__doc__, "recipes.json", problems=200, seeds=1)
    p.add_argument("--recipes", nargs="*", choices=NAMES, default=NAMES)
    p.add_argument("--fade-steps", type=int, default=200, help="of a borrowed neuron")
    args = p.parse_args()
    results = shared.Results(args)
    for seed in range(args.seeds):
        for recipe in args.recipes:
            if results.has(recipe=recipe, seed=seed):
                continue
            folder = retrofit_of(recipe, args.steps, args.fade_steps, seed)
            model, tokenizer = shared.load(folder)
            measured = shared.measure(model, tokenizer, args.problems, seed)
            flags = " ".join(flags_of(recipe, args.fade_steps))
            results.add(recipe=recipe, seed=seed, flags=flags, **measured)
    columns = ("recipe", "seed", *shared.tasks.TASKS, "kl", "compression")
    shared.print_table(results.data["rows"], *columns)


if __name__ == "__main__":
    main()
