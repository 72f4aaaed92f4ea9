"""Faults that were found from outside, each with its kind: the right value, alone and in a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxode import odeint, solve
from jaxode.arguments import trace_of


@jax.custom_jvp
def rounded(x):
    return jnp.round(x)


@rounded.defjvp
def _(primals, tangents):
    return rounded(*primals), tangents[0]


def end(f, **options):
    return lambda y: odeint(f, y, [0.0, 1.0], **options)[-1].sum()


CUSTOM = {
    "a rounding, straight through": (
        end(lambda y, t: rounded(4 * y), method="euler", dt=1.0),
        jnp.linspace(0.1, 1.1, 5),
        5.0,
    ),
    "a rounding, adaptive": (end(lambda y, t: -rounded(y)), jnp.ones(3), np.exp(-1)),
}


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_rules_are_kept_in_a_batch(name):
    loss, y, expected = CUSTOM[name]
    several = jnp.stack([y] * 12)
    for found in (
        jax.grad(loss)(y),
        jax.vmap(jax.grad(loss))(several)[3],
        jax.grad(lambda ys: jax.vmap(loss)(ys).sum())(several)[3],
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "field",
    [
        lambda y, t, p: p[0] - p[1] * y * jnp.abs(y),
        lambda y, t, p: p[0] - p[1] * jnp.cbrt(y),
        lambda y, t, p: p[0] - p[1] * y**0.9,
    ],
    ids=["drag", "cbrt", "power"],  # of a root see test_sensitivities
)
def test_a_derivative_that_is_infinite_at_the_start_spoils_no_gradient_of_a_batch(field):
    one = lambda p: odeint(field, jnp.array(0.0), jnp.array([0.0, 2.0]), p)[-1]
    p, run = jnp.array([1.0, 0.5]), jax.jit(jax.value_and_grad(one))
    (_, alone), batch = run(p), jax.vmap(jax.grad(one))(jnp.stack([p] * 12))
    h = 1e-5
    moved = [(run(p + h * e)[0] - run(p - h * e)[0]) / (2 * h) for e in jnp.eye(2)]
    np.testing.assert_allclose(alone, moved, rtol=1e-4)
    np.testing.assert_allclose(batch[5], alone, rtol=1e-10)


class Holder:
    """A func whose rule can be exchanged without its being another object."""

    def __call__(self, y, t):
        return self.rule(y)


def with_jvp(slope):
    rule = jax.custom_jvp(lambda x: -x)
    rule.defjvp(lambda primals, tangents: (-primals[0], slope * tangents[0]))
    return rule


def with_vjp(slope):
    rule = jax.custom_vjp(lambda x: -x)
    rule.defvjp(lambda x: (-x, None), lambda _, w: (slope * w,))
    return rule


@pytest.mark.parametrize("made", [with_jvp, with_vjp])
def test_a_rule_that_was_exchanged_is_used(made):
    func = Holder()
    for slope in (-1.0, 0.0, -3.0):
        func.rule = made(slope)
        found = jax.grad(lambda y: odeint(func, y, [0.0, 1.0], method="euler", dt=1.0)[-1])(1.0)
        np.testing.assert_allclose(found, 1 + slope, atol=1e-12)


@pytest.mark.parametrize("name", ["relu", "relu6", "softplus", "silu", "gelu", "log_sigmoid"])
def test_a_function_made_anew_with_a_custom_rule_is_equal_to_the_one_before(name):
    made = lambda: lambda y, t: -getattr(jax.nn, name)(y)
    traces = [trace_of(made(), jnp.ones(2), None, jnp.float64, ())[0] for _ in range(2)]
    assert traces[0] == traces[1] and hash(traces[0]) == hash(traces[1])


@pytest.mark.parametrize("adjoint", ["replay", "direct", "backsolve"])
def test_a_solve_that_starts_outside_of_the_domain_and_is_left_out_spoils_no_gradient(adjoint):
    def one(a, y):
        options = dict(adjoint=adjoint, max_steps=300, throw=False)
        sol = solve(lambda y, t, a: a * jnp.log(y), y, jnp.array([0.0, 1.0]), a, **options)
        return jnp.where(sol.status == 0, sol.ys[-1].sum(), 0.0)

    batch = jnp.stack([jnp.full(5, 2.0), jnp.full(5, -1.0)])
    loss = lambda a, ys: jax.vmap(one, (None, 0))(a, ys).sum()
    np.testing.assert_allclose(jax.grad(loss)(jnp.ones(5), batch), 1.05517, rtol=1e-4)
    np.testing.assert_array_equal(jax.grad(loss)(jnp.ones(5), batch[1:].repeat(2, 0)), 0)
    np.testing.assert_array_equal(jax.grad(one)(jnp.ones(5), batch[1]), 0)


# Terms of a field; those of the last one are in no native call.
FIELDS = [
    {
        "pad": lambda y: -jnp.pad(y, 1)[1:-1],
        "negative padding": lambda y: -lax.pad(y, jnp.zeros((), y.dtype), [(-1, 1, 0)]),
        "prod": lambda y: -y * jnp.prod(y),
        "cumprod": lambda y: -jnp.cumprod(y),
    },
    {
        "nothing summed": lambda y: -y + jnp.sum(y[:0]),
        "nothing compared": lambda y: jnp.where(jnp.all(y[:0] > 0), -y, y),
        "gather": lambda y: -y[jnp.array([2, 0, 1])],
        "cond": lambda y: lax.cond(y[0] > 0, lambda y: -y, lambda y: y, y),
        "scan": lambda y: lax.scan(lambda c, a: (c + a, -c * a), jnp.zeros((), y.dtype), y)[1],
    },
    {
        "sort": lambda y: -jnp.sort(y),
        "at": lambda y: (-y).at[jnp.array([1, 1])].add(0.1),
        "linear solve": lambda y: -jnp.linalg.solve(2 * jnp.eye(3, dtype=y.dtype), y),
    },
]


@pytest.mark.parametrize("terms", FIELDS, ids=" and ".join)
def test_any_field_that_jax_can_trace_gives_the_same_alone_and_in_a_batch(terms):
    y, field = jnp.array([0.3, 0.7, 1.1]), lambda y, t: sum(term(y) for term in terms.values())

    def loss(y, adjoint="replay"):
        options = dict(method="bosh3", rtol=1e-5, atol=1e-5, max_steps=100, adjoint=adjoint)
        return (odeint(field, y, jnp.linspace(0.0, 1.0, 4), **options) ** 2).sum()

    value, gradient = jax.value_and_grad(loss)(y)
    values, gradients = jax.vmap(jax.value_and_grad(loss))(jnp.stack([y, 1.1 * y] * 6))
    np.testing.assert_allclose(values[0], value, rtol=1e-10)
    np.testing.assert_allclose(gradients[0], gradient, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(gradient, jax.grad(loss)(y, "direct"), rtol=1e-9, atol=1e-11)


def test_no_solves_at_all_and_empty_states_have_empty_results():
    solve_one = lambda y: odeint(lambda y, t: -y, y, [0.0, 1.0])
    assert jax.vmap(solve_one)(jnp.ones((0, 3))).shape == (0, 2, 3)
    assert jax.vmap(solve_one)(jnp.ones((4, 0))).shape == (4, 2, 0)
    assert jax.vmap(jax.grad(lambda y: solve_one(y).sum()))(jnp.ones((0, 3))).shape == (0, 3)


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun"])
def test_what_a_failed_row_holds_is_the_same_alone_and_in_a_batch(method):
    field = lambda y, t: jnp.where(t >= 1, jnp.nan, -y)
    run = lambda y: solve(field, y, [0.0, 0.95, 1.0], method=method, dt=0.1, throw=False)
    alone, batch = run(1.0), jax.vmap(run)(jnp.ones(2))
    assert int(alone.status) == int(batch.status[0]) != 0
    np.testing.assert_array_equal(alone.ys, batch.ys[0])
    np.testing.assert_array_equal(np.isnan(alone.ys), [False, True, True])
