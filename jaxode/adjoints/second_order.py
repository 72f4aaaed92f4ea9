"""Derivatives of a forward and a backward pass, so that a solve can be differentiated twice."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxode import tree
from jaxode.adjoints.inputs import join, no_tangent, with_vjp
from jaxode.kernels.rules import custom_jvp
from jaxode.stepping.stability import differentiated


class Passes(NamedTuple):
    """The solve, the same with its residuals, and its vjp: of one solve, or of many.

    The plain ones do the same, and are differentiated by JAX in forward mode.
    """

    solve: Callable  # (integrator, f, y0, ss) -> ys, report
    record: Callable  # (x, rest) -> ys, report, residuals
    pull: Callable  # (x, rest, residuals, bars) -> x_bar
    plain_solve: Callable
    plain_record: Callable
    plain_pull: Callable


def twice_differentiable(passes: Passes) -> Callable:
    """The differentiable solve of these passes.

    First derivatives of the forward and the backward pass let it be differentiated again, by
    forward and by reverse mode. With S(x) the solve (its steps held fixed), x all that it depends on
    and w a cotangent of S, both follow from phi(x, w) = <w, S(x)>: the forward pass is d phi / d w,
    the backward pass d phi / d x, and a tangent of the two is the Hessian of phi applied to a tangent
    of (x, w). A Hessian is symmetric: its transpose, which reverse mode asks for, is itself.
    `lax.custom_linear_solve` is how one says so to JAX.
    """

    def record(x, rest):
        """The solve, with its residuals."""
        ys, report, residuals = passes.record(x, rest)
        return (ys, report.folded), (report._replace(folded=None), residuals)

    # The residuals of many solves may be empty, and the same for all of them.
    recorded = custom_jvp(record, still=lambda out: tuple(map(all_of, out, (False, True))))

    @recorded.defjvp
    def recorded_jvp(primals, tangents):
        (x, rest), (x_dot, _) = primals, tangents
        out, (report, residuals) = recorded(x, rest)

        def hessian(v):
            return passes.pull(x, rest, residuals, v[1]), push(x, rest, v[0])

        _, out_dot = symmetric(hessian, (x_dot, jax.tree.map(jnp.zeros_like, out)), x)
        still = jax.tree.map(no_tangent, (report, residuals))
        return (out, (report, residuals)), (out_dot, still)

    pulled = custom_jvp(passes.pull)

    @pulled.defjvp
    def pulled_jvp(primals, tangents):
        (x, rest, residuals, bars), (x_dot, _, _, bars_dot) = primals, tangents

        def gradient(x, bars):
            return passes.plain_pull(x, rest, passes.plain_record(x, rest)[2], bars)

        def hessian(v):
            return jax.jvp(gradient, (x, bars), v)[1], push(x, rest, v[0])

        x_bar_dot, _ = symmetric(hessian, (x_dot, bars_dot), x)
        return pulled(x, rest, residuals, bars), x_bar_dot

    def push(x, rest, x_dot):
        """The tangent of the solve."""

        def of(x):
            integrator, (f, y0, ss) = join(x, rest)
            ys, report = passes.plain_solve(integrator, f, y0, ss)
            return ys, report.folded

        return jax.jvp(of, (x,), (x_dot,))[1]

    def forwards(x, rest):
        (ys, folded), (report, residuals) = recorded(x, rest)
        return ys, report._replace(folded=folded), residuals

    return with_vjp(passes.solve, forwards, pulled, differentiated)


def symmetric(operator, v, x):
    """A linear operator that is its own transpose, applied to v. It may depend on x."""
    one = once(x)
    # JAX transposes the operator only if every part of v is linear: zeros are made so.
    total = sum((jnp.sum(part.real).astype(one.dtype) for part in jax.tree.leaves(v)), 0 * one)
    v = jax.tree.map(lambda part: part + (0 * total).astype(part.dtype), v)
    return lax.custom_linear_solve(
        lambda v: jax.tree.map(lambda part: tree.scale(one, part), v),
        v,
        solve=lambda _, v: operator(v),
        symmetric=True,
    )


def all_of(tree_, flag: bool):
    return jax.tree.map(lambda _: flag, tree_)


@custom_jvp
def once(x):
    """The number 1; it cannot be differentiated, so that no third derivative is silently wrong."""
    return jnp.ones(())


@once.defjvp
def once_jvp(primals, tangents):
    raise NotImplementedError(
        "adjoint='replay' has first and second derivatives; for third ones pass adjoint='direct'."
    )
