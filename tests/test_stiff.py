"""Implicit methods: order, stability, linear algebra, stiff problems with references, failures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from jaxode import odeint
from jaxode.methods import Banded, Dense, Diagonal, named
from jaxode.methods.esdirk import methods as esdirk
from jaxode.methods.linear import LOOPED, solver
from jaxode.methods.rosenbrock import methods as rosenbrock

METHODS = {**rosenbrock, **esdirk}
method = pytest.mark.parametrize("name", METHODS)


def smooth(y, t):
    """Nonlinear, and not autonomous."""
    return jnp.stack([-y[0] * y[1] * jnp.cos(t), y[0] - y[1] * t])


SMOOTH = dict(y0=jnp.array([1.0, 0.5]), t=jnp.linspace(0.0, 1.0, 8))


@method
def test_every_method_has_the_order_it_declares(name):
    exact = solve_ivp(lambda t, y: np.asarray(smooth(y, t)), (0, 1), SMOOTH["y0"], method="DOP853",
                      rtol=1e-13, atol=1e-14, t_eval=SMOOTH["t"]).y.T  # fmt: skip
    # Not so small that what Newton's method leaves undone is seen.
    steps = [h / 8 if named(name).order >= 5 else h / 20 for h in (1, 1 / 2, 1 / 4)]
    run = jax.jit(lambda dt: odeint(smooth, **SMOOTH, method=name, dt=dt))
    errors = [np.abs(run(dt) - exact) for dt in steps]
    ends = [e[-1].max() for e in errors]
    slope = np.log2(ends[0] / ends[2]) / 2
    assert named(name).order - 0.4 < slope < named(name).order + 0.8
    dense = np.log2(errors[0].max() / errors[2].max()) / 2
    assert dense > named(name).dense_order - 0.4


@method
def test_dense_output_has_the_slope_of_the_solution_at_the_start(name):
    m, f = named(name), lambda y, s: smooth(y, s)
    s, h, y = jnp.zeros(()), jnp.asarray(1e-3), SMOOTH["y0"]
    step = m.step(f, s, y, m.start(f, s, y), h)
    d = m.inside(f, s, y, h, step)
    np.testing.assert_allclose(sum(d), step.y - y, rtol=1e-12)
    np.testing.assert_allclose(d[0], h * f(y, s), rtol=2e-3)


@method
def test_every_method_is_l_stable(name):
    m, y = named(name), jnp.array([1.0])
    factor = jax.jit(lambda z: m.step(lambda y, s: z * y, 0 * z, y, z * y, jnp.ones_like(z)).y[0])
    zs = -np.logspace(-3, 7, 40)
    values = np.array([float(factor(z)) for z in zs])
    assert np.all(np.abs(values) <= 1)
    assert abs(values[-1]) < 1e-4
    small = np.abs(zs) < 0.02
    np.testing.assert_allclose(values[small], np.exp(zs[small]), rtol=3e-4)


MATRICES = [(n, Dense()) for n in (1, 3, 4, 5, 9, LOOPED + 1)]
MATRICES += [
    (n, Banded(*of)) for n, of in ((1, (0, 0)), (9, (2, 3)), (7, (3, 0)), (30, (1, 1)), (5, (0, 2)))
]
MATRICES += [(6, Diagonal())]


@pytest.mark.parametrize(("n", "linear"), MATRICES)
def test_linear_systems_are_solved_and_differentiated_as_by_numpy(n, linear):
    rng = np.random.default_rng(n)
    i, j = np.indices((n, n))
    a = rng.normal(size=(n, n))
    if isinstance(linear, Banded):
        a[(i - j > linear.lower) | (j - i > linear.upper)] = 0
    if isinstance(linear, Diagonal):
        a[i != j] = 0
    b, v = rng.normal(size=(2, n))
    whole = np.eye(n) - 0.7 * a

    def found(a, b):
        jacobian = linear.jacobian(lambda y: a @ jnp.sin(y), jnp.zeros(n))
        return solver(linear, jacobian, jnp.asarray(0.7))(b)

    x, back = np.linalg.solve(whole, b), np.linalg.solve(whole.T, v)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-7 * np.abs(b).max())
    close(found(jnp.asarray(a), b), x)
    a_bar, b_bar = jax.grad(lambda a, b: v @ found(a, b), (0, 1))(jnp.asarray(a), jnp.asarray(b))
    close(b_bar, back)
    close(np.where(a == 0, 0, a_bar), np.where(a == 0, 0, 0.7 * np.outer(back, x)))
    many = jax.vmap(found, (None, 1), 1)(jnp.asarray(a), jnp.stack([b, v], 1))
    close(many, np.linalg.solve(whole, np.stack([b, v], 1)))
