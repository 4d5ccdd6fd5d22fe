"""
The KV cache: pages, slots and the ring.

A *row* is one KV head of one sequence in one layer. Each row holds its own number of key/value
pairs, in pages of `page_size` slots that come from one pool. Attention does not care in which order
keys are stored, since RoPE is already inside them. Hence the whole trick:

    token j = t - (window + 1) leaves the window as token t arrives
        j was evicted  ->  t is written over j's slot          (the row's length stays)
        j was kept     ->  t is appended                       (length + 1)

Nothing is ever moved. Each slot says whose pair it holds, by position, and what was decided about
it. A row's ring has window + 1 entries: entry t mod (window + 1) is the slot of token t.

A block of new tokens attends first and is stored afterwards: its last token may take the slot of a
pair that its first token still sees. A dense model's cache just evicts nothing.

A decoding step, one token for each row, is simpler, since no other new token needs the old pair. So
`begin_step` gives the token its slot, in all layers at once. Each layer then stores its pair there
first, and attends to all that its rows hold, the new pair included.

All of it is plain PyTorch. kernels/ has faster functions for both kinds of attention; without that
folder everything still runs. This file knows nothing of training, of tokenizers, or of how the
model comes to its decisions; it can only shift their threshold (`steer`).

Letters: those of dms.py, and N = B * Hkv rows of a layer, where row b * Hkv + h is KV head h of
sequence b; P pages in the pool; M columns of the page table; W = window + 1 entries of the ring.
"""

import os
from collections import namedtuple
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from dms import attention, decisions, visible


class CacheFull(RuntimeError):
    """No page is left for a token that must be stored."""


# ------------------------------------------------------------------------------------------- Pages


class PagePool:
    """Pages of slots for all rows of all layers, and a stack of those that no row has. A slot's
    *place* is its number in the pool, page * page_size + slot of the page. latent: the values are
    the first so many channels of the keys (mla.py), and no memory of their own."""

    def __init__(self, pages, page_size, head_dim, dtype, device, latent=None):
        shape = (pages + 1, page_size)
        self.page_size = page_size
        self.nowhere = pages * page_size  # a place in the last page, which no row ever has
        with torch.device(device):
            self.keys = torch.empty(*shape, head_dim, dtype=dtype)  # (P + 1, page_size, D)
            self.values = self.keys[..., :latent] if latent else torch.empty_like(self.keys)
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

    def free_all_but(self, in_use, needed=0):
        """Put every page on the stack that is not in `in_use`, an integer tensor. Since forks share
        pages, a page is free once no table names it: so the tables are asked, and nothing needs to
        count references. Raises CacheFull, freeing none, if that makes fewer than `needed`."""
        is_free = torch.ones_like(self.free, dtype=torch.bool)
        is_free[in_use] = False
        pages = is_free.nonzero()[:, 0]
        self.check(needed, len(pages))
        self.free[: len(pages)] = pages
        self.free_count = len(pages)


@dataclass
class Rows:
    """What every row holds, and where. rows.layer(l) is the same of one layer, without the L."""

    seen: torch.Tensor  # (N,) int64: tokens appended so far, which is the next one's position
    extra_offset: torch.Tensor  # (N,) float32: beside the model's, of the next token's decision
    length: torch.Tensor  # (L, N) int32: pairs held, in slots 0 to length - 1 of the row
    table: torch.Tensor  # (L, N, M) int32: the row's pages, in order of its slots
    ring: torch.Tensor  # (L, N, W) int32: the slot of token t, at t mod W

    def layer(self, layer):
        by_layer = (self.length[layer], self.table[layer], self.ring[layer])
        return Rows(self.seen, self.extra_offset, *by_layer)

    def select(self, index):
        """The rows of an index: views for a slice, copies for a tensor of numbers."""
        by_row = (self.seen[index], self.extra_offset[index])
        return Rows(*by_row, self.length[:, index], self.table[:, index], self.ring[:, index])

    def pages_in_use(self, page_size):
        """Which entries of the table name a page, (L, N, M) bool."""
        M = self.table.shape[-1]
        column = torch.arange(M, device=self.table.device)
        first_slot = column * page_size
        return first_slot < self.length[..., None]

    def pages_to_be_written(self, page_size):
        """Which pages a row may still write to, (L, N, M) bool: those with a slot of the window.

        A last page with room is among them, since a row's last slot always holds a token of the
        window: if that token leaves and is kept, a newer one has been appended behind it. Before a
        row has seen W tokens some entries of its ring are still 0, and mark its first page; that
        one holds a token of the window then anyway."""
        column = self.ring // page_size
        written = torch.zeros_like(self.table, dtype=torch.bool)
        written.scatter_(2, column.long(), True)
        return written & self.pages_in_use(page_size)


