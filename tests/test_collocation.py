"""Gauss's methods: order, and what they keep: quadratic invariants, symmetry in time, energy in a band."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from jaxode import Status, odeint, solve
from jaxode.methods import Banded, BlockDiagonal, Dense, Diagonal, Krylov, Sparse, named
from jaxode.problems import problems

method = pytest.mark.parametrize("name", ["implicit_midpoint", "gauss4"])
KEPLER = problems["kepler"]


def smooth(y, t):
    """Nonlinear, and not autonomous."""
    return jnp.stack([-y[0] * y[1] * jnp.cos(t), y[0] - y[1] * t])


@method
def test_every_method_has_the_order_it_declares(name):
    y0, t = jnp.array([1.0, 0.5]), jnp.linspace(0.0, 1.0, 8)
    exact = solve_ivp(lambda t, y: np.asarray(smooth(y, t)), (0, 1), y0, method="DOP853",
                      rtol=1e-13, atol=1e-14, t_eval=t).y.T  # fmt: skip
    run = jax.jit(lambda dt: odeint(smooth, y0, t, method=name, dt=dt))
    errors = [np.abs(run(dt) - exact) for dt in (1 / 10, 1 / 40)]
    ends = np.log2(errors[0][-1].max() / errors[1][-1].max()) / 2
    inside = np.log2(errors[0].max() / errors[1].max()) / 2
    assert named(name).order - 0.4 < ends < named(name).order + 0.6
    assert inside > named(name).dense_order - 0.4


@method
def test_a_quadratic_invariant_is_kept_to_roundings(name):
    ys = odeint(KEPLER.f, KEPLER.y0, jnp.linspace(0.0, 100.0, 5), method=name, dt=0.05)
    momentum = [KEPLER.invariants(y)[1] for y in np.asarray(ys)]
    np.testing.assert_allclose(momentum, momentum[0], rtol=1e-11)


@method
def test_the_energy_of_a_pendulum_stays_within_a_band(name):
    p = problems["pendulum"]
    ys = odeint(p.f, p.y0, jnp.linspace(0.0, 400.0, 100), *p.args, method=name, dt=0.1)
    energies = np.array([p.invariants(y)[0] for y in np.asarray(ys)])
    early, late = (np.ptp(part) for part in (energies[:50], energies[50:]))
    assert 0 < early < 2 and late < 1.3 * early


@method
def test_a_step_back_is_the_inverse_of_a_step(name):
    y1 = odeint(smooth, jnp.array([1.0, 0.5]), [0.0, 2.0], method=name, dt=0.2)[-1]
    y0 = odeint(smooth, y1, [2.0, 0.0], method=name, dt=0.2)[-1]
    np.testing.assert_allclose(y0, [1.0, 0.5], rtol=1e-11)


@method
def test_it_is_stable_on_the_whole_left_half_plane_and_keeps_circles(name):
    m, y = named(name), jnp.ones(1, jnp.complex128)
    one = lambda z: m.step(lambda y, s: z * y, jnp.zeros(()), y, z * y, jnp.ones(())).y[0]
    factor = jax.jit(jax.vmap(one))
    left = -np.logspace(-2, 6, 9)[:, None] + 1j * np.linspace(-50, 50, 7)[None, :]
    assert np.all(np.abs(factor(left.reshape(-1))) <= 1 + 1e-12)
    np.testing.assert_allclose(np.abs(factor(1j * np.linspace(-50, 50, 9))), 1, rtol=1e-12)


I, J = np.indices((6, 6))
NEAR = (J - I <= 1) & (I - J <= 2)
STRUCTURES = [
    ("implicit_midpoint", Banded(2, 1), NEAR),
    ("gauss4", Dense(), I == I),
    ("gauss4", Banded(2, 1), NEAR),
    ("gauss4", Sparse(NEAR), NEAR),
    ("gauss4", BlockDiagonal(2), I // 2 == J // 2),
    ("gauss4", Diagonal(), I == J),
    ("gauss4", Krylov(rtol=1e-12), I == I),
]


@pytest.mark.parametrize(("name", "linear", "there"), STRUCTURES)
def test_a_step_by_any_linear_algebra_is_the_stability_function_of_the_jacobian(
    name, linear, there
):
    rng = np.random.default_rng(0)
    a, (y0, v) = np.where(there, rng.normal(size=(6, 6)), 0), rng.normal(size=(2, 6))
    m = dataclasses.replace(named(name), linear=linear)

    def end(y0, k):
        f = lambda y, s: k * jnp.sum(a * y[None], 1)
        return m.step(f, jnp.zeros(()), y0, f(y0, 0), jnp.asarray(0.5)).y

    def exact(y0, k):  # Pade's (1, 1) and (2, 2), HW table IV.3.1
        z, square = 0.5 * k * a, (named(name).order == 4) / 12
        above, below = (np.eye(6) + sign * z / 2 + square * z @ z for sign in (1, -1))
        return np.linalg.solve(below, above @ y0)

    found, vjp = jax.jit(lambda y0, k: jax.vjp(end, y0, k))(y0, 0.8)
    close = partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-9)
    close(found, exact(y0, 0.8))
    y_bar, k_bar = vjp(v)
    close(y_bar, exact(np.eye(6), 0.8).T @ v)
    difference = (exact(y0, 0.8 + 1e-5) - exact(y0, 0.8 - 1e-5)) / 2e-5
    close(k_bar, v @ difference)


def test_a_structure_is_declared_of_df_dy_and_looked_at():
    f = lambda y, t: -y + jnp.roll(y, 1).at[0].set(0.0) ** 2
    y0 = jnp.linspace(1.0, 2.0, 5)
    run = lambda linear: odeint(f, y0, [0.0, 1.0], method="gauss4", dt=0.25, linear=linear)[-1]
    np.testing.assert_allclose(run(Banded(1, 0)), run(None), rtol=1e-12)
    with pytest.raises(ValueError, match="wider band"):
        run(Diagonal())


def test_gradients_are_those_of_the_numbers_returned_also_of_a_batch():
    def loss(length, adjoint="replay"):
        f = lambda y, t: {"q": y["p"], "p": -jnp.sin(y["q"]) / length}
        y0 = {"q": jnp.array(1.0), "p": jnp.array(0.0)}
        return odeint(f, y0, [0.0, 0.55, 2.0], method="gauss4", dt=0.2, adjoint=adjoint)["q"].sum()

    slope = jax.jit(jax.grad(loss))
    difference = (loss(1.0 + 1e-5) - loss(1.0 - 1e-5)) / 2e-5
    np.testing.assert_allclose(slope(1.0), difference, rtol=1e-8)
    forward = jax.jit(jax.jacfwd(lambda x: loss(x, "forward")))
    np.testing.assert_allclose(slope(1.0), forward(1.0), rtol=1e-10)
    lengths = jnp.linspace(0.5, 2.0, 9)
    many = jax.jit(jax.vmap(jax.grad(loss)))(lengths)
    np.testing.assert_allclose(many, [slope(x) for x in lengths], rtol=1e-10)


def test_equations_that_are_not_solved_are_a_failure():
    found = solve(lambda y, t: y**2, 1.0, [0.0, 5.0], method="gauss4", dt=2.5, throw=False)
    assert int(found.status) == Status.NOT_CONVERGED
    with pytest.raises(ValueError, match="dt="):
        odeint(lambda y, t: -y, 1.0, [0.0, 1.0], method="gauss4")


def test_float32_stays_float32():
    y0 = jnp.array([1.0, 0.0], jnp.float32)
    f = lambda y, t: jnp.stack([y[1], -y[0]])
    ys = odeint(f, y0, jnp.array([0.0, 1.0], jnp.float32), method="gauss4", dt=0.1)
    assert ys.dtype == jnp.float32
    np.testing.assert_allclose(ys[-1], [np.cos(1), -np.sin(1)], atol=2e-6)
