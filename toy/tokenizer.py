"""The toy tokenizer: a byte-level BPE of at most 1,024 entries, saved as ordinary Hugging Face files.

Every word of the toy world is one token (with the space before it), every digit is a token of its own.
"""
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from common import write_atomic, write_json
from toy.tasks import ADJECTIVES, LETTERS, NAMES, NOUNS, TASKS, TIMES, VERBS, make_problem

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "model_max_length": 1024,
    "add_bos_token": False,
    "clean_up_tokenization_spaces": False,
    "chat_template": CHAT_TEMPLATE,
}


def make_tokenizer(seed=0, problems=1000):
    """Train the tokenizer on problems of all tasks, the chat's role names and the word lists."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(seed)
    texts = [f"{p.prompt} {p.answer}" for _ in range(problems) for p in [make_problem(rng.choice(TASKS), rng)]]
    words = " ".join([*NAMES, *LETTERS, *ADJECTIVES, *NOUNS, *VERBS, *TIMES, *"0123456789", "system user assistant"])
    chats = ["system\n", "user\n", "assistant\n", "The code", "Give", "Trace", "Work", *LETTERS, *NAMES]
    trainer = trainers.BpeTrainer(
        vocab_size=1024, min_frequency=2, special_tokens=SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts + [" " + words] * 10 + chats * 10, trainer)
    return tokenizer


def save_tokenizer(tokenizer, folder):
    """Write tokenizer.json and tokenizer_config.json."""
    folder = Path(folder)
    write_atomic(folder / "tokenizer.json", lambda scratch: tokenizer.save(str(scratch)))
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)


def chat_ids(tokenizer, problem):
    """(prompt ids up to and with "<|im_start|>assistant\\n", answer ids with the closing <|im_end|>)."""
    prompt = f"<|im_start|>user\n{problem.prompt}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer.encode(prompt).ids, tokenizer.encode(f"{problem.answer}<|im_end|>").ids
