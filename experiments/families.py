"""
Other families: a mixture of experts and latent attention learn to forget as the toy teacher did.

    python experiments/families.py                        # 28 minutes on one core
    python experiments/families.py --teacher-steps 40 --steps 20 --problems 2 --out trial.json

No model of these families is small enough and solves the toy tasks. So two are made out of the toy
teacher, in minutes, and are teachers themselves then:

- qwen3_moe: a layer has eight experts, of which a router, random at first, chooses two. Each begins
  as a random half of the toy teacher's MLP.
- deepseek_v2: the attention begins from nothing, everything else as the toy teacher's. First each
  layer's attention learns to give what the toy teacher's gives for the same input (`imitation`).

Then all matrices of the layers learn to predict what the toy teacher predicts (`divergence`).
retrofit.py does the rest by its own defaults for the toy, and measures. A family has three rows:
the dense model, DMS, and the dense model in a sliding window of as many pairs. Each has the
accuracy of greedy answers, the KL to the dense model, the compression, and the bytes in pages.
"""

from dataclasses import replace

import shared
import torch
import torch.nn.functional as F
from shared import TEACHER, Results, ToyData, load, tasks
from tqdm import tqdm

from checkpoint import copy_tokenizer, save_model
from common import read_json, run_script
from dms import Packing, attention, distillation_loss, document_attention
from model import Model
from toy.pretrain import Muon

EXPERTS = dict(model_type="qwen3_moe", num_experts=8, num_experts_per_tok=2,
               moe_intermediate_size=192, norm_topk_prob=True)
# head_dim is that of the rotated part; all four layers are dense
LATENT = dict(model_type="deepseek_v2", kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32,
              head_dim=32, v_head_dim=32, num_key_value_heads=8, first_k_dense_replace=4)


def with_experts(teacher):
    """A qwen3_moe whose experts are random halves of the teacher's MLPs."""
    model = Model(replace(teacher.config, **EXPERTS))
    model.load_state_dict(teacher.state_dict(), strict=False)
    for block, original in zip(model.model.layers, teacher.model.layers):
        mlp = original.mlp
        for expert in block.mlp.experts:
            half = torch.randperm(len(mlp.up_proj.weight))[: len(expert.up_proj.weight)]
            expert.gate_proj.weight.data = mlp.gate_proj.weight[half]
            expert.up_proj.weight.data = mlp.up_proj.weight[half]
            # twice: the router's weights sum to 1
            expert.down_proj.weight.data = 2 * mlp.down_proj.weight[:, half]
    return model


def with_latent_attention(teacher):
    """A deepseek_v2 that has all but the attention from the teacher."""
    model = Model(replace(teacher.config, **LATENT))
    others = {k: v for k, v in teacher.state_dict().items() if "self_attn" not in k}
    model.load_state_dict(others, strict=False)
    return model


def imitation(model, teacher, ids, packing):
    """What each layer's attention adds to the residual, given the teacher's residual, should be
    what the teacher's adds: the squared error as a share of the square, the mean over layers."""
    inputs = []
    targets = []
    hooks = []
    for block in teacher.model.layers:
        hooks += [
            block.input_layernorm.register_forward_hook(lambda _, x, y: inputs.append((x[0], y))),
            block.self_attn.o_proj.register_forward_hook(lambda _, x, y: targets.append(y))]
    with torch.no_grad():
        teacher.hidden(ids, document_attention(packing))
    for hook in hooks:
        hook.remove()
    counts = packing.precedes(1)
    rotate = model.rope(ids.shape[1], 0, torch.float32)
    errors = []
    for block, (residual, x), target in zip(model.model.layers, inputs, targets):
        q, k, v, _ = block.self_attn.project(residual, x, rotate)
        y = block.self_attn.output(attention(q, k, v))
        errors.append(F.mse_loss(y[counts], target[counts]) / target[counts].square().mean())
    return torch.stack(errors).mean()


def divergence(model, teacher, ids, packing):
    """The KL to the teacher, in nats a token."""
    attend = document_attention(packing)
    with torch.no_grad():
        target = teacher.hidden(ids, attend)
    heads = (model.lm_head.weight, teacher.lm_head.weight)
    counts = packing.precedes(1)
    return distillation_loss(model.hidden(ids, attend), target, *heads, counts) / counts.sum()


def learn(model, teacher, loss_of, part, steps, rate, data):
    """`steps` steps of Muon on the matrices whose names have `part` in them."""
    matrices = [p for name, p in model.named_parameters() if part in name and p.ndim == 2]
    optimizer = Muon(matrices, rate)
    bar = tqdm(range(steps), loss_of.__name__)
    for step, (ids, documents) in zip(bar, data.batches(0)):
        loss = loss_of(model, teacher, ids, Packing(documents, ids.shape[1], ids.device))
        loss.backward()
        scale = min(1, (step + 1) / 20, (steps - step) / (0.6 * steps))
        optimizer.param_groups[0]["lr"] = rate * scale
        optimizer.step()
        model.zero_grad()
        bar.set_postfix_str(f"{loss.item():.4f}")


def teacher_of(family, steps):
    """The folder of a family's teacher, which is made unless it is there. A new attention takes
    three times the steps."""
    folder = shared.RETROFITS / f"teacher-{family}-{steps}"
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    teacher, tokenizer = load(TEACHER)
    data = ToyData(tokenizer, 512, 2, family)
    torch.set_float32_matmul_precision("medium")
    if family == "qwen3_moe":
        model = with_experts(teacher)
        learn(model, teacher, divergence, "layers", steps, 0.005, data)
    else:
        model = with_latent_attention(teacher)
        learn(model, teacher, imitation, "self_attn", steps, 0.02, data)
        learn(model, teacher, divergence, "layers", 2 * steps, 0.005, data)
    torch.set_float32_matmul_precision("highest")
    folder.mkdir(parents=True, exist_ok=True)
    copy_tokenizer(TEACHER, folder)
    save_model(model, folder)
    return folder


def main():
    p = shared.arguments(__doc__, "families.json")
    p.add_argument("--cr", type=float, default=8)
    p.add_argument("--teacher-steps", type=int, default=200, help="that make a family's teacher")
    p.add_argument("--steps", type=int, default=shared.STEPS, help="of the retrofits")
    p.add_argument("--problems", type=int, default=200, help="of each task")
    args = p.parse_args()
    results = Results(args)
    for family in ("qwen3_moe", "deepseek_v2"):
        if results.has(family=family):
            continue
        teacher = teacher_of(family, args.teacher_steps)
        name = f"{teacher.name}-dms-{args.cr:g}x-{args.steps}steps-{args.problems}problems"
        flags = ["--model", teacher, "--data", "toy", "--target-cr", args.cr, "--steps", args.steps]
        folder = shared.retrofitted(name, *flags, problems=args.problems, sequences=32)
        for method, found in read_json(folder / "results.json")["results"].items():
            results.add(family=family, method=method, **found["accuracy"], kl=found["kl"],
                        compression=found["compression_ratio"], bytes=found["peak_page_bytes"])
    columns = ("family", "method", *tasks.TASKS, "kl", "compression", "bytes")
    shared.print_table(results.data["rows"], *columns)


if __name__ == "__main__":
    run_script(main)
