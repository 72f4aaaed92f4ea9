"""What a solver may ask of a method: how to start, how to step, and the solution inside a step."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import tree

# The axis of solves that go in step, where there are many: for `lax.pmax` and the like.
LANES = "lanes"
# The steps of a solve that is differentiated stay inside this part of the radius of the stability region.
SAFETY = 0.9
# Where the solution is at rest (the error of the last step is below this part of what is tolerated) none keeps
# a step from being too long for modes that oscillate, which the region leaves out. So it may take this part of
# the radius: of tsit5 about 1, where a thousand radians make a mode 1.1 times as large. A solve that settles
# takes three times as many steps from there on; the others as many as before (eight problems, 2026-11-28).
QUIET, AT_REST = 1e-4, 0.3


class Step(NamedTuple):
    """What a trial step found.

    Attributes:
        y: the state at the end of the step.
        memory: what this step hands to the next one, such as the derivative at its end.
        slope: the derivative dy/ds at the end.
        errors: estimates of the local error, pytrees like y: none, one, or two to be combined.
        stages: what `Method.inside` needs of this step; the method's own.
        converged: whether the equations of the step were solved; if not, the step is rejected.
        evaluations: how many times func was evaluated.
        inside_errors: estimates of the error of `Method.inside` at some places, pytrees like y; none of a
            method that does not look there.
    """

    y: PyTree
    memory: PyTree
    slope: PyTree
    errors: list
    stages: Any
    converged: Array | bool = True
    evaluations: Array | int = 0
    inside_errors: Sequence[PyTree] = ()


def for_inside(step: Step) -> Step:
    """What `Method.inside` may need of a step."""
    return step._replace(errors=[], converged=None, evaluations=None, inside_errors=())  # type: ignore[arg-type]


def combined(high, low=None):
    """The error of a step from the norms of one estimate, or of two as in DOP853 (HNW eq. II.10.17)."""
    if low is None:
        return high
    both = high**2 + 0.01 * low**2
    return jnp.where(both > 0, high**2 / jnp.sqrt(jnp.where(both > 0, both, 1.0)), both)


class Parts(NamedTuple):
    """dy/ds in two parts, of which it is the sum: one for the implicit table of a method, one for its
    explicit table."""

    stiff: Any
    nonstiff: Any


class Method:
    """A one-step method: a hashable value that answers three questions about a field f on [0, 1].

    Subclass it, and pass an instance as `method=`. All three are functions of one solve, made of
    JAX operations; they are batched (along an axis named `LANES`), compiled and differentiated by the
    solver. Every adjoint, output and failure rule works with a method that keeps these promises:

    - `step` with h = 0 is the identity: it returns y and a memory that fits it;
    - `memory` is a pytree of arrays that depends on (f, s, y) alone up to the error of the method.

    Attributes:
        order: of the solution.
        error_order: of the embedded solution that the error estimate compares with; None for a
            method without an estimate, which takes steps of equal size.
        estimate_sees_end: whether the error estimate depends on the slope at the end of the step,
            so that a slope that is not finite shows in it.
        step_evaluations: evaluations of func in a trial step; None if they are not always the same.
        inside_evaluations: evaluations of func that `inside` adds to those of a step.
        explains: whether `heuristics` can be made from `stages`.
        stage_count: how many states a step holds at a time, by which a batch is sized.
        implicit: whether a step solves equations, so that `converged` may be false.
        iterates: whether it does so until what is left is small: where there are tolerances `step` then
            gets one more argument, `norm(error, y)`, in which an error of 1 is what is tolerated at y.
        measures: whether `step` gets that argument in any case.
        equal_steps: whether it takes steps of equal size (`dt`).
        beyond: whether a stage lies after the end of its step: func then sees times after the last.
        any_state: whether the parts of a state are all treated alike, so that a state of several
            arrays may be handed over as one vector.
        sums_slopes: whether a step only adds multiples of slopes, so that a step of the state with
            its sensitivities is the derivative of the step.
        takes_mass: whether the field may be a `System`: of M dy/ds, with a mass matrix M. What a step
            hands to the next may then be M dy/ds, and `slope` is dy/ds all the same.
        takes_jac: whether it uses the Jacobian of such a field, if there is one.
        takes_parts: whether the field may have two `parts`, one stiff and one not, and a table for each.
        stability: the largest h |lambda| up to which steps are stable, for modes lambda of df/dy that decay;
            None if there is no such limit, or it is not known.
        carries: whether the memory holds a result of the solve, its `carried`.
        has_increment: whether `with_increment` says what a step adds to the state.
    """

    order: int
    error_order: int | None
    estimate_sees_end: bool = False
    step_evaluations: int | None = None
    inside_evaluations: int = 0
    explains: bool = False
    implicit: bool = False
    iterates: bool = False
    measures: bool = False
    equal_steps: bool = True
    beyond: bool = False
    any_state: bool = False
    sums_slopes: bool = False
    takes_mass: bool = False
    takes_jac: bool = False
    takes_parts: bool = False
    stability: float | None = None
    carries: bool = False
    has_increment: bool = False
    stage_count: int = 8

    def suited_to(self, y0: PyTree) -> "Method":
        """The method for a state of this size: by default this one."""
        return self

    def in_numbers(self) -> "Method | None":
        """The same steps without loops, for small states that are taken apart into their numbers.

        Many solves by an implicit method are lanes where it has them, on a CPU; else one after another."""
        return None

    def looking_inside(self) -> "Method":
        """The method of a solve that is asked for what lies inside of steps: by default this one. One whose
        error estimate sees the end of a step alone estimates that of `inside`, too."""
        return self

    def start(self, f, s, y: PyTree) -> PyTree:
        """The memory before the first step. Costs one evaluation of func."""
        raise NotImplementedError

    def slope(self, f, s, y: PyTree, memory: PyTree) -> PyTree:
        """dy/ds at s, from the memory: by default the memory is just that."""
        return memory

    def step(self, f, s, y: PyTree, memory: PyTree, h) -> Step:
        """From s to s + h."""
        raise NotImplementedError

    def inside(self, f, s, y: PyTree, h, step: Step) -> list[PyTree]:
        """[d_0, d_1, ...] with y(s + theta h) = y + sum_p theta^(p+1) d_p for 0 <= theta <= 1."""
        raise NotImplementedError

    def fastest(self, f, s, y: PyTree, memory: PyTree):
        """About the largest |lambda| of df/dy; 0 of a method that does not know it."""
        return jnp.zeros_like(s)

    def restarted(self, f, s, y: PyTree, memory: PyTree, seen) -> PyTree:
        """The memory where an event has made y of the state: by default that of a start.

        `seen()` are two pairs (state, time), right before the event and right after it.
        """
        return self.start(f, s, y)

    def carried(self, memory: PyTree) -> PyTree:
        """The result of the solve that the memory holds, of a method that `carries` one."""
        raise NotImplementedError

    def with_increment(self, f, s, y: PyTree, memory: PyTree, h) -> tuple[Step, PyTree]:
        """A step, and what it adds to the state, before that sum is rounded: in float32 or better."""
        raise NotImplementedError

    def check(self, func, y0: PyTree) -> None:
        """Raise an error that says what to do if this problem is not one for the method.

        `func` is the traced field (`jaxode.kernels.traces.Trace`).
        """

    def backwards(self) -> "Method":
        """The method that solves the continuous adjoint of `backsolve`, whose state is (y, a, p)."""
        return self


@dataclasses.dataclass(frozen=True)
class Around(Method):
    """A method that does more than the one inside of it, `method`, and has the properties of that one.

    The fields of the other are `field` of its fields, its memories `inner` of its memories.
    """

    method: Method

    def __post_init__(self):
        for name in Method.__annotations__:
            object.__setattr__(self, name, getattr(self.method, name))
        object.__setattr__(self, "sums_slopes", False)

    def looking_inside(self) -> Method:
        return dataclasses.replace(self, method=self.method.looking_inside())

    def fastest(self, f, s, y: PyTree, memory):
        return self.method.fastest(f.field, s, y, memory.inner)

    def slope(self, f, s, y: PyTree, memory) -> PyTree:
        return self.method.slope(f.field, s, y, memory.inner)


def of_all(flag):
    """Whether it is so for any, and for all, of the solves that go in step."""
    number = flag.astype(jnp.int32)
    try:
        return lax.pmax(number, LANES) > 0, lax.pmin(number, LANES) > 0
    except NameError:  # there is one solve
        return flag, flag


def chosen(flag, fn, otherwise):
    """`fn()` where the flag is set, else `otherwise()`: each if any of the solves that go in step needs it.

    Backwards each is computed again from what it was given. Else its derivative would be handed all
    that both compute on the way, two hundred arrays, zeros for the one that is not taken.
    """
    fn, otherwise = (jax.checkpoint(fn, prevent_cse=False) for fn in (fn, otherwise))
    some, every = of_all(flag)
    if some is flag:  # there is one solve
        return lax.cond(flag, fn, otherwise)
    return tree.where(flag, tree.where_needed(some, fn), tree.where_needed(~every, otherwise))
