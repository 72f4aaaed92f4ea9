"""The linear algebra of implicit methods, as values: the Jacobian df/dy, and (I - w df/dy) x = b.

A method asks for `solver(linear, f, y, w)`. What is differentiated is the solution, by the implicit
function: with W x = b, W dx = db - dW x, in forward mode, and its transpose in reverse mode. Nothing
ever goes through the elimination; its factors serve both.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import jax.scipy.linalg
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import tree

WRITTEN_OUT = 4  # rows of a matrix up to which the elimination is written out, number by number
LOOPED = 64  # rows up to which it is a loop, which fits into one call; a library is faster above


class Linear:
    """The structure of df/dy: a hashable value, how it is found, and how systems with it are solved.

    A matrix is an array in a form of its own. The five functions are of vectors of one solve.
    """

    def jacobian(self, f, y: Array) -> Array:
        """df/dy at y."""
        raise NotImplementedError

    def shifted(self, jacobian: Array, w) -> Array:
        """I - w df/dy."""
        raise NotImplementedError

    def product(self, matrix: Array, x: Array) -> Array:
        """The matrix times x."""
        raise NotImplementedError

    def factor(self, matrix: Array) -> PyTree:
        """What `substitute` needs. Never differentiated."""
        raise NotImplementedError

    def substitute(self, factors: PyTree, b: Array) -> Array:
        """x with matrix x = b: linear in b, of operations that JAX can transpose."""
        raise NotImplementedError


def solver(linear: Linear, jacobian: Array, w):
    """b -> x with (I - w df/dy) x = b, factored once."""
    matrix = linear.shifted(jacobian, w)
    factors = linear.factor(lax.stop_gradient(matrix))
    times = partial(linear.product, matrix)
    substitute = partial(linear.substitute, factors)

    def solve(b):
        # A rule of JAX that stays one when it is transposed: so second derivatives are right, too.
        back = lambda _, b: jax.linear_transpose(substitute, b)(b)[0]
        return lax.custom_linear_solve(times, b, lambda _, b: substitute(b), back)

    return solve


@dataclasses.dataclass(frozen=True)
class Dense(Linear):
    """Any Jacobian: n derivatives of f, and Gaussian elimination with partial pivoting."""

    def jacobian(self, f, y):
        return jax.jacfwd(f)(y)

    def shifted(self, jacobian, w):
        return np.eye(len(jacobian), dtype=jacobian.dtype) - tree.scale(w, jacobian)

    def product(self, matrix, x):
        return jnp.sum(matrix * x[None, :], 1)

    def factor(self, matrix):
        if len(matrix) <= WRITTEN_OUT:
            return eliminated(matrix)
        if len(matrix) <= LOOPED:
            return eliminated_in_a_loop(matrix)
        return jax.scipy.linalg.lu_factor(matrix)

    def substitute(self, factors, b):
        if len(b) <= WRITTEN_OUT:
            return substituted(factors, b)
        if len(b) <= LOOPED:
            return substituted_in_a_loop(factors, b)
        return jax.scipy.linalg.lu_solve(factors, b)


def eliminated(matrix):
    """The factors of a small matrix, number by number: nothing is moved in memory, alone and in lanes.

    Partial pivoting by choices: each row below takes the place of the pivot if its entry is larger.
    """
    n = len(matrix)
    a = [[matrix[i, j] for j in range(n)] for i in range(n)]
    swaps, inverses = [], []
    for k in range(n):
        for i in range(k + 1, n):
            larger = lax.abs(a[i][k]) > lax.abs(a[k][k])
            swaps.append(larger)
            pairs = [exchanged(larger, x, y) for x, y in zip(a[k], a[i])]
            a[k], a[i] = [x for x, _ in pairs], [y for _, y in pairs]
        inverses.append(1 / a[k][k])
        for i in range(k + 1, n):
            a[i][k] = a[i][k] * inverses[k]
            for j in range(k + 1, n):
                a[i][j] = a[i][j] - a[i][k] * a[k][j]
    return a, inverses, swaps


def substituted(factors, b):
    a, inverses, swaps = factors
    n, swaps = len(a), iter(swaps)
    x = [b[i] for i in range(n)]
    for k in range(n):
        for i in range(k + 1, n):
            x[k], x[i] = exchanged(next(swaps), x[k], x[i])
    for i in range(n):
        for j in range(i):
            x[i] = x[i] - a[i][j] * x[j]
    for i in reversed(range(n)):
        for j in range(i + 1, n):
            x[i] = x[i] - a[i][j] * x[j]
        x[i] = x[i] * inverses[i]
    return jnp.stack(x)


def exchanged(change, x, y):
    return lax.select(change, y, x), lax.select(change, x, y)


def eliminated_in_a_loop(matrix):
    """U, and L^-1 P: [A | I] eliminated with partial pivoting, a column at a time."""
    n = len(matrix)
    i, one = np.arange(n, dtype=np.int32), np.eye(n, dtype=matrix.dtype)

    def column(k, carry):
        at_k, below = i == k, i > k
        entries = lax.dynamic_index_in_dim(carry[0], k, 1, False)
        p = lax.argmax(jnp.where(below | at_k, lax.abs(entries), -1), 0, jnp.int32)
        at_p = i == p

        def pivoted(a):
            row_p = jnp.sum(jnp.where(at_p[:, None], a, 0), 0, keepdims=True)
            row_k = lax.dynamic_index_in_dim(a, k, 0)
            return jnp.where(at_k[:, None], row_p, jnp.where(at_p[:, None], row_k, a))

        u, x = lax.optimization_barrier(tuple(map(pivoted, carry)))
        entries = lax.dynamic_index_in_dim(u, k, 1, False)
        pivot = lax.dynamic_index_in_dim(entries, k, 0)
        m = jnp.where(below, entries / pivot, 0)[:, None]
        return tuple(a - m * lax.dynamic_index_in_dim(a, k, 0) for a in (u, x))

    return lax.fori_loop(0, n, column, (matrix, jnp.asarray(one) + 0 * matrix[:1]))


def substituted_in_a_loop(factors, b):
    """By sums with a mask where b is read: the transpose of an index would be a scatter in lanes."""
    u, x = factors
    n = len(b)
    i = np.arange(n, dtype=np.int32)

    def column(b, given):
        k, entries = given
        at_k = i == k
        value, pivot = (jnp.sum(jnp.where(at_k, x, 0), keepdims=True) for x in (b, entries))
        value = value / pivot
        return jnp.where(at_k, value, b - jnp.where(i < k, entries, 0) * value), None

    return lax.scan(column, jnp.sum(x * b[None, :], 1), (jnp.asarray(i), u.T), reverse=True)[0]


@dataclasses.dataclass(frozen=True)
class Diagonal(Linear):
    """A Jacobian without entries off its diagonal: every number of the state has an equation of its own.

    One derivative of f in all directions at once. Entries off the diagonal would be added to it.
    """

    def jacobian(self, f, y):
        return jax.jvp(f, (y,), (jnp.ones_like(y),))[1]

    def shifted(self, jacobian, w):
        return jnp.ones_like(jacobian) - tree.scale(w, jacobian)

    def product(self, matrix, x):
        return matrix * x

    def factor(self, matrix):
        return matrix

    def substitute(self, factors, b):
        return b / factors


@dataclasses.dataclass(frozen=True)
class Banded(Linear):
    """A Jacobian with `lower` diagonals below the main one, and `upper` above it.

    As of a differential equation on a line, its components next to each other. lower + upper + 1
    derivatives of f, each in the direction of every (lower + upper + 1)-th number; entries outside of
    the band would be added to those inside. Elimination with partial pivoting, row after row.

    Row i of a matrix is its entries from column i - lower to i + upper.
    """

    lower: int
    upper: int

    def __post_init__(self):
        for name in ("lower", "upper"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(
                    f"`{name}` of Banded must be a whole number, 0 or more; got {value!r}."
                )

    @property
    def width(self) -> int:
        return self.lower + self.upper + 1

    def columns(self, n: int):
        """Which column each entry is of, and whether there is one."""
        column = np.arange(n)[:, None] + np.arange(-self.lower, self.upper + 1)[None, :]
        return column, (column >= 0) & (column < n)

    def jacobian(self, f, y):
        n = len(y)
        column, there = self.columns(n)
        seeds = np.arange(n)[None, :] % self.width == np.arange(self.width)[:, None]
        push = lambda seed: jax.jvp(f, (y,), (seed,))[1]
        found = jax.vmap(push, out_axes=1)(jnp.asarray(seeds, y.dtype))
        # Column j is in the derivative j mod width: for each of them every width-th row is alike.
        picked = jnp.stack(
            [
                sum(
                    jnp.where(column[:, d] % self.width == e, found[:, e], 0)
                    for e in range(self.width)
                )
                for d in range(self.width)
            ],
            axis=1,
        )
        return jnp.where(there, picked, 0)

    def shifted(self, jacobian, w):
        one = np.arange(self.width) == self.lower
        return np.asarray(one, jacobian.dtype)[None, :] - tree.scale(w, jacobian)

    def product(self, matrix, x):
        n = len(x)
        wide = jnp.pad(x, (self.lower, self.upper))
        return sum(matrix[:, d] * lax.slice_in_dim(wide, d, d + n) for d in range(self.width))  # type: ignore[return-value]

    def factor(self, matrix):
        """For each column the rows of U, the multipliers, and which row was its pivot.

        A window holds the lower + 1 rows that can have an entry in this column; a row of U has
        lower + upper + lower + 1 entries at most, because of pivoting.
        """
        lower, width = self.lower, self.width + self.lower
        rows = [jnp.pad(matrix, ((0, lower), (0, 0)))[i] for i in range(lower)]
        # Row i begins at column i - lower: here those before the window's first column are left out.
        first = [
            jnp.pad(row[lower - i :], (0, width - self.width + lower - i))
            for i, row in enumerate(rows)
        ]
        entering = jnp.concatenate([matrix[lower:], jnp.zeros((lower, self.width), matrix.dtype)])
        place = np.arange(lower + 1, dtype=np.int32)

        def column(window, row):
            window = jnp.concatenate([window, jnp.pad(row, (0, lower))[None]])
            p = lax.argmax(lax.abs(window[:, 0]), 0, jnp.int32)
            at_p = place == p
            top = jnp.sum(jnp.where(at_p[:, None], window, 0), 0)
            rest = jnp.where(at_p[:, None], window[0], window)[1:]
            m = rest[:, 0] / top[0]
            rest = rest - m[:, None] * top[None, :]
            return jnp.pad(rest[:, 1:], ((0, 0), (0, 1))), (top, m, p)

        empty = jnp.zeros((0, width), matrix.dtype)
        return lax.scan(column, jnp.stack(first) if first else empty, entering)[1]

    def substitute(self, factors, b):
        lower, reach = self.lower, self.width + self.lower - 1
        place = np.arange(lower + 1, dtype=np.int32)

        def forwards(window, given):
            (m, p), entry = given
            window = jnp.concatenate([window, entry[None]])
            at_p = place == p
            top = jnp.sum(jnp.where(at_p, window, 0))
            return jnp.where(at_p, window[0], window)[1:] - m * top, top

        def backwards(window, given):
            row, entry = given
            x = (entry - jnp.sum(row[1:] * window)) / row[0]
            return jnp.concatenate([x[None], window])[:reach], x

        top, m, p = factors
        entering = jnp.concatenate([b[lower:], jnp.zeros(lower, b.dtype)])
        first = jnp.pad(b[:lower], (0, max(0, lower - len(b))))
        _, y = lax.scan(forwards, first, ((m, p), entering))
        _, x = lax.scan(backwards, jnp.zeros(reach, b.dtype), (top, y), reverse=True)
        return x


DENSE = Dense()
