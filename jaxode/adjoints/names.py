"""Every adjoint, and what it can do: the errors and the README's table are made from these."""

from collections.abc import Callable
from typing import NamedTuple

from jaxode.adjoints.backsolve import backsolve
from jaxode.adjoints.direct import direct, forward
from jaxode.adjoints.replay import replay
from jaxode.adjoints.reversible import reversible


class Adjoint(NamedTuple):
    """A way to differentiate a solve: `differentiate(integrator, f, y0, ss) -> (ys, report)`.

    `gradient`, `memory` and `modes` say in words what it is; `reverse` and `forward` whether it
    has these derivatives.
    """

    differentiate: Callable
    gradient: str
    memory: str
    modes: str
    reverse: bool
    forward: bool


adjoints: dict[str, Adjoint] = {
    "replay": Adjoint(
        replay,
        "exact for the steps that were taken",
        "states at about 2 sqrt(`max_steps`) places",
        "reverse; forward or reverse over it",
        reverse=True,
        forward=False,
    ),
    "backsolve": Adjoint(
        backsolve(),
        "of the continuous problem, to tolerance (the paper's)",
        "constant",
        "reverse",
        reverse=True,
        forward=False,
    ),
    "reversible": Adjoint(
        reversible(),
        "exact for the steps that were taken",
        "constant, and the step sizes",
        "reverse",
        reverse=True,
        forward=False,
    ),
    "direct": Adjoint(
        direct,
        "exact for the steps that were taken, through their operations (RK-Net)",
        "every step",
        "all, any order",
        reverse=True,
        forward=True,
    ),
    "forward": Adjoint(
        forward,
        "exact for the steps that were taken",
        "constant",
        "forward, any order",
        reverse=False,
        forward=True,
    ),
}

named: dict[str, Callable] = {name: adjoint.differentiate for name, adjoint in adjoints.items()}


def table() -> str:
    """The adjoints as the README's table, in Markdown; the first one is the default."""
    default = next(iter(adjoints))
    lines = ["| `adjoint=` | gradient | memory | modes |", "|---|---|---|---|"]
    for name, a in adjoints.items():
        mark = " (default)" if name == default else ""
        lines.append(f'| `"{name}"`{mark} | {a.gradient} | {a.memory} | {a.modes} |')
    return "\n".join(lines)
