"""Checkpoints: what is read, what is refused and how it is said, what is written."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import golden
import pytest
import safetensors.torch
import torch
from torch import nn

from deltakern import DeltaTok, DeltaWorld, DINOv3, DINOWorld
from deltakern.models import DINOv3Config, checkpoint
from deltakern.models.checkpoint import CheckpointError

CONFIG = DINOv3Config(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512)
SIZES = {"num_hidden_layers": 1, "intermediate_size": 512}


@pytest.fixture(scope="module")
def backbone() -> DINOv3:
    return DINOv3(config=CONFIG)


@pytest.fixture
def tokenizer(backbone) -> DeltaTok:
    return DeltaTok(backbone, qk_norm_order="post_rope", **SIZES)


@pytest.fixture
def world(tokenizer) -> DeltaWorld:
    return DeltaWorld(tokenizer, predictor_hidden_size=128, predictor_num_hidden_layers=2, predictor_num_heads=2)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return golden.load("deltaworld")


@pytest.fixture(scope="module")
def tokenizer_file(tensors) -> dict[str, torch.Tensor]:
    """What a released DeltaTok file holds, in the released order."""
    weights = golden.under(tensors, "tokenizer.")
    return {k: weights[k] for k, _ in golden.state_dict_keys("deltatok")}


@pytest.fixture(scope="module")
def world_file(tensors) -> dict[str, torch.Tensor]:
    return {f"predictor.{k}": tensors[f"predictor.{k}"] for k, _ in golden.state_dict_keys("predictor")}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def outside(module: nn.Module, *prefixes: str) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items() if not k.startswith(prefixes)}


class TestReading:
    @pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.safetensors", "a.ckpt", "no_suffix"])
    def test_kinds_are_told_apart_by_their_bytes(self, name, tokenizer_file, tmp_path):
        path = tmp_path / "saved.safetensors" if "safetensors" in name else tmp_path / "saved.bin"
        checkpoint.save(tokenizer_file, path)
        path = path.rename(tmp_path / name)
        found = checkpoint.read(path)
        assert (found.kind, found.path, found.metadata) == ("deltatok", str(path), {})
        assert found.state_dict.keys() == tokenizer_file.keys()
        assert all(torch.equal(found.state_dict[k], tokenizer_file[k]) for k in tokenizer_file)

    def test_old_torch_files_are_read(self, tokenizer_file, tmp_path):
        torch.save(tokenizer_file, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        assert same(checkpoint.read(tmp_path / "old.pt").state_dict, tokenizer_file)

    @pytest.mark.parametrize(
        "wrap",
        [
            "{}",
            "_orig_mod.{}",
            "module.{}",
            "network.{}",
            "network._orig_mod.{}",
            "module.network._orig_mod.{}",
            "_fsdp_wrapped_module.network.{}",
        ],
    )
    def test_lightning_files_with_every_wrapper(self, wrap, tokenizer_file, tmp_path):
        state = {wrap.format(k).replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): v for k, v in tokenizer_file.items()}
        if "network." in wrap:
            state["task_heads.vspw.bn.weight"] = torch.ones(3)
        torch.save({"state_dict": state, "epoch": 3, "global_step": 70, "optimizer_states": [{"lr": 0.1}]}, tmp_path / "last.ckpt")
        found = checkpoint.read(tmp_path / "last.ckpt")
        assert same(found.state_dict, tokenizer_file)
        assert (found.metadata["epoch"], found.metadata["global_step"]) == (3, 70)

    def test_folders_hold_the_released_file(self, tokenizer_file, tmp_path):
        checkpoint.save(tokenizer_file, tmp_path / "pytorch_model.bin")
        assert checkpoint.read(tmp_path).path == str(tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=r"holds none of model\.safetensors"):
            checkpoint.read(tmp_path.parent)

    def test_qk_norm_order_comes_from_the_names(self, tokenizer_file):
        renamed = {golden.named(k, "pre_rope"): v for k, v in tokenizer_file.items()}
        assert checkpoint.as_checkpoint(tokenizer_file).qk_norm_order == "post_rope"
        assert checkpoint.as_checkpoint(renamed).qk_norm_order == "pre_rope"
        assert checkpoint.qk_norm_order(golden.under(golden.load("deltatok_plain"), "param.")) is None
        with pytest.raises(CheckpointError, match="both before RoPE"):
            checkpoint.qk_norm_order({**tokenizer_file, **renamed})


class TestForeignFiles:
    """Every one is refused by one CheckpointError that names the file."""

    def refused(self, path: Path, match: str) -> None:
        with pytest.raises(CheckpointError, match=match) as caught:
            checkpoint.read(path)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize("name", ["file.bin", "file.safetensors", "file"])
    @pytest.mark.parametrize(
        ("content", "match"),
        [
            (b"", "the file is empty"),
            (b"<!DOCTYPE html><html><body>Log in</body></html>", "web page"),
            (b'{"error": "not found"}', "JSON"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
            (gzip.compress(b"weights"), "gzip archive"),
            (b"GGUF\x03\x00\x00\x00", "GGUF"),
            (b"\x00" * 400, "something else"),
            (b"PK\x03", "something else"),
            (b"\x80\x02", "a pickle that torch.save did not write, or one truncated"),
            (b"PK\x03\x04 and no more", "a zip archive that torch.save did not write"),
            ((2**40).to_bytes(8, "little") + b'{"a":1}', "safetensors file that is truncated or damaged"),
        ],
        ids=["empty", "html", "json", "lfs", "gzip", "gguf", "zeros", "stub", "pickle stub", "zip stub", "safetensors header"],
    )
    def test_bytes_that_are_no_checkpoint(self, content, match, name, tmp_path):
        (tmp_path / name).write_bytes(content)
        self.refused(tmp_path / name, match)

    def test_tar_and_zip_archives(self, tmp_path):
        (tmp_path / "note.txt").write_text("weights are elsewhere")
        with tarfile.open(tmp_path / "weights.tar", "w") as archive:
            archive.add(tmp_path / "note.txt", "note.txt")
        with zipfile.ZipFile(tmp_path / "weights.zip", "w") as archive:
            archive.write(tmp_path / "note.txt", "note.txt")
        self.refused(tmp_path / "weights.tar", "a tar archive")
        self.refused(tmp_path / "weights.zip", "a zip archive that torch.save did not write")

    @pytest.mark.parametrize("name", ["whole.bin", "whole.safetensors"])
    @pytest.mark.parametrize("keep", [0.01, 0.5, 0.999])
    def test_truncated_files(self, name, keep, tokenizer_file, tmp_path):
        checkpoint.save(tokenizer_file, tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: int(keep * len(whole))])
        self.refused(tmp_path / name, "truncated")

    @pytest.mark.parametrize("protocol", [0, 2, 4])
    @pytest.mark.parametrize("by_torch", [True, False])
    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    def test_code_in_a_pickle_is_not_run(self, protocol, by_torch, tmp_path):
        path, mark = tmp_path / "evil.bin", tmp_path / "ran"
        content = {"z_embed.weight": _Runs(f"touch {mark}")}
        if by_torch:
            torch.save(content, path, pickle_protocol=max(protocol, 2))
        else:
            path.write_bytes(pickle.dumps(content, protocol))
        self.refused(path, r"could run code when loaded|did not write|looks like something else")
        assert not mark.exists()

    def test_objects_of_a_lightning_file_are_named(self, tokenizer_file, tmp_path):
        torch.save({"state_dict": tokenizer_file, "hyper_parameters": types.SimpleNamespace(lr=1)}, tmp_path / "last.ckpt")
        self.refused(tmp_path / "last.ckpt", r"Python objects besides tensors \(types\.SimpleNamespace\)")

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            ([1, 2], "expected tensors by name, got list"),
            (torch.ones(3), "expected tensors by name, got Tensor"),
            ({}, "it is empty"),
            ({"epoch": 3}, "'epoch' is int"),
            ({"state_dict": {"a": torch.ones(1), "b": "text"}}, "'b' is str"),
            ({3: torch.ones(1)}, "3 is Tensor"),
            ({"a.weight": torch.ones(1), "module.a.weight": torch.ones(1)}, r"the same once wrappers' prefixes are gone: a\.weight"),
        ],
    )
    def test_torch_files_that_hold_no_weights(self, content, match, tmp_path):
        torch.save(content, tmp_path / "odd.pt")
        self.refused(tmp_path / "odd.pt", match)

    def test_paths_that_lead_nowhere(self, tmp_path):
        for name in ("missing.bin", "/nowhere/at/all", "some/weights.safetensors"):
            with pytest.raises(FileNotFoundError, match="no such file or folder: .*" + Path(name).name):
                checkpoint.read(name)
        os.mkfifo(tmp_path / "pipe")
        self.refused(tmp_path / "pipe", "not a regular file")


class _Runs:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class TestLoading:
    def test_a_tokenizer_file_leaves_the_backbone_alone(self, tokenizer, tokenizer_file):
        before = {k: v.clone() for k, v in tokenizer.backbone.state_dict().items()}
        fit = checkpoint.load_into(tokenizer, tokenizer_file)
        assert same(outside(tokenizer, "backbone."), tokenizer_file)
        assert same(dict(tokenizer.backbone.state_dict()), before)
        assert fit == ([f"backbone.{k}" for k in before], [], [])

    def test_a_world_file_leaves_backbone_and_tokenizer_alone(self, world, world_file):
        before = outside(world, "predictor.")
        checkpoint.load_into(world, world_file)
        assert same(outside(world, "backbone.", "tokenizer."), world_file)
        assert same(outside(world, "predictor."), before)

    def test_a_world_file_may_bring_its_tokenizer(self, world, world_file, tokenizer_file):
        both = {**world_file, **{f"tokenizer.{k}": v for k, v in tokenizer_file.items()}}
        checkpoint.load_into(world, both)
        assert same(outside(world.tokenizer, "backbone."), tokenizer_file)
        del both["tokenizer.norm.bias"]
        with pytest.raises(CheckpointError, match=r"missing \(1\):\n    tokenizer\.norm\.bias \(128,\)"):
            checkpoint.load_into(world, both)

    def test_an_old_layout_backbone_inside_a_tokenizer_file(self, tokenizer, tokenizer_file, backbone):
        weights = {k: v + 1 for k, v in DINOv3(config=CONFIG).state_dict().items()}
        old = {f"backbone.{k}".replace(".model.layer.", ".layer."): v for k, v in weights.items()}
        fit = checkpoint.load_into(DeltaTok(target := DINOv3(config=CONFIG), qk_norm_order="post_rope", **SIZES), {**tokenizer_file, **old})
        assert fit.left == []
        assert same(dict(target.state_dict()), weights)

    def test_released_dtype_is_turned_into_the_models(self, tokenizer, tokenizer_file):
        tokenizer.double()
        checkpoint.load_into(tokenizer, {k: v.bfloat16() for k, v in tokenizer_file.items()})
        assert tokenizer.norm.weight.dtype == torch.float64
        assert torch.equal(tokenizer.norm.weight, tokenizer_file["norm.weight"].bfloat16().double())

    def test_wrapped_models(self, tokenizer, tokenizer_file):
        checkpoint.load_into(torch.compile(tokenizer), tokenizer_file)
        assert same(outside(tokenizer, "backbone."), tokenizer_file)
        wrapped = nn.DataParallel(DeltaTok(tokenizer.backbone, qk_norm_order="post_rope", **SIZES))
        checkpoint.load_into(wrapped, tokenizer_file)
        assert same(outside(wrapped.module, "backbone."), tokenizer_file)

    def test_loading_shows_in_what_the_model_computes(self, tokenizer, tokenizer_file):
        """Weights derived from parameters and kept must not outlive them."""
        features = torch.randn(1, 6, 128)
        rope = tokenizer._rope(torch.zeros(1, 1, 3, 32, 48))
        tokenizer.eval()
        with torch.no_grad():
            before = tokenizer.encode(features, features, rope)
            checkpoint.load_into(tokenizer, tokenizer_file)
            after = tokenizer.encode(features, features, rope)
        fresh = DeltaTok(tokenizer.backbone, qk_norm_order="post_rope", **SIZES).eval()
        checkpoint.load_into(fresh, tokenizer_file)
        with torch.no_grad():
            assert torch.equal(after, fresh.encode(features, features, rope))
        assert not torch.allclose(before, after)

    def test_everything_that_does_not_fit_is_listed_at_once(self, tokenizer, tokenizer_file):
        state = dict(tokenizer_file)
        del state["norm.bias"], state["encoder_blocks.0.norm1.weight"]
        state["extra.weight"] = torch.zeros(3, 4)
        state["norm.weight"] = torch.zeros(64)
        state["xy_embed.weight"] = torch.zeros(2, 128, dtype=torch.int64)
        before = outside(tokenizer)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load_into(tokenizer, state)
        assert str(caught.value).splitlines() == [
            "the state dict does not fit DeltaTok:",
            "  missing (2):",
            "    encoder_blocks.0.norm1.weight (128,)",
            "    norm.bias (128,)",
            "  unknown (1):",
            "    extra.weight (3, 4)",
            "  mis-shaped (2):",
            "    xy_embed.weight: file (2, 128) int64, model (2, 128)",
            "    norm.weight: file (64,), model (128,)",
        ]
        assert same(outside(tokenizer), before), "nothing may be loaded from a file that does not fit"
        fit = checkpoint.load_into(tokenizer, state, strict=False)
        assert (fit.unknown, fit.misshaped) == (["extra.weight"], ["xy_embed.weight", "norm.weight"])
        assert {"norm.bias", "norm.weight", "xy_embed.weight"} <= set(fit.left)
        assert torch.equal(tokenizer.z_embed.weight, tokenizer_file["z_embed.weight"])

    def test_a_model_built_otherwise_is_told_how_the_file_was_made(self, backbone, tokenizer_file):
        other = DeltaTok(backbone, 2, use_swiglu=False, qk_norm_order="pre_rope", intermediate_size=256)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load_into(other, tokenizer_file)
        last = str(caught.value).splitlines()[-1]
        assert last == "  the file was made with num_hidden_layers=1, use_swiglu=True, intermediate_size=512, qk_norm_order='post_rope'"

    def test_the_wrong_model_is_named(self, tokenizer, world, backbone, tokenizer_file, world_file, tmp_path):
        checkpoint.save(world_file, tmp_path / "world.safetensors")
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load_into(tokenizer, tmp_path / "world.safetensors")
        path = tmp_path / "world.safetensors"
        assert str(caught.value) == f"{path}: this is a DeltaWorld or DINO-world predictor, expected a DeltaTok tokenizer (DeltaTok)"
        with pytest.raises(CheckpointError, match="this is a DeltaTok tokenizer, expected a DeltaWorld or DINO-world predictor"):
            checkpoint.load_into(world, tokenizer_file)
        with pytest.raises(CheckpointError, match="this is a DINOv3 backbone, expected a DeltaTok tokenizer"):
            checkpoint.load_into(tokenizer, dict(backbone.state_dict()))
        with pytest.raises(CheckpointError, match="of which nothing fits DeltaTok"):
            checkpoint.load_into(tokenizer, world_file, strict=False)

    @pytest.mark.parametrize("variant", golden.VARIANTS)
    def test_the_constructors_path_loads_and_follows_the_files_qk_norm(self, variant, backbone, tokenizer_file, tmp_path):
        state = {golden.named(k, variant): v for k, v in tokenizer_file.items()}
        checkpoint.save(state, tmp_path / "tok.ckpt")
        model = DeltaTok(backbone, ckpt_path=str(tmp_path / "tok.ckpt"), qk_norm_order=golden.VARIANTS[variant == "post_rope"], **SIZES)
        assert model.qk_norm_order == variant
        assert same(outside(model, "backbone."), state)


class TestConfigs:
    def test_a_tokenizer_built_from_its_file_fits(self, backbone):
        for name in ("deltatok_default", "deltatok_plain", "deltatok_nodelta"):
            for variant in golden.VARIANTS:
                state = golden.under(golden.load(name, variant), "param.")
                found = checkpoint.infer_deltatok_config(state)
                checkpoint.load_into(DeltaTok(backbone, **found), state)
                switches = {k: v for k, v in golden.meta(name)["config"].items() if k in found}
                assert switches.items() <= found.items()
                assert checkpoint.infer_backbone_shape(state) == {"hidden_size": 128, "num_heads": 2}

    def test_the_released_sizes_are_found(self):
        """On meta tensors: no memory, the real shapes."""
        with torch.device("meta"):
            tokenizer = DeltaTok(DINOv3(config=DINOv3Config()))
            world = DeltaWorld(tokenizer)
        assert checkpoint.infer_deltatok_config(outside(tokenizer, "backbone.")) == {
            "num_hidden_layers": 12,
            "use_qk_norm": True,
            "use_gated_attn": True,
            "use_swiglu": True,
            "intermediate_size": 3072,
            "qk_norm_order": "pre_rope",
        }
        predictor = outside(world, "backbone.", "tokenizer.")
        assert checkpoint.infer_deltaworld_config(predictor) == {
            "predictor_hidden_size": 768,
            "predictor_num_hidden_layers": 12,
            "predictor_num_heads": 12,
            "use_bom": True,
            "mlp_ratio": 4,
        }
        assert checkpoint.infer_backbone_shape(predictor) == {"hidden_size": 768, "num_heads": 12}

    def test_worlds_built_from_their_files_fit(self, tokenizer, world_file):
        checkpoint.load_into(DeltaWorld(tokenizer, **checkpoint.infer_deltaworld_config(world_file)), world_file)
        plain = golden.under(golden.load("dinoworld"), "plain.param.")
        found = checkpoint.infer_deltaworld_config(plain)
        assert found["use_bom"] is False
        checkpoint.load_into(DINOWorld(tokenizer.backbone, **found), plain)

    def test_other_models_weights_are_refused(self, tokenizer_file, world_file):
        with pytest.raises(CheckpointError, match="expected the weights of a DeltaTok tokenizer, got a DeltaWorld"):
            checkpoint.infer_deltatok_config(world_file)
        with pytest.raises(CheckpointError, match="expected the weights of a DeltaWorld or DINO-world predictor, got a DeltaTok"):
            checkpoint.infer_deltaworld_config(tokenizer_file)
        with pytest.raises(CheckpointError, match="as many encoder as decoder blocks, got 1 and 0"):
            checkpoint.infer_deltatok_config({k: v for k, v in tokenizer_file.items() if "decoder" not in k})
        with pytest.raises(CheckpointError, match="got an unknown model"):
            checkpoint.infer_backbone_shape({"a": torch.ones(1)})


class TestSaving:
    @pytest.mark.parametrize("metadata", [{}, {"format": "pt"}, {"step": "7", "format": "pt", "author": 'é "quoted"', "a": "", "z": "1"}])
    def test_safetensors_come_back_as_the_same_bytes(self, metadata, tokenizer_file, tmp_path):
        safetensors.torch.save_file(tokenizer_file, tmp_path / "released.safetensors", metadata=metadata or None)
        found = checkpoint.read(tmp_path / "released.safetensors")
        checkpoint.save(found.state_dict, tmp_path / "again.safetensors", metadata=found.metadata)
        assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "released.safetensors").read_bytes()

    @pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
    def test_torch_files_come_back_with_equal_tensors_in_equal_order(self, suffix, tokenizer_file, tmp_path):
        torch.save(tokenizer_file, tmp_path / "released.bin")
        first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
        checkpoint.save(checkpoint.read(tmp_path / "released.bin").state_dict, first)
        checkpoint.save(checkpoint.read(first).state_dict, second)
        assert same(checkpoint.read(second).state_dict, tokenizer_file)
        assert first.read_bytes() == second.read_bytes()
        plain = torch.load(second, weights_only=True)
        assert same(plain["state_dict"] if suffix == ".ckpt" else plain, tokenizer_file)

    def test_models_are_written_in_the_released_layout(self, world, tokenizer_file, world_file, tmp_path):
        checkpoint.load_into(world.tokenizer, tokenizer_file)
        checkpoint.load_into(world, world_file)
        checkpoint.save(torch.compile(world.tokenizer), tmp_path / "tok.bin")
        checkpoint.save(world, tmp_path / "world.bin")
        assert same(checkpoint.read(tmp_path / "tok.bin").state_dict, tokenizer_file)
        assert same(checkpoint.read(tmp_path / "world.bin").state_dict, world_file)

    def test_views_are_written_without_what_they_view(self, tmp_path):
        base = torch.arange(100_000.0)
        state = {"a": base[:3], "b": base[:3], "c": base[:100].view(10, 10).t()}
        for name in ("views.bin", "views.safetensors"):
            checkpoint.save(state, tmp_path / name)
            found = checkpoint.read(tmp_path / name).state_dict
            assert all(torch.equal(found[k], state[k]) for k in state)
            assert (tmp_path / name).stat().st_size < 10_000

    def test_a_failed_write_leaves_the_old_file_and_nothing_else(self, tokenizer_file, tmp_path, monkeypatch):
        path = tmp_path / "tok.bin"
        checkpoint.save(tokenizer_file, path)
        before = path.read_bytes()

        def fails(content, file):
            file.write(b"half of it")
            raise OSError("disk full")

        monkeypatch.setattr(torch, "save", fails)
        with pytest.raises(OSError, match="disk full"):
            checkpoint.save(tokenizer_file, path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_bad_arguments(self, tokenizer_file, tmp_path):
        with pytest.raises(ValueError, match=r"path must end in \.safetensors or one of .*, got 'model\.onnx'"):
            checkpoint.save(tokenizer_file, tmp_path / "model.onnx")
        with pytest.raises(ValueError, match="metadata is stored in"):
            checkpoint.save(tokenizer_file, tmp_path / "a.bin", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="source must map names to tensors, got int under 'a'"):
            checkpoint.save({"a": 1}, tmp_path / "a.bin")
        assert list(tmp_path.iterdir()) == []


class TestDINOv3Folders:
    @pytest.fixture
    def weights(self) -> dict[str, torch.Tensor]:
        found = golden.load("dinov3_backbone")
        return {k: v for k, v in found.items() if k.startswith("backbone.")}

    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size", "num_register_tokens")
        config = {"model_type": "dinov3_vit", **{n: getattr(CONFIG, n) for n in names}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    @pytest.mark.parametrize("prefix", ["", "backbone."])
    @pytest.mark.parametrize("layers", ["layer.", "model.layer."])
    def test_both_layouts_give_the_golden_features(self, layers, prefix, weights, folder):
        state = {k.replace("backbone.", prefix, 1).replace("model.layer.", layers): v for k, v in weights.items()}
        checkpoint.save(state, folder / "model.safetensors")
        config, found = checkpoint.read_dinov3(folder)
        assert config["hidden_size"] == 128
        assert found.keys() == weights.keys()
        model = DINOv3.from_pretrained(folder)
        golden_file = golden.load("dinov3_backbone")
        torch.testing.assert_close(model(golden_file["frames"]), golden_file["features"], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
    def test_shards(self, kind, weights, folder):
        stem, suffix = kind.split(".")
        names = sorted(weights)
        parts = {f"{stem}-0000{i + 1}-of-00003.{suffix}": names[i::3] for i in range(3)}
        for file, keys in parts.items():
            checkpoint.save({k: weights[k] for k in keys}, folder / file)
        where = {k: file for file, keys in parts.items() for k in keys}
        index = folder / f"{kind}.index.json"
        index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
        _, found = checkpoint.read_dinov3(folder)
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[k], weights[k]) for k in weights)

        index.write_text(json.dumps({"weight_map": {**where, "lost": next(iter(parts))}}))
        with pytest.raises(CheckpointError, match=r"names that their shards do not hold: lost \(of "):
            checkpoint.read_dinov3(folder)
        index.write_text(json.dumps({"weight_map": {**where, "a": "../outside.safetensors"}}))
        with pytest.raises(CheckpointError, match=r"shards must be files beside it, got '\.\./outside\.safetensors'"):
            checkpoint.read_dinov3(folder)
        index.write_text(json.dumps({"weight_map": {**where, "a": "absent.bin"}}))
        with pytest.raises(CheckpointError, match=r"shards that are not there: absent\.bin"):
            checkpoint.read_dinov3(folder)
        index.write_text("{}")
        with pytest.raises(CheckpointError, match="expected a weight_map"):
            checkpoint.read_dinov3(folder)

    def test_pixel_statistics_come_from_the_preprocessor(self, weights, folder):
        checkpoint.save(weights, folder / "model.safetensors")
        (folder / "preprocessor_config.json").write_text(
            json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1], "do_resize": True})
        )
        config, _ = checkpoint.read_dinov3(folder)
        assert config["image_mean"] == [0.1, 0.2, 0.3]
        assert "do_resize" not in config
        assert DINOv3.from_pretrained(folder).processor.image_mean == (0.1, 0.2, 0.3)

    def test_what_is_wrong_with_a_folder_is_said(self, weights, folder, tokenizer_file):
        with pytest.raises(CheckpointError, match=r"the folder holds none of model\.safetensors"):
            checkpoint.read_dinov3(folder)
        checkpoint.save(tokenizer_file, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match="this is a DeltaTok tokenizer, expected a DINOv3 backbone"):
            checkpoint.read_dinov3(folder)
        with pytest.raises(CheckpointError, match=r"expected the folder that holds config\.json and the weights, got a file"):
            checkpoint.read_dinov3(folder / "model.safetensors")
        (folder / "config.json").write_text("[1]")
        with pytest.raises(CheckpointError, match="expected a JSON object, got list"):
            checkpoint.read_dinov3(folder)
        (folder / "config.json").write_text("{half")
        with pytest.raises(CheckpointError, match="not JSON"):
            checkpoint.read_dinov3(folder)
        (folder / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"has no config\.json"):
            checkpoint.read_dinov3(folder)


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch):
        """A hub of our own: ``hub.answer`` is the folder to give or the error to raise; ``hub.asked`` what was asked."""
        hub, errors = types.ModuleType("huggingface_hub"), types.ModuleType("huggingface_hub.utils")
        # The library's own hierarchy.
        errors.HfHubHTTPError = type("HfHubHTTPError", (OSError,), {})
        errors.RepositoryNotFoundError = type("RepositoryNotFoundError", (errors.HfHubHTTPError,), {})
        errors.GatedRepoError = type("GatedRepoError", (errors.RepositoryNotFoundError,), {})
        errors.LocalEntryNotFoundError = type("LocalEntryNotFoundError", (FileNotFoundError, ValueError), {})
        errors.HFValidationError = type("HFValidationError", (ValueError,), {})
        hub.utils, hub.asked, hub.answer = errors, [], None

        def snapshot_download(name, **options):
            hub.asked.append((name, options))
            if isinstance(hub.answer, Exception):
                raise hub.answer
            return str(hub.answer)

        hub.snapshot_download = snapshot_download
        monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
        monkeypatch.setitem(sys.modules, "huggingface_hub.utils", errors)
        return hub

    def test_released_repositories_are_read(self, hub, tokenizer_file, tmp_path):
        checkpoint.save(tokenizer_file, tmp_path / "pytorch_model.bin")
        hub.answer = tmp_path
        found = checkpoint.read(checkpoint.RELEASED["deltatok"], local_files_only=True)
        assert same(found.state_dict, tokenizer_file)
        name, options = hub.asked[0]
        assert (name, options["local_files_only"]) == ("Amazon-FAR/deltatok-kinetics", True)
        assert {"config.json", "model.safetensors", "pytorch_model.bin"} <= set(options["allow_patterns"])

    @pytest.mark.parametrize(
        ("error", "match"),
        [
            ("GatedRepoError", r"accept the licence at https://huggingface\.co/facebook/dinov3-vitb16 and log in"),
            ("RepositoryNotFoundError", "nor a repository on the Hugging Face hub"),
            ("LocalEntryNotFoundError", "not in the local Hugging Face cache"),
            ("HfHubHTTPError", "could not be fetched from the Hugging Face hub: oh no"),
        ],
    )
    def test_refusals_are_explained(self, hub, error, match):
        hub.answer = getattr(hub.utils, error)("oh no")
        with pytest.raises(CheckpointError, match=match):
            DINOv3.from_pretrained("facebook/dinov3-vitb16")

    def test_without_the_library_the_extra_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(CheckpointError, match=r"pip install 'deltakern\[hf\]'"):
            checkpoint.read_dinov3("facebook/dinov3-vitb16")
