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
from jaxode.words import by_name

methods: dict[str, Method] = {
    **tables, **splittings, **rosenbrock, **esdirk, **kencarp, **auto, **collocation,
}  # fmt: skip


# What those of other libraries are called here.
STIFF = "it is for stiff problems, and so are 'rodas5p' and 'rodas4' here"
ELSEWHERE = by_name({
    "rk45 ode45": "'dopri5' is the same method, 'tsit5' a better one",
    "dp5": "'dopri5' is the same method",
    "bs5 owrenzen4 owrenzen5 rko65 anas5": "'tsit5' is the pair of order 5",
    "rk23 ode23 bs3": "'bosh3' is the same method",
    "dp8": "'dop853' is the same method",
    "vern6 vern7 vern8 vern9 tanyam7 tsitpap8 feagin10 feagin12 feagin14 frk65 pfrk87 qprk98":
        "'dop853' is the method of a high order",
    "rkf45": "'fehlberg45' is the same method",
    "fehlberg2 heun3 owrenzen3 ssprk22 ssprk33 ssprk43 ssprk432":
        "'bosh3' is the pair of a low order",
    "adaptiveheun heun2": "'heun' is the same method",
    "adams explicitadams implicitadams fixedadams vcabm cvodeadams ab3 ab4 ab5 abm32 abm43 abm54 vcab3 vcab4 "
    "vcab5 vcabm3 vcabm4 vcabm5 an5 jvodeadams": "'dop853' suits the same problems",
    "leapfrogmidpoint semiimpliciteuler symplecticeuler velocityverlet verletleapfrog "
    "pseudoverletleapfrog leapfrogdriftkickdrift verlet mcate2":
        "'leapfrog' is symplectic, for y0 = (q, p)",
    "ruth3 mcate3 candyroz4 mcate4 mcate42 calvosanz4 mcate5 yoshida6 kahanli6 mcate8 kahanli8 sofspa10":
        "'yoshida4' is symplectic, for y0 = (q, p)",
    "bdf radau radau5 radauiia3 radauiia5 radauiia9 rodas3 rodas42 rodas4p2 rodas5 rodas5pe rodas5pr ros3p "
    "rosenbrock23 rosenbrock32 vode cvode cvodebdf zvode qndf qndf1 qndf2 qbdf qbdf1 qbdf2 fbdf abdf2 ode15s "
    "ode23s kvaerno4 kencarp47 kencarp58 sdirk2 sdirk22 cash4 hairer4 hairer42 trapezoid":
        STIFF,
    "rock2 rock4 rkc serk2 eserk4 eserk5":
        "it is for diffusion, for which 'rodas5p' with `linear=` or 'kencarp4' is there",
    "ida daskr dassl dfbdf dabdf2 dimpliciteuler":
        "with `mass=`, 'rodas5p' solves differential-algebraic equations",
    "lsoda lsodes autotsit5 autodp5 autovern6 autovern7 autovern8 autovern9 defaultodealgorithm":
        "'auto' finds out by itself whether a problem is stiff, as it does",
    "gausslegendre gausslegendre4 gl4 gl6 irk irkgl16": "'gauss4' is Gauss's method of order 4",
    "sil3 arkode imexeuler cnab2 cnlf2 sbdf2 sbdf3 sbdf4 spliteuler etdrk2 etdrk3 etdrk4 hochost4 lawsoneuler "
    "norsetteuler exprb32 exprb43":
        "'kencarp3', 'kencarp4' and 'kencarp5' take a pair (stiff, nonstiff)",
    "reversibleheun": "adjoint='reversible' makes the steps of any method reversible",
    "halfsolver": "a method such as 'tsit5' estimates its error itself",
    "explicitrk": "jaxode.methods.tableau makes a method of a table",
    "scipysolver": "'tsit5' and the others are here by their names",
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
