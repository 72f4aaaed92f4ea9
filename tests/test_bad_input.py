"""The table of bad input in six settings: `odeint`, `solve`, under `jit`, one among many under `vmap`, in the
gradient, in training. Never a plausible number: an error that says what to do, a status with NaN, or the right
values; and nothing of it reaches the solves beside it."""

import functools
import pickle
import traceback
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bad_input_cases import (
    AT_RUN_TIME,
    AT_THE_DOOR,
    OF_DECISIONS,
    STEPS,
    UNUSUAL,
    Given,
    field,
    times_w,
)

from jaxode import Event, Signal, SolveError, Status, odeint, solve, train
from jaxode.adjoints.names import adjoints
from jaxode.batch.vmap_rules import NO_JVP

MANY, MAX_STEPS = 1000, 300
NAMES = list(AT_RUN_TIME)
FAILING = [name for name in NAMES if Status.SUCCESS not in AT_RUN_TIME[name].ends]


def call(given: Given, w=1.0, fn=solve, **options):
    limits = dict(rtol=given.rtol, atol=given.atol, hmax=given.hmax, mxstep=given.mxstep)
    return fn(field, given.y0, given.t, w, given.p, max_steps=MAX_STEPS, **limits, **options)


def right(case, solution):
    """Whether rows that a solve returned are what they must be."""
    given, status = case.given.arrays(), Status(int(solution.status))
    assert status in case.ends, status
    if status != Status.SUCCESS:
        none = status in (Status.NON_FINITE_INITIAL, Status.BAD_INPUT)
        lost = none | ~(np.abs(given.t - given.t[0]) <= np.abs(solution.reached - given.t[0]))
        assert lost[-1] and np.all(np.isnan(solution.ys[lost])), solution
        assert np.all(np.isfinite(solution.ys[~lost]))
    elif case.exact is None:
        assert np.all(np.isfinite(solution.ys))
    else:
        np.testing.assert_allclose(solution.ys, case.exact(given.y0, given.t, 1.0), rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_known_is_an_error_with_the_remedy_or_right(name):
    case = AT_RUN_TIME[name]
    given = case.given.arrays()
    if case.door is not None and case.door[0] is ValueError:
        for fn in (odeint, solve):
            with pytest.raises(ValueError, match=case.door[1]):
                call(given, fn=fn)
        with pytest.raises(ValueError, match=case.door[1]):  # a constant of a program is known
            jax.jit(lambda w: call(given, w))(1.0)
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        solution = call(given, throw=False)
    assert [case.door[1] in str(w.message) for w in said] == ([True] if case.door else [])
    right(case, solution)
    status = Status(int(solution.status))
    if status == Status.SUCCESS:
        return
    with warnings.catch_warnings(), pytest.raises(SolveError) as caught:
        warnings.simplefilter("ignore")
        call(given, fn=odeint)
    assert status.message in str(caught.value) and case.words in str(caught.value)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(caught.value)).solution.ys, solution.ys)


traced = jax.jit(call)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_traced_is_a_status_with_nan_or_right(name):
    case = AT_RUN_TIME[name]
    right(case, traced(case.given.arrays()))


# One among many.


def healthy() -> Given:
    """A thousand different solves without a fault."""
    draw = np.random.default_rng(0).uniform
    given = jax.tree.map(lambda x: np.broadcast_to(x, (MANY, *np.shape(x))), Given().arrays())
    p = given.p._replace(decay=draw(0.5, 2.0, MANY))
    return given._replace(y0=draw(0.5, 1.5, (MANY, 2)), p=p)


def with_rows(many: Given, places: dict) -> Given:
    """The batch with these rows of the table at these places."""
    many = jax.tree.map(np.array, many)
    for name, place in places.items():
        rows = zip(jax.tree.leaves(many), jax.tree.leaves(AT_RUN_TIME[name].given.arrays()))
        for x, new in rows:
            x[place] = new
    return many


@jax.jit
@jax.vmap
def gradients(given: Given):
    """Of one solve: it, and the derivatives of its sum with respect to y0, t and w."""

    def loss(y0, t, w):
        solution = call(given._replace(y0=y0, t=t), w)
        return jnp.sum(solution.ys), (solution.ys, solution.status, solution.reached)

    return jax.grad(loss, (0, 1, 2), has_aux=True)(given.y0, given.t, 1.0)


@functools.cache
def batch(*names):
    """The derivatives and solutions of a batch with these rows of the table, and the places of the rows."""
    places = {name: 7 + 20 * i for i, name in enumerate(names)}
    return gradients(with_rows(healthy(), places)), places


