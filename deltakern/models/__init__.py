"""The models: the frozen DINOv3 backbone, the DeltaTok tokenizer, the DeltaWorld predictor, and the dense DINO-world baseline."""

from deltakern.models.deltatok import DeltaTok, Savings
from deltakern.models.deltaworld import DeltaWorld
from deltakern.models.dinov3 import DINOv3, DINOv3Config
from deltakern.models.dinoworld import DINOWorld
from deltakern.models.sampling import Futures, score, top
from deltakern.models.stream import StaleCacheError, Stream

__all__ = [
    "DINOWorld",
    "DINOv3",
    "DINOv3Config",
    "DeltaTok",
    "DeltaWorld",
    "Futures",
    "Savings",
    "StaleCacheError",
    "Stream",
    "score",
    "top",
]
