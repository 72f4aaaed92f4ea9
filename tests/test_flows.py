"""Flows: a density is one, a trace is a trace, and there and back is where one was."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import odeint
from jaxode.nn import (
    ConcatSquash,
    ContinuousFlow,
    Hutchinson,
    JacobianNorm,
    Normal,
    PlanarField,
    PlanarFlow,
    WithIntegrals,
    diffusion_path,
    divergence,
    flow_matching_loss,
    kinetic_energy,
    linear_path,
    optimal_pairs,
)

KEY = jax.random.key(0)
FIELDS = {
    "planar": lambda dtype: PlanarField(2, width=8, dtype=dtype, key=KEY),
    "gated planar": lambda dtype: PlanarField(2, width=8, hidden=0, dtype=dtype, key=KEY),
    "concat squash": lambda dtype: ConcatSquash(2, width=8, dtype=dtype, key=KEY),
}
fields = pytest.mark.parametrize("name", list(FIELDS))


def loud(field):
    """With weights large enough that something happens."""
    weights, rest = eqx.partition(field, eqx.is_inexact_array)
    return eqx.combine(jax.tree.map(lambda w: 2 * w, weights), rest)


def points(n, dtype="float64"):
    return jax.random.normal(jax.random.key(3), (n, 2), dtype)


@fields
def test_the_cheap_trace_and_the_exact_one_are_the_trace_of_the_jacobian(name, dtype):
    field, z = loud(FIELDS[name](dtype)), points(6, dtype)
    jacobians = jax.vmap(jax.jacfwd(lambda z: field(z[None], 0.4)[0]))(z)
    got = divergence(field, z, 0.4)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, jnp.trace(jacobians, axis1=1, axis2=2), rtol=1e-4, atol=1e-5)
    plain = divergence(lambda z, t: field(z, t), z, 0.4)
    np.testing.assert_allclose(got, plain, rtol=1e-4, atol=1e-5)


@fields
@pytest.mark.parametrize("gaussian", [False, True])
def test_hutchinsons_estimate_is_unbiased(name, gaussian):
    field, z = loud(FIELDS[name]("float64")), points(3)
    draw = jax.random.normal if gaussian else jax.random.rademacher
    noises = draw(jax.random.key(5), (20_000, *z.shape), jnp.float64)
    estimates = jax.vmap(lambda noise: Hutchinson(noise)(field, z, 0.4))(noises)
    error = jnp.std(estimates, axis=0) / 20_000**0.5
    assert np.all(np.abs(estimates.mean(0) - divergence(field, z, 0.4)) < 5 * error + 1e-12)


@fields
def test_a_flow_and_its_inverse_undo_each_other(name):
    flow = ContinuousFlow(loud(FIELDS[name]("float32")), Normal(2))  # in float64 see below
    z = points(20, "float32")
    np.testing.assert_allclose(flow.inverse(flow.forward(z)), z, atol=1e-5)


@fields
def test_the_density_integrates_to_one(name):
    flow = ContinuousFlow(loud(FIELDS[name]("float64")), Normal(2), rtol=1e-5, atol=1e-5)
    axis = jnp.linspace(-9, 9, 181)
    grid = jnp.stack(jnp.meshgrid(axis, axis), -1).reshape(-1, 2)
    assert abs(float(jnp.exp(flow.log_prob(grid)).sum() * 0.1**2) - 1) < 1e-3


@fields
def test_the_density_is_the_change_of_variables(name):
    flow = ContinuousFlow(loud(FIELDS[name]("float64")), Normal(2), rtol=1e-9, atol=1e-9)
    x, log_prob = flow.sample_and_log_prob(KEY, 5)
    jacobians = jax.vmap(jax.jacrev(lambda x: flow.inverse(x[None])[0]))(x)
    exact = flow.base.log_prob(flow.inverse(x)) + jnp.linalg.slogdet(jacobians)[1]
    np.testing.assert_allclose(log_prob, exact, rtol=1e-6)
    np.testing.assert_allclose(flow.log_prob(x), exact, rtol=1e-6)


def test_an_estimated_density_is_near_the_exact_one_on_average():
    flow = ContinuousFlow(loud(FIELDS["concat squash"]("float64")), Normal(2), rtol=1e-5, atol=1e-5)
    x = points(2000)
    exact, estimate = flow.log_prob(x), flow.log_prob(x, key=KEY)
    assert not np.allclose(exact, estimate)
    assert abs(float(jnp.mean(exact - estimate))) < 5 * float(jnp.std(exact - estimate)) / 2000**0.5


def test_gradients_of_the_likelihood_agree_with_finite_differences():
    field = FIELDS["planar"]("float64")
    weights, rest = eqx.partition(field, eqx.is_inexact_array)
    x = points(10)

    def loss(weights):
        flow = ContinuousFlow(eqx.combine(weights, rest), Normal(2), rtol=1e-9, atol=1e-9)
        return flow.log_prob(x).mean()

    direction = jax.tree.map(lambda w: jax.random.normal(KEY, w.shape, w.dtype), weights)
    moved = lambda h: loss(jax.tree.map(lambda w, d: w + h * d, weights, direction))
    slope = sum(
        jnp.vdot(g, d)
        for g, d in zip(jax.tree.leaves(jax.grad(loss)(weights)), jax.tree.leaves(direction))
    )
    np.testing.assert_allclose(slope, (moved(1e-5) - moved(-1e-5)) / 2e-5, rtol=1e-6)


def test_a_context_makes_another_distribution_for_each_sample():
    field = loud(ConcatSquash(2, width=8, context=1, key=KEY))
    flow = ContinuousFlow(field, Normal(2), rtol=1e-5, atol=1e-5)
    z = jnp.zeros((4, 2))
    context = jnp.arange(4.0)[:, None]
    x = flow.forward(z, context=context)
    assert len({tuple(row) for row in np.round(np.asarray(x), 4).tolist()}) == 4
    np.testing.assert_allclose(flow.inverse(x, context=context), z, atol=1e-3)
    one = flow.log_prob(x[2:3], context=context[2:3])
    np.testing.assert_allclose(flow.log_prob(x, context=context)[2:3], one, atol=1e-3)


def test_integrals_are_those_of_the_path():
    y0 = points(4)
    field = lambda y, t: -y
    noise = jax.random.rademacher(KEY, y0.shape, y0.dtype)
    both = WithIntegrals(field, [kinetic_energy, JacobianNorm(noise)])
    _, (energy, norm) = odeint(both, (y0, both.zeros(y0)), [0.0, 1.0])
    exact = (1 - np.exp(-2)) / 2 * jnp.mean(y0**2, axis=1)
    np.testing.assert_allclose(energy[-1], exact, rtol=1e-6)
    np.testing.assert_allclose(norm[-1], 1.0, rtol=1e-6)  # |e^T (-I)|^2 / d


@pytest.mark.parametrize("linear", [False, True])
def test_rates_share_one_evaluation_and_are_what_they_are_alone(linear):
    y, times = points(3), []
    noise = jax.random.rademacher(KEY, y.shape, y.dtype)
    rates = [kinetic_energy, divergence, Hutchinson(noise), JacobianNorm(noise)]
    rates = rates if linear else rates[:1]

    def field(y, t):
        times.append(t)
        return jnp.sin(y @ jnp.array([[1.0, 2.0], [-0.5, 0.3]])) * t

    both = WithIntegrals(field, rates)
    dy, found = both((y, both.zeros(y)), 0.7)
    assert len(times) == 1
    np.testing.assert_allclose(dy, field(y, 0.7), rtol=1e-6)
    for rate, one in zip(rates, found):
        np.testing.assert_allclose(one, rate(field, y, 0.7), rtol=1e-5)


@pytest.mark.parametrize("density", [False, True])
def test_a_planar_flow_has_the_determinant_of_its_jacobian(density):
    flow = PlanarFlow(5, Normal(2), density=density, key=KEY)
    flow = eqx.tree_at(lambda f: (f.w, f.u), flow, (3 * flow.w, 3 * flow.u))
    z = points(6)
    _, change = flow.push(z)
    jacobians = jax.vmap(jax.jacfwd(lambda z: flow.push(z[None])[0][0]))(z)
    np.testing.assert_allclose(change, jnp.linalg.slogdet(jacobians)[1], atol=1e-6)
    assert np.all(np.linalg.det(jacobians) > 0)
    wrong = flow.sample_and_log_prob if density else flow.log_prob
    with pytest.raises(ValueError, match="density="):
        wrong(*((KEY, 3) if density else (z,)))


PATHS = {"linear": linear_path, "diffusion": diffusion_path}


@pytest.mark.parametrize("name", list(PATHS))
def test_a_path_goes_from_the_base_to_the_data_and_its_velocity_is_its_derivative(name, dtype):
    path, z, x = PATHS[name](), points(6, dtype), 2 + points(6, dtype)
    at = jax.jit(path.at)
    ends = [at(jnp.full(6, t, dtype), z, x)[0] for t in (0.0, 1.0)]
    assert ends[0].dtype == dtype
    np.testing.assert_allclose(ends[0], z, atol=0.05)  # diffusion keeps 0.0066 of x
    np.testing.assert_allclose(ends[1], x, atol=1e-6)
    t, h = jnp.linspace(0.05, 0.95, 6, dtype=dtype), 1e-6 if dtype == "float64" else 1e-2
    moved = [at(t + d, z, x)[0] for d in (h, -h)]
    tolerance = 1e-6 if dtype == "float64" else 2e-2
    np.testing.assert_allclose(
        at(t, z, x)[1], (moved[0] - moved[1]) / (2 * h), rtol=tolerance, atol=tolerance
    )


def test_diffusion_keeps_the_variance_and_forgets_at_its_rate():
    path, t = diffusion_path(0.2, 10.0), jnp.linspace(0.0, 0.99, 7)
    np.testing.assert_allclose(path.mean(t) ** 2 + path.spread(t) ** 2, 1.0, rtol=1e-12)
    slope = jax.jit(jax.vmap(jax.grad(lambda t: jnp.log(path.mean(t)))))(t)
    np.testing.assert_allclose(slope, (0.2 + 9.8 * (1 - t)) / 2, rtol=1e-12)  # half of beta(1 - t)


class OfNormal(eqx.Module):
    """The field that carries a normal distribution to N(mean, scale^2) along straight lines, and a bit more.

    E[x - z | y] of the two normal distributions, by the formula of conditional normal ones.
    """

    mean: float
    scale: float
    more: float

    def __call__(self, y, t):
        variance = (t * self.scale) ** 2 + (1 - t) ** 2
        slope = (t * self.scale**2 - (1 - t)) / variance
        return self.mean + slope * (y - t * self.mean) + self.more * jnp.sin(3 * y + t)


def test_the_loss_of_matching_is_least_for_the_field_that_makes_the_data():
    x = 1.5 + 0.5 * points(100_000)
    flow = lambda more: ContinuousFlow(OfNormal(1.5, 0.5, more), Normal(2), rtol=1e-8, atol=1e-8)
    loss = jax.jit(jax.vmap(lambda more: flow_matching_loss(flow(more), x, KEY)))
    values = loss(jnp.array([-0.2, 0.0, 0.2])).tolist()
    slope = (values[2] - values[0]) / 0.4  # of the mean of squares, exactly
    spread = 2 * (values[1] / len(x)) ** 0.5  # of 2 (field - velocity) sin(...), |sin| at most 1
    assert values[1] < min(values[0], values[2]) - 0.005 and abs(slope) < 5 * spread
    exact = Normal(2, scale=0.5).log_prob(x[:20] - 1.5)
    np.testing.assert_allclose(flow(0.0).log_prob(x[:20]), exact, atol=1e-6)


def test_optimal_pairs_cost_little_more_than_the_best_and_use_every_sample_equally_often(dtype):
    from scipy.optimize import linear_sum_assignment

    z, x = points(64, dtype), 2 * jax.random.normal(jax.random.key(4), (64, 2), dtype) ** 2
    costs = np.sum((np.asarray(z)[None] - np.asarray(x)[:, None]) ** 2, axis=-1)
    draw = jax.jit(jax.vmap(lambda key: optimal_pairs(key, z, x)))
    drawn = draw(jax.random.split(KEY, 500))
    assert drawn.dtype == dtype
    cost = float(jnp.mean(jnp.sum((drawn - x[None]) ** 2, axis=-1)))
    least = costs[linear_sum_assignment(costs)].mean()
    assert least < cost + 1e-3 and cost - least < 0.05 * (costs.mean() - least)
    often = np.sum(np.asarray(drawn)[:, :, None, 0] == np.asarray(z)[None, None, :, 0], axis=(0, 1))
    assert often.sum() == 500 * 64 and np.all(np.abs(often / 500 - 1) < 0.25)


def test_optimal_pairs_stay_in_their_context():
    z, x, group = points(60), 1 + points(60)[::-1], jnp.arange(60) % 3
    context = jax.nn.one_hot(group, 3, dtype=x.dtype)
    pairs = jax.jit(lambda context: optimal_pairs(KEY, z, x, context))
    drawn = np.asarray(pairs(context))
    origin = np.argmax(np.all(drawn[:, None] == np.asarray(z)[None], axis=-1), axis=1)
    np.testing.assert_array_equal(origin % 3, group)
    assert np.sum((drawn - x) ** 2) < 0.7 * np.sum((z - x) ** 2)
    all_differ = jnp.tile(jnp.arange(60.0)[:, None], (1, 3))
    np.testing.assert_array_equal(pairs(all_differ), z)


def test_matching_has_gradients_in_its_dtype_and_every_row_has_a_time_and_a_context(dtype):
    field = ConcatSquash(2, width=8, depth=1, context=1, dtype=dtype, key=KEY)
    flow, x = ContinuousFlow(field, Normal(2)), points(8, dtype)
    context = jnp.ones((8, 1), dtype)
    loss = lambda flow: flow_matching_loss(
        flow, x, KEY, path=diffusion_path(), optimal=True, context=context
    )
    value, bar = eqx.filter_jit(eqx.filter_value_and_grad(loss))(flow)
    assert value.dtype == dtype and value.shape == ()
    for leaf in jax.tree.leaves(bar):
        assert leaf.dtype == dtype and np.all(np.isfinite(leaf)) and np.any(leaf)


def test_a_field_of_another_shape_is_refused():
    flow = ContinuousFlow(lambda y, t: y[:, :1], Normal(2))
    with pytest.raises(ValueError, match=r"\(8, 2\) in all; it returned \(8, 1\)"):
        jax.eval_shape(lambda x: flow_matching_loss(flow, x, KEY), points(8))


def test_matching_data_of_another_size_than_the_base_is_refused():
    flow = ContinuousFlow(ConcatSquash(2, depth=1, key=jax.random.key(0)), Normal(2))
    with pytest.raises(ValueError, match="like the base of the flow"):
        flow_matching_loss(flow, jnp.zeros((5, 3)), jax.random.key(1))
