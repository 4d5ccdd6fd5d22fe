"""
What the benchmarks share: models of real shapes with random weights, heads as uneven as real ones,
clocks, and rows of results that a run leaves behind when it is cut.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import choose_device  # noqa: E402
from dms import DMSConfig, start_retrofit  # noqa: E402
from model import Model, ModelConfig, rope_frequencies  # noqa: E402

GPU = torch.cuda.is_available()
# The first fields of ModelConfig, in order: the family, V, C, width of the MLP, L, Hq, Hkv, D
SHAPES = {
    "tiny": ("qwen3", 1000, 64, 128, 2, 4, 2, 32),  # for trying the scripts
    "smollm2-135m": ("llama", 49152, 576, 1536, 30, 9, 3, 64),
    "qwen3-0.6b": ("qwen3", 151936, 1024, 3072, 28, 16, 8, 128),
    "qwen3-8b": ("qwen3", 151936, 4096, 12288, 36, 32, 8, 128),
}
WARM_UP = 3  # runs that are not counted: the first compiles, a GPU's second captures a graph


def options(description, **defaults):
    """The command line: what every benchmark takes, and an option for each of `defaults`, with
    several values where that is a list."""
    p = argparse.ArgumentParser(description=description.strip().splitlines()[0])
    p.add_argument("--shape", default="qwen3-8b" if GPU else "qwen3-0.6b", choices=SHAPES)
    p.add_argument("--layers", type=int, help="fewer than the shape has")
    p.add_argument("--dtype", help="(default: bfloat16 on a GPU, float32 on a CPU)")
    p.add_argument("--profile", action="store_true", help="also say which kernels take longest")
    p.add_argument("--out", help="file to append results to, one JSON line a row")
    for name, default in defaults.items():
        first, nargs = (default[0], "*") if isinstance(default, list) else (default, None)
        p.add_argument(f"--{name}", default=default, type=type(first), nargs=nargs,
                       help=f"(default: {default})")
    args = p.parse_args()
    args.device = "cuda" if GPU else "cpu"
    choose_device(args)
    return args


def model_config(args):
    config = ModelConfig(*SHAPES[args.shape], rope_theta=1e6, max_position_embeddings=40960)
    config.num_hidden_layers = args.layers or config.num_hidden_layers
    config.tie_word_embeddings = args.shape != "qwen3-8b"
    return config


def random_model(args):
    """A dense Model with normal weights."""
    torch.manual_seed(0)
    config = model_config(args)
    with torch.device("meta"):
        model = Model(config).to(getattr(torch, args.dtype))
    model.to_empty(device=args.device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.ones_(parameter)
    model.rope_freq = rope_frequencies(config)[0].to(args.device)
    return model.requires_grad_(False).eval()


def compress(model, context, cr, window):
    """Let the model evict so that it holds 1/cr of the pairs of `context` tokens; cr 1: nothing.
    Returns the share of the tokens outside of the window that each head keeps, (L, Hkv): log-normal
    with a spread of 1.2, as uneven as those of real heads, and always the same."""
    config = model.config
    config.dms = None
    heads = (config.num_hidden_layers, config.num_key_value_heads)
    if cr == 1:
        return torch.ones(heads)
    share = torch.exp(1.2 * torch.randn(heads, generator=torch.Generator().manual_seed(0)))
    recent = window + 1
    mean = max(context / cr - recent, 1) / (context - recent)
    for _ in range(50):  # scale to the mean, with no head above all
        share = (share * (mean / share.mean())).clamp(1e-4, 0.999)
    start_retrofit(model, DMSConfig(window, target_cr=cr))
    for shares, block in zip(share.tolist(), model.model.layers):
        set_shares(block.self_attn, shares)
    return share


def set_shares(attention, shares):
    """Make a layer's adapter keep each head's share of the tokens. Its scores are normal, around
    the number of standard deviations from the threshold that leaves such a share below it."""
    config = attention.config
    like = attention.q_proj.weight
    threshold = config.dms.offset / config.dms.scale
    bias = [threshold - statistics.NormalDist().inv_cdf(share) for share in shares]
    projection = nn.Linear(config.hidden_size, len(shares))
    nn.init.normal_(projection.weight, std=config.hidden_size**-0.5)  # its input has norm C**0.5
    projection.bias.data = torch.tensor(bias)
    attention.dms_proj_alpha = projection.to(like).requires_grad_(False)
    attention.dms_proj_alpha_norm.to(like)


def milliseconds_of(f):
    """How long f() takes. On a GPU: between two events on its stream."""
    if not GPU:
        begin = time.perf_counter()
        f()
        return 1000 * (time.perf_counter() - begin)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    f()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def time_of(f, times, warm_up=WARM_UP):
    """{"ms": the median of so many runs of f(), "fastest_ms": the least}."""
    for _ in range(warm_up):
        f()
    times = [milliseconds_of(f) for _ in range(times)]
    return {"ms": statistics.median(times), "fastest_ms": min(times)}


def tidy():
    """Give memory back before the next measurement takes its own."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory():
    """{"peak_gb": the most that tensors took since `tidy`}, on a GPU."""
    return {"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if GPU else {}


class Results:
    """Prints rows and appends them to --out as they come. The first one says what runs."""

    def __init__(self, args):
        self.args = args
        failed, commit = subprocess.getstatusoutput(f"git -C '{ROOT}' rev-parse --short HEAD")
        on = torch.cuda.get_device_name() if GPU else f"{torch.get_num_threads()} CPU threads"
        settings = {name: str(value) for name, value in vars(args).items()}
        settings |= dict(torch=torch.__version__, commit=None if failed else commit)
        self.add("settings", script=Path(sys.argv[0]).name, on=on, **settings)

    def add(self, kind, **row):
        """A row of names and their values."""
        numbers = {name: f"{x:,.3f}" if type(x) is float else x for name, x in row.items()}
        print(f"{kind}:", ", ".join(f"{name} {x}" for name, x in numbers.items()), flush=True)
        if self.args.out:
            with open(self.args.out, "a") as file:
                print(json.dumps({"row": kind, **row}), file=file)

    def add_kernels(self, kind, f, most=8):
        """With --profile, rows of what takes longest in f() and of all of it: a GPU's kernels, or
        PyTorch's operators on a CPU. To be called last: what is timed later may be slower."""
        if not self.args.profile:
            return
        with profile(activities=[ProfilerActivity.CUDA if GPU else ProfilerActivity.CPU]) as trace:
            milliseconds_of(f)
        of_time = "self_device_time_total" if GPU else "self_cpu_time_total"
        events = [(getattr(e, of_time) / 1000, e.count, e.key[:60]) for e in trace.key_averages()]
        events.sort(reverse=True)
        for ms, calls, name in events[:most]:
            self.add(kind, ms=ms, calls=calls, kernel=name)
        self.add(kind, ms=sum(ms for ms, _, _ in events), kernel="all")
