"""Backsolve: the adjoint as an ordinary differential equation, solved backwards.

Under `jax.vmap` it is one more batch of solves in lanes. The gradient of what all of them share, such
as the weights of a network, is one sum over lanes and steps, never an array for each lane.
"""

import dataclasses
import functools
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxode import tree
from jaxode.adjoints import stretches
from jaxode.adjoints.ends import distance, from_the_end, of_the_field
from jaxode.adjoints.inputs import is_asked, join, of_parts, only, present
from jaxode.adjoints.replay import like_pull, like_solve, solve_part, spread_pull
from jaxode.adjoints.replay_in_lanes import of_own_and_shared
from jaxode.batch import lanes, queue
from jaxode.batch.lanes import first_of
from jaxode.batch.layout import to_lanes
from jaxode.batch.plans import alone, plan
from jaxode.batch.vmap_rules import Form, Part, axes_of, spread, summed
from jaxode.kernels.forms import PLAIN
from jaxode.kernels.stepper import Stepper, stepper
from jaxode.outputs import Cotangents, Times, gather, passed
from jaxode.solution import Status
from jaxode.stepping import loop
from jaxode.stepping.events import quiet
from jaxode.stepping.loop import Recorded
from jaxode.stepping.problems import Problems, end_of, one, pullback

