"""What may be wrong with a solve, found in the log of its trial steps: each finding is a function of the facts.

Every one returns a `Finding`, with the remedy, or None. `FINDINGS` has all of them, the graver first;
`jaxode.diagnosis` collects the facts.
"""

import dataclasses
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from jaxode.methods.method import Method
from jaxode.solution import Solution, Status, TrialSteps, succeeded

MANY = 100  # trial steps from which on a solve is asked what holds its steps short
NEAR_LIMIT = 0.75  # of the stability interval: accuracy holds steps of tsit5 at 0.1 to 0.7 of it
AGAIN = 4  # rejected steps that cross one place: of a smooth func one or two do
SHRUNK = 0.02  # the shortest of these over the longest
NOISE = 0.2  # a rounding of the state over what is tolerated, from which on error estimates show it
SMALL_PART = 1e-4  # of the largest number of a state is small
DECIDES = 0.8  # of the trial steps are a component's
LIMITED = 0.3  # of the trial steps for something are much


class Finding(NamedTuple):
    """Something that is wrong with a solve, or with its gradient: what kind (a word), what it is in words, what
    to do about it; and the time at which it begins, if that is known."""

    kind: str
    text: str
    remedy: str
    time: float | None = None


class Probe(NamedTuple):
    """A look at the solution at a time: the sizes of its numbers, the size of steps, and h |lambda| of the
    fastest mode (0 if that does not decay) over where the method becomes unstable."""

    time: float
    state: np.ndarray
    size: float
    stability: float


@dataclasses.dataclass(frozen=True)
class Facts:
    """A solve as it went: numbers of the host.

    `log` has the trial steps that there were, `names` the components of the state, in the order of one
    vector; `rtol`, `atol` and `first`, the sizes of y0, are vectors like that. `probes` are where the work
    was, `towards_end` at 0.9 and 0.999 of the way to where it came. `rounding` is that of the state;
    `clipped` whether `rtol` was below it.
    """

    solution: Solution
    method: Method
    log: TrialSteps
    names: tuple[str, ...]
    rtol: np.ndarray
    atol: np.ndarray
    first: np.ndarray
    rounding: float
    clipped: bool
    hmax: float
    probes: tuple[Probe, ...] = ()
    towards_end: tuple[Probe, ...] = ()

    @property
    def status(self) -> Status:
        return Status(int(self.solution.status))

    @property
    def failed(self) -> bool:
        return not succeeded(self.status)

    @property
    def start(self) -> float:
        return float(self.solution.ts[0])

    @property
    def end(self) -> float:
        return float(self.solution.ts[-1])

    @property
    def reached(self) -> float:
        return float(self.solution.reached)

    @cached_property
    def tried(self) -> int:
        return int(self.solution.stats.accepted) + int(self.solution.stats.rejected)

    @cached_property
    def rejected(self) -> np.ndarray:
        """Which trial steps were rejected for their errors, and not for an event inside."""
        return np.asarray(~self.log.accepted & ~(self.log.ratios <= 1))

    @cached_property
    def sized(self) -> np.ndarray:
        """Which trial steps were accepted and have a size."""
        return np.asarray(self.log.accepted & (self.log.sizes != 0))

    @cached_property
    def largest(self) -> np.ndarray:
        """The largest size of each component that was seen."""
        seen = [probe.state for probe in (*self.probes, *self.towards_end)]
        return np.max([self.first, *seen], axis=0)

    def deciding(self, which) -> tuple[str, float]:
        """The component that decided most of these trial steps, and its share; '' if none did."""
        components = self.log.component[which]
        components = components[components >= 0]
        if len(components) == 0:
            return "", 0.0
        counts = np.bincount(components)
        return self.names[int(np.argmax(counts))], float(np.max(counts) / len(components))

    def because(self, which) -> str:
        """', because of <component>', if one decided most of these trial steps, and there are others."""
        name, share = self.deciding(which)
        return f", because of {name}" if share > 0.5 and len(self.names) > 1 else ""

    def tolerated(self, state: np.ndarray) -> np.ndarray:
        """What is tolerated of each component of a state."""
        return np.maximum(self.atol + self.rtol * state, np.finfo(np.float64).tiny)


