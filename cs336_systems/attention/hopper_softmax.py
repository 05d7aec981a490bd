"""What the Hopper forward kernel does to rows of scores, a warpgroup's 64 at a time.

Four threads share a row; of every eight columns each holds two that are side by side.
"""

from __future__ import annotations

from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _larger(a, b):
    return gl.maximum(a, b)


@gluon.jit
def _chained_max(x, BLOCK_N: gl.constexpr):
    # Eight chains at first: one alone makes every comparison wait for the one before.
    x = x.reshape([64, 4, BLOCK_N // 32, 4, 2])
    x = gl.reduce(gl.reduce(gl.reduce(x, 2, _larger), 1, _larger), 2, _larger)
    return gl.reduce(x, 1, _larger)


@gluon.jit
def as_integers(x):
    """Return the bits of floats."""
    return x.to(gl.int32, bitcast=True)


@gluon.jit
def as_floats(bits):
    """Return the floats that have these bits."""
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def row_max(S, BLOCK_N: gl.constexpr, THREES: gl.constexpr):
    """Return each row's maximum.

    THREES: compare bits, for which the hardware has an instruction that takes three numbers. The
    order is that of floats unless all of a row are negative; then its least one is returned.
    """
    if THREES:
        return as_floats(_chained_max(as_integers(S), BLOCK_N))
    else:  # noqa: RET505 (else the compiler has two results of one function)
        return _chained_max(S, BLOCK_N)


@gluon.jit
def row_sum(P, BLOCK_N: gl.constexpr):
    """Return the sums of what each thread holds of a row; the four threads that share a row are
    added up once, at the end."""
    return gl.sum(gl.sum(P.reshape([64, BLOCK_N // 8, 4, 2]), 3), 1)


@gluon.jit
def rescale(l_i, alpha):
    """Return a thread's sums times its rows' factors."""
    inner: gl.constexpr = gl.SliceLayout(1, l_i.type.layout)
    return l_i * gl.convert_layout(alpha, inner)[:, None]


@constexpr_function
def _multiply_text(num):
    """Multiply if one of a thread's two rows, in any thread of the warp, has a factor other than 1.

    Operands: num products, which begin as the numbers themselves, and num factors.
    """
    one, other = 2 * num, 2 * num + 2  # Rows alternate by two.
    products = " ".join(f"mul.f32 ${at}, ${at}, ${2 * num + at};" for at in range(num))
    return (
        "{ .reg .pred p, q; "
        f"setp.neu.f32 p, ${one}, 0f3F800000; setp.neu.f32 q, ${other}, 0f3F800000; "
        "or.pred p, p, q; vote.sync.any.pred p, p, 0xffffffff; "
        f"@!p bra DONE; {products} DONE: }}"
    )


@constexpr_function
def _multiply_operands(num):
    return ",".join(["=f"] * num + [str(at) for at in range(num)] + ["f"] * num)


@gluon.jit
def times(acc, alpha, HEAD_DIM: gl.constexpr):
    """Return acc * alpha; warps whose alphas are all 1 jump over the products."""
    NUM: gl.constexpr = HEAD_DIM // 2  # a thread's share
    acc, alpha = gl.broadcast(acc, alpha)
    return gl.inline_asm_elementwise(
        _multiply_text(NUM),
        _multiply_operands(NUM),
        [acc, alpha],
        dtype=gl.float32,
        is_pure=False,
        pack=NUM,
    )
