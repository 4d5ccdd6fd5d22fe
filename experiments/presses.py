"""
Training-free cache compression as people would use it: kvpress's presses on the toy teacher.

    pip install -e ".[experiments]"
    python experiments/presses.py        # settings tried on problems of their own: 10 minutes

kvpress (github.com/NVIDIA/kvpress) hooks into a model of transformers. While a prompt is read every
layer attends to all of it; then the press scores its pairs, and the best of each head stay. What
comes afterwards is appended: the answer is not compressed, unless a second press, a DecodingPress,
goes back to its budget after every INTERVAL tokens ("bounded").

    StreamingLLM         keeps the first tokens and the last
    TOVA                 what the last token attends to
    ObservedAttention    what has had most attention, by the mean over queries (H2O)
    SnapKV               what the last few tokens attend to
    ExpectedAttention    what queries distributed like the prompt's would attend to
    Knorm                short keys
    KeyDiff              keys unlike the mean key
    KVzip                what the prompt, read once more, attends to in its first reading

As in kvpress's own pipeline, what the chat template puts after the question is read after the
compression. (Compressed with the rest, half of KeyDiff's needles are lost.) The command tries the
settings that a press has, as their defaults are made for prompts of thousands of tokens; the best
of them stand in SETTINGS. Answers and counts are made here; accuracy.py puts them beside others.
"""

import logging
from collections import defaultdict
from contextlib import nullcontext
from functools import cache as remember

import shared
import torch
from shared import tasks

import kvpress
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils.logging import disable_progress_bar

INTERVAL = 8  # steps between two compressions, where the answer is compressed, too
MORE_TOKENS = 8  # that an answer may have than the longest reference answer
PRESSES = {
    "StreamingLLM": kvpress.StreamingLLMPress,
    "TOVA": kvpress.TOVAPress,
    "ObservedAttention": kvpress.ObservedAttentionPress,
    "SnapKV": kvpress.SnapKVPress,
    "ExpectedAttention": kvpress.ExpectedAttentionPress,
    "Knorm": kvpress.KnormPress,
    "KeyDiff": kvpress.KeyDiffPress,
    "KVzip": kvpress.KVzipPress,
}
# Not the others: SnapKV wants more new tokens than its window has, KVzip reads a whole prompt
# again, the mean of ObservedAttention would be the last token's attention alone, and StreamingLLM
# counts on the order of the pairs, which no press keeps.
BOUNDED = ["TOVA", "ExpectedAttention", "Knorm", "KeyDiff"]
TRIED = {
    "StreamingLLM": [{"n_sink": 4}, {"n_sink": 16}],
    "SnapKV": [{"window_size": size} for size in (4, 8, 16, 32, 64)],
    "ExpectedAttention": [
        {"n_future_positions": 512, "epsilon": 0.0},
        {"n_future_positions": 512, "epsilon": 0.01},
        {"n_future_positions": 64, "epsilon": 0.0},
        {"n_future_positions": 64, "epsilon": 0.01},
        {"n_future_positions": 64, "epsilon": 0.1},
        {"n_future_positions": 64, "epsilon": 1.0},
    ],
    "KVzip": [{"layerwise": False}, {"layerwise": True}],
}
SETTINGS = {
    "StreamingLLM": {"n_sink": 16},
    "SnapKV": {"window_size": 8},
    "ExpectedAttention": {"n_future_positions": 64, "epsilon": 1.0},
}


@remember
def load(attention):
    """The toy teacher, by transformers. attention: "sdpa", or "eager", which gives weights."""
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    disable_progress_bar()
    how = {"dtype": torch.float32, "attn_implementation": attention}
    return AutoModelForCausalLM.from_pretrained(str(shared.TEACHER), **how)


def compress_to(pairs, tokens, name, settings):
    """A press that keeps `pairs` of each head's `tokens`, or all where there are no more."""
    ratio = max(1 - (pairs + 0.5) / tokens, 0.0)  # kvpress rounds what it keeps down
    return PRESSES[name](compression_ratio=ratio, **settings)


def read(model, press, ids):
    """The compressed cache of prompts. ids (B, T)"""
    cache = DynamicCache()
    with press(model):
        model.model(input_ids=ids, past_key_values=cache)
    return cache


def read_one_by_one(model, press, ids):
    """The same for KVzip, which takes one prompt at a time and does not drop pairs but tells each
    layer which to mask. ids (B, T)"""
    attentions = [layer.self_attn for layer in model.model.layers]
    caches = []
    masked = []  # [prompt][layer]: indices (row of the batch, head, pair)
    for row in ids:
        caches.append(read(model, press, row[None]))
        masked.append([attention.masked_key_indices for attention in attentions])
    joined = caches[0]
    for number, layer in enumerate(joined.layers):
        layer.keys = torch.cat([cache.layers[number].keys for cache in caches])
        layer.values = torch.cat([cache.layers[number].values for cache in caches])
        indices = [of[number] for of in masked]
        if indices[0] is None:  # nothing was to be dropped
            continue
        rows = [torch.full_like(heads, b) for b, (_, heads, _) in enumerate(indices)]
        _, heads, pairs = zip(*indices)
        attentions[number].masked_key_indices = tuple(map(torch.cat, (rows, heads, pairs)))
    return joined


