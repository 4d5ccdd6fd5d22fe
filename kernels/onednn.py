"""
Products of a model on a CPU, in float32, by oneDNN instead of MKL.

A decode step multiplies large weights by a few rows, so its time is that of reading the weights.
oneDNN reads them as fast as memory gives them; MKL, PyTorch's own choice for float32, takes two to
three times as long on some processors. load_model in checkpoint.py calls use_onednn. The result is
that of nn.Linear up to the order of its sums.
"""

import torch
import torch.nn as nn


class Linear(nn.Linear):
    def forward(self, x):
        # the operator has no gradient, and torch.compile cannot trace it
        is_plain = torch.is_grad_enabled() or torch.compiler.is_compiling()
        is_float32 = x.dtype == self.weight.dtype == torch.float32
        if is_plain or not is_float32 or not x.is_cpu:
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def use_onednn(model):
    """Let oneDNN compute the large nn.Linear layers of a model, in place."""
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # of a PyTorch that has oneDNN
        for module in model.modules():
            if type(module) is nn.Linear and module.weight.numel() >= 2**18:
                module.__class__ = Linear
