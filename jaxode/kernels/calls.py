"""A field as calls, each of them a part of its own in the program.

XLA on a CPU merges what is written one after another. Where a field reads its neighbours, a step that
is written out then computes each stage again for every place that it is read at, stage within stage;
and every evaluation of a network is compiled together with sums that have nothing to do with it. A call
with the mark below stays a call: what goes in and what comes out are arrays, computed once.

| one solve on a CPU, milliseconds | gradient, without calls | with them |
|---|---|---|
| Gray-Scott on 64 x 64, 11 outputs | 129 (its stages a loop) | 63 |
| heat equation on 10,000 points | 19 (its stages a loop) | 9 |
| 100 stars, sums over pairs | 400 | 270 |
| MLP 64-128-128-64, a batch of 256 | 30 | 21 |
"""

from collections.abc import Callable

import equinox as eqx
import jax
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import PyTree


def apart(fn: Callable) -> Callable:
    """The function as a call that stays one."""
    program = jax.jit(fn, inline=False)
    return lambda *args: set_xla_metadata(program(*args), inlineable="false")


def in_calls(field, mask: PyTree = None) -> Callable:
    """f(y, s) by calls, and so is its vjp: in y, and in the leaves of the field of which `mask` is true.

    To be used where nothing but this vjp is asked for: by the rules that lower a solve.
    """
    moving, rest = (None, field) if mask is None else eqx.partition(field, mask)

    def evaluate(moving, y, rest, s):
        return eqx.combine(moving, rest)(y, s)

    @jax.custom_vjp
    def slope(*args):
        return apart(evaluate)(*args)

    def forwards(*args):
        of_moving = lambda moving, y, rest, s: jax.vjp(
            lambda moving, y: evaluate(moving, y, rest, s), moving, y
        )
        return apart(of_moving)(*args)

    def backwards(vjp, k_bar):
        return *apart(lambda vjp, k_bar: vjp(k_bar))(vjp, k_bar), None, None

    slope.defvjp(forwards, backwards)
    return lambda y, s: slope(moving, y, rest, s)
