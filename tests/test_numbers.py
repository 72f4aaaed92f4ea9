"""Functions of a few numbers as one kernel: against the same as arrays, and what must stay as it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxode
from jaxode.kernels import numbers
from jaxode.kernels.numbers import can_be_taken_apart, in_numbers, keeps_order
from jaxode.kernels.one_call import one_call
from jaxode.methods import BlockDiagonal, Diagonal, methods

LANES = 5


def solved(y):
    """A linear system with a rule of its own."""
    apart = lambda _, b: b / (2 + 0.1 * y)
    return lax.custom_linear_solve(lambda x: (2 + 0.1 * y) * x, y, apart, apart)


# Every kind of operation that is taken apart, of a vector of three positive numbers.
OPERATIONS = {
    "arithmetic": lambda y: (y + 2) * y - y / (1 + y**2),
    "functions": lambda y: jnp.exp(-y) + jnp.tanh(y) + jnp.log(y) + y**2.5 + jax.nn.softplus(y),
    "comparisons": lambda y: jnp.where(y > 0.5, y, jnp.maximum(y, 0.2)) + (y > 1),
    "clip": lambda y: jnp.clip(y, 0.2, 0.8) + lax.clamp(y[0] / 2, y, y[0]),
    "one by one": lambda y: jnp.stack([y[2] * y[0], y[1], -y[0]]),
    "unstacked": lambda y: jnp.stack([a * a for a in y]),
    "turned": lambda y: jnp.roll(y, 1) - y[::-1],
    "differences": lambda y: jnp.diff(jnp.concatenate([y, y[:2]])),
    "strided": lambda y: y[::2],
    "parts": lambda y: jnp.concatenate(jnp.split(y, [1]))[:2],
    "pad": lambda y: jnp.pad(y, (2, 1)) + lax.pad(y, y[0], [(-1, 2, 1)])[:6],
    "matrix": lambda y: jnp.arange(12, dtype=y.dtype).reshape(4, 3) @ y,
    "outer": lambda y: jnp.outer(y, y).T.reshape(-1),
    "einsum": lambda y: jnp.einsum("ij,jk,bk->bi", jnp.outer(y, y), y[:, None] - y, y + y[:2, None]),
    "batches of products": lambda y: jnp.einsum("bi,bij->bj", y[:, None] * y[:2],
                                               jnp.arange(12, dtype=y.dtype).reshape(3, 2, 2)),
    "sums": lambda y: jnp.sum(jnp.outer(y, y), 0) + jnp.prod(y) + jnp.max(y) - jnp.min(y),
    "any and all": lambda y: jnp.any(y > 0.5) * y + jnp.all(y > 0.5),
    "sums of all before": lambda y: jnp.cumsum(y) + jnp.cumprod(y[::-1]) + lax.cummax(y, reverse=True),
    "whole numbers": lambda y: jnp.arange(3) * y + jnp.floor(y * 4).astype(jnp.int32) % 3,
    "axes": lambda y: jnp.squeeze(jnp.expand_dims(jnp.swapaxes(jnp.outer(y, y), 0, 1), 0), 0),
    "a derivative": lambda y: jax.jacfwd(lambda y: jnp.stack([y[0] * y[1], jnp.sin(y[2])]))(y),
    "a vjp": jax.grad(lambda y: jnp.sum(jnp.sin(y[1:]) * y[:2]) + jax.nn.relu(y[0])),
    "a rule of its own": solved,
    "kept for later": jax.checkpoint(lambda y: jnp.sin(y) * y),
    "a function inside": jax.jit(lambda y: jnp.cos(y)),
    "nothing": lambda y: (y[:0], jnp.zeros((), y.dtype), y),
}  # fmt: skip


def as_one_kernel(fn, many, shared=()):
    """fn of all lanes as a program; fails if it is not one kernel."""

    def kernel(many, shared):
        found = in_numbers(fn, many, shared)
        assert found is not None
        return found(many, shared)

    def otherwise(many, shared):
        raise AssertionError("no call")

    return jax.jit(one_call(kernel, otherwise))(many, shared)


@pytest.fixture
def as_users_do():
    """Arrays of several types and ranks go together, as without the strict settings of these tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.usefixtures("as_users_do")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", OPERATIONS)
def test_it_is_the_same_function(name, dtype):
    fn = lambda y, _: OPERATIONS[name](y)
    y = jnp.asarray(np.random.default_rng(0).uniform(0.1, 1.5, (3, LANES)), dtype)
    near = 1e-5 if dtype == jnp.float32 else 1e-12
    found, wanted = as_one_kernel(fn, y), jax.vmap(fn, (-1, None), -1)(y, ())
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=near, atol=near)


