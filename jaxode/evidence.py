"""What is measured of a gradient: the solves of a gradient report, and what they say of each other."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxode import arguments, diagnosis, tree
from jaxode.adjoints.names import named
from jaxode.findings import Facts
from jaxode.integrate import MAX_STEPS
from jaxode.methods.method import Method
from jaxode.perturbations import Slope, Solves, flat, on_host, unflat, widened
from jaxode.signals import Signal
from jaxode.solution import Solution, Status, succeeded
from jaxode.stiffness import fastest_mode
from jaxode.trust import UNEVEN, Evidence

PROBES = 13  # times at which states are compared
TIGHTER = (1e-4, 1e-2)  # of the tolerances, in the reference: the first with which it succeeds
TIGHT, FINEST = 1e-8, 1e-12  # its rtol is between these
WIDEST, NARROWEST = 2e-2, 1e-9  # relative changes of inputs in differences
SMALL = 1e-3  # of the largest of its array: a component that is less may be 0 but for errors
NONLINEAR = 0.03  # a relative change of a state that is not small
REMEDIES = (0.1, 0.01, 0.001)  # of the tolerances


class Case(NamedTuple):
    """What was asked: a problem with its programs, and what is known of its options."""

    solves: Solves
    options: dict  # as they were given
    method: Method
    name: str  # of the adjoint
    adjoint: Callable
    since: np.ndarray  # the times, as far apart as they are

    @property
    def y0(self) -> PyTree:
        return self.solves.numbers[1]

    @property
    def has_equal_steps(self) -> bool:
        return self.options.get("dt") is not None

    @property
    def rounding(self) -> float:
        return max(float(jnp.finfo(x.dtype).eps) for x in arrays(self.solves.numbers))

    @property
    def of_state(self) -> slice:
        """Where y0 is in a vector of all inputs."""
        begin = len(flat(self.solves.numbers[0]))
        return slice(begin, begin + len(flat(self.y0)))


class Path(NamedTuple):
    """The states of a solve at some times and a tangent of them, as vectors; how large each component becomes,
    and by what it is measured at each time: how large it has been until then; and the relative changes of the
    inputs that the tangent is of."""

    times: np.ndarray
    ys: np.ndarray
    tangents: np.ndarray
    largest: np.ndarray
    units: np.ndarray
    scale: np.ndarray
    direction: np.ndarray

    @property
    def move(self) -> np.ndarray:
        return self.scale * self.direction

    def growth(self, moved: np.ndarray) -> np.ndarray:
        """How large the relative change of the state is, for relative changes of the inputs up to 1."""
        return mean_size(moved / self.units)


class Reference(NamedTuple):
    """The same problem at tight tolerances, and its solution."""

    solves: Solves
    accuracy: float
    value: float
    solution: Solution


def mean_size(x: np.ndarray) -> np.ndarray:
    """Root mean squares along the last axis."""
    return np.sqrt(np.mean(np.square(x), -1))


def arrays(x: PyTree) -> list:
    return [leaf for leaf in jax.tree.leaves(x) if hasattr(leaf, "dtype")]


def collect(case: Case, value: float, solution: Solution) -> tuple[Evidence, PyTree]:
    """All that is measured of the gradient of a solve that succeeded; and the gradient itself."""
    path = path_of(case, solution)
    gradients, gradient, unit = gradients_of(case, path.scale)
    reference, failure = reference_of(case, path)
    accuracy = accuracy_of(case.solves.tolerances, case.y0, path.largest)
    compared = compared_with(case, reference, path)
    tolerance = noise = float(np.median(accuracy))
    if case.has_equal_steps:  # which are as accurate as they are, and without noise
        apart = abs(value - compared["tight_value"]) / max(unit, np.finfo(float).tiny)
        noise = case.rounding
        tolerance = float(np.fmax(noise, apart))
    width = width_of(noise, np.nanmax(compared["growth"], initial=0.0))
    evidence = Evidence(
        adjoint=case.name, gradients=gradients, leaves=leaves_of(case), direction=path.direction,
        unit=unit, tolerance=tolerance, value=value, difference=case.solves.slope(path.move, width),
        times=path.times, of_steps=path.growth(path.tangents), recovered=recovered(case, path, solution),
        components=components_of(case.y0), accuracy=accuracy, facts=facts_of(case, solution),
        dt=case.options.get("dt"), failure=failure, **compared,
    )  # fmt: skip
    if not evidence.is_right:
        evidence = doubted(evidence, case, path, reference)
    return evidence, gradient


# The solve itself.


def path_of(case: Case, solution: Solution) -> Path:
    """The states at some times, and how they move with the inputs."""
    end = case.since[-1]
    if solution.status == Status.EVENT.value:
        end = float(solution.reached)
    times = np.linspace(case.since[0], end, PROBES)
    if end != case.since[-1]:
        times = np.append(times, case.since[-1])  # that the steps are the same
    still = np.zeros(len(flat(case.solves.numbers)))
    ys, _ = case.solves.states(still, still, times)
    largest = np.fmax.accumulate(np.abs(ys))
    first = np.where(largest[0] > 0, largest[0], largest[-1])
    sizes = np.fmax(largest, np.where(first > 0, first, 1.0))
    scale = sizes_of_inputs(case, sizes[0])
    direction = direction_of(case.solves.numbers)
    _, tangents = case.solves.states(still, scale * direction, times)
    of_arrays = [np.full(y.shape, np.max(y)) for y in split(sizes[-1], case.y0)]
    units = np.fmax(sizes, SMALL * np.concatenate(of_arrays))
    return Path(times, ys, tangents, sizes[-1], units, scale, direction)


def sizes_of_inputs(case: Case, of_y0: np.ndarray) -> np.ndarray:
    """How large each input is: a number itself; of a 0 in y0 what its component becomes; of another 0 a middle
    value of its array, or 1."""

    def of_array(x):
        x = np.abs(flat(x))
        return np.where(x > 0, x, np.median(x[x > 0]) if np.any(x > 0) else 1.0)

    func, _, args = (list(map(of_array, jax.tree.leaves(x))) for x in case.solves.numbers)
    return np.concatenate([*func, of_y0, *args])


def gradients_of(case: Case, scale: np.ndarray) -> tuple[dict, PyTree, float]:
    """x dL/dx by all adjoints that there are for this solve; the gradient that was asked for; its unit."""
    asked = {case.name: case.adjoint, "replay": named["replay"]}
    if has_backsolve(case):
        asked["backsolve"] = named["backsolve"]
    found = {name: gradient_by(case.solves, adjoint) for name, adjoint in asked.items()}
    gradient, unit = found[case.name]
    return {name: scale * vector(g) for name, (g, _) in found.items()}, gradient, float(unit)


def gradient_by(solves: Solves, adjoint) -> tuple[PyTree, float]:
    return solves.programs.gradient(adjoint)(solves.numbers, solves.tolerances)


def vector(gradient: PyTree) -> np.ndarray:
    """A gradient as the vector whose product with a change of the inputs is that of the loss: JAX's gradient
    with respect to a complex number is the conjugate of that."""
    return flat(jax.tree.map(np.conj, gradient))


def has_backsolve(case: Case) -> bool:
    """Whether backsolve can differentiate the solve."""
    if case.options.get("dense") or case.options.get("fold") is not None:
        return False
    try:
        case.method.backwards()
    except ValueError:
        return False
    return True


def recovered(case: Case, path: Path, solution: Solution) -> np.ndarray:
    """How far a solve back from the end is from the states at all times, in their sizes; NaN with events, which
    have no way back."""
    if solution.events is not None:
        return np.full(len(path.times), np.nan)
    y1 = np.zeros(len(path.scale))
    y1[case.of_state] = path.ys[-1] - path.ys[0]
    ys, _ = case.solves.states(y1, 0 * y1, path.times[::-1])
    apart = mean_size((ys[::-1] - path.ys) / path.units)
    return np.where(np.isfinite(apart), apart, np.inf)


def facts_of(case: Case, solution: Solution) -> Facts | None:
    """What the log of a solve says, if it has one."""
    if solution.log is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they have been said
        return diagnosis.facts_of(solution, case.y0, False, case.options)


def split(vector: np.ndarray, like: PyTree) -> list[np.ndarray]:
    """The parts of a vector that are of the arrays of a pytree."""
    return np.split(vector, np.cumsum([len(flat(x)) for x in jax.tree.leaves(like)])[:-1])


def direction_of(numbers: PyTree) -> np.ndarray:
    """Something of every input, no two alike; but knots of a signal that are equal stay equal, as they would
    be out of order otherwise."""
    signals, direction = lambda x: isinstance(x, Signal), np.cos(np.arange(len(flat(numbers))))

    def together(new, old):
        if not signals(new) or new.ts is None:
            return new
        places = np.searchsorted(old.ts, old.ts)
        return eqx.tree_at(lambda signal: signal.ts, new, new.ts[places])

    moves = unflat(direction, widened(numbers))
    return flat(jax.tree.map(together, moves, numbers, is_leaf=signals))


def leaves_of(case: Case) -> tuple[tuple[str, slice], ...]:
    """The name of every array of the inputs, and where its numbers are in a vector."""
    found, begin = [], 0
    for root, part in zip(("func", "y0", "args"), case.solves.numbers):
        for path, leaf in jax.tree_util.tree_leaves_with_path(part):
            end = begin + len(flat(leaf))
            found.append((root + jax.tree_util.keystr(path), slice(begin, end)))
            begin = end
    return tuple(found)


def components_of(y0: PyTree) -> tuple[str, ...]:
    """The names of the components of a state, in the order of its vector."""
    names, found = list(tree.names_of(y0)), []
    for leaf in jax.tree.leaves(y0):
        of, names = names[: leaf.size], names[leaf.size :]
        found += [*of, *of] if np.iscomplexobj(leaf) else of
    return tuple(found)


def accuracy_of(tolerances: tuple, y0: PyTree, sizes: np.ndarray) -> np.ndarray:
    """The relative error that is tolerated of each component, at its largest."""
    both = lambda x, y: x * (1 + 1j) if np.iscomplexobj(y) else x
    rtol, atol = (flat(jax.tree.map(both, x, y0)) for x in tolerances)
    return np.fmin(rtol + atol / sizes, 1.0)


# The reference.


def reference_of(case: Case, path: Path) -> tuple[Reference | None, str]:
    """The solve at tight tolerances, or why there is none."""
    failure = ""
    for make in (wide_solves, same_solves):
        solves = make(case)
        if solves is None:
            continue
        try:
            reference = at_tight_tolerances(case, solves, path)
        except (TypeError, ValueError) as error:  # func, or the loss, is not for float64
            failure = f"in float64 it is an error ({str(error).splitlines()[0]})"
            continue
        if succeeded(reference.solution.status):
            return reference, ""
        status = Status(int(reference.solution.status))
        failure = f"it failed ({status.name.lower()}) at t = {reference.solution.reached:g}"
    return None, failure


def wide_solves(case: Case) -> Solves | None:
    """The reference in float64, if the solve is not."""
    solves, programs = case.solves, case.solves.programs
    if all(jnp.finfo(x.dtype).bits == 64 for x in arrays(solves.numbers)):
        return None
    t = programs.t
    if hasattr(t, "dtype") and jnp.issubdtype(t.dtype, jnp.floating):
        t = np.asarray(t, np.float64)
    wide = dataclasses.replace(
        programs, t=t, options=reference_options(case), wide=True, gradients={}
    )
    return Solves(wide, widened(solves.numbers), widened(solves.tolerances))


def same_solves(case: Case) -> Solves:
    """The reference in the dtypes of the solve: by the same programs, if its options allow it."""
    programs, options = case.solves.programs, reference_options(case)
    same = options.keys() == programs.options.keys()
    if same and all(options[name] is x for name, x in programs.options.items()):
        return case.solves
    return case.solves._replace(
        programs=dataclasses.replace(programs, options=options, gradients={})
    )


def reference_options(case: Case) -> dict:
    """The options of the reference: steps that adapt, and are as many as it takes."""
    options = dict(case.solves.programs.options)
    for name in ("dt", "max_evaluations", "mxstep"):
        options.pop(name, None)
    if options["max_steps"] < MAX_STEPS:
        options["max_steps"] = MAX_STEPS
    if case.method.error_order is None:
        options["method"] = "rodas5p" if case.method.implicit else "tsit5"
    return options


def at_tight_tolerances(case: Case, solves: Solves, path: Path) -> Reference:
    """The reference at the first of some tolerances with which it succeeds."""
    sizes = unflat(path.largest, case.y0)
    for factor in TIGHTER:
        finer = tight_tolerances(solves.tolerances, factor)
        for tight in (of_sizes(*finer, sizes), finer):
            here = solves._replace(tolerances=tight)
            value, solution = here.programs.value(here.numbers, tight)
            accuracy = np.median(accuracy_of(tight, case.y0, path.largest))
            reference = Reference(here, float(accuracy), float(value), solution)
            if succeeded(solution.status):
                return reference
    return reference


def tight_tolerances(tolerances: tuple, factor: float) -> tuple[PyTree, PyTree]:
    """rtol and atol, smaller by a factor."""
    rtol, atol = tolerances
    finer = lambda rtol: np.clip(rtol * factor, FINEST, TIGHT).astype(rtol.dtype)
    return jax.tree.map(finer, rtol), times(factor, atol)


def times(factor: float, x: PyTree) -> PyTree:
    return jax.tree.map(lambda x: (factor * x).astype(x.dtype), x)


def of_sizes(rtol: PyTree, atol: PyTree, sizes: PyTree) -> tuple[PyTree, PyTree]:
    """The same, but atol is not above rtol times the size of a component, so that none is lost below it; nor
    is it below roundings of the largest one of its array."""

    def leaf(rtol, atol, size):
        size = np.abs(size).astype(atol.dtype)
        least = 4 * np.finfo(atol.dtype).eps * np.max(size, initial=0.0)
        return np.where(size > 0, np.fmin(atol, np.fmax(rtol * size, least)), atol).astype(
            atol.dtype
        )

    return rtol, jax.tree.map(leaf, rtol, atol, sizes)


def compared_with(case: Case, reference: Reference | None, path: Path) -> dict:
    """What the reference says: its gradient, and how the solve moves with its inputs."""
    nothing, unknown = np.zeros(len(path.times)), Slope(np.nan, np.nan)
    if reference is None:
        growth = path.growth(path.tangents)
        return dict(
            tight=None, tight_value=np.nan, tight_tolerance=np.nan, tight_difference=unknown, growth=growth,
            of_tight_steps=growth, departure=nothing, tight_departure=nothing, tight_facts=None,
        )  # fmt: skip
    solves, still = reference.solves, np.zeros(len(path.scale))
    h = float(np.sqrt(reference.accuracy))
    _, tangents = solves.states(still, path.move, path.times)
    ends = [solves.states(sign * h * path.move, 0 * path.move, path.times)[0] for sign in (1, -1)]
    moved = (ends[0] - ends[1]) / (2 * h)
    by_differences, by_steps = path.growth(moved), path.growth(tangents)
    nonlinear = np.logical_or.accumulate(h * by_differences > NONLINEAR)
    growth = np.where(nonlinear, np.fmax(by_differences, by_steps), by_differences)
    least = np.fmax(by_differences, 0.01)
    apart = lambda of: np.where(nonlinear, 0.0, path.growth(of - moved) / least)
    width = width_of(reference.accuracy, np.nanmax(growth, initial=0.0))
    gradient, _ = gradient_by(solves, named["replay"])
    return dict(
        tight=path.scale * vector(gradient), tight_value=reference.value, tight_tolerance=reference.accuracy,
        tight_difference=solves.slope(path.move, width), growth=growth, of_tight_steps=by_steps,
        departure=apart(path.tangents), tight_departure=apart(tangents),
        tight_facts=facts_of(case, reference.solution),
    )  # fmt: skip


def width_of(noise: float, growth: float) -> float:
    """The relative change of inputs for central differences: errors are about noise / width, and the square of
    how far the states move."""
    return float(np.clip((noise / max(growth, 1.0) ** 2) ** (1 / 3), NARROWEST, WIDEST))


# Where there is doubt.


def doubted(e: Evidence, case: Case, path: Path, reference: Reference | None) -> Evidence:
    """The evidence with what is looked at of a gradient that is not right."""
    rule = 0.0
    if reference is not None and not e.has_reference:
        rule = wrong_derivative(reference, path, case.of_state)
    remedied = errors_of_remedies(e, case, path) if e.has_reference else {}
    return dataclasses.replace(
        e, stability=stability_of(e, case, path), rule=rule, remedied=remedied
    )


def stability_of(e: Evidence, case: Case, path: Path) -> tuple[float, ...]:
    """The size of steps over that at which they become unstable, at all times; () if that is not known."""
    limit = diagnosis.stability_limit(case.method)
    if limit is None or (e.facts is None and e.dt is None):
        return ()
    forward = 1 if path.times[-1] > path.times[0] else -1
    rest = case.solves.programs.rest

    def mode(numbers, y, t):
        func, _, args = eqx.combine(numbers, rest)
        slope = lambda y: arguments.like_state(func(y, t, *args), y)
        return fastest_mode(lambda y: times(forward, slope(y)), y)

    program, found = on_host(mode, False), []
    for time, y in zip(path.times, path.ys):
        rate, decays = program(case.solves.numbers, unflat(y, case.y0), case.solves.time(time))
        size = e.dt if e.facts is None or e.dt is not None else diagnosis.size_at(e.facts, time)
        found.append(float(size * rate / limit) if decays else 0.0)
    return tuple(found)


def wrong_derivative(reference: Reference, path: Path, of_state: slice) -> float:
    """How far the derivatives that func has are from differences of its values: a median over all times."""
    solves, h = reference.solves, np.sqrt(reference.accuracy)
    rest = solves.programs.rest

    def derivative(numbers, move, t):
        def slope(numbers):
            func, y, args = eqx.combine(numbers, rest)
            return func(y, t, *args)

        return jax.jvp(slope, (numbers,), (move,))

    program, found = on_host(derivative, solves.programs.wide), []
    for time, y, size in zip(path.times, path.ys, path.units):
        here, move = flat(solves.numbers), path.move.copy()
        here[of_state] = y
        move[of_state] = size * path.direction[of_state]
        given = unflat(move, solves.numbers), solves.time(time)
        at = lambda x, given=given: program(unflat(x, solves.numbers), *given)
        exact = flat(at(here)[1])
        k1, k0 = (flat(at(here + sign * h * move)[0]) for sign in (1, -1))
        by_differences = (k1 - k0) / (2 * h)
        size = max(np.linalg.norm(exact), np.linalg.norm(by_differences), np.finfo(float).tiny)
        found.append(np.linalg.norm(exact - by_differences) / size)
    return float(np.median(found))


def errors_of_remedies(e: Evidence, case: Case, path: Path) -> dict:
    """The errors of the gradient at other tolerances, up to one that is small."""
    if case.has_equal_steps:
        return {}
    rtol, atol = case.solves.tolerances
    tried = {}
    if np.max(e.accuracy) > UNEVEN * np.min(e.accuracy):
        tried["scaled"] = of_sizes(rtol, atol, unflat(path.largest, case.y0))
    tried |= {factor: (times(factor, rtol), times(factor, atol)) for factor in REMEDIES}
    errors = {}
    for name, tolerances in tried.items():
        g, _ = gradient_by(case.solves._replace(tolerances=tolerances), case.adjoint)
        errors[name] = e.error(path.scale * vector(g))
    return errors