def span(low: float, high: float) -> str:
    """'3.2 to 3.4', with as many digits as tell them apart."""
    for digits in range(3, 16):
        texts = f"{low:.{digits}g}", f"{high:.{digits}g}"
        if texts[0] != texts[1]:
            return f"{texts[0]} to {texts[1]}"
    return f"{low:g}"


def pole(facts: Facts) -> Finding | None:
    """The solution grows without bound at a finite time, which steps approach without reaching it."""
    if not (facts.failed and len(facts.towards_end) == 2 and np.any(facts.sized)):
        return None
    begins, sizes = facts.log.times[facts.sized], np.abs(facts.log.sizes[facts.sized])
    last, way = np.min(sizes[-5:]), abs(facts.reached - facts.start)
    before, after = (probe.state for probe in facts.towards_end)
    growth = after / np.maximum(before, facts.tolerated(before))
    # Steps that stability holds short are short, too, but as long as ever.
    nearby = np.max(sizes[np.abs(begins - facts.start) >= 0.8 * way], initial=last)
    shrunk = last < min(1e-4 * way, SHRUNK * nearby)
    if not (shrunk and np.max(growth) > 2):
        return None
    name = facts.names[int(np.argmax(growth))]
    return Finding(
        "pole",
        f"The solution has a pole: {name} grows without bound towards t = {facts.reached:.6g}, and steps "
        "shrink with what is left of the way",
        "end the solve before that time (an earlier last time, or a terminal jaxode.Event), or solve for a "
        "function of the state that stays finite, such as its inverse",
    )


def not_finite(facts: Facts) -> Finding | None:
    """func, or the solution, becomes NaN or infinite."""
    if facts.status != Status.NON_FINITE:
        return None
    where = facts.log.component[-1] if len(facts.log.component) else -1
    name = f", first in {facts.names[where]}" if where >= 0 else ""
    return Finding(
        "not finite",
        f"What func returns is NaN or infinite after t = {facts.reached:.9g}{name}, for every step size",
        "check func near this time: it may have left its domain (sqrt, log, division), or the solution is "
        "larger than its dtype can hold",
    )


def precision(facts: Facts) -> Finding | None:
    """The tolerance is below what the dtype of the state can tell."""
    noise, component = 0.0, 0
    for probe in facts.probes:
        of = facts.rounding * probe.state / facts.tolerated(probe.state)
        if len(of) and np.max(of) > noise:
            noise, component = float(np.max(of)), int(np.argmax(of))
    troubled = facts.failed or np.sum(facts.rejected) > 0.1 * len(facts.rejected)
    if not facts.clipped and not (noise > NOISE and troubled):
        return None
    where = f" of {facts.names[component]}" if noise > 0 else ""
    wide = "" if facts.rounding < 1e-10 else ", or pass a float64 y0 (and set jax_enable_x64)"
    return Finding(
        "precision",
        f"A rounding{where} ({facts.rounding:.2g} of it) is about as large as the error that is tolerated: the "
        "error estimates are roundings, and smaller steps do not make them smaller",
        f"loosen rtol and atol to 100 roundings ({100 * facts.rounding:.1g}) or more{wide}",
    )


def discontinuity(facts: Facts) -> Finding | None:
    """func jumps: step after step across one place is rejected, until one is short enough."""
    places = crossings(facts)
    lost = sum(count for _, count in places)
    if not places or not (facts.failed or 2 * lost > 0.1 * len(facts.rejected)):
        return None
    if facts.failed and not any(abs(t - facts.reached) <= near(facts) for t, _ in places):
        return None
    times = ", ".join(f"{t:.6g}" for t, _ in sorted(places)[:4])
    more = f" and {len(places) - 4} more" if len(places) > 4 else ""
    return Finding(
        "discontinuity",
        f"There is a discontinuity: {lost} of the {np.sum(facts.rejected)} rejected steps crossed "
        f"t = {times}{more} again and again{facts.because(facts.rejected)}, where func, or a derivative of it, "
        "jumps",
        "let no step see both sides: func compares nothing, but reads a part of the state that the `change` "
        "of a jaxode.Event sets (with `times`, or with what func switches at as its condition); or what drives "
        "func is a jaxode.Signal",
    )


