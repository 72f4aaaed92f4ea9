"""Symplectic methods for separable problems, each one value. Adding a method is adding one here.

A state is a pair (q, p) with dq/dt = v(p, t) and dp/dt = g(q, t), such as a Hamiltonian of the form
T(p) + V(q). A step moves q with p held (drift) and p with q held (kick) in turn; the map keeps
phase-space volume, and the energy stays within a band for very long times.

References: Hairer, Lubich, Wanner (2006), Geometric Numerical Integration, I.1.4 and II.4; Yoshida
(1990), Construction of higher order symplectic integrators; McLachlan (1995).
"""

import dataclasses
import itertools


@dataclasses.dataclass(frozen=True)
class Splitting:
    """A composition of drifts and kicks: q += drift_i h v(p), then p += kick_i h g(q), for each i.

    The other attributes are those of a `jaxode.tableaus.Tableau` that a solve looks at. Dense output
    is the cubic Hermite interpolant of the step: its "stages" are the derivative at the start, the
    mean derivative of the step, and the derivative at the end.
    """

    order: int
    drift: tuple[float, ...]
    kick: tuple[float, ...]
    dense_order: int = 4
    e: None = None
    e_low: None = None
    error_order: None = None
    extra_c: tuple[float, ...] = ()
    extra_a: tuple[tuple[float, ...], ...] = ()
    dense: tuple[tuple[float, ...], ...] = ((1.0, 0.0, 0.0), (-2.0, 3.0, -1.0), (1.0, -2.0, 1.0))

    def __post_init__(self):
        for name in ("drift", "kick"):
            if abs(sum(getattr(self, name)) - 1) > 1e-12:
                raise ValueError(f"The coefficients `{name}` must sum to 1.")
        if len(self.drift) != len(self.kick):
            raise ValueError("`drift` and `kick` need as many coefficients (0 is one).")

    @property
    def c(self) -> tuple[float, ...]:
        """As many nodes as a step has evaluations, and the start."""
        return (0.0,) * (len(self.drift) + 2)


def composed(*substeps: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Leapfrog steps of these sizes one after another, as drifts and kicks."""
    halves = [0.0, *substeps, 0.0]
    drift = tuple((a + b) / 2 for a, b in itertools.pairwise(halves))
    return drift, (*substeps, 0.0)


leapfrog = Splitting(2, *composed(1.0), dense_order=2)

_one = 1 / (2 - 2 ** (1 / 3))
yoshida4 = Splitting(4, *composed(_one, 1 - 2 * _one, _one))

splittings: dict[str, Splitting] = {"leapfrog": leapfrog, "yoshida4": yoshida4}
