"""
Quest (Tang et al., arXiv 2406.10774): keep all pairs, attend to the pages that matter.

It keeps for every page of a head's keys the least and the greatest value of each channel. They bound
what a query q can score in the page:

    bound(page) = sum over channels c of max(q[c] least[page, c], q[c] greatest[page, c])

and a decode step attends to the pages of the highest bounds alone. What differs from the paper is
said in paging.py.
"""

import math

import torch
import torch.nn.functional as F


def bounds(q, least, greatest):
    """q: (..., G, D); least, greatest: (..., P, D). Returns (..., P), the highest of the G heads'."""
    high = q.clamp(min=0) @ greatest.transpose(-1, -2)
    low = q.clamp(max=0) @ least.transpose(-1, -2)
    return (high + low).amax(-2)


def choose(bound, pages):
    """The numbers of the pages to attend to, (..., pages): the newest, and those of the highest
    bounds (..., P)."""
    bound = bound.clone()
    bound[..., -1] = math.inf
    return bound.topk(min(pages, bound.shape[-1]), dim=-1).indices


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
        self.before = torch.zeros(
            *heads, pages, dtype=torch.bool
        )  # chosen a step before
        self.seen = [0] * self.layers
        self.counts = {
            "steps": 0,
            "pairs": 0,
            "bounds": 0,
            "fetched": 0,
        }  # sums over heads

    def __call__(self, layer, q, k, v, logits):
        """q (B, Hq, T, D); k, v (B, Hkv, T, D) -> (B, Hq, T, D)."""
        begin = self.seen[layer]
        end = begin + k.shape[2]
        self.store(layer, k, v, begin, end)
        mask = torch.ones(end - begin, end, dtype=torch.bool).tril(begin)
        if begin > 0:
            seen_pages = self.pages_for(layer, q, end)  # (B, Hkv, P)
            by_pair = seen_pages.repeat_interleave(self.page_size, dim=2)[
                :, :, None, :end
            ]
            mask = by_pair.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            self.count(layer, seen_pages, by_pair)
        held = (self.keys[layer, :, :, :end], self.values[layer, :, :, :end])
        return F.scaled_dot_product_attention(q, *held, attn_mask=mask, enable_gqa=True)

    def store(self, layer, k, v, begin, end):
        self.keys[layer, :, :, begin:end] = k
        self.values[layer, :, :, begin:end] = v
        self.seen[layer] = end
        index = (torch.arange(begin, end) // self.page_size)[:, None].expand_as(k)
        self.least[layer].scatter_reduce_(2, index, k, "amin")
        self.greatest[layer].scatter_reduce_(2, index, k, "amax")

    def pages_for(self, layer, q, end):
        """Which pages each head attends to, (B, Hkv, P) bool: all, where a prompt is read."""
        P = -(-end // self.page_size)
        of_layer = (self.least[layer, :, :, :P], self.greatest[layer, :, :, :P])
        by_group = q[:, :, 0].unflatten(1, (of_layer[0].shape[1], -1))  # (B, Hkv, G, D)
        left = self.budget - (P if self.count_bounds else 0)
        pages = max(math.ceil(left / self.page_size), 1)
        chosen = choose(bounds(by_group, *of_layer), pages)
        is_chosen = torch.zeros(*chosen.shape[:2], P, dtype=torch.bool).scatter_(
            2, chosen, True
        )
        return is_chosen | ~self.answering[:, None, None]

    def count(self, layer, pages, pairs):
        """Of the sequences that are answering; fetched: pairs of pages not chosen a step before."""
        P = pages.shape[2]
        new = pages & ~self.before[layer, :, :, :P]
        self.before[layer] = False
        self.before[layer, :, :, :P] = pages & self.answering[:, None, None]
        answering = int(self.answering.sum())
        self.counts["steps"] += answering if layer == 0 else 0
        self.counts["pairs"] += int(pairs[self.answering].sum())
        self.counts["bounds"] += answering * pages[0].numel()
        self.counts["fetched"] += int(new[self.answering].sum()) * self.page_size
