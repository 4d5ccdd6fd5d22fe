"""
The KV cache: pages, slots and the ring.

Every KV head of every sequence and layer, a row, holds its own number of key/value pairs, in pages
of `page_size` slots that come from one pool. Attention does not care in which order keys are
stored, since RoPE is already inside them. Hence the whole trick:

    token j = t - (window + 1) leaves the window as token t arrives
        j was evicted  ->  t is written over j's slot          (the row's length stays)
        j was kept     ->  t is appended                       (length + 1)

Nothing is ever moved. Each slot says whose pair it holds, by position, and what was decided about
it. The ring says in which slot each token of the window lies: token t's at t mod (window + 1).

A decode step, one token for every sequence, is stored by kernels/cache_write.py and then attended
to by kernels/decode_attention.py. A block of tokens is attended to and then stored, both by
kernels/block.py, since its first tokens still see what expires within it. The tests feed the same
tokens both ways. A dense model is the same cache with nothing evicted.

This file knows nothing of training, of tokenizers, or of how a decision was made.

Letters: those of dms.py, and N = B * Hkv rows of a layer, of which row b * Hkv + h is KV head h of
sequence b; P pages in the pool; M columns of the page table; W = window + 1 entries of the ring.
"""

import copy
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from checkpoint import one_line, refusing, require  # InputErrors, of one line
from kernels.block import append_block
from kernels.choose import choose_kernels
from kernels.pages import CacheFull as CacheFull  # for those who import it from here
from kernels.pages import PagePool, Rows, fork, free_memory


def together(*numbers):
    """Some integers, scalar tensors each, as a list: a GPU is waited for once."""
    return torch.stack([number.long() for number in numbers]).tolist()


@dataclass
class Feed:
    """One piece of input on its way into the cache: the `attend` of Model.hidden, called once for
    every layer. It attends to what the cache holds and to the piece itself, and stores the piece.
    """

    cache: "KVCache"
    rows: Rows  # those fed, of all layers
    count: torch.Tensor  # (B,) int64: the real tokens of each sequence, the rest being padding

    def __post_init__(self):
        self.new = self.count.repeat_interleave(self.cache.kv_heads)  # (N,): the same by row
        self.start = self.rows.seen[:: self.cache.kv_heads, None]  # (B, 1): first positions

    @torch.inference_mode()
    def __call__(self, layer, q, k, v, logits):
        """q (B, Hq, T, D); k, v (B, Hkv, T, D); logits (B, Hkv, T) or None -> (B, Hq, T, D)."""
        N = len(self.new)
        T, D = k.shape[2:]
        feed = self.one_token if T == 1 else self.block
        q_of_rows = q.reshape(N, -1, T, D)
        kv = k.flatten(0, 1), v.flatten(0, 1)
        if logits is not None:  # None: nothing is evicted
            logits = logits.reshape(N, T)
        y = feed(layer, self.rows.layer(layer), q_of_rows, *kv, logits)
        return y.view(q.shape)

    def one_token(self, layer, rows, q, k, v, logits):
        """Store, then attend: the new token is one of the pairs held."""
        pool = self.cache.pool
        kernels = self.cache.kernels
        evict = torch.zeros_like(self.new, dtype=torch.bool)
        if logits is not None:
            evict = logits[:, 0] > 0
        q = q[:, :, 0]
        k = k[:, 0]
        kernels.cache_write(k, v[:, 0], evict, self.new, rows, pool, self.cache.shift)
        return kernels.decode_attention(q, pool.keys, pool.values, rows.table, rows.length)

    def block(self, layer, rows, q, k, v, logits):
        """Attend, then store: the block's first tokens still see what expires within it."""
        cache = self.cache
        reads = (rows.length + self.new) * (self.new > 0)
        cache.reads[layer] += reads.view(-1, cache.kv_heads).sum(0)
        return append_block(
            q,
            k,
            v,
            logits,
            self.new,
            rows,
            cache.pool,
            cache.window,
            cache.shift,
            cache.kernels.block_attention,
        )


