"""Events that change arguments of func: `Event(change_args=...)`.

The numbers that change go along with the state, with derivative 0 and without a part in the error of a step. So
to every method, adjoint and output they are a part of a state that an event changes; the user sees y alone.
"""

import dataclasses
import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import arguments, tree
from jaxode.events import Event, as_rows, listed
from jaxode.functions import (
    CHANGE,
    CHANGE_ARGS,
    CHANGE_ARGS_BY,
    CHANGE_BY,
    CONDITION,
    FOLD,
    FUNC,
    SAVE,
    explained,
    in_order,
)
from jaxode.solution import Solution, SolveError
from jaxode.tolerances import per_leaf

LEFT_OUT = "mass", "jac", "linear"  # what describes func as a function of y alone


class Along(eqx.Module):
    """A state, and the numbers of args that events change. No tuple, which may be taken for a pair (q, p)."""

    y: PyTree
    moving: list


class OfState(eqx.Module):
    """function(y, t, *args) as one of (Along(y, moving), t, *args), in which `moving` are leaves of args.

    `before` arguments come before y, and `after` between t and args.
    """

    function: Callable
    which: tuple[int, ...] = eqx.field(static=True)
    before: int = eqx.field(static=True, default=0)
    after: int = eqx.field(static=True, default=0)

    def __call__(self, *given):
        start, (z, t, *rest) = given[: self.before], given[self.before :]
        values, args = rest[: self.after], tuple(rest[self.after :])
        leaves, structure = jax.tree.flatten(args)
        for i, x in zip(self.which, z.moving, strict=True):
            leaves[i] = x
        return self.function(*start, z.y, t, *values, *structure.unflatten(leaves))


class Derivative(eqx.Module):
    """func of such a state."""

    func: OfState

    def __call__(self, z: Along, t, *args):
        k = arguments.like_state(self.func(z, t, *args), z.y, FUNC)
        return Along(k, jax.tree.map(jnp.zeros_like, z.moving))


class Change(eqx.Module):
    """What an event makes of such a state, by its `change` and its `change_args`; either may be missing."""

    state: OfState | None
    args: OfState | None

    def __call__(self, z: Along, t, *given):
        y = z.y if self.state is None else self.state(z, t, *given)
        if self.args is None:
            return Along(y, z.moving)
        leaves = jax.tree.leaves(self.args(z, t, *given))
        new = [leaves[i] for i in self.args.which]
        return Along(y, [jnp.asarray(x, like.dtype) for x, like in zip(new, z.moving)])


def asked(events) -> bool:
    """Whether any event changes arguments."""
    return any(map(changes_args, listed(events)))


def changes_args(event) -> bool:
    """Whether this one does."""
    return isinstance(event, Event) and event.change_args is not None


def solve(plain: Callable, given: dict) -> Solution:
    """`jaxode.solve` of these arguments, by one of a state with the numbers that change."""
    names = "func", "y0", "t", "args", "events", "unknown"
    func, y0, t, args, events, unknown = (given.pop(name) for name in names)
    func, options = arguments.present(unknown, func, t), given
    for name in LEFT_OUT:
        if options[name] is not None:
            raise ValueError(
                f"`{name}` says what func is as a function of y alone, and cannot be passed with an Event that "
                "has `change_args`: leave it out, or end the solve there (terminal=True) and solve on."
            )
    events, y0 = listed(events), arguments.as_state(y0)
    changed = (changed_by(event, y0, t, args) for event in filter(changes_args, events))
    which = tuple(sorted(set().union(*changed)))
    of = lambda function, *places: OfState(function, which, *places)
    z0 = Along(y0, [as_number(jax.tree.leaves(args)[i], y0) for i in which])
    parts = (func.stiff, func.nonstiff) if isinstance(func, arguments.Pair) else (func,)
    parts = [Derivative(of(part)) for part in parts]
    func = parts[0] if len(parts) == 1 else arguments.Pair(*parts)
    options |= smaller_tolerances(options["rtol"], options["atol"], z0)
    save, fold, states = options["save"], options["fold"], options["save"] is None
    # What is no function is left to be refused in its own words.
    if callable(save):
        in_order(SAVE, save)
        options["save"] = of(save)
    if isinstance(fold, tuple | list) and len(fold) == 2 and callable(fold[1]):
        in_order(FOLD, fold[1])
        options["fold"] = fold[0], of(fold[1], 1)
    options["events"] = [of_event(event, of) for event in events]
    try:
        return seen(plain(func, z0, t, *args, **options), states)
    except SolveError as error:
        raise SolveError(str(error), seen(error.solution, states)) from None


