"""Every method by its name."""

import difflib

from jaxode.methods.esdirk import methods as esdirk
from jaxode.methods.method import Method
from jaxode.methods.rosenbrock import methods as rosenbrock
from jaxode.methods.symplectic import splittings
from jaxode.methods.tables import methods as tables

methods: dict[str, Method] = {**tables, **splittings, **rosenbrock, **esdirk}


def named(method: str | Method) -> Method:
    """The method of that name, or the method itself.

    Raises:
        TypeError: neither a name nor a method.
        ValueError: there is no method of that name; the error says which are close.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise TypeError(
            "`method` must be a name or a Tableau (see jaxode.tableaus.tableau), or another "
            f"jaxode.methods.Method; got {type(method).__name__}."
        )
    if method not in methods:
        close = difflib.get_close_matches(method.lower(), methods, 1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise ValueError(f"There is no method '{method}'.{hint} Methods: {', '.join(methods)}.")
    return methods[method]
