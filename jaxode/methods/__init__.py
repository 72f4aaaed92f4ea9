"""Methods: one family a file, and every name."""

from jaxode.methods.explicit import Tableau as Tableau
from jaxode.methods.explicit import tableau as tableau
from jaxode.methods.method import Method as Method
from jaxode.methods.method import Step as Step
from jaxode.methods.names import methods as methods
from jaxode.methods.names import named as named
from jaxode.methods.symplectic import Splitting as Splitting
from jaxode.methods.symplectic import composed as composed
