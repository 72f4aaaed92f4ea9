"""A family of methods from outside of the package, with every adjoint, output, batch and failure rule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import Status, odeint, solve
from jaxode.methods import Method, Step, methods, named
from jaxode.methods.explicit import Tableau


@dataclasses.dataclass(frozen=True)
class StepDoubling(Method):
    """Any method with a step, twice with half the size and once with all of it: the difference is the error."""

    inner: Tableau
    order: int
    error_order: int
    any_state = True

    def start(self, f, s, y):
        return self.inner.start(f, s, y)

    def step(self, f, s, y, memory, h):
        whole = self.inner.step(f, s, y, memory, h)
        first = self.inner.step(f, s, y, memory, h / 2)
        second = self.inner.step(f, s + h / 2, first.y, first.memory, h / 2)
        error = jax.tree.map(lambda a, b: a - b, second.y, whole.y)
        counts = 3 * (len(self.inner.c) - 1)
        return Step(
            second.y, second.memory, second.slope, [error], (memory, second.y), evaluations=counts
        )

    def inside(self, f, s, y, h, step):
        k0, y1 = step.stages
        scaled = lambda k: jax.tree.map(lambda k: h.astype(k.dtype) * k, k)
        first, last = scaled(k0), scaled(step.slope)
        moved = jax.tree.map(lambda a, b: a - b, y1, y)
        third = jax.tree.map(lambda a, b, d: a + b - 2 * d, first, last, moved)
        second = jax.tree.map(lambda d, a, t: d - a - t, moved, first, third)
        return [first, second, third]


@dataclasses.dataclass(frozen=True)
class ExponentialEuler(Method):
    """y' = -rate y + g(y, t) with the linear part solved exactly: order 1, with a trapezoidal estimate.

    The memory is the derivative, as in a table; f knows the whole right-hand side.
    """

    rate: float
    order: int = 1
    error_order: int = 1
    estimate_sees_end = True

    def start(self, f, s, y):
        return f(y, s)

    def step(self, f, s, y, memory, h):
        # phi(z) = (exp(-z) - 1) / -z, with h = 0 the identity.
        z = self.rate * h
        phi = jnp.where(z == 0, 1.0, -jnp.expm1(-z) / jnp.where(z == 0, 1.0, z))
        y1 = jax.tree.map(lambda y, k: y + (h * phi).astype(y.dtype) * k, y, memory)
        k1 = f(y1, s + h)
        error = jax.tree.map(lambda a, b: (h / 2).astype(a.dtype) * (b - a), memory, k1)
        return Step(y1, k1, k1, [error], memory, evaluations=1)

    def inside(self, f, s, y, h, step):
        return [jax.tree.map(lambda a, b: a - b, step.y, y)]


DOUBLED = StepDoubling(named("rk4"), 4, 4)
METHODS = {"step doubling": DOUBLED, "exponential Euler": ExponentialEuler(2.0)}
METHOD = pytest.mark.parametrize("name", METHODS)
TS = jnp.array([0.0, 0.3, 0.9, 1.5])


def field(y, t, p):
    return -p * y + jnp.sin(t).astype(y.dtype)


def exact(t, y0, p):
    """Of y' = -p y + sin t."""
    part = lambda t: (p * np.sin(t) - np.cos(t)) / (1 + p**2)
    return part(t) + np.exp(-p * t) * (y0 - part(0.0))


def options(name, **more):
    tolerance = 1e-9 if name == "step doubling" else 1e-4
    return dict(method=METHODS[name], rtol=tolerance, atol=tolerance, **more)


