"""
Attention of a decode step on a CPU, compiled by numba.

It equals attend_one in kv_cache.py, in float32. A KVCache on a CPU calls it once for each layer of
a step. The time of a step is that of reading the pages. So each number is read once, where it lies,
and rows are taken side by side, one in each thread.

numba is an extra: without it importing this file raises ImportError, and the cache takes the plain
function. What is compiled is kept for the next process. Letters: N rows of a layer, G query heads
of a row, D head size.
"""

import numba
import numpy as np
import torch


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


@numba.njit(fastmath=fast, cache=True)
def attend_page(q, keys, values, weight, out):
    """Add one page's part to out (D + 2,).

    out[:D]     the sum of weighted values      weight of a slot: exp(its score - out[D + 1])
    out[D]      the sum of the weights
    out[D + 1]  the highest score so far

    weight: room for a number for each slot of the page: its score, then its weight."""
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
