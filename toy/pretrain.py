"""
Make the toy teacher from nothing: a small Qwen3 that solves the toy tasks.

    torchrun --nproc-per-node 2 toy/pretrain.py    # 2 CPU cores: one process a core, about an hour
    python toy/pretrain.py                         # one process; a GPU if there is one (minutes)
    ... toy/pretrain.py --resume                   # go on after an interruption
    python toy/pretrain.py --eval 500              # only measure toy/teacher/ on held-out problems

Retrieval has to appear first, so the first phase is short texts with many questions. Then the texts
grow to 512 tokens and arithmetic joins. The loss counts answer tokens fully, prompt tokens (mostly
filler) a little. Every batch follows from (seed, step), so a resumed run sees what an uninterrupted
one sees.
"""

import argparse
import os
import random
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from checkpoint import load_model, load_tokenizer, save_model  # noqa: E402
from common import torchrun_place, write_atomic, write_json  # noqa: E402
from generate import Sampling, Sequence, generate  # noqa: E402
from kv_cache import KVCache  # noqa: E402
from model import Model, ModelConfig  # noqa: E402
from toy.tasks import LETTERS, NAMES, TASKS, evaluate, is_correct, make_problem  # noqa: E402
from toy.tokenizer import chat_ids, make_tokenizer, save_tokenizer  # noqa: E402

ARCHITECTURE = dict(
    model_type="qwen3",
    hidden_size=192,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)

# steps, tokens per row, tokens per step, the mix: weights of (retrieval drill, sums drill, *TASKS)
PHASES = (
    (200, 64, 2048, (1.00, 0.00, 0.00, 0.00, 0.00)),
    (150, 128, 4096, (0.30, 0.00, 0.30, 0.30, 0.10)),
    (150, 128, 8192, (0.10, 0.00, 0.25, 0.30, 0.35)),
    (100, 256, 8192, (0.00, 0.00, 0.25, 0.30, 0.45)),
    (150, 128, 4096, (0.00, 0.60, 0.10, 0.10, 0.20)),
    (400, 512, 8192, (0.00, 0.08, 0.24, 0.25, 0.43)),
)
DECAY = 500  # the rates fall linearly to 0 over this many last steps
PROMPT_WEIGHT = 0.03  # of a prompt token in the loss, where an answer token counts 1
LEVELS = (
    ("needles", "easy"),
    ("variables", "easy"),
    ("arithmetic", "easy"),
    ("arithmetic", "hard"),
)


def phase_of(step):
    """(tokens per row, tokens per step, weights of the tasks) at `step`."""
    for steps, *phase in PHASES:
        if step < steps:
            return phase
        step -= steps
    return PHASES[-1][1:]


def chat_row(tokenizer, problem):
    """A problem as (token ids, their weights in the loss)."""
    prompt, answer = chat_ids(tokenizer, problem)
    return prompt + answer, [PROMPT_WEIGHT] * len(prompt) + [1.0] * len(answer)


def retrieval_row(tokenizer, rng, width):
    """Bare retrieval, as (token ids, their weights): a few statements, then the same again and
    again in any order, where only what follows " is" counts. It teaches retrieval several times
    faster than the tasks themselves do."""
    if rng.random() < 0.5:
        names = rng.sample(NAMES, rng.randint(2, 6))
        values = {name: f"{rng.randrange(100):02d}" for name in names}
        statements = [f" The code of {name} is {value}." for name, value in values.items()]
    else:
        names = rng.sample(LETTERS, rng.randint(2, 8))
        values = {name: rng.choice(LETTERS + "0123456789") for name in names}
        statements = [f" {name} is {value}." for name, value in values.items()]
    ids = tokenizer.encode("".join(statements)).ids
    weights = [0.0] * len(ids)
    while True:
        name = rng.choice(list(values))
        more = tokenizer.encode(f" {name} is {values[name]},").ids
        if len(ids) + len(more) > width:
            return ids, weights
        ids += more
        weights += [0.0, 0.0] + [1.0] * (len(more) - 3) + [0.0]


