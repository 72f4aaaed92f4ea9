"""Stiff problems of few equations: chemistry, pharmacology, and those made to be hard.

References: Hairer and Wanner (1996), Solving Ordinary Differential Equations II (HW); Mazzia and
Magherini (2008), Test set for initial value problem solvers, release 2.4 (the test set). The answers
are computed by `bench/references.py`, and stand in `jaxode/problems/ends.py`.
"""

import jax.numpy as jnp
import numpy as np

from jaxode.problems.ends import ends
from jaxode.problems.problem import Problem
from jaxode.problems.smooth import forced


def robertson(y, t):
    """Robertson (1966), three species whose rates differ by nine powers of ten (HW eq. IV.1.4)."""
    a, b, c = y
    one, two, three = 0.04 * a, 1e4 * b * c, 3e7 * b**2
    return jnp.stack([two - one, one - two - three, three])


def robertson_dae(y, t):
    """The same with a + b + c = 1 in place of the last equation: mass is diag(1, 1, 0)."""
    a, b, c = y
    one, two, three = 0.04 * a, 1e4 * b * c, 3e7 * b**2
    return jnp.stack([two - one, one - two - three, a + b + c - 1])


def hires(y, t):
    """Schaefer (1975), high irradiance responses of photomorphogenesis (HW eq. IV.10.4)."""
    a, b, c, d, e, f, g, h = y
    bound = 280 * f * h
    return jnp.stack(
        [
            -1.71 * a + 0.43 * b + 8.32 * c + 0.0007,
            1.71 * a - 8.75 * b,
            -10.03 * c + 0.43 * d + 0.035 * e,
            8.32 * b + 1.71 * c - 1.12 * d,
            -1.745 * e + 0.43 * f + 0.43 * g,
            -bound + 0.69 * d + 1.71 * e - 0.43 * f + 0.69 * g,
            bound - 1.81 * g,
            1.81 * g - bound,
        ]
    )


def oregonator(y, t):
    """Field and Noyes (1974), the Belousov-Zhabotinsky reaction (HW eq. IV.10.3)."""
    a, b, c = y
    return jnp.stack(
        [77.27 * (b + a * (1 - 8.375e-6 * a - b)), (c - (1 + a) * b) / 77.27, 0.161 * (a - c)]
    )


def van_der_pol_scaled(y, t, mu):
    """van der Pol's equation in units of its slow time (HW eq. IV.10.2, with 1 / epsilon = mu)."""
    x, v = y
    return jnp.stack([v, mu * ((1 - x**2) * v - x)])


def e5(y, t):
    """Enright, Hull and Lindberg (1975), E5 of stiff DETEST: pyrolysis (HW sec. IV.10).

    It keeps b - c - d = 0, and at late times only b - c decides: b falls from 1e-10 to 1e-20 at t = 1e11
    and 9e-23 at 1e13, as 1 / t, but to whatever b - c has become. So a rounding of 1e-26 made where
    b was large is there at the end, and an `atol` below 1e-25 cannot be met in double precision. Rosenbrock
    methods keep linear invariants (`Rosenbrock.missed`; without that b - c drifts by 1e-22 to 1e-19, up to
    800 times b at 1e13), but no better than this func does: at the stages of a step joined and freed are
    1e3 times what is left of them, and their roundings, times h, go into b - c. At t = 2e3 to 9e4 a step of
    rodas5p at rtol 1e-4 leaves 1e-23 to 4e-23, one of rodas4 a fifth of that; the solution is smooth there,
    so that no estimate of a truncation error sees it. With an `atol` of 1.1e-24 rodas5p is right to 10
    tolerances at rtol 1e-4 to 1e-8, but by luck at the first two (4 and 6; other steps gave 12 to 155),
    and off by 1e-21 at 1e-3. kvaerno5 and kencarp4 have 3 digits of b at 1e13. To see more, put c = b - d,
    and solve for a, b and d: 5 to 8 digits are right then.
    """
    a, b, c, d = y
    split, joined, removed, freed = 7.89e-10 * a, 1.1e7 * a * c, 1.13e9 * b * c, 1.13e3 * d
    db, dd = split - removed, joined - freed
    return jnp.stack([-split - joined, db, db - dd, dd])


POLLUTION_RATES = (
    *(0.35, 26.6, 1.23e4, 8.6e-4, 8.2e-4, 1.5e4, 1.3e-4, 2.4e4, 1.65e4, 9e3, 0.022, 1.2e4, 1.88),
    *(1.63e4, 4.8e6, 3.5e-4, 0.0175, 1e8, 4.44e11, 1240.0, 2.1, 5.78, 0.0474, 1780.0, 3.12),
)


