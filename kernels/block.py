"""
A block of new tokens: they attend to what is held and to each other, and then are stored.

The mask is the visibility rule, over the positions and decisions that the slots carry. Plain
PyTorch only. Letters: those of cache_write.py; G query heads to a row.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dms import decisions, visible
from kernels.cache_write import decide_newest, held, write_block

# not cuDNN, which spends up to half a second on a plan for every new shape
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def append_block(q, k, v, logits, new, rows, pool, window, shift, scores_at_a_time):
    """Attend, then store: the block's first tokens still see what expires within it.

    q: (N, G, T, D); k, v: (N, T, D), the pool's dtype; logits: (N, T), computed at these tokens
    about those `shift`, 0 or 1, before them; new: (N,) int64, how many of the T are real. Returns
    (N, G, T, D). `seen` is left as it is. Raises CacheFull, before anything is stored.
    """
    evict = decisions(logits, shift)  # (N, T)
    if shift == 1:
        decide_newest(logits[:, 0] > 0, new, rows, pool)
        token = torch.arange(k.shape[1], device=k.device)
        evict &= token < new[:, None] - 1  # the last token is not decided yet
    block = (k, v, evict, new, rows, pool, window)
    y = attend_block(q, *block, scores_at_a_time)
    write_block(*block)
    return y


def attend_block(q, k, v, evict, new, rows, pool, window, scores_at_a_time):
    """Attention of new tokens, none of which is stored yet, to all that the rule lets them see.

    q: (N, G, T, D); k, v: (N, T, D), the pool's dtype; evict: (N, T) bool, what was decided about
    these tokens; new: (N,) int64, how many of the T are real. Returns (N, G, T, D). To bound the
    memory, rows are taken in groups whose masks have scores_at_a_time entries, or one by one.
    """
    out = torch.zeros_like(q)
    T = q.shape[2]
    columns = int(rows.length.max()) + T
    rows_at_a_time = scores_at_a_time // (T * columns) + 1
    for begin in range(0, len(q), rows_at_a_time):
        some = slice(begin, begin + rows_at_a_time)
        n = int(new[some].max())
        block = (q[some, :, :n], k[some, :n], v[some, :n], evict[some, :n])
        out[some, :, :n] = attend_rows(*block, rows, pool, window, some)
    return out


def attend_rows(q, k, v, evict, rows, pool, window, some):
    """attend_block for the rows of the slice `some`, to which q, k, v and evict belong."""
    slots = (pool.keys, pool.values, pool.position, pool.evicted)
    (keys, values, position, evicted), in_use = held(slots, rows, some)
    S = in_use.shape[1]
    G, T = q.shape[1:3]
    token = torch.arange(T, dtype=torch.int32, device=k.device)
    query = rows.seen[some, None].int() + token  # (n, T): positions of queries and new keys
    position = torch.cat((position, query), dim=1)  # (n, S + T)
    evicted = torch.cat((evicted, evict), dim=1)
    mask = visible(query[:, :, None], position[:, None], evicted[:, None], window)
    mask[:, :, :S] &= in_use[:, None]  # (n, T, S + T)

    unused = ~in_use[:, :, None]
    keys.masked_fill_(unused, 0)  # (copies) as a weight of 0 times NaN would be NaN
    values.masked_fill_(unused, 0)
    keys = torch.cat((keys, k), dim=1)[:, None]  # (n, 1, S + T, D)
    values = torch.cat((values, v), dim=1)[:, None]
    with sdpa_kernel(BACKENDS):
        return F.scaled_dot_product_attention(
            q, keys.expand(-1, G, -1, -1), values.expand(-1, G, -1, -1), attn_mask=mask[:, None])
