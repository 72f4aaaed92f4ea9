"""Block tridiagonal systems, many rows at a time: by partition.

The block rows are cut into pieces, as many as each has rows. The last row of each is kept; all others are
eliminated in every piece at once, one after another along the piece, which leaves a block tridiagonal
system for the rows that were kept; these are eliminated in turn (Wang 1981, A parallel method for
tridiagonal equations; Polizzi and Sameh 2006, SPIKE). Three times the operations of plain elimination, but
each is one of vectors as long as there are pieces. A solve of the Brusselator on a line by rodas4, 51
steps, takes 9 ms for 1,000 numbers and 157 for 10,000; with rows one after another 74 and 657 (November
2026).

Pivots are exchanged inside of blocks only. That is stable for a matrix whose symmetric part is positive
definite, as I - w df/dy is where f is dissipative; whoever uses it has to look at a residual.

A matrix is (L, D, U), arrays of shape (b, b, rows): L x_(i-1) + D x_i + U x_(i+1) = b_i.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

FEW = 24  # block rows that are eliminated one after another


def times(a, b) -> Any:
    """Products of blocks, along the last axis: of (i, k, n) and (k, j, n)."""
    return sum(a[:, k, None, :] * b[None, k, :, :] for k in range(a.shape[1]))


def applied(a, x) -> Any:
    """Products of blocks (i, k, n) and vectors (k, n)."""
    return sum(a[:, k, :] * x[None, k, :] for k in range(a.shape[1]))


def inverse(a):
    """Inverses of blocks, by Gauss and Jordan with partial pivoting."""
    b = len(a)
    one = jnp.broadcast_to(jnp.asarray(np.eye(b, dtype=a.dtype))[:, :, None], a.shape)
    rows = list(jnp.concatenate([a, one], 1))
    for k in range(b):
        for i in range(k + 1, b):
            larger = lax.abs(rows[i][k]) > lax.abs(rows[k][k])
            choose = lambda x, y: jnp.where(larger[None, :], x, y)  # noqa: B023
            rows[k], rows[i] = choose(rows[i], rows[k]), choose(rows[k], rows[i])
        rows[k] = rows[k] / rows[k][k : k + 1]
        rows = [row if i == k else row - row[k : k + 1] * rows[k] for i, row in enumerate(rows)]
    return lax.optimization_barrier(jnp.stack(rows)[:, b:])


def factored(L, D, U):
    """What `solved` needs."""
    if D.shape[-1] <= FEW:
        return in_turn(L, D, U)
    L, D, U = cut(L, 0), cut(D, np.eye(D.shape[0])), cut(U, 0)
    # Of the rows inside the pieces: those before the last.
    inner = L[:-1], D[:-1], U[:-1]
    zero = jnp.zeros_like(D[0])
    _, (inverses, lower, upper) = lax.scan(eliminate, zero, inner)
    minus = zero - jnp.asarray(np.eye(D.shape[1], dtype=D.dtype))[:, :, None]

    def left(a, given):
        inv, low = given
        a = -times(times(inv, low), a)
        return a, a

    def right(carry, given):
        a, c = given
        a, b = a - times(c, carry[0]), -times(c, carry[1])
        return (a, b), (a, b)

    _, spikes = lax.scan(left, minus, (inverses, lower))
    _, (A, B) = lax.scan(right, (zero, minus), (spikes, upper), reverse=True)
    L1, D1, U1 = L[-1], D[-1], U[-1]
    after = lambda x: shifted(x, 1)
    kept = (
        -times(L1, A[-1]),
        D1 - times(L1, B[-1]) - times(U1, after(A[0])),
        -times(U1, after(B[0])),
    )
    return (inverses, lower, upper, A, B, L1, U1), in_turn(*lax.optimization_barrier(kept))


def in_turn(L, D, U):
    """The same of few rows, which are one piece."""
    return lax.scan(eliminate, jnp.zeros_like(D[..., :1]), along((L, D, U)))[1]


def eliminate(c, given):
    """One row: with the row before solved for, x_(i-1) = ... - c x_i."""
    low, d, up = given
    inv = inverse(d - times(low, c))
    c = times(inv, up)
    return c, (inv, low, c)


def solved(factors, b):
    """x, of shape (b, rows)."""
    if len(factors) == 3:
        return solved_in_turn(factors, b)
    (inverses, lower, upper, A, B, L1, U1), rest = factors
    rows, b = b.shape[-1], cut(b, 0)
    g = sweeps(inverses, lower, upper, b[:-1])
    right = b[-1] - applied(L1, g[-1]) - applied(U1, shifted(g[0], 1))
    kept = solved_in_turn(rest, right)
    before = shifted(kept, -1)
    product = lambda a, x: sum(a[:, :, k] * x[None, None, k] for k in range(a.shape[2]))
    inside = g - product(A, before) - product(B, kept)
    x = jnp.concatenate([inside, kept[None]])
    return jnp.moveaxis(x, 0, -1).reshape(*x.shape[1:-1], -1)[..., :rows]


def solved_in_turn(factors, b):
    return jnp.moveaxis(sweeps(*factors, *along((b,)))[..., 0], 0, -1)


def sweeps(inverses, lower, upper, b):
    """Forwards and backwards along the pieces."""

    def forwards(g, given):
        inv, low, b = given
        g = applied(inv, b - applied(low, g))
        return g, g

    def backwards(x, given):
        c, g = given
        x = g - applied(c, x)
        return x, x

    zero = jnp.zeros_like(b[0])
    _, g = lax.scan(forwards, zero, (inverses, lower, b))
    return lax.scan(backwards, zero, (upper, g), reverse=True)[1]


def cut(x, filler):
    """(..., rows) as (PIECE, ..., pieces), with rows of the identity at the end."""
    rows = x.shape[-1]
    length = math.isqrt(rows)
    pieces = -(-rows // length)
    more = pieces * length - rows
    if more:
        fill = np.broadcast_to(
            np.asarray(filler, x.dtype)[..., None] if np.ndim(filler) else filler,
            (*x.shape[:-1], more),
        )
        x = jnp.concatenate([x, jnp.asarray(fill, x.dtype)], -1)
    return jnp.moveaxis(x.reshape(*x.shape[:-1], pieces, length), -1, 0)


def shifted(x, by: int):
    """What stands beside, along the last axis: 0 beyond the ends."""
    none = jnp.zeros_like(x[..., :1])
    return jnp.concatenate([x[..., 1:], none] if by > 0 else [none, x[..., :-1]], -1)


def along(xs):
    """(..., rows) as (rows, ..., 1): one piece."""
    return tuple(jnp.moveaxis(x, -1, 0)[..., None] for x in xs)
