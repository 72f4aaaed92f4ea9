"""Rosenbrock-Wanner methods: implicit, for stiff problems, with linear systems only.

References: Hairer and Wanner (1996), Solving Ordinary Differential Equations II (HW), IV.7.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

from jaxode import tree
from jaxode.methods.implicit import Implicit, square, time_derivative, vectors
from jaxode.methods.linear import DENSE, NUMBERS, WRITTEN_OUT, Linear, solver
from jaxode.methods.method import Method, Step


@dataclasses.dataclass(frozen=True)
class Rosenbrock(Implicit):
    """A stiffly accurate Rosenbrock method, transformed so that no matrix is multiplied (HW eq. IV.7.25).

    With J = df/dy at the start of the step,

        (I - gamma h J) u_i = gamma (h f(y + sum_j a_ij u_j, s + c_i h) + sum_j g_ij u_j + d_i h^2 df/ds),

    y1 = y + sum_j a_sj u_j + u_s, and the last u_s, times `caution`, is the error. The first stage uses
    the slope at the start, which the step before has found: with h = 0 all u_i are 0.

    For M dy/ds = f(y, s), M constant, singular or not, M stands in the place of I, and before the sum
    of the g_ij u_j (HW eq. IV.7.26, VI.4.5). What one step hands to the next is then M dy/ds.

    Attributes:
        order: of y1; `error_order` that of y1 - u_s.
        gamma, c, d, a, g: the coefficients; row i of a and g has i entries.
        dense: weights of the u_i in k_1, k_2, ... of dense output (HW eq. IV.7.29),
            y(s + theta h) = y + theta (y1 - y) + theta (1 - theta) (k_1 + theta k_2 + theta^2 k_3).
        dense_order: the order with which that converges.
        caution: what the error is multiplied by, where many that are just tolerated would add up.
        linear: how df/dy is found, and systems with it solved (`jaxode.methods.linear`).
        written_up_to: numbers of a state up to which stages are written out, and not a loop.
    """

    order: int
    error_order: int
    gamma: float
    c: tuple[float, ...]
    d: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    g: tuple[tuple[float, ...], ...]
    dense: tuple[tuple[float, ...], ...]
    dense_order: int
    caution: float = 1.0
    linear: Linear = DENSE
    written_up_to: int = WRITTEN_OUT
    looks: tuple[float, ...] = ()
    takes_mass = True
    takes_jac = True

    def in_numbers(self) -> "Rosenbrock | None":
        linear = self.linear.in_numbers()
        return linear and dataclasses.replace(self, linear=linear, written_up_to=NUMBERS)

    @property
    def step_evaluations(self) -> int:  # type: ignore[override]
        return len(self.c) + len(self.looks)

    def slope(self, f, s, y: PyTree, memory: PyTree) -> PyTree:
        """dy/ds: the memory is M dy/ds."""
        if getattr(f, "mass", None) is None:
            return memory
        return self.slope_of_system(f, s, y, memory)

    def step(self, f, s, y: PyTree, memory: PyTree, h) -> Step:
        field, pack, unpack = vectors(f, y)
        y0, k0 = pack(y), pack(memory)
        jacobian = self.jacobian(f, field, s, y0)
        weigh, mass = self.weights(getattr(f, "mass", None), y0, h)
        solve = solver(self.linear, jacobian, tree.scale(self.gamma, h), mass)
        of_time = time_derivative(f, field, s, y0)
        form = self.written_out if len(y0) <= self.written_up_to else self.looped
        us, last, ks = form(field, s, y0, k0, of_time, h, solve, weigh)
        last = last + us[-1]
        if getattr(f, "jac", None) is None:  # the user's own may be another than that of func
            last = last + self.missed(field, s, y0, us, ks, of_time, h, solve, weigh)
        y1 = unpack(last)
        k1 = f(y1, s + h)
        # The inverse of an infinite matrix is 0, which would look like a solution at rest.
        solved = tree.all_finite(jacobian, us if self.linear.iterative else us[0])
        error = us[-1] if self.caution == 1 else tree.scale(self.caution, us[-1])
        step = Step(y1, k1, k1, [unpack(error)], us, solved, self.step_evaluations)
        return step._replace(inside_errors=self.errors_inside(f, s, y, h, step, solve, weigh))

    def written_out(self, field, s, y, k, of_time, h, solve, weigh):
        """The u_i, the last y_i, and the slopes at all of them."""
        us, ks, yi = [], [], y
        for c, d, a, g in zip(self.c, self.d, self.a, self.g):
            if us:
                yi = y + sum(tree.scale(w, u) for w, u in zip(a, us) if w)
                k = field(yi, s + tree.scale(c, h))
            right = tree.scale(h, k)
            if us:
                right = right + weigh(sum(tree.scale(w, u) for w, u in zip(g, us) if w))
            if of_time is not None and d:
                right = right + tree.scale(d * h * h, of_time)
            us.append(solve(tree.scale(self.gamma, right)))
            ks.append(k)
        return us, yi, ks

    def looped(self, field, s, y, k, of_time, h, solve, weigh):
        """The same with the stages in a loop, and the u_i and the slopes as rows of one array.

        Every u_i is added to the sums of all later stages, so that nothing is moved in memory.
        """
        count = len(self.c)
        a, g = square(self.a, y.dtype).T, square(self.g, y.dtype).T
        later = lambda sums, weights, u: sums + weights[:, None] * u[None, :]

        def of(right, d):
            right = tree.scale(h, right)
            if of_time is not None:
                right = right + tree.scale(d, tree.scale(h * h, of_time))
            return right

        def stage(carry, given):
            ys, rights = carry
            i, c, d, a, g = given
            yi = lax.dynamic_index_in_dim(ys, i, 0, False)
            right = lax.dynamic_index_in_dim(rights, i, 0, False)
            k = field(yi, s + tree.scale(c, h))
            u = solve(tree.scale(self.gamma, of(k, d) + weigh(right)))
            return (later(ys, a, u), later(rights, g, u)), (u, yi, k)

        u0 = solve(tree.scale(self.gamma, of(k, self.d[0])))
        begin = later(jnp.broadcast_to(y, (count, *y.shape)), a[0], u0), g[0][:, None] * u0[None, :]
        numbers = jnp.asarray(self.c[1:], h.dtype), jnp.asarray(self.d[1:], h.dtype)
        given = (
            jnp.arange(1, count, dtype=jnp.int32),
            *numbers,
            jnp.asarray(a[1:]),
            jnp.asarray(g[1:]),
        )
        _, (us, ys, ks) = lax.scan(stage, begin, given)
        rows = lambda x0, xs: jnp.concatenate([x0[None], xs])
        return rows(u0, us), ys[-1], rows(k, ks)

    @functools.cached_property
    def sums(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Weights m with y1 = y + sum_i m_i u_i, and v with sum_i m_i u_i = h sum_i v_i (f_i + J u_i)."""
        count = len(self.c)
        rows = np.eye(count) / self.gamma
        for row, g in zip(rows, self.g):
            row[: len(g)] -= g
        m = np.array([*self.a[-1], *[0.0] * (count - 1 - len(self.a[-1])), 1.0])
        return tuple(map(float, m)), tuple(map(float, np.linalg.solve(rows.T, m)))

    def missed(self, field, s, y, us, ks, of_time, h, solve, weigh):
        """What rounding left out of y1 in the linear solves: one step of iterative refinement of their sum.

        Without it, what df/dy keeps, such as the sum of all species, is kept only to the roundings of
        h df/dy u, which are large where the problem is stiff; and where the solution falls to 1e-13 of
        what it was, as that of E5, they are all that is left of it. The product with df/dy is one
        derivative of func, whose equations share their terms, not one with the matrix. It is 0 but for
        roundings, and so is its derivative.
        """
        m, v = self.sums
        frozen = jax.tree.map(lax.stop_gradient, (y, us, ks, of_time))
        y, us, ks, of_time = frozen
        push = jax.jvp(lambda y: field(y, s), (y,), (summed(v, us),))[1]
        right = tree.scale(h, summed(v, ks) + push)
        if of_time is not None:
            right = right + tree.scale(sum(w * d for w, d in zip(v, self.d)) * h * h, of_time)
        return lax.stop_gradient(solve(right - weigh(summed(m, us))))

    def inside(self, f, s, y: PyTree, h, step: Step) -> list[PyTree]:
        _, pack, unpack = vectors(f, y)
        moved = pack(step.y) - pack(y)
        rows = [summed(row, step.stages) for row in self.dense]
        d = [moved + rows[0], *[b - a for a, b in itertools.pairwise(rows)], -rows[-1]]
        return [unpack(x) for x in d]


