"""What the two calls promise beyond `jax.experimental.ode`: times, tolerances, pytrees, results."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxode
from jaxode import Status, odeint, pid, solve
from jaxode.methods import tableau
from jaxode.methods.tables import methods


def decay(y, t, rate=1.0):
    return jax.tree.map(lambda y: -rate * y, y)


def turning(y, t):
    """Forced by time: y = (cos t, sin t) + ... is never needed, only its smoothness."""
    return jnp.stack([-y[1], y[0] + jnp.cos(t).astype(y.dtype)])


start = np.array([1.0, 0.5])


def test_decreasing_time_undoes_increasing_time(dtype):
    y0 = jnp.asarray(start, dtype)
    there = odeint(turning, y0, [0.0, 1.0, 2.0])
    back = odeint(turning, there[-1], [2.0, 1.0, 0.0])
    tolerance = 1e-5 if dtype == "float32" else 7e-7
    np.testing.assert_allclose(back[::-1], there, rtol=tolerance, atol=tolerance)


def test_a_mirrored_problem_takes_the_very_same_steps():
    forward = odeint(lambda y, t: turning(y, t), jnp.asarray(start), [0.0, 1.0, 2.0])
    mirrored = odeint(lambda y, t: -turning(y, -t), jnp.asarray(start), [0.0, -1.0, -2.0])
    np.testing.assert_array_equal(forward, mirrored)


@pytest.mark.parametrize(
    "t", [[0, 0, 1], [0, 0.5, 0.5, 1], [0, 1, 1], [0, 0, 0], [0.0], [0, 1, 1, 1], [1, 1, 0, 0]]
)
def test_times_may_repeat_in_value_and_gradient(t):
    t = jnp.array(t, jnp.float64)
    weights = jnp.arange(1.0, len(t) + 1)

    def loss(y0, t):
        return jnp.sum(weights * odeint(decay, y0, t))

    def exact(y0, t):
        return jnp.sum(weights * y0 * jnp.exp(t[0] - t))

    values, grads = jax.value_and_grad(loss, (0, 1))(2.0, t)
    expected, expected_grads = jax.value_and_grad(exact, (0, 1))(2.0, t)
    np.testing.assert_allclose(values, expected, rtol=1e-7)
    for got, want in zip(grads, expected_grads):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_no_times_give_no_rows():
    assert odeint(decay, jnp.ones(3), jnp.zeros(0)).shape == (0, 3)


def test_tolerances_may_be_numbers_arrays_and_pytrees():
    y0 = {"a": jnp.ones(3), "b": jnp.ones(())}
    exact = np.exp(-1)
    for rtol in (1e-9, {"a": jnp.array([1e-9, 1e-10, 1e-9]), "b": 1e-9}, {"a": 1e-9, "b": 1e-9}):
        ys = odeint(decay, y0, [0.0, 1.0], rtol=rtol, atol=1e-10)
        np.testing.assert_allclose(ys["a"][-1], np.full(3, exact), rtol=1e-8)


def test_a_tighter_tolerance_gives_a_smaller_error_and_more_evaluations():
    errors, counts = [], []
    for tolerance in (1e-4, 1e-7, 1e-10):
        sol = solve(decay, jnp.array(1.0), [0.0, 3.0], rtol=tolerance, atol=tolerance)
        errors.append(abs(float(sol.ys[-1]) - np.exp(-3)))
        counts.append(int(sol.stats.evaluations))
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert counts[0] < counts[1] < counts[2]


def test_sweeping_tolerances_and_limits_does_not_compile_again():
    traced = []

    @jax.jit
    def f(y0, rtol, hmax, mxstep):
        traced.append(1)
        return odeint(decay, y0, [0.0, 1.0, 2.0], rtol=rtol, atol=rtol, hmax=hmax, mxstep=mxstep)

    for rtol in (1e-3, 1e-5, 1e-7):
        np.testing.assert_allclose(f(1.0, rtol, 0.1 + rtol, 500.0)[-1], np.exp(-2), rtol=1e-2)
    assert len(traced) == 1


def compilations():
    return jaxode.solve.__globals__["compiled"]._cache_size()


def test_a_new_lambda_and_new_values_do_not_compile_again():
    def run(rate, y0, rtol):
        return odeint(lambda y, t, rate: -rate * y, y0, [0.0, 1.0], rate, rtol=rtol)

    run(1.0, jnp.ones(2), 1e-5)
    before = compilations()
    run(2.0, 3 * jnp.ones(2), 1e-6)
    assert compilations() == before


def test_a_rebuilt_equal_module_does_not_compile_again():
    def f(y, t, mlp):
        return mlp(y)

    def run(seed):
        mlp = eqx.nn.MLP(2, 2, 8, 1, key=jax.random.key(seed))
        return odeint(f, jnp.ones(2), [0.0, 1.0], mlp)

    run(0)
    before = compilations()
    assert not np.allclose(run(0), run(1))
    assert compilations() == before


def test_a_function_that_reads_a_changed_variable_is_not_mistaken_for_what_it_was():
    rate = 1.0
    f = lambda y, t: -rate * y
    first = odeint(f, 1.0, [0.0, 1.0])
    rate = 2.0
    second = odeint(f, 1.0, [0.0, 1.0])
    np.testing.assert_allclose([first[-1], second[-1]], np.exp([-1, -2]), rtol=1e-6)


def test_func_is_traced_once_gradient_included():
    calls = []

    def f(y, t):
        calls.append(1)
        return -y

    jax.jit(jax.grad(lambda y0: odeint(f, y0, [0.0, 1.0, 2.0]).sum()))(1.0)
    assert len(calls) == 1


class Gated(eqx.Module):
    """A module with leaves of every kind."""

    weight: jax.Array
    flip: jax.Array
    order: jax.Array
    key: jax.Array
    activation: object
    power: int

    def __call__(self, y, t, scale, name):
        assert name == "a name" and isinstance(self.power, int)
        noise = jax.random.normal(self.key, y.shape, y.dtype)
        y = jnp.where(self.flip, -y, y)[self.order] ** self.power + 0 * noise
        return self.activation(scale * self.weight * y)


def test_leaves_of_every_kind_reach_func_and_floats_get_gradients(dtype):
    module = Gated(
        weight=jnp.ones(2, dtype),
        flip=jnp.array([True, False]),
        order=jnp.array([1, 0]),
        key=jax.random.key(0),
        activation=jnp.tanh,
        power=1,
    )

    def loss(weight, scale):
        moved = eqx.tree_at(lambda m: m.weight, module, weight)
        return odeint(moved, jnp.ones(2, dtype), [0.0, 1.0], scale, "a name")[-1].sum()

    got = jax.grad(loss, (0, 1))(jnp.ones(2, dtype), jnp.asarray(0.5, dtype))
    step = 1e-2 if dtype == "float32" else 1e-5
    scale = jnp.asarray(0.5, dtype)
    ones = jnp.ones(2, dtype)
    difference = (loss(ones, scale + step) - loss(ones, scale - step)) / (2 * step)
    np.testing.assert_allclose(got[1], difference, rtol=1e-2 if dtype == "float32" else 1e-5)
    assert got[0].shape == (2,) and bool(jnp.all(got[0] != 0))


def test_a_module_is_a_func_with_gradients_for_its_weights():
    mlp = eqx.nn.MLP(3, 2, 8, 1, key=jax.random.key(0))
    call = lambda mlp: lambda y, t: mlp(jnp.append(y, t))
    loss = lambda mlp: odeint(call(mlp), jnp.ones(2), [0.0, 1.0])[-1].sum()
    grads = eqx.filter_grad(loss)(mlp)
    assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", methods)
def test_every_method_is_accurate_inside_and_at_the_end(name, dtype):
    t = np.linspace(0, 1, 5)
    y0 = jnp.asarray(start, dtype)
    exact = odeint(turning, jnp.asarray(start), t, rtol=1e-12, atol=1e-12, method="dop853")
    ys = odeint(turning, y0, t, method=name, dt=1 / 64)
    bound = {1: 0.05, 2: 1e-3}.get(methods[name].order, 1e-5)
    np.testing.assert_allclose(ys, exact, atol=max(bound, 1e-5 if dtype == "float32" else 0))
    assert ys.dtype == dtype
    if methods[name].e and dtype == "float64":
        sol = solve(turning, y0, t, method=name, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(sol.ys, exact, atol=3e-3)


def test_a_table_of_ones_own_is_a_method():
    heun = tableau(2, c=[0, 1], a=[[], [1]], b=[1 / 2, 1 / 2], e=[-1 / 2, 1 / 2])
    ours = odeint(decay, 1.0, [0.0, 1.0], method=heun, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(
        ours, odeint(decay, 1.0, [0.0, 1.0], method="heun", rtol=1e-5, atol=1e-5)
    )


def test_fixed_steps_are_the_steps_of_the_book():
    ys = odeint(decay, jnp.array(1.0), [0.0, 1.0], method="euler", dt=0.25)
    np.testing.assert_allclose(ys[-1], 0.75**4, rtol=1e-15)
    sol = solve(decay, jnp.array(1.0), [0.0, 1.0], method="rk4", dt=0.5)
    factor = 1 - 0.5 + 0.5**2 / 2 - 0.5**3 / 6 + 0.5**4 / 24
    np.testing.assert_allclose(sol.ys[-1], factor**2, rtol=1e-15)
    assert (sol.stats.accepted, sol.stats.rejected, sol.stats.evaluations) == (2, 0, 9)


def test_statistics_count_what_happened():
    count = []
    f = lambda y, t: (jax.debug.callback(lambda: count.append(1)), -10 * y * jnp.sin(10 * t))[1]
    sol = solve(f, jnp.ones(2), [0.0, 1.0, 2.0], rtol=1e-6, atol=1e-6)
    jax.effects_barrier()
    assert len(count) == sol.stats.evaluations
    assert sol.stats.evaluations == 2 + 6 * (sol.stats.accepted + sol.stats.rejected)
    text = str(sol)
    assert "success" in text and f"evaluations: {len(count)}" in text


def test_outputs_cost_no_evaluations():
    few = solve(turning, jnp.asarray(start), [0.0, 2.0])
    many = solve(turning, jnp.asarray(start), np.linspace(0, 2, 500))
    assert few.stats.evaluations == many.stats.evaluations


def test_statistics_and_status_are_per_sample_under_vmap():
    rates = jnp.array([0.1, 1.0, 20.0])
    sol = jax.vmap(lambda r: solve(decay, 1.0, [0.0, 1.0, 2.0], r))(rates)
    assert sol.status.shape == (3,)
    assert sol.stats.accepted[0] < sol.stats.accepted[2]
    single = [solve(decay, 1.0, [0.0, 1.0, 2.0], r) for r in rates]
    np.testing.assert_array_equal(sol.stats.accepted, [s.stats.accepted for s in single])
    np.testing.assert_allclose(sol.ys, [s.ys for s in single], rtol=1e-12, atol=1e-15)


def test_controllers_change_the_steps_not_the_solution():
    run = lambda **options: solve(turning, jnp.asarray(start), [0.0, 5.0], **options)
    exact, counts = run(rtol=1e-12, atol=1e-12).ys, set()
    for gains in ({}, dict(integral=0.4, proportional=0.3), dict(integral=0.3, derivative=0.05)):
        found = run(rtol=1e-8, atol=1e-8, controller=pid(**gains))
        np.testing.assert_allclose(found.ys, exact, atol=1e-6)
        counts.add(int(found.stats.accepted))
    assert len(counts) == 3


def test_the_factor_of_a_controller_is_that_of_its_formula():
    """The steps by which three errors before change the next one, of a method of order 4."""
    ratios, (i, p, d) = (0.3, 0.5, 2.0), (0.3, 0.2, 0.1)
    controller = pid(integral=i, proportional=p, derivative=d, safety=0.8)
    first, *before = map(jnp.asarray, ratios)
    factor, history = controller(first, tuple(before), 5)
    exponents = -(i + p + d) / 5, (p + 2 * d) / 5, -d / 5
    expected = 0.8 * np.prod([r**e for r, e in zip(ratios, exponents)])
    np.testing.assert_allclose(factor, expected, rtol=1e-12)
    np.testing.assert_allclose(history, ratios[:2])
    alone = lambda ratio: pid()(jnp.asarray(ratio), (), 5)[0]
    np.testing.assert_allclose([alone(r) for r in (1e-9, 1e9, np.nan)], [10, 0.2, 0.2])


def test_steps_may_shrink_after_an_accepted_one():
    """Towards a pole the step has to fall all the time; with shrinking there is hardly a rejection."""
    sol = solve(lambda y, t: y**2, 1.0, [0.0, 0.999], rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(sol.ys[-1], 1000, rtol=1e-4)
    assert 10 * int(sol.stats.rejected) < int(sol.stats.accepted)


def test_the_first_step_follows_the_scale_of_the_problem():
    slow = solve(lambda y, t: -1e-6 * y, 1.0, [0.0, 1.0])
    assert slow.stats.accepted <= 3
    fast = solve(lambda y, t: -1e6 * y, 1.0, [0.0, 1e-6])
    assert fast.stats.rejected <= 1


def test_large_times_lose_no_steps_in_float32():
    y0 = jnp.asarray(1.0, jnp.float32)
    ys = odeint(lambda y, t: -y, y0, np.array([1e6, 1e6 + 1], np.float32))
    np.testing.assert_allclose(ys[-1], np.exp(-1), rtol=1e-3)
    with pytest.raises(jaxode.SolveError, match="shift time"):  # 16 different times are too few
        odeint(lambda y, t: -y * jnp.cos(t), y0, np.array([1e6, 1e6 + 1], np.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_states_are_kept_and_stepped_in_float32(dtype):
    y0 = jnp.ones(3, dtype)
    sol = solve(decay, y0, [0.0, 1.0, 2.0])
    assert sol.ys.dtype == dtype and sol.ts.dtype == jnp.float32
    np.testing.assert_allclose(sol.ys[:, 0].astype(float), np.exp([0, -1, -2]), atol=0.005)
    batch = jax.vmap(lambda y0: odeint(decay, y0, [0.0, 1.0, 2.0]))(jnp.stack([y0, 2 * y0]))
    np.testing.assert_allclose(batch[0].astype(float), sol.ys.astype(float), atol=0.005)
    grad = jax.grad(lambda y0: odeint(decay, y0, [0.0, 1.0])[-1].astype(float).sum())(y0)
    assert grad.dtype == dtype
    np.testing.assert_allclose(grad.astype(float), np.full(3, np.exp(-1)), atol=0.02)


def test_integers_become_floats_and_python_times_keep_float32():
    assert odeint(decay, 1, [0, 1]).dtype == jnp.float64
    assert odeint(decay, jnp.ones(2, jnp.float32), [0.0, 1.0]).dtype == jnp.float32
    assert odeint(decay, np.arange(3), np.array([0, 1, 2])).shape == (3, 3)


@pytest.mark.parametrize(
    "dtype, tolerance",
    [("float64", 1.4e-8), ("float32", 2.0**-20), ("float16", 2.0**-7), ("bfloat16", 2.0**-4)],
)
def test_default_tolerances_are_those_of_jax_as_far_as_a_dtype_holds_them(dtype, tolerance):
    y0 = jnp.asarray(start, dtype)
    default = solve(turning, y0, [0.0, 2.0])
    same = solve(turning, y0, [0.0, 2.0], rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(default.ys, same.ys)
    assert default.stats.evaluations == same.stats.evaluations


def test_a_compiled_solve_has_no_callbacks_and_can_be_exported():
    f = jax.jit(jax.grad(lambda y0: odeint(turning, y0, [0.0, 1.0, 2.0]).sum()))
    y0 = jnp.asarray(start)
    assert "callback" not in f.lower(y0).as_text()
    exported = jax.export.deserialize(jax.export.export(f)(y0).serialize())
    np.testing.assert_allclose(exported.call(y0), f(y0), rtol=1e-14)


def test_a_compiled_solve_is_kept_in_the_persistent_cache(tmp_path):
    import os
    import subprocess
    import sys

    program = (
        "import jax, jax.numpy as jnp; from jaxode import odeint;"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0);"
        "jax.jit(lambda y: odeint(lambda y, t: -y, y, [0.0, 1.0]))(jnp.ones(3))"
    )
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert any("lambda" in file.name for file in tmp_path.iterdir())


def test_solves_run_inside_scan_and_jit():
    def body(y, _):
        y = odeint(decay, y, [0.0, 0.5])[-1]
        return y, y

    _, ys = jax.jit(lambda: jax.lax.scan(body, 1.0, None, length=4))()
    np.testing.assert_allclose(ys, np.exp(-0.5 * np.arange(1, 5)), rtol=1e-6)


def test_statuses_have_messages_with_remedies():
    assert all(len(status.message) > 20 for status in Status)
    assert "max_steps" in Status.MAX_STEPS.message
