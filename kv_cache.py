"""
The KV cache: pages, slots and the ring.

A *row* is one KV head of one sequence in one layer. Each row holds its own number of key/value
pairs, in pages of `page_size` slots that come from one pool. Attention does not care in which order
keys are stored, since RoPE is already inside them. Hence the whole trick:

    token j = t - (window + 1) leaves the window as token t arrives
        j was evicted  ->  t is written over j's slot          (the row's length stays)
        j was kept     ->  t is appended                       (length + 1)

Nothing is ever moved. Each slot says whose pair it holds, by position, and what was decided about
it. A row's ring has window + 1 entries: entry t mod (window + 1) is the slot of token t. Two things
are always true:

- A pair that has left the window was kept. An evicted one loses its slot as it leaves.
- A row's last slot holds a token of the window: if that token leaves and was kept, the new one goes
  to the slot behind it, and if it was evicted, into its slot.

A block of new tokens attends first and is stored afterwards: its last token may take the slot of a
pair that its first token still sees. A dense model's cache just evicts nothing.

A decoding step, one token for each row, is simpler, since no other new token needs the old pair. So
the token gets its slot before the first layer, in all layers at once (`begin_step`). Each layer
then stores the pair there first, and attends to all that its rows hold, the new pair included.

All of it is plain PyTorch. kernels/ has faster functions for both kinds of attention; without that
folder everything still runs. This file knows nothing of training, of tokenizers, or of how the
model comes to its decisions; for a budget it shifts their threshold (`steer`).

Letters: those of dms.py, and N = B * Hkv rows of a layer, where row b * Hkv + h is KV head h of
sequence b; P pages in the pool; M columns of the page table; W = window + 1 entries of the ring.
"""

import os
from collections import namedtuple
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from dms import DMSConfig, attention, by_subject, visible


class CacheFull(RuntimeError):
    """No page is left for a token that must be stored."""


# ------------------------------------------------------------------------------------------- Pages


class PagePool:
    """Pages of slots for all rows of all layers, and a stack of those that no row has. A slot's
    *place* is its number in the pool, page * page_size + slot of the page. of_latents: keys are
    their own values (mla.py), so these need no memory."""

    def __init__(self, pages, page_size, key_dim, dtype, device, of_latents=False):
        shape = (pages + 1, page_size)
        self.page_size = page_size
        self.nowhere = pages * page_size  # a place in the last page, which no row ever has
        with torch.device(device):
            self.keys = torch.empty(*shape, key_dim, dtype=dtype)  # (P + 1, page_size, D)
            self.values = self.keys if of_latents else torch.empty_like(self.keys)
            self.position = torch.empty(shape, dtype=torch.int32)  # of a slot's token
            self.evicted = torch.zeros(shape, dtype=torch.bool)  # the decision about it
            # the free pages are free[:free_count]; the last of them is the top of the stack
            self.free = torch.arange(pages, dtype=torch.int32)  # (P,)
        self.free_count = self.least_free = pages
        self.slots = (self.keys, self.values, self.position, self.evicted)

    def __len__(self):
        return len(self.free)

    def check(self, needed, free):
        """Raise CacheFull unless `needed` pages are among the free ones."""
        if needed > free:
            raise CacheFull(f"the cache is full: {needed} pages are needed, and {free} of its "
                            f"{len(self)} are free; allow more memory or fewer sequences")

    def take(self, count):
        """The numbers of `count` free pages, (count,) int32, off the top of the stack. Raises
        CacheFull, taking none."""
        self.check(count, self.free_count)
        self.free_count -= count
        self.least_free = min(self.least_free, self.free_count)
        return self.free[self.free_count : self.free_count + count]

    def free_all_but(self, rows, needed=0):
        """Put every page on the stack that no row of `rows` has. Since forks share pages, a page is
        free once no table names it: so the tables are asked, and nothing needs to count references.
        Raises CacheFull, freeing none, if that makes fewer than `needed`."""
        is_free = torch.ones_like(self.free, dtype=torch.bool)
        is_free[rows.table[rows.pages_in_use(self.page_size)]] = False
        pages = is_free.nonzero()[:, 0]
        self.check(needed, len(pages))
        self.free[: len(pages)] = pages
        self.free_count = len(pages)


