"""Dense output, functions of the state, and every step: what a solve can be asked to keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from jaxode import Event, Signal, odeint, solve

RATES = jnp.array([0.5, 1.5])


def decay(y, t, rates):
    return -rates * y


def exact(t, y0, rates):
    return np.asarray(y0) * np.exp(-np.asarray(t)[..., None] * np.asarray(rates))


def swing(y, t):
    return jnp.stack([y[1], -jnp.sin(y[0])])


# Dense output.


@pytest.mark.parametrize("ends", [(0.0, 2.0), (2.0, 0.0)], ids=["forwards", "backwards"])
def test_dense_output_is_the_solution_at_times_of_any_shape(dtype, ends):
    y0, rates = jnp.array([1.0, 2.0], dtype), RATES.astype(dtype)
    start = jnp.asarray(exact(ends[0], y0, rates), dtype)
    sol = solve(decay, start, ends, rates, dense=True, max_steps=100)
    t = np.linspace(0.0, 2.0, 6).reshape(2, 3)
    close = 1e-6 if dtype == "float64" else 1e-4
    np.testing.assert_allclose(sol.dense(t), exact(t, y0, rates), rtol=close)
    slopes = -np.asarray(rates) * exact(t, y0, rates)
    np.testing.assert_allclose(sol.dense.derivative(t), slopes, rtol=100 * close)
    np.testing.assert_array_equal(sol.dense(np.array(ends)), sol.ys)
    assert sol.dense(1.0).dtype == dtype


def test_dense_output_agrees_with_that_of_scipy():
    y0 = np.array([1.0, 0.0])
    peer = solve_ivp(
        lambda t, y: [y[1], -np.sin(y[0])], (0, 9), y0, "DOP853",
        rtol=1e-11, atol=1e-11, dense_output=True,
    )  # fmt: skip
    sol = solve(
        swing, y0, [0.0, 9.0], method="dop853", rtol=1e-10, atol=1e-10, dense=True, max_steps=200
    )
    t = np.linspace(0.0, 9.0, 57)
    np.testing.assert_allclose(sol.dense(t), peer.sol(t).T, atol=1e-7)


def test_dense_output_outside_of_its_interval_is_an_error_or_nan():
    dense = solve(decay, jnp.ones(2), [0.0, 1.0], RATES, dense=True, max_steps=50).dense
    for t in (-1e-9, np.array([0.5, 1.0 + 1e-9])):
        with pytest.raises(ValueError, match=r"outside of 0\.0 to 1\.0"):
            dense(t)
    found = jax.jit(lambda dense, t: dense(t))(dense, jnp.array([-1e-9, 0.0, 1.0, 1.1]))
    np.testing.assert_array_equal(np.isnan(found[:, 0]), [True, False, False, True])


@pytest.mark.parametrize("adjoint", ["replay", "direct"])
def test_dense_output_is_differentiated_in_the_time_the_start_and_the_arguments(adjoint):
    def value(y0, rates, t):
        options = dict(dense=True, adjoint=adjoint, max_steps=64, rtol=1e-9, atol=1e-9)
        return solve(decay, y0, jnp.array([0.0, 2.0]), rates, **options).dense(t)[1]

    y0, slopes = jnp.array([1.0, 2.0]), jax.jit(jax.grad(value, (0, 1, 2)))
    for t in (0.7, 2.0):
        y0_bar, rates_bar, t_bar = slopes(y0, RATES, jnp.array(t))
        y = exact(t, y0, RATES)[1]
        np.testing.assert_allclose(y0_bar[1], y / 2, rtol=1e-6)
        np.testing.assert_allclose(rates_bar[1], -t * y, rtol=1e-6)
        np.testing.assert_allclose(t_bar, -1.5 * y, rtol=1e-5)


@pytest.mark.parametrize("asked", ["value", "slope"])
def test_dense_output_of_a_failed_solve_that_a_loss_leaves_out_spoils_no_gradient(asked):
    def loss(rate, t, y0):
        options = dict(dense=True, max_steps=60, throw=False)
        sol = solve(lambda y, t, rate: rate * jnp.log(y), y0, [0.0, 1.0], rate, **options)
        found = sol.dense(t) if asked == "value" else sol.dense.derivative(t)
        return jnp.where(sol.status == 0, found, 0.0)

    slopes = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2)), (None, None, 0)))
    found = np.stack(
        slopes(1.0, 0.5, jnp.array([2.0, -1.0, 3.0])), 1
    )  # -1 is outside of the domain
    assert np.all(np.isfinite(found)) and np.all(found[[0, 2]] != 0)
    np.testing.assert_array_equal(found[1], 0)


def test_many_dense_outputs_are_one_pytree_and_differentiated():
    y0 = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 0.5]])

    def dense(y0, rates):
        return solve(decay, y0, [0.0, 2.0], rates, dense=True, max_steps=64).dense

    many = jax.jit(jax.vmap(dense, (0, None)))(y0, RATES)
    with pytest.raises(ValueError, match=r"jax\.vmap"):
        many(1.0)
    found = jax.vmap(lambda dense: dense(1.0))(many)
    np.testing.assert_allclose(found, exact(1.0, y0, RATES), rtol=1e-6)
    total = lambda rates: jnp.sum(jax.vmap(lambda y0: dense(y0, rates)(1.0))(y0))
    np.testing.assert_allclose(jax.grad(total)(RATES), -np.sum(found, 0), rtol=1e-6)


# A function of the state.


def observed(y, t, rates, weights):
    return {"sum": jnp.sum(weights * y), "time": t * rates[0]}


@pytest.mark.parametrize("adjoint", ["replay", "direct", "backsolve", "forward"])
def test_a_saved_function_and_its_gradients_are_those_of_the_closed_form(adjoint):
    y0, weights, t = jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]), jnp.array([0.0, 0.5, 1.5])
    func = lambda y, t, rates, weights: -rates * y

    def loss(y0, rates, weights, t):
        ys = solve(func, y0, t, rates, weights, save=observed, adjoint=adjoint, max_steps=64).ys
        return jnp.sum(ys["sum"] ** 2 + ys["time"])

    def closed(y0, rates, weights, t):
        y = y0[None] * jnp.exp(-(t - t[0])[:, None] * rates[None])
        return jnp.sum((y @ weights) ** 2 + t * rates[0])

    args = y0, RATES, weights, t
    if adjoint == "forward":
        found, expected = (jax.jvp(fn, args, args) for fn in (loss, closed))
    else:
        found, expected = (jax.grad(fn, (0, 1, 2, 3))(*args) for fn in (loss, closed))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


@pytest.mark.parametrize("adjoint", ["replay", "backsolve"])
def test_many_saved_functions_share_their_weights(adjoint):
    y0, t = jnp.array([[1.0, 2.0], [2.0, 1.0], [0.5, 3.0]]), jnp.array([0.0, 0.5, 1.5])

    def loss(weights, rates):
        save = lambda y, t, rates: jnp.tanh(weights @ y)
        one = lambda y0, r: solve(decay, y0, t, r, save=save, adjoint=adjoint, max_steps=64).ys
        return jnp.sum(jax.vmap(one)(y0, rates))

    def closed(weights, rates):
        ys = y0[:, None] * jnp.exp(-t[None, :, None] * rates[:, None])
        return jnp.sum(jnp.tanh(ys @ weights.T))

    args = jnp.array([[1.0, 2.0], [0.3, -0.2]]), jnp.array([[0.5, 1.5], [1.0, 1.0], [0.2, 0.4]])
    found, expected = (jax.grad(fn, (0, 1))(*args) for fn in (loss, closed))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, expected
    )


def test_a_saved_function_of_a_solve_with_a_signal_is_that_of_its_states():
    u, t = Signal([0.0, 1.0, 2.0], [0.0, 1.0, 0.0], "previous"), [0.0, 0.5, 1.5, 2.0]
    ys = odeint(lambda y, t: u(t), jnp.zeros(()), t, save=lambda y, t: 2 * y + t)
    np.testing.assert_allclose(ys, [0.0, 0.5, 2.5, 4.0], atol=1e-6)


# Every step.


def test_every_step_is_given_with_a_mask_and_differentiated(dtype):
    y0, rates = jnp.array([1.0, 2.0], dtype), RATES.astype(dtype)
    run = lambda rates, **more: solve(
        decay, y0, [0.0, 2.0], rates, save_steps=True, max_steps=64, **more
    )
    sol = run(rates)
    count = int(sol.stats.accepted) + 1
    assert sol.ts.shape == sol.mask.shape == (65,) and int(np.sum(sol.mask)) == count
    assert sol.ts[0] == 0 and sol.ts[count - 1] == 2 and np.all(np.diff(sol.ts[:count]) > 0)
    assert np.all(np.isnan(sol.ys[count:])) and np.all(np.isnan(sol.ts[count:]))
    np.testing.assert_allclose(sol.ys[:count], exact(sol.ts[:count], y0, rates), rtol=1e-4)
    means = run(rates, save=lambda y, t, rates: jnp.mean(y)).ys
    np.testing.assert_allclose(means[:count], np.mean(sol.ys[:count], 1), rtol=1e-6)

    def total(rates):
        sol = run(rates)
        return jnp.sum(jnp.where(sol.mask[:, None], sol.ys, 0))

    expected = -np.sum(np.asarray(sol.ts)[:count, None] * np.asarray(sol.ys[:count]), 0)
    np.testing.assert_allclose(jax.jit(jax.grad(total))(rates), expected, rtol=1e-3)


# At the door.


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(dense=True, save_steps=True), ValueError, "same steps"),
        (dict(dense=True, save=lambda y, t, r: y), ValueError, "leave it out"),
        (dict(dense=1), TypeError, "`dense` must be True or False"),
        (dict(dense=True, adjoint="backsolve"), ValueError, "adjoint='replay'"),
        (dict(save_steps=True, adjoint="backsolve"), ValueError, "adjoint='replay'"),
        (dict(save=lambda y, t, r: None), TypeError, "`save` must return an array"),
        (
            dict(save=lambda y, t, r: {"a": "mean"}),
            TypeError,
            r"\['a'\] must be an array of numbers",
        ),
        (dict(save="mean"), TypeError, "`save` must be a function"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_what_to_do(options, error, message):
    with pytest.raises(error, match=message):
        solve(decay, jnp.ones(2), [0.0, 1.0], RATES, **options)


def test_steps_are_kept_between_two_times_and_by_solve_alone():
    with pytest.raises(ValueError, match=r"t=\[t0, t1\]"):
        solve(decay, jnp.ones(2), [0.0, 1.0, 2.0], RATES, save_steps=True)
    with pytest.raises(TypeError, match="call `solve`"):
        odeint(decay, jnp.ones(2), [0.0, 1.0], RATES, dense=True)


@pytest.mark.parametrize("kind", ["condition", "time"])
def test_dense_output_at_the_start_moves_with_its_time_also_where_there_are_events(kind):
    happens = dict(condition=lambda y, t: y - 0.5) if kind == "condition" else dict(times=[0.5])
    event = Event(**happens, change=lambda y, t: 2 * y)

    def there(t):
        return solve(lambda y, t: -y, 1.0, [0.0, 1.0], events=[event], dense=True).dense(t)

    assert jax.jit(jax.grad(there))(0.0) == pytest.approx(-1.0, rel=1e-6)
