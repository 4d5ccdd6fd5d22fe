"""
The method: Dynamic Memory Sparsification (Lancucki, Staniszewski, Nawrot, Ponti; arXiv 2506.05345).

Every KV head decides for every token whether its key/value pair is kept for good, or evicted once
it is more than `window` tokens old. One rule, which everything else in this repository is tested
against:

    query i sees key j   iff   j <= i  and  (i - j <= window  or  not evict[j])

Here: the rule (visible) and the dense computation that it defines (masked_attention), the decision
and its two sources, the relaxed decision of training, the two losses, the schedule, and how a dense
model becomes a DMS model (start_retrofit). Nothing of files, pages, kernels or devices.

Letters, the same in all files: B batch, T tokens, L layers, Hq query heads, Hkv KV heads (H where
there is no other), G = Hq / Hkv query heads to a KV head, D head size, C hidden size, V vocabulary.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


KEEP = -1e4  # a logit that no noise turns into an eviction
KL_SLICE = 1024  # tokens whose logits exist at a time


@dataclass
class DMSConfig:
    """How a checkpoint decides. All but the last belongs to the checkpoint; nothing is hard-wired."""

    window: int = 512  # tokens behind the query that it always sees, besides its own
    source: str = "adapter"  # of the score s: adapter_score, or "neuron": borrowed_score
    shift: int = 1  # the logit computed at token t decides the fate of token t - shift (0 or 1)
    scale: float = 100.0  # makes small scores decide: lets an adapter learn at a small rate
    offset: float = 5.0  # a score of 0, a fresh adapter's, gives z = -5: keep
    per: str = "head"  # or "layer": head 0 decides for all heads of its layer
    tau: float = 0.1  # temperature of the relaxed decision, training only
    target_cr: float = 8.0  # what it was trained for; documentation only
    disable_eviction: bool = False
    borrowed_weight: float = 0.0  # of borrowed channels in the scores, while training fades them out

    def logits(self, s):
        """The decision logits z = scale * s - offset: a pair is evicted where z > 0.

        s: (B, T, Hkv), any float dtype, from one of the two sources. Returns (B, Hkv, T) float32.
        """
        z = self.scale * s.float() - self.offset
        if self.per == "layer":
            z = z[..., :1].expand_as(z)
        if self.borrowed_weight > 0:  # a neuron that is being faded out decides nothing yet
            z = torch.full_like(z, KEEP)
        return z.transpose(1, 2)


# ------------------------------------------------------------------------------------------- The rule


def visible(query, key, evict, window):
    """The visibility rule, elementwise with broadcasting.

    query, key: positions (integers); evict: bool, what was decided about the key. Returns bool.
    """
    in_window = query - key <= window
    return (key <= query) & (in_window | ~evict)


def decisions(logits, shift):
    """Turn logits by the token that computed them into decisions by the token they are about.

    logits: (B, Hkv, T). Returns evict (B, Hkv, T) bool. With shift 1 nothing has decided about the
    last token yet: it counts as kept, and every window holds it anyway.
    """
    evict = logits > 0
    if shift == 0:
        return evict
    return F.pad(evict[..., 1:], (0, 1), value=False)


def masked_attention(config):
    """The dense masked computation, the oracle of all tests: nothing is cached, all is masked.

    Returns attend(layer, q, k, v, logits) for Model.hidden.
    """
    group = config.num_attention_heads // config.num_key_value_heads

    def attend(layer, q, k, v, logits):
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))  # (B, Hkv, ...) -> (B, Hq, ...)
        if logits is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        t = torch.arange(q.shape[2], device=q.device)
        evicted = decisions(logits, config.dms.shift)[:, :, None, :]  # (B, Hkv, 1, T)
        mask = visible(t[:, None], t, evicted, config.dms.window)  # (B, Hkv, T, T)
        mask = mask.repeat_interleave(group, dim=1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return attend


# ---------------------------------------------------------------- The two sources of the decision


def adapter_score(residual, norm, projection):
    """The adapter: s = RMSNorm_a(x) W_a^T, with weights of its own (NVIDIA's later recipe).

    residual: x, the residual stream before the layer's input norm, (B, T, C). Returns (B, T, Hkv).
    """
    residual = residual.to(projection.weight.dtype)  # float32 while it is trained
    return projection(norm(residual))


def borrowed_score(q, kv_heads):
    """The borrowed neuron: the last channel of the first query head of each group (section 3.2).

    q: (B, T, Hq, D), after its norm and before RoPE. Returns s (B, T, Hkv).
    """
    by_group = q.unflatten(2, (kv_heads, -1))  # (B, T, Hkv, G, D)
    return by_group[:, :, :, 0, -1]


def silence_borrowed(q, kv_heads, weight=0.0):
    """q (B, T, Hq, D) with the borrowed channels set to 0, so that they take no part in scores.
    weight: by what they are multiplied while they are faded out; model.py does so up to three times,
    where at last each of them is 0."""
    group = q.shape[2] // kv_heads
    borrowed = torch.zeros(q.shape[2:], dtype=torch.bool, device=q.device)  # (Hq, D)
    borrowed[::group, -1] = True
    return q.masked_fill(borrowed, 0) if weight == 0 else torch.where(borrowed, weight * q, q)


# --------------------------------------------------------------------------- Training, section 3.3


@dataclass
class Packing:
    """Where the documents lie that a batch's rows are packed with. None sees another, and the
    positions of each begin at 0. What lies behind a row's last document is padding."""

    first: torch.Tensor  # (B, T) int32: where the document of each token begins in its row
    end: torch.Tensor  # (B, T) int32: and where the next one does; 0 for padding

    @classmethod
    def of(cls, documents, T, device):
        """documents: of each row the lengths of its documents, in order, T tokens at most."""
        first = torch.zeros(len(documents), T, dtype=torch.int32)
        end = torch.zeros(len(documents), T, dtype=torch.int32)
        for row, lengths in enumerate(documents):
            begin = 0
            for length in lengths:
                end[row, begin : begin + length] = begin + length
                first[row, begin:] = begin
                begin += length
            first[row, begin:] = begin  # padding sees itself: a softmax over nothing would be NaN
        return cls(first.to(device), end.to(device))

    def token(self):
        return torch.arange(self.end.shape[1], device=self.end.device)  # (T,)

    def predicts(self):
        """(B, T) bool: the tokens with a next token in their document."""
        return self.token() < self.end - 1


def document_attention(documents):
    """The teacher's pass: attend(layer, q, k, v, logits) for Model.hidden, causal attention within
    each document, whatever the logits say. documents: as for Packing.of."""

    def attend(layer, q, k, v, logits):
        y = torch.zeros_like(q)
        for row, lengths in enumerate(documents):
            begin = 0
            for length in lengths:
                one = (slice(row, row + 1), slice(None), slice(begin, begin + length))
                y[one] = F.scaled_dot_product_attention(
                    q[one], k[one], v[one], is_causal=True, enable_gqa=True)
                begin += length
        return y

    return attend


@dataclass
class RelaxedAttention:
    """attend() for training: every decision is replaced by a Gumbel-sigmoid sample in (0, 1).

        p = sigmoid((z + g1 - g2) / tau)                      g1, g2 standard Gumbel noise
        score(i, j) += 0 within the window,  log(1 - p[j]) outside it,  -inf for j > i

    So at p = 1 key j is gone outside the window, and gradients of the scores teach the decision.
    After a forward pass pairs_let_go() is what the compression loss is about.
    """

    dms: DMSConfig
    packing: Packing
    biased_attention: Callable  # (q, k, v, bias, first, window): kernels/training_attention.py
    seeds: list | None  # a text for each row, of which its noise is; None: no noise, the hard rule

    def __post_init__(self):
        self.let_go_by_layer = {}  # layer -> (Hkv,): how many of this batch's pairs

    def __call__(self, layer, q, k, v, logits):
        """q (B, Hq, T, D); k, v (B, Hkv, T, D); logits (B, Hkv, T) float32 -> (B, Hq, T, D)."""
        noisy = self.noisy_decisions(layer, logits)
        self.let_go_by_layer[layer] = self.count_let_go(noisy)
        bias = F.logsigmoid(-noisy)  # log(1 - p), (B, Hkv, T)
        return self.biased_attention(q, k, v, bias, self.packing.first, self.dms.window)

    def noisy_decisions(self, layer, logits):
        """(z + g1 - g2) / tau of the token that each decision is about, (B, Hkv, T)."""
        if self.seeds is None:
            noisy = logits * 1e6  # so large that the sigmoid is a step
        else:
            noisy = (logits + self.noise(layer, logits)) / self.dms.tau
        if self.dms.shift == 0:
            return noisy
        return F.pad(noisy[..., 1:], (0, 1), value=KEEP)  # the last is not decided yet

    def noise(self, layer, logits):
        """g1 - g2, which is logistic. It follows from a row's seed and the layer alone, so that the
        rows of a batch may be computed side by side, one by one, or by several processes."""
        generator = torch.Generator(logits.device)
        # contiguous, as logits need not be: numbers are drawn in the order of memory
        uniform = torch.empty(logits.shape, device=logits.device)
        for row, seed in zip(uniform, self.seeds):
            # 32 bits: a CPU's generator looks at no more
            digest = hashlib.blake2b(f"{seed} {layer}".encode(), digest_size=4).hexdigest()
            row.uniform_(generator=generator.manual_seed(int(digest, 16)))
        if self.dms.per == "layer":  # one decision holds for all heads
            uniform = uniform[:, :1].expand_as(uniform)
        uniform = uniform.clamp(1e-6, 1 - 1e-6)
        return torch.log(uniform) - torch.log1p(-uniform)

    def count_let_go(self, noisy):
        """How many of each head's pairs a cache would not hold any more, (Hkv,): evicted and out of
        the window when their document ends. Straight through: the value is that of hard decisions,
        the gradient that of p."""
        p = torch.sigmoid(noisy)
        hard = (noisy > 0).float() + p - p.detach()
        # the document's last token, end - 1, does not see them any more
        is_out = self.packing.token() < self.packing.end - 1 - self.dms.window  # (B, T)
        return (hard * is_out[:, None]).sum((0, 2))

    def pairs_let_go(self):
        """The mean over layers and heads, a scalar with a gradient."""
        return torch.stack([heads.mean() for heads in self.let_go_by_layer.values()]).mean()


def compression_loss(fraction_let_go, cr):
    """max(1 - 1/CR - fraction let go, 0).

    One-sided: nothing pushes decisions back once the target is met. The fraction is counted as the
    cache counts it: a pair that is flagged but still in the window is still held.
    """
    return (1 - 1 / cr - fraction_let_go).clamp(min=0)


def scheduled_cr(step, steps, target_cr):
    """The compression ratio asked for at a step: from 1 to target_cr, linear over the first 70 % of
    the steps, then constant. 1,000 steps to 8x give the paper's +1 every 100 steps."""
    return 1 + (target_cr - 1) * min(1.0, max(step, 0) / max(0.7 * steps, 1))


def distillation_loss(
    student, teacher, student_head, teacher_head, keep, reverse=False, slice_size=KL_SLICE
):
    """KL between next-token distributions, the sum over the tokens kept, a float32 scalar.

    student, teacher: final hidden states (B, T, C); *_head: output weights (V, C); keep: (B, T)
    bool, the tokens that count. Forward KL, the default, is weighted by the teacher's probabilities
    (the paper), reverse KL by the student's (NVIDIA's code). The logits of V words exist for
    slice_size tokens at a time.
    """
    by_token = (x.flatten(0, 1) for x in (student, teacher, keep))
    given = (*by_token, student_head, teacher_head, reverse, slice_size)
    if torch.is_grad_enabled():
        return SlicedKL.apply(*given)
    return sum(slice_kl(*some) for some in slices(*given))


def slices(student, teacher, keep, student_head, teacher_head, reverse, slice_size):
    """The arguments of slice_kl, one slice of the tokens after another."""
    parts = (x.split(slice_size) for x in (student, teacher, keep))
    for some in zip(*parts):
        yield *some, student_head, teacher_head, reverse


def slice_kl(student, teacher, keep, student_head, teacher_head, reverse):
    """The sum over those of a slice's n tokens that are kept; student, teacher: (n, C). The others
    are computed, too: so shapes are always the same, which libraries like, and nothing waits."""
    log_p = F.log_softmax(F.linear(teacher, teacher_head).float(), dim=-1)
    log_q = F.log_softmax(F.linear(student, student_head).float(), dim=-1)
    if reverse:
        log_p, log_q = log_q, log_p
    nats = F.kl_div(log_q, log_p, log_target=True, reduction="none")  # p (log p - log q)
    return (nats.sum(-1) * keep).sum()


class SlicedKL(torch.autograd.Function):
    """The sum of slice_kl. Gradients are computed on the way forward, while the logits of a slice
    are there: these are neither kept for backward nor computed again there."""

    @staticmethod
    def forward(ctx, student, teacher, keep, student_head, *more):
        inputs = [student.detach().requires_grad_(), student_head.detach()]
        inputs[1].requires_grad_(student_head.requires_grad)
        trained = [x for x in inputs if x.requires_grad]
        gradients = [torch.zeros_like(x) for x in trained]
        total = torch.zeros((), device=student.device)
        with torch.enable_grad():
            for some in slices(inputs[0], teacher, keep, inputs[1], *more):
                kl = slice_kl(*some)
                for gradient, part in zip(gradients, torch.autograd.grad(kl, trained)):
                    gradient += part
                total += kl.detach()
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx, gradient):
        of_student, *of_head = (gradient * x for x in ctx.saved_tensors)  # of a frozen head: none
        # of student, teacher, keep, student_head, teacher_head, reverse, slice_size
        return of_student, None, None, *(of_head or [None]), None, None, None


def start_retrofit(model, settings):
    """Turn a dense Model into a DMS model that evicts nothing yet, in place. Returns the model.

    settings: a DMSConfig. "adapter" adds fresh float32 adapters, which leave the model as it is.
    "neuron" takes the borrowed channels from it: its other weights have to learn to do without.
    With settings.borrowed_weight = 1 they still count, to be faded out first (section 3.2).
    """
    model.config.dms = settings
    if settings.source == "adapter":
        for block in model.model.layers:
            block.self_attn.add_adapter()
    elif settings.borrowed_weight == 0:
        clear_borrowed(model)
    return model


def clear_borrowed(model):
    """Set the weights of the borrowed channels to 0, so that they decide nothing yet (s = 0).
    Returns these parameters."""
    config = model.config
    heads = (config.num_key_value_heads, -1, config.head_dim)
    changed = [p for block in model.model.layers for p in block.self_attn.q_proj.parameters()]
    for parameter in changed:  # (Hq * D, C), perhaps bias (Hq * D)
        by_group = parameter.data.unflatten(0, heads)  # (Hkv, G, D, ...), a view
        by_group[:, 0, -1] = 0
    return changed
