"""The stages of the models: the release's structure in eager and under torch.compile against this package, in turns."""

from __future__ import annotations

import pytest
import torch

from deltakern.report import collect, stages


@pytest.fixture(scope="session")
def models(preset, device, dtype) -> stages.Models:
    return stages.Models(stages.PRESETS[preset], device, autocast=None if dtype == torch.float32 else dtype)


@pytest.mark.parametrize("name", stages.STAGES)
def test_stage(name: str, models: stages.Models, benchmark, request, preset, device, dtype, where, record):
    """All implementations take turns; pytest-benchmark's own table shows this package's."""
    (stage,) = models.stages(names=(name,))
    try:
        made = collect.stage_rows(stage, preset, device, dtype, budget=request.config.getoption("--budget"), where=where)
    except collect.RedError as problem:
        pytest.fail(f"no speed: {problem}", pytrace=False)
    record(made)
    benchmark.group = "stages"
    benchmark.extra_info.update({row.impl: row.seconds for row in made})

    def timed():
        stage.calls[stages.OURS]()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.pedantic(timed, rounds=1, iterations=1)
