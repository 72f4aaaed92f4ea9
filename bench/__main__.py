"""The core questions of speed, every peer in the same run: `python -m bench`.

Each row solves the same problem with the same method, order and tolerance, is checked against a
reference before it is timed, and is reported as a ratio of warm medians taken in turn. The table is
printed, and written to bench/results.json and, between two marks, into bench/README.md; the rows of FRONT
into README.md.

`python -m bench single lanes` runs two of the groups, and `python -m bench everyday --rows Lorenz` some
works of one: those are printed, and written nowhere but to the file that --save names. `--quick` is
one round of each of the works of `bench.everyday`. `--list` names the groups.

All groups take an hour. Each that is done is kept in runs/bench.json: a run that was interrupted goes on
after it, if nothing has changed in between (`--fresh` begins anew).
"""

import argparse
import hashlib
import json
import os
import platform
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.experimental.ode import odeint as jax_odeint
from scipy.integrate import solve_ivp

import jaxode
from bench.ensembles import ensemble_rows
from bench.events import event_rows
from bench.everyday import WORKS, cold_rows, eager_rows, work_rows
from bench.peers import OPTIONAL
from bench.shards import shard_rows
from bench.stiff import stiff_rows
from bench.timing import check, compile_in_turn, row, time_in_turn
from jaxode.nn import MLPField
from jaxode.problems import problems
from jaxode.run_folder import put

HERE = Path(__file__).parent
DONE = HERE.parent / "runs" / "bench.json"
PEERS = {
    "diffrax": "diffrax takes",
    "jax": "jax.experimental.ode",
    "scipy": "scipy RK45",
    "LSODA": "scipy LSODA",
    "Radau": "scipy Radau",
    "BDF": "scipy BDF",
    "CVODE": "CVODE",
    "IDA": "IDA",
    "plain vmap": "a plain vmap",
    "C": "C",
    "tinydiffeq": "tinydiffeq",
    "gradsolve": "gradsolve, steps given",
    "torchdiffeq": "torchdiffeq",
    "torchode": "torchode",
}
# What the front page shows: each shape of work, ours and theirs; the last rows are those that we lose.
FRONT = """\
Lotka-Volterra fit, 20 observations, gradient
Lorenz, 101 outputs, forward
Lorenz, 101 outputs, gradient
Hodgkin-Huxley, 501 outputs, gradient
6 compartments by `.at[i].set`, gradient
batch of 8 Lorenz, gradient
batch of 1,024 Lorenz, 101 outputs, gradient
SIR in 12 groups, 256 of them, gradient
Gray-Scott on 64 x 64, 11 outputs, gradient
neural ODE, 128 samples as one state, gradient
MLP of width 512, gradient
CNF, 256 points, exact trace, training step
HIRES, error 1e-5, forward
HIRES, gradient
1,000 of Robertson to 40, gradient
a ball, 20 bounces, gradient
8 patients with doses of their own, value and gradient
1,000 balls, 20 bounces, forward
Lorenz, 101 outputs, gradient: trace + compile
HIRES, gradient: trace + compile
neural ODE, 128 samples as one state, gradient: trace + compile
Gray-Scott on 64 x 64, 11 outputs, forward: trace + compile
eager odeint of a function, hundredth call""".splitlines()
FRONT_PEERS = "diffrax", "jax", "LSODA"
EVERYDAY = {
    **{group: partial(work_rows, group) for group in WORKS},
    "cold": cold_rows,
    "eager": eager_rows,
}


def lorenz(y, t=None, change=1.0):
    x, y, z = y
    return jnp.stack([10 * (y - x), x * (change * 28 - z) - y, x * y - 8 / 3 * z])


def with_diffrax(f, y0, t1, tolerance, ts=None):
    saveat = diffrax.SaveAt(t1=True) if ts is None else diffrax.SaveAt(ts=ts)
    controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)
    term = diffrax.ODETerm(lambda t, y, args: f(y, t))
    dtype = jnp.result_type(*jax.tree.leaves(y0))
    t0, t1 = jnp.zeros((), dtype), jnp.asarray(t1, dtype)  # else it computes in float64
    return diffrax.diffeqsolve(
        term, diffrax.Dopri5(), t0, t1, None, y0, saveat=saveat, stepsize_controller=controller
    ).ys


