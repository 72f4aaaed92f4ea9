"""Symplectic methods for separable problems, each one value. Adding a method is adding one here.

A state is a pair (q, p) with dq/dt = v(p, t) and dp/dt = g(q, t), such as a Hamiltonian of the form
T(p) + V(q). A step moves q with p held (drift) and p with q held (kick) in turn; the map keeps
phase-space volume, and the energy stays within a band for very long times.

References: Hairer, Lubich, Wanner (2006), Geometric Numerical Integration, I.1.4 and II.4; Yoshida
(1990), Construction of higher order symplectic integrators; McLachlan (1995).
"""

import dataclasses
import itertools

import jax
from jaxtyping import PyTree

from jaxode import tree
from jaxode.methods.method import Method, Step


@dataclasses.dataclass(frozen=True)
class Splitting(Method):
    """A composition of drifts and kicks: q += drift_i h v(p), then p += kick_i h g(q), for each i.

    Dense output is the cubic Hermite interpolant of the step, so a step ends with an evaluation of
    func there, which serves as the memory of the next one.
    """

    order: int
    drift: tuple[float, ...]
    kick: tuple[float, ...]
    dense_order: int = 4
    error_order = None
    sums_slopes = True
    has_increment = True

    def __post_init__(self):
        for name in ("drift", "kick"):
            if abs(sum(getattr(self, name)) - 1) > 1e-12:
                raise ValueError(f"The coefficients `{name}` must sum to 1.")
        if len(self.drift) != len(self.kick):
            raise ValueError("`drift` and `kick` need as many coefficients (0 is one).")

    def start(self, f, s, y: PyTree) -> PyTree:
        return f(y, s)

    def step(self, f, s, y: PyTree, memory: PyTree, h) -> Step:
        """q += drift h v(p), p += kick h g(q), in turn; both have a time of their own."""
        return self.with_slopes(f, s, y, memory, h)[0]

    def with_slopes(self, f, s, y: PyTree, memory: PyTree, h) -> tuple[Step, list]:
        """A step, and its pairs (drift, v) and (kick, g)."""
        (q, p), tq, tp = y, s, s
        drifts, kicks = [], []
        for drift, kick in zip(self.drift, self.kick):
            if drift:
                v = f((q, p), tp)[0]
                q, tq = tree.combine(q, h, [drift], [v]), tq + tree.scale(drift, h)
                drifts.append((drift, v))
            if kick:
                g = f((q, p), tq)[1]
                p, tp = tree.combine(p, h, [kick], [g]), tp + tree.scale(kick, h)
                kicks.append((kick, g))
        y1 = jax.tree.unflatten(jax.tree.structure(y), jax.tree.leaves((q, p)))
        k1 = f(y1, s + h)
        step = Step(y1, k1, k1, [], memory, evaluations=len(self.drift) + 1)
        return step, [drifts, kicks]

    def with_increment(self, f, s, y: PyTree, memory: PyTree, h) -> tuple[Step, PyTree]:
        """A step, and h sum_i drift_i v_i with h sum_i kick_i g_i."""
        step, slopes = self.with_slopes(f, s, y, memory, h)
        moves = [tree.wide_sum(h, pairs) for pairs in slopes]
        return step, jax.tree.unflatten(jax.tree.structure(y), jax.tree.leaves(moves))

    def inside(self, f, s, y: PyTree, h, step: Step) -> list[PyTree]:
        """The cubic through y, y', y1, y1' (HNW eq. II.6.7)."""
        return tree.hermite(h, tree.difference(step.y, y), step.stages, step.slope)

    def check(self, func, y0: PyTree) -> None:
        """Raise if the state is not a pair, or if dq/dt depends on q, or dp/dt on p."""
        if not isinstance(y0, tuple | list) or len(y0) != 2:
            raise TypeError(
                "A symplectic method needs a state y0 = (q, p), and func(y, t) = (dq/dt, dp/dt); "
                f"got {jax.tree.structure(y0)}."
            )
        if func is None:
            return
        q, p = (len(jax.tree.leaves(part)) for part in y0)
        for name, outs, ins in (("dq/dt", (0, q), (0, q)), ("dp/dt", (q, q + p), (q, q + p))):
            if func.depends(range(*outs), range(*ins)):
                raise ValueError(
                    f"A symplectic method needs a separable problem, but {name} depends on "
                    f"{name[1]}. Use a method such as 'dop853'."
                )

    def backwards(self) -> Method:
        raise ValueError("adjoint='backsolve' has no symplectic methods: use 'replay'.")


def composed(*substeps: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Leapfrog steps of these sizes one after another, as drifts and kicks."""
    halves = [0.0, *substeps, 0.0]
    drift = tuple((a + b) / 2 for a, b in itertools.pairwise(halves))
    return drift, (*substeps, 0.0)


leapfrog = Splitting(2, *composed(1.0), dense_order=2)

_one = 1 / (2 - 2 ** (1 / 3))
yoshida4 = Splitting(4, *composed(_one, 1 - 2 * _one, _one))

splittings: dict[str, Splitting] = {"leapfrog": leapfrog, "yoshida4": yoshida4}
