"""At the door: arguments that would give plausible numbers are refused, with the word to use instead."""

import copy
import functools
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxode
from jaxode import Controller, Event, Solution, SolveError, Status, odeint, pid, solve, words
from jaxode.nn import NeuralODE

decay = lambda y, t: -0.1 * y
EPOCH = 1.7e9  # seconds; float32 has steps of 128 there


# Times.


FORMS = list, tuple, np.array, lambda t: [int(x) for x in t], lambda t: np.array(t, np.int64)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("gap", [10.0, 3600.0])
def test_large_times_that_float32_cannot_tell_apart_are_subtracted_in_float64(gap, x64):
    close = functools.partial(np.testing.assert_allclose, rtol=3e-6)
    falls = lambda y, _, rate: -rate * y
    with jax.enable_x64(x64):
        y0, rate = jnp.array(1.0, jnp.float32), jnp.array(1 / gap, jnp.float32)
        for form in FORMS:
            t = form([EPOCH, EPOCH + gap, EPOCH + 2 * gap])
            close(odeint(falls, y0, t, rate), np.exp([0, -1, -2]))
            close(odeint(falls, y0, t[::-1], rate), np.exp([0, 1, 2]))
        fixed = odeint(falls, y0, t, rate, method="rk4", dt=gap / 50)
        close(fixed, np.exp([0, -1, -2]))
        end = lambda y0: odeint(falls, y0, t, rate)[-1]
        close(jax.jit(jax.value_and_grad(end))(y0), (np.exp(-2), np.exp(-2)))
        close(jax.vmap(end)(jnp.stack([y0, 2 * y0])), np.exp(-2) * np.array([1, 2]))


def test_equal_times_remain_equal_and_a_layer_takes_large_times_too():
    t = [EPOCH, EPOCH + 10, EPOCH + 10, EPOCH + 20]
    ys = odeint(decay, jnp.array(1.0, jnp.float32), t)
    np.testing.assert_allclose(ys, np.exp([0, -1, -1, -2]), rtol=3e-6)
    layer = NeuralODE(decay, t0=EPOCH, t1=EPOCH + 10)
    np.testing.assert_allclose(layer(jnp.array(1.0, jnp.float32)), np.exp(-1), rtol=3e-6)


def test_a_func_that_uses_large_times_is_told_how_to_have_them():
    t = [EPOCH, EPOCH + 10, EPOCH + 20]
    timed = lambda y, t: -0.1 * y * (1 + jnp.sin(t - EPOCH)).astype(y.dtype)
    with pytest.raises(ValueError, match="begin near 0"):
        odeint(timed, jnp.array(1.0, jnp.float32), t)
    exact = lambda s: np.exp(-0.1 * (s + 1 - np.cos(s)))
    ys = odeint(timed, jnp.array(1.0, jnp.float32), np.array(t), rtol=1e-6)  # float64, as it says
    np.testing.assert_allclose(ys, exact(np.array(t) - EPOCH), rtol=1e-5)
    shifted = lambda y, s: -0.1 * y * (1 + jnp.sin(s)).astype(y.dtype)
    ys = odeint(shifted, jnp.array(1.0, jnp.float32), np.array(t) - EPOCH)
    np.testing.assert_allclose(ys, exact(np.array(t) - EPOCH), rtol=1e-5)
    with jax.enable_x64(False), pytest.raises(ValueError, match="jax_enable_x64"):
        odeint(timed, jnp.array(1.0), np.array(t))


LOOKS_AT_TIME = {
    "save": dict(save=lambda y, t: t - EPOCH),
    "a fold": dict(fold=(jnp.float32(0), lambda value, y, t: t - EPOCH)),
    "a condition": dict(events=[Event(lambda y, t: t - EPOCH - 5)]),
    "a change": dict(events=[Event(lambda y, t: y - 0.5, change=lambda y, t: y * (t - EPOCH))]),
    "known times": dict(events=[Event(times=[EPOCH + 5], change=lambda y, t: y + 1)]),
}


@pytest.mark.parametrize("what", LOOKS_AT_TIME)
def test_what_else_uses_large_times_is_told_the_same(what):
    t, y0 = [EPOCH, EPOCH + 10, EPOCH + 20], jnp.array(1.0, jnp.float32)
    with pytest.raises(ValueError, match="begin near 0"):
        solve(decay, y0, t, **LOOKS_AT_TIME[what])


