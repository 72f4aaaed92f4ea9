"""One solve: trial steps from 0 to the end, with its outputs, and a tape if it is wanted."""

from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax
from jaxtyping import PyTree

from jaxode import tree
from jaxode.kernels.forms import PLAIN
from jaxode.kernels.stepper import Stepper, expects_event, quiet_trial, stepper
from jaxode.outputs import bent, with_carried, write
from jaxode.stepping import checkpoints
from jaxode.stepping.integrator import Integrator, Report, State
from jaxode.stepping.problems import end_of, one


class Recorded(NamedTuple):
    """What a backward pass needs of a solve: its tape, the slope at its start, its end, how it went."""

    tape: Any
    slope0: PyTree
    y: PyTree
    memory: PyTree
    report: Report


def solve(integrator: Integrator, f, y0, ss, kernel=PLAIN):
    """The solution at ss (increasing, in [0, 1]; the first is the start), and the report."""
    return run(integrator, f, y0, ss, None, kernel)[:2]


def record(integrator: Integrator, f, y0, ss, kernel=PLAIN):
    """The same, and the tape."""
    pair = jax.eval_shape(lambda f, y: (y, integrator.method.start(f, 0 * ss[-1], y)), f, y0)
    tape = checkpoints.empty(integrator.max_steps, pair, ss.dtype)
    ys, report, state, slope0, tape = run(integrator, f, y0, ss, tape, kernel)
    tape = tape._replace(steps=state.accepted)
    return ys, report, Recorded(tape, slope0, state.y, state.memory, report)


def begin(integrator: Integrator, f, y0, ss, kernel=PLAIN):
    """The steps of a solve, what is its own, and it before its first trial step, with its slope."""
    problems, own = one(integrator, f, ss)
    steps = stepper(problems, own, y0, kernel)
    return steps, own, *steps.start(own, y0)


def run(integrator: Integrator, f, y0, ss, tape: Any = None, kernel=PLAIN):
    steps, own, state, slope0 = begin(integrator, f, y0, ss, kernel)
    output = integrator.output
    rows = output.room(integrator, f, y0, ss) if output.rows(ss) else None
    state, rows, tape = advance(steps, own, state, rows, tape)
    at = lax.stop_gradient(ss) if kernel == PLAIN else None  # else nothing is differentiated
    ys, report = result(integrator, f, ss, at, y0, slope0, state, rows)
    return ys, report, state, slope0, tape


def result(integrator: Integrator, f, ss, at, y0, slope0, state: State, rows):
    """What a solve returns that has stopped in this state; `at` is as in `Times.finish`."""
    slope1 = integrator.method.slope(f, state.s, state.y, state.memory)
    report = integrator.report(state, y0, slope0, end_of(ss))
    ys = integrator.output.finish(f, ss, at, y0, slope0, state.y, slope1, rows, report)
    if at is not None:
        ys = bent(integrator.method, integrator.output, f, ss, y0, state.y, report, ys)
    return with_carried(integrator.method, ys, state.memory), report


def advance(steps: Stepper, own, begin: State, rows=None, tape=None, after=None, turns=None):
    """Trial steps until the solve is done: (state, rows, tape) there.

    `after(old, new) -> new` sees every trial step, and may add to what an accepted one did; `turns` stands
    for `lax.while_loop`, and may return more.
    """

    def kept(old, new, h, step, rows, tape):
        """The state, the rows and the tape after a trial step."""
        if tape is not None:
            tape = tape.write(old.accepted, (old.y, old.memory), new.s)
        if rows is not None:
            inside = lambda: steps.inside(own, old.s, old.y, h, step)
            put = lambda row, values, rows, due: tree.put(row, values, rows)
            new, rows = write(steps.problems, inside, own, old, new, h, rows, put)
        return new, rows, tape

    def body(carry):
        old, rows, tape = carry
        new, h, step = steps.trial(own, old)
        new, rows, tape = kept(old, new, h, step, rows, tape)
        return after(old, new) if after else new, rows, tape

    def quiet_body(carry):
        """A trial step at which no event happens; or none, and that one does."""
        old, rows, tape = carry
        new, h, step, happens = quiet_trial(steps, own, old)
        new, rows, tape = kept(old, new, h, step, rows, tape)
        return (new, rows, tape), happens

    unfinished = lambda carry: steps.unfinished(own, carry[0])
    quietly = quiet_body, lambda carry: expects_event(steps, own, carry[0])
    if turns is None:
        turns = lax.while_loop if begin.watch is None else partial(between_events, *quietly)
    if tape is None:
        return turns(unfinished, body, (begin, rows, tape))
    return tape.run(turns, unfinished, body, (begin, rows, tape))


def between_events(quiet_body, expected, unfinished, body, carry):
    """`lax.while_loop`, whose turns at which nothing happens are a loop of their own with less in it."""

    def quiet(state):
        carry, happens = quiet_body(state[0])
        return carry, happens | expected(carry)

    def until_one(carry):
        go = lambda state: unfinished(state[0]) & ~state[1]
        carry, happens = lax.while_loop(go, quiet, (carry, expected(carry)))
        happens = happens & unfinished(carry)
        return tree.at_most_once(happens, body, carry)

    return lax.while_loop(unfinished, until_one, carry)
