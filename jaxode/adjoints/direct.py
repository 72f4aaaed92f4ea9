"""Direct: the operations of the solver, once more, in a form that JAX differentiates in any mode."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxode.adjoints.failed import held, held_by_status
from jaxode.outputs import bent, with_carried
from jaxode.stepping import checkpoints, loop
from jaxode.stepping.events import Eventful
from jaxode.stepping.integrator import trial_step
from jaxode.stepping.problems import end_of
from jaxode.stepping.stability import differentiated


def forward(integrator, f, y0, ss):
    """Forward mode: JAX differentiates the loop itself; the choice of step sizes is left out."""
    return jax.tree.map(forward_alone.bind, loop.solve(differentiated(integrator), f, y0, ss))


NO_TRANSPOSE = (
    "adjoint='forward' has derivatives in forward mode alone, such as jax.jvp and jax.jacfwd. For jax.grad, "
    "jax.vjp and jax.jacrev leave `adjoint` out, which is 'replay', or pass 'backsolve', 'reversible' or "
    "'direct'."
)


def refused(x_bar, x):
    """Of its loops JAX would say that they cannot be differentiated so, and not what to do."""
    raise TypeError(NO_TRANSPOSE)


forward_alone = Primitive("forward_alone")
forward_alone.def_impl(lambda x: x)
forward_alone.def_abstract_eval(lambda x: x)
mlir.register_lowering(forward_alone, mlir.lower_fun(lambda x: x, multiple_results=False))
ad.deflinear2(forward_alone, refused)
batching.defvectorized(forward_alone)


def direct(integrator, f, y0, ss):
    """Exact derivatives of every order and mode, through the solver's own operations.

    Steps of fixed size run in one `scan`, and keep what each one computed. Adaptive ones are found
    first, then taken again by a scan over `max_steps` places, each of which keeps a state (what a
    step computed is computed again in the backward pass).
    """
    at, end = lax.stop_gradient(ss), end_of(ss)
    plain = not (isinstance(f, Eventful) or integrator.observers)
    if isinstance(integrator.steps, int) and plain:
        places = jnp.arange(integrator.steps + 1, dtype=ss.dtype) / integrator.steps
        grid, n, report, due = end * places, integrator.step_count(end), None, None
    else:
        steady = differentiated(integrator)
        _, report, recorded = loop.record(*lax.stop_gradient((steady, f, y0, ss)))
        grid, n, due = recorded.tape.grid, recorded.tape.steps, recorded.tape.due
    x, rest = eqx.partition((f, y0, ss), eqx.is_inexact_array)
    arrays, static = eqx.partition((integrator, rest, at, grid, n, report, due), eqx.is_array)

    def again(x, arrays):
        integrator, rest, *found = eqx.combine(arrays, static)
        return taken_again(integrator, *eqx.combine(x, rest), *found)

    if report is None:
        return held_by_status(again, x, arrays, lambda out: out[1].status)
    return again(held(x, ~report.succeeded), arrays)


def taken_again(integrator, f, y0, ss, at, grid, n, report, due):
    """The solution by a scan over the n steps of a grid, and the report (None: made here)."""
    method, output, end = integrator.method, integrator.output, at[-1]
    memory0 = method.start(f, 0 * end, y0)
    slope0 = method.slope(f, 0 * end, y0, memory0)
    inside = output.rows(ss) > 0

    def one(pair, ends):
        s, s1, due = ends
        y, memory = checkpoints.with_due(pair, due)
        step = trial_step(integrator, f, s, y, memory, s1 - s)
        cost = jnp.asarray(step.evaluations, jnp.int32)
        fine = integrator.finite(step.y, step.slope) & step.converged
        kept: dict[str, Any] = {"went": (fine, cost)}
        if inside:
            d = method.inside(f, s, y, s1 - s, step) if output.needs_inside() else []
            kept["inside"] = y, d
        if integrator.fold is not None:
            kept["fold"] = integrator.fold.of_step(method, s, y, memory, s1 - s, step)
        return (step.y, step.memory), kept

    pair = y0, memory0
    if report is None:
        (y1, memory1), kept = lax.scan(one, pair, (grid[:-1], grid[1:], None))
        went = kept["went"]
        report = report_of_equal_steps(integrator, f, y0, memory0, slope0, grid, went, end)
    else:
        width = checkpoints.segment(integrator.max_steps)
        (y1, memory1), kept = scanned(one, pair, grid, n, width, due)
    if integrator.fold is not None:
        report = report._replace(folded=integrator.fold.total(kept["fold"]))
    rows = rows_of(integrator, f, ss, at, grid, n, kept["inside"]) if inside else None
    slope1 = method.slope(f, end, y1, memory1)
    ys = output.finish(f, ss, at, y0, slope0, y1, slope1, rows, report)
    ys = bent(method, output, f, ss, y0, y1, report, ys)
    return with_carried(method, ys, memory1), report


def report_of_equal_steps(integrator, f, y0, memory0, slope0, grid, went, end):
    """How steps of equal size went, up to the first that is not finite: `went` says which are, and
    what each cost."""
    (fine, costs), n = went, integrator.step_count(end)
    state = integrator.initial(f, y0, memory0, slope0, end)
    accepted = jnp.minimum(jnp.sum(jnp.cumprod(fine.astype(jnp.int32)), dtype=jnp.int32), n)
    stopped = (accepted < n) | (state.h == 0)
    tried = jnp.where(state.h == 0, 0, jnp.minimum(accepted + 1, n))
    taken = jnp.arange(len(costs), dtype=jnp.int32) < tried
    state = state._replace(
        s=grid[accepted], ratio=jnp.where(stopped, jnp.nan, 0), accepted=accepted, tried=tried,
        evaluations=state.evaluations + jnp.sum(jnp.where(taken, costs, 0), dtype=jnp.int32),
    )  # fmt: skip
    return integrator.report(state, y0, slope0, end)


def scanned(one, start, grid, n, width, due=None):
    """A scan of `one` over the first n steps of a grid, whose derivatives take each step again.

    It goes by blocks of `width` places: those beyond n cost nothing.
    """
    one = jax.checkpoint(one)
    first_due = None if due is None else due[0]
    blank = jax.eval_shape(one, start, (grid[0], grid[1], first_due))[1]
    zeros = lambda *lead: jax.tree.map(lambda x: jnp.zeros((*lead, *x.shape), x.dtype), blank)

    def maybe(state, place):
        i, ends = place
        return lax.cond(i < n, lambda: one(state, ends), lambda: (state, zeros()))

    def maybe_several(state, block):
        several = lambda: lax.scan(maybe, state, block)
        return lax.cond(block[0][0] < n, several, lambda: (state, zeros(width)))

    places = -(-(len(grid) - 1) // width) * width
    pad = lambda x: jnp.zeros((places + 1 - len(grid), *x.shape[1:]), x.dtype)
    if due is not None:
        due = jnp.concatenate([due[:-1], pad(due)])
    grid = jnp.concatenate([grid, pad(grid)])
    xs = jnp.arange(places, dtype=jnp.int32), (grid[:-1], grid[1:], due)
    blocks = jax.tree.map(lambda x: x.reshape(-1, width, *x.shape[1:]), xs)
    end, steps = lax.scan(maybe_several, start, blocks)
    return end, jax.tree.map(lambda x: x.reshape(places, *x.shape[2:]), steps)


def rows_of(integrator, f, ss, at, grid, n, steps):
    """The rows inside, each from the step that holds it."""
    output = integrator.output
    row = jnp.arange(output.rows(ss), dtype=jnp.int32)
    i = jnp.clip(output.step_of(at, row, grid, n), 0, jnp.maximum(n - 1, 0))
    h = jnp.where(n > 0, grid[i + 1] - grid[i], 1)
    times = ss[jnp.minimum(row, len(ss) - 1)]

    def value(time, s, h, step):
        y, d = step
        return output.value(f, time, s, h, y, d)

    return jax.vmap(value)(times, grid[i], h, jax.tree.map(lambda x: x[i], steps))
