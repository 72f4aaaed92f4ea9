"""Dense output: the solution between the first and the last time, as a function that can be kept.

Every accepted step holds a polynomial, y(s + theta h) = y + sum_p theta^(p+1) d_p; a time is looked up among
the beginnings of the steps, and the polynomial of its step evaluated.
"""

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import tree
from jaxode.outputs import EveryStep, Steps, from_here
from jaxode.solution import Status
from jaxode.switches import moving


class Dense(eqx.Module):
    """The solution as a function of time: `dense(t)`, and `dense.derivative(t)`, at t of any shape.

    A pytree of arrays: it goes through `jax.jit` and `jax.vmap`, can be stored, and is differentiated in t and
    in all that the solve depends on. Of a solve under `jax.vmap` it is many: evaluate each by
    `jax.vmap(lambda dense, t: dense(t))`.

    It takes `max_steps` + 1 rows of (1 + n) states, n the degree of the polynomials of the method (4 for tsit5,
    7 for dop853, 3 where they are Hermite's cubics), whatever the number of steps taken: bound `max_steps`
    where that matters.

    >>> import jax.numpy as jnp
    >>> from jaxode import solve
    >>> sol = solve(lambda y, t: -y, jnp.array([1.0, 2.0]), [0.0, 3.0], dense=True)
    >>> sol.dense(jnp.ones((4, 5))).shape
    (4, 5, 2)
    >>> bool(jnp.allclose(sol.dense.derivative(1.5), -sol.dense(1.5), atol=1e-4))
    True
    >>> sol.dense(3.5)
    Traceback (most recent call last):
    ...
    ValueError: t = 3.5 is outside of 0.0 to 3.0, where the solution is known. ...
    """

    t0: Array
    t1: Array
    span: Array  # t1 - t0; 1 if they are equal
    reached: Array  # up to where the solution is known, on [0, 1]; -1 if it is nowhere
    count: Array  # how many rows of `steps` are real
    steps: Steps
    start: PyTree = None  # with events, one of which may be at t0: the state before it
    after: bool = eqx.field(static=True, default=False)  # at an event, of the state after it

    @property
    def states(self):
        """What is differentiated of the solution."""
        return self.steps.y, self.steps.d

    def of(self, states) -> "Dense":
        """The same steps with these states."""
        steps = self.steps._replace(y=states[0], d=states[1])
        return dataclasses.replace(self, steps=steps)

    def __call__(self, t) -> PyTree:
        """The state at t: leaves of the shape of t, followed by that of a leaf of y0.

        Where a state jumps at a time, the state before it; with `after_events` the one after it. Before the
        first time and after the last there is none: a ValueError where t is known, and NaN where it is not,
        as under `jit`; NaN after a failure.
        """
        return self.at(t, False)

    def derivative(self, t) -> PyTree:
        """dy/dt of the same: of the polynomials, so one order less accurate."""
        return self.at(t, True)

    def at(self, t, derivative: bool) -> PyTree:
        """The states, or their derivatives."""
        with moving():
            return evaluate(self, self.times(t), derivative)

    def times(self, t) -> Array:
        """Times in the dtype of those of the solve, checked as far as they are known."""
        if jnp.ndim(self.t0):
            raise ValueError(
                "These are the solutions of many solves: evaluate each of them by "
                "jax.vmap(lambda dense, t: dense(t))(sol.dense, t)."
            )
        try:
            t = np.asarray(t) if tree.known(t) else jnp.asarray(t)
        except (TypeError, ValueError) as error:
            raise TypeError(f"`t` must be a time, or an array of times: {error}") from error
        if not (jnp.issubdtype(t.dtype, jnp.integer) or jnp.issubdtype(t.dtype, jnp.floating)):
            raise TypeError(f"`t` must hold real numbers, got dtype {t.dtype}.")
        t = t.astype(self.t0.dtype)
        if tree.known(t, self.t0, self.t1):
            ends = float(self.t0), float(self.t1)
            outside = (t < min(ends)) | (t > max(ends))
            if np.any(outside):
                raise ValueError(
                    f"t = {t[outside].ravel()[0]} is outside of {ends[0]} to {ends[1]}, where the solution is "
                    "known. It is never extrapolated: solve to a later time."
                )
        return jnp.asarray(t)


@partial(jax.jit, static_argnums=2)
def evaluate(dense: Dense, t, derivative: bool) -> PyTree:
    """The states, or their derivatives, at times of any shape."""
    times, steps = t.reshape(-1), dense.steps
    s = (times - dense.t0) / dense.span
    at = lax.stop_gradient(s)
    low, high = jnp.minimum(dense.t0, dense.t1), jnp.maximum(dense.t0, dense.t1)
    there = (times >= low) & (times <= high) & (at <= dense.reached)
    like = lambda x: there.reshape((-1,) + (1,) * (x.ndim - 1))
    take = partial(jnp.take, indices=rows_of(dense, at), axis=0, mode="clip")
    taken = jax.tree.map(take, steps)
    # Zeros where there is none: a loss that leaves a failed solve out would have 0 times NaN in its gradient.
    start, h, y, d = jax.tree.map(lambda x: jnp.where(like(x), x, 0), taken)
    theta = (s - start) / jnp.where(h == 0, 1, h)
    if derivative:
        found = jax.vmap(tree.slope)(theta, jnp.where(h == 0, 1, h) * dense.span, d)
    else:
        if dense.start is not None:  # which moves along the first step, as any other state does
            y = jax.vmap(tree.where, (0, None, 0))(at <= 0, dense.start, y)
        found = jax.vmap(tree.polynomial)(y, theta, d)

    def leaf(x):
        return tree.or_nan(like(x), x).reshape(*t.shape, *x.shape[1:])

    return jax.tree.map(leaf, found)


def rows_of(dense: Dense, s) -> Array:
    """The step that each place is in; where two meet, at a jump say, the one before, or the one `after`.

    By bisection among the steps that there are: `jnp.searchsorted` would go through all the room for them.
    """
    begin = from_here(dense.steps.s) if dense.after else dense.steps.s
    is_before = lax.le if dense.after else lax.lt

    def halve(state):
        row, width = state
        middle = row + width // 2
        return jnp.where(is_before(begin[middle], s), middle, row), width - width // 2

    rows = jnp.zeros(s.shape, jnp.int32)
    return lax.while_loop(lambda state: state[1] > 1, halve, (rows, dense.count))[0]


def of_steps(output: EveryStep, rows: Steps, t, span, end, report, of_states, start):
    """(ts, ys, mask, dense) of a solution from its steps: at the times t, or at each step.

    `of_states` makes states of the rows that are states. `start` is as in `Dense`.
    """
    if output.dense:
        started = report.status != Status.NON_FINITE_INITIAL.value
        reached = jnp.where(started, report.reached * end, -1)
        count = jnp.where(started, report.steps + 1, 0)
        states = rows._replace(y=of_states(rows.y), d=list(map(of_states, rows.d)))
        start = None if output.after else start
        ends = t[0], t[-1], span, lax.stop_gradient(reached), count
        dense = Dense(*ends, states, start, output.after)
        return t, evaluate(dense, t, False), None, dense
    mask = jnp.isfinite(rows.s)
    s = jnp.where(mask, rows.s, 0)  # derivatives of a product with NaN would be NaN
    ts = tree.between(t[0] + span * s, jnp.minimum(t[0], t[-1]), jnp.maximum(t[0], t[-1]))
    ts = tree.or_nan(mask, jnp.where(s >= 1, t[-1], ts))
    return ts, rows.y if output.save else of_states(rows.y), mask, None
