"""What `jax.vmap` makes of a function of one solve: a function of many, found by itself.

`jax.vmap` of a loop runs it until the slowest solve is done. The two functions here give JAX another
rule: the loop over lanes. One is for values, the other for what is differentiated as well.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.custom_batching import custom_vmap
from jax.extend import core
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def batched(single: Callable, many: Callable, able: Callable) -> Callable:
    """`single`, which `jax.vmap` turns into `many(size, flags, *args)`, where `able(flags, *args)`.

    `flags` says which leaves of the args have a leading axis of that size; `many` returns the
    results, and the same of them. Under another `vmap` the two axes become one, and it is asked
    again: a vmap of cotangents alone may be inside of one of the solves.
    """

    def along(size, flags):
        has: Any = None

        def one_axis(*args):
            nonlocal has
            if able(flags, *args):
                out, has = many(size, flags, *args)
            else:
                axes = jax.tree.map(lambda flag: 0 if flag else None, flags)
                out = jax.vmap(single, axes, axis_size=size)(*args)
                has = jax.tree.map(lambda _: True, out)
            return out

        call = custom_vmap(one_axis)

        @call.def_vmap
        def two_axes(more, outer, *args):
            outer = tuple(outer)
            both = jax.tree.map(lambda a, b: a or b, outer, flags)
            join = lambda x, a, b: joined(x, a, b, more, size)
            out, has = along(more * size, both)(*jax.tree.map(join, args, outer, flags))
            split = lambda x, h: x.reshape(more, size, *x.shape[1:]) if h else x
            return jax.tree.map(split, out, has), has

        return lambda *args: (call(*args), has)

    call = custom_vmap(single)
    call.def_vmap(lambda size, flags, *args: along(size, tuple(flags))(*args))
    return call


class Solver(NamedTuple):
    """A function of (solve, f, y0, ss), as values and with derivatives."""

    plain: Callable
    differentiable: Callable


class Program:
    """A function of leaves, traced when it is asked for: of what is differentiated, or batched, it never is.

    `shape` is the structure of its results, as soon as anything has found them.
    """

    def __init__(self, fn: Callable, structure):
        self.fn, self.structure = fn, structure
        self.shape: Any = None
        self.jaxpr: Any = None

    def traced(self, avals):
        """Its jaxpr."""
        if self.jaxpr is None:
            of_leaves = lambda *leaves: self.flat(
                self.fn(*jax.tree.unflatten(self.structure, leaves))
            )
            self.jaxpr = jax.make_jaxpr(of_leaves)(*avals)
        return self.jaxpr

    def flat(self, out):
        """Results as leaves."""
        leaves, self.shape = jax.tree.flatten(out)
        return leaves


def in_lanes(one: Solver, many: Callable, able: Callable, like: Callable) -> Callable:
    """`one`, which `jax.vmap` turns into the solver `many(size, flags)`; `like(*args)` are zeros like
    its results, and its effects.

    Unlike `batched` it is seen before any derivative is taken, if the `vmap` is inside of the
    derivative: then `many` knows what the solves share, and its cotangents may be sums. A primitive,
    because that is the only thing in JAX with rules of its own for both.
    """
    primitive = Primitive("solve")
    primitive.multiple_results = True

    def run(*leaves, program, **_):
        jaxpr = program.traced(list(map(jax.typeof, leaves)))
        return core.jaxpr_as_fun(jaxpr)(*leaves)

    def bind(leaves, structure, size, flags):
        program = Program(solver(structure, size, flags).plain, structure)
        outs = primitive.bind(
            *leaves, program=program, structure=structure, size=size, flags=tuple(flags)
        )
        return outs, program.shape

    def solver(structure, size, flags) -> Solver:
        return many(size, jax.tree.unflatten(structure, flags)) if size else one

    def jvp(primals, tangents, *, program, structure, size, flags):
        moving = [i for i, x_dot in enumerate(tangents) if not isinstance(x_dot, ad.Zero)]

        def of_moving(*xs):
            leaves = list(primals)
            for i, x in zip(moving, xs):
                leaves[i] = x
            fn = solver(structure, size, flags).differentiable
            return program.flat(fn(*jax.tree.unflatten(structure, leaves)))

        xs, xs_dot = ([of[i] for i in moving] for of in (primals, tangents))
        outs, outs_dot = jax.jvp(of_moving, xs, xs_dot)
        still = lambda x_dot: getattr(x_dot, "dtype", None) == jax.dtypes.float0
        zero = lambda x: ad.Zero(jax.typeof(x).to_tangent_aval())
        return outs, [zero(x) if still(x_dot) else x_dot for x, x_dot in zip(outs, outs_dot)]

    def batch(leaves, axes, *, program, structure, size, flags):
        new = [axis is not None for axis in axes]
        more = next(x.shape[axis] for x, axis in zip(leaves, axes) if axis is not None)
        leaves = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(leaves, axes)]
        given = jax.tree.unflatten(structure, leaves)
        if not size and not able(jax.tree.unflatten(structure, new), *given):
            lanes = jax.tree.unflatten(structure, [0 if b else None for b in new])
            outs = program.flat(jax.vmap(one.differentiable, lanes)(*given))
            return outs, [0] * len(outs)
        if not size:
            outs, program.shape = bind(leaves, structure, more, new)
            return outs, [0] * len(outs)
        both = [a or b for a, b in zip(new, flags)]
        leaves = [joined(x, a, b, more, size) for x, a, b in zip(leaves, new, flags)]
        outs, program.shape = bind(leaves, structure, more * size, both)
        return [x.reshape(more, size, *x.shape[1:]) for x in outs], [0] * len(outs)

    primitive.def_impl(run)

    @primitive.def_effectful_abstract_eval
    def abstract(*avals, program, structure, size, flags):
        effects: Any = None

        def zeros(*args):
            nonlocal effects
            out, effects = like(*args)
            return out

        def results(*leaves):
            axes = jax.tree.unflatten(structure, [0 if flag else None for flag in flags])
            all_zeros = jax.vmap(zeros, axes, axis_size=size) if size else zeros
            return program.flat(all_zeros(*jax.tree.unflatten(structure, leaves)))

        plain = lambda a: a == ShapedArray(a.shape, a.dtype, weak_type=a.weak_type)
        if not all(map(plain, avals)):  # inside of `shard_map`: what varies has to be found out
            jaxpr = program.traced(avals)
            return jaxpr.out_avals, jaxpr.effects
        return jax.make_jaxpr(results)(*avals).out_avals, effects

    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=True))
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch

    def call(*args):
        leaves, structure = jax.tree.flatten(args)
        leaves = list(map(jnp.asarray, leaves))
        outs, shape = bind(leaves, structure, 0, [False] * len(leaves))
        return jax.tree.unflatten(shape, outs)

    return call


def spread(size: int, xs, flags):
    """xs with an axis of this size everywhere: where there is no flag, the same for all."""
    one = lambda x, flag: x if flag else jnp.broadcast_to(x, (size, *x.shape))
    return jax.tree.map(one, xs, flags)


def summed(xs_bar, flags):
    """Cotangents of all solves: of what has no axis of its own, the sum."""
    one = lambda x_bar, flag: x_bar if flag else jnp.sum(x_bar, axis=0)
    return jax.tree.map(one, xs_bar, flags)


def joined(x, outer: bool, inner: bool, more: int, size: int):
    """x with its axes of sizes `more` and `size`, as far as it has them, as one."""
    if not (outer or inner):
        return x
    if not outer:
        x = jnp.broadcast_to(x[None], (more, *x.shape))
    if not inner:
        x = jnp.broadcast_to(x[:, None], (x.shape[0], size, *x.shape[1:]))
    return x.reshape(more * size, *x.shape[2:])
