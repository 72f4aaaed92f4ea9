"""What an experiment is: settings that are its options, a folder that resumes, a table, claims.

An experiment is a module with a `Settings` (a frozen dataclass of `option`s) and a function
`run(settings, folder, progress) -> Results`; its docstring is its help. The command line and the
tests find all that they need there.
"""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

from jaxode import run_folder, train

STYLE: Any = {
    "font.size": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 14,
    "axes.prop_cycle": plt.cycler(
        color=["#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#999999"]
    ),
    "figure.constrained_layout.use": True,
    "figure.dpi": 80,  # in a notebook, which holds its pictures
    "figure.facecolor": "white",  # on dark pages, too
    "legend.frameon": False,
    "lines.linewidth": 2.2,
    "savefig.bbox": "tight",
    "savefig.dpi": 120,
}


def option(
    default, help: str, *, quick=None, full=None, low=None, high=None, choices=None, words=None
):
    """A field of settings: its default, its values with --quick and --full, and its range.

    With `words`, a string is a list with commas: of those words, or of whole numbers if that is int.
    """
    metadata = dict(
        help=help, quick=quick, full=full, low=low, high=high, choices=choices, words=words
    )
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of an experiment; a folder holds runs of one of these.

    >>> import dataclasses
    >>> @dataclasses.dataclass(frozen=True)
    ... class Settings(Options):
    ...     steps: int = option(1000, "Steps of training.", quick=10, full=100_000, low=1)
    >>> Settings.at("quick"), Settings.at("default", steps=7)
    (Settings(seed=0, steps=10), Settings(seed=0, steps=7))
    """

    seed: int = option(0, "Of weights, data and noise.", low=0)

    def __post_init__(self):
        for f in dataclasses.fields(self):
            words = f.metadata["words"]
            known = "whole numbers" if words is int else ", ".join(words or ())
            for word in self.listed(f.name) if words else ():
                if not (word.isdecimal() if words is int else word in known.split(", ")):
                    raise ValueError(f"--{f.name} is a list of {known} with commas; got {word!r}.")

    def listed(self, name: str) -> list[str]:
        """The parts of an option that is a list."""
        return getattr(self, name).split(",")

    @classmethod
    def at(cls, scale: str = "default", **given):
        """The settings at "quick", "default" or "full" scale, but for those given."""
        scaled = {
            f.name: f.metadata[scale]
            for f in dataclasses.fields(cls)
            if scale != "default" and f.metadata.get(scale) is not None
        }
        return cls(**{**scaled, **given})


@dataclasses.dataclass(frozen=True)
class Results:
    """What an experiment found: rows of its table, claims that hold or do not, and what else it has.

    `notes` say how to read the table.
    """

    rows: list[dict[str, Any]]
    claims: dict[str, bool]
    notes: str = ""
    more: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    def __str__(self) -> str:
        marks = [f"[{'yes' if held else 'NO '}] {claim}" for claim, held in self.claims.items()]
        parts = [aligned(self.rows), self.notes, *marks, f"{self.seconds:.0f} s in all"]
        return "\n".join(part for part in parts if part)


def carry_out(experiment, settings, folder: str | Path, *, fresh=False, progress=True) -> Results:
    """Run an experiment in a folder; what is done there already is not done again.

    Raises:
        ValueError: the folder holds another experiment, or one with other settings; it is in use, or
            cannot be made.
    """
    began, folder = time.perf_counter(), Path(folder)
    with run_folder.held(folder):
        prepare(folder, experiment.__name__.rpartition(".")[-1], settings, fresh)
        with plt.rc_context(STYLE):
            results = experiment.run(settings, folder, progress)
        results = dataclasses.replace(results, seconds=time.perf_counter() - began)
        written = {"settings": dataclasses.asdict(settings), **dataclasses.asdict(results)}
        put_json(folder / "results.json", written)
    return results


def put_json(path: Path, content: dict) -> None:
    """Write a file of JSON, all at once."""
    run_folder.put(path, (json.dumps(content, indent=2, default=float) + "\n").encode())


def prepare(folder: Path, experiment: str, settings, fresh: bool) -> None:
    """See that the folder is empty, or holds a run of this experiment with these settings."""
    path = folder / "settings.json"
    wanted = json.loads(json.dumps({"experiment": experiment, **dataclasses.asdict(settings)}))
    if fresh and path.exists():
        for child in folder.iterdir():
            if child.is_dir():
                shutil.rmtree(child)
            elif child.name != run_folder.LOCK:
                child.unlink()
    elif path.exists():
        check_settings(path, wanted)
    put_json(path, wanted)


def check_settings(path: Path, wanted: dict) -> None:
    """See that the settings in a file are those that are wanted.

    Raises:
        ValueError: they are not, or the file is damaged.
    """
    remedy = "choose another --out, or start over with --fresh."
    try:
        found = {"experiment": wanted["experiment"], **json.loads(path.read_text())}
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged: remove it, if {path.parent} is of the same settings as now, to go on "
            f"with what is there; or {remedy}"
        ) from error
    if found["experiment"] != wanted["experiment"]:
        raise ValueError(
            f"{path.parent} holds a run of `jaxode {found['experiment'].replace('_', '-')}`: {remedy}"
        )
    if found != wanted:
        names = [k for k in {**wanted, **found} if found.get(k) != wanted.get(k)]
        value = lambda settings, k: settings.get(k, "not there")
        other = ", ".join(f"{k} = {value(found, k)}, now {value(wanted, k)}" for k in names)
        raise ValueError(f"{path.parent} holds a run with other settings ({other}): {remedy}")


def fitted(
    model, loss, batches, steps: int, *, seed, folder, label, progress, rate, last, clip=None,
    parts=10, evaluate=None,
):  # fmt: skip
    """The model after training by `adam`, and the history; checkpoints and evaluations come `parts` times."""
    optimiser = adam(steps, rate, last, clip)
    state, history = train.fit(
        loss, optimiser, train.start(model, optimiser, jax.random.key(seed)), batches, steps,
        folder=folder, every=max(1, steps // parts), evaluate=evaluate, label=label, progress=progress,
    )  # fmt: skip
    return state.model, history


def adam(steps: int, rate: float, last: float, clip: float | None = None):
    """Adam whose rate falls from `rate` to the fraction `last` of it as a cosine; gradients are clipped to
    the norm `clip`."""
    optimiser = optax.adam(optax.cosine_decay_schedule(rate, steps, last))
    if clip:
        optimiser = optax.chain(optax.clip_by_global_norm(clip), optimiser)
    return optax.flatten(optimiser)  # one vector of all weights: less to compile


def parameters(model) -> int:
    """The number of weights."""
    return sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))


def running_mean(values) -> np.ndarray:
    """The mean of the last fiftieth of a curve, at each point: fewer at its begin.

    >>> running_mean([1.0, 3.0])
    array([1., 3.])
    """
    width = max(1, len(values) // 50)
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - width, 0)
    return (total[end] - total[begin]) / (end - begin)


def save(figure, path: Path) -> None:
    """Write a figure, and forget it."""
    figure.savefig(path)
    plt.close(figure)


def aligned(rows: list[dict[str, Any]]) -> str:
    """Rows as a table of text: the first column to the left, numbers to the right.

    >>> print(aligned([{"network": "MLP", "error": "1.5 %"}, {"network": "ODE-Net", "error": ""}]))
    network  error
    MLP      1.5 %
    ODE-Net
    """
    head = list(rows[0])
    lines = [head, *([str(row.get(name, "")) for name in head] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(line, widths)))
        for line in lines
    )
