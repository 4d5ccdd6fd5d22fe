"""
The method: Dynamic Memory Sparsification (Lancucki, Staniszewski, Nawrot, Ponti; arXiv 2506.05345).

Every KV head decides for every token whether its key/value pair is kept for good or evicted once it is more than
`window` tokens old. The one rule that everything else in this repository is tested against:

    query i sees key j   iff   j <= i  and  (i - j <= window  or  not evict[j])                       (visible, below)

Here: the decision and its two sources, the rule, its relaxation for training, the two losses, the schedule, and the
spellings of a DMS checkpoint. Nothing of pages, slots or kernels.

Letters: B batch, T tokens, Hq query heads, Hkv KV heads, G = Hq / Hkv, D head size, C hidden size, V vocabulary.
"""
import hashlib
import json
import math
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class InputError(ValueError):
    """Something the user gave cannot be used. One line: what was wrong, and what to do."""

    def __init__(self, message):
        super().__init__(" ".join(message.split()))  # a path or a library's message may bring line breaks


def one_line(text, most=120):
    """The beginning of a text, line breaks made spaces: what an InputError may quote."""
    return " ".join(str(text).split())[:most]


@contextmanager
def refusing(problem):
    """Whatever a library raises within, a panic of its Rust code included, becomes an InputError of one line."""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # tokenizers raises bare Exceptions, and its panics are not even that
        raise InputError(f"{problem} ({type(e).__name__}: {one_line(e)})") from None