def fork(rows, index, pool):
    """New Rows, whose row i continues rows[index[i]]. What `index`, (n,) int64, does not name is
    dropped. The first row that continues an old one takes over its pages. Each further one is a
    copy: it shares the pages that are full and final, and gets its own of those that may still be
    written to. Raises CacheFull before anything has changed."""
    forked = rows.select(index)
    is_same = index[:, None] == index
    is_copy = is_same.tril(-1).any(dim=1)  # of an earlier row
    to_copy = forked.pages_to_be_written(pool.page_size) & is_copy[:, None]
    originals = forked.table[to_copy]  # in use: the first that continues a row keeps them
    in_use = forked.pages_in_use(pool.page_size)
    pool.free_all_but(forked.table[in_use], needed=len(originals))
    own = pool.take(len(originals))
    forked.table[to_copy] = own
    for slots in pool.slots:
        slots[own] = slots[originals]
    return forked


# --------------------------------------------------------- The rule in memory, for one layer's rows


def place_of(rows, token, exists, pool):
    """Where the pair of a token of each row lies in the pool, (..., N) int64: rows are those of all
    layers or of one. token: (N,) positions, in the window; `nowhere` where not exists (N,) bool."""
    entry = (token % rows.ring.shape[-1])[:, None].expand_as(rows.ring[..., :1])
    slot = rows.ring.gather(-1, entry).long()
    column = slot // pool.page_size
    page = rows.table.gather(-1, column)
    first_slot = page.long() * pool.page_size
    place = first_slot + slot % pool.page_size
    return place[..., 0].where(exists, pool.nowhere)


