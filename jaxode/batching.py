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
    """A function of leaves, traced when it is asked for: of what is differentiated, or batched, it never is."""

    def __init__(self, fn: Callable, structure):
        self.fn, self.structure = fn, structure
        self.jaxpr: Any = None

    def traced(self, avals):
        """Its jaxpr."""
        if self.jaxpr is None:
            fn = lambda *leaves: jax.tree.leaves(
                self.fn(*jax.tree.unflatten(self.structure, leaves))
            )
            self.jaxpr = jax.make_jaxpr(fn)(*avals)
        return self.jaxpr


class InLanes:
    """`one`, which `jax.vmap` turns into the solver `many(size, flags)`; `like(*args)` are zeros like
    its results, and its effects.

    Unlike `batched` it is seen before any derivative is taken, if the `vmap` is inside of the
    derivative: then `many` knows what the solves share, and its cotangents may be sums. A primitive,
    because that is the only thing in JAX with rules of its own for both. Its operands are the leaves
    of the arguments, of this structure; `size` is 0 for one solve.
    """

    def __init__(self, one: Solver, many: Callable, able: Callable, like: Callable):
        self.one, self.many, self.able, self.like = one, many, able, like
        self.primitive = Primitive("solve")
        self.primitive.multiple_results = True
        self.primitive.def_impl(self.run)
        self.primitive.def_effectful_abstract_eval(self.abstract)
        mlir.register_lowering(self.primitive, mlir.lower_fun(self.run, multiple_results=True))
        ad.primitive_jvps[self.primitive] = self.jvp
        batching.primitive_batchers[self.primitive] = self.batch

    def __call__(self, *args):
        leaves, structure = jax.tree.flatten(args)
        leaves = list(map(jnp.asarray, leaves))
        outs = self.bind(leaves, structure, 0, [False] * len(leaves))
        results = jax.eval_shape(lambda *args: self.like(*args)[0], *args)
        return jax.tree.unflatten(jax.tree.structure(results), outs)

    def bind(self, leaves, structure, size, flags):
        program = Program(self.solver(structure, size, flags).plain, structure)
        params = dict(program=program, structure=structure, size=size, flags=tuple(flags))
        return self.primitive.bind(*leaves, **params)

    def solver(self, structure, size, flags) -> Solver:
        return self.many(size, jax.tree.unflatten(structure, flags)) if size else self.one

    def run(self, *leaves, program, **_):
        jaxpr = program.traced(list(map(jax.typeof, leaves)))
        return core.jaxpr_as_fun(jaxpr)(*leaves)

    def abstract(self, *avals, program, structure, size, flags):
        plain = lambda a: a == ShapedArray(a.shape, a.dtype, weak_type=a.weak_type)
        if not all(map(plain, avals)):  # inside of `shard_map`: what varies has to be found out
            jaxpr = program.traced(avals)
            return jaxpr.out_avals, jaxpr.effects
        effects: Any = None

        def zeros(*leaves):
            nonlocal effects
            out, effects = self.like(*jax.tree.unflatten(structure, leaves))
            return jax.tree.leaves(out)

        axes = [0 if flag else None for flag in flags]
        results = jax.vmap(zeros, axes, axis_size=size) if size else zeros
        return jax.make_jaxpr(results)(*avals).out_avals, effects

    def jvp(self, primals, tangents, *, structure, size, flags, **_):
        moving = [i for i, x_dot in enumerate(tangents) if not isinstance(x_dot, ad.Zero)]

        def of_moving(*xs):
            leaves = list(primals)
            for i, x in zip(moving, xs):
                leaves[i] = x
            fn = self.solver(structure, size, flags).differentiable
            return jax.tree.leaves(fn(*jax.tree.unflatten(structure, leaves)))

        xs, xs_dot = ([of[i] for i in moving] for of in (primals, tangents))
        outs, outs_dot = jax.jvp(of_moving, xs, xs_dot)
        still = lambda x_dot: getattr(x_dot, "dtype", None) == jax.dtypes.float0
        zero = lambda x: ad.Zero(jax.typeof(x).to_tangent_aval())
        return outs, [zero(x) if still(x_dot) else x_dot for x, x_dot in zip(outs, outs_dot)]

    def batch(self, leaves, axes, *, structure, size, flags, **_):
        new = [axis is not None for axis in axes]
        more = next(x.shape[axis] for x, axis in zip(leaves, axes) if axis is not None)
        leaves = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(leaves, axes)]
        if not size and more == 1:  # a batch of one is one solve
            one = [x[0] if flag else x for x, flag in zip(leaves, new)]
            outs = [x[None] for x in self.bind(one, structure, 0, flags)]
        elif size:
            both = [a or b for a, b in zip(new, flags)]
            leaves = [joined(x, a, b, more, size) for x, a, b in zip(leaves, new, flags)]
            outs = self.bind(leaves, structure, more * size, both)
            outs = [x.reshape(more, size, *x.shape[1:]) for x in outs]
        else:
            given, given_flags = (jax.tree.unflatten(structure, of) for of in (leaves, new))
            if self.able(given_flags, *given):
                outs = self.bind(leaves, structure, more, new)
            else:
                lanes = jax.tree.unflatten(structure, [0 if flag else None for flag in new])
                outs = jax.tree.leaves(jax.vmap(self.one.differentiable, lanes)(*given))
        return outs, [0] * len(outs)


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
