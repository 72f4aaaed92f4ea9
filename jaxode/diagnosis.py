"""Why a solve is slow, or fails: the facts of a solve, and what they say."""

import dataclasses
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxode import arguments, findings, tolerances, tree
from jaxode.findings import Facts, Finding, Probe
from jaxode.integrate import MAX_STEPS, solve
from jaxode.methods.method import Method
from jaxode.solution import Solution
from jaxode.stiffness import fastest_mode
from jaxode.switches import moving, unchecked

PROBES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the accepted steps: where the work is
TOWARDS_END = (0.9, 0.999)  # of the way
FEW = 5  # rejected steps, below which they are no cluster
ROUND = 5  # steps on both sides of a probe, whose median is the size of steps there


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """Why a solve is slow, or fails: `str` of it is the answer in words.

    Attributes:
        solution: the `Solution`, with its log; its status may be that of a failure.
        findings: what was found to hold it up, the gravest first: each has a `kind` ("stiff",
            "discontinuity", "pole", "precision", "scale", "events", "outputs", "hmax", "newton",
            "not finite", "max_steps", or the name of a status), a `text`, and a `remedy`.
        tried, rejected, evaluations: how many trial steps there were, how many of them rejected, and
            how many evaluations of func.
        cluster: (first, last), the shortest stretch of time in which at least 90 % of the rejected steps
            were, if it is at most a fifth of the solve; else None.
        share: the share of the rejected steps that were in the cluster.
        component: the name of the component that decided most rejected steps, such as `y['a'][7]`; '' if
            none were.
        shortest, longest: (size, time) of the shortest and the longest accepted step.
    """

    solution: Solution
    findings: tuple[Finding, ...]
    tried: int
    rejected: int
    evaluations: int
    cluster: tuple[float, float] | None
    share: float
    component: str
    shortest: tuple[float, float]
    longest: tuple[float, float]

    @property
    def verdict(self) -> str:
        """The kind of the gravest finding; "fine" if there is none."""
        return self.findings[0].kind if self.findings else "fine"

    def __str__(self) -> str:
        ts, reached = np.asarray(self.solution.ts), float(self.solution.reached)
        part = self.rejected / max(self.tried, 1)
        lines = [
            f"The solve came to t = {reached:g} of {ts[-1]:g}, in {self.tried} trial steps, of which "
            f"{self.rejected} ({100 * part:.0f} %) were rejected, and {self.evaluations} evaluations of func.",
        ]
        if self.tried > self.rejected:
            (short, at), (long, there) = self.shortest, self.longest
            lines.append(
                f"Steps were {short:.2g} (at t = {at:.4g}) to {long:.2g} (at t = {there:.4g}) long."
            )
        because = f", because of {self.component}" if self.component else ""
        if self.cluster is not None:
            where = findings.span(*self.cluster)
            lines.append(
                f"{100 * self.share:.0f} % of the rejected steps were at {where}{because}."
            )
        elif self.rejected >= FEW:
            most = f", most of them because of {self.component}" if self.component else ""
            lines.append(f"Rejected steps are spread over the solve{most}.")
        for finding in self.findings:
            lines.append(f"{finding.text}. {finding.remedy[0].upper()}{finding.remedy[1:]}.")
        if not self.findings:
            log = self.solution.log
            estimated = log is not None and np.any(np.isfinite(log.ratios))
            why = "as long as the tolerances allow" if estimated else "of the size that `dt` says"
            lines.append(f"Nothing is wrong: the steps are {why}.")
        return "\n".join(lines)


def explain(func: Callable, y0: PyTree, t, *args, **options) -> Explanation:
    """Solve, and say in words why that is slow, or fails: an `Explanation`, to be printed.

    Takes the arguments of `jaxode.solve`, and solves twice: once with a log of its trial steps, and once
    more to look at the state and at the fastest mode of df/dy where the steps were. For one solve whose
    values are known: not under `jit`, `grad` or `vmap`. Not with signals (see `log` of `solve`).

    Raises:
        TypeError: one of the values is traced; or `log`, `throw`, `progress` or `resumable` are given.
        ValueError: as `solve` does.

    >>> import jax.numpy as jnp
    >>> from jaxode import explain
    >>> f = lambda y, t: {"slow": -y["slow"], "fast": -1e4 * (y["fast"] - jnp.cos(t))}
    >>> print(explain(f, {"slow": 1.0, "fast": 0.0}, [0.0, 1.0], rtol=1e-4, atol=1e-4))
    The solve came to t = 1 of 1, in ... trial steps, of which ... were rejected, and ... evaluations of func.
    ...
    The problem is stiff from ...: steps of about 0.0003... are as long as stability allows, ...
    Try method='rodas5p' (or 'auto').
    """
    for name in ("log", "throw", "progress", "resumable"):
        if name in options:
            raise TypeError(f"explain takes no `{name}`: leave it out.")
    if not tree.known((y0, t, args)):
        raise TypeError(
            "explain looks at values: call it outside of jit, grad and vmap, for one solve."
        )
    rows = min(options.get("max_steps", MAX_STEPS), MAX_STEPS)
    with warnings.catch_warnings(record=True) as said, unchecked():
        warnings.simplefilter("always")
        solution = solve(func, y0, t, *args, log=rows, throw=False, **options)
    clipped = [w for w in said if "is below what" in str(w.message)]
    for warning in said:
        if warning not in clipped:
            warnings.warn(warning.message, stacklevel=2)
    with warnings.catch_warnings(), unchecked(), moving():
        warnings.simplefilter("ignore")  # they have been said
        facts = facts_of(solution, y0, bool(clipped), options)
        facts = looked_at(facts, func, y0, args, options)
        return explained(facts)


