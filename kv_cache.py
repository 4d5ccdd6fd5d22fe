"""
The KV cache: pages, slots and the ring.

Every (sequence, KV head) of every layer holds its own number of key/value pairs, in pages of `page_size` slots from
its layer's pool. Attention does not care in which order keys are stored, since RoPE is already inside them. Hence:

    when token t arrives, token j = t - (window + 1) leaves the window
        evict[j]   ->  t is written over j's slot     (length unchanged)
        otherwise  ->  t is appended                  (length + 1)

A ring of `window + 1` entries per (sequence, KV head) holds each recent token's slot and decision: entry
j mod (window + 1) is j's. Nothing is ever moved. Many tokens at once (a prompt, a chat turn) are the same rule over a
block: as many of the block's survivors as there are freed slots go there, the rest is appended. There is no prefill or
decode mode; a dense model is the same cache with nothing evicted.

This file knows nothing of training, of tokenizers, or of how a decision was made: it is told evict or keep.

Letters: N = B * Hkv rows of a layer, row b * Hkv + h being sequence b's KV head h; P pages of a layer's pool; S slots
in use; n new tokens.
"""
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from dms import InputError, visible


def paged_attention(q, k_pages, v_pages, owner, fill):
    """One query token per row against all of the row's pages, wherever they lie in the pool.

    q (N, G, D); k_pages, v_pages (P, page_size, D); owner (P,) int64, the row that page p belongs to; fill (P,) int64,
    how many of its slots are in use, 0 for a free page. -> (N, G, D).
    Each page is multiplied as it lies, without a copy; softmax pieces of a row's pages are merged by their maxima.
    """
    scores = torch.bmm(k_pages, q[owner].transpose(1, 2)).float() * q.shape[-1] ** -0.5  # (P, page_size, G)
    slot = torch.arange(k_pages.shape[1], device=q.device)
    scores.masked_fill_((slot[None, :] >= fill[:, None])[:, :, None], float("-inf"))
    index = owner[:, None].expand(-1, q.shape[1])  # (P, G)
    top = scores.new_full(q.shape[:2], -1e30).scatter_reduce(0, index, scores.amax(1), "amax")  # (N, G)
    weight = torch.exp(scores - top[owner][:, None, :])  # (P, page_size, G)
    total = torch.zeros_like(top).index_add_(0, owner, weight.sum(1))
    out = torch.bmm(weight.transpose(1, 2).to(v_pages.dtype), v_pages).float()  # (P, G, D)
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device).index_add_(0, owner, out)
    return (out / total.clamp(min=1e-30)[:, :, None]).to(q.dtype)


