"""Replay: backwards over the recorded steps, with their sizes held fixed.

The parts of a solve are operations with rules of their own (`jaxode.batch.vmap_rules`): the solve, the
solve with its tape, and the backward pass. Each has a form for one solve and one for many.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxode import tree
from jaxode.adjoints import replay_in_lanes, sensitivities
from jaxode.adjoints.ends import from_the_end, of_the_field, to_the_start
from jaxode.adjoints.inputs import flags_of, is_asked, join, only, present
from jaxode.adjoints.second_order import Passes, twice_differentiable
from jaxode.batch import lanes
from jaxode.batch.plans import alone
from jaxode.batch.vmap_rules import Form, Part, axes_of
from jaxode.kernels.forms import PLAIN
from jaxode.kernels.stepper import stepper
from jaxode.outputs import gather, with_carried
from jaxode.stepping import checkpoints, loop
from jaxode.stepping.integrator import Report, unseen
from jaxode.stepping.loop import Recorded
from jaxode.stepping.problems import one
from jaxode.stepping.stability import differentiated


def replay(integrator, f, y0, ss):
    """Discrete adjoint of the steps that were accepted, with their sizes held fixed.

    With sizes held fixed a derivative is the product of those of the steps, and explodes if steps are longer
    than an explicit method is stable for, while the values stay right. So the steps of a solve that is
    differentiated are kept inside its stability region (`jaxode.stepping.stability`), at the price of
    an evaluation in every fourth step; where accuracy keeps them shorter, as it mostly does, they are those of
    the plain solve.

    The forward pass records where each step began and the states at about sqrt(max_steps) places;
    the backward pass rebuilds the states between two of them and takes the vjp of one step after
    another (Zhuang et al. 2020, arXiv 2006.02493). Rejected steps are never entered again. Costs
    one evaluation and one vjp of f a stage, and another evaluation where states are rebuilt. Under
    `jax.vmap` both passes are loops over lanes (`jaxode.batch.lanes`), and nothing is recorded.

    In few numbers the same derivatives are carried along instead (`jaxode.adjoints.sensitivities`).
    """
    return solve_part(integrator, f, y0, ss)


# One solve.


def record(x, rest, kernel=PLAIN):
    """The solve with its tape."""
    integrator, given = join(x, rest)
    return loop.record(integrator, *given, kernel=kernel)


def along_the_tape(steps, own, mask, y0, recorded: Recorded, gathered, inside: bool, carry):
    """The cotangents before the first step, and whether all went well (None: it did)."""
    tape = recorded.tape

    def back(carry, n, y, memory):
        s, s1 = tree.row(tape.grid, n), tree.row(tape.grid, n + 1)
        h = s1 - s
        of_rows = lambda carry, d: gathered(carry, s, h, y, d)
        return steps.back(own, mask, carry, s, y, memory, h, of_rows, inside)

    again = lambda *args: steps.again(own, *args)
    return checkpoints.backwards(own[0].max_steps, tape, again, back, carry), None


def pull(x, rest, recorded: Recorded, bars, kernel=PLAIN, way_back=along_the_tape):
    """The vjp of the recorded steps, last to first: cotangents of (f, y0, ss)."""
    integrator, (f, y0, ss) = join(x, rest)
    problems, own = one(integrator, f, ss)
    steps, mask = stepper(problems, own, y0, kernel), present(x[0])
    inside, asked = integrator.output.rows(ss) > 0, is_asked(bars)
    carry, rows_bar, starts = from_the_end(x, rest, recorded, bars)
    carry = carry._replace(f=of_the_field(problems, own, mask, y0, recorded, bars))
    pick = lambda row, rows_bar: tree.row(rows_bar, row)

    def gathered(carry, s, h, y, inside):
        return gather(problems, own, mask, carry, rows_bar, s, h, y, inside, pick)

    tape = recorded.tape._replace(steps=jnp.where(asked, recorded.tape.steps, 0))
    recorded = recorded._replace(tape=tape)
    carry, fine = way_back(steps, own, mask, y0, recorded, gathered, inside, carry)
    found = to_the_start(steps, own, mask, y0, carry, starts)
    if fine is not None:
        found = jax.tree.map(lambda x: tree.or_nan(fine, x), found)
    found = jax.tree.map(lambda x: jnp.where(asked, x, 0), found)
    return found[0], only(x[1], found[1]), found[2]


# One solve or many, on each platform.


def run_solve(form: Form, integrator, f, y0, ss):
    """The solve."""
    if form.size is not None:
        return lanes.solve(form, integrator, f, y0, ss)[:2]
    return alone(form, loop.solve, (f, y0, ss))(integrator, f, y0, ss)


def run_record(form: Form, x, rest):
    """The solve, and what its backward pass needs."""
    if form.size is not None:
        return replay_in_lanes.record(form, x, rest)
    return alone(form, record, join(x, rest)[1])(x, rest)


def run_pull(form: Form, x, rest, recorded, bars):
    """The backward pass."""
    if form.size is not None and form.flags[2].tape.steps:
        return replay_in_lanes.pull(form, x, rest, recorded, bars)
    if form.size is not None:  # many cotangents of one solve, whose tape is there
        x, rest = (jax.tree.map(lambda x, flag: x[0] if flag else x, *of)
                   for of in ((x, form.flags[0]), (rest, form.flags[1])))  # fmt: skip
        return jax.vmap(partial(pull, x, rest), axes_of(form.flags[2:]))(recorded, bars)
    return alone(form, pull, join(x, rest)[1])(x, rest, recorded, bars)


def like_solve(integrator, f, y0, ss):
    """Zeros like what a solve returns, found without tracing it; and the effects of the field."""
    method, count = integrator.method, jnp.zeros((), jnp.int32)

    def returned(integrator, f, y0, ss):
        rows = integrator.output.like(integrator, f, y0, ss)
        return with_carried(method, rows, method.start(f, ss[0], y0) if method.carries else None)

    like = jax.eval_shape(returned, integrator, f, y0, ss)
    ys = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    folded = happened = None
    if integrator.fold is not None:
        state = jax.eval_shape(lambda *args: loop.begin(*args)[2], integrator, f, y0, ss)
        folded = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state.folded)
        happened = None if state.watch is None else count
    report = Report(count, jnp.zeros((), ss.dtype), count, count, count, folded, happened)
    error = None if integrator.budget is None else jnp.zeros((), ss.dtype)
    report = report._replace(seen=unseen(integrator, ss.dtype), error=error)
    return (ys, report), f.trace.jaxpr.effects


def like_record(x, rest):
    integrator, (f, y0, ss) = join(x, rest)
    (ys, report), effects = like_solve(integrator, f, y0, ss)
    of = lambda f, y, s: integrator.method.start(f, s, y)
    memory = jax.eval_shape(of, f, y0, ss[0])
    memory = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), memory)
    tape = checkpoints.empty(integrator.max_steps, (y0, memory), ss.dtype)
    return (ys, report, Recorded(tape, y0, y0, memory, report)), effects


def like_pull(x, rest, recorded, bars):
    return jax.tree.map(jnp.zeros_like, x), rest[1][0].trace.jaxpr.effects


def own_of_record(flags, out):
    """Of many solves the tape is left empty, but for how many steps each took: they are solved again."""
    own = jax.tree.map(lambda _: True, out)
    ys, report, recorded = own
    tape = jax.tree.map(lambda _: False, recorded.tape)._replace(steps=True)
    return ys, report, recorded._replace(tape=tape)


def spread_pull(flags):
    """A `vmap` outside of the derivative: everyone's cotangents are its own."""
    x, rest, recorded, bars = flags
    every = lambda tree_: jax.tree.map(lambda _: True, tree_)
    return every(x), rest, recorded, every(bars)


