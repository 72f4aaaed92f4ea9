"""Hypersolvers: a learnt correction makes a cheap method more accurate (Poli et al. 2020, arXiv 2007.09601).

Networks learn what a step of Euler's and of Heun's method leaves, for predators and prey, whose field is known,
and for the samples of a continuous normalizing flow; with what that is worth where nothing was learnt.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxode import odeint, solve
from jaxode.experiments import flow
from jaxode.experiments.experiment import Options, Results, aligned, fitted, option, save
from jaxode.methods import Hypersolver, named
from jaxode.nn import ConcatSquash, ContinuousFlow, MLPCorrection, Normal, residuals
from jaxode.nn.corrections import Residuals

NAMES = {"euler": "Euler", "heun": "Heun", "rk4": "RK4"}
STEPS = 1024  # the most of a solve
MULTIPLES = (1, 2, 4, 8)  # of the fewest evaluations
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)  # of the adaptive method
EXACT = 1e-9
LOST = 100.0  # a distance from solutions that stay within ten


@dataclasses.dataclass(frozen=True)
class Settings(Options):
    """How long, and how wide."""

    steps: int = option(
        10_000, "Steps of the fit of each correction.", quick=300, full=50_000, low=1
    )
    flow_steps: int = option(1500, "Steps of the flow's fit.", quick=20, full=10_000, low=1)
    bases: str = option(
        "euler,heun", "Methods that are corrected.", quick="heun", words=("euler", "heun")
    )
    method: str = option(
        "tsit5",
        "Of the solver that the flow is trained with.",
        quick="bosh3",
        choices=("bosh3", "tsit5"),
    )
    cloud: str = option("pinwheel", "What the flow samples.", choices=tuple(flow.CLOUDS))
    states: int = option(
        2000, "Initial states to learn from, and to be measured with.", quick=200, low=2
    )
    batch: int = option(512, "Steps of a method in a step of a fit.", quick=256, low=8)
    width: int = option(64, "Of the flow's field, which has two layers.", quick=16, low=1)
    hidden: int = option(32, "Width of a correction, which has two layers.", quick=16, low=1)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A field, where its solutions start and end, and the steps that corrections learn from."""

    name: str
    field: Callable
    start: Callable  # (key, number) -> states
    elsewhere: Callable  # the same, of states that nothing is learnt from
    time: bool  # whether the field depends on it
    end: float
    later: float  # than what is learnt from
    grid: int  # the smallest steps to the end
    strides: tuple[int, ...]  # steps, in smallest steps
    usual: float  # a size of steps
    fewest: int  # evaluations
    drawn: int = 0  # evaluations with which the ends are drawn

    @property
    def sizes(self) -> list[float]:
        """Of the steps."""
        return [stride * self.end / self.grid for stride in self.strides]

    def learnt(self, h: float) -> bool:
        """Whether steps of this size are among them."""
        return any(abs(h / size - 1) < 1e-6 for size in self.sizes)


def lotka_volterra(y, t):
    """Prey and predators, in units of their own (Lotka 1925, Volterra 1926); they turn around (1, 1/2)."""
    prey, predators = y[..., 0], y[..., 1]
    return jnp.stack([prey * (2 - 4 * predators) / 3, predators * (prey - 1)], -1)


def box(low, high):
    """States that are uniform between two corners."""
    return lambda key, n: jax.random.uniform(
        key, (n, 2), minval=jnp.array(low), maxval=jnp.array(high)
    )


def problems(settings, folder, progress) -> list[Problem]:
    """The two, one of which is trained first."""
    animals = Problem(
        "Lotka-Volterra", lotka_volterra, box([0.5, 0.25], [1.5, 1.0]), box([1.5, 0.25], [2.0, 1.0]),
        time=False, end=8.0, later=40.0, grid=160, strides=(1, 2, 4, 8, 16), usual=0.2, fewest=20,
    )  # fmt: skip
    samples = Problem(
        f"flow, {settings.cloud}", trained_flow(settings, folder, progress).field, Normal(2).sample,
        Normal(2, 2.0).sample, time=True, end=1.0, later=1.5, grid=8, strides=(1, 2, 4, 8), usual=0.25,
        fewest=1, drawn=2,
    )  # fmt: skip
    return [animals, samples]


