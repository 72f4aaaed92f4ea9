"""A Jacobian of any pattern: found by few derivatives, and solved with as a narrow band."""

import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxode.methods.linear import Linear, by_rows, numpy_or_jax
from jaxode.methods.structures import Banded, derivatives, is_accurate, outside
from jaxode.tree import matmul

NARROW = 4  # entries beside the diagonal up to which a band is solved with by `Banded`


class Sparse(Linear):
    """A Jacobian whose entries are where a pattern says: the diagonal, and (row, column) of any others.

    Columns that share no row are found by one derivative of f together (Curtis, Powell and Reid 1974, with
    greedy coloring). Systems are solved in the order of Cuthill and McKee (1969), reversed, in which
    entries are near the diagonal: a narrow band as `Banded`, a wide one by blocks as large as it is wide,
    with pivoting inside of them; a step whose matrix is not solved with accurately is rejected. On a grid
    in the plane blocks are as large as its rows: `Krylov` needs less memory there. Entries outside of the
    pattern would be added to those inside.

    Args:
        pattern: a matrix that is 0 where there are no entries (n x n; of numpy, or of scipy.sparse), or the
            rows and the columns of the entries, two arrays of whole numbers.
        n: the number of equations, if the rows and columns do not say it by their largest number.

    A matrix is the entries in the order of `rows`, shape (entries,).
    """

    def __init__(self, pattern: Any, n: int | None = None):
        rows, columns, found = entries_of(pattern)
        self.n = n = int(n or found)
        if len(rows) and (
            min(rows.min(), columns.min()) < 0 or max(rows.max(), columns.max()) >= n
        ):
            raise ValueError(f"The pattern of Sparse has entries outside of {n} x {n} equations.")
        place = np.unique(np.concatenate([rows * n + columns, np.arange(n) * (n + 1)]))
        self.rows, self.columns = np.divmod(place, n)
        self.key = n, place.tobytes()
        self.color = colors(self.rows, self.columns, n)
        self.order = reverse_cuthill_mckee(self.rows, self.columns, n)
        self.rank = np.argsort(self.order)
        i, j = self.rank[self.rows], self.rank[self.columns]
        self.band = Banded(int(max(0, (i - j).max())), int(max(0, (j - i).max())))

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return isinstance(other, Sparse) and self.key == other.key

    def __repr__(self):
        colors = int(self.color.max()) + 1
        return f"Sparse({self.n} equations, {len(self.rows)} entries, {colors} colors, {self.band})"

    def of_stages(self, count):
        return stages_of(self, count) if count > 1 else self

    def jacobian(self, f, y):
        if len(y) != self.n:
            raise ValueError(f"{self} is not of a state of {len(y)} numbers.")
        return derivatives(f, y, self.color)[self.color[self.columns], self.rows]

    def matrix(self, entries):
        if entries.ndim == 1:
            return numpy_or_jax(entries).where(self.rows == self.columns, entries[self.rows], 0)
        where = np.ones((self.n, self.n), bool)
        where[self.rows, self.columns] = False
        outside(self, entries, where)
        return entries[self.rows, self.columns]

    def shifted(self, jacobian, w, mass=None):
        mass = self.matrix(np.ones(self.n, jacobian.dtype)) if mass is None else mass
        return mass - by_rows(w if jnp.ndim(w) == 0 else w[self.rows], jacobian)

    def product(self, matrix, x):
        sums = jax.ops.segment_sum
        return sums(matrix * x[self.columns], self.rows, self.n, indices_are_sorted=True)

    def factor(self, matrix):
        if self.narrow:
            return self.band.factor(self.diagonals(matrix))
        found = by_blocks(*self.blocks(matrix))
        fine = is_accurate(self, matrix, partial(self.solved, found), self.n)
        return found, jnp.where(fine, jnp.ones((), matrix.dtype), jnp.nan)

    def substitute(self, factors, b):
        if self.narrow:
            return self.band.substitute(factors, b[self.order])[self.rank]
        found, fine = factors
        return fine * self.solved(found, b)

    @property
    def narrow(self) -> bool:
        return max(self.band.lower, self.band.upper) <= NARROW

    def diagonals(self, matrix):
        """The matrix in its order, as that of a band."""
        i, j = self.rank[self.rows], self.rank[self.columns]
        zeros = jnp.zeros((self.band.width, self.n), matrix.dtype)
        wide = zeros.at[j - i + self.band.lower, i].set(matrix)
        return tuple(wide[d] for d in range(self.band.width))

    def blocks(self, matrix):
        """The same, as blocks: (L, D, U) of shape (rows, b, b), with rows of the identity at the end."""
        i, j, b = self.rank[self.rows], self.rank[self.columns], self.band.size
        more = np.arange(self.n, -(-self.n // b) * b)
        i, j = np.concatenate([i, more]), np.concatenate([j, more])
        entries = jnp.concatenate([matrix, jnp.ones(len(more), matrix.dtype)])
        zeros = jnp.zeros((3, -(-self.n // b), b, b), matrix.dtype)
        return zeros.at[j // b - i // b + 1, i // b, i % b, j % b].set(entries)

    def solved(self, found, b):
        """x of A x = b, from the factors of A's blocks."""
        inverses, lower, upper = found
        count, size, _ = inverses.shape
        right = jnp.pad(b[self.order], (0, count * size - self.n)).reshape(count, size)

        def forwards(g, given):
            inverse, low, b = given
            g = matmul(inverse, b - matmul(low, g))
            return g, g

        def backwards(x, given):
            c, g = given
            x = g - matmul(c, x)
            return x, x

        zero = jnp.zeros_like(right[0])
        _, g = lax.scan(forwards, zero, (inverses, lower, right))
        _, x = lax.scan(backwards, zero, (upper, g), reverse=True)
        return x.reshape(-1)[self.rank]


@functools.lru_cache(16)
def stages_of(sparse: Sparse, count: int) -> Sparse:
    """Its structure for so many states at once; found once, as that takes a while."""
    each = np.indices((count, count)).reshape(2, -1, 1)
    rows, columns = (count * np.stack([sparse.rows, sparse.columns])[:, None] + each).reshape(2, -1)
    return Sparse((rows, columns), count * sparse.n)


def by_blocks(L, D, U):
    """Block elimination, for large blocks."""

    def eliminate(c, given):
        low, d, up = given
        inverse = jnp.linalg.inv(d - matmul(low, c))
        c = matmul(inverse, up)
        return c, (inverse, low, c)

    return lax.scan(eliminate, jnp.zeros_like(D[0]), (L, D, U))[1]


# Patterns: plain numpy, once for each.


def entries_of(pattern) -> tuple[np.ndarray, np.ndarray, int]:
    """The rows and columns of the entries of a pattern, and how many equations there are."""
    if hasattr(pattern, "tocoo"):
        pattern = pattern.tocoo()
        there = np.asarray(pattern.data) != 0
        shape, (rows, columns) = pattern.shape, (pattern.row[there], pattern.col[there])
    elif isinstance(pattern, tuple | list) and len(pattern) == 2 and np.ndim(pattern[0]) == 1:
        rows, columns = (np.asarray(x) for x in pattern)
        if rows.shape != columns.shape or not all(
            np.issubdtype(x.dtype, np.integer) or not x.size for x in (rows, columns)
        ):
            raise ValueError(
                "The rows and columns of Sparse must be whole numbers, as many of each."
            )
        shape = (1 + int(max(rows.max(initial=-1), columns.max(initial=-1))),) * 2
    else:
        pattern = np.asarray(pattern)
        shape, (rows, columns) = pattern.shape, np.nonzero(np.atleast_2d(pattern))
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"The pattern of Sparse must be a square matrix; got shape {shape}.")
    return rows.astype(np.int64), columns.astype(np.int64), shape[0]


def compressed(rows, columns, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The columns of each row, one row behind the other, and where each row begins."""
    order = np.argsort(rows, kind="stable")
    return columns[order], np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n))])


def colors(rows, columns, n: int) -> np.ndarray:
    """A color for each column, another for those that share a row; greedily, in their order."""
    in_row, row_begins = compressed(rows, columns, n)
    in_column, column_begins = compressed(columns, rows, n)
    color = np.full(n, -1)
    for j in range(n):
        touched = in_column[column_begins[j] : column_begins[j + 1]]
        near = np.concatenate([in_row[row_begins[i] : row_begins[i + 1]] for i in touched])
        taken = np.zeros(len(near) + 1, bool)
        used = color[near]
        taken[used[(used >= 0) & (used < len(taken))]] = True
        color[j] = np.argmin(taken)
    return color


def reverse_cuthill_mckee(rows, columns, n: int) -> np.ndarray:
    """An order of the equations with entries near the diagonal: breadth first, those with few entries first."""
    both = np.unique(np.concatenate([rows * n + columns, columns * n + rows]))
    beside, begins = compressed(*np.divmod(both, n), n)
    degree, seen, order = np.diff(begins), np.zeros(n, bool), []
    neighbours = lambda i: beside[begins[i] : begins[i + 1]]
    for start in np.argsort(degree, kind="stable"):
        if seen[start]:
            continue
        seen[start] = True
        queue = [start]
        for i in queue:  # grows as it is read
            new = neighbours(i)
            new = new[~seen[new]]
            seen[new] = True
            queue.extend(new[np.argsort(degree[new], kind="stable")])
        order += queue
    return np.array(order[::-1], dtype=np.int64)
