"""Reading clips: against videos made here with known frames and times, a real clip, and files that are broken on purpose."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch

av = pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")

from deltakern.data import CLIP, video  # noqa: E402
from deltakern.data.video import VideoError, read_clip  # noqa: E402

CARPHONE = Path(__file__).parent / "data" / "carphone.mp4"


def level(i: int) -> int:
    """The grey level of frame ``i``: tells frames apart after lossy coding."""
    return 16 + 7 * (i % 32)


def write(
    path: Path, times: list[int], *, base: int = 1000, size: tuple[int, int] = (48, 64), gop: int = 12, b_frames: int = 2, **container
) -> Path:
    """A grey video whose frame i has :func:`level` (i) and comes on screen at ``times[i] / base`` seconds."""
    with av.open(str(path), "w", **container) as out:
        stream = out.add_stream("libx264", rate=25)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, base)
        stream.options = {"qp": "4", "g": str(gop), "bf": str(b_frames), "sc_threshold": "0"}
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(torch.full((*size, 3), level(i), dtype=torch.uint8).numpy(), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, base)
            for packet in stream.encode(frame):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    return path


def which(clip: video.Clip) -> list[int]:
    """The indices of the frames, from their grey levels."""
    return [round((float(frame.float().mean()) - 16) / 7) for frame in clip.frames]


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("video") / "steady.mp4", [40 * i for i in range(30)])


UNEVEN = [0, 20, 100, 140, 400, 410, 900, 1000, 1001, 1500, 2600, 2640, 2900, 4000, 5200, 5300, 7000, 7100, 7200, 9000]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Variable frame rate, a keyframe every four frames, B-frames."""
    return write(tmp_path_factory.mktemp("video") / "uneven.mp4", UNEVEN, gop=4)


def test_every_frame(steady: Path) -> None:
    clip = read_clip(steady)
    assert clip.frames.dtype == torch.uint8
    assert clip.frames.shape == (30, 3, 48, 64)
    assert which(clip) == list(range(30))
    assert clip.timestamps.dtype == torch.float64
    torch.testing.assert_close(clip.timestamps, torch.arange(30, dtype=torch.float64) / 25, atol=1e-9, rtol=0)
    assert clip.fps == pytest.approx(25, rel=0.05)


@pytest.mark.parametrize(
    ("start", "stride", "count", "expected"), [(0.0, 1, 3, [0, 1, 2]), (0.39, 4, 3, [9, 13, 17]), (0.4, 1, 2, [10, 11])]
)
def test_strides(steady: Path, start: float, stride: int, count: int, expected: list[int]) -> None:
    clip = read_clip(steady, num_frames=count, stride=stride, start=start)
    assert which(clip) == expected
    torch.testing.assert_close(clip.timestamps, torch.tensor(expected, dtype=torch.float64) / 25, atol=1e-9, rtol=0)
    assert which(read_clip(steady, stride=stride, start=start)) == list(range(expected[0], 30, stride))


