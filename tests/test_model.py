"""The decoder computes what transformers computes: the same logits, and the same greedy tokens."""

import pytest
import torch
from oracle import DEFAULT, FAMILIES, LENGTH, LLAMA3, oracle, saved, scaled, tokens

import checkpoint
import model
from checkpoint import load_model
from dms import masked_attention
from generate import Sequence, generate
from kv_cache import KVCache

SCALED = [name for name, (_, changes) in FAMILIES.items() if "rope_parameters" in changes]


def same(logits, expected):
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_transformers_at_once_cached_and_token_by_token(family, tmp_path):
    kind, changes = FAMILIES[family]
    theirs, folder = saved(tmp_path, kind, **changes)
    ours = load_model(folder)
    ids = tokens()
    expected = theirs(ids).logits
    assert expected.std() > 0.3  # the comparison is of something
    same(ours(ids), expected)
    same(ours(ids, cache=KVCache(ours.config, 1, memory=1e6)), expected)
    cache = KVCache(ours.config, 1, page_size=8, memory=1e6)
    steps = [ours(ids[:, t : t + 1], cache=cache) for t in range(LENGTH)]
    same(torch.cat(steps, dim=1), expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_greedy_tokens_equal_transformers(family, tmp_path):
    kind, changes = FAMILIES[family]
    theirs, folder = saved(tmp_path, kind, **changes)
    prompts = tokens(40, seed=2, batch=2)
    out = theirs(prompts, use_cache=True)
    greedy = []
    for _ in range(12):
        greedy.append(out.logits[:, -1].argmax(-1))
        newest = greedy[-1][:, None]
        out = theirs(newest, past_key_values=out.past_key_values, use_cache=True)

    ours = load_model(folder)
    sequences = [Sequence(prompt, 12) for prompt in prompts.tolist()]
    for _ in generate(ours, KVCache(ours.config, 2), sequences):
        pass
    assert [s.new for s in sequences] == torch.stack(greedy, dim=1).tolist()


@pytest.mark.parametrize("family", SCALED)
@torch.no_grad()
def test_rope_scaling_is_felt_at_the_tested_length(family):
    """Without the scaling the logits differ, by far more than the tolerance above."""
    kind, changes = FAMILIES[family]
    theirs = oracle(kind, **changes)
    unscaled = {key: value for key, value in changes.items() if key != "rope_parameters"}
    plain = oracle(kind, **unscaled)
    plain.load_state_dict(theirs.state_dict())
    assert (theirs(tokens()).logits - plain(tokens()).logits).abs().max() > 0.05


def test_every_variant_of_yarn_gives_its_own_logits():
    """So that no test above passes for want of a difference."""
    logits = {}
    for name, (kind, changes) in FAMILIES.items():
        if name.startswith("qwen3 yarn") and name != "qwen3 yarn mscale alone":
            logits[name] = oracle(kind, **changes)(tokens()).logits
    for one in logits:
        for other in logits:
            if one != other:
                assert (logits[one] - logits[other]).abs().max() > 0.01, (one, other)


@pytest.mark.parametrize("kind, changes", [
    ("llama", {}),
    ("llama", scaled(LLAMA3, rope_theta=5e5, factor=32.0, original_max_position_embeddings=8192)),
    ("qwen3", scaled(DEFAULT)),
    ("qwen3", scaled(dict(rope_type="yarn", rope_theta=1e6, factor=4.0,
                          original_max_position_embeddings=32768))),
])
@torch.no_grad()
def test_published_frequencies_hold_at_far_positions(kind, changes, tmp_path):
    """Of the sizes in use: float32 rounds off a hundredth of a turn by 100,000 tokens."""
    sizes = dict(num_hidden_layers=1, head_dim=128, max_position_embeddings=131072)
    theirs, folder = saved(tmp_path, kind, **sizes, **changes)
    ours = load_model(folder)
    rotary = theirs.model.rotary_emb
    assert ours.rope_scale == rotary.attention_scaling
    difference = ours.rope_freq.double() - rotary.inv_freq.double()
    assert (difference * 131072).abs().max() < 1e-4

    far = 100_000
    ids = tokens()
    states = ours.hidden(ids, masked_attention(ours.config), torch.tensor([[far]]))
    positions = torch.arange(far, far + LENGTH)
    same(ours.lm_head(states), theirs(ids, position_ids=positions[None]).logits)


@torch.no_grad()
def test_ragged_batches_and_chunks_equal_transformers_row_by_row(tmp_path):
    theirs, folder = saved(tmp_path, "llama", **scaled(LLAMA3))
    ours = load_model(folder)
    ids = tokens(batch=3)
    lengths = [120, 1, 77]
    cache = KVCache(ours.config, 3, chunk=16)
    logits = ours(ids, cache=cache, lengths=torch.tensor(lengths))
    for row, n in enumerate(lengths):
        same(logits[row, :n], theirs(ids[row : row + 1, :n]).logits[0])


@torch.no_grad()
def test_last_only_gives_the_logits_of_each_rows_last_token(tmp_path):
    theirs, folder = saved(tmp_path)
    ours = load_model(folder)
    ids = tokens(batch=3)
    lengths = [120, 1, 77]
    cache = KVCache(ours.config, 3, chunk=16)
    logits = ours(ids, cache=cache, lengths=torch.tensor(lengths), last_only=True)
    assert logits.shape == (3, 1, 64)
    for row, n in enumerate(lengths):
        expected = theirs(ids[row : row + 1, :n]).logits[0, -1:]
        same(logits[row], expected)
        same(ours(ids[row : row + 1, :n], last_only=True)[0], expected)


def test_loading_can_be_imported_from_here():
    assert model.load_model is checkpoint.load_model
    assert model.load_tokenizer is checkpoint.load_tokenizer
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        model.nothing_of_this_name  # noqa: B018
