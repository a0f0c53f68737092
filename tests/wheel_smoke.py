"""Run by the gate in a clean environment that holds the built wheel and nothing else: does what was packed work?"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import deltakern
from deltakern import backend, ops
from deltakern.models import DINOv3Config

torch.manual_seed(0)
package = Path(deltakern.__file__).parent
assert "site-packages" in str(package), f"not the installed wheel: {package}"
assert deltakern.__version__ != "0+unknown"
assert (package / "data" / "clips" / "bigbuckbunny.mp4").stat().st_size > 10_000, "the bundled clip is missing"
assert backend.extension().module is not None, f"the compiled extension is missing: {backend.extension().error}"

backbone = deltakern.DINOv3(config=DINOv3Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64))
world = deltakern.DeltaWorld(
    deltakern.DeltaTok(backbone, num_hidden_layers=1, intermediate_size=96),
    predictor_hidden_size=64,
    predictor_num_hidden_layers=1,
    predictor_num_heads=1,
    num_samples_eval=2,
).eval()
frames = torch.randint(0, 256, (1, 3, 3, 32, 32), dtype=torch.uint8)
futures, truth, context = world(frames, torch.tensor([[0.0, 0.1, 0.2]]), ctx_len=2)
assert futures.shape == (1, 2, 1, 4, 64)
assert futures.isfinite().all()
# An untrained world's futures differ by less than a loss in float32 resolves, so either may win: candidates that lie apart.
candidates = futures[:, :1, 0] + torch.tensor([0.5, 0.1, 0.3])[:, None, None] * torch.randn(3, 4, 64)
index, loss = ops.best_of_n(candidates, futures[:, 0, 0], reduce_dims=2, impl="cpp")
expected = ops.best_of_n.reference(candidates, futures[:, 0, 0], reduce_dims=2)
assert index.tolist() == expected[0].tolist() == [1], (index, expected)
torch.testing.assert_close(loss, expected[1])
print(f"wheel of deltakern {deltakern.__version__} works on Python {sys.version.split()[0]}, torch {torch.__version__}")
