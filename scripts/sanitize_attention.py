"""Run the Hopper kernels on small shapes that straddle their tiles, for NVIDIA's memory checkers:

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck python3 scripts/sanitize_attention.py
    compute-sanitizer --tool racecheck python3 scripts/sanitize_attention.py

With that variable every tensor is an allocation of its own, so that a step past its end is seen.
Results are held to the portable kernels', so that a run in which nothing ran does not pass.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
from torch import Tensor

from cs336_systems.attention.flash_hopper import flash_attention_hopper
from cs336_systems.attention.flash_triton import flash_attention_triton

_UNCACHED = "PYTORCH_NO_CUDA_MEMORY_CACHING"
# Heads, heads of keys, queries, keys: a tile of one, odd counts, tails, grouped heads, more of
# either than of the other.
SHAPES = ((1, 1, 1, 1), (2, 1, 193, 193), (2, 2, 65, 449), (4, 2, 300, 129))


def results(attend: object, inputs: list[Tensor], grad: Tensor, causal: bool) -> list[Tensor]:
    """Return the output and the three gradients."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    o = attend(*leaves, is_causal=causal)  # type: ignore[operator]
    return [o.detach(), *torch.autograd.grad(o, leaves, grad)]


def main() -> int:
    """Return 0 where all results agree; raise where they do not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes")
    options = parser.parse_args()
    if not os.environ.get(_UNCACHED):
        print(f"sanitize_attention: {_UNCACHED} must be 1, got nothing", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    ran = 0
    for head_dim in options.head_dims:
        for heads, kv_heads, num_queries, num_keys in SHAPES[: options.shapes]:
            sizes = ((heads, num_queries), (kv_heads, num_keys), (kv_heads, num_keys))
            inputs = [
                torch.randn(1, *size, head_dim, device="cuda", dtype=torch.bfloat16)
                for size in sizes
            ]
            grad = torch.randn_like(inputs[0])
            for causal in (True, False):
                ours = results(flash_attention_hopper, inputs, grad, causal)
                others = results(flash_attention_triton, inputs, grad, causal)
                for one, other in zip(ours, others, strict=True):
                    torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
                ran += 1
    torch.cuda.synchronize()
    print(f"sanitize_attention: {ran} cases agree with the portable kernels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