def test_bad_solves_leave_the_others_of_a_batch_as_they_are_bit_for_bit():
    (alone, _), (together, places) = batch(), batch(*NAMES)
    others = np.delete(np.arange(MANY), list(places.values()))
    for x, y in zip(jax.tree.leaves(alone), jax.tree.leaves(together)):
        np.testing.assert_array_equal(x[others], y[others])
    for name in ("a pole", "NaN at the start", "more steps than mxstep"):  # one among 999
        one, places = batch(name)
        others = np.arange(MANY) != places[name]
        for x, y in zip(jax.tree.leaves(alone), jax.tree.leaves(one)):
            np.testing.assert_array_equal(x[others], y[others])


@pytest.mark.parametrize("name", NAMES)
def test_among_many_a_row_is_what_it_is_alone_and_has_the_right_derivatives_or_nan(name):
    case, ((derivatives, found), places) = AT_RUN_TIME[name], batch(*NAMES)
    ys, status, reached = (x[places[name]] for x in found)
    alone = traced(case.given.arrays())
    right(case, alone._replace(ys=ys, status=status, reached=reached))
    assert status == alone.status
    derivatives = [x[places[name]] for x in derivatives]
    if status != Status.SUCCESS:
        assert all(np.all(np.isnan(x)) for x in derivatives)
    elif case.exact is not None:
        given = case.given.arrays()
        of = lambda *x: jnp.sum(case.exact(*x))
        expected = jax.grad(of, (0, 1, 2))(given.y0, given.t, 1.0)
        # A jump of func in time is no event: derivatives with respect to t take it to be where it is.
        asked = (0, 2) if given.p.jump else (0, 1, 2)
        for i in asked:
            np.testing.assert_allclose(derivatives[i], expected[i], rtol=1e-3, atol=1e-4)


def test_training_goes_on_as_if_the_solves_that_fail_were_not_in_the_batch():
    def loss(w, batch, key):
        given, counts = batch
        solutions = jax.vmap(call, (0, None))(given, w)
        fine = (solutions.status == 0) & counts
        ys = jnp.where(fine[:, None, None], solutions.ys, 0.0)
        decayed = jnp.exp(-2.0 * given.p.decay[:, None] * given.t)
        exact = given.y0[:, None] * decayed[..., None]
        off = jnp.where(fine[:, None, None], ys - exact, 0.0)
        count = jnp.sum(fine.astype(float))
        return jnp.sum(off**2) / count, {"solved": count}

    some = jax.tree.map(lambda x: x[:16], healthy())
    optimiser = optax.sgd(0.7)
    step = train.train_step(loss, optimiser)

    def fit(batches):
        state = train.start(jnp.array(1.0), optimiser, jax.random.key(0))
        return train.fit(loss, optimiser, state, batches, len(FAILING), step=step, progress=False)

    bad = lambda n: (with_rows(some, {FAILING[n]: n % 16}), np.ones(16, bool))
    state, history = fit(bad)
    expected, _ = fit(lambda n: (some, np.arange(16) != n % 16))
    assert all(record["solved"] == 15 for record in history)
    np.testing.assert_allclose(state.model, expected.model, rtol=1e-12)
    assert abs(float(state.model) - 2.0) < 0.1  # and learns: the data decay at twice the rate


# Unusual, and right.


def solved(case, w, fn=solve):
    options = {"rtol": 1e-4, "atol": 1e-5, **case.options}
    if case.dtype in (jnp.float16, jnp.bfloat16):
        options = dict(rtol=4e-2, atol=1e-2)
    return fn(times_w, case.y0, case.t, jnp.asarray(w), method="bosh3", max_steps=100, **options)


def near(ys, case):
    t = np.array(case.t, float)
    for y, y0 in zip(jax.tree.leaves(ys), jax.tree.leaves(case.y0), strict=True):
        assert y.dtype == case.dtype and y.shape == (len(t), *np.shape(y0))
        exact = np.multiply.outer(np.exp(t[:1].sum() - t), np.asarray(y0, case.dtype))
        tolerance = 0.05 if y.dtype.itemsize == 2 else 1e-3
        np.testing.assert_allclose(y.astype(exact.dtype), exact, atol=tolerance)


def test_what_is_unusual_is_right_when_called_as_it_is_and_under_jit():
    for case in UNUSUAL.values():
        near(solved(case, 1.0).ys, case)
        near(solved(case, 1.0, odeint), case)
    together = jax.jit(lambda w: {name: solved(case, w).ys for name, case in UNUSUAL.items()})(1.0)
    for name, case in UNUSUAL.items():
        near(together[name], case)