def test_a_time_names_the_frame_on_screen(uneven: Path) -> None:
    """Every millisecond-grained request against the plain search in the list of times."""
    asked = [0.0, 0.019, 0.05, 0.1399, 0.14, 0.405, 0.95, 1.2, 2.599, 3.999, 4.0, 5.25, 6.9, 7.15, 8.9, 9.01]
    expected = [max(i for i, t in enumerate(UNEVEN) if t / 1000 <= time + video.SLACK) for time in asked]
    clip = read_clip(uneven, timestamps=asked)
    assert which(clip) == expected
    torch.testing.assert_close(clip.timestamps, torch.tensor([UNEVEN[i] / 1000 for i in expected], dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_single_times_from_any_container(tmp_path: Path, suffix: str) -> None:
    """One request a call, so that each seeks by itself: with an index (mp4), cues (mkv), and neither (ts)."""
    times = [0, 20, 400, 420, 1900, 2600, 2640, 2900, 4000, 5200, 5300, 7000, 7100, 8200, 12000, 12040]
    path = write(tmp_path / f"uneven.{suffix}", times, gop=4)
    for i, time in enumerate(times):
        clip = read_clip(path, timestamps=[time / 1000])
        assert which(clip) == [i]
        assert clip.timestamps.item() == pytest.approx(time / 1000, abs=1e-3)
    assert which(read_clip(path, timestamps=[t / 1000 for t in times])) == list(range(len(times)))


def test_times_count_from_the_first_frame(tmp_path: Path) -> None:
    path = write(tmp_path / "late.mkv", [3000 + 40 * i for i in range(10)])
    clip = read_clip(path, timestamps=[0.0, 0.2])
    assert which(clip) == [0, 5]
    assert clip.timestamps.tolist() == pytest.approx([0.0, 0.2], abs=1e-3)


def test_one_frame_may_answer_two_times(steady: Path) -> None:
    clip = read_clip(steady, timestamps=[0.401, 0.41, 0.44])
    assert which(clip) == [10, 10, 11]


def test_seeks_instead_of_decoding_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "long.mp4", [40 * i for i in range(500)], gop=25)
    seen = []
    plain = video._File._shown
    monkeypatch.setattr(video._File, "_shown", lambda self: (seen.append(s.time) or s for s in plain(self)))
    read_clip(path, timestamps=[2.0, 10.0, 18.0])
    assert len(seen) < 3 * 55, "three requests decode at most about two seconds each"
    seen.clear()
    read_clip(path, start=15.0, num_frames=4)
    assert len(seen) < 60


def test_real_clip_agrees_however_it_is_asked() -> None:
    whole = read_clip(CARPHONE)
    assert whole.frames.shape == (60, 3, 144, 176)
    assert whole.fps == pytest.approx(30000 / 1001)
    some = read_clip(CARPHONE, timestamps=whole.timestamps[[3, 17, 40, 59]])
    assert torch.equal(some.frames, whole.frames[[3, 17, 40, 59]])
    assert torch.equal(some.timestamps, whole.timestamps[[3, 17, 40, 59]])
    strided = read_clip(CARPHONE, start=1.5, stride=3, num_frames=5)
    assert torch.equal(strided.frames, whole.frames[44:57:3])


def test_bundled_clip() -> None:
    assert CLIP.stat().st_size < 500_000
    assert "Blender Foundation" in (CLIP.parent / "ATTRIBUTION.txt").read_text(encoding="utf-8")
    clip = read_clip(CLIP)
    assert clip.frames.shape == (132, 3, 192, 256)
    assert clip.fps == 25
    moved = (clip.frames[6:].float() - clip.frames[:-6].float()).abs().mean((1, 2, 3))
    assert moved.min() > 1, "every quarter second something moves"


@pytest.mark.parametrize(
    ("size", "expected"),
    [(32, (32, 32)), (40, (32, 48)), (96, (96, 128)), ((48, 48), (48, 48)), ((20, 90), (20, 90)), ((99, 30), (99, 30))],
)
def test_sizes(steady: Path, size: int | tuple[int, int], expected: tuple[int, int]) -> None:
    assert read_clip(steady, num_frames=1, size=size).frames.shape[-2:] == expected


def test_resize_keeps_the_aspect_and_the_centre() -> None:
    """Against Pillow's antialiased bicubic on the same box."""
    frame = read_clip(CARPHONE, num_frames=1).frames[0]
    resized = read_clip(CARPHONE, num_frames=1, size=(64, 64)).frames[0]
    picture = Image.fromarray(frame.permute(1, 2, 0).numpy()).resize((78, 64), Image.Resampling.BICUBIC).crop((7, 0, 71, 64))
    theirs = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(64, 64, 3).permute(2, 0, 1)
    assert (resized.int() - theirs.int()).abs().max() <= 2


def test_downscaling_does_not_alias(tmp_path: Path) -> None:
    """A one-pixel chequerboard becomes an even grey; without antialiasing it stays black and white."""
    board = (torch.arange(128)[:, None] + torch.arange(128)) % 2 * 255
    Image.fromarray(board.to(torch.uint8)[..., None].expand(-1, -1, 3).contiguous().numpy()).save(tmp_path / "board.png")
    frame = read_clip(tmp_path, fps=1, size=32).frames[0, :, 2:-2, 2:-2]
    assert (frame.int() - 127).abs().max() <= 3


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_stored_rotation_is_applied(tmp_path: Path, turn: int) -> None:
    """The container's transformation matrix turns the picture clockwise by ``turn``; the bright half must follow."""
    path = tmp_path / "turned.mp4"
    picture = torch.zeros(64, 64, 3, dtype=torch.uint8)
    picture[:32] = 200  # the upper half is bright
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        for i in range(3):
            frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
            frame.pts = i
            for packet in stream.encode(frame):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    one, minus = (1 << 16).to_bytes(4, "big"), (-1 << 16).to_bytes(4, "big", signed=True)
    nil, w = bytes(4), (1 << 30).to_bytes(4, "big")
    # rows (a b u), (c d v), (x y w): x' = a p + c q, y' = b p + d q, with y downwards
    a, b, c, d = {0: (one, nil, nil, one), 90: (nil, one, minus, nil), 180: (minus, nil, nil, minus), 270: (nil, minus, one, nil)}[turn]
    raw = path.read_bytes()
    header = raw.index(b"tkhd") + 4
    matrix = header + 40
    assert raw[matrix : matrix + 36] == one + nil * 3 + one + nil * 3 + w
    path.write_bytes(raw[:matrix] + a + b + nil + c + d + nil * 3 + w + raw[matrix + 36 :])
    frame = read_clip(path, num_frames=1).frames[0].float().mean(0)
    halves = {0: frame[:32], 90: frame[:, 32:], 180: frame[32:], 270: frame[:, :32]}
    assert max(halves, key=lambda k: float(halves[k].mean())) == turn
    assert halves[turn].mean() > 180


def test_folder_of_images(tmp_path: Path) -> None:
    for i in range(12):  # natural order: 2 before 10
        Image.new("RGB" if i % 2 else "L", (40, 24), (level(i),) * 3 if i % 2 else level(i)).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    clip = read_clip(tmp_path, fps=10)
    assert which(clip) == list(range(12))
    assert clip.timestamps.tolist() == pytest.approx([i / 10 for i in range(12)])
    assert clip.fps == 10
    assert which(read_clip(tmp_path, fps=10, timestamps=[0.1, 0.35, 1.1])) == [1, 3, 11]
    assert which(read_clip(tmp_path, fps=10, start=0.5, stride=3, num_frames=3)) == [5, 8, 11]
    assert read_clip(tmp_path, fps=10, size=16, num_frames=1).frames.shape == (1, 3, 16, 16)
    with pytest.raises(VideoError, match=r"1\.200 s was asked for, but its 12 images at 10 a second end at 1\.200 s"):
        read_clip(tmp_path, fps=10, timestamps=[1.2])
    with pytest.raises(VideoError, match="too short: 3 frames with stride 6"):
        read_clip(tmp_path, fps=10, num_frames=3, stride=6)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a positive fps, got None"):
        read_clip(tmp_path)
    with pytest.raises(VideoError, match="holds no image"):
        read_clip(tmp_path, fps=5)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(VideoError, match=r"a\.png: not an image"):
        read_clip(tmp_path, fps=5)
    (tmp_path / "a.png").unlink()
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    Image.new("RGB", (9, 8)).save(tmp_path / "c.png")
    with pytest.raises(VideoError, match="frames differ in size, 8x8 then 8x9"):
        read_clip(tmp_path, fps=5)


def test_missing_empty_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"nowhere\.mp4: no such file"):
        read_clip(tmp_path / "nowhere.mp4")
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(VideoError, match=r"empty\.mp4: the file is empty"):
        read_clip(tmp_path / "empty.mp4")
    (tmp_path / "text.mp4").write_text("this is not a video " * 100)
    with pytest.raises(VideoError, match=r"text\.mp4: not a video that can be opened"):
        read_clip(tmp_path / "text.mp4")


