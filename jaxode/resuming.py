"""`Solution.resume`: a solve that goes on where an earlier one ended."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxode import arguments
from jaxode.solution import Status, succeeded
from jaxode.stepping.integrator import State
from jaxode.switches import moving
from jaxode.tree import known

OPTIONS = {  # that a solve which can be resumed does not have, and what to do instead
    "dense": "ask for the times that are needed in `t`",
    "save_steps": "ask for the times that are needed in `t`",
    "heuristics": "leave one of them out",
    "max_evaluations": "end the solve earlier",
    "log": "log a solve to the same time without `resumable`",
    "progress": "each part that ends is a progress to show",
    "events": "end a solve at an event (terminal=True), and start a new one there",
}


class Resuming(eqx.Module):
    """What a solve with `resumable=True` leaves behind: the problem, its options, and the state of its solver.

    A pytree: it goes through `jit` and `vmap`, and its arrays can be stored, for example with those of the
    whole `Solution` by `equinox.tree_serialise_leaves`.
    """

    answer: Callable = eqx.field(static=True)  # `jaxode.integrate.go_on`
    static: Any = eqx.field(static=True)
    throw: bool | None = eqx.field(static=True)
    given: Any  # the arrays of func, and y0
    limits: Any
    extras: Any
    t0: Array
    at: Array  # where the solve ended
    sign: Array  # 1 for increasing times, -1 for decreasing ones

    @classmethod
    def of(cls, state: State, answer, static, given, t, limits, extras, throw):
        """Of a solve at the times t, which has left its solver in this state."""
        t = jnp.asarray(t)
        sign = jnp.where(t[-1] < t[0], -jnp.ones_like(t[0]), 1)
        extras = extras._replace(before=state)
        return cls(answer, static, throw, given, limits, extras, t[0], t[-1], sign)

    def resume(self, t, status):
        """The solution at t, after a solve that ended with this status."""
        if jnp.ndim(self.t0):
            raise ValueError(
                "These are many solves: pass jax.vmap(lambda solution, t: solution.resume(t), (0, None))."
            )
        with moving():
            return self.went_on(t, status)

    def went_on(self, t, status):
        """The same, once it is known to be one solve."""
        seen = known(t, self.at, self.sign, self.t0)
        np_or_jnp: Any = np if seen else jnp
        times = arguments.as_times(np_or_jnp.atleast_1d(t), self.given[1])[0].astype(self.t0.dtype)
        if len(times) == 0:
            raise ValueError("`resume` needs a time to go on to, or several.")
        late = self.sign * (times - self.at) >= 0
        if not seen:
            times = jnp.where(late, times, jnp.nan)  # bad input
        times = np_or_jnp.concatenate([np_or_jnp.reshape(self.t0, 1), times])
        if seen:
            check(times, np.asarray(late), self.at, status)
        static = dataclasses.replace(self.static, seen=seen and self.static.seen)
        given = static, self.given, (times, None), self.limits, self.extras
        return self.answer(*given, self.throw)


def check(times, late, at, status) -> None:
    """Raise if a solve cannot go on from where it is to these times."""
    codes = np.unique(status) if known(status) else np.array([Status.SUCCESS.value])
    failed = codes[~succeeded(codes, None) & (codes != Status.MAX_STEPS.value)]
    if len(failed):
        code = Status(int(failed[0]))
        raise ValueError(
            f"There is nothing to go on from: the solve failed ({code.name.lower()}). {code.message}"
        )
    if not np.all(late):
        raise ValueError(
            f"`resume` goes on from t = {np.ravel(at)[0]:g}, and t = {times[1:][~late][0]:g} is before it. "
            "Ask for that time in the `t` of the solve."
        )
    arguments.check_times(times)


def wanted(resumable, t, exact, driven: bool, others) -> bool:
    """Whether a solve is to be resumed; an error if it cannot be. `others` are the values of `OPTIONS`."""
    if not arguments.flag("resumable", resumable):
        return False
    for (name, instead), given in zip(OPTIONS.items(), others, strict=True):
        if given:
            raise ValueError(
                f"`resumable` and `{name}` are not to be had in the same solve: {instead}."
            )
    arguments.without_signals("resumable", driven, "Let func interpolate (jnp.interp).")
    arguments.without_lost_digits("resumable", exact, t.dtype)
    return True