def test_what_is_unusual_is_right_beside_a_bad_one_in_a_batch_and_in_training():
    def loss(solution):
        left = lambda y: jnp.sum(jnp.where(solution.status == 0, y, 0).real).astype(float)
        return sum(map(left, jax.tree.leaves(solution.ys)))

    def total(w):
        every = {name: solved(case, w) for name, case in UNUSUAL.items()}
        return sum(map(loss, every.values())), every

    training = jax.jit(jax.vmap(jax.grad(total, has_aux=True)))
    alone = training(jnp.array([1.0, 0.5, 2.0, 1.5]))
    bars, every = training(jnp.array([1.0, np.nan, 2.0, 1.5]))
    others = np.array([0, 2, 3])
    for x, y in zip(jax.tree.leaves(alone), jax.tree.leaves((bars, every))):
        np.testing.assert_array_equal(x[others], y[others])
    assert bars[1] == 0 and np.all(np.isfinite(bars))
    for name, case in UNUSUAL.items():
        first = jax.tree.map(lambda x: x[0], every[name].ys)
        near(first, case)
        second = jax.tree.leaves(jax.tree.map(lambda x: x[1], every[name].ys))
        assert all(np.all(np.isnan(y)) for y in second)


# Steps of equal size.


def test_a_step_that_is_none_is_refused_or_bad_input():
    run = lambda dt, y0=1.0: solve(lambda y, t: -y, y0, [0.0, 1.0, 2.0], method="rk4", dt=dt)
    for dt, status in STEPS.items():
        if status == Status.SUCCESS:
            continue
        with pytest.raises(ValueError, match="`dt`"):
            run(dt)
        with pytest.raises(ValueError, match="`dt`"):
            jax.jit(lambda y0, dt=dt: run(dt, y0))(1.0)
    dts, statuses = np.array(list(STEPS)), np.array(list(STEPS.values()))
    one = lambda dt, y0: (lambda s: (s.ys[-1], s))(run(dt, y0))
    grads, many = jax.jit(jax.vmap(jax.grad(one, 1, has_aux=True), (0, None)))(dts, 1.0)
    fine = statuses == Status.SUCCESS
    np.testing.assert_array_equal(many.status, statuses)
    assert np.all(np.isnan(many.ys[~fine, -1])) and np.all(np.isnan(grads[~fine]))
    np.testing.assert_allclose(many.ys[-2], np.exp([0, -1, -2]), rtol=1e-5)
    np.testing.assert_allclose(grads[-2], np.exp(-2), rtol=1e-5)


# At the door.


def settings(case):
    """The call in every setting: y0 is traced in most of them."""
    func, y0, t, args, options = case[2:]

    def solved(w=None, fn=solve):
        numbers = jax.tree.leaves(y0)
        moves = w is not None and all(isinstance(x, float | np.ndarray) for x in numbers)
        start = jax.tree.map(lambda y: y * w, y0) if moves else y0
        return fn(func, start, t, *args, **options)

    def total(w):
        solution = solved(w)
        ys = jax.tree.map(lambda y: jnp.where(solution.status == 0, y, 0), solution.ys)
        return sum(jnp.sum(y.real) for y in jax.tree.leaves(ys))

    return {
        "odeint": lambda: solved(fn=solve if "fold" in options else odeint),  # odeint has no fold
        "solve": solved,
        "jit": lambda: jax.jit(solved)(1.0),
        "vmap": lambda: jax.vmap(solved)(jnp.ones(3)),
        "gradient": lambda: jax.grad(total)(1.0),
        "training": lambda: jax.jit(jax.grad(lambda w: jax.vmap(total)(w).sum()))(jnp.ones(3)),
    }


@pytest.mark.parametrize("name", AT_THE_DOOR)
def test_what_no_value_makes_right_is_refused_in_every_setting(name):
    case = AT_THE_DOOR[name]
    for setting, run in settings(case).items():
        try:
            run()
        except case.error as error:
            with pytest.raises(case.error, match=case.words):
                raise error
        else:
            pytest.fail(f"{setting}: no error")


@pytest.mark.parametrize("name", ["if t", "if y", "NumPy"])
def test_an_error_in_a_function_of_the_user_says_where_it_is(name):
    case = OF_DECISIONS[name]
    with pytest.raises(case.error) as caught:
        solve(case.func, case.y0, case.t)
    cause = caught.value.__cause__
    assert type(cause).__module__.startswith("jax") and "racer" in str(cause)
    frames = traceback.extract_tb(cause.__traceback__)
    assert any(frame.filename == case.func.__code__.co_filename for frame in frames)


