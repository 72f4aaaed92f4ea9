"""Fields that keep something, augmented layers, the solver's own estimates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import odeint, solve
from jaxode.nn import (
    Augmented,
    DivergenceFreeField,
    HamiltonianField,
    MLPField,
    NeuralODE,
    SeparableHamiltonian,
)

KEY = jax.random.key(0)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_divergence_free_field_has_no_divergence(size, dtype):
    field = DivergenceFreeField(size, width=8, dtype=dtype, key=KEY)
    y = jax.random.normal(KEY, (5, size), dtype)
    assert field(y, 0.0).dtype == dtype
    jacobians = jax.vmap(jax.jacfwd(lambda y: field(y, 0.0)))(y)
    assert np.max(np.abs(jacobians)) > 1e-2
    np.testing.assert_allclose(jnp.trace(jacobians, axis1=1, axis2=2), 0, atol=1e-5)
    np.testing.assert_allclose(field(y, 0.0)[2], field(y[2], 0.0), rtol=1e-5, atol=1e-6)


def test_a_hamiltonian_field_keeps_its_energy(dtype):
    field = HamiltonianField(4, width=16, dtype=dtype, key=KEY)
    y0 = jax.random.normal(KEY, (4,), dtype)
    tight = 1e-9 if dtype == "float64" else 1e-6
    ys = odeint(field, y0, [0.0, 2.0, 5.0], rtol=tight, atol=tight)
    assert np.max(np.abs(ys[-1] - y0)) > 1e-2
    np.testing.assert_allclose(
        field.energy(ys), field.energy(y0), rtol=1e-6 if tight < 1e-8 else 1e-4
    )
    with pytest.raises(ValueError, match="as many p as q"):
        HamiltonianField(3, key=KEY)


def test_a_separable_hamiltonian_is_the_gradient_of_its_energy_and_takes_symplectic_methods():
    field = SeparableHamiltonian(2, width=8, dtype=jnp.float64, key=KEY)
    q, p = jax.random.normal(KEY, (2, 2), jnp.float64)
    dq, dp = field((q, p), 0.0)
    by_q, by_p = jax.grad(field.energy)((q, p))
    np.testing.assert_allclose(dq, by_p, rtol=1e-12)
    np.testing.assert_allclose(dp, -by_q, rtol=1e-12)
    ys = odeint(field, (q, p), jnp.linspace(0.0, 50.0, 20), method="leapfrog", dt=0.1)
    energies = jax.vmap(field.energy)(ys)
    assert np.max(np.abs(energies - energies[0])) < 1e-2


def test_an_augmented_layer_starts_from_zeros_beside_its_input(dtype):
    layer = NeuralODE(MLPField(4, width=8, dtype=dtype, key=KEY))
    augmented = Augmented(layer, 2)
    x = jax.random.normal(KEY, (5, 2), dtype)
    np.testing.assert_array_equal(augmented.augment(x)[:, :2], x)
    np.testing.assert_array_equal(augmented.augment(x)[:, 2:], 0)
    assert augmented(x).shape == (5, 4) and augmented(x).dtype == dtype
    np.testing.assert_allclose(augmented.solve(x).ys[-1], augmented(x))


def test_an_mlp_without_time_is_the_same_at_all_times():
    field = MLPField(2, width=8, time=False, key=KEY)
    y = jnp.ones((3, 2))
    np.testing.assert_array_equal(field(y, 0.0), field(y, 5.0))
    assert not np.allclose(
        MLPField(2, width=8, key=KEY)(y, 0.0), MLPField(2, width=8, key=KEY)(y, 5.0)
    )


MATRIX = jnp.array([[-2.0, 1.0], [0.5, -30.0]])


def estimates(matrix, **options):
    field = lambda y, t: jnp.tanh(matrix @ y) + jnp.sin(t)
    options = {"adjoint": "direct", "max_steps": 64, **options}
    return solve(field, jnp.ones(2), [0.0, 1.0], heuristics=True, **options)


def test_the_stiffness_estimate_of_a_linear_decay_is_its_rate(dtype):
    y0 = jnp.ones(3, dtype)
    solution = solve(
        lambda y, t: -30 * y, y0, [0.0, 0.2], adjoint="direct", heuristics=True, max_steps=64
    )
    mean = float(solution.heuristics.stiffness) / int(solution.stats.accepted)
    assert solution.heuristics.stiffness.dtype == dtype
    np.testing.assert_allclose(mean, 30.0, rtol=1e-2)


@pytest.mark.parametrize("name", ["error", "stiffness"])
def test_estimates_are_differentiated_with_the_steps_held(name):
    value = lambda matrix: getattr(estimates(matrix, method="tsit5", dt=0.05).heuristics, name)
    direction = jax.random.normal(KEY, MATRIX.shape, MATRIX.dtype)
    slope = jnp.vdot(jax.grad(value)(MATRIX), direction)
    h = 1e-4
    finite = (value(MATRIX + h * direction) - value(MATRIX - h * direction)) / (2 * h)
    np.testing.assert_allclose(slope, finite, rtol=1e-4)


def test_the_error_estimate_falls_with_the_tolerance():
    loose, tight = (estimates(MATRIX, rtol=r, atol=r).heuristics.error for r in (1e-3, 1e-6))
    assert 0 < tight < 0.1 * loose


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(adjoint="replay"), "direct"),
        (dict(method="bosh3"), "tsit5"),
        (dict(method="rk4", dt=0.1), "tsit5"),
    ],
)
def test_estimates_are_refused_where_there_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        estimates(MATRIX, **options)
