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
    "rk45": "'dopri5' is the same method, 'tsit5' a better one",
    "dp5": "'dopri5' is the same method",
    "rk23": "'bosh3' is the same method",
    "dp8": "'dop853' is the same method",
    "dopri8": "'dop853' is the method of that order",
    "adams": "'dop853' suits the same problems",
    "leapfrogmidpoint semiimpliciteuler": "'leapfrog' is symplectic, for y0 = (q, p)",
    "bdf radau radauiia5 rodas5 rosenbrock23 vode cvode zvode": STIFF,
    "lsoda autotsit5": "'auto' finds out by itself whether a problem is stiff, as it does",
    "kvaerno4": STIFF,
    "impliciteuler": "it is 'implicit_euler' here",
    "implicitmidpoint": "it is 'implicit_midpoint' here",
    "gausslegendre gausslegendre4 gl4 irk": "'gauss4' is Gauss's method of order 4",
})  # fmt: skip


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
    name = method if is_name else type(method).__name__
    here = f"it is '{name.lower()}' here" if name.lower() in methods else None
    if remedy := ELSEWHERE.get(name.lower(), here):
        raise (ValueError if is_name else TypeError)(f"There is no method '{name}': {remedy}.")
    if not is_name:
        raise TypeError(
            "`method` must be a name or a Tableau (see jaxode.tableaus.tableau), or another "
            f"jaxode.methods.Method; got {name}."
        )
    close = difflib.get_close_matches(name.lower(), methods, 1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise ValueError(f"There is no method '{name}'.{hint} Methods: {', '.join(methods)}.")
