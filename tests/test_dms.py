"""The method: the rule, the decision and its two sources, relaxed attention, losses, schedule."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import close, small_model

import dms
from dms import DMSConfig, Packing, RelaxedAttention
from kv_cache import KVCache
from retrofit import learning_rate


def test_the_rule_and_decisions_on_a_small_case():
    evict = torch.tensor([True, False, True, True, False])
    t = torch.arange(5)
    assert dms.visible(t[:, None], t, evict, window=1).int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 0, 1, 1]]
    logits = torch.tensor([[[9.0, -1, 1, -1, 1]]])
    assert (dms.by_subject(logits, 0) > 0).int().tolist() == [[[1, 0, 1, 0, 1]]]
    assert (dms.by_subject(logits, 1) > 0).int().tolist() == [[[0, 1, 0, 1, 0]]]


def test_fresh_adapters_leave_the_model_as_it_was():
    ids = torch.randint(0, 67, (2, 50))
    close(dms.start_retrofit(small_model(1), DMSConfig(window=0))(ids), small_model(1)(ids))
    model = dms.start_retrofit(small_model(1).bfloat16(), DMSConfig())
    assert {p.dtype for n, p in model.named_parameters() if "alpha" in n} == {torch.float32}
    assert model(ids).dtype == torch.bfloat16
    assert DMSConfig().logits(torch.zeros(1, 3, 2).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_retrofit_by_a_borrowed_neuron_begins_with_weights_that_decide_nothing(kind):
    """Only the outputs of the borrowed channels, biases included, become zero: then s = 0."""
    model = small_model(1, model_type=kind)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    dms.start_retrofit(model, DMSConfig(window=1, source="neuron"))
    for name, parameter in model.named_parameters():
        if "q_proj" in name:
            before[name][[7, 23]] = 0  # of 4 heads of 8 channels the last of heads 0 and 2
        assert torch.equal(parameter, before[name])
    cache = KVCache(model.config, 1)
    model(torch.randint(0, 67, (1, 50)), cache=cache)
    assert cache.compression_ratio() == 1


def test_relaxed_attention_of_16_bits_is_rounded_once():
    q, k, v = torch.randn(3, 2, 2, 300, 8).bfloat16()
    others = (F.logsigmoid(torch.randn(2, 2, 300)), torch.zeros(2, 300, dtype=torch.int32), 5)
    expected = dms.relaxed_attention(q.float(), k.float(), v.float(), *others).bfloat16()
    assert torch.equal(dms.relaxed_attention(q, k, v, *others), expected)


@pytest.mark.parametrize("shift", [0, 1])
def test_certain_decisions_are_the_hard_rule_in_packed_documents(shift):
    """With |z| large the noise does not matter, so training computes what inference will: each
    document has the states, and evicts the pairs, that it does alone. The teacher evicts none."""
    dense = small_model(3)
    model = small_model(3, DMSConfig(window=5, shift=shift))
    model.load_state_dict(dense.state_dict(), strict=False)
    model.config.dms.scale = 1e6
    ids = torch.randint(0, 67, (2, 200))
    documents = [[60, 1, 100, 30], [7, 180]]
    packing = Packing(documents, 200, "cpu")
    teacher = model.hidden(ids, dms.document_attention(packing), -packing.first)
    relaxed = RelaxedAttention(model.config.dms, packing, dms.relaxed_attention, [3, 4])
    student = model.hidden(ids, relaxed, -packing.first)
    evicted = 0
    for b, lengths in enumerate(documents):
        for i in range(len(lengths)):
            here = (slice(b, b + 1), slice(sum(lengths[:i]), sum(lengths[: i + 1])))
            cache = KVCache(model.config, 1)
            close(student[here], model.states(ids[here], cache=cache), atol=1e-3)
            close(teacher[here], dense.states(ids[here]))
            stats = cache.stats()
            evicted += stats["tokens"] - stats["pairs"] / (2 * 2)  # layers, heads
    assert evicted > 20
    assert relaxed.evicted_pairs().item() == pytest.approx(evicted, abs=1e-3)


def test_noise_follows_from_the_seed_of_a_sequence_and_the_layer_alone():
    def noise(seeds, layer, logits=None, per="head"):
        relaxed = RelaxedAttention(DMSConfig(per=per), None, None, seeds)
        return relaxed.noise(layer, torch.zeros(len(seeds), 2, 50) if logits is None else logits)

    every = [noise([seed], 3) for seed in ("0 5 0", "0 261 0", "0 5 1", "1 5 0", "256 5 0")]
    every.append(noise(["0 5 0"], 4))  # another layer
    assert len({tuple(x.flatten().tolist()) for x in every}) == 6
    transposed = torch.zeros(1, 50, 2).transpose(1, 2)  # logits lie in memory as they like
    assert torch.equal(noise(["0 5 0"], 3, transposed), every[0])
    assert torch.equal(*noise(["0 5 0"], 3, per="layer")[0])
    many = noise([str(seed) for seed in range(200)], 0)
    assert many.mean().item() == pytest.approx(0, abs=0.06)
    assert many.var().item() == pytest.approx(math.pi**2 / 3, rel=0.05)  # the logistic's


def test_the_compression_loss_is_one_sided_and_what_changes_with_the_step():
    assert dms.compression_loss(torch.tensor(0.5), 8).item() == pytest.approx(0.375)
    assert dms.compression_loss(torch.tensor(0.9), 8).item() == 0
    assert [dms.scheduled_cr(step, 1000, 8) for step in (0, 100, 700, 999)] == [1, 2, 8, 8]
    rates = [learning_rate(step, 1000, 0.5) for step in (0, 9, 19, 600, 800, 1000)]
    assert rates == pytest.approx([0.025, 0.25, 0.5, 0.5, 0.25, 0])
    assert learning_rate(9, 10, 0.5) == pytest.approx(0.125)  # a short run stays below the peak
