"""The form of a step, chosen once: for one solve and for many, forwards and backwards.

| a step is | for | its vjp |
|---|---|---|
| written out | any method | `jax.vjp` of the step |
| a loop over stages | a method with a table | stage by stage, in a loop |
| a kernel of its numbers | lanes of an implicit method with few | the same of its `jax.vjp` |
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from jaxode import tree
from jaxode.kernels import eventful, forms
from jaxode.kernels.calls import in_calls
from jaxode.kernels.forms import CALLS, ONE_CALL, PLAIN
from jaxode.kernels.numbers import in_numbers
from jaxode.kernels.stages import Stages
from jaxode.methods.explicit import Tableau
from jaxode.methods.linear import WRITTEN_OUT
from jaxode.methods.method import Step, for_inside
from jaxode.outputs import Cotangents
from jaxode.stepping import events, stability
from jaxode.stepping.events import Eventful, WithEvents
from jaxode.stepping.integrator import next_end_or_event, trial_step, watched
from jaxode.stepping.problems import Problems, end_of, pullback


class Stepper(NamedTuple):
    """Trial steps of one solve or of many, and the way back through them.

    `kernel` is one of `jaxode.kernels.forms`; `loops` says whether the stages are a loop, forwards and
    backwards.
    """

    problems: Problems
    method: Any
    kernel: str
    loops: forms.Loops

    @property
    def in_numbers(self) -> bool:
        """Whether steps of lanes are taken apart into their numbers, if they are few."""
        many = self.kernel == ONE_CALL and self.problems.axis is not None
        return many and self.method.in_numbers() is not None

    @property
    def stages(self) -> Stages:
        return Stages(self.method, self.problems, self.kernel)

    def field(self, f, mask=None):
        """The field of one solve as a step is to see it."""
        return in_calls(f, mask) if self.kernel == CALLS and self.method.sums_slopes else f

    # Forwards.

    def start(self, own, y0: PyTree):
        """Solves before their first trial steps, and their slopes there."""

        def one(integrator, f, ss, y0):
            end = end_of(ss)
            memory = self.method.start(f, 0 * end, y0)
            slope = self.method.slope(f, 0 * end, y0, memory)
            state = integrator.initial(f, y0, memory, slope, end)
            folded = None
            if integrator.fold is not None:
                step = lambda: trial_step(integrator, f, 0 * end, y0, memory, end)
                found = lambda: integrator.fold.of_step(
                    self.method, 0 * end, y0, memory, end, step()
                )
                folded = tree.zeros_of(lambda: integrator.fold.begin(found()))
            if isinstance(f, Eventful):
                state = events.begin(f, state)
            state = stability.gently(integrator, f, state)
            if integrator.steady and not self.method.implicit:
                probe = stability.begin(integrator, controlled(self, f), state, slope)
                state = state._replace(probe=probe)
            return state._replace(folded=folded), slope

        return self.problems.each(one)(own, y0)

    def unfinished(self, own, state):
        """Whether there is to be another trial step, of each solve."""
        one = lambda integrator, f, ss, state: integrator.unfinished(state, end_of(ss))
        return self.problems.each(one)(own, state)

    def trial(self, own, state):
        """A trial step: the state after it, its size, and what `inside` needs of it."""
        if not self.loops.forward:
            trial = self.problems.each(self.trial_of_one)
            if state.watch is not None:
                trial = partial(eventful.trial, self)
            elif self.in_numbers and tree.count(state.y) > WRITTEN_OUT:
                trial = trial_in_numbers(self, own, state) or trial
            new, found, h, step = trial(own, state)
            new = folded(self, own, state, new, found)
            return steadied(self, own, new, state.y), h, for_inside(step)

        def decide(integrator, f, ss, state, y, k, errors, move):
            step = Step(y, k, k, errors, None, evaluations=self.method.step_evaluations)
            new = integrator.accept_or_reject(state, step, *move)
            return watched(integrator, state, new, move[1], step, move[2])

        s1, h, go = self.problems.each(self.move)(own, state)
        step = self.stages.step(own, state.s, state.y, state.memory, h)
        found = step.y, step.slope, step.errors
        new = self.problems.each(decide)(own, state, *found, (s1, h, go))
        return steadied(self, own, new, state.y), h, for_inside(step)

    def trial_of_one(self, integrator, f, ss, state):
        """The same of one solve, in one go; and what the step adds to a fold."""
        s1, h, go = self.move(integrator, f, ss, state)
        step = trial_step(integrator, self.field(f), state.s, state.y, state.memory, h)
        return decided(integrator, state, s1, h, go, step)

    def move(self, integrator, f, ss, state):
        """Where the next trial step ends, its size, and whether there is one: if not, its size is 0."""
        s1, h, _ = next_end_or_event(integrator, state, end_of(ss))
        if self.problems.axis is None:  # then the loop has asked
            return s1, h, True
        go = integrator.unfinished(state, end_of(ss))
        return jnp.where(go, s1, state.s), jnp.where(go, h, 0), go

    def inside(self, own, s, y, h, step) -> list[PyTree]:
        """The d_p of dense output inside a step."""
        if isinstance(self.method, WithEvents):
            inner, own_inner = self.without_events(own)
            return inner.inside(own_inner, s, y, h, step.stages[0])
        if self.loops.forward:
            return self.stages.inside(own, s, y, h, step)
        one = lambda integrator, f, ss, *args: self.method.inside(self.field(f), *args)
        return self.problems.each(one)(own, s, y, h, step)

    def step(self, own, s, y, memory, h) -> Step:
        """A step, whatever comes of it."""
        if self.loops.forward:
            return self.stages.step(own, s, y, memory, h)
        one = lambda integrator, f, ss, *args: trial_step(integrator, self.field(f), *args)
        return self.problems.each(one)(own, s, y, memory, h)

    def again(self, own, s, y, memory, h):
        """y and the memory at the end of a step that is known to be accepted."""
        return self.step(own, s, y, memory, h)[:2]

    def without_events(self, own) -> tuple["Stepper", Any]:
        """The steps between events, of one solve as ever, of many as if there were no events; and what is the
        solves' own."""
        method = self.method.method

        def plain(x):
            integrator, f, ss = x
            return dataclasses.replace(integrator, method=method), f.field, ss

        many = self.problems.axis is not None and isinstance(method, Tableau)
        problems = self.problems._replace(shared=plain(self.problems.shared))
        return Stepper(problems, method, self.kernel, forms.Loops(many, many)), plain(own)

    # Backwards.

    def back(self, own, mask, carry: Cotangents, s, y, memory, h, gathered, inside: bool):
        """The vjp of a step with the rows inside it: the cotangents before it.

        `mask` says which leaves of the field are differentiated; `gathered(carry, inside)` is
        `outputs.gather`.
        """
        if self.loops.backward:
            return back_by_stages(self, own, mask, carry, s, y, memory, h, gathered, inside)

        field, folds = partial(self.field, mask=mask), carry.folded is not None
        step_of = partial(step_with_rows, field, folds, inside)
        if self.in_numbers:
            at = y, memory, s, h
            found = back_in_numbers(self, step_of, own, mask, at, carry, gathered, inside)
            if found is not None:
                return found
        fn = lambda problems, own, *args: problems.each(step_of)(own, *args)
        (_, _, d, _), vjp = pullback(self.problems, own, mask, fn, (y, memory), (s, h))
        straight, d_bar = None, []
        if inside:
            carry, straight, d_bar = gathered(carry, lambda: d)
        f_bar, y_bar, memory_bar = vjp((carry.y, carry.memory, d_bar, carry.folded))
        return at_the_start(carry, f_bar, y_bar, memory_bar, straight)