def run_script(main, stopped="stopped"):
    """Run a script's main(): an InputError ends it with its one line and exit code 2, an interruption with 130."""
    try:
        main()
    except InputError as e:
        sys.exit(print(f"error: {e}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print(f"\n{stopped}", file=sys.stderr) or 130)


def choose_device(name):
    """The device of a script's --device, made the current one: "cuda" is this process's own GPU under torchrun."""
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    with refusing(f"--device {name}: cannot be used; give cpu, or cuda where PyTorch finds a GPU"):
        torch.zeros(1, device=name)
        if name.startswith("cuda"):
            torch.cuda.set_device(name)
    return name


@dataclass
class DMSConfig:
    """How a checkpoint decides. Everything here is part of the checkpoint, nothing is hard-wired."""

    window: int = 512  # tokens behind the query that it always sees, besides its own
    source: str = "adapter"  # "adapter": W_a on the normed residual; "neuron": borrowed from a group's first query
    shift: int = 1  # the logit computed at token t decides the fate of token t - shift (0 or 1)
    scale: float = 100.0
    offset: float = 5.0
    per: str = "head"  # "head", or "layer": head 0 decides for all heads of its layer
    tau: float = 0.1  # temperature of the relaxed decision, training only
    target_cr: float = 8.0  # what it was trained for; documentation only
    disable_eviction: bool = False

    def logits(self, s):
        """s (..., Hkv), any float dtype -> decision logits z (..., Hkv) float32; evict where z > 0."""
        z = self.scale * s.float() - self.offset
        return z[..., :1].expand_as(z) if self.per == "layer" else z


def borrow_neuron(q, kv_heads):
    """The paper's source of s (section 3.2): the last channel of each group's first query head.
    q (B, T, Hq, D), before RoPE -> s (B, T, Hkv), and q with that channel set to 0: it takes no part in scores."""
    group = q.shape[2] // kv_heads
    silent = torch.zeros(q.shape[2], q.shape[3], dtype=torch.bool, device=q.device)
    silent[::group, -1] = True
    return q[:, :, ::group, -1], q.masked_fill(silent, 0)


# ------------------------------------------------------------------------------------------------- The visibility rule


def visible(query, key, evict, window):
    """The rule, elementwise with broadcasting: query and key are positions, evict the key's decision (bool)."""
    return (key <= query) & ((query - key <= window) | ~evict)


def decisions(logits, shift):
    """Decision logits (B, Hkv, T), one per token that computed it -> evict (B, Hkv, T) bool, one per token it speaks
    of. With shift 1 the last token is not decided yet: kept, and inside every window anyway."""
    evict = logits > 0
    return F.pad(evict[..., shift:], (0, shift)) if shift else evict


def masked_attention(config):
    """The oracle: attend(layer, q, k, v, logits) over the tokens themselves, nothing cached, everything masked."""
    group = config.num_attention_heads // config.num_key_value_heads

    def attend(layer, q, k, v, logits):
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        if logits is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        t = torch.arange(q.shape[2], device=q.device)
        evict = decisions(logits, config.dms.shift)[:, :, None, :]  # (B, Hkv, 1, T)
        mask = visible(t[:, None], t[None, :], evict, config.dms.window)  # (B, Hkv, T, T)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat_interleave(group, dim=1))

    return attend


# ---------------------------------------------------------------------------------- Training (the paper's section 3.3)


class RelaxedAttention:
    """attend() for training: the hard rule with every decision replaced by a Gumbel-sigmoid sample.

        p = sigmoid((z + g1 - g2) / tau)     score(i, j) += 0 within the window, log(1 - p[j]) outside, -inf for j > i

    Queries are taken `block` at a time, each against the keys up to its end, so that memory grows with block * T and
    nothing above the diagonal is computed. Long sequences recompute each block in backward.
    After a forward pass, `gone()` is the fraction of (token, head) pairs that a cache would no longer hold."""

    def __init__(self, config, lengths, block=128):
        """lengths (B,) int64: the real tokens of each row; the rest is padding at the end."""
        self.dms, self.lengths, self.block = config.dms, lengths, block
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.gone_by_layer = {}  # layer -> (Hkv,) straight-through fraction of this batch's tokens

    def __call__(self, layer, q, k, v, logits):
        B, H, T = logits.shape
        uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
        noisy = (logits + torch.log(uniform) - torch.log1p(-uniform)) / self.dms.tau  # g1 - g2 is logistic
        if self.dms.shift:  # token t is decided by the logit at t + 1; nothing has decided the last one yet
            noisy = F.pad(noisy[..., 1:], (0, 1), value=-1e4)
        soft = torch.sigmoid(noisy)
        hard = (noisy > 0).float() + soft - soft.detach()  # straight-through
        t = torch.arange(T, device=q.device)
        left = t < self.lengths[:, None] - self.dms.window - 1  # (B, T): out of the window when the row ends
        self.gone_by_layer[layer] = (hard * left[:, None]).sum((0, 2)) / self.lengths.sum()
        bias = F.logsigmoid(-noisy).to(q.dtype)  # log(1 - p), (B, Hkv, T)
        q = q.view(B, H, self.group, T, -1)
        out = []
        for start in range(0, T, self.block):
            end = min(start + self.block, T)
            piece = (q[:, :, :, start:end], k[:, :, :end], v[:, :, :end], bias[:, :, :end], t[start:end])
            out.append(checkpoint(self._rows, *piece, use_reentrant=False) if T > 1024 else self._rows(*piece))
        return torch.cat(out, dim=3).flatten(1, 2)

    def _rows(self, q, k, v, bias, position):
        """q (B, Hkv, G, n, D) at position (n,), k and v (B, Hkv, S, D), bias (B, Hkv, S) -> (B, Hkv, G, n, D)."""
        keys = torch.arange(k.shape[2], device=q.device)
        distance = position[:, None] - keys  # (n, S)
        mask = torch.where(distance > self.dms.window, bias[:, :, None, :], 0).masked_fill(distance < 0, float("-inf"))
        score = (q.flatten(2, 3) * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # (B, Hkv, G * n, S)
        score = score.view(*q.shape[:4], -1) + mask[:, :, None]
        weight = torch.softmax(score.float(), dim=-1).to(v.dtype)
        return (weight.flatten(2, 3) @ v).view(q.shape)

    def gone(self):
        """Straight-through mean over layers and heads of the fraction of tokens that the cache has let go, scalar."""
        return torch.stack([x.mean() for x in self.gone_by_layer.values()]).mean()


def compression_loss(gone, cr):
    """max(target - gone, 0), target = 1 - 1/cr: one-sided, so nothing pushes decisions back once the target is met.
    The fraction is counted as the cache counts it: a flagged token that is still in the window is still held."""
    return (1 - 1 / cr - gone).clamp(min=0)


def scheduled_cr(step, steps, target_cr):
    """The compression asked for at a step: linear from 1 to target_cr over the first 7/10 of the steps, then constant.
    1,000 steps to 8x give the paper's +1 every 100 steps."""
    return 1 + (target_cr - 1) * min(1.0, step / max(0.7 * steps, 1))


def check_target(target_cr, window, length):
    """Raise InputError if sequences of this many tokens cannot reach target_cr: the window alone is too much."""
    if not target_cr >= 1:
        raise InputError(f"target CR {target_cr} is not a compression; give 1 or more")
    if (window + 1) * target_cr > length:
        raise InputError(f"target CR {target_cr:g} is impossible for sequences of {length} tokens: the window alone "
                         f"holds {window + 1} of them, and 1/{target_cr:g} is {length / target_cr:.0f}; use a smaller "
                         f"--window, a smaller --target-cr or longer sequences")


def distillation_loss(student, teacher, student_head, teacher_head, keep, reverse=False, piece=1024):
    """KL between next-token distributions over the whole vocabulary, mean over the tokens kept, scalar float32.

    student, teacher: final hidden states (B, T, C); *_head: output weights (V, C); keep (B, T) bool.
    Forward KL, the default, is weighted by the teacher's probabilities (the paper), reverse by the student's (NVIDIA's
    code). Logits exist for `piece` tokens at a time and are computed again in backward."""
    student, teacher = student[keep], teacher[keep]  # (n, C)

    def kl(s, t):
        s = F.log_softmax(F.linear(s, student_head).float(), dim=-1)
        t = F.log_softmax(F.linear(t, teacher_head).float(), dim=-1)
        return F.kl_div(t, s, log_target=True, reduction="sum") if reverse else \
            F.kl_div(s, t, log_target=True, reduction="sum")

    pieces = zip(student.split(piece), teacher.split(piece))
    return sum(checkpoint(kl, s, t, use_reentrant=False) for s, t in pieces) / max(len(student), 1)


def start_retrofit(model, settings):
    """Turn a dense model into a DMS model that decides nothing yet: fresh float32 adapters, which leave the model as
    it is, or the borrowed channel's weights set to zero, which changes it: its other weights must be retrained."""
    config = model.config
    config.dms = settings
    for block in model.model.layers:
        if settings.source == "adapter":
            with torch.device(model.device):
                block.self_attn.add_adapter()
        else:
            stride = config.head_dim * config.num_attention_heads // config.num_key_value_heads
            with torch.no_grad():
                for p in block.self_attn.q_proj.parameters():
                    p[config.head_dim - 1::stride] = 0
    return model


# ------------------------------------------------------------------------------------------------ Checkpoint spellings


def read_json(file):
    """Parse a JSON object. Raises InputError naming the file when it is missing or damaged."""
    with refusing(f"{file}: not found or not a JSON object; is this a model folder, and a whole one?"):
        return dict(json.loads(Path(file).read_text(encoding="utf-8")).items())


def read_lines(file, cut=False):
    """The JSON objects of a file, one to a line. cut: the last line has no end if its writer was interrupted, and does
    not count then. Raises InputError."""
    with refusing(f"{file}: not readable as text; give a file of JSON lines"):
        lines, rows = Path(file).read_text(encoding="utf-8").split("\n"), []
    for number, line in enumerate(lines[:-1] if cut else lines, 1):
        with refusing(f"{file}: line {number} is not a JSON object; fix it"):
            rows += [dict(json.loads(line).items())] if line.strip() else []
    return rows


# our field, NVIDIA's key in config.json, its default there, the key in dms_metadata.json, its default there
FIELDS = (("window", "dms_window_size", 512, "window_size", 256),
          ("scale", "dms_alpha_scale", 100.0, "alpha_scale", 100.0),
          ("offset", "dms_initial_alpha_offset", 5.0, "alpha_offset", 5.0),
          ("target_cr", "dms_cr", 8.0, "target_cr", 8.0),
          ("source", "dms_separate_alpha", False, None, False),
          ("per", "dms_alpha_per", "head", None, "head"),
          ("tau", "dms_tau", 0.1, None, 0.1),
          ("disable_eviction", "dms_disable_eviction", False, None, False),
          ("shift", "dms_shift", 1, "shift", 0))


def read_settings(folder, raw):
    """The DMSConfig of a checkpoint folder whose parsed config.json is `raw`, None for a dense model: from dms_* keys
    there (NVIDIA's two layouts) and dms_metadata.json (borrowed neuron). Prints what it assumes; raises InputError."""
    file = Path(folder) / "dms_metadata.json"
    metadata = read_json(file) if file.exists() else None
    if metadata is not None and isinstance(metadata.get("config"), dict):
        metadata = {**metadata, **metadata["config"]}
    config = {k: v for k, v in raw.items() if k.startswith("dms_")}
    if not config and metadata is None:
        return None
    if config.get("dms_separate_alpha") and metadata is not None:
        raise InputError(f"{folder}: config.json says that adapters decide, dms_metadata.json belongs to a borrowed "
                         f"neuron; remove the wrong one")
    values, assumed = {}, []
    for name, key, default, other_key, other_default in FIELDS:
        stated = [source[k] for source, k in ((config, key), (metadata or {}, other_key)) if source.get(k) is not None]
        if len(stated) == 2 and stated[0] != stated[1]:
            raise InputError(f"{folder}: config.json says {key} = {repr(stated[0])[:80]} and dms_metadata.json says "
                             f"{other_key} = {repr(stated[1])[:80]}; remove the wrong one")
        value = stated[0] if stated else default if metadata is None else other_default
        if not stated and name in ("window", "scale", "offset", "shift"):
            assumed.append(f"{name} = {value}")
        kind = type(default)
        if kind is float and type(value) is int and abs(value) < 2**53:
            value = float(value)
        if type(value) is not kind:
            raise InputError(f"{folder}: {key} = {repr(value)[:80]} is not of type {kind.__name__}; fix that file")
        values[name] = value
    values["source"] = "adapter" if values["source"] else "neuron"
    settings = DMSConfig(**values)
    usable = all(math.isfinite(x) for x in (settings.scale, settings.offset, settings.tau, settings.target_cr)) and \
        0 <= settings.window <= 2**20 and settings.shift in (0, 1) and settings.per in ("head", "layer")
    if not usable:
        raise InputError(f"{folder}: unusable DMS settings {str(settings)[:300]}; fix the checkpoint's settings")
    if assumed:
        print(f"{folder}: not stated by the checkpoint, so assumed: {', '.join(assumed)}", file=sys.stderr)
    return settings


def settings_to_dict(settings):
    """The dms_* keys of config.json, NVIDIA's spelling and dms_shift; empty for None."""
    if settings is None:
        return {}
    values = {key: getattr(settings, name) for name, key, *_ in FIELDS}
    return {**values, "dms_separate_alpha": settings.source == "adapter"}


def read_adapter_settings(path):
    """(DMSConfig, file, fingerprint of their base or None) of adapter tensors to be laid over a base model: a
    safetensors file, or a folder with just one, and beside it, if they are there, the settings."""
    path = Path(path)
    files = [path] if os.path.isfile(path) else sorted(path.glob("*.safetensors")) if os.path.isdir(path) else []
    if len(files) != 1:
        raise InputError(f"{path}: {len(files)} safetensors files there; name the file that holds the adapters")
    folder = files[0].parent
    raw = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    settings = read_settings(folder, {"dms_separate_alpha": True, **raw})
    settings.source = "adapter"
    return settings, files[0], raw.get("dms_base_fingerprint")


def fingerprint(weights):
    """sha256 over the names, shapes and first and last rows of base weights: {name: open safetensors file}. It tells
    one model's weights from another's, whatever their sharding, without reading them all."""
    digest = hashlib.sha256()
    for name in sorted(n for n in weights if "dms_proj_alpha" not in n):
        part = weights[name].get_slice(name)
        shape = part.get_shape()
        digest.update(f"{name} {shape} {part.get_dtype()}".encode())
        for row in (part[:1], part[shape[0] - 1:]) if shape and shape[0] else ():
            digest.update(bytes(row.cpu().contiguous().view(torch.uint8).flatten().tolist()))
    return digest.hexdigest()
