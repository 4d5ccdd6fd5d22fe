"""What the cache is made of, and the fast paths: first the plain PyTorch function, then a kernel
that equals it.

    pages.py               the pool of pages, and what every row holds in it
    cache_write.py         new tokens into the rows: plain, and one a row by Triton
    decode_attention.py    one query a row: plain, and by Triton
    feed_token.py          what lies between a layer's products and its attention in a decode step,
                           by Triton
    block.py               many queries a row: plain, and by Triton
    cpu.py                 one token and one query a row, by numba for a CPU
    choose.py              which of them a cache uses
    decode_step.py         a whole decode step, as one CUDA graph on a GPU
    training_attention.py  the relaxed attention of training: plain, and by Triton
"""
import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # it has no wheel for this platform; the plain functions need none
    triton = tl = None


def capability(tensor):
    """The major compute capability of a tensor's GPU; H100's, 9, where there is none."""
    return torch.cuda.get_device_capability(tensor.device)[0] if tensor.is_cuda else 9


def check_launch(name, *tensors):
    """What every Triton launcher needs: Triton, and contiguous tensors on the current GPU or, under
    TRITON_INTERPRET=1, on the CPU. The cache sees to it; a failure is a bug of ours."""
    if triton is None:
        raise ImportError(f"{name} needs triton, which is not installed; {name}_plain does not")
    device = tensors[0].device
    assert all(x.device == device for x in tensors), f"{name}: tensors on several devices"
    assert all(x.is_contiguous() for x in tensors), f"{name}: tensors must be contiguous"
    if device.type == "cuda":
        assert device.index == torch.cuda.current_device(), f"{name}: {device} is not the current GPU"
    can_run = device.type != "cpu" or os.environ.get("TRITON_INTERPRET") == "1"
    assert can_run, f"{name}: on a CPU it runs under TRITON_INTERPRET=1 only"