def able_to_pull(size, flags) -> bool:
    """Not a batch of sums: but one of many cotangents of one solve."""
    return size is None or not flags[2].tape.steps


solve_part = Part("solve", run_solve, like_solve, derivative=lambda form: differentiable(form))
record_part = Part("record", run_record, like_record, own=own_of_record)
pull_part = Part(
    "pull",
    run_pull,
    like_pull,
    backward=True,
    own=lambda flags, out: flags[0],
    spread=spread_pull,
    able=able_to_pull,
)


def differentiable(form: Form):
    """The solve as a function that JAX can differentiate."""
    size, plain = form.size, form
    form = form._replace(flags=(differentiated(form.flags[0]), *form.flags[1:]))
    every = lambda tree_: jax.tree.map(lambda _: size is not None, tree_)
    solve_many = partial(solve_part.of_many, size)

    def flags_of_pull(x, recorded, bars):
        of_recorded = every(recorded)
        if size is not None:
            of_recorded = own_of_record(None, (None, None, recorded))[2]
        return *flags_of(x, form.flags), of_recorded, every(bars)

    def record_all(x, rest):
        flags = flags_of(x, form.flags)
        if sensitivities.suit(size, x, rest, flags):
            return sensitivities.record(solve_many, x, rest, flags)
        return record_part.of_many(size, flags, x, rest)

    def pull_all(x, rest, residuals, bars):
        if not isinstance(residuals, Recorded):
            found = sensitivities.pull(
                size, x[:2], residuals, bars[0], flags_of(x, form.flags)[0][:2]
            )
            return *found, None
        flags = flags_of_pull(x, residuals, bars)
        return pull_part.of_many(size, flags, x, rest, residuals, bars)

    def plain_record(x, rest):
        return run_record(form._replace(flags=flags_of(x, form.flags)), x, rest)

    def plain_pull(x, rest, recorded, bars):
        given = x, rest, recorded, bars
        return run_pull(form._replace(flags=flags_of_pull(x, recorded, bars)), *given)

    solves = partial(solve_many, plain.flags), partial(run_solve, form)
    return twice_differentiable(
        Passes(solves[0], record_all, pull_all, solves[1], plain_record, plain_pull)
    )
