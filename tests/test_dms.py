"""The method: the rule, the decision, the relaxed mask, the losses, and an independent reading of a checkpoint."""
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import plain_forward, small_config, small_model

import dms
from dms import DMSConfig, InputError, RelaxedAttention
from kv_cache import KVCache
from model import Model, load_model, load_tokenizer, save_model

TOY = Path(__file__).resolve().parent.parent / "toy"


@pytest.mark.parametrize("name", ["teacher", "retrofitted"])
def test_shipped_models_equal_an_independent_computation(name):
    import random

    from toy import tasks
    tokenizer, model = load_tokenizer(TOY / name), load_model(TOY / name)
    problem = tasks.make_problem("needles", random.Random(5), "test", 220)
    ids = tokenizer.encode(tokenizer.apply_chat_template(tasks.messages(problem)), add_special_tokens=False)
    c = json.loads((TOY / name / "config.json").read_text())
    settings = {key: c["dms_" + spelled] for key, spelled in (
        ("window", "window_size"), ("scale", "alpha_scale"), ("offset", "initial_alpha_offset"), ("shift", "shift"),
        ("per", "alpha_per"), ("separate", "separate_alpha"))} if name == "retrofitted" else None
    expected, evict = plain_forward(TOY / name, ids, settings)
    torch.testing.assert_close(model(torch.tensor([ids]))[0], expected, atol=1e-4, rtol=1e-4)
    cache = KVCache(model.config, 1)
    torch.testing.assert_close(model(torch.tensor([ids]), cache=cache)[0], expected, atol=1e-4, rtol=1e-4)
    window = model.config.dms.window if model.config.dms else 0
    held = (~evict | (torch.arange(len(ids)) >= len(ids) - 1 - window)).sum(-1)
    assert cache.stats()["pairs_per_head"] == held.tolist()
    assert (name == "teacher") == (not evict.any())


def test_rule_on_a_small_case():
    evict = torch.tensor([True, False, True, True, False])
    t = torch.arange(5)
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 0, 1, 1]]
    assert dms.visible(t[:, None], t, evict, 1).int().tolist() == expected
    assert dms.decisions(torch.tensor([[[9.0, -1, 1, -1, 1]]]), 1)[0, 0].tolist() == [False, True, False, True, False]
    assert dms.decisions(torch.tensor([[[9.0, -1, 1, -1, 1]]]), 0)[0, 0].tolist() == [True, False, True, False, True]


def test_decision_logits():
    s = torch.tensor([[0.02, 0.08]])
    torch.testing.assert_close(DMSConfig().logits(s), torch.tensor([[-3.0, 3.0]]))
    torch.testing.assert_close(DMSConfig(per="layer").logits(s), torch.tensor([[-3.0, -3.0]]))


def test_borrowed_neuron_is_the_last_channel_of_each_groups_first_query():
    q = torch.arange(2 * 3 * 4 * 6).float().view(2, 3, 4, 6)  # B 2, T 3, Hq 4, D 6
    s, rest = dms.borrow_neuron(q, 2)
    assert torch.equal(s, torch.stack((q[:, :, 0, 5], q[:, :, 2, 5]), -1))
    assert (rest[:, :, [0, 2], 5] == 0).all() and torch.equal(rest[..., :5], q[..., :5])
    assert torch.equal(rest[:, :, [1, 3]], q[:, :, [1, 3]])


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("T", [37, 300])
def test_relaxed_attention_with_certain_decisions_is_the_hard_rule(shift, T):
    """With |z| large the noise does not matter, so training computes what inference will."""
    config = DMSConfig(window=5, shift=shift, scale=1e4, offset=0.0)
    model = small_model(3, None)
    dms.start_retrofit(model, config)
    for block in model.model.layers:
        torch.nn.init.normal_(block.self_attn.dms_proj_alpha.weight)
    ids = torch.randint(0, 67, (2, T))
    lengths = torch.tensor([T, T - 9])
    relaxed = RelaxedAttention(model.config, lengths)
    states = model.hidden(ids, relaxed)
    torch.testing.assert_close(model.lm_head(states), model(ids), atol=1e-4, rtol=1e-4)
    cache = KVCache(model.config, 2)
    model(ids, cache=cache, lengths=lengths)
    stats = cache.stats()
    assert relaxed.gone().item() == pytest.approx(1 - stats["pairs"] / stats["dense_pairs"], abs=1e-5)