def test_audio_only(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(torch.zeros(1, 1024).numpy(), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 44100, 0
        for packet in [*stream.encode(frame), *stream.encode()]:
            out.mux(packet)
    with pytest.raises(VideoError, match=r"sound\.mp4: has no video stream \(audio only\)"):
        read_clip(path)


def test_truncated(tmp_path: Path) -> None:
    """With its index at the front a cut file opens: what is there can be read, what is not says so. With it at the end, nothing."""
    whole = write(tmp_path / "whole.mp4", [40 * i for i in range(60)], size=(144, 176), options={"movflags": "+faststart"})
    raw = whole.read_bytes()
    payload = raw.index(b"mdat")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(raw[: payload + (len(raw) - payload) // 2])
    assert which(read_clip(cut, num_frames=5)) == [0, 1, 2, 3, 4]
    with pytest.raises(VideoError, match=r"cut\.mp4: "):
        read_clip(cut, num_frames=60)
    with pytest.raises(VideoError, match=r"cut\.mp4: "):
        read_clip(cut, timestamps=[2.3])
    headless = write(tmp_path / "headless.mp4", [40 * i for i in range(60)])
    headless.write_bytes(headless.read_bytes()[:-600])
    with pytest.raises(VideoError, match=r"headless\.mp4: not a video that can be opened"):
        read_clip(headless)


def test_damaged_in_the_middle(tmp_path: Path) -> None:
    raw = bytearray(CARPHONE.read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 4000] = bytes(4000)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(raw)
    with pytest.raises(VideoError, match=r"damaged\.mp4: damaged after \d"):
        read_clip(path)
    assert torch.equal(read_clip(path, num_frames=5).frames, read_clip(CARPHONE, num_frames=5).frames)


def test_too_short_and_out_of_range(steady: Path) -> None:
    with pytest.raises(VideoError, match=r"steady\.mp4: too short: 31 frames .* it has 30; but its last frame is at 1\.160 s"):
        read_clip(steady, num_frames=31)
    assert which(read_clip(steady, num_frames=31, strict=False)) == list(range(30))
    with pytest.raises(VideoError, match=r"a frame at 1\.300 s was asked for, but its last frame is at 1\.160 s"):
        read_clip(steady, timestamps=[0.1, 1.3])
    with pytest.raises(VideoError, match=r"start is 5\.000 s"):
        read_clip(steady, start=5.0)
    assert which(read_clip(steady, timestamps=[1.19])) == [29], "the last frame stays for its own duration"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestamps": [0.2, 0.1]}, "must increase strictly, got 0.1 after 0.2"),
        ({"timestamps": [0.1, 0.1]}, "must increase strictly"),
        ({"timestamps": [-0.1]}, "at least 0 seconds"),
        ({"timestamps": [float("nan")]}, "must be finite"),
        ({"timestamps": []}, "non-empty sequence"),
        ({"timestamps": [[0.0]]}, r"non-empty sequence of seconds, got shape \(1, 1\)"),
        ({"timestamps": [0.0], "num_frames": 2}, "timestamps come without num_frames"),
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"start": -1.0}, "start must be at least 0 seconds"),
        ({"size": 8}, "size must be at least 16 pixels, got 8"),
        ({"size": (1, 2, 3)}, r"an int or \(height, width\)"),
        ({"fps": 25}, "fps is for a folder of images"),
    ],
)
def test_bad_arguments(steady: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_clip(steady, **options)


def test_missing_package_says_which_extra(monkeypatch: pytest.MonkeyPatch, steady: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match=r'reading video needs the package av; install it with: pip install "deltakern\[demo\]"'):
        read_clip(steady)
