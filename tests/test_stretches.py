"""Backsolve goes back through events, stretch by stretch: its gradients against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import Event, Status, solve

backsolved = dict(adjoint="backsolve", rtol=1e-10, atol=1e-10)


def bounced(height, g, restitution, count, t1, **options):
    """The times and the speeds of the first bounces of a ball that is dropped."""
    floor = Event(
        lambda y, t, g, r: y[0], direction="down", keep=count,
        change=lambda y, t, g, r: y * jnp.stack([jnp.ones_like(r), -r]),
    )  # fmt: skip
    fall = lambda y, t, g, r: jnp.stack([y[1], -g])
    y0 = jnp.stack([height, 0 * height])
    t = np.array([0.0, t1], y0.dtype)
    sol = solve(fall, y0, t, g, restitution, events=[floor], **{**backsolved, **options})
    return sol.events[0].times, sol.events[0].states[:, 1]


def test_ten_bounces_have_the_derivatives_of_the_closed_form():
    h, g, r, n = 1.3, 9.81, 0.9, np.arange(10)
    of = lambda *given: bounced(*given, count=10, t1=6.4)
    by_height, by_g, by_r = (
        [of[i] for of in jax.jacrev(of, (0, 1, 2))(*map(jnp.asarray, (h, g, r)))] for i in range(3)
    )
    first = np.sqrt(2 * h / g)
    time = first * np.array([1 + 2 * np.sum(r ** np.arange(1, i + 1)) for i in n])
    speed = -np.sqrt(2 * g * h) * r**n
    time_by_r = first * np.array([2 * np.sum(n[1 : i + 1] * r ** n[:i]) for i in n])

    def close(found, *exact):
        for a, b in zip(found, exact):
            np.testing.assert_allclose(a, b, rtol=1e-6)

    close(by_height, time / (2 * h), speed / (2 * h))
    close(by_g, -time / (2 * g), speed / (2 * g))
    close(by_r, time_by_r, speed * n / r)


def test_float32_has_them_too():
    of = lambda h: bounced(
        h, np.float32(9.81), np.float32(0.9), 3, 2.1, rtol=None, atol=None, throw=False
    )[0][2]
    value, slope = jax.value_and_grad(of)(jnp.float32(1.0))
    np.testing.assert_allclose(slope, value / 2, rtol=1e-4)


@pytest.mark.parametrize("steps", [{}, {"method": "rk4", "dt": 0.1}])
def test_doses_have_derivatives_in_times_and_amounts_with_outputs_at_them(steps):
    """Elimination at a rate k: every dose decays by itself; an output at its time is before it."""
    ts = np.array([0.0, 3.0, 8.0, 8.0, 20.0])
    weights = np.array([0.0, 3.0, -2.0, 1.0, 5.0])

    def of(times, amounts, k):
        dose = Event(times=times, values=amounts, change=lambda y, t, mg, k: y + mg)
        sol = solve(lambda y, t, k: -k * y, 0.0, ts, k, events=[dose], **backsolved, **steps)
        return jnp.sum(weights * sol.ys) + sol.events[0].states[2]

    def exact(times, amounts, k):
        since = ts[:, None] - times[None]
        there = jnp.where(since > 0, jnp.exp(-k * since), 0)
        before = jnp.sum((amounts * jnp.exp(-k * (times[2] - times)))[:2])
        return weights @ (there @ amounts) + before

    given = jnp.array([0.0, 8.0, 16.0]), jnp.array([10.0, 5.0, 2.0]), 0.2
    found, wanted = jax.grad(of, (0, 1, 2))(*given), jax.grad(exact, (0, 1, 2))(*given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), found, wanted)


def test_a_batch_ends_each_at_its_own_time_or_not_at_all():
    """y = y0 exp(-k t) falls to 1/2 at log(2 y0) / k; one does not within the time, and one fails."""
    y0, ts = np.linspace(0.6, 3.0, 10), np.array([0.0, 0.1, 0.5, 2.0])
    stop = Event(lambda y, t, k: y - 0.5, terminal=True)
    rate = lambda y, t, k: jnp.where(y < 100, -k * y, jnp.nan)

    def of(y0, k):
        sol = solve(rate, y0, ts, k, events=[stop], throw=False, **backsolved)
        time = jnp.where(sol.status == Status.EVENT, sol.events[0].times[0], 0)
        there = jnp.sum(jnp.where(jnp.isfinite(sol.ys), sol.ys, 0))
        return jnp.where(sol.status <= Status.EVENT, there + time, 0)

    def exact(y0, k):
        time = jnp.log(2 * y0) / k
        there = jnp.where(ts <= time, y0 * jnp.exp(-k * ts), 0)
        return jnp.where(y0 < 100, jnp.sum(there) + jnp.where(time < 2, time, 0), 0)

    y0 = np.array([*y0, 1000.0])
    grads = lambda fn: jax.grad(lambda y0, k: jnp.sum(jax.vmap(fn, (0, None))(y0, k)), (0, 1))
    found, wanted = grads(of)(y0, 0.9), grads(exact)(y0, 0.9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, wanted)


def test_two_at_the_same_time_while_time_decreases():
    """y' = -y from t = 1 to 0; at one time it is added to, and then doubled."""

    def of(y, amount, time):
        add = Event(times=time[None], change=lambda y, t, amount: y + amount)
        double = Event(times=time[None], change=lambda y, t, amount: 2 * y)
        events = [add, double]
        sol = solve(lambda y, t, a: -y, y, [1.0, 0.0], amount, events=events, **backsolved)
        return sol.ys[-1]

    exact = lambda y, amount, time: 2 * (y * jnp.e + amount * jnp.exp(time))
    given = tuple(map(jnp.asarray, (1.0, 0.7, 0.4)))
    found, wanted = (jax.grad(fn, (0, 1, 2))(*given) for fn in (of, exact))
    np.testing.assert_allclose(found, wanted, rtol=1e-7)


def test_more_events_than_are_kept_have_no_derivative():
    tick = Event(lambda y, t: jnp.sin(jnp.pi * t), change=lambda y, t: 2 * y, keep=3)

    def of(y, t1):
        t, events = jnp.stack([0 * t1, t1]), [tick, Event(times=[0.5], keep=1)]
        return solve(lambda y, t: -y, y, t, events=events, hmax=0.3, **backsolved).ys[-1]

    found = [jax.grad(of)(1.0, jnp.asarray(t1)) for t1 in (3.5, 4.5)]
    np.testing.assert_allclose(found, [8 * np.exp(-3.5), np.nan], rtol=1e-7)
