"""Functions with a derivative of their own, which they keep inside of any of JAX's transformations.

`jax.custom_jvp` says the same of a function, but JAX forgets it where it splits a program in two, into what is
known already and what is not ("we assume non-trivial partial evaluation is only performed to build linear
functions", `jax.interpreters.partial_eval`). It splits the body of `lax.scan`, and of other calls, when that is
differentiated in reverse mode. A second derivative, or one by another input, is then that of the operations,
not that of the rule. A primitive is not taken apart: so a function here is one, which carries its jaxpr and
its rule along.
"""

from collections.abc import Callable
from functools import update_wrapper
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import ad, batching, mlir

ruled = core.Primitive("ruled")
ruled.multiple_results = True


class custom_jvp:
    """`jax.custom_jvp`, but the rule stays. Neither function nor rule may close over traced values.

    `still(out)` says which leaves of the results are constants to every derivative, whatever the rule says of
    them: such a one has an axis under `jax.vmap` only if it depends on something that has.
    """

    def __init__(self, fn: Callable, still: Callable | None = None):
        self.fn, self.still = fn, still
        self.rule: Any = None
        update_wrapper(self, fn)

    def defjvp(self, rule: Callable) -> Callable:
        """The rule, `rule(primals, tangents) -> (out, out_dot)`."""
        self.rule = rule
        return rule

    def __call__(self, *args):
        leaves, structure = jax.tree.flatten(args)
        leaves = list(map(jnp.asarray, leaves))
        given = lambda leaves: jax.tree.unflatten(structure, leaves)
        call, like = jax.make_jaxpr(lambda *xs: self.fn(*given(xs)), return_shape=True)(*leaves)
        still = self.still or (lambda out: jax.tree.map(lambda _: False, out))
        moving = [
            is_inexact(x) and not fixed
            for x, fixed in zip(jax.tree.leaves(like), jax.tree.leaves(still(like)))
        ]

        def rule(xs, xs_dot):
            dots = iter(xs_dot)
            every = [next(dots) if is_inexact(x) else without_tangent(x) for x in xs]
            out, out_dot = self.rule(given(xs), given(every))
            return jax.tree.leaves(out), chosen(jax.tree.leaves(out_dot), moving)

        outs = ruled.bind(*leaves, call=call, rule=rule, moving=tuple(moving))
        return jax.tree.unflatten(jax.tree.structure(like), outs)


def custom_root(residual: Callable, guess, iterate: Callable, tangent: Callable):
    """`lax.custom_root` of one array, with results that have no derivative; its rule stays, too.

    `iterate(residual, guess) -> (x, more)`; `tangent(product, right)` solves product(x) = right, which is
    linear. All three may close over traced values.
    """

    def linear(x, right):
        return tangent(jax.linearize(residual, x)[1], right)

    f, *of_f = hoisted(residual, guess)
    find, *of_find = hoisted(lambda guess: iterate(residual, guess), guess)
    undo, *of_undo = hoisted(linear, guess, guess)

    def root(of_f, of_find, of_undo, guess):
        return find(of_find, guess)

    fixed = lambda out: (False, jax.tree.map(lambda _: True, out[1]))
    found = custom_jvp(root, still=fixed)

    @found.defjvp
    def found_jvp(primals, tangents):
        (of_f, _, of_undo, _), (of_f_dot, *_) = primals, tangents
        x, more = found(*primals)
        right = jax.jvp(lambda consts: f(consts, x), (of_f,), (of_f_dot,))[1]
        return (x, more), (-undo(of_undo, x, right), jax.tree.map(without_tangent, more))

    return found(of_f, of_find, of_undo, guess)


def hoisted(fn: Callable, *examples):
    """fn of arrays as a function of (constants, *args), which holds none of them; and what it closes over."""
    closed, like = jax.make_jaxpr(fn, return_shape=True)(*examples)
    inner, structure = closed.jaxpr, jax.tree.structure(like)
    inner = inner.replace(constvars=(), invars=[*inner.constvars, *inner.invars])

    def call(consts, *args):
        outs = core.jaxpr_as_fun(core.ClosedJaxpr(inner, ()))(*consts, *args)
        return jax.tree.unflatten(structure, outs)

    return call, *closed.consts


def is_inexact(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def without_tangent(x):
    """The tangent of an array of integers."""
    return np.zeros(jnp.shape(x), jax.dtypes.float0)


def chosen(xs, flags) -> list:
    return [x for x, flag in zip(xs, flags) if flag]


def evaluate(*leaves, call, rule, moving):
    return core.jaxpr_as_fun(call)(*leaves)


def abstract(*avals, call, rule, moving):
    if list(avals) != call.in_avals:  # inside of `shard_map`: other axes may vary
        call = jax.make_jaxpr(core.jaxpr_as_fun(call))(*avals)
    return call.out_avals, call.effects


def jvp(primals, tangents, *, call, rule, moving):
    xs_dot = [ad.instantiate_zeros(x_dot) for x, x_dot in zip(primals, tangents) if is_inexact(x)]
    outs, outs_dot = rule(primals, xs_dot)
    dots = iter(outs_dot)
    zero = lambda x: ad.Zero(jax.typeof(x).to_tangent_aval())
    return outs, [next(dots) if moves else zero(x) for x, moves in zip(outs, moving)]


def batch(axis, leaves, axes, *, call, rule, moving):
    """The same of many, and its rule. What moves has an axis always, since its tangent may have one."""
    if all(d is None for d in axes):
        return ruled.bind(*leaves, call=call, rule=rule, moving=moving), [None] * len(moving)
    over = dict(axis_name=axis.name, axis_size=axis.size, spmd_axis_name=axis.spmd_name)
    axes_dot, out_axes = chosen(axes, map(is_inexact, leaves)), []

    def many(*xs):
        one = lambda *xs: (core.jaxpr_as_fun(call)(*xs), ())
        outs, _, out_axes[:] = mapped(one, tuple(axes), over, moving)(*xs)
        return outs

    def rule_of_many(xs, xs_dot):
        return mapped(rule, (list(axes), axes_dot), over, moving)(list(xs), xs_dot)[:2]

    call = jax.make_jaxpr(many)(*leaves)
    outs = ruled.bind(*leaves, call=call, rule=rule_of_many, moving=moving)
    return outs, out_axes


def mapped(fn: Callable, axes, over: dict, moving) -> Callable:
    """`fn(...) -> (outs, more)` by `jax.vmap`, and the axes of outs: None where there is none to keep."""

    def many(*args):
        alone = []

        def one(*args):
            outs, more = fn(*args)
            alone[:] = []
            for x in outs:
                without_axis.bind(x, found=alone)
            return outs, more

        outs, more = jax.vmap(one, axes, **over)(*args)
        kept = [x if moves or y is None else y for x, y, moves in zip(outs, alone, moving)]
        out_axes = [0 if moves or y is None else None for y, moves in zip(alone, moving)]
        return kept, more, out_axes

    return many


def look(_axis, xs, axes, *, found):
    """Inside of `jax.vmap`: add to `found` the value if it has no axis there, else None."""
    found.append(xs[0] if axes[0] is None else None)
    return xs[0], axes[0]


without_axis = core.Primitive("without_axis")
batching.fancy_primitive_batchers[without_axis] = look

ruled.def_impl(evaluate)
ruled.def_effectful_abstract_eval(abstract)
mlir.register_lowering(ruled, mlir.lower_fun(evaluate, multiple_results=True))
ad.primitive_jvps[ruled] = jvp
batching.fancy_primitive_batchers[ruled] = batch
