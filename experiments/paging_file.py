"""
A decode step's attention over pairs that lie in a file, beside DMS 8x in memory: the second half of
paging.py, which says what is measured. Shape: Qwen3-0.6B's, one sequence.
"""

import mmap
import os
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from quest import bounds, choose

from kv_cache import PagePool, choose_kernels

HEADS, GROUP, D = 8, 2, 128  # KV heads, query heads to each, head size


class SlowPages:
    """Pages of pairs in a file, keys before values in each: layer by layer, head by head."""

    def __init__(self, file, layers, context, page_size, dtype):
        self.page_size = page_size
        self.per_head = context // page_size
        self.layers = layers
        self.page_bytes = 2 * page_size * D * dtype.itemsize
        self.shape = (layers, HEADS * self.per_head, 2, page_size, D)
        self.file = open(file, "w+b")
        self.write(dtype)
        self.map = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.map.madvise(mmap.MADV_RANDOM)  # nothing is read that was not asked for
        self.pages = torch.frombuffer(self.map, dtype=dtype).view(self.shape)

    def write(self, dtype):
        """Every layer the same, which no reader can know; the bounds, a copy for each layer."""
        torch.manual_seed(0)
        of_layer = torch.randn(self.shape[1:]).to(dtype)
        keys = of_layer[:, 0].unflatten(0, (HEADS, -1))  # (HEADS, P, page_size, D)
        self.least = [keys.amin(2) for _ in range(self.layers)]
        self.greatest = [keys.amax(2) for _ in range(self.layers)]
        for _ in range(self.layers):
            of_layer.view(torch.uint8).numpy().tofile(self.file)
        self.file.flush()
        os.fsync(self.file.fileno())  # what is not written yet cannot be dropped

    def warm(self):
        """Let the system read the whole file, and keep of it what it can."""
        with open(self.file.name, "rb") as file:
            while file.read(2**24):
                pass

    def drop(self):
        """Forget the system's copy of the file."""
        self.map.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def fetch(self, layer, chosen):
        """The chosen pages (HEADS, n) of a layer, as a pool: keys, values (HEADS * n, page_size, D)
        each."""
        first = torch.arange(HEADS)[:, None] * self.per_head
        numbers = (first + chosen).flatten()
        of_layer = layer * HEADS * self.per_head
        for number in numbers.tolist():  # so that the device has many at once to do
            begin = (of_layer + number) * self.page_bytes
            before = begin % mmap.PAGESIZE  # where the system's page begins
            self.map.madvise(mmap.MADV_WILLNEED, begin - before, before + self.page_bytes)
        pages = self.pages[layer].index_select(0, numbers)
        keys, values = pages.unbind(1)
        return SimpleNamespace(keys=keys.contiguous(), values=values.contiguous())


def delivered():
    """Bytes that devices have delivered to this process, None where the system does not say."""
    try:
        fields = Path("/proc/self/io").read_text().split()
        return int(fields[fields.index("read_bytes:") + 1])
    except (OSError, ValueError):
        return None


def quest_step(slow, q, pages, attend):
    """One step's attention, q (L, HEADS, GROUP, D). Returns seconds of choosing, of fetching and of
    attending."""
    seconds = [0.0, 0.0, 0.0]
    table = torch.arange(HEADS * pages, dtype=torch.int32).view(HEADS, pages)
    length = torch.full((HEADS,), pages * slow.page_size, dtype=torch.int32)
    rows = SimpleNamespace(length=length, table=table)
    for layer in range(slow.layers):
        marks = [time.perf_counter()]
        bound = bounds(q[layer], slow.least[layer], slow.greatest[layer])
        chosen = choose(bound, pages)
        marks.append(time.perf_counter())
        fetched = slow.fetch(layer, chosen)
        marks.append(time.perf_counter())
        attend(q[layer], rows, fetched)
        marks.append(time.perf_counter())
        seconds = [s + end - begin for s, begin, end in zip(seconds, marks, marks[1:])]
    return seconds


