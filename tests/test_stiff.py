"""Implicit methods: order, stability, linear algebra, stiff problems with references, failures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.linalg import expm

from jaxode import Status, odeint, solve
from jaxode.methods import Banded, Dense, Diagonal, named
from jaxode.methods.esdirk import methods as esdirk
from jaxode.methods.kencarp import methods as kencarp
from jaxode.methods.linear import LOOPED, solver
from jaxode.methods.rosenbrock import methods as rosenbrock
from jaxode.problems import problems

METHODS = {**rosenbrock, **esdirk, **kencarp}
method = pytest.mark.parametrize("name", METHODS)


def smooth(y, t):
    """Nonlinear, and not autonomous."""
    return jnp.stack([-y[0] * y[1] * jnp.cos(t), y[0] - y[1] * t])


SMOOTH = dict(y0=jnp.array([1.0, 0.5]), t=jnp.linspace(0.0, 1.0, 8))


@method
def test_every_method_has_the_order_it_declares(name):
    exact = solve_ivp(lambda t, y: np.asarray(smooth(y, t)), (0, 1), SMOOTH["y0"], method="DOP853",
                      rtol=1e-13, atol=1e-14, t_eval=SMOOTH["t"]).y.T  # fmt: skip
    # Not so small that what Newton's method leaves undone is seen.
    steps = [h / 8 if named(name).order >= 5 else h / 20 for h in (1, 1 / 2, 1 / 4)]
    run = jax.jit(lambda dt: odeint(smooth, **SMOOTH, method=name, dt=dt))
    errors = [np.abs(run(dt) - exact) for dt in steps]
    ends = [e[-1].max() for e in errors]
    slope = np.log2(ends[0] / ends[2]) / 2
    assert named(name).order - 0.4 < slope < named(name).order + 0.8
    dense = np.log2(errors[0].max() / errors[2].max()) / 2
    assert dense > named(name).dense_order - 0.4


@method
def test_dense_output_has_the_slope_of_the_solution_at_the_start(name):
    m, f = named(name), lambda y, s: smooth(y, s)
    s, h, y = jnp.zeros(()), jnp.asarray(1e-3), SMOOTH["y0"]
    step = m.step(f, s, y, m.start(f, s, y), h)
    d = m.inside(f, s, y, h, step)
    np.testing.assert_allclose(sum(d), step.y - y, rtol=1e-12)
    np.testing.assert_allclose(d[0], h * f(y, s), rtol=2e-3)


@method
def test_every_method_is_l_stable(name):
    m, y = named(name), jnp.array([1.0])
    factor = jax.jit(lambda z: m.step(lambda y, s: z * y, 0 * z, y, z * y, jnp.ones_like(z)).y[0])
    zs = -np.logspace(-3, 7, 40)
    values = np.array([float(factor(z)) for z in zs])
    assert np.all(np.abs(values) <= 1)
    assert abs(values[-1]) < 1e-4
    small = np.abs(zs) < 0.02
    np.testing.assert_allclose(values[small], np.exp(zs[small]), rtol=3e-4)


MATRICES = [(n, Dense()) for n in (1, 3, 4, 5, 9, LOOPED + 1)]
MATRICES += [
    (n, Banded(*of)) for n, of in ((1, (0, 0)), (9, (2, 3)), (7, (3, 0)), (30, (1, 1)), (5, (0, 2)))
]
MATRICES += [(6, Diagonal())]


@pytest.mark.parametrize(("n", "linear"), MATRICES)
def test_linear_systems_are_solved_and_differentiated_as_by_numpy(n, linear):
    rng = np.random.default_rng(n)
    i, j = np.indices((n, n))
    a = rng.normal(size=(n, n))
    if isinstance(linear, Banded):
        a[(i - j > linear.lower) | (j - i > linear.upper)] = 0
    if isinstance(linear, Diagonal):
        a[i != j] = 0
    b, v = rng.normal(size=(2, n))
    whole = np.eye(n) - 0.7 * a

    def found(a, b):
        jacobian = linear.jacobian(lambda y: a @ jnp.sin(y), jnp.zeros(n))
        return solver(linear, jacobian, jnp.asarray(0.7))(b)

    @jax.jit
    def answers(a, b, v):
        back = jax.grad(lambda a, b: v @ found(a, b), (0, 1))
        many = jax.vmap(found, (None, 1), 1)
        return found(a, b), back(a, b), many(a, jnp.stack([b, v], 1))

    one, (a_bar, b_bar), many = answers(*map(jnp.asarray, (a, b, v)))
    x, back = np.linalg.solve(whole, b), np.linalg.solve(whole.T, v)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-7 * np.abs(b).max())
    close(one, x)
    close(b_bar, back)
    close(np.where(a == 0, 0, a_bar), np.where(a == 0, 0, 0.7 * np.outer(back, x)))
    close(many, np.linalg.solve(whole, np.stack([b, v], 1)))


def test_a_stiff_matrix_is_solved_to_the_roundings_that_its_condition_allows():
    rng, linear = np.random.default_rng(0), Dense()
    jacobian = rng.normal(size=(9, 9)) * 10.0 ** rng.uniform(-4, 6, size=(9, 1))
    jacobian[-1] = -jacobian[:-1].sum(0)  # it keeps a sum
    whole, x = np.eye(9) - jacobian, rng.normal(size=9)
    b = np.asarray(whole.astype(np.longdouble) @ x, float)
    factors = linear.factor(jnp.asarray(whole))
    size = np.finfo(float).eps * np.linalg.cond(whole)
    np.testing.assert_allclose(linear.substitute(factors, jnp.asarray(b)), x, rtol=0, atol=size)


# The ring modulator oscillates for 40,000 steps and more, whose errors add up to 10 to 45 tolerances.
STIFF = [n for n, p in problems.items() if p.stiff and p.mass is None and n != "ring_modulator"]
# All of them by one method: the others share its linear algebra and the choice of its steps. Those four, on
# which the coefficients of methods show, by each: long times, jumps, a stiff source, rates of all sizes.
TELLING = ("robertson_long", "van_der_pol_1e6", "prothero_robinson", "e5")
PAIRS = [
    *((problem, "rodas5p") for problem in STIFF),
    *((problem, name) for problem in TELLING for name in ("rodas4", "rodas4p")),
]


@pytest.mark.parametrize(("problem", "name"), PAIRS)
def test_stiff_problems_are_solved_to_ten_tolerances(problem, name):
    p = problems[problem]
    linear = Banded(*p.band) if p.band else None
    run = jax.jit(
        lambda rtol: solve(
            p.f, p.y0, [p.t0, p.t1], *p.args, method=name, linear=linear, rtol=rtol,
            atol=rtol * p.scale, max_steps=2**15, throw=False,
        )
    )  # fmt: skip
    for rtol in (1e-4, 1e-6, 1e-8):
        found = run(rtol)
        error = np.abs(found.ys[-1] - p.answer()) / (p.scale + np.abs(p.answer()))
        assert int(found.status) != Status.SUCCESS or error.max() < 10 * rtol, rtol


@pytest.mark.parametrize("name", rosenbrock)
def test_what_df_dy_keeps_is_kept_to_roundings_so_that_e5_is_right_where_it_is_smallest(name):
    p = problems["e5_long"]
    run = jax.jit(
        lambda atol: (
            solve(
                p.f, p.y0, [0.0, 1e7, 1e13], method=name, rtol=1e-8, atol=atol, max_steps=2**15
            ).ys
        )
    )
    ys = np.asarray(run(1.1e-24))
    b, c, d = ys[1, 1:]
    assert abs(b - c - d) < 3e-24  # of numbers that were 1e-10
    np.testing.assert_allclose(ys[-1], p.answer(), rtol=0, atol=3e-24)


def test_a_tolerance_that_no_rounding_of_the_state_can_meet_is_warned_of():
    p = problems["e5_long"]
    with pytest.warns(UserWarning, match="leave one of them out"):
        solve(p.f, p.y0, [0.0, 1e-3], method="rodas4", rtol=1e-4, atol=1.1e-24)


def rate_equations(y, t, k):
    """Robertson's, of a dictionary."""
    a, b, c = y["a"], y["bc"][0], y["bc"][1]
    one, two, three = k[0] * a, k[1] * b * c, k[2] * b**2
    return {"a": two - one, "bc": jnp.stack([one - two - three, three])}