def sums_row(tokenizer, rng, width):
    """The tables of arithmetic, as (token ids, their weights): sum after sum, where only the
    results count."""
    ids = []
    weights = []
    while len(ids) < width - 8:
        expression = f"{rng.randrange(10)} {rng.choice('++--*')} {rng.randrange(10)}"
        if rng.random() < 0.25:
            first = f"{rng.randrange(10)} {rng.choice('+-')}"
            expression = f"{first} {rng.randrange(10)} * {rng.randrange(10)}"
        ids += tokenizer.encode(f" {expression} is {evaluate(expression)},").ids
        weights += [0.0] * (len(ids) - len(weights) - 2) + [1.0, 0.0]
    return ids, weights


DRILLS = {"retrieval drill": retrieval_row, "sums drill": sums_row}


def collate(rows, pad, width):
    """[(token ids, weights), ...] -> ids (B, width) int64, loss weights (B, width) float32 of
    predicting ids."""
    ids = torch.full((len(rows), width), pad)
    weights = torch.zeros(len(rows), width)
    for i, (row, row_weights) in enumerate(rows):
        ids[i, :len(row)] = torch.tensor(row)
        weights[i, :len(row)] = torch.tensor(row_weights)
    return ids, weights


def make_batch(tokenizer, step, seed, rank=0, world=1):
    """Process `rank`'s share of the batch of `step`, the same for the same (seed, step)."""
    rng = random.Random(f"{seed}-{step}")
    longest, tokens, mix = phase_of(step)
    width = longest
    if rng.random() >= 0.75:
        shorter = [width for width in (128, 256, 512) if width <= longest]
        width = rng.choice(shorter or [longest])
    rng = random.Random(f"{seed}-{step}-{rank}")
    rows = []
    for _ in range(tokens // width // world):
        task = rng.choices((*DRILLS, *TASKS), mix)[0]
        if task in DRILLS:
            rows.append(DRILLS[task](tokenizer, rng, width))
            continue
        level = rng.randint(max(96, width * 5 // 8), width)
        if width == 512 and rng.random() < 0.4:  # the shape of the evaluation
            level = "hard" if task != "arithmetic" and rng.random() < 0.5 else "easy"
        rows.append(chat_row(tokenizer, make_problem(task, rng, "train", level)))
    return collate(rows, tokenizer.token_to_id("<|endoftext|>"), width)


def loss_of(model, ids, weights):
    """Weighted mean cross-entropy of the next token, in nats."""
    logits = model(ids)[:, :-1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def exact(model, tokenizer, problems, batch=16):
    """For each problem: is every token of its answer the argmax after those before it? Where it is,
    the greedy reply is the reference answer to the letter, and nothing needs to be generated to
    know so."""
    hits = []
    for start in range(0, len(problems), batch):
        rows = [chat_row(tokenizer, p) for p in problems[start:start + batch]]
        ids, weights = (x.to(model.device) for x in collate(rows, 0, 512))
        hit = model(ids[:, :-1]).argmax(-1) == ids[:, 1:]
        hits += (hit | (weights[:, 1:] < 1)).all(dim=1).tolist()
    return hits


def exact_scores(model, tokenizer, count):
    """The share of such answers on `count` held-out problems of each kind, as text."""
    hits = {kind: exact(model, tokenizer, held_out(*kind, count)) for kind in LEVELS}
    return ", ".join(f"{' '.join(kind)} {sum(hit) / count:.3f}" for kind, hit in hits.items())


def held_out(task, level, count, seed=1):
    """`count` problems of the test split, always the same."""
    rng = random.Random(f"{seed}-{task}-{level}")
    return [make_problem(task, rng, "test", level) for _ in range(count)]


def free_running(model, tokenizer, problems, temperature=0.0, batch=50):
    """Share of problems answered correctly by free-running replies; temperature 0 is greedy."""
    unsure = problems
    if temperature == 0:
        unsure = [p for p, known in zip(problems, exact(model, tokenizer, problems)) if not known]
    right = len(problems) - len(unsure)
    if unsure:
        cache = KVCache(model.config, min(batch, len(unsure)), model.device)
        prompts = [chat_ids(tokenizer, problem)[0] for problem in unsure]
        sampling = Sampling(temperature)
        replies = [Sequence(prompt, 280, seed, sampling=sampling)
                   for seed, prompt in enumerate(prompts)]
        end_ids = {tokenizer.token_to_id("<|im_end|>")}
        for _ in generate(model, cache, replies, end_ids):
            pass
        texts = [tokenizer.decode(reply.new) for reply in replies]
        right += sum(map(is_correct, unsure, texts))
    return right / len(problems)


def new_model(vocab_size, seed):
    """A model with random weights, and two head starts without which retrieval takes several times
    longer to appear.

    Channel 0 of every embedding is the same constant (the tied output layer's softmax does not
    notice), which gives queries and keys a part that does not depend on the token. From that part,
    four of the first layer's query heads look 1, 2, 1 and 3 tokens back: with q = exp(-i f d),
    k = 1 in every rotary pair of frequency f, the logit sum_f cos(f (distance - d)) is largest at
    distance d. Only the fast frequencies are used.
    """
    torch.manual_seed(seed)
    config = ModelConfig(vocab_size=vocab_size, **ARCHITECTURE)
    model = Model(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.constant_(parameter, 1.5)
        elif parameter.ndim == 1:
            torch.nn.init.ones_(parameter)
        elif "embed_tokens" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        else:
            scale = parameter.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):  # write to the residual stream
                scale *= (2 * config.num_hidden_layers) ** -0.5
            torch.nn.init.normal_(parameter, std=scale)
    look_back(model.model.layers[0].self_attn, config)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
    return model


@torch.no_grad()
def look_back(attention, config):
    """Make the first heads of a layer look back, as new_model says."""
    D = config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    frequency = config.rope_theta ** -(torch.arange(0, D, 2) / D)
    amplitude = torch.zeros(D // 2)
    amplitude[:6] = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.7, 0.5])
    queries = attention.q_proj.weight.view(-1, D, config.hidden_size)  # (Hq, D, C)
    keys = attention.k_proj.weight.view(-1, D, config.hidden_size)  # (Hkv, D, C)
    for head, distance in enumerate((1, 2, 1, 3)):
        query = queries[head]
        key = keys[head // group]
        angle = frequency * distance
        query.mul_(0.3)
        query[:, 0] = 0.5 * torch.cat((amplitude * angle.cos(), -amplitude * angle.sin()))
        key.mul_(0.3)
        key[:, 0] = 0.5 * torch.cat((amplitude, torch.zeros(D // 2)))


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by five Newton-Schulz steps; for matrices only.
    https://kellerjordan.github.io/posts/muon/"""

    def __init__(self, parameters, lr, momentum=0.95, weight_decay=0.1):
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(state["momentum"], group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonal(matrix):
    """The nearest matrix with all singular values near 1."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return x.T if tall else x


def make_optimizers(model, args):
    """Muon for the matrices inside the blocks, AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers" not in n]
    adam = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [Muon(matrices, lr=args.muon_lr), adam]


def all_groups(optimizers):
    """Their groups of parameters, which load_state_dict replaces."""
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def average_gradients(model):
    """Replace every process's gradients by their mean over the processes."""
    gradients = [p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    means = flat.split([gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means):
        gradient.copy_(mean.view_as(gradient))


def save_checkpoint(file, step, model, optimizers):
    """Everything that --resume needs, in one atomic file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {"step": step, "model": model.state_dict()}
    state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    write_atomic(file, lambda temporary: torch.save(state, temporary))


def restore_checkpoint(file, model, optimizers):
    """The inverse. Returns the steps done."""
    state = torch.load(file, weights_only=True, map_location=model.device)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    return state["step"]


def save_teacher(model, tokenizer, folder):
    """An ordinary Hugging Face model folder."""
    save_model(model, folder, dtype=torch.bfloat16)
    save_tokenizer(tokenizer, folder)
    end = tokenizer.token_to_id("<|im_end|>")
    pad = tokenizer.token_to_id("<|endoftext|>")
    write_json(Path(folder) / "generation_config.json", {
        "do_sample": True, "temperature": 1.0, "top_p": 1.0,
        "eos_token_id": [end, pad], "pad_token_id": pad})


def train(args, device):
    rank, world = torchrun_place()
    tokenizer = make_tokenizer()
    model = new_model(tokenizer.get_vocab_size(), args.seed).to(device)
    optimizers = make_optimizers(model, args)
    total = sum(steps for steps, *_ in PHASES)
    peaks = [group["lr"] for group in all_groups(optimizers)]
    checkpoint = Path(args.scratch) / "checkpoint.pt"
    first = 0
    if args.resume:
        first = restore_checkpoint(checkpoint, model, optimizers)
    forward = torch.compile(model, dynamic=False) if args.compile else model
    if rank == 0:
        size = sum(parameter.numel() for parameter in model.parameters())
        print(f"{size:,} parameters, vocabulary {tokenizer.get_vocab_size()}, steps {first} to "
              f"{total} on {device}", flush=True)
    bar = tqdm(range(first, total), initial=first, total=total, mininterval=10, disable=rank > 0)
    started = time.time()
    average = None
    for step in bar:
        scale = min(1.0, (step + 1) / 30, (total - step) / DECAY)
        for group, peak in zip(all_groups(optimizers), peaks):
            group["lr"] = peak * scale
        batch = make_batch(tokenizer, step, args.seed, rank, world)
        ids, weights = (x.to(device) for x in batch)
        loss = loss_of(forward, ids, weights)
        loss.backward()
        if world > 1:
            average_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
        bar.set_postfix(loss=f"{average:.3f}", refresh=False)
        done = step + 1
        if rank > 0:
            continue
        if done % 50 == 0:
            tqdm.write(f"step {done} loss {average:.4f} rate {scale:.3f}", sys.stdout)
        if done % args.every == 0 or done == total:
            save_checkpoint(checkpoint, done, model, optimizers)
            save_teacher(model, tokenizer, args.out)
            scores = exact_scores(model, tokenizer, args.check)
            tqdm.write(f"step {done} held-out exact answers: {scores}", sys.stdout)
        sys.stdout.flush()
    if rank == 0:
        print(f"trained for {time.time() - started:.0f} s", flush=True)


def measure(args, device):
    """Free-running accuracy of the finished teacher on held-out problems."""
    model = load_model(args.out, device=device)
    tokenizer = load_tokenizer(args.out).fast
    for task, level in (*LEVELS, ("needles", "hard"), ("variables", "hard")):
        problems = held_out(task, level, args.eval)
        sizes = [len(chat_row(tokenizer, p)[0]) for p in problems]
        greedy = free_running(model, tokenizer, problems)
        line = f"{task} {level}: greedy {greedy:.1%} of {args.eval}"
        if task == "arithmetic":
            fewer = problems[: max(args.eval // 5, 1)]  # it is slow
            sampled = free_running(model, tokenizer, fewer, temperature=1.0)
            line += f", one sampled chain {sampled:.1%} of {len(fewer)}"
        mean = sum(sizes) / len(sizes)
        print(f"{line}; {mean:.0f} tokens on average, at most {max(sizes)}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    add = parser.add_argument
    flag = argparse.BooleanOptionalAction
    add("--out", default=str(ROOT / "toy" / "teacher"), help="the teacher's folder")
    add("--scratch", default=str(ROOT / "toy" / ".pretrain"), help="folder of the checkpoint")
    add("--resume", action="store_true", help="go on from the checkpoint")
    add("--eval", type=int, default=0, metavar="N", help="only measure --out on N problems a task")
    add("--lr", type=float, default=3e-3, help="peak rate of AdamW")
    add("--muon-lr", type=float, default=0.01, help="peak rate of Muon")
    add("--compile", action=flag, default=True, help="use torch.compile")
    add("--every", type=int, default=100, help="steps between saving and checking")
    add("--check", type=int, default=32, help="held-out problems a task in a check")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if "RANK" in os.environ:  # started by torchrun, for CPU cores
        dist.init_process_group("gloo", timeout=timedelta(hours=1))
    if not args.eval:
        train(args, device)
        args.eval = 500
    if not dist.is_initialized() or dist.get_rank() == 0:
        measure(args, device)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
