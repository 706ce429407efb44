"""Tensors of safetensors files that hold a matrix per expert: Granite-MoE, gpt-oss.

Such a tensor is [X, out, in] in a file, and a parameter [X out, in] here: see moe.py. gpt-oss has
[X, in, out], gate and up in one tensor whose outputs alternate, g0 u0 g1 u1 ..., and weights of
four bits. The entries stacked, interleaved and mxfp4 of configs/families.yaml say which.
"""
import math

import torch


class StackedSlice:
    """A tensor of a safetensors file with all experts, read as [X out, in], or as [X out]."""

    def __init__(self, stored, tensor, family):
        self.stored = stored                 # of get_slice() of the file, or an Mxfp4Tensor
        self.get_dtype = stored.get_dtype
        self.transposed = "stacked_transposed" in family
        self.interleaved = tensor.endswith(tuple(family.get("interleaved", ())))

    def get_shape(self):
        X, *shape = self.stored.get_shape()
        if self.transposed:
            shape = shape[::-1]
        return [X * shape[0], *shape[1:]]

    def __getitem__(self, rows):
        """rows: a slice. Reads the experts that have some of these rows."""
        n_out = self.get_shape()[0] // self.stored.get_shape()[0]       # rows of an expert
        first_expert = rows.start // n_out
        end_expert = math.ceil(rows.stop / n_out)
        experts = self.stored[first_expert:end_expert]
        # [x, in, out]. Not transposed are a bias [x, out], and MXFP4 [x, out, in / 32, 17]
        if self.transposed and experts.dim() == 3:
            experts = experts.mT
        if self.interleaved:
            experts = torch.cat([experts[:, 0::2], experts[:, 1::2]], 1)
        first_row = first_expert * n_out
        part = experts.flatten(0, 1)[rows.start - first_row:rows.stop - first_row]
        is_mxfp4 = part.dim() == 3
        return decode_mxfp4(part) if is_mxfp4 else part


def stack(x, n_experts, tensor, family):
    """The inverse of StackedSlice: [X out, in] -> the tensor of a file."""
    x = x.unflatten(0, (n_experts, -1))
    if tensor.endswith(tuple(family.get("interleaved", ()))):
        gate, up = x.chunk(2, 1)
        x = torch.stack([gate, up], 2).flatten(1, 2)
    if "stacked_transposed" in family and x.dim() == 3:
        x = x.mT
    return x


# the values of 4-bit codes, the format E2M1 of MXFP4 (OCP Microscaling Formats, section 5.3.3)
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


class Mxfp4Tensor:
    """A tensor [X, in, out] that is stored in MXFP4, both as an open file and as its get_slice().

    A slice of it is encoded: [x, out, in / 32, 17], which StackedSlice decodes to bf16.

    blocks  uint8 [X, out, in / 32, 16], two codes each, the first in the lower 4 bits
    scales  uint8 [X, out, in / 32]: 32 values are multiplied by 2^(scale - 127)
    """

    def __init__(self, blocks, scales):
        self.blocks = blocks                 # get_slice() of the files
        self.scales = scales

    def get_slice(self, tensor):
        return self

    def get_dtype(self):
        return "BF16"

    def get_shape(self):
        X, n_out, n_blocks, n_bytes = self.blocks.get_shape()
        return [X, n_blocks * n_bytes * 2, n_out]

    def __getitem__(self, experts):                                        # [x, out, in / 32, 17]
        return torch.cat([self.blocks[experts], self.scales[experts][..., None]], -1)


def decode_mxfp4(encoded):
    """uint8 [rows, n, 17], blocks and scales -> bf16 [rows, 32 n]"""
    pairs = encoded[..., :16]
    codes = torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2)                  # [rows, n, 32]
    values = torch.tensor(FP4 + [-value for value in FP4])[codes.int()]
    exponents = encoded[..., 16:].int() - 127
    return torch.ldexp(values, exponents).flatten(1).bfloat16()


def open_mxfp4(files):
    """{tensor: open file}. Each pair NAME_blocks and NAME_scales appears as one tensor, NAME."""
    opened = dict(files)
    for tensor in files:
        name = tensor.removesuffix("_blocks")
        if name != tensor and f"{name}_scales" in files:
            blocks = opened.pop(tensor).get_slice(tensor)
            scales = opened.pop(f"{name}_scales").get_slice(f"{name}_scales")
            opened[name] = Mxfp4Tensor(blocks, scales)
    return opened
