"""Triton kernels. Each file is one kernel with its launcher and, first, the plain PyTorch function that it equals."""
import math
import os
import threading

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # it has no wheel for this platform; the plain functions need none
    triton = tl = None


_scratch = threading.local()


def scratch(name, shape, device, dtype=torch.float32):
    """An uninitialised tensor that is used again at the next call with this name: memory fresh from the system costs
    a CPU more than what is computed in it."""
    size, kept, key = math.prod(shape), vars(_scratch), (name, device, dtype)
    if key not in kept or len(kept[key]) < size:
        with torch.inference_mode(False):
            kept[key] = torch.empty(size, device=device, dtype=dtype)
    return kept[key][:size].view(shape)


def in_float32(x):
    """x itself, or where it has another dtype a copy in scratch memory, valid until the next call."""
    return x if x.dtype == torch.float32 else scratch("float32", x.shape, x.device).copy_(x)


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
