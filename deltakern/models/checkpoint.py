"""Released files, Lightning files and DINOv3 folders: reading, checking, loading into models, writing.

Kinds of file: ``torch.save`` (.bin, .pt, .pth), Lightning (.ckpt, weights under ``state_dict``) and safetensors, told apart by
their bytes, not their names. Pickles are read with ``weights_only=True``, so that no file can run code. Names lose what
torch.compile, DDP, FSDP and Lightning put around them (``_orig_mod``, ``module``, ``_fsdp_wrapped_module``,
``_checkpoint_wrapped_module`` anywhere in the path, ``network.`` in front).

A released DeltaTok file holds the tokenizer without its backbone, a DeltaWorld file the predictor alone; what such a file leaves
out stays as it is in the model. Everything else must fit exactly, or one :class:`CheckpointError` lists all that does not.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Union

import safetensors
import safetensors.torch
import torch
from torch import nn

RELEASED = {
    "deltatok": "Amazon-FAR/deltatok-kinetics",
    "deltaworld": "Amazon-FAR/deltaworld-kinetics",
    "seg-head-vspw": "Amazon-FAR/seg-head-vspw",
    "seg-head-cityscapes": "Amazon-FAR/seg-head-cityscapes",
    "depth-head-kitti": "Amazon-FAR/depth-head-kitti",
    "rgb-head-imagenet": "Amazon-FAR/rgb-head-imagenet",
}
"""Repositories of the released weights on the Hugging Face hub; :func:`read` takes their names."""

_KINDS = {
    "deltatok": "a DeltaTok tokenizer",
    "world": "a DeltaWorld or DINO-world predictor",
    "dinov3": "a DINOv3 backbone",
    "rgb_head": "an RGB head",
    "map_head": "a segmentation or depth head",
    "other": "an unknown model",
}
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_WEIGHT_FILES = [f"{name}{shards}" for name in ("model.safetensors", "pytorch_model.bin") for shards in ("", ".index.json")]
_TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_HEAD = 64  # channels of a head in every released model
_FOREIGN = (
    (rb"\x1f\x8b", "a gzip archive"),
    (rb"BZh", "a bzip2 archive"),
    (rb"\xfd7zXZ", "an xz archive"),
    (rb"\x28\xb5\x2f\xfd", "a zstandard archive"),
    (rb"version https://git-lfs", "a Git LFS pointer, the file itself was not downloaded"),
    (rb"GGUF", "a GGUF file"),
    (rb"\x89HDF", "an HDF5 file"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"(?s:.{257})ustar", "a tar archive"),
    (rb"\s*<(?i:!doctype|html|\?xml)", "a web page; the download may have answered with a log-in or error page"),
    (rb"\s*[{[]", "JSON"),
)
_OPTIONAL = {
    "deltatok": r"backbone(?=\.)",
    "world": r"(tokenizer\.)?backbone(?=\.)|tokenizer(?=\.)",
    "rgb_head": r"decoder_pos_embed$",  # a fixed table, rebuilt from its formula where a file lacks it
}
"""By kind, what the names of a part begin with that a file may leave out as a whole."""

State = dict[str, torch.Tensor]
Source = Union[str, os.PathLike, "Checkpoint", Mapping[str, torch.Tensor]]
"""A path or hub repository (see :func:`read`), what :func:`read` returned, or a state dict."""


class CheckpointError(ValueError):
    """A file that is not a checkpoint, or whose weights do not fit."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        state_dict: tensors on the CPU under clean names, in the file's order.
        metadata: what the file holds besides (safetensors metadata; a Lightning file's step, epoch, ...).
        kind: "deltatok", "world" (DeltaWorld's and DINO-world's predictors have the same names), "dinov3", "rgb_head",
            "map_head" (segmentation and depth heads have the same names) or "other".
        path: the file, as the errors name it.
    """

    state_dict: State
    metadata: dict[str, Any] = field(default_factory=dict)
    kind: str = "other"
    path: str = "the state dict"

    @property
    def qk_norm_order(self) -> str | None:
        """See :func:`qk_norm_order`."""
        return qk_norm_order(self.state_dict)


class Fit(NamedTuple):
    """How a checkpoint fitted a model: names ``left`` as they were in the model, ``unknown`` to it, and ``misshaped``."""

    left: list[str]
    unknown: list[str]
    misshaped: list[str]


def read(source: str | os.PathLike, *, local_files_only: bool = False) -> Checkpoint:
    """Reads a checkpoint.

    Args:
        source: a file; a folder that holds ``model.safetensors``, ``pytorch_model.bin`` or a sharded index of either; or, where no
            such path exists, a repository on the Hugging Face hub ("owner/name", needs the extra ``[hf]``).
        local_files_only: take hub files from the local cache alone.

    Raises:
        FileNotFoundError: no such file, nor a name that could be a repository.
        CheckpointError: empty, truncated, not a checkpoint, or holding Python objects that would run code.
    """
    path = Path(source)
    if not path.exists():
        path = _from_hub(str(source), local_files_only)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: not a regular file")
    tensors, metadata = _read_file(path)
    return _checkpoint(tensors, metadata, str(path))


def as_checkpoint(source: Source) -> Checkpoint:
    """What :func:`read` returns, from any :data:`Source`."""
    if isinstance(source, Checkpoint):
        return source
    return _checkpoint(source, {}, "the state dict") if isinstance(source, Mapping) else read(source)


def expect(source: Source, kind: str, name: str | None = None) -> Checkpoint:
    """:func:`as_checkpoint`; a :class:`CheckpointError`, with the expected model's ``name``, where it is of another kind."""
    found = as_checkpoint(source)
    if found.kind != kind:
        raise CheckpointError(f"{found.path}: this is {_KINDS[found.kind]}, expected {name or _KINDS[kind]}")
    return found


def load_into(module: nn.Module, source: Source, *, strict: bool = True) -> Fit:
    """Copies a checkpoint's weights into ``module``, in the module's dtype and device.

    What a released file leaves out stays as it is: the backbone of a tokenizer, the backbone and the tokenizer of a world
    model (each as a whole). The module may be wrapped by torch.compile, DDP or the like.

    Args:
        module: a model with the released names.
        source: see :data:`Source`.
        strict: with False, what does not fit is skipped, and returned.

    Raises:
        CheckpointError: another model's file; unknown, missing or mis-shaped names (all of them are listed); with
            ``strict=False``, if nothing fits.
    """
    source = as_checkpoint(source)
    given, kind, name = source.state_dict, source.kind, type(module).__name__
    places = module.state_dict()
    own_names = {_clean(k): k for k in places}
    ours = {k: places[v] for k, v in own_names.items()}
    wanted = _kind(ours)
    if strict and wanted != kind and "other" not in (wanted, kind):
        raise CheckpointError(f"{source.path}: this is {_KINDS[kind]}, expected {_KINDS[wanted]} ({name})")

    parts = {_part(k, wanted) for k in given} | {None}
    missing = [k for k in ours if k not in given and _part(k, wanted) in parts]
    unknown = [k for k in given if k not in ours]
    shapes, own_shapes = ({k: (v.shape, v.is_floating_point()) for k, v in state.items()} for state in (given, ours))
    misshaped = [k for k in given if k in ours and shapes[k] != own_shapes[k]]
    if strict and (unknown or missing or misshaped):
        lines = _misfit(source, ours, missing, unknown, misshaped)
        raise CheckpointError("\n".join((f"{source.path} does not fit {name}:", *lines)))
    usable = {own_names[k]: v for k, v in given.items() if k in ours and k not in misshaped}
    if not usable:
        raise CheckpointError(f"{source.path}: {_KINDS[kind]}, of which nothing fits {name}")
    module.load_state_dict(usable, strict=False)
    return Fit([k for k, v in own_names.items() if v not in usable], unknown, misshaped)


def save(source: nn.Module | Mapping[str, torch.Tensor], path: str | os.PathLike, *, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a model's weights in the released layout, or a state dict as it is.

    A tokenizer is written without its backbone, a world model without backbone and tokenizer. The file is written under
    another name beside ``path`` and renamed when complete, so that ``path`` is never half a file.

    Args:
        source: a model, wrapped or not, or tensors by name.
        path: .safetensors; .bin, .pt, .pth (``torch.save`` of the names and tensors); .ckpt (the same under ``state_dict``).
        metadata: strings to store in a safetensors file; :attr:`Checkpoint.metadata` of one that was read gives the same bytes.

    Raises:
        ValueError: another suffix, metadata for a file that holds none, values that are not tensors.
    """
    path = Path(path)
    if path.suffix != ".safetensors" and path.suffix not in _TORCH_SUFFIXES:
        raise ValueError(f"path must end in .safetensors or one of {_TORCH_SUFFIXES}, got {path.name!r}")
    if metadata and path.suffix != ".safetensors":
        raise ValueError(f"metadata is stored in .safetensors files alone, got {path.name!r}")
    if isinstance(source, nn.Module):
        tensors = {_clean(k): v for k, v in source.state_dict().items()}
        if (kind := _kind(tensors)) in ("deltatok", "world"):
            tensors = {k: v for k, v in tensors.items() if _part(k, kind) is None}
    else:
        tensors = dict(source)
    strangers = [k for k, v in tensors.items() if not isinstance(v, torch.Tensor)]
    if strangers:
        raise ValueError(f"source must map names to tensors, got {type(tensors[strangers[0]]).__name__} under {strangers[0]!r}")
    # Own memory for every tensor: safetensors refuses shared storage, and torch.save would write the whole of a view's.
    tensors = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            if path.suffix == ".safetensors":
                file.write(_safetensors_bytes(tensors, dict(metadata or {})))
            else:
                torch.save({"state_dict": tensors} if path.suffix == ".ckpt" else tensors, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def qk_norm_order(state_dict: Iterable[str]) -> str | None:
    """Where QK-norm stands, by the names: "post_rope" (``q_norm``), "pre_rope" (``q_norm_prerope``), None without QK-norm.

    Raises:
        CheckpointError: both names occur.
    """
    parts = {part for key in state_dict for part in key.split(".")}
    post, pre = bool(parts & {"q_norm", "k_norm"}), bool(parts & {"q_norm_prerope", "k_norm_prerope"})
    if post and pre:
        raise CheckpointError("the names hold QK-norm both before RoPE (q_norm_prerope, k_norm_prerope) and after it (q_norm, k_norm)")
    return "post_rope" if post else "pre_rope" if pre else None


def infer_deltatok_config(state_dict: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Arguments with which :class:`deltakern.DeltaTok` has exactly these weights.

    ``use_delta`` changes no weight and is not among them. ``intermediate_size`` is the least that gives the MLP's size.

    Raises:
        CheckpointError: not a tokenizer, or encoder and decoder differ in depth.
    """
    _one_of(state_dict, "deltatok")
    depth = _depth(state_dict, "encoder_blocks.")
    if depth == 0 or depth != _depth(state_dict, "decoder_blocks."):
        raise CheckpointError(f"a tokenizer has as many encoder as decoder blocks, got {depth} and {_depth(state_dict, 'decoder_blocks.')}")
    names = set(state_dict)
    swiglu = "encoder_blocks.0.mlp.gate_proj.weight" in names
    hidden = matrix_shape(state_dict, "encoder_blocks.0.mlp.up_proj.weight")[0]
    order = qk_norm_order(names)
    return {
        "num_hidden_layers": depth,
        "use_qk_norm": order is not None,
        "use_gated_attn": "encoder_blocks.0.attention.attn_gate.weight" in names,
        "use_swiglu": swiglu,
        "intermediate_size": (3 * hidden + 1) // 2 if swiglu else hidden,
        **({"qk_norm_order": order} if order else {}),
    }


def infer_deltaworld_config(state_dict: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Arguments with which :class:`deltakern.DeltaWorld` (or DINOWorld) has exactly these weights, for heads of 64 channels, or a
    :class:`CheckpointError` where there is no ``predictor.*``."""
    _one_of(state_dict, "world")
    width = matrix_shape(state_dict, "predictor.blocks.0.attention.q_proj.weight")[0]
    return {
        "predictor_hidden_size": width,
        "predictor_num_hidden_layers": _depth(state_dict, "predictor.blocks."),
        "predictor_num_heads": max(1, width // _HEAD),
        "use_bom": "q_embed.weight" not in state_dict,
        "mlp_ratio": matrix_shape(state_dict, "predictor.blocks.0.mlp.up_proj.weight")[0] // width,
    }


def infer_backbone_shape(state_dict: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """``hidden_size`` and ``num_heads`` (of 64 channels) of the backbone that a tokenizer's or world model's weights were made for, or a
    :class:`CheckpointError` for weights of neither."""
    key = "z_embed.weight" if _one_of(state_dict, "deltatok", "world") == "deltatok" else "predictor.blocks.0.attention.kv_proj.weight"
    width = matrix_shape(state_dict, key)[1]
    return {"hidden_size": width, "num_heads": max(1, width // _HEAD)}


def read_dinov3(folder_or_repo_id: str | os.PathLike, *, local_files_only: bool = False) -> tuple[dict[str, Any], State]:
    """Config and weights of a DINOv3 ViT in Hugging Face's layout, from a folder or from the hub (extra ``[hf]``).

    The config is ``config.json``, with ``image_mean`` and ``image_std`` of ``preprocessor_config.json`` where there is one; the weights
    have this package's names (:func:`dinov3_names`).

    Args:
        folder_or_repo_id: folder with ``config.json`` and weights (one file or a sharded index), or "owner/name".
        local_files_only: take hub files from the local cache alone.

    Raises:
        FileNotFoundError: neither a folder nor a repository's name.
        CheckpointError: files missing or damaged, another model, the licence not accepted, ``huggingface_hub`` not installed.
    """
    folder = Path(folder_or_repo_id)
    if not folder.exists():
        folder = _from_hub(str(folder_or_repo_id), local_files_only)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected the folder that holds config.json and the weights, got a file")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: has no config.json, which says how the backbone is built")
    config = _json(folder / "config.json")
    if (folder / "preprocessor_config.json").is_file():
        pixels = _json(folder / "preprocessor_config.json")
        config = {**{k: pixels[k] for k in ("image_mean", "image_std") if k in pixels}, **config}
    return config, dinov3_names(expect(_read_folder(folder), "dinov3").state_dict)


def dinov3_names(state_dict: Mapping[str, torch.Tensor]) -> State:
    """DINOv3 weights under the names of :class:`deltakern.DINOv3`, from either layout of transformers.

    ``layer.N.*`` and ``model.layer.N.*``, with ``backbone.`` in front or not, become ``backbone.model.layer.N.*``; the other names
    only get their ``backbone.``.
    """
    bare = {k.removeprefix("backbone."): v for k, v in state_dict.items()}
    return {f"backbone.{'model.' if k.startswith('layer.') else ''}{k}": v for k, v in bare.items()}


def _checkpoint(tensors: Mapping[str, torch.Tensor], metadata: dict[str, Any], path: str) -> Checkpoint:
    strangers = [k for k, v in tensors.items() if not isinstance(k, str) or not isinstance(v, torch.Tensor)]
    if strangers or not tensors:
        what = f"{strangers[0]!r} is {type(tensors[strangers[0]]).__name__}" if strangers else "it is empty"
        raise CheckpointError(f"{path}: not a checkpoint: expected tensors by name, but {what}")
    clean = {_clean(k): k for k in tensors}
    if len(clean) != len(tensors):
        twice = sorted({k for k in tensors if clean[_clean(k)] != k})
        raise CheckpointError(f"{path}: names that are the same once wrappers' prefixes are gone: {', '.join(map(_clean, twice))}")
    if any(k.startswith("network.") for k in clean):  # a whole training module: its metrics and task heads are not the network
        clean = {k: v for k, v in clean.items() if not k.startswith(("task_heads.", "metrics."))}
        clean = {k.removeprefix("network."): v for k, v in clean.items()}
    return Checkpoint({k: tensors[v] for k, v in clean.items()}, metadata, _kind(clean), path)


def _clean(key: str) -> str:
    key = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
    return re.sub(r"(^|\.)backbone\.layer\.(?=\d)", r"\1backbone.model.layer.", key)


def _kind(names: Iterable[str]) -> str:
    names = set(names)
    if any(k.startswith("predictor.") for k in names):
        return "world"
    if any(k == "z_embed.weight" or k.startswith(("encoder_blocks.", "decoder_blocks.")) for k in names):
        return "deltatok"
    if any(k.endswith("embeddings.patch_embeddings.weight") for k in names):
        return "dinov3"
    if "decoder_embed.weight" in names:
        return "rgb_head"
    return "map_head" if {"bn.weight", "head.weight"} <= names else "other"


def _one_of(names: Iterable[str], *kinds: str) -> str:
    if (kind := _kind(names)) not in kinds:
        raise CheckpointError(f"expected the weights of {' or '.join(_KINDS[k] for k in kinds)}, got {_KINDS[kind]}")
    return kind


def _part(key: str, kind: str) -> str | None:
    """The part to which a name belongs and that a released file of this kind may leave out."""
    found = re.match(_OPTIONAL[kind], key) if kind in _OPTIONAL else None
    return found and found[0]


def _misfit(source: Checkpoint, ours: State, missing: list[str], unknown: list[str], misshaped: list[str]) -> Iterator[str]:
    """The lines of a message on all that does not fit."""
    theirs = source.state_dict

    def described(value: torch.Tensor) -> str:
        return f"{tuple(value.shape)}" + ("" if value.is_floating_point() else f" {str(value.dtype).removeprefix('torch.')}")

    for title, found in (
        ("missing", [f"{k} {tuple(ours[k].shape)}" for k in missing]),
        ("unknown", [f"{k} {described(theirs[k])}" for k in unknown]),
        ("mis-shaped", [f"{k}: file {described(theirs[k])}, model {tuple(ours[k].shape)}" for k in misshaped]),
    ):
        if found:
            yield f"  {title} ({len(found)}):"
            yield from (f"    {line}" for line in found)
    infer = {"deltatok": infer_deltatok_config, "world": infer_deltaworld_config}.get(_kind(ours), lambda _: {})
    with contextlib.suppress(CheckpointError):  # too little of the model is there to say more
        arguments = infer(ours)
        if differ := [f"{k}={v!r}" for k, v in infer(theirs).items() if arguments.get(k) != v]:
            yield f"  the file was made with {', '.join(differ)}"


def _depth(names: Iterable[str], prefix: str) -> int:
    return len({k.removeprefix(prefix).partition(".")[0] for k in names if k.startswith(prefix)})


def matrix_shape(state_dict: Mapping[str, torch.Tensor], key: str, path: str = "") -> tuple[int, int]:
    """(rows, columns) of a weight; a :class:`CheckpointError`, which names the file at ``path``, where it is no matrix."""
    shape = tuple(state_dict[key].shape) if key in state_dict else ()
    if len(shape) != 2:
        got = f"shape {shape}" if key in state_dict else "no such name"
        raise CheckpointError(f"{path and path + ': '}expected the matrix {key}, got {got}")
    return shape


def _read_file(path: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Tensors by name, as the file has them, and what else it holds."""
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        raise CheckpointError(f"{path}: the file is empty")
    if start[8:9] == b"{":  # safetensors: the header's length in 8 bytes, then JSON
        try:
            with safetensors.safe_open(path, "pt") as file:
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
            with open(path, "rb") as file:  # the metadata in the file's order, which the library loses
                header = json.loads(file.read(8 + int.from_bytes(start[:8], "little"))[8:])
            return tensors, header.get("__metadata__") or {}
        except (safetensors.SafetensorError, OSError) as problem:
            raise CheckpointError(f"{path}: a safetensors file that is truncated or damaged: {problem}") from problem
    if start[:4] != b"PK\x03\x04" and start[:1] != b"\x80":
        raise CheckpointError(f"{path}: not a checkpoint: it looks like {_looks_like(start)}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # the unpickler raises whatever the bytes lead it to
        raise CheckpointError(f"{path}: {_unreadable(problem, start)}") from problem
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: not a checkpoint: expected tensors by name, got {type(content).__name__}")
    if isinstance(content.get("state_dict"), Mapping):
        return content["state_dict"], {k: v for k, v in content.items() if k != "state_dict"}
    return content, {}


def _unreadable(problem: Exception, start: bytes) -> str:
    text = str(problem).strip() or type(problem).__name__
    found = re.search(r"(?:GLOBAL|global|class) ([\w.]+)", text)
    if found:
        return (
            f"holds Python objects besides tensors ({found[1]}), which could run code when loaded, and is not read; "
            "where you trust it, load it with torch.load yourself and save its state dict alone"
        )
    if "TorchScript" in text:
        return "a TorchScript archive, a program rather than a checkpoint"
    cause = text.partition("WeightsUnpickler error:")[2].strip() or text
    what = "a zip archive that torch.save did not write" if start[:2] == b"PK" else "a pickle that torch.save did not write"
    return f"{what}, or one truncated or damaged: {cause.splitlines()[0]}"


def _looks_like(start: bytes) -> str:
    return next((name for pattern, name in _FOREIGN if re.match(pattern, start)), f"something else (first bytes {start[:8].hex(' ')})")


def _safetensors_bytes(tensors: State, metadata: dict[str, str]) -> bytes:
    """As the library writes it, with the metadata in its own order: the library's order changes from run to run."""
    plain = safetensors.torch.save(tensors)
    if not metadata:
        return plain
    size = int.from_bytes(plain[:8], "little")
    header = {"__metadata__": metadata, **json.loads(plain[8 : 8 + size])}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + plain[8 + size :]


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise CheckpointError(f"{path}: not JSON: {problem}") from problem
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _read_folder(folder: Path) -> Checkpoint:
    for path in (folder / name for name in _WEIGHT_FILES):
        if path.is_file():
            return _read_shards(path) if path.suffix == ".json" else read(path)
    raise CheckpointError(f"{folder}: the folder holds none of {', '.join(_WEIGHT_FILES)}")


def _read_shards(index: Path) -> Checkpoint:
    where = _json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(v, str) for v in where.values()):
        raise CheckpointError(f"{index}: expected a weight_map of names to files")
    files = sorted(set(where.values()))
    outside = [f for f in files if f in ("", ".", "..") or "/" in f or "\\" in f]
    if outside:
        raise CheckpointError(f"{index}: shards must be files beside it, got {', '.join(map(repr, outside))}")
    absent = [f for f in files if not (index.parent / f).is_file()]
    if absent:
        raise CheckpointError(f"{index}: shards that are not there: {', '.join(absent)}")
    shards = {f: _read_file(index.parent / f)[0] for f in files}
    lost = [f"{k} (of {f})" for k, f in where.items() if k not in shards[f]]
    if lost:
        raise CheckpointError(f"{index}: names that their shards do not hold: {', '.join(lost)}")
    return _checkpoint({k: shards[f][k] for k, f in where.items()}, {}, str(index))


def _from_hub(name: str, local_files_only: bool) -> Path:
    """The local folder of a hub repository's config and weights."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) or Path(name).suffix in (*_TORCH_SUFFIXES, ".safetensors"):
        raise FileNotFoundError(f"no such file or folder: {name}")
    try:
        import huggingface_hub
        from huggingface_hub import utils as errors  # in .errors only since 0.25
    except ImportError as problem:
        raise CheckpointError(
            f"{name}: no such file or folder; to fetch it from the Hugging Face hub, pip install 'deltakern[hf]' ({problem})"
        ) from problem
    patterns = ["config.json", "preprocessor_config.json", *_WEIGHT_FILES, "*-of-*"]
    unreached = "local_files_only=True" if local_files_only else "the hub could not be reached"
    reasons = {  # the first that fits
        errors.GatedRepoError: f"access is gated: accept the licence at https://huggingface.co/{name} and log in with `hf auth login`",
        errors.LocalEntryNotFoundError: f"no such file or folder, and not in the local Hugging Face cache ({unreached})",
        errors.RepositoryNotFoundError: "no such file or folder, nor a repository on the Hugging Face hub (or one you cannot see)",
    }
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=local_files_only))
    except (*reasons, errors.HfHubHTTPError, errors.HFValidationError, OSError) as problem:
        other = f"could not be fetched from the Hugging Face hub: {problem}"
        reason = next((text for kind, text in reasons.items() if isinstance(problem, kind)), other)
        raise CheckpointError(f"{name}: {reason}") from problem