@pytest.mark.parametrize("option", ["dense", "resumable"])
@pytest.mark.parametrize("t", [[EPOCH, EPOCH + 10], [100.1, 100.7]])
def test_what_goes_by_the_times_of_a_solve_needs_their_digits(option, t):
    y0, given = jnp.array(1.0, jnp.float32), {option: True}
    with pytest.raises(
        ValueError, match=f"`{option}` .* too few digits of how far .* begin near 0"
    ):
        solve(decay, y0, t, **given)
    length = t[1] - t[0]
    np.testing.assert_allclose(
        solve(decay, y0, [0.0, length], **given).ys[-1], np.exp(-0.1 * length), rtol=3e-6
    )


def test_events_of_the_state_alone_take_large_times():
    jump = Event(lambda y, t: y - 0.5, change=lambda y, t: y + 1)
    ys = odeint(decay, jnp.array(1.0, jnp.float32), [EPOCH, EPOCH + 10], events=[jump])
    np.testing.assert_allclose(ys[-1], 1.5 * 2 * np.exp(-1), rtol=1e-5)


def test_times_that_are_as_good_as_float32_are_not_refused():
    timed = lambda y, t: jnp.cos(t).astype(y.dtype)
    y0 = jnp.array(0.0, jnp.float32)
    for t in (np.linspace(0, 1, 10_001), np.linspace(100, 101, 101), [-1e3, 0.0, 1e3 + 1e-3]):
        with jax.enable_x64(False):
            assert np.all(np.isfinite(odeint(timed, y0, t, max_steps=100_000)))
    given = np.float32([EPOCH, EPOCH + 128, EPOCH + 256])  # float32 by choice: these are its times
    ys = odeint(lambda y, t: -y / 128, jnp.array(1.0, jnp.float32), given)
    np.testing.assert_allclose(ys, np.exp([0, -1, -2]), rtol=3e-6)


# Steps of equal size. What is a constant, and what is one of a batch, is in the table of bad input.


def first_row(y0, dt):
    """The first row of a solve, and the solution."""
    solution = solve(decay, y0, [0.0, 1.0, 2.0], method="rk4", dt=dt)
    return solution.ys[0], solution


slope_of_first_row = jax.jit(jax.grad(first_row, has_aux=True))


@pytest.mark.parametrize("dt", [np.inf, np.nan, 0.0, -0.1, -np.inf, 1e-12, 1e-300])
def test_a_traced_step_that_is_none_is_a_status_and_has_no_gradient(dt):
    slope, solution = slope_of_first_row(1.0, dt)
    expected = Status.MAX_STEPS if 0 < dt < 1 else Status.BAD_INPUT
    assert Status(int(solution.status)) == expected and np.all(np.isnan(solution.ys[1:]))
    assert np.isnan(slope)


def test_a_traced_step_takes_as_many_steps_as_one_that_is_known(dtype):
    y0 = jnp.array(1.0, dtype)
    known = lambda dt: solve(decay, y0, [0.0, 1.0], method="euler", dt=dt).stats.accepted
    traced = jax.jit(known)
    assert list(map(int, map(traced, (0.1, 0.3, 5.0, 0.001)))) == [10, 4, 1, 1000]
    assert list(map(int, map(known, (0.1, 0.001)))) == [10, 1000]


