"""
Loading: how much memory and time it takes, for a random checkpoint of Qwen3-8B's shape, sharded,
in bf16, loaded in a process of its own.

    python bench/loading.py --folder /tmp/qwen3-8b      # 36 layers, 16.4 GB, removed afterwards
    python bench/loading.py --folder /tmp/small --layers 1 --keep

Printed for each dtype: the bytes of the weights in that dtype, the most private (anonymous) memory
that the process took over what it held before, seconds, and the speed in bytes on disk per second;
then the speed of reading the same files from end to end. Files that the kernel has cached stay
cached: run twice to see both. Weights that are loaded in their own dtype may stay mapped from the
files until they are used, so the time of one pass over them is printed as well. Linux only.
"""

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from common import model_config
from safetensors.torch import save_file

from checkpoint import config_to_dict, load_model, run_script, write_json
from model import Model


def make_checkpoint(folder, config, shard_bytes=2 * 2**30):
    """Write a random bf16 checkpoint of that ModelConfig, one shard in memory at a time."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Model(config).named_parameters()}
    shards = [[]]
    size = 0
    for name, shape in shapes.items():
        tensor_bytes = 2 * shape.numel()
        if size + tensor_bytes > shard_bytes and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor_bytes
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            tensors[name] = torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, 0.02)
            weight_map[name] = file
        save_file(tensors, folder / file, {"format": "pt"})
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    write_json(folder / "config.json", {**config_to_dict(config), "torch_dtype": "bfloat16"})


def private_bytes():
    """The anonymous memory of this process: what it cannot give back by reading a file again."""
    for line in Path("/proc/self/status").read_text().split("\n"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024


def load_and_measure(folder, dtype):
    """Load in this process; a dict of bytes, peak (private bytes over those before), seconds and
    pass_seconds."""
    (torch.ones(64, 64) @ torch.ones(64, 64)).to(torch.bfloat16)  # what the first use allocates
    before = private_bytes()
    peak = before
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    model = load_model(folder, dtype=dtype)
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    peak = max(peak, private_bytes())
    begin = time.perf_counter()
    for p in model.parameters():
        p.view(torch.uint8).flatten()[::4096].sum()  # touches every page
    pass_seconds = time.perf_counter() - begin
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return dict(bytes=size, peak=peak - before, seconds=seconds, pass_seconds=pass_seconds)


def measure(folder, dtype):
    """load_and_measure in a fresh process."""
    command = [sys.executable, __file__, "--folder", str(folder), "--only-load", dtype]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def read_files(files):
    """Seconds of reading files from end to end."""
    buffer = bytearray(2**24)
    begin = time.perf_counter()
    for file in files:
        with open(file, "rb", buffering=0) as f:
            while f.readinto(buffer):
                pass
    return time.perf_counter() - begin


def measure_all(folder, dtypes):
    files = sorted(folder.glob("*.safetensors"))
    disk = sum(file.stat().st_size for file in files)
    print(f"{folder}: {len(files)} shards, {disk:,} bytes on disk")
    for dtype in dtypes:
        r = measure(folder, dtype)
        print(f"{dtype}: {r['bytes']:,} bytes of weights, peak {r['peak']:,} bytes private "
              f"({r['peak'] / r['bytes']:.4f} of them), {r['seconds']:.2f} s, "
              f"{disk / r['seconds'] / 1e9:.2f} GB/s; one pass over the weights afterwards "
              f"{r['pass_seconds']:.2f} s")
    seconds = read_files(files)
    print(f"plain sequential read: {seconds:.2f} s, {disk / seconds / 1e9:.2f} GB/s")


def main():
    p = argparse.ArgumentParser(description="Memory and time of loading a checkpoint.")
    add = p.add_argument
    add("--folder", required=True, type=Path, help="where it is made, or lies already")
    add("--layers", type=int, help="fewer than 36, for a smaller one")
    add("--dtypes", nargs="+", default=["bfloat16", "float16"], help="to load it in, one by one")
    add("--keep", action="store_true", help="leave the checkpoint there")
    add("--only-load", metavar="DTYPE", help="load what is there in this process; print JSON")
    args = p.parse_args()
    if args.only_load:
        print(json.dumps(load_and_measure(args.folder, getattr(torch, args.only_load))))
        return
    is_new = not args.folder.exists()
    try:
        if is_new:
            make_checkpoint(args.folder, model_config("qwen3-8b", args.layers))
        measure_all(args.folder, args.dtypes)
    finally:
        if is_new and not args.keep:
            shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    run_script(main)
