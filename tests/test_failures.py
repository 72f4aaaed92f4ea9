"""A failed solve is never a plausible number, and bad input is refused at the door."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import SolveError, Status, odeint, pid, solve
from jaxode.adjoints import named

T = [0.0, 0.5, 1.0, 2.0]
explode = lambda y, t: y**2  # a pole at t = 1 from y = 1
leave = lambda y, t: jnp.where(t > 0.7, jnp.nan, -1.0) * y
overflow = lambda y, t: 1e300 * y * y
stiff = lambda y, t: -1e7 * (y - jnp.cos(t))

FAILURES = {
    "pole": (explode, {}, {Status.DT_TOO_SMALL, Status.NON_FINITE}, 1.0),
    "NaN on the way": (leave, {}, {Status.NON_FINITE}, 0.7),
    "overflow": (overflow, {}, {Status.NON_FINITE, Status.DT_TOO_SMALL}, 0.0),
    "budget": (stiff, dict(max_steps=50), {Status.MAX_STEPS}, 0.0),
    "mxstep": (stiff, dict(mxstep=20), {Status.MAX_STEPS}, 0.0),
    "NaN at the start": (lambda y, t: jnp.nan * y, {}, {Status.NON_FINITE_INITIAL}, 0.0),
    "fixed steps": (leave, dict(method="rk4", dt=0.1), {Status.NON_FINITE}, 0.7),
    "no estimate of the end": (leave, dict(method="heun"), {Status.NON_FINITE}, 0.7),
}


@pytest.fixture(params=FAILURES)
def failure(request):
    return FAILURES[request.param]


def test_called_eagerly_a_failed_solve_raises_with_the_time_and_the_remedy(failure):
    f, options, statuses, time = failure
    with pytest.raises(SolveError, match="failed") as caught:
        odeint(f, 1.0, T, **options)
    solution = caught.value.solution
    assert Status(int(solution.status)) in statuses
    assert abs(float(solution.reached) - time) < 0.11
    assert Status(int(solution.status)).message in str(caught.value)


def test_rows_after_a_failure_are_nan_and_rows_before_it_are_right(failure):
    f, options, _, _ = failure
    sol = solve(f, 1.0, T, throw=False, **options)
    known = np.array(T) <= float(sol.reached)
    assert not known[-1] and np.all(np.isnan(sol.ys[~known]))
    if Status(int(sol.status)) != Status.NON_FINITE_INITIAL:
        assert np.all(np.isfinite(sol.ys[known]))
    if f is leave:
        np.testing.assert_allclose(sol.ys[:2], np.exp([0, -0.5]), rtol=1e-5)


@pytest.mark.parametrize(
    "case, adjoint",
    [
        *(("pole", adjoint) for adjoint in named),
        *(("budget", adjoint) for adjoint in ("replay", "backsolve")),
        *(("NaN at the start", adjoint) for adjoint in ("replay", "backsolve")),
    ],
)
def test_a_failed_solve_has_nan_gradients_under_jit(case, adjoint):
    f, options, _, _ = FAILURES[case]
    options = {"max_steps": 300, **options}

    def loss(y0, rate):  # the first rows are fine; the gradient must not be
        ys = odeint(lambda y, t: rate * f(y, t), y0, T, adjoint=adjoint, **options)
        return ys[0] + ys[1]

    derivative = jax.jacfwd if adjoint == "forward" else jax.grad
    assert np.all(np.isnan(jax.jit(derivative(loss, (0, 1)))(1.0, 1.0)))


def test_one_failed_sample_leaves_its_neighbours_as_they_are():
    y0 = jnp.array([0.1, 1.0, 0.3])
    f = lambda y0: solve(explode, y0, [0.0, 0.5, 1.5])
    sol = jax.vmap(f)(y0)
    assert [Status(int(s)) == Status.SUCCESS for s in sol.status] == [True, False, True]
    exact = lambda y0: y0 / (1 - np.array([0, 0.5, 1.5]) * y0)
    for i in (0, 2):
        np.testing.assert_allclose(sol.ys[i], exact(float(y0[i])), rtol=1e-6)
    grads = jax.vmap(jax.grad(lambda y0: f(y0).ys.sum()))(y0)
    assert np.isnan(grads[1]) and np.all(np.isfinite(grads[np.array([0, 2])]))


def test_throw_raises_while_the_program_runs():
    f = jax.jit(lambda y0: odeint(explode, y0, T, throw=True))
    with pytest.raises(Exception, match="The solve failed"):
        jax.block_until_ready(f(1.0))
    with pytest.raises(Exception, match="The solve failed"):
        jax.block_until_ready(jax.jit(jax.grad(lambda y0: f(y0).sum()))(1.0))
    assert np.isfinite(f(0.1)[0])


def test_an_error_that_is_not_a_number_shrinks_the_step_a_bounded_number_of_times():
    sol = solve(leave, 1.0, T, throw=False)
    assert 5 < int(sol.stats.rejected) < 100


def test_a_domain_is_not_left():
    ys = odeint(lambda y, t: -jnp.sqrt(y), 1.0, [0.0, 1.9], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(ys[-1], (1 - 0.95) ** 2, rtol=1e-2)


def test_func_is_never_asked_beyond_the_interval():
    inside = lambda y, t: jnp.where((t < 0.1) | (t > 0.7), jnp.nan, -y)
    for t in ([0.1, 0.3, 0.7], [0.7, 0.3, 0.1]):
        assert np.all(np.isfinite(odeint(inside, 1.0, t)))


def test_nothing_to_do_takes_few_steps():
    for f in (lambda y, t: 0 * y, lambda y, t: 1.0 + 0 * y):
        sol = solve(f, jnp.ones(2), [0.0, 100.0])
        assert int(sol.stats.accepted) <= 12
    assert solve(lambda y, t: y, jnp.zeros(0), [0.0, 1.0]).ys.shape == (2, 0)


ok = lambda y, t: -y


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(mxstep=-1), "`mxstep`"),
        (dict(method="rk5"), "no method 'rk5'"),
        (dict(method="leapfrogg"), "leapfrog"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        odeint(ok, 1.0, [0.0, 1.0], **options)
    with pytest.raises(ValueError, match=message):  # before compilation, where the values are known
        jax.jit(lambda: odeint(ok, 1.0, [0.0, 1.0], **options))()


def test_lost_precision_is_warned_of():
    f = lambda y, t: -y.astype(jnp.float32)
    with pytest.warns(UserWarning, match="float32"):
        odeint(f, jnp.ones(2), [0.0, 1.0])
    with pytest.warns(UserWarning, match="below what float32"):
        odeint(ok, jnp.ones(2, jnp.float32), [0.0, 1.0], rtol=1e-9)


@pytest.mark.parametrize("limits", [dict(safety=0.0), dict(min_factor=2.0), dict(integral=0.0)])
def test_a_wrong_controller_is_refused(limits):
    with pytest.raises(ValueError):
        pid(**limits)


def test_a_start_at_rest_in_float32_is_no_failure():
    # Nothing happens at first: Hairer's rule guesses a step below what float32 time resolves.
    field = lambda y, t: jnp.where(t > 0.5, 1.0, 0.0).astype(y.dtype) - y
    solution = solve(field, jnp.zeros(2, jnp.float32), [0.0, 1.0])
    assert int(solution.status) == Status.SUCCESS
    np.testing.assert_allclose(solution.ys[-1], 1 - np.exp(-0.5), rtol=1e-2)


def blow_up(y, t, p, w):
    return jnp.where(p > 1, y**2 * p, -y) * w


@pytest.mark.parametrize("adjoint", ["replay", "backsolve", "direct"])
def test_a_failed_solve_that_a_loss_leaves_out_spoils_no_gradient(adjoint):
    options = dict(max_steps=300, adjoint=adjoint, throw=False)
    one = lambda p, w: solve(blow_up, jnp.array(1.0), [0.0, 0.5, 1.0], p, w, **options)

    def loss(w, p):
        solutions = jax.vmap(one, (0, None))(p, w)
        fine = solutions.status[:, None] == 0
        return jnp.sum(jnp.sin(jnp.where(fine, solutions.ys, 0.0)))

    p = jnp.array([0.5, 3.0, 0.7])
    found = jax.grad(loss, (0, 1))(1.0, p)
    np.testing.assert_allclose(found[0], jax.grad(loss)(1.0, p[::2]), rtol=1e-10)
    np.testing.assert_array_equal(found[1], 0.0)
    # But what is asked of it has no derivative, whatever its cotangents add up to.
    difference = lambda w: (lambda ys: ys[1] - ys[0])(one(p[1], w).ys)
    assert np.isnan(jax.grad(difference)(1.0))


def test_what_a_failed_solve_has_no_number_for_is_nan_in_both_parts_of_a_complex_one():
    func = lambda z, t, rate: jnp.where(t > 1, jnp.nan, 1j * rate * z)
    start = jnp.asarray(1 + 0j, jnp.complex128)
    ends = lambda rate: solve(func, start, [0.0, 0.5, 2.0], rate, method="rk4", dt=0.1).ys
    last = jax.jit(ends)(2.0)[-1]
    assert jnp.isnan(last.real) and jnp.isnan(last.imag)
    loss = lambda rate: ends(rate)[-1].imag
    assert jnp.isnan(jax.jit(jax.grad(loss))(2.0)) and jnp.isnan(jax.jit(loss)(2.0))
    of_start = lambda z: solve(func, z, [0.0, 2.0], 2.0, method="rk4", dt=0.1).ys[-1].real
    start_bar = jax.jit(jax.grad(of_start))(start)
    assert jnp.isnan(start_bar.real) and jnp.isnan(start_bar.imag)
