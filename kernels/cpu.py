"""
What a decode step does on a CPU: the cache write and the attention, compiled by numba, and the
products, by oneDNN.

A decode step multiplies large things that lie in memory, pages and weights, by a few rows only. Its
time is the reading: here each number is read once, and 16-bit numbers are converted on the way.
Without numba PyTorch computes the same. Letters: those of decode_attention.py.
"""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    import numba
except ImportError:
    numba = None


def can_read(device, dtype):
    """Can these kernels read tensors of this kind?"""
    is_kind = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
    return is_kind and numba is not None


def launch(kernel, *tensors):
    """Run a kernel on tensors as numpy sees them, bfloat16 as 16-bit integers, in as many threads
    as PyTorch uses."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    tensors = [x.view(torch.uint16) if x.dtype == torch.bfloat16 else x for x in tensors]
    kernel(*(x.detach().numpy() for x in tensors))
    if torch.get_num_threads() != threads:  # numba's first launch sets them for all of OpenMP
        torch.set_num_threads(threads)


def cache_write(k, v, evict, new, rows, pool, shift):
    """cache_write_plain. The free stack must have a page for every row that needs one."""
    state = (rows.seen, rows.length, rows.table, rows.ring, pool.keys, pool.values, pool.position)
    launch(_write, k, v, evict, new, *state, pool.evicted, pool.free, pool.free_count, torch.tensor([shift]))


def decode_attention(q, k_pages, v_pages, table, length):
    """decode_attention_plain, float32 or bfloat16."""
    query = q.float() * q.shape[2] ** -0.5
    # part (threads, N, G, D + 2): D sums of values, the sum of weights, and the highest score of
    # each thread's share, see _attend
    part = F.pad(query.new_zeros(torch.get_num_threads(), *q.shape), (0, 2))
    part[..., -1] = -1e30
    launch(_attend, query, k_pages, v_pages, table, length, part)
    out, total, top = part.split((q.shape[2], 1, 1), dim=3)
    weight = (top - top.amax(0)).exp()  # of each thread's share
    return ((weight * out).sum(0) / (weight * total).sum(0).clamp(min=1e-30)).to(q.dtype)


class Linear(nn.Linear):
    """nn.Linear in float32 by oneDNN, which reads weights for a few rows as fast as memory gives
    them, where PyTorch's own choice, MKL, takes two to three times as long on some processors."""

    def forward(self, x):
        # the operator has no gradient, and cannot be traced
        must_be_plain = torch.is_grad_enabled() or torch.compiler.is_compiling()
        is_float32 = x.dtype == self.weight.dtype == torch.float32
        if must_be_plain or not is_float32 or not x.is_cpu or x.shape[-1] != self.in_features:
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def use_onednn(model):
    """The switch: make the large nn.Linear layers of a model those above, in place."""
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.weight.numel() >= 2**18:
                module.__class__ = Linear


if numba is not None:

    def number(x):
        """The float32 that an element stands for."""

    @numba.extending.overload(number, inline="always")
    def _(x):
        if isinstance(x, numba.types.Float):
            return lambda x: x
        # 16 bits of a bfloat16, which is the upper half of a float32
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)

    try:
        keep = dict(cache=True)  # what is compiled, for the next process
        numba.njit(can_read, **keep)  # compiles nothing: only looks for a folder
    except RuntimeError:  # there is no folder that can be written to
        keep = {}
    # sums in any order, so that they are made side by side; NaN and infinity stay what they are
    fast = {"reassoc", "contract", "nsz", "arcp"}
    compiled = numba.njit(parallel=True, fastmath=fast, **keep)

    @numba.njit(**keep)
    def _write(
        k, v, evict, new, seen, length, table, ring,
        keys, values, position, evicted, free, free_count, shift,
    ):  # fmt: skip
        """One row after another, the rule as it is written in cache_write.py."""
        page_size = keys.shape[1]
        W = ring.shape[1]
        for row in range(len(new)):
            if new[row] == 0:
                continue
            t = seen[row]
            if shift[0] == 1 and t > 0:
                newest = ring[row, (t - 1) % W]
                evicted[table[row, newest // page_size], newest % page_size] = evict[row]
            slot = length[row]
            if t >= W:
                oldest = ring[row, t % W]
                if evicted[table[row, oldest // page_size], oldest % page_size]:
                    slot = oldest
            if slot == length[row]:
                length[row] += 1
                if slot % page_size == 0:
                    free_count[0] -= 1
                    table[row, slot // page_size] = free[free_count[0]]
            place = table[row, slot // page_size], slot % page_size
            keys[place] = k[row]
            values[place] = v[row]
            position[place] = t
            evicted[place] = evict[row] and shift[0] == 0
            ring[row, t % W] = slot

    @compiled
    def _attend(q, k_pages, v_pages, table, length, part):
        """A thread takes its share of every row's pages, so uneven rows cost nothing. part
        (threads, N, G, D + 2): of each share the sum of its values and of its weights, both
        relative to its highest score, and that score; at first 0, 0 and -1e30."""
        N, G, D = q.shape
        page_size = k_pages.shape[1]
        threads = len(part)
        for share in numba.prange(threads):
            weight = np.empty(page_size, np.float32)
            for row in range(N):
                pages = -(-length[row] // page_size)
                for ordinal in range(share * pages // threads, (share + 1) * pages // threads):
                    held = min(length[row] - ordinal * page_size, page_size)
                    keys = k_pages[table[row, ordinal], :held]
                    values = v_pages[table[row, ordinal], :held]
                    for g in range(G):
                        attend_page(q[row, g], keys, values, weight, part[share, row, g])

    @numba.njit(fastmath=fast, **keep)
    def attend_page(q, keys, values, weight, out):
        """Add one page's part to out (D + 2,): see _attend."""
        D = len(q)
        top = out[D + 1]
        for t in range(len(keys)):
            score = np.float32(0)
            for d in range(D):
                score += q[d] * number(keys[t, d])
            weight[t] = score
            top = max(top, score)
        out[: D + 1] *= np.exp(out[D + 1] - top)
        out[D + 1] = top
        for t in range(len(keys)):
            w = np.exp(weight[t] - top)
            out[D] += w
            for d in range(D):
                out[d] += w * number(values[t, d])
