"""deltakern: DeltaTok and DeltaWorld on custom kernels. Importing it touches neither Triton nor CUDA."""

from importlib.metadata import PackageNotFoundError, version

from deltakern import models, ops
from deltakern.backend import BackendError, explain, use_impl
from deltakern.models import DeltaTok, DeltaWorld, DINOv3, DINOv3Config, DINOWorld, Savings
from deltakern.nn import FrozenWeightsError, freeze, frozen, is_frozen, unfreeze

try:
    __version__ = version("deltakern")  # the one place is pyproject.toml
except PackageNotFoundError:  # a source tree on sys.path that was never installed
    __version__ = "0+unknown"

__all__ = [
    "BackendError",
    "DINOWorld",
    "DINOv3",
    "DINOv3Config",
    "DeltaTok",
    "DeltaWorld",
    "FrozenWeightsError",
    "Savings",
    "__version__",
    "explain",
    "freeze",
    "frozen",
    "is_frozen",
    "models",
    "ops",
    "unfreeze",
    "use_impl",
]