def test_relaxed_attention_by_the_formula_and_its_gradients():
    config = small_config(dms=DMSConfig(window=3, tau=0.5))
    B, H, T, D = 2, 2, 21, 8
    torch.manual_seed(0)
    q, k, v = torch.randn(B, 4, T, D), torch.randn(B, H, T, D), torch.randn(B, H, T, D)
    z = torch.randn(B, H, T, requires_grad=True)
    torch.manual_seed(7)
    out = RelaxedAttention(config, torch.tensor([T, T]), block=6)(0, q, k, v, z)
    torch.manual_seed(7)
    u = torch.rand_like(z).clamp(1e-6, 1 - 1e-6)
    p = torch.sigmoid((z + torch.log(u / (1 - u))) / 0.5)
    p = torch.cat((p[..., 1:], torch.zeros(B, H, 1)), -1)
    i, j = torch.arange(T)[:, None], torch.arange(T)
    mask = torch.where(i - j <= 3, 0.0, torch.log1p(-p)[:, :, None, :]).masked_fill(j > i, float("-inf"))
    mask, k2, v2 = (x.repeat_interleave(2, dim=1) for x in (mask, k, v))
    expected = torch.softmax(q @ k2.transpose(2, 3) / math.sqrt(D) + mask, -1) @ v2
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    probe = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad((o * probe).sum(), z)[0] for o in (out, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_fresh_adapters_leave_the_model_as_it_was():
    model = small_model(1, None)
    ids = torch.randint(0, 67, (2, 50))
    before = model(ids)
    dms.start_retrofit(model, DMSConfig(window=0))
    torch.testing.assert_close(model(ids), before)
    relaxed = RelaxedAttention(model.config, torch.tensor([50, 50]))
    model.hidden(ids, relaxed)
    assert relaxed.gone().item() < 0.03  # z = -5: the noise alone evicts a token in 150


def test_losses_and_schedule():
    torch.manual_seed(0)
    s, t, ws, wt = torch.randn(2, 9, 5), torch.randn(2, 9, 5), torch.randn(11, 5), torch.randn(11, 5)
    keep = torch.arange(9) < torch.tensor([[9], [4]])
    ls, lt = F.log_softmax(s @ ws.T, -1), F.log_softmax(t @ wt.T, -1)
    forward = (lt.exp() * (lt - ls)).sum(-1)[keep].mean()
    reverse = (ls.exp() * (ls - lt)).sum(-1)[keep].mean()
    torch.testing.assert_close(dms.distillation_loss(s, t, ws, wt, keep, piece=4), forward)
    torch.testing.assert_close(dms.distillation_loss(s, t, ws, wt, keep, reverse=True, piece=4), reverse)
    assert dms.compression_loss(torch.tensor(0.5), 8).item() == pytest.approx(0.375)
    assert dms.compression_loss(torch.tensor(0.9), 8).item() == 0
    assert [dms.scheduled_cr(s, 1000, 8) for s in (0, 100, 700, 999)] == [1, 2, 8, 8]


def test_impossible_targets_are_refused():
    dms.check_target(8, 16, 512)
    with pytest.raises(InputError, match="window alone holds 513"):
        dms.check_target(8, 512, 4096)
    with pytest.raises(InputError, match="not a compression"):
        dms.check_target(0.5, 16, 512)


@pytest.mark.parametrize("settings", [DMSConfig(window=7, shift=0, per="layer"), DMSConfig(source="neuron", window=3)])
def test_merged_checkpoint_round_trip(tmp_path, settings):
    model = small_model(2, settings, 0.5)
    save_model(model, tmp_path, torch.float32)
    again = load_model(tmp_path)
    assert again.config.dms == settings
    ids = torch.randint(0, 67, (1, 40))
    assert torch.equal(again(ids), model(ids))
    assert json.loads((tmp_path / "config.json").read_text())["dms_separate_alpha"] == (settings.source == "adapter")


def test_adapter_checkpoint_names_its_base_and_refuses_another(tmp_path):
    base = Model(small_config()).requires_grad_(False)
    save_model(base, tmp_path / "base", torch.float32)
    student = dms.start_retrofit(load_model(tmp_path / "base"), DMSConfig(window=4))
    for block in student.model.layers:
        torch.nn.init.normal_(block.self_attn.dms_proj_alpha.weight)
    save_model(student, tmp_path / "adapters", torch.float32, base=tmp_path / "base")
    ids = torch.randint(0, 67, (1, 40))
    again = load_model(tmp_path / "adapters")
    assert torch.equal(again(ids), student(ids))
    assert sum(f.stat().st_size for f in (tmp_path / "adapters").iterdir()) < 4000
    overlaid = load_model(tmp_path / "base", adapter=tmp_path / "adapters")
    assert torch.equal(overlaid(ids), student(ids))
    base.model.layers[1].mlp.up_proj.weight[-1, 0] += 1
    save_model(base, tmp_path / "base", torch.float32)
    with pytest.raises(InputError, match="fingerprint"):
        load_model(tmp_path / "adapters")
