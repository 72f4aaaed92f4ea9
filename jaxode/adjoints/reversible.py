"""Reversible: exact derivatives of the steps that were taken, without any of their states stored."""

import dataclasses
import functools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import tree
from jaxode.adjoints import replay
from jaxode.adjoints.ends import distance
from jaxode.adjoints.inputs import join, of_parts
from jaxode.batch.lanes import first_of, one_after_another
from jaxode.batch.plans import alone, go_in_turn
from jaxode.batch.vmap_rules import Form, Part, axes_of, summed
from jaxode.kernels.forms import PLAIN
from jaxode.kernels.one_call import one_call
from jaxode.kernels.stages import Stages, vjp_of_added
from jaxode.methods.reversible import made_reversible
from jaxode.stepping import loop
from jaxode.stepping.loop import Recorded
from jaxode.stepping.stability import differentiated

KEEP = 32  # pairs of states that are stored at most


@functools.cache
def reversible(keep: int = KEEP):
    """Gradients of the numbers that the solve returned, by steps that can be taken back.

    The solve takes reversible steps (`jaxode.methods.reversible.Reversible`, after McCallum and Foster
    2024, arXiv 2410.11648) made of the explicit Runge-Kutta method that `method` names, adaptive or equal.
    The backward pass takes each of them back, and its vjp: stored are the step sizes, and the two states
    of a step where they had to be made one, which is once in about five time constants of the fastest mode.
    So memory does not grow with the number of steps, as in the paper's adjoint (`backsolve`), and the gradient
    is that of the steps (as in `replay`). A step costs twice the evaluations of its table, and two more.

    The gradient is NaN if there was more to be stored than `keep` pairs (stiff problems, and those that decay
    over hundreds of time constants), or if the state at t0 comes back off by more than the cube root of a
    rounding of its size (root mean squares): use `replay` there, or a larger `keep`. Along a mode that decays,
    and that the solution does not excite (a component that is 0), the two states do not come apart, and the
    gradient grows as e^t in its time constants, unseen: use `replay` for that, too.

    Args:
        keep: how many pairs of states there is room for.

    Raises:
        ValueError: `keep` is not a positive integer; the method has no explicit table; there are events, a
            fold, `dense` or `save_steps`.

    The string "reversible" is `reversible()`.
    """
    if not isinstance(keep, int) or keep < 1:
        raise ValueError(f"`keep` must be a positive integer, got {keep!r}.")

    def solve(integrator, f, y0, ss):
        if integrator.output.each_step:
            raise ValueError(
                "adjoint='reversible' keeps nothing of the steps that were taken: with `dense` or "
                "`save_steps` use adjoint='replay'; or ask for as many times in `t` as are needed."
            )
        before, method = integrator.method, made_reversible(integrator.method)
        budget = integrator.budget
        if budget is not None:
            budget = budget.with_steps_of(method, before, "adjoint='reversible'")
        return part(dataclasses.replace(integrator, method=method, budget=budget), f, y0, ss)

    def derivative(form: Form):
        return of_parts(form, part, record_part, pull_part, differentiated)

    part = Part("solve_reversible", replay.run_solve, replay.like_solve, derivative=derivative)
    run, like = partial(run_record, keep), partial(like_record, keep)
    record_part = Part("record_reversible", run, like)
    return solve


class Joins(NamedTuple):
    """Where each step began (None for steps of equal size); and before which steps the two states were
    made one, with what they were."""

    pairs: PyTree
    at: Array
    grid: Any
    steps: Array

    def write(self, n, pair, s1) -> "Joins":
        """The pair from which a trial step begins. It is written over unless that step makes one of them."""
        y, memory = pair
        row = jnp.minimum(memory.joins.astype(jnp.int32), len(self.at) - 1)
        pairs = tree.put(row, (y, memory.z), self.pairs)
        grid = self.grid if self.grid is None else tree.put(n + 1, lax.stop_gradient(s1), self.grid)
        return self._replace(pairs=pairs, at=tree.put(row, n, self.at), grid=grid)

    def run(self, turns, unfinished, body, state):
        return turns(unfinished, body, state)


def room(keep: int, integrator, y0, dtype) -> Joins:
    """Room for what is stored; its last row is for what need not be."""
    zero = jnp.zeros((), jnp.int32)
    pairs = tree.rooms((y0, y0), keep + 1)
    grid = jnp.zeros(integrator.max_steps + 1, dtype) if integrator.adaptive else None
    return Joins(pairs, jnp.zeros(keep + 1, jnp.int32), grid, zero)


# The parts: the forward solve with its step sizes, and the way back.


def record(keep: int, x, rest, kernel=PLAIN):
    """The solve, its end, and where its steps were."""
    integrator, (f, y0, ss) = join(x, rest)
    tape = room(keep, integrator, y0, ss.dtype)
    ys, report, state, slope0, tape = loop.run(integrator, f, y0, ss, tape, kernel)
    tape = tape._replace(steps=state.accepted)
    return ys, report, Recorded(tape, slope0, state.y, state.memory, report)


