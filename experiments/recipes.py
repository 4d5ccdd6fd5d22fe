"""
Recipes: what a retrofit is made of, one thing changed at a time, all to 8x on the toy world.

    python experiments/recipes.py                                     # 40 minutes on two cores
    python experiments/recipes.py --steps 10 --problems 2             # a trial

The usual recipe begins cold: decisions from adapters, all weights trained, forward KL, a shift of
one, decisions per head, a window of 16. "warm" is retrofit.py's own for the toy, which begins with
a regression and has no shift; half the steps are enough for it. Two differ in more than one thing:
the paper's, a borrowed neuron that decides about its own token, and NVIDIA's later one, adapters on
a frozen base with reverse KL; both at the toy's learning rate and length. A borrowed neuron is
taken out of the model at once, where the paper fades it out over 2,000 steps (section 3.2).

A row has the accuracy on each task (of 200 problems: a share of 95% has a standard error of 1.5
points), the KL to the teacher in nats, always forward and on the same text, and the compression
that the cache counted while answering.
"""

import shared

RATIO = 8
COLD = ["--warm-start", "0"]
USUAL = [*COLD, "--shift", "1"]
NEURON = ["--decision", "neuron", "--train", "all"]
RECIPES = {  # what retrofit.py is told besides ratio, steps and seed
    "usual": USUAL,
    "frozen": [*USUAL, "--train", "adapters"],
    "neuron": [*USUAL, *NEURON],
    "reverse-kl": [*USUAL, "--reverse-kl"],
    "shift-0": COLD,
    "per-layer": [*USUAL, "--per", "layer"],
    "paper": [*COLD, *NEURON],
    "nvidia": [*USUAL, "--train", "adapters", "--reverse-kl"],
    "warm": [],
    "warm-frozen": ["--train", "adapters", "--lr", "3e-4", "--compression-weight", "4"],
}


def retrofit_of(recipe, steps, seed):
    """The folder of a retrofit by a recipe."""
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
