"""At the door: arguments that would give plausible numbers are refused, with the word to use instead."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import Event, SolveError, Status, odeint, solve
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


def test_a_solver_object_of_another_library_is_named():
    diffrax = pytest.importorskip("diffrax")
    with pytest.raises(TypeError, match="'tsit5'"):
        solve(decay, 1.0, [0.0, 1.0], method=diffrax.Tsit5())


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
