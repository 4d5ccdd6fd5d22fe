"""
The toy world: three tasks in short English, each with a checker of free-running answers.

needles      facts hidden in filler sentences, several of them asked for at the end
variables    chains of assignments among filler and other chains, one value asked for
arithmetic   a program of one-digit statements (modulo 10), worked out line by line, a chain of
             thought

Most of each text is filler that can be forgotten at once; what is needed sits on few tokens, far
back.

`level` is one of
  "easy"   the standard evaluation problem, 400 to 480 tokens with the chat template and the answer
  "hard"   the same length and more to do: more facts and questions, longer chains, mostly sums of
           three operands
  an int   a training problem of about that many tokens (at least 96), its other numbers at random

    python toy/tasks.py arithmetic 100 > prompts.jsonl    # test problems for generate.py --requests

Train and test problems are disjoint by construction: a checksum of the statements and the question,
without the filler, decides which of the two a problem belongs to.
"""

import json
import random
import re
import sys
import zlib
from dataclasses import dataclass

TASKS = ("needles", "variables", "arithmetic")

NAMES = """ann bob carl dora emma finn gina hugo iris jack kate liam mona nora oscar paul quinn rosa
    sam tom ursula vera will xena yara zoe adam beth cora dean elsa fred greta hank ivan jane karl
    lena max nina""".split()
LETTERS = "bcdefghjklmnopqrstuvwxyz"
ADJECTIVES = """old small green quiet slow bright cold warm heavy gentle narrow dusty clever happy
    lonely pale round silver wooden young""".split()
NOUNS = """boat river garden bird stone window cloud teacher market horse road lamp forest bridge
    farmer cat village train child mountain dog kitchen sailor harbor field""".split()
VERBS = "follows watches passes likes finds leaves sees crosses reaches forgets".split()
TIMES = "today again slowly often tonight early later together".split()

TEMPLATE_TOKENS = 10  # what the chat template adds around a prompt and an answer


@dataclass(frozen=True)
class Problem:
    task: str
    prompt: str  # the user's message
    answer: str  # the assistant's whole reply, without special tokens
    expected: tuple  # ((name, value), ...): what is asked for, in order


def count_tokens(text):
    """Length of `text` in tokens of the toy tokenizer: one for each word, digit and mark."""
    return len(re.findall(r"\d|[A-Za-z]+|[^\w\s]", text))


def filler(rng):
    """A sentence that says nothing any question asks for (7 or 8 tokens)."""
    subject, thing = rng.sample(NOUNS, 2)
    if rng.random() < 0.5:
        return f"The {rng.choice(ADJECTIVES)} {subject} {rng.choice(VERBS)} the {thing}."
    return f"The {subject} {rng.choice(VERBS)} the {thing} {rng.choice(TIMES)}."


# Each task gives (statements, question, answer, what is expected).


