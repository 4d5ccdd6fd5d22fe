"""How the real model's folder and its text are made."""

import importlib.util
import itertools
import sys

import pytest
import torch
from conftest import REPOSITORY, small_model

sys.path.insert(0, str(REPOSITORY / "experiments"))

import real_model  # noqa: E402
import real_quality  # noqa: E402
import text  # noqa: E402

import dms  # noqa: E402
from model import apply_rope  # noqa: E402


def test_rows_of_q_in_our_order_turn_as_llama_cpp_turns_its_own():
    """There channels 2i and 2i + 1 are one pair, here i and i + D/2: scores are the same."""
    D = 8
    torch.manual_seed(0)
    q = torch.randn(2 * D, 5)  # 2 heads
    angle = torch.rand(D // 2)
    x = torch.randn(5)
    theirs = torch.view_as_complex((q @ x).view(2, D // 2, 2)) * torch.polar(
        torch.ones(D // 2), angle
    )
    ours = (real_model.in_our_order(q, 2) @ x).view(1, 1, 2, D)
    twice = torch.cat((angle, angle)).view(1, 1, 1, D)
    ours = apply_rope(ours, twice.cos(), twice.sin())[0, 0]
    torch.testing.assert_close(ours[:, : D // 2], theirs.real)
    torch.testing.assert_close(ours[:, D // 2 :], theirs.imag)


@pytest.mark.parametrize(
    "name, ours",
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.12.ffn_norm.weight", "model.layers.12.post_attention_layernorm.weight"),
        ("blk.3.attn_q.weight", "model.layers.3.self_attn.q_proj.weight"),
    ],
)
def test_tensors_have_the_names_of_a_checkpoint(name, ours):
    assert real_model.our_name(name) == ours


def test_documents_are_paragraphs_to_the_length_asked_for():
    paragraphs = [f"{i} " + "x" * 2500 for i in range(8)]
    documents = list(text.documents_of("\n\n".join(paragraphs)))
    assert len(documents) == 2  # of three paragraphs each; the rest is too short
    assert all(len(document) >= text.CHARACTERS for document in documents)
    assert "".join(documents).split() == " ".join(paragraphs[:6]).split()


@pytest.mark.parametrize("window", [None, 4])
def test_the_continuation_is_measured_as_the_dense_masked_model_has_it(window, monkeypatch):
    monkeypatch.setattr(real_quality, "PROMPT", 9)
    model = small_model(1, dms.DMSConfig(window=window) if window else None, 0.1)
    ids = torch.randint(0, 67, (1, 15))
    logits, after_prompt, at_end = real_quality.by_engine(model)(ids)
    torch.testing.assert_close(logits, model(ids)[0, 9:], rtol=1e-4, atol=1e-4)
    if window is None:
        assert (after_prompt, at_end) == (9, 15)
    reference = model(ids)[0, 9:]
    row = real_quality.measure(lambda ids: (logits, 1, 2), [ids], [reference])
    assert abs(row["kl"]) < 1e-6 and row["pairs_at_end"] == 2


@pytest.mark.skipif(not importlib.util.find_spec("kvpress"), reason="needs the experiments extra")
def test_a_press_that_removes_nothing_is_the_dense_model(tmp_path, monkeypatch):
    from kvpress import KeyDiffPress
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(real_quality, "PROMPT", 40)
    folder = REPOSITORY / "toy" / "teacher"
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([list(itertools.islice(itertools.cycle(range(5, 90)), 60))])
    with torch.inference_mode():
        dense = real_quality.by_engine(real_quality.load(folder)[0])(ids)
        press = real_quality.by_press(theirs, KeyDiffPress(0.0))(ids)
        half = real_quality.by_press(theirs, KeyDiffPress(0.5))(ids)
    torch.testing.assert_close(press[0], dense[0], rtol=1e-3, atol=1e-3)
    assert press[1:] == dense[1:] == (40, 60)
    assert half[1:] == (20, 40)