class KVCache:
    """The per-head paged cache of a batch of sequences, each of its own length.

        cache = KVCache(model.config, batch_size=B)
        model(ids, cache=cache)                    # appends T tokens to every sequence, or
        model(ids, cache=cache, lengths=lengths)   # lengths[b] <= T to sequence b
        model(ids[:1], cache=cache, sequence=2)    # to this one alone
        cache.select([0, 0, 0])                    # three continuations of sequence 0
        cache.release([1])                         # its pages are free again
    """

    def __init__(self, config, batch_size, device="cpu", dtype=torch.float32, page_size=None,
                 chunk=None, memory=None):
        """config: a ModelConfig; device, dtype: the model's. page_size: slots of a page, a power
        of two. chunk: the most tokens computed at a time; 1 counts as 2. memory: bytes of the pool;
        None is what the model's whole context takes without eviction, but at most 80 % of a GPU's
        free memory, or of the machine's (whose pages take memory once they are written to)."""
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        self.page_size = page_size or (64 if config.head_dim >= 64 else 32)
        self.chunk = max(chunk or (2048 if on_gpu else 512), 2)
        require(self.page_size.bit_count() == 1, "page_size must be a power of two")
        require(batch_size > 0 and (chunk or 1) > 0 and (memory is None or memory > 0),
                "batch_size and chunk must be at least 1, memory above 0")
        self.config = replace(config, dms=copy.copy(config.dms))  # as it is now
        self.layers = config.num_hidden_layers
        self.kv_heads = config.num_key_value_heads
        self.window = config.eviction.window if config.eviction else 0
        self.shift = config.eviction.shift if config.eviction else 0
        self.kernels = choose_kernels(self.device, dtype)

        N = batch_size * self.kv_heads
        self.page_bytes = PagePool.page_bytes(self.page_size, config.head_dim, dtype)
        if memory is None:
            pages = self.layers * N * self.pages_for(config.max_position_embeddings)
            memory = min(pages * self.page_bytes, 0.8 * free_memory(self.device))
        problem = f"no memory for a cache of {memory / 1e9:.1f} GB; allow it less"
        with refusing(problem, RuntimeError, OverflowError, ValueError):
            self.rows = Rows.empty(self.layers, N, self.window + 1, self.device)
            pages = max(int(memory / self.page_bytes), 1)
            self.pool = PagePool(pages, self.page_size, config.head_dim, dtype, self.device)

        self.reads = self.rows.seen.new_zeros(self.layers, self.kv_heads)
        self.peak_pairs = self.rows.seen.new_zeros(1)
        self.least_free_pages = self.pool.free_count.clone()
        self.ended_tokens = 0
        self.ended_pairs = 0

    @property
    def batch_size(self):
        return len(self.rows.seen) // self.kv_heads

    @property
    def seen(self):
        """Tokens fed to each sequence, (B,) int64."""
        return self.rows.seen[:: self.kv_heads]

    def pages_for(self, slots):
        return -(-slots // self.page_size)

    def rows_of(self, sequences):
        """The indices of the rows of some sequences, in order, (n * Hkv,) int64."""
        rows = [b * self.kv_heads + head for b in sequences for head in range(self.kv_heads)]
        return torch.tensor(rows, dtype=torch.int64, device=self.device)

    def check_model(self, model):
        """Raise InputError unless it was made for such a model, as that is configured now."""
        require(self.config == model.config,
                "the cache was made for another config, or this one before it changed; make a new one")
        stored = self.pool.keys.dtype
        require(stored == model.dtype, f"the cache stores {stored}, the model gives {model.dtype}; "
                "make it with dtype=model.dtype")

    def check_sequences(self, sequences):
        """Raise InputError unless these are indices of sequences."""
        require(set(sequences) <= set(range(self.batch_size)),
                f"the cache has sequences of indices below {self.batch_size}, "
                f"not all of {one_line(list(sequences))}")

    def check_lengths(self, B, T, lengths=None, sequence=None):
        """The real tokens in each row of ids (B, T), (B,) int64 on the cache's device. Raises
        InputError where ids, lengths or the one sequence do not fit the cache."""
        self.check_sequences([] if sequence is None else [sequence])
        expected = self.batch_size if sequence is None else 1
        lengths = [T] * B if lengths is None else lengths
        lengths = torch.as_tensor(lengths, dtype=torch.int64, device=self.device)
        has_shape = B == expected and lengths.shape == (B,)
        require(has_shape and bool((lengths.clamp(0, T) == lengths).all()),
                f"lengths must be {expected} numbers from 0 to {T}, and ids have such rows")
        return lengths

    @contextmanager
    def append(self, count, T, sequence=None, reserve=True, of=None):
        """`with cache.append(...) as feed:` gives a Feed, which is to be called once for each layer
        with T new tokens. When the block ends, they count as seen.

        count: (B,) int64, how many of the T are real in each sequence; sequence: the tokens are
        this one's alone. reserve=False: the caller has called `reserve` already. of: (B,) int64, the
        tokens of a longer input, of which these are a piece.

        Raises CacheFull. For T = 1, which may only be the first piece, nothing has changed then.
        For T > 1 some layers have stored the piece and others have not, as after anything that is
        raised within the block: the sequences that it is for are released, with all that they held.
        """
        sequences = range(self.batch_size) if sequence is None else [sequence]
        rows = slice(sequences[0] * self.kv_heads, (sequences[-1] + 1) * self.kv_heads)
        if T > 1:
            self.widen_tables(T, int(self.rows.length.max()))
        elif reserve:
            self.reserve(count, rows)
        feed = Feed(self, self.rows.select(rows), count)
        try:
            yield feed
        except BaseException:
            fed = count if of is None else of
            self.release([b for b, tokens in zip(sequences, fed.tolist()) if tokens > 0])
            raise
        with torch.inference_mode():
            feed.rows.seen += feed.new  # a view of the cache's own rows
            # a step reads its own tokens, too, and is counted here; a block was, by Feed.block
            if T == 1:
                fed = feed.rows.length * (feed.new > 0)  # (L, N)
                self.reads += fed.view(self.layers, -1, self.kv_heads).sum(1)
            self.peak_pairs.clamp_(min=self.rows.length.sum())  # a running maximum, in place
            self.least_free_pages.clamp_(max=self.pool.free_count)

    @torch.inference_mode()
    def reserve(self, count, rows=slice(None)):
        """Make sure that the next step of one token, for every sequence whose count (B,) is 1, finds
        its pages. Raises CacheFull, before anything has changed. (It waits for the GPU, once, which
        has nothing to do: the token that this step begins with was waited for, too.)"""
        length = self.rows.length[:, rows]
        new = count.repeat_interleave(self.kv_heads)
        needs_page = (length % self.page_size == 0) & (new > 0)
        needed, free, longest = together(
            needs_page.sum(),
            self.pool.free_count[0],
            self.rows.length.max(),
        )
        self.pool.check(needed, free)
        self.widen_tables(1, longest)

    def widen_tables(self, tokens, longest):
        """Make room in the page tables for the longest row and `tokens` more."""
        self.rows.widen(self.pages_for(longest) + self.pages_for(tokens))

    @torch.inference_mode()
    def release(self, sequences):
        """End sequences (their indices): their pages are free again, and their rows empty. Raises
        InputError for an index that is none."""
        self.check_sequences(sequences := set(sequences))
        rows = self.rows_of(sequences)
        self.count_ended(rows)
        self.rows.seen[rows] = 0
        self.rows.length[:, rows] = 0
        self.pool.free_all_but(self.rows.pages_in_use(self.page_size))

    @torch.inference_mode()
    def select(self, sequences):
        """Sequence i of the cache continues what sequences[i] has fed: name one several times to
        fork it, do not name it to drop it. Forks share the pages that they will not write to.
        Raises InputError, or CacheFull, before anything has changed."""
        require(sequences, "select at least one sequence")
        self.check_sequences(sequences)
        dropped = set(range(self.batch_size)) - set(sequences)
        is_copy = [b in sequences[:i] for i, b in enumerate(sequences)]
        is_copy = torch.tensor(is_copy, device=self.device).repeat_interleave(self.kv_heads)
        chosen = fork(self.rows, self.rows_of(sequences), is_copy, self.pool)
        self.least_free_pages.clamp_(max=self.pool.free_count)
        self.count_ended(self.rows_of(dropped))
        if len(sequences) == self.batch_size:
            self.rows.copy_(chosen)  # a captured decode step goes on reading these tensors
        else:
            self.rows = chosen

    def positions(self, sequence, layer, head):
        """The positions of the tokens whose pairs a KV head holds, ascending, (n,) int32."""
        self.check_sequences([sequence])
        require(0 <= layer < self.layers and 0 <= head < self.kv_heads,
                f"there are {self.layers} layers of {self.kv_heads} KV heads, from 0")
        row = sequence * self.kv_heads + head
        return self.rows.positions(layer, row, self.pool)

    def count_ended(self, rows):
        """Note what sequences hold that end now. (rows: indices)"""
        self.ended_tokens += int(self.rows.seen[rows].sum()) // self.kv_heads
        self.ended_pairs += int(self.rows.length[:, rows].sum())

    def compression_ratio(self):
        """Tokens fed so far x L x Hkv / the pairs held at their ends, None before any token."""
        return self.ratio_and_free_pages()[0]

    def ratio_and_free_pages(self):
        """(compression_ratio, the pages that are free), waiting for the GPU once."""
        held, tokens, free = together(
            self.rows.length.sum(),
            self.seen.sum(),
            self.pool.free_count[0],
        )
        pairs = self.ended_pairs + held
        dense_pairs = (self.ended_tokens + tokens) * self.layers * self.kv_heads
        return (dense_pairs / pairs if pairs else None), free

    def stats(self):
        """Of the sequences held now: tokens, fed to them; pairs, held; dense_pairs, what a dense
        cache would hold; pages and page_bytes, in use; pairs_per_head, [L][Hkv].
        Of all so far, ended ones, too: compression_ratio; peak_pairs, the most held at once;
        peak_page_bytes; reads, pairs attended to, summed over steps, a block counting as one;
        reads_per_head, [L][Hkv]. Of the pool: pool_bytes."""
        tokens = int(self.seen.sum())
        pages = len(self.pool) - int(self.pool.free_count)
        by_head = self.rows.length.view(self.layers, -1, self.kv_heads).sum(1)
        return {
            "tokens": tokens,
            "pairs": int(by_head.sum()),
            "dense_pairs": tokens * self.layers * self.kv_heads,
            "compression_ratio": self.compression_ratio(),
            "peak_pairs": int(self.peak_pairs),
            "reads": int(self.reads.sum()),
            "pages": pages,
            "page_bytes": pages * self.page_bytes,
            "peak_page_bytes": (len(self.pool) - int(self.least_free_pages)) * self.page_bytes,
            "pool_bytes": len(self.pool) * self.page_bytes,
            "pairs_per_head": by_head.tolist(),
            "reads_per_head": self.reads.tolist(),
        }
