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

SAFETY = 0.9  # of the radius of the stability region
# The power method turns in each of the first trial steps, in which the size may grow tenfold, and in every
# fourth one after them.
FIRST, EVERY = 12, 4


class Probe(NamedTuple):
    """A direction, as long as what is tolerated; how long df/dy has just made it; and the fastest rate."""

    direction: PyTree
    rate: Array
    fastest: Array


def differentiated(integrator):
    """The integrator of a solve whose derivatives hold the step sizes fixed."""
    if not integrator.adaptive or integrator.method.stability is None:
        return integrator
    return dataclasses.replace(integrator, steady=True)


def begin(integrator, f, state, slope):
    """A solve before its first trial step: with a direction that has something of every mode."""
    if not integrator.steady:
        return state
    some = tree.any_direction(integrator.controlled(state.y))
    stretch = lambda x, s: tree.stretched(s, x).astype(x.dtype) * x
    zero = 0 * state.h
    probe = Probe(jax.tree.map(stretch, some, units_of(integrator, state.y)), zero, zero)
    return kept(integrator, f, state._replace(probe=probe), slope, state.y)


def kept(integrator, f, state, slope, *ys):
    """A solve between two trial steps, the next of which is inside the stability region; `ys` are the states
    at the ends of the last one, and f the field of what is controlled of them."""
    due = (state.tried < FIRST) | (state.tried % EVERY == 0)
    turn = lambda probe: turned(integrator, f, state, slope, ys, probe)
    probe = lax.stop_gradient(tree.at_most_once(due, turn, state.probe))
    most = SAFETY * integrator.method.stable_up_to(state.memory)
    h = jnp.where(state.h * probe.fastest > most, most / probe.fastest, state.h)
    return state._replace(h=lax.stop_gradient(h), probe=probe)


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
    if len(rtol) == 1 and rtol[0].size == 1:
        return tolerated
    wide = tree.widest(*(r.dtype for r in rtol))
    most = tree.largest([jnp.max(r, initial=0).astype(wide) for r in rtol])
    share = lambda r: jnp.where(r > 0, most / jnp.where(r > 0, r, 1).astype(wide), 1)
    return jax.tree.map(lambda t, r: t * share(r).astype(t.dtype), tolerated, integrator.rtol)
