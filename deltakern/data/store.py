"""The token store: delta tokens of videos on disk, so that frozen features are computed once and not at every step.

A store is a folder::

    manifest.json             what every token in it has in common: fingerprint of the models, sizes, dtype, sampling, seed
    shards/NAME.parquet       rows; NAME is unique to the process that wrote it
    failed/NAME.jsonl         videos that could not be read, and why

A row is one clip: ``video`` (string), ``crop`` (int32, the number of the draw), ``timestamps`` (T float32 seconds, a list of
fixed size), ``tokens`` (T x D little-endian float16 or float32, C order, as fixed-size binary), ``fingerprint`` (string).

A shard is written under another name and renamed when complete and on disk, so that a killed process loses at most the rows of
the shard in hand. Processes share nothing but the manifest, which the first of them creates and none ever changes. Where two
shards hold the same clip, the first by name counts. Pages carry checksums: a damaged shard is noticed when it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from deltakern._extras import require

__all__ = ["Manifest", "StoreError", "TokenDataset", "TokenOrder", "Writer", "done_clips", "fingerprint", "read_manifest", "video_share"]

FORMAT = 1
DTYPES = ("float16", "float32")
SPLITS = ("all", "train", "val")


class StoreError(ValueError):
    """A token store that cannot be read or written as asked."""


def fingerprint(tokenizer: nn.Module) -> str:
    """32 hexadecimal digits that depend on all that decides a video's tokens: weights of backbone and tokenizer, and configuration.

    Where the model runs, what it leaves out exactly and how it is wrapped make no difference; the parameters' dtype does.

    Args:
        tokenizer: a DeltaTok with its backbone.
    """
    backbone = tokenizer.backbone
    config = getattr(getattr(backbone, "backbone", None), "config", None)
    processor = getattr(backbone, "processor", None)
    facts = {
        "use_delta": tokenizer.use_delta,
        "heads": backbone.num_heads,
        "patch_size": backbone.patch_size,
        "theta": float(getattr(config, "rope_theta", 100.0)),
        "eps": float(getattr(config, "layer_norm_eps", 1e-5)),
        "mean": [float(x) for x in getattr(processor, "image_mean", ())],
        "std": [float(x) for x in getattr(processor, "image_std", ())],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Manifest:
    """What all tokens of a store have in common.

    Attributes:
        fingerprint: of the models, see :func:`fingerprint`.
        width: D.
        heads: attention heads of the backbone.
        patch_size: of the backbone.
        num_frames: T.
        dtype: "float16" or "float32".
        precision: what the models computed in.
        seed: of the draws.
        sampling: how clips were drawn, by the names of :class:`deltakern.data.sampling.Sampling`.
    """

    fingerprint: str
    width: int
    heads: int
    patch_size: int
    num_frames: int
    dtype: str = "float16"
    precision: str = "float32"
    seed: int = 0
    sampling: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {self.dtype!r}")


def read_manifest(store: str | os.PathLike) -> Manifest:
    """The manifest of a store.

    Raises:
        StoreError: no store, or one of another format.
    """
    path = Path(store) / "manifest.json"
    if not path.is_file():
        raise StoreError(f"{store}: not a token store: it has no manifest.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise StoreError(f"{path}: a format that this version does not read; expected {FORMAT}")
        return Manifest(**content)
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise StoreError(f"{path}: not a token store's manifest, or damaged ({problem})") from problem


def _create(store: Path, manifest: Manifest) -> None:
    """Creates the store, or checks that it holds tokens of the same kind. Safe among any number of processes."""
    for folder in ("shards", "failed"):
        (store / folder).mkdir(parents=True, exist_ok=True)
    path = store / "manifest.json"
    if not path.exists():
        partial = store / f".manifest.{uuid.uuid4().hex}.partial"
        _write_durably(partial, json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1).encode() + b"\n")
        try:
            os.link(partial, path)  # unlike a rename it does not replace what another process has just created
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            os.replace(partial, path)
        partial.unlink(missing_ok=True)
    ours, theirs = json.loads(json.dumps(asdict(manifest))), asdict(read_manifest(store))
    differing = [f"{key} is {theirs[key]!r}, expected {ours[key]!r}" for key in ours if ours[key] != theirs[key]]
    if differing:
        raise StoreError(f"{store}: holds tokens of another kind: {'; '.join(differing)}; write to another store")


def _write_durably(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes a rename in ``folder`` survive a power failure; some file systems do not offer it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class Writer:
    """Adds clips to a store, which it creates if need be. Leaving the context writes the rows in hand.

    Args:
        store: the folder.
        manifest: must be that of the store, if there is one.
        rows_per_shard: clips to a shard: what a killed process loses at most.

    Raises:
        StoreError: the store holds tokens of another kind.
        MissingExtraError: pyarrow is not installed.
    """

    def __init__(self, store: str | os.PathLike, manifest: Manifest, *, rows_per_shard: int = 1024) -> None:
        if rows_per_shard < 1:
            raise ValueError(f"rows_per_shard must be at least 1, got {rows_per_shard}")
        self._arrow = require("pyarrow", "store", "the token store")
        self._parquet = require("pyarrow.parquet", "store", "the token store")
        self.store, self.manifest, self.rows_per_shard = Path(store), manifest, rows_per_shard
        _create(self.store, manifest)
        _remove_leftovers(self.store / "shards")
        self.name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self.written = 0
        self._shards = 0
        self._rows: list[tuple[str, int, np.ndarray, bytes]] = []

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def add(self, video: str, crop: int, timestamps: torch.Tensor, tokens: torch.Tensor) -> None:
        """One clip: timestamps (T,) seconds and tokens (T,D).

        Raises:
            StoreError: shapes that are not the manifest's; tokens that are not finite, or that float16 cannot hold.
        """
        frames, width = self.manifest.num_frames, self.manifest.width
        if tuple(tokens.shape) != (frames, width) or tuple(timestamps.shape) != (frames,):
            raise StoreError(
                f"{video}: expected tokens {(frames, width)} and timestamps {(frames,)}, "
                f"got {tuple(tokens.shape)} and {tuple(timestamps.shape)}"
            )
        values = tokens.detach().float().cpu()
        if not values.isfinite().all():
            raise StoreError(f"{video}, crop {crop}: tokens that are not finite")
        if self.manifest.dtype == "float16" and values.abs().max() > torch.finfo(torch.float16).max:
            raise StoreError(f"{video}, crop {crop}: tokens too large for float16; store them as float32")
        data = np.ascontiguousarray(values.numpy(), dtype=f"<f{2 if self.manifest.dtype == 'float16' else 4}").tobytes()
        self._rows.append((video, crop, timestamps.detach().cpu().numpy().astype("<f4"), data))
        if len(self._rows) >= self.rows_per_shard:
            self.flush()

    def flush(self) -> None:
        """Writes the rows in hand as a shard."""
        if not self._rows:
            return
        name = f"{self.name}-{self._shards:06d}.parquet"
        partial = self.store / "shards" / f".{name}.partial"
        table = to_table(self._arrow, self._rows, self.manifest)
        compression = {"video": "SNAPPY", "fingerprint": "SNAPPY"}  # floats do not compress
        with open(partial, "wb") as file:
            self._parquet.write_table(
                table, file, compression=compression, use_dictionary=["video", "fingerprint"], write_page_checksum=True
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.store / "shards" / name)
        _sync_folder(self.store / "shards")
        self.written += len(self._rows)
        self._shards += 1
        self._rows.clear()

    def failed(self, video: str, reason: str) -> None:
        """Notes a video that could not be read."""
        with open(self.store / "failed" / f"{self.name}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"video": video, "reason": reason}, ensure_ascii=False) + "\n")


def to_table(arrow: Any, rows: Sequence[tuple[str, int, np.ndarray, bytes]], manifest: Manifest) -> Any:
    """A pyarrow table of rows (video, crop, timestamps, tokens) as the module's docstring describes them."""
    videos, crops, times, tokens = zip(*rows, strict=True)
    return arrow.table(
        {
            "video": arrow.array(videos, arrow.string()),
            "crop": arrow.array(crops, arrow.int32()),
            "timestamps": arrow.FixedSizeListArray.from_arrays(arrow.array(np.concatenate(times)), manifest.num_frames),
            "tokens": arrow.array(tokens, arrow.binary(len(tokens[0]))),
            "fingerprint": arrow.array([manifest.fingerprint] * len(rows), arrow.string()),
        }
    )


