"""The user's functions: whether they take their arguments in order, and what an error in one of them means.

func, the condition and the change of an event, `save`, `jac` and the function of a fold are called once, with
values that only the compiled program has. What JAX and Python say where that does not work is put in words
that name the function and the remedy.
"""

import inspect
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import jax
import numpy as np
from jax.errors import (
    ConcretizationTypeError,
    NonConcreteBooleanIndexError,
    TracerArrayConversionError,
    TracerBoolConversionError,
    TracerIntegerConversionError,
)
from jaxtyping import PyTree


class Role(NamedTuple):
    """What a function of the user is for: its name in messages, how it is called, what else there is to say
    where it makes a decision, and whether a value stands beside the state in what is traced."""

    name: str
    call: str
    decision: str = ""
    pair: bool = False

    @property
    def parameters(self) -> list[str]:
        """The names in its call."""
        return self.call[self.call.index("(") + 1 : -1].split(", ")

    @property
    def order(self) -> str:
        """What its arguments are, as a sentence."""
        return f"Its arguments are ({', '.join(self.parameters)}), in this order."

    def state(self, given: PyTree) -> PyTree:
        """y, of what is traced."""
        return given[self.parameters.index("y")] if self.pair else given


FUNC = Role(
    "func",
    "func(y, t, *args)",
    " Where func switches, steps should end: at a known time let it ask a jaxode.Signal of kind 'previous', or "
    "pass events=[jaxode.Event(times=...)]; where the state crosses a value, events=[jaxode.Event(condition)].",
)
JAC = Role("`jac`", "jac(y, t, *args)")
SAVE = Role("`save`", "save(y, t, *args)")
CONDITION = Role("the condition of an Event", "condition(y, t, *args)")
CHANGE = Role("the change of an Event", "change(y, t, *args)")
CHANGE_BY = Role("the change of an Event with `values`", "change(y, t, value, *args)", pair=True)
CHANGE_ARGS = Role("`change_args` of an Event", "change_args(y, t, *args)")
CHANGE_ARGS_BY = Role("`change_args` of an Event with `values`", "change_args(y, t, value, *args)")
CORRECTION = Role("the correction of a Hypersolver", "correction(y, t, h, slope, *args)", pair=True)
FOLD = Role("the function of a `fold`", "function(value, y, t, *args)", pair=True)

TIMES = ("t", "time")
STATES = tuple("y x u z q h v Y X U state states y0 x0 yt xt".split())


def in_order(role: Role, func: Callable) -> None:
    """Raise if a function, by the names of its parameters, takes the time before the state, or after other
    arguments.

    Shapes do not tell: a state of one number and a time are alike, and so are a parameter and a time. Functions
    of SciPy's `solve_ivp`, of diffrax and of torchdiffeq are f(t, y), those of Julia f(u, p, t).
    """
    try:
        parameters = inspect.signature(func).parameters.values()
    except (TypeError, ValueError):  # of something that is not written in Python
        return
    taken = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names, first = [p.name for p in taken], role.parameters.index("y")
    if len(names) < first + 2:
        return
    before = "".join(f"{name}, " for name in role.parameters[:first])
    # One with a default, as in lambda y, s, t=t: ..., may be a value that the function keeps.
    late = [p.name for p in taken[first + 2 :] if p.name in TIMES and p.default is p.empty]
    if late and not {*names[first : first + 2]} & {*TIMES}:
        time_after_others(role, before, names[first:], late[0])
    t, y = names[first : first + 2]
    if t not in TIMES or y not in STATES:
        return
    raise TypeError(
        f"{role.name} takes ({before}{t}, {y}, ...), the time before the state, but it is called as "
        f"{role.call}: swap the two, or pass lambda {before}{y}, {t}, *args: f({before}{t}, {y}, *args). If "
        f"its `{t}` is the state, give it another name."
    )


def time_after_others(role: Role, before: str, names: list[str], t: str) -> None:
    """Raise the error of a function that takes (y, p, t), as those of Julia do, or fills its first argument."""
    if names[0] == f"d{names[1]}":
        raise TypeError(
            f"{role.name} takes ({', '.join(names)}), as Julia's f!(du, u, p, t) that fills du, but it is "
            f"called as {role.call}, and returns the derivative."
        )
    y, *others = (name for name in names if name != t)
    others = ", ".join(others)
    raise TypeError(
        f"{role.name} takes ({before}{', '.join(names)}), the time after other arguments, as Julia's "
        f"f(u, p, t), but it is called as {role.call}: let {t} follow {y}, or pass lambda {before}{y}, {t}, "
        f"{others}: f({before}{', '.join(names)}). If its `{t}` is no time, give it another name."
    )