def trained_flow(settings, folder, progress):
    """A continuous normalizing flow, fitted to points of the plane by likelihood."""
    field = ConcatSquash(2, width=settings.width, depth=2, key=jax.random.key(settings.seed))
    solver: dict = dict(method=settings.method, rtol=1e-3, atol=1e-3, max_steps=1024)
    model = ContinuousFlow(field, Normal(2), **solver)
    cloud = flow.CLOUDS[settings.cloud]
    model, _ = fitted(
        model, flow.likelihood_loss, lambda step: cloud(jax.random.key(step), settings.batch),
        settings.flow_steps, rate=5e-3, folder=folder / "flow", label="flow",
        **flow.common(settings, progress),
    )  # fmt: skip
    return model


# What corrections learn.


def wide(tree):
    """In float64: rounding would show in accurate solutions, and in residuals of short steps."""
    return jax.tree.map(lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x, tree)


@eqx.filter_jit
def accurate(field, y0, ts, tolerance):
    """The solution by an adaptive method, all states as one, and its evaluations."""
    solution = solve(field, y0, ts, rtol=tolerance, atol=tolerance)
    return solution.ys, solution.stats.evaluations


@eqx.filter_jit
def in_steps(method, field, y0, ts, dt):
    """The end of a solution in steps of equal size; NaN if there is none."""
    return odeint(field, y0, ts, method=method, dt=dt, max_steps=STEPS)[-1]


def times(problem: Problem, first=0.0, last=None):
    """Those of accurate solutions: always as many, for one program."""
    return np.linspace(first, problem.end if last is None else last, problem.grid + 1)


def exactly(problem: Problem, y0, *ends):
    """The solution at these times, to many digits."""
    return accurate(problem.field, y0, times(problem, *ends), jnp.asarray(EXACT))[0]


def lessons(problem: Problem, base: str, ys):
    """Residuals of the method, for each size of steps: from every time of the grid that leaves room for one."""
    ts, ys, strides = times(problem), np.asarray(ys), problem.strides

    @jax.jit
    @jax.vmap
    def found(ys, ts):
        return jax.tree.map(lambda x: x[0], residuals(problem.field, ys, ts, method=base))

    pairs = lambda x: np.concatenate([np.stack([x[:-n], x[n:]], 1) for n in strides])
    rows = found(pairs(ys), pairs(ts))
    of_each = lambda x: np.broadcast_to(x[:, None, None], (*rows.y.shape[:2], 1))
    rows = rows._replace(t=of_each(rows.t), h=of_each(rows.h))
    ends = np.cumsum([len(ts) - n for n in strides])[:-1]
    split = [np.split(np.asarray(x, np.float32), ends) for x in rows]
    return [Residuals(*(x.reshape(-1, x.shape[-1]) for x in part)) for part in zip(*split)]


def share_loss(size):
    """The mean square of what a correction leaves of residuals, as a share of their `size`."""

    def loss(correction, batch, key):
        left = batch.residual - correction(batch.y, batch.t, batch.h, batch.slope)
        return jnp.mean(left**2) / size, {}

    return loss


