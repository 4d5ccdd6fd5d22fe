"""The method: the rule, the decision and its two sources, the relaxed mask, losses, schedule."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import small_model

import dms
from dms import DMSConfig, Packing, RelaxedAttention
from kernels.training_attention import relaxed_attention_plain
from kv_cache import KVCache


def relaxed_attention(model, documents, T, seeds):
    packing = Packing.of(documents, T, "cpu")
    return RelaxedAttention(model.config.dms, packing, relaxed_attention_plain, seeds)


def test_rule_on_a_small_case():
    evict = torch.tensor([True, False, True, True, False])
    t = torch.arange(5)
    assert dms.visible(t[:, None], t, evict, window=1).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 1, 0, 1, 1],
    ]


def test_decisions_are_about_the_token_or_with_a_shift_the_one_before():
    logits = torch.tensor([[[9.0, -1, 1, -1, 1]]])
    assert dms.decisions(logits, 0)[0, 0].tolist() == [True, False, True, False, True]
    assert dms.decisions(logits, 1)[0, 0].tolist() == [False, True, False, True, False]


def test_decision_logits_by_head_or_by_layer():
    s = torch.tensor([[[0.02, 0.08], [0.05, 0.0], [0.1, 0.04]]])  # B 1, T 3, Hkv 2
    by_head = DMSConfig().logits(s)
    torch.testing.assert_close(by_head, torch.tensor([[[-3.0, 0.0, 5.0], [3.0, -5.0, -1.0]]]))
    by_layer = DMSConfig(per="layer").logits(s)
    torch.testing.assert_close(by_layer, torch.tensor([[[-3.0, 0.0, 5.0], [-3.0, 0.0, 5.0]]]))
    assert DMSConfig().logits(s.bfloat16()).dtype == torch.float32


def test_borrowed_neuron_is_the_last_channel_of_each_groups_first_query():
    q = torch.arange(1, 2 * 3 * 4 * 6 + 1).float().view(2, 3, 4, 6)  # B 2, T 3, Hq 4, D 6
    expected = torch.stack((q[:, :, 0, 5], q[:, :, 2, 5]), -1)
    assert torch.equal(dms.borrowed_score(q, 2), expected)

    silent = dms.silence_borrowed(q, 2)
    assert (silent[:, :, [0, 2], 5] == 0).all()
    assert torch.equal(silent[..., :5], q[..., :5])
    assert torch.equal(silent[:, :, [1, 3]], q[:, :, [1, 3]])
    assert (q != 0).all()  # the original is as it was


def test_adapter_score_is_a_projection_of_the_normed_residual():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    norm = torch.nn.RMSNorm(8, eps=1e-6)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    projection = torch.nn.Linear(8, 2, bias=False)
    mean_square = x.square().mean(-1, keepdim=True)
    expected = (x / (mean_square + 1e-6).sqrt() * norm.weight) @ projection.weight.T
    torch.testing.assert_close(dms.adapter_score(x, norm, projection), expected)
    assert dms.adapter_score(x.bfloat16(), norm, projection).dtype == torch.float32


@pytest.mark.parametrize("shift", [0, 1])
def test_without_eviction_the_model_is_the_dense_one_whatever_the_logits(shift):
    """Which is the teacher's pass."""
    model = small_model(1)
    ids = torch.randint(0, 67, (2, 50))
    dense = model(ids)
    dms.start_retrofit(model, DMSConfig(window=2, shift=shift, scale=1.0, offset=0.0))
    for block in model.model.layers:
        torch.nn.init.normal_(block.self_attn.dms_proj_alpha.weight)
    assert (model(ids) - dense).abs().max() > 0.1  # it does evict
    without = dms.document_attention([[50], [50]])
    torch.testing.assert_close(model.lm_head(model.hidden(ids, without)), dense)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("T", [37, 300])
def test_relaxed_attention_with_certain_decisions_is_the_hard_rule(shift, T):
    """With |z| large the noise does not matter, so training computes what inference will."""
    model = small_model(3)
    dms.start_retrofit(model, DMSConfig(window=5, shift=shift, scale=1e4, offset=0.0))
    for block in model.model.layers:
        torch.nn.init.normal_(block.self_attn.dms_proj_alpha.weight)
    ids = torch.randint(0, 67, (2, T))
    lengths = torch.tensor([T, T - 9])
    for seeds in ([3, 4], None):
        relaxed = relaxed_attention(model, [[T], [T - 9]], T, seeds)
        logits = model.lm_head(model.hidden(ids, relaxed))
        for row, n in enumerate((T, T - 9)):  # what lies behind is padding
            torch.testing.assert_close(logits[row, :n], model(ids)[row, :n], atol=1e-4, rtol=1e-4)

        cache = KVCache(model.config, 2)
        model(ids, cache=cache, lengths=lengths)
        stats = cache.stats()
        let_go = 1 - stats["pairs"] / stats["dense_pairs"]
        assert let_go > 0.1
        assert relaxed.pairs_let_go().item() / (T + T - 9) == pytest.approx(let_go, abs=1e-5)


