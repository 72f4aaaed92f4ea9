"""Backsolve: the adjoint as an ordinary differential equation, solved backwards.

Under `jax.vmap` it is one more batch of solves in lanes. The gradient of what all of them share, such
as the weights of a network, is one sum over lanes and steps, never an array for each lane.
"""

import dataclasses
import functools
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxode import tree
from jaxode.adjoints.ends import from_the_end, of_the_field
from jaxode.adjoints.inputs import flags_of, is_asked, join, only, present, with_vjp
from jaxode.adjoints.replay import like_pull, like_solve, solve_part, spread_pull
from jaxode.adjoints.replay_in_lanes import of_own_and_shared
from jaxode.batch import lanes, queue
from jaxode.batch.lanes import first_of
from jaxode.batch.layout import to_lanes
from jaxode.batch.plans import alone, plan
from jaxode.batch.vmap_rules import Form, Part, spread, summed
from jaxode.kernels.forms import PLAIN
from jaxode.kernels.stepper import Stepper, stepper
from jaxode.outputs import Cotangents, Times, gather, passed
from jaxode.solution import Status
from jaxode.stepping import loop
from jaxode.stepping.loop import Recorded
from jaxode.stepping.problems import Problems, end_of, one, pullback


@functools.cache
def backsolve(rtol=None, atol=None):
    """The adjoint of Chen et al. (2018, arXiv 1806.07366, algorithm 1): one more ODE, solved backwards.

    With a(t) = dL/dy(t) and p(t) the gradient of the parameters collected so far,

        dy/dt = f,   da/dt = -a^T df/dy,   dp/dt = -a^T df/dtheta,   from t1 back to t0;

    nothing of the forward solve is kept. `rtol` and `atol` are those of the backward solve (those
    of the forward one by default). p is no part of its state: it only ever is a quadrature (Kidger et
    al. 2020, arXiv 2009.09457), by Gauss's rule on the dense output of every accepted step. The
    cotangents of outputs inside a step are moved to its end by the vjp of dense output, so that the
    steps do not shrink with the distance between outputs. y(t) is computed backwards, too, and drifts
    from the forward solution where that is unstable backwards in time (dissipative and stiff problems):
    use `replay` there.

    The string "backsolve" is `backsolve()`.
    """

    def derivative(form: Form):
        return differentiable(form, pull_part)

    pull_part = Part(
        "pull_backsolve", partial(run_pull, (rtol, atol)), like_pull, spread=spread_pull,
        own=lambda flags, out: flags[0], able=lambda size, flags: size is None,
    )  # fmt: skip
    part = Part("solve_backsolve", solve_part.run_form, like_solve, derivative=derivative)

    def solve(integrator, f, y0, ss):
        if integrator.output.each_step:
            raise ValueError(
                "adjoint='backsolve' knows nothing of the steps that were taken: with `dense` or `save_steps` "
                "use adjoint='replay' or 'direct'; or ask for as many times in `t` as are needed."
            )
        return part(integrator, f, y0, ss)

    return solve


# The parts: the forward solve with its ends, and the backward solve.


def run_ends(form: Form, x, rest):
    """The solve, its ends and how it went; nothing in between."""
    integrator, given = join(x, rest)
    if form.size is not None:
        of_x, (of_integrator, of_rest) = form.flags
        form = form._replace(flags=(of_integrator, *eqx.combine(of_x, of_rest)))
        ys, report, end, slope0 = lanes.solve(form, integrator, *given)
    else:
        run = lambda *args, kernel=PLAIN: loop.run(*args, kernel=kernel)[:4]
        ys, report, end, slope0 = alone(form, run, given)(integrator, *given)
    return ys, report, Recorded(None, slope0, end.y, end.memory, report)  # type: ignore[arg-type]


def like_ends(x, rest):
    integrator, (f, y0, ss) = join(x, rest)
    (ys, report), effects = like_solve(integrator, f, y0, ss)
    memory = jax.eval_shape(lambda f, y, s: integrator.method.start(f, s, y), f, y0, ss[0])
    memory = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), memory)
    return (ys, report, Recorded(None, y0, y0, memory, report)), effects  # type: ignore[arg-type]


ends_part = Part("ends", run_ends, like_ends)