def step_with_rows(field, folds: bool, inside: bool, integrator, f, ss, y, memory, s, h):
    """What is differentiated of a step of one solve: its end, what rows inside it need, and what it adds to a
    fold."""
    f, method, added = field(f), integrator.method, None
    step = trial_step(integrator, f, s, y, memory, h)
    d = method.inside(f, s, y, h, step) if inside else []
    if folds:
        found = integrator.fold.of_step(method, s, y, memory, h, step)
        added = integrator.fold.add(integrator.fold.begin(found), found)
    return step.y, step.memory, d, added


def at_the_start(carry: Cotangents, f_bar, y_bar, memory_bar, straight) -> Cotangents:
    """The cotangents before a step, from those after it and what its vjp has found."""
    f_bar = jax.tree.map(jnp.add, carry.f, f_bar)
    return carry._replace(f=f_bar, y=added(y_bar, straight), memory=memory_bar)


def in_numbers_of(problem):
    """(integrator, field, ss) with the method as `Method.in_numbers` has it; and of the times the last one,
    which alone a step looks at."""
    integrator, f, ss = problem
    method = integrator.method.in_numbers()
    return dataclasses.replace(integrator, method=method), f, None if ss is None else ss[-1:]


def decided(integrator, state, s1, h, go, step: Step):
    """The state after a trial step of one solve, what it adds to a fold, its size, what `inside` needs."""
    new = integrator.accept_or_reject(state, step, s1, h, go)
    new, fold = watched(integrator, state, new, h, step, go), integrator.fold
    given = integrator.method, state.s, state.y, state.memory, h, step
    return new, None if fold is None else fold.of_step(*given), h, for_inside(step)


