"""A soak, python tests/soak.py MINUTES [FIRST_SEED]: random lives of small caches, and random
continuous batching, in which every text is what the dense masked model says to that history alone.
"""
import random
import sys
import time
from collections import Counter
from contextlib import closing

import torch
from conftest import SLOT, check_pages, random_dms, small_model
from test_kv_cache import check_held, oracle, test_a_random_life_of_a_batch

from common import InputError
from generate import Sampling, Sequence, generate, penalized, sample
from kv_cache import PLAIN, KVCache

LONGEST = 90  # tokens of a conversation, beyond which it ends
SAMPLINGS = [Sampling(), Sampling(1.3), Sampling(0.8, top_k=9, top_p=0.9), Sampling(1.0, min_p=0.1),
             Sampling(repetition_penalty=1.5)]


class Talks:
    """Conversations of several turns over one cache, which may be too small, each with its own
    sampling: put back, left early, by accidents too, gone on with, begun where another stands."""

    def __init__(self, seed):
        rng = self.rng = random.Random(seed)
        dms = random_dms(rng) if rng.random() < 0.85 else None
        self.model = small_model(seed, dms, rng.choice([0.1, 0.5, 0.9]))
        self.cache = KVCache(
            self.model.config, rng.randint(1, 6), page_size=rng.choice([1, 2, 4, 8]),
            chunk=rng.choice([3, 8, 512]), memory=4 * rng.choice([60, 130, 400]) * SLOT)
        self.cache.kernels = rng.choice([PLAIN, self.cache.kernels])
        self.ends = rng.choice([(), (3, 5, 8, 13)])
        self.talks, self.made, self.counts = [], 0, Counter()

    def ids(self, most):
        return [self.rng.randrange(67) for _ in range(self.rng.randint(1, most))]

    def turn(self):
        rng = self.rng
        talks = [talk for talk in self.talks if rng.random() < 0.7]
        for talk in talks:
            if talk.over or rng.random() < 0.5:
                talk.ids += self.ids(12)
                talk.new, talk.finish_reason, talk.error = [], None, None
        beginning = self.ids(20)
        for _ in range(rng.randint(0, 5)):
            self.made += 1
            ids = rng.choice([beginning, self.ids(25), *[talk.ids for talk in talks]])
            talks.append(Sequence(ids, 1, self.made, sampling=rng.choice(SAMPLINGS)))
        rng.shuffle(talks)
        for talk in talks:
            talk.max_new_tokens = len(talk.new) + rng.randint(1, 14)
        histories = [talk.ids[: len(talk.ids) - len(talk.new)] for talk in talks]
        try:
            is_whole = self.run(talks)
        except InputError as e:  # fewer places than must stay
            assert "no place is free" in str(e)
            is_whole = False
        for talk, history in zip(talks, histories):
            self.check_text(talk, history)
            said_end = talk.new and talk.new[-1] in self.ends
            has_ended = said_end or len(talk.new) == talk.max_new_tokens
            assert talk.over == bool(has_ended or talk.error) and (talk.over or not is_whole)
            assert not set(talk.new[:-1]) & set(self.ends)
            self.counts["texts that did not fit"] += "cache is full" in (talk.error or "")
        every = sorted({*self.talks, *talks}, key=lambda talk: talk.seed)
        self.talks = [talk for talk in every if talk.index is not None or rng.random() < 0.3]
        self.end()

    def check_text(self, talk, history):
        """Each token is what the dense masked model samples after those before it, from logits that
        may differ in their last bits."""
        for place, token in enumerate(talk.new):
            ids = history + talk.new[:place]
            before = Sequence(ids, 1, talk.seed, sampling=talk.sampling, new=talk.new[:place])
            logits = self.model(torch.tensor([ids]), last_only=True)[:, -1]
            near = torch.cat((logits, logits + 1e-4 * torch.randn(30, 67)))
            near = torch.stack([penalized(row, before) for row in near])
            uniform = torch.full((31,), before.uniform())
            assert token in sample(near, uniform, talk.sampling)
        assert talk.ids == history + talk.new
        self.counts["texts compared"] += 1

    def run(self, talks):
        """generate(), perhaps not to its end; returns whether it ended."""
        rng = self.rng
        steps_left = rng.randint(0, 25) if rng.random() < 0.3 else 3000
        accident_after = rng.randint(1, 60) if rng.random() < 0.2 else 10**6
        mlp = self.model.model.layers[-1].mlp
        calls = []
        kept = [(talk, len(talk.new)) for talk in talks if talk.index is not None]

        def count(*given):
            calls.append(given)
            if len(calls) == accident_after:
                raise EOFError

        steps = generate(self.model, self.cache, talks, self.ends, rng.random() < 0.4)
        try:
            with mlp.register_forward_pre_hook(count), closing(steps):
                for number, _ in enumerate(steps):
                    if number == 0 and all(talk.index is not None for talk, _ in kept):
                        assert all(len(talk.new) > said for talk, said in kept)  # none has to wait
                    if number == steps_left:
                        assert number < 3000, "it does not end"
                        return False
        except EOFError:
            self.counts["accidents"] += 1
            return False
        return True

    def end(self):
        for talk in self.talks:
            if talk.index is not None and (len(talk.ids) > LONGEST or self.rng.random() < 0.1):
                self.cache.release([talk.index])
                talk.index, talk.fed = None, 0
        self.talks = [talk for talk in self.talks if len(talk.ids) <= LONGEST]
        check_pages(self.cache)
        held = {talk.index: talk.ids[: talk.fed] for talk in self.talks if talk.index is not None}
        assert int(self.cache.seen.sum()) == sum(map(len, held.values()))
        for i, ids in held.items():
            check_held(self.cache, i, oracle(self.model, torch.tensor(ids))[1])
            self.counts["conversations held"] += 1

    def live(self):
        for _ in range(20):
            self.turn()
        return self.counts


if __name__ == "__main__":
    until = time.time() + 60 * float(sys.argv[1])
    seed = int((sys.argv + ["0"])[2])
    counts = Counter()
    while time.time() < until:
        print(f"\rseed {seed}", end="", flush=True)  # which repeats a failure
        test_a_random_life_of_a_batch(seed)
        counts += Talks(seed).live()
        seed += 1
    print(*(f"\n{count:12,} {name}" for name, count in sorted(counts.items())))
