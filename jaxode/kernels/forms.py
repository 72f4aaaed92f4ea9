"""Which form of a step suits a field: written out, or a loop over its stages.

For one solve that depends on the field, since XLA on a CPU fuses what is written one after another:

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
beside them.
"""

import itertools
from typing import Any, NamedTuple

import jax
from jax.extend import core

from jaxode.kernels.one_call import ELEMENTWISE

MOVES = frozenset("dynamic_slice gather pad rev slice split transpose unstack".split())
KEEPS = ELEMENTWISE | {"broadcast_in_dim", "concatenate", "reshape", "squeeze", "stack"}
PRODUCTS = frozenset(("conv_general_dilated", "dot_general"))
REDUCTIONS = frozenset("reduce_and reduce_max reduce_min reduce_sum".split())
CALLS = frozenset("jit pjit closed_call core_call custom_jvp_call custom_vjp_call".split())
MANY, SMALL = 10, 10_000  # kernels of a field, and numbers of a state
# Finite derivatives wherever their value is finite; those of a root, say, are not.
SMOOTH = (
    frozenset(
        """abs add add_any and ceil clamp concatenate convert_element_type copy cos cosh cumsum
        broadcast_in_dim div dot_general dynamic_slice dynamic_update_slice eq erf erfc exp exp2
        expand_dims expm1 floor ge gt integer_pow iota le log log1p logistic lt max min mul ne neg not or
        reduce_max reduce_min reduce_sum reshape round select_n sign sin sinh square squeeze stack
        stop_gradient sub tan tanh xor conv_general_dilated""".split()
    )
    | MOVES
)
TINY, FEW = 64, 40  # numbers of a state, and operations of a field, that are few in one call


class Loops(NamedTuple):
    """Whether the stages of a step are to be a loop, and those of its vjp."""

    forward: bool
    backward: bool


def which(f, y, s, fused=False) -> Loops:
    """Which form of the stages of a table is the faster one for a field: measured on a CPU.

    In one call (`fused`) a loop compiles in a third of the time, and takes 5 to 15 % longer: only a
    field of a few operations is written out, forwards.
    """
    jaxpr = jax.make_jaxpr(lambda f, y, s: f(y, s))(f, y, s).jaxpr
    states = jaxpr.invars[len(jax.tree.leaves(f)) : -1]
    whole = lambda v: Read(v, tuple((0, n) for n in v.aval.shape), ())
    reads = read(jaxpr, {v: frozenset([whole(v)]) for v in states})
    neighbours = any(a.meets(b) for r in reads for a, b in itertools.combinations(r, 2))
    size = sum(x.size for x in jax.tree.leaves(y))
    if fused:
        few = size <= TINY and count(jaxpr, None) <= FEW
        return Loops(not few, True)
    small = size <= SMALL
    many = small and count(jaxpr, PRODUCTS | REDUCTIONS) >= MANY
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
            inner = next(iter(core.jaxprs_in_params(eqn.params)))
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


def derivatives_are_finite(jaxpr) -> bool:
    """Whether the derivatives of a field are finite wherever its value is."""
    inner = lambda eqn: all(map(derivatives_are_finite, core.jaxprs_in_params(eqn.params)))
    known = SMOOTH | {"jit", "pjit", "closed_call", "core_call", "cond", "scan"}
    return all(eqn.primitive.name in known and inner(eqn) for eqn in jaxpr.eqns)


def count(jaxpr, primitives: frozenset | None) -> int:
    """How many equations there are of some primitives, or of all."""
    inner = lambda eqn: sum(count(j, primitives) for j in core.jaxprs_in_params(eqn.params))
    chosen = lambda eqn: primitives is None or eqn.primitive.name in primitives
    return sum(chosen(eqn) + inner(eqn) for eqn in jaxpr.eqns)
