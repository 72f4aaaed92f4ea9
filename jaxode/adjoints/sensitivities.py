"""Forward sensitivities: the derivatives of a solve in a few numbers, carried along with it.

With S_i = dy/dp_i for every number p_i that is differentiated,

    dS_i/ds = df/dy S_i + df/dp_i,   S_i(0) = dy0/dp_i

(Hairer, Norsett, Wanner 1993, eq. I.14.14) is one more part of the same system, so that this is a
solve like any other. A step that is made of sums of slopes is then the derivative of the step of y,
sizes held fixed, which is what `replay` computes from the other side. The error norm sees y alone, so
the steps are those of the plain solve. Nothing is recorded, nothing is solved again, and there is one
program to compile instead of three: for a few numbers that is faster than to go back.
"""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxode import tree
from jaxode.adjoints.inputs import join
from jaxode.batch.vmap_rules import axes_of, summed
from jaxode.kernels.forms import PRODUCTS, count, derivatives_are_finite
from jaxode.outputs import Times

# Numbers that are differentiated, up to which it is faster than to go back (measured on a CPU,
# gradient by replay / by sensitivities): Lorenz, 3 numbers, 0.10 / 0.09 ms, compiled in 1.5 / 0.9 s;
# SIR of 36 states, 1 number, 0.12 / 0.07 ms, 2.8 / 1.1 s; Hodgkin-Huxley, 4 numbers, 0.83 / 0.57 ms.
FEW = 4
# For a large state or batch: Gray-Scott of 8,192 numbers, 4 numbers, 133 / 208 ms, a heat equation on
# 20,000 points, 2 numbers, 48 / 42 ms; 1,024 Lorenz systems, 3 numbers, 32 / 45 ms.
FEW_OF_MANY, LARGE_STATE, LARGE_BATCH = 2, 1000, 256


class Variational(eqx.Module):
    """The field of (y, S_1, S_2, ...), stacked: first the S_i of the numbers of f, then those of y0."""

    x: PyTree  # what is differentiated of the field
    rest: PyTree

    @property
    def trace(self):
        return self.rest.trace

    @property
    def of_state(self):
        """The field of the state alone."""
        return eqx.combine(self.x, self.rest)

    def __call__(self, ys, s):
        field = lambda x, y: eqx.combine(x, self.rest)(y, s)
        sensitivities = jax.tree.map(lambda y: y[1:], ys)
        directions = len(jax.tree.leaves(sensitivities)[0])
        ones = units(self.x, directions, 0)
        k, push = jax.linearize(field, self.x, of_state(ys))
        if count(self.trace.jaxpr, PRODUCTS):  # with a matrix: k vectors are faster than one matrix
            of = lambda i: push(*jax.tree.map(lambda x: x[i], (ones, sensitivities)))
            found = [of(i) for i in range(directions)]
            return jax.tree.map(lambda *k: jnp.stack(k), k, *found)
        return stacked(k, jax.vmap(push)(ones, sensitivities))


def of_state(ys: PyTree) -> PyTree:
    """The state without its sensitivities: all that the error norm sees."""
    return jax.tree.map(lambda y: y[0], ys)


def stacked(y: PyTree, sensitivities: PyTree) -> PyTree:
    return jax.tree.map(lambda y, s: jnp.concatenate([y[None], s]), y, sensitivities)


def numbers(x, flags) -> int:
    """How many numbers there are, of one solve."""
    size = lambda x, flag: math.prod(jnp.shape(x)[1:] if flag else jnp.shape(x))
    return sum(jax.tree.leaves(jax.tree.map(size, x, flags)))


def units(x: PyTree, total: int, first: int) -> PyTree:
    """For each of `total` directions an x: 1 in one of its numbers, from direction `first` on, else 0."""
    leaves, structure = jax.tree.flatten(x)
    out = []
    for leaf in leaves:
        one = np.zeros((total, math.prod(leaf.shape)), leaf.dtype)
        one[first : first + one.shape[1]] = np.eye(one.shape[1])
        first += one.shape[1]
        out.append(one.reshape(total, *leaf.shape))
    return jax.tree.unflatten(structure, out)


