"""The token store: drawing clips, finding videos, writing, reading, killing, and what is refused."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("pyarrow")

import pyarrow.parquet
import stored
from hypothesis import given, settings
from hypothesis import strategies as st

import deltakern
from deltakern.data import TokenDataset, sampling, store
from deltakern.data import tokenize as stage
from deltakern.data.sampling import Sampling, draw_clips, generator_for
from deltakern.data.sources import SourceError, find_videos
from deltakern.data.store import StoreError, TokenOrder, Writer, done_clips, fingerprint
from deltakern.data.tokenize import TokenizeOptions, tokenize
from deltakern.data.video import frame_times, read_clip
from deltakern.models import checkpoint
from deltakern.nn import frozen


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five small videos, one of them in a folder of its own, and one file that is none."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "deep").mkdir()
    for i in range(4):
        stored.write_video(folder / f"{i}.mp4", i)
    stored.write_video(folder / "deep" / "0.mp4", 4)
    (folder / "broken.mp4").write_bytes(b"not a video")
    (folder / "notes.txt").write_text("not looked at")
    return folder


def options(**changes) -> TokenizeOptions:
    return TokenizeOptions(**{"crops": 2, "sampling": stored.SMALL, "rows_per_shard": 3, "progress": False, **changes})


def contents(folder: Path) -> dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]]:
    dataset = TokenDataset(folder)
    everything = range(len(dataset))
    return dict(zip(dataset.names(everything), (dataset[i] for i in everything), strict=True))


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, (tokens, times) in one.items():
        assert torch.equal(tokens, other[key][0]), key
        assert torch.equal(times, other[key][1]), key


# Drawing


def test_frame_times_are_those_of_the_frames():
    assert torch.allclose(frame_times(stored.CLIP), read_clip(stored.CLIP).timestamps, rtol=0, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 400), st.sampled_from([12.0, 25.0, 29.97, 60.0]), st.integers(2, 9))
def test_drawn_frames_are_nearest_to_random_times(seed, frames, rate, num_frames):
    """Against the release's formula: the frame whose time is nearest, over all frames."""
    shown = torch.arange(frames, dtype=torch.float64) / rate
    drawn = sampling.draw_frames(shown, Sampling(num_frames=num_frames), generator_for(seed))
    g = generator_for(seed)
    gaps = torch.rand(num_frames - 1, generator=g, dtype=torch.float64) * (1 / 3 - 1 / 25) + 1 / 25
    offsets = torch.cat((torch.zeros(1, dtype=torch.float64), gaps.cumsum(0)))
    start = torch.rand(1, generator=g, dtype=torch.float64) * max(0.0, shown[-1].item() - offsets[-1].item())
    distance = (shown[None] - (start + offsets)[:, None]).abs()
    assert torch.equal(distance.gather(1, drawn[:, None])[:, 0], distance.min(1).values)
    assert (drawn.diff() >= 0).all()


def test_gaps_are_uniform_between_a_25th_and_a_third_of_a_second():
    shown = torch.arange(100_000, dtype=torch.float64) / 10_000  # fine enough that the nearest frame is the time itself
    gaps = torch.cat([shown[sampling.draw_frames(shown, Sampling(), generator_for(i))].diff() for i in range(400)])
    assert gaps.min() >= 1 / 25 - 1e-3
    assert gaps.max() <= 1 / 3 + 1e-3
    quarters = torch.histc(gaps, 4, 1 / 25, 1 / 3) / len(gaps)
    assert (quarters - 0.25).abs().max() < 0.04


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(17, 700), st.integers(17, 700))
def test_crops_lie_inside_and_have_the_asked_area_and_shape(seed, height, width):
    top, left, tall, wide = sampling.draw_crop(height, width, Sampling(), generator_for(seed))
    assert 0 <= top <= top + tall <= height
    assert 0 <= left <= left + wide <= width
    if tall < height and wide < width:
        assert tall * wide / (height * width) >= 0.6 - 0.1
        assert 3 / 4 * 0.9 <= wide / tall <= 4 / 3 * 1.1


