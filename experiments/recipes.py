"""
Recipes: what a retrofit is made of, one thing changed at a time, all to 8x on the toy world.

    python experiments/recipes.py                                     # 40 minutes on two cores
    python experiments/recipes.py --steps 10 --problems 2             # a trial

The usual recipe is retrofit.py's for the toy: decisions from adapters, all weights trained, forward
KL, a shift of one, decisions per head, a window of 16. Two recipes differ in more than one thing:
the paper's, a borrowed neuron that decides about its own token, and NVIDIA's later one, adapters on
a frozen base with reverse KL; both at the toy's learning rate and length. A borrowed neuron is
taken out of the model at once, where the paper fades it out over 2,000 steps (section 3.2).

A row has the accuracy on each task (of 200 problems: a share of 95% has a standard error of 1.5
points), the KL to the teacher in nats, always forward and on the same text, and the compression
that the cache counted while answering.
"""

import shared

RATIO = 8
NEURON = ["--decision", "neuron", "--train", "all"]
RECIPES = {  # what retrofit.py is told besides ratio, steps and seed
    "usual": [],
    "frozen": ["--train", "adapters"],
    "neuron": NEURON,
    "reverse-kl": ["--reverse-kl"],
    "shift-0": ["--shift", "0"],
    "per-layer": ["--per", "layer"],
    "paper": [*NEURON, "--shift", "0"],
    "nvidia": ["--train", "adapters", "--reverse-kl"],
}


def retrofit_of(recipe, steps, seed):
    """The folder of a retrofit by a recipe."""
    if recipe == "usual":
        return shared.standard(RATIO, seed, steps)
    flags = ["--target-cr", RATIO, "--seed", seed, "--steps", steps, *RECIPES[recipe]]
    return shared.retrofitted(f"dms-{RATIO}x-{recipe}-seed{seed}-{steps}steps", *flags)


def main():
    p = shared.toy_arguments(__doc__, "recipes.json", problems=200, seeds=1)
    p.add_argument("--recipes", nargs="*", choices=RECIPES, default=list(RECIPES))
    args = p.parse_args()
    results = shared.Results(args)
    for seed in range(args.seeds):
        for recipe in args.recipes:
            if results.has(recipe=recipe, seed=seed):
                continue
            model, tokenizer = shared.load(retrofit_of(recipe, args.steps, seed))
            measured = shared.measure(model, tokenizer, args.problems, seed)
            results.add(recipe=recipe, seed=seed, flags=" ".join(RECIPES[recipe]), **measured)
    columns = ("recipe", "seed", *shared.tasks.TASKS, "kl", "compression")
    shared.print_table(results.data["rows"], *columns)


if __name__ == "__main__":
    main()
