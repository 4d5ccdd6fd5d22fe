"""Make the toy teacher from nothing: a small Qwen3 that solves the toy tasks.

    torchrun --nproc-per-node 2 toy/pretrain.py         # 2 CPU cores: one process a core, about an hour
    python toy/pretrain.py                              # one process; a GPU is used if there is one (minutes)
    ... toy/pretrain.py --resume                        # go on after an interruption
    python toy/pretrain.py --eval 500                   # only measure toy/teacher/ on held-out problems

Retrieval has to appear first, so the first phase is short texts with many questions; then the texts grow to 512
tokens and arithmetic joins. The loss counts answer tokens fully and prompt tokens (mostly filler) a little.
Every batch is drawn from a generator seeded with (seed, step), so a resumed run sees what an uninterrupted one sees.
"""
import argparse
import json
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
from model import Model, ModelConfig, save_model  # noqa: E402
from toy.tasks import TASKS, final_answer, is_correct, make_problem  # noqa: E402
from toy.tokenizer import chat_ids, make_tokenizer, save_tokenizer  # noqa: E402

ARCHITECTURE = dict(
    model_type="qwen3", hidden_size=192, intermediate_size=384, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, head_dim=32, rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=1024,
    tie_word_embeddings=True)

# steps, tokens per row, weights of (needles, variables, arithmetic) in the mix
PHASES = (
    (1000, 128, (0.45, 0.45, 0.10)),
    (500, 256, (0.30, 0.30, 0.40)),
    (1400, 512, (0.25, 0.25, 0.50)),
)
TOKENS_PER_STEP = 8192
PROMPT_WEIGHT = 0.1         # of a prompt token in the loss, where an answer token counts 1
LEVELS = (("needles", "easy"), ("variables", "easy"), ("arithmetic", "easy"), ("arithmetic", "hard"))


def phase_of(step):
    """(tokens per row, weights of the tasks) at `step`."""
    for steps, length, weights in PHASES:
        if step < steps:
            return length, weights
        step -= steps
    return PHASES[-1][1:]


def collate(pairs, pad, width):
    """[(prompt ids, answer ids), ...] -> ids (B, width) int64, loss weights (B, width) float32 of predicting ids."""
    ids = torch.full((len(pairs), width), pad)
    weights = torch.zeros(len(pairs), width)
    for row, (prompt, answer) in enumerate(pairs):
        n, m = len(prompt), len(prompt) + len(answer)
        ids[row, :m] = torch.tensor(prompt + answer)
        weights[row, :n] = PROMPT_WEIGHT
        weights[row, n:m] = 1.0
    return ids, weights


