"""Mass matrices, differential-algebraic equations of index 1, their initial values; the user's own Jacobian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import Signal, Status, consistent, odeint, solve
from jaxode.methods import Banded, Diagonal, named
from jaxode.problems import problems

ROSENBROCK = ["rodas4", "rodas4p", "rodas5p"]
DIAGONALLY_IMPLICIT = ["trbdf2", "kvaerno5", "kencarp4"]
method = pytest.mark.parametrize("name", [*ROSENBROCK, *DIAGONALLY_IMPLICIT])
RATES, START = jnp.array([0.04, 1e4, 3e7]), jnp.array([1.0, 0.0, 0.0])
CONSERVED = jnp.array([1.0, 1.0, 0.0])


def robertson(y, t, k):
    """The conservation of mass in the place of the third equation."""
    a, b, c = y
    one, two, three = k[0] * a, k[1] * b * c, k[2] * b**2
    return jnp.stack([two - one, one - two - three, a + b + c - 1])


@pytest.mark.parametrize("name", ["rodas4", "rodas5p", "kvaerno5", "kencarp4"])
def test_robertson_as_a_dae_is_robertson(name):
    p = problems["robertson"]
    for rtol in (1e-4, 1e-6, 1e-8):
        options = dict(method=name, rtol=rtol, atol=1e-4 * rtol)
        found = solve(robertson, START, [0.0, p.t1], RATES, mass=CONSERVED, **options)
        error = np.abs(found.ys[-1] - p.answer()) / (1e-4 + np.abs(p.answer()))
        assert error.max() < 10 * rtol
        assert abs(found.ys[-1].sum() - 1) < 1e-12
        if name in ("rodas5p", "kvaerno5"):  # one of each family
            plain = solve(p.f, p.y0, [0.0, p.t1], method=name, rtol=rtol, atol=1e-4 * rtol)
            assert int(found.stats.accepted) < 1.3 * int(plain.stats.accepted) + 5


# A capacitor C between two nodes, each with a resistor: R1 to a source U(t), R2 to earth. The matrix of
# the capacitor is singular without a row of zeros. With q the voltage of the capacitor,
# (R1 + R2) C q' = U - q, and the current is i = (U - q) / (R1 + R2).
R1, R2, C = 2.0, 3.0, 0.1


def circuit(v, t, source=lambda t: jnp.sin(20 * t)):
    return jnp.stack([(source(t) - v[0]) / R1, -v[1] / R2])


CAPACITOR = C * jnp.array([[1.0, -1.0], [-1.0, 1.0]])


def voltages(t, w=20.0):
    """From q(0) = 0 with U = sin(w t), by variation of constants."""
    tau = (R1 + R2) * C
    phase = np.sin(w * t) - w * tau * np.cos(w * t) + w * tau * np.exp(-t / tau)
    i = (np.sin(w * t) - phase / (1 + (w * tau) ** 2)) / (R1 + R2)
    return np.stack([np.sin(w * t) - R1 * i, R2 * i], -1)


def test_a_circuit_is_its_closed_form_and_its_times_have_derivatives():
    options = dict(method="rodas5p", mass=CAPACITOR, rtol=1e-9, atol=1e-9)
    ts = jnp.array([0.0, 0.3, 0.7, 1.0, 1.0])
    solved = lambda ts: odeint(circuit, jnp.zeros(2), ts, **options)
    np.testing.assert_allclose(solved(ts), voltages(np.asarray(ts)), atol=2e-7)
    slopes = jax.jit(jax.jacrev(solved))(ts)
    e = 1e-6
    for i in (1, 2):
        expected = (voltages(ts[i] + e) - voltages(ts[i] - e)) / (2 * e)
        np.testing.assert_allclose(slopes[i, :, i], expected, rtol=1e-3, atol=1e-4)
    # The end, as a time between others: along dy/dt, which is not M dy/dt.
    expected = (voltages(1 + e) - voltages(1 - e)) / (2 * e)
    np.testing.assert_allclose(slopes[3, :, 3], expected, rtol=1e-4)


def test_a_source_that_jumps_moves_the_algebraic_part_at_once():
    pulse = Signal([0.0, 0.5, 2.0], [0.0, 1.0, 1.0], "previous")
    ts = jnp.array([0.0, 0.4, 0.6, 1.0])
    found = solve(lambda v, t: circuit(v, t, pulse), jnp.zeros(2), ts, method="rodas5p",
                  mass=CAPACITOR, rtol=1e-8, atol=1e-8)  # fmt: skip
    ts = np.asarray(ts)
    i = np.exp(-np.maximum(ts - 0.5, 0) / ((R1 + R2) * C)) / (R1 + R2) * (ts > 0.5)
    np.testing.assert_allclose(found.ys, np.stack([(ts > 0.5) - R1 * i, R2 * i], 1), atol=1e-7)


@method
def test_the_order_is_kept_and_dense_output_too(name):
    ts = jnp.linspace(0.0, 0.95, 8)
    run = jax.jit(lambda dt: odeint(circuit, jnp.zeros(2), ts, method=name, mass=CAPACITOR, dt=dt))
    steps = [1 / 20, 1 / 40, 1 / 80]
    errors = [np.abs(run(h) - voltages(np.asarray(ts))) for h in steps]
    ends, all_rows = ([e[-1].max() for e in errors], [e.max() for e in errors])
    assert np.log2(ends[0] / ends[2]) / 2 > named(name).order - 0.4
    assert np.log2(all_rows[0] / all_rows[2]) / 2 > named(name).dense_order - 0.4


FULL = jnp.array([[1.0, 0.2, 0.1], [0.3, 2.0, 0.4], [0.0, 0.1, 0.5]])
MILD = jnp.array([0.4, 1e1, 3e1])


def loss(y0, k, mass, name="rodas4", adjoint="replay"):
    """Equal steps: a difference does not see another choice of them."""
    t = [0.0, 0.1, 0.4]
    ys = odeint(robertson, y0, t, k, method=name, dt=0.02, adjoint=adjoint, mass=mass)
    return jnp.sum(ys[1:] @ jnp.asarray([1.0, 20.0, 3.0]))


def difference(fn, x, direction, e=1e-6):
    return (fn(x + e * direction) - fn(x - e * direction)) / (2 * e)


@pytest.mark.parametrize("mass", [CONSERVED, FULL], ids=["diagonal", "full"])
def test_derivatives_by_diagonally_implicit_methods_are_those_of_differences(mass):
    at = jnp.array([0.8, 0.1, 0.1]), MILD, mass
    run = jax.jit(jax.value_and_grad(lambda *x: loss(*x, name="kvaerno3"), (0, 1, 2)))
    _, exact = run(*at)
    for i, x in enumerate(at):
        v = np.random.default_rng(i).normal(size=x.shape) * (np.asarray(x) != 0)
        along = lambda z, i=i: run(*at[:i], z, *at[i + 1 :])[0]
        np.testing.assert_allclose(jnp.sum(exact[i] * v), difference(along, x, v), rtol=1e-6)


def test_diagonally_implicit_daes_of_a_batch_that_end_at_different_steps_are_each_of_them():
    def end(k):
        ys = odeint(robertson, START, [0.0, 40.0], k, method="kvaerno3", mass=CONSERVED, rtol=1e-4,
                    atol=1e-8, max_steps=200)  # fmt: skip
        return ys[-1, 0]

    rates = RATES[None] * np.asarray([1e-2, 0.3, 1.0])[:, None]
    run = jax.value_and_grad(end)
    many, slopes = jax.jit(jax.vmap(run))(rates)
    for i, k in enumerate(rates):
        one, slope = jax.jit(run)(k)
        np.testing.assert_allclose(many[i], one, rtol=1e-8)
        np.testing.assert_allclose(slopes[i], slope, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("mass", [CONSERVED, FULL], ids=["diagonal", "full"])
def test_derivatives_with_respect_to_start_rates_and_mass_are_those_of_differences(mass):
    at, run = (jnp.array([0.8, 0.1, 0.1]), MILD, mass), jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    _, exact = run(*at)
    if mass is CONSERVED:  # adjoints differ in how they go through a solve, not through a matrix
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)
        for adjoint, d in {"direct": jax.grad, "forward": jax.jacfwd}.items():
            other = jax.jit(d(lambda *x: loss(*x, adjoint=adjoint), (0, 1, 2)))(*at)  # noqa: B023
            jax.tree.map(close, other, exact)
    rng = np.random.default_rng(0)
    # What is 0 stays 0: another rank is another problem.
    for i, x in enumerate(at):
        v = rng.normal(size=x.shape) * (1.0 if i < 2 else np.asarray(mass) != 0)
        of = lambda z, i=i: run(*at[:i], z, *at[i + 1 :])[0]
        np.testing.assert_allclose(jnp.sum(exact[i] * v), difference(of, x, v), rtol=1e-6)


def test_the_second_derivative_with_respect_to_the_mass_is_a_difference_of_the_first():
    y0, v = jnp.array([0.8, 0.1, 0.1]), np.random.default_rng(1).normal(size=(3, 3))
    slope = lambda m: jax.grad(loss, 2)(y0, MILD, m)
    both = jax.jit(lambda m: jax.jvp(slope, (m,), (v,)))
    expected = difference(lambda m: both(m)[0], FULL, v)
    np.testing.assert_allclose(both(FULL)[1], expected, rtol=1e-5, atol=1e-8)


def test_the_gradient_of_a_singular_matrix_goes_along_its_rank():
    def charge(c, t=0.8):
        mass = c * jnp.array([[1.0, -1.0], [-1.0, 1.0]])
        return odeint(
            circuit, jnp.zeros(2), [0.0, t], method="rodas5p", mass=mass, rtol=1e-9, atol=1e-9
        )[-1, 0]

    run = jax.jit(jax.value_and_grad(charge))
    expected = difference(lambda c: run(c)[0], C, 1.0, 1e-4)
    np.testing.assert_allclose(run(C)[1], expected, rtol=1e-5)


def test_a_regular_matrix_is_the_inverse_inside_of_func():
    plain = lambda y, t, k: jnp.linalg.solve(FULL, robertson(y, t, k))
    y0 = jnp.array([0.8, 0.1, 0.1])
    options = dict(method="rodas4", rtol=1e-9, atol=1e-9)
    found = odeint(robertson, y0, [0.0, 0.5], MILD, mass=FULL, **options)
    np.testing.assert_allclose(found, odeint(plain, y0, [0.0, 0.5], MILD, **options), rtol=1e-7)
    twice = odeint(lambda y, t: -2 * y, jnp.ones(3), [1.0, 0.0], mass=2.0, **options)  # backwards
    np.testing.assert_allclose(twice[-1], np.e, rtol=1e-7)


def test_a_batch_of_daes_is_each_of_them():
    rates = RATES[None] * np.exp(np.linspace(-1, 1, 30))[:, None]
    one = lambda k, mass: odeint(
        robertson, START, [0.0, 10.0, 40.0], k, method="rodas5p", mass=mass, rtol=1e-6, atol=1e-10,
        max_steps=500,
    )  # fmt: skip
    masses = jnp.asarray(np.linspace(0.5, 2, 30)[:, None] * np.asarray(CONSERVED))
    both = lambda k, mass: (lambda ys: (ys[-1, 0], ys))(one(k, mass))
    run = jax.value_and_grad(both, (0, 1), has_aux=True)
    ((_, many), slopes), alone = jax.jit(jax.vmap(run))(rates, masses), jax.jit(run)
    for i in (0, 13, 29):
        (_, ys), slope = alone(rates[i], masses[i])
        np.testing.assert_allclose(many[i], ys, rtol=1e-7)
        for a, b in zip(slopes, slope):
            np.testing.assert_allclose(a[i], b, rtol=1e-6, atol=1e-12)
    scaled = odeint(
        problems["robertson"].f, START, [0.0, 10.0 / 0.5], method="rodas5p", rtol=1e-9, atol=1e-13
    )
    (_, same), _ = alone(jnp.asarray(RATES), 0.5 * CONSERVED)
    np.testing.assert_allclose(same[1], scaled[-1], rtol=1e-4, atol=1e-9)


def test_a_state_of_several_parts_has_a_diagonal_like_it_in_float32_too(dtype):
    def field(y, t):
        return {"x": -y["x"] + y["z"], "z": jnp.sum(y["x"]) - 2 * y["z"]}

    y0 = {"x": jnp.ones(2, dtype), "z": jnp.ones((), dtype)}
    ys = odeint(field, y0, [0.0, 1.0], method="rodas4", mass={"x": 1.0, "z": 0.0})
    # x_0 = x_1 = z: at rest.
    assert ys["z"].dtype == dtype
    np.testing.assert_allclose(ys["x"][-1], 1, rtol=1e-5)
    start = {**y0, "z": jnp.zeros((), dtype)}
    np.testing.assert_allclose(consistent(field, start, 0.0, mass={"x": 1.0, "z": 0.0})["z"], 1.0)
    moved = {**y0, "x": jnp.asarray([1.0, 0.0], dtype)}
    moved = consistent(field, moved, 0.0, mass={"x": 1.0, "z": 0.0})
    ys = odeint(field, moved, [0.0, 1.0], method="rodas4", mass={"x": 1.0, "z": 0.0})
    np.testing.assert_allclose(ys["x"][-1], [0.5 + 0.5 / np.e, 0.5 - 0.5 / np.e], rtol=1e-5)


@pytest.mark.parametrize("linear", [Banded(1, 1), Diagonal()])
def test_structured_systems_have_masses_too(linear):
    n = 20
    weights = np.linspace(0.5, 2, n)
    f = lambda y, t: -jnp.asarray(weights) * 3 * y
    for mass in (jnp.asarray(weights), jnp.diag(weights)):
        ys = odeint(f, jnp.ones(n), [0.0, 1.0], method="rodas5p", linear=linear, mass=mass)
        np.testing.assert_allclose(ys[-1], np.exp(-3), rtol=1e-6)
    with pytest.raises(ValueError, match="wider structure"):
        odeint(
            f,
            jnp.ones(n),
            [0.0, 1.0],
            method="rodas5p",
            linear=linear,
            mass=jnp.ones((n, n)) + jnp.eye(n),
        )


# Initial values.


def chord(y, t, a):
    """y_0' = -y_0, and y_1 with y_1^3 + y_1 = a y_0 + t."""
    return jnp.stack([-y[0], a * y[0] + t - y[1] ** 3 - y[1]])


