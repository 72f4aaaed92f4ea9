"""Why an explicit solve did not come to its end: whether stability held its steps short."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxode import tree
from jaxode.kernels.traces import Trace
from jaxode.solution import Solution, Status

BOUND = 2.0  # h |lambda| where explicit methods begin to be unstable: 2 for Euler, 3.5 for tsit5
PRODUCTS = 30  # with df/dy, of the power method


EXPLICIT = "Pass method='rodas5p' (or 'auto')."
OF_PAIR = "Move what decays so fast to the first function of the pair, which is solved implicitly."


class Slope(NamedTuple):
    """dy/dt, or its opposite, of a traced function: equal to another one that does the same, so that a second
    failure of a problem compiles nothing."""

    trace: Trace
    func_time: Any
    forwards: bool = True

    def __call__(self, y, t, leaves):
        k = self.trace(leaves, y, t.astype(self.func_time))
        direction = 1.0 if self.forwards else -1.0
        return jax.tree.map(lambda k: tree.scale(direction, k), k)


def hint(solution: Solution, again: Callable, times, slope: Slope, leaves, remedy=EXPLICIT) -> str:
    """What to say to a failed explicit solve: that it looks stiff, if it does; else nothing.

    A step that accuracy holds short has h |lambda| about 1 or less for every eigenvalue lambda of df/dy; at
    2 or more, with a negative real part, it is stability that does (Hairer and Wanner 1996, sec. IV.2).

    `again(t, since)` is the same solve at other times than `times`, and `slope(y, t, leaves)` func, or what of
    it an explicit table serves. The solve is done again to have the state near its end: no solve that succeeds
    pays for this.
    """
    ends = Status.MAX_STEPS, Status.DT_TOO_SMALL
    start, reached = float(np.asarray(solution.ts)[0]), float(solution.reached)
    if int(solution.status) not in ends or reached == start:
        return ""
    share = 0.9
    t, since = times
    part = again(*until(t, since, share * (solution.reached - t[0])))
    steps = int(solution.stats.accepted) - int(part.stats.accepted)
    if int(part.status) != Status.SUCCESS or steps < 1:
        return ""
    h = (1 - share) * abs(reached - start) / steps
    y = jax.tree.map(lambda y: y[-1], part.ys)
    rate, decays = fastest(slope._replace(forwards=reached > start), y, part.ts[-1], leaves)
    if not (decays and h * rate > BOUND):
        return ""
    return (
        f" It looks stiff: the fastest mode decays at a rate of {rate:.1e}, and explicit steps must not be "
        f"longer than about {h:.1e} to be stable. {remedy}"
    )


def until(t, since, end):
    """The same times, but none more than `end` after the first."""
    cut = lambda past: jnp.where(jnp.abs(past) > jnp.abs(end), end, past)
    return t[0] + cut(t - t[0]), None if since is None else cut(since)


def fastest(f, y, *given) -> tuple[float, bool]:
    """The largest |lambda| of df/dy, and whether that mode decays; f(y, *given)."""
    rate, decays = fastest_of(f, y, *given)
    return float(rate), bool(decays)


@partial(jax.jit, static_argnums=0)
def fastest_of(f, y, *given):
    """The same as arrays."""
    return fastest_mode(lambda y: f(y, *given), y)


def fastest_mode(f, y):
    """The same of f(y), by the power method."""
    push = jax.linearize(f, y)[1]
    v, once = tree.any_direction(y), lambda v: (v, push(v))
    v, w = jax.lax.fori_loop(0, PRODUCTS, lambda _, vw: once(tree.unit(vw[1])), (v, v))
    along = tree.ratio(
        tree.dot(jax.tree.map(jnp.conj, v), w), tree.dot(jax.tree.map(jnp.conj, v), v)
    )
    rate = tree.length(w)
    return rate, along < -0.5 * rate