# How far off y0 may be where the solve backwards ends: by this share of the size of the state, or by so
# many times what is tolerated.
DRIFT, TOLERANCES = 0.05, 10


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
    use `replay` there. If the state at t0 comes back as another one, the gradient is NaN: off by more than a
    twentieth of its size (root mean squares) and by more than 10 tolerances. It is NaN, too, if the
    solve backwards fails.

    Of a solve with events the states right before them are kept, as many as the events' `keep` together, and
    each stretch between two is solved by itself (`jaxode.adjoints.stretches`). If there were more events,
    the gradient is NaN.

    The string "backsolve" is `backsolve()`.
    """

    def derivative(form: Form):
        return of_parts(form, solve_part, ends_part, pull_part)

    pull_part = Part(
        "pull_backsolve", partial(run_pull, (rtol, atol)), like_pull, backward=True, spread=spread_pull,
        own=lambda flags, out: flags[0], able=lambda size, flags: size is None,
    )  # fmt: skip
    part = Part("solve_backsolve", solve_part.run_form, like_solve, derivative=derivative)

    def solve(integrator, f, y0, ss):
        if integrator.output.each_step:
            raise ValueError(
                "adjoint='backsolve' knows nothing of the steps that were taken: with `dense` or `save_steps` "
                "use adjoint='replay' or 'direct'; or ask for as many times in `t` as are needed."
            )
        if integrator.method.carries:
            raise ValueError(
                "adjoint='backsolve' knows nothing of the steps that were taken: with `fold` use "
                "adjoint='replay' or 'direct'."
            )
        return part(integrator, f, y0, ss)

    return solve


# The parts: the forward solve with its ends, and the backward solve.


def run_ends(form: Form, x, rest):
    """The solve, its ends and how it went; nothing in between."""
    integrator, given = join(x, rest)
    integrator = stretches.with_trail(integrator)
    if form.size is not None:
        of_x, (of_integrator, of_rest) = form.flags
        of_integrator = stretches.with_trail(of_integrator)
        form = form._replace(flags=(of_integrator, *eqx.combine(of_x, of_rest)))
        ys, report, end, slope0 = lanes.solve(form, integrator, *given)
    else:
        run = lambda *args, kernel=PLAIN: loop.run(*args, kernel=kernel)[:4]
        ys, report, end, slope0 = alone(form, run, given)(integrator, *given)
    report, trail = stretches.taken_apart(report)
    return ys, report, Recorded(trail, slope0, end.y, end.memory, report)  # type: ignore[arg-type]


def like_ends(x, rest):
    integrator, (f, y0, ss) = join(x, rest)
    (ys, report), effects = like_solve(stretches.with_trail(integrator), f, y0, ss)
    report, trail = stretches.taken_apart(report)
    memory = jax.eval_shape(lambda f, y, s: integrator.method.start(f, s, y), f, y0, ss[0])
    memory = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), memory)
    return (ys, report, Recorded(trail, y0, y0, memory, report)), effects  # type: ignore[arg-type]


ends_part = Part("ends", run_ends, like_ends)


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


def reverse(tolerances, integrator, f, ss, meetings=None):
    """The backward problem of one solve. With events it is that of all stretches between them."""
    end = end_of(ss)
    span = jnp.stack([0 * end, end]) if meetings is None else meetings
    return backwards(integrator, *tolerances), Reversed(f, end), span


class Along(NamedTuple):
    """What goes back along with a solve: `f` are the cotangents of leaves of the field that it has of its own,
    `row` and `ss` as in `Cotangents`; `ahead` says how many events are still to come, None without any."""

    f: PyTree
    row: Array
    ss: Any
    ahead: Any = None


class Back(NamedTuple):
    """Trial steps back, of one solve or of many: with cotangents of f and of the rows."""

    forwards: Stepper
    backwards: Stepper
    mask: PyTree
    rows_bar: PyTree
    events: stretches.Events | None = None

    def trial(self, own, own_back, state, extra: Along, total, who):
        """The state after a trial step, what goes along with it, and the cotangents of what is shared."""
        own_back, place = self.stretch(own_back, extra)
        new, h, step = self.backwards.trial(own_back, state)
        accepted = new.accepted > state.accepted
        d = self.backwards.inside(own_back, state.s, state.y, h, step)
        end = self.backwards.problems.of(own_back)[1].end
        if self.events is not None:  # one that was cut short says nothing of the size of the next
            cut = accepted & (h < state.h)
            new = new._replace(h=jnp.where(cut, jnp.maximum(new.h, state.h), new.h))

        def add(carry):
            return self.quadrature(own, accepted, state, end, h, d, *carry)

        f_bar, total = tree.at_most_once(jnp.any(accepted), add, (extra.f, total))
        carry = new, extra._replace(f=f_bar), total
        if self.rows_bar is None:
            return carry
        pending = passed(self.forwards.problems, own, extra.row, place(new), h) & accepted

        def move(carry):
            return self.move(own, own_back, pending, h, place, who, *carry)

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

    def move(self, own, own_back, pending, h, place, who, new, extra: Along, total):
        """The rows that a step back has passed, moved to its end: by the vjp of dense output."""
        problems, method = self.forwards.problems, self.forwards.method
        (y, a), (f_bar, row, ss_bar, _), s = new.y, extra, place(new)
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
        memory = self.restarted(own_back, (y, a), new.s)
        there = problems.vmap(tree.where)(pending, ((y, a), memory), (new.y, new.memory))
        row = jnp.where(pending, carry.row, row)
        extra = extra._replace(f=f_bar, row=row, ss=carry.ss)
        return new._replace(y=there[0], memory=there[1]), extra, total

    def restarted(self, own_back, y, r):
        """The memory of solves that go on from other states."""
        restart = lambda integrator, f, ss, y, r: integrator.method.start(f, r, y)
        return self.backwards.problems.each(restart)(own_back, y, r)

    def added(self, more, f_bar, total):
        """With these cotangents of f added: to those of each, and to those of what is shared."""
        shared = jax.tree.map(lambda x: x is not None, total, is_leaf=lambda x: x is None)
        of_total, of_mine = eqx.partition(more, shared)
        add = partial(jax.tree.map, jnp.add)
        return add(f_bar, of_mine), add(total, of_total)

    # From stretch to stretch.

    def start(self, own_back, start, asked, extra: Along):
        """Solves before their first trial steps, and their slopes there; those that are not asked for stay."""
        state, slope = self.backwards.start(self.stretch(own_back, extra)[0], start)
        go = asked if self.events is None else asked & (extra.ahead >= 0)
        return state._replace(h=jnp.where(go, state.h, 0)), slope

    def stretch(self, own_back, extra: Along):
        """The problem that is solved now, and when in [0, 1] a state of it is: of all of the way back, or with
        events of a stretch of it."""
        problems = self.backwards.problems
        if self.events is None:
            end = problems.of(own_back)[1].end
            return own_back, lambda state: end - state.s
        own_back, last = stretches.stretch(problems, own_back, extra.ahead)
        _, f, span = problems.of(own_back)
        # To the last bit: an output at the time of an event is before it.
        return own_back, lambda state: jnp.where(state.s < span[..., -1], f.end - state.s, last)

    def at_event(self, own_back, state, extra: Along):
        """Whether an event is what comes next."""
        own_back, _ = self.stretch(own_back, extra)
        return stretches.is_at_event(self.backwards.problems, own_back, state, extra.ahead)

    def on_stretch(self, own_back, state, extra: Along):
        """Whether there is to be another trial step before the next event, or the start."""
        return self.backwards.unfinished(self.stretch(own_back, extra)[0], state)

    def unfinished(self, own_back, state, extra: Along):
        """Whether there is more to be done."""
        go = self.on_stretch(own_back, state, extra)
        return go if self.events is None else go | self.at_event(own_back, state, extra)

    def jump(self, own, own_back, state, extra: Along, total, who):
        """Back through an event, where one comes next, and on to the stretch before it."""
        jumps = self.at_event(own_back, state, extra)

        def back(carry):
            state, extra, total = carry
            problems, s = self.forwards.problems, self.stretch(own_back, extra)[1](state)
            given = self.events, extra.ahead, who, jumps, s, *state.y
            f_more, pair = stretches.back_through(problems, own, self.mask, *given)
            f_bar, total = self.added(f_more, extra.f, total)
            extra = extra._replace(f=f_bar, ahead=extra.ahead - jumps.astype(jnp.int32))
            memory = self.restarted(self.stretch(own_back, extra)[0], pair, 0 * s)
            new = state._replace(s=0 * s, y=pair, memory=memory, accepted=0 * state.accepted)
            return problems.vmap(tree.where)(jumps, new, state), extra, total

        return tree.at_most_once(jnp.any(jumps), back, (state, extra, total))


def begun(carry: Cotangents, recorded: Recorded, ss, span) -> Along:
    """What goes along with a solve (or with many) where it begins, at the end; without those of the field."""
    if recorded.tape is None:
        return Along(None, carry.row, carry.ss)
    ss = jnp.broadcast_to(ss, (*span.shape[:-1], ss.shape[-1]))
    # A terminal event may have ended it before the last row.
    last = jnp.sum(ss <= span[..., -1:], -1, dtype=jnp.int32) - 1
    return Along(None, jnp.minimum(carry.row, last), carry.ss, stretches.events_ahead(recorded))


# One solve.


def pull_one(tolerances, x, rest, recorded: Recorded, bars, kernel=PLAIN):
    """Cotangents of (f, y0, ss) by one solve from the end to the start."""
    integrator, (f, y0, ss) = join(x, rest)
    asked, mask = is_asked(bars), present(x[0])
    carry, rows_bar, starts = from_the_end(x, rest, recorded, bars)
    events = stretches.events_of(integrator, recorded, carry.folded)
    problems, own = one(integrator if events is None else quiet(integrator), f, ss)
    meetings = None if events is None else stretches.meetings(recorded, ss)
    problems_back, own_back = one(*reverse(tolerances, integrator, f, ss, meetings))
    start = recorded.y, carry.y
    forwards = stepper(problems, own, y0, kernel)
    back = Back(forwards, stepper(problems_back, own_back, start, kernel), mask, rows_bar, events)
    extra = begun(carry, recorded, ss, own_back[2])
    state, slope = back.start(own_back, start, asked, extra)
    extra = extra._replace(f=of_the_field(problems, own, mask, y0, recorded, bars))
    total = jax.tree.map(lambda _: None, extra.f)

    def body(carry):
        state, extra = carry
        return back.trial(own, own_back, state, extra, total, None)[:2]

    def to_event(carry):
        on_stretch = lambda carry: back.on_stretch(own_back, *carry)
        state, extra = jax.lax.while_loop(on_stretch, body, carry)
        return back.jump(own, own_back, state, extra, total, None)[:2]

    unfinished = lambda carry: back.unfinished(own_back, *carry)
    turn = body if events is None else to_event
    state, extra = jax.lax.while_loop(unfinished, turn, (state, extra))
    own_back, _ = back.stretch(own_back, extra)
    end = state, extra
    return ending(x, rest, asked, own_back, start, slope, end, carry, starts)[0]


def ending(x, rest, asked, own_back, start, slope, end, carry, starts):
    """The cotangents of one solve, and whether they are fine: NaN if the backward solve failed, or came to
    another state than y0; 0 if nothing was asked of it."""
    state, extra = end
    y, a = state.y
    fine = has_come_back(own_back, start, slope, state, extra) & ~drifted(
        *join(x, rest), start[0], y
    )
    y0_bar = jax.tree.map(jnp.add, a, starts[0])
    given = lambda x: jnp.where(asked, tree.or_nan(fine, x), 0)
    return jax.tree.map(given, (extra.f, only(x[1], y0_bar), extra.ss)), fine | ~asked


def has_come_back(own_back, start, slope, state, extra: Along):
    """Whether a solve back has reached the start, with no more events ahead."""
    integrator, _, span = own_back
    fine = integrator.report(state, start, slope, span[-1]).status == Status.SUCCESS.value
    return fine if extra.ahead is None else fine & (extra.ahead == 0)


def drifted(integrator, given, y1, recovered):
    """Whether the state that a solve back has found at the start is another one than y0.

    Then so was the path along which the adjoint was solved: its gradient means nothing.
    """
    _, y0, _ = given
    tolerated = integrator.tolerated(y0, y1)
    off, size = distance(recovered, y0, y1)
    too_far = tree.norm(tree.difference(recovered, y0), tolerated) > TOLERANCES
    return (off > DRIFT * size) & too_far


# Many solves.


def pull_all_in_lanes(tolerances, form: Form, x, rest, recorded: Recorded, bars):
    """`pull_one` of many. Cotangents of what they share of f are sums over all of them."""
    of_x, (of_integrator, of_rest), of_recorded, of_bars = form.flags
    in_axes = *axes_of(form.flags[:2]), 0, 0
    size, (integrator, given) = form.size, join(x, rest)
    of_given = eqx.combine(of_x, of_rest)
    form = form._replace(flags=(of_integrator, *of_given))
    how = plan(form, *first_of((integrator, *given), form.flags), copies=3)
    width = max(how.width, min(size, 32)) if isinstance(size, int) else size
    bars, recorded = spread(size, bars, of_bars), spread(size, recorded, of_recorded)
    carry, rows_bar, starts = jax.vmap(from_the_end, in_axes)(x, rest, recorded, bars)
    asked = jax.vmap(is_asked)(bars)
    events = stretches.events_of(integrator, recorded, carry.folded)
    # A solve that is left out is not solved backwards. It may have failed: it starts as another.
    who = jnp.where(asked, jnp.arange(size), jnp.argmax(asked))
    start, mask = (recorded.y, carry.y), present(x[0])
    meetings = None
    if events is not None:
        integrator, of_integrator = quiet(integrator), quiet(of_integrator)
        meetings = jax.vmap(stretches.meetings)(recorded, spread(size, given[2], of_given[2]))[who]
    flags = of_integrator, *of_given
    forth, back, start = both_ways(tolerances, flags, integrator, given, who, start, meetings)
    (problems, own), (problems_back, own_back) = forth, back
    y0 = spread(size, given[1], of_given[1])
    steppers = stepper(problems, own, y0), stepper(problems_back, own_back, start)
    back = Back(*steppers, mask, rows_bar, events)
    extra = begun(carry, recorded, given[2], own_back[2])
    state, slope = back.start(own_back, start, asked, extra)
    total, f_bar = of_own_and_shared(problems, mask, who, asked, own, y0, recorded, bars)

    def once(carry):
        ((own, own_back), (state, extra)), who, total = carry
        state, extra, total = back.trial(own, own_back, state, extra, total, who)
        if events is not None:
            state, extra, total = back.jump(own, own_back, state, extra, total, who)
        return ((own, own_back), (state, extra)), who, total

    unfinished = lambda own, now: back.unfinished(own[1], *now)
    waiting = (own, own_back), (state, extra._replace(f=f_bar))
    ends, total = queue.together(unfinished, waiting, once, total, size, width)

    def result(x, rest, asked, own_back, start, slope, end, carry, starts):
        own_back = eqx.combine(own_back, problems_back.shared)
        return ending(x, rest, asked, own_back, start, slope, end, carry, starts)

    own_back, _ = back.stretch(own_back, ends[1])
    args = x, rest, asked, own_back, start, slope, ends, carry, starts
    (f_bar, y0_bar, ss_bar), fine = jax.vmap(result, (*in_axes[:2], *[0] * 7))(*args)
    total = jax.tree.map(lambda x: tree.or_nan(jnp.all(fine), x), total)
    y0_bar, ss_bar = summed((y0_bar, ss_bar), (of_x[1], of_x[2]))
    return eqx.combine(f_bar, total), y0_bar, ss_bar


def both_ways(tolerances, flags, integrator, given, who, start, meetings):
    """The forward and the backward problem of each solve `who`, as (problems, own), and where it starts."""
    (f, _, ss), (of_integrator, of_f, _, of_ss) = given, flags
    own, shared = eqx.partition((integrator, f, ss), (of_integrator, of_f, of_ss))
    own, start = jax.tree.map(lambda x: x[who], (own, start))
    flags_back = reverse_flags(integrator, of_integrator, of_f, meetings)
    reversed_ = lambda own, *meetings: reverse(tolerances, *eqx.combine(own, shared), *meetings)
    in_stretches = () if meetings is None else (meetings,)
    whole = jax.vmap(reversed_, out_axes=axes_of(flags_back), axis_size=who.shape[0])(
        own, *in_stretches
    )
    own_back, shared_back = eqx.partition(whole, flags_back)
    return (Problems(shared, 0), own), (Problems(shared_back, 0), own_back), start


def reverse_flags(integrator, of_integrator, of_f, meetings):
    """Which leaves of the backward problem a solve has of its own."""
    steps = of_integrator.steps
    if meetings is not None:  # so many in each stretch
        steps = jax.tree.map(lambda _: True, steps)
    of_back = dataclasses.replace(
        of_integrator, rtol=(of_integrator.rtol,) * 2, atol=(of_integrator.atol,) * 2, mxstep=None,
        method=integrator.method.backwards(), output=Times(), fold=None, steps=steps,
    )  # fmt: skip
    return of_back, Reversed(of_f, True), True
