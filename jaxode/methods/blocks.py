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

A matrix is (L, D, U), arrays of shape (length, b, b, pieces) with L x_(i-1) + D x_i + U x_(i+1) = b_i; block
row i of n is row i % length of piece i // length. A vector has shape (length, b, pieces).
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

FEWEST = 48  # block rows of a system that is worth it


def laid_out(x, size: int, filler=0.0):
    """A vector of n numbers as one of pieces, with numbers more at the end to fill the last one."""
    rows = -(-len(x) // size)
    length = math.isqrt(rows)
    pieces = -(-rows // length)
    x = jnp.pad(x, (0, pieces * length * size - len(x)), constant_values=filler)
    return jnp.transpose(x.reshape(pieces, length, size), (1, 2, 0))


def flat(x, n: int):
    """The n numbers of a vector of pieces."""
    return jnp.transpose(x, (2, 0, 1)).reshape(-1)[:n]


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
    zero = jnp.zeros_like(D[0])
    minus = zero - jnp.asarray(np.eye(D.shape[1], dtype=D.dtype))[:, :, None]
    # Inside of a piece x_i = g_i - A_i (the row kept before) - B_i (its own row that is kept).
    _, (inverses, upper, spikes) = lax.scan(eliminate, (zero, minus), (L[:-1], D[:-1], U[:-1]))

    def backwards(carry, given):
        a, c = given
        found = a - times(c, carry[0]), -times(c, carry[1])
        return found, found

    _, (A, B) = lax.scan(backwards, (zero, minus), (spikes, upper), reverse=True)
    L1, U1 = L[-1], U[-1]
    kept = (
        -times(L1, A[-1]),
        D[-1] - times(L1, B[-1]) - times(U1, shifted(A[0], 1)),
        -times(U1, shifted(B[0], 1)),
    )
    rest = in_turn(lax.optimization_barrier(kept))
    alone = jnp.zeros_like(rest[0][0])
    _, (inverses1, upper1, _) = lax.scan(eliminate, (alone, alone), rest)
    return (inverses, L, upper), (A, B, L1, U1), (inverses1, rest[0], upper1)


def eliminate(carry, given):
    """One row, where those before are solved for: x_i = ... - c x_(i+1) - a (what was before all)."""
    c, a = carry
    low, d, up = given
    inv = inverse(d - times(low, c))
    c, a = times(inv, up), -times(inv, times(low, a))
    return (c, a), (inv, c, a)


def solved(factors, b):
    """x."""
    inside, (A, B, L1, U1), rest = factors
    g = sweeps(inside, b[:-1])
    right = b[-1] - applied(L1, g[-1]) - applied(U1, shifted(g[0], 1))
    (right,) = in_turn((right,))
    kept = jnp.moveaxis(sweeps(rest, right)[..., 0], 0, -1)
    before = shifted(kept, -1)
    product = lambda a, x: sum(a[:, :, k] * x[None, None, k] for k in range(a.shape[2]))
    return jnp.concatenate([g - product(A, before) - product(B, kept), kept[None]])


def sweeps(factors, b):
    """Forwards and backwards along the pieces."""
    inverses, lower, upper = factors

    def forwards(g, given):
        inv, low, b = given
        g = applied(inv, b - applied(low, g))
        return g, g

    def backwards(x, given):
        c, g = given
        x = g - applied(c, x)
        return x, x

    zero = jnp.zeros_like(b[0])
    _, g = lax.scan(forwards, zero, (inverses, lower[: len(b)], b))
    return lax.scan(backwards, zero, (upper, g), reverse=True)[1]


def shifted(x, by: int):
    """What stands beside, along the last axis: 0 beyond the ends."""
    none = jnp.zeros_like(x[..., :1])
    return jnp.concatenate([x[..., 1:], none] if by > 0 else [none, x[..., :-1]], -1)


def in_turn(xs):
    """Arrays of pieces (..., pieces) as rows of one piece: (pieces, ..., 1)."""
    return tuple(jnp.moveaxis(x, -1, 0)[..., None] for x in xs)
