"""Mass matrices, and the algebraic equations that a singular one makes: their initial values.

With M y' = f(y, t), M constant, every row of M that is 0 is an equation 0 = f_i(y, t): a semi-explicit
differential-algebraic equation (DAE), of index 1 if the rows of M that are not 0, with the rows of
df/dy of the algebraic equations, are a regular matrix (Hairer and Wanner 1996, sec. VI.1).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import arguments, tree
from jaxode.functions import JAC
from jaxode.kernels.traces import Trace
from jaxode.methods.implicit import vectors
from jaxode.methods.linear import DENSE, Dense, Linear, numpy_or_jax
from jaxode.methods.names import named
from jaxode.methods.newton import solved
from jaxode.solution import Status
from jaxode.stepping.field import Field, System
from jaxode.switches import moving, unchecked
from jaxode.tree import known

ITERATIONS = 50  # of Newton's method for initial values


class Beside(NamedTuple):
    """What an implicit method is told beside the field: the arrays of a `System`."""

    mass: Any = None
    algebraic: Any = None
    jac: Any = None  # the leaves of its trace

    def system(self, field, of_jac: Field | None) -> System:
        return System(field, self.mass, self.algebraic, of_jac)


class Problem(NamedTuple):
    """What a look at a problem before it is solved is specialised to."""

    trace: Trace
    jac: Trace | None
    method: Any
    func_time: Any

    def system(self, leaves, beside: Beside, t0) -> System:
        """The field at t0, in the unit of time of func."""
        at = t0, t0, jnp.ones_like(t0), self.func_time
        of_jac = None if self.jac is None else Field(self.jac, beside.jac, *at)
        return beside.system(Field(self.trace, leaves, *at), of_jac)


def of_systems(
    adjoint: Callable, beside: Beside, of_jac: Field | None, consistent: bool
) -> Callable:
    """The adjoint, for a field with what stands beside it; y0 is made to fulfil its algebraic equations, if
    it is not known to."""

    def solve(integrator, field, y0, ss):
        f = beside.system(field, of_jac)
        if beside.mass is None or consistent:
            return adjoint(integrator, f, y0, ss)
        start = 0 * ss[0]
        y, found = corrected(f, integrator.method.linear, y0, start)
        hmax = jnp.where(found, integrator.hmax, 0)
        ys, report = adjoint(dataclasses.replace(integrator, hmax=hmax), f, y, ss)
        fine = found | ~integrator.finite(y0, f(y0, start))
        status = jnp.where(fine, report.status, Status.NOT_CONVERGED.value)
        ys = jax.tree.map(lambda y: tree.or_nan(found, y), ys)
        return ys, report._replace(status=status)

    return solve


# At the door.


def mass_of(mass, y0: PyTree):
    """A mass matrix as n x n numbers, or as the n numbers of its diagonal, in the dtype of the state.

    Raises TypeError or ValueError if it is none of this state.
    """
    leaves = jax.tree.leaves(y0)
    if any(map(jnp.iscomplexobj, leaves)):
        raise TypeError(
            "`mass` is for real states: pass real and imaginary parts as two of its parts."
        )
    n, dtype = sum(y.size for y in leaves), tree.widest(*map(tree.real_dtype, leaves))
    numbers = partial(as_numbers, dtype=dtype)
    one = jax.tree.structure(mass) == jax.tree.structure(0)
    if one and np.shape(mass) in ((n, n), (n,)):
        mass = numbers("mass", mass)
    else:
        try:
            parts = jax.tree.leaves(jax.tree.broadcast(mass, y0))
            parts = [numbers("mass", m) for m in parts]
            shaped = [numpy_or_jax(m).broadcast_to(m, y.shape) for m, y in zip(parts, leaves)]
        except ValueError as error:
            raise ValueError(
                f"`mass` must be an array of {n} x {n} numbers, which acts on y0 as one vector of {n} numbers, "
                f"or its diagonal: {n} numbers, or a pytree like y0. Got shapes "
                f"{jax.tree.map(np.shape, mass)}."
            ) from error
        join = np if known(shaped) else jnp
        mass = join.concatenate([m.reshape(-1) for m in shaped])
    if known(mass) and not np.all(np.isfinite(mass)):
        raise ValueError("`mass` has numbers that are NaN or infinite.")
    return mass


def as_numbers(name, x, dtype):
    """Real numbers; a numpy array where they are known."""
    if not arguments.is_real(x):
        raise TypeError(f"`{name}` must hold real numbers, got {type(x).__name__}.")
    return np.asarray(x, dtype) if known(x) else jnp.asarray(x, dtype)


class Combined(eqx.Module):
    """R f, for rows R: equations combined so that every algebraic one stands alone."""

    func: Callable
    rows: Array

    def __call__(self, y, t, *args):
        _, pack, unpack = vectors(self.func, y)
        k = pack(arguments.like_state(self.func(y, t, *args), y))
        return unpack(tree.matmul(self.rows, k))


def separated(mass, linear: Linear):
    """R with R M of rows that are 0 or linearly independent of each other, None for the identity; R M;
    and which of its rows are 0."""
    if mass.ndim == 1:
        return None, mass, mass == 0
    zero = numpy_or_jax(mass).all(mass == 0, 1)
    if known(mass):
        independent = np.linalg.matrix_rank(mass) == np.sum(~zero)
        if not independent and not isinstance(linear, Dense):
            raise ValueError(
                "`mass` has rows that depend on each other, which only linear=Dense() can take: "
                "combine the equations so that each row of `mass` that is not needed is 0."
            )
        rows = None if independent else np.linalg.svd(mass)[0].T
    else:
        rows = jnp.linalg.svd(lax.stop_gradient(mass))[0].T if isinstance(linear, Dense) else None
    if rows is None:
        return None, mass, zero
    mass = tree.matmul(rows, mass) if isinstance(mass, jax.Array) else rows @ mass
    size = abs(lax.stop_gradient(mass)).max(1)
    return rows, mass, size <= 8 * len(size) * float(jnp.finfo(mass.dtype).eps) * size.max()


class OfVector(eqx.Module):
    """The user's Jacobian, as a function of the state as one vector."""

    jac: Callable
    unpack: Callable = eqx.field(static=True)  # the vector as a state
    rows: Any

    def __call__(self, x, t, *args):
        y = self.unpack(x)
        found = as_matrix(self.jac(y, t, *args), y, x)
        return found if self.rows is None else tree.matmul(self.rows, found)


