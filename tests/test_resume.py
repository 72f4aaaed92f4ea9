"""A solve that goes on where it ended is one that was never interrupted."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import Event, Signal, SolveError, Status, solve


def van_der_pol(y, t):
    return jnp.stack([y[1], 3 * (1 - y[0] ** 2) * y[1] - y[0]])


def spring(y, t):
    return jnp.stack([y[1], -y[0]])


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_array_equal(x, y)


def in_parts(func, y0, ends, **options):
    solution = solve(func, y0, ends[:2], resumable=True, **options)
    for t in ends[2:]:
        solution = solution.resume(t)
    return solution


def check(func, y0, ends, **options):
    whole = solve(func, y0, [ends[0], ends[-1]], resumable=True, **options)
    parts = in_parts(func, y0, ends, **options)
    same(jax.tree.map(lambda y: y[-1], parts.ys), jax.tree.map(lambda y: y[-1], whole.ys))
    same(parts.stats, whole.stats)
    same((parts.status, parts.reached), (whole.status, whole.reached))
    return whole


# One of each family, which differ in what a step hands to the next.
@pytest.mark.parametrize("method", ["tsit5", "dop853", "rodas5p", "kvaerno5", "auto"])
def test_ten_parts_are_one_solve_bit_for_bit(method):
    y0, ends = jnp.array([2.0, 0.0]), [0.0, *np.cumsum(np.linspace(0.3, 1.3, 10))]
    whole = check(van_der_pol, y0, ends, method=method, rtol=1e-6, atol=1e-6)
    plain = solve(van_der_pol, y0, [0.0, ends[-1]], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(whole.ys[-1], plain.ys[-1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["rk4", "gauss4", "leapfrog"])
def test_steps_of_one_size_go_on_in_that_size(method):
    func, y0 = (spring, jnp.array([1.0, 0.0]))
    if method == "leapfrog":
        func, y0 = (lambda y, t: (y[1], -y[0])), (jnp.ones(1), jnp.zeros(1))
    whole = check(func, y0, [0.0, 0.7, 1.0, 2.03], method=method, dt=0.013)
    assert whole.stats.accepted == int(np.ceil(2.03 / 0.013))


def test_ends_may_be_of_any_length_and_direction():
    y0 = {"x": jnp.ones(2), "v": jnp.zeros(2)}
    func = lambda y, t: {"x": y["v"], "v": -y["x"] * (2 + jnp.sin(t))}
    check(func, y0, [5.0, 4.9, 4.9, 1.0, -3.0])
    check(func, y0, [1e3, 1e3 + 1e-3, 1e3 + 7])


def test_single_precision_and_a_singular_mass_go_on_too():
    check(van_der_pol, jnp.array([2.0, 0.0], jnp.float32), [0.0, 1.5, 4.0], rtol=1e-4, atol=1e-4)
    dae = lambda y, t: jnp.stack([-y[0] + y[1], y[0] + y[1] - 1])
    options = dict(method="rodas4", mass=jnp.array([1.0, 0.0]), rtol=1e-6, atol=1e-6)
    check(dae, jnp.array([0.2, 0.8]), [0.0, 0.5, 2.0], **options)


@pytest.mark.parametrize("span", [1e-12, 1e-20])
def test_an_interval_may_be_short_in_the_unit_of_func(dtype, span):
    decay = lambda y, t: -y / span
    whole = check(decay, jnp.array(1.0, dtype), np.array([0.0, 0.3 * span, span], dtype))
    np.testing.assert_allclose(whole.ys[-1], np.exp(-1), rtol=1e-5)
    failed = solve(
        lambda y, t: y * jnp.nan, jnp.array(1.0, dtype), [0.0, span], resumable=True, throw=False
    )
    assert Status(int(failed.status)) == Status.NON_FINITE_INITIAL


def test_a_pair_of_functions_goes_on():
    pair = (lambda y, t: -50.0 * y), (lambda y, t: jnp.cos(t) * jnp.ones(2))
    check(pair, jnp.ones(2), [0.0, 0.5, 0.8, 2.0], method="kencarp4", rtol=1e-6, atol=1e-6)


def test_outputs_inside_a_later_part_are_those_of_the_whole():
    y0, times = jnp.array([1.0, 0.0]), np.array([2.0, 2.1, 3.3, 4.0])
    whole = solve(spring, y0, [0.0, *times], resumable=True, save=lambda y, t: {"x": y[0] * t})
    part = solve(spring, y0, [0.0, 1.9], resumable=True, save=lambda y, t: {"x": y[0] * t})
    part = part.resume(times)
    same(part.ts, times)
    same(part.ys["x"], whole.ys["x"][1:])
    exact = np.cos(times) * times
    np.testing.assert_allclose(part.ys["x"], exact, rtol=1e-6)


def test_it_goes_on_under_jit_and_vmap():
    y0 = jnp.array([[1.0, 0.0], [0.3, 0.5], [2.0, 1.0]])
    options = dict(rtol=1e-6, atol=1e-6, resumable=True)

    @jax.jit
    @jax.vmap
    def many(y0, t):
        return solve(van_der_pol, y0, [0.0, 1.0], **options).resume(t)

    later = jnp.array([2.0, 3.0, 4.0])
    found = many(y0, later)
    for i in range(3):
        one = solve(van_der_pol, y0[i], [0.0, 1.0], **options).resume(float(later[i]))
        np.testing.assert_allclose(found.ys[i], one.ys, rtol=1e-12)
        assert found.stats.accepted[i] == one.stats.accepted
    early = many(y0, jnp.array([2.0, 0.5, 4.0]))
    assert early.status.tolist() == [0, Status.BAD_INPUT.value, 0]
    assert jnp.all(jnp.isnan(early.ys[1]))


def test_many_solves_go_on_by_vmap():
    sols = jax.vmap(lambda w: solve(lambda y, t, w: -w * y, 1.0, [0.0, 1.0], w, resumable=True))(
        jnp.array([1.0, 2.0])
    )
    later = jax.vmap(lambda sol: sol.resume(2.0).ys[-1])(sols)
    at_once = jax.vmap(
        lambda w: (
            solve(lambda y, t, w: -w * y, 1.0, [0.0, 1.0], w, resumable=True).resume(2.0).ys[-1]
        )
    )(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(later, np.exp([-2.0, -4.0]), rtol=1e-6)
    np.testing.assert_allclose(at_once, later, rtol=1e-12)
    with pytest.raises(ValueError, match="These are many solves"):
        sols.resume(2.0)


def test_steps_that_ran_out_can_be_followed_by_as_many():
    y0 = jnp.array([1.0, 0.0])
    with pytest.raises(SolveError) as error:
        solve(spring, y0, [0.0, 20.0], max_steps=50, resumable=True)
    part = error.value.solution
    while part.status == Status.MAX_STEPS:
        try:
            part = part.resume(20.0)
        except SolveError as error:
            part = error.solution
    whole = solve(spring, y0, [0.0, 20.0], resumable=True)
    same(part.ys[-1], whole.ys[-1])
    same(part.stats, whole.stats)


def test_tomorrow_may_be_another_process(tmp_path):
    y0, path = jnp.array([2.0, 0.0]), tmp_path / "solution.eqx"
    today = solve(van_der_pol, y0, [0.0, 3.0], resumable=True)
    eqx.tree_serialise_leaves(path, today)
    like = solve(van_der_pol, 0 * y0 + 1, [0.0, 0.1], resumable=True)
    same(eqx.tree_deserialise_leaves(path, like).resume(5.0), today.resume(5.0))


def test_what_cannot_be_resumed_says_so():
    y0 = jnp.array([1.0, 0.0])
    plain = solve(spring, y0, [0.0, 1.0])
    with pytest.raises(ValueError, match="resumable=True"):
        plain.resume(2.0)
    solution = solve(spring, y0, [0.0, 1.0], resumable=True)
    with pytest.raises(ValueError, match=r"goes on from t = 1, and t = 0\.5 is before"):
        solution.resume(0.5)
    with pytest.raises(ValueError, match="increasing"):
        solution.resume([3.0, 2.0])
    with pytest.raises(ValueError, match="a time to go on to"):
        solution.resume([])
    with pytest.raises(TypeError, match="no derivatives"):
        jax.grad(lambda y: jnp.sum(solve(spring, y, [0.0, 1.0], resumable=True).ys))(y0)
    failed = solve(lambda y, t: y**2, jnp.ones(1), [0.0, 2.0], resumable=True, throw=False)
    with pytest.raises(ValueError, match="nothing to go on from"):
        failed.resume(3.0)


@pytest.mark.parametrize(
    "options",
    [
        dict(dense=True),
        dict(save_steps=True),
        dict(events=[Event(lambda y, t: y[0])]),
        dict(heuristics=True, adjoint="direct"),
    ],
)
def test_options_that_are_not_for_a_solve_in_parts_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        solve(spring, jnp.array([1.0, 0.0]), [0.0, 1.0], resumable=True, **options)


def test_signals_are_refused():
    drive = Signal(jnp.array([0.0, 1.0]), jnp.array([0.0, 1.0]))
    with pytest.raises(ValueError, match="without signals"):
        solve(lambda y, t, u: u(t) - y, jnp.ones(()), [0.0, 1.0], drive, resumable=True)
