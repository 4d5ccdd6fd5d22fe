"""What is not a kernel's on a GPU, on a simulated one: no tensor is left behind on the CPU, and the
results are the CPU's. In `simulated_gpu()` there is a device "cuda:0", made of a CPU's memory. Its
tensors say that they are there, and are computed by the CPU. To mix them with a CPU's raises, as on
a GPU. There is no Triton, so the plain functions run."""
import sys
from contextlib import contextmanager

import pytest
import torch
from conftest import small_model
from test_retrofit import arguments, metrics_in, random_teacher, results_in, text  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import retrofit
from dms import DMSConfig
from generate import Sampling, Sequence, generate
from kv_cache import KVCache

GPU = torch.device("cuda:0")
aten = torch.ops.aten
# what may take tensors of both: copies, and indices
MIXES = {aten.copy_, aten._to_copy, aten.index, aten.index_put_, aten.index_put,
         aten._index_put_impl_}


def compute(_, function, types, given=(), named=None):
    """Call an operation, on the CPU, with a result on the device where it belongs."""
    named = named or {}
    tensors = [x for x in tree_leaves((given, named)) if isinstance(x, torch.Tensor)]
    wrappers = {id(x.inner): x for x in tensors if isinstance(x, OnGPU)}
    strangers = [tuple(x.shape) for x in tensors if not isinstance(x, OnGPU) and x.dim() > 0]
    if wrappers and strangers and function.overloadpacket not in MIXES:
        raise RuntimeError(f"{function}: tensors of a GPU, and of a CPU {strangers}")
    if function is aten._fused_sdp_choice.default:
        return torch.nn.attention.SDPBackend.MATH.value
    is_ours = bool(wrappers)
    if function.overloadpacket is aten.copy_:
        is_ours = isinstance(given[0], OnGPU)
    if named.get("device") is not None:
        is_ours = torch.device(named["device"]).type == "cuda"
        named = {**named, "device": torch.device("cpu"), "pin_memory": False}

    def wrap(x):  # what is changed in place stays what it is
        if not is_ours or not isinstance(x, torch.Tensor):
            return x
        return wrappers[id(x)] if id(x) in wrappers else OnGPU(x)

    def unwrap(x):
        return x.inner if isinstance(x, OnGPU) else x

    with torch.inference_mode(False), torch.no_grad():
        return tree_map(wrap, function(*tree_map(unwrap, given), **tree_map(unwrap, named)))


class OnGPU(torch.Tensor):
    """A tensor of the simulated GPU; `inner` is the CPU's that it is made of."""
    __torch_dispatch__ = classmethod(compute)

    @staticmethod
    def __new__(cls, inner):
        layout = dict(strides=inner.stride(), storage_offset=inner.storage_offset())
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **layout, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @property
    def device(self):  # what Python sees; beneath it is a CPU's tensor
        return GPU

    def to(self, *given, **named):
        device, dtype, *_ = torch._C._nn._parse_to(*given, **named)
        result = super().to(dtype or self.dtype)
        return result if device in (None, GPU) else result.cpu()

    def cpu(self):
        return self.detach().inner.clone()

    def tolist(self):
        return self.inner.tolist()


class Generator(torch.Generator):
    def __new__(cls, device=None):  # a CPU's, whatever it is asked to be
        return super().__new__(cls)


class Simulation(TorchDispatchMode):
    __torch_dispatch__ = compute


@contextmanager
def simulated_gpu():
    answers = dict(_lazy_init=None, is_available=True, set_device=None, mem_get_info=(2**28, 2**28),
                   max_memory_allocated=0, get_device_capability=(8, 0), get_device_name="none")
    with pytest.MonkeyPatch.context() as patch, Simulation():
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, lambda device=None, answer=answer: answer)
        patch.setattr(torch, "Generator", Generator)
        for name in ("kernels", "kernels.training"):  # as if they were not there
            patch.setitem(sys.modules, name, None)
        torch._C._set_only_lift_cpu_tensors(True)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            yield
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
            torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.mark.parametrize("settings", [DMSConfig(window=3), DMSConfig(0, "neuron", 0), None])
def test_generation_without_triton(settings):
    """Continuous batching, forks, put-backs, sampling."""
    def texts(model):
        sampling = Sampling(1.3, top_k=20, top_p=0.9)
        chains = [Sequence([1, 2, 3] * (i // 2 + 2), 8, i, sampling=sampling) for i in range(6)]
        memory = 30 * KVCache(model.config, 1, page_size=4).page_bytes
        cache = KVCache(model.config, 3, model.device, page_size=4, chunk=8, memory=memory)
        for _ in generate(model, cache, chains, {3, 5}):
            pass
        return [(chain.new, chain.error) for chain in chains]

    model = small_model(4, settings, 0.5)
    expected = texts(model)
    with simulated_gpu():
        assert texts(model.to(GPU)) == expected


@pytest.mark.parametrize("train", ["adapters", "all"])
def test_a_retrofit_from_its_first_step_to_its_table(random_teacher, text, tmp_path, train):  # noqa: F811
    def numbers(device):
        more = f"--train {train} --steps 2 --dtype float32 --device {device}"
        retrofit.main(arguments(random_teacher, text, tmp_path / device, more))
        found = [*metrics_in(tmp_path / device), *results_in(tmp_path / device).values()]
        return [x for row in found for x in row.values() if isinstance(x, (int, float))]

    expected = numbers("cpu")
    with simulated_gpu():
        assert numbers("cuda:0") == pytest.approx(expected, rel=1e-3, abs=1e-6)
