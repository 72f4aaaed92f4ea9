"""Steps that stay inside the stability region of an explicit method, where a solve is differentiated.

At the stability limit values stay right: a step that is a little too long makes an error grow, the
controller sees that and shortens the next one. A derivative with step sizes held fixed knows nothing of
the controller. It is the product of the growth of all steps, and explodes while the values look fine
(dy/dt = 2 - y^3 to t = 100 at a tolerance of 1e-3: 5e8 times too large). So before a step of such a solve
its size is compared with the fastest mode of df/dy. That mode is followed by a power method, of which a
turn, a difference quotient of func, is done now and then: modes are seen that the solution does not excite.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import tree
from jaxode.methods.method import AT_REST, QUIET, SAFETY

# The power method turns before each of the first trial steps, in which the size may grow tenfold, and before
# every fourth one after them. In every eighth, and the first 4, it costs 3 % less of the gradient of a small
# system, and misses modes that become 30 or 3,000 times as fast all at once.
FIRST, EVERY = 12, 4


class Probe(NamedTuple):
    """A direction, as long as what is tolerated; how long df/dy has just made it; and the fastest rate."""

    direction: PyTree
    rate: Array
    fastest: Array


def differentiated(integrator):
    """The integrator of a solve whose derivatives hold the step sizes fixed."""
    method = integrator.method
    if not integrator.adaptive or (method.stability is None and not method.implicit):
        return integrator
    return dataclasses.replace(integrator, steady=True)


def gently(integrator, f, state):
    """A solve at its start, or after an event; of a steady one by an implicit method the next step resolves the
    fastest mode.

    Where a mode is gone within that step, its derivative is the product of a number of the size of h lambda
    with what df/dy changes in the step. With respect to the start of a species that turns into two others at a
    rate of 1e9, in parts that depend on them, it was 1e4 for 0.5. The steps that follow grow tenfold, so this
    costs one step for each power of ten.
    """
    if not (integrator.steady and integrator.method.implicit):
        return state
    rate = integrator.method.fastest(f, state.s, state.y, state.memory)
    usable = lax.is_finite(rate) & (rate * state.h > 1)
    h = jnp.where(usable, 1 / jnp.where(usable, rate, 1), state.h)
    h = jnp.maximum(h, jnp.minimum(state.h, 64 * integrator.least(state.s)))
    return state._replace(h=lax.stop_gradient(h))


def begin(integrator, f, state, slope) -> Probe:
    """Before the first trial step: a turn from a direction that has something of every mode. A rate is made of
    two turns, so that step is not limited yet."""
    some = tree.any_direction(integrator.controlled(state.y))
    stretch = lambda x, s: tree.stretched(s, x).astype(x.dtype) * x
    zero = 0 * state.h
    probe = Probe(jax.tree.map(stretch, some, units_of(integrator, state.y)), zero, zero)
    return turned(integrator, f, state, slope, (state.y,), probe)


def is_due(integrator, f, ss, state):
    """Whether the power method is to turn before the next trial step."""
    return (state.tried < FIRST) | (state.tried % EVERY == 0)


def limited(integrator, f, ss, state):
    """The solve with a next step inside the stability region."""
    part = jnp.where(state.ratio < QUIET, AT_REST, SAFETY)
    most, fastest = part * integrator.method.stability, state.probe.fastest
    h = jnp.where(state.h * fastest > most, most / fastest, state.h)
    return state._replace(h=lax.stop_gradient(h))


def turned(integrator, f, state, slope, ys, probe: Probe) -> Probe:
    """One turn of the power method.

    A matrix that is not normal stretches a direction by more than any eigenvalue: one of position and
    velocity by 1 and by omega^2 in turn. So the rate is the geometric mean of two turns.
    """
    along = probe.direction
    y, k = integrator.controlled(state.y), integrator.controlled(slope)
    w = tree.difference(f(jax.tree.map(lax.add, y, along), state.s), k)
    rate = tree.norm(w, units_of(integrator, *ys)).astype(probe.rate.dtype)
    usable = lax.is_finite(rate) & (rate > 0)
    inverse = 1 / jnp.where(usable, rate, 1)
    along = tree.where(usable, jax.tree.map(lambda w: tree.scale(inverse, w), w), along)
    rate = jnp.where(lax.is_finite(rate), rate, probe.rate)
    return lax.stop_gradient(Probe(along, rate, jnp.sqrt(rate) * jnp.sqrt(probe.rate)))


def units_of(integrator, *ys) -> PyTree:
    """How large the components of a state are beside each other: what is tolerated, as if with one `rtol`."""
    tolerated, rtol = integrator.tolerated(*ys), jax.tree.leaves(integrator.rtol)
    if sum(r.size for r in rtol) <= 1:
        return tolerated
    one = any_of(rtol)
    share = lambda r: jnp.where(r > 0, one / jnp.where(r > 0, r, 1).astype(one.dtype), 1)
    return jax.tree.map(lambda t, r: t * share(r).astype(t.dtype), tolerated, integrator.rtol)


def any_of(rtol):
    """One of several `rtol` that stands for all; not the largest, the search for which cost more than all the
    rest of a turn (36 components)."""
    wide = tree.widest(*(r.dtype for r in rtol))
    one = tree.largest([r.reshape(-1)[0].astype(wide) for r in rtol if r.size])
    rounding = max(float(jnp.finfo(r.dtype).eps) for r in rtol)
    return jnp.where(one > 0, one, rounding**0.5)
