"""The task heads against the released ones' outputs and names, on other grids, and on bad input."""

from __future__ import annotations

import golden
import pytest
import torch
from test_golden import assert_reproduced
from torch import nn

from deltakern.models import checkpoint
from deltakern.models.heads import DepthHead, RGBHead, SegHead, feature_map, position_table

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return golden.load("heads")


def make(kind: str, tensors: dict[str, torch.Tensor], **changes) -> nn.Module:
    state = {**golden.under(tensors, f"{kind}.param."), **changes}
    state = {k: v for k, v in state.items() if v is not None}
    if kind == "seg":
        return SegHead.from_checkpoint(state)
    if kind == "depth":
        return DepthHead.from_checkpoint(state)
    return RGBHead.from_checkpoint(state, tensors["norm_weight"], tensors["norm_bias"], num_heads=4, img_size=64)


@pytest.mark.parametrize("kind", ["seg", "depth", "rgb"])
def test_outputs_and_names_are_the_released_ones(kind, tensors):
    head = make(kind, tensors)
    assert not head.training
    assert_reproduced({f"{kind}.out": head(tensors["features"])}, tensors)
    assert head.state_dict().keys() == golden.under(tensors, f"{kind}.param.").keys()


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("kind", ["seg", "depth"])
def test_heads_are_read_from_files(kind, suffix, tensors, tmp_path):
    head = make(kind, tensors)
    checkpoint.save(head, tmp_path / f"head{suffix}")
    again = type(head).from_checkpoint(tmp_path / f"head{suffix}")
    assert torch.equal(again(tensors["features"]), head(tensors["features"]))


def test_rgb_builds_the_table_of_positions_that_a_file_lacks(tensors):
    assert torch.equal(position_table(96, 4), tensors["rgb.param.decoder_pos_embed"])
    without = make("rgb", tensors, decoder_pos_embed=None)
    assert torch.equal(without.decoder_pos_embed, tensors["rgb.param.decoder_pos_embed"])
    assert_reproduced({"rgb.out": without(tensors["features"])}, tensors)


def test_rgb_of_the_tables_own_grid_reads_the_table_as_it_is(tensors):
    head = make("rgb", tensors)
    assert head._positions(4, 4) is head.decoder_pos_embed
    assert head(tensors["features"][..., :4]).shape == (2, 3, 64, 64)
    # A table that says nothing of the place says the same on every grid.
    flat = torch.ones_like(head.decoder_pos_embed)
    head.decoder_pos_embed.copy_(flat)
    torch.testing.assert_close(head._positions(3, 7), torch.ones(1, 22, 96))


def test_rgb_puts_pixels_where_their_patch_is(tensors):
    """A decoder without blocks' effect and with one pixel of a patch switched on paints that pixel of every patch."""
    head = make("rgb", tensors)
    with torch.no_grad():
        head.decoder_pred.weight.zero_()
        head.decoder_pred.bias.zero_()
        head.decoder_pred.bias[(3 * 16 + 5) * 3 + 2] = 1.0  # row 3, column 5, blue
    image = (head(tensors["features"]) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    expected = torch.zeros(2, 3, 64, 96)
    expected[:, 2, 3::16, 5::16] = 1.0
    torch.testing.assert_close(image, expected, atol=1e-6, rtol=0)


def test_depth_lies_within_its_range_and_is_the_middle_where_bins_are_alike():
    head = DepthHead(8, 2.0, 6.0, num_bins=5).eval()
    depth = head(torch.randn(3, 8, 2, 2) * 50)
    assert depth.shape == (3, 1, 2, 2)
    assert bool(((depth >= 2) & (depth <= 6)).all())
    nn.init.zeros_(head.head.weight)
    nn.init.zeros_(head.head.bias)
    torch.testing.assert_close(head(torch.randn(1, 8, 2, 2)), torch.full((1, 1, 2, 2), 4.0))


@pytest.mark.parametrize("kind", ["seg", "depth", "rgb"])
def test_double_precision_agrees(kind, tensors):
    head = make(kind, tensors)
    single = head(tensors["features"])
    double = head.double()(tensors["features"].double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)


def test_feature_map_keeps_rows_and_columns_apart():
    features = torch.arange(2 * 3 * 6).view(2, 3, 6, 1).expand(-1, -1, -1, 4)
    found = feature_map(features, 2, 3)
    assert found.shape == (6, 4, 2, 3)
    assert found[4, 0].tolist() == [[24, 25, 26], [27, 28, 29]]
    with pytest.raises(ValueError, match=r"N = 3 \* 3 = 9, got \(2, 3, 6, 4\)"):
        feature_map(features, 3, 3)


def test_bad_input_is_answered(tensors):
    seg, rgb = make("seg", tensors), make("rgb", tensors)
    with pytest.raises(ValueError, match=r"feature map \(B,128,h,w\), got a tensor of shape \(2, 24, 128\)"):
        seg(torch.zeros(2, 24, 128))
    with pytest.raises(ValueError, match=r"got a tensor of shape \(1, 64, 4, 4\)"):
        rgb(torch.zeros(1, 64, 4, 4))
    with pytest.raises(TypeError, match=r"floating tensor, got torch\.int64"):
        seg(torch.zeros(1, 128, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="num_classes must be an integer of at least 1, got 0"):
        SegHead(128, 0)
    with pytest.raises(ValueError, match=r"min_depth < max_depth, got 3\.0 and 1\.0"):
        DepthHead(128, 3.0, 1.0)
    with pytest.raises(ValueError, match=r"norm_weight must be \(in_size,\) = \(128,\), got \(64,\)"):
        RGBHead(128, torch.ones(64), torch.zeros(128), MEAN, STD)
    with pytest.raises(ValueError, match="three values each, got 1 and 3"):
        RGBHead(128, torch.ones(128), torch.zeros(128), (0.5,), STD)
    with pytest.raises(ValueError, match="multiple of 4 and of num_heads=5, got 96"):
        RGBHead(128, torch.ones(128), torch.zeros(128), MEAN, STD, hidden_size=96, num_heads=5)


def test_a_wrong_file_says_which_model_it_is(tensors):
    seg = golden.under(tensors, "seg.param.")
    with pytest.raises(checkpoint.CheckpointError, match="this is a segmentation or depth head, expected an RGB head"):
        RGBHead.from_checkpoint(seg, tensors["norm_weight"], tensors["norm_bias"])
    with pytest.raises(checkpoint.CheckpointError, match="this is an RGB head, expected a depth head"):
        DepthHead.from_checkpoint(golden.under(tensors, "rgb.param."))
    with pytest.raises(checkpoint.CheckpointError, match=r"missing \(1\):\n    bn.running_mean \(128,\)"):
        SegHead.from_checkpoint({k: v for k, v in seg.items() if k != "bn.running_mean"})
    with pytest.raises(checkpoint.CheckpointError, match=r"for a square grid, got \(1, 16, 96\)"):
        make("rgb", tensors, decoder_pos_embed=torch.zeros(1, 16, 96))
