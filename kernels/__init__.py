"""By Triton, a file each with its launcher and, first, the plain PyTorch function that it equals; by numba: cpu.py."""
import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # it has no wheel for this platform; the plain functions need none
    triton = tl = None


def check_launch(name, *tensors):
    """What every launcher needs: Triton, contiguous tensors, the current GPU or, under TRITON_INTERPRET=1, the CPU."""
    if triton is None:
        raise ImportError(f"{name} needs triton, which is not installed; {name}_plain does not")
    devices, here = {x.device for x in tensors}, tensors[0].device
    if len(devices) > 1 or here.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1" or \
            here.type == "cuda" and here.index != torch.cuda.current_device():
        raise ValueError(f"{name} needs its tensors on the GPU that torch.cuda.set_device chose, or on the CPU under "
                         f"TRITON_INTERPRET=1, not on {', '.join(sorted(map(str, devices)))}")
    if not all(x.is_contiguous() for x in tensors):
        raise ValueError(f"{name} needs contiguous tensors")
