"""Triton kernels. Each file is one kernel with its launcher and, first, the plain PyTorch function that it equals."""
import os

try:
    import triton
    import triton.language as tl
except ImportError:  # it has no wheel for this platform; the plain functions need none
    triton = tl = None


def check_launch(name, *tensors):
    """What every launcher needs: Triton, and contiguous tensors on one GPU, or on the CPU under TRITON_INTERPRET=1."""
    if triton is None:
        raise ImportError(f"{name} needs triton, which is not installed; {name}_plain does not")
    devices = {x.device for x in tensors}
    if len(devices) > 1 or tensors[0].device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"{name} needs its tensors on one GPU, or on the CPU under TRITON_INTERPRET=1, not on "
                         f"{', '.join(sorted(map(str, devices)))}")
    if not all(x.is_contiguous() for x in tensors):
        raise ValueError(f"{name} needs contiguous tensors")
