"""The fast paths, a file each: first the plain PyTorch function, then a kernel that equals it.

cache_write.py       one new token into every row: plain, and by Triton
decode_attention.py  one query for every row: plain, and by Triton
block.py             many new tokens: plain only
cpu.py               the first two, and products with few rows, compiled by numba for a CPU
choose.py            which of them a cache uses
"""

import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # it has no wheel for this platform; the plain functions need none
    triton = tl = None


def check_launch(name, *tensors):
    """What every Triton launcher needs: Triton, and contiguous tensors on the current GPU or, under
    TRITON_INTERPRET=1, on the CPU. The cache sees to it; a failure is a bug of ours."""
    if triton is None:
        raise ImportError(f"{name} needs triton, which is not installed; {name}_plain does not")
    device = tensors[0].device
    assert all(x.device == device for x in tensors), f"{name}: tensors on several devices"
    assert all(x.is_contiguous() for x in tensors), f"{name}: tensors must be contiguous"
    if device.type == "cuda":
        is_here = device.index == torch.cuda.current_device()
        assert is_here, f"{name}: {device} is not the GPU that set_device chose"
    interpreted = device.type != "cpu" or os.environ.get("TRITON_INTERPRET") == "1"
    assert interpreted, f"{name}: on a CPU it runs under TRITON_INTERPRET=1 only"
