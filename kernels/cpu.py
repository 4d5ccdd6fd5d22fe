"""
What a decode step reads on a CPU, compiled by numba: the pairs held, and the weights.

PyTorch's products of a page and two query heads leave most of a CPU's bandwidth unused, those of 16-bit weights and a
few rows nearly all. Here a number is read once and converted on the way. Without numba PyTorch computes the same.

Letters: those of decode_attention.py; R rows of x, C inputs and O outputs of a layer.
"""
import numpy as np
import torch
import torch.nn.functional as F

try:
    import numba
except ImportError:
    numba = None


def takes(x):
    """Can these kernels read the tensor?"""
    return numba is not None and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


def _launch(kernel, *tensors):
    """Run it on the tensors as numpy sees them, bfloat16 as 16-bit integers, in as many threads as PyTorch uses."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    kernel(*((x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).detach().numpy() for x in tensors))


def decode_attention(q, k_pages, v_pages, table, length):
    """decode_attention_plain for float32 and bfloat16 on a CPU."""
    query = q.float() * q.shape[2] ** -0.5
    part = F.pad(query.new_zeros(torch.get_num_threads(), *q.shape), (0, 2))
    part[..., -1] = -1e30
    _launch(_attend, query, k_pages, v_pages, table, length, part)
    out, total, top = part.split((q.shape[2], 1, 1), dim=3)
    weight = (top - top.amax(0)).exp()
    return ((weight * out).sum(0) / (weight * total).sum(0).clamp(min=1e-30)).to(q.dtype)


def linear(x, weight, bias=None):
    """F.linear for x (R, C), weight (O, C) and bias (O,), all float32 or all bfloat16. Made for a few rows."""
    rows = F.pad(x.float(), (0, 0, 0, -len(x) % 4)).contiguous()
    y = torch.empty(len(rows), len(weight))
    _launch(_linear, rows, weight, y)
    return (y[:len(x)] if bias is None else y[:len(x)] + bias).to(x.dtype)


if numba is not None:
    def number(x):
        """The float32 that an element stands for: 16 bits are a bfloat16, which is a float32's upper half."""

    @numba.extending.overload(number, inline="always")
    def _(x):
        return (lambda x: x) if isinstance(x, numba.types.Float) else \
            (lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32))

    # sums in any order, so that they are made side by side; NaN and infinity stay what they are
    compiled = numba.njit(parallel=True, cache=True, fastmath={"reassoc", "contract", "nsz", "arcp"})

    @compiled
    def _attend(q, k_pages, v_pages, table, length, part):
        """A thread takes its share of every row's pages. part (threads, N, G, D + 2): of each share the sum of its
        values and of its weights, both relative to its highest score, and that score; at first 0, 0 and -1e30."""
        (N, G, D), page_size, threads = q.shape, k_pages.shape[1], len(part)
        for share in numba.prange(threads):
            weight = np.empty(page_size, np.float32)
            for row in range(N):
                pages = -(-length[row] // page_size)
                for ordinal in range(share * pages // threads, (share + 1) * pages // threads):
                    keys, values = k_pages[table[row, ordinal]], v_pages[table[row, ordinal]]
                    held = min(length[row] - ordinal * page_size, page_size)
                    for g in range(G):
                        out = part[share, row, g]
                        top = out[D + 1]
                        for t in range(held):
                            score = np.float32(0)
                            for d in range(D):
                                score += q[row, g, d] * number(keys[t, d])
                            weight[t] = score
                            top = max(top, score)
                        out[:D + 1] *= np.exp(out[D + 1] - top)
                        out[D + 1] = top
                        for t in range(held):
                            w = np.exp(weight[t] - top)
                            out[D] += w
                            for d in range(D):
                                out[d] += w * number(values[t, d])

    @compiled
    def _linear(x, weight, y):
        """Two rows of weights by four of x (R a multiple of 4) at a time: what is loaded serves several products."""
        (R, C), O = x.shape, len(weight)
        for block in range(0, R, 256):  # so many rows of x stay in the processor's cache
            for pair in numba.prange((O + 1) // 2):
                m, n = 2 * pair, min(2 * pair + 1, O - 1)
                for r in range(block, min(block + 256, R), 4):
                    x0, x1, x2, x3 = x[r], x[r + 1], x[r + 2], x[r + 3]
                    m0 = m1 = m2 = m3 = n0 = n1 = n2 = n3 = np.float32(0)
                    for c in range(C):
                        a, b = number(weight[m, c]), number(weight[n, c])
                        m0, m1, m2, m3 = m0 + x0[c] * a, m1 + x1[c] * a, m2 + x2[c] * a, m3 + x3[c] * a
                        n0, n1, n2, n3 = n0 + x0[c] * b, n1 + x1[c] * b, n2 + x2[c] * b, n3 + x3[c] * b
                    y[r, m], y[r + 1, m], y[r + 2, m], y[r + 3, m] = m0, m1, m2, m3
                    y[r, n], y[r + 1, n], y[r + 2, n], y[r + 3, n] = n0, n1, n2, n3
