"""Initial-value problems with known answers; tests, bench and notebooks share them.

`problems` maps names to values; each says where its answer comes from. A problem is used as

>>> from jaxode import odeint
>>> from jaxode.problems import problems
>>> p = problems["kepler"]
>>> ys = odeint(p.f, p.y0, (p.t0, p.t1), *p.args, rtol=1e-5, atol=1e-5)
>>> bool(abs(ys[-1] - p.exact(p.t1)).max() < 1e-2)
True

Their equations are functions here, too: `smooth`, `stiff`, `detest`, `grids` and `circuits` hold them.
"""

from jaxode.problems import circuits, detest, grids, smooth, stiff
from jaxode.problems.circuits import ring_modulator, transistor_amplifier
from jaxode.problems.grids import (
    brusselator_line,
    brusselator_square,
    brusselator_square_start,
    brusselator_start,
    cusp,
    cusp_start,
    medical_akzo,
)
from jaxode.problems.problem import Problem
from jaxode.problems.smooth import (
    ARENSTORF,
    PLEIADES,
    arenstorf,
    brusselator,
    decay,
    forced,
    kepler,
    kepler_exact,
    kepler_invariants,
    logistic,
    lorenz,
    lotka_volterra,
    lotka_volterra_invariant,
    oscillator,
    pendulum,
    pendulum_invariant,
    pleiades,
    product,
    van_der_pol,
)
from jaxode.problems.stiff import (
    e5,
    hires,
    kaps,
    oregonator,
    pharmacology,
    pollution,
    robertson,
    robertson_dae,
    van_der_pol_scaled,
)

problems: dict[str, Problem] = {
    **smooth.problems,
    **stiff.problems,
    **detest.problems,
    **grids.problems,
    **circuits.problems,
}

__all__ = [  # noqa: RUF022 - the table, what it is made of, and the equations
    "problems",
    "Problem",
    "ring_modulator",
    "transistor_amplifier",
    "brusselator_line",
    "brusselator_square",
    "brusselator_square_start",
    "brusselator_start",
    "cusp",
    "cusp_start",
    "medical_akzo",
    "ARENSTORF",
    "PLEIADES",
    "arenstorf",
    "brusselator",
    "decay",
    "forced",
    "kepler",
    "kepler_exact",
    "kepler_invariants",
    "logistic",
    "lorenz",
    "lotka_volterra",
    "lotka_volterra_invariant",
    "oscillator",
    "pendulum",
    "pendulum_invariant",
    "pleiades",
    "product",
    "van_der_pol",
    "e5",
    "hires",
    "kaps",
    "oregonator",
    "pharmacology",
    "pollution",
    "robertson",
    "robertson_dae",
    "van_der_pol_scaled",
]