def trial_in_numbers(steps: Stepper, own, state) -> Callable | None:
    """`Stepper.trial` of lanes, the step of the method a kernel of numbers; None if these are not few."""
    integrator, _, ss = steps.problems.of(own)
    plain: list = []
    spare = integrator.fold is None and not integrator.output.rows(ss)
    shared, mine = map(in_numbers_of, (steps.problems.shared, own))

    def one(many, shared):
        own, at = many
        integrator, f, _ = eqx.combine(own, shared)
        step = trial_step(integrator, f, *at)
        step = step._replace(stages=None) if spare else step
        arrays, same = eqx.partition(step, eqx.is_array)
        plain[:] = [same]
        return arrays

    def decide(integrator, f, ss, state, s1, h, go, arrays):
        step = eqx.combine(arrays, plain[0])
        return decided(integrator, state, s1, h, go, step)

    s1, h, go = steps.problems.each(steps.move)(own, state)
    at = state.s, state.y, state.memory, h
    kernel = in_numbers(one, (mine, at), shared)
    if kernel is None:
        return None
    arrays = kernel((mine, at), shared)
    return lambda own, state: steps.problems.each(decide)(own, state, s1, h, go, arrays)


def back_in_numbers(steps: Stepper, step_of, own, mask, at, carry, gathered, inside: bool):
    """`Stepper.back` of lanes as kernels of numbers; None if these are not few."""
    shared, own = map(in_numbers_of, (steps.problems.shared, own))

    def rows(many, shared):
        own, at = many
        return step_of(*eqx.combine(own, shared), *at)[2]

    def pulled(many, shared):
        own, (y, memory, *when), bars = many
        integrator, f, ss = eqx.combine(own, shared)
        x, rest = eqx.partition(f, mask)
        of = lambda x, y, memory: step_of(integrator, eqx.combine(x, rest), ss, y, memory, *when)
        return jax.vjp(of, x, y, memory)[1](bars)

    d: Any = None
    straight, d_bar = None, []
    if inside:
        d = in_numbers(rows, (own, at), shared)
        if d is None:
            return None
        d_bar = jax.eval_shape(d, (own, at), shared)
    bars = lambda carry, d_bar: (carry.y, carry.memory, d_bar, carry.folded)
    pull = in_numbers(pulled, (own, at, bars(carry, d_bar)), shared)
    if pull is None:
        return None
    if inside:
        carry, straight, d_bar = gathered(carry, lambda: d((own, at), shared))
    f_bar, *others = pull((own, at, bars(carry, d_bar)), shared)
    # What is of a field that they share is summed.
    of_all = lambda bar, own: jnp.sum(bar, -1) if bar is not None and own is None else bar
    f_bar = jax.tree.map(of_all, f_bar, own[1], is_leaf=lambda x: x is None)
    return at_the_start(carry, f_bar, *others, straight)


