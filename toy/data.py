"""The toy world as a data source of retrofit.py: batches(step), held_out(rows), and tasks to be answered."""
import itertools
import random

import torch
from tqdm import tqdm

from generate import Sequence, generate
from toy import tasks


class ToyData:
    """The toy world: chat-formatted problems, one to a row, padded; test problems and a checker for each task."""

    def __init__(self, tokenizer, seq_len, batch_size, seed):
        self.tokenizer = tokenizer
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed

    def encode(self, problem, with_answer):
        return self.tokenizer.encode(tasks.messages(problem, with_answer), add_generation_prompt=not with_answer)

    def rows(self, rng, split, rows):
        ids, lengths = torch.zeros(rows, self.seq_len, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
        for row in range(rows):
            task, level = tasks.TASKS[row % len(tasks.TASKS)], "easy"
            if split == "train":
                task = rng.choice((*tasks.TASKS, "arithmetic"))  # a chain of thought is the hardest to compress
                level = rng.choice(("easy", "hard"))  # trained on one alone, a model forgets the other
            problem = tasks.make_problem(task, rng, split, level)
            text = self.encode(problem, True)[:self.seq_len]
            ids[row, :len(text)], lengths[row] = torch.tensor(text), len(text)
        longest = -(-int(lengths.max()) // 64) * 64  # of few lengths, so that few shapes occur
        return ids[:, :longest], [[n] for n in lengths.tolist()]

    def batches(self, step, place=None):
        """From a step on: (token ids (B, T), of each row the lengths of its documents, None)."""
        for number in itertools.count(step):
            yield *self.rows(random.Random(f"{self.seed} {number}"), "train", self.batch_size), None

    def held_out(self, rows):
        return self.rows(random.Random("held out"), "test", rows)

    def answer_tasks(self, model, cache, options, desc):
        """Free-running greedy answers to options.eval_problems test problems of each task, side by
        side in the cache: {task: share that is correct}."""
        accuracy = {}
        for task in tasks.TASKS:
            rng = random.Random(f"evaluate {task}")
            problems = [tasks.make_problem(task, rng, "test") for _ in range(options.eval_problems)]
            sequences = [Sequence(self.encode(p, False), options.eval_tokens) for p in problems]
            with tqdm(total=len(problems), desc=f"{desc}: {task}", leave=False) as bar:
                for drawn in generate(model, cache, sequences, {self.tokenizer.end_id}):
                    bar.update(sum(sequence.over for sequence, _ in drawn))
            texts = [self.tokenizer.decode(s.new, skip_special_tokens=True) for s in sequences]
            accuracy[task] = sum(map(tasks.is_correct, problems, texts)) / len(problems)
        return accuracy