def test_documents_in_a_row_do_not_see_each_other():
    """Packed end to end, with padding behind them, they get the states, and let go of the pairs,
    that they do by themselves."""
    model = small_model(3)
    dms.start_retrofit(model, DMSConfig(window=5, scale=1e4, offset=0.0))
    for block in model.model.layers:
        torch.nn.init.normal_(block.self_attn.dms_proj_alpha.weight)
    ids = torch.randint(0, 67, (2, 90))
    documents = [[30, 1, 40, 12], [7, 80]]
    packing = Packing.of(documents, 90, "cpu")
    relaxed = relaxed_attention(model, documents, 90, [1, 2])
    dense = dms.document_attention(documents)
    states = [model.hidden(ids, attend, -packing.first) for attend in (relaxed, dense)]
    let_go = 0
    for row, lengths in enumerate(documents):
        begin = 0
        for n in lengths:
            alone = ids[row : row + 1, begin : begin + n]
            by_itself = relaxed_attention(model, [[n]], n, [1])
            every = [model.hidden(alone, by_itself), model.hidden(alone, dms.document_attention([[n]]))]
            for packed, expected in zip(states, every):
                found = packed[row : row + 1, begin : begin + n]
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            let_go += by_itself.pairs_let_go().item()
            begin += n
    assert let_go > 10
    assert relaxed.pairs_let_go().item() == pytest.approx(let_go, abs=1e-3)
    expected = [[29, 30, 70, 82, *range(83, 90)], [6, *range(86, 90)]]
    for row, last in zip(packing.predicts(), expected):  # documents' last tokens, and padding
        assert (~row).nonzero().flatten().tolist() == last


def test_noise_follows_from_the_seed_of_a_row_and_the_layer_alone():
    settings = DMSConfig()
    logits = torch.zeros(3, 2, 50)

    def noise(seeds, layer):
        packing = Packing.of([[50]] * len(seeds), 50, "cpu")
        relaxed = RelaxedAttention(settings, packing, relaxed_attention_plain, seeds)
        return relaxed.noise(layer, logits[: len(seeds)])

    together = noise(["0 5 0", "0 5 1", "1 5 0"], 3)
    assert torch.equal(together[1:2], noise(["0 5 1"], 3))
    assert torch.equal(together[2:], noise(["1 5 0"], 3))
    # another layer, another step, another row, another seed
    every = [noise([seed], 3) for seed in ("0 5 0", "0 261 0", "0 5 1", "1 5 0", "256 5 0")]
    every.append(noise(["0 5 0"], 4))
    assert len({tuple(x.flatten().tolist()) for x in every}) == 6
    # as the CPU's own layout of the logits may be any
    mixed = torch.zeros(3, 50, 2).transpose(1, 2)
    packing = Packing.of([[50]], 50, "cpu")
    relaxed = RelaxedAttention(settings, packing, relaxed_attention_plain, ["0 5 0"])
    assert torch.equal(relaxed.noise(3, mixed[:1]), together[:1])
    settings.per = "layer"
    per_layer = noise(["0 5 0"], 3)
    assert torch.equal(per_layer[:, 0], per_layer[:, 1])
    settings.per = "head"
    # logistic: a variance of pi^2 / 3
    many = torch.cat([noise([f"{seed}"], 0).flatten() for seed in range(200)])
    assert many.mean().item() == pytest.approx(0, abs=0.06)
    assert many.var().item() == pytest.approx(math.pi**2 / 3, rel=0.05)