@dataclass
class Rows:
    """What every row holds, and where."""

    seen: torch.Tensor  # (N,) int64: tokens appended so far, which is the next one's position
    threshold: torch.Tensor  # (N,) float32: a pair is evicted whose logit is above; see `steer`
    length: torch.Tensor  # (L, N) int32: pairs held, in slots 0 to length - 1 of the row
    table: torch.Tensor  # (L, N, M) int32: the row's pages, in order of its slots
    ring: torch.Tensor  # (L, N, W) int32: the slot of token t, at t mod W

    def part(self, layers=slice(None), rows=slice(None)):
        """The Rows of some layers and rows: views for slices and numbers, copies for a tensor of
        numbers. Those of one layer, rows.part(l), have no L."""
        by_layer = (x[layers, rows] for x in (self.length, self.table, self.ring))
        return Rows(self.seen[rows], self.threshold[rows], *by_layer)

    def pages_in_use(self, page_size):
        """Which entries of the table name a page, (L, N, M) bool."""
        column = torch.arange(self.table.shape[-1], device=self.table.device)
        return column * page_size < self.length[..., None]

    def widen(self, tokens, page_size):
        """Make room in the table for the longest row and `tokens` more. A table that must grow is
        replaced, by one with room to spare."""
        present = self.table.shape[-1]
        longest = int(self.length.max()) + tokens
        missing = -(-longest // page_size) - present  # rounded up
        if missing > 0:
            self.table = F.pad(self.table, (0, missing + present // 2))

    def pages_to_be_written(self, page_size):
        """Which pages a row may still write to, (L, N, M) bool: those with a slot of the window.

        A last page with room is among them, as a row's last slot holds a token of the window.
        Before a row has seen W tokens, some entries of its ring mean nothing, and may mark any
        page. But then all its tokens are in the window: all its pages are to be marked."""
        column = (self.ring // page_size).long()
        written = torch.zeros_like(self.table, dtype=torch.bool).scatter_(2, column, True)
        return written & self.pages_in_use(page_size)


def fork(rows, index, pool):
    """New Rows, whose row i continues rows[index[i]]. What `index`, (n,) int64, does not name is
    dropped. The first row that continues an old one takes over its pages. Each further one is a
    copy: it shares the pages that are full and final, and gets its own of those that may still be
    written to. Raises CacheFull before anything has changed."""
    forked = rows.part(rows=index)
    is_copy = (index[:, None] == index).tril(-1).any(dim=1)  # of an earlier row
    to_copy = forked.pages_to_be_written(pool.page_size) & is_copy[:, None]
    originals = forked.table[to_copy]
    # The pages of dropped rows are freed. The originals are not among them, as the first row that
    # continues each still names them.
    pool.free_all_but(forked, needed=len(originals))
    own = pool.take(len(originals))
    forked.table[to_copy] = own
    for slots in pool.slots:
        slots[own] = slots[originals]
    return forked


# --------------------------------------------------------- The rule in memory, for one layer's rows


def place_of(rows, token, exists, pool):
    """Where the pair of a token of each row lies in the pool, (..., N) int64; `nowhere` for a row
    where `exists` is False. rows: of all layers, or of one. token: (N,), the position of a token
    whose slot the row's ring knows, if it exists. exists: (N,) bool."""
    # (..., N, 1): a row's entry in its ring, the same in all layers
    entry = (token % rows.ring.shape[-1])[:, None].expand_as(rows.ring[..., :1])
    slot = rows.ring.gather(-1, entry).long()
    page = rows.table.gather(-1, slot // pool.page_size).long()
    place = page * pool.page_size + slot % pool.page_size
    return place[..., 0].where(exists, pool.nowhere)


def held(slots, rows, row):
    """Copies of what the n slots of one row hold, in order: [(n, ...)] of tensors (P, page_size,
    ...) of the pool."""
    n = int(rows.length[row])
    pages = rows.table[row, : -(-n // slots[0].shape[1])]
    return [x[pages].flatten(0, 1)[:n] for x in slots]


def add_pages(rows, pool, length):
    """From now on the rows hold `length` (..., N) pairs: give them the pages for it. Raises
    CacheFull before anything has changed."""
    lacks = replace(rows, length=length).pages_in_use(pool.page_size)  # (..., N, M)
    lacks &= ~rows.pages_in_use(pool.page_size)
    rows.table[lacks] = pool.take(int(lacks.sum()))
    rows.length.copy_(length)


def store(k, v, evict, new, rows, pool, window):
    """Store new tokens, and free the slots of what nobody will see any more.

    Afterwards only what the last new token sees is of use. So every pair held that it does not see
    leaves its slot open, and a new token that it does not see is never stored. All slots behind the
    row's last one are open, too. The other new tokens, the survivors, take the open slots in order:

        slots held      a  b  c  d  e         b and d were evicted, and now leave the window
        open            -  1  -  3  -  5  6   their slots, and all behind the last
        survivors       x  y  z               the new tokens that are stored
        afterwards      a  x  c  y  e  z

    Every open slot between others is filled. Each is that of an evicted pair that leaves the window
    now, and at most min(new, W) pairs leave it, one for each new token. At least as many new tokens
    survive, since the last min(new, W) are in the window.

    k, v: (N, T, D), the pool's dtype; evict: (N, T) bool, what was decided about these tokens; new:
    (N,) int64, how many of the T are real. All of the rows' state is updated but `seen`. Pages that
    are written to must not be shared, and the tables must have room. Raises CacheFull, after which
    the rows must be released.
    """
    # (N, S), S = M * page_size. Behind a row's own pages this is anything; in_use leaves it out.
    position = pool.position[rows.table].flatten(1)
    evicted = pool.evicted[rows.table].flatten(1)
    slot = torch.arange(position.shape[1], device=k.device)
    in_use = slot < rows.length[:, None]
    # (N, T): the new tokens' positions
    token = (rows.seen[:, None] + torch.arange(evict.shape[1], device=k.device)).int()
    last = (rows.seen + new - 1)[:, None]  # (N, 1): that of the last real one
    stays = in_use & visible(last, position, evicted, window)  # (N, S)
    survives = visible(last, token, evict, window)  # (N, T); padding comes after `last`: False

    add_pages(rows, pool, stays.sum(1) + survives.sum(1))
    open_slots = stays.byte().argsort(dim=1, stable=True)  # (N, S): first those that do not stay
    rank = survives.cumsum(1) - 1  # (N, T): a survivor's place among those of its row
    row, i = survives.nonzero(as_tuple=True)  # (n,) each: the survivors of all rows
    target = open_slots[row, rank[row, i]]
    page = rows.table[row, target // pool.page_size]
    for slots, of_new in zip(pool.slots, (k, v, token, evict)):
        slots[page, target % pool.page_size] = of_new[row, i]

    W = window + 1
    # a kept token may be older than the window, and the ring has no entry for it
    recent = i >= new[row] - W
    row = row[recent]
    rows.ring[row, token[row, i[recent]] % W] = target[recent].int()


# ------------------------------------------------------------------- Attention, of one layer's rows


def attend_block(q, k, v, evict, new, rows, pool, window):
    """Attention of new tokens, none of which is stored yet, to all that the rule lets them see.

    q: (N, G, T, D); k, v: (N, T, D), the pool's dtype; evict: (N, T) bool, what was decided about
    these tokens; new: (N,) int64, how many of the T are real. Returns (N, G, T, D), in which
    padding is finite but means nothing. Rows are taken one by one, which bounds the memory of the
    mask.
    """
    y = torch.zeros_like(q)
    for row, n in enumerate(new.tolist()):
        if n == 0:
            continue
        old = held(pool.slots, rows, row)  # S pairs
        token = rows.seen[row] + torch.arange(n, device=k.device)  # (n,): the new ones' positions
        block = (k[row, :n], v[row, :n], token, evict[row, :n])
        # keys and values (S + n, D), position and evicted (S + n,): what is held, then the block
        keys, values, position, evicted = (torch.cat(pair) for pair in zip(old, block))
        mask = visible(token[:, None], position, evicted, window)  # (n, S + n)
        # as a batch of one, and of one KV head
        query = q[None, row, :, :n]
        y[row, :, :n] = attention(query, keys[None, None], values[None, None], mask)[0]
    return y


def attend_one(q, rows, pool):
    """Attention of a single query of each head, q (N, G, D), to all that its row holds. Returns
    (N, G, D), 0 for a row that holds nothing."""
    y = torch.zeros_like(q)
    for row in rows.length.nonzero()[:, 0].tolist():
        keys, values = held((pool.keys, pool.values), rows, row)
        y[row] = F.scaled_dot_product_attention(q[None, row], keys[None], values[None])[0]
    return y


Kernels = namedtuple("Kernels", "attend_one attend_block")
PLAIN = Kernels(attend_one, attend_block)


def choose_kernels(device, dtype, key_dim):
    """Triton's on a GPU, numba's for a step on a CPU, and the plain ones elsewhere."""
    # no Triton, numba or kernels/, or no folder in which numba may keep compiled code
    with suppress(ImportError, RuntimeError):
        if device.type == "cuda" and key_dim <= 256:
            from kernels import attention

            return Kernels(attention.attend_one, attention.attend_block)
        if device.type == "cpu" and dtype == torch.float32:
            from kernels import cpu

            return Kernels(cpu.attend_one, attend_block)
    return PLAIN


# --------------------------------------------------------------------------------------- The cache


def usable_memory(device):
    """Bytes that a GPU has free, or that this machine, or the container around us, has in all."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # it may say "max"
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory


PERIOD = 128  # tokens between two settings of a sequence's threshold; see `steer`
# a threshold higher by this makes a head keep e times as many pairs (as measured after warm starts)
LOGITS_PER_E_FOLD = 8.0


def steer(cache, part):
    """For a budget: set the threshold of sequences that have seen a multiple of PERIOD tokens.

    A head should hold the pairs of the window, and keep_rate times those behind it. A threshold
    holds for the next PERIOD tokens, and shows in the lengths W tokens later, as they leave the
    window. We assume that over these PERIOD + W tokens the model by itself would keep usual =
    keep_rate * (PERIOD + W). With a threshold of x it keeps about

        usual * exp(x / E)  ~  usual + usual * x / E        E = LOGITS_PER_E_FOLD

    The surplus, usual * x / E, shall be what the sequence's heads are lacking now, on average.
    x depends only on what was seen and is held: it is the same in every cut of the input."""
    if cache.keep_rate is None:
        return
    W = cache.window + 1
    behind = (part.seen - W).clamp(min=0)
    wanted = part.seen.clamp(max=W) + cache.keep_rate * behind  # (N,)
    by_sequence = part.length.float().mean(0).view(-1, cache.kv_heads).mean(1)  # (B,)
    lacking = wanted - by_sequence.repeat_interleave(cache.kv_heads)
    usual = cache.keep_rate * (PERIOD + W)
    threshold = LOGITS_PER_E_FOLD * lacking / usual
    part.threshold.copy_(threshold.where(part.seen % PERIOD == 0, part.threshold))


class KVCache:
    """The per-head paged cache of a batch of sequences, each of its own length.

        cache = KVCache(model.config, batch_size=B)
        model(ids, cache=cache)                    # appends T tokens to every sequence, or
        model(ids, cache=cache, lengths=lengths)   # lengths[b] <= T to sequence b
        model(ids[:1], cache=cache, sequence=2)    # to this one alone
        cache.select([0, 0, 0])                    # three continuations of sequence 0
        cache.release([1])                         # its pages are free again
    """

    def __init__(self, config, batch_size, device="cpu", dtype=torch.float32,
                 page_size=None, chunk=None, memory=None, budget=None):
        """config: a ModelConfig; device, dtype: the model's. page_size: slots of a page. chunk: the
        most tokens computed at a time. memory: bytes of the pool. By default it has room for the
        whole context without eviction, but takes at most 80% of a machine's memory, or of what a
        GPU has free. (On a CPU a page takes memory only once it is written to.) budget: (pairs,
        tokens), so that after so many tokens a head of a sequence holds so many pairs, on average
        over heads, see `steer`. By default the model's own offset decides."""
        self.device = torch.device(device)
        self.page_size = page_size = page_size or (64 if config.key_dim >= 64 else 32)
        self.chunk = chunk or (2048 if self.device.type == "cuda" else 512)
        self.layers = L = config.num_hidden_layers
        self.kv_heads = config.kv_heads
        settings = config.eviction or DMSConfig(window=0, shift=0)
        self.window = settings.window
        self.shift = settings.shift
        if self.window < self.shift:
            raise ValueError("shift 1 needs a window of 1 or more")
        self.keep_rate = None  # the share of the tokens behind the window that are to be kept
        if budget and config.eviction:
            pairs, tokens = budget
            in_window = self.window + 1
            self.keep_rate = max(pairs - in_window, 1) / max(tokens - in_window, 1)
        self.kernels = choose_kernels(self.device, dtype, config.key_dim)
        self.decode_step = None  # generate.py's CUDA graph, which lives as long as these tensors

        N = batch_size * self.kv_heads  # rows of a layer
        # a slot has a key, a value unless that is the key, a position (4 bytes), a decision (1)
        of_latents = bool(config.kv_lora_rank)
        vectors = 1 if of_latents else 2
        self.page_bytes = page_size * (vectors * config.key_dim * dtype.itemsize + 5)
        pages = L * N * -(-config.context // page_size)  # the whole context
        if memory is None:
            memory = min(pages * self.page_bytes, 0.8 * usable_memory(self.device))
        pages = max(int(memory / self.page_bytes), 1)
        self.pool = PagePool(pages, page_size, config.key_dim, dtype, self.device, of_latents)
        zeros = partial(torch.zeros, dtype=torch.int32)
        with self.device:
            self.rows = Rows(
                seen=torch.zeros(N, dtype=torch.int64),
                threshold=torch.zeros(N),
                length=zeros(L, N), table=zeros(L, N, 1), ring=zeros(L, N, self.window + 1))
            # counted on the device, since a replayed CUDA graph adds to it; see stats
            self.reads = torch.zeros(1, dtype=torch.int64)
        self.ended_tokens = 0
        self.ended_pairs = 0

    @property
    def batch_size(self):
        return len(self.seen)

    @property
    def seen(self):
        """Tokens appended to each sequence, (B,) int64."""
        return self.rows.seen[:: self.kv_heads]

    def rows_of(self, sequences):
        """The numbers of the rows of sequences, in order, (n * Hkv,) int64."""
        rows = torch.arange(len(self.rows.seen), device=self.device)
        return rows.view(-1, self.kv_heads)[list(sequences)].flatten()  # of (B, Hkv)

    # ----------------------------------------------------------------------------------- Appending

    @torch.inference_mode()
    def append(self, hidden, ids, lengths=None, sequence=None):
        """Append ids (B, T) int64 to the sequences, and return their final states (B, T, C).

        hidden: Model.hidden, which is called for one piece of the ids after another, with the
        piece's `attend` and the position (B, 1) where it begins. lengths, sequence: see
        Model.states. Raises ValueError for lengths that do not fit, and CacheFull.

        For a single token CacheFull comes before anything has changed. Any other error leaves a
        piece stored by some layers and not by others: so the sequences concerned are released.
        """
        sequences = range(self.batch_size)
        if sequence is not None:
            sequences = sequences[sequence : sequence + 1]
        B, T = ids.shape
        lengths = [T] * B if lengths is None else lengths
        count = torch.as_tensor(lengths, dtype=torch.int64, device=self.device)
        if not (count.clamp(0, T).equal(count) and len(count) == B == len(sequences)):
            raise ValueError(f"ids, lengths: {len(sequences)} are wanted, of 0 to {T} tokens each")
        rows = slice(sequences.start * self.kv_heads, sequences.stop * self.kv_heads)
        if T == 1:  # outside of `try`: if this raises, nothing has changed
            self.begin_step(count, rows)
        try:
            if T == 1:
                return self.append_token(hidden, ids, count, rows)
            states = []
            for piece in ids.tensor_split(self.cuts(T, rows), dim=1):
                of_piece = count.clamp(max=piece.shape[1])
                states.append(self.append_block(hidden, piece, of_piece, rows))
                count = count - of_piece
            return torch.cat(states, dim=1)
        except BaseException:
            self.release(b for b, length in zip(sequences, lengths) if length)
            raise

    def cuts(self, T, rows):
        """Where T new tokens are cut into pieces: after every `chunk`, and where `steer` is due."""
        cuts = set(range(0, T, self.chunk))
        if self.keep_rate is not None:
            for seen in self.rows.seen[rows].unique().tolist():
                cuts.update(range(-seen % PERIOD, T, PERIOD))
        return sorted(cuts - {0})

    def prepare(self, rows, tokens):
        """The cache's own rows that `rows`, a slice, names, with room in the table for so many more
        tokens, and steered. They are views: what is written to them stays."""
        self.rows.widen(tokens, self.page_size)
        part = self.rows.part(rows=rows)
        steer(self, part)
        return part

    @torch.inference_mode()
    def begin_step(self, count, rows=slice(None)):
        """Give one token of every sequence whose count (B,) is 1 its slot, in all layers: that of
        the token that leaves the window, if it was evicted, else the row's next one. rows: a slice.
        Raises CacheFull before any page is taken. It waits for a GPU."""
        part = self.prepare(rows, 1)
        is_new = count.repeat_interleave(self.kv_heads) > 0  # (N,)
        token = part.seen  # the new token's position
        W = self.window + 1
        leaves = is_new & (token >= W)  # does token - W exist, which leaves the window?
        oldest = place_of(part, token - W, leaves, self.pool)  # (L, N)
        reuses = leaves & self.pool.evicted.flatten()[oldest]
        appends = is_new & ~reuses
        next_slot = part.length.clone()
        add_pages(part, self.pool, next_slot + appends)
        # token and token - W have the same entry: where the slot is reused, it is right already
        entry = (slice(None), torch.arange(len(token), device=self.device), token % W)
        part.ring[entry] = next_slot.where(appends, part.ring[entry])

    def append_token(self, hidden, ids, count, rows=slice(None)):
        """Append the token ids (B, 1) of every sequence whose count (B,) is 1, after `begin_step`.
        Nothing here waits for a GPU."""
        part = self.rows.part(rows=rows)
        is_new = count.repeat_interleave(self.kv_heads) > 0  # (N,)
        place = place_of(part, part.seen, is_new, self.pool)  # (L, N): of the new pairs
        # of the tokens that the logits are about
        subject = self.newest_place(part, is_new) if self.shift else place
        # views: what is written to them is the pool's own
        keys, values, position, evicted = (slots.flatten(0, 1) for slots in self.pool.slots)
        position[place] = part.seen.int()
        evicted[place] = False  # until it is decided

        def attend(layer, q, k, v, logits):  # T = 1
            keys[place[layer]] = k.flatten(0, 2)
            values[place[layer]] = v.flatten(0, 2)
            if logits is not None:
                evicted[subject[layer]] = logits.flatten() > part.threshold
            q_by_row = q.reshape(len(is_new), -1, q.shape[3])  # (N, G, D)
            return self.kernels.attend_one(q_by_row, part.part(layer), self.pool).reshape(q.shape)

        self.reads += (part.length * is_new).sum()
        return self.run(hidden, ids, attend, part, is_new)

    def append_block(self, hidden, ids, count, rows):
        """Append ids[b, :count[b]] to each sequence, ids (B, T)."""
        T = ids.shape[1]
        part = self.prepare(rows, T)
        new = count.repeat_interleave(self.kv_heads)  # (N,)
        newest = self.newest_place(part, new > 0)
        evicted = self.pool.evicted.flatten()
        # With shift 1 a row's last real token is not decided yet: the logit that by_subject gives
        # it may be that of padding.
        is_decided = torch.arange(T, device=self.device) < (new - self.shift)[:, None]  # (N, T)

        def attend(layer, q, k, v, logits):
            evict = torch.zeros_like(is_decided)
            if logits is not None:
                z = logits.flatten(0, 1)  # (N, T)
                evict = by_subject(z, self.shift) > part.threshold[:, None]
                evict &= is_decided
                if self.shift:  # the first logit is about a token that is stored already
                    evicted[newest[layer]] = z[:, 0] > part.threshold
            block = (k.flatten(0, 1), v.flatten(0, 1), evict, new)
            where = (part.part(layer), self.pool, self.window)
            # q as (N, G, T, D)
            y = self.kernels.attend_block(q.reshape(len(new), -1, *q.shape[2:]), *block, *where)
            store(*block, *where)
            return y.reshape(q.shape)

        self.reads += ((part.length + new) * (new > 0)).sum()
        return self.run(hidden, ids, attend, part, new)

    def newest_place(self, part, is_new):
        """Where the newest token that each row has seen lies, (L, N) int64. With shift 1 it is the
        one that a row's first new logit is about."""
        return place_of(part, part.seen - 1, is_new & (part.seen > 0), self.pool)

    def run(self, hidden, ids, attend, part, new):
        """The states (B, T, C) of ids; afterwards they count as seen."""
        states = hidden(ids, attend, part.seen[:: self.kv_heads, None])
        part.seen += new  # a view of the cache's own
        return states

    # -------------------------------------------------------------------------- Ending and forking

    @torch.inference_mode()
    def release(self, sequences):
        """End sequences: their pages are free again, and their rows empty."""
        rows = self.rows_of(set(sequences))
        self.count_ended(rows)
        self.rows.seen[rows] = 0
        self.rows.length[:, rows] = 0
        self.pool.free_all_but(self.rows)

    @torch.inference_mode()
    def select(self, sequences):
        """From now on sequence i continues what sequences[i] has seen: name one several times to
        fork it, do not name it to drop it. Forks share the pages that they will not write to.
        Raises CacheFull before anything has changed."""
        chosen = fork(self.rows, self.rows_of(sequences), self.pool)
        self.count_ended(self.rows_of(set(range(self.batch_size)).difference(sequences)))
        if len(sequences) != self.batch_size:
            self.rows = chosen
            return
        # in place where the shapes allow it, since a CUDA graph (generate.py) holds these addresses
        for name, mine in vars(self.rows).items():
            mine.copy_(getattr(chosen, name))

    # ------------------------------------------------------------------------------------ Counting

    def positions(self, sequence, layer, head):
        """The positions of the tokens whose pairs a KV head holds, ascending, (n,) int32."""
        row = sequence * self.kv_heads + head
        [position] = held([self.pool.position], self.rows.part(layer), row)
        return position.sort().values

    def count_ended(self, rows):
        """Note what sequences hold that end now. rows: the numbers of their rows."""
        self.ended_tokens += int(self.rows.seen[rows].sum()) // self.kv_heads  # a row for each head
        self.ended_pairs += int(self.rows.length[:, rows].sum())

    def compression_ratio(self):
        """Tokens seen so far x L x Hkv / the pairs held at their ends, None before any token."""
        pairs = self.ended_pairs + int(self.rows.length.sum())
        tokens = self.ended_tokens + int(self.seen.sum())
        return tokens * self.layers * self.kv_heads / pairs if pairs else None

    def stats(self):
        """Of the sequences in the cache now:
            tokens          appended to them
            pairs           held, and pairs_per_head [L][Hkv]
            pages           in use, and page_bytes
        Of all so far, ended ones included:
            compression_ratio
            peak_page_bytes
            reads           pairs attended to, summed over steps (a block counts as one step)
        """
        pages = len(self.pool) - self.pool.free_count
        most_pages = len(self.pool) - self.pool.least_free
        by_head = self.rows.length.view(self.layers, -1, self.kv_heads).sum(1)  # (L, Hkv)
        return {
            "tokens": int(self.seen.sum()),
            "pairs": int(by_head.sum()),
            "compression_ratio": self.compression_ratio(),
            "reads": int(self.reads),
            "pages": pages,
            "page_bytes": pages * self.page_bytes,
            "peak_page_bytes": most_pages * self.page_bytes,
            "pairs_per_head": by_head.tolist(),
        }