RATES = jnp.array([0.04, 1e4, 3e7])
MILD = jnp.array([0.4, 1e2, 3e2])  # for steps of equal size
START = {"a": jnp.array(1.0), "bc": jnp.zeros(2)}


@pytest.mark.parametrize("name", ["rodas4", "kvaerno5"])  # one of each family
def test_every_adjoint_gives_the_derivative_of_the_numbers_returned(name):
    def loss(y0, k, adjoint="replay"):
        # Equal steps on a time of its own scale: a difference does not see another choice of them.
        ys = odeint(rate_equations, y0, [0.0, 0.1, 0.4], k, method=name, dt=0.01, adjoint=adjoint)
        return 1e3 * jnp.sum(ys["a"]) + 1e3 * jnp.sum(ys["bc"][1:, 0])

    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    _, exact = run(START, MILD)
    direct = jax.jit(jax.grad(lambda *x: loss(*x, "direct"), (0, 1)))(START, MILD)
    forward = jax.jit(jax.jacfwd(lambda *x: loss(*x, "forward"), (0, 1)))(START, MILD)
    for other in (direct, forward):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), other, exact)
    e = np.diag(1e-5 * np.asarray(MILD))
    for i in range(3):
        (above, up), (below, down) = run(START, MILD + e[i]), run(START, MILD - e[i])
        np.testing.assert_allclose(exact[1][i], (above - below) / (2 * e[i, i]), rtol=1e-5)
    if name == "kvaerno5":  # of the other family see test_mass
        of_last = lambda k: jax.grad(loss, 1)(START, MILD.at[2].set(k))
        second = jax.jit(jax.jacfwd(of_last))(MILD[2])
        np.testing.assert_allclose(second, (up[1] - down[1]) / (2 * e[2, 2]), rtol=1e-4)