def lorenz_numpy(t, y):
    x, y, z = y
    return 10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z


def with_scipy(f, t1, tolerance):
    """solve_ivp with the same method, and with LSODA; f is in plain Python."""

    def solve(method):
        options = dict(rtol=tolerance, atol=tolerance, method=method)
        return lambda y0: solve_ivp(f, (0.0, t1), np.asarray(y0), **options).y[:, -1]

    return {"scipy": solve("RK45"), "LSODA": solve("LSODA")}


def warm_up():
    """Compile something else with each library first: its own start-up is not what is compared."""
    decay = lambda y, t=None: -y
    for solve in (
        lambda y0: jaxode.odeint(decay, y0, [0.0, 1.0], method="dopri5")[-1],
        lambda y0: with_diffrax(decay, y0, 1.0, 1e-6)[-1],
        lambda y0: jax_odeint(decay, y0, jnp.array([0.0, 1.0]))[-1],
    ):
        jax.jit(solve).lower(jnp.ones(2)).compile()
        jax.jit(jax.grad(lambda y0, solve=solve: solve(y0).sum())).lower(jnp.ones(2)).compile()


def lorenz_rows():
    y0, tolerance = jnp.array([1.0, 1.0, 1.0]), 1e-6
    options = dict(rtol=tolerance, atol=tolerance)

    def ends(change=1.0):
        field = lambda y, t=None: lorenz(y, t, change)
        return {
            "jaxode": lambda y0: jaxode.odeint(field, y0, [0.0, 10.0], method="dopri5", **options)[
                -1
            ],
            "diffrax": lambda y0: with_diffrax(field, y0, 10.0, tolerance)[-1],
            "jax": lambda y0: jax_odeint(field, y0, jnp.array([0.0, 10.0]), **options)[-1],
        }

    compiled, compile_seconds = compile_in_turn(ends, y0)
    exact = jaxode.odeint(lorenz, y0, [0.0, 10.0], rtol=1e-13, atol=1e-13, method="dop853")[-1]
    check(compiled, (y0,), exact, 1e-3)
    seconds = time_in_turn(compiled | with_scipy(lorenz_numpy, 10.0, tolerance), y0)
    yield row("Lorenz, forward", seconds, "ms")
    yield row("Lorenz, forward: trace + compile", compile_seconds, "s")

    # The backward solve of jax.experimental.ode does not come back from this chaotic problem.
    grads = lambda change: {
        n: jax.grad(lambda y0, f=f: f(y0).sum()) for n, f in ends(change).items() if n != "jax"
    }
    compiled, compile_seconds = compile_in_turn(grads, y0)
    loss = lambda y0: jaxode.odeint(
        lorenz, y0, [0.0, 10.0], rtol=1e-12, atol=1e-12, method="dop853"
    )[-1].sum()
    check(compiled, (y0,), jax.grad(loss)(y0), 1e-2)
    gradient = time_in_turn(compiled, y0)
    yield row("Lorenz, gradient", gradient, "ms")
    yield row("Lorenz, gradient: trace + compile", compile_seconds, "s")
    over = {"jaxode": gradient["jaxode"] / seconds["jaxode"]}
    yield row("Lorenz, gradient over forward", over, "times")


def classic_rows():
    for name, shown_as in (("van_der_pol", "van der Pol"), ("pleiades", "Pleiades")):
        p = problems[name]
        field = lambda y, t=None, p=p: p.f(y, t, *p.args)
        yield from problem_rows(shown_as, field, jnp.asarray(p.y0), p.t1, 1e-8, p.answer())
    heat = lambda y, t=None: 100 * (jnp.roll(y, 1) - 2 * y + jnp.roll(y, -1)) + jnp.sin(y)
    y0 = jnp.sin(jnp.arange(1000.0))
    yield from problem_rows("heat on 1,000 points", heat, y0, 0.3, 1e-6)


