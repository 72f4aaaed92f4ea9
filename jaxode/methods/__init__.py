"""Methods: one family a file, and every name.

| for | use |
|---|---|
| every method by its name, as a value | `methods`, `named` |
| an explicit Runge-Kutta method of one's own | `tableau`, `Tableau` |
| a symplectic one | `composed`, `Splitting` |
| an explicit method with a learnt correction of its steps | `Hypersolver` |
| implicit methods, and a choice between both kinds | `Rosenbrock`, `Esdirk`, `Collocation`, `Auto` |
| `linear=`, the structure of df/dy | `Dense`, `Banded`, `BlockDiagonal`, `Diagonal`, `Sparse`, `Krylov` |
| a method, or a structure, of another kind | `Method`, `Step`, `Linear` |
"""

from jaxode.methods.auto import Auto
from jaxode.methods.collocation import Collocation
from jaxode.methods.esdirk import Esdirk
from jaxode.methods.explicit import Tableau, tableau
from jaxode.methods.hypersolver import Hypersolver
from jaxode.methods.krylov import Krylov
from jaxode.methods.linear import Dense, Linear
from jaxode.methods.method import Method, Step
from jaxode.methods.names import methods, named
from jaxode.methods.rosenbrock import Rosenbrock, rodas4, rodas4p, rodas5p
from jaxode.methods.sparse import Sparse
from jaxode.methods.structures import Banded, BlockDiagonal, Diagonal
from jaxode.methods.symplectic import Splitting, composed

__all__ = [  # noqa: RUF022 - in the order of the table
    "methods",
    "named",
    "tableau",
    "Tableau",
    "composed",
    "Splitting",
    "Hypersolver",
    "Rosenbrock",
    "rodas4",
    "rodas4p",
    "rodas5p",
    "Esdirk",
    "Collocation",
    "Auto",
    "Dense",
    "Banded",
    "BlockDiagonal",
    "Diagonal",
    "Sparse",
    "Krylov",
    "Method",
    "Step",
    "Linear",
]