def as_matrix(found, y: PyTree, x: Array) -> Array:
    """What `jac` returned, as one matrix; a TypeError if it is not a Jacobian of this state."""
    n, structure = len(x), jax.tree.structure(y)
    if any(map(jnp.iscomplexobj, jax.tree.leaves(found))):
        raise TypeError(
            "`jac` returned complex numbers for a state of real ones: return their real part."
        )
    if isinstance(found, list | tuple) and structure == jax.tree.structure(0):
        found = jnp.stack([jnp.stack(list(map(jnp.asarray, row))) for row in found])
    if getattr(found, "shape", None) == (n, n):
        return jnp.asarray(found, x.dtype)
    try:
        rows = [structure.flatten_up_to(row) for row in structure.flatten_up_to(found)]
        sizes = [leaf.size for leaf in jax.tree.leaves(y)]
        blocks = [
            [jnp.asarray(block, x.dtype).reshape(a, b) for block, b in zip(row, sizes)]
            for row, a in zip(rows, sizes)
        ]
        return jnp.block(blocks)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`jac` must return df/dy, as jac(y, t, *args): an array of shape ({n}, {n}), or what "
            f"jax.jacfwd(func) does; got {jax.tree.map(jnp.shape, found)}."
        ) from error


# What was declared of df/dy.

CHECKED: set = set()  # the declarations that were right


def check_structure(problem: Problem, leaves, beside: Beside | None, y0, t) -> None:
    """Raise if df/dy has entries where its declared structure has none; as far as values are known.

    Two of its products with vectors without an order are compared with those of derivatives of func (or
    of the user's own Jacobian), at y0, the first time that such a problem is solved.
    """
    linear = getattr(problem.method, "linear", None)
    if linear is None or isinstance(linear, Dense) or linear.iterative or problem in CHECKED:
        return
    if not known(leaves, beside, y0, t):
        return
    off = float(difference_of_products(problem, leaves, beside or Beside(), y0, jnp.asarray(t[0])))
    if off > 1:
        raise ValueError(
            f"df/dy has entries at y0 that linear={linear} leaves out: its products with vectors are others. "
            "Choose a wider band or larger blocks, add the entries to the pattern, or pass linear=Dense()."
        )
    if len(CHECKED) > 1000:
        CHECKED.clear()
    CHECKED.add(problem)


