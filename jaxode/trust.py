"""Whether a gradient can be believed: each finding is a function of the evidence.

Every one returns a `Finding`, with the remedy, or None. The first of `VERDICTS` that finds something is the
verdict; what `BESIDE` finds is told too. `jaxode.gradients` collects the evidence.
"""

import dataclasses
from functools import cached_property

import numpy as np

from jaxode.findings import Facts, Finding, crossings
from jaxode.perturbations import Slope

OFF = 0.03  # of a gradient: an error that is told
NEGLIGIBLE = 1e-6  # of what the loss changes where outputs change by their own size
EXACT = (
    0.003  # of a gradient: how near that of the reference is to differences, where func may jump
)
GOOD = 0.01  # of a gradient: an error that a remedy has to come below
UNSTABLE = 1e5  # growth of a perturbation from which on its problem cannot be predicted for long
PREDICTABLE = 1e3  # growth up to which it can
EXPLODED = 10.0  # times the growth of the problem is that of the steps
NEAR_LIMIT = 0.6  # of the stability interval: median over the solve
UNEVEN = 100.0  # times as accurate as another is a component
HALF_NOISE = 0.3  # of a difference: how far those of other widths are from it, if func jumps


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What was measured of a gradient: numbers of the host.

    Inputs and states are measured in their own sizes, and gradients with respect to relative changes:
    x dL/dx. A direction has one number for each number of the inputs, as every gradient has.

    Attributes:
        adjoint: the name of that by which the gradient is.
        gradients: by the names of adjoints; `tight` is that by replay of the reference, None without one.
        leaves: the name of every array of the inputs, and where its numbers are.
        unit: how much the loss changes where outputs change by their own size.
        tolerance: the relative error of a step that is tolerated, and `tight_tolerance` in the reference.
        value, tight_value: of the loss.
        difference, tight_difference: the derivative along `direction` by central differences of the solve
            and of the reference.
        times: at which states were compared; `growth` is there the relative change of the state for relative
            changes of the inputs up to 1 in the problem, `of_steps` the same by the product of the derivatives
            of the steps, and `of_tight_steps` by that of the reference.
        departure, tight_departure: how far that product has moved a perturbation from where differences
            of the reference see it.
        recovered: how far a solve back from the end is from the states that it had.
        components: the names of the components of the state; `accuracy` is their relative tolerances.
        facts, tight_facts: logs of the solve and of the reference, if there are.
        dt: the size of equal steps.
        failure: why there is no reference.
        stability: step size over that at which steps become unstable, at some times; looked at in doubt.
        rule: the relative error of the derivatives that func has; looked at in doubt.
        remedied: relative errors of the gradient with other tolerances: by factors, or "scaled".
    """

    adjoint: str
    gradients: dict[str, np.ndarray]
    tight: np.ndarray | None
    leaves: tuple[tuple[str, slice], ...]
    direction: np.ndarray
    unit: float
    tolerance: float
    tight_tolerance: float
    value: float
    tight_value: float
    difference: Slope
    tight_difference: Slope
    times: np.ndarray
    growth: np.ndarray
    of_steps: np.ndarray
    of_tight_steps: np.ndarray
    departure: np.ndarray
    tight_departure: np.ndarray
    recovered: np.ndarray
    components: tuple[str, ...]
    accuracy: np.ndarray
    facts: Facts | None
    tight_facts: Facts | None
    dt: float | None
    failure: str = ""
    stability: tuple[float, ...] = ()
    rule: float = 0.0
    remedied: dict = dataclasses.field(default_factory=dict)

    @property
    def gradient(self) -> np.ndarray:
        return self.gradients[self.adjoint]

    @property
    def negligible(self) -> float:
        """A gradient below that moves the outputs by less than the solve is accurate."""
        return max(10 * self.tolerance, NEGLIGIBLE) * self.unit

    def slope(self, g: np.ndarray) -> float:
        return float(np.dot(g, self.direction))

    def error(self, g: np.ndarray) -> float:
        """How far a gradient is from that of the reference: the largest relative error of an array of it.

        An array that has less than a tenth of the gradient counts as if it had that.
        """
        tight = self.tight
        if tight is None:
            return np.nan
        if not np.all(np.isfinite(g)):
            return np.inf
        least = max(float(np.linalg.norm(tight)) / 10, self.negligible, np.finfo(float).tiny)
        size = lambda x, part: float(np.linalg.norm(x[part]))
        of = [size(g - tight, part) / max(size(tight, part), least) for _, part in self.leaves]
        return max(of, default=0.0)

    def agrees(self, g: np.ndarray, off: float = OFF) -> bool:
        """Whether a gradient has the slope that differences of the reference see."""
        value, uncertainty = self.tight_difference
        if not (np.all(np.isfinite(g)) and np.isfinite(value)):
            return False
        size = max(np.linalg.norm(g), abs(value), self.negligible)
        return bool(abs(value - self.slope(g)) <= off * size + 3 * uncertainty)

    @cached_property
    def jumps(self) -> bool:
        """Whether differences of the reference of several widths do not agree."""
        value, uncertainty = self.tight_difference
        size = max(abs(value), self.negligible)
        if self.tight is not None and np.all(np.isfinite(self.tight)):
            size = max(size, np.linalg.norm(self.tight))
        return bool(uncertainty > HALF_NOISE * size)

    @cached_property
    def places(self) -> list[tuple[float, int]]:
        """Where func, or a derivative of it, jumps: times, and how many rejected steps crossed each."""
        facts = self.facts if self.tight is None else self.tight_facts
        return [] if facts is None else sorted(crossings(facts))

    @cached_property
    def has_reference(self) -> bool:
        """Whether the gradient of the reference is one to compare with."""
        off = EXACT if self.places else OFF
        return self.tight is not None and self.agrees(self.tight, off) and not self.jumps

    def right(self, g: np.ndarray) -> bool:
        """Whether a gradient is right. One that is that of the reference is not if differences see another."""
        if self.has_reference or self.error(g) <= OFF:
            return self.has_reference and self.error(g) <= OFF
        return self.agrees(g) and not self.jumps

    @property
    def values_agree(self) -> bool:
        return abs(self.value - self.tight_value) <= OFF * abs(self.tight_value)

    @cached_property
    def is_right(self) -> bool:
        return self.right(self.gradient)

    @cached_property
    def lasting(self) -> float:
        """The growth of a perturbation that lasts: at the end, but for what passes."""
        late = self.growth[np.isfinite(self.growth)][-4:]
        return float(np.median(late)) if len(late) else 0.0

    def exploded(self, of_steps: np.ndarray) -> bool:
        """Whether the product of the derivatives of the steps grows as the problem does not."""
        bound = EXPLODED * np.fmax(self.growth, 1.0)
        return bool(np.any(np.isfinite(self.growth) & ~(of_steps <= bound)))

    def first(self, sizes: np.ndarray, bound: float) -> float | None:
        """The first time at which something is above a bound."""
        above = np.flatnonzero(np.isfinite(self.growth) & ~(sizes <= bound))
        return float(self.times[above[0]]) if len(above) else None


def chaotic(e: Evidence) -> Finding | None:
    """The problem makes perturbations grow, so that its solution cannot be predicted."""
    if not e.lasting >= UNSTABLE:
        return None
    until = float(e.times[np.flatnonzero(e.growth <= PREDICTABLE)[-1]])
    return Finding(
        "chaotic",
        f"The problem is chaotic, or unstable: a small change of the inputs has grown {e.lasting:.1g} times as "
        "large by the end, in the problem itself and not by the steps. The gradient is that of the computed "
        "path; it does not say how the loss changes where the inputs do, but for changes below one part in "
        f"{e.lasting:.1g}",
        f"end the solve at about t = {until:.4g}, to which the growth is below {PREDICTABLE:g}; fit longer "
        "data in pieces of that length that begin at states of their own (multiple shooting)",
        until,
    )


def not_finite(e: Evidence) -> Finding | None:
    """A derivative of func or of the loss is NaN or infinite."""
    if np.all(np.isfinite(e.gradient)) or (e.tight is not None and np.all(np.isfinite(e.tight))):
        return None
    if e.exploded(np.nan_to_num(e.of_steps, nan=0.0)):
        return None
    at = e.first(np.where(np.isfinite(e.of_tight_steps), 0.0, 1.0), 0.5)
    where = "of the loss, or of func," if at is None else f"of func, at or before t = {at:.4g},"
    names = ", ".join(name for name, part in e.leaves if not np.all(np.isfinite(e.gradient[part])))
    return Finding(
        "not finite",
        f"The gradient is NaN or infinite in {names}: the values are finite, and a derivative {where} is not",
        "look for sqrt, norm, power, log or division where their arguments are 0, also in a branch of jnp.where"
        " that is not taken: give them an argument that is safe, jnp.sqrt(jnp.where(x > 0, x, 1))",
        at,
    )


def zero(e: Evidence) -> Finding | None:
    """There is no gradient."""
    if np.any(e.gradient != 0) or not e.agrees(e.gradient):
        return None
    return Finding(
        "zero",
        "The gradient is 0, and differences see none either: the loss does not depend on y0 or args",
        "check that the loss uses what the solve returns, and that nothing on the way counts, rounds, or "
        "compares",
    )


def discontinuous(e: Evidence) -> Finding | None:
    """func jumps, where what makes it jump moves with the inputs."""
    if e.tight is None:  # at tighter tolerances no solve may succeed
        shows = len(e.places) > 0
    else:
        unstable = not e.places and e.exploded(e.of_tight_steps)
        apart = np.isfinite(e.tight_difference.value) and not (e.is_right or e.has_reference)
        shows = apart and e.rule <= OFF and (e.jumps or not unstable)
    if not shows:
        return None
    times = [time for time, _ in e.places[:4]]
    if not times and e.tight is not None and (at := e.first(e.tight_departure, OFF)) is not None:
        times = [at]
    where = f" near t = {', '.join(f'{time:.4g}' for time in times)}" if times else ""
    noise = " and differences of several widths do not agree with each other" if e.jumps else ""
    return Finding(
        "discontinuous",
        f"func, or the loss, jumps{where}: differences do not agree with the gradients{noise}. The derivatives "
        "of steps do not know that the time of a jump moves with the inputs",
        "make what func switches at the condition of a jaxode.Event, whose `change` switches a component of "
        "the state; what drives func may be a jaxode.Signal; or make the jump smooth (a sigmoid in place of "
        "jnp.where)",
        times[0] if times else None,
    )


def wrong_rule(e: Evidence) -> Finding | None:
    """func has a derivative that is not its own."""
    if e.is_right or not e.rule > OFF:
        return None
    return Finding(
        "wrong rule",
        f"The derivative that JAX has of func is not that of its values: it is {100 * e.rule:.2g} % off. "
        "All gradients use it, and differences do not agree with them",
        "if that is not intended, look in func for stop_gradient, rounding, comparisons, and custom derivative "
        "rules",
    )


def stability_limit(e: Evidence) -> Finding | None:
    """Steps are as long as stability allows, or longer, and their derivatives explode."""
    unstable = len(e.stability) > 0 and np.median(e.stability) > NEAR_LIMIT
    if e.is_right or not (e.exploded(e.of_steps) or unstable):
        return None
    at = e.first(e.departure, 0.1)
    where = "" if at is None else f" from t = {at:.4g} on"
    apart = abs(e.value - e.tight_value)
    ratio = max(e.stability, default=0.0)
    steps, problem = (np.nanmax(x, initial=0.0) for x in (e.of_steps, e.growth))
    if e.dt is not None and ratio > 1:
        remedy = f"pass a `dt` below {0.9 * e.dt / ratio:.2g}, or method='rodas5p'"
    else:
        remedy = "pass method='rodas5p' (or 'auto')" + tighter(e, ", or {}")
    return Finding(
        "stability limit",
        f"Steps are at the limit of stability: the loss is right to {apart:.1g}, and the product of the "
        f"derivatives of the steps is not that of the problem{where}: perturbations become up to {steps:.2g} "
        f"times as large by the steps, and {problem:.2g} times by the problem",
        remedy,
        at,
    )


def tighter(e: Evidence, words: str) -> str:
    """The tolerances with which the gradient was right, in words; '' if there are none."""
    good = [factor for factor, error in e.remedied.items() if factor != "scaled" and error < GOOD]
    if not good:
        return ""
    return words.format(f"tolerances {1 / good[0]:g} times as tight (its error is then "
                        f"{100 * e.remedied[good[0]]:.1g} %)")  # fmt: skip


def badly_scaled(e: Evidence) -> Finding | None:
    """Components of the state are so unlike that one atol does not serve all of them."""
    worst = int(np.argmax(e.accuracy)) if len(e.accuracy) else 0
    if e.is_right or e.remedied.get("scaled", np.inf) > OFF:
        return None
    if e.values_agree and e.exploded(e.of_steps):
        return None
    return Finding(
        "badly scaled",
        f"The scales of components differ: {e.components[worst]} is so small beside its atol that it is only "
        f"{100 * min(e.accuracy[worst], 1):.2g} % accurate, others {100 * np.min(e.accuracy):.1g} %",
        "pass an atol for each component, a pytree like y0, of rtol times its largest value: the error of the "
        f"gradient is then {100 * e.remedied['scaled']:.1g} %",
    )


def loose_tolerance(e: Evidence) -> Finding | None:
    """The gradient changes with the tolerance."""
    if e.is_right or not e.has_reference:
        return None
    error = e.error(e.gradient)
    if e.dt is not None:
        remedy = f"pass a smaller `dt` than {e.dt:g}, or a method of higher order"
    else:
        remedy = tighter(e, "pass {}") or "pass tighter rtol and atol, if need be with a float64 y0"
    return Finding(
        "loose tolerance",
        f"The gradient is {100 * error:.2g} % off, the loss {abs(e.value - e.tight_value):.1g}: the solve is "
        "not accurate enough",
        remedy,
    )


def drifting(e: Evidence) -> Finding | None:
    """The gradient that was asked for is by backsolve, which is off, and by replay it is right."""
    return drift(e) if e.adjoint == "backsolve" else None


def drift(e: Evidence) -> Finding | None:
    """The solve back in time leaves the path, and the gradient by it is off where another is right."""
    g = e.gradients.get("backsolve")
    if g is None or e.right(g) or not any(map(e.right, e.gradients.values())):
        return None
    backwards = e.recovered[::-1]
    late = np.flatnonzero(~(backwards <= OFF))
    at = float(e.times[::-1][late[0]]) if len(late) else None
    where = "" if at is None else f"; it has left the path at t = {at:.4g}"
    found = e.recovered[0]
    state = ""
    if found > OFF:
        state = (
            f", the y0 that it finds by {found:.1g} of its size"
            if found < np.inf
            else ", it finds no y0"
        )
    error = e.error(g)
    size = f"{100 * error:.2g} % off" if np.isfinite(error) else "wrong"
    return Finding(
        "backsolve drifts",
        f"The gradient by backsolve is {size}{state}{where}: what decays forwards grows backwards",
        "use adjoint='replay'",
        at,
    )


def unresolved(e: Evidence) -> Finding | None:
    """Checks do not agree, for no reason that is known."""
    if e.is_right:
        return None
    if e.tight is None:
        return Finding(
            "unresolved",
            f"There is no solve at a tighter tolerance to compare with: {e.failure}",
            "see what jaxode.explain says of a solve at tolerances that are a tenth of these",
        )
    if np.isnan(e.tight_difference.value):
        return Finding(
            "unresolved",
            "There are no differences to compare with: solves with slightly changed inputs fail",
            "hold fixed what must not change by itself, such as repeated knots of a padded Signal: let func "
            "close over it, and do not pass it in args",
        )
    return Finding(
        "unresolved",
        f"Gradients do not agree with differences: along one direction {e.slope(e.gradient):.3g} by "
        f"{e.adjoint}, {e.tight_difference.value:.3g} by differences at a tighter tolerance",
        "see what jaxode.explain says of the solve; check the loss for jumps and for derivatives that are "
        "not its own",
    )


def jump_of_time(e: Evidence) -> Finding | None:
    """func jumps at times that do not move with the inputs: the gradient is right."""
    if not e.is_right or not e.places:
        return None
    times = ", ".join(f"{time:.4g}" for time, _ in e.places[:4])
    return Finding(
        "jump",
        f"func, or a derivative of it, jumps near t = {times}, which does not harm the gradient here",
        "steps need not search for it if the `change` of a jaxode.Event sets a component of the state that "
        "func reads, or with a jaxode.Signal",
    )


# The first that finds something is the verdict.
VERDICTS = (
    chaotic, not_finite, zero, discontinuous, wrong_rule, drifting, badly_scaled, stability_limit,
    loose_tolerance, unresolved,
)  # fmt: skip
BESIDE = (drift, jump_of_time)


def found(e: Evidence) -> tuple[str, tuple[Finding, ...]]:
    """The verdict, and what was found: what it stands on first, and then what there is beside it."""
    verdict = next((finding for look in VERDICTS if (finding := look(e))), None)
    first = () if verdict is None else (verdict,)
    beside = [finding for look in BESIDE if (finding := look(e))]
    every = *first, *(finding for finding in beside if finding not in first)
    return "trusted" if verdict is None else verdict.kind, every
