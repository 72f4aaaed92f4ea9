"""The linear algebra of implicit methods, as values: the Jacobian df/dy, and (M - w df/dy) x = b.

A method asks for `solver(linear, f, y, w)`. What is differentiated is the solution, by the implicit
function: with W x = b, W dx = db - dW x, in forward mode, and its transpose in reverse mode. Nothing
ever goes through the elimination; its factors serve both.
"""

import dataclasses
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import jax.scipy.linalg
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import tree

WRITTEN_OUT = 4  # rows of a matrix up to which the elimination is written out, number by number
NUMBERS = 8  # the same where a whole step is (`jaxode.kernels.numbers`)
LOOPED = 64  # rows up to which it is a loop, which fits into one call; a library is faster above


class Linear:
    """The structure of df/dy: a hashable value, how it is found, and how systems with it are solved.

    A matrix is an array (or a pytree of arrays) in a form of its own. The functions are of vectors of
    one solve.

    Attributes:
        iterative: whether each solution is found by iterations of its own, that may fail: it is then NaN.
    """

    iterative: ClassVar[bool] = False

    def of_stages(self, count: int) -> "Linear":
        """The structure of equations for so many states at once, what is of one number side by side.

        Entry (i, j) of df/dy is a block there, of rows count i, ... and columns count j, ....
        """
        if count == 1:
            return self
        raise NotImplementedError(
            f"linear={self} does not say what it is for several stages at once: give it `of_stages`, as "
            "those of jaxode.methods have, or choose a method that solves for one stage after the other, "
            "such as 'implicit_midpoint' or 'kvaerno5'."
        )

    def jacobian_of_stages(self, a: np.ndarray, f, y: Array) -> PyTree:
        """The derivative of all f(y + sum_j a_ij x_j) in the x_j: df/dy times a, a block an entry."""
        count, push = len(a), jax.linearize(f, y)[1]

        def moved(xs):
            sums = jnp.sum(xs.reshape(-1, 1, count) * a[None], 2)
            return jax.vmap(push, 1, 1)(sums).reshape(-1)

        return self.of_stages(count).jacobian(moved, jnp.zeros(count * len(y), y.dtype))

    def in_numbers(self) -> "Linear | None":
        """The same without loops, to be evaluated number by number (`jaxode.kernels.numbers`), if it can be."""
        return None

    def jacobian(self, f, y: Array) -> PyTree:
        """df/dy at y."""
        raise NotImplementedError

    def matrix(self, entries) -> PyTree:
        """A matrix given as n x n numbers, or as the n numbers of its diagonal, in this form.

        Raises ValueError if numbers whose values are known are where the structure has none.
        """
        raise NotImplementedError

    def shifted(self, jacobian: PyTree, w, mass: PyTree | None = None) -> PyTree:
        """M - w df/dy, without M for the identity; w is a number, or one for each row."""
        raise NotImplementedError

    def product(self, matrix: PyTree, x: Array) -> Array:
        """The matrix times x."""
        raise NotImplementedError

    def factor(self, matrix: PyTree) -> PyTree:
        """What `substitute` needs. Never differentiated."""
        raise NotImplementedError

    def substitute(self, factors: PyTree, b: Array) -> Array:
        """x with matrix x = b: linear in b, of operations that JAX can transpose."""
        raise NotImplementedError

    def substitute_transposed(self, factors: PyTree, b: Array) -> Array:
        """x with the transposed matrix."""
        return jax.linear_transpose(partial(self.substitute, factors), b)(b)[0]

    def solution(self, product: Callable, b: Array, factors: PyTree) -> Array:
        """x with product(x) = b, for a linear function that has this structure.

        `factors` are those of a matrix near it, which iterations may use.
        """
        jacobian = self.jacobian(product, jnp.zeros_like(b))
        nothing = self.matrix(np.zeros(len(b), b.dtype))
        return solver(self, jacobian, -jnp.ones((), b.dtype), nothing)(b)


def solver(linear: Linear, jacobian: PyTree, w, mass: PyTree | None = None):
    """b -> x with (M - w df/dy) x = b, factored once."""
    matrix = linear.shifted(jacobian, w, mass)
    factors = linear.factor(lax.stop_gradient(matrix))
    times = partial(linear.product, matrix)
    # A rule of JAX that stays one when it is transposed: so second derivatives are right, too.
    forth = lambda _, b: linear.substitute(factors, b)
    back = lambda _, b: linear.substitute_transposed(factors, b)
    return lambda b: lax.custom_linear_solve(times, b, forth, back)


