"""Where a backward pass over steps begins and ends: at the rows of the outputs, and at the first evaluation."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from jaxode import tree
from jaxode.adjoints.inputs import join
from jaxode.outputs import Cotangents, bent_back, with_carried
from jaxode.stepping.loop import Recorded
from jaxode.stepping.problems import Problems, end_of, pullback


def finished(integrator, f, at, y0, slope0, y1, memory1, ss, rows, report):
    """`Output.finish` from what is recorded of a solve."""
    slope1 = integrator.method.slope(f, at[-1], y1, memory1)
    ys = integrator.output.finish(f, ss, at, y0, slope0, y1, slope1, rows, report)
    return with_carried(integrator.method, ys, memory1)


def room_of(integrator, f, y0, ss):
    """Room for the rows that are written while the solve runs, if there are any."""
    return integrator.output.room(integrator, f, y0, ss) if integrator.output.rows(ss) else None


def from_the_end(x, rest, recorded: Recorded, bars):
    """The cotangents at the end of a solve, those of the rows inside, and what goes to the start.

    The transpose of `Output.finish`: of one solve, but for the leaves of the field.
    """
    integrator, (f, y0, ss) = join(x, rest)
    (ys_bar, folded_bar), output, method = bars, integrator.output, integrator.method

    def finish(y0, slope0, y1, memory1, ss, rows):
        return finished(integrator, f, at, y0, slope0, y1, memory1, ss, rows, recorded.report)

    at, rows = lax.stop_gradient(ss), room_of(integrator, f, y0, ss)
    args = y0, recorded.slope0, recorded.y, recorded.memory, ss, rows
    _, vjp = jax.vjp(finish, *args)
    y0_bar, slope0_bar, y1_bar, memory1_bar, ss_bar, rows_bar = vjp(ys_bar)
    row = jnp.asarray(output.last(ss, recorded.report), jnp.int32)
    if x[2] is None:
        ss_bar = None
    else:
        of_rows = ys_bar[0] if method.carries else ys_bar
        ends = y0, recorded.y, recorded.report
        ss_bar = bent_back(method, output, f, ss, *ends, of_rows, ss_bar)
    carry = Cotangents(y1_bar, memory1_bar, None, row, ss_bar, folded_bar)
    return carry, rows_bar, (y0_bar, slope0_bar)


def of_the_field(problems: Problems, own, mask, y0, recorded: Recorded, bars):
    """The same for the leaves of the field: where the rows do not see it these are zeros.

    Of one solve; or of many, with lanes along the first axis, those of what they share summed.
    """
    mine, shared = (eqx.filter(part[1], mask) for part in (own, problems.shared))
    if not problems.of(own)[0].output.sees_field:
        return jax.tree.map(jnp.zeros_like, eqx.combine(mine, shared))

    def finish(integrator, f, ss, y0, recorded):
        rows, (_, slope0, y1, memory1, report) = room_of(integrator, f, y0, ss), recorded
        return finished(integrator, f, ss, y0, slope0, y1, memory1, ss, rows, report)

    of_each = lambda problems, own: problems.each(finish)(own, y0, recorded._replace(tape=None))
    return pullback(problems, own, mask, of_each, ())[1](bars[0])[0]


def distance(y, y0, y1):
    """How far a state that was recovered at the start is from y0, and the size of y0 or, if that is larger, of
    the end y1: root mean squares."""
    ones = jax.tree.map(lambda x: jnp.ones((), tree.real_dtype(x)), y0)
    norm = lambda x: tree.norm(x, ones)
    return norm(tree.difference(y, y0)), jnp.maximum(norm(y0), norm(y1))


def to_the_start(steps, own, mask, y0, carry: Cotangents, start_bars):
    """The cotangents of (f, y0, ss): of one solve, or of many."""
    y0_bar, slope0_bar = start_bars
    method = steps.method

    def start(integrator, f, ss, y0):
        memory = method.start(f, 0 * end_of(ss), y0)
        return memory, method.slope(f, 0 * end_of(ss), y0, memory)

    fn = lambda problems, own, y0: problems.each(start)(own, y0)
    _, vjp = pullback(steps.problems, own, mask, fn, (y0,))
    f_more, y_more = vjp((carry.memory, slope0_bar))
    f_bar = jax.tree.map(jnp.add, carry.f, f_more)
    return f_bar, jax.tree.map(lambda *y: sum(y), carry.y, y_more, y0_bar), carry.ss