def test_what_lanes_share_and_what_is_closed_over():
    y, c, d = jnp.arange(6.0).reshape(2, 3), jnp.array([2.0, 3.0]), jnp.array([5.0, 7.0])

    @jax.jit
    def program(y, c, d):
        fn = lambda y, c: c * y + d  # d is traced here, outside of fn
        call = lambda y, c, d: in_numbers(lambda y, c: c * y + d, y, c)(y, c)
        return one_call(call, lambda *_: fn(y, c[:, None]))(y, c, d)

    np.testing.assert_array_equal(program(y, c, d), c[:, None] * y + d[:, None])


@pytest.mark.usefixtures("as_users_do")
@pytest.mark.parametrize("fn", [
    lambda y, _: jnp.sort(y),
    lambda y, _: y[jnp.argmax(y)],
    lambda y, _: lax.fori_loop(0, 3, lambda _, y: 2 * y, y),
    lambda y, _: y + 1j,
    lambda y, _: (y, y.astype(jnp.float32)),
    lambda y, _: functools.reduce(lambda y, _: jnp.sin(jnp.outer(y, y)[0]), range(2000), y),
])  # fmt: skip
def test_what_cannot_be_taken_apart_is_left_alone(fn):
    assert in_numbers(fn, jnp.ones((3, LANES)), ()) is None


def test_a_field_is_asked_before_lanes_are_planned():
    assert can_be_taken_apart(lambda y: jnp.sin(y) * y[::-1], jnp.ones(3))
    assert not can_be_taken_apart(jnp.sort, jnp.ones(3))


def test_xla_combines_rows_in_turn():
    assert keeps_order()


# Steps of implicit methods in lanes.


def chain(n):
    def f(y, t, k):
        left, right = jnp.concatenate([y[-1:], y[:-1]]), jnp.concatenate([y[1:], y[:1]])
        return k[0] * 300 * (left - 2 * y + right) + k[1] * (1 - y) * y + jnp.sin(t)

    return f, jnp.linspace(0.1, 1.0, n)


RATES = jnp.exp(0.3 * jnp.asarray(np.random.default_rng(1).normal(size=(12, 2))))
TIMES = jnp.linspace(0.0, 2.0, 5)


@pytest.mark.parametrize(
    ("method", "n", "linear"),
    [
        ("rodas5p", 2, None),
        ("rodas4", 4, None),  # backwards, too
        ("rodas4", 4, Diagonal()),
        ("rodas5p", 6, Diagonal()),
        ("rodas4", 6, BlockDiagonal(2)),
        ("rodas4", 8, None),
    ],
)
def test_many_solves_are_those_of_each(method, n, linear):
    f, y0 = chain(n)
    if linear is not None:  # no other entries than these
        f = lambda y, t, k: -k[0] * 300 * (y - jnp.cos(t)) + k[1] * y**2
    given = dict(method=method, rtol=1e-6, atol=1e-8, linear=linear)
    value = lambda k: jnp.sum(jaxode.odeint(f, y0, TIMES, k, **given) ** 2)
    alone = jax.jit(jax.value_and_grad(value))
    found = jax.jit(jax.vmap(jax.value_and_grad(value)))(RATES)
    wanted = [alone(k) for k in RATES]
    for a, b in zip(found, map(jnp.stack, zip(*wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(jax.jit(jax.vmap(value))(RATES), found[0], rtol=1e-9)


def test_gradients_of_what_lanes_share_are_summed():
    f, y0 = chain(3)
    given = dict(method="rodas5p", rtol=1e-6, atol=1e-8)
    one = lambda shared, k: jnp.sum(
        jaxode.odeint(lambda y, t: shared * f(y, t, k), y0, TIMES, **given)
    )
    together = lambda shared: jnp.sum(jax.vmap(one, (None, 0))(shared, RATES))
    wanted = sum(jax.grad(one)(1.1, k) for k in RATES)
    np.testing.assert_allclose(jax.grad(together)(1.1), wanted, rtol=1e-7)


def test_a_bad_lane_leaves_the_others_as_they_are():
    f, y0 = chain(6)
    solve = lambda k: jaxode.solve(f, y0, TIMES, k, method="rodas5p", throw=False)
    good = jax.vmap(solve)(RATES)
    bad = jax.vmap(solve)(RATES.at[3].set(jnp.nan))
    others = np.arange(len(RATES)) != 3
    np.testing.assert_array_equal(good.ys[others], bad.ys[others])
    assert bad.status[3] != jaxode.Status.SUCCESS and jnp.isnan(bad.ys[3, 1:]).all()


def test_an_xla_that_combines_rows_in_another_way_gets_arrays(monkeypatch):
    f, y0 = chain(6)
    solve = lambda k: jaxode.odeint(f, y0, TIMES, k, method="rodas5p")
    wanted = jax.vmap(solve)(RATES)
    monkeypatch.setattr(numbers, "keeps_order", lambda: False)
    jax.clear_caches()
    np.testing.assert_allclose(jax.vmap(solve)(RATES), wanted, rtol=1e-5)


def test_methods_that_can_be_taken_apart_say_so():
    suited = {name for name, method in methods.items() if method.in_numbers() is not None}
    assert suited == {"rodas4", "rodas4p", "rodas5p"}
