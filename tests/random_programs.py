"""Programs that solve problems with exact answers: the structure of each is drawn, and its numbers later.

A `Structure` says all that is compiled: the problem, the pytree and the dtype of the state, the method, the
adjoint, what is kept of the solve, and the stack of transformations. `Program(structure)` is compiled once for
many batches of numbers, of which `Program.failures` says what is wrong with each.
"""

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from random_problems import (
    MOVABLE,
    PROBLEMS,
    TIMES,
    Ranges,
    count_moved,
    draw_numbers,
    exact_rows,
    moved,
    stack,
)
from random_stacks import ORDER, Stack, random_stack, stacked

from jaxode import Event, pid, solve
from jaxode.methods import names as method_names

# States.


def as_complex(u):
    half = len(u) // 2
    z = lax.complex(u[:half], u[half : 2 * half])
    return (z, u[2 * half :]) if len(u) % 2 else z


FORMS = {
    "vector": lambda u: u,
    "matrix": lambda u: u.reshape(1, -1, 1),
    "scalars": lambda u: tuple(u[i] for i in range(len(u))),
    "tree": lambda u: {"a": u[0], "empty": u[:0].reshape(0, 2), "none": None, "rest": [u[1:]]},
    "pair": lambda u: (u[: len(u) // 2], u[len(u) // 2 :]),
    "complex": as_complex,
    "mixed": lambda u: (u[:1].astype(jnp.float32), u[1:]),
}


def vector(state, dtype):
    """A state as one real vector."""

    def parts(leaf):
        leaf = leaf.reshape(-1)
        return [leaf.real, leaf.imag] if jnp.iscomplexobj(leaf) else [leaf]

    pieces = [part.astype(dtype) for leaf in jax.tree.leaves(state) for part in parts(leaf)]
    return jnp.concatenate(pieces)


# Methods, with the order by which a tolerance is chosen. Equal steps are `EQUAL` in number.

EXPLICIT = dict(
    heun=2, ralston=2, midpoint=2, bosh3=3, fehlberg45=5, cash_karp=5, dopri5=5, tsit5=5
)
EXPLICIT |= dict(dop853=8)
IMPLICIT = dict(
    trbdf2=2, kvaerno3=3, kvaerno5=5, rodas4=4, rodas4p=4, rodas5p=5, kencarp4=4, auto=5
)
PAIRS = dict(kencarp3=3, kencarp4=4, kencarp5=5)
EQUAL_STEPS = dict(rk4=4, rk4_38=4, gauss4=4, implicit_midpoint=2, euler=1)
SYMPLECTIC = dict(leapfrog=2, yoshida4=4)
ORDERS = {**EXPLICIT, **IMPLICIT, **PAIRS, **EQUAL_STEPS, **SYMPLECTIC}
EQUAL = 64
PLAIN = Stack()
HALF = ("float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Structure:
    """All of a program but its numbers.

    `which` names what is differentiated; `kept` is what is asked of the solve; `shared`: all cases have the
    same parameters, which are no array with an axis for them; `pair`: func is a pair of functions.
    """

    problem: str = "linear"
    form: str = "vector"
    dtype: str = "float64"
    method: str = "tsit5"
    adjoint: str = "replay"
    kept: str = "times"
    which: tuple[str, ...] = MOVABLE
    stack: Stack = PLAIN
    shared: bool = False
    batch: int = 12
    event: str = "condition"
    pair: bool = False
    mass: bool = False
    max_steps: int = 400
    controlled: bool = False

    @property
    def wide(self):
        """The dtype that func computes in."""
        return jnp.float64 if self.dtype == "float64" else jnp.float32

    @property
    def eps(self) -> float:
        """That of the narrowest array of the state."""
        narrow = jnp.float32 if self.form == "mixed" and self.wide == jnp.float64 else self.dtype
        return float(jnp.finfo(narrow).eps)

    @property
    def equal_steps(self) -> bool:
        return self.method in EQUAL_STEPS or self.method in SYMPLECTIC

    @property
    def ranges(self) -> Ranges:
        """Within which a solve can do what it is asked for."""
        problem, order = PROBLEMS[self.problem], ORDERS[self.method]
        least = max(-(order + 2.0), -9.0 if self.eps < 1e-10 else -5.0)
        most = max(-4.0, 0.5 - order)
        # Times have few digits far from 0.
        offset = 1e10 if self.wide == jnp.float64 else 1e3
        if problem.sees_time or self.problem == "impulse":
            offset = 1e5 if self.wide == jnp.float64 else 2.0
        if self.dtype in HALF:
            return Ranges((-1.0, 1.0), (-0.5, 0.5), (-2.5, -2.0), min(offset, 1.0))
        # Steps of a solve that can go on are in the unit of func; float32 has none shorter than 4e-12 of it.
        short = self.kept == "resumed" and self.wide == jnp.float32
        return Ranges((-8.0 if short else -12.0, 6.0), rtol=(least, most), offset=offset)

    def state(self, u):
        return jax.tree.map(self.narrowed, FORMS[self.form](u))

    def narrowed(self, leaf):
        if jnp.iscomplexobj(leaf) or self.form == "mixed":
            return leaf
        return leaf.astype(self.dtype)


# The solve.


def field_of(s: Structure):
    """func(y, t, given), or a pair of such functions; given = (q, rate, start, scale, breaks): `breaks` may be
    a place beyond which du/dx is a value that is not finite."""
    problem = PROBLEMS[s.problem]

    def func(y, t, given, part=1.0):
        q, rate, start, scale, breaks = given
        x = None
        if problem.sees_time or breaks:
            x = (rate.astype(t.dtype) * (t - start.astype(t.dtype))).astype(s.wide)
        if s.method in SYMPLECTIC:
            slopes = separated(s, *y, q, rate, scale)
            broken = lambda k: jnp.where(x > breaks[0], breaks[1], k) if breaks else k
            return tuple(map(broken, slopes))
        k = problem.field(vector(y, s.wide) / scale, x, q)
        if breaks:
            at, value = breaks
            k = jnp.where(x > at, value, k)
        k = k * (rate * scale * part)
        return s.state(k * mass_of(s) if s.mass else k)

    return (partial(func, part=0.25), partial(func, part=0.75)) if s.pair else func


def separated(s: Structure, place, momentum, q, rate, scale):
    """dy/dt of (position, momentum), each of whose parts is a function of the other alone."""
    zero, field = jnp.zeros(len(place), s.wide), PROBLEMS[s.problem].field
    wide = lambda *parts: jnp.concatenate([part.astype(s.wide) for part in parts]) / scale
    slope = lambda u: field(u, None, q) * (rate * scale)
    slopes = slope(wide(zero, momentum))[: len(place)], slope(wide(place, zero))[len(place) :]
    return jax.tree.map(s.narrowed, slopes)


def mass_of(s: Structure):
    return jnp.linspace(0.5, 2.0, PROBLEMS[s.problem].size, dtype=s.wide)


def events_of(s: Structure, t, q, rate, clock):
    """What pushes the state, when its clock, which begins with `clock`, says so."""

    def change(y, t, given):
        q, _, _, scale, _ = given
        return s.state(vector(y, s.wide) + scale * jnp.append(q["push"], jnp.zeros(1, s.wide)))

    def condition(y, t, given):
        return vector(y, s.wide)[3] / given[3] - given[0]["at"]

    if s.event == "condition":
        return [Event(condition, change=change, direction="up")]
    at = t[0] + ((q["at"] - clock) / rate).astype(t.dtype)
    return [Event(times=jnp.stack([at]), change=change)]


def options_of(s: Structure, case) -> dict:
    options: dict[str, Any] = dict(method=s.method, adjoint=s.adjoint, max_steps=s.max_steps)
    if s.equal_steps:
        options["dt"] = 1 / (EQUAL * jnp.abs(case["rate"]))
    else:
        options |= dict(rtol=case["rtol"], atol=case["rtol"] * case["atol"] * case["scale"])
        if s.controlled:
            options["controller"] = pid(integral=0.4, proportional=0.3)
    if s.mass:
        options["mass"] = mass_of(s)
    return options


def solved(s: Structure, z, case):
    """What is kept of the solve of a case, and how it went."""
    m, narrow = moved(z, case, s.which), partial(jax.tree.map, lambda x: x.astype(s.wide))
    scale, start = narrow((case["scale"], case["start"]))
    u0, q, rate = narrow((m.u0, m.q, m.rate))
    y0, t = s.state(u0 * scale), m.t.astype(s.wide)
    options = options_of(s, case)
    if s.problem == "impulse":
        options["events"] = events_of(s, t, q, rate, u0[3])
    given = (
        q,
        rate,
        start,
        scale,
        narrow((case["breaks"], case["value"])) if "breaks" in case else (),
    )
    run = lambda t, **more: solve(field_of(s), y0, t, given, **options, **more)
    rows_of = lambda ys: jax.vmap(lambda y: vector(y, jnp.float64))(ys) / case["scale"]
    if s.kept == "dense":
        solution = run(t, dense=True)
        return rows_of(solution.dense(t)), solution
    if s.kept == "save":
        solution = run(t, save=lambda y, t, *_: {"of y": vector(y, s.wide)})
        return rows_of(solution.ys), solution
    if s.kept == "fold":
        solution = run(t, fold=(vector(y0, s.wide), lambda _, y, t, *__: vector(y, s.wide)))
        end = solution.folded.astype(jnp.float64) / case["scale"]
        return jnp.broadcast_to(end, (TIMES, len(end))), solution
    if s.kept == "save_steps":
        solution = run(jnp.stack([t[0], t[-1]]), save_steps=True)
        return off_at_steps(s, m, case, solution, rows_of(solution.ys)), solution
    if s.kept == "resumed":
        first = run(t[:3], resumable=True)
        solution = first.resume(t[2:])
        return jnp.concatenate([rows_of(first.ys)[:2], rows_of(solution.ys)]), solution
    solution = run(t)
    return rows_of(solution.ys), solution


def off_at_steps(s: Structure, m, case, solution, rows):
    """How far some of the steps are from the exact solution at their times."""
    end = jnp.sum(solution.mask) - 1
    places = jnp.array([0, 1, 2, 0, 0]).at[3].set(end // 2).at[4].set(end)
    here = solution.mask[places]
    ts = jnp.where(here, solution.ts[places].astype(jnp.float64), m.t[0])
    exact = PROBLEMS[s.problem].exact(m.u0, m.rate * (ts - case["start"]), m.q)
    return jnp.where(here[:, None], rows[places] - exact, 0.0)


def wanted_rows(s: Structure, z, case):
    """What `solved` should find."""
    rows = exact_rows(s.problem, s.which, z, case)
    if s.kept == "save_steps":
        return 0 * rows
    return jnp.broadcast_to(rows[-1], rows.shape) if s.kept == "fold" else rows


# A program, and what is wrong with what it finds.


def of_one(s: Structure, rows):
    """`rows(s, z, case)` as the function g(z, own, shared) of a stack."""

    def g(z, own, shared):
        case = own | {name: x for name, x in shared.items() if name != "z"}
        if "z" in shared:
            z = jnp.concatenate([z, shared["z"]])
        return rows(s, z, case)

    return g


@cache
def exact_program(s: Structure):
    """The exact answer of a structure: of many that only differ in how they are solved."""
    return jax.jit(stacked(s.stack, of_one(s, wanted_rows)))


def of_exact(s: Structure) -> Structure:
    kept = s.kept if s.kept in ("save_steps", "fold") else "times"
    return Structure(
        s.problem, kept=kept, which=s.which, shared=s.shared,
        stack=Stack(s.stack.derivative, summed=s.stack.summed),
    )  # fmt: skip


class Program:
    """The compiled program of a structure."""

    def __init__(self, structure: Structure):
        s = self.structure = structure
        self.run = jax.jit(stacked(s.stack, of_one(s, lambda *args: solved(*args)[0])))
        self.exact = exact_program(of_exact(s))

    def draw(self, rng) -> list[dict]:
        """Numbers for a batch."""
        s = self.structure
        dtype = np.float64 if s.wide == jnp.float64 else np.float32
        draw = lambda: draw_numbers(rng, s.problem, s.ranges, dtype, s.kept != "fold")
        cases = [draw() for _ in range(s.batch)]
        if s.shared:
            cases = [case | {"q": cases[0]["q"]} for case in cases]
        return cases

    def given(self, cases: list[dict]):
        """The arguments of the program: (zs, owns, shared)."""
        s, first = self.structure, cases[0]
        if not s.shared:
            count = count_moved(first, s.which)
            return np.zeros((len(cases), count)), stack(cases), {}
        own = [name for name in s.which if name != "q"]
        zs = np.zeros((len(cases), count_moved(first, own)))
        owns = [{name: x for name, x in case.items() if name != "q"} for case in cases]
        shared = {"q": first["q"]}
        if "q" in s.which:
            shared["z"] = np.zeros(count_moved(first, ("q",)))
        return zs, stack(owns), shared

    def failures(self, cases: list[dict]) -> list[str]:
        """What is wrong, in words; nothing if all is right."""
        given = self.given(cases)
        found, exact = (jax.tree.map(np.asarray, fn(*given)) for fn in (self.run, self.exact))
        bounds = np.array([bound(self.structure, case) for case in cases])
        own, total = found if isinstance(found, tuple) else (found, None)
        wrong = [
            f"case {i} is off by {off:.2g} where {bounds[i]:.2g} is allowed: {cases[i]}"
            for i, off in compared(own, exact if total is None else exact[0], bounds)
        ]
        if total is not None:
            of_all = compared(total[None], exact[1][None], [np.sum(bounds)])
            wrong += [f"the sum over all cases is off by {off:.2g}" for _, off in of_all]
        return wrong


def compared(found, exact, bounds):
    """Of each array that is off by more than it may be, its number and by how much."""
    for i, (a, b, most) in enumerate(zip(found, exact, bounds, strict=True)):
        off = np.max(np.abs(a - b), initial=0.0)
        if not off <= most:
            yield i, off


def bound(s: Structure, case: dict) -> float:
    """The largest error that a case may have: some tolerances, times what becomes of them, and roundings."""
    problem, order = PROBLEMS[s.problem], ORDER[s.stack.derivative]
    size = max(1.0, float(np.max(np.abs(case["u0"]))))
    tolerance = case["rtol"] * (size + case["atol"])
    if s.equal_steps:
        tolerance = 20 * (3 / EQUAL) ** ORDERS[s.method]
    eps_time = float(jnp.finfo(s.wide).eps)
    lost = eps_time * abs(case["start"] * case["rate"]) if problem.sees_time else 0.0
    if s.problem == "impulse":
        lost = eps_time * (abs(case["start"] * case["rate"]) + 1)
    rounding = (20 if s.dtype in HALF else 200) * s.eps
    growth = problem.growth ** (1 + order)
    if order == 2 and "t" in s.which and not s.equal_steps:
        # The second derivative of a row in its time is that of dense output, two orders less accurate.
        tolerance = max(tolerance, tolerance ** (1 - 2 / (ORDERS[s.method] + 1)))
    return 5.0**order * growth * (30 * tolerance + rounding + 50 * lost)


# Structures at random.


def random_structure(rng) -> Structure:
    """Any structure that there can be."""
    kind = rng.choice(["any"] * 5 + ["stiff", "event", "event", "symplectic", "pair"])
    problem = rng.choice(
        [name for name, p in PROBLEMS.items() if not p.stiff and name != "impulse"]
    )
    dtype = rng.choice(["float64"] * 4 + ["float32", "float32", "float16", "bfloat16"])
    forms = [name for name in FORMS if name not in ("complex", "mixed") or dtype not in HALF]
    form, method = rng.choice(forms), rng.choice([*EXPLICIT, *EXPLICIT, *IMPLICIT, *EQUAL_STEPS])
    adjoint = rng.choice(["replay", "replay", "replay", "backsolve", "direct", "forward"])
    pair = mass = False
    if kind == "stiff":
        problem, method = "stiff", rng.choice([m for m in IMPLICIT])
        dtype, form = "float64", rng.choice(["vector", "tree", "scalars"])
    if kind == "event":
        problem, method = "impulse", rng.choice([*EXPLICIT, *IMPLICIT, *EQUAL_STEPS])
    if kind == "symplectic":
        problem, form, method = "rotation", "pair", rng.choice([*SYMPLECTIC])
    if kind == "pair":
        method, pair = rng.choice([*PAIRS]), True
    taken = method_names.methods[method]
    if dtype in HALF and ORDERS[method] > 5:
        method = "tsit5"
    if adjoint == "backsolve" and taken.implicit:
        adjoint = "replay"
    if taken.takes_mass and form == "vector" and not pair and kind == "any":
        mass = rng.random() < 0.3
    keeps = ["times"] * 4 + ["dense", "save", "save_steps", "fold"]
    if adjoint == "backsolve":
        keeps = ["times", "times", "save"]
    kept = rng.choice(keeps)
    if kind == "symplectic" and kept == "save_steps":
        kept = "times"
    shared = rng.random() < 0.2 and adjoint != "forward"
    which = rng.choice([MOVABLE, MOVABLE, ("u0",), ("rate",), ("q",), ("t",), ("u0", "q")])
    if problem == "stiff" and "t" in which:
        which = ("u0", "q", "rate")
    if shared and which not in (("q",), ("u0", "q")):
        which = ("u0", "q")
    if shared and which == ("q",):
        which = ("u0", "q")
    chosen = random_stack(rng, adjoint, shared)
    if (
        kept == "times"
        and chosen.derivative == "value"
        and problem != "impulse"
        and rng.random() < 0.3
    ):
        kept = "resumed"
    return Structure(
        problem, form, dtype, method, adjoint, kept, which, chosen, shared,
        batch=rng.choice([4, 12, 12, 40, 100]), event=rng.choice(["condition", "times"]), pair=pair, mass=mass,
        max_steps=2000 if problem == "stiff" else rng.choice([400, 400, 1000]), controlled=rng.random() < 0.1,
    )  # fmt: skip
