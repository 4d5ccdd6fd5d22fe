"""
The method: Dynamic Memory Sparsification (Lancucki, Staniszewski, Nawrot, Ponti; arXiv 2506.05345).

Every KV head decides, for every token, whether its key/value pair is kept for good or evicted once
it is more than `window` tokens old. One rule defines everything, and all other code is tested
against it:

    query i sees key j   iff   j <= i  and  (i - j <= window  or  not evict[j])

This file has the rule (visible) and the dense computation that it defines (masked_attention), the
decision and its two sources, the step from a dense model to a DMS model (start_retrofit), documents
packed into a sequence (Packing), the relaxed decision of training, the two losses and the schedule.
It knows nothing of files, pages or kernels.

Letters, the same in all files: B batch, T tokens, L layers, Hq query heads, Hkv KV heads,
G = Hq / Hkv query heads to a KV head, D head size, C hidden size, V vocabulary, w window.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class DMSConfig:
    """How a checkpoint decides. Every field belongs to the checkpoint; nothing is hard-wired."""

    window: int = 512  # a query always sees this many tokens behind it, and itself
    source: str = "adapter"  # "adapter" or "neuron": which gives the score s
    # The logit computed at token t decides the fate of token t - shift. NVIDIA's checkpoints mean 1
    # and do not state it: hence this default. Ours state it; retrofit.py's own default is 0.
    shift: int = 1
    scale: float = 100.0  # makes small scores decide, so that adapters can learn at a small rate
    offset: float = 5.0  # a score of 0, which a fresh adapter gives, means z = -5: keep
    per: str = "head"  # or "layer": head 0 decides for all heads of its layer
    tau: float = 0.1  # temperature of the relaxed decision, in training only
    target_cr: float = 8.0  # the compression it was trained for, which decoding does not read
    disable_eviction: bool = False  # then the model runs as a dense one
    # [ratio, offset] by rising ratio, see settle_offsets in evaluate.py
    offsets: list = field(default_factory=list)

    def logits(self, s):
        """The decision logits z = scale * s - offset. A pair is evicted where z > 0.

        s: (B, T, Hkv), any float dtype, from one of the two sources. Returns (B, Hkv, T) float32.
        """
        z = self.scale * s.float() - self.offset
        if self.per == "layer":
            z = z[..., :1].expand_as(z)
        return z.transpose(1, 2)


# ----------------------------------------------------------------------------------------- The rule


def visible(query, key, evict, window):
    """The visibility rule, elementwise with broadcasting.

    query, key: positions (integers); evict: bool, what was decided about the key. Returns bool.
    """
    return (key <= query) & ((query - key <= window) | ~evict)


UNDECIDED = -1e4  # a logit far below 0: kept, for certain


def by_subject(logits, shift):
    """Logits (..., T) in the order of the tokens that they are about. They come in the order of the
    tokens that computed them. With shift 1 nothing is said about the last token yet: it counts as
    kept, and every window holds it anyway."""
    return F.pad(logits[..., shift:], (0, shift), value=UNDECIDED)


def attention(q, k, v, mask=None):
    """Softmax attention, causal unless there is a mask: q (B, Hq, T, D), k and v (B, Hkv, S, D)."""
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)


def masked_attention(config):
    """The dense masked computation, the oracle of all tests: nothing is cached, all is masked.

    config: a ModelConfig. Returns attend(layer, q, k, v, logits) for Model.hidden.
    """
    def attend(layer, q, k, v, logits):
        if logits is None:
            return attention(q, k, v)
        evict = by_subject(logits, config.dms.shift) > 0  # (B, Hkv, T)
        evict = evict.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (B, Hq, T)
        t = torch.arange(q.shape[2], device=q.device)
        return attention(q, k, v, visible(t[:, None], t, evict[:, :, None], config.dms.window))

    return attend


# ---------------------------------------------------------------- The two sources of the decision


def add_adapter(module):
    """Give a layer's attention module the decision's own weights, which decide nothing yet (s = 0),
    in float32."""
    config = module.config
    C = config.hidden_size
    with module.o_proj.weight.device:
        # the names are NVIDIA's
        module.dms_proj_alpha_norm = torch.nn.RMSNorm(C, config.rms_norm_eps)
        module.dms_proj_alpha = torch.nn.Linear(C, config.kv_heads, bias=config.attention_bias)
    for parameter in module.dms_proj_alpha.parameters():
        torch.nn.init.zeros_(parameter)


def decide(module, residual, q=None):
    """The decision logits (B, Hkv, T) of a layer's attention module, None where nothing is evicted.

    residual: x (B, T, C), the residual stream before the layer's input norm. The adapter's score is
    s = RMSNorm_a(x) W_a^T, with weights of its own (NVIDIA's later recipe). q: (B, T, Hq, D), which
    only the borrowed neuron needs.
    """
    settings = module.config.eviction  # config.dms, unless eviction is switched off
    if settings is None:
        return None
    if settings.source == "neuron":
        s = borrowed_score(q, module.config.kv_heads)
    else:
        x = residual.to(module.dms_proj_alpha.weight.dtype)  # float32 while it is trained
        s = module.dms_proj_alpha(module.dms_proj_alpha_norm(x))
    return settings.logits(s)


def borrowed_score(q, kv_heads):
    """The borrowed neuron: the last channel of the first query head of each group (section 3.2).

    q: (B, T, Hq, D), after its norm and before RoPE. Returns s (B, T, Hkv), a view of q.
    """
    return q.unflatten(2, (kv_heads, -1))[:, :, :, 0, -1]  # of (B, T, Hkv, G, D)


def without_borrowed(q, config):
    """q (B, T, Hq, D) with any borrowed channels set to 0, so that they take no part in scores,
    whether something is evicted or not. config: a ModelConfig."""
    if config.dms is not None and config.dms.source == "neuron":
        q = q.clone()
        borrowed_score(q, config.kv_heads).zero_()
    return q


def start_retrofit(model, settings):
    """Turn a dense Model into a DMS model that evicts nothing yet, in place. Returns the model.

    settings: a DMSConfig. "adapter" adds fresh float32 adapters, which leave the model as it is.
    "neuron" takes the borrowed channels from it: its other weights have to learn to do without.
    """
    config = model.config
    config.dms = settings  # every block holds this same config
    for block in model.model.layers:
        if settings.source == "adapter":
            add_adapter(block.self_attn)
        else:  # silence what borrowed_score reads: s = 0 from now on
            for parameter in block.self_attn.q_proj.parameters():  # (Hq * D, C), perhaps (Hq * D)
                parameter.data.unflatten(0, (config.kv_heads, -1, config.head_dim))[:, 0, -1] = 0
    return model


# ------------------------------------------------------------- Training: documents in a sequence


class Packing:
    """Where each document lies in the packed sequences of a batch. Documents do not see one
    another, and positions begin at 0 in each. What follows a sequence's last one is padding.

    first: (B, T) int32, where the document of each token begins. It never falls along a sequence.
    Padding counts as one more document, which sees nothing but itself.
    end: (B, T) int32, one past the last token of the document of each token. In padding it is 0, so
    that nothing of padding counts in a loss.
    documents: an index for each, which selects its part (1, H, n, ...) of (B, H, T, ...).
    """

    def __init__(self, lengths_by_sequence, T, device):
        """lengths_by_sequence: of each sequence's documents, in order, T tokens at most in all."""
        self.token = torch.arange(T, device=device)
        self.first = torch.zeros(len(lengths_by_sequence), T, dtype=torch.int32, device=device)
        self.end = torch.zeros_like(self.first)
        self.documents = []
        for b, lengths in enumerate(lengths_by_sequence):
            begin = 0
            for length in lengths:
                end = begin + length
                self.first[b, begin:end] = begin
                self.end[b, begin:end] = end
                self.documents.append((slice(b, b + 1), slice(None), slice(begin, end)))
                begin = end
            self.first[b, begin:] = begin

    def precedes(self, count):
        """(B, T) bool: the tokens that at least `count` more tokens of their document follow. Where
        one follows, there is one to predict. Where window + 1 follow, a token has left the window
        when the document ends, and only there does a decision free memory."""
        return self.token < self.end - count


def document_attention(packing):
    """The teacher's attention: attend(layer, q, k, v, logits) for Model.hidden, causal within each
    document, whatever the logits say."""

    def attend(layer, q, k, v, logits):
        y = torch.zeros_like(q)
        for document in packing.documents:
            y[document] = attention(q[document], k[document], v[document])
        return y

    return attend


# --------------------------------------------------------- Training: relaxed decisions, section 3.3


# tokens: for longer sequences backward recomputes what would take too much memory to keep
RECOMPUTE_ABOVE = 2048


def computed(function, *inputs, recompute):
    """function(*inputs), in which nothing is random. recompute: only the inputs are kept for
    backward, where it is computed again."""
    if not recompute:
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def relaxed_attention(q, k, v, bias, first, window, block=128):
    """Attention under the rule with every decision relaxed to a bias on its key:

        score(i, j) = q_i k_j / sqrt(D)  +  (0 within the window, bias_j outside it)
                      -inf for j > i and for j < first_i, where the document of token i begins

    q: (B, Hq, T, D); k, v: (B, Hkv, T, D); bias: (B, Hkv, T) float32; first: (B, T) int32. Returns
    (B, Hq, T, D) in q's dtype; in between all is float32. Queries are taken `block` at a time. In
    a long sequence backward computes each block again, so that T x T numbers are never in memory at
    once. kernels/training.py computes the same on a GPU.
    """
    T, D = q.shape[2:]
    q_by_group = (q.float() * D**-0.5).unflatten(1, (k.shape[1], -1))  # (B, Hkv, G, T, D)
    k = k.float()
    v = v.float()

    def attend(start):  # what it needs only for a moment is free again when it returns
        begin = int(first[:, start].min())  # all keys before it are of earlier documents
        end = min(start + block, T)  # all keys from there on lie in the future
        query = torch.arange(start, end, device=q.device)[:, None]
        key = torch.arange(begin, end, device=q.device)  # S of them
        added = torch.where(query - key > window, bias[:, :, None, begin:end], 0)
        unseen = (key > query) | (key < first[:, start:end, None])  # (B, n, S)
        added = added.masked_fill(unseen[:, None], float("-inf"))  # (B, Hkv, n, S)
        q_block = q_by_group[:, :, :, start:end]
        score = torch.einsum("bhgid,bhjd->bhgij", q_block, k[:, :, begin:end]) + added[:, :, None]
        y = torch.einsum("bhgij,bhjd->bhgid", score.softmax(dim=-1), v[:, :, begin:end])
        return y.flatten(1, 2)  # (B, Hq, n, D)

    recompute = T > RECOMPUTE_ABOVE
    blocks = [computed(attend, start, recompute=recompute) for start in range(0, T, block)]
    return torch.cat(blocks, dim=2).to(q.dtype)


def straight_through(value, relaxed):
    """Something with this value and the gradient of `relaxed`."""
    return value + relaxed - relaxed.detach()


@dataclass
class RelaxedAttention:
    """attend() of training: every decision is a Gumbel-sigmoid sample in (0, 1).

        p = sigmoid((z + g1 - g2) / tau)                      g1, g2 standard Gumbel noise
        score(i, j) += 0 within the window,  log(1 - p[j]) outside it

    At p = 1 key j is gone outside the window, and gradients of the scores teach the decision.
    After a forward pass, evicted_pairs() is what the compression loss is about.
    """

    dms: DMSConfig
    packing: Packing
    biased_attention: Callable  # relaxed_attention, or the kernel that equals it
    seeds: list  # a string for each sequence, such as "0 17 3": run, step, sequence
    evicted_by_layer: list = field(default_factory=list)  # (Hkv,) pairs of this batch

    def __call__(self, layer, q, k, v, logits):
        """q (B, Hq, T, D); k, v (B, Hkv, T, D); logits (B, Hkv, T) float32 -> (B, Hq, T, D). Notes
        what this layer evicts, for evicted_pairs."""
        noisy = (logits + self.noise(layer, logits)) / self.dms.tau  # (z + g1 - g2) / tau
        noisy = by_subject(noisy, self.dms.shift)
        self.evicted_by_layer.append(self.count_evicted(noisy))
        bias = F.logsigmoid(-noisy)  # log(1 - p), (B, Hkv, T)
        return self.biased_attention(q, k, v, bias, self.packing.first, self.dms.window)

    def noise(self, layer, logits):
        """g1 - g2, a standard logistic, which is the logit of a uniform sample. It follows from a
        sequence's seed and the layer alone: so a step's sequences may be computed side by side, one
        by one, or by several processes."""
        generator = torch.Generator(logits.device)
        # Not empty_like: numbers are generated in the order of memory, and logits may be strided.
        # The same seed would then give other noise.
        uniform = torch.empty(logits.shape, device=logits.device)
        for sequence, seed in zip(uniform, self.seeds):
            generator.manual_seed(zlib.crc32(f"{seed} {layer}".encode()))
            sequence.uniform_(generator=generator)
        if self.dms.per == "layer":  # one decision holds for all heads
            uniform = uniform[:, :1].expand_as(uniform)
        uniform = uniform.clamp(1e-6, 1 - 1e-6)
        return torch.log(uniform) - torch.log1p(-uniform)

    def count_evicted(self, noisy):
        """How many pairs of each head a cache no longer holds when their documents end, (Hkv,).
        The value is that of hard decisions, the gradient that of p."""
        hard = straight_through((noisy > 0).float(), torch.sigmoid(noisy))
        expires = self.packing.precedes(self.dms.window + 1)  # (B, T)
        return (hard * expires[:, None]).sum((0, 2))  # of (B, Hkv, T)

    def evicted_pairs(self):
        """Pairs evicted in this batch, the mean over layers and heads, a scalar with a gradient.
        compression_loss takes their share of the tokens."""
        return torch.stack(self.evicted_by_layer).mean()


# ---------------------------------------------------------------------- Training: losses, schedule

KL_SLICE = 1024  # tokens whose logits over the vocabulary exist at a time


def distillation_loss(student, teacher, student_head, teacher_head, counts, reverse=False):
    """KL between the next-token distributions, the sum over the tokens that count, float32.

    student, teacher: final hidden states (B, T, C); *_head: output weights (V, C); counts: (B, T)
    bool. Forward KL, the default, is weighted by the teacher's probabilities (the paper), reverse
    KL by the student's (NVIDIA's code).

    Logits of 150,000 words by 32,768 tokens take 20 GB, so they exist for KL_SLICE tokens at a
    time, and again in backward.
    """
    slices = (x.flatten(0, 1).split(KL_SLICE) for x in (student, teacher, counts))
    is_long = counts.numel() > KL_SLICE
    return sum(computed(slice_kl, *inputs, student_head, teacher_head, reverse, recompute=is_long)
               for inputs in zip(*slices))


def slice_kl(student, teacher, counts, student_head, teacher_head, reverse):
    """The same for one slice: student, teacher (n, C), counts (n,). Tokens that do not count are
    computed, too: to leave them out, the CPU would have to wait for the GPU to know the shapes."""
    log_p = F.linear(teacher, teacher_head).float().log_softmax(-1)
    log_q = F.linear(student, student_head).float().log_softmax(-1)
    if reverse:  # then p is the student's
        log_p, log_q = log_q, log_p
    nats = F.kl_div(log_q, log_p, log_target=True, reduction="none")  # p (log p - log q)
    return (nats.sum(-1) * counts).sum()


def compression_loss(evicted_fraction, cr):
    """max(1 - 1/CR - evicted fraction, 0).

    One-sided: nothing pushes decisions back once the target is met. The fraction is counted as the
    cache counts it: a pair that is evicted but still in the window is still held.
    """
    return (1 - 1 / cr - evicted_fraction).clamp(min=0)


def scheduled_cr(step, steps, target_cr):
    """The compression ratio asked for at a step: from 1 to target_cr, linear over the first 70% of
    the steps, then constant. 1,000 steps to 8x give the paper's +1 every 100 steps."""
    return 1 + (target_cr - 1) * min(1.0, step / (0.7 * steps))
