"""deltakern: DeltaTok and DeltaWorld on custom kernels. Importing it touches neither Triton nor CUDA."""

from importlib.metadata import PackageNotFoundError, version

from deltakern import ops
from deltakern.backend import BackendError, explain, use_impl

try:
    __version__ = version("deltakern")  # the one place is pyproject.toml
except PackageNotFoundError:  # a source tree on sys.path that was never installed
    __version__ = "0+unknown"

__all__ = ["BackendError", "__version__", "explain", "ops", "use_impl"]
