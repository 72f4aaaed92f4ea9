"""Whether the gradient of a solve can be believed: it is compared with all that should be the same."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxode import arguments, tolerances, tree, trust
from jaxode.adjoints.names import adjoints, named
from jaxode.evidence import Case, collect
from jaxode.findings import Finding
from jaxode.integrate import MAX_STEPS
from jaxode.methods.method import Method
from jaxode.perturbations import Programs, Solves, flat
from jaxode.solution import Solution, Status, succeeded
from jaxode.switches import moving
from jaxode.trust import Evidence

REFUSED = ("log", "throw", "progress", "resumable", "heuristics", "save_steps")


@dataclasses.dataclass(frozen=True, eq=False)
class GradientReport:
    """Whether a gradient can be believed: `str` of it is the answer in words.

    Lengths, angles and slopes are those of x dL/dx, with x in its own size (of a 0 in y0 the largest value of
    that component; of another 0 a middle value of its array): of the change of the loss with relative changes.

    Attributes:
        verdict: "trusted", or the kind of the first of the findings.
        findings: what was found, the verdict first: each has a `kind` ("failed", "chaotic", "not finite",
            "zero", "discontinuous", "wrong rule", "stability limit", "badly scaled", "loose tolerance",
            "unresolved"; "backsolve drifts" and "jump", which may stand beside another verdict), a `text`, a
            `remedy`, and the `time` at which it begins, if that is known.
        solution: the `Solution`.
        gradient: the gradient, as (func, y0, args); None where nothing is differentiated.
        loss, tight_loss: the loss, and that of the reference: a solve at `tight_tolerance`, of float64 if that
            can be had.
        lengths: of the gradients, by the names of adjoints, and "tight", by replay in the reference.
        angles: between them and the gradient, in degrees.
        error: of the gradient: the largest relative error of an array of it, if the one of the reference agrees
            with differences; else NaN.
        slopes: derivatives along one direction, by the names of `lengths`, and by central differences of the
            "solve" and of the "tight solve".
        uncertainties: of these two: how far differences of other widths are from them.
        condition: the largest relative change of the state for relative changes of the inputs up to 1.
        growth: the same at each of `times`: a root mean square over the state, where each component is measured
            by the largest value that it has had (by a thousandth of that of its array, if it has less).
        recovered: how far from y0 a solve back from the end arrives, in its size; NaN with events, which have
            no way back.
    """

    verdict: str
    findings: tuple[Finding, ...]
    solution: Solution
    gradient: PyTree = None
    loss: float = np.nan
    tight_loss: float = np.nan
    tight_tolerance: float = np.nan
    lengths: dict = dataclasses.field(default_factory=dict)
    angles: dict = dataclasses.field(default_factory=dict)
    error: float = np.nan
    slopes: dict = dataclasses.field(default_factory=dict)
    uncertainties: dict = dataclasses.field(default_factory=dict)
    times: Any = None
    growth: Any = None
    recovered: float = np.nan

    @property
    def where(self) -> float | None:
        """The time at which the gradient begins to go wrong, if that is known."""
        return self.findings[0].time if self.verdict != "trusted" else None

    @property
    def condition(self) -> float:
        return float(np.nanmax(self.growth, initial=0.0)) if self.growth is not None else np.nan

    def __str__(self) -> str:
        lines = [*self.numbers(), *map(sentence, self.findings)]
        if self.verdict == "trusted":
            error = f": it is {100 * self.error:.1g} % off" if np.isfinite(self.error) else ""
            lines.append(f"The gradient can be trusted{error}.")
        return "\n".join(lines)

    def numbers(self):
        """The sentences that hold numbers."""
        if self.verdict == "failed":
            return
        yield (
            f"The loss is {self.loss:.6g}; at a tolerance of {self.tight_tolerance:.1g} it is "
            f"{self.tight_loss:.6g}."
        )
        others = (
            f"{in_words(name)} {self.lengths[name]:.4g} (at an angle of {angle:.2g} degrees)"
            for name, angle in self.angles.items()
        )
        name, length = next(iter(self.lengths.items()))
        lengths = ", ".join([f"{in_words(name)} {length:.4g}", *others])
        yield f"The gradient of relative changes is of length {lengths}."
        slopes = (f"{in_words(name)} {slope:.6g}" for name, slope in self.slopes.items())
        yield f"Along one direction it is {', '.join(slopes)}."
        if not np.any(np.isfinite(self.growth)):
            return
        back = f"; a solve back from the end finds y0 to {self.recovered:.1g} of its size"
        at = self.times[int(np.nanargmax(self.growth))]
        yield (
            f"A relative change of the inputs grows at most {self.condition:.2g}-fold, at t = {at:.4g}"
            f"{back if np.isfinite(self.recovered) else ''}."
        )


def in_words(name: str) -> str:
    """By what a gradient or a slope is."""
    return {
        "tight": "by replay at tight tolerances",
        "solve": "by differences of the solve",
        "tight solve": "by differences at tight tolerances",
    }.get(name, f"by {name}")


def sentence(finding: Finding) -> str:
    return f"{finding.text}. {finding.remedy[0].upper()}{finding.remedy[1:]}."


def gradient_report(func: Callable, y0: PyTree, t, *args, loss: Callable | None = None, **options):
    """Whether the gradient of a solve can be believed, in words and numbers: a `GradientReport`, to be printed.

    The gradient of `loss` with respect to the floating-point numbers of func (of an equinox module, say), y0
    and args, by the `adjoint` of the options ("replay" by default), is compared with that by "backsolve", with
    central differences along one direction, and with the gradient by replay and such differences of a
    reference: the same solve at 1e-4 of its tolerances, in float64. Perturbations of the states say where in
    time they part. It takes about 30 solves, half of them at the tight tolerances, and four programs to
    compile; seven, if the solve is not in float64.

    Args:
        func, y0, t, args: those of `jaxode.solve`; values that are known, for one solve.
        loss: a function of the `Solution` whose result is a real number, such as
            `lambda solution: jnp.mean((solution.ys - data) ** 2)`; by default the sum of squares of `ys`.
        options: those of `solve`.

    Raises:
        TypeError: one of the values is traced: call it outside of `jit`, `grad` and `vmap`; the loss is no real
            number; or an option is given that says nothing about gradients, such as `log` or `save_steps`.
        ValueError: there is nothing to differentiate, fewer than two times, or what `solve` says.

    >>> import jax.numpy as jnp
    >>> from jaxode import gradient_report
    >>> decay = lambda y, t, rate: -rate * y
    >>> report = gradient_report(decay, 1.0, [0.0, 1.0], 0.5, loss=lambda solution: solution.ys[-1])
    >>> report.verdict, round(report.condition, 2)
    ('trusted', 1.0)
    >>> print(report)
    The loss is 0.6065...; at a tolerance of 3e-12 it is 0.6065...
    ...
    The gradient can be trusted: ...
    """
    # What explodes may become infinite, and what is not finite is told.
    with moving(), np.errstate(all="ignore"):
        case = prepared(func, y0, t, args, sum_of_squares if loss is None else loss, options)
        solves = case.solves
        value, solution = solves.programs.value(solves.numbers, solves.tolerances)
        if not succeeded(solution.status):
            status = Status(int(solution.status))
            text = f"The solve failed ({status.name.lower()}) at t = {solution.reached:g}. {status.message}"
            remedy = "see what jaxode.explain says of it"
            failed = Finding("failed", text.rstrip("."), remedy, float(solution.reached))
            return GradientReport("failed", (failed,), solution)
        evidence, gradient = collect(case, float(value), solution)
        return report_of(evidence, solution, gradient)


def report_of(e: Evidence, solution: Solution, gradient: PyTree) -> GradientReport:
    """What the evidence says."""
    verdict, findings = trust.found(e)
    compared = {e.adjoint: e.gradient, **e.gradients}
    if e.tight is not None:
        compared["tight"] = e.tight
    return GradientReport(
        verdict=verdict, findings=findings, solution=solution, gradient=gradient, loss=e.value,
        tight_loss=e.tight_value, tight_tolerance=e.tight_tolerance,
        lengths={name: float(np.linalg.norm(g)) for name, g in compared.items()},
        angles={name: angle(g, e.gradient) for name, g in compared.items() if name != e.adjoint},
        error=e.error(e.gradient) if e.has_reference else np.nan,
        slopes={
            **{name: e.slope(g) for name, g in compared.items()},
            "solve": e.difference.value, "tight solve": e.tight_difference.value,
        },
        uncertainties={"solve": e.difference.uncertainty, "tight solve": e.tight_difference.uncertainty},
        times=e.times, growth=e.growth, recovered=float(e.recovered[0]),
    )  # fmt: skip


def angle(a: np.ndarray, b: np.ndarray) -> float:
    """Between two vectors, in degrees; NaN if one is 0 or not finite.

    By the half-angle formula, which is accurate for small angles too (Kahan 2006).
    """
    if not (np.any(a) and np.any(b) and np.all(np.isfinite(a)) and np.all(np.isfinite(b))):
        return np.nan
    a, b = a / np.max(np.abs(a)), b / np.max(np.abs(b))
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return float(np.degrees(2 * np.arctan2(np.linalg.norm(a - b), np.linalg.norm(a + b))))


def sum_of_squares(solution: Solution):
    """Of all outputs that there are: rows after a terminal event are NaN."""
    finite = jax.tree.map(lambda y: jnp.where(jnp.isfinite(y), y, 0), solution.ys)
    return tree.dot(finite, jax.tree.map(jnp.conj, finite))


def prepared(func, y0, t, args, loss, options: dict) -> Case:
    """The problem, checked at the door."""
    for name in REFUSED:
        if name in options:
            raise TypeError(f"gradient_report takes no `{name}`: leave it out.")
    outside_of_transformations(func, y0, t, args, options.get("rtol"), options.get("atol"))
    if not callable(loss):
        raise TypeError(f"`loss` must be a function of the Solution; got {type(loss).__name__}.")
    func, y0 = arguments.present({}, func, t), arguments.as_state(y0)
    times, exact, func_time = arguments.as_times(t, y0)
    if len(flat(y0)) == 0:
        raise ValueError("There is nothing to differentiate: y0 has no numbers.")
    if len(times) < 2 or times[0] == times[-1]:
        raise ValueError(f"gradient_report needs times `t` from a first to a later one; got {t!r}.")
    method, _ = arguments.method_for(
        options.get("method", "tsit5"), options.get("linear"), y0, options.get("dt")
    )
    both = tolerances.of_leaves(options.get("rtol"), options.get("atol"), y0, method)
    full = lambda x: jax.tree.map(lambda x, y: np.array(np.broadcast_to(x, y.shape)), x, y0)
    name, adjoint = adjoint_of(options, method)
    trace, leaves = arguments.trace_of(func, y0, times, func_time, args)
    outside_of_transformations(leaves)
    driven = arguments.is_driven(trace, exact, func_time)
    numbers, rest = eqx.partition((func, y0, args), eqx.is_inexact_array_like)
    programs = programs_of(rest, t, checked(loss), options, driven)
    since = np.asarray(times, np.float64) if exact is None else exact - exact[0]
    solves = Solves(programs, numbers, tuple(map(full, both)))
    return Case(solves, options, method, name, adjoint, since)


def outside_of_transformations(*values) -> None:
    if not tree.known(values):
        raise TypeError(
            "gradient_report looks at values: call it outside of jit, grad and vmap, for one solve."
        )


def adjoint_of(options: dict, method: Method) -> tuple[str, Callable]:
    """The adjoint that is asked for, and its name."""
    adjoint = arguments.named_adjoint(options.get("adjoint", "replay"), method)
    name = next((name for name, known in named.items() if known is adjoint), "custom")
    if name in adjoints and not adjoints[name].reverse:
        raise ValueError(
            f"gradient_report takes gradients, and adjoint={name!r} is for forward mode: leave it out."
        )
    return name, adjoint


def programs_of(rest: PyTree, t, loss: Callable, options: dict, driven: bool) -> Programs:
    """The programs of the solve with these options; with a log, but for signals."""
    options = {"max_steps": MAX_STEPS, **options}
    for name in ("rtol", "atol", "adjoint"):
        options.pop(name, None)
    most = min(arguments.whole("max_steps", options["max_steps"]), MAX_STEPS)
    return Programs(rest, t, loss, options, {} if driven else {"log": most}, wide=False)


def checked(loss: Callable) -> Callable:
    """The loss; an error if it is no real number."""

    def value(solution: Solution):
        try:
            found = loss(solution)
        except (TypeError, AttributeError, IndexError) as error:
            error.add_note(
                "`loss` of gradient_report is given the Solution: loss=lambda solution: f(solution.ys)."
            )
            raise
        if jnp.shape(found) != () or not jnp.issubdtype(jnp.result_type(found), jnp.floating):
            raise TypeError(
                "`loss` must return one real number, such as jnp.sum(solution.ys ** 2); it returned "
                f"{jnp.result_type(found)}{list(jnp.shape(found))}."
            )
        return found

    return value
