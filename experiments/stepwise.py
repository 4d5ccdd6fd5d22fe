"""
Free-running answers by an attention of one's own, where the engine's cache is not what is measured.

A cache here is any callable that Model.hidden can `attend` by: it stores T new tokens of every
sequence and attends to them, the beginning of all prompts at once and then token by token. It finds
in `active` which sequences are not over yet, and in `answering` which of them read their prompt no
more: (B,) bool each, set before every step. All sequences begin at position 0.
"""

import torch

from shared import prompt_ids


def encode(tokenizer, some, room):
    """The prompts of some problems with room for answers: ids (B, T), lengths (B,)."""
    prompts = [prompt_ids(tokenizer, problem) for problem in some]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.zeros(len(prompts), int(lengths.max()) + room, dtype=torch.int64)
    for row, prompt in zip(ids, prompts):
        row[: len(prompt)] = torch.tensor(prompt)
    return ids, lengths


@torch.inference_mode()
def answer(model, tokenizer, some, cache, max_new_tokens=256):
    """Greedy answers to some problems, side by side. The last token drawn is not fed. Returns
    texts."""
    ids, lengths = encode(tokenizer, some, max_new_tokens)
    ends = lengths.clone()  # of each text, so far
    cache.active = torch.ones(len(ids), dtype=torch.bool)
    cache.answering = torch.zeros_like(cache.active)
    shared = int(lengths.min()) - 1  # so many tokens all prompts have, and one more
    model.hidden(ids[:, :shared], cache)
    for t in range(shared, ids.shape[1] - 1):
        cache.answering = cache.active & (t >= lengths)
        states = model.hidden(ids[:, t : t + 1], cache, t)  # (B, 1, C)
        drawn = model.lm_head(states[:, -1]).argmax(-1)
        draws = cache.active & (t + 1 >= lengths)
        ids[draws, t + 1] = drawn[draws]
        ends[draws] += 1
        is_end = drawn == tokenizer.end_id
        is_long = ends - lengths >= max_new_tokens
        cache.active = cache.active & ~(draws & (is_end | is_long))
        if not cache.active.any():
            break
    texts = []
    for row, begin, end in zip(ids, lengths, ends):
        new = row[begin:end].tolist()
        texts.append(tokenizer.decode(new, skip_special_tokens=True))
    return texts


def answer_in_batches(model, tokenizer, some, make_cache, batch):
    """Texts, and the caches of the batches; make_cache(B) makes one."""
    texts = []
    caches = []
    for begin in range(0, len(some), batch):
        part = some[begin : begin + batch]
        caches.append(make_cache(len(part)))
        texts += answer(model, tokenizer, part, caches[-1])
    return texts, caches