def root(x):
    """The real root of z^3 + z = x."""
    return next(r.real for r in np.roots([1, 0, 1, -x]) if abs(r.imag) < 1e-9)


HALF = jnp.array([1.0, 0.0])


def test_consistent_values_keep_what_has_a_derivative_and_are_an_implicit_function():
    found = consistent(chord, jnp.array([2.0, -30.0]), 0.5, 4.0, mass=HALF)
    np.testing.assert_allclose(found, [2.0, root(8.5)], rtol=1e-12)
    z = root(8.5)
    of = lambda y, t, a: consistent(chord, y, t, a, mass=HALF)[1]
    y_bar, t_bar, a_bar = jax.jit(jax.grad(of, (0, 1, 2)))(jnp.array([2.0, 0.0]), 0.5, 4.0)
    slope = 1 / (3 * z**2 + 1)
    np.testing.assert_allclose(y_bar, [4 * slope, 0], rtol=1e-10)
    np.testing.assert_allclose([t_bar, a_bar], [slope, 2 * slope], rtol=1e-10)
    second = jax.jit(jax.grad(jax.grad(of, 2), 2))(jnp.array([2.0, 0.0]), 0.5, 4.0)
    np.testing.assert_allclose(second, -6 * z * slope**3 * 4, rtol=1e-9)
    many = jax.vmap(lambda a: of(jnp.array([2.0, 0.0]), 0.5, a))(jnp.array([0.0, 4.0, 100.0]))
    np.testing.assert_allclose(many, [root(0.5), root(8.5), root(200.5)], rtol=1e-10)


