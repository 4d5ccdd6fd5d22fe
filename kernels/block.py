"""
A block of new tokens: they attend to what is held and to each other, and then are stored.

The mask is the visibility rule, over the positions and decisions that the slots carry. First in
plain PyTorch, with a mask of its own for each row; then by Triton, which reads the pages as they
lie. There a key carries the last position that may see it, its own + window if it was evicted: one
comparison, as what is held lies before all queries. Letters: those of cache_write.py; G query heads
to a row.
"""

import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dms import decisions, visible
from kernels import capability, check_launch, tl, triton
from kernels.cache_write import decide_newest, held, write_block

# not cuDNN, which spends up to half a second on a plan for every new shape
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
SCORES_AT_A_TIME = {"cpu": 2**19, "cuda": 2**26}  # entries of a plain mask


def append_block(q, k, v, logits, new, rows, pool, window, shift, attention):
    """Attend, then store: the block's first tokens still see what expires within it.

    q: (N, G, T, D); k, v: (N, T, D), the pool's dtype; logits: (N, T), computed at these tokens
    about those `shift`, 0 or 1, before them, None if nothing is ever evicted; new: (N,) int64, how
    many of the T are real; attention: block_attention or its plain twin. Returns (N, G, T, D).
    `seen` is left as it is. Raises CacheFull, before any pair is stored.
    """
    evict = None
    if logits is not None:
        evict = decisions(logits, shift)  # (N, T)
        if shift == 1:
            decide_newest(logits[:, 0] > 0, new, rows, pool)
            token = torch.arange(k.shape[1], device=k.device)
            evict &= token < new[:, None] - 1  # the last token is not decided yet
    y = attention(q, k, v, evict, new, rows, pool, window)
    nothing = torch.zeros(k.shape[:2], dtype=torch.bool, device=k.device)
    write_block(k, v, nothing if evict is None else evict, new, rows, pool, window)
    return y


def block_attention_plain(q, k, v, evict, new, rows, pool, window):
    """Attention of new tokens, none of which is stored yet, to all that the rule lets them see.

    q: (N, G, T, D); k, v: (N, T, D), the pool's dtype; evict: (N, T) bool, what was decided about
    these tokens, None if nothing is ever evicted; new: (N,) int64, how many of the T are real.
    Returns (N, G, T, D), of padding anything finite. To bound the memory, rows are taken in groups
    whose masks have SCORES_AT_A_TIME entries, or one by one.
    """
    out = torch.zeros_like(q)
    T = q.shape[2]
    columns = int(rows.length.max()) + T
    rows_at_a_time = SCORES_AT_A_TIME[q.device.type] // (T * columns) + 1
    for begin in range(0, len(q), rows_at_a_time):
        some = slice(begin, begin + rows_at_a_time)
        n = int(new[some].max())
        of_block = None if evict is None else evict[some, :n]
        block = (q[some, :, :n], k[some, :n], v[some, :n], of_block)
        out[some, :, :n] = attend_rows(*block, rows, pool, window, some)
    return out


def attend_rows(q, k, v, evict, rows, pool, window, some):
    """block_attention_plain for the rows of the slice `some`, to which q, k, v and evict belong."""
    G, T = q.shape[1:3]
    slots = (pool.keys, pool.values, pool.position, pool.evicted)
    (keys, values, position, evicted), in_use = held(slots, rows, some)
    S = in_use.shape[1]
    mask = None  # causal
    if S > 0 or evict is not None:
        token = torch.arange(T, dtype=torch.int32, device=k.device)
        query = rows.seen[some, None].int() + token  # (n, T): positions of queries and new keys
        of_block = torch.zeros_like(query, dtype=torch.bool) if evict is None else evict
        position = torch.cat((position, query), dim=1)  # (n, S + T)
        evicted = torch.cat((evicted, of_block), dim=1)
        mask = visible(query[:, :, None], position[:, None], evicted[:, None], window)
        mask[:, :, :S] &= in_use[:, None]  # (n, T, S + T)
        mask = mask[:, None]

    unused = ~in_use[:, :, None]
    keys.masked_fill_(unused, 0)  # (copies) as a weight of 0 times NaN would be NaN
    values.masked_fill_(unused, 0)
    keys = torch.cat((keys, k), dim=1)[:, None]  # (n, 1, S + T, D)
    values = torch.cat((values, v), dim=1)[:, None]
    keys, values = (x.expand(-1, G, -1, -1) for x in (keys, values))
    with sdpa_kernel(BACKENDS):
        return F.scaled_dot_product_attention(q, keys, values, mask, is_causal=mask is None)


