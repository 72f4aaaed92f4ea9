"""What a solve returns: the values, how it went, and what it cost."""

import enum
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from jaxode import words


class Status(enum.IntEnum):
    """How a solve ended. Data, one per sample: it goes through `jit` and `vmap`."""

    SUCCESS = 0
    EVENT = 1
    MAX_STEPS = 2
    DT_TOO_SMALL = 3
    NON_FINITE = 4
    NON_FINITE_INITIAL = 5
    NOT_CONVERGED = 6
    EVENTS_ACCUMULATE = 7
    BUDGET = 8
    BAD_INPUT = 9

    @property
    def message(self) -> str:
        """What happened, and what to do about it."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.SUCCESS: "The solve reached the last time.",
    Status.EVENT: "A terminal event ended the solve; what comes after it is NaN.",
    Status.MAX_STEPS: (
        "The step limit was reached before the last time. Raise `max_steps` (or `mxstep`), loosen "
        "`rtol` and `atol`, or, if the problem is stiff, pass method='rodas5p'."
    ),
    Status.DT_TOO_SMALL: (
        "The step size fell below what the precision of time can resolve: a pole, a discontinuity "
        "or a stiff problem; or times so large that their spacing is coarse. Check func near this "
        "time, loosen `rtol` and `atol`, shift time to start at 0, or use float64."
    ),
    Status.NON_FINITE: (
        "func returned NaN or infinity for every step size tried, or the solution overflowed. "
        "Check func near this time: it may have left its domain (sqrt, log, division)."
    ),
    Status.NON_FINITE_INITIAL: (
        "y0, or func(y0, t0), is NaN or infinite. Check the initial state and func at the first time."
    ),
    Status.NOT_CONVERGED: (
        "The equations of an implicit step could not be solved for any step size tried: Newton's method "
        "did not converge, or the derivative of func with respect to y is NaN or infinite. Check func "
        "near this time: it may have a kink or a jump, or have left its domain (sqrt and powers at 0). With "
        "a singular `mass`: no initial values fulfil the algebraic equations, or their index is above 1."
    ),
    Status.EVENTS_ACCUMULATE: (
        "An event happened again and again, with no time in between. Make it `terminal` after some `count`, "
        "or let its `change` leave the root of its condition, as a ball that comes to rest does not."
    ),
    Status.BUDGET: (
        "The solve reached the last time with steps that are longer than `rtol` and `atol` ask for, so that it "
        "kept to `max_evaluations`: `Solution.error` says by how much. Raise it, or loosen the tolerances."
    ),
    Status.BAD_INPUT: (
        "The times are not increasing (or decreasing) and finite; a tolerance or limit is negative or "
        "NaN; `dt` is not positive and finite; or the knots of a signal decrease."
    ),
}


def succeeded(status, *others: Status | None):
    """Whether a solve ended as it should: at its last time or, as far as it can, with one of these others: by
    default at a terminal event, or with all that a budget allowed."""
    fine = status == Status.SUCCESS.value
    for other in others or (Status.EVENT, Status.BUDGET):
        fine = fine if other is None else fine | (status == other.value)
    return fine


def other_end(events, error) -> Status | None:
    """How else than at its last time a solve may end as it should, if it has events or a budget."""
    if events is not None:
        return Status.EVENT
    return None if error is None else Status.BUDGET


class SolveError(RuntimeError):
    """A solve did not reach its last time. `solution` holds what it did reach."""

    def __init__(self, message: str, solution: "Solution"):
        super().__init__(message)
        self.solution = solution

    def __reduce__(self):
        return type(self), (*self.args, self.solution)  # for pickle and copy


class Stats(NamedTuple):
    """Counts, per sample: evaluations of func, accepted steps and rejected steps."""

    evaluations: Array
    accepted: Array
    rejected: Array


class Heuristics(NamedTuple):
    """Sums over the accepted steps of two estimates that the solver makes of itself; differentiable.

    `error`: the local error estimates, as root mean squares; `stiffness`: estimates of the largest
    eigenvalue of df/dy. As penalties they make dynamics cheaper (Pal et al. 2021, arXiv 2105.03918).
    """

    error: Array
    stiffness: Array


class TrialSteps(NamedTuple):
    """Trial steps, in the order in which they were taken; NaN, -1 and False beyond the last.

    Attributes:
        times: where each begins, in the unit of t.
        sizes: how long it is, in the same unit, negative where time decreases. Of size 0 is a step that makes
            the change of an event.
        ratios: its error over what is tolerated; above 1 it is rejected. NaN if func was not finite, or for
            steps of equal size; infinite if the equations of an implicit step were not solved.
        accepted: whether it was. A step that is not, though its ratio is at most 1, had an event inside.
        component: the component of the state (as one vector: leaf after leaf) whose error was largest beside
            its tolerance, or the first that was not finite; -1 where there is none.
    """

    times: Array
    sizes: Array
    ratios: Array
    accepted: Array
    component: Array


class Solution(NamedTuple):
    """`ys[i]` is the state at `ts[i]`; rows after a failure are NaN.

    Attributes:
        ts: the output times, shape (n,).
        ys: the states there, a pytree like y0 with a new leading axis of length n.
        status: a `Status` as an integer array, per sample.
        stats: `Stats`: evaluations of func in the forward solve, accepted and rejected steps.
        reached: the time up to which the solution is known; the last of `ts` after a success.
        heuristics: `Heuristics`, if asked for.
        dense: the solution as a function of time, `jaxode.dense.Dense`, with `dense=True`.
        mask: which rows of ts and ys are real, with `save_steps=True`.
        events: for each of `events` a record: `.times` when it happened, `.states` right before, and `.count`,
            how often it did.
        folded: the last value of `fold`; NaN after a failure, and then integers in it mean nothing.
        log: `TrialSteps`, the last ones, with `log`.
        error: with `max_evaluations` the largest error of an accepted step over what is tolerated: above 1 if
            the budget forced steps to be too long. Not differentiated.
        resuming: what `resume` needs, with `resumable=True`.
    """

    ts: Array
    ys: PyTree
    status: Array
    stats: Stats
    reached: Array
    heuristics: Heuristics | None = None
    dense: Any = None
    mask: Array | None = None
    events: tuple | None = None
    folded: PyTree = None
    log: TrialSteps | None = None
    error: Array | None = None
    resuming: Any = None

    def resume(self, t) -> "Solution":
        """The solution at later times, as if the solve had not ended: `solve(..., resumable=True)`.

        The state, the step size, the history of the controller and the statistics go along, so that steps and
        states are those of one solve to the last of these times with `resumable=True`, bit for bit. It can
        be resumed again; after `Status.MAX_STEPS`, too, with as many steps again. To go on in another process,
        store its arrays (`equinox.tree_serialise_leaves`) and read them into a solution of the same problem
        over any interval.

        Args:
            t: a time, or several, shape (n,): not before the end of the solve so far, in its direction.

        Returns:
            A `Solution` at these times alone; its statistics are of all from the start.

        Raises:
            ValueError: a time is before the end of the solve, or that failed, or was not `resumable`.

        >>> import jax.numpy as jnp
        >>> from jaxode import solve
        >>> spring = lambda y, t: jnp.stack([y[1], -y[0]])
        >>> today = solve(spring, jnp.array([1.0, 0.0]), [0.0, 2.0], resumable=True)
        >>> tomorrow = today.resume(5.0)
        >>> whole = solve(spring, jnp.array([1.0, 0.0]), [0.0, 5.0], resumable=True)
        >>> bool(jnp.all(tomorrow.ys[-1] == whole.ys[-1]))
        True
        """
        if self.resuming is None:
            raise ValueError("To be resumed a solve needs resumable=True.")
        return self.resuming.resume(t, self.status)

    if not TYPE_CHECKING:  # those that read a program know what a solution does not have

        def __getattr__(self, name: str):
            """Of what is not there: an error with the name that it has here."""
            raise AttributeError(words.about_field(name, self._fields))

        def __call__(self, *_):
            """A solution is no function: an error that says what is one."""
            raise TypeError(f"A Solution cannot be called: {words.DENSE}.")

    def __str__(self) -> str:
        if isinstance(self.status, Tracer):
            return f"Solution(ts={self.ts}, ys={self.ys}, status={self.status})"
        status = np.asarray(self.status)
        lines = [f"Solution at {np.sum(np.isfinite(self.ts))} times, {_span(self.ts)}"]
        for code in np.unique(status):
            share = f" ({np.sum(status == code)} of {status.size})" if status.size > 1 else ""
            lines.append(
                f"  status: {Status(int(code)).name.lower()}{share}. {Status(int(code)).message}"
            )
        for name, count in zip(Stats._fields, self.stats):
            lines.append(f"  {name}: {_range(np.asarray(count))}")
        for i, event in enumerate(self.events or ()):
            lines.append(f"  events[{i}]: {_range(np.asarray(event.count))} times")
        shapes = jax.tree.map(lambda y: f"{y.dtype.name}{list(y.shape)}", self.ys)
        lines.append(f"  ys: {shapes}")
        return "\n".join(lines)


def _span(ts) -> str:
    ts = np.asarray(ts)
    return f"from {np.nanmin(ts):g} to {np.nanmax(ts):g}" if ts.size else "none"


def _range(counts) -> str:
    low, high = counts.min(initial=np.iinfo(np.int32).max), counts.max(initial=0)
    return f"{high}" if counts.ndim == 0 or low == high else f"{low} to {high} a sample"
