"""Which form of a step suits a field: its kernel, and whether its stages are a loop.

| kernel | what a step is | for |
|---|---|---|
| `ONE_CALL` | a part of one native function (`jaxode.kernels.one_call`) | small states on a CPU |
| `CALLS` | written out, the field as calls (`jaxode.kernels.calls`) | other states on a CPU |
| `PLAIN` | a loop over its stages; networks, and forwards tiny states, written out | GPU and TPU; many solves |

In one call a loop over stages compiles in a third of the time, and takes 5 to 15 % longer than what is
written out: forwards, only a field of few operations is. In calls, networks are a loop forwards: that
compiles in two thirds of the time and runs as fast, where fields of a few operations take a fifth longer.
Backwards, a field of many kernels on a small state is one: a flow with its exact trace (768 numbers) takes
13 ms and 5.2 s to compile, written out 20 ms and 8.3 s.
"""

from typing import NamedTuple

import jax
from jax.extend import core

from jaxode import tree

PRODUCTS = frozenset(("conv_general_dilated", "dot_general"))
REDUCTIONS = frozenset("reduce_and reduce_max reduce_min reduce_sum".split())
MANY, SMALL = 10, 10_000  # kernels of a field, and numbers of a state
ONE_CALL, CALLS, PLAIN = "one call", "calls", "plain"
# Finite derivatives wherever their value is finite; those of a root, say, are not.
SMOOTH = frozenset(
    """abs add add_any and ceil clamp concatenate conv_general_dilated convert_element_type copy cos cosh
    cumsum broadcast_in_dim div dot_general dynamic_slice dynamic_update_slice eq erf erfc exp exp2
    expand_dims expm1 floor gather ge gt integer_pow iota le log log1p logistic lt max min mul ne neg not
    one_minus_square or pad polynomial reduce_max reduce_min reduce_sum reshape rev round select_n sign
    sin sinh slice split square squeeze stack stop_gradient sub tan tanh transpose unstack xor""".split()
)
TINY, FEW = 64, 40  # numbers of a state, and operations of a field, that are few in one call


class Loops(NamedTuple):
    """Whether the stages of a step are to be a loop, and those of its vjp."""

    forward: bool
    backward: bool


def which(f, y, s, kernel: str) -> Loops:
    """Whether the stages of a table are loops: measured on a CPU, and chosen for other platforms."""
    jaxpr = jax.make_jaxpr(lambda f, y, s: f(y, s))(f, y, s).jaxpr
    size = tree.count(y)
    network = bool(count(jaxpr, PRODUCTS))
    if kernel == CALLS:
        many = count(jaxpr, PRODUCTS | REDUCTIONS) >= MANY and size <= SMALL
        return Loops(network, many)
    if kernel == PLAIN:
        return Loops(not network and size > TINY, not network)
    few = size <= TINY and count(jaxpr, None) <= FEW
    return Loops(not few, True)


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
