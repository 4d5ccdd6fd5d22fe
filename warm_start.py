"""
The warm start: adapters by regression on what attention itself says. No step, nothing is
differentiated; some ten thousand tokens are enough.

What would a layer lose if the pair of token j were missing? Query i gives it the probability a, and
the output of its head is o. Without it the other pairs would share its probability, each would have
1 / (1 - a) times its own, and the output would be (o - a v_j) / (1 - a). So what the head adds to
the residual would change by exactly

    d = a / (1 - a) W_o (o - v_j)  =  a W_o (the output without it - v_j)

The need of a pair is what its KV head's query heads would lose together, as a share of the residual
x, on average over the queries of the document that would miss it:

    need_j = mean over i > j + window of  sum over heads of  |d|^2 / |x_i|^2

Such a share compares across heads and layers, so one threshold serves all of them. It is a squared
length. The logarithm of the length is what an adapter, which is linear, is fitted to:

    log(need_j) / 2  ~  W RMSNorm(x_{j + shift})      ridge regression, from sums alone
    z = -SHARPNESS W RMSNorm(x) - offset                       z > 0, evict, where need is low

The offset is settled afterwards (evaluate.py), for any compression ratio.
"""

import functools
import itertools

import torch
from tqdm import tqdm

from common import all_reduce, sharded_like, torchrun_place
from data import long_documents
from dms import attention

# logits for a nat of log(need) / 2; training's noise has a standard deviation of 1.8 logits
SHARPNESS = 4.0
RIDGE = 0.1  # what is added to the diagonal of the sums, as a share of its mean
FIRST = 30.0  # weight of a document's first token, the sink, which nearly all heads need


def small_output(output, kv_heads):
    """R (Hkv, G, D, D) for output matrices W_o (Hq, C, D): |R u| = |W_o u|. Only lengths matter
    here, and D is much less than C."""
    return torch.linalg.qr(output.float().unflatten(0, (kv_heads, -1)), mode="r").R


def needs(q, k, v, residual, R, window, block=128):
    """The need of every pair (Hkv, T) of one document; the last window + 1 have none.

    q: (Hq, T, D); k, v: (Hkv, T, D); residual: x (T, C); R: of small_output; all float32. It takes
    `block` queries at a time, so that T x T never exists.
    """
    Hkv, T, D = k.shape
    q = q.unflatten(0, (Hkv, -1))  # (Hkv, G, T, D)
    q = q * D**-0.5
    keys = k[:, None]
    v = v[:, None] @ R.mT  # (Hkv, G, T, D): its norm is that of what it would add to the residual
    squared_norm = residual.square().sum(-1, keepdim=True)  # (T, 1)
    position = torch.arange(T, device=q.device)
    total = k.new_zeros(Hkv, T)
    for query in position.split(block):
        age = query[:, None] - position  # (n, T)
        score = q[:, :, query] @ keys.mT  # (Hkv, G, n, T)
        score = score.masked_fill(age < 0, float("-inf"))
        a = score.softmax(-1)
        change = torch.cdist(a @ v, v)  # |o - v_j|
        change *= a / (1 - a)
        top, exact = change_of_likeliest(score, a, v)
        change.scatter_(-1, top, exact)
        share = change.square() / squared_norm[query]
        total += share.where(age > window, 0).sum((1, 2))
    return total / (T - 1 - window - position).clamp(min=1)  # the queries that would miss a pair


def change_of_likeliest(score, a, v):
    """(the number of each query's likeliest pair, its |d|), (Hkv, G, n, 1) each. If it has nearly
    all of the probability, 1 - a and o - v are mere rounding: so this computes d = a W_o (the
    output without it - v_j). score, a: (Hkv, G, n, T); v: (Hkv, G, T, D)."""
    largest, top = a.max(-1, keepdim=True)
    others = score.scatter(-1, top, -1e9)  # not -inf: the first query has no other pair
    without = others.softmax(-1) @ v  # (Hkv, G, n, D)
    difference = without - v.gather(2, top.expand_as(without))
    return top, largest * difference.norm(dim=-1, keepdim=True)


def warm_start(model, data, documents):
    """Fit a model's fresh adapters to the first `documents` documents of the training text that are
    long enough to reach the target. Processes share them, and end with the same weights."""
    settings = model.config.dms
    rank, world = torchrun_place()
    count = -(-documents // world)  # the same in each process, as sharding demands
    least = (settings.window + 1) * max(settings.target_cr, 2)  # 2: or log_needs has no pair
    mine = itertools.islice(long_documents(data, least), rank, count * world, world)

    def log_needs(*inputs):
        need = needs(*inputs, settings.window)
        if settings.per == "layer":  # one decision holds for all heads
            need = need.sum(0).expand_as(need)
        # The need of a pair near the end is a mean over few queries, so it says little. These are
        # the n pairs that at least a quarter of the document's queries would miss.
        n = need.shape[1] * 3 // 4 - settings.window
        need = need[:, :n] + 1e-24  # it may be 0
        return need.log().T / 2

    fit_adapters(model, tqdm(mine, "warm start", count, disable=rank > 0), log_needs)


@torch.no_grad()
def fit_adapters(model, documents, target):
    """Fit a model's fresh adapters to a target by ridge regression.

    documents: token ids (1, T). target(q, k, v, residual, R), with the arguments of `needs`, gives
    y (n, Hkv) for each document's first n pairs: a larger y speaks for keeping the pair.
    """
    config = model.config
    settings = config.dms
    layers = model.model.layers
    C = config.hidden_size
    Hkv = config.kv_heads
    # by layer the sum over tokens of x x^T (C, C), and beside it of x y (C, Hkv)
    sums = torch.zeros(len(layers), C, C + Hkv, device=model.device)
    # of the present layer: what its adapter gets (1, T, C), and what its norm makes of that. A hook
    # keeps them, since `attend` is not given them.
    of_adapter = {}

    @functools.cache  # since QR is slow on a GPU
    def small_output_of(layer):
        return small_output(layers[layer].self_attn.output_weight(), Hkv)

    def attend(layer, q, k, v, logits):
        inputs = (x[0].float() for x in (q, k, v, of_adapter["residual"]))
        y = target(*inputs, small_output_of(layer))
        x = of_adapter["normed"][0, settings.shift :][: len(y)]  # (n, C)
        both = torch.cat((x, y), dim=1)
        both[0] *= FIRST**0.5
        sums[layer] += both[:, :C].T @ both
        return attention(q, k, v)

    def note(norm, inputs, normed):
        of_adapter.update(residual=inputs[0], normed=normed)

    hooks = [block.self_attn.dms_proj_alpha_norm.register_forward_hook(note) for block in layers]
    for ids in documents:
        model.hidden(ids.to(model.device), attend)
    for hook in hooks:
        hook.remove()

    xx, xy = all_reduce(sums).split((C, Hkv), dim=2)
    squares = xx.diagonal(dim1=1, dim2=2)  # (L, C), a view of xx
    squares += RIDGE * squares.mean()
    settings.offset = 0.0
    for block, w in zip(layers, torch.linalg.solve(xx, xy)):  # (C, Hkv)
        weight = block.self_attn.dms_proj_alpha.weight
        weight.copy_(sharded_like(-SHARPNESS / settings.scale * w.T, weight))
