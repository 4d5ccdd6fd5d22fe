"""
Quest (Tang et al., arXiv 2406.10774): keep all pairs, attend to the pages that matter.

For every page of a head's keys it keeps the least and the greatest value of each channel. These
bound what a query q can score in the page:

    bound(page) = sum over channels c of max(q[c] least[page, c], q[c] greatest[page, c])

and a decode step attends only to the pages of the highest bounds. paging.py says what differs from
the paper.
"""

import math

import torch

from dms import attention


def bounds(q, least, greatest):
    """q: (..., G, D); least, greatest: (..., P, D). Returns (..., P), the highest of G heads."""
    high = q.clamp(min=0) @ greatest.transpose(-1, -2)
    low = q.clamp(max=0) @ least.transpose(-1, -2)
    return (high + low).amax(-2)


def choose(bound, pages):
    """The numbers of the pages to attend to, (..., pages): the newest, and those of the highest
    bounds (..., P)."""
    bound = bound.clone()
    bound[..., -1] = math.inf
    pages = min(pages, bound.shape[-1])
    return bound.topk(pages, dim=-1).indices


class QuestCache:
    """All pairs of B sequences, and the `attend` to the chosen pages of them (stepwise.py).

    budget: pairs that a head may read a step. count_bounds: these are among them.
    """

    def __init__(self, config, B, page_size, budget, count_bounds=False):
        self.page_size = page_size
        self.budget = budget
        self.count_bounds = count_bounds
        self.layers = config.num_hidden_layers
        heads = (self.layers, B, config.num_key_value_heads)
        pages = -(-config.max_position_embeddings // page_size)
        self.keys = torch.zeros(*heads, pages * page_size, config.head_dim)
        self.values = torch.zeros_like(self.keys)
        self.least = torch.full((*heads, pages, config.head_dim), math.inf)
        self.greatest = torch.full_like(self.least, -math.inf)
        # of each head the pages that it chose a step before
        self.before = torch.zeros(*heads, pages, dtype=torch.bool)
        self.seen = [0] * self.layers
        # sums over the steps of sequences that are answering, and over heads
        self.steps = 0
        self.pairs = 0
        self.bounds = 0
        self.fetched = 0

    def __call__(self, layer, q, k, v, logits):
        """q (B, Hq, T, D); k, v (B, Hkv, T, D) -> (B, Hq, T, D)."""
        begin = self.seen[layer]
        end = begin + k.shape[2]
        self.store(layer, k, v, begin, end)
        if begin == 0:  # the prompts
            mask = torch.ones(end, end, dtype=torch.bool).tril()
        else:
            pages = self.pages_for(layer, q, end)  # (B, Hkv, P)
            pairs = pages.repeat_interleave(self.page_size, dim=2)
            pairs = pairs[:, :, None, :end]  # (B, Hkv, 1, end)
            mask = pairs.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            self.count(layer, pages, pairs)
        return attention(q, self.keys[layer, :, :, :end], self.values[layer, :, :, :end], mask)

    def store(self, layer, k, v, begin, end):
        self.keys[layer, :, :, begin:end] = k
        self.values[layer, :, :, begin:end] = v
        self.seen[layer] = end
        page = torch.arange(begin, end) // self.page_size
        index = page[:, None].expand_as(k)
        self.least[layer].scatter_reduce_(2, index, k, "amin")
        self.greatest[layer].scatter_reduce_(2, index, k, "amax")

    def pages_for(self, layer, q, end):
        """Which pages each head attends to, (B, Hkv, P) bool: all, where a prompt is read."""
        P = -(-end // self.page_size)
        least = self.least[layer, :, :, :P]
        greatest = self.greatest[layer, :, :, :P]
        Hkv = least.shape[1]
        by_group = q[:, :, 0].unflatten(1, (Hkv, -1))  # (B, Hkv, G, D)
        budget = self.budget - P * self.count_bounds
        count = max(math.ceil(budget / self.page_size), 1)
        chosen = choose(bounds(by_group, least, greatest), count)
        pages = torch.zeros(least.shape[:3], dtype=torch.bool)
        pages.scatter_(2, chosen, True)
        return pages | ~self.answering[:, None, None]

    def count(self, layer, pages, pairs):
        """Note what is read. fetched: pairs of pages that were not chosen a step before."""
        before = self.before[layer, :, :, : pages.shape[2]]  # a view
        new = pages & ~before
        before.copy_(pages & self.answering[:, None, None])
        if layer == 0:
            self.steps += int(self.answering.sum())
        read = pairs[self.answering]
        fetched = new[self.answering]
        self.pairs += int(read.sum())
        self.bounds += fetched.numel()
        self.fetched += int(fetched.sum()) * self.page_size
