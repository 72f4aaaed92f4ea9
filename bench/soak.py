"""Random cases, for as long as one likes: `python -m bench.soak --minutes 60 --seed 0`.

| property | what a piece of work is |
|---|---|
| right | a random structure of solve and stack of transformations, against exact answers and derivatives |
| symmetries | the same solve in other units, directions, orders and parts, mostly to the last bit |
| breaks | solves of which some fail: NaN and a status, in rows and gradients; the others untouched |
| fields | a field of random operations, compiled in the library's forms, against one operation at a time |
| options | random options, right and wrong, together: a program, or a documented error |

Pieces of work run in child processes, some at a time, since a fault of compiled code ends a process, and a
process that has compiled much holds much memory. They are compiled with XLA's optimisations, as users do, and
without them, as the tests do, in turn. Ctrl-C ends a soak with its count. What failed is printed with the
command that does it again.
"""

import argparse
import collections
import json
import os
import random
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the generators of cases are the tests'
SHARES = {"right": 8, "symmetries": 3, "breaks": 2, "fields": 4, "options": 1}
GROUP = 6  # pieces of work a process
LONGEST = 3600.0  # seconds that a process may take
TWO_DEVICES = "--xla_force_host_platform_device_count=2"


class Outcome(NamedTuple):
    """Of a piece of work: how many cases, what they were, and what is wrong."""

    cases: int
    what: str
    failures: list[str]


# Pieces of work. Each imports what it needs, so that the parent process needs no JAX.


def tried(structure):
    """The structure; kept in case that it raises an error."""
    LAST[:] = [str(structure)]
    return structure


LAST: list[str] = []


def in_batches(rng, kind, random_one, batches: int) -> Outcome:
    """Some batches of cases of a random structure, through one program."""
    structure = tried(random_one(rng))
    program, wrong = kind(structure), []
    for _ in range(batches):
        wrong += program.failures(program.draw(rng))
    return Outcome(batches * structure.batch, str(structure), wrong)


def right(rng) -> Outcome:
    from random_programs import Program, random_structure

    return in_batches(rng, Program, random_structure, 20)


def symmetries(rng) -> Outcome:
    from random_symmetries import Symmetries, random_symmetric

    structure = tried(random_symmetric(rng))
    program = Symmetries(structure)
    wrong = program.failures(program.draw(rng), rng.choice([-40, -7, 3, 50]))
    return Outcome(structure.batch * 10, str(structure), wrong)


def breaks(rng) -> Outcome:
    from random_symmetries import Breaks, random_breaking

    return in_batches(rng, Breaks, random_breaking, 8)


def fields(rng) -> Outcome:
    import jax
    import numpy as np
    from one_call_cases import case_of, results

    name = f"seed:{rng.randrange(10**6)}"
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found, _, wanted, narrow = results(tried(case_of(name)))
    near, wrong = 1e-4 if narrow else 1e-9, []
    for x, y in zip(found, wanted, strict=True):
        if x.dtype != y.dtype or not np.allclose(x, y, rtol=near, atol=near, equal_nan=True):
            wrong.append(f"{x} where it should be {y}"[:1000])
    return Outcome(1, name, wrong)


def options(rng) -> Outcome:
    from random_options import attempt

    tried = [attempt(rng) for _ in range(20)]
    return Outcome(len(tried), "", [f"{what}: {wrong}" for what, wrong in tried if wrong])


WORK = {work.__name__: work for work in (right, symmetries, breaks, fields, options)}


def done(item: str) -> Outcome:
    """What came of a piece of work: it is named `property:number`, and depends on that alone."""
    from random_options import is_documented

    rng = random.Random(item)
    LAST.clear()
    try:
        return WORK[item.split(":")[0]](rng)
    except Exception as error:
        if is_documented(error):
            return Outcome(0, f"refused: {error}; {LAST}"[:900], [])
        text = "".join(traceback.format_exception(error, limit=-6))
        return Outcome(1, " ".join(LAST), [text])


def child(items: list[str], quick: bool) -> None:
    """Do pieces of work; say when each starts, and what came of it."""
    from compile_flags import QUICK

    os.environ["XLA_FLAGS"] = f"{QUICK if quick else ''} {TWO_DEVICES}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_traceback_filtering", "off")
    if quick:
        jax.config.update("jax_numpy_rank_promotion", "raise")
        jax.config.update("jax_numpy_dtype_promotion", "strict")
    for item in items:
        print(json.dumps(dict(starts=item)), flush=True)
        print(json.dumps(done(item)._asdict()), flush=True)
        jax.clear_caches()