def differentiable(form: Form, pull_part: Part):
    """The solve as a function that JAX can differentiate."""
    if form.size is None:
        return with_vjp(solve_part, ends_part, pull_part)
    size, every = form.size, partial(jax.tree.map, lambda _: True)

    def ends_of_all(x, rest):
        return ends_part.of_many(size, flags_of(x, form.flags), x, rest)

    def pull_all(x, rest, recorded, bars):
        flags = *flags_of(x, form.flags), every(recorded), every(bars)
        return pull_part.of_many(size, flags, x, rest, recorded, bars)

    return with_vjp(partial(solve_part.of_many, size, form.flags), ends_of_all, pull_all)


def run_pull(tolerances, form: Form, x, rest, recorded, bars):
    """The backward solve."""
    if form.size is not None:
        return pull_all_in_lanes(tolerances, form, x, rest, recorded, bars)
    pull = alone(form, partial(pull_one, tolerances), join(x, rest)[1])
    return pull(x, rest, recorded, bars)


def backwards(integrator, rtol, atol):
    """The integrator of (y, a)."""
    given = lambda new, old: jax.tree.map(lambda x: jnp.full_like(x, new), old) if new else old
    rtol, atol = given(rtol, integrator.rtol), given(atol, integrator.atol)
    return dataclasses.replace(
        integrator, method=integrator.method.backwards(), rtol=(rtol, rtol), atol=(atol, atol),
        mxstep=None, output=Times(), fold=None, observers=(), budget=None,
    )  # fmt: skip


class Reversed(eqx.Module):
    """The field of (y, a) in r = end - s, the time still to go back from the end."""

    f: PyTree
    end: PyTree

    def __call__(self, state, r):
        y, a = state
        k, vjp = jax.vjp(lambda y: self.f(y, self.end - r), y)
        return jax.tree.map(jnp.negative, k), vjp(a)[0]


def reverse(tolerances, integrator, f, ss):
    """The backward problem of one solve."""
    end = end_of(ss)
    return backwards(integrator, *tolerances), Reversed(f, end), jnp.stack([0 * end, end])


