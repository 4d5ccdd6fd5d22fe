"""
Measuring: a retrofitted model beside the dense one and a sliding window of the same budget.

What is measured is the KL on held-out text that is read through the cache, the accuracy where the
data brings tasks, and what the cache counted: pairs held, compression, reads, bytes. retrofit.py
ends with it, and before that settles the offset of the decisions by what a cache compresses.
"""

import platform
from pathlib import Path

import torch
import torch.distributed as distributed

import dms
from checkpoint import load_model
from common import write_json
from data import settling_sequences
from kv_cache import KVCache

PRINTED = "kl compression_ratio peak_pairs reads peak_page_bytes".split()  # of a measurement


def read_through(cache, model, ids, documents):
    """Read the documents of some sequences through an empty cache of batch size 1, and yield each
    (1, n) with its final states (1, n, C). The cache goes on counting."""
    for sequence, lengths in zip(ids.to(model.device), documents):
        for document in sequence[None, : sum(lengths)].split(lengths, dim=1):
            yield document, model.states(document, cache)
            cache.release([0])


@torch.inference_mode()
def kl_on_text(model, reference, data, count):
    """(the KL to the reference model without eviction, the mean over tokens in nats; how many
    documents; the cache) of `count` held-out sequences, after those that settle_offset takes."""
    first = settling_sequences(data.seq_len)
    ids, documents = data.held_out(first + count)
    cache = KVCache(model.config, 1, model.device, model.dtype)
    nats = []
    tokens = 0
    for document, states in read_through(cache, model, ids[first:], documents[first:]):
        length = document.shape[1]
        packing = dms.Packing([[length]], length, model.device)
        target = reference.hidden(document, dms.document_attention(packing))
        heads = (model.lm_head.weight, reference.lm_head.weight)
        nats.append(dms.distillation_loss(states, target, *heads, packing.predicts()))
        tokens += length - 1
    return sum(nats).item() / tokens, len(nats), cache


def settle_offset(model, data):
    """Set the decisions' offset so that the cache compresses held-out text by 2 to 4% more than the
    target, since other text may be compressed by less. The one-sided loss overshoots by much more,
    which costs quality. The offset may fall by 1 at most: decisions whose logits are that near to 0
    were not certain in training either, where the noise is larger.
    Returns the compression ratio."""
    settings = model.config.dms
    least = 1.02 * settings.target_cr
    ids, documents = data.held_out(settling_sequences(data.seq_len))

    def try_offset(offset):
        """Set it, and return the compression ratio."""
        settings.offset = offset
        cache = KVCache(model.config, 1, model.device, model.dtype)
        for _ in read_through(cache, model, ids, documents):
            pass
        ratio = torch.tensor(cache.compression_ratio(), device=model.device)
        if distributed.is_initialized():
            # one process decides for all: if each went by its own last bits, they would part
            distributed.broadcast(ratio, src=0)
        return ratio.item()

    low = settings.offset - 1  # the lower, the more is evicted
    high = low + 128  # more than scores reach; 14 halvings leave less than 0.01
    for _ in range(14):
        middle = (low + high) / 2
        ratio = try_offset(middle)
        if least <= ratio <= 1.02 * least:
            return ratio
        if ratio < least:
            high = middle
        else:
            low = middle
    return try_offset(low)  # the ratio jumps over the range, or does not reach it


def sliding_window(model, pairs):
    """A dense model, which is changed, with a sliding window of so many pairs: a DMS model that
    evicts everything (s = 0 from a fresh adapter, so z = 1)."""
    return dms.start_retrofit(model, dms.DMSConfig(window=pairs - 1, offset=-1.0))


def measure(model, data, options, reference=None):
    """The KL to the reference model (None: to the model itself without eviction), the accuracy
    where the data brings tasks, and the counts of the cache that answered these, or else of the one
    that read the held-out text."""
    kl, sequences, cache = kl_on_text(model, reference or model, data, options.eval_sequences)
    accuracy = {}
    if hasattr(data, "answer_tasks"):
        accuracy, cache = data.answer_tasks(model, options.eval_problems)
        sequences = len(accuracy) * options.eval_problems
    # of ended sequences: the cache is empty by now
    ended = {"tokens": cache.ended_tokens, "pairs": cache.ended_pairs, "sequences": sequences}
    return {"kl": kl, "accuracy": accuracy} | cache.stats() | ended


def evaluate(data, options, out):
    """Measure the dense model, the retrofitted one in the folder `out`, and a sliding window that
    holds as many pairs. Write results.json there and print the table."""

    def load(model):
        return load_model(model, options.device, getattr(torch, options.dtype))

    results = {"dense": measure(load(options.model), data, options)}
    # adapters leave their base as it is, so with them one model at a time will do
    reference = None if options.train == "adapters" else load(options.model)
    found = results["DMS"] = measure(load(out), data, options, reference)
    # the window's budget is what a head held at the end of an average sequence
    budget = round(found["tokens"] / found["sequences"] / found["compression_ratio"])
    results["window"] = measure(sliding_window(load(options.model), budget), data, options)
    hardware = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if options.device.startswith("cuda"):
        hardware = torch.cuda.get_device_name()
    # names, not where these lie here
    names = {key: Path(getattr(options, key)).name for key in ("model", "data")}
    run = {"settings": options.settings() | names, "hardware": hardware,
           "window_tokens": budget, "results": results}
    write_json(out / "results.json", run)
    print(table_of(run))


def table_of(run):
    """The table, as text, of what results.json holds."""
    columns = run["results"].values()
    lines = [f"{'':26}" + "".join(f"{name:>18}" for name in run["results"])]
    for task in run["results"]["dense"]["accuracy"]:
        lines.append(f"{task:26}" + "".join(f"{x['accuracy'][task]:18.1%}" for x in columns))
    for key in PRINTED:
        lines.append(f"{key:26}" + "".join(f"{round(x[key], 4):18,}" for x in columns))
    lines.append(f"The window holds {run['window_tokens']} pairs. Measured on {run['hardware']}.")
    return "\n".join(lines)