def near(facts: Facts) -> float:
    return 1e-3 * abs(facts.end - facts.start)


def crossings(facts: Facts) -> list[tuple[float, int]]:
    """Places that at least `AGAIN` rejected steps crossed, shorter and shorter; and how many did."""
    which = facts.rejected & np.isfinite(facts.log.ratios)
    a = facts.log.times[which]
    b = a + facts.log.sizes[which]
    low, high = np.minimum(a, b), np.maximum(a, b)
    found = []
    while len(low) >= AGAIN:
        starts = np.sort(low)
        counts = np.searchsorted(starts, low, side="right") - np.searchsorted(np.sort(high), low)
        most = int(np.argmax(counts))
        here = (low <= low[most]) & (high >= low[most])
        if np.sum(here) < AGAIN:
            break
        width = (high - low)[here]
        shortest = np.flatnonzero(here)[int(np.argmin(width))]
        if np.min(width) < SHRUNK * np.max(width) and low[shortest] > min(facts.start, facts.end):
            found.append((float((low[shortest] + high[shortest]) / 2), int(np.sum(here))))
        low, high = low[~here], high[~here]
    return found


def stiff(facts: Facts) -> Finding | None:
    """Stability, and not accuracy, holds the steps of an explicit method short."""
    limited = [probe for probe in facts.probes if probe.stability > NEAR_LIMIT]
    if facts.tried < MANY or 2 * len(limited) < len(facts.probes) or not limited:
        return None
    times = [probe.time for probe in limited]
    low, high = min(times), max(times)
    begins = facts.log.times
    here = (begins >= low) & (begins <= high)
    where = f"from {span(low, high)}" if high > low else f"at t = {low:.4g}"
    large = ", with what is known of df/dy as `linear=`" if len(facts.names) > 512 else ""
    return Finding(
        "stiff",
        f"The problem is stiff {where}: steps of about {np.median([p.size for p in limited]):.2g} are as long "
        f"as stability allows{facts.because(here & facts.rejected)}, not as long as accuracy would",
        f"try method='rodas5p' (or 'auto'){large}",
    )


def scale(facts: Facts) -> Finding | None:
    """A component that is much smaller than others decides the steps, or one is below its atol."""
    if len(facts.names) < 2 or not facts.probes:
        return None
    largest, top = facts.largest, float(np.max(facts.largest))
    small = (largest > 0) & (largest < SMALL_PART * top)
    by_small = (facts.log.component >= 0) & small[facts.log.component]
    share = float(np.mean(by_small)) if len(by_small) else 0.0
    if share > DECIDES and facts.tried >= MANY:
        name = facts.deciding(by_small)[0]
        c = facts.names.index(name)
        return Finding(
            "scale",
            f"The scales of components differ: {name} is at most {largest[c]:.2g}, where others reach "
            f"{top:.2g}, and such small ones decide {100 * share:.0f} % of the steps; its atol is "
            f"{facts.atol[c]:.2g}",
            "if it need not be so accurate, pass a larger atol for it (atol may be a pytree like y0), or "
            "measure it in another unit",
        )
    hidden = (largest > 0) & (largest < facts.atol)
    # One that begins below its atol is driven up to it by errors that do not count, and what grows from it
    # is late or early.
    hidden |= (facts.first > 0) & (facts.first < facts.atol)
    if not np.any(hidden):
        return None
    c = int(np.argmax(hidden))
    begins = 0 < facts.first[c] < facts.atol[c]
    size = f"begins at {facts.first[c]:.2g}" if begins else f"is at most {largest[c]:.2g}"
    return Finding(
        "scale",
        f"The scales of components differ: {facts.names[c]} {size}, and its atol is "
        f"{facts.atol[c]:.2g}: its error does not count there",
        "pass a smaller atol for it: atol may be a pytree like y0",
    )