class Back(NamedTuple):
    """Trial steps back, of one solve or of many: with cotangents of f and of the rows.

    `f_bar` are those of leaves of f that a solve has of its own, `row` and `ss` as in `Cotangents`.
    """

    forwards: Stepper
    backwards: Stepper
    mask: PyTree
    rows_bar: PyTree

    def trial(self, own, own_back, state, extra, total, who):
        """The state after a trial step, what goes along with it, and the cotangents of what is shared."""
        new, h, step = self.backwards.trial(own_back, state)
        accepted = new.accepted > state.accepted
        d = self.backwards.inside(own_back, state.s, state.y, h, step)
        f_bar, row, ss_bar = extra
        end = self.backwards.problems.of(own_back)[1].end

        def add(carry):
            return self.quadrature(own, accepted, state, end, h, d, *carry)

        f_bar, total = tree.at_most_once(jnp.any(accepted), add, (f_bar, total))
        if self.rows_bar is None:
            return new, (f_bar, row, ss_bar), total
        pending = passed(self.forwards.problems, own, row, end - new.s, h) & accepted

        def move(carry):
            return self.move(own, own_back, pending, h, end, who, *carry)

        carry = new, (f_bar, row, ss_bar), total
        return tree.at_most_once(jnp.any(pending), move, carry)

    def quadrature(self, own, accepted, state, end, h, d, f_bar, total):
        """The integral of a^T df/dtheta over a step, by Gauss's rule."""
        problems = self.forwards.problems
        slopes = lambda problems, own, y, s: problems.slopes(own, y, s)
        count = -(-(self.backwards.method.order + 1) // 2)
        nodes, weights = np.polynomial.legendre.leggauss(count)
        for node, weight in zip((nodes + 1) / 2, weights / 2):
            theta = jnp.full_like(h, node)
            y, a = problems.vmap(tree.polynomial)(state.y, theta, d)
            part = jnp.where(accepted, h * jnp.asarray(weight, h.dtype), 0)
            w = jax.tree.map(lambda a, part=part: problems.spread(part, a) * a, a)
            s = end - (state.s + theta * h)
            more, _ = pullback(self.forwards.problems, own, self.mask, slopes, (y,), (s,))[1](w)
            f_bar, total = self.added(more, f_bar, total)
        return f_bar, total

    def move(self, own, own_back, pending, h, end, who, new, extra, total):
        """The rows that a step back has passed, moved to its end: by the vjp of dense output."""
        problems, method = self.forwards.problems, self.forwards.method
        (y, a), (f_bar, row, ss_bar), s = new.y, extra, end - new.s
        start = lambda problems, own, y, s: problems.each(
            lambda integrator, f, ss, y, s: method.start(f, s, y)
        )(own, y, s)  # fmt: skip
        memory, pull_start = pullback(self.forwards.problems, own, self.mask, start, (y,), (s,))
        zero = partial(jax.tree.map, jnp.zeros_like)
        none = eqx.combine(zero(f_bar), zero(total))
        carry = Cotangents(zero(y), zero(memory), none, jnp.where(pending, row, -1), ss_bar)

        def pick(row, rows_bar):
            if problems.axis is None:
                return tree.row(rows_bar, row)
            return to_lanes(jax.tree.map(lambda w: w[who, row], rows_bar), problems.axis)

        def gathered(carry, inside):
            return gather(problems, own, self.mask, carry, self.rows_bar, s, h, y, inside, pick)

        carry = self.forwards.back(own, self.mask, carry, s, y, memory, h, gathered, True)
        f_more, y_more = pull_start(carry.memory)
        a = jax.tree.map(lambda *a: sum(a), a, carry.y, y_more)
        f_more = jax.tree.map(jnp.add, carry.f, f_more)
        f_bar, total = self.added(f_more, f_bar, total)
        restart = lambda integrator, f, ss, y, r: integrator.method.start(f, r, y)
        memory = self.backwards.problems.each(restart)(own_back, (y, a), new.s)
        there = problems.vmap(tree.where)(pending, ((y, a), memory), (new.y, new.memory))
        row = jnp.where(pending, carry.row, row)
        return new._replace(y=there[0], memory=there[1]), (f_bar, row, carry.ss), total

    def added(self, more, f_bar, total):
        """With these cotangents of f added: to those of each, and to those of what is shared."""
        shared = jax.tree.map(lambda x: x is not None, total, is_leaf=lambda x: x is None)
        of_total, of_mine = eqx.partition(more, shared)
        add = partial(jax.tree.map, jnp.add)
        return add(f_bar, of_mine), add(total, of_total)


# One solve.


def pull_one(tolerances, x, rest, recorded: Recorded, bars, kernel=PLAIN):
    """Cotangents of (f, y0, ss) by one solve from the end to the start."""
    integrator, (f, y0, ss) = join(x, rest)
    asked, mask = is_asked(bars), present(x[0])
    carry, rows_bar, starts = from_the_end(x, rest, recorded, bars)
    problems, own = one(integrator, f, ss)
    problems_back, own_back = one(*reverse(tolerances, integrator, f, ss))
    start = recorded.y, carry.y
    forwards = stepper(problems, own, y0, kernel)
    back = Back(forwards, stepper(problems_back, own_back, start, kernel), mask, rows_bar)
    state, slope = back.backwards.start(own_back, start)
    state = state._replace(h=jnp.where(asked, state.h, 0))
    f_bar = of_the_field(problems, own, mask, y0, recorded, bars)
    total = jax.tree.map(lambda _: None, f_bar)

    def body(carry):
        state, extra = carry
        state, extra, _ = back.trial(own, own_back, state, extra, total, None)
        return state, extra

    unfinished = lambda carry: back.backwards.unfinished(own_back, carry[0])
    begin = state, (f_bar, carry.row, carry.ss)
    state, (f_bar, _, ss_bar) = jax.lax.while_loop(unfinished, body, begin)
    return ending(x, rest, asked, own_back, start, slope, state, f_bar, ss_bar, carry, starts)


def ending(x, rest, asked, own_back, start, slope, state, f_bar, ss_bar, carry, starts):
    """The cotangents of one solve: NaN if the backward solve failed, 0 if nothing was asked of it."""
    integrator, _, span = own_back
    a = state.y[1]
    report = integrator.report(state, start, slope, span[-1])
    y0_bar = jax.tree.map(jnp.add, a, starts[0])
    fine = report.status == Status.SUCCESS.value
    given = lambda x: jnp.where(asked, jnp.where(fine, x, jnp.nan), 0)
    return jax.tree.map(given, (f_bar, only(x[1], y0_bar), ss_bar))


# Many solves.


def pull_all_in_lanes(tolerances, form: Form, x, rest, recorded: Recorded, bars):
    """`pull_one` of many. Cotangents of what they share of f are sums over all of them."""
    of_x, (of_integrator, of_rest), of_recorded, of_bars = form.flags
    size, (integrator, given) = form.size, join(x, rest)
    of_given = eqx.combine(of_x, of_rest)
    form = form._replace(flags=(of_integrator, *of_given))
    how = plan(form, *first_of((integrator, *given), form.flags), copies=3)
    width = max(how.width, min(size, 32))
    bars, recorded = spread(size, bars, of_bars), spread(size, recorded, of_recorded)
    axes = partial(jax.tree.map, lambda flag: 0 if flag else None)
    in_axes = axes(of_x), (axes(of_integrator), axes(of_rest)), 0, 0
    carry, rows_bar, starts = jax.vmap(from_the_end, in_axes)(x, rest, recorded, bars)
    asked = jax.vmap(is_asked)(bars)
    # A solve that is left out is not solved backwards. It may have failed: it starts as another.
    who = jnp.where(asked, jnp.arange(size), jnp.argmax(asked))
    f, y0, ss = given
    own, shared = eqx.partition((integrator, f, ss), (of_integrator, of_given[0], of_given[2]))
    own = jax.tree.map(lambda x: x[who], own)
    start = jax.tree.map(lambda x: x[who], (recorded.y, carry.y))
    problems = Problems(shared, 0)
    flags_back = reverse_flags(integrator, f, ss, of_integrator, of_given)
    all_back = lambda own: reverse(tolerances, *eqx.combine(own, shared))
    whole = jax.vmap(all_back, out_axes=axes(flags_back), axis_size=size)(own)
    own_back, shared_back = eqx.partition(whole, flags_back)
    problems_back = Problems(shared_back, 0)
    y0 = spread(size, y0, of_given[1])
    mask = present(x[0])
    back = Back(
        stepper(problems, own, y0),
        stepper(problems_back, own_back, start),
        mask,
        rows_bar,
    )
    state, slope = back.backwards.start(own_back, start)
    state = state._replace(h=jnp.where(asked, state.h, 0))
    total, f_bar = of_own_and_shared(problems, mask, who, asked, own, y0, recorded, bars)

    def once(carry):
        ((own, own_back), (state, extra)), who, total = carry
        state, extra, total = back.trial(own, own_back, state, extra, total, who)
        return ((own, own_back), (state, extra)), who, total

    unfinished = lambda own, state: back.backwards.unfinished(own[1], state[0])
    waiting = (own, own_back), (state, (f_bar, carry.row, carry.ss))
    ends, total = queue.together(unfinished, waiting, once, total, size, width)

    def result(x, rest, asked, own_back, start, slope, end, carry, starts):
        state, (f_bar, _, ss_bar) = end
        own_back = eqx.combine(own_back, shared_back)
        found = ending(x, rest, asked, own_back, start, slope, state, f_bar, ss_bar, carry, starts)
        status = own_back[0].report(state, start, slope, own_back[2][-1]).status
        return found, (status == Status.SUCCESS.value) | ~asked

    args = x, rest, asked, own_back, start, slope, ends, carry, starts
    (f_bar, y0_bar, ss_bar), fine = jax.vmap(result, (*in_axes[:2], *[0] * 7))(*args)
    total = jax.tree.map(lambda x: jnp.where(jnp.all(fine), x, jnp.nan), total)
    y0_bar, ss_bar = summed((y0_bar, ss_bar), (of_x[1], of_x[2]))
    return eqx.combine(f_bar, total), y0_bar, ss_bar


def reverse_flags(integrator, f, ss, of_integrator, of_given):
    """Which leaves of the backward problem a solve has of its own."""
    of_back = dataclasses.replace(
        of_integrator, rtol=(of_integrator.rtol,) * 2, atol=(of_integrator.atol,) * 2, mxstep=None,
        method=integrator.method.backwards(), output=Times(), fold=None,
    )  # fmt: skip
    return of_back, Reversed(of_given[0], True), True
