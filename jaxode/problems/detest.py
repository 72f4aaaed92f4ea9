"""Some of stiff DETEST: linear (A, B), coupled (C), chemistry (D, F) and nonlinear (E).

References: Enright, Hull and Lindberg (1975), Comparing numerical methods for stiff systems of
ODEs; Enright and Pryce (1987), Two FORTRAN packages for assessing initial value methods. E5 and D2
(Robertson) and F4 (the Oregonator) are in `jaxode.problems.stiff`.
"""

import jax.numpy as jnp
import numpy as np

from jaxode.problems.problem import Problem
from jaxode.problems.stiff import entry


def detest_a2(y, t):
    """Nine compartments in a row."""
    y = jnp.asarray(y)
    first, inner, last = (
        -1800 * y[0] + 900 * y[1],
        y[:-2] - 2 * y[1:-1] + y[2:],
        1000 * y[7] - 2000 * y[8] + 1000,
    )
    return jnp.concatenate([first[None], inner, last[None]])  # fmt: skip


def detest_b5(y, t, frequency):
    """Eigenvalues -10 +- 100 i: what BDF of high order cannot damp."""
    a, b, *rest = y
    rates = (4.0, 1.0, 0.5, 0.1)
    return jnp.stack(
        [-10 * a + frequency * b, -frequency * a - 10 * b, *(-r * x for r, x in zip(rates, rest))]
    )


def detest_c5(y, t, coupling):
    """Slow components that drive fast ones."""
    a, b, c, d = y
    return jnp.stack(
        [
            2 - a,
            -10 * b + coupling * a**2,
            -40 * c + 4 * coupling * (a**2 + b**2),
            -100 * d + 10 * coupling * (a**2 + b**2 + c**2),
        ]
    )


def detest_d4(y, t):
    """Gear (1969), a reaction."""
    a, b, c = y
    one, two, three = 0.013 * a, 1000 * a * c, 2500 * b * c
    return jnp.stack([-one - two, -three, -one - two - three])


def detest_d6(y, t):
    a, b, c = y
    da, db = -a + 1e8 * c * (1 - a), -10 * b + 3e7 * c * (1 - b)
    return jnp.stack([da, db, -da - db])


def detest_e3(y, t):
    a, b, c = y
    return jnp.stack([-(55 + c) * a + 65 * b, 0.0785 * (a - b), 0.1 * a])


def detest_f1(y, t):
    """Luss and Amundson (1968), a fluidised bed: the rate depends on the temperature y1."""
    a, b, c, d = y
    k = jnp.exp(20.7 - 1500 / a)
    return jnp.stack(
        [
            1.3 * (c - a) + 10400 * k * b,
            1880 * (d - b * (1 + k)),
            1752 - 269 * c + 267 * a,
            0.1 + 320 * b - 321 * d,
        ]
    )


def detest_f3(y, t):
    """Bui and Bui (1979), an enzyme."""
    a, b, c, d, e = y
    first, second = 1e7 * a * b, 1e7 * b * e
    return jnp.stack(
        [
            -first + 10 * c,
            -first - second + 10 * c + 10 * d,
            first - 1.001e4 * c + 1e-3 * d,
            1e4 * c - 10.001 * d + second,
            10 * d - second,
        ]
    )


def detest_b5_exact(t):
    spiral = np.exp(-10 * t) * np.array(
        [np.cos(100 * t) + np.sin(100 * t), np.cos(100 * t) - np.sin(100 * t)]
    )
    return np.concatenate([spiral, np.exp(-np.array([4.0, 1.0, 0.5, 0.1]) * t)])


problems: dict[str, Problem] = {
    **entry("detest_a2", detest_a2, np.zeros(9), 120.0, band=(1, 1)),
    **entry("detest_b5", detest_b5, np.ones(6), 20.0, args=(100.0,), exact=detest_b5_exact),
    **entry("detest_c5", detest_c5, np.ones(4), 20.0, args=(20.0,)),
    **entry("detest_d4", detest_d4, (1.0, 1.0, 0.0), 50.0, scale=1e-4),
    **entry("detest_d6", detest_d6, (1.0, 0.0, 0.0), 1.0, scale=1e-6),
    **entry("detest_e3", detest_e3, (1.0, 1.0, 0.0), 500.0),
    **entry("detest_f1", detest_f1, (761.0, 0.0, 600.0, 0.1), 1000.0, scale=1e-2),
    **entry("detest_f3", detest_f3, (4e-6, 1e-6, 0.0, 0.0, 0.0), 100.0, scale=1e-9),
}