def _remove_leftovers(folder: Path) -> None:
    """Removes unfinished shards of processes of this machine that are no more."""
    host = socket.gethostname()
    for path in folder.glob(f".{host}-*.partial"):
        pid = path.name[len(host) + 2 :].partition("-")[0]
        if not pid.isdigit() or _alive(int(pid)):
            continue
        path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _shards(store: Path) -> list[Path]:
    return sorted((store / "shards").glob("[!.]*.parquet"))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what pyarrow raises about a damaged shard into an error that says which."""
    arrow = require("pyarrow", "store", "the token store")
    try:
        yield
    except (arrow.ArrowException, OSError, KeyError) as problem:
        raise StoreError(f"{path}: not a shard of a token store, or damaged ({problem}); delete it and tokenize again") from problem


def _columns(path: Path, columns: list[str]) -> Any:
    parquet = require("pyarrow.parquet", "store", "the token store")
    with _reading(path):
        table = parquet.read_table(path, columns=columns, page_checksum_verification=True, memory_map=True, partitioning=None)
        if table.column_names != columns:
            raise KeyError(f"expected the columns {columns}, got {table.column_names}")
        return table


def done_clips(store: str | os.PathLike) -> dict[str, set[int]]:
    """For every video of a store the draws that it holds."""
    done: dict[str, set[int]] = {}
    for path in _shards(Path(store)):
        table = _columns(path, ["video", "crop"])
        for video, crop in zip(table["video"].to_pylist(), table["crop"].to_pylist(), strict=True):
            done.setdefault(video, set()).add(crop)
    return done


def video_share(video: str) -> float:
    """A number in [0, 1) that depends on the video's name alone."""
    return int.from_bytes(hashlib.sha256(video.encode()).digest()[:8], "little") / 2**64


