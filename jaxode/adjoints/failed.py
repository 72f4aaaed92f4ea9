"""Derivatives of a failed solve: NaN, in both modes; but 0 where nothing depends on it.

A loss that leaves a failed solve out, `jnp.where(solution.status == 0, loss, 0)`, has a cotangent
of 0 there. A sum of products would make NaN of it (0 times NaN), and one failed solve would spoil
the gradient of a whole batch. So the poison is an operation of its own: NaN where x is not 0, and 0
where it is; its own derivative, and its own transpose.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import PyTree

from jaxode import tree
from jaxode.kernels.rules import custom_jvp
from jaxode.solution import Status


def values(x, failed):
    """NaN where a solve failed and x is not 0; else 0. `failed` is a scalar, or shaped like x."""
    return tree.or_nan(~failed | (x == 0), jnp.zeros((), x.dtype))


def jvp(primals, tangents):
    (x, failed), (x_dot, _) = primals, tangents
    still = isinstance(x_dot, ad.Zero)
    return poison.bind(x, failed), x_dot if still else poison.bind(x_dot, failed)


def transpose(x_bar, x, failed):
    return [x_bar if isinstance(x_bar, ad.Zero) else poison.bind(x_bar, failed), None]


def batch(args, axes):
    size = next(x.shape[axis] for x, axis in zip(args, axes) if axis is not None)
    x, failed = (
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(args, axes)
    )
    failed = failed.reshape(failed.shape + (1,) * (x.ndim - failed.ndim))
    return poison.bind(x, jnp.broadcast_to(failed, x.shape)), 0


poison = Primitive("poison")
poison.def_impl(jax.jit(values))
poison.def_abstract_eval(lambda x, failed: x)
mlir.register_lowering(poison, mlir.lower_fun(values, multiple_results=False))
ad.primitive_jvps[poison] = jvp
ad.primitive_transposes[poison] = transpose
batching.primitive_batchers[poison] = batch


@custom_jvp
def poisoned(ys: PyTree, success, inputs) -> PyTree:
    """ys; but if the solve failed, its derivatives are NaN, with respect to every input."""
    return ys


@poisoned.defjvp
def poisoned_jvp(primals, tangents):
    (ys, success, inputs), (ys_dot, _, inputs_dot) = primals, tangents
    dtype = tree.widest(*map(tree.real_dtype, inputs_dot))
    # At both ends, since what is not 0 may have a sum that is.
    parts = [part for x in inputs_dot for part in tree.real_parts(x)]
    total = sum(jnp.sum(poison.bind(part.astype(dtype), ~success)) for part in parts)

    def spread(y_dot):
        everywhere = jnp.broadcast_to(total, y_dot.shape).astype(tree.real_dtype(y_dot))
        more = poison.bind(everywhere, ~success)
        more = lax.complex(more, more) if jnp.iscomplexobj(y_dot) else more
        return y_dot + more.astype(y_dot.dtype)

    return poisoned(ys, success, inputs), jax.tree.map(spread, ys_dot)


@custom_jvp
def held(x: PyTree, failed):
    """x; but its derivatives are 0 if the solve that it goes into failed.

    Else they would be products with the derivatives of func where it failed, and 0 times NaN spoils
    what does not depend on them. `poisoned` makes those NaN that somebody asks for.
    """
    # Batched whenever its tangent is, which JAX 0.10 takes for granted.
    return jax.tree.map(lambda x: jnp.where(failed, x, x), x)


@held.defjvp
def held_jvp(primals, tangents):
    return held(*primals), zero_if(primals[1], tangents[0])


def zero_if(failed, x_dot):
    return jax.tree.map(lambda x_dot: jnp.where(failed, jnp.zeros_like(x_dot), x_dot), x_dot)


def held_by_status(fn: Callable, x, constants, status):
    """fn(x, constants), the same for a solve without events of which only the result tells whether it failed.

    The constants are arrays that are not differentiated.
    """
    solve = custom_jvp(fn)

    @solve.defjvp
    def solve_jvp(primals, tangents):
        x, constants = primals
        out, push = jax.linearize(lambda x: fn(x, constants), x)
        return out, push(zero_if(status(out) != Status.SUCCESS.value, tangents[0]))

    return solve(x, constants)
