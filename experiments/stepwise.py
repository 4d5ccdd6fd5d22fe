"""
Free-running answers by an attention of one's own, where the engine's cache is not what is measured.

A cache here is any callable that Model.hidden can `attend` by. It stores T new tokens of every
sequence and attends to them: first the beginning of all prompts at once, then token by token.
Before every step it is told, by two (B,) bool attributes, which sequences are `active`, not over
yet, and which are `answering`, past their prompts. All sequences begin at position 0.
"""

import torch

from shared import prompt_ids


def encode(tokenizer, problems, room):
    """The prompts of problems with room for answers: ids (B, T), lengths (B,)."""
    prompts = [prompt_ids(tokenizer, problem) for problem in problems]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.zeros(len(prompts), int(lengths.max()) + room, dtype=torch.int64)
    for row, prompt in zip(ids, prompts):
        row[: len(prompt)] = torch.tensor(prompt)
    return ids, lengths


@torch.inference_mode()
def answer(model, tokenizer, problems, cache, max_new_tokens=256):
    """Greedy answers to problems, side by side, as texts. Their last tokens are not appended."""
    ids, lengths = encode(tokenizer, problems, max_new_tokens)
    ends = lengths.clone()  # of each text, so far
    cache.active = torch.ones(len(ids), dtype=torch.bool)
    cache.answering = torch.zeros_like(cache.active)
    together = int(lengths.min()) - 1  # every prompt has so many tokens, and one more
    model.hidden(ids[:, :together], cache)
    for t in range(together, ids.shape[1] - 1):
        cache.answering = cache.active & (t >= lengths)
        states = model.hidden(ids[:, t : t + 1], cache, t)  # (B, 1, C)
        token = model.lm_head(states[:, -1]).argmax(-1)
        is_new = cache.active & (t + 1 >= lengths)
        ids[is_new, t + 1] = token[is_new]
        ends[is_new] += 1
        is_last = (token == tokenizer.end_id) | (ends - lengths >= max_new_tokens)
        cache.active = cache.active & ~(is_new & is_last)
        if not cache.active.any():
            break
    return [tokenizer.decode(row[begin:end].tolist(), skip_special_tokens=True)
            for row, begin, end in zip(ids, lengths, ends)]


def answer_in_batches(model, tokenizer, problems, make_cache, batch):
    """Texts, and the caches of the batches; make_cache(B) makes one."""
    texts = []
    caches = []
    for begin in range(0, len(problems), batch):
        part = problems[begin : begin + batch]
        caches.append(make_cache(len(part)))
        texts += answer(model, tokenizer, part, caches[-1])
    return texts, caches
