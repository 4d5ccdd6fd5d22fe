"""Which kernels are used: by a cache, and in training."""

from collections import namedtuple

from kernels import (
    block,
    cache_write,
    cpu,
    decode_attention,
    feed_token,
    training_attention,
    triton,
)

# functions with the signatures of their plain twins; and feed_token, of which there is only one:
# None where a decode step is the model's own layers
Kernels = namedtuple("Kernels", "cache_write decode_attention block_attention feed_token")
PLAIN = Kernels(
    cache_write.cache_write_plain,
    decode_attention.decode_attention_plain,
    block.block_attention_plain,
    None,
)
TRITON = Kernels(
    cache_write.cache_write,
    decode_attention.decode_attention,
    block.block_attention,
    feed_token.feed_token,
)
NUMBA = Kernels(cpu.cache_write, cpu.decode_attention, block.block_attention_plain, None)


def choose_kernels(device, dtype):
    """Triton on a GPU, numba on a CPU, and PyTorch where they are missing."""
    if device.type == "cuda" and triton is not None:
        return TRITON
    return NUMBA if cpu.can_read(device, dtype) else PLAIN


def choose_training_attention(device):
    """What RelaxedAttention attends with: relaxed_attention_plain, or Triton's on a GPU."""
    if device.type == "cuda" and triton is not None:
        return training_attention.relaxed_attention
    return training_attention.relaxed_attention_plain
