"""Stiff problems at equal achieved error, in CPU time: `python -m bench stiff`.

For each problem every method takes the loosest tolerance of a ladder with which its error at the end
is at most `TARGET`, relative to the problem's scale; of each library the fastest is reported, and
which one that is is printed. Where a library has none that gets there, its column stays empty. Rows
say the least ratio that we want to hold ("wanted"); those that do not hold it are printed as they are.

diffrax's controller has the gains (0.3, 0.4) that its documentation has for stiff problems. SciPy's
right-hand sides are plain Python, without a Jacobian, and so are those of SUNDIALS (CVODE and IDA by
scikit-sundae) but for the equations on a line, a compiled function. Run on one core:
`taskset -c 1 python -m bench stiff`.
"""

import time
from functools import partial

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp

import jaxode
from bench.peers import installed
from bench.timing import Seconds, compile_in_turn, row, time_in_turn
from jaxode.methods import Banded
from jaxode.problems import Problem, brusselator_line, brusselator_start, problems

TARGET = 1e-5
LADDER = [10 ** (-k / 2) for k in range(6, 21)]
OURS = ("rodas4", "rodas4p", "rodas5p")
THEIRS = {
    "Kvaerno3": diffrax.Kvaerno3,
    "Kvaerno4": diffrax.Kvaerno4,
    "Kvaerno5": diffrax.Kvaerno5,
    "KenCarp4": diffrax.KenCarp4,
}
SCIPY = ("LSODA", "Radau", "BDF")
timed = partial(time_in_turn, clock=time.process_time)


# The problems: with parameters, and once more in plain Python.

RATES = np.array([0.04, 3e7, 1e4])
LIGHT = np.array([1.71, 0.43, 8.32, 0.0007, 8.75, 10.03, 0.035, 1.12, 1.745, 280.0, 0.69, 1.81])


def robertson(y, t, k):
    a, b, c = y
    one, two, three = k[0] * a, k[1] * b * b, k[2] * b * c
    return jnp.stack([three - one, one - two - three, two])


def hires(y, t, k):
    a, b, c, d, e, f, g, h = y
    k1, k2, k3, k4, k5, k6, k7, k8, k9, k10, k11, k12 = k
    bound = k10 * f * h - k12 * g
    return jnp.stack(
        [
            -k1 * a + k2 * b + k3 * c + k4,
            k1 * a - k5 * b,
            -k6 * c + k2 * d + k7 * e,
            k3 * b + k1 * c - k8 * d,
            -k9 * e + k2 * (f + g),
            k11 * (d + g) + k1 * e - k2 * f - k10 * f * h,
            bound,
            -bound,
        ]
    )


def robertson_python(t, y):
    a, b, c = y
    one, two, three = 0.04 * a, 3e7 * b * b, 1e4 * b * c
    return [three - one, one - two - three, two]


def hires_python(t, y):
    a, b, c, d, e, f, g, h = y
    bound = 280 * f * h - 1.81 * g
    return [
        -1.71 * a + 0.43 * b + 8.32 * c + 0.0007,
        1.71 * a - 8.75 * b,
        -10.03 * c + 0.43 * d + 0.035 * e,
        8.32 * b + 1.71 * c - 1.12 * d,
        -1.745 * e + 0.43 * f + 0.43 * g,
        -280 * f * h + 0.69 * d + 1.71 * e - 0.43 * f + 0.69 * g,
        bound,
        -bound,
    ]


def oregonator_python(t, y):
    a, b, c = y
    return [77.27 * (b + a * (1 - 8.375e-6 * a - b)), (c - (1 + a) * b) / 77.27, 0.161 * (a - c)]


def van_der_pol_python(t, y):
    x, v = y
    return [v, 1e6 * ((1 - x * x) * v - x)]


FORWARD = {  # in plain Python; the least ratio to diffrax, to LSODA, and to Radau and BDF
    "hires": (hires_python, "HIRES", 10),
    "robertson": (robertson_python, "Robertson to 40", 20),
    "robertson_long": (robertson_python, "Robertson to 1e11", 50),
    "oregonator": (oregonator_python, "Oregonator", 100),
    "van_der_pol_1e6": (van_der_pol_python, "van der Pol, 1e6", 80),
}
DIFFERENTIATED = {"robertson": (robertson, RATES, 60), "hires": (hires, LIGHT, 10)}


# One way to call each library.


