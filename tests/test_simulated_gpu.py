"""What is not a kernel's on a GPU, on a simulated one (simulated_gpu.py): no tensor is left behind on
the CPU, and the results are the CPU's."""

import json

import pytest
import torch
from conftest import small_model
from simulated_gpu import GPU, OnGPU, simulated_gpu
from test_retrofit import arguments, small_teacher, text_file  # noqa: F401

import retrofit
from dms import DMSConfig
from generate import Sequence, generate
from kernels import choose
from kv_cache import KVCache


def test_tensors_of_both_devices_do_not_mix():
    with simulated_gpu():
        x = torch.arange(6.0, device=GPU).view(2, 3)
        assert isinstance(x, OnGPU) and x.device == GPU
        assert (x[1] * 2 + torch.tensor(1.0)).tolist() == [7, 9, 11]  # a scalar may come from the CPU
        with pytest.raises(RuntimeError, match="tensors of a GPU, and of a CPU"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="tensors of a GPU, and of a CPU"):
            torch.where(torch.ones(3) > 0, x, 0)
        x[0] = torch.ones(3)  # a copy
        assert type(x.cpu()) is torch.Tensor and x.sum().item() == 15


@pytest.mark.parametrize(
    "settings", [None, DMSConfig(window=3), DMSConfig(window=3, source="neuron", shift=0)]
)
def test_generation_without_triton(settings):
    """Continuous batching, forks, put-backs, sampling."""

    def texts(model):
        chains = [[1, 2, 3 + i // 2] * (i + 2) for i in range(10)]
        chains = [Sequence(ids, 30, seed=i) for i, ids in enumerate(chains)]
        memory = 60 * KVCache(model.config, 1, page_size=4).page_bytes
        cache = KVCache(model.config, 4, model.device, page_size=4, chunk=8, memory=memory)
        assert cache.kernels == choose.PLAIN or model.device.type == "cpu"
        sampling = dict(temperature=1.3, top_k=20, top_p=0.95, min_p=0.01)
        for _ in generate(model, cache, chains, {3, 5}, sampling):
            pass
        return [(chain.new, chain.error) for chain in chains]

    model = small_model(4, settings, 0.5)
    expected = texts(model)
    with simulated_gpu():
        assert texts(model.to(GPU)) == expected


@pytest.mark.parametrize("train", ["adapters", "all"])
def test_a_retrofit_from_its_first_step_to_its_results(small_teacher, text_file, tmp_path, train):  # noqa: F811
    results = []
    for device in ("cpu", "cuda:0"):
        out = tmp_path / device
        argv = [*arguments(small_teacher, text_file, out), "--device", device, "--train", train,
                "--dtype", "float32", "--steps", "4", "--eval-every", "2", "--eval-rows", "2"]
        if device == "cpu":
            retrofit.main(argv)
        else:
            with simulated_gpu():
                retrofit.main(argv)
        numbers = []
        for line in (out / "metrics.jsonl").read_text().splitlines():
            numbers += json.loads(line).values()
        for column in json.loads((out / "results.json").read_text())["results"].values():
            numbers += [column["kl"], column["compression_ratio"], column["pairs"]]
        results.append(numbers)
    assert len(results[0]) == 4 * 6 + 2 * 2 + 3 * 3
    assert results[1] == pytest.approx(results[0], rel=1e-3, abs=1e-6)