def pollution(y, t):
    """Verwer (1994), air pollution: 25 reactions of 20 species (the test set, II.2)."""
    y = jnp.asarray(y)
    left = np.array(
        [1, 2, 5, 7, 7, 7, 9, 9, 11, 11, 13, 10, 14, 1, 3, 4, 4, 16, 16, 17, 19, 19, 1, 19, 20]
    )
    r = jnp.asarray(POLLUTION_RATES, y.dtype) * y[left - 1]
    with_right = [
        (2, 4),
        (3, 2),
        (6, 6),
        (8, 6),
        (9, 2),
        (10, 1),
        (12, 2),
        (14, 6),
        (20, 6),
        (23, 4),
        (24, 1),
    ]
    r = [None, *(r[i] for i in range(25))]
    for reaction, species in with_right:
        r[reaction] = r[reaction] * y[species - 1]
    return jnp.stack(
        [
            r[2] + r[3] + r[9] + r[11] + r[12] + r[22] + r[25] - r[1] - r[10] - r[14] - r[23] - r[24],
            r[1] + r[21] - r[2] - r[3] - r[9] - r[12],
            r[1] + r[17] + r[19] + r[22] - r[15],
            r[15] - r[2] - r[16] - r[17] - r[23],
            2 * r[4] + r[6] + r[7] + r[13] + r[20] - r[3],
            r[3] + 2 * r[18] - r[6] - r[8] - r[14] - r[20],
            r[13] - r[4] - r[5] - r[6],
            r[4] + r[5] + r[6] + r[7],
            -r[7] - r[8],
            r[7] + r[9] - r[12],
            r[8] + r[11] - r[9] - r[10],
            r[9],
            r[10] - r[11],
            r[12] - r[13],
            r[14],
            r[16] - r[18] - r[19],
            -r[20],
            r[20],
            r[23] + r[25] - r[21] - r[22] - r[24],
            r[24] - r[25],
        ]
    )  # fmt: skip


def kaps(y, t, stiffness):
    """Kaps (1981): in the limit of great stiffness a differential-algebraic equation."""
    a, b = y
    return jnp.stack([-(stiffness + 2) * a + stiffness * b**2, a - b - b**2])


DRUG = (0.8, 0.3, 0.5, 0.3, 1.0, 200.0, 0.5, 1.0, 0.3, 2.0, 5.0, 0.5, 3.0)


def pharmacology(y, t, p=DRUG):
    """A drug that its own target removes, and an effect, in days and nmol.

    References: Mager and Jusko (2001); Dayneka, Garg and Jusko (1993).

    From a depot into blood and tissue; in blood it binds a receptor, fast, and the complex is taken
    up by cells. The drug in blood inhibits what keeps a response up. The parameters p are thirteen
    numbers: rates of absorption, elimination, to and from the tissue; those of synthesis of the
    receptor, of binding, of release, of decay of the receptor and of uptake of the complex; those of the
    response's synthesis; the concentration of half the inhibition; rate of the response's decay; volume.
    """
    depot, drug, tissue, receptor, complex_, response = y
    absorb, eliminate, out, back, make, on, off, decay, uptake, build, half, lose, volume = p
    bound = on * drug * receptor - off * complex_
    exchanged = out * drug - back * tissue
    return jnp.stack(
        [
            -absorb * depot,
            absorb * depot / volume - eliminate * drug - exchanged - bound,
            exchanged,
            make - decay * receptor - bound,
            bound - uptake * complex_,
            build * half / (half + drug) - lose * response,
        ]
    )


def by_cosine(t):
    return np.array([np.cos(t)])


def entry(name, f, y0, t1, **more) -> dict[str, Problem]:
    """One entry of `problems`, with its end if there is no exact solution."""
    end = None if "exact" in more else ends.get(name)
    return {name: Problem(f, y0, t1, end=end, stiff=True, **more)}


CHEMISTRY = (1.0, 0.0, 0.0)
E5 = (1.76e-3, 0.0, 0.0, 0.0)

problems: dict[str, Problem] = {
    **entry("robertson", robertson, CHEMISTRY, 40.0, scale=1e-4),
    **entry("robertson_long", robertson, CHEMISTRY, 1e11, scale=1e-10),
    **entry("robertson_dae", robertson_dae, CHEMISTRY, 40.0, mass=np.diag([1, 1, 0]), scale=1e-4),
    **entry("hires", hires, (1, 0, 0, 0, 0, 0, 0, 0.0057), 321.8122, scale=1e-4),
    **entry("oregonator", oregonator, (1.0, 2.0, 3.0), 360.0),
    **entry("van_der_pol_1e3", van_der_pol_scaled, (2.0, 0.0), 2.0, args=(1e3,)),
    **entry("van_der_pol_1e6", van_der_pol_scaled, (2.0, 0.0), 2.0, args=(1e6,)),
    **entry("e5", e5, E5, 1e11, scale=1e-17),
    **entry("e5_long", e5, E5, 1e13, scale=1e-17),
    **entry("pollution", pollution,
            (0, 0.2, 0, 0.04, 0, 0, 0.1, 0.3, 0.01, *[0] * 7, 0.007, 0, 0, 0), 60.0, scale=1e-4),
    **entry("kaps", kaps, (1.0, 1.0), 5.0, args=(1e6,),
            exact=lambda t: np.array([np.exp(-2 * t), np.exp(-t)])),
    **entry("prothero_robinson", forced, (1.0,), 10.0, args=(1e6,), exact=by_cosine),
    **entry("pharmacology", pharmacology, (100, 0, 0, 1.0, 0, 4.0), 30.0, args=(DRUG,), scale=1e-2),
}  # fmt: skip
