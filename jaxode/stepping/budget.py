"""A budget of evaluations of func: errors are allowed to be larger where what is left of it asks for that.

With r the error of a step of size h over what is tolerated, and q one more than the order of its estimate,
r^(1/q) steps would have taken its place if each had the error that is tolerated. The sum of these over the
steps so far, over the time that they took, or the same of this step alone if that is less, says how many
steps are still needed. If the budget pays k, errors may be

    (needed / k)^q

times as large, if that is more than 1: steps are then as many as can be paid, and their errors alike. So that
the end is reached whatever comes, a step is at least u^20 (end - s) / k long, u the share of the budget that
is spent, and the last one that can be paid goes to the end; these are accepted with any error.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxode.methods.method import Method

START = 2  # evaluations before the first trial step
# Of the budget, for what is not foreseen; and the power of the share that is spent with which steps are made
# longer whatever their error.
RESERVE, LATE = 0.08, 20
# Trial steps for one that is needed: some are rejected, and sizes are chosen with care.
SPARE = 1.2


class Budget(NamedTuple):
    """So many evaluations, of which a trial step takes `cost`, with outputs inside."""

    evaluations: int
    cost: int

    @classmethod
    def of(cls, evaluations: int, cost: int, name: str) -> "Budget":
        """One that can pay a step of the method of that name; else a ValueError."""
        if evaluations < START + cost:
            raise ValueError(
                f"`max_evaluations` = {evaluations} cannot pay a step of {name}, which takes {cost}, and "
                f"{START} to begin: pass at least {START + cost}."
            )
        return cls(evaluations, cost)

    def with_steps_of(self, method: Method, before: Method, name: str) -> "Budget":
        """The same for steps of another method than the one `before`, with the same outputs."""
        assert method.step_evaluations is not None and before.step_evaluations is not None
        return self.of(
            self.evaluations, self.cost + method.step_evaluations - before.step_evaluations, name
        )


class Forced(NamedTuple):
    """How many trial steps were not what they would have been without a budget; the largest error over what is
    tolerated of any accepted step; and how many steps would have had the error that is tolerated."""

    steps: Array
    error: Array
    needed: Array


def payable(integrator, state) -> Array:
    """How many trial steps there may still be."""
    budget = integrator.budget
    paid = (budget.evaluations - state.evaluations) // budget.cost
    return jnp.minimum(paid, integrator.max_steps - state.tried)


def spent(integrator, state) -> tuple[Array, Array]:
    """How many trial steps there may still be, at least 1, and the share of all of them that there were."""
    budget = integrator.budget
    most = min((budget.evaluations - START) // budget.cost, integrator.max_steps)
    left = lax.convert_element_type(jnp.clip(payable(integrator, state), 1, most), state.s.dtype)
    return left, (most - left) / max(most - 1, 1)


def next_end(integrator, state, end) -> Array:
    """Where the next trial step is to end."""
    left, used = spent(integrator, state)
    h = jnp.maximum(state.h, used**LATE * (end - state.s) / left)
    return jnp.where(left <= 1, end, lax.min(state.s + h, end))


def is_longer(state, s1) -> Array:
    """Whether a trial step is longer than its error would have it."""
    return s1 > state.s + state.h


def is_forced(integrator, state, s1) -> Array:
    """Whether a trial step is accepted with any error."""
    return is_longer(state, s1) | (payable(integrator, state) <= 1)


def equivalent(integrator, ratio) -> Array:
    """How many steps with an error that is just tolerated are worth one with this ratio."""
    return ratio ** (1 / (integrator.method.error_order + 1))


def allowed(integrator, state, ratio, h) -> Array:
    """What the error of a trial step may be, over what is tolerated; 1 if there is enough to spend."""
    left, used = spent(integrator, state)
    here = equivalent(integrator, ratio) / h
    mean = jnp.where(state.s > 0, state.forced.needed / state.s, jnp.inf)
    needed = SPARE * jnp.minimum(here, mean) * (1 - state.s)
    left = jnp.maximum(left - RESERVE * left / (1 - used), 1)  # used < 1: something is left
    most = (needed / left) ** (integrator.method.error_order + 1)
    return jnp.where(jnp.isfinite(ratio) & (most > 1), most, 1)


def counted(integrator, state, s1, ratio, h, accepted, go) -> Forced:
    """What is known of forced steps after a trial step."""
    steps, error, needed = state.forced
    other = is_longer(state, s1) | (allowed(integrator, state, ratio, h) > 1)
    other = other | (accepted & (ratio > 1))
    return Forced(
        steps + (other & go).astype(jnp.int32),
        jnp.where(accepted, jnp.maximum(error, ratio), error),
        jnp.where(accepted, needed + equivalent(integrator, ratio), needed),
    )
