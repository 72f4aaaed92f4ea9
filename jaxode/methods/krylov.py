"""Systems solved by iterations that only need products with the matrix: nothing of size n x n."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxode import tree
from jaxode.methods.linear import Linear, by_rows, numpy_or_jax

KINDS = ("gmres", "bicgstab")


class Operator(NamedTuple):
    """x -> diagonal x - w jacobian(x), a linear function with its arrays; the latter may be None.

    `near` is a matrix near this one, in the form of the preconditioner; None without one.
    """

    diagonal: Any
    w: Any
    jacobian: Any = None
    near: Any = None


@dataclasses.dataclass(frozen=True)
class Krylov(Linear):
    """Any Jacobian, by its products with vectors alone, each a derivative of f: for large systems.

    Systems are solved by `lineax` (`pip install 'jaxode[krylov]'`). Without a preconditioner the number of
    iterations grows with the root of the stiffness h |df/dy|; their memory is that of `restart` states. A
    system that is not solved to its tolerance in `max_iterations` rejects the step. Its derivative is that
    of the solution, by a solve with the transposed matrix.

    A preconditioner is another structure, of which systems are solved directly. It is used from the right:
    with P near W = M - w df/dy, W P^-1 z = b is solved for z, and x = P^-1 z, so that the residual that
    has to be small is that of the system itself. However poor P is, only the number of iterations depends
    on it: no solution and no derivative does. P is that of the start of a step, transposed for derivatives.

    Attributes:
        kind: "gmres", or "bicgstab", which keeps fewer vectors.
        rtol: the residual that is left, relative to the right side (the largest number of each). To be
            well below the tolerance of the solve. In float32 it is at least 1e-5.
        restart: the iterations of GMRES between restarts.
        max_iterations: of GMRES how often it starts again, of the other in all.
        preconditioner: what df/dy is like: `BlockDiagonal(size)` for what reacts at a point, `Banded`, or a
            `Linear` of your own (`jaxode.methods.linear`), such as one that solves by Fourier transforms or
            multigrid. df/dy may have entries outside of it: `Diagonal`, `BlockDiagonal`, `Banded` and `Sparse`
            add those to entries inside, as SUNDIALS' banded preconditioner does. So diffusion, whose rows have
            the sum 0, leaves the reaction alone in `BlockDiagonal`.

    >>> from jaxode import odeint
    >>> from jaxode.methods import BlockDiagonal
    >>> def reaction(y, t):  # fast and other at each point; what diffuses is slow
    ...     u, v = y.reshape(-1, 2).T
    ...     rate = 1e4 * jnp.linspace(1.0, 2.0, len(u))
    ...     spread = jnp.roll(u, 1) - 2 * u + jnp.roll(u, -1)
    ...     return jnp.stack([spread - rate * (u - v), 0 * v], 1).reshape(-1)
    >>> linear = Krylov(restart=5, max_iterations=3, preconditioner=BlockDiagonal(2))
    >>> y0 = jnp.tile(jnp.array([0.0, 1.0]), 20)
    >>> ys = odeint(reaction, y0, [0.0, 1.0], method="rodas4", linear=linear, rtol=1e-6, atol=1e-6)
    >>> print(bool(jnp.all(abs(ys[-1] - 1) < 1e-5)))
    True
    """

    kind: str = "gmres"
    rtol: float = 1e-8
    restart: int = 30
    max_iterations: int = 1000
    preconditioner: Linear | None = None
    iterative = True

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"`kind` of Krylov must be one of {KINDS}; got {self.kind!r}.")
        if not 0 < self.rtol < 1:
            raise ValueError(f"`rtol` of Krylov must be between 0 and 1; got {self.rtol!r}.")
        near = self.preconditioner
        if near is not None and (not isinstance(near, Linear) or near.iterative):
            raise TypeError(
                "`preconditioner` of Krylov must be a structure whose systems are solved directly, such as "
                f"jaxode.methods.BlockDiagonal(2), or a `Linear` of your own; got {near!r}."
            )
        lineax()

    def of_stages(self, count):
        if self.preconditioner is None:
            return self
        return dataclasses.replace(self, preconditioner=self.preconditioner.of_stages(count))

    def jacobian(self, f, y):
        near = self.preconditioner and self.preconditioner.jacobian(f, y)
        minus = jnp.full((), -1, y.dtype)
        return Operator(jnp.zeros_like(y), minus, jax.linearize(f, y)[1], near)

    def matrix(self, entries):
        if entries.ndim > 1:
            raise ValueError(
                "Krylov() only multiplies: it takes a mass matrix by its diagonal, and no `jac`."
            )
        near = self.preconditioner and self.preconditioner.matrix(entries)
        return Operator(entries, np.zeros((), entries.dtype), None, near)

    def shifted(self, jacobian, w, mass=None):
        one = numpy_or_jax(jacobian.diagonal).ones_like(jacobian.diagonal)
        diagonal, of_mass = (one, None) if mass is None else (mass.diagonal, mass.near)
        near = self.preconditioner and self.preconditioner.shifted(jacobian.near, w, of_mass)
        return Operator(diagonal - by_rows(w, jacobian.diagonal), w, jacobian, near)

    def product(self, matrix, x):
        kept = matrix.diagonal * x
        inner = matrix.jacobian
        if inner is None:
            return kept
        moved = self.product(inner, x) if isinstance(inner, Operator) else inner(x)
        return kept - by_rows(matrix.w, moved)

    def factor(self, matrix):
        near = self.preconditioner and self.preconditioner.factor(matrix.near)
        return matrix._replace(near=near)

    def substitute(self, factors, b):
        return self.solved(partial(self.product, factors), b, factors.near)

    def substitute_transposed(self, factors, b):
        product = transposed(partial(self.product, factors), b)
        return self.solved(product, b, factors.near, back=True)

    def solution(self, product, b, factors):
        forth = lambda product, b: self.solved(product, b, factors.near)
        back = lambda product, b: self.solved(product, b, factors.near, back=True)
        return lax.custom_linear_solve(product, b, forth, back)

    def solved(self, product, b, near, back=False):
        """x with product(x) = b; NaN if it is not found."""
        lx, precondition = lineax(), lambda x: x
        if self.preconditioner is not None:
            linear = self.preconditioner
            precondition = partial(
                linear.substitute_transposed if back else linear.substitute, near
            )
        least = max(self.rtol, 100 * float(jnp.finfo(b.dtype).eps))
        size = lax.stop_gradient(jnp.max(lax.abs(b), initial=0))
        # Of a right side of size 1: the tolerance of lineax is absolute, too.
        b = b / jnp.where(size > 0, size, 1)
        options: dict[str, Any] = dict(rtol=0.0, atol=least, max_steps=self.max_iterations)
        if self.kind == "gmres":
            options["restart"] = min(self.restart, len(b))
        solver = lx.GMRES(**options) if self.kind == "gmres" else lx.BiCGStab(**options)
        operator = lx.FunctionLinearOperator(
            lambda z: product(precondition(z)), jax.ShapeDtypeStruct(b.shape, b.dtype)
        )
        # `lx.linear_solve` would be traced later. Products of func have their own precision.
        with jax.default_matmul_precision("highest"):
            found, *_ = solver.compute(solver.init(operator, {}), b, {})
        x = precondition(found)
        off = jnp.max(lax.abs(product(x) - b), initial=0)
        return jnp.where(off <= 10 * least, tree.scale(size, x), jnp.nan)


def transposed(product, b):
    """b -> the transposed matrix times b."""
    return lambda x: jax.linear_transpose(product, b)(x)[0]


def lineax():
    """The package, which is not one that jaxode needs."""
    try:
        import lineax
    except ImportError as error:
        raise ImportError(
            "linear=Krylov() needs the package lineax: pip install 'jaxode[krylov]'."
        ) from error
    return lineax
