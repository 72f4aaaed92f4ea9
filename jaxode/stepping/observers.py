"""What watches the trial steps of a solve, accepted or not, and changes nothing: a log, and a progress bar.

An observer is a hashable value that a compiled solve is specialised to. Its own value goes along with the
state of the solve, is not differentiated, and comes back in the report. A solve that nobody watches is the
same program as ever.
"""

import dataclasses
import threading
import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, PyTree

from jaxode import tree
from jaxode.solution import TrialSteps
from jaxode.stepping.integrator import INSIDE, error_over_tolerance


class Observer:
    """Watches trial steps; a frozen dataclass with these three functions."""

    def begin(self, dtype) -> PyTree:
        """Its value before the first trial step; `dtype` is that of time."""
        raise NotImplementedError

    def after(self, value: PyTree, integrator, old, new, h, step, go) -> PyTree:
        """Its value after a trial step of size h from the state `old` to `new`.

        A step that was rejected, or that an event has undone, leaves `new.accepted` what it was. Where `go`
        is not set there was no step (a lane that is done), and the value has to stay what it is.
        """
        raise NotImplementedError

    def in_batch(self) -> "Observer":
        """What watches each of many solves."""
        return self


@dataclasses.dataclass(frozen=True)
class Log(Observer):
    """The last `rows` trial steps, as `TrialSteps` on [0, 1]: trial step n is in row n modulo `rows`.

    A ring, because what explains a failure is at its end; with `rows` of max_steps it is all of them.
    """

    rows: int

    def begin(self, dtype) -> TrialSteps:
        nothing = jnp.full(self.rows, jnp.nan, dtype)
        return TrialSteps(
            nothing, nothing, nothing, jnp.zeros(self.rows, jnp.int32),
            jnp.full(self.rows, -1, jnp.int32),
        )  # fmt: skip

    def after(self, value: TrialSteps, integrator, old, new, h, step, go) -> TrialSteps:
        ratio = jnp.full_like(h, jnp.nan)
        if integrator.adaptive:
            ratio = error_over_tolerance(integrator, old.y, step)
        accepted = (new.accepted > old.accepted).astype(jnp.int32)
        found = TrialSteps(old.s, h, ratio, accepted, decisive(integrator, old.y, step))
        return tree.put_where(go, old.tried % self.rows, found, value)

    def in_time(self, value: TrialSteps, tried, t0, span) -> TrialSteps:
        """In the unit of func, in the order of time: `tried` is how many trial steps there were."""
        first = jnp.where(tried > self.rows, tried % self.rows, 0)
        s, h, ratios, accepted, component = (jnp.roll(x, -first) for x in value)
        return TrialSteps(t0 + span * s, span * h, ratios, accepted > 0, component)


def decisive(integrator, y: PyTree, step) -> Array:
    """The component, of the state as one vector, whose scaled error is largest, at the end of the step or
    inside of it: the first that is not finite, if there is one; -1 if there is none and errors are not
    estimated."""
    scales = integrator.tolerated(y, step.y)
    controlled = integrator.controlled
    smaller = partial(jax.tree.map, partial(tree.scale, 1 / INSIDE))
    errors = [controlled(error) for error in [*step.errors[:1], *map(smaller, step.inside_errors)]]
    errors = errors or [jax.tree.map(jnp.zeros_like, scales)]

    def scaled(scale, y, k, *errors):
        finite = tree.is_finite(y) & tree.is_finite(k)
        size = tree.largest(map(tree.magnitude, errors)) / tree.stretched(scale, y)
        size = jnp.where(finite & ~jnp.isnan(size), size, jnp.inf)
        return size.reshape(-1).astype(jnp.float32)

    sizes = jax.tree.map(scaled, scales, controlled(step.y), controlled(step.slope), *errors)
    sizes = jnp.concatenate([jnp.zeros(0, jnp.float32), *jax.tree.leaves(sizes)])
    if sizes.size == 0:
        return jnp.full((), -1, jnp.int32)
    largest = jnp.argmax(sizes).astype(jnp.int32)
    known = integrator.adaptive and bool(step.errors)
    return largest if known else jnp.where(jnp.max(sizes) > 0, largest, -1)


UPDATES = 100  # of a progress bar


@dataclasses.dataclass(frozen=True)
class Progress(Observer):
    """A bar of tqdm that shows how much of the interval has been solved: by a host callback each time that
    another hundredth is done, and none at other steps. It is no `visible` one for many solves."""

    visible: bool = True

    def begin(self, dtype) -> PyTree:
        return ()

    def after(self, value, integrator, old, new, h, step, go) -> PyTree:
        if not self.visible:
            return value
        part = lambda s: jnp.floor(UPDATES * s).astype(jnp.int32)
        ended = ~integrator.unfinished(new, jnp.ones_like(new.s))
        due = (part(new.s) > part(old.s)) | ended
        told = lambda: tell(part(new.s), new.tried, ended)
        lax.cond(due, told, lambda: jnp.zeros((), jnp.int32))
        return value

    def in_batch(self) -> "Progress":
        no_bar()
        return Progress(visible=False)


def no_bar() -> None:
    """Say that there is no bar."""
    warnings.warn(
        "`progress` is off under jax.vmap: a bar is that of one solve. Leave it out, or show the progress of "
        "the loop that calls the batches.",
        stacklevel=2,
    )


@custom_vmap
def tell(part, steps, ended):
    """Move the bar. JAX keeps it for its effect; the number that it returns means nothing."""
    jax.debug.callback(BAR.move, part, steps, ended)
    return jnp.zeros((), jnp.int32)


@tell.def_vmap
def tell_none(size, batched, part, steps, ended):
    no_bar()
    return jnp.zeros((), jnp.int32), False


class Bar:
    """The bar on the host: that of the solve which runs."""

    def __init__(self):
        self.bar: Any = None
        self.lock = threading.Lock()

    def move(self, part, steps, ended) -> None:
        """To so many hundredths, after so many trial steps; it is closed where the solve has ended."""
        from tqdm import tqdm

        part, steps = int(part), int(steps)
        with self.lock:
            if self.bar is not None and part < self.bar.n:  # a solve that was broken off
                self.close()
            if self.bar is None:
                self.bar = tqdm(total=UPDATES, desc="solve", unit="%", leave=False)
            self.bar.set_postfix({"steps": steps}, refresh=False)
            self.bar.update(part - self.bar.n)
            if ended:
                self.close()

    def close(self) -> None:
        self.bar.close()
        self.bar = None


BAR = Bar()


def log_of(observers: tuple, seen: tuple, tried, t0, span) -> TrialSteps | None:
    """The log among the values of observers, if there is one."""
    for observer, value in zip(observers, seen):
        if isinstance(observer, Log):
            return lax.stop_gradient(observer.in_time(value, tried, t0, span))
    return None