ONLY_THEN = "a value that is only known when the solve runs"
TRACED = {
    TracerBoolConversionError:
        "lets Python decide (`if`, `while`, `and`, `or`, `not`, `max`) by {value}: write "
        "jnp.where(condition, a, b), or jax.lax.cond for what is expensive; `&`, `|` and `~` for `and`, `or` "
        "and `not`.{decision} A Python float that it closes over may be asked; so may an int, bool or str of "
        "args.",
    TracerIntegerConversionError:
        "uses {value} as a Python integer, as an index of a list or in `range`: index an array, such as "
        "jnp.stack(the list), and repeat by jax.lax.fori_loop.",
    TracerArrayConversionError: "passes {value} to NumPy: write jnp, which is jax.numpy, for np.",
    NonConcreteBooleanIndexError:
        "picks entries by a mask, so that how many there are is {value}: keep all of them, with "
        "jnp.where(mask, x, 0).",
    ConcretizationTypeError:
        "makes a Python number (by float, int or the module math) of {value}: write jnp.sin for math.sin, and "
        "x.astype(int) for int(x).",
}  # fmt: skip


@contextmanager
def explained(role: Role, given: PyTree, args: tuple = ()):
    """A call of a function of the user, whose errors are raised again in words: from those of JAX and Python,
    which say where. Others pass, with a note of the order of its arguments where that is not func's."""
    try:
        with in_words(role, role.state(given), args):
            yield
    except Exception as error:
        if role.pair and role.call not in str(error):
            error.add_note(f"{role.name} is called as {role.call}.")
        raise


@contextmanager
def in_words(role: Role, y: PyTree, args: tuple):
    """The same, without the note."""
    try:
        yield
    except tuple(TRACED) as error:
        # The first that fits: that of a decision is a ConcretizationTypeError, too.
        what = next(what for kind, what in TRACED.items() if isinstance(error, kind))
        what = what.format(value=ONLY_THEN, decision=role.decision)
        raise TypeError(f"{role.name} {what}{no_vector(y)}") from error
    except ValueError as error:
        if "setting an array element" not in str(error):
            raise
        raise TypeError(
            f"{role.name} writes {ONLY_THEN} into an array of NumPy, which only holds numbers that are known: "
            "return jnp.stack([a, b]), or jnp.zeros(2).at[0].set(a), which is another array."
        ) from error
    except (TypeError, AttributeError) as error:
        said = str(error)
        if isinstance(error, TypeError) and "positional argument" in said:
            bundled = "missing" in said and any(isinstance(arg, tuple | list) for arg in args)
            more = (
                ". A tuple after t is one argument: pass what is in it, `*args`" if bundled else ""
            )
            raise TypeError(f"{role.name} is called as {role.call}: {said}{more}") from error
        if no_vector(y) and any(word in said for word in ("list", "tuple", "sequence")):
            raise TypeError(f"{role.name} failed: {said}.{no_vector(y)}") from error
        if type(y) is dict and "dict" in said:
            raise TypeError(
                f"{role.name} failed: {said}. y0 is a dict, and so y is a dict, which has no arithmetic: "
                "take it apart (y[name]), or pass each array through jax.tree.map."
            ) from error
        raise


def no_vector(y: PyTree) -> str:
    """What to say of a state that is a list, where a function may have taken it for a vector; else nothing."""
    if type(y) not in (list, tuple) or not y:
        return ""
    kind = type(y).__name__
    return (
        f" y0 is a {kind}, and so y is a {kind}, whose arithmetic is not that of vectors: pass "
        f"y0=jnp.array(y0), or take it apart (a, b = y).{like_t_span(y) if kind == 'tuple' else ''}"
    )


def like_t_span(y0: PyTree) -> str:
    """What to say of a state that may be the `t_span` of SciPy's solve_ivp, two numbers; else nothing."""
    if type(y0) not in (list, tuple) or [np.ndim(y) for y in jax.tree.leaves(y0)] != [0, 0]:
        return ""
    return (
        " If y0 was meant to be the first and the last time: the state comes first, "
        "solve(func, y0, [t0, t1])."
    )
