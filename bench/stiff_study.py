"""Work against precision on stiff problems: `python -m bench.studies stiff`.

Error at the end against CPU time, rtol from 1e-3 to 1e-10 and atol = rtol times the problem's scale, of our
implicit methods, diffrax's, SciPy's and SUNDIALS' CVODE (scikit-sundae, left out where it is not
installed). What is measured is kept after each method in bench/studies/stiff.json, and not measured
again: remove the file to begin anew. SciPy and CVODE call a Python function, which is their only
way; on HIRES, Robertson, the Oregonator and van der Pol it is plain Python, the fastest that they have.

Radau IIA of order 5 (as the code RADAU5: one real and one complex system of n equations an iteration, the
polynomial of the step before as the first guess, the filtered error estimate) was built, and is not worth its
place. November 2026, one core, milliseconds of it / of the better of rodas4p and rodas5p, at equal error:

| error | HIRES | Robertson to 1e11 | Oregonator | van der Pol, 1e6 |
|---|---|---|---|---|
| 1e-4 | 0.59 / 0.49 | 0.11 / 0.09 | 0.38 / 0.18 | 0.16 / 0.08 |
| 1e-6 | 1.8 / 1.0 | 0.17 / 0.13 | 0.49 / 0.31 | 0.22 / 0.14 |
| 1e-8 | 3.9 / 3.8 | 0.23 / 0.26 | 0.82 / 0.85 | 0.30 / 0.41 |
| 1e-10 | 9.4 / 10.2 | 0.35 / 0.62 | 1.8 / 1.9 | 0.65 / 1.4 |

A step takes 1.5 to 2 times as long; below 1e-8 there are half as many. On the banded Brusselator it takes half
the time with 40 states, but with 1,000 42 ms for an error of 3e-7, where rodas4p takes 24 for 2e-7; on the
ring modulator 5.2 s for 1e-4, where rodas5p takes 1.5 for 2e-5; on pollution twice the time. On E5 its step
size ran out at rtol 1e-4 (to 1e11) and at 1e-4 and 1e-6 (to 1e13). It compiles in up to twice the time.
"""

import json
import time
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from bench.peers import installed
from bench.stiff import (
    FORWARD,
    SCIPY,
    THEIRS,
    by_cvode,
    by_scipy,
    error,
    in_jax,
    ours,
    theirs,
    timed,
)
from jaxode.problems import problems

TOLERANCES = [10.0**-k for k in range(3, 11)]
OURS = ("rodas4", "rodas4p", "rodas5p", "kvaerno5", "kencarp4", "trbdf2")
CLASSICS = {
    "hires": "HIRES",
    "robertson_long": "Robertson to 1e11",
    "oregonator": "Oregonator",
    "van_der_pol_1e6": "van der Pol, 1e6",
}


def solver_of(name, label):
    """A function of a tolerance that gives the end of a problem."""
    p, (library, method) = problems[name], label.split()
    if library == "jaxode":
        return in_jax({"": ours(method, p, max_steps=2**15)}, p)[""]
    if library == "diffrax":
        return in_jax({"": theirs(THEIRS[method], p)}, p)[""]
    f = FORWARD[name][0]  # f(t, y) in plain Python
    return by_scipy(method, p, f) if library == "scipy" else by_cvode(p, f)


def labels():
    yield from (f"jaxode {m}" for m in OURS)
    yield from (f"diffrax {m}" for m in THEIRS)
    yield from (f"scipy {m}" for m in SCIPY)
    if installed("sksundae"):
        yield "CVODE BDF"


def points_of(name, label):
    """Pairs of an error and seconds, one for each tolerance that came to an end."""
    solve, points = solver_of(name, label), []
    for tolerance in TOLERANCES:
        began = time.process_time()
        try:
            off = error(problems[name], solve(tolerance))
        except Exception as failure:  # a library that gives up is left out at this tolerance
            print(f"{name}, {label} at {tolerance:.0e}: {str(failure)[:100]}", flush=True)
            continue
        if np.isfinite(off) and off < 1:
            seconds = time.process_time() - began
            if seconds < 0.2:  # what takes longer is not timed better by doing it again
                seconds = timed({"": partial(solve, tolerance)}, rounds=3, least=0.01)[""]
            points.append((max(off, 1e-16), seconds))
    return points


def stiff_work_precision(path):
    found = json.loads(path.read_text()) if path.exists() else {}
    work = [(name, label) for name in CLASSICS for label in labels()]
    for name, label in tqdm(work, desc="stiff"):
        lines = found.setdefault(name, {})
        if label not in lines:
            lines[label] = points_of(name, label)
            path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def draw_stiff(found, path):
    figure, axes = plt.subplots(2, 2, figsize=(15, 11), layout="constrained")
    styles = {"jaxode": "o-", "diffrax": "s:", "scipy": "^--", "CVODE": "D-."}
    every = list(dict.fromkeys(label for lines in found.values() for label in lines))
    colours = {label: plt.get_cmap("tab20")(i % 20) for i, label in enumerate(every)}
    for axis, (name, lines) in zip(axes.flat, found.items()):
        for label, points in lines.items():
            x, y = zip(*[(e, 1e3 * s) for e, s in points]) if points else ((), ())
            axis.loglog(
                x, y, styles[label.split()[0]], color=colours[label], label=label, ms=4, lw=1.3
            )
        axis.invert_xaxis()
        axis.set(title=CLASSICS[name], xlabel="error at the end", ylabel="CPU ms")
        axis.grid(color="#eeeeee")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=8, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def fastest(found, errors=(1e-3, 1e-5, 1e-7)):
    """Lines that say what wins where: of each problem and error the fastest of each library."""
    for name, lines in found.items():
        for target in errors:
            best = {}
            for label, points in lines.items():
                seconds = min((s for e, s in points if e <= target), default=None)
                library = label.split()[0]
                if seconds and seconds < best.get(library, (np.inf, ""))[0]:
                    best[library] = seconds, label
            said = ", ".join(f"{label} {1e3 * s:.3g} ms" for s, label in sorted(best.values()))
            yield f"{CLASSICS[name]}, error {target:.0e}: {said}"