def summed(weights, xs):
    """The sum of weights times vectors: a list of them, or rows of an array, which compile in less time."""
    if isinstance(xs, list):
        return sum(tree.scale(w, x) for w, x in zip(weights, xs) if w)
    return jnp.sum(jnp.asarray(weights, xs.dtype)[:, None] * xs, 0)


def rosenbrock(order, *, gamma, c, d, a, g, dense, dense_order, caution=1.0) -> Rosenbrock:
    """A Rosenbrock method as the literature prints it: rows of a and g without their zeros."""
    floats = lambda row: tuple(map(float, row))
    rows = lambda rows: tuple(map(floats, rows))
    return Rosenbrock(
        order, order - 1, float(gamma), floats(c), floats(d), rows(a), rows(g), rows(dense), dense_order,
        caution,
    )  # fmt: skip


rodas4 = rosenbrock(
    4,
    gamma=0.25,
    c=[0, 0.386, 0.21, 0.63, 1, 1],
    d=[0.25, -0.1043, 0.1035, -0.0362, 0, 0],
    a=[
        [],
        [1.544],
        [0.9466785280815826, 0.2557011698983284],
        [3.314825187068521, 2.896124015972201, 0.9986419139977817],
        [1.221224509226641, 6.019134481288629, 12.53708332932087, -0.687886036105895],
        [1.221224509226641, 6.019134481288629, 12.53708332932087, -0.687886036105895, 1],
    ],
    g=[
        [],
        [-5.6688],
        [-2.430093356833875, -0.2063599157091915],
        [-0.1073529058151375, -9.594562251023355, -20.47028614809616],
        [7.496443313967647, -10.24680431464352, -33.99990352819905, 11.7089089320616],
        [
            8.083246795921522,
            -7.981132988064893,
            -31.52159432874371,
            16.31930543123136,
            -6.058818238834054,
        ],
    ],
    dense=[
        [
            10.12623508344586,
            -7.487995877610167,
            -34.80091861555747,
            -7.992771707568823,
            1.025137723295662,
            0,
        ],
        [
            -0.6762803392801253,
            6.087714651680015,
            16.43084320892478,
            24.76722511418386,
            -6.594389125716872,
            0,
        ],
    ],
    dense_order=3,
)
"""Hairer and Wanner (1996), the code RODAS: L-stable, order 4(3), six stages."""

