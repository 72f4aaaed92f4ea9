"""Whether the tests see a fault: `python -m bench.mutations [name ...]`.

Faults are made one at a time in a copy of the repository, and the tests that are nearest to each are run
until one fails. The score is how many faults were found, of all. At first the same tests pass without any
fault (`--no-control` leaves that out).
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
LEFT_OUT = ".git .venv .venv-oldest runs shared notebooks __pycache__ .ruff_cache studies".split()
LONGEST = 900  # seconds for the tests of one fault: one that hangs is found


class Mutation(NamedTuple):
    """A fault: a text of a file, and what stands there instead; and the tests that ought to see it."""

    file: str
    old: str
    new: str
    tests: str


SWAPPED = "jax.lax.select((row == 1) | (row == 2), 3 - row, row)"  # the second output and the third
BACK = "        return carry._replace(f=f_bar, y=added(y_bar, straight), memory=memory_bar)\n\n    def back_"
BACK_WITHOUT_ROWS = BACK.replace("added(y_bar, straight)", "y_bar")
MUTATIONS = {
    # A coefficient, off by 1e-6; sums that are checked stay what they are.
    "tsit5, a": Mutation(
        "methods/tables.py",
        "-0.008480655492356989 0.335480655492357",
        "-0.008479655492356989 0.335479655492357",
        "test_tableaus",
    ),
    "tsit5, dense output": Mutation(
        "methods/tables.py", "-1.0530884977290216", "-1.0530874977290216", "test_tableaus"
    ),
    "dop853, a": Mutation(
        "methods/tables.py",
        "0.0197250569845379 0.0591751709536137",
        "0.0197260569845379 0.0591741709536137",
        "test_tableaus",
    ),
    "dop853, dense output": Mutation(
        "methods/tables.py", "-8.428938276109013", "-8.428937276109013", "test_tableaus"
    ),
    "rodas4, a": Mutation("methods/rosenbrock.py", "[1.544],", "[1.544001],", "test_stiff"),
    "rodas4, dense output": Mutation(
        "methods/rosenbrock.py", "10.12623508344586,", "10.12623608344586,", "test_stiff"
    ),
    "rodas5p, g": Mutation(
        "methods/rosenbrock.py", "[-14.155112264123755]", "[-14.155111264123755]", "test_stiff"
    ),
    "kvaerno3, a": Mutation(
        "methods/esdirk.py", "1.490563388254108,", "1.490564388254108,", "test_stiff"
    ),
    "kvaerno3, error": Mutation(
        "methods/esdirk.py", "-0.18175341844607212,", "-0.18175241844607212,", "test_esdirk test_stiff"
    ),
    # A stale first stage.
    "the first stage of the step before": Mutation(
        "methods/explicit.py",
        "return Step(y1, ks[-1], ks[-1], errors, ks",
        "return Step(y1, ks[0], ks[-1], errors, ks",
        "test_solve",
    ),
    "the same in a loop over stages": Mutation(
        "kernels/stages.py",
        "return Step(y1, k1, k1, errors, ks",
        "return Step(y1, memory, k1, errors, ks",
        "test_stages test_lanes",
    ),
    "the same of a Rosenbrock method": Mutation(
        "methods/rosenbrock.py",
        "return Step(y1, k1, k1, [unpack(error)]",
        "return Step(y1, memory, k1, [unpack(error)]",
        "test_stiff",
    ),
    # A wrong sign.
    "a sign in the error estimate": Mutation(
        "methods/explicit.py", "[(w, k) for w, k in zip(e, ks) if w]",
        "[(abs(w), k) for w, k in zip(e, ks) if w]",
        "test_solve test_tableaus",
    ),
    "a sign in dop853's two estimates": Mutation(
        "stepping/integrator.py", "high**2 + 0.01 * low**2", "high**2 - 0.01 * low**2", "test_solve test_fuzz"
    ),
    "a sign in a Rosenbrock step": Mutation(
        "methods/rosenbrock.py", "last = last + us[-1]\n", "last = last - us[-1]\n", "test_stiff"
    ),
    "a sign in the error estimate of an implicit method": Mutation(
        "methods/esdirk.py", "tree.scale(self.e[0], k0) + jnp.tensordot(e, ks, 1)",
        "tree.scale(self.e[0], k0) - jnp.tensordot(e, ks, 1)", "test_esdirk test_stiff",
    ),
    "a sign in backward time": Mutation(
        "stepping/field.py", "t = self.t0 + self.span * s", "t = self.t0 + jnp.abs(self.span) * s", "test_solve"
    ),
    "a sign in backward time, resumed": Mutation(
        "program.py", "jnp.where(t[-1] < t[0], -jnp.ones_like(t[0]), 1)", "jnp.ones_like(t[0])", "test_resume"
    ),
    "time of the adjoint that runs forwards": Mutation(
        "adjoints/backsolve.py", "self.f(y, self.end - r)", "self.f(y, r)", "test_adjoints"
    ),
    "a sign in dense output": Mutation(
        "methods/explicit.py", "(0, 3, -2), (0, -1, 1)", "(0, 3, -2), (0, 1, -1)", "test_tableaus"
    ),
    "a sign in the higher terms of dense output": Mutation(
        "methods/explicit.py", "BUMPS = (0, 1, -2, 1)", "BUMPS = (0, -1, 2, -1)", "test_tableaus"
    ),
    "a sign in the dense output of implicit methods": Mutation(
        "tree.py", "first, last = (weighted_sum(h, [(1.0, k)])", "first, last = (weighted_sum(-h, [(1.0, k)])",
        "test_esdirk test_stiff",
    ),
    "a sign in the controller": Mutation(
        "controllers.py", "(p + 2 * d) / order, -d / order", "-(p + 2 * d) / order, -d / order",
        "test_solve",
    ),
    # Two outputs change their places.
    "two outputs swapped": Mutation(
        "stepping/loop.py",
        "put = lambda row, values, rows, due: tree.put(row, values, rows)",
        f"put = lambda row, values, rows, due: tree.put({SWAPPED}, values, rows)",
        "test_solve",
    ),
    "two outputs swapped, of many": Mutation(
        "batch/lanes.py", "place = jnp.where(due, who, size), row\n",
        f"place = jnp.where(due, who, size), {SWAPPED}\n", "test_lanes",
    ),
    "two outputs swapped, in one call": Mutation(
        "batch/lanes.py", "(who[j], row, *[jnp.zeros_like(row)]", f"(who[j], {SWAPPED}, *[jnp.zeros_like(row)]",
        "test_lanes",
    ),
    "the first and the last output swapped": Mutation(
        "outputs.py", "jnp.where(fit(at_start), first, inside)", "jnp.where(fit(at_start), inside, first)",
        "test_solve",
    ),
    "two cotangents of outputs swapped": Mutation(
        "adjoints/replay.py", "pick = lambda row, rows_bar: tree.row(rows_bar, row)",
        f"pick = lambda row, rows_bar: tree.row(rows_bar, {SWAPPED})", "test_adjoints",
    ),
    # An order off by one.
    "the order of the controller": Mutation(
        "stepping/integrator.py", "state.history, self.method.error_order + 1)",
        "state.history, self.method.error_order + 0)", "test_solve test_fuzz",
    ),
    "the order of the first step": Mutation(
        "stepping/integrator.py", "integrator.method.error_order + 1, integrator.tolerated(y0)",
        "integrator.method.error_order, integrator.tolerated(y0)", "test_solve test_fuzz",
    ),
    # A term missing in the vjp of a step.
    "a step without the cotangents of its rows": Mutation(
        "kernels/stepper.py", BACK + "by",
        BACK_WITHOUT_ROWS + "by",
        "test_adjoints test_stiff",
    ),
    "the same by stages": Mutation(
        "kernels/stepper.py", BACK + "at",
        BACK_WITHOUT_ROWS + "at",
        "test_adjoints test_stages",
    ),
    "a step without the cotangent of the next slope": Mutation(
        "kernels/stages.py", "jax.tree.map(jnp.add, slope_bar(i, ys_bar), at_last(ends[1]))",
        "slope_bar(i, ys_bar)",
        "test_adjoints test_stages",
    ),
    "parameters of the last step alone": Mutation(
        "kernels/stepper.py", "f_bar = jax.tree.map(jnp.add, carry.f, f_bar)", "f_bar = f_bar", "test_stiff",
    ),
    "the start without the cotangent of its slope": Mutation(
        "adjoints/ends.py", "jax.tree.map(lambda *y: sum(y), carry.y, y_more, y0_bar)",
        "jax.tree.map(lambda *y: sum(y), carry.y, y0_bar)", "test_adjoints",
    ),
    "a quadrature of backsolve with one node": Mutation(
        "adjoints/backsolve.py", "count = -(-(self.backwards.method.order + 1) // 2)",
        "count = 1", "test_adjoints"
    ),
    "sums over a batch of its first solve": Mutation(
        "batch/vmap_rules.py", "x_bar if flag else jnp.sum(x_bar, axis=0)", "x_bar if flag else x_bar[0]",
        "test_lanes test_fuzz",
    ),
    "sensitivities that begin at 0": Mutation(
        "adjoints/sensitivities.py", "one[first : first + one.shape[1]] = np.eye(one.shape[1])",
        "one[first : first + one.shape[1]] = np.eye(one.shape[1], k=1)", "test_sensitivities",
    ),
    # What is iterated, and when.
    "Newton's method stopped after one iteration": Mutation(
        "methods/newton.py", "return (count < iterations) &", "return (count < 1) &", "test_esdirk test_stiff"
    ),
    "stages of a Rosenbrock method at the start of the step": Mutation(
        "methods/rosenbrock.py", "k = field(yi, s + tree.scale(c, h))\n            right = tree.scale(h, k)",
        "k = field(yi, s)\n            right = tree.scale(h, k)", "test_stiff",
    ),
    "no derivative of time in a Rosenbrock step": Mutation(
        "methods/rosenbrock.py", "if of_time is not None and d:",
        "if of_time is not None and d and h is None:", "test_stiff"
    ),
    "a failed solve with a gradient": Mutation(
        "adjoints/failed.py", "failed & (x != 0)", "failed & (x > 0)", "test_failures test_fuzz"
    ),
    "a lane that takes the problem after the next": Mutation(
        "batch/queue.py", "return lanes, who, rows, ends, head + 1", "return lanes, who, rows, ends, head + 2",
        "test_lanes",
    ),
}  # fmt: skip


def copied(folder: Path) -> Path:
    """The repository, but for what tests do not need."""
    there = folder / "copy"
    shutil.copytree(ROOT, there, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return there


def tests_pass(copy: Path, tests: str) -> bool:
    """Whether these test files pass; they stop at the first failure."""
    files = [f"tests/{name}.py" for name in tests.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:xdist", *files]
    env = {**os.environ, "PYTHONPATH": str(copy)}
    quiet = subprocess.DEVNULL
    try:
        ended = subprocess.run(
            command, cwd=copy, env=env, stdout=quiet, stderr=quiet, timeout=LONGEST
        )
    except subprocess.TimeoutExpired:
        return False
    return ended.returncode == 0


def survives(copy: Path, mutation: Mutation) -> bool:
    """Whether no test sees the fault."""
    file = copy / "jaxode" / mutation.file
    text = file.read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(
            f"{mutation.file} has {mutation.old!r} {text.count(mutation.old)} times, not once."
        )
    file.write_text(text.replace(mutation.old, mutation.new))
    try:
        return all(tests_pass(copy, test) for test in mutation.tests.split())
    finally:
        file.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="these faults alone")
    parser.add_argument(
        "--no-control", action="store_true", help="believe that the tests pass without faults"
    )
    given = parser.parse_args()
    chosen = {name: MUTATIONS[name] for name in given.names or MUTATIONS}
    with tempfile.TemporaryDirectory() as folder:
        copy, alive = copied(Path(folder)), []
        tests = sorted({test for mutation in chosen.values() for test in mutation.tests.split()})
        if not given.no_control and not tests_pass(copy, " ".join(tests)):
            print("The tests fail without any fault: their score would mean nothing.")
            return 1
        for name, mutation in chosen.items():
            began = time.monotonic()
            if survives(copy, mutation):
                alive.append(name)
            verdict = "SURVIVES" if name in alive[-1:] else "killed"
            print(f"{verdict:9} {time.monotonic() - began:5.0f} s  {name}", flush=True)
        print(f"\n{len(chosen) - len(alive)} of {len(chosen)} faults are seen by the tests")
        return bool(alive)


if __name__ == "__main__":
    sys.exit(main())
