"""Triton kernels. Each file is one kernel with its launcher and, first, the plain PyTorch function that it equals."""