rodas4p = rosenbrock(
    4,
    gamma=0.25,
    c=[0, 0.75, 0.21, 0.63, 1, 1],
    d=[0.25, -0.5, -0.023504, -0.0362, 0, 0],
    a=[
        [],
        [3],
        [1.831036793486759, 0.4955183967433795],
        [2.304376582692669, -0.05249275245743001, -1.176798761832782],
        [-7.170454962423024, -4.741636671481785, -16.31002631330971, -1.062004044111401],
        [-7.170454962423024, -4.741636671481785, -16.31002631330971, -1.062004044111401, 1],
    ],
    g=[
        [],
        [-12],
        [-8.791795173947035, -2.207865586973518],
        [10.81793056857153, 6.780270611428266, 19.5348594464241],
        [34.19095006749676, 15.49671153725963, 54.7476087596413, 14.16005392148534],
        [
            34.62605830930532,
            15.30084976114473,
            56.99955578662667,
            18.40807009793095,
            -5.714285714285717,
        ],
    ],
    dense=[
        [25.09876703708589, 11.62013104361867, 28.49148307714626, -5.664021568594133, 0, 0],
        [
            1.638054557396973,
            -0.7373619806678748,
            8.47791821923899,
            15.9925314877952,
            -1.882352941176471,
            0,
        ],
    ],
    dense_order=3,
)
"""Steinebach (1995): the same without loss of order on linear parabolic problems, order 4(3)."""

