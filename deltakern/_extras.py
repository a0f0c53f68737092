"""Optional dependencies: imported when needed, missed with the line that installs them."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingExtraError(ImportError):
    """A package of one of the extras is not installed."""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Imports ``module``, or says which extra of this package brings it.

    Args:
        module: a dotted module name.
        extra: the name in ``pip install "deltakern[extra]"``.
        purpose: what cannot be done without it, as the subject of a sentence ("reading video").

    Raises:
        MissingExtraError: the package of ``module`` is not installed.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as problem:
        if problem.name is None or problem.name.partition(".")[0] != package:
            raise  # the package is there, something that it needs is not
        raise MissingExtraError(f'{purpose} needs the package {package}; install it with: pip install "deltakern[{extra}]"') from problem