class TokenDataset(torch.utils.data.Dataset):
    """The clips of one or several token stores, for any DataLoader; items are (tokens (T,D) float32, timestamps (T,) float32).

    Shards are read when first touched and kept while ``cache_bytes`` allows. Reading in the order of :class:`TokenOrder`
    reads each shard once an epoch, where the cache holds at least four.

    Args:
        stores: a store's folder, or several of one fingerprint and shape.
        split: "all", "train" or "val": the videos are divided by their names, all clips of one on the same side.
        val_fraction: share of the videos on the "val" side.
        fingerprint: if given, must be that of the stores.
        cache_bytes: memory for shards, at least one of which is kept.

    Raises:
        StoreError: no store, damaged shards, no clip, fingerprints or shapes that differ.
        MissingExtraError: pyarrow is not installed.
    """

    def __init__(
        self,
        stores: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        split: str = "all",
        val_fraction: float = 0.0,
        fingerprint: str | None = None,
        cache_bytes: int = 4 << 30,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must be in [0, 1), got {val_fraction}")
        folders = [Path(s) for s in ([stores] if isinstance(stores, str | os.PathLike) else stores)]
        if not folders:
            raise StoreError("no store was given")
        self.manifest = read_manifest(folders[0])
        for folder in folders:
            _same_kind(folders[0], self.manifest, folder, read_manifest(folder))
        if fingerprint is not None and fingerprint != self.manifest.fingerprint:
            raise StoreError(
                f"{folders[0]}: its tokens were made by other models: fingerprint {self.manifest.fingerprint}, expected {fingerprint}; "
                "tokens of one tokenizer mean nothing to another"
            )
        self.num_frames, self.width = self.manifest.num_frames, self.manifest.width
        self.cache_bytes = cache_bytes
        self._paths: list[Path] = []
        self._cache: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._index(folders, split, val_fraction)
        if not len(self):
            raise StoreError(f"{', '.join(map(str, folders))}: no clip in the split {split!r} (val_fraction={val_fraction})")

    def _index(self, folders: list[Path], split: str, val_fraction: float) -> None:
        """Where every clip lies: ``_shard`` and ``_row`` (N,); the names stay on disk."""
        seen: set[bytes] = set()
        shard, row = [], []
        digest = hashlib.sha256(self.manifest.fingerprint.encode())
        for path in (p for folder in folders for p in _shards(folder)):
            table = _columns(path, ["video", "crop", "fingerprint"])
            strangers = set(table["fingerprint"].unique().to_pylist()) - {self.manifest.fingerprint}
            if strangers:
                raise StoreError(f"{path}: its tokens were made by other models than the manifest says: {', '.join(sorted(strangers))}")
            kept = []
            for i, (video, crop) in enumerate(zip(table["video"].to_pylist(), table["crop"].to_pylist(), strict=True)):
                if split != "all" and (video_share(video) < val_fraction) != (split == "val"):
                    continue
                key = hashlib.blake2b(f"{crop} {video}".encode(), digest_size=16).digest()
                if key not in seen:
                    seen.add(key)
                    digest.update(key)
                    kept.append(i)
            if kept:
                shard.append(np.full(len(kept), len(self._paths), np.int32))
                row.append(np.array(kept, np.int32))
                self._paths.append(path)
        self._shard, self._row = (np.concatenate(parts) if parts else np.zeros(0, np.int32) for parts in (shard, row))
        self.digest = digest.hexdigest()[:32]
        """Depends on which clips there are and in which order."""

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be below {len(self)}, got {index}")
        tokens, timestamps = self.batch([index % len(self)])
        return tokens[0], timestamps[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(*self.batch(indices), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Clips as a batch: tokens (B,T,D) float32, timestamps (B,T) float32."""
        indices = np.asarray(indices, np.int64)
        tokens = np.empty((len(indices), self.num_frames, self.width), np.float32)
        times = np.empty((len(indices), self.num_frames), np.float32)
        shards = self._shard[indices]
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            all_tokens, all_times = self._load(int(shard))
            rows = self._row[indices[here]]
            tokens[here], times[here] = all_tokens[rows], all_times[rows]
        return torch.from_numpy(tokens), torch.from_numpy(times)

    def names(self, indices: Sequence[int] | np.ndarray) -> list[tuple[str, int]]:
        """(video, crop) of clips; reads them from disk."""
        names = []
        for index in indices:
            table = _columns(self._paths[self._shard[index]], ["video", "crop"]).slice(int(self._row[index]), 1)
            names.append((table["video"][0].as_py(), table["crop"][0].as_py()))
        return names

    def _load(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        if shard in self._cache:
            self._cache.move_to_end(shard)
            return self._cache[shard]
        path = self._paths[shard]
        table = _columns(path, ["timestamps", "tokens"]).combine_chunks()
        size = self.num_frames * self.width * np.dtype(self.manifest.dtype).itemsize
        with _reading(path):
            tokens, times = table["tokens"].chunk(0), table["timestamps"].chunk(0)
            if getattr(tokens.type, "byte_width", None) != size:
                raise KeyError(f"rows of {size} bytes were expected, got {tokens.type}")
            values = np.frombuffer(tokens.buffers()[1], f"<f{size // (self.num_frames * self.width)}")
            values = values.reshape(-1, self.num_frames, self.width)[tokens.offset : tokens.offset + len(tokens)]
            seconds = times.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, self.num_frames)
        self._cache[shard] = (values, seconds)
        while len(self._cache) > 1 and sum(v.nbytes for v, _ in self._cache.values()) > self.cache_bytes:
            self._cache.popitem(last=False)
        return self._cache[shard]

    def shard_runs(self) -> list[tuple[int, int]]:
        """The clips of every shard, as ranges of indices."""
        edges = np.flatnonzero(np.diff(self._shard)) + 1
        return list(zip([0, *edges.tolist()], [*edges.tolist(), len(self)], strict=True))

    def shards_cached(self) -> int:
        """How many shards the cache holds at once."""
        largest = max(stop - start for start, stop in self.shard_runs())
        return max(1, self.cache_bytes // (largest * self.num_frames * self.width * np.dtype(self.manifest.dtype).itemsize))


def _same_kind(first: Path, one: Manifest, second: Path, other: Manifest) -> None:
    for key in ("fingerprint", "width", "heads", "num_frames", "dtype"):
        if getattr(one, key) != getattr(other, key):
            raise StoreError(
                f"{first} and {second} hold tokens of different kinds: {key} {getattr(one, key)!r} and {getattr(other, key)!r}"
            )


class TokenOrder:
    """The endless random order in which clips are trained on: every clip once an epoch, a function of the seed alone.

    Shards are shuffled, taken half as many at a time as the dataset's cache holds, and the clips of those shuffled among each
    other; where the cache holds all of them this is a full shuffle.

    Args:
        dataset: whose clips are ordered.
        seed: another seed, another order.
    """

    def __init__(self, dataset: TokenDataset, seed: int = 0) -> None:
        self.length, self.seed = len(dataset), seed
        self._runs, self._together = dataset.shard_runs(), dataset.shards_cached()
        if self._together < len(self._runs):
            self._together = max(1, self._together // 2)  # a batch may need the end of one group and the start of the next
        self._epochs: OrderedDict[int, np.ndarray] = OrderedDict()

    def epoch(self, number: int) -> np.ndarray:
        """(N,) the order of one epoch."""
        if number not in self._epochs:
            random = np.random.Generator(np.random.PCG64([self.seed, number]))
            shards = random.permutation(len(self._runs))
            parts = []
            for start in range(0, len(shards), self._together):
                group = [np.arange(*self._runs[s]) for s in shards[start : start + self._together]]
                parts.append(random.permutation(np.concatenate(group)))
            self._epochs[number] = np.concatenate(parts)
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[number]

    def take(self, start: int, stop: int) -> np.ndarray:
        """Clips ``start`` to ``stop`` of the endless order."""
        parts = []
        while start < stop:
            epoch, place = divmod(start, self.length)
            end = min(self.length, place + stop - start)
            parts.append(self.epoch(epoch)[place:end])
            start += end - place
        return np.concatenate(parts)
