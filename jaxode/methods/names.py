"""Every method by its name."""

import difflib

from jaxode.methods.auto import methods as auto
from jaxode.methods.collocation import methods as collocation
from jaxode.methods.esdirk import methods as esdirk
from jaxode.methods.kencarp import methods as kencarp
from jaxode.methods.method import Method
from jaxode.methods.rosenbrock import methods as rosenbrock
from jaxode.methods.symplectic import splittings
from jaxode.methods.tables import methods as tables

methods: dict[str, Method] = {
    **tables, **splittings, **rosenbrock, **esdirk, **kencarp, **auto, **collocation,
}  # fmt: skip


def by_name(meanings: dict[str, str]) -> dict[str, str]:
    """A meaning for each of the names that stand together."""
    return {name: meaning for names, meaning in meanings.items() for name in names.split()}


# What those of other libraries are called here.
STIFF = "it is for stiff problems, and so are 'rodas5p' and 'rodas4' here"
ELSEWHERE = by_name({
    "rk45 ode45": "'dopri5' is the same method, 'tsit5' a better one",
    "dp5": "'dopri5' is the same method",
    "rk23 ode23 bs3": "'bosh3' is the same method",
    "dp8": "'dop853' is the same method",
    "vern6 vern7 vern8 vern9": "'dop853' is the method of a high order",
    "rkf45": "'fehlberg45' is the same method",
    "fehlberg2": "'bosh3' is the pair of a low order",
    "adaptiveheun": "'heun' is the same method",
    "adams explicitadams implicitadams fixedadams vcabm": "'dop853' suits the same problems",
    "leapfrogmidpoint semiimpliciteuler symplecticeuler velocityverlet verlet":
        "'leapfrog' is symplectic, for y0 = (q, p)",
    "bdf radau radau5 radauiia5 rodas5 rosenbrock23 vode cvode cvodebdf zvode qndf fbdf ode15s ode23s kvaerno4":
        STIFF,
    "ida": "with `mass=`, 'rodas5p' solves differential-algebraic equations",
    "lsoda lsodes autotsit5": "'auto' finds out by itself whether a problem is stiff, as it does",
    "gausslegendre gausslegendre4 gl4 irk": "'gauss4' is Gauss's method of order 4",
})  # fmt: skip


def plain(name: str) -> str:
    """A name without capitals and marks: "Implicit-Euler" and "ImplicitEuler" are 'impliciteuler'."""
    return "".join(filter(str.isalnum, name.lower()))


def named(method: str | Method) -> Method:
    """The method of that name, or the method itself.

    Raises:
        TypeError: neither a name nor a method; it says which one stands for a solver of another library.
        ValueError: there is no method of that name; the error says which are close.
    """
    if isinstance(method, Method):
        return method
    is_name = isinstance(method, str)
    if is_name and method in methods:
        return methods[method]
    name = method if is_name else (method if isinstance(method, type) else type(method)).__name__
    here = next((f"it is '{ours}' here" for ours in methods if plain(ours) == plain(name)), None)
    if remedy := ELSEWHERE.get(plain(name), here):
        raise (ValueError if is_name else TypeError)(f"There is no method '{name}': {remedy}.")
    if not is_name:
        raise TypeError(
            "`method` must be a name or a Tableau (see jaxode.methods.tableau), or another "
            f"jaxode.methods.Method; got {name}."
        )
    close = difflib.get_close_matches(name.lower(), methods, 1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise ValueError(f"There is no method '{name}'.{hint} Methods: {', '.join(methods)}.")