def test_names_that_may_be_right_are_no_error():
    """A time may come first under another name, and a state may be called t."""
    exact = np.exp(-1)
    for func in (
        lambda y, t: -y,
        lambda t, s: -t,
        lambda x, time: -x,
        lambda *given: -given[0],
        lambda y, s, t=1.0: -y,
    ):
        np.testing.assert_allclose(odeint(func, 1.0, [0.0, 1.0])[-1], exact, rtol=1e-6)


# Forward mode, of an adjoint that has none.


def pulse(y, t, u):
    return u(t) - y


FORWARD = {
    "jvp": lambda f: jax.jvp(f, (1.0,), (1.0,)),
    "jit of jvp": lambda f: jax.jit(lambda y: jax.jvp(f, (y,), (y,)))(1.0),
    "jvp of jit": lambda f: jax.jvp(jax.jit(f), (1.0,), (1.0,)),
    "linearize": lambda f: jax.linearize(f, 1.0)[1](1.0),
    "jacfwd": lambda f: jax.jacfwd(f)(1.0),
    "jvp of vmap": lambda f: jax.jvp(jax.vmap(f), (jnp.ones(3),), (jnp.ones(3),)),
    "scan": lambda f: jax.jvp(
        lambda y: jax.lax.scan(lambda y, _: (f(y), None), y, None, 2)[0], (1.0,), (1.0,)
    ),
    "jvp of checkpoint": lambda f: jax.jvp(jax.checkpoint(f), (1.0,), (1.0,)),
    "jvp of jvp": lambda f: jax.jvp(lambda y: jax.jvp(f, (y,), (1.0,))[1], (1.0,), (1.0,)),
}


def test_the_error_of_forward_mode_names_all_adjoints_that_have_it_and_no_others():
    for name, adjoint in adjoints.items():
        assert (f"adjoint='{name}'" in NO_JVP) == adjoint.forward


@pytest.mark.parametrize("transform", FORWARD)
def test_forward_mode_names_the_adjoints_that_have_it(transform):
    end = lambda y: odeint(lambda y, t: -y, y, [0.0, 1.0], method="euler", dt=0.5)[-1]
    with pytest.raises(TypeError, match="adjoint='direct' or adjoint='forward'"):
        FORWARD[transform](end)


KNOTS = Signal([0.0, 1.0, 2.0], [0.0, 1.0, 0.0])


@pytest.mark.parametrize("adjoint", ["replay", "backsolve"])
def test_forward_mode_through_a_signal_and_back_in_time_names_them_too(adjoint):
    end = lambda y: odeint(pulse, y, [0.0, 2.0], KNOTS, adjoint=adjoint)[-1]
    with pytest.raises(TypeError, match="adjoint='direct' or adjoint='forward'"):
        jax.jvp(end, (1.0,), (1.0,))


BACKWARD = {
    "grad": jax.grad,
    "jacrev": jax.jacrev,
    "jit": lambda f: jax.jit(jax.grad(f)),
    "vmap": lambda f: lambda y: jax.vmap(jax.grad(f))(jnp.stack([y, y])),
    "over forward": lambda f: jax.grad(lambda y: jax.jvp(f, (y,), (1.0,))[1]),
}


@pytest.mark.parametrize("transform", BACKWARD)
def test_reverse_mode_of_forward_names_the_adjoints_that_have_it(transform):
    options = dict(adjoint="forward")
    end = lambda y: odeint(lambda y, t: -(y**2), y, [0.0, 1.0], **options)[-1]
    driven = lambda y: odeint(lambda y, t, u: u(t) - y**2, y, [0.0, 2.0], KNOTS, **options)[-1]
    for function in (end, driven):
        with pytest.raises(TypeError, match="leave `adjoint` out") as info:
            BACKWARD[transform](function)(1.0)
        others = {name for name, adjoint in adjoints.items() if adjoint.reverse}
        assert others == {name for name in adjoints if f" '{name}'" in str(info.value)}


# A pulse that is shorter than the first step.


def test_a_pulse_that_a_step_goes_over_is_caught_by_hmax_a_signal_or_an_event():
    def func(y, t):
        return jnp.where((t >= 5) & (t < 5.1), 1.0, 0.0) * jnp.ones_like(y)

    signal = Signal([0.0, 5.0, 5.1], [0.0, 1.0, 0.0], "previous")
    t = [0.0, 10.0]
    missed = solve(func, 0.0, t)
    assert int(missed.status) == Status.SUCCESS and missed.ys[-1] == 0  # as `hmax` says
    for ys in (
        odeint(func, 0.0, t, hmax=0.1),
        odeint(lambda y, t: signal(t) + 0 * y, 0.0, t),
        odeint(func, 0.0, t, events=[Event(times=[5.0, 5.1])]),
    ):
        np.testing.assert_allclose(ys[-1], 0.1, rtol=1e-5)
