"""What is not a kernel's on a GPU, on a simulated one: no tensor is left behind on the CPU, and the
results are the CPU's."""

import pytest
from conftest import small_model
from simulated_gpu import GPU, simulated_gpu
from test_retrofit import arguments, metrics_in, random_teacher, results_in, text  # noqa: F401

import retrofit
from dms import DMSConfig
from generate import Sampling, Sequence, generate
from kv_cache import KVCache


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