def by_rows(w, matrix: Array) -> Array:
    """w times a matrix whose first axis is that of its rows: w is a number, or one for each row."""
    if jnp.ndim(w) == 0:
        return tree.scale(w, matrix)
    return lax.convert_element_type(w, matrix.dtype).reshape(-1, *[1] * (matrix.ndim - 1)) * matrix


def numpy_or_jax(x):
    """The module of these numbers: those that are numpy's stay constants of the program."""
    return np if isinstance(x, np.ndarray) else jnp


@contextmanager
def in_forward_mode():
    """Derivatives of func are taken here in forward mode: what to do where JAX has none."""
    try:
        yield
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise TypeError(
            "An implicit method needs df/dy, by derivatives of func in forward mode, and JAX has none of a "
            "function with jax.custom_vjp: write its rule as a jax.custom_jvp; or pass "
            "jac=lambda y, t, *args: jax.jacrev(func)(y, t, *args) with a method such as 'rodas5p'; or choose "
            "an explicit method."
        ) from error


@dataclasses.dataclass(frozen=True)
class Dense(Linear):
    """Any Jacobian: n derivatives of f, and Gaussian elimination with partial pivoting.

    Attributes:
        most: rows up to which the elimination is written out, number by number.
    """

    most: int = dataclasses.field(default=WRITTEN_OUT, repr=False)

    def of_stages(self, count):
        return self

    def in_numbers(self):
        return dataclasses.replace(self, most=NUMBERS)

    def jacobian_of_stages(self, a, f, y):
        return jnp.kron(self.jacobian(f, y), a)  # in as many derivatives as one state takes

    def jacobian(self, f, y):
        return jax.jacfwd(f)(y)

    def matrix(self, entries):
        return numpy_or_jax(entries).diag(entries) if entries.ndim == 1 else entries

    def shifted(self, jacobian, w, mass=None):
        if mass is None:
            mass = np.eye(len(jacobian), dtype=jacobian.dtype)
        return mass - by_rows(w, jacobian)

    def product(self, matrix, x):
        return jnp.sum(matrix * x[None, :], 1)

    def factor(self, matrix):
        if len(matrix) <= self.most:
            return eliminated(matrix)
        if len(matrix) <= LOOPED:
            return inverted_in_a_loop(matrix)
        return jax.scipy.linalg.lu_factor(matrix)

    def substitute(self, factors, b):
        if len(b) <= self.most:
            return substituted(factors, b)
        if len(b) <= LOOPED:
            return self.product(factors, b)
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


def inverted_in_a_loop(matrix):
    """The inverse, by Gauss and Jordan with partial pivoting, a column at a time.

    It takes as many operations as to eliminate [A | I] only below the diagonal; but then a system is solved
    by one product. Where that went back row after row, the gradient of HIRES took 6.4 s to compile and
    5.9 ms to run in place of 4.3 and 4.0 (November 2026), with the same steps and errors.
    """
    n = len(matrix)
    i, one = np.arange(n, dtype=np.int32), np.eye(n, dtype=matrix.dtype)

    def column(k, carry):
        at_k = i == k
        entries = lax.dynamic_index_in_dim(carry[0], k, 1, False)
        p = lax.argmax(jnp.where(i >= k, lax.abs(entries), -1), 0, jnp.int32)
        at_p = i == p

        def pivoted(a):
            row_p = jnp.sum(jnp.where(at_p[:, None], a, 0), 0, keepdims=True)
            row_k = lax.dynamic_index_in_dim(a, k, 0)
            return jnp.where(at_k[:, None], row_p, jnp.where(at_p[:, None], row_k, a))

        u, x = lax.optimization_barrier(tuple(map(pivoted, carry)))
        entries = lax.dynamic_index_in_dim(u, k, 1, False)
        pivot = lax.dynamic_index_in_dim(entries, k, 0)

        def eliminated(a):
            row = lax.dynamic_index_in_dim(a, k, 0) / pivot[:, None]
            return jnp.where(at_k[:, None], row, a - entries[:, None] * row)

        return eliminated(u), eliminated(x)

    return lax.fori_loop(0, n, column, (matrix, jnp.asarray(one) + 0 * matrix[:1]))[1]


DENSE = Dense()
