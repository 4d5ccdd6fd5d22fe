"""What the benchmarks share: models of real shapes with random weights, and decisions as uneven as real ones."""
import platform
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dms import DMSConfig  # noqa: E402
from kernels import cpu as compiled  # noqa: E402
from model import Model, ModelConfig, rope_frequencies  # noqa: E402

SHAPES = {
    "qwen3-0.6b": dict(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                       num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True),
    "qwen3-8b": dict(vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
                     num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False),
}


def shape(name, layers=None, **changes):
    settings = dict(model_type="qwen3", rope_theta=1e6, max_position_embeddings=40960, **SHAPES[name], **changes)
    return ModelConfig(**{**settings, "num_hidden_layers": layers or settings["num_hidden_layers"]})


def head_shares(config, cr):
    """The share of tokens outside the window that each head keeps, (L, Hkv): log-normal with a spread of 1.2, 1/cr on
    average; always the same."""
    share = torch.exp(torch.randn(config.num_hidden_layers, config.num_key_value_heads,
                                  generator=torch.Generator().manual_seed(0)) * 1.2)
    for _ in range(50):  # scale to the mean, no head above all
        share = (share * (1 / cr / share.mean())).clamp(1e-4, 0.999)
    return share


def random_model(config, device="cpu", dtype=torch.float32, cr=1.0, window=256, seed=0):
    """A Model with normal weights. cr > 1: its adapters keep the tokens outside the window at each head's share,
    decided token by token."""
    torch.manual_seed(seed)
    config.dms = DMSConfig(window=window, target_cr=cr) if cr > 1 else None
    with torch.device("meta"):
        model = Model(config).to(dtype)
    model.to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02) if p.ndim > 1 else torch.nn.init.ones_(p)
    model.rope_freq = rope_frequencies(config)[0].to(device)
    if cr > 1:
        H, C = config.num_key_value_heads, config.hidden_size
        threshold = (config.dms.offset / config.dms.scale)
        for layer, block in zip(head_shares(config, cr).tolist(), model.model.layers):
            proj = torch.nn.Linear(C, H, device=device, dtype=torch.float32)
            torch.nn.init.normal_(proj.weight, std=C ** -0.5)  # s is standard normal, as the norm's output has norm C
            proj.bias.data = torch.tensor([threshold - NormalDist().inv_cdf(x) for x in layer], device=device)
            block.self_attn.dms_proj_alpha = proj
            block.self_attn.dms_proj_alpha_norm.float()
    return model.requires_grad_(False).eval()


def environment():
    """Hardware, versions and commit, for a results file."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    cpu = platform.processor() or platform.machine()
    try:
        cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"cpu": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "numba": getattr(compiled.numba, "__version__", None),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "commit": commit.stdout.strip() or None}
