"""The models: DINOv3 backbone, DeltaTok, DeltaWorld, the dense DINO-world baseline, released task heads, checkpoints."""

from deltakern.models import checkpoint
from deltakern.models.deltatok import DeltaTok, Savings
from deltakern.models.deltaworld import DeltaWorld
from deltakern.models.dinov3 import DINOv3, DINOv3Config
from deltakern.models.dinoworld import DINOWorld
from deltakern.models.heads import DepthHead, RGBHead, SegHead
from deltakern.models.sampling import Futures, score, top
from deltakern.models.stream import Stream
from deltakern.nn import StaleCacheError

__all__ = [
    "DINOWorld",
    "DINOv3",
    "DINOv3Config",
    "DeltaTok",
    "DeltaWorld",
    "DepthHead",
    "Futures",
    "RGBHead",
    "Savings",
    "SegHead",
    "StaleCacheError",
    "Stream",
    "checkpoint",
    "score",
    "top",
]