def problem_rows(shown_as, field, y0, t1, tolerance, answer=None):
    """A problem, forward and gradient."""
    options = dict(rtol=tolerance, atol=tolerance)
    ends = {
        "jaxode": lambda y0: jaxode.odeint(field, y0, [0.0, t1], method="dopri5", **options)[-1],
        "diffrax": lambda y0: with_diffrax(field, y0, t1, tolerance)[-1],
        "jax": lambda y0: jax_odeint(field, y0, jnp.array([0.0, t1]), **options)[-1],
    }
    exact = lambda y0: jaxode.odeint(
        field, y0, [0.0, t1], rtol=1e-12, atol=1e-12, method="dop853", max_steps=2**17
    )[-1]
    compiled, _ = compile_in_turn(lambda _: ends, y0, rounds=1)
    check(compiled, (y0,), exact(y0) if answer is None else answer, 1e-2)
    yield row(f"{shown_as}, forward", time_in_turn(compiled, y0), "ms")
    # The backward solve of jax.experimental.ode is another problem, and may not come back.
    grads = {n: jax.grad(lambda y0, f=ends[n]: f(y0).sum()) for n in ("jaxode", "diffrax")}
    compiled, seconds = compile_in_turn(lambda _: grads, y0, rounds=1)
    check(compiled, (y0,), jax.grad(lambda y0: exact(y0).sum())(y0), 5e-2)
    yield row(f"{shown_as}, gradient", time_in_turn(compiled, y0), "ms")
    yield row(f"{shown_as}, gradient: trace + compile", seconds, "s")


def network(width, change=1.0):
    """Solves of an MLP field by each library, as functions of (weights, y0); and these two."""
    mlp = eqx.nn.MLP(64, 64, width, 2, jnp.tanh, dtype=jnp.float32, key=jax.random.key(0))
    weights, static = eqx.partition(mlp, eqx.is_array)
    y0 = jax.random.normal(jax.random.key(1), (256, 64), jnp.float32)
    options, t = dict(rtol=1e-3, atol=1e-3), np.array([0.0, 3.0], np.float32)

    def field(weights):
        mlp = eqx.combine(weights, static)
        return lambda y, t: change * jax.vmap(mlp)(y)

    solves = {
        "jaxode": lambda w, y0: jaxode.odeint(field(w), y0, t, method="dopri5", **options)[-1],
        "diffrax": lambda w, y0: with_diffrax(field(w), y0, 3.0, 1e-3)[-1],
        "jax": lambda w, y0: jax_odeint(
            lambda y, t, w: field(w)(y, t), y0, jnp.asarray(t), w, **options
        )[-1],
    }
    return solves, (weights, y0), field


def squared(solves):
    """Gradients with respect to the weights, of the mean square."""
    return {n: jax.grad(lambda w, y0, f=f: (f(w, y0) ** 2).mean()) for n, f in solves.items()}


def mlp_rows():
    _, (weights, y0), field = network(128)
    compiled, _ = compile_in_turn(lambda change: network(128, change)[0], weights, y0)
    check(compiled, (weights, y0), compiled["diffrax"](weights, y0), 5e-2)
    count = jaxode.solve(
        field(weights), y0, np.array([0.0, 3.0], np.float32), method="dopri5", rtol=1e-3, atol=1e-3
    ).stats.evaluations
    bare = lambda w, y: jax.lax.fori_loop(
        0, int(count), lambda _, y: y + 1e-3 * field(w)(y, 0.0), y
    )
    programs = compiled | {"bare": jax.jit(bare).lower(weights, y0).compile()}
    seconds = time_in_turn(programs, weights, y0)
    over = {"jaxode": seconds["jaxode"] / seconds.pop("bare")}
    yield row("MLP 64-128-128-64, batch 256, forward", seconds, "ms")
    yield row("MLP, forward over its evaluations alone, in a loop", over, "times")
    gradients = lambda change: squared(network(128, change)[0])
    compiled, compile_seconds = compile_in_turn(gradients, weights, y0)
    check(compiled, (weights, y0), compiled["diffrax"](weights, y0), 5e-2)
    gradient = time_in_turn(compiled, weights, y0)
    yield row("MLP, gradient", gradient, "ms")
    yield row("MLP, gradient: trace + compile", compile_seconds, "s")
    over = {"jaxode": gradient["jaxode"] / seconds["jaxode"]}
    yield row("MLP, gradient over forward", over, "times")
    for width in (16, 512):
        solves, args, _ = network(width)
        gradients = squared(solves)
        compiled, _ = compile_in_turn(lambda _, g=gradients: g, *args, rounds=1)
        check(compiled, args, compiled["diffrax"](*args), 5e-2)
        yield row(f"MLP of width {width}, gradient", time_in_turn(compiled, *args, rounds=9), "ms")


