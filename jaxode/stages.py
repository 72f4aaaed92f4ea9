"""A step as a loop over its stages, with all slopes in one array; and the way back through it.

A stage is then a product of a row of the table with the slopes, and the program has the field once,
where `step` writes it down for every stage. For many solves at once that is the faster form. For one
solve it depends on the field, since XLA on a CPU fuses what is written one after another:

| field, float64 but for the networks | forward, written out / loop | gradient, written out / loop |
|---|---|---|
| heat equation on 10,000 points | 129 / 36 ms | 532 / 115 ms |
| seven stars (sums over pairs) | 1.6 / 2.7 ms | 12.5 / 9.6 ms |
| MLP 64-128-128-64, a batch of 256 | 4.1 / 4.9 ms | 16.5 / 20 ms |
| flow of 2 layers of 32, exact trace | 1.6 / 1.2 ms | 5.0 / 4.5 ms, compiled in 8.6 / 4.3 s |
| ODE-Net of 16 channels on 4 x 4 pixels | 6.9 / 6.5 ms | 34 / 31 ms, compiled in 6.4 / 4.3 s |
| ODE-Net of 64 channels on 7 x 7 pixels | 113 / 113 ms | 450 / 520 ms, compiled in 9.2 / 5.1 s |

A difference of neighbours reads each slope at several places, and XLA computes it again for each of
them, stage within stage; a matrix product, or a sum, is computed once. A field of many of these is many
kernels, whose number is what compilation takes long for, and on a small state the rows cost nothing
beside them. `which` finds out.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jaxtyping import PyTree

from jaxode import scalars, tree
from jaxode.splittings import Splitting
from jaxode.tableaus import Tableau

MOVES = frozenset("dynamic_slice gather pad rev slice split transpose unstack".split())
KEEPS = scalars.ELEMENTWISE | {"broadcast_in_dim", "concatenate", "reshape", "squeeze", "stack"}
PRODUCTS = frozenset(("conv_general_dilated", "dot_general"))
MANY, SMALL = 10, 10_000  # kernels of a field, and numbers of a state
CALLS = scalars.CALLS | {"custom_vjp_call"}


class Loops(NamedTuple):
    """Whether the stages of a step of one solve are to be a loop, and those of its vjp."""

    forward: bool
    backward: bool


def which(table: Tableau | Splitting, f, y, s) -> Loops:
    """Which form is the faster one for a field: measured on a CPU; elsewhere stages are written out."""
    if jax.default_backend() != "cpu" or isinstance(table, Splitting):
        return Loops(False, False)
    jaxpr = jax.make_jaxpr(lambda f, y, s: f(y, s))(f, y, s).jaxpr
    states = jaxpr.invars[len(jax.tree.leaves(f)) : -1]
    whole = lambda v: Read(v, tuple((0, n) for n in v.aval.shape), ())
    reads = read(jaxpr, {v: frozenset([whole(v)]) for v in states})
    neighbours = any(a.meets(b) for r in reads for a, b in itertools.combinations(r, 2))
    small = sum(x.size for x in jax.tree.leaves(y)) <= SMALL
    many = small and count(jaxpr, PRODUCTS | scalars.REDUCTIONS.keys()) >= MANY
    forward = neighbours or many
    return Loops(forward, forward or not count(jaxpr, PRODUCTS))


class Read(NamedTuple):
    """A place that is read: a box in an array of the state, and what moved that box about."""

    array: Any
    box: tuple[tuple[int, int], ...]
    moves: tuple

    def meets(self, other) -> bool:
        """Whether the same numbers are in both, at different places."""
        boxes = zip(self.box, other.box)
        return self.array is other.array and all(a < d and c < b for (a, b), (c, d) in boxes)


def read(jaxpr, reads: dict) -> list[frozenset]:
    """What of the state each result is made of, as far as XLA would compute that more than once."""

    def of(atom):
        return frozenset() if isinstance(atom, core.Literal) else reads.get(atom, frozenset())

    for eqn in jaxpr.eqns:
        found = frozenset().union(*map(of, eqn.invars))
        if eqn.primitive.name in CALLS:
            inner = scalars.inner(eqn).jaxpr
            outs = read(inner, dict(zip(inner.invars, map(of, eqn.invars))))
        elif eqn.primitive.name in KEEPS:
            outs = [found] * len(eqn.outvars)
        elif eqn.primitive.name in MOVES:
            outs = [
                frozenset(moved(place, eqn, i) for place in found) for i in range(len(eqn.outvars))
            ]
        else:  # a sum, a product: XLA computes it once
            outs = [frozenset()] * len(eqn.outvars)
        reads.update(zip(eqn.outvars, outs))
    return list(map(of, jaxpr.outvars))


def moved(place: Read, eqn, i: int) -> Read:
    """Where result i of a slice, or the like, is read from: another box if it is of the state itself."""
    if eqn.invars[0] is place.array and eqn.primitive.name == "slice":
        starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
        return place._replace(box=tuple(zip(starts, limits)))
    if eqn.invars[0] is place.array and eqn.primitive.name == "unstack":
        box, axis = list(place.box), eqn.params["axis"]
        box[axis] = (i, i + 1)
        return place._replace(box=tuple(box))
    return place._replace(moves=(*place.moves, eqn.outvars[i]))


def count(jaxpr, primitives: frozenset) -> int:
    """How many equations there are of some primitives."""
    inner = lambda eqn: sum(count(j, primitives) for j in core.jaxprs_in_params(eqn.params))
    return sum((eqn.primitive.name in primitives) + inner(eqn) for eqn in jaxpr.eqns)


def matrix(table: Tableau, extra: bool) -> tuple[np.ndarray, np.ndarray]:
    """A and c of a table; with the stages of dense output, if they are wanted."""
    rows = (*table.a, *(table.extra_a if extra else ()))
    a = np.zeros((len(rows), len(rows)))
    for i, row in enumerate(rows):
        a[i, : len(row)] = row
    return a, np.array((*table.c, *(table.extra_c if extra else ())))


def product(weights, ks):
    """sum_i w_i k_i over the leading axis, in float32 or better; weights that are missing are 0."""

    def leaf(k):
        k = tree.wide(k)
        w = jnp.asarray(weights, k.dtype)
        w = jnp.pad(w, (0, len(k) - len(w)))
        return jnp.tensordot(w, k, 1, precision=lax.Precision.HIGHEST)

    return jax.tree.map(leaf, ks)


def room_for(y, count: int):
    """An array for so many states."""
    return jax.tree.map(lambda y: jnp.zeros((count, *y.shape), y.dtype), y)


def of_one(table: Tableau, f) -> "Stages":
    """The stages of one solve."""
    return Stages(table, lambda ks, i, y, s: tree.put(i, f(y, s), ks))


def alone(h, like):
    """A number, so that it multiplies an array."""
    return lax.convert_element_type(h, like.dtype)


class Stages(NamedTuple):
    """A system, as far as the stages of a step need to know it."""

    table: Tableau
    slopes: Callable  # (ks, i, y, s) -> ks with f(y, s) in row i
    spread: Callable = alone  # (h, array) -> what multiplies the array, for a step size or a weight

    def moved(self, y, h, k):
        """y + h k."""
        return jax.tree.map(lambda y, k: tree.moved(y, self.spread(h, k) * k), y, k)

    def run(self, y, ks, s, h, start: int, stop: int, seen=None):
        """Stages `start` to `stop` - 1 of a step: the last y_i, and slopes in the rows of ks.

        Every y_i goes into a row of `seen`, if that is given.
        """
        a, c = matrix(self.table, stop > len(self.table.c))

        def stage(state):
            i, _, ks, seen = state
            y1 = self.moved(y, h, product(tree.row(jnp.asarray(a), i), ks))
            ks = self.slopes(ks, i, y1, s + tree.row(jnp.asarray(c, h.dtype), i) * h)
            return i + 1, y1, ks, seen if seen is None else tree.put(i, y1, seen)

        begin = jnp.asarray(start, jnp.int32), y, ks, seen
        _, y1, ks, seen = lax.while_loop(lambda state: state[0] < stop, stage, begin)
        return y1, ks, seen

    def step(self, y, k, s, h):
        """y at the end of a step, and all slopes in rows."""
        count = len(self.table.c)
        return self.run(y, tree.put(0, k, room_for(y, count)), s, h, 1, count)[:2]

    def seen(self, y, k, s, h, inside: bool):
        """The slopes and the y_i of a step, all in rows: what `back` needs."""
        total = len(self.table.c) + inside * len(self.table.extra_c)
        ks, seen = tree.put(0, k, room_for(y, total)), room_for(y, total)
        return self.run(y, ks, s, h, 1, total, seen)[1:]

    def coefficients(self, y, h, ks) -> list:
        """The d_p of the solution inside (see `step.coefficients`)."""
        zero = jax.tree.map(jnp.zeros_like, y)
        return [self.moved(zero, h, product(weights, ks)) for weights in self.table.dense]

    def back(self, pull: Callable, seen, s, h, ends, f_bar, d_bar=None):
        """The vjp of a step, stage by stage: cotangents of y and k, and f_bar with those of f added.

        With y_i = y + h sum_j a_ij k_j and k_i = f(y_i), the cotangents from the last stage to the
        first are k_i' = h sum_(j > i) a_ji y_j' and y_i' = (df/dy)^T k_i'. The step ends at its last
        y_i, and k of the next step is its last k_i: `ends` are the cotangents of these two. `d_bar`
        are those of the d_p, in rows; `pull(y, s, w)` is the vjp of f.
        """
        table = self.table
        total, last = len(jax.tree.leaves(seen)[0]), len(table.c) - 1
        a, c = matrix(table, total > len(table.c))
        zero = jax.tree.map(jnp.zeros_like, ends[0])
        dense = np.zeros((len(table.dense), total))
        for p, weights in enumerate(table.dense if d_bar is not None else ()):
            dense[p, : len(weights)] = weights

        def slope_bar(i, ys_bar):
            """The cotangent of k_i, but for that of the next step."""
            k_bar = self.moved(zero, h, product(tree.row(jnp.asarray(a.T), i), ys_bar))
            if d_bar is None:
                return k_bar
            return self.moved(k_bar, h, product(tree.row(jnp.asarray(dense.T), i), d_bar))

        def stage(state):
            i, f_bar, ys_bar = state
            at_last = lambda x: jax.tree.map(lambda x: jnp.where(i == last, x, 0), x)
            k_bar = jax.tree.map(jnp.add, slope_bar(i, ys_bar), at_last(ends[1]))
            s_i = s + tree.row(jnp.asarray(c, h.dtype), i) * h
            f_more, y_bar = pull(tree.row(seen, i), s_i, k_bar)
            y_bar = jax.tree.map(jnp.add, y_bar, at_last(ends[0]))
            return i - 1, jax.tree.map(jnp.add, f_bar, f_more), tree.put(i, y_bar, ys_bar)

        state: Any = jnp.asarray(total - 1, jnp.int32), f_bar, room_for(zero, total)
        first, f_bar, ys_bar = lax.while_loop(lambda state: state[0] > 0, stage, state)
        narrow = lambda x, like: lax.convert_element_type(x, like.dtype)
        y_bar: PyTree = jax.tree.map(narrow, product(np.ones(total), ys_bar), zero)
        return y_bar, slope_bar(first, ys_bar), f_bar
