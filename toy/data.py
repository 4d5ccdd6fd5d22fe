"""The toy world as a data source of retrofit.py: sequences to train on or held out, and tasks."""

import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

from generate import Sequence, generate
from kv_cache import KVCache
from toy import tasks

ANSWER_TOKENS = 256  # the most new tokens of an answer
SIDE_BY_SIDE = 100  # problems that are answered at a time


class ToyData:
    """The toy world: chat-formatted problems, one to a sequence, padded; test problems and a
    checker for each task."""

    revision = None  # it is made here, not fetched

    def __init__(self, tokenizer, seq_len, batch_size, seed):
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed

    def encode(self, problem, with_answer):
        messages = tasks.messages(problem, with_answer)
        return self.tokenizer.encode(messages, add_generation_prompt=not with_answer)

    def sequences(self, rng, split, count):
        """(ids (count, T), the length of each sequence's one document)."""
        ids = torch.zeros(count, self.seq_len, dtype=torch.int64)
        lengths = []
        for number, sequence in enumerate(ids):
            task = tasks.TASKS[number % len(tasks.TASKS)]
            level = "easy"
            if split == "train":
                # a chain of thought is the hardest to compress
                task = rng.choice((*tasks.TASKS, "arithmetic"))
                # trained on one alone, a model forgets the other
                level = rng.choice(("easy", "hard"))
            problem = tasks.make_problem(task, rng, split, level)
            text = self.encode(problem, True)[: self.seq_len]
            sequence[: len(text)] = torch.tensor(text)
            lengths.append([len(text)])
        longest = -(-max(lengths)[0] // 64) * 64  # of few lengths, so that few shapes occur
        return ids[:, :longest], lengths

    def batches(self, step):
        """Endless: (ids (B, T), the lengths of each sequence's documents) from a step on. While one
        batch is trained on, a thread makes the next."""

        def make(number):
            rng = random.Random(f"{self.seed} {number}")
            return self.sequences(rng, "train", self.batch_size)

        with ThreadPoolExecutor(1) as thread:
            upcoming = thread.submit(make, step)
            for number in itertools.count(step + 1):
                batch = upcoming.result()
                upcoming = thread.submit(make, number)
                yield batch

    def held_out(self, count):
        return self.sequences(random.Random("held out"), "test", count)

    def answer_tasks(self, model, count):
        """Free-running greedy answers to `count` test problems of each task, side by side in a
        cache: ({task: share that is correct}, the cache)."""
        cache = KVCache(model.config, min(SIDE_BY_SIDE, count), model.device, model.dtype)
        accuracy = {}
        for task in tasks.TASKS:
            rng = random.Random(f"evaluate {task}")
            problems = [tasks.make_problem(task, rng, "test") for _ in range(count)]
            sequences = [Sequence(self.encode(p, False), ANSWER_TOKENS) for p in problems]
            with tqdm(total=count, desc=task, leave=False) as bar:
                for generated in generate(model, cache, sequences, {self.tokenizer.end_id}):
                    bar.update(sum(sequence.over for sequence, _ in generated))
            texts = [self.tokenizer.decode(s.new, skip_special_tokens=True) for s in sequences]
            accuracy[task] = sum(map(tasks.is_correct, problems, texts)) / count
        return accuracy, cache
