"""
Multi-head latent attention, of DeepSeek-V2 and V3, in the form that caches least.

A head's key and value are both computed from one short vector of the token, its latent c. Only the
part of the key that carries the position is computed apart, once for all heads:

    k_h = [W_UK_h c ; k_rope]       v_h = W_UV_h c       score = q_h k_h

But the two projections commute with attention:

    q^T (W_UK c) = (W_UK^T q)^T c        sum_j a_j (W_UV c_j) = W_UV (sum_j a_j c_j)

So a query is carried into the space of latents, and the output of attention out of it:

    q_h = [W_UK_h^T q_nope ; q_rope]       k = [c ; k_rope]       y = sum_j a_j k_j

Now all heads have the same pair: there is one KV head, and one decision for a token and layer. The
value is c, which the key contains. So only the key is cached, and serves as the value, too: y then
begins with sum_j a_j c_j, and its rest is not used. The module has the methods of model.py's
Attention.

References: DeepSeek-AI 2405.04434 (V2), 2412.19437 (V3). Letters: those of dms.py; r, the size of a
latent, is kv_lora_rank.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import dms


def in_halves(x):
    """x (B, T, H, D) with its even channels first. DeepSeek's RoPE pairs channels 2i and 2i + 1,
    model.py's pairs i and i + D/2. Products of q and k do not change if both are reordered, so the
    channels need not go back."""
    return x.unflatten(3, (-1, 2)).mT.flatten(3)


class LatentAttention(nn.Module):
    """In the place of model.py's Attention, over one KV head of latents."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        C = config.hidden_size
        H = config.num_attention_heads
        nope = config.qk_nope_head_dim
        D = nope + config.qk_rope_head_dim  # of a query, before it is carried over
        if config.q_lora_rank:
            self.q_a_proj = nn.Linear(C, config.q_lora_rank, bias=False)
            self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, 1e-6)  # whatever rms_norm_eps is
            self.q_b_proj = nn.Linear(config.q_lora_rank, H * D, bias=False)
        else:
            self.q_proj = nn.Linear(C, H * D, bias=False)
        r = config.kv_lora_rank
        v = config.v_head_dim
        self.kv_a_proj_with_mqa = nn.Linear(C, config.key_dim, bias=False)  # to c and k_rope
        self.kv_a_layernorm = nn.RMSNorm(r, 1e-6)
        self.kv_b_proj = nn.Linear(r, H * (nope + v), bias=False)
        self.o_proj = nn.Linear(H * v, C, bias=False)
        # A score is mscale^2 q k / sqrt(D), where mscale is 1 without yarn. `attend` divides by
        # sqrt(key_dim), so q is multiplied by the rest.
        rope = config.rope_scaling or {}
        mscale = 1 + 0.1 * rope.get("mscale_all_dim", 0) * math.log(rope.get("factor", 1))
        self.scale = mscale**2 * (config.key_dim / D) ** 0.5

    def up(self):
        """W_UK (H, nope, r) and W_UV (H, v, r)."""
        config = self.config
        by_head = self.kv_b_proj.weight.unflatten(0, (config.num_attention_heads, -1))
        return by_head.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)

    def project(self, residual, x, rotate):
        """q (B, H, T, r + rope), k (B, 1, T, r + rope), the same as values, and the decision
        logits. Arguments: those of Attention.project."""
        W_UK, _ = self.up()
        H, nope, r = W_UK.shape
        if self.config.q_lora_rank:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        else:
            q = self.q_proj(x)
        q = q.unflatten(2, (H, -1)) * self.scale  # (B, T, H, nope + rope)
        k = self.kv_a_proj_with_mqa(x)[:, :, None]  # (B, T, 1, r + rope)
        q_nope = q[..., :nope].transpose(1, 2)
        q_rope = rotate(in_halves(q[..., nope:]))
        k_rope = rotate(in_halves(k[..., r:]))
        c = self.kv_a_layernorm(k[..., :r])
        q = torch.cat((q_nope @ W_UK, q_rope.transpose(1, 2)), dim=3)
        k = torch.cat((c, k_rope), dim=3).transpose(1, 2)
        return q, k, k, dms.decide(self, residual)

    def output(self, y):
        """y (B, H, T, r + rope), the result of `attend` -> what the residual gains, (B, T, C)."""
        _, W_UV = self.up()
        y = y[..., : W_UV.shape[2]] @ W_UV.mT  # (B, H, T, v)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def output_weight(self):
        """The output projection by head, (H, C, r + rope), for warm_start.py."""
        _, W_UV = self.up()
        W = self.o_proj.weight.unflatten(1, (len(W_UV), -1))  # (C, H, v)
        W = W.transpose(0, 1) @ W_UV
        return F.pad(W, (0, self.config.qk_rope_head_dim))