def ours(method, p: Problem, f=None, max_steps=2**13, **options):
    """A function of (y0, args, tolerance) that gives the end."""
    f = f or p.f
    return lambda y0, args, tol: jaxode.odeint(
        f, y0, [p.t0, p.t1], *args, method=method, rtol=tol, atol=tol * p.scale,
        max_steps=max_steps, **options,
    )[-1]  # fmt: skip


def theirs(solver, p: Problem, f=None):
    """The same by diffrax; KenCarp4 is given an explicit part that is 0, if f is not a pair."""
    f, solver = f or p.f, solver()
    of = lambda f: diffrax.ODETerm(lambda t, y, args: f(y, t, *args))
    if isinstance(solver, diffrax.KenCarp4):
        stiff, nonstiff = f if isinstance(f, tuple) else (f, lambda y, t, *args: jnp.zeros_like(y))
        term = diffrax.MultiTerm(of(nonstiff), of(stiff))
    else:
        term = of(f)
    control = partial(diffrax.PIDController, pcoeff=0.3, icoeff=0.4)

    def solve(y0, args, tol):
        found = diffrax.diffeqsolve(
            term, solver, p.t0, p.t1, None, y0, args, throw=False, max_steps=2**13,
            stepsize_controller=control(rtol=tol, atol=tol * p.scale),
        )  # fmt: skip
        # Where it fails, what it gives looks like a state.
        return jnp.where(found.result == diffrax.RESULTS.successful, found.ys[-1], jnp.nan)

    return solve


def solve_of(library, method, p: Problem, f=None):
    """That by a method of us or of diffrax."""
    return ours(method, p, f) if library == "jaxode" else theirs(THEIRS[method], p, f)


def by_scipy(method, p: Problem, f, **options):
    return lambda tol: solve_ivp(
        f, (p.t0, p.t1), p.y0, method, rtol=tol, atol=tol * np.asarray(p.scale), t_eval=[p.t1], **options
    ).y[:, -1]  # fmt: skip


def by_cvode(p: Problem, f, **options):
    """SUNDIALS' BDF methods; f(t, y) is as for SciPy."""
    from sksundae.cvode import CVODE

    def rhs(t, y, slope):
        slope[:] = f(t, y)

    return by_sundials(partial(CVODE, rhs, **options), p, ())


def by_ida(p: Problem, residual, slope, **options):
    """The same for a DAE; residual(t, y, slope, out) fills the last."""
    from sksundae.ida import IDA

    return by_sundials(partial(IDA, residual, **options), p, (slope,))


def by_sundials(made, p: Problem, slope):
    def solve(tol):
        atol = np.array(np.broadcast_to(tol * p.scale, p.y0.shape))
        solver = made(rtol=tol, atol=atol, max_num_steps=10**5)
        return solver.solve(np.array([p.t0, p.t1]), p.y0, *slope).y[-1]

    return solve


def error(p: Problem, y) -> float:
    """Of the worst number, relative to itself and the problem's scale."""
    found = np.max(np.abs(np.asarray(y) - p.answer()) / (p.scale + np.abs(p.answer())))
    return float(found) if np.isfinite(found) else np.inf


def loosest(p: Problem, solve):
    """The first tolerance of the ladder with which the target is met, or None."""
    for tolerance in LADDER:
        if error(p, solve(tolerance)) <= TARGET:
            return tolerance
    return None


def quickest(p: Problem, candidates, rounds=5):
    """Of functions of a tolerance: the name, tolerance and time of the one that takes the least."""
    met = {name: (solve, loosest(p, solve)) for name, solve in candidates.items()}
    ready = {name: partial(solve, tol) for name, (solve, tol) in met.items() if tol}
    if not ready:
        return None
    seconds = timed(ready, rounds=rounds)
    name = min(seconds, key=seconds.get)
    return name, met[name][1], seconds[name]


def in_jax(solves, p: Problem, args=None):
    """Functions of a tolerance, compiled."""
    y0, args = jnp.asarray(p.y0), p.args if args is None else args
    ready = {}
    for name, solve in solves.items():
        program = jax.jit(solve).lower(y0, args, 1e-4).compile()
        ready[name] = lambda tol, program=program: program(y0, args, tol)
    return ready


# The rows.

CHOSEN: dict = {}  # of each problem: what was the fastest of us and of diffrax, and its tolerance


def choose(name):
    """The fastest of each library on a problem, at equal error."""
    if name not in CHOSEN:
        p = problems[name]
        found = {
            "jaxode": quickest(p, in_jax({m: ours(m, p) for m in OURS}, p)),
            "diffrax": quickest(p, in_jax({n: theirs(s, p) for n, s in THEIRS.items()}, p)),
        }
        CHOSEN[name] = {library: best for library, best in found.items() if best}
    return CHOSEN[name]