def test_a_whole_frame_crop_is_a_bilinear_resize_and_half_are_mirrored():
    frames = read_clip(stored.CLIP, num_frames=2, size=(64, 64)).frames
    plain = Sampling(size=64, scale=(1.0, 1.0), ratio_jitter=1.0, flip=False)
    assert torch.equal(sampling.augment(frames, plain, generator_for(0)), frames)
    mirrored = [
        torch.equal(sampling.augment(frames, Sampling(size=64, scale=(1.0, 1.0), ratio_jitter=1.0), generator_for(i)), frames.flip(-1))
        for i in range(60)
    ]
    assert 15 < sum(mirrored) < 45


def test_a_draw_depends_on_its_number_alone():
    together = draw_clips(stored.CLIP, stored.SMALL, 3, "a", [0, 1, 2])
    alone = draw_clips(stored.CLIP, stored.SMALL, 3, "a", [1])[0]
    assert torch.equal(together[1].frames, alone.frames)
    assert torch.equal(together[1].timestamps, alone.timestamps)
    assert alone.timestamps[0] == 0
    others = [together[0], *draw_clips(stored.CLIP, stored.SMALL, 4, "a", [1]), *draw_clips(stored.CLIP, stored.SMALL, 3, "b", [1])]
    assert not any(torch.equal(alone.frames, other.frames) for other in others)


def test_many_draws_of_a_video_are_decoded_in_groups(monkeypatch):
    whole = draw_clips(stored.CLIP, stored.SMALL, 0, "a", range(5))
    monkeypatch.setattr(sampling, "_AT_ONCE", 16)
    for one, other in zip(whole, draw_clips(stored.CLIP, stored.SMALL, 0, "a", range(5)), strict=True):
        assert torch.equal(one.frames, other.frames)


def test_a_video_shorter_than_the_gaps_repeats_its_last_frame(tmp_path):
    short = stored.write_video(tmp_path / "short.mp4", frames=3)
    clip = draw_clips(short, stored.SMALL, 0, "short", [0])[0]
    assert clip.frames.shape == (8, 3, 32, 32)
    assert torch.equal(clip.frames[-1], clip.frames[-2])
    assert clip.timestamps[-1] == clip.timestamps[-2]


def test_the_middle_clip():
    clip = sampling.middle_clip(stored.CLIP, 4, 0.2, 64)
    assert clip.frames.shape == (4, 3, 64, 64)
    assert torch.allclose(clip.timestamps.diff(), torch.full((3,), 0.2), atol=0.02)
    with pytest.raises(ValueError, match="too short: 100 frames"):
        sampling.middle_clip(stored.CLIP, 100, 0.2, 64)


@pytest.mark.parametrize(
    "bad",
    [{"num_frames": 1}, {"size": 40}, {"gaps": (0.2, 0.1)}, {"gaps": (0.0, 0.1)}, {"scale": (0.5, 1.5)}, {"ratio_jitter": 0.5}],
)
def test_sampling_refuses_nonsense(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)


# Sources


def test_files_folders_lists_and_tars(videos, tmp_path):
    assert [v.name for v in find_videos([videos])] == ["0.mp4", "1.mp4", "2.mp4", "3.mp4", "broken.mp4", "deep/0.mp4"]
    assert [v.name for v in find_videos([videos / "3.mp4", videos / "1.mp4"])] == ["1.mp4", "3.mp4"]
    listed = videos / "some.list"
    listed.write_text("# a comment\n\n2.mp4\ndeep/0.mp4\n")
    assert [v.name for v in find_videos([listed])] == ["2.mp4", "deep/0.mp4"]
    listed.unlink()
    shard = tmp_path / "shard.tar"
    with tarfile.open(shard, "w") as tar:
        tar.add(videos, "train")
    found = find_videos([shard])
    assert [v.name for v in found] == [f"shard.tar/train/{n}" for n in ("0.mp4", "1.mp4", "2.mp4", "3.mp4", "broken.mp4", "deep/0.mp4")]
    with found[5].file() as path:
        assert path.read_bytes() == (videos / "deep/0.mp4").read_bytes()
    assert not path.exists()