def test_values_that_are_not_consistent_are_an_error_where_they_are_known_and_a_guess_elsewhere():
    y0, options = jnp.array([2.0, 1.0]), dict(method="rodas5p", mass=HALF, rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="consistent"):
        solve(chord, y0, [0.0, 1.0], 4.0, **options)
    run = lambda y: odeint(chord, y, [0.0, 1.0], 4.0, **options)
    good = run(consistent(chord, y0, 0.0, 4.0, mass=HALF))
    np.testing.assert_allclose(good[-1], [2 / np.e, root(8 / np.e + 1)], rtol=1e-6)
    np.testing.assert_allclose(jax.jit(run)(y0), good, rtol=1e-6)
    slope = jax.jit(jax.grad(lambda y: run(y)[-1, 1]))(y0)
    expected = 4 / np.e / (3 * root(8 / np.e + 1) ** 2 + 1)
    np.testing.assert_allclose(slope, [expected, 0], rtol=1e-5, atol=1e-12)


def pendulum(y, t):
    """In the plane, with the constraint of its length: of index 3."""
    x, z, u, v, force = y
    return jnp.stack([u, v, -force * x, -force * z - 9.81, x**2 + z**2 - 1])


def test_an_index_above_1_is_an_error_and_a_status():
    name, y0, mass = "rodas4", jnp.array([1.0, 0, 0, 0, 0]), jnp.array([1.0, 1, 1, 1, 0])
    with pytest.raises(ValueError, match="index"):
        solve(pendulum, y0, [0.0, 1.0], method=name, mass=mass)
    with pytest.raises(ValueError, match="index"):
        consistent(pendulum, y0, 0.0, mass=mass)
    run = jax.jit(lambda y: solve(pendulum, y, [0.0, 1.0], method=name, mass=mass))
    found = run(y0)
    assert int(found.status) == Status.NOT_CONVERGED and np.all(np.isnan(found.ys[-1]))
    assert int(run(y0 * jnp.nan).status) == Status.NON_FINITE_INITIAL
    assert np.all(np.isnan(jax.jit(lambda y: consistent(pendulum, y, 0.0, mass=mass))(y0)))
    # Index 2 whose singular block has no zeros, and no root: y_1 + y_2 = y_0 = 1, twice, and otherwise.
    twins = lambda y, t: jnp.stack([-y[0], y[1] + y[2] - y[0], 3 * (y[1] + y[2]) / 3 - y[0]])
    with pytest.raises(ValueError, match="index"):
        solve(
            twins, jnp.array([1.0, 0.5, 0.5]), [0.0, 1.0], method=name, mass=jnp.array([1.0, 0, 0])
        )


