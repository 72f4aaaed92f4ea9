"""Tolerances: one for every leaf of a state, never so small that rounding decides.

Those that cannot mean what their user thinks get a warning.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxode import tree
from jaxode.arguments import is_real
from jaxode.methods.method import Method
from jaxode.outputs import Times
from jaxode.solution import Solution, Status
from jaxode.tree import known
from jaxode.words import no_foreign

SHOWN = 3  # names of components in a warning
TOLERANCE = 1.4e-8  # the default of rtol and atol, that of `jax.experimental.ode`


def of_leaves(rtol, atol, y0, method: Method) -> tuple[PyTree, PyTree]:
    """rtol and atol as pytrees like y0, never so small that rounding decides."""
    rtol, atol = per_leaf("rtol", rtol, y0), per_leaf("atol", atol, y0)
    within_reach(method, atol, y0)

    def floor(r, a, y):
        least = 4 * float(jnp.finfo(y.dtype).eps)
        if not known(r):
            return jnp.where((r > 0) & (r < least), jnp.asarray(least, r.dtype), r)
        if known(a) and np.any((r == 0) & (a == 0)):
            raise ValueError("`rtol` and `atol` are both 0: no step can be that accurate.")
        small = (r > 0) & (r < least)
        if np.any(small):
            warnings.warn(
                f"`rtol` is below what {y.dtype.name} can hold; {least:.2g} is used instead. "
                "Pass a float64 y0 (and set jax_enable_x64) to go further.",
                stacklevel=4,
            )
        return np.where(small, np.asarray(least, r.dtype), r)

    return jax.tree.map(floor, rtol, atol, y0), atol


def within_reach(method: Method, atol, y0) -> None:
    """Warn of an `atol` of an implicit method that is far below the roundings of what y0 holds.

    As in the chemistry of `jaxode.problems.e5`: what a small number is made of may be larger ones, or a
    law that ties it to them, and rounding then decides what it is.
    """
    for a, y in zip(jax.tree.leaves(atol), jax.tree.leaves(y0)):
        if not method.implicit or not known(a, y) or y.size == 0:
            continue
        rounding = float(jnp.finfo(y.dtype).eps) * float(np.max(np.abs(np.asarray(y))))
        if 0 < (most := float(np.max(a))) < 1e-4 * rounding:
            warnings.warn(
                f"`atol` = {most:.2g} is far below a rounding of the largest number of y0, {rounding:.2g}: "
                "numbers as small as that are right only where no larger one feeds them. Choose a larger "
                "`atol`; where a law ties small numbers to large ones, use it to leave one of them out; or "
                "pass atol=0 for relative accuracy alone.",
                stacklevel=4,
            )


def warn_of_unresolved(solution: Solution, static, y0, atol) -> None:
    """Warn, where values are known, of numbers that an implicit method's default `atol` takes for zero.

    As in the chemistry of `jaxode.problems.e5`, species at 1e-20: any number below `atol` is accepted for them,
    a negative one too, with success. In a problem that is not stiff a small number is rarely more than that;
    in a stiff one it may decide what the large ones do.
    """
    rows = isinstance(static.output, Times) and static.saved is None
    if not static.method.implicit or not rows or not known(solution, y0, atol):
        return
    default = per_leaf("atol", None, y0)
    same = jax.tree.map(
        lambda a, b: a.size == 1 and float(a.ravel()[0]) == float(b.ravel()[0]), atol, default
    )
    if not all(jax.tree.leaves(same)) or int(solution.status) != Status.SUCCESS:
        return

    def is_small(ys, a):
        largest = np.max(np.abs(np.asarray(ys)), 0, initial=0)
        return np.ravel((largest > 0) & (largest < np.asarray(a)))

    small = jax.tree.leaves(jax.tree.map(is_small, solution.ys, default))
    names = [name for name, flag in zip(tree.names_of(y0), np.concatenate(small)) if flag]
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        least = float(jax.tree.leaves(default)[0].ravel()[0])
        warnings.warn(
            f"{', '.join(names[:SHOWN])}{more}: below the default `atol` = {least:.2g} at all outputs, where "
            "digits mean nothing, and what they do to larger numbers may be wrong. Pass a smaller `atol` for "
            "each component (an array like y0), or atol=0 for relative accuracy alone.",
            stacklevel=4,
        )


def per_leaf(name, value, y0) -> PyTree:
    """A tolerance for every leaf of y0; a numpy array where its value is known."""
    if value is None:
        value = jax.tree.map(lambda y: max(TOLERANCE, 8 * float(jnp.finfo(y.dtype).eps)), y0)
    no_foreign(f"`{name}`", value)
    try:
        value = with_lists(value, y0)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{name}` must be a number, an array or a list of numbers, or a pytree like y0 (or a prefix of "
            f"it): y0 is {jax.tree.structure(y0)}, `{name}` is {jax.tree.structure(value)}."
        ) from error

    def leaf(path, tolerance, y):
        no_foreign(f"`{name}`", tolerance)
        if not is_real(tolerance):
            raise TypeError(f"`{name}` must hold real numbers, got {tolerance!r}.")
        array = np.asarray if known(tolerance) else jnp.asarray
        tolerance = array(tolerance, tree.real_dtype(y))
        if not fits(tolerance.shape, y.shape):
            raise ValueError(
                f"`{name}` has shape {tolerance.shape} where y0{jax.tree_util.keystr(path)} has "
                f"shape {y.shape}."
            )
        if known(tolerance) and not np.all(tolerance >= 0):
            raise ValueError(f"`{name}` must not be negative or NaN.")
        return tolerance.reshape((1,) * (y.ndim - tolerance.ndim) + tolerance.shape)

    return jax.tree_util.tree_map_with_path(leaf, value, y0)


def with_lists(value: PyTree, y0: PyTree) -> PyTree:
    """A value for every leaf of y0, where lists of numbers may stand for arrays."""
    try:
        return jax.tree.broadcast(value, y0)
    except ValueError:  # y0 has an array where the value has a list
        as_array = lambda x: np.asarray(x) if known(x) else jnp.stack([*map(jnp.asarray, x)])
        listed = lambda _, x: as_array(x) if isinstance(x, list | tuple) else x
        return jax.tree.broadcast(jax.tree.map(listed, y0, value), y0)


def fits(shape: tuple[int, ...], like: tuple[int, ...]) -> bool:
    """Whether an array of a shape can be broadcast to another."""
    try:
        return np.broadcast_shapes(shape, like) == like
    except ValueError:
        return False
