"""Linear algebra as values: structures, sparse patterns, Krylov methods; each against numpy and scipy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from scipy.sparse.csgraph import reverse_cuthill_mckee

from jaxode import Status, constraints, odeint, solve
from jaxode.methods import Banded, BlockDiagonal, Dense, Diagonal, Krylov, Sparse
from jaxode.methods.linear import Linear, solver


def band(n, lower, upper):
    i, j = np.indices((n, n))
    return (i - j <= lower) & (j - i <= upper)


def grid(n):
    """Five points of a plane, n x n of them."""
    i = np.arange(n * n).reshape(n, n)
    pattern = np.eye(n * n, dtype=bool)
    for a, b in ((i[1:], i[:-1]), (i[:, 1:], i[:, :-1])):
        pattern[a, b] = pattern[b, a] = True
    return pattern


RANDOM = np.random.default_rng(3).random((30, 30)) < 0.06
CASES = {
    "tridiagonal": (Banded(1, 1), band(70, 1, 1)),
    "two below": (Banded(2, 1), band(101, 2, 1)),
    "wide": (Banded(3, 6), band(60, 3, 6)),
    "blocks": (BlockDiagonal(3), np.kron(np.eye(7), np.ones((3, 3))) > 0),
    "large blocks": (BlockDiagonal(70), np.kron(np.eye(2), np.ones((70, 70))) > 0),
    "a grid": (Sparse(grid(7)), grid(7)),
    "any": (Sparse(RANDOM), RANDOM | np.eye(30, dtype=bool)),
    "gmres": (Krylov(rtol=1e-13), band(20, 2, 1)),
    "bicgstab": (Krylov("bicgstab", rtol=1e-13), band(20, 2, 1)),
    "preconditioned": (Krylov(rtol=1e-13, preconditioner=Banded(1, 1)), band(20, 2, 1)),
}


def derivative(linear, a, b, w, mass):
    jacobian = linear.jacobian(lambda y: a @ jnp.sin(y), jnp.zeros(len(b)))
    return solver(linear, jacobian, w, linear.matrix(mass))(b)


# Without a diagonal: the matrix of a band, eliminated with pivoting. Elsewhere it may be singular then.
SYSTEMS = [(name, False) for name in CASES] + [(name, True) for name in ("tridiagonal", "wide")]


@pytest.mark.parametrize(("name", "mirrored"), SYSTEMS)
def test_systems_are_solved_and_differentiated_as_by_numpy(name, mirrored):
    linear, pattern = CASES[name]
    n, rng = len(pattern), np.random.default_rng(0)
    a = np.where(pattern, rng.normal(size=(n, n)), 0)
    mass, b, v = rng.normal(size=(3, n))
    mass = np.where(np.arange(n) % 3, mass, 0)
    a = a - 6 * np.eye(n) if not mirrored else a + np.diag(mass / 0.7 - np.diag(a))
    whole = np.diag(mass) - 0.7 * a
    rows = rng.normal(size=n)

    @jax.jit
    def answers(a, b, mass, v):
        found = lambda *x: derivative(linear, x[0], x[1], jnp.asarray(0.7), x[2])
        x, vjp = jax.vjp(found, a, b, mass)
        jacobian = linear.jacobian(lambda y: a @ jnp.sin(y), jnp.zeros(n))
        shifted = linear.shifted(jacobian, jnp.asarray(rows), linear.matrix(mass))
        return x, vjp(v), linear.product(jacobian, v), linear.product(shifted, v)

    given = tuple(map(jnp.asarray, (a, b, mass, v)))
    x, back = np.linalg.solve(whole, b), np.linalg.solve(whole.T, v)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8 * np.abs(b).max())
    solution, (a_bar, b_bar, mass_bar), product, of_shifted = answers(*given)
    close(solution, x)
    close(b_bar, back)
    close(mass_bar, -back * x)
    close(np.where(pattern, a_bar, 0), np.where(pattern, 0.7 * np.outer(back, x), 0))
    close(product, a @ v)
    close(of_shifted, mass * v - rows * (a @ v))


def test_a_band_without_dominant_diagonal_is_pivoted_between_its_blocks():
    """The block elimination of this matrix is not possible: each leading block is singular."""
    n = 120
    whole = np.diag(np.ones(n - 1), 1) + np.diag(np.ones(n - 1), -1)  # zeros on the diagonal
    linear, b = Banded(1, 1), np.random.default_rng(0).normal(size=n)
    found = jax.jit(
        lambda b: solver(linear, linear.matrix(whole), -1.0, linear.matrix(np.zeros(n)))(b)
    )
    np.testing.assert_allclose(
        found(jnp.asarray(b)), np.linalg.solve(whole, b), rtol=1e-9, atol=1e-9
    )


def test_one_color_never_has_two_columns_of_a_row_and_lines_need_three():
    for linear, pattern in (
        CASES["a grid"],
        CASES["any"],
        (Sparse(band(50, 1, 1)), band(50, 1, 1)),
    ):
        for row in pattern:
            colors = linear.color[row]
            assert len(set(colors)) == len(colors)
    assert Sparse(band(50, 1, 1)).color.max() == 2
    assert Sparse(grid(20)).color.max() < 9


def test_the_band_of_a_shuffled_grid_is_that_of_scipy():
    order = np.random.default_rng(0).permutation(400)
    pattern = grid(20)[np.ix_(order, order)]
    best = reverse_cuthill_mckee(scipy.sparse.csr_array(pattern), symmetric_mode=True)
    i, j = np.nonzero(pattern[np.ix_(best, best)])
    assert Sparse(pattern).band.lower <= 1.2 * np.max(i - j)


def test_patterns_are_values_however_they_are_given():
    pattern = grid(4)
    rows, columns = np.nonzero(pattern)
    same = [
        Sparse(scipy.sparse.coo_array(pattern)),
        Sparse((rows, columns)),
        Sparse((rows, columns), 16),
    ]
    assert all(x == Sparse(pattern) and hash(x) == hash(Sparse(pattern)) for x in same)
    assert Sparse(pattern) != Sparse(band(16, 1, 1)) and "16 equations" in repr(Sparse(pattern))
    for bad in (
        np.ones((2, 3)),
        (np.array([0, 1]), np.array([0])),
        (np.array([0.5]), np.array([0.0])),
    ):
        with pytest.raises(ValueError, match="Sparse"):
            Sparse(bad)
    with pytest.raises(ValueError, match="outside"):
        Sparse((rows, columns), 3)


def heat(y, t, k):
    """On a square, with a source: each number with its four neighbours."""
    u = y.reshape(round(len(y) ** 0.5), -1)
    u = jnp.pad(u, 1)
    spread = u[:-2, 1:-1] + u[2:, 1:-1] + u[1:-1, :-2] + u[1:-1, 2:] - 4 * u[1:-1, 1:-1]
    return k * spread.reshape(-1) - y**3 + jnp.cos(t)


class DiffusionAlone(Linear):
    """What is like the Jacobian of `heat` on 6 x 6 points: diffusion, by its eigenvectors."""

    sines = np.sqrt(2 / 7) * np.sin(np.pi * np.outer(np.arange(1, 7), np.arange(1, 7)) / 7)
    rates = -4 * np.sin(np.pi * np.arange(1, 7) / 14) ** 2

    def jacobian(self, f, y):
        lowest = jnp.asarray(np.outer(self.sines[0], self.sines[0]).reshape(-1))
        return jax.jvp(f, (y,), (lowest,))[1] @ lowest / (2 * self.rates[0])

    def shifted(self, jacobian, w, mass=None):
        return w * jacobian

    def factor(self, matrix):
        return matrix

    def substitute(self, factors, b):
        modes = self.sines @ b.reshape(6, 6) @ self.sines
        modes = modes / (1 - factors * (self.rates[:, None] + self.rates[None, :]))
        return (self.sines @ modes @ self.sines).reshape(-1)


FEW = dict(restart=4, max_iterations=3)  # the first of these only computes a residual
LIKE_HEAT = Krylov(rtol=1e-12, preconditioner=DiffusionAlone(), **FEW)


def end_and_slope(linear, name):
    def end(k):
        options = dict(method=name, linear=linear, dt=0.05, max_steps=100)
        return jnp.sum(odeint(heat, jnp.ones(36), [0.0, 0.2], k, **options)[-1] ** 2)

    return jax.jit(jax.value_and_grad(end))(50.0)


with_a_dense_matrix = functools.cache(functools.partial(end_and_slope, Dense()))


@pytest.mark.parametrize(
    ("linear", "name"),
    [(Sparse(grid(6)), "rodas4"), (Krylov(rtol=1e-12), "kvaerno3"), (LIKE_HEAT, "kvaerno3")],
)
def test_a_square_is_solved_as_with_a_dense_matrix_gradients_too(linear, name):
    np.testing.assert_allclose(end_and_slope(linear, name), with_a_dense_matrix(name), rtol=1e-6)


def test_iterations_that_do_not_end_are_a_failure_and_a_preconditioner_lets_them_end():
    for linear in (Krylov(**FEW), Krylov("bicgstab", max_iterations=3), LIKE_HEAT):
        options = dict(method="kvaerno3", linear=linear, throw=False)
        found = solve(heat, jnp.ones(36), [0.0, 0.2], 50.0, dt=0.05, **options)
        if linear.preconditioner is None:
            assert int(found.status) == Status.NOT_CONVERGED and np.all(np.isnan(found.ys[-1]))
        else:
            assert int(found.status) == Status.SUCCESS
    found = solve(lambda y, t: -jnp.sqrt(y - 1), jnp.ones(3), [0.0, 1.0], method="rodas4",
                  linear=Krylov(), throw=False)  # fmt: skip
    assert int(found.status) != Status.SUCCESS


def test_a_preconditioner_is_a_structure_that_solves_directly():
    for wrong in ("ilu", Krylov(), lambda b: b):
        with pytest.raises(TypeError, match="`preconditioner` of Krylov must be a structure"):
            Krylov(preconditioner=wrong)


def test_blocks_are_systems_beside_each_other():
    rates = jnp.asarray(np.logspace(0, 4, 10))

    def pairs(y, t):
        a, b = y.reshape(-1, 2).T
        return jnp.stack([-rates * a + b, rates * a - b], 1).reshape(-1)

    found = odeint(pairs, jnp.ones(20), [0.0, 1.0], method="rodas5p", linear=BlockDiagonal(2))
    # The sum is kept, and a - 2 / (1 + rate) decays by 1 + rate.
    end = 2 / (1 + rates) + (1 - 2 / (1 + rates)) * np.exp(-(1 + rates))
    np.testing.assert_allclose(found[-1].reshape(-1, 2)[:, 0], end, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="whole blocks"):
        odeint(pairs, jnp.ones(20), [0.0, 1.0], method="rodas5p", linear=BlockDiagonal(3))


# A declaration that is wrong.

WRONG = {
    "band": Banded(1, 1),
    "diagonal": Diagonal(),
    "blocks": BlockDiagonal(6),
    "sparse": Sparse(band(36, 3, 3)),
}


@pytest.mark.parametrize(
    "case, name", [*((case, "rodas4") for case in WRONG), ("band", "kvaerno3")]
)
def test_a_structure_without_entries_that_func_has_is_an_error_where_values_are_known(case, name):
    y0, options = jnp.linspace(0.0, 1.0, 36), dict(method=name, linear=WRONG[case], dt=0.1)
    for _ in range(2):
        with pytest.raises(ValueError, match="df/dy has entries"):
            odeint(heat, y0, [0.0, 0.1], 5.0, **options)


def test_a_right_declaration_is_looked_at_once(monkeypatch):
    looks, look = [], constraints.difference_of_products
    monkeypatch.setattr(
        constraints, "difference_of_products", lambda *x: looks.append(1) or look(*x)
    )
    for k in (1.0, 2.0):
        f = lambda y, t, k: -k * y
        odeint(f, jnp.ones(3), [0.0, 0.1], k, method="rodas4", linear=Banded(0, 0), dt=0.1)
    assert len(looks) == 1


def test_an_own_jacobian_that_does_not_fit_its_structure_is_an_error():
    jac = lambda y, t, k: jax.jacfwd(heat)(y, t, k)
    options = dict(method="rodas4", dt=0.1, jac=jac)
    with pytest.raises(ValueError, match="df/dy has entries"):
        odeint(heat, jnp.ones(36), [0.0, 0.1], 5.0, linear=Banded(1, 1), **options)
    odeint(heat, jnp.ones(36), [0.0, 0.1], 5.0, linear=Sparse(grid(6)), **options)
