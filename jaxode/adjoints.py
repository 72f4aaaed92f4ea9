"""Ways to differentiate a solve. Each is given the solve, and knows nothing of how it steps.

An adjoint is a function `adjoint(solve, f, y0, ss) -> (ys, report)`. `solve(f, y0, ss)` computes
that, and `solve.record(f, y0, ss)` a tape as well; `f` is the field on [0, 1], a pytree whose arrays
are the parameters (t0 and t1 among them); `ss` are the output times in [0, 1]. Whatever the adjoint
returns is differentiated by JAX; a new one may live outside this library.

| adjoint | gradient | memory | modes |
|---|---|---|---|
| `replay` | exact for the numbers that the solve returned | at most 128 states | reverse, and over it |
| `backsolve` | of the continuous problem, to tolerance | constant | reverse |
| `direct` | exact, through the operations of the solver | all steps | all, any order |
| `forward` | exact, step sizes held fixed | constant | forward, any order |
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from jaxode import batching, lanes, lanes_backward, scalars, sensitivities, stages, tree
from jaxode.continuous_adjoint import backsolve
from jaxode.cotangents import (
    Cotangents,
    join,
    no_tangent,
    only,
    outputs,
    rows_where,
    slopes,
    with_vjp,
)
from jaxode.loop import Pair, assemble, backwards, equal_steps_report
from jaxode.step import coefficients, heuristics, powers_of, step, step_and_inside


def forward(solve, f, y0, ss):
    """Forward mode: JAX differentiates the loop itself; the choice of step sizes is left out."""
    return solve(f, y0, ss)


# Direct: the operations of the solver, once more, in a form that JAX differentiates in any mode.


def direct(solve, f, y0, ss):
    """Exact derivatives of every order and mode, through the solver's own operations.

    Steps of fixed size run in one `scan`, and keep what each one computed. Adaptive ones are found
    first, then taken again by a scan over `max_steps` places, each of which keeps a state (what a
    step computed is computed again in the backward pass).
    """
    k0 = f(y0, jnp.zeros_like(ss[0]))
    inside = len(ss) > 2

    def one(state, ends):
        y, k = state
        s, s1 = ends
        y1, ks = step(solve.table, f, y, k, s, s1 - s)
        kept: list[Any] = [None, None]
        if inside:
            kept[0] = y, coefficients(solve.table, f, y, ks, s, s1 - s)
        if solve.heuristics:
            kept[1] = heuristics(solve.table, y, y1, ks, s1 - s)
        return (y1, ks[-1]), kept

    if isinstance(solve.steps, int):
        end = lax.stop_gradient(ss[-1])
        grid = end * (jnp.arange(solve.steps + 1, dtype=ss.dtype) / solve.steps)
        n = jnp.where(end > 0, jnp.asarray(solve.steps, jnp.int32), 0)
        (y1, k1), (steps, found) = lax.scan(one, (y0, k0), (grid[:-1], grid[1:]))
        report = equal_steps_report(solve, y0, k0, y1, n, end, end)
    else:
        _, report, tape = solve.record(*lax.stop_gradient((f, y0, ss)))
        grid, n = tape.grid, tape.steps
        (y1, k1), (steps, found) = taken_again(one, (y0, k0), grid, n, solve.segment)
    if solve.heuristics:
        report = report._replace(heuristics=jax.tree.map(jnp.sum, found))
    rows = None
    if inside:
        grid = jnp.where(jnp.arange(len(grid), dtype=jnp.int32) <= n, grid, jnp.inf)
        i = jnp.searchsorted(grid, ss, side="left").astype(jnp.int32) - 1
        i = jnp.clip(i, 0, jnp.maximum(n - 1, 0))
        theta = (ss - grid[i]) / jnp.where(n > 0, grid[i + 1] - grid[i], 1)
        rows = jax.vmap(polynomial)(theta, jax.tree.map(lambda x: x[i], steps))
    return assemble(y0, k0, y1, k1, rows, ss, report), report


def taken_again(one, start, grid, n, width):
    """A scan of `one` over the first n steps of a grid, whose derivatives take each step again.

    It goes by blocks of `width` places: those beyond n cost nothing.
    """
    one = jax.checkpoint(one)
    blank = jax.eval_shape(one, start, (grid[0], grid[1]))[1]
    zeros = lambda *lead: jax.tree.map(lambda x: jnp.zeros((*lead, *x.shape), x.dtype), blank)

    def maybe(state, place):
        i, ends = place
        return lax.cond(i < n, lambda: one(state, ends), lambda: (state, zeros()))

    def maybe_several(state, block):
        several = lambda: lax.scan(maybe, state, block)
        return lax.cond(block[0][0] < n, several, lambda: (state, zeros(width)))

    places = -(-(len(grid) - 1) // width) * width
    pad = jnp.zeros(places + 1 - len(grid), grid.dtype)
    grid = jnp.concatenate([grid, pad])
    xs = jnp.arange(places, dtype=jnp.int32), (grid[:-1], grid[1:])
    blocks = jax.tree.map(lambda x: x.reshape(-1, width), xs)
    end, steps = lax.scan(maybe_several, start, blocks)
    return end, jax.tree.map(lambda x: x.reshape(places, *x.shape[2:]), steps)


def polynomial(theta, coefficients):
    """y + sum_p theta^(p+1) d_p."""
    y, d = coefficients
    return tree.combine(y, 1.0, powers_of(theta, len(d)), d)


# Replay: backwards over the recorded steps.


def replay(solve, f, y0, ss):
    """Discrete adjoint of the steps that were accepted, with their sizes held fixed.

    The forward pass records where each step began and the states at about sqrt(max_steps) places;
    the backward pass rebuilds the states between two of them and takes the vjp of one step after
    another (Zhuang et al. 2020, arXiv 2006.02493). Rejected steps are never entered again. Costs
    one evaluation and one vjp of f a stage, and another evaluation where states are rebuilt. Under
    `jax.vmap` both passes are loops over lanes (`jaxode.lanes`), and nothing is recorded; where each
    solve has at most four numbers to be differentiated, these derivatives are carried along
    (`jaxode.sensitivities`): the same numbers for half the time.
    """
    return replay_in_lanes(solve, f, y0, ss)


class Passes(NamedTuple):
    """A solve, the same with its tape, and the vjp over the tape: of one solve, or of many.

    The last two and their `plain` selves do the same; the plain ones are differentiated by JAX.
    """

    solve: Callable  # (solve, f, y0, ss) -> ys, report
    record: Callable  # (x, rest) -> ys, report, tape
    pull: Callable  # (x, rest, tape, ys_bar) -> x_bar
    plain: tuple[Callable, Callable, Callable]


def replaying(passes: Passes) -> Callable:
    """The differentiable solve of these passes.

    First derivatives of the forward and the backward pass let replay be differentiated again, by
    forward and by reverse mode. With S(x) the solve (its steps held fixed), x all that it depends on
    and w a cotangent of S, both follow from phi(x, w) = <w, S(x)>: the forward pass is d phi / d w,
    the backward pass d phi / d x, and a tangent of the two is the Hessian of phi applied to a tangent
    of (x, w). A Hessian is symmetric: its transpose, which reverse mode asks for, is itself.
    `lax.custom_linear_solve` is how one says so to JAX.
    """
    plain_solve, plain_record, plain_pull = passes.plain

    @jax.custom_jvp
    def recorded(x, rest):
        """The solve, with its tape."""
        ys, report, tape = passes.record(x, rest)
        return ys, (report, tape)

    @recorded.defjvp
    def recorded_jvp(primals, tangents):
        (x, rest), (x_dot, _) = primals, tangents
        ys, (report, tape) = recorded(x, rest)

        def hessian(v):
            return passes.pull(x, rest, tape, v[1]), push(x, rest, v[0])

        _, ys_dot = symmetric(hessian, (x_dot, jax.tree.map(jnp.zeros_like, ys)), x)
        return (ys, (report, tape)), (ys_dot, jax.tree.map(no_tangent, (report, tape)))

    @jax.custom_jvp
    def pulled(x, rest, tape, ys_bar):
        """Cotangents of (f, y0, ss), None where there are none."""
        return passes.pull(x, rest, tape, ys_bar)

    @pulled.defjvp
    def pulled_jvp(primals, tangents):
        (x, rest, tape, ys_bar), (x_dot, _, _, ys_bar_dot) = primals, tangents

        def gradient(x, ys_bar):
            return plain_pull(x, rest, plain_record(x, rest)[2], ys_bar)

        def hessian(v):
            return jax.jvp(gradient, (x, ys_bar), v)[1], push(x, rest, v[0])

        x_bar_dot, _ = symmetric(hessian, (x_dot, ys_bar_dot), x)
        return pulled(x, rest, tape, ys_bar), x_bar_dot

    def push(x, rest, x_dot):
        """The tangent of the solve."""

        def ys(x):
            solve, (f, y0, ss) = join(x, rest)
            return plain_solve(solve, f, y0, ss)[0]

        return jax.jvp(ys, (x,), (x_dot,))[1]

    def forwards(x, rest):
        ys, (report, tape) = recorded(x, rest)
        return ys, report, tape

    return with_vjp(passes.solve, forwards, pulled)


def symmetric(operator, v, x):
    """A linear operator that is its own transpose, applied to v. It may depend on x."""
    one = once(x)
    # JAX transposes the operator only if every part of v is linear: zeros are made so.
    total = sum((jnp.sum(part.real).astype(one.dtype) for part in jax.tree.leaves(v)), 0 * one)
    v = jax.tree.map(lambda part: part + (0 * total).astype(part.dtype), v)
    return lax.custom_linear_solve(
        lambda v: jax.tree.map(lambda part: tree.scale(one, part), v),
        v,
        solve=lambda _, v: operator(v),
        symmetric=True,
    )


@jax.custom_jvp
def once(x):
    """The number 1; it cannot be differentiated, so that no third derivative is silently wrong."""
    return jnp.ones(())


@once.defjvp
def once_jvp(primals, tangents):
    raise NotImplementedError(
        "adjoint='replay' has first and second derivatives; for third ones pass adjoint='direct'."
    )


# The backward pass.


def pull(x, rest, tape, ys_bar):
    """The vjp of the recorded steps, last to first: cotangents of (f, y0, ss)."""
    solve, (f, y0, ss) = join(x, rest)
    tape, _ = tape
    f_x, _, ss_x = x
    f_rest = rest[1][0]
    at_start, at_end = ss <= 0, (ss >= ss[-1]) & (ss > 0)
    inside = len(ss) > 2
    y_bar = rows_where(at_end, ys_bar)
    take = Backstep(solve.table, f_rest, inside, (f_x, y0, ss[0]))
    carry = Cotangents(
        pair=take.pair.pack(y_bar, jax.tree.map(jnp.zeros_like, y_bar)),
        f=jax.tree.map(jnp.zeros_like, f_x),
        ss=None if ss_x is None else jnp.where(at_end, slopes(ys_bar, tape.k_end, ss.dtype), 0),
        row=jnp.sum(~at_end, dtype=jnp.int32) - 1,
    )

    def visit(carry, n, y, k):
        s, s1 = tape.grid[n], tape.grid[n + 1]
        return take(carry, f_x, y, k, s, s1 - s, ss, ys_bar)

    again = one_step(solve.table, f, y0, tape.grid[0])
    carry = backwards(solve, tape, again, visit, carry)
    k0, pull_k = jax.vjp(lambda f_x, y: eqx.combine(f_x, f_rest)(y, jnp.zeros_like(ss[0])), f_x, y0)
    y_bar, k_bar = take.pair.open(carry.pair)
    f_bar, y0_bar = pull_k(k_bar)
    f_bar = jax.tree.map(jnp.add, carry.f, f_bar)
    y0_bar = jax.tree.map(lambda *x: sum(x), y_bar, y0_bar, rows_where(at_start, ys_bar))
    ss_bar = None if ss_x is None else jnp.where(at_start, slopes(ys_bar, k0, ss.dtype), carry.ss)
    return f_bar, only(x[1], y0_bar), ss_bar


# Both passes of one solve, which a `jax.vmap` outside of a derivative turns into loops over lanes,
# and those of many, which a `jax.vmap` inside of it does.


def record_lanes(size, flags, x, rest):
    """`record_one` of all; but there is no tape: only the number of attempts, or the derivatives."""
    of_x, (of_solve, of_rest) = flags
    solve, given = join(x, rest)
    of_given = eqx.combine(of_x, of_rest)
    ys, report, ahead = ahead_in_lanes(size, (of_solve, *of_given), x, of_x, solve, *given)
    first = jax.tree.map(lambda x, flag: x[0] if flag else x, (x, rest), flags)
    tape, _ = jax.eval_shape(record_one, *first)[2]
    # NaN: nothing can be made of this tape without its being seen.
    nothing = lambda dtype: jnp.nan if jnp.issubdtype(dtype, jnp.inexact) else 0
    tape = jax.tree.map(lambda x: jnp.full(x.shape, nothing(x.dtype), x.dtype), tape)
    empty = jax.tree.map(lambda _: False, tape)._replace(steps=True)
    tape = tape._replace(steps=report.accepted + report.rejected)
    every = lambda tree_: jax.tree.map(lambda _: True, tree_)
    return (ys, report, (tape, ahead)), (every(ys), every(report), (empty, every(ahead)))


def ahead_in_lanes(size, flags, x, of_x, solve, f, y0, ss):
    """All solves; with their derivatives, if these are few."""
    if not sensitivities.few(x, of_x):
        return *lanes.solved(size, flags, solve, f, y0, ss)[0], None
    one = lambda xs, flags: jax.tree.map(lambda x, flag: x[0] if flag else x, xs, flags)
    starts = sensitivities.starts(one(y0, flags[2]), one(x, of_x))
    solve, field, of_field = sensitivities.extended(solve, x[0], f, flags[1])
    of_y0 = flags[2], jax.tree.map(lambda _: False, starts)
    of_solve = dataclasses.replace(flags[0], measured=solve.measured)
    flags = of_solve, of_field, of_y0, flags[3]
    ((ys, ahead), report), _ = lanes.solved(size, flags, solve, field, (y0, starts), ss)
    return ys, report, ahead


def pull_lanes(size, flags, x, rest, tape, ys_bar):
    """`pull` of all: the solves are done again, a chunk at a time."""
    x, of_x = batching.spread(size, x, flags[0]), jax.tree.map(lambda _: True, x)
    ys_bar = batching.spread(size, ys_bar, flags[3])
    given = (flags[1][0], of_x, flags[1][1])
    steps, ahead = tape[0].steps, tape[1]
    out = pull_all_lanes(size, given, x, rest, (steps, ahead), ys_bar)
    return out, jax.tree.map(lambda _: True, out)


def pull_all_lanes(size, given, x, rest, tape, ys_bar):
    """Cotangents of x: of what solves have of their own, each its own; of what they share, the sum."""
    steps, ahead = tape
    if ahead is not None:
        found = sensitivities.pulled(size, ahead, ys_bar, x, given[1])
        return *batching.summed(found, given[1][:2]), None
    f_bar, y0_bar, ss_bar = lanes_backward.pulled(size, given, rest[0], x, rest[1], steps, ys_bar)
    return f_bar, *batching.summed((only(x[1], y0_bar), ss_bar), given[1][1:])


def of_many(size, flags) -> batching.Solver:
    """Replay of solves that share what is not flagged: its cotangents are sums."""

    def solve_all(*args):
        return lanes.solved(size, flags, *args)[0]

    def record_all(x, rest):
        solve, given = join(x, rest)
        of_x = only(x, flags[1:])
        ys, report, ahead = ahead_in_lanes(size, flags, x, of_x, solve, *given)
        return ys, report, (report.accepted + report.rejected, ahead)

    def pull_all(x, rest, tape, ys_bar):
        given = flags[0], only(x, flags[1:]), only(rest[1], flags[1:])
        return pull_all_lanes(size, given, x, rest, tape, ys_bar)

    passes = Passes(solve_all, record_all, pull_all, (solve_all, record_all, pull_all))
    return batching.Solver(solve_all, replaying(passes))


def record_one(x, rest):
    """A solve, its tape, and (for lanes, which fill it) room for its derivatives, if these are few."""
    solve, given = join(x, rest)
    ys, report, tape = solve.record(*given)
    room = sensitivities.room(x, ys) if sensitivities.few(x) else None
    return ys, report, (tape, room)


of_one = replaying(
    Passes(
        lanes.solve_batched,
        batching.batched(record_one, record_lanes, lambda flags, x, rest: lanes.able(rest[0])),
        batching.batched(
            pull, pull_lanes, lambda flags, x, rest, *_: flags[2][0].steps and lanes.able(rest[0])
        ),
        (lanes.solve_one, record_one, pull),
    )
)
replay_in_lanes = batching.InLanes(
    batching.Solver(lanes.solve_one, of_one), of_many, lanes.able_to, lanes.like_results
)


class Backstep:
    """The vjp of one step, and of the outputs inside it; in one kernel if the step is small."""

    def __init__(self, table, f_rest, inside, examples):
        self.table, self.f_rest, self.inside = table, f_rest, inside
        f_x, y, s = examples
        self.pair = Pair(y, packed=True)
        self.blank = jax.tree.map(jnp.zeros_like, y)
        self.d_blank = [self.blank] * len(table.dense) if inside else []
        args = (f_x, y, y, s, s, self.blank)
        self.fused: Any = None
        self.slope: Any = None
        if self.pair.packed:
            both = self.pair.pack(y, y)
            self.fused = scalars.fuse(self.pull, *args, both, self.d_blank)
        self.loop = False
        if self.fused is None:
            self.pair = Pair(y, packed=False)
            self.loop = stages.which(table, eqx.combine(f_x, f_rest), y, s).backward
        elif inside:
            self.slope = scalars.fuse(lambda *args: self.step(*args)[2], f_x, y, y, s, s)

    def step(self, f_x, y, k, s, h):
        f = eqx.combine(f_x, self.f_rest)
        return step_and_inside(self.table, f, y, k, s, h, self.inside)

    def pull(self, f_x, y, k, s, h, straight, both, d_bar):
        _, vjp = jax.vjp(lambda f_x, y, k: self.step(f_x, y, k, s, h), f_x, y, k)
        return self.pulled(vjp, straight, both, d_bar)

    def pulled(self, vjp, straight, both, d_bar):
        f_bar, y_bar, k_bar = vjp((*self.pair.open(both), d_bar))
        return f_bar, self.pair.pack(jax.tree.map(jnp.add, y_bar, straight), k_bar)

    def by_stages(self, carry, f_x, y, k, s, h, ss, ys_bar):
        """The same as a loop over stages."""
        field = lambda f_x, y, s: eqx.combine(f_x, self.f_rest)(y, s)
        steps = stages.of_one(self.table, functools.partial(field, f_x))
        ks, seen = steps.seen(y, k, s, h, self.inside)
        straight, d_bar = self.blank, None
        if self.inside:
            d = steps.coefficients(y, h, ks)
            carry, straight, d_bar = outputs(carry, d, straight, self.d_blank, s, h, ss, ys_bar)
            d_bar = jax.tree.map(lambda *d: jnp.stack(d), *d_bar)
        pull = lambda y, s, w: jax.vjp(lambda f_x, y: field(f_x, y, s), f_x, y)[1](w)
        y_bar, k_bar, f_bar = steps.back(pull, seen, s, h, carry.pair, carry.f, d_bar)
        both = jax.tree.map(jnp.add, y_bar, straight), k_bar
        return Cotangents(both, f_bar, carry.ss, carry.row)

    def __call__(self, carry, f_x, y, k, s, h, ss, ys_bar):
        if self.loop:
            return self.by_stages(carry, f_x, y, k, s, h, ss, ys_bar)
        straight, d_bar = self.blank, self.d_blank
        d: Any = None
        vjp: Any = None
        if self.fused is None:
            (_, _, d), vjp = jax.vjp(lambda f_x, y, k: self.step(f_x, y, k, s, h), f_x, y, k)
        elif self.inside and carry.ss is not None:
            d = self.slope(f_x, y, k, s, h)
        if self.inside:
            carry, straight, d_bar = outputs(carry, d, straight, d_bar, s, h, ss, ys_bar)
        if self.fused is None:
            f_bar, both = self.pulled(vjp, straight, carry.pair, d_bar)
        else:
            f_bar, both = self.fused(f_x, y, k, s, h, straight, carry.pair, d_bar)
        return Cotangents(both, jax.tree.map(jnp.add, carry.f, f_bar), carry.ss, carry.row)


def one_step(table, f, y, s):
    """(y, k, s, h) -> y and k at the end of a step; in one kernel if it is small."""
    pair = Pair(y, packed=True)

    def plain(f, y, k, s, h):
        y1, ks = step(table, f, y, k, s, h)
        return y1, ks[-1]

    fused = None
    if pair.packed:
        packed = lambda *args: pair.pack(*plain(*args))
        fused = scalars.fuse(packed, f, y, y, s, s, cheap=True)
    if fused is None and stages.which(table, f, y, s).backward:

        def in_a_loop(y, k, s, h):
            y1, ks = stages.of_one(table, f).step(y, k, s, h)
            return y1, tree.row(ks, len(table.c) - 1)

        return in_a_loop
    if fused is None:
        return functools.partial(plain, f)
    return lambda *args: pair.open(fused(f, *args))


named = {"replay": replay, "backsolve": backsolve(), "direct": direct, "forward": forward}
