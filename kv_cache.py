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


def page_attention(q, k, v, fill):
    """Softmax attention within each page by itself: q (M, g, D), k and v (M, page_size, D), fill (M,) int64 slots in
    use -> float32 (top (M, g), total (M, g), out (M, g, D)): the largest score, sum(exp(score - top)) and
    sum(exp(score - top) * v). A page with nothing in use gets top = -1e30."""
    score = torch.bmm(k, q.transpose(1, 2)).float() * q.shape[-1] ** -0.5  # (M, page_size, g)
    slot = torch.arange(k.shape[1], device=q.device)
    score.masked_fill_((slot >= fill[:, None])[:, :, None], -1e30)
    top = score.amax(1)
    weight = score.sub_(top[:, None]).exp_()
    return top, weight.sum(1), torch.bmm(weight.transpose(1, 2).to(v.dtype), v).float()


def paged_attention(q, k_pages, v_pages, owner, fill, shared=None):
    """One query token per row against all of the row's pages, wherever they lie in the pool.

    q (N, G, D); k_pages, v_pages (P, page_size, D); owner (P,) int64, the one row that page p belongs to, any where
    fill is 0; fill (P,) int64, slots in use, 0 for pages that are free or shared. shared: None, or pages (S,), their
    fill (S,) and the rows (S, R) that share them, padded with -1. -> (N, G, D).
    An owned page is multiplied as it lies, without a copy; a shared one is read once for all its rows. The pages'
    results are merged by their largest scores (log-sum-exp).
    """
    N, G, D = q.shape
    parts = [(owner, *page_attention(q[owner], k_pages, v_pages, fill))]
    if shared is not None:
        pages, shared_fill, rows = shared
        some = page_attention(q[rows.clamp(min=0)].flatten(1, 2), k_pages[pages], v_pages[pages], shared_fill)
        real = rows.flatten() >= 0
        parts.append((rows.flatten()[real], *(x.view(len(real), G, *x.shape[2:])[real] for x in some)))
    row, top, total, out = (torch.cat(x) for x in zip(*parts)) if shared is not None else parts[0]
    highest = top.new_full((N, G), -1e30).scatter_reduce(0, row[:, None].expand(-1, G), top, "amax")
    scale = torch.exp(top - highest[row])
    total = torch.zeros_like(highest).index_add_(0, row, total * scale)
    out = out.new_zeros(N, G, D).index_add_(0, row, out * scale[:, :, None])
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
        self.pages = state(L, N)  # pages that each row has
        self.table = [state(N, 0) for _ in range(L)]  # (N, most pages of a row): the row's pages in order
        # the same seen from the pool, for each page: how many rows have it, which one, its place
        self.references = [state(0) for _ in range(L)]
        self.owner = [state(0) for _ in range(L)]
        self.ordinal = [state(0) for _ in range(L)]
        self.shared = [None] * L  # pages (S,) of several rows and those rows (S, R), padded with -1
        self.used = [0] * L  # all pages from this one on are free
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
        P, shared = self.used[layer], self.shared[layer]
        owner, ordinal = self.owner[layer][:P], self.ordinal[layer][:P]

        def fill(row, ordinal):
            return (self.length[layer][row] - ordinal * self.page_size).clamp(0, self.page_size)

        if shared is not None:
            pages, rows = shared
            shared = pages, fill(rows[:, 0], ordinal[pages]), rows
        return paged_attention(q, self.k_pages[layer][:P], self.v_pages[layer][:P], owner.clamp(min=0),
                               torch.where(owner >= 0, fill(owner, ordinal), 0), shared)

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
        self._unshare(layer, row, s // self.page_size)
        where = self.table[layer][row, s // self.page_size] * self.page_size + s % self.page_size
        self.k_pages[layer].view(-1, self.head_dim)[where] = k[row, t]
        self.v_pages[layer].view(-1, self.head_dim)[where] = v[row, t]
        row, t = in_window.nonzero(as_tuple=True)
        entry = (seen[row, 0] + t) % W
        self.ring_slot[layer, row, entry] = slot[row, t]
        self.ring_evict[layer, row, entry] = evict[row, t]

    # ------------------------------------------------------------------------------------------------ pages

    def _reserve(self, layer):
        """Give every row of the layer the pages that its length needs."""
        have = self.pages[layer]
        need = (-(-self.length[layer] // self.page_size) - have).clamp(min=0)
        total = int(need.sum())
        if total == 0:
            return
        page = self._free(layer, total)
        row = torch.arange(len(need), device=self.device).repeat_interleave(need)
        first = (need.cumsum(0) - need)[row]
        ordinal = have[row] + torch.arange(total, device=self.device) - first
        missing = int(ordinal.max()) + 1 - self.table[layer].shape[1]
        if missing > 0:
            self.table[layer] = F.pad(self.table[layer], (0, missing + self.table[layer].shape[1] // 2))
        self.table[layer][row, ordinal] = page
        self.owner[layer][page], self.ordinal[layer][page], self.references[layer][page] = row, ordinal, 1
        self.pages[layer] += need
        self.used[layer] = max(self.used[layer], int(page[-1]) + 1)

    def _free(self, layer, count):
        """The layer's `count` lowest free pages (count,); its pool grows by an eighth or more if they are too few."""
        free = (self.references[layer] == 0).nonzero()[:, 0]
        if len(free) >= count:
            return free[:count]
        P, least = len(self.owner[layer]), count - len(free)
        more = max(least, P // 8)
        if self.max_pages is not None:
            room = self.max_pages - sum(len(owner) for owner in self.owner)
            if room < least:
                raise InputError(f"the cache is full: all {self.max_pages} pages of {self.page_size} slots are taken; "
                                 f"allow more pages, or fewer or shorter sequences")
            more = min(more, room)
        for state in (self.owner, self.ordinal, self.references):
            state[layer] = F.pad(state[layer], (0, more))
        for pool in (self.k_pages, self.v_pages):
            grown = torch.zeros(P + more, self.page_size, self.head_dim, dtype=self.dtype, device=self.device)
            grown[:P] = pool[layer]
            pool[layer] = grown
        return torch.cat((free, torch.arange(P, P + least, device=self.device)))

    def _unshare(self, layer, row, ordinal):
        """Copy on write: pages (row, ordinal), both (n,), that other rows have too become their row's own."""
        if self.shared[layer] is None:
            return
        others = self.references[layer][self.table[layer][row, ordinal]] > 1
        row, ordinal = torch.stack((row[others], ordinal[others])).unique(dim=1)
        if len(row) == 0:
            return
        old, new = self.table[layer][row, ordinal], self._free(layer, len(row))
        for pool in (self.k_pages[layer], self.v_pages[layer]):
            pool[new] = pool[old]
        self.table[layer][row, ordinal] = new
        self._index(layer)

    def _index(self, layer):
        """Work out from the rows' tables what each page of the layer's pool is to whom."""
        table, P = self.table[layer], len(self.owner[layer])
        valid = torch.arange(table.shape[1], device=self.device) < self.pages[layer][:, None]
        row, ordinal = valid.nonzero(as_tuple=True)
        page = table[row, ordinal]
        count = torch.bincount(page, minlength=P)
        self.references[layer] = count
        self.owner[layer] = torch.full((P,), -1, device=self.device).scatter(0, page, row).masked_fill(count > 1, -1)
        self.ordinal[layer] = torch.zeros(P, dtype=torch.int64, device=self.device).scatter(0, page, ordinal)
        self.used[layer] = int(page.max()) + 1 if len(page) else 0
        several, self.shared[layer] = (count > 1).nonzero()[:, 0], None
        if len(several):
            page, order = page.sort(stable=True)
            place = torch.arange(len(page), device=self.device) - (count.cumsum(0) - count)[page]  # among the sharers
            sharers = torch.full((P, int(count.max())), -1, device=self.device)
            sharers[page, place] = row[order]
            self.shared[layer] = several, sharers[several]

    # ------------------------------------------------------------------------------------------------ sequences

    @torch.inference_mode()
    def release(self, sequences):
        """End sequences (a list of indices): their pages are free again, their rows empty and ready for new ones."""
        b = torch.as_tensor(sequences, dtype=torch.int64, device=self.device).unique()
        rows = (b[:, None] * self.kv_heads + torch.arange(self.kv_heads, device=self.device)).flatten()
        self.ended_tokens += int(self.seen[b].sum())
        self.ended_pairs += int(self.length[:, rows].sum())
        self.seen[b] = 0
        self.length[:, rows] = 0
        self.pages[:, rows] = 0
        self.ring_evict[:, rows] = False
        for layer in range(self.layers):
            self._index(layer)

    @torch.inference_mode()
    def select(self, sequences):
        """Make row i continue what sequence sequences[i] has fed so far: fork (name one several times), drop (do not
        name it; it ends as in `release`) and reorder in one. Nothing is computed again, and forks share their pages
        until one of them writes to it."""
        chosen = torch.as_tensor(sequences, dtype=torch.int64, device=self.device)
        if len(chosen) == 0 or bool((chosen < 0).any()) or bool((chosen >= self.batch_size).any()):
            raise InputError(f"sequences to select must be indices below {self.batch_size}, at least one")
        dropped = [b for b in range(self.batch_size) if b not in set(chosen.tolist())]
        if dropped:
            self.release(dropped)
        rows = (chosen[:, None] * self.kv_heads + torch.arange(self.kv_heads, device=self.device)).flatten()
        self.seen, self.length, self.pages = self.seen[chosen], self.length[:, rows], self.pages[:, rows]
        self.ring_slot, self.ring_evict = self.ring_slot[:, rows], self.ring_evict[:, rows]
        for layer in range(self.layers):
            self.table[layer] = self.table[layer][rows]
            self._index(layer)

    # ------------------------------------------------------------------------------------------------ counting

    def stats(self):
        """What is counted, all from real lengths and pages:
        tokens: fed to the sequences held now; pairs: (key, value) pairs held now; dense_pairs: what a dense cache of
        the same tokens would hold; compression_ratio: their ratio, ended sequences counted in, None before any token;
        peak_pairs: the most held at once; reads: pairs attended to, summed over steps, a block counting as one step;
        pages, page_bytes: in use now, a shared page counting once; pool_bytes: allocated, free pages included;
        pairs_per_head, reads_per_head: [L][Hkv], summed over sequences."""
        L, H = self.layers, self.kv_heads
        tokens, pairs = int(self.seen.sum()), int(self.length.sum())
        pages = sum(int((references > 0).sum()) for references in self.references)
        one_page = 2 * self.page_size * self.head_dim * self.k_pages[0].element_size()
        all_tokens, all_pairs = tokens + self.ended_tokens, pairs + self.ended_pairs
        return {
            "tokens": tokens, "pairs": pairs, "dense_pairs": tokens * L * H, "peak_pairs": self.peak,
            "compression_ratio": all_tokens * L * H / all_pairs if all_pairs else None,
            "reads": int(self.reads.sum()), "pages": pages, "page_bytes": pages * one_page,
            "pool_bytes": sum(len(owner) for owner in self.owner) * one_page,
            "pairs_per_head": self.length.view(L, -1, H).sum(1).tolist(), "reads_per_head": self.reads.tolist(),
        }
