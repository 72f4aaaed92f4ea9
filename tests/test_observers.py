"""What watches the trial steps of a solve: its log, and its progress bar."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import Event, Signal, odeint, solve
from jaxode.stepping import observers


def van_der_pol(y, t, a):
    return {"v": a * (1 - y["x"] ** 2) * y["v"] - y["x"], "x": y["v"]}


Y0 = {"v": 0.0, "x": 2.0}


def logged(rows=500, t=(0.0, 10.0), a=5.0, **options):
    """The trial steps of a solve, as numpy arrays of those that there were; and the solution."""
    options = {"rtol": 1e-5, "atol": 1e-5, **options}
    solution = solve(van_der_pol, Y0, list(t), a, log=rows, **options)
    tried = int(solution.stats.accepted + solution.stats.rejected)
    there = ~np.isnan(solution.log.times)
    assert np.sum(there) == min(rows, tried) and not np.any(solution.log.accepted[~there])
    assert np.all(solution.log.component[~there] == -1)
    return jax.tree.map(lambda x: np.asarray(x)[there], solution.log), solution


@pytest.mark.parametrize("method", ["tsit5", "rodas5p"])
def test_the_accepted_steps_of_a_log_are_those_that_save_steps_keeps(method):
    log, solution = logged(method=method)
    options = dict(rtol=1e-5, atol=1e-5, method=method, save_steps=True)
    kept = solve(van_der_pol, Y0, [0.0, 10.0], 5.0, **options)
    begins = np.asarray(kept.ts)[np.asarray(kept.mask)]
    np.testing.assert_allclose(log.times[log.accepted], begins[:-1], rtol=1e-12)
    np.testing.assert_allclose(log.sizes[log.accepted], np.diff(begins), rtol=1e-9)
    assert np.sum(~log.accepted) == int(solution.stats.rejected) > 0
    np.testing.assert_array_equal(log.accepted, log.ratios <= 1)
    again = np.flatnonzero(~log.accepted[:-1])  # a rejected step begins again where it was, smaller
    np.testing.assert_array_equal(log.times[again], log.times[again + 1])
    assert np.all(log.sizes[again] > log.sizes[again + 1])


def test_a_short_log_holds_the_last_trial_steps_and_time_may_decrease():
    y0 = jax.tree.map(jnp.float32, Y0)
    long, short, vast = (
        solve(van_der_pol, y0, [10.0, 0.0], 0.5, rtol=1e-3, atol=1e-3, log=rows).log
        for rows in (100, 7, 5000)
    )
    n = int(np.sum(~np.isnan(long.times)))
    assert n >= 14
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[n - 7 : n], y), long, short)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[:n], y[:n]), long, vast)
    assert long.times[0] == 10.0 and np.all(long.sizes[:n] < 0)
    assert long.times.dtype == jnp.float32


def test_the_component_is_the_one_with_the_largest_error():
    def func(y, t):
        return {"a": 0 * y["a"], "b": jnp.stack([0 * t, jnp.cos(30 * t), 0 * t])}

    y0 = {"a": jnp.ones((2, 2)), "b": jnp.ones(3)}
    log = solve(func, y0, [0.0, 1.0], log=50).log
    n = int(np.sum(~np.isnan(log.times)))
    assert np.all(log.component[:n] == 5)
    broken = lambda y, t: jnp.stack([1.0 + 0 * t, jnp.where(t > 0.5, jnp.nan, 1.0)])
    failed = solve(broken, jnp.zeros(2), [0.0, 1.0], throw=False, log=1000).log
    last = failed.ratios[~np.isnan(failed.times)][-1]
    assert np.isnan(last) and failed.component[~np.isnan(failed.times)][-1] == 1


def test_the_component_whose_error_inside_of_a_step_decides_is_named():
    """One that fast modes hold to a curve is right at the end of any step, and wrong inside of it."""

    def func(y, t):
        return jnp.stack([-y[0], -1e6 * (y[1] - jnp.sin(3 * t)) + 3 * jnp.cos(3 * t)])

    options = dict(method="rodas5p", rtol=1e-4, atol=1e-4, log=200)
    ends, inside = (
        solve(func, jnp.array([1.0, 0.0]), jnp.linspace(0.0, 3.0, n), **options).log for n in (2, 7)
    )
    last = lambda log: np.asarray(log.component)[np.asarray(log.accepted)][3:-1]
    assert len(last(inside)) > 3 and np.all(last(inside) == 1) and np.all(last(ends) == 0)


def test_lanes_have_logs_of_their_own_and_derivatives_do_not_see_them():
    t, options = jnp.array([0.0, 3.0]), dict(rtol=1e-4, atol=1e-4)
    run = lambda a, **log: solve(van_der_pol, Y0, t, a, **options, **log)
    value = lambda a, **log: run(a, **log).ys["x"][-1]
    rates = jnp.linspace(1.0, 6.0, 12)
    many = jax.vmap(lambda a: run(a, log=80))(rates)
    for i in (0, 7, 11):
        alone = run(rates[i], log=80).log
        np.testing.assert_allclose(many.log.times[i], alone.times, rtol=1e-5)
        np.testing.assert_array_equal(many.log.accepted[i], alone.accepted)
    there = ~np.isnan(many.log.times)
    np.testing.assert_array_equal(np.sum(there, 1), many.stats.accepted + many.stats.rejected)
    gradients = jax.vmap(jax.grad(lambda a: value(a, log=80)))(rates)
    np.testing.assert_array_equal(gradients, jax.vmap(jax.grad(value))(rates))
    zero = jax.grad(lambda a: jnp.nansum(run(a, log=80).log.sizes))(2.0)
    assert zero == 0.0


@pytest.mark.parametrize("adjoint", ["direct", "forward", "backsolve"])
def test_every_adjoint_has_the_same_log(adjoint):
    options = dict(
        t=(0.0, 2.0), rtol=1e-8, atol=1e-8
    )  # accuracy keeps steps far below the stable ones
    (log, _), (same, _) = logged(**options), logged(**options, adjoint=adjoint)
    np.testing.assert_allclose(log.times, same.times, rtol=1e-9)
    if adjoint == "direct":
        equal, _ = logged(t=(0.0, 2.0), adjoint=adjoint, method="rk4", dt=0.125)
        np.testing.assert_allclose(equal.times, np.arange(0, 2, 0.125))
        assert np.all(np.isnan(equal.ratios)) and np.all(equal.component == -1)


def test_a_step_with_an_event_inside_was_not_accepted_and_its_change_has_size_0():
    bounce = Event(lambda y, t, a: y["x"], direction="down")
    log, solution = logged(events=[bounce])
    count = int(solution.events[0].count)
    assert count > 0 and np.sum(log.sizes == 0) == count
    assert np.sum(~log.accepted & (log.ratios <= 1)) >= count
    np.testing.assert_allclose(np.sum(log.sizes[log.accepted]), 10.0)


# The bar.


@pytest.fixture
def moves(monkeypatch):
    found = []
    monkeypatch.setattr(observers.BAR, "move", lambda *args: found.append(tuple(map(int, args))))
    yield found
    jax.effects_barrier()
    jax.clear_caches()


def shown(x, **options):
    t = jnp.array([0.0, 30.0])
    return odeint(van_der_pol, {"v": 0.0, "x": x}, t, 5.0, progress=True, **options)["x"][-1]


@pytest.mark.parametrize("adjoint", ["replay", "direct"])
def test_a_bar_moves_a_hundred_times_at_most_under_jit_and_grad_too(moves, adjoint):
    jax.jit(jax.grad(lambda x: shown(x, adjoint=adjoint)))(2.0).block_until_ready()
    jax.effects_barrier()
    parts, steps, ended = zip(*moves)
    assert 20 < len(parts) <= 100 and list(parts) == sorted(set(parts)) and parts[-1] == 100
    assert list(ended) == [0] * (len(parts) - 1) + [1] and list(steps) == sorted(steps)


@pytest.mark.parametrize("size", [3, 12])
def test_under_vmap_there_is_none_and_a_warning(moves, size):
    with pytest.warns(UserWarning, match="`progress` is off under jax.vmap"):
        jax.vmap(jax.grad(shown))(jnp.linspace(1.0, 2.0, size)).block_until_ready()
    with pytest.warns(UserWarning, match="`progress` is off under jax.vmap"):
        jax.vmap(lambda x: shown(x, adjoint="forward"))(jnp.linspace(1.0, 2.0, size))
    jax.effects_barrier()
    assert not moves


def test_a_solve_that_fails_closes_its_bar(capfd):
    solve(van_der_pol, Y0, [0.0, 30.0], 5.0, progress=True, max_steps=30, throw=False)
    jax.effects_barrier()
    assert observers.BAR.bar is None and "solve: " in capfd.readouterr().err


# At the door.


def test_what_cannot_be_watched_is_refused():
    u = Signal([0.0, 1.0], [0.0, 1.0])
    driven = lambda y, t: u(t)
    for options in ({"log": 10}, {"progress": True}):
        with pytest.raises(ValueError, match="without signals"):
            solve(driven, 0.0, [0.0, 1.0], **options)
    with pytest.raises(TypeError, match="such as log=1000"):
        solve(van_der_pol, Y0, [0.0, 1.0], 1.0, log=True)
    with pytest.raises(ValueError, match="`log` must be a positive integer"):
        solve(van_der_pol, Y0, [0.0, 1.0], 1.0, log=0)
    with pytest.raises(TypeError, match="`progress` must be True or False"):
        solve(van_der_pol, Y0, [0.0, 1.0], 1.0, progress="yes")
    with pytest.raises(TypeError, match="call `solve`"):
        odeint(van_der_pol, Y0, [0.0, 1.0], 1.0, log=10)
