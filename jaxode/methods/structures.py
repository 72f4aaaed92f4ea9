"""Jacobians that are known to be 0 in most places: their structure, as a value."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxode import tree
from jaxode.methods import blocks
from jaxode.methods.linear import DENSE, Linear, by_rows, numpy_or_jax

WIDEST = 4  # numbers of a block, up to which systems are solved by blocks


@dataclasses.dataclass(frozen=True)
class Diagonal(Linear):
    """A Jacobian without entries off its diagonal: every number of the state has an equation of its own.

    One derivative of f in all directions at once. Entries off the diagonal would be added to it.
    """

    def of_stages(self, count):
        return BlockDiagonal(count) if count > 1 else self

    def in_numbers(self):
        return self

    def jacobian(self, f, y):
        return jax.jvp(f, (y,), (jnp.ones_like(y),))[1]

    def matrix(self, entries):
        if entries.ndim == 1:
            return entries
        outside(self, entries, ~np.eye(len(entries), dtype=bool))
        return numpy_or_jax(entries).diagonal(entries)

    def shifted(self, jacobian, w, mass=None):
        mass = jnp.ones_like(jacobian) if mass is None else mass
        return mass - by_rows(w, jacobian)

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

    A matrix is its diagonals, from the lowest on: arrays of n numbers, 0 where there is no column.
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

    def of_stages(self, count):
        more = count - 1
        return Banded(count * self.lower + more, count * self.upper + more)

    @property
    def width(self) -> int:
        return self.lower + self.upper + 1

    def columns(self, n: int):
        """Which column each entry of each diagonal is of, and whether there is one."""
        column = np.arange(n)[None, :] + np.arange(-self.lower, self.upper + 1)[:, None]
        return column, (column >= 0) & (column < n)

    def jacobian(self, f, y):
        column, there = self.columns(len(y))
        color = np.arange(len(y)) % self.width
        found = derivatives(f, y, color)
        # Column j is in the derivative j mod width: for each of them every width-th row is alike.
        picked = lambda column: sum(
            jnp.where(column % self.width == e, found[e], 0) for e in range(self.width)
        )
        return tuple(jnp.where(there, picked(column), 0) for column, there in zip(column, there))

    def matrix(self, entries):
        n, module = len(entries), numpy_or_jax(entries)
        if entries.ndim == 1:
            zero = module.zeros_like(entries)
            return tuple(entries if d == self.lower else zero for d in range(self.width))
        column, there = self.columns(n)
        inside = np.zeros((n, n), bool)
        inside[np.nonzero(there)[1], column[there]] = True
        outside(self, entries, ~inside)
        place = np.clip(column, 0, n - 1)
        return tuple(
            module.where(there[d], entries[np.arange(n), place[d]], 0) for d in range(self.width)
        )

    def shifted(self, jacobian, w, mass=None):
        if mass is None:
            mass = self.matrix(np.ones(len(jacobian[0]), jacobian[0].dtype))
        return tuple(m - by_rows(w, j) for m, j in zip(mass, jacobian))

    def product(self, matrix, x):
        n = len(x)
        wide = jnp.pad(x, (self.lower, self.upper))
        return sum(m * lax.slice_in_dim(wide, d, d + n) for d, m in enumerate(matrix))  # type: ignore[return-value]

    def factor(self, matrix):
        """By blocks, and row after row with pivoting only where that is not accurate."""
        if not self.by_blocks(len(matrix[0])):
            return eliminated(self, matrix)
        found = blocks.factored(*self.blocks(matrix))
        by_found = partial(self.solved_by_blocks, found)
        fine = is_accurate(self, matrix, by_found, len(matrix[0]))
        return found, fine, tree.where_needed(~fine, lambda: eliminated(self, matrix))

    def substitute(self, factors, b):
        if not self.by_blocks(len(b)):
            return substituted(self, factors, b)
        found, fine, other = factors
        return lax.cond(
            fine, partial(self.solved_by_blocks, found), partial(substituted, self, other), b
        )

    def by_blocks(self, n: int) -> bool:
        """Whether there are rows enough, and blocks small enough."""
        size = self.size
        return size <= WIDEST and n >= blocks.FEWEST * size

    @property
    def size(self) -> int:
        """Of the blocks of a block tridiagonal matrix that has all entries of the band."""
        return max(self.lower, self.upper, 1)

    def blocks(self, matrix):
        """The same matrix as blocks, with rows of the identity at the end."""
        b = self.size
        fill = lambda d: 1.0 if d == self.lower else 0.0
        rows = [blocks.laid_out(m, b, fill(d)) for d, m in enumerate(matrix)]

        def entry(i, j, d):
            place = d * b + j - i + self.lower
            return rows[place][:, i] if 0 <= place < self.width else jnp.zeros_like(rows[0][:, 0])

        def block(d):
            of_row = lambda i: jnp.stack([entry(i, j, d) for j in range(b)], 1)
            return jnp.stack([of_row(i) for i in range(b)], 1)

        return block(-1), block(0), block(1)

    def solved_by_blocks(self, found, b):
        """x of A x = b, from the factors of A's blocks."""
        return blocks.flat(blocks.solved(found, blocks.laid_out(b, self.size)), len(b))


