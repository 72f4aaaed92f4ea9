"""Neural controlled differential equations: closed forms, missing values, padding, what is known when."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm

from jaxode import Signal
from jaxode.nn import NeuralCDE, Series, control_path
from jaxode.nn.controlled import INTERPOLATIONS

KEY = jax.random.key(0)
PATHS = pytest.mark.parametrize("path", INTERPOLATIONS)


def series(dtype="float64", n=3, length=5):
    """Ragged (row i ends after length - i points), with values missing here and there."""
    times = jnp.cumsum(jax.random.uniform(KEY, (n, length), dtype, 0.1, 0.5), axis=1)
    values = jax.random.normal(KEY, (n, length, 2), dtype)
    there = jnp.arange(length)[None] < length - jnp.arange(n)[:, None]
    some = jax.random.bernoulli(jax.random.key(2), 0.7, values.shape)
    some = some.at[:, length - n].set(True)  # so that a row ends where it should
    return Series(times, values, there[..., None] & some)


def model(dtype="float64", field=None, **options):
    tight = {"rtol": 1e-5, "atol": 1e-6} if dtype == "float32" else {"rtol": 1e-9, "atol": 1e-9}
    return NeuralCDE(5, 2, hidden=4, width=8, field=field, dtype=dtype, key=KEY, **tight, **options)


class Diagonal(eqx.Module):
    """f(z) = z rates^T: dz = z (rates . dX)."""

    rates: jax.Array

    def __call__(self, z):
        return z[..., None] * self.rates[(None,) * z.ndim]


class Matrices(eqx.Module):
    """The matrix with the columns A_c z: dz = sum of A_c z dX_c."""

    a: jax.Array

    def __call__(self, z):
        flat = z @ self.a.reshape(-1, z.shape[-1]).T
        return jnp.swapaxes(flat.reshape(*z.shape[:-1], *self.a.shape[:2]), -1, -2)


@pytest.mark.parametrize(
    "path, dtype",
    [("backward_hermite", "float64"), ("rectilinear", "float64"), ("linear", "float32")],
)
def test_a_linear_cde_whose_channels_commute_depends_on_the_ends_of_its_path_alone(path, dtype):
    rates = jnp.array([0.5, -0.3, 0.2, 0.1, -0.2], dtype)
    net, control = model(dtype, Diagonal(rates)), control_path(series(dtype), path)
    z = net.solve(control).ys
    assert z.dtype == dtype and z.shape == (2, 3, 4)
    exact = z[0] * jnp.exp((control.us[-1] - control.us[0]) @ rates)[:, None]
    np.testing.assert_allclose(z[1], exact, rtol=1e-4 if dtype == "float32" else 1e-7)
    out = exact @ net.head.weight.T + net.head.bias[None]
    np.testing.assert_allclose(net(control), out, rtol=1e-3 if dtype == "float32" else 1e-6)


def test_a_linear_cde_is_a_product_of_exponentials_along_lines():
    a = 0.5 * jax.random.normal(KEY, (5, 4, 4))
    net, control = model(field=Matrices(a)), control_path(series(), "linear")
    z = net.solve(control).ys
    for row in range(3):
        end = z[0, row]
        for rise in np.diff(control.us[:, row], axis=0):
            end = expm(np.einsum("c,cij->ij", rise, a)) @ end
        np.testing.assert_allclose(z[1, row], end, rtol=1e-6, atol=1e-8)


def test_how_fast_a_path_is_gone_along_does_not_matter():
    net, control = model(), control_path(series())
    lines = Signal(control.ts, control.us)
    slow = Signal(jnp.array([0.0, 0.1, 2.0, 2.2, 3.0]), control.us)
    z, other = (
        net.solve(path, jnp.stack([path.ts[0], path.ts[2], path.ts[4]])).ys
        for path in (lines, slow)
    )
    np.testing.assert_allclose(other, z, rtol=1e-6, atol=1e-6)  # steps go over corners of ReLUs
    assert not np.allclose(z[1], z[0], rtol=1e-2)


@PATHS
def test_what_is_missing_does_not_matter(path):
    whole = series()
    control = lambda values, mask: control_path(Series(whole.times, values, mask), path).us
    expected, everything = control(whole.values, whole.mask), jnp.ones_like(whole.mask)
    for hidden in (1e3, jnp.nan):
        values = jnp.where(whole.mask, whole.values, hidden)
        np.testing.assert_array_equal(control(values, whole.mask), expected)
    np.testing.assert_array_equal(control(values, everything), expected)
    by_values = jax.grad(lambda values: jnp.sum(control(values, everything) ** 2))(values)
    assert np.all(np.isfinite(by_values)) and np.all(by_values[~whole.mask] == 0)


@PATHS
def test_the_path_of_a_row_stands_still_after_its_end(path):
    whole = series()
    alone = Series(*(part[2:, :3] for part in whole))  # row 2 has three points
    short, long = control_path(alone, path).us[:, 0], control_path(whole, path).us[:, 2]
    np.testing.assert_allclose(long[: len(short)], short, rtol=1e-12)
    np.testing.assert_array_equal(
        long[len(short) :], jnp.broadcast_to(short[-1:], (len(long) - len(short), 5))
    )


def test_a_cubic_that_is_longer_than_its_row_moves_no_state():
    # Its slope at the end of the row is not 0: the path goes out, and comes back along the same line.
    control = control_path(series())
    assert np.any(np.abs(control(2.5)[2] - control(2.0)[2]) > 0.01)
    z = model().solve(control, [0.0, 2.0, 4.0]).ys  # row 2 has three points
    np.testing.assert_allclose(z[2, 2], z[1, 2], rtol=1e-6)
    assert not np.allclose(z[2, 0], z[1, 0], rtol=1e-2)


def test_channels_are_times_values_and_counts_with_missing_values_filled():
    nan = np.nan
    values = np.array([[[nan, 1.0], [2.0, nan], [nan, nan], [8.0, 4.0], [nan, nan]]])
    times = np.array([[0.0, 1.0, 2.0, 4.0, 5.0]])
    given = Series(times, values, np.ones((1, 5), bool))
    held = [0, 1, 2, 4, 4]  # nothing is seen after t = 4: the path stands still
    linear = control_path(given, "linear")
    expected = [held, [2, 2, 4, 8, 8], [1, 1.75, 2.5, 4, 4], [0, 1, 1, 2, 2], [1, 1, 1, 2, 2]]
    np.testing.assert_allclose(linear.us[:, 0].T, expected)
    np.testing.assert_array_equal(linear.ts, np.arange(5))
    without = control_path(given, "backward_hermite", counts=0)
    np.testing.assert_allclose(without.us[:, 0].T, expected[:3])
    steps = control_path(given, "rectilinear", counts=0.5)
    points = [held, [0, 2, 2, 8, 8], [1, 1, 1, 4, 4], [0, 0.5, 0.5, 1, 1], [0.5, 0.5, 0.5, 1, 1]]
    np.testing.assert_allclose(steps.us[::2, 0].T, points)
    corners = [held[1:], *(channel[:-1] for channel in points[1:])]
    np.testing.assert_allclose(steps.us[1::2, 0].T, corners)


def test_a_component_that_is_never_seen_is_zero():
    given = series()._replace(mask=jnp.zeros((3, 5, 2), bool).at[..., 0].set(True))
    for path in INTERPOLATIONS:
        control = control_path(given, path)
        np.testing.assert_array_equal(control.us[..., [2, 4]], 0)
        assert np.all(np.isfinite(control.us))


@pytest.mark.parametrize("path, causal", [("rectilinear", True), ("linear", False)])
def test_what_is_known_before_the_time_of_a_value(path, causal):
    given, knots = series(), 2 if path == "rectilinear" else 1  # of each point

    control = lambda values: np.asarray(control_path(given._replace(values=values), path).us)
    before = control(given.values)
    looks_ahead = []
    for i in range(1, 4):
        later = (jnp.arange(5) > i)[None, :, None]
        after = control(given.values + jnp.where(later, 1.0, 0.0))
        looks_ahead.append(not np.array_equal(before[: knots * i + 1], after[: knots * i + 1]))
        assert not np.array_equal(before, after)
    assert any(looks_ahead) is not causal


def test_wrong_arguments_of_a_path_are_refused():
    with pytest.raises(ValueError, match=r"'rectilinear'.*got 'cubic'"):
        control_path(series(), "cubic")
    with pytest.raises(ValueError, match="mask of a series"):
        control_path(series()._replace(mask=jnp.ones((3, 4), bool)))


def test_a_path_of_other_channels_is_refused():
    series = Series(jnp.zeros((2, 3)), jnp.ones((2, 3, 2)), jnp.ones((2, 3), bool))
    with pytest.raises(ValueError, match="made for paths of 7 channels"):
        NeuralCDE(7, 4, key=jax.random.key(0))(control_path(series))