def held(slots, rows, row):
    """Copies of what the n slots of one row hold, in order: [(n, ...)] of tensors (P, page_size,
    ...) of the pool."""
    n = int(rows.length[row])
    page_size = slots[0].shape[1]
    pages = rows.table[row, : -(-n // page_size)]
    return [x[pages].flatten(0, 1)[:n] for x in slots]


def add_pages(rows, pool, length):
    """From now on the rows hold `length` (..., N) pairs: give them the pages for it. Raises
    CacheFull before anything has changed."""
    lacks = replace(rows, length=length).pages_in_use(pool.page_size)  # (..., N, M)
    lacks &= ~rows.pages_in_use(pool.page_size)
    pages = pool.take(int(lacks.sum()))
    rows.length.copy_(length)
    rows.table[lacks] = pages


def store(k, v, evict, new, rows, pool, window):
    """Store new tokens, and free the slots of what nobody will see any more.

    Afterwards only what the last new token sees is of use. So every pair held that it does not see
    leaves its slot open, and a new token that it does not see is never stored. All slots behind the
    row's last one are open, too. The other new tokens, the survivors, take the open slots in order:

        slots held      a  b  c  d  e         b and d were evicted, and now leave the window
        open            -  1  -  3  -  5  6   their slots, and all behind the last
        survivors       x  y  z               the new tokens that are stored
        afterwards      a  x  c  y  e  z

    No hole is left below the new length. At most min(new, W) tokens leave the window, so there are
    at most so many holes. And at least so many tokens survive: the last min(new, W) new ones, which
    are in the window.

    k, v: (N, T, D), the pool's dtype; evict: (N, T) bool, what was decided about these tokens; new:
    (N,) int64, how many of the T are real. All of the rows' state is updated but `seen`. Pages that
    are written to must not be shared, and the tables must have room. Raises CacheFull, after which
    the rows must be released.
    """
    # (N, S), S = M * page_size. Entries that name no page give anything, which in_use leaves out.
    position = pool.position[rows.table].flatten(1)
    evicted = pool.evicted[rows.table].flatten(1)
    slot = torch.arange(position.shape[1], device=k.device)
    in_use = slot < rows.length[:, None]
    t = torch.arange(evict.shape[1], device=k.device)
    token = (rows.seen[:, None] + t).int()  # (N, T): the new tokens' positions
    last = (rows.seen + new - 1)[:, None]  # (N, 1): that of the last real one
    stays = in_use & visible(last, position, evicted, window)  # (N, S)
    survives = visible(last, token, evict, window)  # (N, T); padding comes after `last`: False

    length = stays.sum(1) + survives.sum(1)
    add_pages(rows, pool, length)
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
    entry = token[row, i[recent]] % W
    rows.ring[row, entry] = target[recent].int()


# ------------------------------------------------------------------- Attention, of one layer's rows


def attend_block(q, k, v, evict, new, rows, pool, window):
    """Attention of new tokens, none of which is stored yet, to all that the rule lets them see.

    q: (N, G, T, D); k, v: (N, T, D), the pool's dtype; evict: (N, T) bool, what was decided about
    these tokens; new: (N,) int64, how many of the T are real. Returns (N, G, T, D), of the values'
    size; its padding is finite but means nothing. Rows are taken one by one, which bounds the
    memory of the mask.
    """
    if not (rows.length.any() or evict.any()):  # nothing but causal, which is faster said so
        return attention(q, k[:, None], v[:, None])
    y = torch.zeros_like(q[..., : v.shape[-1]])
    for row, n in enumerate(new.tolist()):
        if n == 0:
            continue
        old = held(pool.slots, rows, row)  # S pairs
        t = torch.arange(n, device=k.device)
        token = rows.seen[row] + t  # (n,): the new tokens' positions
        block = (k[row, :n], v[row, :n], token, evict[row, :n])
        # keys and values (S + n, D), position and evicted (S + n,): what is held, then the block
        keys, values, position, evicted = (torch.cat(pair) for pair in zip(old, block))
        mask = visible(token[:, None], position, evicted, window)  # (n, S + n)
        # as a batch of one, and of one KV head
        query = q[None, row, :, :n]
        out = attention(query, keys[None, None], values[None, None], mask)
        y[row, :, :n] = out[0]
    return y


def attend_one(q, rows, pool):
    """Attention of a single query of each head, q (N, G, D), to all that its row holds. Returns
    (N, G, D), of the values' size, 0 for a row that holds nothing."""
    y = torch.zeros_like(q[..., : pool.values.shape[-1]])
    for row in rows.length.nonzero()[:, 0].tolist():
        keys, values = held((pool.keys, pool.values), rows, row)
        out = F.scaled_dot_product_attention(q[None, row], keys[None], values[None])
        y[row] = out[0]
    return y


Kernels = namedtuple("Kernels", "attend_one attend_block")
PLAIN = Kernels(attend_one, attend_block)


def choose_kernels(device, dtype, head_dim):
    """Triton's on a GPU, numba's for a step on a CPU, and the plain ones elsewhere."""
    try:
        if device.type == "cuda" and head_dim <= 256:
            from kernels import attention

            return Kernels(attention.attend_one, attention.attend_block)
        if device.type == "cpu" and dtype == torch.float32:
            from kernels import cpu

            return Kernels(cpu.attend_one, attend_block)
    except (ImportError, RuntimeError):
        pass  # no Triton, numba or kernels/, or no folder in which numba may keep compiled code
    return PLAIN


# --------------------------------------------------------------------------------------- The cache


def attend_piece(cache, rows, new, place, subject, layer, q, k, v, logits):
    """The `attend` of Model.hidden for a piece of input, once KVCache.pieces has given the first
    five arguments. Called for every layer, it attends to what the cache holds and to the piece
    itself, and stores the piece.

    rows: those of the piece, of all layers. new (N,) int64: how many of the T tokens are real.
    place (L, N) int64: in a decoding step, the place of the new pairs in the pool; else None.
    subject (L, N) int64: the place of the pairs, already in the pool, that the first new logits
    decide about; None if they decide about new tokens. q (B, Hq, T, D); k, v (B, Hkv, T, D);
    logits (B, Hkv, T) or None -> (B, Hq, T, D).
    """
    pool = cache.pool
    rows = rows.layer(layer)
    k = k.flatten(0, 1)  # (N, T, D)
    v = v.flatten(0, 1)
    N, T, D = k.shape
    q_by_row = q.reshape(N, -1, T, D)  # (N, G, T, D)
    if logits is None:
        logits = k.new_full((N, T), -1.0)  # keep everything
    logits = logits.reshape(N, T)
    if cache.keep_rate:
        logits = logits - rows.extra_offset[:, None]
    keys, values, _, evicted = (slots.flatten(0, 1) for slots in pool.slots)
    if subject is not None:
        evicted[subject[layer]] = logits[:, 0] > 0
    if place is not None:
        keys[place[layer]] = k[:, 0]
        values[place[layer]] = v[:, 0]
        y = cache.kernels.attend_one(q_by_row[:, :, 0], rows, pool)
        return y.reshape(*q.shape[:3], -1)
    evict = decisions(logits, cache.shift)  # (N, T)
    if cache.shift == 1:
        # Each row's last real token is left undecided. A row that rests has none: -1 is then its
        # padding, whose decision is not read.
        row = torch.arange(N, device=k.device)
        evict[row, new - 1] = False
    new_pairs = (k, v, evict, new)
    y = cache.kernels.attend_block(q_by_row, *new_pairs, rows, pool, cache.window)
    store(*new_pairs, rows, pool, cache.window)
    return y.reshape(*q.shape[:3], -1)


def usable_memory(device):
    """Bytes that a GPU has free, or that this machine, or the container around us, has in all."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # it may say "max"
        container = Path("/sys/fs/cgroup/memory.max").read_text()
        memory = min(memory, int(container))
    return memory


PERIOD = 128  # tokens between two settings of a sequence's extra offset; see KVCache.steer
OFFSET_PER_NAT = 8.0  # logits that e times as many pairs lie above, after a warm start


class KVCache:
    """The per-head paged cache of a batch of sequences, each of its own length.

        cache = KVCache(model.config, batch_size=B)
        model(ids, cache=cache)                    # appends T tokens to every sequence, or
        model(ids, cache=cache, lengths=lengths)   # lengths[b] <= T to sequence b
        model(ids[:1], cache=cache, sequence=2)    # to this one alone
        cache.select([0, 0, 0])                    # three continuations of sequence 0
        cache.release([1])                         # its pages are free again
    """

    def __init__(
            self, config, batch_size, device="cpu", dtype=torch.float32,
            page_size=None, chunk=None, memory=None, budget=None):
        """config: a ModelConfig; device, dtype: the model's. page_size: slots of a page. chunk: the
        most tokens computed at a time. memory: bytes of the pool. By default it has room for the
        whole context without eviction, but takes at most 80% of a machine's memory, or of what a
        GPU has free. (On a CPU a page takes memory only once it is written to.) budget: (pairs that
        a head of each sequence shall hold, on average over heads; after how many tokens), see
        `steer`. By default the model's own offset decides, whatever number that comes to."""
        self.device = torch.device(device)
        default = 64 if config.key_dim >= 64 else 32
        self.page_size = page_size = page_size or default
        default = 2048 if self.device.type == "cuda" else 512
        self.chunk = chunk or default
        self.layers = L = config.num_hidden_layers
        self.kv_heads = config.kv_heads
        eviction = config.eviction
        self.window = eviction.window if eviction else 0
        self.shift = eviction.shift if eviction else 0
        if self.window < self.shift:
            raise ValueError("shift 1 needs a window of 1 or more")
        self.keep_rate = None  # the share of the tokens behind the window that are to be kept
        if budget and eviction:
            pairs, tokens = (max(n - self.window - 1, 1) for n in budget)
            self.keep_rate = pairs / tokens
        latent = config.kv_lora_rank  # no kernel takes values that are part of the keys
        self.kernels = PLAIN if latent else choose_kernels(self.device, dtype, config.head_dim)
        self.decode_step = None  # generate.py's CUDA graph, which lives as long as these tensors

        N = batch_size * self.kv_heads  # rows of a layer
        # a slot has a key, perhaps a value, a position (4 bytes) and a decision (1 byte)
        pair_bytes = config.key_dim * dtype.itemsize * (1 if latent else 2)
        slot_bytes = pair_bytes + 5
        self.page_bytes = page_size * slot_bytes
        pages = L * N * -(-config.context // page_size)  # the whole context
        if memory is None:
            memory = min(pages * self.page_bytes, 0.8 * usable_memory(self.device))
        pages = max(int(memory / self.page_bytes), 1)
        self.pool = PagePool(pages, page_size, config.key_dim, dtype, self.device, latent)
        seen = torch.zeros(N, dtype=torch.int64, device=self.device)
        zeros = partial(seen.new_zeros, dtype=torch.int32)
        self.rows = Rows(
            seen,
            extra_offset=zeros(N, dtype=torch.float32),
            length=zeros(L, N),
            table=zeros(L, N, 1),
            ring=zeros(L, N, self.window + 1))

        # counted on the device, since a replayed CUDA graph adds to them; see stats
        self.reads = seen.new_zeros(1)
        self.peak_pairs = seen.new_zeros(1)
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
        by_sequence = rows.view(-1, self.kv_heads)  # (B, Hkv)
        return by_sequence[list(sequences)].flatten()

    # ----------------------------------------------------------------------------------- Appending

    @contextmanager
    def append(self, ids, lengths=None, sequence=None):
        """`with cache.append(ids) as pieces:` gives what `pieces` yields. Arguments: as for
        Model.states.

        CacheFull for a single token is raised before anything has changed. Whatever is raised
        later comes when one layer has stored a piece and the next has not: so the sequences that
        the ids belong to are released, with all that they held.
        """
        sequences = range(self.batch_size)
        if sequence is not None:
            sequences = sequences[sequence : sequence + 1]
        B, T = ids.shape
        lengths = [T] * B if lengths is None else lengths
        count = torch.as_tensor(lengths, dtype=torch.int64, device=self.device)
        is_possible = count.clamp(0, T).equal(count)
        if not (is_possible and len(count) == B == len(sequences)):
            raise ValueError(f"ids and lengths must be of {len(sequences)} sequences, and each "
                             f"length from 0 to {T}")
        # a slice, by which Rows.select gives views
        rows = slice(sequences.start * self.kv_heads, sequences.stop * self.kv_heads)
        if T == 1:
            self.begin_step(count, rows)
        try:
            yield self.pieces(ids, count, rows)
        except BaseException:
            disturbed = [b for b, n in zip(sequences, count.tolist()) if n]
            self.release(disturbed)
            raise

    def pieces(self, ids, count, rows=slice(None)):
        """Yield (piece of ids, its `attend`, (B, 1) the position of each sequence's first token)
        for pieces of at most `chunk` tokens. A piece counts as seen when the next one is asked for,
        so the caller must run the loop to its end.
        For a single token nothing here waits for a GPU, and the caller has called `begin_step`."""
        length = ids.shape[1]
        is_step = length == 1
        cuts = set(range(0, length, self.chunk))
        if self.keep_rate and not is_step:
            for seen in self.rows.seen[rows].unique().tolist():
                cuts.update(range(-seen % PERIOD, length, PERIOD))
        for piece in ids.tensor_split(sorted(cuts - {0}), dim=1):
            T = piece.shape[1]
            if not is_step:
                self.widen_tables(T)
            part = self.rows.select(rows)
            of_sequence = count.clamp(max=T)
            new = of_sequence.repeat_interleave(self.kv_heads)  # (N,)
            is_new = new > 0
            start = part.seen[:: self.kv_heads, None]
            place = subject = None
            attended = part.length
            if is_step:
                place = place_of(part, part.seen, is_new, self.pool)
            else:
                self.steer(part)
                attended = part.length + new  # the pairs held before the block, and its own
            if is_step or self.shift == 1:
                token = part.seen - self.shift
                exists = is_new & (token >= 0)
                subject = place_of(part, token, exists, self.pool)
            yield piece, partial(attend_piece, self, part, new, place, subject), start
            count = count - of_sequence
            part.seen += new  # a view of the cache's own
            self.reads += (attended * is_new).sum()
            self.peak_pairs.clamp_(min=self.rows.length.sum())  # a running maximum, in place

    def steer(self, part):
        """Set the extra offset of sequences that have seen a multiple of PERIOD tokens, so that
        their heads hold keep_rate times what is behind the window, on average, besides the window.

        A decision shows in the number of pairs only after a window, and the next correction comes
        after a period. So the offset is chosen to make up for the difference within these. Raising
        it by OFFSET_PER_NAT keeps e times as many. Since the pairs held are a sum of decisions,
        this is integral control. The offset depends on nothing but what was seen and is held: it
        is the same however the input is cut."""
        if self.keep_rate is None:
            return
        W = self.window + 1
        behind = (part.seen - W).clamp(min=0)
        wanted = part.seen.clamp(max=W) + self.keep_rate * behind  # (N,)
        held = part.length.float().mean(0)  # (N,), over layers
        by_sequence = held.view(-1, self.kv_heads).mean(1)  # (B,)
        lacking = wanted - by_sequence.repeat_interleave(self.kv_heads)
        usual = self.keep_rate * (PERIOD + W)  # what is kept in that time
        offset = OFFSET_PER_NAT * lacking / usual
        is_due = part.seen % PERIOD == 0
        part.extra_offset.copy_(torch.where(is_due, offset, part.extra_offset))

    @torch.inference_mode()
    def begin_step(self, count, rows=slice(None)):
        """Give one token of every sequence whose count (B,) is 1 its slot, in all layers: that of
        the token that leaves the window, if it was evicted, or the row's next one. Raises CacheFull
        before anything has changed. It waits for the GPU, twice."""
        self.widen_tables(1)
        part = self.rows.select(rows)
        pool = self.pool
        self.steer(part)
        is_new = count.repeat_interleave(self.kv_heads) > 0  # (N,)
        t = part.seen  # the new token's position
        W = self.window + 1
        leaves = is_new & (t >= W)
        oldest = place_of(part, t, leaves, pool)  # of token t - W, which has t's entry in the ring
        was_evicted = pool.evicted.flatten()[oldest]  # (L, N)
        is_next = is_new & ~(was_evicted & leaves)
        slot = part.length.clone()
        add_pages(part, pool, slot + is_next)
        row = torch.arange(len(t), device=self.device)
        present = part.ring[:, row, t % W]
        part.ring[:, row, t % W] = torch.where(is_next, slot, present)
        place = place_of(part, t, is_new, pool)
        pool.position.flatten()[place] = t.int()
        pool.evicted.flatten()[place] = False  # until it is decided

    def widen_tables(self, tokens):
        """Make room in the page tables for the longest row and `tokens` more. A table that must
        grow is replaced, by one with room to spare."""
        longest = int(self.rows.length.max())
        present = self.rows.table.shape[2]
        missing = -(-(longest + tokens) // self.page_size) - present
        if missing > 0:
            more = missing + present // 2
            self.rows.table = F.pad(self.rows.table, (0, more))

    # -------------------------------------------------------------------------- Ending and forking

    @torch.inference_mode()
    def release(self, sequences):
        """End sequences: their pages are free again, and their rows empty."""
        rows = self.rows_of(set(sequences))
        self.count_ended(rows)
        self.rows.seen[rows] = 0
        self.rows.length[:, rows] = 0
        in_use = self.rows.pages_in_use(self.page_size)
        self.pool.free_all_but(self.rows.table[in_use])

    @torch.inference_mode()
    def select(self, sequences):
        """From now on sequence i continues what sequences[i] has seen: name one several times to
        fork it, do not name it to drop it. Forks share the pages that they will not write to.
        Raises CacheFull before anything has changed."""
        index = self.rows_of(sequences)
        chosen = fork(self.rows, index, self.pool)
        dropped = set(range(self.batch_size)).difference(sequences)
        self.count_ended(self.rows_of(dropped))
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
        rows = self.rows.layer(layer)
        [position] = held([self.pool.position], rows, row)
        return position.sort().values

    def count_ended(self, rows):
        """Note what sequences hold that end now. rows: the numbers of their rows."""
        tokens = self.rows.seen[rows].sum() // self.kv_heads  # each has a row for every head
        pairs = self.rows.length[:, rows].sum()
        self.ended_tokens += int(tokens)
        self.ended_pairs += int(pairs)

    def compression_ratio(self):
        """Tokens seen so far x L x Hkv / the pairs held at their ends, None before any token."""
        pairs = self.ended_pairs + int(self.rows.length.sum())
        tokens = self.ended_tokens + int(self.seen.sum())
        dense = tokens * self.layers * self.kv_heads
        return dense / pairs if pairs else None

    def stats(self):
        """Of the sequences in the cache now:
            tokens          appended to them
            pairs           held, and pairs_per_head [L][Hkv]
            pages           in use, and page_bytes
        Of all so far, ended ones included:
            compression_ratio
            peak_pairs      the most held at once, and peak_page_bytes
            reads           pairs attended to, summed over steps (a block counts as one step)
        """
        pages = len(self.pool) - self.pool.free_count
        most_pages = len(self.pool) - self.pool.least_free
        by_sequence = self.rows.length.view(self.layers, -1, self.kv_heads)  # (L, B, Hkv)
        by_head = by_sequence.sum(1)  # (L, Hkv)
        return {
            "tokens": int(self.seen.sum()),
            "pairs": int(by_head.sum()),
            "compression_ratio": self.compression_ratio(),
            "peak_pairs": int(self.peak_pairs),
            "reads": int(self.reads),
            "pages": pages,
            "page_bytes": pages * self.page_bytes,
            "peak_page_bytes": most_pages * self.page_bytes,
            "pairs_per_head": by_head.tolist(),
        }
