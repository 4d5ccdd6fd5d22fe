"""
Measuring: a retrofitted model beside the dense one and a sliding window of the same budget.

KL on held-out text that is read through the cache; accuracy, where the data brings tasks; and what
the cache counted: pairs held, compression, reads, bytes. retrofit.py ends with it.
"""
import math
import platform
from pathlib import Path

import torch
from torch.nn.attention import sdpa_kernel

import dms
from checkpoint import load_model, read_lines, require, write_json
from distillation import settling_rows
from kernels.block import BACKENDS
from kv_cache import KVCache

TABLE = {"kl": "KL to the teacher, nats", "peak_pairs": "peak pairs held",
         "compression_ratio": "compression ratio", "reads": "KV reads, pairs",
         "peak_page_bytes": "peak bytes in pages"}  # what of a measurement is printed


@torch.inference_mode()
def kl_on_text(model, reference, data, rows):
    """(KL to the reference model, which does not evict, on held-out documents that are read through
    a cache, the mean over tokens in nats; how many documents; that cache)."""
    cache = KVCache(model.config, 1, model.device, model.dtype)
    skipped = settling_rows(data.seq_len)
    ids, documents = data.held_out(skipped + rows)
    ids = ids[skipped:]
    documents = documents[skipped:]
    nats = 0.0
    tokens = 0
    for row, lengths in zip(ids.to(model.device), documents):
        for document in row[: sum(lengths)].split(lengths):
            n = len(document)
            states = model.states(document[None], cache)
            with sdpa_kernel(BACKENDS):
                target = reference.hidden(document[None], dms.document_attention([[n]]))
            predicts = torch.arange(n, device=model.device)[None] < n - 1
            heads = (model.lm_head.weight, reference.lm_head.weight)
            nats += dms.distillation_loss(states, target, *heads, predicts).item()
            tokens += n - 1
            cache.release([0])
    require(math.isfinite(nats), "no finite KL: begin anew with another --dtype or a lower --lr")
    return nats / max(tokens, 1), sum(map(len, documents)), cache


def sliding_window(model, pairs):
    """A dense model, which is changed, with a sliding window of so many pairs: a DMS model that
    evicts everything (s = 0 from a fresh adapter, so z = 1)."""
    return dms.start_retrofit(model, dms.DMSConfig(window=pairs - 1, offset=-1.0))


def measure(model, reference, data, options, desc):
    """KL to the reference model, None for the model itself, asked not to evict; accuracy, where the
    data brings tasks; and the counts of the cache that answered these, or of the one that read the
    held-out text where there are none."""
    kl, sequences, cache = kl_on_text(model, reference or model, data, options.eval_rows)
    accuracy = {}
    if hasattr(data, "answer_tasks"):
        rows = min(options.eval_batch, options.eval_problems)
        cache = KVCache(model.config, rows, model.device, model.dtype)
        accuracy = data.answer_tasks(model, cache, options, desc)
        sequences = len(accuracy) * options.eval_problems
    ended = {"tokens": cache.ended_tokens, "pairs": cache.ended_pairs, "sequences": sequences}
    return {"kl": kl, "accuracy": accuracy, **cache.stats(), **ended}


def evaluate(data, options, out):
    """Measure the dense model, the retrofitted one in the folder `out` and a sliding window that
    holds as many pairs, write results.json there and print the table."""

    def load(model):
        return load_model(model, options.device, options.torch_dtype)

    results = {"dense": measure(load(options.model), None, data, options, "dense")}
    # Adapters leave their base as it is, so with them one model at a time will do.
    reference = None if options.train == "adapters" else load(options.model)
    results["DMS"] = measure(load(out), reference, data, options, "DMS")
    del reference
    # The window's budget is what DMS held at the end of an average sequence.
    held = results["DMS"]["pairs"] / results["DMS"]["sequences"]
    heads = sum(map(len, results["DMS"]["pairs_per_head"]))
    budget = max(round(held / heads), 1)
    window = sliding_window(load(options.model), budget)
    results["window"] = measure(window, None, data, options, f"window of {budget}")
    on_cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    is_gpu = options.device.startswith("cuda")
    settings = {**options.settings(), "model": Path(options.model).name}
    write_json(out / "results.json", {
        "settings": settings, "hardware": torch.cuda.get_device_name() if is_gpu else on_cpu,
        "torch": torch.__version__, "window_tokens": budget, "results": results})  # fmt: skip
    titles = ("dense", f"DMS {options.target_cr:g}x", f"window of {budget}")
    print_table(dict(zip(titles, results.values())))


def draw_curves(out):
    """curves.png in a run's folder: its KL and compression by steps. Needs matplotlib, an extra;
    without it nothing is drawn."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = list(read_lines(out / "metrics.jsonl").values())
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, keys in zip(figure.subplots(1, 2), (("kl",), ("target_cr", "cr"))):
        for key in keys:
            axes.plot([row["step"] for row in rows], [row[key] for row in rows], label=key)
        axes.set_xlabel("step")
        axes.legend()
    figure.axes[0].set_yscale("log")
    figure.savefig(out / "curves.png")


def print_table(columns):
    """columns: {title: what measure gives}."""
    print(f"{'':26}" + "".join(f"{title:>18}" for title in columns))
    columns = columns.values()
    for task in list(columns)[0]["accuracy"]:
        print(f"{task:26}" + "".join(f"{column['accuracy'][task]:18.1%}" for column in columns))
    has_tasks = list(columns)[0]["accuracy"]
    for key, name in TABLE.items():
        if key == "reads" and not has_tasks:
            continue  # a text is read in one go
        decimals = {"kl": 4, "compression_ratio": 2}.get(key, 0)
        print(f"{name:26}" + "".join(f"{column[key]:18,.{decimals}f}" for column in columns))
