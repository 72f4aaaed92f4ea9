"""Words of other libraries, and ours: for arguments, fields, objects and names.

Who comes from SciPy, `jax.experimental.ode`, diffrax, torchdiffeq or DifferentialEquations.jl writes what is
right there. Every table has their words, and what to write instead, which is what an error then says. None of
these libraries is imported: an object is known by the module and the name of its class.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import TypeVar

Kind = TypeVar("Kind", bound=type)


def by_name(meanings: dict[str, str]) -> dict[str, str]:
    """A meaning for each of the names that stand together."""
    return {name: meaning for names, meaning in meanings.items() for name in names.split()}


# Arguments of `solve`.

STEP = (
    "the first step is chosen from func; `dt` takes steps of equal size, `hmax` bounds all of them"
)
CALLED = "func is called as func(y, t, *args); write lambda y, t: f(t, y) for a function of (t, y)"
GRADIENTS = "`adjoint` is a name such as 'replay' or 'backsolve', or a function of jaxode.adjoints"

WORDS = by_name({
    "args": "pass them after t: solve(func, y0, t, *args)",
    "p": "pass parameters after t: solve(func, y0, t, *args)",
    "fun f terms rhs term": "the derivative is the first argument, `func`",
    "t_eval t_span ts t0 t1 tspan tlist saveat":
        "the output times are the third argument, `t`: solve(func, y0, [0.0, 1.0])",
    "max_step hmax0 dtmax dt_max": "the largest step is `hmax`",
    "min_step hmin dtmin dt_min force_dtmin": "there is no least step to choose",
    "first_step h0 dt0 step_size": STEP,
    "jac_sparsity col_deriv lband uband ml mu":
        "the Jacobian is derived from func, where the method needs one; what is known of its "
        "structure is `linear=`, such as jaxode.methods.Banded(lower, upper)",
    "Dfun jacobian": "the Jacobian df/dy, for an implicit method, is `jac`, a function jac(y, t, *args)",
    "mass_matrix M": "the mass matrix is `mass`",
    "event event_fn callback callbacks cb discrete_terminating_event merge_callbacks cond_fn":
        "events are `events=[jaxode.Event(...), ...]`",
    "dense_output": "the solution at any time is `dense=True`, or many times in `t`",
    "tfirst vectorized": CALLED,
    "stepsize_controller controllers options":
        "pass `rtol`, `atol` and `controller=jaxode.pid(...)`, or `dt` for steps of equal size",
    "adjoint_method adjoint_rtol adjoint_atol adjoint_params adjoint_options sensealg odeint_interface":
        GRADIENTS,
    "solver alg integrator": "the method is `method`, a name such as 'tsit5'",
    "tcrit tstops jump_ts jump_t step_ts step_t d_discontinuities":
        "steps end at the knots of a `jaxode.Signal`, and at `jaxode.Event(times=...)`",
    "max_num_steps maxiters nsteps": "the most steps are `max_steps`",
    "full_output printmessg stats": "`solve` returns statistics and the status",
    "reltol rel_tol": "the relative tolerance is `rtol`",
    "abstol abs_tol": "the absolute tolerance is `atol`",
    "ixpr mxhnil mxordn mxords with_jacobian order max_order_ns max_order_s max_hnil verbosity":
        "it is one of LSODA or VODE, which are not here",
    "solver_state controller_state made_jump":
        "a solve that can go on is `resumable=True`, and `Solution.resume` goes on",
    "progress_meter progress_bar progress_steps progress_name progress_message progress_id":
        "a bar of a long solve is `progress=True`",
    "u0": "the initial state is the second argument, `y0`",
    "prob problem": "func, y0 and t are the arguments: solve(func, y0, [0.0, 1.0])",
    "adaptive": "steps adapt, unless `dt` is given: the size of equal ones",
    "reverse_time": "times may decrease: solve(func, y0, [1.0, 0.0])",
    "save_everystep save_on save_start save_end initialize_save":
        "rows of a solution are the times in `t`, or every step with save_steps=True",
    "save_idxs save_func save_fn": "what is kept of the states is `save`, a function save(y, t, *args)",
    "pcoeff icoeff dcoeff factormin factormax safety ifactor dfactor beta1 beta2 qmin qmax "
    "qsteady_min qsteady_max qoldinit failfactor":
        "the next step size is that of `controller`, such as jaxode.pid(integral=0.4, proportional=0.3, "
        "safety=0.9, min_factor=0.2, max_factor=10.0)",
    "beta gamma":
        "pass parameters of func after t: solve(func, y0, t, *args); numbers of the step size are those of "
        "`controller`, such as jaxode.pid(integral=0.4, proportional=0.3)",
    "error_order": "the order of the error estimate is that of `method`",
    "norm internalnorm":
        "an error is measured as a root mean square; weigh its components by `rtol` and `atol` like y0",
    "isoutofdomain": "a step is rejected where func is NaN: let it be NaN outside of its domain",
    "unstable_check verbose":
        "a solve that fails raises an error, or ends with a status: `throw`, `Solution.status`",
    "initializealg du0 differential_vars":
        "initial values of algebraic equations, with `mass`, are found by `jaxode.consistent`",
    "alias alias_u0": "arrays of JAX never change, so that there is nothing to alias",
    "calck": "the solution at any time is `dense=True`",
    "timeseries_errors dense_errors": "problems with known answers are in `jaxode.problems`",
    "alg_hints": "the method is `method`: 'tsit5', 'rodas5p' where a problem is stiff, or 'auto'",
    "trajectories ensemblealg": "many solves are `jax.vmap` of one",
    "root_finder": "the time of an event is found to rounding, by no other choice",
    "wrap": "what is returned is always a `jaxode.Solution`",
})  # fmt: skip
OPTIONS = (
    "rtol atol mxstep hmax method adjoint dt controller max_steps throw heuristics linear mass jac dense save "
    "save_steps events after_events fold resumable log progress max_evaluations compensated"
).split()


# Arguments of an Event, and of a controller.

ONE_CONDITION = (
    "the condition is the first argument: jaxode.Event(condition), of condition(y, t, *args)"
)
AFFECT = (
    "what becomes of the state is `change`, a function change(y, t, *args) that returns the new one"
)
EVENT_WORDS = by_name({
    "cond_fn event event_fn fun g": ONE_CONDITION,
    "affect affect_pos callback": AFFECT,
    "affect_neg": f"{AFFECT}; for one direction alone pass direction='down' or 'up', and two events for both",
    "terminate stop": "an event ends the solve with terminal=True",
    "t ts tstops dosetimes": "known times are `times`",
    "dt period": "known times are `times`, such as jnp.arange(t0 + dt, t1, dt)",
    "root_finder rootfind interp_points abstol reltol rtol atol repeat_nudge":
        "the time of an event is found to rounding, by no other choice",
    "save_positions": "the states recorded are those before the event, or with solve(..., after_events=True) "
        "those after it",
    "max_events": "a terminal event ends the solve after `count` times",
    "args p": "the functions of an Event get what is passed after t: condition(y, t, *args)",
})  # fmt: skip

CONTROLLER_WORDS = by_name({
    "pcoeff kp": "it is `proportional=` here",
    "icoeff ki": "it is `integral=` here",
    "dcoeff kd": "it is `derivative=` here",
    "beta1 beta2": "the gains are `integral` and `proportional`",
    "factormin dfactor qmin": "it is `min_factor=` here",
    "factormax ifactor qmax": "it is `max_factor=` here",
    "gamma": "it is `safety=` here",
    "dtmax": "the largest step is `hmax`, an argument of `solve`",
    "reltol": "the relative tolerance is `rtol`, an argument of `solve`",
    "abstol": "the absolute tolerance is `atol`, an argument of `solve`",
})  # fmt: skip


def about_words(unknown: Iterable[str], words=WORDS, options: Iterable[str] = OPTIONS) -> str:
    """What to write instead of arguments that there are not."""
    name, options = next(iter(unknown)), list(options)
    if name in words:
        return f"There is no argument `{name}=`: {words[name]}."
    if name in OPTIONS:
        return f"There is no argument `{name}=` here: it is one of `solve`."
    if name in WORDS:
        return f"There is no argument `{name}=` here. Of `solve`: {WORDS[name]}."
    close = difflib.get_close_matches(name, options, 1)
    hint = f" Did you mean `{close[0]}=`?" if close else ""
    return f"There is no argument `{name}=`.{hint} Options: {', '.join(options)}."


def answers(words: dict[str, str]) -> Callable[[Kind], Kind]:
    """A decorator of a class, for whose unknown keyword arguments an error then has these words."""

    def answering(cls: Kind) -> Kind:
        make = cls.__init__
        names = list(inspect.signature(make).parameters)[1:]

        @functools.wraps(make)  # its signature is still that of the class
        def __init__(self, *args, **given):
            if unknown := [name for name in given if name not in names]:
                raise TypeError(about_words(unknown, words, names))
            make(self, *args, **given)

        cls.__init__ = __init__
        return cls

    return answering


# Fields of a solution.

DENSE = "the solution at any time is `sol.dense(t)`, after solve(..., dense=True)"
ENDED = "how it ended is `sol.status`, of jaxode.Status: 0 is a success, 1 a terminal event"
FIELDS = by_name({
    "t": "the times are `sol.ts`",
    "y u x": "the states are `sol.ys`, a row for each of `sol.ts`",
    "sol evaluate interpolation interp": DENSE,
    "derivative": "it is `sol.dense.derivative(t)`, after solve(..., dense=True)",
    "retcode result success successful": ENDED,
    "message": "it is in `print(sol)`, and jaxode.Status(int(sol.status)).message",
    "t_events": "times are `sol.events[0].times`, after solve(..., events=[...])",
    "y_events": "states are `sol.events[0].states`, after solve(..., events=[...])",
    "event_mask": "`sol.events[0].count` says how often it happened, after solve(..., events=[...])",
    "nfev nf destats": "evaluations of func are `sol.stats.evaluations`",
    "naccept nreject": "steps are `sol.stats.accepted` and `sol.stats.rejected`",
    "njev nlu": "Jacobians and factorisations are not counted",
    "t0": "the first time is `sol.ts[0]`",
    "t1": "the time up to which it is known is `sol.reached`",
    "prob alg": "a solution holds no functions",
    "solver_state controller_state made_jump": "`sol.resume(t)` goes on, after solve(..., resumable=True)",
})  # fmt: skip


def about_field(name: str, fields: Iterable[str]) -> str:
    """What to write instead of a field that a solution does not have."""
    if name in FIELDS:
        return f"A Solution has no `{name}`: {FIELDS[name]}."
    return f"A Solution has no `{name}`; it has {', '.join(fields)}."


# Objects. The bases of a class are looked up, too.

OBJECTS = by_name({
    "Event": "write jaxode.Event(condition, terminal=True), of condition(y, t, *args)",
    "AbstractDiscreteTerminatingEvent":
        "write jaxode.Event(condition, terminal=True), of condition(y, t, *args), which may be a boolean",
    "SaveAt SubSaveAt":
        "times are a list, the first that of y0: solve(func, y0, ts); its steps=True is save_steps=True, its "
        "dense=True the same, and its fn is `save`",
    "AbstractTerm": "func is the function itself, func(y, t, *args), the state before the time",
    "MultiTerm": "func may be a pair of functions (stiff, nonstiff), each of (y, t, *args)",
    "AbstractSolver": "the method is `method=`, a name such as 'tsit5'",
    "AbstractStepSizeController":
        "pass `rtol` and `atol` to solve, and controller=jaxode.pid(proportional=0.3, integral=0.4)",
    "ConstantStepSize": "pass dt=0.1 to solve, the size of equal steps, and no controller",
    "StepTo ClipStepSizeController":
        "steps end at jaxode.Event(times=ts) and at the knots of a jaxode.Signal; pass no controller, or "
        "controller=jaxode.pid(proportional=0.3, integral=0.4)",
    "AbstractAdjoint": "write adjoint='replay', the default, 'backsolve', 'direct' or 'forward'",
    "RecursiveCheckpointAdjoint": "write adjoint='replay', which is the default",
    "BacksolveAdjoint": "write adjoint='backsolve'",
    "DirectAdjoint": "write adjoint='direct'",
    "ForwardMode": "write adjoint='forward'",
    "AbstractProgressMeter": "write progress=True",
    "Tensor": "pass jnp.asarray(x.numpy()), after x.detach().cpu() where it has a gradient or is on a GPU",
    "Module": "JAX cannot differentiate it: write it with jax.numpy, or as a module of equinox",
})  # fmt: skip
LIBRARIES = ("diffrax", "torch")


def no_foreign(where: str, x) -> None:
    """Raise if something is an object of another library, or its class, for which there is a word of ours."""
    if said := about_class(x if isinstance(x, type) else type(x)):
        raise TypeError(f"{where} is of another library, {said}.")


@functools.lru_cache(maxsize=1000)  # arguments of every call are asked for it
def about_class(cls: type) -> str:
    """What to write instead of an object of this class; nothing if it is of none of these libraries."""
    library_of = lambda kind: str(kind.__module__).partition(".")[0]
    theirs = [kind for kind in cls.__mro__ if library_of(kind) in LIBRARIES]
    for kind in theirs:
        if kind.__name__ in OBJECTS:
            return f"`{library_of(kind)}.{theirs[0].__name__}`: {OBJECTS[kind.__name__]}"
    return ""


# Names that are imported.

NAMES = by_name({
    "solve_ivp diffeqsolve odeint_adjoint odeint_event ode ODEProblem":
        "it is `solve(func, y0, t)`, or `odeint(func, y0, t)` for the states alone",
    "ODETerm MultiTerm": "func is the function itself, func(y, t, *args)",
    "SaveAt": "the times of the outputs are the third argument: solve(func, y0, ts)",
    "Tsit5 Dopri5 Dopri8 Heun Euler Bosh3 Kvaerno3 Kvaerno5 KenCarp3 KenCarp4 KenCarp5 RK45 DOP853 Rodas5P":
        "methods are names, such as method='tsit5'",
    "PIDController": "it is `pid`",
    "ConstantStepSize": "the size of equal steps is `dt`, an argument of `solve`",
    "RecursiveCheckpointAdjoint BacksolveAdjoint DirectAdjoint ForwardMode":
        "adjoints are names, such as adjoint='replay'",
    "ContinuousCallback DiscreteCallback PresetTimeCallback CallbackSet": "they are `Event`s",
    "RESULTS ReturnCode": "it is `Status`",
    "solve_bvp": "boundary values are found by a root finder around `odeint`",
})  # fmt: skip
