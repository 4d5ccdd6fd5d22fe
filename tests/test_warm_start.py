"""The warm start: need against brute force, and what the fitted adapters are worth."""
import pytest
import torch
from conftest import close, small_model

import dms
from checkpoint import load_model, load_tokenizer
from evaluate import kl_on_text, settle_offsets
from retrofit import TEACHER
from toy.data import ToyData
from warm_start import needs, small_output, warm_start


def brute_force(q, k, v, residual, output, window):
    """The need of every pair by its definition: delete it, and compute attention again."""
    Hq, T, D = q.shape
    Hkv, _, Dv = v.shape
    need = torch.zeros(Hkv, T)
    query = torch.arange(T)[:, None]
    for j in range(T - 1 - window):
        misses = torch.arange(j + window + 1, T)  # the queries that would see it no longer
        for h in range(Hq):
            of = h // (Hq // Hkv)
            score = (q[h] @ k[of].T * D**-0.5).masked_fill(query < query.T, -torch.inf)
            whole = score.softmax(-1) @ v[of]
            score[:, j] = -torch.inf
            without = score.softmax(-1) @ v[of]
            lost = (without - whole)[misses] @ output[h].T  # of the residual
            need[of, j] += (lost.norm(dim=1) / residual[misses].norm(dim=1)).square().mean()
    return need


def test_need_equals_brute_force():
    torch.manual_seed(0)
    # probabilities in between, and some that are 1 to the last bit; values as long as keys or not
    for sharpness, Dv in ((1, 8), (8, 8), (1, 6)):
        Hq, Hkv, T, D, C, window = 4, 2, 40, 8, 24, 5
        shapes = (Hq, T, D), (Hkv, T, D), (Hkv, T, Dv), (T, C), (Hq, C, Dv)
        q, k, *others = map(torch.randn, shapes)
        inputs = (q * sharpness, k * sharpness, *others)
        expected = brute_force(*(x.double() for x in inputs), window)
        *inputs, output = inputs
        need = needs(*inputs, small_output(output, Hkv), window, block=16)
        seen = slice(0, T - 1 - window)  # the others no query can miss
        torch.testing.assert_close(need[:, seen], expected[:, seen], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_a_heads_part_of_the_output(family):
    attention = small_model(model_type=family).model.layers[0].self_attn
    W = attention.output_weight()
    y = torch.randn(2, 4, 5, W.shape[2])  # (B, Hq, T, D)
    close((y @ W.mT).sum(1), attention.output(y))


@pytest.mark.parametrize("shift", [0, 1])
def test_the_toy_forgets_well_before_the_first_step(shift):
    student = dms.start_retrofit(load_model(TEACHER), dms.DMSConfig(16, shift=shift))
    data = ToyData(load_tokenizer(TEACHER), 512, 4, seed=0)
    warm_start(student, data, 12)
    settle_offsets(student, data, (40,))
    [[ratio, _]] = student.config.dms.offsets
    assert ratio == 8  # at 40 the windows alone hold more
    kl, _, cache = kl_on_text(student, load_model(TEACHER), data, 8)
    assert kl < 0.15 and cache.compression_ratio() == pytest.approx(8.2, rel=0.1)