def by_inversion(steps, own, mask, y0, recorded: Recorded, gathered, inside: bool, carry):
    """The cotangents before the first step, from the end alone; and whether all that was needed was stored
    and has led to y0."""
    integrator, _, ss = own
    tape = recorded.tape

    def place(n):
        return integrator.place(n, ss[-1]) if tape.grid is None else tree.row(tape.grid, n)

    def back(state):
        n, k, y1, z1, carry = state
        n, s, s1 = n - 1, place(n - 1), place(n)
        last = jnp.maximum(k - 1, 0)
        joins = (k > 0) & (tree.row(tape.at, last) == n)
        stored = joins, tree.row(tape.pairs, last)
        y, z, carry = back_a_step(steps, own, mask, carry, s, s1, y1, z1, stored, gathered, inside)
        return n, k - joins.astype(k.dtype), y, z, carry

    joins = recorded.memory.joins.astype(jnp.int32)
    begin = tape.steps, joins, recorded.y, recorded.memory.z, carry
    _, _, y, _, carry = lax.while_loop(lambda state: state[0] > 0, back, begin)
    off, size = distance(y, y0, recorded.y)
    eps = max((float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(y0)), default=1.0)
    return carry, (joins < len(tape.at)) & (off <= eps ** (1 / 3) * size)


def back_a_step(steps, own, mask, carry, s, s1, y1, z1, stored, gathered, inside: bool):
    """The two states before a step, and the cotangents there.

    The slopes of each half are computed once, to take it back and for its vjp. `stored` says whether the
    states were made one in this step, and what they were. The slope in the memory has no cotangent: at the
    end of a solve it moves rows in time, by nothing.
    """
    stages = Stages(steps.method.method, steps.problems, steps.kernel)
    half = partial(vjp_of_added, stages, own, mask)
    (joins, pair), h, plus = stored, s1 - s, partial(jax.tree.map, jnp.add)

    back, _, vjp = half(s1, y1, -h, False)  # z1 = z - Psi_-h(y1)
    z = tree.where(joins, pair[0], plus(z1, back))
    y_bar, f_bar = vjp(carry.f, [jax.tree.map(jnp.negative, carry.memory.z)])
    carry = carry._replace(f=f_bar)
    y_bar = straight = plus(carry.y, y_bar)

    there, d, vjp = half(s, z, h, inside)  # y1 = y + Psi_h(z)
    y, z_before = tree.where(joins, pair, (tree.difference(y1, there), z))
    d_bar = []
    if inside:
        carry, of_rows, d_bar = gathered(carry, s, h, y, d)
        straight = plus(y_bar, of_rows)
    z_bar, f_bar = vjp(carry.f, [y_bar, *d_bar])
    z_bar = plus(carry.memory.z, z_bar)

    zero = jax.tree.map(jnp.zeros_like, z_bar)
    y_bar, z_bar = tree.where(joins, (plus(straight, z_bar), zero), (straight, z_bar))
    memory = carry.memory._replace(z=z_bar)
    return y, z_before, carry._replace(y=y_bar, f=f_bar, memory=memory)


def pull(x, rest, recorded: Recorded, bars, kernel=PLAIN):
    """The vjp of the steps, last to first: cotangents of (f, y0, ss), NaN if they could not be taken back."""
    return replay.pull(x, rest, recorded, bars, kernel, by_inversion)


def run_record(keep: int, form: Form, x, rest):
    """The solve, and what its backward pass needs."""
    return run_each(form, partial(record, keep), x, rest)


def run_pull(form: Form, x, rest, recorded, bars):
    """The way back; the cotangents of what many solves share are summed."""
    found = run_each(form, pull, x, rest, recorded, bars)
    return found if form.size is None else summed(found, form.flags[0])


def run_each(form: Form, fn, x, rest, *args):
    """fn of one solve, or of each of many: in turn if they are small, on a CPU; else JAX batches the loop."""
    args = x, rest, *args
    if form.size is None:
        return alone(form, fn, join(x, rest)[1])(*args)
    batched = jax.vmap(fn, axes_of(form.flags), axis_size=form.size)
    if not go_in_turn(form, *join(*first_of((x, rest), form.flags[:2]))[1]):
        return batched(*args)
    return one_call(partial(one_after_another, form, fn), batched)(*args)


def like_record(keep: int, x, rest):
    (ys, report, recorded), effects = replay.like_record(x, rest)
    integrator, (_, y0, ss) = join(x, rest)
    tape = room(keep, integrator, y0, ss.dtype)
    return (ys, report, recorded._replace(tape=tape)), effects


pull_part = Part(
    "pull_reversible",
    run_pull,
    replay.like_pull,
    backward=True,
    own=lambda flags, out: flags[0],
    spread=replay.spread_pull,
)
