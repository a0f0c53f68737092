"""Tokenizing on Ray: a local Ray with two encoding actors fills the same store as one process."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

pytest.importorskip("ray", reason='needs Ray: pip install "deltakern[ray]"')
pytest.importorskip("av")
pytest.importorskip("pyarrow")

import ray
import stored

from deltakern.data import TokenDataset
from deltakern.data.ray_pipeline import tokenize_on_ray
from deltakern.data.store import StoreError, Writer
from deltakern.data.tokenize import Job, TokenizeOptions, tokenize

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def two_workers():
    here = {"env_vars": {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=4, include_dashboard=False, logging_level=logging.ERROR, runtime_env=here, object_store_memory=200 << 20)
    yield
    ray.shutdown()


def contents(folder: Path) -> dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]]:
    dataset = TokenDataset(folder)
    return {name: dataset[i] for i, name in enumerate(dataset.names(range(len(dataset))))}


def test_ray_fills_the_store_of_one_process(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    for i in range(3):
        stored.write_video(videos / f"{i}.mp4", i)
    (videos / "broken.mp4").write_bytes(b"not a video")
    options = TokenizeOptions(crops=2, sampling=stored.SMALL, rows_per_shard=4, progress=False)
    job = Job((str(videos),), str(tmp_path / "ray"), options, *stored.write_models(tmp_path / "models"))
    assert tokenize_on_ray(job, actors=2, gpus=0) == (6, 0, 1, False)
    assert tokenize_on_ray(job, actors=2, gpus=0) == (0, 6, 1, False)
    tokenize([videos], tmp_path / "one", stored.tokenizer(), options)
    ours, expected = contents(tmp_path / "ray"), contents(tmp_path / "one")
    assert ours.keys() == expected.keys()
    for key, (tokens, times) in expected.items():
        assert torch.allclose(ours[key][0], tokens, rtol=2e-3, atol=1e-4)  # float16, and another number of threads
        assert torch.equal(ours[key][1], times)
    assert any("broken.mp4" in p.read_text() for p in (tmp_path / "ray/failed").glob("*.jsonl"))
    done = tokenize([videos], tmp_path / "ray", stored.tokenizer(), options)
    assert (done.written, done.present) == (0, 6)
    Writer(tmp_path / "other", stored.manifest())
    with pytest.raises(StoreError, match="tokens of another kind"):
        tokenize_on_ray(Job((str(videos),), str(tmp_path / "other"), options, job.dinov3, job.deltatok), actors=1, gpus=0)
    with pytest.raises(ValueError, match="actors must be at least 1"):
        tokenize_on_ray(job, actors=0)
