"""
One token into every row: what lies between a layer's products and its attention, in one launch.

    q, k = RoPE(norm(q)), RoPE(norm(k))        a norm only where the model has one (Qwen3)
    evict = scale * s - offset > 0             s from an adapter, or from a borrowed neuron
    k, v -> the cache                          as cache_write.py says

It means what Attention.project (model.py) and then cache_write_plain do, and is tested to equal
them. Letters: those of decode_attention.py; Hq query heads, C hidden size.
"""

import torch

from kernels import check_launch, tl, triton
from kernels.cache_write import state_of

if triton is not None:
    from kernels.cache_write import put

    @triton.jit
    def _rotated(
        x_ptr, at, mask, silent, norm_ptr, cos_ptr, sin_ptr, eps, D: tl.constexpr,
        WIDTH: tl.constexpr, NORM: tl.constexpr):
        """(Vectors of x after RMSNorm and RoPE, (n, WIDTH); their last channels before RoPE), in
        float32. at: (n,) where in x they begin; silent: (n,) whose last channel takes no part."""
        d = tl.arange(0, WIDTH)[None, :]
        other = (d + D // 2) % D  # the channel that each is paired with
        dtype = x_ptr.dtype.element_ty
        mask = mask[:, None] & (d < D)
        x = tl.load(x_ptr + at[:, None] + d, mask=mask, other=0.0).to(tl.float32)
        pair = tl.load(x_ptr + at[:, None] + other, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
            x *= scale * tl.load(norm_ptr + d, mask=d < D, other=0.0).to(tl.float32)
            pair *= scale * tl.load(norm_ptr + other, mask=d < D, other=0.0).to(tl.float32)
            x = x.to(dtype).to(tl.float32)
            pair = pair.to(dtype).to(tl.float32)
        last = tl.sum(tl.where(d == D - 1, x, 0.0), 1)
        silent = silent[:, None]
        pair = tl.where(silent & (other == D - 1), 0.0, pair)
        pair = tl.where(d < D // 2, -pair, pair)
        cos = tl.load(cos_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        return tl.where(silent & (d == D - 1), 0.0, x * cos + pair * sin), last

    @triton.jit
    def _adapter_score(
        residual_ptr, norm_ptr, weight_ptr, eps, C: tl.constexpr, BLOCK: tl.constexpr):
        """RMSNorm(residual) @ weight, of (C,) each."""
        squares = tl.zeros((BLOCK,), tl.float32)
        products = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, C, BLOCK):
            c = start + tl.arange(0, BLOCK)
            x = tl.load(residual_ptr + c, mask=c < C, other=0.0).to(tl.float32)
            norm = tl.load(norm_ptr + c, mask=c < C, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
            squares += x * x
            products += x * norm * weight
        return tl.sum(products, 0) * tl.rsqrt(tl.sum(squares, 0) / C + eps)

    @triton.jit(do_not_specialize=["table_stride"])
    def _feed(
        x_ptr, q_ptr, residual_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, adapter_norm_ptr,
        adapter_ptr, bias_ptr, new_ptr, seen_ptr, length_ptr, table_ptr, ring_ptr, keys_ptr,
        values_ptr, position_ptr, evicted_ptr, free_ptr, free_count_ptr, eps, scale, offset,
        table_stride, Hkv: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
        WIDTH: tl.constexpr, C: tl.constexpr, PAGE: tl.constexpr, W: tl.constexpr,
        SHIFT: tl.constexpr, NORM: tl.constexpr, NEURON: tl.constexpr, ADAPTER: tl.constexpr,
        BIAS: tl.constexpr, PER_LAYER: tl.constexpr, EVICTS: tl.constexpr):
        """Program (row,): q (N, G, D) of the row's query heads, and its pair into the cache. x: (B,
        (Hq + 2 Hkv) D), the products q, k and v of each sequence side by side."""
        row = tl.program_id(0).to(tl.int64)
        sequence = row // Hkv
        head = row % Hkv
        x_ptr += sequence * (G + 2) * Hkv * D
        cos_ptr += sequence * D
        sin_ptr += sequence * D
        dtype = x_ptr.dtype.element_ty
        g = tl.arange(0, GROUP)
        d = tl.arange(0, WIDTH)
        one = tl.arange(0, 1)

        silent = (g == 0) & NEURON
        q, q_last = _rotated(
            x_ptr, (head * G + g) * D, g < G, silent, q_norm_ptr, cos_ptr, sin_ptr, eps, D, WIDTH,
            NORM)
        at = (row * G + g)[:, None] * D + d[None, :]
        tl.store(q_ptr + at, q.to(dtype), mask=(g < G)[:, None] & (d < D)[None, :])

        if tl.load(new_ptr + row) > 0:
            decider = head * 0 if PER_LAYER else head
            score = 0.0
            if NEURON:
                first = decider * G * D + one
                decider_q, last = _rotated(
                    x_ptr, first, first >= 0, first < 0, q_norm_ptr, cos_ptr, sin_ptr, eps, D,
                    WIDTH, NORM)
                score = tl.sum(last, 0)
            if ADAPTER:
                score = _adapter_score(
                    residual_ptr + sequence * C, adapter_norm_ptr, adapter_ptr + decider * C, eps,
                    C, 1024)
            if BIAS:
                score += tl.load(bias_ptr + decider).to(tl.float32)
            evict = (scale * score - offset > 0) & EVICTS
            at_k = (G * Hkv + head) * D + one
            k, k_last = _rotated(
                x_ptr, at_k, at_k >= 0, at_k < 0, k_norm_ptr, cos_ptr, sin_ptr, eps, D, WIDTH, NORM)
            v = tl.load(x_ptr + ((G + 1) * Hkv + head) * D + d, mask=d < D)
            put(
                row, tl.sum(k, 0).to(dtype), v, evict, seen_ptr, length_ptr, table_ptr, ring_ptr,
                keys_ptr, values_ptr, position_ptr, evicted_ptr, free_ptr, free_count_ptr,
                table_stride, D, WIDTH, PAGE, W, SHIFT)


def feed_token(x, residual, cos, sin, attention, new, rows, pool):
    """Finish the queries of one token a sequence, and store its pairs.

    x: (B, (Hq + 2 Hkv) D), the products q, k and v side by side; residual: (B, C), before the input
    norm; cos, sin: (B, D); attention: the layer's Attention (model.py), for its norms, its adapter
    and its settings; new: (N,) int64, 1 for a row that gets a token, 0 for one that rests. Returns
    q (N, G, D). The free stack must have a page for every row that needs one.
    """
    config = attention.config
    dms = config.dms
    eviction = config.eviction
    assert dms is None or dms.borrowed_weight == 0, "feed_token: a neuron is being faded out"
    is_adapter = eviction is not None and dms.source == "adapter"
    is_neuron = dms is not None and dms.source == "neuron"
    qk_norm = config.model_type == "qwen3"
    nothing = x  # in place of weights that there are not
    norms = (attention.q_norm.weight, attention.k_norm.weight) if qk_norm else (nothing, nothing)
    adapter = (nothing, nothing, None)
    if is_adapter:
        projection = attention.dms_proj_alpha
        adapter = (attention.dms_proj_alpha_norm.weight, projection.weight, projection.bias)
    bias = adapter[2]
    weights = (*norms, *adapter[:2], nothing if bias is None else bias)
    state = state_of(rows, pool)
    check_launch("feed_token", x, residual, cos, sin, *weights, new, *state)
    assert x.dtype == pool.keys.dtype, "feed_token: x and the pool differ in dtype"
    Hkv, D = config.num_key_value_heads, config.head_dim
    N = len(new)
    G = config.num_attention_heads // Hkv
    q = torch.empty(N, G, D, dtype=x.dtype, device=x.device)
    _feed[(N,)](
        x, q, residual, cos, sin, *weights, new, *state, config.rms_norm_eps,
        dms.scale if eviction else 1.0, dms.offset if eviction else 0.0, rows.table.stride(0),
        Hkv=Hkv, G=G, GROUP=triton.next_power_of_2(G), D=D, WIDTH=triton.next_power_of_2(D),
        C=config.hidden_size, PAGE=pool.keys.shape[1], W=rows.ring.shape[1],
        SHIFT=eviction.shift if eviction else 0, NORM=qk_norm, NEURON=is_neuron,
        ADAPTER=is_adapter, BIAS=bias is not None,
        PER_LAYER=eviction is not None and dms.per == "layer", EVICTS=eviction is not None,
        num_warps=4)
    return q