# The soak.


class Count:
    """What was found so far, by property."""

    def __init__(self):
        self.programs, self.cases = collections.Counter(), collections.Counter()
        self.refused, self.failed = collections.Counter(), []

    def add(self, item: str, outcome: Outcome) -> None:
        kind = item.split(":")[0]
        self.programs[kind] += 1
        self.cases[kind] += outcome.cases
        self.refused[kind] += outcome.what.startswith("refused")
        if outcome.failures:
            self.failed.append((item, outcome))

    def __str__(self) -> str:
        lines = [f"{'property':12} {'programs':>9} {'cases':>9} {'refused':>9} {'failed':>9}"]
        failed = collections.Counter(item.split(":")[0] for item, _ in self.failed)
        for kind in SHARES:
            row = self.programs[kind], self.cases[kind], self.refused[kind], failed[kind]
            lines.append(f"{kind:12} " + " ".join(f"{n:9,}" for n in row))
        total = (
            *(sum(c.values()) for c in (self.programs, self.cases, self.refused)),
            len(self.failed),
        )
        return "\n".join([*lines, f"{'all':12} " + " ".join(f"{n:9,}" for n in total)])


def command(items, quick: bool) -> list[str]:
    return [sys.executable, "-m", "bench.soak", *(["--quick"] if quick else []), "--work", *items]


def said(item: str, outcome: Outcome, quick: bool) -> str:
    again = " ".join(["python", *command([item], quick)[1:]])
    return "\n".join([f"\nFAILED, again by: {again}", outcome.what, *outcome.failures[:4]])


def run_group(items: list[str], quick: bool, count: Count) -> None:
    """Some pieces of work in a process of their own."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command(items, quick), stdout=pipe, stderr=pipe, text=True, cwd=ROOT
    ) as process:
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.extend(process.stderr))  # type: ignore[arg-type]
        limit = threading.Timer(LONGEST, process.kill)
        reader.start()
        limit.start()
        item = None
        try:
            for line in process.stdout:  # type: ignore[union-attr]
                if not line.startswith("{"):
                    continue
                given = json.loads(line)
                if "starts" in given:
                    item = given["starts"]
                    continue
                finish(item, Outcome(**given), quick, count)
                item = None
        finally:
            limit.cancel()
            if sys.exc_info()[0] is not None:
                process.kill()
        process.wait()
        reader.join()
        if item is not None and process.returncode:
            text = f"the process ended with {process.returncode}: {''.join(errors)[-2000:]}"
            finish(item, Outcome(1, "", [text]), quick, count)


def finish(item, outcome: Outcome, quick: bool, count: Count) -> None:
    count.add(item, outcome)
    if outcome.failures:
        print(said(item, outcome, quick), flush=True)


def soak(minutes: float, seed: int, only: list[str]) -> Count:
    """Pieces of work in the order of their numbers, until the time is over, or Ctrl-C."""
    count, ends = Count(), time.monotonic() + 60 * minutes
    shares = {kind: share for kind, share in SHARES.items() if not only or kind in only}
    kinds, number, group = random.Random(seed), 0, 0
    try:
        while time.monotonic() < ends:
            chosen = kinds.choices([*shares], [*shares.values()], k=GROUP)
            items = [f"{kind}:{seed * 10**6 + number + i}" for i, kind in enumerate(chosen)]
            run_group(items, group % 3 != 2, count)
            number, group = number + GROUP, group + 1
            left = max(0.0, ends - time.monotonic()) / 60
            total = sum(count.cases.values())
            print(
                f"{total:,} cases, {len(count.failed)} failed, {left:.0f} minutes left", flush=True
            )
    except KeyboardInterrupt:
        print("interrupted")
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", nargs="*", default=[], choices=[*SHARES], help="these properties alone"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="compile as the tests do, with strict promotion (of --work)",
    )
    parser.add_argument("--work", nargs="*", help="these pieces of work alone, in this process")
    given = parser.parse_args()
    if given.work:
        child(given.work, given.quick)
        return 0
    count = soak(given.minutes, given.seed, given.only)
    print(f"\n{count}\n")
    for item, outcome in count.failed:
        print(f"failed: {item}: {outcome.failures[0][:200]}")
    return bool(count.failed)


if __name__ == "__main__":
    sys.exit(main())