def make_batch(tokenizer, step, seed, rank=0, world=1):
    """Process `rank`'s share of a batch of TOKENS_PER_STEP tokens, the same for the same (seed, step)."""
    rng = random.Random(f"{seed}-{step}")
    longest, weights = phase_of(step)
    width = longest if rng.random() < 0.75 else rng.choice([w for w in (128, 256, 512) if w <= longest])
    pairs = []
    rng = random.Random(f"{seed}-{step}-{rank}")
    for _ in range(TOKENS_PER_STEP // width // world):
        task = rng.choices(TASKS, weights)[0]
        level = rng.randint(max(96, width * 5 // 8), width)
        if width == 512 and rng.random() < 0.4:             # the shape of the evaluation
            level = "hard" if task != "arithmetic" and rng.random() < 0.5 else "easy"
        pairs.append(chat_ids(tokenizer, make_problem(task, rng, "train", level)))
    return collate(pairs, tokenizer.token_to_id("<|endoftext|>"), width)


def loss_of(model, ids, weights):
    """Weighted mean cross-entropy of the next token, in nats."""
    logits = model(ids)[:, :-1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def exact_match(model, tokenizer, task, level, problems, seed=1, batch=16):
    """Share of held-out problems whose every answer token is the argmax given those before it. These are just the
    problems whose greedy reply is the reference answer to the letter: a cheap lower bound of the accuracy."""
    rng = random.Random(f"{seed}-{task}-{level}")
    device = next(model.parameters()).device
    right = 0
    for start in range(0, problems, batch):
        pairs = [chat_ids(tokenizer, make_problem(task, rng, "test", level))
                 for _ in range(min(batch, problems - start))]
        ids, weights = (x.to(device) for x in collate(pairs, 0, 512))
        hit = model(ids[:, :-1]).argmax(-1) == ids[:, 1:]
        right += (hit | (weights[:, 1:] < 1)).all(dim=1).sum().item()
    return right / problems


@torch.no_grad()
def generate(model, tokenizer, prompts, temperature=0.0, max_new=280):
    """Free-running replies to `prompts` (lists of ids), dense KV cache; temperature 0 is greedy."""
    from kv_cache import KVCache
    device = next(model.parameters()).device
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    ids = torch.tensor([p + [pad] * (int(lengths.max()) - len(p)) for p in prompts], device=device)
    cache = KVCache(model.config, batch_size=len(prompts))
    logits = model(ids, cache=cache, lengths=lengths, last_only=True)[:, -1]
    alive, replies = torch.ones_like(lengths), [[] for _ in prompts]
    for _ in range(max_new):
        probabilities = (logits.float() / max(temperature, 1e-6)).softmax(-1)
        chosen = torch.multinomial(probabilities, 1)[:, 0] if temperature else logits.argmax(-1)
        alive = alive * (chosen != end)
        if not alive.any():
            break
        for reply, token, going in zip(replies, chosen.tolist(), alive.tolist()):
            reply.extend([token] * going)
        logits = model(chosen[:, None], cache=cache, lengths=alive)[:, -1]
    return [tokenizer.decode(reply) for reply in replies]


def free_running(model, tokenizer, task, level, problems, temperature=0.0, seed=1, batch=50):
    """(accuracy, mean tokens, most tokens) of free-running replies to held-out problems."""
    rng = random.Random(f"{seed}-{task}-{level}")
    drawn = [make_problem(task, rng, "test", level) for _ in range(problems)]
    pairs = [chat_ids(tokenizer, p) for p in drawn]
    right = 0
    for start in tqdm(range(0, problems, batch), desc=f"{task} {level}", leave=False, disable=None):
        replies = generate(model, tokenizer, [prompt for prompt, _ in pairs[start:start + batch]], temperature)
        right += sum(is_correct(p, reply) for p, reply in zip(drawn[start:], replies))
    sizes = [len(prompt) + len(answer) for prompt, answer in pairs]
    return right / problems, sum(sizes) / problems, max(sizes)


def new_model(vocab_size, seed):
    """A model with normally distributed weights (std 0.02; what writes to the residual stream: less)."""
    torch.manual_seed(seed)
    model = Model(ModelConfig(vocab_size=vocab_size, **ARCHITECTURE))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            deep = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / (2 * ARCHITECTURE["num_hidden_layers"]) ** 0.5 if deep else 0.02
            torch.nn.init.normal_(parameter, std=std)
        else:
            torch.nn.init.ones_(parameter)
    return model


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
    return [Muon(matrices, lr=args.muon_lr), torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)]


def average_gradients(model):
    """Replace every process's gradients by their mean over the processes."""
    gradients = [p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, flat.div_(dist.get_world_size()).split([g.numel() for g in gradients])):
        gradient.copy_(mean.view_as(gradient))


def save_checkpoint(file, step, model, optimizers):
    """Everything that --resume needs, in one atomic file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".tmp")
    torch.save({"step": step, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]},
               scratch)
    os.replace(scratch, file)


def save_teacher(model, tokenizer, folder):
    """An ordinary Hugging Face model folder."""
    save_model(model, folder, dtype=torch.bfloat16)
    save_tokenizer(tokenizer, folder)
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    settings = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "eos_token_id": [end, pad], "pad_token_id": pad}
    (Path(folder) / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def train(args, device):
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    tokenizer = make_tokenizer()
    model = new_model(tokenizer.get_vocab_size(), args.seed).to(device)
    optimizers = make_optimizers(model, args)
    total = sum(steps for steps, *_ in PHASES)
    peaks = [group["lr"] for o in optimizers for group in o.param_groups]
    checkpoint = Path(args.scratch) / "checkpoint.pt"
    first = 0
    if args.resume:
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        first = state["step"]
    forward = torch.compile(model, dynamic=False) if args.compile else model
    if rank == 0:
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {tokenizer.get_vocab_size()}, "
              f"steps {first} to {total} on {device}", flush=True)
    bar = tqdm(range(first, total), initial=first, total=total, mininterval=10, disable=rank > 0)
    started, average = time.time(), None
    for step in bar:
        # linear warm-up, then constant, then linear to 0 over the last half
        scale = min(1.0, (step + 1) / 100, 2 * (total - step) / total)
        for group, peak in zip((g for o in optimizers for g in o.param_groups), peaks):
            group["lr"] = peak * scale
        ids, weights = (x.to(device) for x in make_batch(tokenizer, step, args.seed, rank, world))
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
            tqdm.write(f"step {done} loss {average:.4f} rate {scale:.3f} {time.time() - started:.0f} s", sys.stdout)
        if done % args.every == 0 or done == total:
            save_checkpoint(checkpoint, done, model, optimizers)
            save_teacher(model, tokenizer, args.out)
            scores = [f"{t} {lv} {exact_match(model, tokenizer, t, lv, args.check):.3f}" for t, lv in LEVELS]
            tqdm.write(f"step {done} held-out exact match: {', '.join(scores)}", sys.stdout)
        sys.stdout.flush()
    seconds = time.time() - started
    if rank == 0:
        print(f"trained for {seconds:.0f} s ({seconds / max(total - first, 1):.2f} s a step)", flush=True)


def measure(args, device):
    """Free-running accuracy of the finished teacher on held-out problems."""
    from model import load_model, load_tokenizer
    model = load_model(args.out, device=device)
    tokenizer = load_tokenizer(args.out).fast
    for task, level in (*LEVELS[:2], ("needles", "hard"), ("variables", "hard"), *LEVELS[2:]):
        accuracy, mean, most = free_running(model, tokenizer, task, level, args.eval)
        line = f"{task} {level}: greedy {accuracy:.1%} of {args.eval}, tokens mean {mean:.0f}, most {most}"
        if task == "arithmetic":
            sampled = free_running(model, tokenizer, task, level, args.eval, temperature=1.0)[0]
            line += f", one sampled chain {sampled:.1%}"
        print(line, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=str(ROOT / "toy" / "teacher"), help="the teacher's folder")
    parser.add_argument("--scratch", default=str(ROOT / "toy" / ".pretrain"), help="folder of the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--eval", type=int, default=0, metavar="N", help="only measure --out on N problems a task")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak rate of AdamW")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="peak rate of Muon")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="use torch.compile")
    parser.add_argument("--every", type=int, default=200, help="steps between saving and checking")
    parser.add_argument("--check", type=int, default=64, help="held-out problems a task in a check")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if "RANK" in os.environ:                                # started by torchrun, for CPU cores
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
