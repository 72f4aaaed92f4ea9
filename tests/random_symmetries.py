"""What must not change a solution, or change it in a known way: most of it to the last bit.

`Symmetries(structure).failures(cases)` solves a batch of cases, and the same again after each of `SAME` has
made others of their numbers, by one compiled program. `Failures` are solves of fields that break off.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from random_problems import MOVABLE, PROBLEMS, TIMES, draw_numbers, exact_rows, stack
from random_programs import (
    Program,
    Structure,
    bound,
    field_of,
    options_of,
    random_structure,
    solved,
    vector,
)
from random_stacks import Stack

from jaxode import Status, solve


def dyadic(case: dict) -> dict:
    """The case with times that have few digits: sums with powers of two, and with each other, are exact."""
    sign, power = math.copysign(1, case["rate"]), round(-math.log2(abs(case["rate"])))
    span = sign * 2.0**power
    parts = np.clip((case["t"] - case["t"][0]) * case["rate"], 0, 1)
    parts = np.maximum.accumulate(np.round(parts * 2**18) / 2**18)
    return case | dict(t=span * parts, start=0.0, rate=1 / span)


def larger(case, power):
    return case | dict(scale=case["scale"] * 2.0**power)


def slower(case, power):
    by = 2.0**power
    return case | dict(t=case["t"] * by, start=case["start"] * by, rate=case["rate"] / by)


def mirrored(case, _):
    return case | dict(t=-case["t"], start=-case["start"], rate=-case["rate"])


def later(case, _):
    by = 3 / case["rate"]
    return case | dict(t=case["t"] + by, start=case["start"] + by)


def refined(case, _):
    """Other times between the first and the last: the last row is the same."""
    a, *_, b = case["t"]
    inner = np.linspace(a, b, TIMES)[1:-1]
    return case | dict(t=np.array([a, *inner, b]))


# What is done to the numbers of a case, and which rows are then the same.
SAME = {
    "a state in another unit": (larger, slice(None)),
    "time in another unit": (slower, slice(None)),
    "time that runs the other way": (mirrored, slice(None)),
    "time from another start": (later, slice(None)),
    "other times between": (refined, slice(-1, None)),
}


class Symmetries:
    """The program of the plain solve of a structure."""

    def __init__(self, structure: Structure):
        self.structure = structure
        self.run = jax.jit(jax.vmap(partial(rows_and_report, structure)))
        self.run_twice = jax.jit(jax.vmap(partial(rows_of_two, structure)))

    @property
    def sees_time(self) -> bool:
        name = self.structure.problem
        return PROBLEMS[name].sees_time or name == "impulse"

    def draw(self, rng) -> list[dict]:
        s = self.structure
        dtype = np.float64 if s.wide == jnp.float64 else np.float32
        draw = lambda: dyadic(draw_numbers(rng, s.problem, s.ranges, dtype))
        return [draw() for _ in range(s.batch)]

    def failures(self, cases: list[dict], power: int) -> list[str]:
        """What is wrong, in words."""
        rows, status, taken = self.found(cases)
        wrong = [f"case {i} has status {code}" for i, code in enumerate(status) if code]
        if np.any(status == 0) and np.any(np.isnan(rows[status == 0])):
            wrong.append("a success with a NaN")
        for name, (change, same) in SAME.items():
            if change is later and self.sees_time:
                continue  # its times are rounded elsewhere
            found, _, steps = self.found([change(case, power) for case in cases])
            for i in np.flatnonzero(different(rows[:, same], found[:, same]) | (steps != taken)):
                off = np.max(np.abs(rows[i, same] - found[i, same]))
                wrong.append(
                    f"{name} changes case {i} by {off:.2g}, steps {taken[i]} to {steps[i]}"
                )
        return (
            wrong + self.of_batches(cases, rows) + self.of_two(cases, rows) + self.of_parts(cases)
        )

    def found(self, cases):
        return jax.tree.map(np.asarray, self.run(stack(cases)))

    def of_batches(self, cases, rows) -> list[str]:
        """Cases in another order, and the same case in all places."""
        backwards = self.found(cases[::-1])[0][::-1]
        alike = self.found([cases[0]] * len(cases))[0]
        wrong = [f"the order changes case {i}" for i in np.flatnonzero(different(rows, backwards))]
        return wrong + [f"place {i} differs" for i in np.flatnonzero(different(alike[:1], alike))]

    def of_two(self, cases, rows) -> list[str]:
        """The system beside itself: each is what it is alone, to roundings."""
        if self.structure.problem == "impulse" or self.structure.pair:
            return []  # its events, or its two functions, are not made for two
        first, second = map(np.asarray, self.run_twice(stack(cases)))
        wrong = [f"case {i} has an unlike twin" for i in np.flatnonzero(different(first, second))]
        most = 1e5 * self.structure.eps * PROBLEMS[self.structure.problem].growth
        off = np.max(np.abs(first - rows), (1, 2))
        return wrong + [
            f"a twin changes case {i} by {off[i]:.2g}" for i in np.flatnonzero(~(off <= most))
        ]

    def of_parts(self, cases) -> list[str]:
        """From the first time to one between, and on from there: as good as the exact solution."""
        s = self.structure
        if s.problem == "impulse":
            return []  # its clock would begin anew
        some = lambda case, *rows: case | dict(t=case["t"][list(rows)])
        middle = self.found([some(case, 0, 2, 2, 2, 2) for case in cases])[0][:, -1]
        rest = [some(case, 2, 2, 2, 3, 4) | dict(u0=u0) for case, u0 in zip(cases, middle)]
        found = self.found(rest)[0][:, -1]
        exact = jax.vmap(lambda case: exact_rows(s.problem, (), None, case))(stack(cases))[:, -1]
        off = np.max(np.abs(found - exact), 1)
        most = np.array([2 * bound(s, case) for case in cases])
        return [
            f"case {i} in two parts is off by {off[i]:.2g}" for i in np.flatnonzero(~(off <= most))
        ]


def different(a, b):
    """Which of many arrays differ in a bit; NaN is like NaN."""
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    return ~np.all(same, tuple(range(1, same.ndim)))


def rows_and_report(s: Structure, case):
    none = dataclasses.replace(s, which=())
    rows, solution = solved(none, jnp.zeros(0), case)
    return rows, solution.status, solution.stats.accepted + solution.stats.rejected


def rows_of_two(s: Structure, case):
    """The rows of a system that stands twice in one state."""
    narrow = lambda x: jnp.asarray(x, s.wide)
    given = *(jax.tree.map(narrow, case[name]) for name in ("q", "rate", "start", "scale")), ()
    one = field_of(s)
    func = lambda y, t, given: {name: one(part, t, given) for name, part in y.items()}
    y0 = s.state(narrow(case["u0"]) * given[3])
    options, t = options_of(s, case), narrow(case["t"])
    ys = solve(func, {"a": y0, "b": y0}, t, given, **options).ys
    rows = lambda y: jax.vmap(lambda y: vector(y, jnp.float64))(y) / case["scale"]
    return rows(ys["a"]), rows(ys["b"])


class Breaks:
    """Solves of a field that is not finite beyond some time, beside others, with gradients.

    Each has a status that says so, rows that are right as far as it came, and NaN beyond; its gradient is NaN.
    The others are what they are where nothing breaks, to the last bit.
    """

    def __init__(self, structure: Structure):
        self.structure = structure
        self.plain = Program(structure)
        self.run = jax.jit(jax.vmap(partial(value_and_gradient, structure)))

    def draw(self, rng) -> list[dict]:
        cases = self.plain.draw(rng)
        far = lambda case: case | dict(breaks=3.0, value=np.nan)
        some = lambda case: (
            case | dict(breaks=rng.uniform(-0.2, 0.95), value=rng.choice([np.nan, np.inf, -np.inf]))
        )
        return [some(case) if rng.random() < 0.4 else far(case) for case in cases]

    def failures(self, cases: list[dict]) -> list[str]:
        s, whole = self.structure, [case | dict(breaks=3.0) for case in cases]
        found = jax.tree.map(np.asarray, self.run(stack(cases)))
        fine = jax.tree.map(np.asarray, self.run(stack(whole)))
        rows, status, reached, gradient = found
        wrong = []
        for i, case in enumerate(cases):
            goes = case["t"][-1] != case["t"][0]
            breaks = case["breaks"] < (1 if goes else 0)
            if breaks != (status[i] != Status.SUCCESS):
                wrong.append(f"case {i} has status {status[i]}, breaks at {case['breaks']:.3g}")
            if not breaks:
                same = [not different(a[i : i + 1], b[i : i + 1])[0] for a, b in zip(found, fine)]
                wrong += [] if all(same) else [f"case {i} is not what it is without the others"]
                continue
            known = (case["t"] - case["start"]) * case["rate"] <= min(reached[i], case["breaks"])
            if case["breaks"] < 0 and status[i] == Status.NON_FINITE_INITIAL:
                known[:] = False
            off = np.max(np.abs(rows[i] - fine[0][i])[known], initial=0)
            if not off <= 2 * bound(s, case):
                wrong.append(f"case {i} is off by {off:.2g} before it broke")
            if not np.all(np.isnan(rows[i, -1])) or not np.all(np.isnan(gradient[i])):
                wrong.append(f"case {i} broke, but has numbers at its end, or in its gradient")
        return wrong


def value_and_gradient(s: Structure, case):
    """The rows, the status, where it ended, and the gradient of all numbers that move."""

    def loss(z):
        rows, solution = solved(s, z, case)
        return jnp.vdot(case["w"], rows), (rows, solution)

    count = sum(np.size(x) for name in s.which for x in jax.tree.leaves(case[name]))
    (_, (rows, solution)), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.zeros(count))
    reached = (solution.reached.astype(jnp.float64) - case["start"]) * case["rate"]
    return rows, solution.status, reached, gradient


def random_symmetric(rng) -> Structure:
    """A structure of a plain solve."""
    s = random_structure(rng)
    form = "vector" if s.form == "mixed" else s.form
    dtype = rng.choice(["float64", "float64", "float32"]) if s.problem != "stiff" else "float64"
    return dataclasses.replace(
        s, form=form, dtype=dtype, adjoint="replay", kept="times", which=(), stack=Stack(), shared=False,
        batch=rng.choice([3, 12, 40]),
    )  # fmt: skip


def random_breaking(rng) -> Structure:
    """A structure of a plain solve with a gradient."""
    s = random_structure(rng)
    while s.problem in ("impulse", "stiff"):
        s = random_structure(rng)
    adjoint = "replay" if s.adjoint == "forward" else s.adjoint
    dtype = rng.choice(["float64", "float64", "float32"])
    which = rng.choice([MOVABLE, ("u0",), ("rate",)])
    return dataclasses.replace(
        s, dtype=dtype, adjoint=adjoint, kept="times", which=which, stack=Stack(), shared=False,
        batch=rng.choice([3, 12, 40]),
    )  # fmt: skip
