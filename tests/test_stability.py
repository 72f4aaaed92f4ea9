"""Gradients at the stability limit of explicit methods, and where the backward solve of `backsolve` drifts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import Event, Status, odeint, solve
from jaxode.methods import tables
from jaxode.methods.explicit import radius
from jaxode.problems import problems

# dy/dt = k - y^3 settles at y = k^(1/3), where explicit steps grow until they are unstable.
settles = lambda y, t, k: k - y**3
dk = lambda k: k ** (-2 / 3) / 3


def end(k, y0=0.5, t1=100.0, **options):
    k = jnp.asarray(k)
    options = {"rtol": 1e-3, "atol": 1e-3, **options}
    return odeint(settles, jnp.asarray(y0, k.dtype), jnp.array([0.0, t1], k.dtype), k, **options)[
        -1
    ]


@pytest.mark.parametrize("method", ["tsit5", "dop853", "bosh3", "auto"])
def test_a_gradient_at_the_stability_limit(method):
    value, gradient = jax.value_and_grad(end)(jnp.asarray(2.0), method=method)
    np.testing.assert_allclose((value, gradient), (2 ** (1 / 3), dk(2.0)), rtol=2e-3)


def test_the_same_in_float32():
    k = jnp.asarray(2.0, jnp.float32)
    gradient = jax.grad(end)(k, t1=1000.0, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, dk(2.0), rtol=1e-4)


def test_the_same_for_many_in_every_form():
    """By sensitivities and by steps back, of many; by `direct` and `forward`; the second derivative."""
    k = jnp.linspace(1.0, 3.0, 20)
    by_sensitivities = jax.vmap(jax.grad(end))(k)

    def of_ten(k):
        return jnp.sum(end(k, jnp.full(10, 0.5)))

    back = jax.vmap(jax.grad(lambda k, y: jnp.sum(end(k, y)), (0, 1)), (0, None))
    by_steps_back, by_y0 = back(k, jnp.full(10, 0.5))
    np.testing.assert_allclose(by_sensitivities, dk(k), rtol=2e-3)
    np.testing.assert_allclose(by_steps_back, 10 * dk(k), rtol=2e-3)
    assert np.max(np.abs(by_y0)) < 1e-9
    direct = jax.grad(lambda k: end(k, adjoint="direct"))(k[5])
    push = jax.jvp(lambda k: end(k, adjoint="forward"), (k[5],), (1.0,))[1]
    np.testing.assert_allclose((direct, push), dk(k[5]), rtol=2e-3)
    np.testing.assert_allclose(jax.hessian(of_ten)(k[5]), -20 / 9 * k[5] ** (-5 / 3), rtol=1e-2)


def test_modes_that_the_solution_does_not_excite():
    """A start in equilibrium, and a fast mode that is 0: no step of the solution itself knows of them."""
    for method in ("tsit5", "auto"):
        still = jax.grad(end)(2.0, 2 ** (1 / 3), method=method)
        np.testing.assert_allclose(still, dk(2.0), rtol=1e-3)

    def with_fast(y, t):
        return jnp.stack([y[1], -y[0], -1000 * y[2]])

    def total(y):
        return jnp.sum(odeint(with_fast, y, jnp.array([0.0, 3.0]), rtol=1e-6, atol=1e-6)[-1])

    cos, sin = np.cos(3.0), np.sin(3.0)
    gradient = jax.grad(total)(jnp.array([1.0, 0.0, 0.0]))
    np.testing.assert_allclose(gradient, [cos - sin, cos + sin, 0.0], atol=1e-5)


def test_a_start_at_rest():
    """An oscillator, of which no error is seen: steps of tsit5 as long as damped modes allow make the
    gradient 17 times too large at t = 20, and 1e136 times at t = 2,000."""

    def swings(y, t, damping):
        return jnp.stack([y[1], -4 * y[0] - damping * y[1]])

    def last(y, t1, damping, method="tsit5", **options):
        t = jnp.stack([0 * t1, t1])
        return odeint(swings, y, t, damping, method=method, **options)[-1, 0]

    still, short = jnp.zeros(2), jnp.asarray(20.0)
    exact = [np.cos(40.0), np.sin(40.0) / 2]
    np.testing.assert_allclose(jax.grad(last)(still, short, 0.0), exact, atol=0.02)
    assert np.max(np.abs(jax.grad(last)(still, 100 * short, 0.0))) < 2
    np.testing.assert_allclose(jax.grad(last)(still, short, 0.0, "bosh3"), exact, atol=0.25)
    np.testing.assert_allclose(
        jax.grad(last)(still, short, 0.0, adjoint="direct", max_steps=200), exact, atol=0.02
    )
    many = jax.vmap(jax.grad(last), (None, None, 0))(still, short, jnp.array([0.0, 0.2]))
    pace = np.sqrt(4 - 0.01)
    faded = np.exp(-2.0) * (np.cos(20 * pace) + 0.1 * np.sin(20 * pace) / pace)
    np.testing.assert_allclose(many[:, 0], [exact[0], faded], atol=0.02)


def test_what_a_rejected_step_ended_at_has_no_part_in_it():
    """Robertson's problem: the first trial step ends at 1e50, and a direction as long as what is tolerated
    there asked for steps of size 1e-56. The solution is soon at rest, which makes steps a third as long."""
    p = problems["robertson"]
    options = dict(rtol=1e-6, atol=1e-9, max_steps=300, throw=False)
    for method in ("tsit5", "dopri5"):
        plain, steady = (
            solve(p.f, p.y0, [0.0, 40.0], method=method, adjoint=adjoint, **options)
            for adjoint in ("replay", "direct")
        )
        assert (plain.status, steady.status) == (Status.MAX_STEPS, Status.MAX_STEPS)
        assert steady.reached > 0.3 * plain.reached


def test_a_stiff_forced_problem():
    """The published explosion: 190 for 0 with tsit5, 2e10 with dopri5."""

    def forced(y, t):
        return -1000 * (y - jnp.cos(t))

    def last(y, method):
        return odeint(forced, y, jnp.array([0.0, 1.0]), rtol=1e-5, atol=1e-5, method=method)[-1]

    for method in ("tsit5", "dopri5"):
        assert abs(jax.grad(last)(jnp.asarray(0.0), method)) < 1e-6


def test_steps_that_accuracy_chooses_stay_as_they_are():
    """Also where df/dy is far from normal: near the centre of an orbit it stretches by 1,000 and by 1."""

    def orbit(y, t):
        return jnp.concatenate([y[2:], -y[:2] / jnp.sum(y[:2] ** 2) ** 1.5])

    start = jnp.array([0.1, 0.0, 0.0, np.sqrt(19.0)])
    for method, tolerance in (("tsit5", 1e-6), ("dop853", 1e-8)):
        options = dict(method=method, rtol=tolerance, atol=tolerance)
        plain = solve(orbit, start, [0.0, 10.0], **options)
        steady = solve(orbit, start, [0.0, 10.0], adjoint="direct", **options)
        assert plain.stats.accepted == steady.stats.accepted
        np.testing.assert_allclose(plain.ys, steady.ys, rtol=1e-9)


def test_stability_regions():
    """On the negative axis (Hairer and Wanner 1996, fig. IV.2.1), and for an own table."""
    assert 2.2 < radius(tables.bosh3) < 2.52
    assert 3.1 < radius(tables.dopri5) < 3.31
    assert 0.5 < radius(tables.euler) < 2.0
    assert radius(tables.dop853) == tables.dop853.stability


# Backsolve.


def test_backsolve_that_drifts_has_no_gradient():
    """The state that comes back at t0 is another one: NaN, not a number that is wrong."""

    def gradient(k, t1):
        return jax.grad(lambda k: end(k, t1=t1, adjoint="backsolve", rtol=1e-6, atol=1e-6))(k)

    near, far = gradient(2.0, 1.0), gradient(2.0, 3.0)
    exact = jax.grad(lambda k: end(k, t1=1.0, rtol=1e-9, atol=1e-9))(2.0)
    np.testing.assert_allclose(near, exact, rtol=1e-4)
    assert np.isnan(far)
    spans = jnp.array([0.5, 1.0, 3.0, 5.0])
    many = jax.vmap(gradient, (None, 0))(2.0, spans)
    np.testing.assert_array_equal(np.isnan(many), [False, False, True, True])
    np.testing.assert_allclose(many[1], exact, rtol=1e-4)


def test_backsolve_is_never_far_off():
    """Lorenz's equations, where backwards errors grow by e^14 in a unit of time: right, or NaN."""

    def lorenz(y, t, s):
        return jnp.stack([s * (y[1] - y[0]), y[0] * (28 - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]])

    @jax.jit
    def gradients(t1, tolerance):
        def total(s, adjoint, tolerance):
            options = dict(rtol=tolerance, atol=tolerance, adjoint=adjoint)
            return jnp.sum(odeint(lorenz, jnp.ones(3), jnp.stack([0.0, t1]), s, **options)[-1])

        both = jax.grad(total)(10.0, "backsolve", tolerance), jax.grad(total)(10.0, "replay", 1e-9)
        return jnp.stack(both)

    found = np.array([
        gradients(t1, 10.0**-p) for t1 in (0.3, 0.7, 1.0, 1.5, 2.0) for p in (4, 5, 6, 7)
    ])  # fmt: skip
    said = np.isfinite(found[:, 0])
    assert 3 < np.sum(said) < len(said) - 3
    off = np.abs(found[said, 0] - found[said, 1]) / (0.1 + np.abs(found[said, 1]))
    assert np.max(off) < 0.06