@dataclasses.dataclass(frozen=True)
class BlockDiagonal(Linear):
    """A Jacobian of equal blocks on the diagonal: systems of `size` equations that stand beside each other.

    As of one cell, or one reaction, for each point. `size` derivatives of f; entries outside of the
    blocks would be added to those inside.

    A matrix has shape (size, size, blocks).
    """

    size: int

    def __post_init__(self):
        if not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"`size` of BlockDiagonal must be 1 or more; got {self.size!r}.")

    def of_stages(self, count):
        return BlockDiagonal(count * self.size)

    def count(self, n: int) -> int:
        """How many blocks a state of n numbers has."""
        if n % self.size:
            raise ValueError(f"{self} is not of a state of {n} numbers: they are no whole blocks.")
        return n // self.size

    def jacobian(self, f, y):
        count = self.count(len(y))
        found = derivatives(f, y, np.arange(len(y)) % self.size)
        return jnp.transpose(found.reshape(self.size, count, self.size), (2, 0, 1))

    def matrix(self, entries):
        n, module = len(entries), numpy_or_jax(entries)
        one = np.eye(self.size, dtype=entries.dtype)[:, :, None]
        if entries.ndim == 1:
            return one * entries.reshape(1, -1, self.size).transpose(0, 2, 1)
        block = np.arange(n) // self.size
        outside(self, entries, block[:, None] != block[None, :])
        place = np.arange(self.count(n))
        blocks = entries.reshape(len(place), self.size, len(place), self.size)[place, :, place, :]
        return module.moveaxis(blocks, 0, -1)

    def shifted(self, jacobian, w, mass=None):
        if mass is None:
            mass = np.eye(self.size, dtype=jacobian.dtype)[:, :, None]
        rows = w if jnp.ndim(w) == 0 else w.reshape(-1, 1, self.size).transpose(2, 1, 0)
        return mass - rows * jacobian if jnp.ndim(w) else mass - by_rows(w, jacobian)

    def product(self, matrix, x):
        return jnp.sum(matrix * self.columns(x)[None], 1).T.reshape(-1)

    def factor(self, matrix):
        return jax.vmap(DENSE.factor, -1, -1)(matrix)

    def substitute(self, factors, b):
        return jax.vmap(DENSE.substitute, -1, -1)(factors, self.columns(b)).T.reshape(-1)

    def columns(self, x):
        """A column for each block, of its part of x."""
        return x.reshape(-1, self.size).T


def derivatives(f, y, color) -> Array:
    """For every color the derivative of f in the direction of all numbers of that color together."""
    seeds = np.arange(max(color) + 1)[:, None] == color[None, :]
    # A barrier, so that XLA does not spend seconds on products with these constants.
    seeds = lax.optimization_barrier(jnp.asarray(seeds, y.dtype))
    return jax.vmap(lambda seed: jax.jvp(f, (y,), (seed,))[1])(seeds)


def is_accurate(linear: Linear, matrix, solve, n: int) -> Array:
    """Whether `solve` is backward stable, with a right side of n numbers without an order."""
    dtype = jax.tree.leaves(matrix)[0].dtype
    b = jnp.asarray(np.random.default_rng(0).normal(size=n), dtype)
    x = solve(b)
    off = lax.abs(linear.product(matrix, x) - b)
    scale = linear.product(jax.tree.map(lax.abs, matrix), lax.abs(x)) + lax.abs(b)
    return jnp.all(off <= float(jnp.finfo(dtype).eps) ** 0.75 * scale)


def outside(linear: Linear, entries, where) -> None:
    """Raise if a matrix has entries where this structure has none; as far as they are known."""
    if tree.known(entries) and np.any(np.asarray(entries)[where]):
        raise ValueError(
            f"a matrix has entries that {linear} leaves out: choose a wider structure, or Dense()."
        )


def eliminated(band: "Banded", matrix):
    """For each column the rows of U, the multipliers, and which row was its pivot.

    A window holds the lower + 1 rows that can have an entry in this column; a row of U has
    lower + upper + lower + 1 entries at most, because of pivoting.
    """
    lower, width = band.lower, band.width + band.lower
    matrix = jnp.stack(matrix, 1)
    rows = [jnp.pad(matrix, ((0, lower), (0, 0)))[i] for i in range(lower)]
    # Row i begins at column i - lower: here those before the window's first column are left out.
    first = [
        jnp.pad(row[lower - i :], (0, width - band.width + lower - i)) for i, row in enumerate(rows)
    ]
    entering = jnp.concatenate([matrix[lower:], jnp.zeros((lower, band.width), matrix.dtype)])
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


def substituted(band: "Banded", factors, b):
    lower, reach = band.lower, band.width + band.lower - 1
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