def test_backsolve_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="replay"):
        odeint(lambda y, t: -y, 1.0, [0.0, 1.0], method="rodas5p", adjoint="backsolve")


def test_a_batch_is_what_scipy_finds_each_with_its_own_jacobian():
    rates = RATES[None] * np.exp(np.linspace(-1, 1, 12))[:, None]
    t = np.array([0.0, 1.0, 40.0])

    def field(y, t, k):
        r = k[0] * y[0], k[1] * y[1] * y[2], k[2] * y[1] ** 2
        return jnp.stack([r[1] - r[0], r[0] - r[1] - r[2], r[2]])

    def one(k):
        options = dict(method="rodas5p", rtol=1e-7, atol=1e-11, max_steps=2000)
        ys = solve(field, jnp.array([1.0, 0, 0]), t, k, **options).ys
        return ys[-1, 0], ys

    run = jax.grad(one, has_aux=True)
    (many, found), alone = jax.jit(jax.vmap(run))(rates), jax.jit(run)
    for i in (0, 7, 11):
        f = lambda t, y, k=rates[i]: np.array(
            [k[1] * y[1] * y[2] - k[0] * y[0],
             k[0] * y[0] - k[1] * y[1] * y[2] - k[2] * y[1] ** 2, k[2] * y[1] ** 2]
        )  # fmt: skip
        f_np = lambda t, y, f=f: f(t, y).astype(float)
        expected = solve_ivp(f_np, (0, 40), [1.0, 0, 0], "Radau", t_eval=t, rtol=1e-9, atol=1e-13)
        np.testing.assert_allclose(found[i], expected.y.T, rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(many[i], alone(rates[i])[0], rtol=1e-6)


@pytest.mark.parametrize("name", ["rodas4", "kvaerno3"])
def test_float32_stays_float32(name):
    f = lambda y, t: -1e4 * (y - jnp.cos(t))
    ys = odeint(f, jnp.ones(2, jnp.float32), jnp.array([0.0, 1.0], jnp.float32), method=name)
    assert ys.dtype == jnp.float32
    np.testing.assert_allclose(ys[-1], np.cos(1.0), atol=2e-4)


@pytest.mark.parametrize("name", ["rodas4", "kvaerno3"])
def test_a_matrix_product_in_func_is_differentiated_in_all_directions_at_once(name):
    rates = np.array([[-100.0, 1.0], [2.0, -1e3]])
    func = lambda y, t: (y.reshape(3, 2) @ rates.T).reshape(
        -1
    )  # six directions of (2, 2) by (2, 3)
    options = dict(method=name, rtol=1e-6, atol=1e-9)
    found = odeint(func, jnp.arange(6.0), [0.0, 0.01], **options)[-1]
    exact = np.arange(6.0).reshape(3, 2) @ expm(0.01 * rates).T
    np.testing.assert_allclose(found, exact.reshape(-1), rtol=1e-4, atol=1e-7)


def test_a_line_of_reactions_is_solved_without_its_band_too():
    p = problems["brusselator_line"]
    ys = odeint(p.f, p.y0, [0.0, 10.0], *p.args, method="rodas5p", rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(ys[-1], p.answer(), atol=1e-5)


def test_a_complex_state_and_a_diagonal_jacobian():
    rates = jnp.array([1.0, 1e3, 1e6])
    f = lambda y, t, k: -k.astype(y.dtype) * y * jnp.asarray(1 + 1j, y.dtype)
    for name in ("rodas5p", "kvaerno5"):
        found = odeint(
            f, jnp.ones(3, jnp.complex128), [0.0, 0.5], rates, method=name, rtol=1e-6, atol=1e-6
        )
        np.testing.assert_allclose(
            found[-1], np.exp(-np.asarray(rates) * 0.5 * (1 + 1j)), atol=1e-5
        )
        real = odeint(
            lambda y, t, k: -k * y, jnp.ones(3), [0.0, 0.5], rates, method=name, linear=Diagonal(),
            rtol=1e-6, atol=1e-6,
        )  # fmt: skip
        np.testing.assert_allclose(real[-1], np.exp(-rates * 0.5), atol=1e-5)


@pytest.mark.parametrize("name", ["rodas4", "kvaerno3"])
def test_equations_that_cannot_be_solved_are_a_status_of_their_own(name):
    root = lambda y, t: 1 - jnp.sqrt(y)  # its derivative at 0 is infinite
    found = solve(root, jnp.array([0.0]), [0.0, 1.0], method=name, throw=False)
    assert int(found.status) == Status.NOT_CONVERGED
    many = jax.vmap(lambda y: solve(root, y, [0.0, 1.0], method=name))(jnp.array([[0.0], [4.0]]))
    assert many.status.tolist() == [Status.NOT_CONVERGED, Status.SUCCESS]


@pytest.mark.parametrize("name", ["rodas4", "kvaerno3", "gauss4", "auto"])
def test_a_func_without_forward_mode_is_refused_with_the_remedy(name):
    rule = jax.custom_vjp(jnp.sin)
    rule.defvjp(lambda x: (jnp.sin(x), x), lambda x, bar: (jnp.cos(x) * bar,))
    func = lambda y, t: -rule(y)
    options = dict(method=name, rtol=1e-6, atol=1e-6) | (dict(dt=0.1) if name == "gauss4" else {})
    with pytest.raises(TypeError, match="jacrev"):
        odeint(func, jnp.ones(2), [0.0, 1.0], **options)
    if name == "rodas4":
        end = lambda y: odeint(func, y, [0.0, 1.0], jac=jax.jacrev(func), **options)[-1, 0]
        value, slope = jax.value_and_grad(end)(jnp.ones(2))
        exact = lambda y: 2 * np.arctan(np.exp(-1) * np.tan(y / 2))
        np.testing.assert_allclose(value, exact(1.0), rtol=1e-5)
        np.testing.assert_allclose(slope[0], (exact(1.001) - exact(0.999)) / 0.002, rtol=1e-4)


def test_linear_is_for_implicit_methods():
    with pytest.raises(ValueError, match="implicit"):
        odeint(lambda y, t: -y, 1.0, [0.0, 1.0], linear=Banded(1, 1))
    with pytest.raises(TypeError, match="Banded"):
        odeint(lambda y, t: -y, 1.0, [0.0, 1.0], method="rodas4", linear="banded")


def test_numbers_that_the_default_atol_takes_for_zero_are_named():
    """The chemistry of E5 ends at 9e-82: with the default atol that is a negative number, with success."""
    e5 = problems["e5"]
    run = lambda **options: solve(
        e5.f, e5.y0, [0.0, 1e13], *e5.args, method="rodas4", rtol=1e-6, **options
    )
    with pytest.warns(
        UserWarning, match=r"y\[1\], y\[2\], y\[3\]: below the default `atol` = 1.4e-08"
    ):
        run()
    jax.jit(
        run
    )()  # without a word, as are other tolerances, zeros, and numbers that were larger once
    run(atol=1.4e-9, throw=False)
    solve(lambda y, t: -y, jnp.array([1.0, 0.0]), [0.0, 100.0], method="rodas5p")


@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_what_lies_inside_of_long_steps_is_as_good_as_their_ends(method):
    """A component that fast modes hold to cos t is right at the end of a step of any length; the polynomial
    between the ends was wrong by more than 1, with success, and that of SciPy's Radau is."""
    p, rtol = problems["prothero_robinson"], 1e-4
    t = jnp.linspace(0.0, p.t1, 101)
    given = dict(method=method, rtol=rtol, atol=rtol, max_steps=2**14)
    ends = solve(p.f, p.y0, t[::100], *p.args, **given)
    found = solve(p.f, p.y0, t, *p.args, **given)
    assert np.abs(found.ys[:, 0] - np.cos(t)).max() < 10 * rtol
    assert found.stats.accepted >= ends.stats.accepted
    dense = solve(p.f, p.y0, t[::100], *p.args, dense=True, **given)
    np.testing.assert_allclose(dense.dense(t), found.ys, rtol=1e-7, atol=1e-7)
    many = jax.vmap(lambda rate: solve(p.f, p.y0, t, rate, **given).ys[:, 0])(jnp.array([1e2, 1e6]))
    assert np.abs(many - np.cos(t)[None]).max() < 10 * rtol
