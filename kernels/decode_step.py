"""
A decode step: one token for every sequence, forward pass and sampling, as one launch on a GPU.

    tokens and random numbers -> hidden states, through the cache -> logits -> sample -> tokens

`run` is the step as PyTorch code. On a GPU it is captured as a CUDA graph the second time that it
runs on the same tensors, and replayed from then on; nothing in it waits for the GPU.

Here, as in generate.py, a row is a sequence: its place in the cache's batch.
"""
import math

import torch

from kernels import triton


def sample(logits, uniform, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0):
    """Draw one token per row: logits (B, V), uniform (B,) in [0, 1) -> (B,) int64.

    At a temperature below 1e-5 the likeliest. Otherwise the distribution is cut to the top_k likeliest tokens
    (0: all), then to the fewest that hold top_p of the mass, then to those at least min_p times as
    likely as the first; the token is where the sum of what is left passes `uniform`.
    """
    if temperature < 1e-5:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        p, order = logits.softmax(-1).sort(descending=True, stable=True)
        drop = p.cumsum(-1) - p >= top_p  # the mass before it suffices...
        drop[:, 0] = False  # ...but never the first
        # scatter brings all of drop from sorted order back into that of token ids
        logits = logits.masked_fill(drop.scatter(1, order, drop), -math.inf)
    p = logits.softmax(-1)
    p = p.where(p >= min_p * p.amax(-1, keepdim=True), 0)
    mass = p.double().cumsum(-1)
    point = uniform.double()[:, None] * mass[:, -1:]
    return torch.searchsorted(mass, point, right=True)[:, 0]


class DecodeStep:
    """The step of a Model over a KVCache. sampling: the arguments of `sample`."""

    def __init__(self, model, cache, sampling):
        self.model = model
        self.cache = cache
        self.sampling = sampling
        shape = (cache.batch_size, 3)  # of every row: token id, random number, 1 if it runs else 0
        self.buffer = torch.zeros(shape, dtype=torch.float64, device=cache.device)
        # the plain functions wait for the GPU, so only Triton's can be captured
        self.captures = cache.device.type == "cuda" and triton is not None
        self.graph = None
        self.table = None  # the page table that the last run used: the cache may replace it

    @torch.inference_mode()
    def __call__(self, inputs):
        """inputs: {row: (token id, random number in [0, 1))} for the rows of the batch that run ->
        {row: next token id}. Raises CacheFull, before anything has changed."""
        values = [(*inputs.get(row, (0, 0.0)), row in inputs) for row in range(len(self.buffer))]
        self.buffer.copy_(torch.tensor(values, dtype=torch.float64))
        self.cache.reserve(self.buffer[:, 2].long())
        if not self.captures or self.table is not self.cache.rows.table:
            self.table = self.cache.rows.table
            self.graph = None
            self.run()
        else:
            self.graph = self.graph or self.capture()
            self.graph.replay()
        drawn = self.next.tolist()
        return {row: drawn[row] for row in inputs}

    def run(self):
        token, uniform, count = self.buffer.unbind(1)
        with self.cache.append(count.long(), 1, reserve=False) as feed:
            x = self.model.hidden(token.long()[:, None], feed, feed.start)
        self.next = sample(self.model.lm_head(x)[:, -1], uniform, **self.sampling)

    def capture(self):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # records, and runs nothing
            self.run()
        return graph
