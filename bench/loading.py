"""
How much memory and time loading takes: a random checkpoint of Qwen3-8B's shape, sharded, bf16, loaded in a process of
its own.

    python bench/loading.py --folder /tmp/qwen3-8b               # 36 layers, 16.4 GB on disk, removed afterwards
    python bench/loading.py --folder /tmp/small --layers 1 --keep

Printed for each dtype: the bytes of the weights in that dtype, the most private (anonymous) memory that the process
took over what it held before, seconds, and the speed in bytes on disk per second; then the speed of reading the same
files from end to end, for comparison. Files that the kernel has cached stay cached: run twice to see both. Weights
that are loaded in their own dtype may stay mapped from the files until they are used, so the time of one pass over
them is printed as well.
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
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import Model, ModelConfig, load_model, write_json  # noqa: E402

QWEN3_8B = dict(model_type="qwen3", vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
                num_attention_heads=32, num_key_value_heads=8, head_dim=128, rope_theta=1e6,
                max_position_embeddings=40960)


def make_checkpoint(folder, config, shard_bytes=2 * 2**30):
    """Write a random bf16 checkpoint of the shape of `config`, a ModelConfig, one shard in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Model(config).named_parameters()}
    shards, size = [[]], 0
    for name, shape in shapes.items():
        if size + 2 * shape.numel() > shard_bytes and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * shape.numel()
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, 0.02) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    total = sum(2 * shape.numel() for shape in shapes.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", {**config.to_dict(), "torch_dtype": "bfloat16"})


def private_bytes():
    """The anonymous memory of this process: all that it cannot give back by reading a file again. Linux only."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))


def load_and_measure(folder, dtype):
    """Load in this process; a dict of bytes, peak (private bytes over those before), seconds and pass_seconds."""
    (torch.ones(64, 64) @ torch.ones(64, 64)).to(torch.bfloat16)  # what torch allocates at its first use
    before = peak = private_bytes()
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
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"bytes": size, "peak": peak - before, "seconds": seconds, "pass_seconds": time.perf_counter() - begin}


def measure(folder, dtype):
    """`load_and_measure` in a fresh process."""
    done = subprocess.run([sys.executable, __file__, "--folder", str(folder), "--only-load", dtype],
                          stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main():
    p = argparse.ArgumentParser(description="Memory and time of loading a checkpoint.")
    p.add_argument("--folder", required=True, type=Path, help="where the checkpoint is made, or lies already")
    p.add_argument("--layers", type=int, default=QWEN3_8B["num_hidden_layers"], help="fewer, for a smaller one")
    p.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"], help="to load it in, each by itself")
    p.add_argument("--keep", action="store_true", help="leave the checkpoint there")
    p.add_argument("--only-load", metavar="DTYPE", help="load what is there in this process and print JSON")
    args = p.parse_args()
    if args.only_load:
        return print(json.dumps(load_and_measure(args.folder, getattr(torch, args.only_load))))
    made = not args.folder.exists()
    if made:
        make_checkpoint(args.folder, ModelConfig(**{**QWEN3_8B, "num_hidden_layers": args.layers}))
    try:
        files = sorted(args.folder.glob("*.safetensors"))
        disk = sum(file.stat().st_size for file in files)
        print(f"{args.folder}: {len(files)} shards, {disk:,} bytes on disk")
        for dtype in args.dtypes:
            r = measure(args.folder, dtype)
            print(f"{dtype}: {r['bytes']:,} bytes of weights, peak {r['peak']:,} bytes private "
                  f"({r['peak'] / r['bytes']:.3f} of them), {r['seconds']:.2f} s, {disk / r['seconds'] / 1e9:.2f} "
                  f"GB/s; one pass over the weights afterwards {r['pass_seconds']:.2f} s")
        begin, buffer = time.perf_counter(), bytearray(2**24)
        for file in files:
            with open(file, "rb", buffering=0) as f:
                while f.readinto(buffer):
                    pass
        seconds = time.perf_counter() - begin
        print(f"plain sequential read: {seconds:.2f} s, {disk / seconds / 1e9:.2f} GB/s")
    finally:
        if made and not args.keep:
            shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