# Words.


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(dt=[0.1], method="rk4"), TypeError, "`dt` must be a number"),
        (dict(dt=1j, method="rk4"), TypeError, "`dt` must be a number"),
        (dict(hmax="large"), TypeError, "`hmax` must be a number"),
        (dict(mxstep=np.ones(2)), TypeError, "`mxstep` must be a number"),
        (dict(rtol=1j), TypeError, "`rtol` must hold real numbers"),
        (dict(args=(1.0,)), TypeError, r"`args=`: pass them after t: solve\(func, y0, t, \*args\)"),
        (dict(max_step=0.1), TypeError, "`hmax`"),
        (dict(first_step=0.1), TypeError, "`hmax`"),
        (dict(dt0=0.1), TypeError, "`dt`"),
        (dict(events=print), TypeError, "events"),
        (dict(Dfun=print), TypeError, "Jacobian"),
        (dict(dense_output=True), TypeError, "`t`"),
        (dict(t_eval=[1.0]), TypeError, "third argument, `t`"),
        (dict(t_span=(0, 1)), TypeError, "third argument, `t`"),
        (dict(saveat=1), TypeError, "third argument, `t`"),
        (dict(stepsize_controller=1), TypeError, "`controller=jaxode.pid"),
        (dict(solver="tsit5"), TypeError, "`method`"),
        (dict(tcrit=[0.5]), TypeError, "jaxode.Signal"),
        (dict(d_discontinuities=[0.5]), TypeError, "jaxode.Signal"),
        (dict(isoutofdomain=print), TypeError, "NaN outside"),
        (dict(beta=0.3, gamma=0.1), TypeError, "parameters of func after t"),
        (dict(solver_state=1), TypeError, "`resumable=True`"),
        (dict(rtoll=1.0), TypeError, "Did you mean `rtol=`"),
        (dict(whatever=1.0), TypeError, "Options: rtol, atol"),
        (dict(method="RK45"), ValueError, "'dopri5'"),
        (dict(method="RK23"), ValueError, "'bosh3'"),
        (dict(method="DOP853"), ValueError, "'dop853'"),
        (dict(method="Tsit5"), ValueError, "'tsit5'"),
        (dict(method="Dopri5"), ValueError, "'dopri5'"),
        (dict(method="BDF"), ValueError, "stiff"),
        (dict(method="LSODA"), ValueError, "stiff"),
        (dict(method="Radau"), ValueError, "stiff"),
        (dict(method="Kvaerno5"), ValueError, "'kvaerno5'"),
        (dict(method="Rodas5"), ValueError, "'rodas5p'"),
        (dict(method="QNDF2"), ValueError, "stiff"),
        (dict(method="KahanLi6"), ValueError, "'yoshida4'"),
        (dict(method="Sil3"), ValueError, "a pair"),
    ],
)
def test_an_argument_that_is_none_is_named_with_what_to_write_instead(options, error, message):
    for call in (odeint, solve):
        with pytest.raises(error, match=message):
            call(decay, 1.0, [0.0, 1.0], **options)
    with pytest.raises(error, match=message):
        jax.jit(lambda y0: odeint(decay, y0, jnp.arange(2.0), **options))(1.0)


def test_missing_times_are_named():
    with pytest.raises(TypeError, match="third argument, `t`"):
        solve(decay, 1.0, t_span=(0.0, 1.0))
    with pytest.raises(TypeError, match="`t` are missing"):
        odeint(decay, 1.0)