def flow_rows():
    """A training step of a continuous normalizing flow: exact trace, 256 points, and Adam."""
    field = MLPField(2, width=64, dtype=jnp.float32, key=jax.random.key(0))
    weights, structure = jax.tree.flatten(field)
    x = jax.random.normal(jax.random.key(1), (256, 2), jnp.float32)
    start, optimiser, tolerance = (x, jnp.zeros(256, jnp.float32)), optax.adam(1e-3), 1e-4
    options = dict(rtol=tolerance, atol=tolerance)

    def with_trace(weights):
        field = jax.tree.unflatten(structure, weights)

        def one(x, t):
            return field(x, t), -jnp.trace(jax.jacfwd(field)(x, t))

        return lambda state, t=None: jax.vmap(one, (0, None))(state[0], t)

    solves = {
        "jaxode": lambda f, s: jaxode.odeint(f, s, [0.0, 1.0], method="dopri5", **options),
        "diffrax": lambda f, s: with_diffrax(f, s, 1.0, tolerance),
        "jax": None,
    }

    def step(name, weights, slots):
        def loss(weights):
            if name == "jax":
                ends = jax_odeint(
                    lambda s, t, w: with_trace(w)(s, t), start, jnp.array([0.0, 1.0], jnp.float32),
                    weights, **options,
                )  # fmt: skip
            else:
                ends = solves[name](with_trace(weights), start)
            z, change = jax.tree.map(lambda x: x[-1], ends)
            return jnp.mean(jnp.sum(z**2, -1) / 2 + change)

        updates, slots = optimiser.update(jax.grad(loss)(weights), slots)
        return optax.apply_updates(weights, updates), slots

    fns = {name: partial(step, name) for name in solves}
    args = weights, optimiser.init(weights)
    compiled, seconds = compile_in_turn(lambda _: fns, *args, rounds=1)
    check(compiled, args, compiled["diffrax"](*args), 1e-2)
    yield row("CNF, 256 points, exact trace, training step", time_in_turn(compiled, *args), "ms")
    yield row("CNF, training step: trace + compile", seconds, "s")


def output_rows():
    y0 = jnp.linspace(0.5, 1.5, 64)
    weights = jax.random.normal(jax.random.key(0), (64, 64)) / 8
    field = lambda y, t: jnp.tanh(weights @ y)
    times = {}
    for library in ("jaxode", "jax"):
        solve = jaxode.odeint if library == "jaxode" else jax_odeint
        grads = {
            n: jax.grad(
                lambda y0, n=n, solve=solve: solve(
                    field, y0, jnp.linspace(0, 5, n), rtol=1e-6, atol=1e-6
                )[-1].sum()
            )
            for n in (2, 101)
        }
        compiled, _ = compile_in_turn(lambda _, grads=grads: grads, y0, rounds=1)
        seconds = time_in_turn(compiled, y0)
        times[library] = seconds[101] / seconds[2]
    yield row("gradient, 101 outputs over 2 outputs", times, "times")


def memory_rows():
    y0, field = jnp.ones(2000), lambda y, t: jnp.tanh(y)
    for adjoint in ("backsolve", "reversible", "replay"):
        used = []
        for steps in (100, 10_000):
            loss = lambda y0, steps=steps, adjoint=adjoint: jaxode.odeint(
                field, y0, [0.0, 1.0], method="rk4", dt=1 / steps, adjoint=adjoint
            )[-1].sum()
            compiled = jax.jit(jax.grad(loss)).lower(y0).compile()
            used.append(compiled.memory_analysis().temp_size_in_bytes)
        over = {"jaxode": used[1] / used[0]}
        yield row(f"gradient memory, 10,000 steps over 100, {adjoint}", over, "times")


def times(ratio) -> str:
    """With two digits at least, also where we lose."""
    return f"{ratio:.2f}" if ratio < 1 else f"{ratio:.1f}"