@METHOD
def test_a_method_from_outside_solves_alone_and_in_a_batch(name):
    ps = jnp.array([0.5, 1.0, 2.0])
    one = lambda p: odeint(field, jnp.array([1.0, -1.0]), TS, p, **options(name))
    error = 1e-7 if name == "step doubling" else 2e-2
    for p, rows in zip(ps, jax.vmap(one)(ps)):
        expected = np.stack([exact(np.asarray(TS), y0, float(p)) for y0 in (1.0, -1.0)], 1)
        np.testing.assert_allclose(rows, expected, atol=error)
        np.testing.assert_allclose(rows, one(p), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name, adjoint",
    [
        ("step doubling", "replay"),
        *(("exponential Euler", a) for a in ("replay", "backsolve", "direct", "forward")),
    ],
)
def test_every_adjoint_differentiates_it(name, adjoint):
    def loss(y0, p, ts):
        # Steps of equal size: so that a difference does not see another choice of steps.
        ys = odeint(field, y0, ts, p, method=METHODS[name], dt=0.01, adjoint=adjoint)
        value = jnp.sum(ys * jnp.arange(1.0, 5.0)[:, None])
        return value, value

    args = jnp.array([1.0, -1.0]), jnp.array(0.7), TS + jnp.array([0.0, 0.0, 0.0, -0.003])
    derivative = jax.jacfwd if adjoint == "forward" else jax.grad
    derivative = derivative(loss, (0, 1, 2), has_aux=True)
    run = jax.jit(derivative)
    found, _ = run(*args)
    batch, _ = jax.vmap(derivative, (0, None, None))(jnp.stack([args[0]] * 9), *args[1:])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[3], b, rtol=1e-9, atol=1e-11), batch, found
    )
    for i, x in enumerate(args):
        direction = jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
        moved = [run(*args[:i], x + e * direction, *args[i + 1 :])[1] for e in (1e-6, -1e-6)]
        slope = jnp.vdot(found[i], direction)
        tolerance = 2e-2 if adjoint == "backsolve" else 1e-5
        np.testing.assert_allclose(
            slope, (moved[0] - moved[1]) / 2e-6, rtol=tolerance, atol=tolerance
        )


@METHOD
def test_its_failures_are_those_of_any_method(name):
    explode = lambda y, t: y**2
    found = solve(explode, 1.0, [0.0, 0.5, 2.0], throw=False, **options(name, max_steps=20_000))
    assert Status(int(found.status)) in (Status.DT_TOO_SMALL, Status.NON_FINITE, Status.MAX_STEPS)
    assert np.isfinite(found.ys[1]) and np.isnan(found.ys[2])
    batch = jax.vmap(lambda y: solve(explode, y, [0.0, 0.5], **options(name)))(
        jnp.array([0.1, 5.0])
    )
    assert int(batch.status[0]) == 0 and int(batch.status[1]) != 0
    gradient = jax.grad(
        lambda y: odeint(explode, y, [0.0, 2.0], **options(name, max_steps=500))[-1]
    )
    assert np.isnan(jax.jit(gradient)(1.0))


def test_a_step_of_size_zero_is_the_identity():
    y, s = jnp.array([1.0, 2.0]), jnp.zeros(())
    f = lambda y, s: -y
    for method in (*methods.values(), *METHODS.values()):
        if method.order and not hasattr(method, "drift"):
            step = method.step(f, s, y, method.start(f, s, y), 0 * s)
            np.testing.assert_array_equal(step.y, y)


def test_names_answer_and_a_method_that_is_none_is_refused():
    assert named("tsit5") is methods["tsit5"] and named(DOUBLED) is DOUBLED
    with pytest.raises(TypeError, match="Method"):
        named(3)


class Implicit(ExponentialEuler):
    """The same, said to solve equations; it does not know how fast the modes of a field are."""

    implicit = True


def test_an_implicit_method_from_outside_is_differentiated():
    given = dict(rtol=1e-4, atol=1e-4)
    last = lambda p, method: odeint(field, jnp.ones(2), TS, p, method=method, **given)[-1].sum()
    slopes = [jax.grad(last)(0.7, method) for method in (ExponentialEuler(2.0), Implicit(2.0))]
    np.testing.assert_allclose(slopes[1], slopes[0], rtol=1e-12)