@partial(jax.jit, static_argnums=0)
def difference_of_products(problem: Problem, leaves, beside: Beside, y0, t0):
    """How much they differ, over what roundings may be; 0 where they are not finite."""
    linear, system = problem.method.linear, problem.system(leaves, beside, t0).parts[0]
    field, pack, _ = vectors(system, y0)
    x, s = pack(y0), 0 * t0
    found = problem.method.jacobian(system, field, s, x)
    worst = jnp.zeros((), x.dtype)
    for seed in range(2):
        v = jnp.asarray(np.random.default_rng(seed).normal(size=len(x)), x.dtype)
        if system.jac is None:
            exact = jax.jvp(lambda x: field(x, s), (x,), (v,))[1]
        else:
            exact = DENSE.product(system.jac(x, s), v)
        product = linear.product(found, v)
        size = jnp.max(lax.abs(exact), initial=0) + jnp.max(lax.abs(product), initial=0)
        off = jnp.max(lax.abs(product - exact), initial=0)
        worst = jnp.maximum(worst, tree.ratio(off, float(jnp.finfo(x.dtype).eps) ** 0.6 * size))
    return jnp.where(jnp.isfinite(worst), worst, 0)


# Initial values.


def corrected(f: System, linear: Linear, y: PyTree, s) -> tuple[PyTree, Array]:
    """The state with the algebraic equations fulfilled, and whether that has been found.

    Newton's method, damped, for 0 = f_i(y) in the algebraic rows and 0 = M (y - y0) in the others. Its
    derivative is that of the implicit function. A system of an index above 1 has no such state.
    """
    field, pack, unpack = vectors(f, y)
    x0 = pack(y)
    rows = -lax.convert_element_type(f.algebraic, x0.dtype)

    def residual(x):
        kept = linear.product(f.mass, x - x0)
        return jnp.where(f.algebraic, field(x, s), kept)

    def matrix_at(x):
        jacobian = linear.jacobian(lambda x: field(x, s), x)
        if f.jac is not None:
            jacobian = linear.matrix(f.jac(x, s))
        return linear.shifted(jacobian, rows, f.mass)

    def factored(x):
        matrix = matrix_at(x)
        return matrix, linear.factor(matrix)

    near = linear.factor(lax.stop_gradient(matrix_at(x0))) if linear.iterative else None
    x, found = solved(residual, x0, partial(newtons, factored, linear), linear, near)
    return unpack(x), lax.stop_gradient(found) > 0


def newtons(factored: Callable, linear: Linear, residual: Callable, x0):
    """The root of `residual` near x0, and 1 if it has been found, as a number.

    Damped by the natural test of monotonicity (Deuflhard 2004, Newton methods for nonlinear problems,
    sec. 3.3): the next correction, with the same matrix, has to be smaller.
    """
    eps = float(jnp.finfo(x0.dtype).eps)
    least = eps**0.6  # the next iteration would change about the square of it
    size = lambda x, change: jnp.max(lax.abs(change) / (lax.abs(x) + floor(x)), initial=0)

    def unfinished(carry):
        _, count, moved, fine = carry
        return (count < ITERATIONS) & (moved > least) & fine

    def iterate(carry):
        x, count, _, _ = carry
        matrix, factors = factored(x)
        change = linear.substitute(factors, residual(x))
        length = size(x, change)
        after = lambda w: size(x, linear.substitute(factors, residual(x - w * change)))
        worse = lambda w: ~(after(w) <= (1 - w / 4) * length) & (w > 1e-3) & (length > least)
        w = lax.while_loop(worse, lambda w: w / 2, jnp.ones((), x.dtype))
        return x - w * change, count + 1, length, is_regular(linear, matrix, factors, x)

    huge = jnp.asarray(jnp.finfo(x0.dtype).max, x0.dtype)
    begin = x0, jnp.zeros((), jnp.int32), huge, jnp.array(True)
    x, _, moved, fine = lax.while_loop(unfinished, iterate, begin)
    found = fine & (moved <= least) & tree.all_finite(x)
    return jnp.where(found, x, x0), lax.convert_element_type(found, x0.dtype)


def floor(x):
    """What a number of the vector is measured by where it is small."""
    return 1e-6 * jnp.max(lax.abs(x), initial=0) + jnp.finfo(x.dtype).tiny


def is_regular(linear: Linear, matrix, factors, x) -> Array:
    """Whether a matrix can be solved with: if it is multiplied with ones, they have to come back."""
    one = jnp.ones_like(x)
    again = linear.substitute(factors, linear.product(matrix, one))
    return jnp.all(lax.abs(again - one) < 0.1)


@partial(jax.jit, static_argnums=0)
def initial(problem: Problem, leaves, beside: Beside, y0, t0):
    """The corrected state, and whether it was found."""
    return corrected(problem.system(leaves, beside, t0), problem.method.linear, y0, 0 * t0)