@pytest.mark.parametrize("T, block", [(21, 6), (1030, 300)])  # the second computes scores twice
def test_relaxed_attention_by_the_formula_and_its_gradients(T, block):
    tau = 0.5
    window = 3
    B, H, D = 2, 2, 8
    torch.manual_seed(0)
    q = torch.randn(B, 2 * H, T, D)
    k = torch.randn(B, H, T, D)
    v = torch.randn(B, H, T, D)
    z = torch.randn(B, H, T)
    inputs = [x.requires_grad_() for x in (q, k, v, z)]
    attend = functools.partial(relaxed_attention_plain, block=block)
    settings = DMSConfig(window=window, tau=tau)
    packing = Packing.of([[T], [T]], T, "cpu")
    relaxed = RelaxedAttention(settings, packing, attend, [7, 8])
    out = relaxed(0, q, k, v, z)

    # in float32 1 - p may be 0
    p = torch.sigmoid((z + relaxed.noise(0, z)).double() / tau)
    p = torch.cat((p[..., 1:], torch.zeros(B, H, 1)), -1)
    i = torch.arange(T)[:, None]
    j = torch.arange(T)
    mask = torch.where(i - j <= window, 0.0, torch.log1p(-p).float()[:, :, None])
    mask = mask.masked_fill(j > i, float("-inf"))
    mask, k, v = (x.repeat_interleave(2, dim=1) for x in (mask, k, v))
    expected = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(D) + mask, -1) @ v
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)

    probe = torch.randn_like(out)
    ours = torch.autograd.grad((out * probe).sum(), inputs)
    theirs = torch.autograd.grad((expected * probe).sum(), inputs)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_fresh_adapters_leave_the_model_as_it_was():
    model = small_model(1)
    ids = torch.randint(0, 67, (2, 50))
    before = model(ids)
    dms.start_retrofit(model, DMSConfig(window=0))
    torch.testing.assert_close(model(ids), before)
    relaxed = relaxed_attention(model, [[50], [50]], 50, [1, 2])
    model.hidden(ids, relaxed)
    # z = -5: the noise alone evicts a token in 150
    assert relaxed.pairs_let_go().item() < 0.03 * 100


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_retrofit_by_a_borrowed_neuron_begins_with_weights_that_decide_nothing(kind):
    """Only the rows of the borrowed channels, biases included, become zero: then s = 0."""
    model = small_model(1, model_type=kind)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    dms.start_retrofit(model, DMSConfig(window=0, source="neuron"))
    D = model.config.head_dim
    borrowed = torch.zeros(4 * D, dtype=torch.bool)
    borrowed[[D - 1, 3 * D - 1]] = True  # the last channels of query heads 0 and 2
    for name, parameter in model.named_parameters():
        if "q_proj" in name:
            assert (parameter[borrowed] == 0).all()
            assert torch.equal(parameter[~borrowed], before[name][~borrowed])
        else:
            assert torch.equal(parameter, before[name])
    cache = KVCache(model.config, 1)
    model(torch.randint(0, 67, (1, 50)), cache=cache)
    assert cache.stats()["compression_ratio"] == 1


def test_a_borrowed_neuron_is_faded_out_from_all_to_nothing():
    """At first the student is the teacher, at last what the cleared weights give; between, it moves
    from the one to the other, and lets go of nothing."""
    model = small_model(1)
    ids = torch.randint(0, 67, (1, 50))
    whole = model(ids)
    settings = DMSConfig(window=0, source="neuron", borrowed_weight=1.0)
    dms.start_retrofit(model, settings)

    def faded(left):
        settings.borrowed_weight = left
        relaxed = relaxed_attention(model, [[50]], 50, [1])
        logits = model.lm_head(model.hidden(ids, relaxed))
        assert relaxed.pairs_let_go().item() == 0
        return logits

    torch.testing.assert_close(faded(1.0), whole)
    distances = [(faded(left) - whole).norm().item() for left in (0.9, 0.5, 0.1, 1e-6)]
    assert distances == sorted(distances)
    assert distances[0] > 0
    almost = faded(1e-9)
    settings.borrowed_weight = 0.0
    dms.clear_borrowed(model)
    torch.testing.assert_close(almost, model(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("slice_size", [4, 1024])
@pytest.mark.parametrize("reverse", [False, True])
def test_distillation_loss_is_the_kl_summed_over_the_tokens_kept(reverse, slice_size):
    torch.manual_seed(0)
    student = torch.randn(2, 9, 5)
    teacher = torch.randn(2, 9, 5)
    student_head = torch.randn(11, 5)
    teacher_head = torch.randn(11, 5)
    keep = torch.arange(9) < torch.tensor([[9], [4]])
    log_q = F.log_softmax(student @ student_head.T, -1)
    log_p = F.log_softmax(teacher @ teacher_head.T, -1)
    if reverse:
        log_p, log_q = log_q, log_p
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)[keep].sum()
    heads = (student_head, teacher_head)
    loss = dms.distillation_loss(student, teacher, *heads, keep, reverse, slice_size=slice_size)
    torch.testing.assert_close(loss, expected)


def test_compression_loss_is_one_sided():
    assert dms.compression_loss(torch.tensor(0.5), 8).item() == pytest.approx(0.375)
    assert dms.compression_loss(torch.tensor(0.9), 8).item() == 0


def test_compression_is_asked_for_step_by_step():
    assert [dms.scheduled_cr(step, 1000, 8) for step in (0, 100, 700, 999)] == [1, 2, 8, 8]