def branching(y, t, speed):
    """A species that is gone at once, into two others, in parts that depend on them."""
    gone, a, b = y
    part = 0.6 + 0.1 * (a - 0.5)
    return jnp.stack(
        [-speed * gone, part * speed * gone - a + b, (1 - part) * speed * gone + a - b]
    )


def after_start(more, speed, **options):
    y0, t = jnp.array([0.0, 0.6, 0.4]).at[0].add(more), jnp.array([0.0, 1.0])
    return solve(branching, y0, t, speed, rtol=1e-4, atol=1e-4, **options).ys[-1, 1]


def after_dose(more, speed, **options):
    dose = Event(times=[0.5], change=lambda y, t, _: y.at[0].add(more))
    y0, t = jnp.array([0.0, 0.6, 0.4]), jnp.array([0.0, 1.5])
    options = dict(rtol=1e-4, atol=1e-4, events=[dose]) | options
    return solve(branching, y0, t, speed, **options).ys[-1, 1]


@pytest.mark.parametrize(
    ("last", "method"),
    [
        (after_start, "rodas5p"),
        (after_start, "kvaerno5"),
        (after_start, "auto"),
        (after_dose, "rodas5p"),
    ],
)
def test_what_is_given_to_a_mode_that_is_gone_at_once(last, method):
    """Long steps right after it made of derivatives 1e4 for 0.5, where values were right."""
    options = dict(method=method, max_steps=200)
    low, high = (last(more, 1e9, **options) for more in (-0.01, 0.01))
    exact = (high - low) / 0.02
    slope = jax.grad(lambda more, speed: last(more, speed, **options))
    np.testing.assert_allclose(jax.jit(slope)(0.0, 1e9), exact, rtol=3e-3)
    many = jax.jit(jax.vmap(slope))(jnp.zeros(2), jnp.array([1e9, 1e6]))
    np.testing.assert_allclose(many, exact, rtol=3e-3)
