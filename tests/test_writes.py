"""Writes into small arrays as pieces: the same bits and derivatives, and no scatter where places are known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from jaxode import Event, odeint
from jaxode.kernels.one_call import suits
from jaxode.kernels.writes import WRITES, evaluate, holds_writes

Y, A = jnp.array([0.5, -1.25, 2.0, -0.0, 3.5]), jnp.array([[1.0, -2.0, 3.0], [4.0, 0.5, -6.0]])
EDGES = jnp.array([[0, 1, 2, 3, 0], [1, 2, 2, 4, 9]])
WRITTEN = {
    "set": (lambda x: x.at[1].set(x[0] * 3), Y),
    "add": (lambda x: x.at[0].add(jnp.sin(x[2])), Y),
    "multiply": (lambda x: x.at[-1].multiply(x[0]), Y),
    "min": (lambda x: x.at[2].min(x[1]), Y),
    "max": (lambda x: x.at[2].max(x[1]), Y),
    "slice": (lambda x: x.at[1:4].set(x[:3] ** 2), Y),
    "every other": (lambda x: x.at[::2].add(x[:3]), Y),
    "one after another": (lambda x: jnp.zeros(3).at[0].set(x[1]).at[1].set(x[0]).at[2].add(x[2]), Y),
    "places that repeat": (lambda x: x.at[jnp.arange(4) // 2].add(x[1:]), Y),
    "row": (lambda x: x.at[1].set(x[0]), A),
    "column": (lambda x: x.at[:, 1].multiply(x[:, 0]), A),
    "entry": (lambda x: x.at[0, -1].set(x[1, 1]), A),
    "block": (lambda x: x.at[:, 1:].add(x[:, :2]), A),
    "everything": (lambda x: x.at[...].set(2 * x), A),
    "in a jitted function": (lambda x: jax.jit(lambda x: x.at[1].set(x[0]))(x) ** 2, Y),
    "not known": (lambda x: x.at[jnp.argmax(x)].set(x[0]), Y),
    "row not known": (lambda x: x.at[jnp.argmax(x[:, 0])].add(x[0]), A),
    "entry not known": (lambda x: x.at[jnp.argmax(x[:, 0]), jnp.argmin(x[0])].multiply(x[0, 2]), A),
    "not known, outside": (lambda x: x.at[jnp.argmax(x) + 1].set(x[0]), Y),
    "not known, clipped": (lambda x: x.at[jnp.argmax(x) + 1].set(x[0], mode="clip"), Y),
    "sums over edges": (lambda x: jax.ops.segment_sum(x[EDGES[0]] * x[EDGES[1]], EDGES[1], 5), Y),
    "outside": (lambda x: x.at[9].set(x[0]), Y),
    "clipped": (lambda x: x.at[9].set(x[0], mode="clip"), Y),
    "complex": (lambda x: x.at[1].multiply(2j), Y.astype(complex) * 1j),
    "float16": (lambda x: x.at[1].add(x[0]), Y.astype(jnp.float16)),
    "a number": (lambda x: x.at[()].set(x * 2), Y[0]),
}  # fmt: skip


def pieces(fn):
    """The function, with its writes as pieces."""

    def call(x):
        closed = jax.make_jaxpr(fn)(x)
        return evaluate(closed.jaxpr, closed.consts, [x])[0]

    return call


@pytest.mark.parametrize("name", WRITTEN)
def test_they_are_the_same_numbers_and_have_the_same_derivatives(name):
    fn, x = WRITTEN[name]
    put, bars = pieces(fn), jax.eval_shape(fn, x)
    assert holds_writes(jax.make_jaxpr(fn)(x).jaxpr)
    made = jax.make_jaxpr(put)(x).jaxpr
    assert not any(eqn.primitive.name in WRITES for eqn in every_equation(made))
    same = lambda a, b: (
        np.testing.assert_array_equal(a, b),
        np.testing.assert_array_equal(np.signbit(np.real(a)), np.signbit(np.real(b))),
    )
    same(put(x), fn(x))
    same(jax.vmap(put, -1, -1)(jnp.stack([x, 2 * x], -1))[..., 1], fn(2 * x))
    x_dot = jnp.cos(jnp.arange(x.size)).reshape(x.shape).astype(x.dtype)
    y_bar = jnp.arange(1, 1 + bars.size).reshape(bars.shape).astype(bars.dtype)
    wanted = jax.jvp(fn, (x,), (x_dot,))[1]
    near = dict(rtol=1e-2 if x.dtype == jnp.float16 else 1e-12)
    np.testing.assert_allclose(jax.jvp(put, (x,), (x_dot,))[1], wanted, **near)
    (x_bar,) = jax.vjp(put, x)[1](y_bar)
    np.testing.assert_allclose(jnp.sum(x_bar * x_dot), jnp.sum(y_bar * wanted), **near)


def every_equation(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from every_equation(inner)


def test_a_place_of_a_large_array_that_is_not_known_stays_a_scatter():
    fn, x = lambda x: x.at[jnp.argmax(x)].set(0.0), jnp.arange(100.0)
    made = jax.make_jaxpr(pieces(fn))(x).jaxpr
    assert any(eqn.primitive.name == "scatter" for eqn in every_equation(made))
    np.testing.assert_array_equal(pieces(fn)(x), fn(x))


def test_a_function_that_writes_its_components_is_one_native_call():
    stacked = lambda y, t: jnp.stack([y[1], -jnp.sin(y[0])])
    written = lambda y, t: jnp.zeros(2).at[0].set(y[1]).at[1].add(-jnp.sin(y[0]))
    y0, t = jnp.array([1.0, 0.5]), jnp.linspace(0.0, 3.0, 4)

    def of(field):
        push = Event(times=[1.0], change=lambda y, t: field(y, t))
        loss = lambda y0: jnp.sum(odeint(field, y0, t, events=[push]) ** 2)
        program = jax.jit(jax.value_and_grad(loss)).lower(y0)
        return program.as_text().count("xla_cpu_small_call"), program.compile()(y0)

    (calls, wanted), (written_calls, found) = of(stacked), of(written)
    assert written_calls == calls > 0
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-13), found, wanted)
    assert suits(pieces(lambda y: written(y, 0.0)), y0)
