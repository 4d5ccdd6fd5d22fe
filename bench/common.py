"""
What the benchmarks share: models of real shapes with random weights, decisions as uneven as real
ones, clocks, and results files that a run which is cut leaves behind.
"""

import argparse
import gc
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from statistics import NormalDist

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import write_json  # noqa: E402
from dms import DMSConfig  # noqa: E402
from kernels import cpu, triton  # noqa: E402
from model import Model, ModelConfig, rope_frequencies  # noqa: E402

SHAPES = {
    "smollm2-135m": dict(
        model_type="llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        rope_theta=1e5,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "qwen3-0.6b": dict(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "qwen3-8b": dict(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        tie_word_embeddings=False,
    ),
}
DTYPES = ("float32", "bfloat16", "float16")
WARM_UP = 3  # runs that are not counted: the first compiles, a GPU's second captures a graph


# ------------------------------------------------------------------------------------ What is run


def arguments(description, shape, layers=None, dtype="bfloat16"):
    """A parser that has what every benchmark takes; shape, layers and dtype are its defaults."""
    gpu = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--shape", default=shape, choices=SHAPES)
    p.add_argument("--layers", type=int, default=layers, help="fewer than the shape has")
    p.add_argument("--device", default="cuda" if gpu else "cpu")
    p.add_argument("--dtype", default=dtype, choices=DTYPES)
    p.add_argument("--out", type=Path, help="JSON file for the results, written row by row")
    return p


def model_config(shape, layers=None):
    settings = dict(
        model_type="qwen3",
        vocab_size=151936,
        num_key_value_heads=8,
        head_dim=128,
        rope_theta=1e6,
        max_position_embeddings=40960,
    )
    settings |= SHAPES[shape]
    if layers is not None:
        settings["num_hidden_layers"] = layers
    return ModelConfig(**settings)


def head_shares(config, cr):
    """The share of the tokens outside the window that each head keeps, (L, Hkv): log-normal with a
    spread of 1.2, 1/cr on average; always the same."""
    heads = (config.num_hidden_layers, config.num_key_value_heads)
    generator = torch.Generator().manual_seed(0)
    share = torch.exp(torch.randn(heads, generator=generator) * 1.2)
    for _ in range(50):  # scale to the mean, no head above all
        share = (share * (1 / cr / share.mean())).clamp(1e-4, 0.999)
    return share


def random_model(config, device="cpu", dtype=torch.float32, cr=1.0, window=256):
    """A Model with normal weights. cr > 1: its adapters keep the tokens outside the window at each
    head's share, decided token by token."""
    torch.manual_seed(0)
    if cr > 1:
        config.dms = DMSConfig(window=window, target_cr=cr)
    with torch.device("meta"):
        model = Model(config).to(dtype)
    model.to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.02)
        else:
            torch.nn.init.ones_(p)
    model.rope_freq = rope_frequencies(config)[0].to(device)
    if cr > 1:
        for shares, block in zip(head_shares(config, cr).tolist(), model.model.layers):
            set_shares(block.self_attn, shares)
    model.requires_grad_(False).eval()
    cpu.use_onednn(model)
    return model


def set_shares(attention, shares):
    """Make a layer's adapter keep each head's share of the tokens: its scores are normal, around
    the number of standard deviations from the threshold that leaves such a share below it."""
    config = attention.config
    device = attention.q_proj.weight.device
    threshold = config.dms.offset / config.dms.scale
    bias = [threshold - NormalDist().inv_cdf(share) for share in shares]
    C = config.hidden_size
    projection = torch.nn.Linear(C, len(shares), device=device, dtype=torch.float32)
    torch.nn.init.normal_(projection.weight, std=C**-0.5)  # what it gets has norm C**0.5
    projection.bias.data = torch.tensor(bias, device=device)
    attention.dms_proj_alpha = projection
    attention.dms_proj_alpha_norm.float()


# ---------------------------------------------------------------------------------------- Clocks


def seconds_of(f, device):
    """How long f() takes. On a GPU: between two events on its stream."""
    if device == "cpu":
        begin = time.perf_counter()
        f()
        return time.perf_counter() - begin
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    begin.record()
    f()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def time_of(f, times, device, warm_up=WARM_UP):
    """{"seconds": the median over so many runs of f(), "fastest": the least}."""
    for _ in range(warm_up):
        f()
    seconds = [seconds_of(f, device) for _ in range(times)]
    return {"seconds": statistics.median(seconds), "fastest": min(seconds)}


def tidy(device):
    """Give memory back before the next measurement takes its own."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------- Results


def environment():
    """Hardware, versions and commit, for a results file."""
    gpu = torch.cuda.is_available()
    return {
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "triton": getattr(triton, "__version__", None),
        "numba": getattr(cpu.numba, "__version__", None),
        "commit": commit(),
    }


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n")
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def commit():
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError:  # there is no git
        return None
    return done.stdout.strip() or None


class Results:
    """What a run has measured, in `data`. Written to --out, if that is given, after every row: a
    run that is cut leaves what it has."""

    def __init__(self, args, **more):
        settings = {}
        for name, value in vars(args).items():
            is_plain = isinstance(value, int | float | str | list | None)
            settings[name] = value if is_plain else str(value)
        self.data = {"settings": settings, **environment(), **more}
        self.out = args.out
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)

    def add(self, kind, row):
        """Append a row, a dict, to the list data[kind]."""
        self.data.setdefault(kind, []).append(row)
        self.write()

    def write(self):
        if self.out:
            write_json(self.out, self.data)