def test_failing_members_of_a_batch_are_marked_alone():
    def f(y, t, a):
        return jnp.stack([y[0], a * y[1] - y[0]])

    one = lambda a: solve(f, jnp.array([1.0, 1.0]), [0.0, 1.0], a, method="rodas4", mass=HALF)
    found = jax.vmap(one)(jnp.array([1.0, 0.0, 2.0]))
    assert found.status.tolist() == [0, Status.NOT_CONVERGED, 0]
    np.testing.assert_allclose(found.ys[2, -1], [np.e, np.e / 2], rtol=1e-6)


BAD = [
    (dict(mass=jnp.ones((3, 2))), ValueError, "3 x 3"),
    (dict(mass=jnp.ones(4)), ValueError, "3 x 3"),
    (dict(mass="unit"), TypeError, "real numbers"),
    (dict(mass=jnp.array([1.0, jnp.nan, 0])), ValueError, "NaN"),
    (dict(mass=CONSERVED, method="tsit5"), ValueError, "rodas5p"),
    (dict(mass=CONSERVED, method="gauss4", dt=0.1), ValueError, "kvaerno5"),
    (dict(jac=lambda y, t, k: y, method="tsit5"), ValueError, "rodas5p"),
    (dict(jac=jnp.eye(3)), TypeError, "function"),
    (dict(jac=lambda y, t, k: jnp.ones((3, 2))), TypeError, "jacfwd"),
    (dict(jac=lambda y, t, k: jnp.eye(3, dtype=complex)), TypeError, "real part"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_what_is_no_mass_or_jacobian_is_refused_with_the_remedy(options, error, message):
    with pytest.raises(error, match=message):
        odeint(robertson, START, [0.0, 1.0], RATES, **{"method": "rodas4", **options})


# The user's own Jacobian.


def own(y, t, k):
    """That of Robertson's, with the conservation of mass."""
    a, b, c = y
    zero, one = jnp.zeros_like(a), jnp.ones_like(a)
    return jnp.stack(
        [
            jnp.stack([-k[0], k[1] * c, k[1] * b]),
            jnp.stack([k[0], -k[1] * c - 2 * k[2] * b, -k[1] * b]),
            jnp.stack([one, one, one + zero]),
        ]
    )


def test_an_own_jacobian_gives_the_same_numbers_and_gradients():
    def end(k, jac):
        ys = odeint(robertson, START, [0.0, 40.0], k, method="rodas4", mass=CONSERVED, jac=jac, rtol=1e-4,
                    atol=1e-9, max_steps=400)  # fmt: skip
        return ys[-1, 0]

    found, slope = jax.jit(jax.value_and_grad(lambda k: end(k, own)))(RATES)
    expected, slopes = jax.jit(jax.value_and_grad(lambda k: end(k, None)))(RATES)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_allclose(slope, slopes, rtol=1e-6)


def test_an_own_jacobian_is_used_and_differentiated_and_func_is_not():
    hidden = lambda y, t, k: -k * (jax.lax.stop_gradient(y) - jnp.cos(t))
    jac = lambda y, t, k: -k * jnp.eye(1)
    options = dict(method="rodas5p", rtol=1e-6, atol=1e-6, max_steps=200, throw=False)
    run = lambda **more: solve(hidden, jnp.ones(1), [0.0, 3.0], 1e6, **options, **more)
    assert int(run().status) == Status.MAX_STEPS
    np.testing.assert_allclose(run(jac=jac).ys[-1], np.cos(3.0), atol=1e-5)

    # An inexact one has a part in the numbers returned, and so in their derivatives.
    def end(k):
        inexact = lambda y, t, k: -jnp.sin(k) * jnp.eye(1)
        f = lambda y, t, k: -k * y**2
        return odeint(f, jnp.ones(1), [0.0, 1.0], k, method="rodas4", dt=0.1, jac=inexact)[-1, 0]

    np.testing.assert_allclose(
        jax.jit(jax.grad(end))(2.0), difference(jax.jit(end), 2.0, 1.0), rtol=1e-7
    )


def test_an_own_jacobian_of_a_pytree_is_what_jacfwd_returns_and_of_a_band_its_band():
    def field(y, t, k):
        return {"a": -k * y["a"] * y["b"][0], "b": y["b"] * jnp.stack([y["a"], -y["b"][0]])}

    y0 = {"a": jnp.array(1.0), "b": jnp.ones(2)}
    options = dict(method="rodas4", dt=0.1)
    plain = odeint(field, y0, [0.0, 1.0], 2.0, **options)
    found = odeint(field, y0, [0.0, 1.0], 2.0, jac=jax.jacfwd(field), **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, plain)
    chain = lambda y, t: -2 * y + jnp.pad(y[1:], (0, 1)) * y
    plain = odeint(chain, jnp.ones(6), [0.0, 1.0], **options)
    for linear in (Banded(0, 1), None):
        found = odeint(
            chain, jnp.ones(6), [0.0, 1.0], jac=jax.jacfwd(chain), linear=linear, **options
        )
        np.testing.assert_allclose(found, plain, rtol=1e-12)


def test_an_own_jacobian_serves_newtons_method_whose_solution_it_does_not_change():
    field = lambda y, t, k: jnp.stack([-k * y[0] * y[1], k * y[0] * y[1] - y[1] ** 2])
    wrong = lambda y, t, k: 0.8 * jax.jacfwd(field)(y, t, k)

    def end(k, jac):
        options = dict(method="kvaerno3", dt=0.1, jac=jac)
        return odeint(field, jnp.array([1.0, 0.3]), [0.0, 1.0], k, **options)[-1, 0]

    value, slope = jax.jit(jax.value_and_grad(lambda k: end(k, None)))(2.0)
    for jac in (jax.jacfwd(field), wrong):
        found = jax.jit(jax.value_and_grad(lambda k, jac=jac: end(k, jac)))(2.0)
        np.testing.assert_allclose(found, (value, slope), rtol=1e-9)
    stiff = lambda y, t: -1e4 * (y - jnp.cos(t))
    run = lambda jac: solve(stiff, jnp.ones(1), [0.0, 1.0], method="kvaerno3", jac=jac).stats
    right, half = (run(lambda y, t, w=w: jnp.array([[-1e4 * w]])) for w in (1.0, 0.5))
    assert int(right.evaluations) == int(run(None).evaluations) < int(half.evaluations)


def test_a_mass_is_for_real_states():
    with pytest.raises(TypeError, match="real"):
        odeint(lambda y, t: -y, jnp.ones(2, complex), [0.0, 1.0], method="rodas4", mass=1.0)
