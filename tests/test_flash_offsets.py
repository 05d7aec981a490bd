"""Addresses past 2^31 elements: 32-bit offsets read elsewhere first, and crash later.

Seen in flash-linear-attention 1080, SageAttention 386 and sglang 20389.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

FAR = 2**31 + 64
CASES = {
    "far heads": ((2, 40), (FAR, 16)),
    "far rows": ((1, 40), (16, 2**26 + 16)),
}
CODE = """
import torch
from cs336_systems.attention.flash_triton import flash_attention_triton

def gradients(q, k, v, do, deterministic):
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    o = flash_attention_triton(*leaves, is_causal=True, deterministic=deterministic)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]

(heads, rows), (head_stride, row_stride), device = {arguments}
extent = (heads - 1) * head_stride + (rows - 1) * row_stride + 16
assert extent > 2**31
# Memory that is never touched is never made.
memory = torch.empty(extent, dtype=torch.float16, device=device)
far = memory.as_strided((1, heads, rows, 16), (0, head_stride, row_stride, 1))
generator = torch.Generator().manual_seed(0)
far.copy_(torch.randn(far.shape, generator=generator))
do = torch.randn(far.shape, generator=generator).to(device, torch.float16)
near = far.clone(memory_format=torch.contiguous_format)
for deterministic in (False, True):
    expected = gradients(near, near, near, do, deterministic)
    for q, k, v in ((far, far, far), (far, near, near), (near, far, near), (near, near, far)):
        got = gradients(q, k, v, do, deterministic)
        for mine, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-3)
print("right")
"""


@pytest.mark.parametrize("case", CASES)
def test_offsets_past_two_to_the_31(case: str) -> None:
    """In a process of its own, which a wrong address may end."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    code = CODE.format(arguments=(*CASES[case], device))
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"status {done.returncode}\n{done.stderr}"
    assert done.stdout.strip() == "right"