def needles(rng, level):
    numbers = {"easy": (6, 4), "hard": (12, 8)}.get(level)
    if numbers is None:
        facts = rng.randint(2, 12)
        numbers = facts, rng.randint((facts + 1) // 2, min(facts, 8))
    facts, asked = numbers
    codes = {name: f"{rng.randrange(100):02d}" for name in rng.sample(NAMES, facts)}
    statements = [f"The code of {name} is {code}." for name, code in codes.items()]
    names = rng.sample(list(codes), asked)
    question = f"Give the codes of {', '.join(names)}."
    answer = ", ".join(f"{name} is {codes[name]}" for name in names) + "."
    return statements, question, answer, tuple((name, codes[name]) for name in names)


def variables(rng, level):
    depths = {"easy": [3, 3, 3], "hard": [6, 6, 6]}.get(level)
    asked = 1
    if depths is None:
        depths = [rng.randint(1, rng.randint(1, 6)) for _ in range(rng.randint(1, 5))]
        asked = rng.randint((len(depths) + 1) // 2, len(depths))
    letters = rng.sample(LETTERS, len(LETTERS))
    while sum(depths) > 20:
        depths[depths.index(max(depths))] -= 1
    chains = []  # each [(variable, its value or the next variable), ...]
    for depth in depths:
        links = [letters.pop() for _ in range(depth)]
        chains.append(list(zip(links, [str(rng.randrange(10)), *links])))
    turns = [i for i, depth in enumerate(depths) for _ in range(depth)]
    rng.shuffle(turns)  # the chains are interleaved, each in its own order
    rest = [iter(chain) for chain in chains]
    statements = ["{} is {}.".format(*next(rest[i])) for i in turns]
    chosen = rng.sample(chains, asked)
    question = f"Trace {', '.join(chain[-1][0] for chain in chosen)}."
    traces = [[f"{name} is {value}" for name, value in reversed(chain)] for chain in chosen]
    answer = " ".join(", ".join(trace) + "." for trace in traces)
    return statements, question, answer, tuple((chain[-1][0], chain[0][1]) for chain in chosen)


def arithmetic(rng, level):
    numbers = {"easy": (3, 7, 0.0), "hard": (3, 6, 0.75)}.get(level)
    if numbers is None:
        numbers = rng.randint(1, 4), rng.randint(1, 8), rng.choice((0.0, 0.0, 0.0, 0.5, 0.5))
    constants, lines, hard = numbers
    names = rng.sample(LETTERS, constants + lines)
    values = {name: rng.randrange(10) for name in names[:constants]}
    statements = [f"{name} is {value}." for name, value in values.items()]
    steps = []
    last = names[constants - 1]  # every line needs the one before it, so any slip shows
    for name in names[constants:]:
        others = [v for v in values if v != last]
        rng.shuffle(others)
        free = [others.pop() if others and rng.random() < 0.6 else str(rng.randrange(10))
                for _ in range(2)]
        if rng.random() < hard:
            expression = f"{last} {rng.choice('+-')} {free[0]} * {free[1]}"
        else:
            pair = [last, free[0]]
            rng.shuffle(pair)
            expression = f"{pair[0]} {rng.choice('++--*')} {pair[1]}"
        looked_up = "".join(f", {v} is {values[v]}" for v in re.findall("[a-z]", expression))
        digits = re.sub("[a-z]", lambda m: str(values[m.group()]), expression)
        value = values[name] = evaluate(digits)
        statements.append(f"{name} = {expression}.")
        steps.append(f"{name} = {expression}{looked_up}, {digits} is {value}, {name} is {value}.")
        last = name
    question = f"Work out {', '.join(names[constants:])} modulo ten."
    answer = " ".join(steps) + f" The answer is {values[last]}."
    return statements, question, answer, ((last, str(values[last])),)


def evaluate(expression):
    """Value modulo 10 of "3 + 4" or "3 - 4 * 5"; `*` binds tighter than + and -."""
    total = 0
    for sign, product in re.findall(r"(^|[+-]) ?(\d(?: \* \d)*)", expression):
        value = 1
        for factor in product.split(" * "):
            value *= int(factor)
        total += -value if sign == "-" else value
    return total % 10


BUILDERS = {"needles": needles, "variables": variables, "arithmetic": arithmetic}


def make_problem(task, rng, split="train", level="easy"):
    """A problem of `task` by `rng`, a random.Random; the module's head says what `level` is."""
    length = level if isinstance(level, int) else rng.randint(430, 480)
    room = -1
    in_test = None
    while room < 0 or in_test != (split == "test"):
        statements, question, answer, expected = BUILDERS[task](rng, level)
        core = " ".join([*statements, question])
        in_test = zlib.crc32(core.encode()) % 8 == 0
        room = length - count_tokens(core + answer) - TEMPLATE_TOKENS
    sentences = []
    while room >= 8:
        sentences.append(filler(rng))
        room -= count_tokens(sentences[-1])
    # the last part of the filler comes after all statements, so that what is needed lies far back
    tail = int(len(sentences) * (rng.uniform(0.0, 0.6) if isinstance(level, int) else 0.3))
    before = len(sentences) - tail
    places = sorted(rng.randint(0, before) for _ in statements)
    for i, (place, statement) in enumerate(zip(places, statements)):
        sentences.insert(place + i, statement)
    return Problem(task, " ".join([*sentences, question]), answer, expected)


def final_answer(problem, text):
    """The values `text` ends with as one string (so that several chains can vote), or None if there
    are none."""
    text = text.split("<|im_end|>")[0]
    if problem.task == "needles":
        said = dict(re.findall(r"\b([a-z]+) is (\d\d)(?!\d)", text))
        values = [said.get(name) for name, _ in problem.expected]
    elif problem.task == "variables":
        traces = [re.findall(r"\bis (\d)(?!\d)", sentence) for sentence in text.split(".")]
        values = [found[-1] for found in traces if found][-len(problem.expected) :]
    else:
        values = re.findall(r"\banswer is (\d)(?!\d)", text)[-1:]
    if len(values) < len(problem.expected) or None in values:
        return None
    return " ".join(values)


def is_correct(problem, text):
    """Does `text`, an assistant's reply, end with the expected value(s)?"""
    return final_answer(problem, text) == " ".join(value for _, value in problem.expected)


def question(seed):
    """The text of a test problem, of another task for each seed, and the answer that is expected."""
    task = TASKS[seed % len(TASKS)]
    problem = make_problem(task, random.Random(f"generate {seed}"), "test")
    return problem.prompt, final_answer(problem, problem.answer)


def messages(problem, with_answer=True):
    """The problem as a chat."""
    chat = [{"role": "user", "content": problem.prompt}]
    if with_answer:
        chat.append({"role": "assistant", "content": problem.answer})
    return chat


if __name__ == "__main__":
    rng = random.Random(7)
    for _ in range(int(sys.argv[2])):
        problem = make_problem(sys.argv[1], rng, "test")
        expected = [value for _, value in problem.expected]
        print(json.dumps({"prompt": problem.prompt, "expected": expected}))