def forward_rows():
    for name, (python, shown, wanted) in FORWARD.items():
        found = dict(choose(name))
        for method in SCIPY:
            best = quickest(problems[name], {method: by_scipy(method, problems[name], python)}, 1)
            if best:
                found[method] = best
        said = ", ".join(f"{library} {m} at {tol:.1e}" for library, (m, tol, _) in found.items())
        print(f"    {shown}: {said}; wanted: diffrax {wanted}x, LSODA 200x, Radau and BDF 800x")
        seconds = {library: seconds for library, (_, _, seconds) in found.items()}
        yield row(f"{shown}, error 1e-5, forward", seconds, "ms")


def differentiated(name):
    """Gradients of the sum of the end with respect to start and rates, of us and of diffrax."""
    p, (f, rates, _) = problems[name], DIFFERENTIATED[name]
    made = {}
    for library, (method, tol, _) in choose(name).items():
        solve = solve_of(library, method, p, f)
        made[library] = jax.grad(lambda y0, k, s=solve, t=tol: jnp.sum(s(y0, (k,), t)[:1]), (0, 1))
    return made, (jnp.asarray(p.y0), jnp.asarray(rates))


def gradient_rows():
    for name, (_, _, wanted) in DIFFERENTIATED.items():
        shown = FORWARD[name][1]
        solves, args = differentiated(name)
        compiled, seconds = compile_in_turn(lambda _, s=solves: s, *args, rounds=1)
        print(
            f"    {shown}: wanted of the gradient: diffrax {wanted}x, 5 forward solves, compilation 2x"
        )
        took = timed(compiled, *args, rounds=3)
        yield row(f"{shown}, gradient", took, "ms")
        over = {"jaxode": took["jaxode"] / choose(name)["jaxode"][2]}
        yield row(f"{shown}, gradient over forward", over, "times")
        yield row(f"{shown}, gradient: trace + compile", seconds, "s")


def compile_rows():
    for name in DIFFERENTIATED:
        p, made = problems[name], {}
        for library, (method, tol, _) in choose(name).items():
            solve = solve_of(library, method, p)
            made[library] = lambda y0, s=solve, t=tol, p=p: s(y0, p.args, t)
        _, seconds = compile_in_turn(lambda _, made=made: made, jnp.asarray(p.y0), rounds=1)
        print("    wanted of compilation: diffrax 2.5x")
        yield row(f"{FORWARD[name][1]}, forward: trace + compile", seconds, "s")


