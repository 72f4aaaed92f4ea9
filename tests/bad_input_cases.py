"""The table of bad input: what is passed, and what must happen, as data.

Rows of `AT_RUN_TIME` are one field whose faults are numbers, so that all of them are one program, and one
batch. Rows of `AT_THE_DOOR` are refused whatever the values are: before anything is compiled.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxode import Event, Status

inf, nan = math.inf, math.nan

# At run time: a field with every fault, of which a healthy one has none.


class Faults(NamedTuple):
    """Numbers of the field below; by default of dy/dt = -y."""

    decay: Any = 1.0
    constant: Any = 0.0
    square: Any = 0.0  # a pole
    root: Any = 0.0  # a domain that the solution leaves
    log: Any = 0.0
    floor: Any = -1e308  # where that domain ends
    slide: Any = 0.0  # a jump that the solution cannot leave
    jump: Any = 0.0  # at t = 1
    cut: Any = inf  # the time after which func is NaN


def field(y, t, w, p):
    inside = y - p.floor
    k = -w * p.decay * y + p.constant + (p.square * y) * y - p.slide * jnp.sign(y)
    k = k - p.root * jnp.sqrt(inside) + p.log * jnp.log(inside) + jnp.where(t > 1, p.jump, 0.0)
    return jnp.where(t > p.cut, nan, k)


class Given(NamedTuple):
    """All that is passed to one solve."""

    y0: Any = (1.0, 0.5)
    t: Any = (0.0, 0.5, 2.0)
    p: Faults = Faults()
    rtol: Any = 1e-6
    atol: Any = 1e-6
    hmax: Any = inf
    mxstep: Any = 1e6

    def arrays(self) -> "Given":
        given = self._replace(y0=np.array(self.y0), t=np.array(self.t))
        return jax.tree.map(np.float64, given)


class Row(NamedTuple):
    """`ends` are the statuses that are allowed where values are traced; after success rows are `exact`.
    `door` is the error, and a word of it, where they are known; None if they are no error there."""

    given: Given
    ends: set
    exact: Callable | None = None
    door: tuple | None = None
    words: str = ""  # of the SolveError


def row(ends, exact=None, door=None, words="", **given) -> Row:
    faults = {name: given.pop(name) for name in Faults._fields if name in given}
    ends = {ends} if isinstance(ends, Status) else set(ends)
    return Row(Given(p=Faults(**faults), **given), ends, exact, door, words)


def decay(y0, t, w):
    return y0[None] * jnp.exp(-w * (t - t[0]))[:, None]


def constant(y0, t, w):
    return y0[None] + (t - t[0])[:, None]


def still(y0, t, w):
    return y0[None] + 0 * t[:, None]


def pushed(y0, t, w):
    """-w y, and 1 more from t = 1 on."""
    after = (1 - jnp.exp(-w * (t - 1))) / w
    return decay(y0, t, w) + jnp.where(t > 1, after, 0.0)[:, None]


SUCCESS, BAD_INPUT = Status.SUCCESS, Status.BAD_INPUT
STUCK = Status.MAX_STEPS, Status.DT_TOO_SMALL
LEFT = Status.NON_FINITE, Status.DT_TOO_SMALL
INITIAL = Status.NON_FINITE_INITIAL
refused = lambda words: (ValueError, words)

AT_RUN_TIME = {
    "nothing wrong": row(SUCCESS, decay),
    # The solution, or func, ends.
    "more steps than there may be": row(Status.MAX_STEPS, decay=1e7, words="It looks stiff"),
    "more steps than mxstep": row(Status.MAX_STEPS, decay=1e4, mxstep=20, words="mxstep"),
    "a pole": row(LEFT, decay=0, square=1),
    "an overflow": row(LEFT, decay=0, square=1e300),
    "NaN at the start": row(INITIAL, cut=-inf, words="func at the first time"),
    "infinity at the start": row(INITIAL, decay=inf),
    "NaN on the way": row(Status.NON_FINITE, cut=0.7, words="left its domain"),
    "a root of what is negative": row(LEFT, decay=0, root=1, floor=0),
    "a logarithm of what is negative": row(LEFT, decay=0, log=1, floor=0),
    "a jump that is never left": row(STUCK, decay=0, slide=1),
    "a jump in time": row(SUCCESS, pushed, jump=1),
    # y0.
    "y0 is NaN": row(INITIAL, y0=(1.0, nan), door=refused("y0 is NaN or infinite")),
    "y0 is infinite": row(INITIAL, y0=(1.0, -inf), door=refused("y0 is NaN or infinite")),
    "y0 is huge": row(SUCCESS, decay, y0=(1e300, 2e300), atol=0.0),
    "y0 is tiny": row(SUCCESS, decay, y0=(1e-300, 2e-300), atol=0.0),
    "y0 is denormal": row({SUCCESS, *STUCK, Status.NON_FINITE}, y0=(1e-310, 5e-324), atol=0.0),
    "y0 is 0 in a component": row(SUCCESS, decay, y0=(0.0, 1.0), atol=0.0),
    # Times.
    "times back and forth": row(BAD_INPUT, t=(0.0, 2.0, 1.0), door=refused("increasing or decreasing")),
    "times there and back": row(BAD_INPUT, t=(0.0, 1.0, 0.0), door=refused("increasing or decreasing")),
    "a time beyond the last": row(BAD_INPUT, t=(2.0, 0.0, 3.0), door=refused("increasing or decreasing")),
    "a time is NaN": row(BAD_INPUT, t=(0.0, nan, 2.0), door=refused("must be finite")),
    "the first time is NaN": row(BAD_INPUT, t=(nan, 1.0, 2.0), door=refused("must be finite")),
    "the last time is NaN": row(BAD_INPUT, t=(0.0, 1.0, nan), door=refused("must be finite")),
    "the last time is infinite": row(BAD_INPUT, t=(0.0, 1.0, inf), door=refused("must be finite")),
    "times that are equal": row(SUCCESS, decay, t=(0.0, 2.0, 2.0)),
    "no time at all": row(SUCCESS, decay, t=(0.3, 0.3, 0.3)),
    "times that decrease": row(SUCCESS, decay, t=(0.0, -0.5, -2.0)),
    "times that are large": row(
        Status.DT_TOO_SMALL, t=(1e15, 1e15 + 0.5, 1e15 + 2), words="shift time"
    ),
    # Tolerances.
    "rtol is 0": row(SUCCESS, decay, rtol=0.0),
    "both tolerances are 0": row(STUCK, rtol=0.0, atol=0.0, door=refused("both 0")),
    "rtol is negative": row(BAD_INPUT, rtol=-1e-6, door=refused("`rtol` must not be negative")),
    "atol is negative": row(BAD_INPUT, atol=-1e-6, door=refused("`atol` must not be negative")),
    "rtol is NaN": row(BAD_INPUT, rtol=nan, door=refused("`rtol` must not be negative or NaN")),
    "atol is NaN": row(BAD_INPUT, atol=nan, door=refused("`atol` must not be negative or NaN")),
    "rtol is below a rounding": row(
        {SUCCESS, Status.MAX_STEPS}, decay, rtol=1e-17, atol=0.0, door=(UserWarning, "below what float64")
    ),
    # func does little.
    "func is 0": row(SUCCESS, still, decay=0),
    "func is constant": row(SUCCESS, constant, decay=0, constant=1),
    # Limits.
    "hmax is 0": row(BAD_INPUT, hmax=0.0, door=refused("`hmax` must be positive")),
    "hmax is negative": row(BAD_INPUT, hmax=-1.0, door=refused("`hmax` must be positive")),
    "hmax is NaN": row(BAD_INPUT, hmax=nan, door=refused("`hmax` must be positive")),
    "hmax is beyond the interval": row(SUCCESS, decay, hmax=1e3),
    "mxstep is 0": row(BAD_INPUT, mxstep=0.0, door=refused("`mxstep` must be positive")),
    "mxstep is NaN": row(BAD_INPUT, mxstep=nan, door=refused("`mxstep` must be positive")),
}  # fmt: skip

# Steps of equal size: `dt`, and what it is where it is traced.
STEPS = {
    0.0: BAD_INPUT, -0.1: BAD_INPUT, nan: BAD_INPUT, inf: BAD_INPUT, -inf: BAD_INPUT,
    1e-12: Status.MAX_STEPS, 1e-300: Status.MAX_STEPS, 0.1: SUCCESS, 5.0: SUCCESS,
}  # fmt: skip


# Unusual, and right: y0, times and options of dy/dt = -y, and the dtype of the result.


class Unusual(NamedTuple):
    y0: Any
    dtype: Any = np.float64
    t: Any = (0.0, 0.5, 1.0)
    options: dict = {}  # noqa: RUF012


UNUSUAL = {
    "integers": Unusual(np.array([1, 2])),
    "booleans": Unusual(np.array([True, False])),
    "half precision": Unusual(jnp.ones(2, jnp.float16), jnp.float16),
    "bfloat16": Unusual(jnp.ones(2, jnp.bfloat16), jnp.bfloat16),
    "single precision": Unusual(jnp.ones(2, jnp.float32), jnp.float32),
    "complex numbers": Unusual(np.array([1.0, 2.0j]), np.complex128),
    "a number": Unusual(1),
    "a table": Unusual(np.ones((2, 1))),
    "a tree": Unusual({"a": 1.0, "b": [np.ones(2), 2.0]}),
    "nothing": Unusual(np.zeros(0)),
    "no times": Unusual(1.0, t=()),
    "one time": Unusual(1.0, t=(3.0,)),
    "integer times": Unusual(1.0, t=(0, 1, 2)),
    "a tolerance for each component": Unusual(
        {"a": np.ones(2), "b": 1.0}, options=dict(rtol={"a": np.array([1e-4, 1e-2]), "b": 1e-4}, atol=1e-5)
    ),
}  # fmt: skip


def times_w(y, t, w):
    return jax.tree.map(lambda y: -w.astype(y.dtype) * y, y)


# At the door.

VECTOR = np.array([1.0, 0.5])


class Refused(NamedTuple):
    """A call that is an error of this kind, with these words."""

    error: type
    words: str
    func: Any
    y0: Any
    t: Any
    args: tuple
    options: dict


def door(error, words, func=lambda y, t: -y, y0=VECTOR, t=(0.0, 0.5, 2.0), args=(), **options):
    return Refused(error, words, func, y0, t, args, options)


def my_own(y, t):
    raise KeyError("my own")


OF_FUNC = {
    "a scalar": door(TypeError, r"shape \(\) where y0 has shape \(2,\)", lambda y, t: y[0]),
    "one number": door(TypeError, r"shape \(1,\)", lambda y, t: y[:1]),
    "a row": door(TypeError, r"shape \(1, 2\)", lambda y, t: y[None]),
    "a column": door(TypeError, r"shape \(2, 1\)", lambda y, t: y[:, None]),
    "too many": door(TypeError, r"shape \(3,\)", lambda y, t: jnp.ones(3)),
    "None": door(TypeError, "derivative like y0", lambda y, t: None),
    "integers": door(TypeError, "use floats", lambda y, t: jnp.ones(2, int)),
    "booleans": door(TypeError, "use floats", lambda y, t: y > 0),
    "complex numbers": door(TypeError, "complex y0", lambda y, t: 1j * y.astype(complex)),
    "another tree": door(TypeError, "derivative like y0", lambda y, t: {"b": y["a"]}, y0={"a": 1.0}),
    "a leaf of another shape": door(
        TypeError, r"y0\['a'\] has shape", lambda y, t: {"a": y["a"][None]}, y0={"a": 1.0}
    ),
    "an error": door(KeyError, "my own", my_own),
    "no function": door(TypeError, "callable", 3),
    "too few parameters": door(TypeError, r"func is called as func\(y, t, \*args\)", lambda y: -y),
    "too few arguments": door(TypeError, r"called as func.*missing 1", lambda y, t, k: -k * y, y0=1.0),
    "a tuple for arguments": door(
        TypeError, r"missing 1 .*: pass what is in it, `\*args`", lambda y, t, a, b: -a * b * y,
        args=((1.0, 2.0),),
    ),
    "too many arguments": door(TypeError, "called as func.*3 were given", args=(1.0,), y0=1.0),
}  # fmt: skip


class Tensor:
    """What is known of a tensor of torch, which need not be installed."""


Tensor.__module__ = "torch"
NUMPY = r"of another library, `torch\.Tensor`: pass jnp\.asarray\(x\.numpy\(\)\)"
T_SPAN = r"the state comes first, solve\(func, y0, \[t0, t1\]\)"

OF_ARGUMENTS = {
    "y0 is None": door(TypeError, "got None: it is the state at t.0., the second argument", y0=None),
    "y0 is a method": door(TypeError, "got 'tsit5'.*method=", y0="tsit5"),
    "y0 is a tensor": door(TypeError, f"y0 is {NUMPY}", y0=Tensor()),
    "y0 has a tensor": door(TypeError, NUMPY, y0={"a": Tensor()}),
    "times are a tensor": door(TypeError, f"`t` is {NUMPY}", t=Tensor()),
    "an argument is a tensor": door(TypeError, f"argument of func.* is {NUMPY}", args=({"a": Tensor()},)),
    "a step is a tensor": door(TypeError, f"`dt` is {NUMPY}", dt=Tensor(), method="rk4"),
    "a tolerance is a tensor": door(TypeError, f"`atol` is {NUMPY}", atol=Tensor()),
    "times first": door(ValueError, T_SPAN, y0=(0.0, 1e5), t=[1.0, 0.0, 2.0]),
    "times first, and a number": door(ValueError, T_SPAN, y0=(0.0, 1e5), t=1.0),
    "times first, and two numbers": door(TypeError, T_SPAN, y0=(0.0, 1e5), t=[1.0, 0.5]),
    "an end that only an event makes": door(
        ValueError, "got inf. Where a terminal event .* pass a large, finite one", t=[0.0, inf]
    ),
    "y0 is text": door(TypeError, r"y0\['a'\]", y0={"a": "text"}),
    "y0 is an object": door(TypeError, "y0 must be an array of numbers", y0=object()),
    "one time": door(ValueError, "one-dimensional", t=1.0),
    "a table of times": door(ValueError, "one-dimensional", t=[[0.0, 1.0]]),
    "complex times": door(TypeError, "real", t=[0.0, 1j]),
    "times that are text": door(TypeError, "real numbers", t=["a", "b"]),
    "ragged times": door(TypeError, "array of times", t=[[0.0], [1.0, 2.0]]),
    "no times": door(TypeError, "`t` are missing", t=None),
    "tolerances of another shape": door(ValueError, "shape", rtol=np.ones(3)),
    "tolerances of another tree": door(ValueError, "pytree like y0", rtol={"a": 1.0}),
    "too many steps": door(ValueError, "`max_steps` must be below", max_steps=2**31),
    "no steps": door(ValueError, "`max_steps` must be a positive integer", max_steps=0),
    "max_steps is no number": door(ValueError, "`max_steps`", max_steps=None),
    "steps to be counted": door(ValueError, "more than can be counted", dt=1e-12, method="euler"),
    "steps that are equal, and no size": door(ValueError, "pass a step size", method="rk4"),
    "hmax is None": door(TypeError, "`hmax` must be a number", hmax=None),
    "mxstep is a list": door(TypeError, "`mxstep` must be a number", mxstep=[1, 2]),
    "rtol is text": door(TypeError, "`rtol` must hold real numbers", rtol="a"),
    "atol is an object": door(TypeError, "`atol` must hold real numbers", atol=object()),
    "dt is text": door(TypeError, "`dt` must be a number", dt="a", method="rk4"),
    "throw is text": door(TypeError, "`throw` must be True or False", throw="no"),
    "heuristics is text": door(TypeError, "`heuristics` must be True or False", heuristics="no"),
    "a controller that is none": door(TypeError, "`controller`", controller=3),
    "an adjoint that is none": door(ValueError, "`adjoint` must be one of", adjoint="adjoint"),
    "an adjoint that is a list": door(ValueError, "`adjoint` must be one of", adjoint=["replay"]),
}  # fmt: skip


# The order of arguments, which shapes do not tell.


class Upside(eqx.Module):
    """A module whose func is f(t, y)."""

    def __call__(self, t, y):
        return -y

    def bound(self, time, state, rate=1.0):
        return -rate * state

    def late(self, state, rate, time):
        return -rate * state


def upside(t, x, rate):
    return -rate * x


by_name = lambda t, y: -y
event = lambda **given: dict(events=[Event(**given)])
SWAPPED = "the time before the state"
OF_ORDER = {
    "a function": door(TypeError, r"func takes \(t, x, \.\.\.\), the time before", upside, args=(1.0,)),
    "a lambda": door(TypeError, "pass lambda y, t", by_name, y0=1.0),
    "a part of a function": door(TypeError, SWAPPED, jax.tree_util.Partial(upside, rate=1.0)),
    "a compiled function": door(TypeError, SWAPPED, jax.jit(by_name)),
    "a module": door(TypeError, SWAPPED, Upside()),
    "a method": door(TypeError, r"\(time, state, \.\.\.\)", Upside().bound),
    "one of a pair": door(TypeError, SWAPPED, (lambda y, t: -y, by_name), method="kencarp3"),
    "save": door(TypeError, f"`save` takes .*{SWAPPED}", save=by_name),
    "jac": door(TypeError, f"`jac` takes .*{SWAPPED}", jac=by_name, method="rodas5p"),
    "a condition": door(TypeError, f"condition .*{SWAPPED}", **event(condition=by_name)),
    "a change": door(TypeError, f"change .*{SWAPPED}", **event(times=[1.0], change=by_name)),
    "a change by values": door(
        TypeError, rf"`values` takes .*{SWAPPED}.*change\(y, t, value",
        **event(times=[1.0], values=[1.0], change=lambda t, y, value: y),
    ),
    "a function of Julia": door(
        TypeError, r"\(u, p, t\), the time after.*pass lambda u, t, p: f\(u, p, t\)", lambda u, p, t: -p * u,
        args=(2.0,),
    ),
    "a function of Julia that fills du": door(
        TypeError, "fills du.*returns the derivative", lambda du, u, p, t: None, args=(2.0,)
    ),
    "a time after others in a method": door(
        TypeError, r"pass lambda state, time, rate: f\(state, rate, time\)", Upside().late
    ),
    "a change by the value before the time": door(
        TypeError, r"the time after.*change\(y, t, value",
        **event(times=[1.0], values=[1.0], change=lambda y, value, t: y),
    ),
    "a change that takes the value last": door(
        AttributeError, r"`values` is called as change\(y, t, value, \*args\)", lambda y, t, p: -y, args=(1.0,),
        **event(times=[1.0], values=[1.0], change=lambda y, t, p, value: p.no_such),
    ),
    "a fold": door(TypeError, r"`fold` takes \(value, t, y", fold=(0.0, lambda v, t, y: v)),
}  # fmt: skip


# A Python decision, or a Python number, of a value that is only known when the solve runs.


def decides(*given):
    return given[0] if given[-1] < 1 else 2.0 * given[0]


def fills(y, t):
    d = np.zeros(2)
    d[0] = -y[0]
    return d


def decides_by_state(y, t):
    return -y if y.sum() > 0 else y


def repeats(y, t):
    while t > 1:
        t = t - 1
    return t * y


CHOOSE = r"jnp\.where\(condition, a, b\), or jax\.lax\.cond"
OF_DECISIONS = {
    "if t": door(TypeError, rf"func lets Python decide.*{CHOOSE}.*jaxode\.Signal", decides),
    "if y": door(TypeError, rf"{CHOOSE}.*Event\(condition\)", decides_by_state),
    "if an argument": door(TypeError, "Python float that it closes over", decides, args=(2.0,)),
    "while t": door(TypeError, CHOOSE, repeats),
    "max": door(TypeError, CHOOSE, lambda y, t: y * max(t, 1.0), y0=1.0),
    "math": door(TypeError, r"jnp\.sin for math\.sin", lambda y, t: y * math.sin(t), y0=1.0),
    "float": door(TypeError, "makes a Python number", lambda y, t: y * float(t), y0=1.0),
    "NumPy": door(TypeError, "write jnp", lambda y, t: y * np.sin(t), y0=1.0),
    "an array of NumPy": door(TypeError, r"jnp\.stack\(\[a, b\]\), or jnp\.zeros\(2\)\.at\[0\]", fills),
    "an index": door(TypeError, "fori_loop", lambda y, t: y * [1.0, 2.0][t.astype(int)], y0=1.0),
    "a mask": door(TypeError, r"jnp\.where\(mask", lambda y, t: -y[y > 0]),
    "a condition": door(TypeError, f"condition of an Event .*{CHOOSE}", **event(condition=decides)),
    "a change": door(TypeError, f"change of an Event .*{CHOOSE}", **event(times=[1.0], change=decides)),
    "save": door(TypeError, f"`save` .*{CHOOSE}", save=decides),
    "a fold": door(TypeError, f"of a `fold` .*{CHOOSE}", fold=(0.0, decides)),
}  # fmt: skip


# A list as y0, taken for a vector.
VECTORS = r"y is a list, .*y0=jnp\.array\(y0\)"
OF_LISTS = {
    "a product": door(TypeError, VECTORS, lambda y, t: -0.5 * y, y0=[1.0, 0.5]),
    "a sign": door(TypeError, VECTORS, lambda y, t: -y, y0=[1.0, 0.5]),
    "a list twice": door(TypeError, VECTORS, lambda y, t: 2 * y, y0=[1.0, 0.5]),
    "a sum": door(TypeError, VECTORS, lambda y, t: y + y, y0=[1.0, 0.5]),
    "a matrix": door(TypeError, VECTORS, lambda y, t: jnp.eye(2) @ y, y0=[1.0, 0.5]),
    "a matrix of NumPy": door(TypeError, VECTORS, lambda y, t: np.eye(2) @ y, y0=[1.0, 0.5]),
    "a function": door(TypeError, VECTORS, lambda y, t: jnp.sin(y), y0=[1.0, 0.5]),
    "an attribute": door(TypeError, VECTORS, lambda y, t: y.sum() * y, y0=[1.0, 0.5]),
    "a slice": door(TypeError, VECTORS, lambda y, t: y[:, None], y0=[1.0, 0.5]),
    "a dict": door(TypeError, "y0 is a dict.*take it apart", lambda y, t: -y, y0={"a": 1.0}),
    "a product of a dict": door(TypeError, "y0 is a dict", lambda y, t: 2.0 * y, y0={"a": 1.0}),
    "a tuple": door(TypeError, r"y0 is a tuple", lambda y, t: -0.5 * y, y0=(1.0, 0.5)),
    "saved": door(
        TypeError, f"`save` .*{VECTORS}", lambda y, t: [y[1], -y[0]], y0=[1.0, 0.5],
        save=lambda y, t: 2.0 * y,
    ),
    "a condition": door(
        TypeError, f"condition of an Event .*{VECTORS}", lambda y, t: [y[1], -y[0]], y0=[1.0, 0.5],
        **event(condition=lambda y, t: y.sum()),
    ),
}  # fmt: skip

AT_THE_DOOR = {
    f"{kind}: {name}": case
    for kind, cases in {
        "func returns": OF_FUNC, "argument": OF_ARGUMENTS, "order": OF_ORDER, "decision": OF_DECISIONS,
        "list": OF_LISTS,
    }.items()
    for name, case in cases.items()
}  # fmt: skip