def test_sources_that_are_refused(videos, tmp_path):
    with pytest.raises(SourceError, match="no source"):
        find_videos([])
    with pytest.raises(SourceError, match="missing: no such file"):
        find_videos([tmp_path / "missing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="holds no video"):
        find_videos([tmp_path / "empty"])
    with pytest.raises(SourceError, match=r"two videos are named '0\.mp4'"):
        find_videos([videos, videos / "deep"])
    (tmp_path / "l.txt").write_text("\ngone.mp4\n")
    with pytest.raises(SourceError, match=r"line 2: no such file: gone\.mp4"):
        find_videos([tmp_path / "l.txt"])
    (tmp_path / "v.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(SourceError, match=r"plain \.tar"):
        find_videos([tmp_path / "v.tar.gz"])
    (tmp_path / "bad.tar").write_bytes(b"x" * 2000)
    with pytest.raises(SourceError, match="damaged"):
        find_videos([tmp_path / "bad.tar"])


# Tokenizing


def test_tokens_in_the_store_are_the_tokenizers(videos, tmp_path, caplog):
    tokenizer = stored.tokenizer()
    done = tokenize([videos], tmp_path / "s", tokenizer, options(dtype="float32"))
    assert done == (10, 0, 1, False)
    assert "broken.mp4" in caplog.text
    found = contents(tmp_path / "s")
    assert {key for key, _ in found} == {"0.mp4", "1.mp4", "2.mp4", "3.mp4", "deep/0.mp4"}
    clip = draw_clips(videos / "deep/0.mp4", stored.SMALL, 0, "deep/0.mp4", [1])[0]
    with torch.no_grad(), frozen(tokenizer):  # as it is while tokenizing
        expected = tokenizer.tokenize(clip.frames[None])[0]
    tokens, times = found["deep/0.mp4", 1]
    assert torch.equal(tokens, expected)
    assert torch.equal(times, clip.timestamps)


def test_a_rerun_computes_nothing_and_more_crops_are_added(videos, tmp_path):
    tokenizer = stored.tokenizer()
    tokenize([videos], tmp_path / "s", tokenizer, options())
    assert tokenize([videos], tmp_path / "s", tokenizer, options()) == (0, 10, 1, False)
    assert tokenize([videos], tmp_path / "s", tokenizer, options(crops=3)) == (5, 10, 1, False)
    tokenize([videos], tmp_path / "once", tokenizer, options(crops=3))
    assert_same(contents(tmp_path / "s"), contents(tmp_path / "once"))


def test_decoding_workers_and_parts_give_the_same_tokens(videos, tmp_path):
    tokenizer = stored.tokenizer()
    tokenize([videos], tmp_path / "one", tokenizer, options())
    parts = [tokenize([videos], tmp_path / "s", tokenizer, options(workers=1, part=(i, 2))) for i in range(2)]
    assert sum(p.written for p in parts) == 10
    assert_same(contents(tmp_path / "s"), contents(tmp_path / "one"))


def test_a_log_gets_lines_where_a_terminal_gets_a_bar(videos, tmp_path, caplog, capsys):
    pytest.importorskip("rich")
    caplog.set_level("INFO", "deltakern")
    tokenize([videos], tmp_path / "s", stored.tokenizer(), options(progress=True))
    assert re.search(r"s: 1 of 12 clips, \S+ a second, \S+ s left", caplog.text)
    assert capsys.readouterr().out == ""


def test_float16_and_batches_are_close(videos, tmp_path):
    tokenizer = stored.tokenizer()
    tokenize([videos], tmp_path / "exact", tokenizer, options(dtype="float32"))
    tokenize([videos], tmp_path / "half", tokenizer, options(batch=4))
    exact, half = contents(tmp_path / "exact"), contents(tmp_path / "half")
    for key, (tokens, _) in exact.items():
        assert (tokens - half[key][0]).abs().max() <= 2**-11 * tokens.abs().max() + 1e-5


def _tokenize_as(sources, folder, models, device):
    torch.set_num_threads(1)
    stage.Job((str(sources),), str(folder), options(), *models).run(device)


def test_two_processes_into_one_store_do_not_collide(videos, tmp_path):
    """Both do all the work at once: the store holds every clip, each read once."""
    models = stored.write_models(tmp_path / "models")
    context = stored.clean_processes()
    children = [context.Process(target=_tokenize_as, args=(videos, tmp_path / "s", models, "cpu")) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    tokenize([videos], tmp_path / "one", stored.tokenizer(), options())
    assert_same(contents(tmp_path / "s"), contents(tmp_path / "one"))


def test_devices_share_the_work(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda method: stored.clean_processes())
    models = stored.write_models(tmp_path / "models")
    done = stage.run_on_devices(stage.Job((str(videos),), str(tmp_path / "s"), options(crops=1), *models), ["cpu", "cpu"])
    assert done == (5, 0, 1, False)
    assert len(contents(tmp_path / "s")) == 5


def _tokenize_counting(count, sources, folder):
    torch.set_num_threads(1)
    add = Writer.add

    def counting(self, *args):
        add(self, *args)
        with count.get_lock():
            count.value += 1

    Writer.add = counting
    tokenizer = stored.tokenizer()
    count.value = 0
    tokenize([sources], folder, tokenizer, options(rows_per_shard=2, crops=4))


def test_ten_kills_lose_at_most_the_shard_in_hand(videos, tmp_path):
    many = tmp_path / "many"
    many.mkdir()
    for i in range(12):
        shutil.copy(videos / f"{i % 4}.mp4", many / f"{i:02d}.mp4")
    tokenizer = stored.tokenizer()
    tokenize([many], tmp_path / "clean", tokenizer, options(crops=4))
    context, chance, killed = stored.clean_processes(), random.Random(0), 0
    for _ in range(10):
        before = sum(map(len, done_clips(tmp_path / "s").values()))
        moment = chance.randint(0, 5), chance.uniform(0, 0.02)
        alive, added = stored.killed_after(context, *moment, _tokenize_counting, many, tmp_path / "s")
        killed += alive
        after = contents(tmp_path / "s") if any((tmp_path / "s" / "shards").glob("*.parquet")) else {}
        assert before + added - 2 <= len(after) <= before + added + 1
    assert killed >= 8
    left = tokenize([many], tmp_path / "s", tokenizer, options(rows_per_shard=2, crops=4))
    assert left.written + left.present == 48
    assert_same(contents(tmp_path / "s"), contents(tmp_path / "clean"))
    assert not list((tmp_path / "s").rglob("*.partial"))


def _tokenize_until_told(began, sources, folder):
    torch.set_num_threads(1)
    tokenizer = stored.tokenizer()
    encode = stage.tokenize_videos

    def slow(*args):
        began.set()
        time.sleep(0.05)
        return encode(*args)

    stage.tokenize_videos = slow
    done = tokenize([sources], folder, tokenizer, options(crops=4, rows_per_shard=100))
    raise SystemExit(10 + done.stopped + 2 * (done.written == len(contents(folder))))


def test_sigterm_writes_what_is_in_hand(videos, tmp_path):
    context = stored.clean_processes()
    began = context.Event()
    child = context.Process(target=_tokenize_until_told, args=(began, videos, tmp_path / "s"))
    child.start()
    assert began.wait(60)
    os.kill(child.pid, signal.SIGTERM)
    child.join(60)
    assert child.exitcode == 13  # stopped, and all that it says it wrote is there
    assert 0 < len(contents(tmp_path / "s")) < 20


# Fingerprints


def test_the_fingerprint_is_of_weights_and_configuration(tmp_path):
    base = fingerprint(stored.tokenizer())
    assert fingerprint(stored.tokenizer()) == base
    assert fingerprint(stored.tokenizer(attention="sdpa-math", savings=deltakern.Savings.none())) == base
    assert fingerprint(stored.tokenizer(seed=1)) != base
    assert fingerprint(stored.tokenizer(use_delta=False)) != base
    assert fingerprint(stored.tokenizer(qk_norm_order="post_rope")) != base
    changed = stored.tokenizer()
    with torch.no_grad():
        changed.backbone.backbone.model.layer[0].mlp.up_proj.bias[3] += 1e-6
    assert fingerprint(changed) != base
    loaded = stage.load_tokenizer(*stored.write_models(tmp_path))
    assert fingerprint(loaded) == base


def test_tokens_of_another_tokenizer_are_refused(videos, tmp_path):
    tokenize([videos], tmp_path / "s", stored.tokenizer(), options(crops=1))
    with pytest.raises(StoreError, match="tokens of another kind: fingerprint"):
        tokenize([videos], tmp_path / "s", stored.tokenizer(seed=1), options(crops=1))
    with pytest.raises(StoreError, match="another kind: seed is 0, expected 1"):
        tokenize([videos], tmp_path / "s", stored.tokenizer(), options(seed=1))
    with pytest.raises(StoreError, match="made by other models"):
        TokenDataset(tmp_path / "s", fingerprint=fingerprint(stored.tokenizer(seed=1)))
    tokenize([videos], tmp_path / "t", stored.tokenizer(seed=1), options(crops=1))
    with pytest.raises(StoreError, match="different kinds: fingerprint"):
        TokenDataset([tmp_path / "s", tmp_path / "t"])
    shutil.copy(next((tmp_path / "t/shards").glob("*.parquet")), tmp_path / "s/shards/moved.parquet")
    with pytest.raises(StoreError, match=r"moved\.parquet: its tokens were made by other models"):
        TokenDataset(tmp_path / "s")


# Writing and reading


def test_columns_and_kinds(tmp_path):
    folder = stored.write_store(tmp_path, videos=2, dtype="float16")
    schema = pyarrow.parquet.read_schema(next((folder / "shards").glob("*.parquet")))
    assert [(f.name, str(f.type)) for f in schema] == [
        ("video", "string"),
        ("crop", "int32"),
        ("timestamps", "fixed_size_list<element: float>[8]"),
        ("tokens", f"fixed_size_binary[{8 * 16 * 2}]"),
        ("fingerprint", "string"),
    ]


def test_items_batches_and_loaders_agree(tmp_path):
    dataset = TokenDataset(stored.write_store(tmp_path))
    assert len(dataset) == 24
    tokens, times = dataset.batch([5, 0, 23, 5])
    for i, index in enumerate([5, 0, -1, 5]):
        assert torch.equal(tokens[i], dataset[index][0])
        assert torch.equal(times[i], dataset[index][1])
    assert tokens.dtype == times.dtype == torch.float32
    loader = torch.utils.data.DataLoader(dataset, batch_size=7, num_workers=1)
    together = [torch.cat(parts) for parts in zip(*loader, strict=True)]
    assert torch.equal(together[0], dataset.batch(range(24))[0])
    with pytest.raises(IndexError):
        dataset[24]


def test_a_small_cache_changes_nothing_and_stays_small(tmp_path):
    folder = stored.write_store(tmp_path)
    wide, narrow = TokenDataset(folder), TokenDataset(folder, cache_bytes=1)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.equal(wide.batch(order)[0], narrow.batch(order)[0])
    assert len(narrow._cache) == 1
    assert len(wide._cache) == 5


def test_splits_divide_videos(tmp_path):
    folder = stored.write_store(tmp_path, videos=60, crops=2)
    sides = {split: TokenDataset(folder, split=split, val_fraction=0.3) for split in ("train", "val")}
    names = {split: {v for v, _ in d.names(range(len(d)))} for split, d in sides.items()}
    assert not names["train"] & names["val"]
    assert len(sides["train"]) + len(sides["val"]) == 120
    assert all(len(sides[s]) == 2 * len(names[s]) for s in sides)
    assert 8 <= len(names["val"]) <= 28
    with pytest.raises(StoreError, match="no clip in the split 'val'"):
        TokenDataset(folder, split="val")


def test_several_stores_are_one_dataset(tmp_path):
    one = stored.write_store(tmp_path / "a", videos=4)
    two = stored.write_store(tmp_path / "b", videos=6)
    both = TokenDataset([one, two])
    assert len(both) == 12  # the first four videos have the same names and count once
    assert torch.equal(both[0][0], TokenDataset(one)[0][0])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 60), st.integers(1, 80), st.sampled_from([1, 3000, 10**9]))
def test_the_order_takes_every_clip_once_an_epoch(seed, start, count, cache):
    dataset = _DATASET
    dataset.cache_bytes = cache
    order = TokenOrder(dataset, seed)
    for epoch in range(3):
        assert sorted(order.epoch(epoch)) == list(range(len(dataset)))
    endless = np.concatenate([order.epoch(e) for e in range(8)])
    assert np.array_equal(order.take(start, start + count), endless[start : start + count])
    assert np.array_equal(TokenOrder(dataset, seed).take(start, start + count), endless[start : start + count])


@pytest.fixture(scope="module", autouse=True)
def _dataset(tmp_path_factory):
    global _DATASET
    _DATASET = TokenDataset(stored.write_store(tmp_path_factory.mktemp("order")))


def test_a_small_cache_reads_each_shard_once_an_epoch(tmp_path, monkeypatch):
    dataset = TokenDataset(stored.write_store(tmp_path), cache_bytes=4 * 5 * 8 * 16 * 4)
    reads = []
    columns = store._columns
    monkeypatch.setattr(store, "_columns", lambda path, names: reads.append(path) or columns(path, names))
    order = TokenOrder(dataset)
    for start in range(0, 24, 4):
        dataset.batch(order.take(start, start + 4))
    assert order._together == 2
    assert len(reads) == len(set(reads)) == 5
    assert not np.array_equal(order.epoch(0), order.epoch(1))


def test_damaged_shards_are_named(tmp_path):
    folder = stored.write_store(tmp_path, rows_per_shard=24)
    shard = next((folder / "shards").glob("*.parquet"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(StoreError, match=f"{shard.name}.*damaged"):
        TokenDataset(folder)
    at = len(whole) // 2  # most of the file is tokens
    shard.write_bytes(whole[:at] + bytes(b ^ 0xFF for b in whole[at : at + 8]) + whole[at + 8 :])
    with pytest.raises(StoreError, match=f"{shard.name}.*damaged"):
        TokenDataset(folder).batch(range(24))


def test_what_a_store_is_not(tmp_path):
    with pytest.raises(StoreError, match="not a token store: it has no manifest"):
        TokenDataset(tmp_path)
    (tmp_path / "manifest.json").write_text("[1]")
    with pytest.raises(StoreError, match="not a token store's manifest"):
        TokenDataset(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(StoreError, match="format that this version does not read"):
        TokenDataset(tmp_path)
    with pytest.raises(ValueError, match="split must be one of"):
        TokenDataset(tmp_path, split="test")
    with pytest.raises(StoreError, match="no store was given"):
        TokenDataset([])


def test_tokens_that_cannot_be_stored(tmp_path):
    writer = Writer(tmp_path, stored.manifest(dtype="float16"))
    times, tokens = torch.zeros(8), torch.zeros(8, 16)
    with pytest.raises(StoreError, match="not finite"):
        writer.add("a", 0, times, tokens + torch.nan)
    with pytest.raises(StoreError, match="too large for float16"):
        writer.add("a", 0, times, tokens + 1e5)
    with pytest.raises(StoreError, match=r"expected tokens \(8, 16\)"):
        writer.add("a", 0, times, tokens[:7])
    with pytest.raises(ValueError, match="rows_per_shard"):
        Writer(tmp_path, stored.manifest(), rows_per_shard=0)
    with pytest.raises(ValueError, match="dtype must be one of"):
        stored.manifest(dtype="int8")


@pytest.mark.parametrize(
    ("bad", "message"),
    [({"crops": 0}, "crops"), ({"workers": -1}, "workers"), ({"precision": "int8"}, "precision"), ({"part": (2, 2)}, "part")],
)
def test_options_refuse_nonsense(bad, message):
    with pytest.raises(ValueError, match=message):
        TokenizeOptions(**bad)


def test_random_weights_are_the_same_each_time(monkeypatch):
    monkeypatch.setattr(stage, "DINOv3Config", lambda: stored.CONFIG)
    one, other = (stage.load_tokenizer(random_weights=True) for _ in range(2))
    assert fingerprint(one) == fingerprint(other)
    with pytest.raises(ValueError, match="random weights come without"):
        stage.load_tokenizer("somewhere", random_weights=True)


def test_models_are_loaded_from_files(tmp_path):
    dinov3, deltatok = stored.write_models(tmp_path)
    loaded = stage.load_tokenizer(dinov3, deltatok)
    for name, value in stored.tokenizer().state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    with pytest.raises(checkpoint.CheckpointError):
        stage.load_tokenizer(dinov3, str(tmp_path / "dinov3" / "model.safetensors"))
