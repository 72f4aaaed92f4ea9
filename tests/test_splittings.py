"""Symplectic methods: their order, and what they keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import odeint, solve
from jaxode.methods import Splitting, composed
from jaxode.methods.symplectic import splittings
from jaxode.problems import problems

METHODS = pytest.mark.parametrize("method", list(splittings))
START = jnp.array([0.5, 0.0]), jnp.array([0.0, 3**0.5])


def kepler(state, t):
    q, p = state
    return p, -q / jnp.sum(q**2) ** 1.5


def driven(state, t):
    """x'' = -x + cos 2t: exact from rest, (cos t - cos 2t) / 3."""
    q, p = state
    return p, jnp.cos(2 * t).astype(q.dtype) - q


@METHODS
def test_errors_fall_with_the_declared_order_at_the_end_and_inside(method):
    kepler_exact, table = problems["kepler"].exact, splittings[method]
    run = jax.jit(lambda dt: odeint(kepler, START, [0.0, 3.013, 5.0], method=method, dt=dt))
    errors = []
    for ys in map(run, (0.02, 0.01, 0.005)):
        found = np.concatenate([np.asarray(part) for part in ys], axis=1)
        errors.append([np.abs(found[i] - kepler_exact(t)).max() for i, t in ((1, 3.013), (2, 5.0))])
    slopes = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.all(slopes[:, 1] > table.order - 0.2)
    assert np.all(slopes[:, 0] > table.dense_order - 0.5)


@METHODS
def test_a_force_that_depends_on_time_is_met_at_the_right_times(method):
    ts = jnp.linspace(0.0, 3.0, 7)
    zero = jnp.zeros(1)
    q, _ = odeint(driven, (zero, zero), ts, method=method, dt=0.005)
    np.testing.assert_allclose(q[:, 0], (jnp.cos(ts) - jnp.cos(2 * ts)) / 3, atol=1e-5)


@METHODS
def test_a_step_keeps_area_and_runs_backwards_to_where_it_came_from(method):
    pendulum = lambda state, t: (state[1], -jnp.sin(state[0]))
    step = lambda x: jnp.stack(
        [part[-1] for part in odeint(pendulum, (x[0], x[1]), [0.0, 0.5], method=method, dt=0.5)]
    )
    x = jnp.array([1.0, 0.3])
    np.testing.assert_allclose(jnp.linalg.det(jax.jacrev(step)(x)), 1.0, rtol=1e-12)
    there = odeint(pendulum, (x[0], x[1]), [0.0, 4.0], method=method, dt=0.5)
    back = odeint(pendulum, (there[0][-1], there[1][-1]), [4.0, 0.0], method=method, dt=0.5)
    np.testing.assert_allclose([back[0][-1], back[1][-1]], x, atol=1e-12)


def test_energy_stays_in_a_band_where_a_runge_kutta_method_drifts():
    energy = problems["kepler"].invariants
    ts = np.linspace(0.0, 200.0, 50)
    drift = {}
    for method, dt in (("leapfrog", 0.02), ("heun", 0.02)):
        ys = odeint(kepler, START, ts, method=method, dt=dt, max_steps=2**14)
        found = np.concatenate([np.asarray(part) for part in ys], axis=1)
        drift[method] = np.abs([energy(y)[0] - energy(found[0])[0] for y in found])
    assert drift["leapfrog"].max() < 0.02
    assert drift["heun"][-5:].min() > 2 * drift["leapfrog"].max()


@METHODS
@pytest.mark.parametrize("adjoint", ["replay", "direct"])
def test_gradients_are_those_of_the_steps(method, adjoint, dtype):
    options = dict(method=method, dt=0.1, adjoint=adjoint)
    loss = lambda q: odeint(kepler, (q, START[1].astype(dtype)), [0.0, 1.0], **options)[0][-1].sum()
    q, direction = START[0].astype(dtype), jnp.array([0.6, -0.8], dtype)
    run = jax.jit(jax.value_and_grad(loss))
    slope = jnp.vdot(run(q)[1], direction)
    h = 1e-5 if dtype == "float64" else 1e-2
    finite = (run(q + h * direction)[0] - run(q - h * direction)[0]) / (2 * h)
    np.testing.assert_allclose(slope, finite, rtol=1e-6 if dtype == "float64" else 2e-2)


def test_evaluations_are_counted_and_the_method_may_be_ones_own():
    ruth3 = Splitting(3, (2 / 3, -2 / 3, 1.0), (7 / 24, 3 / 4, -1 / 24), dense_order=3)
    stats = solve(kepler, START, [0.0, 1.0], method=ruth3, dt=0.1).stats
    assert int(stats.accepted) == 10 and int(stats.evaluations) == 1 + 10 * 4
    assert composed(1.0) == ((0.5, 0.5), (1.0, 0.0))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: odeint(lambda y, t: (y[0], y[1]), START, [0, 1], method="leapfrog", dt=0.1),
         ValueError, "separable"),
        (lambda: odeint(kepler, START, [0, 1], method="leapfrog"), ValueError, "pass a step size"),
        (lambda: odeint(lambda y, t: -y, jnp.ones(2), [0, 1], method="leapfrog", dt=0.1),
         TypeError, r"\(q, p\)"),
        (lambda: odeint(kepler, START, [0, 1], method="leapfrog", dt=0.1, adjoint="backsolve"),
         ValueError, "replay"),
        (lambda: Splitting(1, (0.5,), (1.0,)), ValueError, "sum to 1"),
        (lambda: Splitting(1, (1.0,), (0.5, 0.5)), ValueError, "as many"),
    ],
)  # fmt: skip
def test_a_wrong_use_is_refused_with_the_reason(call, error, message):
    with pytest.raises(error, match=message):
        call()
