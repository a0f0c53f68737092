"""The demo with models of a toy's size: the same numbers twice, honest verdicts, a page that stands alone."""

from __future__ import annotations

import dataclasses
import html.parser
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from deltakern import DeltaTok, DeltaWorld, DINOv3, DINOv3Config, demo
from deltakern.data.video import VideoError
from deltakern.models import checkpoint
from deltakern.report import page

CARPHONE = Path(__file__).parent / "data" / "carphone.mp4"
TINY = demo.Settings(
    out=None,
    size=32,
    gap=2,
    tokenizer_steps=2,
    world_steps=2,
    samples=3,
    video=CARPHONE,
    views=2,
    clips=6,
    pairs=3,
    batch=3,
    candidates=4,
    width=32,
    heads=2,
    backbone_layers=1,
    layers=1,
    threads=1,
    log=False,
)


@pytest.fixture(scope="module")
def result() -> demo.Result:
    return demo.compute(TINY)


def test_the_seed_repeats_it_bit_for_bit(result: demo.Result) -> None:
    torch.rand(5)  # whatever happened before must not matter
    again = demo.compute(TINY)
    assert again.numbers == result.numbers
    assert again.curves == result.curves
    for name, tensor in result.shown.items():
        assert torch.equal(tensor, again.shown[name]), name
    other = demo.compute(dataclasses.replace(TINY, seed=1))
    assert other.numbers["best"] != result.numbers["best"]


def test_leaves_the_global_state_alone() -> None:
    torch.manual_seed(3)
    expected, threads = torch.rand(4), torch.get_num_threads()
    torch.manual_seed(3)
    demo.compute(TINY)
    assert torch.equal(torch.rand(4), expected)
    assert torch.get_num_threads() == threads


def test_numbers_hang_together(result: demo.Result) -> None:
    n = result.numbers
    assert n["windows"] == 60 - 40 - 6 * 2
    assert n["pairs"] == 20 - 2
    assert n["best"] <= n["single"], "the best of the futures is not worse than their average"
    assert n["mean"] <= n["single"] + 1e-6, "smooth-L1 is convex"
    assert all(value == value for value in n.values())
    assert len(result.curves["DeltaTok"]) == 2
    assert len(result.curves["DeltaWorld"]) == 2


def test_held_out_frames_do_not_reach_the_training(monkeypatch: pytest.MonkeyPatch, result: demo.Result) -> None:
    """Other pixels in the held-out part: the training curves stay as they were, the verdict does not."""
    plain = demo.read_clip

    def changed(*args, **kwargs):
        clip = plain(*args, **kwargs)
        frames = clip.frames.clone()
        frames[40:] = 255 - frames[40:].flip(0)
        return clip._replace(frames=frames)

    monkeypatch.setattr(demo, "read_clip", changed)
    other = demo.compute(TINY)
    assert other.curves == result.curves
    assert other.numbers["copy-last"] != result.numbers["copy-last"]


def test_verdicts_say_plainly_what_lost(result: demo.Result) -> None:
    numbers = {**result.numbers, "best": 1.0, "mean": 3.0, "copy-last": 2.0, "rebuilt": 2.0}
    texts = dict(demo.verdicts(dataclasses.replace(result, numbers=numbers), 3))
    assert texts["The best of 3 futures beats copy-last on held-out frames (50.0% of its loss)."] is True
    assert texts["The mean of 3 futures does NOT beat copy-last on held-out frames (150.0% of its loss)."] is False
    assert texts["Reconstruction three steps on does NOT beat copy-last on held-out frames (100.0% of its loss)."] is False