def events(facts: Facts) -> Finding | None:
    """Steps are spent on events."""
    changes = np.sum(facts.log.sizes == 0)
    found = np.sum(~facts.log.accepted & (facts.log.ratios <= 1))
    trials = len(facts.rejected)
    if facts.solution.events is None or trials < MANY or changes + found <= LIMITED * trials:
        return None
    return Finding(
        "events",
        f"Of {trials} trial steps {changes + found} were for events; there were {changes} of them",
        "each costs about three steps: of events that come so often make fewer, or a part of func",
    )


def outputs(facts: Facts) -> Finding | None:
    """Evaluations are spent on outputs between steps."""
    begins = np.sort(facts.log.times[facts.sized])
    inside = np.unique(np.searchsorted(begins, np.asarray(facts.solution.ts)[1:-1]))
    spent = len(inside) * facts.method.inside_evaluations
    count, total = len(facts.solution.ts), int(facts.solution.stats.evaluations)
    if facts.solution.mask is not None or count <= 2 * total:
        return None
    return Finding(
        "outputs",
        f"There are {count} outputs and {total} evaluations of func, {spent} of them for outputs: most of the "
        "time may go into evaluating, and storing, dense output",
        "ask for fewer times, or keep a function of the state alone (`save`)",
    )


def hmax(facts: Facts) -> Finding | None:
    """Steps are as long as `hmax` allows."""
    sizes = np.abs(facts.log.sizes[facts.sized])
    if len(sizes) < 10 or np.sum(sizes > 0.99 * facts.hmax) < 0.5 * len(sizes):
        return None
    return Finding(
        "hmax",
        f"Most steps are as long as hmax = {facts.hmax:g} allows, and more accurate than they have to be",
        "pass a larger hmax, or none",
    )


def newton(facts: Facts) -> Finding | None:
    """The equations of implicit steps are not solved."""
    unsolved = np.sum(facts.log.ratios == np.inf)
    if unsolved <= LIMITED * max(np.sum(facts.rejected), 10):
        return None
    return Finding(
        "newton",
        f"The equations of {unsolved} implicit steps were not solved"
        f"{facts.because(facts.log.ratios == np.inf)}: df/dy changes much over a step, or func has a kink or a "
        "jump",
        "try method='rodas5p', which solves linear equations alone; make func smooth",
    )


def limit(facts: Facts) -> Finding | None:
    """There are more steps to take than allowed."""
    if facts.status != Status.MAX_STEPS:
        return None
    share = abs(facts.reached - facts.start) / abs(facts.end - facts.start)
    return Finding(
        "max_steps",
        f"The limit of steps was reached: {facts.tried} trial steps came to {100 * share:.2g} % of the way, "
        "and each was as long as its error allowed",
        "raise max_steps (or mxstep), loosen rtol and atol, or take a method of higher order, such as 'dop853'",
    )


def short_budget(facts: Facts) -> Finding | None:
    """There are fewer evaluations than the tolerances ask for."""
    error = facts.solution.error
    if facts.status != Status.BUDGET or error is None:
        return None
    return Finding(
        "budget",
        f"max_evaluations made steps so long that their errors are up to {float(np.asarray(error)):.2g} times "
        "what is tolerated",
        "raise it, loosen rtol and atol, or leave it out to see how many evaluations the tolerances take",
    )


# The graver first: what one of a group explains, those after it are not asked about.
FINDINGS: tuple[tuple[Any, ...], ...] = (
    (
        pole,
        not_finite,
        short_budget,
        precision,
        discontinuity,
        stiff,
        scale,
        newton,
        events,
        hmax,
        limit,
    ),
    (outputs,),
)


def found(facts: Facts) -> tuple[Finding, ...]:
    """All that is wrong with a solve."""
    groups = ([finding for look in group if (finding := look(facts))] for group in FINDINGS)
    return tuple(group[0] for group in groups if group)
