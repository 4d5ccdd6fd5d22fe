"""
A soak: random lives of a small cache, in which everything happens that may happen to one, and every
logit and text is compared with the dense masked model's for that history alone.

    python tests/soak.py --seconds 600 --processes 2

Inputs of any length to one sequence or all, forks, releases, pools that are too small; several
conversations of several turns over one cache by generate(release=False), put back in any turn;
runs that are left early, by an exception in the middle of a step, too; and misuse in between, which
must change nothing. A failure names its seed: `--first SEED --lives 1` repeats it.
"""
import argparse
import multiprocessing
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from conftest import check_pages, random_dms, small_model
from test_kv_cache import check_held, oracle

from checkpoint import InputError
from generate import Sequence, generate
from kernels.decode_step import sample
from kv_cache import CacheFull, KVCache

LONGEST = 90  # tokens of a history, beyond which it ends


class Accident(Exception):
    """Raised in the middle of a step."""


class Soak:
    """One cache and what it must hold: `held`, {row: token ids}, and the conversations in it."""

    def __init__(self, seed):
        rng = self.rng = random.Random(seed)
        dms = random_dms(rng) if rng.random() < 0.85 else None
        self.model = small_model(seed, dms, rng.choice([0.1, 0.5, 0.9]))
        page_size = rng.choice([1, 2, 4, 8])
        one = KVCache(self.model.config, 1, page_size=page_size)
        pages = rng.choice([one.layers * one.kv_heads * n // page_size for n in (60, 130, 400)])
        self.cache = KVCache(
            self.model.config,
            rng.randint(1, 6),
            page_size=page_size,
            chunk=rng.choice([3, 8, 512]),
            memory=pages * one.page_bytes,
        )
        self.held = {}
        self.talks = []  # Sequences, of which some have a row
        self.made = 0
        self.counts = Counter()

    def ids(self, most):
        return [self.rng.randrange(67) for _ in range(self.rng.randint(1, most))]

    def act(self):
        deeds = [self.talk, self.talk, self.talk, self.feed, self.feed, self.fork, self.end, self.misuse]
        deed = self.rng.choice(deeds)
        deed()
        self.counts[deed.__name__] += 1
        self.check()

    def check(self):
        """Pages, lengths, and what one row holds."""
        cache = self.cache
        check_pages(cache)
        assert cache.seen.tolist() == [len(self.held.get(row, ())) for row in range(cache.batch_size)]
        if self.held:
            row = self.rng.choice(list(self.held))
            check_held(cache, row, oracle(self.model, torch.tensor(self.held[row]))[1])
            self.counts["rows compared"] += 1

    def drop(self, rows):
        """These rows are empty now."""
        for row in rows:
            self.held.pop(row, None)
        for talk in self.talks:
            if talk.row in rows:
                talk.row = None
                talk.fed = 0

    # ------------------------------------------------------------------------------- Conversations

    def talk(self):
        """A turn of some conversations, old and new."""
        rng = self.rng
        old = [talk for talk in self.talks if rng.random() < 0.7]
        for talk in old:
            talk.ids += self.ids(12)
            talk.new = []
            talk.over = False
            talk.error = None
            talk.max_new_tokens = rng.randint(1, 14)
        words = self.ids(20)
        new = []
        for _ in range(rng.randint(0, 5)):
            beginning = words if rng.random() < 0.5 else self.ids(25)
            new.append(Sequence(beginning, rng.randint(1, 14), self.made))
            self.made += 1
        some = old + new
        rng.shuffle(some)
        sampling = rng.choice([{}, dict(temperature=1.3), dict(temperature=0.8, top_k=9, top_p=0.9)])
        ends = rng.choice([(), (3, 5, 8, 13)])
        histories = [list(talk.ids) for talk in some]
        release = rng.random() < 0.4
        try:
            whole = self.run(some, ends, sampling, release)
        except InputError as e:  # there are fewer rows than must stay, or none
            assert "release them" in str(e)
            for talk, history in zip(some, histories):
                assert talk.ids == history
            return
        for talk, history in zip(some, histories):
            assert talk.ids == history + talk.new
            self.check_text(talk, history, sampling)
            has_ended = talk.new and talk.new[-1] in ends or len(talk.new) == talk.max_new_tokens
            assert talk.over == bool(has_ended or talk.error)
            assert talk.over or not whole
            assert not set(talk.new[:-1]) & set(ends)
            assert talk.error is None or "cache is full" in talk.error
            self.counts["texts compared"] += 1
            self.counts["texts that did not fit"] += talk.error is not None
        self.talks = [t for t in {*self.talks, *some} if t.row is not None or rng.random() < 0.3]
        self.talks.sort(key=lambda talk: talk.seed)
        self.end_long_ones()

    def check_text(self, talk, history, sampling):
        """Each of its tokens is what the dense masked model draws after those before it, or, where
        the draw hangs by a hair, what it draws from logits that differ in their last bits."""
        for place, token in enumerate(talk.new):
            ids = history + talk.new[:place]
            uniform = torch.tensor([Sequence([], 1, talk.seed, new=talk.new[:place]).uniform()])
            logits = self.model(torch.tensor([ids]), last_only=True)[:, -1]
            if int(sample(logits, uniform, **sampling)) != token:
                near = logits + 1e-4 * torch.randn(50, logits.shape[1])
                assert token in sample(near, uniform.expand(50), **sampling).tolist()
                self.counts["tokens drawn by a hair"] += 1

    def run(self, some, ends, sampling, release):
        """generate(), perhaps not to its end. Keeps `held` up to date; returns whether it ended."""
        rng = self.rng
        leave_after = rng.randint(0, 25) if rng.random() < 0.3 else 1000
        accident_after = rng.randint(1, 60) if rng.random() < 0.2 else None
        mlp = self.model.model.layers[-1].mlp
        forward = mlp.forward
        calls = 0

        def counting(x):
            nonlocal calls
            calls += 1
            if calls == accident_after:
                raise Accident
            return forward(x)

        mlp.forward = counting
        before = {talk: talk.row for talk in some}
        whole = True
        steps = generate(self.model, self.cache, some, ends, sampling, release)
        try:
            for number, _ in enumerate(steps):
                assert number < 3000, "it does not end"
                if number == leave_after:
                    whole = False
                    self.counts["runs left early"] += 1
                    break
                put_back = [t for t in some if before[t] is not None and t.row is None and not t.over]
                self.counts["steps with a turn put back"] += bool(put_back)
        except Accident:
            whole = False
            self.counts["accidents"] += 1
        finally:
            mlp.forward = forward
            steps.close()
        seen = self.cache.seen.tolist()
        for talk in some:
            if before[talk] is not None:
                self.held.pop(before[talk], None)
        for talk in some:
            if talk.row is not None and seen[talk.row] == 0:  # the accident took it
                assert not whole
                talk.row = None
                talk.fed = 0
            if talk.row is not None:
                self.held[talk.row] = talk.ids[: talk.fed]
        return whole

    def end_long_ones(self):
        rows = [row for row, ids in self.held.items() if len(ids) > LONGEST]
        if rows:
            self.cache.release(rows)
            self.drop(rows)
        self.talks = [talk for talk in self.talks if len(talk.ids) <= LONGEST]

    # ---------------------------------------------------------------------------------- The cache

    def feed(self):
        """Tokens to one sequence, or ragged ones to all."""
        rng = self.rng
        cache = self.cache
        rows = range(cache.batch_size)
        sequence = None
        if rng.random() < 0.5:
            sequence = rng.randrange(cache.batch_size)
            rows = [sequence]
        T = rng.choice([1, 1, 2, 7, 20])
        lengths = [rng.randint(0, T) if rng.random() < 0.3 else T for _ in rows]
        ids = torch.tensor([[rng.randrange(67) for _ in range(T)] for _ in rows])
        fed = [row for row, n in zip(rows, lengths) if n > 0]
        before = cache.seen.tolist()
        try:
            logits = self.model(ids, cache=cache, lengths=lengths, sequence=sequence)
        except CacheFull:
            self.counts["inputs that did not fit"] += 1
            if cache.seen.tolist() != before:  # found after the first piece: they are released
                self.drop(fed)
            return
        for index, (row, n) in enumerate(zip(rows, lengths)):
            if n == 0:
                continue
            history = self.held.get(row, []) + ids[index, :n].tolist()
            expected = self.model(torch.tensor([history]))[0, -n:]
            torch.testing.assert_close(logits[index, :n], expected, atol=2e-4, rtol=1e-3)
            self.counts["inputs compared"] += 1
            self.held[row] = history
            for talk in self.talks:
                if talk.row == row:  # whose last token was drawn, but not fed
                    talk.ids = list(history)
                    talk.fed = len(history)
        self.end_long_ones()

    def fork(self):
        cache = self.cache
        B = cache.batch_size
        sources = [self.rng.randrange(B) for _ in range(self.rng.choice([B, B, self.rng.randint(1, 6)]))]
        try:
            cache.select(sources)
        except CacheFull:
            self.counts["forks that did not fit"] += 1
            return
        held = {row: self.held[source] for row, source in enumerate(sources) if source in self.held}
        for talk in self.talks:
            if talk.row is not None:
                talk.row = sources.index(talk.row) if talk.row in sources else None
                talk.fed = talk.fed if talk.row is not None else 0
        self.held = held

    def end(self):
        rows = [row for row in range(self.cache.batch_size) if self.rng.random() < 0.4]
        self.cache.release(rows)
        self.drop(rows)

    def misuse(self):
        cache = self.cache
        model = self.model
        one = torch.tensor([[1]])
        wrong = self.rng.choice([
            lambda: cache.release([-1]),
            lambda: cache.release([0.5]),
            lambda: cache.select([cache.batch_size]),
            lambda: model(one, cache=cache, sequence=cache.batch_size),
            lambda: model(torch.tensor([[67]]), cache=cache, sequence=0),
            lambda: model(one[:, :0], cache=cache, sequence=0),
            lambda: next(generate(model, cache, [Sequence([], 1)])),
            lambda: next(generate(model, cache, [Sequence([1], 0)])),
        ])
        try:
            wrong()
        except ValueError:
            return
        raise AssertionError("misuse passed")


def live(seed, acts=40):
    """One life; the counts of what happened in it."""
    soak = Soak(seed)
    try:
        for _ in range(acts):
            soak.act()
    except Exception as e:
        raise AssertionError(f"seed {seed}, after {dict(soak.counts)}: {type(e).__name__}: {e}") from e
    return soak.counts


def run_lives(seeds, until):
    torch.set_num_threads(1)
    counts = Counter()
    for seed in seeds:
        if time.time() > until:
            break
        counts += live(seed)
        counts["lives"] += 1
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--lives", type=int, default=10**6)
    options = parser.parse_args()
    until = time.time() + options.seconds
    seeds = range(options.first, options.first + options.lives)
    shares = [(seeds[i :: options.processes], until) for i in range(options.processes)]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for name, count in sorted(sum(pool.starmap(run_lives, shares), Counter()).items()):
            print(f"{name:28}{count:12,}")
