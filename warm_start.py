"""
The warm start: adapters by regression on what attention itself says. No step, nothing is
differentiated; some ten thousand tokens are enough.

What would a layer lose if the pair of token j were missing? Query i gives it the probability a, and
the output of its head is o. Without it the other pairs would share its probability, each would have
1 / (1 - a) times its own, and the output would be (o - a v_j) / (1 - a). So what the head adds to
the residual would change by exactly

    d = a / (1 - a) W_o (o - v_j)

The need of a pair is the sum over the query heads of its KV head of |d|^2 / |x|^2, where x is the
residual: the mean over all queries i > j + window of its document, which are those that would miss
it. As a share of the residual it compares across heads and layers, so one threshold serves all of
them. An adapter's score is linear in what it sees of a token, hence

    log(need_j) / 2  ~  W RMSNorm(x_{j + shift})      ridge regression, from sums alone
    z = -SHARPNESS W RMSNorm(x) - offset                       z > 0, evict, where need is low

The offset is settled afterwards (evaluate.py), for any compression ratio.
"""

import itertools

import torch
from tqdm import tqdm

from common import all_reduce, sharded_like, torchrun_place
from data import split_documents
from dms import attention

SHARPNESS = 4.0  # logits to a nat of log(need) / 2: far above the noise of training
RIDGE = 0.1  # of a feature's variance
FIRST = 30.0  # weight of a document's first token, the sink, which nearly all heads need


def small_output(o_proj, kv_heads, head_dim):
    """R (Hkv, G, D, D) for o_proj's weight W_o (C, Hq * D): |R u| = |W_o u|."""
    W = o_proj.float().unflatten(1, (kv_heads, -1, head_dim))  # (C, Hkv, G, D)
    return torch.linalg.qr(W.permute(1, 2, 0, 3), mode="r").R


def needs(q, k, v, residual, R, window, block=128):
    """The need of every pair (Hkv, T) of one document; the last window + 1 have none.

    q: (Hq, T, D); k, v: (Hkv, T, D); residual: x (T, C); R: of small_output; all float32. It takes
    `block` queries at a time, so that T x T never exists.
    """
    Hkv, T, D = k.shape
    q = q.unflatten(0, (Hkv, -1)) * D**-0.5  # (Hkv, G, T, D)
    v = v[:, None] @ R.mT  # (Hkv, G, T, D), as long as what it would add to the residual
    position = torch.arange(T, device=q.device)
    total = torch.zeros(Hkv, T, device=q.device)
    for query in position.split(block):
        age = query[:, None] - position  # (n, T)
        score = q[:, :, query] @ k[:, None].mT  # (Hkv, G, n, T)
        score = score.masked_fill(age < 0, float("-inf"))
        a = score.softmax(-1)
        change = a / (1 - a) * torch.cdist(a @ v, v)
        # One pair of a query may have nearly all: then 1 - a and o - v are mere rounding. So the
        # output without it is computed as it stands: d = a W_o (that output - v).
        largest, top = a.max(-1, keepdim=True)  # (Hkv, G, n, 1)
        without = score.scatter(-1, top, -1e9).softmax(-1) @ v
        difference = without - v.gather(2, top.expand_as(without))
        change = change.scatter(-1, top, largest * difference.norm(dim=-1, keepdim=True))
        share = change.square() / residual[query].square().sum(-1, keepdim=True)
        total += share.where(age > window, 0).sum((1, 2))
    queries = T - 1 - window - position  # that would miss a pair
    return total / queries.clamp(min=1)


@torch.no_grad()
def warm_start(model, data, documents):
    """Fit a model's fresh adapters to the first `documents` documents of the training text that are
    long enough to reach the target. Processes share them, and end with the same weights."""
    settings = model.config.dms
    layers = model.model.layers
    rank, world = torchrun_place()
    total = -(-documents // world) * world  # the same number in each process, as sharding demands
    least = (settings.window + 1) * max(settings.target_cr, 2)
    every = (ids for batch in data.batches(0) for ids in split_documents(*batch))
    mine = itertools.islice((x for x in every if x.shape[1] >= least), rank, total, world)

    L, C, H = len(layers), model.config.hidden_size, model.config.num_key_value_heads
    xx = torch.zeros(L, C, C, device=model.device)  # the sum of x x^T over tokens
    xy = torch.zeros(L, C, H, device=model.device)  # and of x y
    outputs = {}  # layer: small_output, which is slow on a GPU
    seen = {}  # what a layer's adapter gets (1, T, C), and what its norm makes of it

    def attend(layer, q, k, v, logits):
        if layer not in outputs:
            outputs[layer] = small_output(layers[layer].self_attn.o_proj.weight, *k.shape[1::2])
        inputs = (x[0].float() for x in (q, k, v, seen["residual"]))
        need = needs(*inputs, outputs[layer], settings.window)
        if settings.per == "layer":  # one decision holds for all heads
            need = need.sum(0).expand_as(need)
        # what less than a quarter of the document could miss says little
        count = q.shape[2] * 3 // 4 - settings.window
        y = need[:, :count].clamp(min=1e-24).log().T / 2  # (count, Hkv)
        x = seen["normed"][0, settings.shift :][:count]  # (count, C)
        weighted = x.clone()
        weighted[0] *= FIRST
        xx[layer] += weighted.T @ x
        xy[layer] += weighted.T @ y
        return attention(q, k, v)

    note = lambda norm, inputs, normed: seen.update(residual=inputs[0], normed=normed)
    hooks = [x.self_attn.dms_proj_alpha_norm.register_forward_hook(note) for x in layers]
    for ids in tqdm(mine, "warm start", total // world, disable=rank > 0):
        model.hidden(ids.to(model.device), attend)
    for hook in hooks:
        hook.remove()

    all_reduce(xx)
    all_reduce(xy)
    variance = xx.diagonal(dim1=1, dim2=2).mean()
    ridge = RIDGE * variance * torch.eye(C, device=model.device)
    W = torch.linalg.solve(xx + ridge, xy)  # (L, C, Hkv)
    settings.offset = 0.0
    for block, w in zip(layers, W):
        weight = block.self_attn.dms_proj_alpha.weight
        weight.copy_(sharded_like(-SHARPNESS / settings.scale * w.T, weight))
