"""Systems solved by iterations that only need products with the matrix: nothing of size n x n."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxode import tree
from jaxode.methods.linear import Linear, by_rows, numpy_or_jax

KINDS = ("gmres", "bicgstab")


class Operator(NamedTuple):
    """x -> diagonal x - w jacobian(x), a linear function with its arrays; the latter may be None."""

    diagonal: Any
    w: Any
    jacobian: Any = None


@dataclasses.dataclass(frozen=True)
class Krylov(Linear):
    """Any Jacobian, by its products with vectors alone, each a derivative of f: for large systems.

    Systems are solved by `lineax` (`pip install 'jaxode[krylov]'`), without a preconditioner: the number
    of iterations grows with the root of the stiffness h |df/dy|, and their memory is that of `restart`
    states. A system that is not solved to its tolerance in `max_iterations` rejects the step. Its
    derivative is that of the solution, by a solve with the transposed matrix.

    Attributes:
        kind: "gmres", or "bicgstab", which keeps fewer vectors.
        rtol: the residual that is left, relative to the right side (the largest number of each). To be
            well below the tolerance of the solve. In float32 it is at least 1e-5.
        restart: the iterations of GMRES between restarts.
        max_iterations: in all.
    """

    kind: str = "gmres"
    rtol: float = 1e-8
    restart: int = 30
    max_iterations: int = 1000
    iterative = True

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"`kind` of Krylov must be one of {KINDS}; got {self.kind!r}.")
        if not 0 < self.rtol < 1:
            raise ValueError(f"`rtol` of Krylov must be between 0 and 1; got {self.rtol!r}.")
        lineax()

    def of_stages(self, count):
        return self

    def jacobian(self, f, y):
        return Operator(jnp.zeros_like(y), jnp.full((), -1, y.dtype), jax.linearize(f, y)[1])

    def matrix(self, entries):
        if entries.ndim > 1:
            raise ValueError(
                "Krylov() only multiplies: it takes a mass matrix by its diagonal, and no `jac`."
            )
        return Operator(entries, np.zeros((), entries.dtype))

    def shifted(self, jacobian, w, mass=None):
        one = numpy_or_jax(jacobian.diagonal).ones_like(jacobian.diagonal)
        diagonal = one if mass is None else mass.diagonal
        return Operator(diagonal - by_rows(w, jacobian.diagonal), w, jacobian)

    def product(self, matrix, x):
        kept = matrix.diagonal * x
        inner = matrix.jacobian
        if inner is None:
            return kept
        moved = self.product(inner, x) if isinstance(inner, Operator) else inner(x)
        return kept - by_rows(matrix.w, moved)

    def factor(self, matrix):
        return matrix

    def substitute(self, factors, b):
        return self.solved(lambda x: self.product(factors, x), b)

    def substitute_transposed(self, factors, b):
        product = lambda x: self.product(factors, x)
        return self.solved(lambda x: jax.linear_transpose(product, b)(x)[0], b)

    def solved(self, product, b):
        """x with product(x) = b; NaN if it is not found."""
        lx = lineax()
        least = max(self.rtol, 100 * float(jnp.finfo(b.dtype).eps))
        size = lax.stop_gradient(jnp.max(lax.abs(b), initial=0))
        # Of a right side of size 1: the tolerance of lineax is absolute, too.
        b = b / jnp.where(size > 0, size, 1)
        options: dict[str, Any] = dict(rtol=0.0, atol=least, max_steps=self.max_iterations)
        if self.kind == "gmres":
            options["restart"] = min(self.restart, len(b))
        solver = lx.GMRES(**options) if self.kind == "gmres" else lx.BiCGStab(**options)
        operator = lx.FunctionLinearOperator(product, jax.ShapeDtypeStruct(b.shape, b.dtype))
        x = lx.linear_solve(operator, b, solver, throw=False).value
        off = jnp.max(lax.abs(product(x) - b), initial=0)
        return jnp.where(off <= 10 * least, tree.scale(size, x), jnp.nan)


def lineax():
    """The package, which is not one that jaxode needs."""
    try:
        import lineax
    except ImportError as error:
        raise ImportError(
            "linear=Krylov() needs the package lineax: pip install 'jaxode[krylov]'."
        ) from error
    return lineax