def pairs_in(cache):
    """Pairs that are stored for each sequence, by the shapes of the cache's tensors."""
    return sum(layer.keys.shape[1] * layer.keys.shape[2] for layer in cache.layers)


def masked_in(model, cache):
    """Pairs among these that no query may see (KVzip)."""
    indices = [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers]
    return sum(len(of[0]) for of in indices if of is not None) // len(cache.layers[0].keys)


def continue_greedily(model, cache, header, seen, limit, end_id):
    """Greedy continuations. header (B, H): the rest of the prompts, after the `seen` tokens in the
    cache. Returns (token ids (B, steps), the pairs stored at each step, [steps])."""
    heads = len(cache.layers) * cache.layers[0].keys.shape[1]
    ids = header
    position = torch.arange(seen, seen + header.shape[1])[None]
    over = torch.zeros(len(header), dtype=torch.bool)
    new = []
    stored = []
    while len(new) < limit and not over.all():
        stored.append(pairs_in(cache) + heads * ids.shape[1])  # before any is dropped again
        logits = model(
            input_ids=ids, past_key_values=cache, position_ids=position, logits_to_keep=1).logits
        ids = logits[:, -1].argmax(-1, keepdim=True)
        position = position[:, -1:] + 1
        over |= ids[:, 0] == end_id
        new.append(ids)
    return torch.cat(new, dim=1), stored


@torch.inference_mode()
def answer_batch(name, prompts, budget, bounded, limit, end_id, settings):
    """Answers to prompts of one length: a list of (token ids, pairs seen at the end of the prompt,
    the most seen, the most stored) with pairs as the mean over heads. See `answer`."""
    model = load("eager" if name == "ObservedAttention" else "sdpa")
    ids = torch.tensor(prompts)
    # up to the template's end of the question
    seen = len(prompts[0]) - prompts[0][::-1].index(end_id) - 1
    header = ids[:, seen:]
    press = compress_to(budget - header.shape[1], seen, name, settings)
    reader = read_one_by_one if name == "KVzip" else read
    cache = reader(model, press, ids[:, :seen])
    compressing = nullcontext()
    if bounded:
        base = PRESSES[name](**settings)
        compressing = kvpress.DecodingPress(base, INTERVAL, budget)(model)
    with compressing:
        new, stored = continue_greedily(model, cache, header, seen, limit, end_id)
    heads = len(cache.layers) * cache.layers[0].keys.shape[1]
    masked = masked_in(model, cache) / heads
    stored = [pairs / heads for pairs in stored]
    answers = []
    for row in new.tolist():
        steps = row.index(end_id) + 1 if end_id in row else len(row)
        most = max(stored[:steps])
        answers.append((row[:steps], stored[0] - masked, most - masked, most))
    return answers


def answer_limit(tokenizer, problems):
    """How many tokens an answer to any of these problems may have."""
    return max(len(tokenizer.encode(problem.answer)) for problem in problems) + MORE_TOKENS


def answer(name, tokenizer, problems, budget, bounded, limit, settings=None):
    """Free-running greedy answers to problems: (texts, {what is counted: the mean over problems}).

    budget: the pairs of each head at the end of the prompt, its last words included; bounded: and
    again after every INTERVAL steps. limit: the most tokens of an answer.
    """
    settings = SETTINGS.get(name, {}) if settings is None else settings
    lengths = defaultdict(list)  # kvpress does not know padding: prompts of one length at a time
    for number, problem in enumerate(problems):
        ids = shared.prompt_ids(tokenizer, problem)
        lengths[len(ids)].append((number, ids))
    answers = {}
    for group in lengths.values():
        numbers, prompts = zip(*group)
        batch = answer_batch(name, prompts, budget, bounded, limit, tokenizer.end_id, settings)
        answers.update(zip(numbers, batch))
    ids, *counts = zip(*(answers[number] for number in range(len(problems))))
    texts = [tokenizer.decode(of, skip_special_tokens=True) for of in ids]
    prompt, most, stored = (sum(of) / len(problems) for of in counts)
    return texts, {"prompt_pairs": prompt, "peak_pairs": most, "stored_pairs": stored}


def main():
    p = shared.arguments(__doc__, "presses.json")
    p.add_argument("--problems", type=int, default=60, help="of each task")
    p.add_argument("--pairs", type=int, default=56, help="of a head after the prompt: 8x of 450")
    args = p.parse_args()
    results = shared.Results(args)
    tokenizer = shared.load_tokenizer(shared.TEACHER)
    for name, tried in TRIED.items():
        for settings in tried:
            if results.has(method=name, settings=settings):
                continue
            row = {"method": name, "settings": settings}
            for task in tasks.TASKS:
                problems = shared.make_problems(task, args.problems, "settings")
                limit = answer_limit(tokenizer, problems)
                texts, _ = answer(name, tokenizer, problems, args.pairs, False, limit, settings)
                row[task] = shared.accuracy(problems, texts)
            results.add(**row)


if __name__ == "__main__":
    main()
