"""
Measuring: a retrofitted model beside the dense one and a sliding window of the same budget.

What is measured is the KL on held-out text that is read through the cache, the accuracy where the
data brings tasks, and what the cache counted: pairs held, compression, reads, bytes. retrofit.py
ends with it, and before that settles the offset of the decisions by what a cache compresses.
"""

import math
import platform
from pathlib import Path

import torch

import dms
from checkpoint import load_model
from common import from_main_process, require, write_json
from data import settling_sequences
from kv_cache import KVCache

SIDE_BY_SIDE = 100  # problems that are answered at a time
# what the table has of a measurement
PRINTED = {"kl": "KL to the teacher, nats", "peak_pairs": "peak pairs held",
           "compression_ratio": "compression ratio", "reads": "KV reads, pairs",
           "peak_page_bytes": "peak bytes in pages"}


def read_through(cache, model, ids, documents):
    """Read the documents of some sequences through an empty cache of batch size 1, and yield each
    (1, n) with its final states (1, n, C). The cache goes on counting."""
    for sequence, lengths in zip(ids.to(model.device), documents):
        for document in sequence[: sum(lengths)].split(lengths):
            yield document[None], model.states(document[None], cache)
            cache.release([0])


@torch.inference_mode()
def kl_on_text(model, reference, data, count):
    """(the KL to the reference model without eviction, the mean over tokens in nats; how many
    documents; the cache) of `count` held-out sequences, after those that settle_offset takes."""
    cache = KVCache(model.config, 1, model.device, model.dtype)
    settling = settling_sequences(data.seq_len)
    ids, documents = data.held_out(settling + count)
    lengths = [n for sequence in documents[settling:] for n in sequence]
    nats = 0.0
    for document, states in read_through(cache, model, ids[settling:], documents[settling:]):
        packing = dms.Packing([[document.shape[1]]], document.shape[1], model.device)
        target = reference.hidden(document, dms.document_attention(packing))
        # asked for only now, since under --shard a forward pass makes them whole
        heads = (model.lm_head.weight, reference.lm_head.weight)
        nats += dms.distillation_loss(states, target, *heads, packing.predicts()).item()
    require(math.isfinite(nats), "no finite KL: begin anew with another --dtype or a lower --lr")
    return nats / max(sum(lengths) - len(lengths), 1), len(lengths), cache


def settle_offset(model, data):
    """Set the decisions' offset so that the cache compresses held-out text by 2 to 4% more than the
    target, since other text may be compressed by less. The one-sided loss overshoots by much more,
    which costs quality. Where even an offset lower by 1, which is less than the noise in training,
    does not reach the target, it stays as it was trained. Returns the compression ratio."""
    ids, documents = data.held_out(settling_sequences(data.seq_len))

    @torch.inference_mode()
    def ratio(offset):
        model.config.dms.offset = offset
        cache = KVCache(model.config, 1, model.device, model.dtype)
        for _ in read_through(cache, model, ids, documents):
            pass
        reached = torch.tensor(cache.compression_ratio(), device=model.device)
        # one process decides for all: if each went by its own last bits, some would wait for ever
        return from_main_process(reached).item()

    trained = model.config.dms.offset
    least = 1.02 * model.config.dms.target_cr
    most = 1.04 * model.config.dms.target_cr
    low = offset = trained - 1  # the lower, the more is evicted
    high = math.inf
    for n in range(16):
        reached = ratio(offset)
        if least <= reached <= most:
            return reached
        if reached > most:
            low = offset
        elif n == 0:
            return ratio(trained)
        else:
            high = offset
        offset = min((low + high) / 2, low + 2**n)  # strides that double, then halves
    return ratio(low)  # few texts: nothing lies between `least` and `most`


def sliding_window(model, pairs):
    """A dense model, which is changed, with a sliding window of so many pairs: a DMS model that
    evicts everything (s = 0 from a fresh adapter, so z = 1)."""
    return dms.start_retrofit(model, dms.DMSConfig(window=pairs - 1, offset=-1.0))


def measure(model, reference, data, options, desc):
    """The KL to the reference model (None: to the model itself without eviction), the accuracy
    where the data brings tasks, and the counts of the cache that answered these, or else of the one
    that read the held-out text."""
    kl, sequences, cache = kl_on_text(model, reference or model, data, options.eval_sequences)
    accuracy = {}
    if hasattr(data, "answer_tasks"):
        batch_size = min(SIDE_BY_SIDE, options.eval_problems)
        cache = KVCache(model.config, batch_size, model.device, model.dtype)
        accuracy = data.answer_tasks(model, cache, options, desc)
        sequences = len(accuracy) * options.eval_problems
    ended = {"tokens": cache.ended_tokens, "pairs": cache.ended_pairs, "sequences": sequences}
    return {"kl": kl, "accuracy": accuracy, **cache.stats(), **ended}


def evaluate(data, options, out):
    """Measure the dense model, the retrofitted one in the folder `out`, and a sliding window that
    holds as many pairs. Write results.json there and print the table."""

    def load(model):
        return load_model(model, options.device, getattr(torch, options.dtype))

    results = {"dense": measure(load(options.model), None, data, options, "dense")}
    # adapters leave their base as it is, so with them one model at a time will do
    reference = None if options.train == "adapters" else load(options.model)
    results["DMS"] = measure(load(out), reference, data, options, "DMS")
    del reference
    # the window's budget is what a head held at the end of an average sequence
    heads = sum(map(len, results["DMS"]["pairs_per_head"]))
    budget = max(round(results["DMS"]["pairs"] / results["DMS"]["sequences"] / heads), 1)
    window = sliding_window(load(options.model), budget)
    results["window"] = measure(window, None, data, options, f"window of {budget}")
    hardware = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if options.device.startswith("cuda"):
        hardware = torch.cuda.get_device_name()
    settings = {**options.settings(), "model": Path(options.model).name}
    write_json(out / "results.json", {
        "settings": settings,
        "hardware": hardware,
        "torch": torch.__version__,
        "window_tokens": budget,
        "results": results,
    })
    titles = ("dense", f"DMS {options.target_cr:g}x", f"window of {budget}")
    print_table(dict(zip(titles, results.values())))


def print_table(columns):
    """columns: {title: what measure gives}."""
    measured = list(columns.values())
    print(f"{'':26}" + "".join(f"{title:>18}" for title in columns))
    for task in measured[0]["accuracy"]:
        print(f"{task:26}" + "".join(f"{column['accuracy'][task]:18.1%}" for column in measured))
    for key, name in PRINTED.items():
        if key == "reads" and not measured[0]["accuracy"]:
            continue  # a text is read in one go
        decimals = 4 if key == "kl" else 2 if key == "compression_ratio" else 0
        print(f"{name:26}" + "".join(f"{column[key]:18,.{decimals}f}" for column in measured))
