"""What an initial-value problem with a known answer is."""

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """dy/dt = f(y, t, *args), or mass dy/dt = f(y, t, *args), y(t0) = y0, solved until t1.

    Either `exact(t)` is the solution at any time, or `end` is its value at t1, to the digits given.

    Attributes:
        invariants: `invariants(y)` are numbers that the solution keeps.
        stiff: explicit methods take steps for stability and not for accuracy.
        mass: a constant matrix before dy/dt, shape (n, n); singular where some equations are algebraic.
        scale: the size below which a number of the solution counts as small, one for all or one for each:
            with a relative tolerance rtol, use atol = rtol * scale.
        band: how many diagonals of df/dy below and above the main one have entries, where they are few.
    """

    f: Callable
    y0: npt.ArrayLike
    t1: float
    t0: float = 0.0
    args: tuple = ()
    exact: Callable | None = None
    end: npt.ArrayLike | None = None
    invariants: Callable | None = None
    stiff: bool = False
    mass: npt.ArrayLike | None = None
    scale: npt.ArrayLike = 1.0
    band: tuple[int, int] | None = None

    def __post_init__(self):
        for name in ("y0", "end", "mass", "scale"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, np.array(value, float))

    def answer(self) -> np.ndarray:
        """y(t1)."""
        return np.asarray(self.exact(self.t1) if self.exact else self.end)