def back_by_stages(steps: Stepper, own, mask, carry, s, y, memory, h, gathered, inside):
    """`Stepper.back`, stage by stage."""
    table, stages, ends = steps.method, steps.stages, (carry.y, carry.memory)
    total = len(table.c) + inside * len(table.extra_c)
    ks, seen = stages.seen(own, s, y, h, total, memory)
    straight, weights, d_bar = None, table.dense, []
    if inside:
        carry, straight, d_bar = gathered(carry, lambda: stages.sums(y, h, ks, weights))
    pull = stages.pull_of_slopes(own, mask)
    y_bar, memory_bar, f_bar = stages.back(pull, seen, s, h, carry.f, weights, d_bar, ends)
    return carry._replace(f=f_bar, y=added(y_bar, straight), memory=memory_bar)


def controlled(steps: Stepper, f):
    """The field of what is controlled of a state, as a step is to see it."""
    return steps.field(getattr(f, "of_state", f))


def expects_event(steps: Stepper, own, state):
    """Whether the next step of one solve ends at an event, or makes its change."""
    integrator, _, ss = steps.problems.of(own)
    return state.is_due | next_end_or_event(integrator, state, end_of(ss))[2]


def quiet_trial(steps: Stepper, own, state):
    """A trial step of one solve with events; if one happens, none, and that it does."""
    integrator, _, ss = steps.problems.of(own)
    s1, h, cut = next_end_or_event(integrator, state, end_of(ss))
    step = eventful.quiet_step(steps, own, state, h)
    happens = state.is_due | eventful.looked_at(steps, own, state, step, h, cut)[-1]
    new = integrator.accept_or_reject(state, step, s1, h, veto=happens)
    happens = happens & (new.accepted == state.accepted) & (new.h == state.h)
    new = watched(integrator, state, new, h, step)
    return steadied(steps, own, new, state.y), h, for_inside(step), happens


def folded(steps: Stepper, own, old, new, found):
    """The state after a trial step, with what that adds to a fold if it was accepted."""
    fold = steps.problems.of(own)[0].fold
    if fold is None:
        return new
    accepted = new.accepted > old.accepted
    put = partial(steps.problems.put, by_lane=steps.kernel == ONE_CALL)
    return new._replace(folded=fold.add_accepted(steps.problems, put, new.folded, found, accepted))


def steadied(steps: Stepper, own, state, before):
    """The state between two trial steps, the next of which is inside the stability region; `before` is y at
    the beginning of the last one.

    What a rejected step ended at has no part in it: it may be 1e50, and a direction as long as what is
    tolerated there is no small one.

    Whether any lane turns is asked outside of `vmap`, which would transpose all that a loop inside of it
    reads: that took a tenth of the time of 1,024 Lorenz systems, and the turns themselves a fortieth.
    """
    if state.probe is None:
        return state
    each, alone = steps.problems.each, steps.problems.axis is None
    due = each(stability.is_due)(own, state)

    def of_one(integrator, f, ss, state, due, probe, before):
        slope = steps.method.slope(f, state.s, state.y, state.memory)
        ys = before, state.y
        new = stability.turned(integrator, controlled(steps, f), state, slope, ys, probe)
        return new if alone else tree.where(due, new, probe)

    turn = lambda probe: each(of_one)(own, state, due, probe, before)
    probe = tree.at_most_once(due if alone else jnp.any(due), turn, state.probe)
    return each(stability.limited)(own, state._replace(probe=lax.stop_gradient(probe)))


def added(y_bar, straight):
    return y_bar if straight is None else jax.tree.map(jnp.add, y_bar, straight)


def stepper(problems: Problems, own, y0, kernel: str = PLAIN) -> Stepper:
    """The steps of these solves, in a form of `jaxode.kernels.forms`."""
    integrator, f, ss = problems.of(own)
    method = integrator.method
    if not isinstance(method, Tableau) or integrator.fold is not None:
        loops = forms.Loops(False, False)
    elif problems.axis is not None:
        loops = forms.Loops(True, True)
    else:
        loops = forms.which(f, y0, jnp.zeros((), ss.dtype), kernel)
    return Stepper(problems, method, kernel, loops)
