"""Stacks of JAX's transformations around a function, none of which may change what it computes.

The function is `g(z, own, shared)`, of the numbers that are differentiated, of those that each case has of
its own, and of those that all cases share; its result is one array. `stacked` makes of it a function of many
cases: differentiated, inside or outside of what goes over the cases, with other transformations between.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

# What is made of a function of one case, and the order of the derivative. `w` is a cotangent of its
# result, `v` a tangent of z.


def loss_of(g):
    return lambda z, own, shared: jnp.vdot(own["w"].reshape(-1), g(z, own, shared).reshape(-1))


def tangent_of(z, own):
    return own["v"][: z.size]


def pushed(g):
    def tangent(z, own, shared):
        return jax.jvp(lambda z: g(z, own, shared), (z,), (tangent_of(z, own),))[1]

    return tangent


def linearized(g):
    def tangent(z, own, shared):
        return jax.linearize(lambda z: g(z, own, shared), z)[1](tangent_of(z, own))

    return tangent


def twice(g):
    gradient = jax.grad(loss_of(g))
    along = lambda z, own, shared: jnp.vdot(tangent_of(z, own), gradient(z, own, shared))
    return jax.grad(along)


DERIVATIVES = {
    "value": lambda g: g,
    "grad": lambda g: jax.grad(loss_of(g)),
    "value_and_grad": lambda g: lambda *args: jnp.append(*jax.value_and_grad(loss_of(g))(*args)),
    "jacrev": jax.jacrev,
    "jvp": pushed,
    "linearize": linearized,
    "jacfwd": jax.jacfwd,
    "hvp": lambda g: pushed(jax.grad(loss_of(g))),
    "hessian": lambda g: jax.hessian(loss_of(g)),
    "jacfwd of jacfwd": lambda g: jax.jacfwd(jax.jacfwd(loss_of(g))),
    "grad of grad": twice,
}
ORDER = {name: 1 for name in DERIVATIVES} | {"value": 0}
ORDER |= dict.fromkeys(("hvp", "hessian", "jacfwd of jacfwd", "grad of grad"), 2)
# What each adjoint can do.
ABLE = {
    "replay": [*"value grad value_and_grad jacrev hvp hessian".split(), "grad of grad"],
    "backsolve": "value grad value_and_grad jacrev".split(),
    "direct": list(DERIVATIVES),
    "forward": ["value", "jvp", "linearize", "jacfwd", "jacfwd of jacfwd"],
}

# What goes around a function of one case.


def in_a_branch(g):
    def chosen(z, own, shared):
        like = jax.eval_shape(g, z, own, shared)
        nothing = lambda *_: jnp.zeros(like.shape, like.dtype)
        return lax.cond(own["rtol"] > 0, g, nothing, z, own, shared)

    return chosen


def in_a_scan(g):
    """The last of two turns, of which only that has the right z."""

    def last(z, own, shared):
        like = jax.eval_shape(g, z, own, shared)
        turn = lambda _, i: (g(z * i, own, shared), None)
        return lax.scan(turn, jnp.zeros(like.shape, like.dtype), jnp.array([0.5, 1.0]))[0]

    return last


def with_a_vjp(g):
    rule = jax.custom_vjp(g)
    rule.defvjp(lambda *args: jax.vjp(g, *args), lambda vjp, bar: vjp(bar))
    return rule


def with_a_jvp(g):
    rule = jax.custom_jvp(g)
    rule.defjvp(lambda xs, xs_dot: jax.jvp(g, xs, xs_dot))
    return rule


def alone_in_a_batch(g):
    return lambda z, own, shared: jax.vmap(g, (0, None, None))(z[None], own, shared)[0]


AROUND = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "cond": in_a_branch,
    "scan": in_a_scan,
    "custom_vjp": with_a_vjp,
    "custom_jvp": with_a_jvp,
    "vmap": alone_in_a_batch,
}
# What an adjoint without forward, or without reverse mode cannot be put into.
REVERSE_ALONE, FORWARD_ALONE = {"custom_jvp"}, {"custom_vjp"}

# What goes over many cases.


def by_vmap(fn):
    return lambda zs, owns, shared: jax.vmap(fn, (0, 0, None))(zs, owns, shared)


def by_map(fn):
    return lambda zs, owns, shared: lax.map(lambda args: fn(*args, shared), (zs, owns))


def by_map_of_batches(fn):
    def lifted(zs, owns, shared):
        return lax.map(lambda args: fn(*args, shared), (zs, owns), batch_size=4)

    return lifted


def by_scan(fn):
    def lifted(zs, owns, shared):
        return lax.scan(lambda _, args: (None, fn(*args, shared)), None, (zs, owns))[1]

    return lifted


def by_two_vmaps(fn):
    def lifted(zs, owns, shared):
        halves = lambda x: x.reshape(2, -1, *x.shape[1:])
        both = jax.vmap(by_vmap(fn), (0, 0, None))(*jax.tree.map(halves, (zs, owns)), shared)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), both)

    return lifted


def over_devices(fn):
    mesh, split = Mesh(np.array(jax.devices()), "x"), PartitionSpec("x")
    specs = dict(in_specs=(split, split, PartitionSpec()), out_specs=split)
    return jax.shard_map(by_vmap(fn), mesh=mesh, check_vma=False, **specs)


OVER = {
    "vmap": by_vmap,
    "map": by_map,
    "map of batches": by_map_of_batches,
    "scan": by_scan,
    "vmap of vmap": by_two_vmaps,
    "shard_map": over_devices,
}


class Stack(NamedTuple):
    """Transformations: a derivative, what is around the function inside and outside of it, and what goes over
    the cases. `summed`: the derivative is that of the sum over all cases, outside of what goes over them."""

    derivative: str = "value"
    inside: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    over: str = "vmap"
    summed: bool = False


def around(fn, names):
    for name in names:
        fn = AROUND[name](fn)
    return fn


def stacked(stack: Stack, g):
    """A function of (zs, owns, shared): of all cases. With shared["z"] numbers that all cases share are
    differentiated too, and their derivative is a sum over the cases: then a pair is returned."""
    g = around(g, stack.inside)
    if not stack.summed:
        return OVER[stack.over](around(DERIVATIVES[stack.derivative](g), stack.outside))
    assert stack.derivative == "grad"
    lifted = OVER[stack.over](around(loss_of(g), stack.outside))

    def gradient(zs, owns, shared):
        def total(zs, z):
            of = shared if z is None else shared | {"z": z}
            return jnp.sum(lifted(zs, owns, of))

        if "z" in shared:
            return jax.grad(total, (0, 1))(zs, shared["z"])
        return jax.grad(total)(zs, None)

    return gradient


def random_stack(rng, adjoint: str, shared: bool = False) -> Stack:
    """A stack that an adjoint can be put into."""
    if shared:
        derivative, summed = "grad", True
    else:
        derivative = rng.choice(ABLE[adjoint])
        summed = derivative == "grad" and rng.random() < 0.5
    unable = {"direct": set(), "forward": FORWARD_ALONE}.get(adjoint, REVERSE_ALONE)
    if derivative in ABLE["forward"][1:]:
        unable = unable | {"custom_vjp"}
    if ORDER[derivative] == 2:
        unable = unable | {"custom_vjp"}  # JAX has no forward mode of its backward pass, in general
    names = [name for name in AROUND if name not in unable]
    some = lambda: tuple(rng.choice(names) for _ in range(rng.choice([0, 0, 1, 2])))
    over = rng.choice([*OVER, "vmap", "vmap"])
    if summed and over == "shard_map":
        over = "vmap"
    plain = [name for name in ("jit", "checkpoint", "cond", "vmap")]
    outside = some() if summed else tuple(rng.choice(plain) for _ in range(rng.choice([0, 0, 1])))
    return Stack(derivative, some(), outside, over, summed)
