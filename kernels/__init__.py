"""
Fast versions of what stands in plain PyTorch in the module that uses it; with this folder deleted
everything still runs, slower.

    attention.py   attend_block, attend_one of kv_cache.py    Triton, on a GPU
    training.py    relaxed_attention of dms.py                Triton, on a GPU
    cpu.py         attend_one of kv_cache.py                  numba, on a CPU

Nothing here imports anything of ours from outside the folder. Importing a file without the library
that it needs raises ImportError, and whoever imports it then takes the plain function.

The Triton kernels cover heads of up to 256 channels in float32, float16 and bfloat16, from compute
capability 8.0 on. On 7.5 (a T4) they cover decode and prefill in float16. Training is not covered
there: it keeps more in registers than there are, so it would run from memory. The keys of
DeepSeek's latent attention have 576 channels, and are not covered.
"""

import torch


def capability(tensor):
    """The major compute capability of a tensor's GPU; 9, an H100's, where there is none."""
    return torch.cuda.get_device_capability(tensor.device)[0] if tensor.is_cuda else 9


def block_sizes(x, width):
    """How many vectors of `width` channels in x's dtype a program takes: (own, other, few).

    A program holds `own` queries, or keys, and walks over the other side: `other` of them at a time
    in a kernel with one accumulator, `few` in one with several, which take the registers.

    The numbers were found by compiling: with them the kernels fit into the shared memory of every
    GPU that they cover, and up to 128 channels they spill at most a few registers on an A100 or
    H100. (An H100, capability 9, multiplies from shared memory. Others multiply from registers,
    which have room for less, and so does every GPU in float32.)
    """
    size = width * x.element_size()
    if x.element_size() == 4:
        few = 32 if width <= 64 else 16
        return 32, few, few
    own = {7: 32, 9: 128}.get(capability(x), 64)
    if size > 256:  # more than 128 channels in 16 bits
        own //= 2
    other = min(64, 16384 // size)  # 16 KiB at a time
    return own, other, 32
