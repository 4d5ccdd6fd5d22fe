"""A GPU made of a CPU's memory, to find what a real one would refuse.

Within `simulated_gpu()` there is a device "cuda:0". Its tensors say that they are there, and are
computed by the CPU; an operation that mixes them with a CPU's, as a GPU would refuse, raises. There
is no Triton, so that the plain functions are what runs.
"""

from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import kernels.choose

GPU = torch.device("cuda:0")
aten = torch.ops.aten
# what may take tensors of both: copies, and indices
MIXES = {aten.copy_, aten._to_copy, aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_}


class OnGPU(torch.Tensor):
    """A tensor of the simulated GPU; `inner` is the CPU's that it is made of."""

    @staticmethod
    def __new__(cls, inner):
        layout = dict(strides=inner.stride(), storage_offset=inner.storage_offset())
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **layout, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @property
    def device(self):  # what Python sees; beneath it is a CPU's tensor
        return GPU

    def to(self, *arguments, **named):
        device, dtype, *_ = torch._C._nn._parse_to(*arguments, **named)
        result = super().to(dtype or self.dtype)
        return result if device in (None, GPU) else result.cpu()

    def cpu(self):
        return self.detach().inner.clone()

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), named=None):
        return compute(function, arguments, named or {})

    def tolist(self):
        return self.inner.tolist()


def compute(function, arguments, named):
    """Call an operation, on the CPU, with a result on the device where it belongs."""
    tensors = [x for x in tree_leaves((arguments, named)) if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, OnGPU)]
    strangers = [x for x in tensors if not isinstance(x, OnGPU) and x.dim() > 0]
    if ours and strangers and function.overloadpacket not in MIXES:
        shapes = [tuple(x.shape) for x in strangers]
        raise RuntimeError(f"{function}: tensors of a GPU, and of a CPU {shapes}")
    if function is aten._fused_sdp_choice.default:
        return torch.nn.attention.SDPBackend.MATH.value
    is_ours = bool(ours)
    if function.overloadpacket is aten.copy_:
        is_ours = isinstance(arguments[0], OnGPU)
    named = {key: value for key, value in named.items() if key != "pin_memory"}
    if named.get("device") is not None:
        is_ours = torch.device(named["device"]).type == "cuda"
        named["device"] = torch.device("cpu")

    wrappers = {id(x.inner): x for x in ours}

    def wrap(x):
        if not is_ours or not isinstance(x, torch.Tensor):
            return x
        # what is changed in place stays what it is
        return wrappers[id(x)] if id(x) in wrappers else OnGPU(x)

    def unwrap(x):
        return x.inner if isinstance(x, OnGPU) else x

    with torch.inference_mode(False), torch.no_grad():
        return tree_map(wrap, function(*tree_map(unwrap, arguments), **tree_map(unwrap, named)))


class Generator(torch.Generator):
    """A CPU's, whatever it is asked to be."""

    def __new__(cls, device=None):
        return super().__new__(cls)


class Simulation(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        return compute(function, arguments, named or {})


@contextmanager
def simulated_gpu():
    with (
        mock.patch("torch.cuda._lazy_init"),
        mock.patch("torch.Generator", Generator),
        mock.patch("torch.cuda.mem_get_info", lambda device=None: (2**28, 2**28)),
        mock.patch("torch.cuda.get_device_name", lambda: "a simulated GPU"),
        mock.patch.object(kernels.choose, "triton", None),
        Simulation(),
    ):
        torch._C._set_only_lift_cpu_tensors(True)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            yield
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
            torch.__future__.set_overwrite_module_params_on_conversion(False)
