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
from tqdm import tqdm

import dms
from checkpoint import load_model
from common import torchrun_place, write_json
from data import split_documents
from kv_cache import KVCache

MARGIN = 1.03  # to be compressed by more than asked for: other text may be compressed by less
RATIOS = (2, 3, 4, 6, 8, 12)  # that one retrofit serves, each by an offset of its own


def settling_sequences(seq_len):
    """How many of the first held-out sequences settle_offsets takes: some 8,000 tokens, in which
    the share of evicted pairs hardly varies, but at least 8 sequences, since each is text of its
    own kind. What is measured comes after them, so that it is new to the offset."""
    return max(8, min(2**13 // seq_len, 32))


@torch.inference_mode()
def kl_on_text(model, reference, data, count):
    """(the KL to the reference model without eviction, the mean over tokens in nats; how many
    documents; the cache) of `count` held-out sequences, after those that settle_offsets takes."""
    first = settling_sequences(data.seq_len)
    ids, documents = data.held_out(first + count)
    ids = ids[first:].to(model.device)
    cache = KVCache(model.config, 1, model.device, model.dtype)
    nats = []
    tokens = 0
    for document in split_documents(ids, documents[first:]):
        states = model.states(document, cache)
        cache.release([0])  # its counts of what has ended go on
        length = document.shape[1]
        packing = dms.Packing([[length]], length, model.device)
        target = reference.hidden(document, dms.document_attention(packing))
        heads = (model.lm_head.weight, reference.lm_head.weight)
        nats.append(dms.distillation_loss(states, target, *heads, packing.precedes(1)))
        tokens += length - 1
    return sum(nats).item() / tokens, len(nats), cache


@torch.no_grad()
def settle_offsets(model, data, ratios=RATIOS, biased_attention=dms.relaxed_attention):
    """Find the decisions' offset for the target, and for each of `ratios` that the window allows:
    that at which a cache compresses held-out text by about MARGIN times the ratio. Afterwards the
    target's is in force.

    The logits of the text tell at which offset the right share of pairs would be evicted. But what
    is evicted changes the logits of later layers a little, so each takes two rounds."""
    settings = model.config.dms
    ids, documents = data.held_out(settling_sequences(data.seq_len))
    packing = dms.Packing(documents, ids.shape[1], model.device)
    expires = packing.precedes(settings.window + 1)  # (B, T)
    tokens = sum(map(sum, documents))
    expired = expires.sum().item()  # the others are always held, whatever is decided

    def logits_of_expired():
        """The logits about these tokens, of all heads and layers, with the lowest first."""
        by_layer = []

        def attend(layer, q, k, v, logits):
            about = dms.by_subject(logits, settings.shift)  # (B, Hkv, T)
            by_layer.append(about.transpose(0, 1)[:, expires].flatten())
            bias = -1e4 * (about > 0).float()  # as good as gone
            return biased_attention(q, k, v, bias, packing.first, settings.window)

        model.hidden(ids.to(model.device), attend, -packing.first)
        return torch.cat(by_layer).sort().values

    settings.offsets = []
    for cr in tqdm(sorted({*ratios, settings.target_cr}), "settling", leave=False,
                   disable=torchrun_place()[0] > 0):
        kept = tokens / (MARGIN * cr) - (tokens - expired)  # of the expired tokens, by a head
        if kept <= 0:
            continue
        for _ in range(2):
            # A pair is kept where its logit is below 0. That shall hold for the lowest part,
            # kept / expired, of all logits. If the offset grows by the first logit above that part,
            # this one becomes 0.
            logits = logits_of_expired()
            change = logits[int(kept / expired * len(logits))]
            if distributed.is_initialized():
                # one process decides for all: if each went by its own last bits, they would part
                distributed.broadcast(change, src=0)
            settings.offset += change.item()
        settings.offsets.append([cr, settings.offset])
    settings.offset = dict(settings.offsets)[settings.target_cr]


def sliding_window(model, pairs):
    """A dense model, which is changed, with a sliding window of so many pairs: a DMS model that
    evicts everything (s = 0 from a fresh adapter, so z = 1)."""
    return dms.start_retrofit(model, dms.DMSConfig(window=pairs - 1, shift=0, offset=-1.0))


def measure(model, data, options, reference=None):
    """The KL to the reference model (None: to the model itself without eviction), the accuracy
    where the data brings tasks, and the counts of the cache that answered these, or else of the one
    that read the held-out text."""
    kl, sequences, cache = kl_on_text(model, reference or model, data, options.eval_sequences)
    accuracy = {}
    if hasattr(data, "answer_tasks"):  # then it is this cache that is reported
        accuracy, cache = data.answer_tasks(model, options.eval_problems)
        sequences = len(accuracy) * options.eval_problems
    # all sequences have ended
    counts = cache.stats() | {"tokens": cache.ended_tokens, "pairs": cache.ended_pairs}
    return counts | {"kl": kl, "accuracy": accuracy, "sequences": sequences}


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
    on_cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    hardware = torch.cuda.get_device_name() if "cuda" in options.device else on_cpu
    # the last part of a path: local folders are nobody's business
    names = {key: Path(getattr(options, key)).name for key in ("model", "data")}
    run = dict(settings=options.settings() | names, hardware=hardware, window_tokens=budget,
               results=results)
    write_json(out / "results.json", run)
    print(table_of(run))


def table_of(run):
    """The table, as text, of what results.json holds."""
    columns = run["results"].values()
    lines = [f"{'':26}" + "".join(f"{name:>18}" for name in run["results"])]
    for task in run["results"]["dense"]["accuracy"]:
        lines.append(f"{task:26}" + "".join(f"{x['accuracy'][task]:18.1%}" for x in columns))
    for key in "kl compression_ratio reads peak_page_bytes".split():
        lines.append(f"{key:26}" + "".join(f"{round(x[key], 4):18,}" for x in columns))
    lines.append(f"The window holds {run['window_tokens']} pairs. Measured on {run['hardware']}.")
    return "\n".join(lines)