@jax.enable_x64(False)
def corrected(problem: Problem, base: str, rows, settings, folder, progress):
    """The method with a correction that was fitted to residuals, and the share of them that is left."""
    size = float(np.mean([np.mean(r.residual**2) for r in rows]))

    def batches(step):
        rng = np.random.default_rng([settings.seed, step])
        count = settings.batch // len(rows)
        at = [rng.integers(0, len(r.y), count) for r in rows]
        return jax.tree.map(lambda *x: np.concatenate([x[i] for x, i in zip(x, at)]), *rows)

    correction = MLPCorrection(
        2, width=settings.hidden, time=problem.time, key=jax.random.key(settings.seed)
    )
    name = f"{problem.name.split(',')[0]}-{base}".lower()
    correction, history = fitted(
        correction, share_loss(size), batches, settings.steps, seed=settings.seed, rate=1e-2, last=1e-3,
        folder=folder / name, label=name, progress=progress, parts=5,
    )  # fmt: skip
    last = [record["loss"] for record in history[-max(1, len(history) // 10) :]]
    return Hypersolver(base, correction), float(np.mean(last)) ** 0.5


# What they are worth.


def distance(found, exact) -> float:
    """The root mean square of the distance of states."""
    return float(jnp.sqrt(jnp.mean(jnp.sum((found - exact) ** 2, -1))))


def cost_of(method) -> int:
    """Evaluations in a step: the slope at its end is the first of the next one."""
    return named(method).step_evaluations or 0


def products(function, *args) -> float:
    """Multiplications with additions for each state: half of the operations that XLA counts, without tanh."""
    cost: Any = jax.jit(function).lower(*args).cost_analysis()
    return cost["flops"] / 2 / len(args[0])


def costs(problem: Problem, method, states) -> tuple[float, float]:
    """Products of an evaluation of the field, and of a correction if the method has one."""
    of_field = products(lambda y: problem.field(y, 0.5), states)
    if not isinstance(method, Hypersolver):
        return of_field, 0.0
    return of_field, products(lambda y: method.correction(y, 0.5, 0.1, y), states)


def against_evaluations(problem: Problem, methods: dict, states, exact) -> list[dict]:
    """The error at the end for each method and number of evaluations."""
    ts, y0, found = np.array([0.0, problem.end]), states, []
    for name, method in methods.items():
        of_field, extra = costs(problem, method, y0)
        for multiple in MULTIPLES:
            evaluations = multiple * problem.fewest
            steps = evaluations // cost_of(method)
            if steps:
                h = problem.end / steps
                end = in_steps(method, problem.field, y0, ts, jnp.asarray(h))
                found.append({
                    "method": name, "evaluations": evaluations, "error": distance(end, exact), "h": h,
                    "products": evaluations * of_field + steps * extra,
                })  # fmt: skip
    return found


def adaptive(problem: Problem, states, exact) -> list[dict]:
    """The same for tsit5, at some tolerances."""
    (of_field, _), found = costs(problem, "tsit5", states), []
    for tolerance in TOLERANCES:
        given = problem.field, states, times(problem), jnp.asarray(tolerance)
        ys, evaluations = accurate(*given)
        count = int(evaluations)
        found.append({
            "method": "tsit5", "evaluations": count, "error": distance(ys[-1], exact),
            "products": count * of_field,
        })  # fmt: skip
    return found


def elsewhere(problem: Problem, base: str, method, states, other, exact) -> dict:
    """The error with the correction over that without it, as it was learnt, and in what way it was not."""
    end, usual = problem.end, problem.usual
    cases = {
        "as learnt": (states, (0.0, end), usual),
        "h between": (states, (0.0, end), 1.5 * usual),
        "h shorter": (states, (0.0, end), problem.sizes[0] / 2),
        "h longer": (states, (0.0, end), problem.sizes[-1] * 2),
        "time longer": (states, (0.0, problem.later), usual),
        "other states": (other, (0.0, end), usual),
        "backwards": (exact, (end, 0.0), usual),
    }
    found = {}
    for name, (y0, ends, h) in cases.items():
        if h > abs(ends[1] - ends[0]):
            continue
        truth = exactly(problem, y0, *ends)[-1]
        given = problem.field, y0, np.array(ends), jnp.asarray(h)
        left, whole = (distance(in_steps(m, *given), truth) for m in (method, base))
        found[name] = {"with": left, "without": whole}
    return found


@dataclasses.dataclass(frozen=True)
class Findings:
    """Of one problem."""

    errors: list[dict]
    elsewhere: dict[str, dict]  # of each base
    shares: dict[str, float]
    price: float  # of a correction, in evaluations of the field
    shown: dict[str, np.ndarray]  # states at the end

    def error(self, method: str, evaluations: int) -> float:
        """NaN if the method was not tried with so many."""
        rows = [r for r in self.errors if (r["method"], r["evaluations"]) == (method, evaluations)]
        return rows[0]["error"] if rows else float("nan")


@jax.enable_x64(True)
def studied(problem: Problem, settings, folder, progress) -> Findings:
    """Corrections are learnt from some states, and measured with others."""
    field, keys = problem.field, jax.random.split(jax.random.key(settings.seed + 1), 3)
    problem = dataclasses.replace(problem, field=wide(field))
    draw = lambda how, key: wide(how(key, settings.states))
    lesson, states = (draw(problem.start, key) for key in keys[:2])
    ys, exact = exactly(problem, lesson), exactly(problem, states)[-1]
    methods: dict[str, Any] = {NAMES[base]: base for base in settings.listed("bases")}
    shares, gains = {}, {}
    bases = settings.listed("bases")
    for base in bases:
        rows = lessons(problem, base, ys)
        method, shares[base] = corrected(problem, base, rows, settings, folder, progress)
        methods[f"Hyper-{NAMES[base]}"] = method = wide(method)
        other = draw(problem.elsewhere, keys[2])
        gains[base] = elsewhere(problem, base, method, states, other, exact)
    methods["RK4"] = "rk4"
    errors = against_evaluations(problem, methods, states, exact)
    errors += adaptive(problem, states, exact)
    of_field, of_correction = costs(problem, methods[f"Hyper-{NAMES[bases[0]]}"], states)
    shown = ends_of(problem, methods, states, exact)
    return Findings(errors, gains, shares, of_correction / of_field, shown)


def ends_of(problem: Problem, methods: dict, states, exact) -> dict[str, np.ndarray]:
    """Where few evaluations lead, by each method that can do with them; and the exact ends."""
    ts, shown = np.array([0.0, problem.end]), {"exact": np.asarray(exact)}
    for name, method in methods.items():
        if steps := problem.drawn // cost_of(method):
            dt = jnp.asarray(problem.end / steps)
            shown[name] = np.asarray(in_steps(method, problem.field, states, ts, dt))
    return shown


def rows_of(problem: Problem, found: Findings) -> list[dict]:
    """Lines of the table: a method, and its error at so many evaluations."""
    rows = []
    for method in dict.fromkeys(r["method"] for r in found.errors if r["method"] != "tsit5"):
        mine = [r for r in found.errors if r["method"] == method]
        row = {"problem": problem.name, "method": method}
        for multiple in MULTIPLES:
            error = found.error(method, multiple * problem.fewest)
            row[f"{multiple} E"] = "" if np.isnan(error) else f"{error:.2g}"
        row["MACs at 8 E"] = f"{mine[-1]['products']:,.0f}"
        rows.append(row)
    return rows


def gains_of(problem: Problem, found: Findings) -> list[dict]:
    """Lines of the other table: what is left of an error, in per cent."""
    return [
        {
            "left of the error": f"{problem.name}, {NAMES[base]}",
            **{
                name: left_of(pair["with"], pair["without"], NAMES[base])
                for name, pair in cases.items()
            },
        }
        for base, cases in found.elsewhere.items()
    ]


def left_of(error: float, whole: float, base: str) -> str:
    """An error in per cent of that of the method, if neither of the two is far from every solution.

    >>> left_of(1.0, 80.0, "Euler"), left_of(1.0, 3.0, "Euler"), left_of(1.0, float("nan"), "Euler")
    ('1.2 %', '33 %', 'Euler fails')
    """
    if not (error < LOST and whole < LOST):
        return "fails" if not error < LOST else f"{base} fails"
    return f"{100 * error / whole:.{1 if error < 0.1 * whole else 0}f} %"


def is_better(problem: Problem, found: Findings, base: str) -> bool:
    """Whether a correction lowers the error at every number of evaluations with steps of a size learnt."""
    rows = [r for r in found.errors if r["method"] == NAMES[base] and problem.learnt(r["h"])]
    return all(
        found.error(f"Hyper-{NAMES[base]}", r["evaluations"]) < r["error"] for r in rows
    ) and bool(rows)


def run(settings: Settings, folder: Path, progress: bool) -> Results:
    """Both problems, the tables and the figure."""
    both = problems(settings, folder, progress)
    found = {p.name: studied(p, settings, folder, progress) for p in both}
    animals, samples = both
    rows = [row for p in both for row in rows_of(p, found[p.name])]
    gains = [row for p in both for row in gains_of(p, found[p.name])]
    names = list(gains[0])
    gains = [{name: row.get(name, "") for name in names} for row in gains]
    claims = {
        f"{p.name}: at equal evaluations a correction lowers the error of {NAMES[base]}'s method": is_better(
            p, found[p.name], base
        )
        for p in both
        for base in settings.listed("bases")
    }
    long = settings.steps >= 5000 and settings.flow_steps >= 1000
    if long and len(set(settings.listed("bases"))) == 2:
        claims |= of_trained(samples, found[samples.name])
    notes = (
        "Root mean square distance from the exact states at the end, of states not learnt from, with\n"
        f"E = {animals.fewest} evaluations of the field of {animals.name} (t = {animals.end:g}) and E = "
        f"{samples.fewest} of that of the flow (t = {samples.end:g}).\n"
        "A correction is no evaluation; MACs, multiplications with additions for a state at 8 E, count it: it\n"
        f"costs {found[animals.name].price:.0f} evaluations of the field of {animals.name}, and "
        f"{found[samples.name].price:.3f} of that of the flow.\n\n" + aligned(gains)
    )
    save(figure(both, found), folder / "hyper.png")
    more = {
        p.name: {
            "errors": found[p.name].errors,
            "elsewhere": found[p.name].elsewhere,
            "shares of residuals left": found[p.name].shares,
            "price of a correction": found[p.name].price,
        }
        for p in both
    }
    return Results(rows, claims, notes, more)


def of_trained(samples: Problem, found: Findings) -> dict[str, bool]:
    """Claims of a flow, and of corrections, that were trained for long."""
    return {
        "Samples: Hyper-Euler with 1 evaluation is nearer than Heun with 2": found.error("Hyper-Euler", 1)
        < found.error("Heun", 2),
        "and Hyper-Heun with 2 than Heun with 4": found.error("Hyper-Heun", 2) < found.error("Heun", 4),
        "A correction costs less than half an evaluation of the flow's field": found.price < 0.5,
    }  # fmt: skip


# The figure.


def figure(both, found):
    """Error against evaluations of both problems, and against MACs; samples with two evaluations."""
    plt_figure, axes = plt.subplots(2, 3, figsize=(15, 9))
    panels = [
        *((axes[0, i], p, "evaluations") for i, p in enumerate(both)),
        (axes[0, 2], both[1], "products"),
    ]
    for axis, problem, against in panels:
        for i, (name, rows) in enumerate(of_methods(found[problem.name].errors).items()):
            style: dict = dict(color="black", lw=1, ls="--", marker=".") if name == "tsit5" else {}
            style = style or dict(color=f"C{i % 7}", marker="o" if "Hyper" in name else "s")
            axis.loglog([r[against] for r in rows], [r["error"] for r in rows], label=name, **style)
        label = "MACs for a sample"
        if against == "evaluations":
            most = max(r["evaluations"] for r in found[problem.name].errors)
            label = "evaluations of the field"
            ticks = [problem.fewest * 2**i for i in range(9) if problem.fewest * 2**i <= most]
            axis.set_xticks(ticks, list(map(str, ticks)))
            axis.minorticks_off()
        axis.set(xlabel=label, ylabel="error at the end (RMS)", title=problem.name)
    axes[0, 2].legend(fontsize=11, loc="lower left")
    shown = found[both[1].name].shown
    picked = [
        name for name in ("exact", "Heun", "Hyper-Heun", "Euler", "Hyper-Euler") if name in shown
    ][:3]
    for axis, name in zip(axes[1], picked):
        axis.plot(*shown[name].T, ".", ms=2)
        axis.set(xlim=(-4, 4), ylim=(-4, 4), aspect="equal", xticks=[], yticks=[])
        axis.set_title(
            "samples, exact" if name == "exact" else f"{name}, {both[1].drawn} evaluations"
        )
    for axis in axes[1, len(picked) :]:
        axis.set_axis_off()
    return plt_figure


def of_methods(errors: list[dict]) -> dict[str, list[dict]]:
    """The rows of each method."""
    names = dict.fromkeys(r["method"] for r in errors)
    return {name: [r for r in errors if r["method"] == name] for name in names}