def batch_rows():
    """diffrax is given a tenth of the systems, and its time is multiplied by ten: all would take minutes."""
    for name, count, wanted in (("robertson", 1000, "200x, 100x"), ("hires", 300, "60x, 30x")):
        solves, (y0, rates) = differentiated(name)
        p, f = problems[name], DIFFERENTIATED[name][0]
        factors = np.exp(0.3 * np.random.default_rng(0).normal(size=(count, len(rates))))
        many = jnp.asarray(rates * factors)
        print(f"    {count} of {FORWARD[name][1]}: wanted: diffrax {wanted}, forward and gradient")
        for way in ("forward", "gradient"):
            seconds = {}
            for library, (method, tol, _) in choose(name).items():
                mine = library == "jaxode"
                solve = solve_of(library, method, p, f)
                one = lambda k, y0=y0, s=solve, t=tol: s(y0, (k,), t)
                if way == "gradient":
                    one = lambda k, y0=y0, g=solves[library]: g(y0, k)
                given = many if mine else many[: count // 10]
                program = jax.jit(jax.vmap(one)).lower(given).compile()
                took = timed({library: program}, given, rounds=5 if mine else 1)[library]
                seconds[library] = took if mine else Seconds.of([10 * took])
            yield row(f"{count:,} of {FORWARD[name][1]}, {way}", seconds, "ms")


def line(points) -> Problem:
    """The Brusselator on a line of many points; its answer by rodas5p at 1e-10."""
    start = partial(Problem, brusselator_line, brusselator_start(points), 10.0, args=(1 / 50,))
    p = start(end=np.zeros(2 * points))
    y0, args = jnp.asarray(p.y0), p.args
    solve = ours("rodas5p", p, linear=Banded(2, 2))
    return start(end=np.asarray(jax.jit(solve)(y0, args, 1e-9)))


def line_rows():
    p = line(500)
    field = jax.jit(lambda t, y: p.f(y, t, *p.args)).lower(0.0, jnp.asarray(p.y0)).compile()
    f = lambda t, y: np.asarray(field(jnp.asarray(t, float), y))
    banded = {m: ours(m, p, linear=Banded(2, 2)) for m in ("rodas4", "rodas5p")}
    best = quickest(p, in_jax(banded, p), 3)
    bands = dict(lband=2, uband=2)
    found = {
        "jaxode": best,
        "LSODA": quickest(p, {"LSODA": by_scipy("LSODA", p, f, **bands)}, 3),
    }
    if installed("sksundae"):
        solve = by_cvode(p, f, linsolver="band", **bands)
        found["CVODE"] = quickest(p, {"BDF": solve}, 3)
    found = {library: best for library, best in found.items() if best}
    print(f"    {found}; wanted: LSODA 1.2x, CVODE 1x; 10,000 states in at most 12 times the time")
    yield row(
        "Brusselator, 1,000 states, banded, error 1e-5",
        {n: s for n, (_, _, s) in found.items()},
        "ms",
    )
    large = line_of_many(best, 5000)
    yield row("Brusselator, 10,000 states over 1,000", {"jaxode": large / best[2]}, "times")


def spreading(y, t, diffusion):
    """The diffusion of the Brusselator on a line, with what is at its ends."""
    return brusselator_line(y, t, diffusion) - reacting(y, t, diffusion)


def reacting(y, t, diffusion):
    """Its reaction."""
    u, v = y.reshape(-1, 2).T
    return jnp.stack([1 + u**2 * v - 4 * u, 3 * u - u**2 * v], 1).reshape(-1)


def pair_rows():
    """Diffusion implicit and the reaction explicit, against all of it implicit, and against diffrax."""
    p, pair = line(100), (spreading, reacting)
    banded = partial(ours, p=p, linear=Banded(2, 2))
    solves = {
        "pair": in_jax({"kencarp4": banded("kencarp4", f=pair)}, p),
        "whole": in_jax({m: banded(m) for m in ("kencarp4", "rodas5p")}, p),
        "diffrax": in_jax({"KenCarp4": theirs(diffrax.KenCarp4, p, pair)}, p),
    }
    found = {way: quickest(p, solve, 3) for way, solve in solves.items()}
    print(f"    {found}")
    seconds = {way: best[2] for way, best in found.items() if best}
    whole = seconds.pop("whole")
    seconds["jaxode"] = seconds.pop("pair")
    work = "Brusselator, 200 states, its reaction explicit (IMEX), error 1e-5"
    yield row(work, seconds, "ms")
    over = {"jaxode": seconds["jaxode"] / whole}
    yield row("Brusselator, 200 states, IMEX over all implicit", over, "times")


def robertson_residual(t, y, slope, out):
    first, second, _ = robertson_python(t, y)
    out[:] = slope[0] - first, slope[1] - second, y[0] + y[1] + y[2] - 1


def dae_rows():
    p = problems["robertson_dae"]
    found = {"jaxode": quickest(p, in_jax({m: ours(m, p, mass=p.mass) for m in OURS}, p))}
    if installed("sksundae"):
        slope = np.array([-0.04, 0.04, 0.0])
        solve = by_ida(p, robertson_residual, slope, algebraic_idx=[2])
        found["IDA"] = quickest(p, {"IDA": solve}, 3)
    found = {library: best for library, best in found.items() if best}
    print(f"    {found}")
    seconds = {library: seconds for library, (_, _, seconds) in found.items()}
    yield row("Robertson to 40 as a DAE, error 1e-5, forward", seconds, "ms")


def line_of_many(best, points) -> float:
    """Seconds of the same method and tolerance on a longer line."""
    p = Problem(brusselator_line, brusselator_start(points), 10.0, args=(1 / 50,))
    ready = in_jax({"": ours(best[0], p, linear=Banded(2, 2))}, p)
    return timed({"": partial(ready[""], best[1])}, rounds=1)[""]


def auto_rows():
    p = problems["lorenz"]
    solves = in_jax({m: ours(m, p) for m in ("auto", "tsit5")}, p)
    seconds = timed({m: partial(s, 1e-6) for m, s in solves.items()})
    print('    wanted: at most 1.5 times "tsit5"')
    yield row("Lorenz, auto over tsit5", {"jaxode": seconds["auto"] / seconds["tsit5"]}, "times")


def stiff_rows():
    groups = forward_rows, gradient_rows, compile_rows, line_rows, pair_rows, dae_rows, auto_rows
    for rows in (*groups, batch_rows):
        yield from rows()