class KVCache:
    """Per-head paged cache of a batch of sequences of different lengths.

        cache = KVCache(model.config, batch_size=B)
        model(ids, cache=cache)                    # appends T tokens to every sequence, 1 or thousands
        model(ids, cache=cache, lengths=lengths)   # ragged: row b brings lengths[b] <= T tokens
        cache.select([0, 0, 0]); cache.release([1]); cache.stats()

    page_size: slots of a page. chunk: the most tokens a sequence computes at a time; longer inputs are cut.
    max_pages: a limit on the pages of all layers together; None lets the pools grow as needed.
    """

    def __init__(self, config, batch_size, device="cpu", dtype=torch.float32, page_size=32, chunk=512, max_pages=None):
        if batch_size < 1 or page_size < 1 or chunk < 1:
            raise InputError("a cache needs batch_size, page_size and chunk of at least 1")
        self.layers, self.kv_heads = config.num_hidden_layers, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.window = config.eviction.window if config.eviction else 0
        self.shift = config.eviction.shift if config.eviction else 0
        self.device, self.dtype = torch.device(device), dtype
        self.page_size, self.chunk, self.max_pages = page_size, chunk, max_pages
        L, N = self.layers, batch_size * self.kv_heads

        def state(*shape, fill=0, dtype=torch.int64):
            return torch.full(shape, fill, dtype=dtype, device=self.device)

        self.seen = state(batch_size)  # tokens that each sequence has fed
        self.length = state(L, N)  # pairs that each row holds
        self.ring_slot = state(L, N, self.window + 1)
        self.ring_evict = state(L, N, self.window + 1, dtype=torch.bool)
        self.pages = state(L, N)  # pages that each row owns
        self.table = [state(N, 0) for _ in range(L)]  # (N, most pages of a row): the row's pages in order
        self.owner = [state(0) for _ in range(L)]  # (P,): the row that owns the page, -1 where free
        self.ordinal = [state(0) for _ in range(L)]  # (P,): which of its row's pages this is
        self.used = [0] * L  # no page of the pool from this one on is owned
        self.k_pages = [torch.empty(0, page_size, self.head_dim, dtype=dtype, device=self.device) for _ in range(L)]
        self.v_pages = [torch.empty_like(k) for k in self.k_pages]
        self.reads = state(L, self.kv_heads)
        self.peak = self.ended_tokens = self.ended_pairs = 0

    @property
    def batch_size(self):
        return len(self.seen)

    # ------------------------------------------------------------------------------------------------ feeding tokens

    def check_lengths(self, T, lengths):
        """lengths as (B,) int64 on the cache's device, all T if None. Raises InputError if they do not fit."""
        if lengths is None:
            lengths = torch.full((self.batch_size,), T)
        lengths = torch.as_tensor(lengths, dtype=torch.int64, device=self.device)
        if lengths.shape != self.seen.shape or bool((lengths < 0).any()) or bool((lengths > T).any()):
            raise InputError(f"lengths must be {self.batch_size} numbers from 0 to {T}, one per sequence of the cache")
        return lengths

    @contextmanager
    def append(self, lengths):
        """Within it, attend(layer, q, k, v, logits) takes every layer's new tokens once; see Model.hidden for the
        shapes. lengths (B,) int64: how many of them are real. The sequences count as longer when it ends."""
        def attend(layer, q, k, v, logits):
            y = self._append(layer, q, k, v, logits, lengths)
            return y if torch.is_inference_mode_enabled() else y.clone()  # a clone may be part of a gradient graph

        yield attend
        self.seen = self.seen + lengths
        self.peak = max(self.peak, int(self.length.sum()))

    @torch.inference_mode()
    def _append(self, layer, q, k, v, logits, lengths):
        B, H, T, D = k.shape
        k, v = k.reshape(B * H, T, D), v.reshape(B * H, T, D)
        evict = torch.zeros(B * H, T, dtype=torch.bool, device=k.device)
        if logits is not None:
            evict = self._decide(layer, (logits > 0).reshape(B * H, T), lengths)
        if T == 1:
            self._write(layer, k, v, evict, lengths)
            self.reads[layer] += (self.length[layer].view(B, H) * (lengths > 0)[:, None]).sum(0)
            y = self._attend_one(layer, q.reshape(B * H, -1, D))
        else:
            y = self._attend_block(layer, q.reshape(B * H, -1, T, D), k, v, evict, lengths)
            self._write(layer, k, v, evict, lengths)
        return y.reshape(q.shape)

    def _rows(self, per_sequence):
        """(B, ...) -> (N, ...), each sequence's value for each of its rows."""
        return per_sequence.repeat_interleave(self.kv_heads, dim=0)

    def _decide(self, layer, evict, lengths):
        """What was decided at each new token -> what is decided about it (N, n). With shift 1 the first decision is
        about the last token of the ring, and the last new token is not decided yet."""
        t = torch.arange(evict.shape[1], device=self.device)
        n, seen = self._rows(lengths)[:, None], self._rows(self.seen)[:, None]
        if self.shift:
            last = (seen - 1) % (self.window + 1)
            ring = self.ring_evict[layer]
            ring.scatter_(1, last, torch.where((n > 0) & (seen > 0), evict[:, :1], ring.gather(1, last)))
            evict = F.pad(evict[:, 1:], (0, 1))
        return evict & (t < n - self.shift)

    def _attend_one(self, layer, q):
        """q (N, G, D), its own pair already written -> (N, G, D)."""
        P = self.used[layer]
        owner = self.owner[layer][:P]
        fill = (self.length[layer][owner] - self.ordinal[layer][:P] * self.page_size).clamp(0, self.page_size)
        fill = torch.where(owner >= 0, fill, 0)
        return paged_attention(q, self.k_pages[layer][:P], self.v_pages[layer][:P], owner.clamp(min=0), fill)

    def _attend_block(self, layer, q, k, v, evict, lengths):
        """q (N, G, T, D), k, v (N, T, D), evict (N, T), nothing of it written yet -> (N, G, T, D). A row's queries see
        its slots, of which those in the ring may expire on the way, and the new tokens themselves."""
        T, W = q.shape[2], self.window + 1
        out = torch.zeros_like(q)
        new = torch.arange(T, device=self.device)
        for row in range(len(q)):
            n, seen, S = (int(x[i]) for x, i in ((lengths, row // self.kv_heads), (self.seen, row // self.kv_heads),
                                                 (self.length[layer], row)))
            if n == 0:
                continue
            self.reads[layer, row % self.kv_heads] += S + n
            if S == 0 and not evict[row].any():
                out[row, :, :n] = F.scaled_dot_product_attention(
                    q[row, None, :, :n], *(x[row, None, None, :n].expand(-1, q.shape[1], -1, -1) for x in (k, v)),
                    is_causal=True)
                continue
            position = torch.zeros(S + n, dtype=torch.int64, device=self.device)  # of a key; 0 serves for kept ones
            flag = torch.zeros(S + n, dtype=torch.bool, device=self.device)
            recent = torch.arange(max(seen - W, 0), seen, device=self.device)
            slot = self.ring_slot[layer, row, recent % W]
            position[slot], flag[slot] = recent, self.ring_evict[layer, row, recent % W]
            position[S:], flag[S:] = seen + new[:n], evict[row, :n]
            mask = visible(seen + new[:n, None], position, flag, self.window)  # (n, S + n)
            pages = self.table[layer][row, :-(-S // self.page_size)]
            keys, values = (torch.cat((p[layer][pages].flatten(0, 1)[:S], x[row, :n]))[None, None]
                            for p, x in ((self.k_pages, k), (self.v_pages, v)))
            out[row, :, :n] = F.scaled_dot_product_attention(
                q[row, None, :, :n], keys.expand(-1, q.shape[1], -1, -1), values.expand(-1, q.shape[1], -1, -1),
                attn_mask=mask)[0]
        return out

    def _write(self, layer, k, v, evict, lengths):
        """Store the new tokens k, v (N, T, D) with decisions evict (N, T) as the ring says; T at most any number."""
        W, T = self.window + 1, k.shape[1]
        n, seen, length = self._rows(lengths)[:, None], self._rows(self.seen)[:, None], self.length[layer][:, None]
        # the oldest of the ring leave the window, and the flagged ones leave their slots
        i = torch.arange(min(T, W), device=self.device)
        entry = (seen - W + i) % W
        freed = self.ring_evict[layer].gather(1, entry) & (seen - W + i >= 0) & (i < n)
        slots = self.ring_slot[layer].gather(1, entry)
        if len(i) > 1:
            slots = slots.gather(1, freed.long().argsort(dim=1, descending=True, stable=True))
        freed = freed.sum(1, keepdim=True)
        # a flagged new token that is outside the window before the block ends is never stored
        t = torch.arange(T, device=self.device)
        in_window = (t >= n - W) & (t < n)
        survive = in_window | (~evict & (t < n))
        rank = survive.cumsum(1) - 1
        slot = torch.where(rank < freed, slots.gather(1, rank.clamp(0, len(i) - 1)), length + rank - freed)
        self.length[layer] += (survive.sum(1, keepdim=True) - freed)[:, 0]
        self._reserve(layer)
        row, t = survive.nonzero(as_tuple=True)
        s = slot[row, t]
        where = self.table[layer][row, s // self.page_size] * self.page_size + s % self.page_size
        self.k_pages[layer].view(-1, self.head_dim)[where] = k[row, t]
        self.v_pages[layer].view(-1, self.head_dim)[where] = v[row, t]
        row, t = in_window.nonzero(as_tuple=True)
        entry = (seen[row, 0] + t) % W
        self.ring_slot[layer, row, entry] = slot[row, t]
        self.ring_evict[layer, row, entry] = evict[row, t]

    # ------------------------------------------------------------------------------------------------ pages

    def _reserve(self, layer):
        """Give every row of the layer the pages that its length needs, the lowest free ones first."""
        have = self.pages[layer]
        need = (-(-self.length[layer] // self.page_size) - have).clamp(min=0)
        total = int(need.sum())
        if total == 0:
            return
        free = (self.owner[layer] < 0).nonzero()[:, 0]
        if len(free) < total:
            self._grow(layer, total - len(free))
            free = (self.owner[layer] < 0).nonzero()[:, 0]
        row = torch.arange(len(need), device=self.device).repeat_interleave(need)
        first = (need.cumsum(0) - need)[row]
        ordinal = have[row] + torch.arange(total, device=self.device) - first
        missing = int(ordinal.max()) + 1 - self.table[layer].shape[1]
        if missing > 0:
            self.table[layer] = F.pad(self.table[layer], (0, missing + self.table[layer].shape[1] // 2))
        page = free[:total]
        self.table[layer][row, ordinal] = page
        self.owner[layer][page], self.ordinal[layer][page] = row, ordinal
        self.pages[layer] += need
        self.used[layer] = max(self.used[layer], int(page[-1]) + 1)

    def _grow(self, layer, least):
        """Add at least `least` free pages to the layer's pool, an eighth of it if that is more."""
        P = len(self.owner[layer])
        more = max(least, P // 8)
        if self.max_pages is not None:
            room = self.max_pages - sum(len(owner) for owner in self.owner)
            if room < least:
                raise InputError(f"the cache is full: all {self.max_pages} pages of {self.page_size} slots are taken; "
                                 f"allow more pages, or fewer or shorter sequences")
            more = min(more, room)
        self.owner[layer] = F.pad(self.owner[layer], (0, more), value=-1)
        self.ordinal[layer] = F.pad(self.ordinal[layer], (0, more))
        for pool in (self.k_pages, self.v_pages):
            grown = torch.zeros(P + more, self.page_size, self.head_dim, dtype=self.dtype, device=self.device)
            grown[:P] = pool[layer]
            pool[layer] = grown

    # ------------------------------------------------------------------------------------------------ sequences

    @torch.inference_mode()
    def release(self, sequences):
        """End sequences (a list of indices): their pages are free again, their rows empty and ready for new ones."""
        b = torch.as_tensor(sequences, dtype=torch.int64, device=self.device).unique()
        rows = (b[:, None] * self.kv_heads + torch.arange(self.kv_heads, device=self.device)).flatten()
        self.ended_tokens += int(self.seen[b].sum())
        self.ended_pairs += int(self.length[:, rows].sum())
        for layer in range(self.layers):
            self.owner[layer][torch.isin(self.owner[layer], rows)] = -1
            owned = (self.owner[layer] >= 0).nonzero()
            self.used[layer] = int(owned[-1]) + 1 if len(owned) else 0
        self.seen[b] = 0
        self.length[:, rows] = 0
        self.pages[:, rows] = 0
        self.ring_evict[:, rows] = False

    @torch.inference_mode()
    def select(self, sequences):
        """Make row i continue what sequence sequences[i] has fed so far: fork (name one several times), drop (do not
        name it; it ends as in `release`) and reorder in one. Nothing is computed again; a fork's pages are copied."""
        chosen = torch.as_tensor(sequences, dtype=torch.int64, device=self.device)
        if len(chosen) == 0 or bool((chosen < 0).any()) or bool((chosen >= self.batch_size).any()):
            raise InputError(f"sequences to select must be indices below {self.batch_size}, at least one")
        dropped = [b for b in range(self.batch_size) if b not in set(chosen.tolist())]
        if dropped:
            self.release(dropped)
        H, N = self.kv_heads, len(chosen) * self.kv_heads
        old = (chosen[:, None] * H + torch.arange(H, device=self.device)).flatten()  # (N,) old row of each new row
        copies = torch.ones(N, dtype=torch.bool, device=self.device)  # all but the first that continue an old row
        first = torch.full((self.length.shape[1],), N, device=self.device)
        first.scatter_reduce_(0, old, torch.arange(N, device=self.device), "amin")
        copies[first[first < N]] = False
        self.seen, self.length = self.seen[chosen], self.length[:, old]
        self.ring_slot, self.ring_evict = self.ring_slot[:, old], self.ring_evict[:, old]
        owned, self.pages = self.pages[:, old], torch.where(copies, 0, self.pages[:, old])
        for layer in range(self.layers):
            held = self.owner[layer] >= 0
            self.owner[layer] = torch.where(held, first[self.owner[layer].clamp(min=0)], -1)
            source = self.table[layer][old]
            self.table[layer] = source.clone()
            self._reserve(layer)
            row, i = (torch.arange(source.shape[1], device=self.device) < owned[layer, :, None]).nonzero(as_tuple=True)
            row, i = row[copies[row]], i[copies[row]]
            for pool in (self.k_pages[layer], self.v_pages[layer]):
                pool[self.table[layer][row, i]] = pool[source[row, i]]

    # ------------------------------------------------------------------------------------------------ counting

    def stats(self):
        """What is counted (all from real lengths and pages; ended sequences enter the compression ratio only):
        tokens: fed, of the sequences held now; pairs: (key, value) pairs held now; dense_pairs: what a dense cache of
        the same tokens would hold; compression_ratio: over held and ended sequences, None before any token;
        peak_pairs: the most held at once; reads: pairs attended to, summed over steps, a block counting as one step;
        pages, page_bytes: in use now; pool_bytes: allocated, free pages included; pairs_per_head and reads_per_head:
        [L][Hkv], summed over sequences."""
        L, H = self.layers, self.kv_heads
        tokens, pairs = int(self.seen.sum()), int(self.length.sum())
        one_page = 2 * self.page_size * self.head_dim * self.k_pages[0].element_size()
        all_tokens, all_pairs = tokens + self.ended_tokens, pairs + self.ended_pairs
        return {
            "tokens": tokens, "pairs": pairs, "dense_pairs": tokens * L * H, "peak_pairs": self.peak,
            "compression_ratio": all_tokens * L * H / all_pairs if all_pairs else None,
            "reads": int(self.reads.sum()), "pages": int(self.pages.sum()),
            "page_bytes": int(self.pages.sum()) * one_page,
            "pool_bytes": sum(len(owner) for owner in self.owner) * one_page,
            "pairs_per_head": self.length.view(L, -1, H).sum(1).tolist(), "reads_per_head": self.reads.tolist(),
        }