def shown(result, names=tuple(PEERS)) -> list[str]:
    """A line of the table: our time with its spread, and how many times longer each peer takes."""
    scale = {"ms": 1e3, "s": 1.0, "times": 1.0}[result["unit"]]
    ours = result["seconds"]["jaxode"]
    digits = {"ms": ".3g", "s": ".2f", "times": ".2f"}[result["unit"]]
    peers = [
        "" if name not in result["seconds"]
        else f"{times(result['seconds'][name] / ours)}x" if result["unit"] != "times"
        else f"{result['seconds'][name]:.1f} times"
        for name in names
    ]  # fmt: skip
    spread = result["spread"].get("jaxode")
    spread = "" if spread is None else f" ± {100 * spread:.0f} %"
    return [result["work"], f"{ours * scale:{digits}} {result['unit']}{spread}", *peers]


def table(results, names=tuple(PEERS)) -> str:
    head = ["work", "jaxode", *(PEERS[name] for name in names)]
    lines = [head, ["---"] * len(head), *(shown(result, names) for result in results)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(results) -> None:
    """How many times as long as jaxode each peer takes, a row of dots for every line of the table.

    Running on the left, compilation on the right.
    """
    compared = [r for r in results if r["unit"] != "times" and len(r["seconds"]) > 1][::-1]
    sides = [[r for r in compared if ("compile" in r["work"]) == side] for side in (False, True)]
    height = 0.26 * max(map(len, sides)) + 1.6
    figure, axes = plt.subplots(1, 2, figsize=(19, height), layout="constrained")
    colors = plt.get_cmap("tab20").colors  # strong and pale ones in turn
    colors = [*colors[::2], *colors[1::2]]
    for axis, rows in zip(axes, sides):
        for i, (marker, name) in enumerate(zip("osD^v<>PX*dhp8", PEERS, strict=True)):
            ratio = lambda r, name=name: r["seconds"][name] / r["seconds"]["jaxode"]
            points = [(ratio(r), y) for y, r in enumerate(rows) if name in r["seconds"]]
            if points:
                label = PEERS[name].removesuffix(" takes")
                axis.plot(*zip(*points), marker, color=colors[i], label=label, ms=6)
        axis.axvline(1, color="#444444", lw=1)
        axis.set(xscale="log", xlabel="times as long as jaxode (more is better)")
        axis.set_yticks(range(len(rows)), [r["work"] for r in rows])
        axis.set_ylim(-1, len(rows))
        axis.grid(axis="y", color="#dddddd")
    handles, labels = axes[0].get_legend_handles_labels()
    columns = -(-len(labels) // 2)  # in one row those of all the peers would be cut off
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)
    figure.savefig(HERE / "results.png", dpi=100)
    plt.close(figure)


def versions() -> str:
    names = ["jaxode", "jax", "diffrax", "equinox", "scipy"]
    for name in (*OPTIONAL, "scikit-sundae"):  # of which the module is sksundae
        try:
            version(name)
            names.append(name)
        except PackageNotFoundError:
            pass
    return (
        ", ".join(f"{n} {version(n)}" for n in names)
        + f", {platform.machine()}, "
        + f"{jax.devices()[0].platform} ({len(os.sched_getaffinity(0))} cores), "
        + f"Python {platform.python_version()}"
    )


def write(written) -> None:
    """The tables, between their two marks, and the figure, of what results.json holds."""
    results, runs = written["results"], written["cold_runs"]
    how = "Warm medians in one run, ± half of the range between the quartiles; compilation: medians of three"
    how += f", and of the everyday works medians of {runs}, each in a fresh process"
    how += f": {written['versions']}."
    named = {result["work"]: result for result in results}
    front = table([named[work] for work in FRONT], FRONT_PEERS)
    for path, text in (
        (HERE.parent / "README.md", front),
        (HERE / "README.md", f"{table(results)}\n\n{how}"),
    ):
        before, rest = path.read_text().split("<!-- bench -->\n")
        _, after = rest.split("<!-- /bench -->")
        path.write_text(f"{before}<!-- bench -->\n{text}\n<!-- /bench -->{after}")
    draw(results)


STUDIES = {
    "lorenz": lorenz_rows,
    "classic": classic_rows,
    "mlp": mlp_rows,
    "flow": flow_rows,
    "outputs": output_rows,
    "memory": memory_rows,
    "ensembles": ensemble_rows,
    "shards": shard_rows,
    "stiff": stiff_rows,
    "events": event_rows,
    **EVERYDAY,
}


def parsed():
    parser = argparse.ArgumentParser("python -m bench", description=__doc__.partition("\n")[0])
    choices = [*STUDIES, "everyday"]
    say = parser.add_argument
    say("names", nargs="*", metavar="NAME", help="groups of rows: " + ", ".join(choices))
    say("--only", nargs="+", default=[], metavar="NAME", help="the same")
    say("--rows", default="", metavar="TEXT", help="everyday works whose names contain it")
    say("--quick", action="store_true", help="one round of each everyday work")
    say("--cold-runs", type=int, default=1, help="processes for each time to compile (default: 1)")
    say("--fresh", action="store_true", help="do not go on with an interrupted run of all groups")
    say("--save", type=Path, help="a file for the results of some groups")
    say("--list", action="store_true", help="name the groups, and everyday works")
    options = parser.parse_args()
    options.names += options.only
    unknown = set(options.names) - set(choices)
    if unknown:
        parser.error(f"no such group: {', '.join(sorted(unknown))}; there are {', '.join(choices)}")
    return options


def chosen(options):
    """The groups to run, by name: all, unless some were named."""
    names = options.names
    if "everyday" in names or (options.rows and not names):
        names = [n for n in names if n != "everyday"] + [n for n in EVERYDAY if n not in names]
    for name in names or STUDIES:
        rows = STUDIES[name]
        if name in EVERYDAY:
            rows = partial(rows, only=options.rows, quick=options.quick)
        if name == "cold":
            rows = partial(rows, runs=options.cold_runs)
        yield name, rows


def conditions(options) -> dict:
    """What must be the same for rows to be those of one run."""
    code = hashlib.sha256()
    for path in sorted([*Path(jaxode.__file__).parent.rglob("*.py"), *HERE.glob("*.py")]):
        code.update(path.read_bytes())
    return {"versions": versions(), "cold_runs": options.cold_runs, "code": code.hexdigest()}


def done_before(now: dict) -> dict[str, list]:
    """The rows of the groups that an interrupted run has finished, under the conditions of now."""
    if not DONE.exists():
        return {}
    kept = json.loads(DONE.read_text())
    if kept["conditions"] != now:
        print(f"What {DONE} holds is of other code or versions: all groups run.", flush=True)
        return {}
    return kept["groups"]


def run(groups, done: dict[str, list], keep) -> list:
    """The rows of all groups, printed; `keep` is told of each group that is done."""
    for name, rows in groups:
        found = []
        for result in done.get(name) or rows():
            found.append(result)
            work, ours, *cells = shown(result)
            peers = [f"{peer} {cell}" for peer, cell in zip(PEERS, cells) if cell]
            print(f"{work:60s}  {ours:>18s}  " + ", ".join(peers), flush=True)
        if name not in done:
            done[name] = found
            keep()
    return [result for rows in done.values() for result in rows]


def main():
    options = parsed()
    if options.list:
        for name in STUDIES:
            print(name, *(f"    {work}" for work in WORKS.get(name, ())), sep="\n")
        return
    everything = not options.names and not options.rows and not options.quick
    jax.config.update("jax_enable_x64", True)
    began = conditions(options)  # not those at the end of a group: the code may be edited meanwhile
    done = done_before(began) if everything and not options.fresh else {}
    warm_up()

    def keep():
        if everything:
            DONE.parent.mkdir(exist_ok=True)
            put(DONE, json.dumps({"conditions": began, "groups": done}).encode())

    results = run(chosen(options), done, keep)
    written = {"versions": versions(), "cold_runs": options.cold_runs, "results": results}
    text = json.dumps(written, indent=1)
    if options.save:
        options.save.write_text(text)
    if everything:
        (HERE / "results.json").write_text(text)
        write(written)
        DONE.unlink()


if __name__ == "__main__":
    main()
