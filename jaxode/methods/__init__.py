"""Methods: one family a file, and every name."""

from jaxode.methods.auto import Auto as Auto
from jaxode.methods.collocation import Collocation as Collocation
from jaxode.methods.esdirk import Esdirk as Esdirk
from jaxode.methods.explicit import Tableau as Tableau
from jaxode.methods.explicit import tableau as tableau
from jaxode.methods.krylov import Krylov as Krylov
from jaxode.methods.linear import Dense as Dense
from jaxode.methods.linear import Linear as Linear
from jaxode.methods.method import Method as Method
from jaxode.methods.method import Step as Step
from jaxode.methods.names import methods as methods
from jaxode.methods.names import named as named
from jaxode.methods.rosenbrock import Rosenbrock as Rosenbrock
from jaxode.methods.rosenbrock import rodas4 as rodas4
from jaxode.methods.rosenbrock import rodas4p as rodas4p
from jaxode.methods.rosenbrock import rodas5p as rodas5p
from jaxode.methods.sparse import Sparse as Sparse
from jaxode.methods.structures import Banded as Banded
from jaxode.methods.structures import BlockDiagonal as BlockDiagonal
from jaxode.methods.structures import Diagonal as Diagonal
from jaxode.methods.symplectic import Splitting as Splitting
from jaxode.methods.symplectic import composed as composed