def told(func, given, method, name, mass, jac):
    """func, with its equations combined where that is needed; what a method is told beside it; and the
    trace of the user's Jacobian, if there is one. `given` are (y0, t, func_time, args)."""
    arguments.takes(method, name, func, mass, jac)
    if mass is None and jac is None:
        return func, None, None
    y0, t, func_time, args = given
    linear = method.linear
    rows = algebraic = of_jac = leaves = None
    if mass is not None:
        rows, mass, algebraic = separated(mass_of(mass, y0), linear)
        mass, algebraic = linear.matrix(mass), jnp.asarray(algebraic)
        func = func if rows is None else Combined(func, jnp.asarray(rows))
    if jac is not None:
        if any(map(jnp.iscomplexobj, jax.tree.leaves(y0))):
            raise TypeError("`jac` is for real states: leave it out, and it is derived from func.")
        _, pack, unpack = vectors(func, y0)
        of_vector = OfVector(jac, unpack, None if rows is None else jnp.asarray(rows))
        x0 = jax.eval_shape(pack, y0)
        checked = lambda out, _: out
        of_jac, leaves = arguments.trace_of(of_vector, x0, t, func_time, args, checked, JAC)
    return func, Beside(jax.tree.map(jnp.asarray, mass), algebraic, leaves), of_jac


def check(
    problem: Problem, leaves, beside: Beside | None, y0, t, rtol, atol, driven: bool
) -> tuple[PyTree, bool]:
    """y0, made to fulfil the algebraic equations to roundings if all is known, and whether no other start
    has to be: a signal that drives func may jump at its knots.

    Raise if df/dy has other entries than declared, or y0 does not fulfil them to the tolerances; as far as
    that is known.
    """
    problem.method.check(problem.trace, y0)
    check_structure(problem, leaves, beside, y0, t)
    if beside is None or beside.mass is None or not known(leaves, beside, y0, t, rtol, atol):
        return y0, False
    with unchecked():
        y, found = initial(problem, leaves, beside, y0, jnp.asarray(t[0]))
    if not found:
        raise ValueError(NOT_FOUND)
    scale = jax.tree.map(lambda a, r, y: a + r * abs(y) + 1e-300, atol, rtol, y0)
    off = float(tree.norm(tree.difference(y, y0), scale))
    if off > 1:
        raise ValueError(
            "y0 does not fulfil the algebraic equations, those where the rows of `mass` are 0: it is "
            f"{off:.3g} tolerances from a state that does. Such a state is found by "
            "jaxode.consistent(func, y0, t0, *args, mass=mass), which keeps what has a derivative."
        )
    return y, not driven


NOT_FOUND = (
    "There are no initial values near y0 that fulfil the algebraic equations, those where the rows of "
    "`mass` are 0: Newton's method did not find them, or their derivatives are singular at y0, as those of "
    "a DAE of an index above 1 are (differentiate its constraints until they determine all variables)."
)


def consistent(func: Callable, y0: PyTree, t0, *args, mass, linear: Linear | None = None) -> PyTree:
    """Initial values of a differential-algebraic equation: y near y0 with all algebraic equations fulfilled.

    For M y' = func(y, t, *args), by Newton's method from y0: func(y, t0) = 0 where a row of M is 0, and
    M y = M y0, so that what has a derivative is kept. Differentiable in y0, t0, M and all that func
    depends on, as the implicit function that it is; works under `jit` and `vmap`.

    Args:
        func, y0, args, mass, linear: as of `jaxode.solve`; y0 is a first guess in its algebraic part.
        t0: the initial time.

    Returns:
        A pytree like y0; NaN where there are no such values and no error can be raised, under `jit`.

    Raises:
        ValueError: no such values were found, or the equations do not determine them (index above 1).

    >>> import jax.numpy as jnp
    >>> from jaxode import consistent
    >>> divider = lambda y, t: jnp.stack([-y[0] + y[1], y[0] - 3 * y[1]])  # 0 = y_0 - 3 y_1
    >>> print(consistent(divider, jnp.array([6.0, 0.0]), 0.0, mass=jnp.array([1.0, 0.0])))
    [6. 2.]
    """
    with moving():
        func, y0 = arguments.present((), func, t0), arguments.as_state(y0)
        one = [t0] if np.ndim(t0) == 0 and known(t0) else t0[None]
        t, _, func_time = arguments.as_times(one, y0)
        given = y0, t, func_time, args
        method = arguments.with_linear(named("rodas4"), "rodas4", linear)
        func, beside, _ = told(func, given, method, "rodas4", mass, None)
        trace, leaves = arguments.trace_of(func, *given)
        problem = Problem(trace, None, method, func_time)
        with unchecked():
            y, found = initial(problem, leaves, beside, y0, jnp.asarray(t)[0])
        if known(found) and not found:
            raise ValueError(NOT_FOUND)
        return jax.tree.map(lambda y: tree.or_nan(found, y), y)
