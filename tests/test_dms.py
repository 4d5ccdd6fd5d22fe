"""The method: the rule, the decision and its two sources, relaxed attention, losses, schedule."""

import functools
import math
import random
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import small_model

import dms
from dms import DMSConfig, Packing, RelaxedAttention
from kv_cache import KVCache

close = functools.partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)


def test_the_rule_decisions_and_packing_on_small_cases():
    evict = torch.tensor([True, False, True, True, False])
    t = torch.arange(5)
    assert dms.visible(t[:, None], t, evict, window=1).int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 0, 1, 1]]
    logits = torch.tensor([[[9.0, -1, 1, -1, 1]]])
    assert dms.decisions(logits, 0).int().tolist() == [[[1, 0, 1, 0, 1]]]
    assert dms.decisions(logits, 1).int().tolist() == [[[0, 1, 0, 1, 0]]]
    packing = Packing([[3, 1, 2], [4]], 7, "cpu")
    assert packing.first.tolist() == [[0, 0, 0, 3, 4, 4, 6], [0, 0, 0, 0, 4, 4, 4]]
    assert packing.end.tolist() == [[3, 3, 3, 4, 6, 6, 0], [4, 4, 4, 4, 0, 0, 0]]
    assert packing.predicts().int().tolist() == [[1, 1, 0, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]]
    assert packing.expires(1).int().tolist() == [[1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]]
    s = torch.tensor([[[0.02, 0.08], [0.05, 0.0], [0.1, 0.04]]])  # B 1, T 3, Hkv 2
    close(DMSConfig().logits(s), torch.tensor([[[-3.0, 0.0, 5.0], [3.0, -5.0, -1.0]]]))
    close(DMSConfig(per="layer").logits(s), torch.tensor([[[-3.0, 0.0, 5.0]] * 2]))
    assert DMSConfig().logits(s.bfloat16()).dtype == torch.float32