def measure_quest_step(slow, pages, attend, cold, args):
    """Medians over steps, after one that is not counted."""
    runs = []
    bytes_delivered = []
    for step in range(args.steps + 1):
        q = torch.randn(slow.layers, HEADS, GROUP, D).to(slow.pages.dtype)
        if cold:
            slow.drop()
        elif step == 0:
            slow.warm()
        before = delivered()
        run = quest_step(slow, q, pages, attend)
        after = delivered()
        if step > 0:
            runs.append(run)
            bytes_delivered.append(after and after - before)
    choosing, fetching, attending = (statistics.median(part) for part in zip(*runs))
    of_bounds = 2 * slow.least[0].nbytes * slow.layers
    fetched = slow.layers * HEADS * pages * slow.page_bytes
    buffer = fetched // slow.layers
    in_file = slow.pages.nbytes
    return {
        "seconds": statistics.median(map(sum, runs)),
        "choosing": choosing,
        "fetching": fetching,
        "attending": attending,
        "bytes_fetched": fetched,
        "bytes_delivered": None if after is None else statistics.median(bytes_delivered),
        "bytes_in_memory": of_bounds + buffer + (0 if cold else in_file),
        "bytes_read_in_memory": of_bounds + fetched,
        "bytes_in_file": in_file,
    }


def uneven_lengths(layers, context, cr):
    """Pairs held by each head (L, HEADS), context / cr on average: log-normal with a spread of 1.2,
    as lengths of real heads are, and none above the context."""
    generator = torch.Generator().manual_seed(0)
    share = torch.exp(torch.randn(layers, HEADS, generator=generator) * 1.2)
    for _ in range(50):
        share *= 1 / cr / share.mean()
        share.clamp_(max=1.0)
    return (share * context).round().int().clamp(min=1)


def measure_dms_step(context, attend, dtype, args):
    """A step's attention over the pairs that 8x leaves, in pages scattered over a pool."""
    page_size = 64
    length = uneven_lengths(args.layers, context, args.cr)
    in_use = -(-length // page_size)
    pool = PagePool(int(in_use.sum()), page_size, D, dtype, "cpu")
    pool.keys.normal_()
    pool.values.normal_()
    columns = torch.arange(int(in_use.max()))
    table = torch.zeros(args.layers, HEADS, len(columns), dtype=torch.int32)
    table[columns < in_use[..., None]] = torch.randperm(len(pool)).int()
    runs = []
    for _ in range(args.steps + 1):
        q = torch.randn(args.layers, HEADS, GROUP, D).to(dtype)
        begin = time.perf_counter()
        for layer in range(args.layers):
            attend(q[layer], SimpleNamespace(length=length[layer], table=table[layer]), pool)
        runs.append(time.perf_counter() - begin)
    read = 2 * int(length.sum()) * D * dtype.itemsize
    return {
        "seconds": statistics.median(runs[1:]),
        "bytes_fetched": 0,
        "bytes_in_memory": sum(slots.nbytes for slots in pool.slots),
        "bytes_read_in_memory": read,
        "bytes_in_file": 0,
    }


def run_file(results, args):
    dtype = getattr(torch, args.dtype)
    attend = choose_kernels(torch.device("cpu"), dtype, 128).attend_one
    file = Path(args.file)
    file.parent.mkdir(parents=True, exist_ok=True)
    for context in args.contexts:
        keys = dict(part="file", context=context, method="DMS")
        if not results.has(**keys):
            results.add(**keys, **measure_dms_step(context, attend, dtype, args))
        keys["method"] = "Quest"
        if results.has(**keys, state="warm"):
            continue
        try:
            slow = SlowPages(file, args.layers, context, args.file_page_size, dtype)
            pages = context // args.cr // args.file_page_size
            for state in ("cold", "warm"):
                row = measure_quest_step(slow, pages, attend, state == "cold", args)
                keys["state"] = state
                if not results.has(**keys):
                    results.add(**keys, page_size=args.file_page_size, **row)
        finally:
            file.unlink(missing_ok=True)
