"""
The KV cache: pages, slots and the ring.

Every (sequence, KV head) of every layer holds its own number of key/value pairs, in pages of `page_size` slots from
one pool. Attention does not care in which order keys are stored, since RoPE is already inside them. Hence the rule of
kernels/cache_write.py: a new token is written over the slot of an evicted one that leaves the window, or appended.
Entry t mod (window + 1) of a row's ring holds the slot and the decision of token t while it is in the window. Nothing
is ever moved. There is no prefill or decode mode; a dense model is the same cache with nothing evicted.

This file knows nothing of training, of tokenizers, or of how a decision was made: it is told evict or keep.

Letters: L layers, B sequences, N = B * Hkv rows of a layer, row b * Hkv + h being sequence b's KV head h; P pages of
the pool; M columns of the table; W = window + 1; S slots in use; n new tokens.
"""
import copy
import os
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from dms import InputError, refusing, visible
from kernels import cache_write as writing
from kernels import cpu
from kernels import decode_attention as attending


class CacheFull(InputError):
    """No page is left for a token that must be stored."""


class KVCache:
    """Per-head paged cache of a batch of sequences of different lengths.

        cache = KVCache(model.config, batch_size=B)
        model(ids, cache=cache)                    # appends T tokens to every sequence, 1 or thousands
        model(ids, cache=cache, lengths=lengths)   # ragged: row b brings lengths[b] <= T tokens
        cache.select([0, 0, 0]); cache.release([1]); cache.stats()

    page_size: slots of a page, a power of two; 64, or 32 where heads are smaller than that. chunk: the most tokens a
    sequence computes at a time, 512, or 2,048 on a GPU; longer inputs are cut. memory: bytes of the pool (a CPU's
    system gives it as it is written to); None is what the model's whole context takes without eviction, or 80 % of
    the GPU's free memory or of the machine's, if that is less. When it is used up CacheFull is raised: before anything
    is written where there is one token per sequence; else the sequences that were fed must be released."""

    def __init__(self, config, batch_size, device="cpu", dtype=torch.float32, page_size=None, chunk=None, memory=None):
        gpu = torch.device(device).type == "cuda"
        page_size = (64 if config.head_dim >= 64 else 32) if page_size is None else page_size
        chunk = (2048 if gpu else 512) if chunk is None else chunk
        if batch_size < 1 or chunk < 1 or page_size < 1 or page_size & (page_size - 1):
            raise InputError("a cache needs batch_size and chunk of at least 1 and a page_size that is a power of two")
        self.layers, self.kv_heads = config.num_hidden_layers, config.num_key_value_heads
        self.window = config.eviction.window if config.eviction else 0
        self.shift = config.eviction.shift if config.eviction else 0
        self.device, self.page_size, self.chunk = torch.device(device), page_size, chunk
        self.page_bytes = 2 * page_size * config.head_dim * dtype.itemsize
        self.scores = 2**29 if gpu else 2**20  # of a block's attention, at a time
        L, N, W = self.layers, batch_size * self.kv_heads, self.window + 1
        if memory is None:
            context = L * N * self._pages(config.max_position_embeddings) * self.page_bytes
            free = torch.cuda.mem_get_info(self.device)[0] if gpu else \
                os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 16e9
            memory = min(context, 0.8 * free)
        P = max(int(memory / self.page_bytes), 1)
        with refusing(f"no memory for a cache of {memory / 1e9:.1f} GB; allow it less"):
            self.k_pages, self.v_pages = torch.empty(2, P, page_size, config.head_dim, dtype=dtype, device=device)
        self.kernels = gpu and attending.triton is not None

        def state(*shape, dtype=torch.int32):
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.seen = state(batch_size, dtype=torch.int64)  # tokens that each sequence has fed
        self.length = state(L, N)  # pairs that each row holds
        self.ring_slot, self.ring_evict = state(L, N, W), state(L, N, W, dtype=torch.bool)
        self.table = state(L, N, 1)  # each row's pages in order; how many there are follows from its length
        self.free, self.top = state(P), state(1)  # a stack of free pages, its top at top - 1
        self._collect()
        self.reads = state(L, self.kv_heads, dtype=torch.int64)
        self.peak = state(1, dtype=torch.int64)
        self.peak_pages = self.ended_tokens = self.ended_pairs = 0
        self.steps_left = 0  # steps of one token per sequence for which there are certainly pages enough

    @property
    def batch_size(self):
        return len(self.seen)

    def check_lengths(self, T, lengths):
        """lengths as (B,) int64 on the cache's device, all T if None. Raises InputError if they do not fit."""
        lengths = [T] * self.batch_size if lengths is None else lengths
        lengths = torch.as_tensor(lengths, dtype=torch.int64, device=self.device)
        if lengths.shape != self.seen.shape or bool((lengths < 0).any()) or bool((lengths > T).any()):
            raise InputError(f"lengths must be {self.batch_size} numbers from 0 to {T}, one per sequence of the cache")
        return lengths

    @contextmanager
    def append(self, lengths, T, reserve=True):
        """Within it, Model.hidden's attend(layer, q, k, v, logits) takes every layer's T new tokens once, of which
        lengths (B,) int64 are real. reserve=False: the caller has called `reserve`; nothing waits for the GPU then."""
        if T > 1:
            self.steps_left = 0
            self._widen(int(self.length.max()), T)
        elif reserve:
            self.reserve(lengths)
        n, seen = self._rows(lengths), self._rows(self.seen)

        def attend(layer, q, k, v, logits):
            y = self._append(layer, q, k, v, logits, n, seen)
            return y if torch.is_inference_mode_enabled() else y.clone()  # a clone may be part of a gradient graph

        yield attend
        with torch.inference_mode():
            self.seen += lengths
            if T == 1:
                self.reads += (self.length.view(self.layers, -1, self.kv_heads) * (lengths > 0)[:, None]).sum(1)
            self.peak.copy_(torch.maximum(self.peak, self.length.sum()))

    @torch.inference_mode()
    def _append(self, layer, q, k, v, logits, n, seen):
        B, H, T, D = k.shape
        shape, q, k, v = q.shape, q.reshape(B * H, -1, T, D), k.reshape(B * H, T, D), v.reshape(B * H, T, D)
        evict = torch.zeros(B * H, T, dtype=torch.bool, device=k.device) if logits is None else \
            (logits > 0).reshape(B * H, T)
        length, table = self.length[layer], self.table[layer]
        if T > 1:
            about = writing.about(evict, n[:, None], seen[:, None], self.ring_evict[layer], self.shift)
            y = self._attend_block(layer, q, k, v, about, n, seen)
            most = length + writing.stored(about, n[:, None], self.window + 1).sum(1)  # if no slot falls free
            self._need(int((self._pages(most) - self._pages(length)).sum()))
        write = writing.cache_write if self.kernels and T == 1 else writing.cache_write_plain
        write(k, v, evict, n, seen, length, self.ring_slot[layer], self.ring_evict[layer], table, self.free,
              self.top, self.k_pages, self.v_pages, self.shift)
        if T == 1:
            attend = attending.decode_attention if self.kernels else \
                cpu.decode_attention if cpu.takes(k) else attending.decode_attention_plain
            y = attend(q[:, :, 0], self.k_pages, self.v_pages, table, length)
        return y.view(shape)

    def _rows(self, per_sequence):
        """(B, ...) -> (N, ...), each sequence's value for each of its rows."""
        return per_sequence.repeat_interleave(self.kv_heads, dim=0)

    def _attend_block(self, layer, q, k, v, evict, n, seen):
        """q (N, G, T, D), k, v (N, T, D), evict (N, T), nothing of it written yet -> (N, G, T, D). A row's queries see
        its slots, of which those in the ring may expire on the way, and the new tokens themselves. As many rows at a
        time as make `self.scores` numbers: on a CPU a long row is computed alone."""
        W, group, held, out = self.window + 1, q.shape[1], self.length[layer], torch.zeros_like(q)
        self.reads[layer] += ((held + n) * (n > 0)).view(-1, self.kv_heads).sum(0)
        count = self.scores // (group * q.shape[2] * (int(held.max()) + q.shape[2])) + 1
        for rows in (slice(i, i + count) for i in range(0, len(q), count)):
            length, start, S, T = held[rows, None], seen[rows, None], int(held[rows].max()), int(n[rows].max())
            new = start + torch.arange(T, device=self.device)  # positions of queries, and of their own keys
            keys, values, flag, mask = k[rows, :T], v[rows, :T], evict[rows, :T], None
            if S > 0 or flag.any():
                unused = torch.arange(S + 1, device=self.device) >= length  # of slots; the last stands for none
                recent = start - W + torch.arange(W, device=self.device)
                slot = self.ring_slot[layer, rows].long().gather(1, recent % W).where(recent >= 0, S)
                leaves = self.ring_evict[layer, rows].gather(1, recent % W)
                position = torch.where(unused, 2**60, 0).scatter_(1, slot, recent)  # 0 for kept ones
                position = torch.cat((position[:, :S], new), dim=1)
                flag = torch.cat((torch.zeros_like(unused).scatter_(1, slot, leaves)[:, :S], flag), dim=1)
                mask = visible(new[:, :, None], position[:, None], flag[:, None], self.window)[:, None]  # T x (S + T)
                pages = self.table[layer, rows, :self._pages(S)].long()
                keys, values = (torch.cat((pool[pages].flatten(1, 2)[:, :S].masked_fill_(unused[:, :S, None], 0), x),
                                          dim=1) for pool, x in ((self.k_pages, keys), (self.v_pages, values)))
            out[rows, :, :T] = F.scaled_dot_product_attention(
                q[rows, :, :T], *(x[:, None].expand(-1, group, -1, -1) for x in (keys, values)),
                attn_mask=mask, is_causal=mask is None)
        return out

    def _pages(self, slots):
        return -(-slots // self.page_size)

    @torch.inference_mode()
    def reserve(self, lengths):
        """Make sure that a step of one token for every sequence with lengths (B,) = 1 finds its pages. Looks at the
        stack, which waits for the GPU, once in page_size steps only. Raises CacheFull."""
        if self.steps_left == 0:
            steps = self.page_size  # no row fills two pages in that many
            if int(self.top) < self.length.numel():  # enough for this step is enough
                steps, full = 1, (self.length % self.page_size == 0) & self._rows(lengths > 0)
                self._need(int(full.sum()))
            self._widen(int(self.length.max()), self.page_size)
            self.steps_left = steps
        self.steps_left -= 1

    def _widen(self, length, tokens):
        """Make room in the table for rows of `length` pairs and `tokens` more."""
        missing = self._pages(length) + self._pages(tokens) - self.table.shape[2]
        if missing > 0:
            self.table = F.pad(self.table, (0, missing + self.table.shape[2] // 2))

    def _collect(self):
        """Put the pages that no row has on the stack."""
        taken = torch.zeros(len(self.free), dtype=torch.bool, device=self.device)
        column = torch.arange(self.table.shape[2], device=self.device)
        taken[self.table[column < self._pages(self.length)[:, :, None]].long()] = True
        free = (~taken).nonzero()[:, 0]
        self.free[:len(free)] = free.flip(0)
        self.top.fill_(len(free))
        self.steps_left = 0

    def _need(self, count):
        if int(self.top) < count:
            raise CacheFull(f"the cache is full: of its {len(self.free)} pages {int(self.top)} are free and {count} "
                            f"needed; allow more memory, or fewer or shorter sequences")

    def part(self, sequence, tokens):
        """A view of one sequence, to be fed up to `tokens` tokens before this cache is used again."""
        self._widen(int(self.length.max()), tokens + 2 * self.page_size)
        self.steps_left = 0
        part, rows = copy.copy(self), slice(sequence * self.kv_heads, (sequence + 1) * self.kv_heads)
        part.seen = self.seen[sequence:sequence + 1]
        for name in ("length", "ring_slot", "ring_evict", "table"):
            setattr(part, name, getattr(self, name)[:, rows])
        return part

    def has_room_for(self, tokens):
        """Can a sequence of this many tokens be expected to fit, if it is compressed as those so far have been?"""
        pairs = tokens / (self.stats()["compression_ratio"] or 1) + self.page_size  # of a row, half a page to spare
        return self.layers * self.kv_heads * pairs <= int(self.top) * self.page_size

    @torch.inference_mode()
    def release(self, sequences):
        """End sequences (a list of indices): their pages are free again, and their rows empty."""
        b = torch.as_tensor(sequences, dtype=torch.int64, device=self.device).unique()
        rows = (b[:, None] * self.kv_heads + torch.arange(self.kv_heads, device=self.device)).flatten()
        self.stats()  # for the peak
        self.ended_tokens += int(self.seen[b].sum())
        self.ended_pairs += int(self.length[:, rows].sum())
        self.seen[b] = 0
        self.length[:, rows] = 0
        self._collect()

    @torch.inference_mode()
    def select(self, sequences):
        """Row i continues what sequence sequences[i] has fed: fork (name it several times), drop (do not name it) and
        reorder in one. Forks share the pages that they cannot write to."""
        chosen = torch.as_tensor(sequences, dtype=torch.int64, device=self.device)
        if len(chosen) == 0 or bool((chosen < 0).any()) or bool((chosen >= self.batch_size).any()):
            raise InputError(f"sequences to select must be indices below {self.batch_size}, at least one")
        self.release(list(set(range(self.batch_size)) - set(chosen.tolist())))
        rows = (chosen[:, None] * self.kv_heads + torch.arange(self.kv_heads, device=self.device)).flatten()
        states = {name: getattr(self, name)[:, rows] for name in ("length", "ring_slot", "ring_evict", "table")}
        states["seen"] = self.seen[chosen]
        if len(chosen) == self.batch_size:
            for name, state in states.items():
                getattr(self, name).copy_(state)
        else:
            self.__dict__.update(states)
        self.steps_left = 0
        for layer in range(self.layers):
            self._unshare(layer)

    def _unshare(self, layer):
        """Copy the pages that several rows have and may write to. Rows that share a page were forked from each other,
        so the same writes may lie ahead of them, and after this nobody ever writes to a page of several."""
        recent = torch.arange(self.window + 1, device=self.device) < self._rows(self.seen)[:, None]
        written = torch.zeros(self.table[layer].shape, dtype=torch.bool, device=self.device)
        row, entry = recent.nonzero(as_tuple=True)
        written[row, self.ring_slot[layer, row, entry].long() // self.page_size] = True
        row = (self.length[layer] % self.page_size).nonzero()[:, 0]
        written[row, self.length[layer, row].long() // self.page_size] = True
        row, ordinal = written.nonzero(as_tuple=True)
        page, order = self.table[layer, row, ordinal].long().sort(stable=True)
        again = F.pad(page[1:] == page[:-1], (1, 0)) if len(page) else page.bool()  # the first row keeps the page
        row, ordinal, page = row[order][again], ordinal[order][again], page[again]
        if len(page):
            self._need(len(page))
            self.top -= len(page)
            own = self.free[self.top:][:len(page)]
            for pool in (self.k_pages, self.v_pages):
                pool[own.long()] = pool[page]
            self.table[layer, row, ordinal] = own

    def stats(self):
        """What is counted. tokens: fed to the sequences held now; pairs: (key, value) pairs held now; dense_pairs:
        what a dense cache would hold of them; compression_ratio: of all tokens so far, None before any; peak_pairs:
        the most held at once; reads: pairs attended to, summed over steps, a block counting as one; pages, page_bytes,
        peak_page_bytes: in use, now and at the most; pairs_per_head, reads_per_head: [L][Hkv], of all sequences."""
        L, H = self.layers, self.kv_heads
        tokens, pairs, pages = int(self.seen.sum()), int(self.length.sum()), len(self.free) - int(self.top)
        self.peak_pages = max(self.peak_pages, pages)  # rows only grow until they end, where this is called
        all_tokens, all_pairs = tokens + self.ended_tokens, pairs + self.ended_pairs
        return {
            "tokens": tokens, "pairs": pairs, "dense_pairs": tokens * L * H, "peak_pairs": int(self.peak),
            "compression_ratio": all_tokens * L * H / all_pairs if all_pairs else None,
            "reads": int(self.reads.sum()), "pages": pages, "page_bytes": pages * self.page_bytes,
            "peak_page_bytes": self.peak_pages * self.page_bytes, "pool_bytes": len(self.free) * self.page_bytes,
            "pairs_per_head": self.length.view(L, -1, H).sum(1).tolist(), "reads_per_head": self.reads.tolist(),
        }
