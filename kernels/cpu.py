"""
A decode step on a CPU: the cache write and the attention, compiled by numba.

They equal `store` and a softmax over all that a row holds (see Kernels in kv_cache.py), in float32.
A KVCache on a CPU calls them once for each layer of a step. The time of a step is that of reading
the pages. So each number is read once, where it lies.

The write visits one row after another: it is a few numbers a row. The attention takes rows side by
side, one in each thread.

numba is an extra: without it importing this file raises ImportError, and the cache takes the plain
functions. What is compiled is kept for the next process. Letters: N rows of a layer, G query heads
of a row, D head size.
"""

import numba
import numpy as np
import torch


def store_one(k, v, evict, new, rows, pool, shift):
    """By numba. The free stack must hold a page for every row that needs one."""
    # of the pool keys, values, position and evicted
    tensors = (k, v, evict, new, rows.seen, rows.length, rows.table, rows.ring, *pool.slots, pool.free, pool.free_count)
    _store(shift, *(x.numpy() for x in tensors))


def attend_one(q, rows, pool):
    """By numba, in as many threads as PyTorch uses."""
    y = torch.empty_like(q)
    threads = torch.get_num_threads()
    tensors = (q * q.shape[2] ** -0.5, pool.keys, pool.values, rows.table, rows.length, y)
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    with numba.parallel_chunksize(1):  # a thread that is done takes the next row
        _attend(*(x.numpy() for x in tensors))
    torch.set_num_threads(threads)  # numba's first launch sets them for all of OpenMP
    return y


# sums in any order, so that they are made side by side; NaN and infinity stay what they are
fast = {"reassoc", "contract", "nsz", "arcp"}


@numba.njit(cache=True)
def locate(pages, slot, page_size):
    """Where a slot of a row lies: its page, and the place in it."""
    return pages[slot // page_size], slot % page_size


@numba.njit(cache=True)
def _store(shift, k, v, evict, new, seen, length, table, ring,
           keys, values, position, evicted, free, free_count):
    """The rule as it is written in write.py."""
    page_size = keys.shape[1]
    W = ring.shape[1]
    for row in range(len(new)):
        if new[row] == 0:
            continue
        t = seen[row]
        pages = table[row]
        if shift == 1 and t > 0:
            evicted[locate(pages, ring[row, (t - 1) % W], page_size)] = evict[row]
        slot = length[row]
        oldest = ring[row, t % W]
        if t >= W and evicted[locate(pages, oldest, page_size)]:
            slot = oldest
        else:
            length[row] += 1
            if slot % page_size == 0:
                free_count[0] -= 1
                pages[slot // page_size] = free[free_count[0]]
        place = locate(pages, slot, page_size)
        keys[place] = k[row]
        values[place] = v[row]
        position[place] = t
        evicted[place] = evict[row] and shift == 0
        ring[row, t % W] = slot


@numba.njit(fastmath=fast, cache=True)
def attend_page(q, keys, values, weight, out):
    """Add one page's part to out (D + 2,).

    out[:D]     the sum of weighted values      weight of a slot: exp(its score - out[D + 1])
    out[D]      the sum of the weights
    out[D + 1]  the highest score so far

    weight: room for one number a slot, first its score."""
    D = len(q)
    top = out[D + 1]
    for t in range(len(keys)):
        score = np.float32(0)
        for d in range(D):
            score += q[d] * keys[t, d]
        weight[t] = score
        top = max(top, score)
    out[: D + 1] *= np.exp(out[D + 1] - top)
    out[D + 1] = top
    for t in range(len(keys)):
        w = np.exp(weight[t] - top)
        out[D] += w
        for d in range(D):
            out[d] += w * values[t, d]


@numba.njit(parallel=True, fastmath=fast, cache=True)
def _attend(q, keys, values, table, length, y):
    N, G, D = q.shape
    page_size = keys.shape[1]
    for row in numba.prange(N):
        weight = np.empty(page_size, np.float32)
        out = np.zeros((G, D + 2), np.float32)
        out[:, D] = 1e-30  # a row that holds nothing gives 0
        out[:, D + 1] = -1e30
        for begin in range(0, length[row], page_size):
            page = table[row, begin // page_size]
            held = min(length[row] - begin, page_size)
            for g in range(G):  # while the page is in the processor's cache
                attend_page(q[row, g], keys[page, :held], values[page, :held], weight, out[g])
        for g in range(G):
            y[row, g] = out[g, :D] / out[g, D]