if triton is not None:
    from kernels.decode_attention import attend_to

    FOREVER = tl.constexpr(2**31 - 1)

    @triton.jit(do_not_specialize=["T", "window", "table_stride"])
    def _attend_block(
        q_ptr, k_ptr, v_ptr, evict_ptr, new_ptr, seen_ptr, length_ptr, table_ptr, keys_ptr,
        values_ptr, position_ptr, evicted_ptr, y_ptr, T, window, scale, table_stride,
        G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr,
        EVICTS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):
        """y (N, G, T, D) of program (block of queries, row). A query is a token and a head; those
        of a token are neighbours. The last blocks, which see most, begin first."""
        row = tl.program_id(1).to(tl.int64)
        query = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES + tl.arange(0, QUERIES)
        token = query // G
        d = tl.arange(0, WIDTH)
        t = tl.arange(0, KEYS)
        new = tl.load(new_ptr + row).to(tl.int32)
        seen = tl.load(seen_ptr + row).to(tl.int32)  # the position of token 0
        at = ((query % G) * T + token)[:, None] * D + d[None, :]  # in the row
        q_ptr += row * G * T * D
        k_ptr += row * T * D
        v_ptr += row * T * D
        evict_ptr += row * T
        is_query = (token < T)[:, None] & (d < D)[None, :]
        q = tl.load(q_ptr + at, mask=is_query, other=0.0)
        top = tl.full((QUERIES,), -1e30, tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        out = tl.zeros((QUERIES, WIDTH), tl.float32)
        end = tl.minimum(tl.max(token, 0) + 1, new)  # of what the block's tokens see of the new ones
        length = tl.where(tl.min(token, 0) < new, tl.load(length_ptr + row).to(tl.int32), 0)
        table_ptr += row * table_stride
        for start in range(0, length, KEYS):
            slot = start + t
            is_held = slot < length
            page = tl.load(table_ptr + slot // PAGE, mask=is_held, other=0).to(tl.int64)
            where = page * PAGE + slot % PAGE
            mask = is_held[:, None] & (d < D)[None, :]
            k = tl.load(keys_ptr + where[:, None] * D + d[None, :], mask=mask, other=0.0)
            v = tl.load(values_ptr + where[:, None] * D + d[None, :], mask=mask, other=0.0)
            sees = is_held[None, :]
            if EVICTS:
                evicted = tl.load(evicted_ptr + where, mask=is_held, other=0).to(tl.int1)
                # the last of the block's tokens that may see it
                until = tl.load(position_ptr + where, mask=is_held, other=0) + window - seen
                until = tl.where(evicted, until, FOREVER)
                sees = sees & (token[:, None] <= until[None, :])
            top, total, out = attend_to(q, k, v, sees, scale, top, total, out)
        for start in range(0, end, KEYS):
            key = start + t
            mask = (key < end)[:, None] & (d < D)[None, :]
            at_key = key[:, None] * D + d[None, :]
            k = tl.load(k_ptr + at_key, mask=mask, other=0.0)
            v = tl.load(v_ptr + at_key, mask=mask, other=0.0)
            sees = key[None, :] <= token[:, None]
            if EVICTS:
                evicted = tl.load(evict_ptr + key, mask=key < end, other=0).to(tl.int1)
                until = tl.where(evicted, key + window, FOREVER)
                sees = sees & (token[:, None] <= until[None, :])
            top, total, out = attend_to(q, k, v, sees, scale, top, total, out)
        out /= tl.maximum(total, 1e-30)[:, None]
        tl.store(y_ptr + row * G * T * D + at, out.to(y_ptr.dtype.element_ty), mask=is_query)


def block_sizes(q, width):
    """(queries, keys) that a program takes at a time, for heads of a width, a power of two: what
    compiles for A100 and H100 without spilling registers, up to 128 in 16 bits, 64 in float32."""
    if q.dtype == torch.float32 and not q.is_cpu:  # its products are made in registers
        return max(2048 // width, 32), 32
    most = max(min(128, 32768 // (width * q.element_size())), 16)
    if capability(q) in (9, 10):  # they multiply from shared memory, others from registers
        return most, max(most // 2, 16)
    return min(most, 64), min(most, 64)


def block_attention(q, k, v, evict, new, rows, pool, window):
    """block_attention_plain by Triton: D up to 256, any G, any page_size that is a power of two,
    float32, float16 or bfloat16."""
    dtype = q.dtype
    keys, values = pool.keys, pool.values
    assert dtype == k.dtype == keys.dtype, "block_attention: q, k and the pool differ in dtype"
    if q.is_cpu and dtype == torch.bfloat16:  # the interpreter multiplies it as if it were integers
        q, k, v, keys, values = (x.float() for x in (q, k, v, keys, values))
    q, k, v = (x.contiguous() for x in (q, k, v))
    decided = new if evict is None else evict.contiguous()  # new, where none is read
    lengths = (rows.seen, rows.length)
    slots = (keys, values, pool.position, pool.evicted)
    check_launch("block_attention", q, k, v, decided, new, *lengths, *slots)
    N, G, T, D = q.shape
    assert D <= 256, f"block_attention: {D=} is not covered"
    width = max(triton.next_power_of_2(D), 16)
    queries, keys_at_a_time = block_sizes(q, width)
    y = torch.empty_like(q)
    _attend_block[triton.cdiv(T * G, queries), N](
        q, k, v, decided, new, *lengths, rows.table, *slots, y, T, window,
        D**-0.5 * math.log2(math.e), rows.table.stride(0), G=G, D=D, WIDTH=width,
        PAGE=keys.shape[1], EVICTS=evict is not None, QUERIES=queries,
        KEYS=keys_at_a_time, num_warps=8, num_stages=3)
    return y.to(dtype)
