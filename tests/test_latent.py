"""Latent ODEs, recurrent networks and point processes on ragged series."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from jaxode import data
from jaxode.nn import ODERNN, RNN, JointModel, LatentODE, PointProcess, RecognitionRNN, Series
from jaxode.nn.latent import Decoder, GRUCell

KEY = jax.random.key(0)
GATED = functools.partial(RecognitionRNN, gated=True)
ENCODERS = pytest.mark.parametrize("encoder", [RecognitionRNN, GATED, ODERNN])


def series(dtype="float64", n=4, length=6):
    """Ragged: row i ends after length - i points."""
    times = jnp.cumsum(jax.random.uniform(KEY, (n, length), dtype, 0.1, 0.5), axis=1)
    mask = jnp.arange(length)[None] < length - jnp.arange(n)[:, None]
    times = jnp.where(mask, times, jnp.max(jnp.where(mask, times, 0), 1, keepdims=True))
    values = jax.random.normal(KEY, (n, length, 2), dtype)
    return Series(times, values, mask)


def disturbed(batch):
    """Other values where the mask hides them."""
    return batch._replace(values=jnp.where(batch.mask[..., None], batch.values, 1e3))


@ENCODERS
def test_what_the_mask_hides_does_not_matter(encoder, dtype):
    model = LatentODE.make(2, encoder=encoder, dtype=dtype, key=KEY)
    batch = series(dtype)
    bound, stats = model.elbo(batch, key=KEY)
    again, _ = model.elbo(disturbed(batch), key=KEY)
    assert bound.dtype == dtype and bound.shape == (4,) and np.all(np.isfinite(bound))
    np.testing.assert_array_equal(bound, again)
    assert stats.evaluations.shape == (4,)


@ENCODERS
def test_a_series_is_encoded_and_solved_as_if_it_were_alone(encoder):
    model = LatentODE.make(2, encoder=encoder, dtype=jnp.float64, key=KEY)
    batch = series()
    alone = Series(*(part[2:3, :4] for part in batch))  # row 2 has four points
    together, _ = model.encode(batch)
    np.testing.assert_allclose(model.encode(alone)[0][0], together[2], rtol=1e-12)
    later = jnp.array([[3.0, 4.0]])
    many = model.predict(batch, jnp.broadcast_to(later, (4, 2)))
    np.testing.assert_allclose(model.predict(alone, later)[0], many[2], rtol=1e-6)


def test_a_prediction_goes_before_the_first_time_too():
    model = LatentODE.make(2, dtype=jnp.float64, key=KEY, rtol=1e-8, atol=1e-8)
    batch = series(n=1)
    start = batch.times[0, 0]
    around = model.predict(batch, (start + jnp.array([-0.5, -1e-9, 0.0, 1e-9, 0.5]))[None])[0]
    np.testing.assert_allclose(around[1], around[3], atol=1e-6)
    path = model.paths(model.encode(batch)[0], jnp.stack([start, start - 0.5])[None]).ys
    np.testing.assert_allclose(around[0], model.decoder(path[0, -1]), atol=1e-6)


def test_the_divergence_of_the_bound_is_that_of_two_normals():
    model = LatentODE.make(2, dtype=jnp.float64, key=KEY)
    batch = series()
    mean, log_spread = map(np.asarray, model.encoder(batch))
    _, kl = model.encode(batch)
    draws = mean + np.exp(log_spread) * np.random.default_rng(0).normal(size=(200_000, *mean.shape))
    normal = lambda z, m, s: -0.5 * ((z - m) / np.exp(s)) ** 2 - s
    estimate = np.mean(np.sum(normal(draws, mean, log_spread) - normal(draws, 0, 0.0), -1), 0)
    np.testing.assert_allclose(kl, estimate, atol=0.02)


def test_consistency_is_the_density_of_the_path_under_the_encoder():
    model = LatentODE.make(2, dtype=jnp.float64, key=KEY)
    batch = series()
    plain, _ = model.elbo(batch, key=KEY)
    more, _ = model.elbo(batch, key=KEY, consistency=2.0)
    key, _ = jax.random.split(KEY)
    path = model.paths(model.encode(batch, key)[0], batch.times).ys

    def density(cut):
        """Of each path where its series is first seen from `cut` on, by what is seen from there on."""
        later = batch.mask & (np.arange(6) >= cut)[None]
        mean, log_spread = model.encoder(batch._replace(mask=later))
        found = norm.logpdf(path[:, cut], mean, np.exp(log_spread)) + np.log(2 * np.pi) / 2
        return np.where(later[:, cut], found.sum(axis=1), 0)  # rows end, but have no gaps

    # The cut is drawn from the middle third of six places.
    assert any(np.allclose((more - plain) / 2, density(cut), rtol=1e-9) for cut in (2, 3))


def test_an_encoder_that_reads_the_beginning_is_asked_for_the_whole_series():
    model = LatentODE.make(2, dtype=jnp.float64, key=KEY)
    batch = series()
    read = jnp.broadcast_to(jnp.arange(6) < 3, (4, 6))
    hidden = jnp.where(read[..., None], batch.values, 1e3)  # from the encoder
    first = batch._replace(values=hidden, mask=batch.mask & read)
    z0, kl = model.encode(first, jax.random.split(KEY)[0])
    mean = np.asarray(model.decoder(model.paths(z0, batch.times).ys))
    terms = norm.logpdf(np.asarray(batch.values), mean, model.noise)
    expected = np.sum(terms, axis=(1, 2), where=np.asarray(batch.mask)[..., None]) - kl
    np.testing.assert_allclose(model.elbo(batch, key=KEY, read=read)[0], expected, rtol=1e-9)


def test_gradients_of_the_bound_are_finite_for_rows_of_one_point():
    batch = series()
    mask = batch.mask.at[3].set(jnp.arange(6) == 0)
    model = LatentODE.make(2, dtype=jnp.float64, key=KEY)
    grads = eqx.filter_grad(
        lambda model: model.elbo(batch._replace(mask=mask), key=KEY, consistency=1.0)[0].sum()
    )(model)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


@ENCODERS
def test_single_components_may_be_missing(encoder):
    model = LatentODE.make(2, encoder=encoder, dtype=jnp.float64, key=KEY)
    points = series()
    both = jnp.broadcast_to(points.mask[..., None], points.values.shape)
    np.testing.assert_array_equal(
        model.encode(points)[0], model.encode(points._replace(mask=both))[0]
    )
    some = points._replace(mask=both & jax.random.bernoulli(KEY, 0.6, both.shape))
    hidden = some._replace(values=jnp.where(some.mask, some.values, jnp.nan))
    bound, _ = model.elbo(hidden, key=KEY, consistency=1.0)
    np.testing.assert_array_equal(bound, model.elbo(some, key=KEY, consistency=1.0)[0])
    z0, kl = model.encode(hidden, jax.random.split(KEY)[0])
    from scipy.stats import norm

    mean = np.asarray(model.decoder(model.paths(z0, hidden.times).ys))
    terms = norm.logpdf(np.asarray(some.values), mean, model.noise)
    expected = np.sum(terms, axis=(1, 2), where=np.asarray(some.mask)) - kl
    np.testing.assert_allclose(model.elbo(hidden, key=KEY)[0], expected, rtol=1e-9)


def test_the_error_of_an_rnn_is_that_of_the_components_that_there_are():
    model, batch = RNN(2, dtype=jnp.float64, key=KEY), series()
    first = jnp.stack([batch.mask, jnp.zeros_like(batch.mask)], axis=-1)
    hidden = batch._replace(values=jnp.where(first, batch.values, jnp.nan), mask=first)
    _, means = model.read(batch._replace(values=jnp.where(first, batch.values, 0)))
    misses = np.asarray(means[:, :-1, 0] - batch.values[:, 1:, 0]) ** 2
    expected = np.mean(misses, axis=1, where=np.asarray(batch.mask)[:, 1:])
    np.testing.assert_allclose(model.squared_error(hidden), expected, rtol=1e-12)


def test_a_mask_of_another_shape_is_refused():
    batch = series()
    with pytest.raises(
        ValueError, match=r"\(4, 6\), or that of its values, \(4, 6, 2\); got \(4, 2\)"
    ):
        RNN(2, key=KEY).squared_error(batch._replace(mask=batch.mask[:, :2]))


def test_a_gru_keeps_its_state_when_its_gate_says_so():
    cell = GRUCell(2, 3, dtype=jnp.float64, key=KEY)
    h = jax.random.normal(KEY, (4, 3), jnp.float64)
    x = jnp.ones((4, 2))
    shut = eqx.tree_at(lambda c: c.gates.bias, cell, cell.gates.bias + 1e3)
    np.testing.assert_allclose(shut(x, h), h)
    assert not np.allclose(cell(x, h), h)


@pytest.mark.parametrize("time_gaps", [False, True])
def test_an_rnn_predicts_the_next_value_and_then_goes_on_by_itself(time_gaps, dtype):
    model = RNN(2, time_gaps=time_gaps, dtype=dtype, key=KEY)
    batch = series(dtype)
    error = model.squared_error(batch)
    np.testing.assert_array_equal(error, model.squared_error(disturbed(batch)))
    assert error.shape == (4,) and error.dtype == dtype
    whole = Series(*(part[:1] for part in batch))  # the first row has all six points
    _, means = model.read(whole)
    first = model.predict(
        Series(whole.times[:, :5], whole.values[:, :5], whole.mask[:, :5]), whole.times[:, 5:]
    )
    np.testing.assert_allclose(first[:, 0], means[:, 4], rtol=1e-5, atol=1e-6)
    moved = model.predict(whole, whole.times[:, -1:] + jnp.array([[0.1, 3.0]], dtype))
    other = model.predict(whole, whole.times[:, -1:] + jnp.array([[2.0, 3.0]], dtype))
    assert np.allclose(moved[:, 0], other[:, 0]) == (not time_gaps)


def test_the_likelihood_of_a_constant_rate_is_that_of_a_poisson_process():
    process = PointProcess(
        lambda z, t: jnp.zeros_like(z), lambda z: jnp.log(3.0) + 0 * z[..., :1], jnp.zeros(2)
    )
    events, mask = jnp.array([0.5, 1.5, 1.7, 2.0]), jnp.array([True, True, True, False])
    found = process.log_prob(events, mask, 0.0, 2.0)
    np.testing.assert_allclose(found, 3 * np.log(3.0) - 6.0, rtol=1e-6)


def test_the_likelihood_integrates_the_intensity_of_the_path(dtype):
    process = PointProcess.make(latent=3, dtype=dtype, key=KEY, rtol=1e-6, atol=1e-6)
    events = jnp.array([0.4, 1.1, 2.0, 2.0], dtype)
    mask = jnp.array([True, True, False, False])
    fine = jnp.linspace(0.0, 2.0, 2001, dtype=dtype)
    rate = np.asarray(process.intensity(fine))
    at = process.intensity(jnp.array([0.0, 0.4, 1.1], dtype))[1:]
    expected = np.sum(np.log(at)) - np.trapezoid(rate, fine)
    found = process.log_prob(events, mask, 0.0, 2.0)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_samples_come_as_often_as_the_intensity_says():
    process = PointProcess.make(latent=2, key=KEY, dtype=jnp.float64)
    ts = np.linspace(0.0, 5.0, 1001)
    expected = np.trapezoid(np.asarray(process.intensity(ts)), ts)
    counts = [len(process.sample(jax.random.key(i), 0.0, 5.0)) for i in range(60)]
    assert abs(np.mean(counts) - expected) < 4 * (expected / 60) ** 0.5


def test_times_and_values_share_one_path():
    process = PointProcess.make(latent=3, dtype=jnp.float64, key=KEY, rtol=1e-9, atol=1e-9)
    model = JointModel(process, Decoder(3, 2, dtype=jnp.float64, key=KEY), 0.5)
    events, mask = jnp.array([0.4, 1.1, 2.0]), jnp.array([True, True, False])
    values = jnp.ones((3, 2))
    of_times, of_values = model.log_prob(events, values, mask, 0.0, 2.0)
    np.testing.assert_allclose(of_times, process.log_prob(events, mask, 0.0, 2.0), rtol=1e-6)
    z = process.along(jnp.array([0.0, 0.4, 1.1]))[0][1:]
    expected = norm.logpdf(np.ones((2, 2)), np.asarray(model.decoder(z)), 0.5).sum()
    np.testing.assert_allclose(of_values, expected, rtol=1e-6)


def test_thinned_events_have_the_right_mean_and_are_padded():
    rate = lambda t: 1 + np.sin(t)
    times, mask = data.poisson_events(KEY, rate, 10.0, count=300, most=2.0)
    expected = 10 + 1 - np.cos(10.0)
    assert abs(mask.sum(1).mean() - expected) < 4 * (expected / 300) ** 0.5
    assert np.all(np.diff(times, axis=1) >= 0) and np.all(times[~mask] == 10.0)