def test_the_two_sources_of_the_score():
    """The last channel of each group's first query, and a projection of the normed residual."""
    q = torch.arange(1, 2 * 3 * 4 * 6 + 1).float().view(2, 3, 4, 6)  # B 2, T 3, Hq 4, D 6
    assert torch.equal(dms.borrowed_score(q, 2), torch.stack((q[:, :, 0, 5], q[:, :, 2, 5]), -1))
    silent = dms.silence_borrowed(q, 2)
    q[:, :, [0, 2], 5] = 0
    assert torch.equal(silent, q)
    x = torch.randn(2, 3, 8)
    norm, projection = torch.nn.RMSNorm(8, eps=1e-6), torch.nn.Linear(8, 2, bias=False)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    root = (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    close(dms.adapter_score(x, norm, projection), x / root * norm.weight @ projection.weight.T)
    assert dms.adapter_score(x.bfloat16(), norm, projection).dtype == torch.float32


def test_fresh_adapters_leave_the_model_as_it_was():
    ids = torch.randint(0, 67, (2, 50))
    close(dms.start_retrofit(small_model(1), DMSConfig(window=0))(ids), small_model(1)(ids))
    model = dms.start_retrofit(small_model(1).bfloat16(), DMSConfig())
    assert {p.dtype for n, p in model.named_parameters() if "alpha" in n} == {torch.float32}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_retrofit_by_a_borrowed_neuron_begins_with_weights_that_decide_nothing(kind):
    """Only the outputs of the borrowed channels, biases included, become zero: then s = 0."""
    model = small_model(1, model_type=kind)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    dms.start_retrofit(model, DMSConfig(window=0, source="neuron"))
    for name, parameter in model.named_parameters():
        if "q_proj" in name:
            before[name][[7, 23]] = 0  # of 4 heads of 8 channels the last of heads 0 and 2
        assert torch.equal(parameter, before[name])
    cache = KVCache(model.config, 1)
    model(torch.randint(0, 67, (1, 50)), cache=cache)
    assert cache.compression_ratio() == 1


def formula(q, k, v, bias, first, window):
    """Relaxed attention, dense. k, v and bias have a head for each of q's."""
    j = torch.arange(q.shape[2])
    i = j[:, None]
    score = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    score = score + torch.where(i - j > window, bias[:, :, None], 0)
    hidden = (j > i) | (j < first[:, None, :, None])
    return score.masked_fill(hidden, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize("seed", range(24))
def test_relaxed_attention_is_the_formula_and_so_are_its_gradients(seed):
    """In 1,100 tokens scores are computed again in backward; 16-bit results are rounded once."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    T = 1100 if seed == 1 else rng.choice([1, 2, 9, 40, 130])
    B, Hkv, G = rng.choice([1, 2]), rng.choice([1, 2]), rng.choice([1, 2, 3])
    dtype = torch.float32 if seed % 4 else torch.bfloat16
    q, k, v = (torch.randn(B, T, n, 8).to(dtype).transpose(1, 2) for n in (Hkv * G, Hkv, Hkv))
    bias = F.logsigmoid(torch.randn(B, Hkv, T) * rng.choice([1, 10]))
    for certain in (0.0, -1e4):  # kept, and evicted
        bias[torch.rand(B, Hkv, T) < 0.2] = certain
    first = Packing([[cut := rng.randrange(T), (T - cut) // 2]] * B, T, "cpu").first
    window = rng.choice([0, 1, 7, 200])
    probe = torch.randn(q.shape, dtype=dtype)
    inputs = [x.requires_grad_() for x in (q, k, v, bias)]
    y = dms.relaxed_attention(*inputs, first, window, block=rng.choice([6, 128]))
    found = [y, *torch.autograd.grad((y * probe).sum(), inputs)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    y = formula(exact[0], *(x.repeat_interleave(G, 1) for x in exact[1:]), first, window)
    expected = [y, *torch.autograd.grad((y * probe).sum(), exact)]
    assert [x.dtype for x in found] == [dtype] * 4 + [torch.float32]
    for x, y in zip(found, expected):
        close(x.double(), y, atol=2e-5, rtol=2e-5 if seed % 4 else torch.finfo(dtype).eps)


def test_a_decision_is_relaxed_to_a_gumbel_sigmoid():
    """Key j's bias is log(1 - p), from the logit of one token later; the count of evicted pairs is
    of hard decisions; the gradients are those of p."""
    z = torch.randn(2, 2, 21, requires_grad=True)
    packing = Packing([[21], [9, 8]], 21, "cpu")
    attend = lambda q, k, v, *others: others
    relaxed = RelaxedAttention(DMSConfig(window=3, tau=0.5), packing, attend, [7, 8])
    bias, first, window = relaxed(0, None, None, None, z)
    assert first is packing.first and window == 3
    p = torch.sigmoid((z + relaxed.noise(0, z)) / 0.5)[..., 1:]
    counted = torch.zeros(2, 1, 20)  # what a document's last token has out of its window
    counted[0, :, :17] = counted[1, :, :5] = counted[1, :, 9:13] = 1
    pairs = relaxed.evicted_pairs()
    assert pairs.item() == pytest.approx(((p > 0.5) * counted).sum().item() / 2)  # heads
    close(bias, F.pad(torch.log1p(-p), (0, 1)))  # the last token is not decided yet: kept
    for pair in ((bias.sum(), torch.log1p(-p).sum()), (pairs, (p * counted).sum() / 2)):
        close(*(torch.autograd.grad(x, z, retain_graph=True) for x in pair))


@pytest.mark.parametrize("shift", [0, 1])
def test_certain_decisions_are_the_hard_rule_in_packed_documents(shift):
    """With |z| large the noise does not matter, so training computes what inference will: each
    document has the states, and evicts the pairs, that it does alone. The teacher evicts none."""
    dense = small_model(3)
    model = small_model(3, DMSConfig(window=5, shift=shift))
    model.load_state_dict(dense.state_dict(), strict=False)
    model.config.dms.scale = 1e4
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

    together = noise(["0 5 0", "0 5 1", "1 5 0"], 3)
    assert torch.equal(together[1:2], noise(["0 5 1"], 3))
    assert torch.equal(together[2:], noise(["1 5 0"], 3))
    every = [noise([seed], 3) for seed in ("0 5 0", "0 261 0", "0 5 1", "1 5 0", "256 5 0")]
    every.append(noise(["0 5 0"], 4))  # another layer
    assert len({tuple(x.flatten().tolist()) for x in every}) == 6
    transposed = torch.zeros(1, 50, 2).transpose(1, 2)  # logits lie in memory as they like
    assert torch.equal(noise(["0 5 0"], 3, transposed), together[:1])
    assert torch.equal(*noise(["0 5 0"], 3, per="layer")[0])
    many = noise([str(seed) for seed in range(200)], 0)
    assert many.mean().item() == pytest.approx(0, abs=0.06)
    assert many.var().item() == pytest.approx(math.pi**2 / 3, rel=0.05)  # the logistic's


@pytest.mark.parametrize("size, reverse, trained_head", product((4, 99), *[(False, True)] * 2))
def test_distillation_loss_is_the_naive_kl(size, reverse, trained_head, monkeypatch):
    monkeypatch.setattr(dms, "KL_SLICE", size)
    torch.manual_seed(0)
    student = torch.randn(2, 9, 5, requires_grad=True)
    heads = (torch.randn(11, 5, requires_grad=trained_head), torch.randn(11, 5))
    teacher = torch.randn(2, 9, 5)
    counts = torch.arange(9) < torch.tensor([[9], [4]])
    log_q, log_p = (F.log_softmax(x @ w.T, -1) for x, w in zip((student, teacher), heads))
    log_p, log_q = (log_q, log_p) if reverse else (log_p, log_q)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)[counts].sum()
    loss = dms.distillation_loss(student, teacher, *heads, counts, reverse)
    close(loss, expected)
    trained = [student, heads[0]] if trained_head else [student]
    close(torch.autograd.grad(3 * loss, trained), torch.autograd.grad(3 * expected, trained))
    with torch.no_grad():
        close(dms.distillation_loss(student, teacher, *heads, counts, reverse), expected)


def test_compression_loss_is_one_sided_and_its_target_grows():
    assert dms.compression_loss(torch.tensor(0.5), 8).item() == pytest.approx(0.375)
    assert dms.compression_loss(torch.tensor(0.9), 8).item() == 0
    assert [dms.scheduled_cr(step, 1000, 8) for step in (0, 100, 700, 999)] == [1, 2, 8, 8]
