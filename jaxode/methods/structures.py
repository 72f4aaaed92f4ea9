"""Jacobians that are known to be 0 in most places: their structure, as a value."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxode.methods.linear import Linear, by_rows, numpy_or_jax
from jaxode.tree import known


@dataclasses.dataclass(frozen=True)
class Diagonal(Linear):
    """A Jacobian without entries off its diagonal: every number of the state has an equation of its own.

    One derivative of f in all directions at once. Entries off the diagonal would be added to it.
    """

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

    def matrix(self, entries):
        n, place = len(entries), np.arange(self.width)[None, :]
        if entries.ndim == 1:
            return numpy_or_jax(entries).where(place == self.lower, entries[:, None], 0)
        column, there = self.columns(n)
        inside = np.zeros((n, n), bool)
        inside[np.nonzero(there)[0], column[there]] = True
        outside(self, entries, ~inside)
        rows = np.arange(n)[:, None]
        return numpy_or_jax(entries).where(there, entries[rows, np.clip(column, 0, n - 1)], 0)

    def shifted(self, jacobian, w, mass=None):
        if mass is None:
            one = np.arange(self.width) == self.lower
            mass = np.asarray(one, jacobian.dtype)[None, :]
        return mass - by_rows(w, jacobian)

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


def outside(linear: Linear, entries, where) -> None:
    """Raise if a matrix has entries where this structure has none; as far as they are known."""
    if known(entries) and np.any(np.asarray(entries)[where]):
        raise ValueError(
            f"a matrix has entries that {linear} leaves out: choose a wider structure, or Dense()."
        )