def suit(size, x, rest, flags) -> bool:
    """Whether this solve is one to carry its derivatives along: in few numbers, and finite ones.

    Going back, an infinite df/dy meets only cotangents that somebody asks for; here it would meet
    sensitivities that are 0, and make them NaN.
    """
    integrator, (f, y0, _) = join(x, rest)
    of_y0 = eqx.combine(flags[0][1], flags[1][1][1])
    many = size is not None and not (isinstance(size, int) and size <= LARGE_BATCH)
    large = many or numbers(y0, of_y0) > LARGE_STATE
    return (
        x[2] is None
        and integrator.output == Times()
        and integrator.fold is None
        and integrator.method.sums_slopes
        and not any(map(jnp.iscomplexobj, jax.tree.leaves(x)))
        and 0 < numbers(x[:2], flags[0][:2]) <= (FEW_OF_MANY if large else FEW)
        and derivatives_are_finite(f.trace.jaxpr)
    )


def record(solve, x, rest, flags):
    """The outputs, the report, and the sensitivities; `solve(flags, *args)` is the plain solve.

    Of one solve, or of many: `flags` says which leaves of (x, rest) have an axis of theirs.
    """
    args, of_args = extended(x, rest, flags)
    rows, report = solve(of_args, *args)
    axis = jnp.ndim(report.status)
    pick = lambda i: jax.tree.map(lambda row: row[(slice(None),) * (axis + 1) + (i,)], rows)
    return pick(0), report, pick(slice(1, None))


def extended(x, rest, flags):
    """The solve with its sensitivities: (integrator, field, y0, ss), and which leaves have an axis."""
    (of_f, of_y0, _), (of_integrator, of_rest) = flags
    integrator, (_, y0, ss) = join(x, rest)
    integrator = dataclasses.replace(integrator, controlled=of_state)
    first, total = numbers(x[0], of_f), numbers(x[:2], flags[0][:2])

    def start(y0):
        zero = jax.tree.map(lambda y: np.zeros((total, *y.shape), y.dtype), y0)
        given = jax.tree.map(lambda y, dx: None if dx is None else y, y0, x[1])
        return stacked(y0, eqx.combine(units(given, total, first), zero))

    every = eqx.combine(of_y0, of_rest[1])
    many = any(jax.tree.leaves(every))
    ys0 = jax.vmap(start, (axes_of(every),))(y0) if many else start(y0)
    of_ys0 = jax.tree.map(lambda _: many, every)
    args = integrator, Variational(x[0], rest[1][0]), ys0, ss
    return args, (of_integrator, Variational(of_f, of_rest[0]), of_ys0, of_rest[2])


def pull(size, x, sensitivities: PyTree, ys_bar: PyTree, of_x):
    """Cotangents of x: <ys_bar, S_i>; of what many solves share the sums."""
    if size is None:
        return paired(x, sensitivities, ys_bar)
    alone = jax.tree.map(lambda x, flag: x[0] if flag else x, x, of_x)
    found = jax.vmap(lambda s, w: paired(alone, s, w))(sensitivities, ys_bar)
    return summed(found, of_x)


def paired(x, sensitivities: PyTree, ys_bar: PyTree):
    """The same of one solve. What no one asks for may have failed: 0 times NaN is 0 here."""
    dtype = tree.widest(*map(tree.real_dtype, jax.tree.leaves(ys_bar)))

    def leaf(w, s):
        w = w[:, None]
        terms = jnp.real(jnp.where(w == 0, 0, s) * w)
        return jnp.sum(terms, [i for i in range(terms.ndim) if i != 1], dtype)

    found = sum(jax.tree.leaves(jax.tree.map(leaf, ys_bar, sensitivities)))
    leaves, structure = jax.tree.flatten(x)
    ends = np.cumsum([leaf.size for leaf in leaves])
    parts = [found[end - x.size : end] for x, end in zip(leaves, ends)]  # type: ignore[index]
    return structure.unflatten([p.reshape(x.shape).astype(x.dtype) for p, x in zip(parts, leaves)])