def facts_of(solution: Solution, y0: PyTree, clipped: bool, options: dict) -> Facts:
    """What the log of a solve and its arguments say."""
    log = jax.tree.map(np.asarray, solution.log)
    there = ~np.isnan(log.times)
    log = jax.tree.map(lambda x: x[there], log)
    log = log._replace(times=log.times.astype(np.float64), sizes=log.sizes.astype(np.float64))
    y0 = arguments.as_state(y0)
    name = options.get("method", "tsit5")
    method = arguments.method_for(name, options.get("linear"), y0, options.get("dt"))[0]
    given = options.get("rtol"), options.get("atol")
    rtol, atol = (vector(x, y0) for x in tolerances.of_leaves(*given, y0, method))
    roundings = [float(jnp.finfo(y.dtype).eps) for y in jax.tree.leaves(y0)]
    return Facts(
        solution=solution, method=method, log=log, names=tree.names_of(y0), rtol=rtol, atol=atol,
        rounding=max(roundings, default=0.0), clipped=clipped, hmax=float(options.get("hmax", np.inf)),
        first=vector(y0, y0),
    )  # fmt: skip


def vector(x: PyTree, y0: PyTree) -> np.ndarray:
    """The sizes of what broadcasts to a state, as one vector."""
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y0))
    leaves = [np.broadcast_to(np.abs(np.asarray(x)), y.shape).astype(np.float64) for x, y in pairs]
    return np.concatenate([np.zeros(0), *(leaf.ravel() for leaf in leaves)])


def looked_at(facts: Facts, func, y0, args, options: dict) -> Facts:
    """The facts with probes: the state, and the fastest mode, at some times of a second solve."""
    begins = facts.log.times[facts.sized]
    if len(begins) < 2:
        return facts
    work = [begins[int(share * (len(begins) - 1))] for share in PROBES]
    way = [facts.start + share * (facts.reached - facts.start) for share in TOWARDS_END]
    forward = 1 if facts.end >= facts.start else -1
    dtype = np.asarray(facts.solution.ts).dtype
    times = np.array([facts.start, *work, *way, facts.end], dtype)  # with the end: the same steps
    times = forward * np.unique(forward * times)  # in order
    kept = ("save", "save_steps", "dense", "heuristics")
    options = {name: value for name, value in options.items() if name not in kept}
    again = solve(func, y0, times, *args, throw=False, **options)
    limit = stability_limit(facts.method)

    @jax.jit
    def mode(y, t):
        slope = lambda y: arguments.like_state(func(y, t, *args), y)
        return fastest_mode(lambda y: jax.tree.map(lambda k: tree.scale(forward, k), slope(y)), y)

    def probe(time) -> Probe:
        i = int(np.argmin(np.abs(times - time)))
        y = jax.tree.map(lambda y: y[i], again.ys)
        size, stability = size_at(facts, time), 0.0
        if limit is not None:
            rate, decays = map(float, mode(y, times[i]))
            stability = size * rate / limit if decays else 0.0
        return Probe(float(time), vector(y, y), size, stability)

    probes, towards_end = (
        tuple(p for p in map(probe, at) if np.all(np.isfinite(p.state))) for at in (work, way)
    )
    return dataclasses.replace(facts, probes=probes, towards_end=towards_end)


def size_at(facts: Facts, time) -> float:
    """How long the accepted steps were around a time."""
    begins, sizes = (x[facts.sized] for x in (facts.log.times, facts.log.sizes))
    i = int(np.argmin(np.abs(begins - time)))
    return float(np.median(np.abs(sizes[max(0, i - ROUND) : i + ROUND + 1])))


def stability_limit(method: Method) -> float | None:
    """The least h |lambda| from which on a step makes y' = -|lambda| y grow; None if it is beyond 50, or for an
    implicit method."""
    if method.implicit or method.error_order is None:
        return None
    one, h = jnp.ones(()), jnp.ones(())

    def grown(z):
        f = lambda y, s: -z * y
        return jnp.abs(method.step(f, 0 * h, one, method.start(f, 0 * h, one), h).y)

    z = jnp.linspace(0.05, 50.0, 1000)
    unstable = np.asarray(jax.vmap(grown)(z)) > 1
    return float(z[int(np.argmax(unstable))]) if np.any(unstable) else None


def explained(facts: Facts) -> Explanation:
    """What the facts say."""
    found = findings.found(facts)
    if not found and facts.failed:
        found = (Finding(facts.status.name.lower(), "the solve failed", facts.status.message),)
    times = np.sort(facts.log.times[facts.rejected])
    cluster, share = None, 0.0
    if len(times) >= FEW:
        count = int(np.ceil(0.9 * len(times)))
        widths = times[count - 1 :] - times[: len(times) - count + 1]
        first = int(np.argmin(widths))
        if widths[first] <= 0.2 * abs(facts.end - facts.start):
            cluster = float(times[first]), float(times[first + count - 1])
            share = float(np.mean((times >= cluster[0]) & (times <= cluster[1])))
    within = facts.rejected
    if cluster is not None:
        within = within & (facts.log.times >= cluster[0]) & (facts.log.times <= cluster[1])
    sizes, begins = np.abs(facts.log.sizes[facts.sized]), facts.log.times[facts.sized]
    pick = lambda i: (float(sizes[i]), float(begins[i]))
    shortest = longest = (np.nan, np.nan)
    if len(sizes):
        shortest, longest = pick(np.argmin(sizes)), pick(np.argmax(sizes))
    stats = facts.solution.stats
    return Explanation(
        solution=facts.solution, findings=found, tried=facts.tried, rejected=int(stats.rejected),
        evaluations=int(stats.evaluations), cluster=cluster, share=share,
        component=facts.deciding(within)[0], shortest=shortest, longest=longest,
    )  # fmt: skip
