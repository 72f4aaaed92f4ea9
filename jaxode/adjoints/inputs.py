"""Which inputs of a solve are differentiated, and the two passes that do it."""

from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero, custom_vjp_primal_tree_values

from jaxode.batch.vmap_rules import matmul_precision


def with_vjp(
    plain: Callable, forwards: Callable, backwards: Callable, prepared: Callable = lambda x: x
) -> Callable:
    """The solve `plain(integrator, f, y0, ss) -> (ys, report)`, differentiated by two functions.

    `forwards(x, rest) -> (ys, report, residuals)` is given the inputs that are differentiated, and the
    others; `backwards(x, rest, residuals, bars)` returns cotangents of the former. `bars` are those of
    ys and of `report.folded`. Both get the integrator as `prepared(integrator)`. Products backwards have the
    precision that was asked for forwards (`jax.default_matmul_precision`).
    """
    precision = matmul_precision()

    @jax.custom_vjp
    def solved(integrator, f, y0, ss):
        return plain(integrator, f, y0, ss)

    def forward_pass(integrator, f, y0, ss):
        x, rest = perturbed((f, y0, ss))
        rest = (prepared(custom_vjp_primal_tree_values(integrator)), rest)
        ys, report, residuals = forwards(x, rest)
        return (ys, report), (x, rest, residuals)

    def backward_pass(residuals, cotangents):
        bars = cotangents[0], cotangents[1].folded
        zero = lambda x: isinstance(x, SymbolicZero)
        dense = lambda x: jnp.zeros(x.aval.shape, x.aval.dtype) if zero(x) else x
        bars = jax.tree.map(dense, bars, is_leaf=zero)
        with jax.default_matmul_precision(precision):
            return None, *backwards(*residuals, bars)

    solved.defvjp(forward_pass, backward_pass, symbolic_zeros=True)
    return solved


def of_parts(form, solve, record, pull, prepared: Callable = lambda x: x) -> Callable:
    """`with_vjp` of parts (`jaxode.batch.vmap_rules.Part`), of one solve or of many, whose residuals and
    results are a solve's own."""
    if form.size is None:
        return with_vjp(solve, record, pull, prepared)
    size, every = form.size, partial(jax.tree.map, lambda _: True)
    flags = prepared(form.flags[0]), *form.flags[1:]

    def record_all(x, rest):
        return record.of_many(size, flags_of(x, flags), x, rest)

    def pull_all(x, rest, recorded, bars):
        of_each = *flags_of(x, flags), every(recorded), every(bars)
        return pull.of_many(size, of_each, x, rest, recorded, bars)

    return with_vjp(partial(solve.of_many, size, form.flags), record_all, pull_all, prepared)


def perturbed(inputs):
    """Split custom_vjp's inputs into what is differentiated and the rest, with None for the other."""
    is_primal = lambda x: isinstance(x, CustomVJPPrimal)
    mask = jax.tree.map(
        lambda x: bool(x.perturbed) and jnp.issubdtype(jnp.result_type(x.value), jnp.inexact),
        inputs,
        is_leaf=is_primal,
    )
    return eqx.partition(custom_vjp_primal_tree_values(inputs), mask)


def join(x, rest):
    """The integrator, and (f, y0, ss)."""
    return rest[0], eqx.combine(x, rest[1])


def flags_of(x, flags):
    """The flags of (x, rest), from those of (integrator, f, y0, ss)."""
    of_integrator, *of_given = flags
    of_x, of_rest = eqx.partition(tuple(of_given), present(x))
    return of_x, (of_integrator, of_rest)


def only(mask, tree_):
    """tree_ where the mask has a leaf, None elsewhere."""
    return eqx.filter(tree_, present(mask))


def present(x):
    """Whether there is a leaf, for every place of a tree that has None for others."""
    return jax.tree.map(lambda x: x is not None, x, is_leaf=lambda x: x is None)


def no_tangent(x):
    if jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        return jnp.zeros_like(x)
    return np.zeros(jnp.shape(x), jax.dtypes.float0)


def is_asked(bars):
    """Whether there is anything to go back for: a solve that a loss leaves out may have failed."""
    leaves = jax.tree.leaves(bars)
    return jnp.any(jnp.stack([jnp.any(w != 0) for w in leaves])) if leaves else jnp.array(False)