OBJECTS = {
    "Tsit5": (lambda x: dict(method=x()), "'tsit5'"),
    "Event": (
        lambda x: dict(events=[x(lambda t, y, args, **_: y)]),
        r"jaxode\.Event\(condition, term",
    ),
    "SaveAt": (lambda x: dict(t=x(ts=[0.0, 1.0])), r"solve\(func, y0, ts\)"),
    "PIDController": (lambda x: dict(controller=x(1e-3, 1e-3)), r"controller=jaxode\.pid"),
    "ConstantStepSize": (lambda x: dict(controller=x()), "dt=0.1"),
    "StepTo": (lambda x: dict(dt=x([0.0, 1.0]), method="rk4"), r"jaxode\.Event\(times=ts\)"),
    "RecursiveCheckpointAdjoint": (lambda x: dict(adjoint=x()), "adjoint='replay'"),
    "BacksolveAdjoint": (lambda x: dict(adjoint=x), "adjoint='backsolve'"),  # the class
    "ODETerm": (lambda x: dict(func=x(decay)), "func is the function itself"),
    "Dopri5": (lambda x: dict(y0=x()), "`method=`"),
    "TqdmProgressMeter": (lambda x: dict(progress=x()), "progress=True"),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_of_diffrax_is_answered_with_what_to_write(name):
    diffrax = pytest.importorskip("diffrax")
    options, message = OBJECTS[name]
    with pytest.raises(TypeError, match=message):
        solve(**{"func": decay, "y0": 1.0, "t": [0.0, 1.0], **options(getattr(diffrax, name))})


def test_objects_that_have_an_answer_are_names_of_diffrax():
    diffrax = pytest.importorskip("diffrax")
    assert all(hasattr(diffrax, name) for name in {*words.OBJECTS} - {"Tensor", "Module"})


@pytest.mark.parametrize(
    "make, options, message",
    [
        (Event, dict(cond_fn=print), r"jaxode\.Event\(condition\)"),
        (Event, dict(condition=print, affect=print), "`change`"),
        (Event, dict(condition=print, terminale=True), "Did you mean `terminal=`"),
        (Event, dict(condition=print, dense=True), "it is one of `solve`"),
        (pid, dict(pcoeff=0.3), "`proportional=`"),
        (pid, dict(rtol=0.3), "it is one of `solve`"),
        (pid, dict(dtmin=0.3), "no least step"),
        (Controller, dict(factormax=5.0), "`max_factor=`"),
    ],
)
def test_an_argument_that_an_event_or_a_controller_does_not_have_is_named(make, options, message):
    with pytest.raises(TypeError, match=message):
        make(**options)


def test_the_signatures_of_an_event_and_a_controller_are_those_of_their_fields():
    for cls in (Event, Controller):
        assert list(inspect.signature(cls).parameters) == list(cls.__dataclass_fields__)


def test_what_a_solution_does_not_have_is_answered_and_nothing_else_changes():
    sol = solve(decay, 1.0, [0.0, 1.0])
    for name in words.FIELDS:
        with pytest.raises(AttributeError, match=f"no `{name}`: .*"):
            getattr(sol, name)
    with pytest.raises(AttributeError, match="it has ts, ys, status"):
        sol.nothing  # noqa: B018
    with pytest.raises(TypeError, match="dense=True"):
        sol(0.5)
    assert sol.dense is None and sol.events is None and not hasattr(sol, "__array__")
    for again in (copy.deepcopy(sol), pickle.loads(pickle.dumps(sol)), jax.tree.map(np.array, sol)):
        assert isinstance(again, Solution)
        np.testing.assert_array_equal(again.ys, sol.ys)


def test_a_name_of_another_library_is_answered_where_it_is_imported():
    with pytest.raises(ImportError, match=r"There is no `solve_ivp`.*`solve\(func, y0, t\)`"):
        from jaxode import solve_ivp  # noqa: F401
    assert not {*words.NAMES} & {*dir(jaxode)} and not hasattr(jaxode, "nothing")


def test_lists_are_tolerances_of_arrays():
    y0, tight, loose = jnp.array([1.0, 0.5]), [1e-9, 1e-3], [1e-3, 1e-9]
    run = lambda y0, atol: solve(lambda y, t: jax.tree.map(jnp.cos, y), y0, [0.0, 2.0], atol=atol)
    of_lists = run({"x": y0, "z": y0}, {"x": tight, "z": tuple(loose)})
    of_arrays = run({"x": y0, "z": y0}, {"x": np.array(tight), "z": np.array(loose)})
    np.testing.assert_array_equal(of_lists.ys["x"], of_arrays.ys["x"])
    assert of_lists.stats.accepted == of_arrays.stats.accepted
    traced = jax.jit(lambda a: run(y0, [a, 1e-3]).ys)(1e-9)
    np.testing.assert_array_equal(traced, run(y0, tight).ys)


@pytest.mark.parametrize(
    "again", [lambda x: pickle.loads(pickle.dumps(x)), copy.copy, copy.deepcopy]
)
def test_a_solve_error_can_be_pickled_and_copied(again):
    with pytest.raises(SolveError) as caught:
        solve(lambda y, t: y**2, 1.0, [0.0, 0.5, 2.0])
    error = again(caught.value)
    assert type(error) is SolveError and str(error) == str(caught.value)
    assert int(error.solution.status) == int(caught.value.solution.status)
    np.testing.assert_array_equal(error.solution.ys, caught.value.solution.ys)


@pytest.mark.parametrize("shape", [(2,), (4, 3), (2, 2)])
def test_a_tolerance_of_another_shape_is_refused_by_its_name_and_that_of_the_state(shape):
    with pytest.raises(
        ValueError, match=r"`atol` has shape \(.*\) where y0\['x'\] has shape \(3,\)"
    ):
        solve(lambda y, t: y, {"x": jnp.ones(3)}, [0.0, 1.0], atol=np.ones(shape))
