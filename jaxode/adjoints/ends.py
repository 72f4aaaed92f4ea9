"""Where a backward pass over steps begins and ends: at the rows of the outputs, and at the first evaluation."""

import equinox as eqx
import jax
import jax.numpy as jnp

from jaxode.adjoints.inputs import join
from jaxode.outputs import Cotangents
from jaxode.stepping.loop import Recorded


def from_the_end(x, rest, recorded: Recorded, bars):
    """The cotangents at the end of a solve, those of the rows inside, and what goes to the start.

    The transpose of `Output.finish`: of one solve. The cotangent of f is None where no row depends on it.
    """
    integrator, (f, y0, ss) = join(x, rest)
    (ys_bar, folded_bar), f_rest, output = bars, rest[1][0], integrator.output
    f_x = x[0] if output.save is not None else None

    def finish(f_x, y0, slope0, y1, memory1, ss, rows):
        field = f if f_x is None else eqx.combine(f_x, f_rest)
        slope1 = integrator.method.slope(field, at[-1], y1, memory1)
        return output.finish(field, ss, at, y0, slope0, y1, slope1, rows, recorded.report)

    at, rows = ss, output.room(f, y0, ss) if output.rows(ss) else None
    args = f_x, y0, recorded.slope0, recorded.y, recorded.memory, ss, rows
    _, vjp = jax.vjp(finish, *args)
    f_bar, y0_bar, slope0_bar, y1_bar, memory1_bar, ss_bar, rows_bar = vjp(ys_bar)
    row = jnp.asarray(output.last(ss), jnp.int32)
    ss_bar = None if x[2] is None else ss_bar
    carry = Cotangents(y1_bar, memory1_bar, f_bar, row, ss_bar, folded_bar)
    return carry, rows_bar, (y0_bar, slope0_bar)


def to_the_start(steps, own, mask, y0, carry: Cotangents, start_bars):
    """The cotangents of (f, y0, ss): of one solve, or of many."""
    y0_bar, slope0_bar = start_bars
    f_more, y_more = steps.back_at_start(own, mask, y0, carry.memory, slope0_bar)
    f_bar = jax.tree.map(jnp.add, carry.f, f_more)
    return f_bar, jax.tree.map(lambda *y: sum(y), carry.y, y_more, y0_bar), carry.ss
