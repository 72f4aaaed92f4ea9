"""A million steps in float32: what the sums lose without `compensated`, and with it; and its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import odeint, solve

COUNT, END = 1_000_000, 10.0
H = END / COUNT


def decay(y, t):
    return -y


def one(y, t):
    return jnp.ones_like(y)


def oscillator(state, t):
    return state[1], -state[0]


def rk4(z):
    """What a step of size z / lambda makes of a mode lambda."""
    return 1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24


def of_leapfrog():
    """Its steps from (1, 0), as a power of a matrix."""
    drift, kick = np.array([[1, H / 2], [0, 1]]), np.array([[1, 0], [-H, 1]])
    return np.linalg.matrix_power(drift @ kick @ drift, COUNT)[:, 0]


SINGLE = np.float32(1), np.float32(0)
# A method, func, y0, and what these steps find in float64.
SUMS = {
    "rk4": ("rk4", lambda y, t: decay(y, t) / 10, SINGLE[0], rk4(-H / 10) ** COUNT),
    "euler": ("euler", lambda y, t: decay(y, t) / 10, SINGLE[0], (1 - H / 10) ** COUNT),
    "leapfrog": ("leapfrog", oscillator, SINGLE, of_leapfrog()),
    "an integral of 1": ("euler", one, SINGLE[1], END),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_million_steps_in_float32_are_those_in_float64(name):
    method, func, y0, right = SUMS[name]

    def off(compensated):
        options = dict(method=method, dt=H, compensated=compensated)
        ys = odeint(func, y0, np.array([0, END], "float32"), **options)
        ends = [np.asarray(y[-1], "float64") for y in jax.tree.leaves(ys)]
        return np.max(np.abs(ends - np.atleast_1d(right))) / np.max(np.abs(right))

    exact = off(True)
    assert exact < 1e-6
    assert 30 * exact < off(False)


def test_in_bfloat16_a_state_moves_by_steps_that_are_smaller_than_its_roundings():
    def end(**options):
        t = np.array([0, 1], "float32")
        return float(
            odeint(decay, jnp.ones((), jnp.bfloat16), t, method="rk4", dt=1e-4, **options)[-1]
        )

    assert end() == 1
    assert abs(end(compensated=True) - np.exp(-1)) < 2**-9


Y0, RATE, STEPS = np.arange(1.0, 7.0), 0.7, 40


def gradient(y0, rate, **options):
    """Of the squares of the state at the end, by y0 and by the rate."""

    def loss(y0, rate):
        ys = odeint(lambda y, t, rate: -rate * y, y0, np.array([0, 1], y0.dtype), rate, **options)
        return jnp.sum(ys[-1] ** 2)

    return jax.grad(loss, (0, 1))(y0, rate)


@pytest.mark.parametrize("adjoint", ["replay", "direct", "backsolve"])
def test_derivatives_are_those_of_the_steps(adjoint):
    z = -RATE / STEPS
    factor = rk4(z) ** STEPS
    by_rate = -factor * (1 + z + z**2 / 2 + z**3 / 6) / rk4(z)
    right = 2 * factor**2 * Y0, 2 * factor * by_rate * np.sum(Y0**2)
    options = dict(method="rk4", dt=1 / STEPS, adjoint=adjoint, compensated=True)
    many = lambda y0, rate: jax.vmap(lambda y0: gradient(y0, rate, **options))(np.stack([y0, -y0]))
    found = many(np.float32(Y0), np.float32(RATE))
    np.testing.assert_allclose(found[0], [right[0], -right[0]], rtol=3e-6)
    np.testing.assert_allclose(found[1], [right[1], right[1]], rtol=3e-6)


def test_a_solve_that_goes_on_has_lost_nothing():
    options = dict(method="rk4", dt=1 / 64, compensated=True, resumable=True)
    whole = solve(decay, np.float32(Y0), np.array([0, 2], "float32"), **options)
    part = solve(decay, np.float32(Y0), np.array([0, 1], "float32"), **options)
    np.testing.assert_array_equal(part.resume(2.0).ys[-1], whole.ys[-1])


@pytest.mark.parametrize("options", [{}, dict(method="gauss4", dt=0.1), dict(method="rodas5p")])
def test_it_is_refused_where_there_is_no_sum_to_compensate(options):
    with pytest.raises(ValueError, match="`compensated` is for many steps of equal size"):
        odeint(decay, 1.0, [0.0, 1.0], compensated=True, **options)
