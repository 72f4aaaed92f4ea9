"""The user's functions: whether they take their arguments in order, and what an error in one of them means.

func, the condition and the change of an event, `save`, `jac` and the function of a fold are called once, with
values that only the compiled program has. What JAX and Python say where that does not work is put in words
that name the function and the remedy.
"""

import inspect
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

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
    """Raise if a function, by the names of its parameters, takes the time before the state.

    Shapes do not tell: a state of one number and a time are alike. Functions of SciPy's `solve_ivp`, of
    diffrax and of torchdiffeq are f(t, y).
    """
    try:
        parameters = inspect.signature(func).parameters.values()
    except (TypeError, ValueError):  # of something that is not written in Python
        return
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    first = role.parameters.index("y")
    if len(names) < first + 2 or names[first] not in TIMES or names[first + 1] not in STATES:
        return
    t, y = names[first : first + 2]
    before = "".join(f"{name}, " for name in role.parameters[:first])
    raise TypeError(
        f"{role.name} takes ({before}{t}, {y}, ...), the time before the state, but it is called as "
        f"{role.call}: swap the two, or pass lambda {before}{y}, {t}, *args: f({before}{t}, {y}, *args). If "
        f"its `{t}` is the state, give it another name."
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
def explained(role: Role, given: PyTree):
    """A call of a function of the user, whose errors are raised again in words: from those of JAX and Python,
    which say where. Others pass."""
    y = role.state(given)
    try:
        yield
    except tuple(TRACED) as error:
        # The first that fits: that of a decision is a ConcretizationTypeError, too.
        what = next(what for kind, what in TRACED.items() if isinstance(error, kind))
        what = what.format(value=ONLY_THEN, decision=role.decision)
        raise TypeError(f"{role.name} {what}{no_vector(y)}") from error
    except (TypeError, AttributeError) as error:
        said = str(error)
        if isinstance(error, TypeError) and "positional argument" in said:
            raise TypeError(f"{role.name} is called as {role.call}: {said}") from error
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
        "y0=jnp.array(y0), or take it apart (a, b = y)."
    )
