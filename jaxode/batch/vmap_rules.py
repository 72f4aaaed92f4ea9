"""What JAX's transformations make of a part of a solve: of one solve, of many, on each platform.

`jax.vmap` of a loop runs it until the slowest solve is done, and a CPU wants another program than a
GPU. So the parts of a solve (the solve itself, the solve with what a backward pass needs, the backward
pass) are primitives, the only thing in JAX that has a rule of its own for each transformation. They
are made of public JAX alone: `jax.extend.core.Primitive` and the rule tables of `jax.interpreters`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxode.switches import look_at_cotangents, unchecked


class Form(NamedTuple):
    """What a part is lowered to: for one solve (`size` is None) or for many, on a platform.

    `flags`, a pytree of booleans like the arguments, says which leaves have a leading axis of that size.
    """

    platform: str
    size: Any  # None for one solve
    flags: Any


def matmul_precision() -> str | None:
    """What `jax.default_matmul_precision` is set to, here and now."""
    return jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]


class Part:
    """A part of a solve as one operation: `run(form, *args)`, of one solve or of many.

    A part is traced when it is lowered, which may be outside of the user's `with
    jax.default_matmul_precision(...)`: so it remembers the precision that was asked for where it was called.

    - `like(*args)`: zeros like the results of one solve, found without tracing it, and its effects.
    - `derivative(form)`: the same as a function that JAX can differentiate, if there is one. A part of a
      derivative has none: what is differentiated twice has a rule around it (`jaxode.adjoints.second_order`).
    - `own(flags, results)`: which leaves of the results of many solves have an axis of their own;
      all by default.
    - `spread(flags)`: which leaves of the arguments get an axis of their own under `jax.vmap`.
    - `able(size, flags)`: whether `run` knows of more solves than these; else JAX batches its loops.
    - `backward`: whether the results are cotangents.
    """

    def __init__(
        self, name: str, run: Callable, like: Callable, backward: bool = False, **rules: Callable
    ):
        self.run_form, self.like = run, like
        self.derivative = rules.get("derivative")
        self.own = rules.get("own", lambda flags, out: jax.tree.map(lambda _: True, out))
        self.spread = rules.get("spread", lambda flags: flags)
        self.able = rules.get("able", lambda size, flags: True)
        self.backward = backward
        self.primitive = primitive = Primitive(name)
        primitive.multiple_results = True
        primitive.def_impl(self.evaluate)
        primitive.def_effectful_abstract_eval(self.abstract)
        # A program may be lowered for another platform than that of the process.
        for platform in (None, "cpu"):
            lower = mlir.lower_fun(partial(self.run, platform or "other"), multiple_results=True)
            mlir.register_lowering(primitive, lower, platform=platform)
        batching.primitive_batchers[primitive] = self.batch
        ad.primitive_jvps[primitive] = refuse_again if self.derivative is None else self.jvp

    def __call__(self, *args):
        return self.of_many(None, jax.tree.map(lambda _: False, args), *args)

    def of_many(self, size, flags, *args):
        """Of many solves; `flags` says which leaves of the arguments have an axis of that size."""
        leaves, structure = jax.tree.flatten(args)
        leaves = list(map(jnp.asarray, leaves))
        of: dict[str, Any] = dict(
            structure=structure, size=size, flags=tuple(jax.tree.leaves(flags))
        )
        of["precision"] = matmul_precision()
        outs = self.primitive.bind(*leaves, **of)
        results = jax.eval_shape(lambda *leaves: self.results(leaves, **of)[0], *leaves)
        return jax.tree.unflatten(jax.tree.structure(results), outs)

    def evaluate(self, *leaves, **of):
        """Outside of `jit`: as a program of its own; with JAX's `disable_jit` as it stands."""
        with unchecked():  # what goes to other parts may be NaN where nothing is
            if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
                outs = self.run("other", *leaves, **of)
            else:
                outs = compiled(self, tuple(of.items()), *leaves)
        if self.backward:
            look_at_cotangents(outs)
        return outs

    def run(self, platform, *leaves, structure, size, flags, precision):
        """What it is lowered to."""
        if size == 0:  # no solves at all
            return jax.tree.leaves(self.results(leaves, structure, size, flags)[0])
        form = Form(platform, size, jax.tree.unflatten(structure, flags))
        with jax.default_matmul_precision(precision):
            return jax.tree.leaves(self.run_form(form, *jax.tree.unflatten(structure, leaves)))

    def results(self, leaves, structure, size, flags, precision=None):
        """Zeros like the results, and the effects."""
        one = [jnp.zeros(x.shape[1:], x.dtype) if flag else x for x, flag in zip(leaves, flags)]
        out, effects = self.like(*jax.tree.unflatten(structure, one))
        if size is None:
            return out, effects
        widen = lambda x, own: jnp.zeros((size, *x.shape), x.dtype) if own else x
        return jax.tree.map(
            widen, out, self.own(jax.tree.unflatten(structure, flags), out)
        ), effects

    def abstract(self, *avals, **of):
        plain = lambda a: a == ShapedArray(a.shape, a.dtype, weak_type=a.weak_type)
        if not all(map(plain, avals)):  # inside of `shard_map`: what varies has to be found out
            jaxpr = jax.make_jaxpr(lambda *leaves: self.run("other", *leaves, **of))(*avals)
            return jaxpr.out_avals, jaxpr.effects
        effects: Any = None

        def zeros(*leaves):
            nonlocal effects
            out, effects = self.results(leaves, **of)
            return jax.tree.leaves(out)

        return jax.make_jaxpr(zeros)(*avals).out_avals, effects

    def jvp(self, primals, tangents, *, structure, size, flags, precision):
        moving = [i for i, x_dot in enumerate(tangents) if not isinstance(x_dot, ad.Zero)]
        assert self.derivative is not None
        with jax.default_matmul_precision(precision):
            fn = self.derivative(Form("other", size, jax.tree.unflatten(structure, flags)))

        def of_moving(*xs):
            leaves = list(primals)
            for i, x in zip(moving, xs):
                leaves[i] = x
            return jax.tree.leaves(fn(*jax.tree.unflatten(structure, leaves)))

        xs, xs_dot = ([of[i] for i in moving] for of in (primals, tangents))
        xs_dot = reverse_only.bind(*xs_dot, *xs)
        with jax.default_matmul_precision(precision):
            outs, outs_dot = jax.jvp(of_moving, xs, xs_dot)
        still = lambda x_dot: getattr(x_dot, "dtype", None) == jax.dtypes.float0
        zero = lambda x: ad.Zero(jax.typeof(x).to_tangent_aval())
        return outs, [zero(x) if still(x_dot) else x_dot for x, x_dot in zip(outs, outs_dot)]

    def batch(self, leaves, axes, *, structure, size, flags, precision):
        """One solve becomes many; many become more, their axes joined."""
        not_split(leaves)
        new = [axis is not None for axis in axes]
        more = next(x.shape[axis] for x, axis in zip(leaves, axes) if axis is not None)
        leaves = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(leaves, axes)]
        if more == 1:  # a batch of one is one solve
            leaves = [x[0] if flag else x for x, flag in zip(leaves, new)]
            of = dict(structure=structure, size=size, flags=flags, precision=precision)
            outs = self.primitive.bind(*leaves, **of)
            return [x[None] for x in outs], [0] * len(outs)
        if not self.able(size, jax.tree.unflatten(structure, flags)):
            of = dict(structure=structure, size=size, flags=flags, precision=precision)
            one = partial(self.run, "other", **of)
            outs = jax.vmap(one, [0 if flag else None for flag in new], axis_size=more)(*leaves)
            return outs, [0] * len(outs)
        wanted = jax.tree.leaves(self.spread(jax.tree.unflatten(structure, new)))
        leaves = [widened(x, a, b, more) for x, a, b in zip(leaves, new, wanted)]
        if size is None:
            of = dict(structure=structure, size=more, flags=tuple(wanted))
        else:
            both = tuple(a or b for a, b in zip(wanted, flags))
            leaves = [joined(x, a, b, more, size) for x, a, b in zip(leaves, wanted, flags)]
            of = dict(structure=structure, size=more * size, flags=both)
        outs = self.primitive.bind(*leaves, precision=precision, **of)
        zeros = jax.eval_shape(
            lambda *leaves: self.results(leaves, structure, 0, of["flags"])[0], *leaves
        )
        own = [x.shape[:1] == (0,) for x in jax.tree.leaves(zeros)]
        if size is not None:
            outs = [
                x.reshape(more, size, *x.shape[1:]) if mine else x for x, mine in zip(outs, own)
            ]
        return outs, [0 if mine else None for mine in own]


def not_split(xs) -> None:
    """Raise if an array is split over an explicit mesh: the parts of a loop's state would be, too."""
    for x in jax.tree.leaves(xs):
        sharding = getattr(jax.typeof(x), "sharding", None)
        if sharding is not None and any(name is not None for name in sharding.spec):
            raise TypeError(
                f"a solve takes no array that is split over an explicit mesh (here {sharding.spec}): give each "
                "device its part by jax.shard_map(..., check_vma=False), or make a mesh of AxisType.Auto, or "
                "put the array whole on every device by jax.reshard(x, jax.P())."
            )


# Where tangents go into a part that has derivatives in reverse mode alone. JAX would say so when a program is
# lowered, in words that know of no adjoint. This comes first; of it nothing is left when the tangents are
# transposed. Its operands are (tangents, primals): the latter have tangents too in a jvp of a jvp.

NO_JVP = (
    "can't apply forward-mode differentiation (jvp) to a solve with this `adjoint`: pass adjoint='direct' or "
    "adjoint='forward'."
)


def refuse(*_, **__):
    raise TypeError(NO_JVP)


def refuse_again(*_, **__):
    raise NotImplementedError(
        "A solve with this `adjoint` has first derivatives alone: for second ones pass adjoint='replay' or "
        "adjoint='direct'."
    )


reverse_only = Primitive("reverse_only")
reverse_only.multiple_results = True
reverse_only.def_impl(refuse)
reverse_only.def_abstract_eval(lambda *avals: avals[: len(avals) // 2])
mlir.register_lowering(reverse_only, refuse)
batching.primitive_batchers[reverse_only] = refuse
ad.primitive_jvps[reverse_only] = refuse
ad.primitive_transposes[reverse_only] = lambda bars, *_: [*bars, *[None] * len(bars)]


@partial(jax.jit, static_argnums=(0, 1))
def compiled(part: Part, of, *leaves):
    """A part outside of `jit`: a program of its own."""
    return part.primitive.bind(*leaves, **dict(of))


def widened(x, has: bool, wants: bool, size: int):
    """x with an axis of this size, if it has none and wants one."""
    return jnp.broadcast_to(x, (size, *x.shape)) if wants and not has else x


def joined(x, outer: bool, inner: bool, more: int, size: int):
    """x with its axes of sizes `more` and `size`, as far as it has them, as one."""
    if not (outer or inner):
        return x
    if not outer:
        x = jnp.broadcast_to(x[None], (more, *x.shape))
    if not inner:
        x = jnp.broadcast_to(x[:, None], (x.shape[0], size, *x.shape[1:]))
    return x.reshape(more * size, *x.shape[2:])


def spread(size: int, xs, flags):
    """xs with an axis of this size everywhere: where there is no flag, the same for all."""
    return jax.tree.map(lambda x, flag: widened(x, flag, True, size), xs, flags)


def axes_of(flags):
    """Of what has an axis of its own that axis, for `jax.vmap`."""
    return jax.tree.map(lambda flag: 0 if flag else None, flags)


def summed(xs_bar, flags):
    """Cotangents of all solves: of what has no axis of its own, the sum."""
    one = lambda x_bar, flag: x_bar if flag else jnp.sum(x_bar, axis=0)
    return jax.tree.map(one, xs_bar, flags)
