"""
What the kernels read and write: pages of slots, and what each row holds in them.

A row is one KV head of one sequence in one layer. It holds `length` key/value pairs, in slots that
are numbered from 0 and lie in the pages of its table. A slot says whose pair it holds, by position,
and what was decided about it; the ring says in which slot each token of the window lies.

Letters: L layers, N = B * Hkv rows of a layer, of which row b * Hkv + h is KV head h of sequence b;
P pages in the pool; M columns of the page table; W = window + 1 entries of the ring; D head size.
"""
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from checkpoint import InputError


class CacheFull(InputError):
    """No page is left for a token that must be stored."""


class PagePool:
    """Pages of slots for all rows of all layers, and a stack of those that no row has."""

    def __init__(self, pages, page_size, head_dim, dtype, device):
        slots = (pages, page_size)
        self.keys = torch.empty(*slots, head_dim, dtype=dtype, device=device)  # (P, page_size, D)
        self.values = torch.empty(*slots, head_dim, dtype=dtype, device=device)
        self.position = torch.empty(slots, dtype=torch.int32, device=device)  # of a slot's token
        self.evicted = torch.zeros(slots, dtype=torch.bool, device=device)  # the decision about it
        # the free pages are free[:free_count], the top of the stack being the last of them
        self.free = torch.arange(pages, dtype=torch.int32, device=device).flip(0)  # (P,)
        self.free_count = torch.full((1,), pages, dtype=torch.int32, device=device)

    def __len__(self):
        return len(self.free)

    @staticmethod
    def page_bytes(page_size, head_dim, dtype):
        """Of a page's keys, values, positions and decisions."""
        return page_size * (2 * head_dim * dtype.itemsize + 4 + 1)

    def check(self, count, free):
        """Raise CacheFull unless there are `count` pages among those that are free."""
        if free < count:
            pages = f"of its {len(self)} pages {free} are free and {count} needed"
            raise CacheFull(f"the cache is full: {pages}; allow more memory or fewer sequences")

    def take(self, count):
        """The numbers of `count` free pages, (count,) int32, from the top of the stack down. Raises
        CacheFull, taking none."""
        top = int(self.free_count)
        self.check(count, top)
        self.free_count -= count
        return self.free[top - count : top].flip(0)

    def free_all_but(self, in_use):
        """Put every page on the stack that is not in `in_use`, an integer tensor."""
        is_free = torch.ones(len(self), dtype=torch.bool, device=self.free.device)
        is_free[in_use.long()] = False
        pages = is_free.nonzero()[:, 0]
        self.free[: len(pages)] = pages.flip(0)
        self.free_count.fill_(len(pages))

    def copy(self, source, target):
        """Copy pages `source` to pages `target`, (n,) integers each."""
        for slots in (self.keys, self.values, self.position, self.evicted):
            slots[target.long()] = slots[source.long()]


@dataclass
class Rows:
    """What every row holds, and where. Without the leading L: the rows of one layer."""

    seen: torch.Tensor  # (N,) int64: tokens fed so far, which is the next one's position
    length: torch.Tensor  # (L, N) int32: pairs held, which are slots 0 to length - 1 of the row
    table: torch.Tensor  # (L, N, M) int32: the row's pages, in order of its slots
    ring: torch.Tensor  # (L, N, W) int32: the slot of token t, at t mod W, while it is in the window

    @classmethod
    def empty(cls, L, N, W, device):
        shapes = ((L, N), (L, N, 1), (L, N, W))
        zeros = [torch.zeros(shape, dtype=torch.int32, device=device) for shape in shapes]
        return cls(torch.zeros(N, dtype=torch.int64, device=device), *zeros)

    def layer(self, layer):
        return Rows(self.seen, self.length[layer], self.table[layer], self.ring[layer])

    def select(self, index):
        """Some of the rows: views for a slice, copies for a tensor of indices."""
        by_layer = [x[:, index] for x in (self.length, self.table, self.ring)]
        return Rows(self.seen[index], *by_layer)

    def copy_(self, other):
        for name, mine in vars(self).items():
            mine.copy_(getattr(other, name))

    def widen(self, columns):
        """Make the page tables this wide at least. A table that must grow is replaced, by one with
        room to spare."""
        present = self.table.shape[2]
        if columns > present:
            self.table = F.pad(self.table, (0, columns - present + present // 2))

    def positions(self, layer, row, pool):
        """The positions of the tokens whose pairs a row holds, ascending, (n,) int32."""
        length = int(self.length[layer, row])
        page_size = pool.keys.shape[1]
        pages = self.table[layer, row, : -(-length // page_size)].long()
        return pool.position[pages].flatten()[:length].sort().values

    def is_page(self, page_size):
        """Which entries of the table mean a page, (L, N, M) bool."""
        column = torch.arange(self.table.shape[2], device=self.table.device)
        return column < -(-self.length // page_size)[:, :, None]

    def pages_in_use(self, page_size):
        """The pages that rows have, (n,) int32; one that forks share as often as it is shared."""
        return self.table[self.is_page(page_size)]

    def pages_to_be_written(self, page_size):
        """Which pages a row may still write to, (L, N, M) bool: those with a slot of the window,
        since it may fall free, and the last one, unless it is full."""
        next_slot = self.length[:, :, None]
        entry = torch.arange(self.ring.shape[2], device=self.ring.device)
        # A row that has seen t < W tokens has set t entries of its ring. The others are replaced by
        # the next slot, whose page is marked in any case.
        is_set = entry < self.seen[:, None]
        slots = torch.where(is_set, self.ring, next_slot)
        column = torch.cat((slots, next_slot), dim=2) // page_size
        L, N, M = self.table.shape
        # The next slot may belong to a page that the row does not have yet, in column M at most. So
        # there is one column more than in the table, and marks of such pages are dropped below.
        written = torch.zeros(L, N, M + 1, dtype=torch.bool, device=self.table.device)
        written.scatter_(2, column.long(), True)
        return written[:, :, :M] & self.is_page(page_size)


def fork(rows, index, is_copy, pool):
    """New Rows, of which row i continues rows[index[i]]; what `index` does not name is dropped.

    index: (n,) int64. is_copy: (n,) bool, whether an earlier row continues the same one. A copy
    gets pages of its own in place of those that may still be written to; the others it shares.
    Raises CacheFull, before anything has changed, if there are not pages enough for that.
    """
    page_size = pool.keys.shape[1]
    forked = rows.select(index)
    to_copy = forked.pages_to_be_written(page_size) & is_copy[:, None]
    originals = forked.table[to_copy]
    in_use = forked.pages_in_use(page_size)
    left = len(pool) - len(in_use.unique())
    if len(originals) > left:
        raise CacheFull(f"the cache is full: forks need {len(originals)}, {left} of its {len(pool)} would be free")
    pool.free_all_but(in_use)
    own = pool.take(len(originals))
    pool.copy(originals, own)
    forked.table[to_copy] = own
    return forked


def free_memory(device):
    """Bytes that a GPU has free, or that a CPU's machine has in all."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 16e9
