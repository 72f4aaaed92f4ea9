"""A solve that can go on later, as if it had never been interrupted.

Its steps do not depend on where it ends: time is counted from t0 in the unit of func, not in the length of
the interval, and the state is kept that is there when the next step is the first one to be cut at the end.
From that state the solve goes on with the whole step.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxode import tree
from jaxode.kernels.forms import PLAIN
from jaxode.kernels.rules import custom_jvp
from jaxode.kernels.stepper import stepper
from jaxode.stepping.integrator import Integrator, Report, State
from jaxode.stepping.loop import advance, result
from jaxode.stepping.problems import end_of, one

SHORT = 1e-24  # a time in the unit of func, far below any interval; times a rounding no denormal in float32


class OfOwnUnit(Integrator):
    """Steps that the error estimate chooses, of time in the unit of func: it may be picoseconds."""

    def least(self, s):
        """The same. Near t0 there is no length to compare a step with, but this is below every one."""
        eps = 16 * float(jnp.finfo(s.dtype).eps)
        return jnp.maximum(self.hmin, eps * jnp.maximum(s, SHORT))


class OfEqualSize(Integrator):
    """Steps of one size that is given, and not their number: only the last one may be shorter."""

    size: Any = None

    def unfinished(self, state: State, end):
        return (state.h > 0) & (state.s < end) & (state.tried < self.max_steps)

    def next_end(self, state: State, end):
        """The same, at whole multiples of the size. One that ends close to the end, ends there."""
        s1 = self.multiple(state)
        close = s1 >= end * (1 - 16 * float(jnp.finfo(end.dtype).eps))
        s1 = jnp.where(close, end, s1)
        return s1, s1 - state.s

    def multiple(self, state: State) -> Array:
        """Where the next step ends if it is whole."""
        return self.size * lax.convert_element_type(state.equal_steps + 1, state.s.dtype)

    def stopped(self, state: State, end):
        return state.tried >= self.max_steps, state.s >= end


def is_whole(integrator: Integrator, state: State, end) -> Array:
    """Whether the next step is what it would be if the solve went on after its end."""
    equal = isinstance(integrator, OfEqualSize)
    return (integrator.multiple(state) if equal else state.s + state.h) <= end


def go_on(integrator: Integrator, f, y0, ss, before: State | None):
    """The solution at ss, the report, and the state from which the solve can go on.

    `before` is such a state of a solve that ended earlier: its y is used, and y0 is not; None to start. The
    first of ss is the start of the whole solve all the same. `max_steps` bounds the steps of this part, the
    statistics are those of all.
    """
    problems, own = one(integrator, f, ss)
    end, tried = end_of(ss), 0
    steps = stepper(problems, own, y0, PLAIN)
    if before is None:
        state, slope0 = steps.start(own, y0)
    else:
        tried = before.tried
        first = jnp.full_like(before.output, integrator.output.first)
        state = before._replace(tried=0 * tried, output=first)
        y0, slope0 = state.y, integrator.method.slope(f, state.s, state.y, state.memory)
    rows = integrator.output.room(integrator, f, y0, ss) if integrator.output.rows(ss) else None
    whole = lambda carry: is_whole(integrator, carry[0], end)
    found: Any = advance(steps, own, state, rows, turns=partial(in_two_parts, whole))
    (state, rows, _), kept = found
    ys, report = result(integrator, f, ss, None, y0, slope0, state, rows)
    report = report._replace(rejected=report.rejected + tried)
    return ys, report, kept._replace(tried=kept.tried + tried)


def in_two_parts(whole, unfinished, body, carry):
    """`lax.while_loop`, and the state when the next step is not whole any more. One loop goes round the
    parts, so that there is one program for the steps of both."""

    def part(i, carry):
        carry, kept = carry
        go = lambda carry: unfinished(carry) & ((i > 0) | whole(carry))
        carry = lax.while_loop(go, body, carry)
        return carry, tree.where(i == 0, carry[0], kept)

    return lax.fori_loop(0, 2, part, (carry, carry[0]))


@custom_jvp
def without_derivatives(x):
    """x; an error where it is differentiated."""
    return x


@without_derivatives.defjvp
def refused(primals, tangents):
    raise TypeError(
        "A solve with resumable=True has no derivatives. Leave it out where a gradient is wanted; to go on "
        "from the last state all the same, start a new solve there."
    )


def resumable(before: State | None):
    """What stands for the adjoint of such a solve: `(integrator, f, y0, ss) -> (ys, report)`."""

    def solve(integrator, f, y0, ss) -> tuple[Any, Report]:
        ys, report, kept = without_derivatives(go_on(integrator, f, y0, ss, before))
        return ys, report._replace(going_on=kept)

    return solve
