"""Arithmetic of many lanes in one kernel (`scalars.of_lanes`): the values, and what it costs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxode import odeint, scalars, solve

FUNCTIONS = {
    "arithmetic": lambda a, b: (a + b * a, {"quotient": a / (2 + b), "root": jnp.sqrt(a)}),
    "more results than arguments": lambda a, b: [a + i * b for i in range(7)],
    "fewer": lambda a, b: a,
    "functions": lambda a, b: (jnp.exp(a), jnp.log(a), jnp.sin(b), jnp.tanh(b), a**0.3),
    "matrices": lambda a, b: jnp.stack([a, b, a])[:, None] * jnp.ones((3, 2), a.dtype) + b,
    "integers and booleans": lambda a, b: (
        a > b,
        jnp.where(a > b, 3, 4),
        jnp.isfinite(a) & (b < 1),
    ),
    "reductions": lambda a, b: (jnp.sum(jnp.stack([a, b])), jnp.all(jnp.stack([a > 0, b > 0]))),
    "derivatives": jax.grad(lambda a, b: jnp.sum(jnp.split(jnp.sin(a * jnp.stack([b, a])), 2)[1])),
    "a constant": lambda a, b: (a, jnp.asarray(2.5, a.dtype)),
    "nothing": lambda a, b: (a, jnp.zeros((2, 0), a.dtype)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_kernel_computes_what_vmap_does(name, dtype):
    fn = FUNCTIONS[name]
    a, b = jnp.linspace(0.1, 2, 37, dtype=dtype), jnp.linspace(-1, 3, 37, dtype=dtype)
    many = scalars.of_lanes(fn, a[0], b[0])
    values, valid = jax.jit(many)(a, b)
    expected = jax.vmap(fn, out_axes=-1)(a, b)
    assert np.all(valid)
    close = dict(rtol=1e-5) if dtype == "float32" else dict(rtol=1e-12)
    for value, want in zip(*map(jax.tree.leaves, (values, expected)), strict=True):
        assert value.dtype == want.dtype and value.shape == want.shape
        np.testing.assert_allclose(value, want, **close)


def test_what_is_large_or_of_two_precisions_is_left_to_others():
    assert scalars.of_lanes(lambda a: a + 1, jnp.ones(100)) is None
    assert scalars.of_lanes(lambda a: jnp.linalg.inv(a), jnp.eye(2)) is None
    single, double = jnp.ones((), jnp.float32), jnp.ones((), jnp.float64)
    assert scalars.of_lanes(lambda a, b: (a, b), single, double) is None


def field(y, t, rate):
    a, b, c = y
    return jnp.stack([10 * (b - a), a * (rate - c) - b, a * b - 8 / 3 * c])


def many(rates, **options):
    one = lambda r: solve(field, jnp.ones(3), [0.0, 1.0], r, rtol=1e-6, atol=1e-6, **options)
    return jax.vmap(one)(rates)


def test_an_attempt_of_all_lanes_is_one_kernel():
    """Counted in the compiled loop: the reduction, rows put together, and how many are busy."""
    if jax.default_backend() != "cpu":
        pytest.skip("kernels of a CPU")
    text = jax.jit(many).lower(jnp.linspace(0.0, 50.0, 5000)).compile().as_text()
    bodies = [part for part in text.split("\n\n") if "_reduce_fusion" in part and "region" in part]
    kernels = min(len(re.findall(r" (?:fusion|concatenate)\(", body)) for body in bodies)
    assert kernels <= 10


@pytest.mark.parametrize("size", [4, 3000])
@pytest.mark.parametrize(
    "options", [{}, {"method": "rk4", "dt": 0.01}], ids=["adaptive", "equal steps"]
)
def test_a_reduction_in_another_order_gives_nan_and_no_wrong_number(monkeypatch, size, options):
    def reduce(operands, begin, combine, axes):
        if not isinstance(operands, tuple):
            return original(operands, begin, combine, axes)
        return jax.vmap(lambda *x: otherwise(x, begin, combine, axes), 1)(*operands)

    def otherwise(rows, begin, combine, axes):
        first, second = ([x[i] for x in rows] for i in range(2))
        return combine(combine(begin, first), combine(begin, second))

    original = lax.reduce
    rates = jnp.linspace(0.0, 20.0, size)
    good = many(rates, **options)
    jax.clear_caches()
    monkeypatch.setattr(lax, "reduce", reduce)
    bad = many(rates, **options)
    assert np.all(good.status == 0) and np.all(bad.status != 0)
    assert np.all(np.isnan(bad.ys[:, -1]))
    end = lambda r, y0: odeint(field, y0, [0.0, 1.0], r, **options)[-1].sum()
    by_sensitivities, by_going_back = jax.grad(end), jax.grad(end, (0, 1))
    assert np.all(np.isnan(jax.vmap(by_sensitivities, (0, None))(rates, jnp.ones(3))))
    assert np.all(np.isnan(jax.vmap(by_going_back, (0, None))(rates, jnp.ones(3))[0]))
    jax.clear_caches()