def changed_by(event: Event, y0, t, args) -> set[int]:
    """Which leaves of args are not those that they were after `change_args`; an error if one may not change."""
    role = CHANGE_ARGS if event.values is None else CHANGE_ARGS_BY
    change_args = event.change_args
    assert change_args is not None
    in_order(role, change_args)
    leaves, structure = jax.tree.flatten(args)
    numbers = [i for i, x in enumerate(leaves) if is_inexact(x)]
    more = () if event.values is None else (jax.tree.map(lambda v: v[0], as_rows(event.values)),)

    def new_numbers(y, xs):
        given = list(leaves)
        for i, x in zip(numbers, xs):
            given[i] = x
        with explained(role, y):
            new = change_args(y, jnp.asarray(t)[0], *more, *structure.unflatten(given))
        if jax.tree.structure(new) != structure:
            raise TypeError(
                f"`change_args` of an Event must return the arguments after it, a tuple like args: those are "
                f"{structure}, it returned {jax.tree.structure(new)}."
            )
        pairs = list(zip(jax.tree.leaves(new), given))
        for i, (x, old) in enumerate(pairs):
            check_leaf(i, x, old, i in numbers)
        return [jnp.asarray(pairs[i][0], jnp.result_type(pairs[i][1])) for i in numbers]

    jaxpr = jax.make_jaxpr(new_numbers)(y0, [jnp.asarray(leaves[i]) for i in numbers]).jaxpr
    before = jaxpr.invars[len(jaxpr.invars) - len(numbers) :]
    return {i for i, x, new in zip(numbers, before, jaxpr.outvars, strict=True) if new is not x}


def is_inexact(x) -> bool:
    """Whether a leaf of args holds numbers that can change."""
    return isinstance(x, jax.Array | np.ndarray | np.generic | float | complex) and jnp.issubdtype(
        jnp.result_type(x), jnp.inexact
    )


def as_number(x, y0) -> Array:
    """A leaf of args as an array; one that has no dtype of its own in that of the state."""
    x = jnp.asarray(x)
    if not x.weak_type:
        return x
    dtype = tree.widest(jnp.float32, *map(tree.real_dtype, jax.tree.leaves(y0)))
    return lax.convert_element_type(
        x, jnp.promote_types(dtype, jnp.complex64) if jnp.iscomplexobj(x) else dtype
    )


def check_leaf(i: int, new, old, is_number: bool) -> None:
    """Raise if a leaf of args after an event cannot take the place of the one before."""
    if not is_number and new is not old:
        raise TypeError(
            f"`change_args` of an Event changes leaf {i} of args, a {type(old).__name__}: only floats and "
            "arrays of floats can change. Pass a float in its place."
        )
    if is_number and jnp.shape(new) != jnp.shape(old):
        raise TypeError(
            f"`change_args` of an Event returned shape {jnp.shape(new)} for leaf {i} of args, which has shape "
            f"{jnp.shape(old)}."
        )


def smaller_tolerances(rtol, atol, z0: Along) -> dict:
    """Those for the state with what goes along, so that errors of the state count as they do without it.

    The root mean square of errors is over all numbers, and what goes along has none: so the tolerances are
    smaller by the root of the part that the state is of all.
    """
    count, more = tree.count(z0.y), tree.count(z0.moving)
    part = math.sqrt(count / (count + more)) if count else 1.0

    def smaller(r, y):
        if not tree.known(r):
            return part * r
        least = 4 * float(
            jnp.finfo(y.dtype).eps
        )  # below which there is a warning: of what the user chose
        return np.where((r >= least) & (part * r < least), least, part * r)

    rtol, atol = (per_leaf(name, x, z0.y) for name, x in (("rtol", rtol), ("atol", atol)))
    first = next((r.reshape(-1)[0] for r in jax.tree.leaves(rtol) if r.size), 1e-6)
    # What is small beside it is no part of the size of the state (of which the first step is a part), and by as
    # much it is moved to look for what is unstable.
    sizes = [np.abs(x) if tree.known(x) else jnp.abs(lax.stop_gradient(x)) for x in z0.moving]
    return dict(
        rtol=Along(jax.tree.map(smaller, rtol, z0.y), [first] * len(z0.moving)),
        atol=Along(jax.tree.map(lambda a: part * a, atol), [first**0.5 * size for size in sizes]),
    )


def of_event(event: Event, of: Callable) -> Event:
    """The same of a state with what goes along."""
    if not isinstance(event, Event):
        return event  # for which there is a message
    after = 0 if event.values is None else 1
    by_state, by_args = (
        None if fn is None else of(fn, 0, after) for fn in (event.change, event.change_args)
    )
    if event.condition is not None:
        in_order(CONDITION, event.condition)
    if event.change is not None:
        in_order(CHANGE if event.values is None else CHANGE_BY, event.change)
    return dataclasses.replace(
        event,
        condition=event.condition and of(event.condition),
        change_args=None,
        change=Change(by_state, by_args) if by_state or by_args else None,
    )


def seen(sol: Solution, states: bool) -> Solution:
    """The solution as the user is to see it: without what goes along. With `save`, ys are no `states`."""
    events = sol.events and tuple(event._replace(states=event.states.y) for event in sol.events)
    dense = sol.dense
    if dense is not None:
        y, d = dense.states
        start = None if dense.start is None else dense.start.y
        dense = dataclasses.replace(dense.of((y.y, [x.y for x in d])), start=start)
    return sol._replace(ys=sol.ys.y if states else sol.ys, events=events, dense=dense)