rodas5p = rosenbrock(
    5,
    gamma=0.21193756319429014,
    c=[0, 0.6358126895828704, 0.4095798393397535, 0.9769306725060716, 0.4288403609558664, 1, 1, 1],
    d=[
        0.21193756319429014,
        -0.42387512638858027,
        -0.3384627126235924,
        1.8046452872882734,
        2.325825639765069,
        0,
        0,
        0,
    ],
    a=[
        [],
        [3],
        [2.849394379747939, 0.45842242204463923],
        [-6.954028509809101, 2.489845061869568, -10.358996098473584],
        [2.8029986275628964, 0.5072464736228206, -0.3988312541770524, -0.04721187230404641],
        [
            -7.502846399306121,
            2.561846144803919,
            -11.627539656261098,
            -0.18268767659942256,
            0.030198172008377946,
        ],
        [
            -7.502846399306121,
            2.561846144803919,
            -11.627539656261098,
            -0.18268767659942256,
            0.030198172008377946,
            1,
        ],
        [
            -7.502846399306121,
            2.561846144803919,
            -11.627539656261098,
            -0.18268767659942256,
            0.030198172008377946,
            1,
            1,
        ],
    ],
    g=[
        [],
        [-14.155112264123755],
        [-17.97296035885952, -2.859693295451294],
        [147.12150275711716, -1.41221402718213, 71.68940251302358],
        [165.43517024871676, -0.4592823456491126, 42.90938336958603, -5.961986721573306],
        [
            24.854864614690072,
            -3.0009227002832186,
            47.4931110020768,
            5.5814197821558125,
            -0.6610691825249471,
        ],
        [
            30.91273214028599,
            -3.1208243349937974,
            77.79954646070892,
            34.28646028294783,
            -19.097331116725623,
            -28.087943162872662,
        ],
        [
            37.80277123390563,
            -3.2571969029072276,
            112.26918849496327,
            66.9347231244047,
            -40.06618937091002,
            -54.66780262877968,
            -9.48861652309627,
        ],
    ],
    dense=[
        [
            25.948786856663858,
            -2.5579724845846235,
            10.433815404888879,
            -2.3679251022685204,
            0.524948541321073,
            1.1241088310450404,
            0.4272876194431874,
            -0.17202221070155493,
        ],
        [
            -9.91568850695171,
            -0.9689944594115154,
            3.0438037242978453,
            -24.495224566215796,
            20.176138334709044,
            15.98066361424651,
            -6.789040303419874,
            -6.710236069923372,
        ],
        [
            11.419903575922262,
            2.8879645146136994,
            72.92137995996029,
            80.12511834622643,
            -52.072871366152654,
            -59.78993625266729,
            -0.15582684282751913,
            4.883087185713722,
        ],
    ],
    dense_order=4,
    caution=1.35,
)
"""Steinebach (2023), Construction of Rosenbrock-Wanner method Rodas5P: order 5(4), eight stages, L-stable.

Its estimate is honest: the true error of a step is a tenth of it as a rule, and half of it where a wave
of the Brusselator on a square builds up. There a hundred such steps in a row added up to 12.5 tolerances;
with `caution` they make 9 at most, and at equal error a solve takes the steps that it took.
"""

methods: dict[str, Method] = {"rodas4": rodas4, "rodas4p": rodas4p, "rodas5p": rodas5p}
"""Every method by its name."""