class _Links(html.parser.HTMLParser):
    """Everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset") and tag != "a"]
        assert tag not in ("script", "link", "iframe")


def test_writes_one_page_that_stands_alone(tmp_path: Path) -> None:
    result = demo.run(dataclasses.replace(TINY, out=tmp_path))
    assert [f.name for f in tmp_path.iterdir()] == ["index.html"]
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    links = _Links()
    links.feed(text)
    assert sum(link.startswith("data:image/png;base64,") for link in links.found) >= 7 + 7 + 5 * 3
    assert all(link.startswith(("data:", "#")) for link in links.found)
    assert not re.search(r"url\((?!#)", text)
    assert text.count("<svg") == 2
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len([i for i in ids if re.match(r"[pm][0-9a-f]{8}", i)]) == len({i for i in ids if re.match(r"[pm][0-9a-f]{8}", i)})
    for sentence, _ in demo.verdicts(result, TINY.samples):
        assert str(page.escape(sentence)) in text
    for row in demo.rows(result, TINY.samples):
        assert str(page.escape(row[1])) in text


def test_attribution_is_on_the_page_of_the_bundled_clip(result: demo.Result) -> None:
    bundled = dataclasses.replace(result, facts={**result.facts, "bundled": True, "threads": 1})
    assert "Blender Foundation" in demo.make_page(TINY, bundled).html()


def test_given_weights_are_used_and_not_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = DINOv3Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=128)
    backbone = DINOv3(config=config)
    tokenizer = DeltaTok(backbone, 1, intermediate_size=96, layer_scale_init=1.0)
    world = DeltaWorld(
        tokenizer, predictor_hidden_size=64, predictor_num_hidden_layers=1, predictor_num_heads=1, num_samples_eval=3, layer_scale_init=1.0
    )
    checkpoint.save(tokenizer, tmp_path / "tok.safetensors")
    checkpoint.save(world, tmp_path / "world.safetensors")
    folder = tmp_path / "dinov3"
    folder.mkdir()
    checkpoint.save(backbone, folder / "model.safetensors")
    fields = dataclasses.asdict(config) | {"model_type": "dinov3_vit"}
    (folder / "config.json").write_text(__import__("json").dumps(fields))
    given = dataclasses.replace(TINY, dinov3=str(folder), deltatok=tmp_path / "tok.safetensors", deltaworld=tmp_path / "world.safetensors")
    result = demo.compute(given)
    assert result.curves == {}
    assert result.facts["real"]
    assert result.facts["views"] == 0
    frames = result.shown["frames"][None]
    stamps = (result.shown["times"] - result.shown["times"][0]).float()[None]
    rebuilt = tokenizer.eval()(frames, horizon=3)[0][0]
    torch.testing.assert_close(result.shown["rebuilt"], rebuilt)
    futures = world.eval()(frames, stamps, ctx_len=4, queries=torch.zeros(1, 3, 3, 64))[0]
    assert futures.shape[1:3] == (3, 3)
    half = demo.compute(dataclasses.replace(given, deltaworld=None))
    assert list(half.curves) == ["DeltaWorld"]
    torch.testing.assert_close(half.numbers["rebuilt"], result.numbers["rebuilt"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 40}, "size must be a multiple of 16"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"threads": -1}, "threads must be at least 0"),
        ({"deltatok": Path("x")}, "give dinov3 as well"),
    ],
)
def test_bad_settings(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_a_clip_too_short() -> None:
    with pytest.raises(VideoError, match=r"carphone\.mp4: too short: 60 frames leave 20 held out, a window with gap 4 needs 25"):
        demo.compute(dataclasses.replace(TINY, gap=4))


def test_page_parts_escape_and_refuse() -> None:
    built = page.Page("a <b>")
    built.section("c & d", page.paragraph("<script>"), page.table(["x<y"], [["1 & 2"]]))
    text = built.html()
    assert "<script>" not in text
    for escaped in ("a &lt;b&gt;", "c &amp; d", "x&lt;y", "1 &amp; 2"):
        assert escaped in text
    with pytest.raises(TypeError, match="takes Html"):
        built.add("plain")
    with pytest.raises(ValueError, match="a row has 2 cells, the header 1"):
        page.table(["a"], [["b", "c"]])
    with pytest.raises(ValueError, match="uint8"):
        page.data_uri(torch.rand(3, 2, 2))


def test_pictures_survive(tmp_path: Path) -> None:
    import base64
    import io

    from PIL import Image

    image = torch.randint(0, 256, (3, 6, 5), dtype=torch.uint8)
    raw = base64.b64decode(page.data_uri(image).removeprefix("data:image/png;base64,"))
    back = Image.open(io.BytesIO(raw)).convert("RGB")
    assert back.size == (5, 6)
    assert back.tobytes() == image.permute(1, 2, 0).contiguous().numpy().tobytes()


def test_charts_repeat_and_follow_the_text_colour() -> None:
    draw = lambda: page.lines({"a": ([1, 2, 3], [3.0, 2.0, 1.5])}, title="t", x="step", y="loss", levels={"copy": 2.0}, log=True)  # noqa: E731
    first = draw()
    assert first == draw()
    assert "currentColor" in first
    assert page.INK not in first
