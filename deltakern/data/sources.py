"""Finding the videos that a command was given: files, folders, list files and tar shards."""

from __future__ import annotations

import contextlib
import itertools
import os
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SourceError", "Video", "find_videos"]

SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".flv", ".wmv", ".mpg", ".mpeg", ".ts", ".m2ts", ".3gp", ".ogv", ".y4m")
)
"""What counts as a video inside a folder or a tar shard; a file that is named itself is taken whatever its suffix."""

LISTS = frozenset((".txt", ".list"))


class SourceError(ValueError):
    """A source that cannot be used. The message names it."""


@dataclass(frozen=True, order=True)
class Video:
    """A video and how to get at it.

    Attributes:
        name: what it is called in a store and in logs; unique among the videos of one call.
        path: the file, or the tar shard that holds it.
        offset, length: where in the shard it lies, in bytes; None for a file of its own.
    """

    name: str
    path: Path
    offset: int | None = None
    length: int | None = None

    @contextlib.contextmanager
    def file(self) -> Iterator[Path]:
        """A path to read the video from, within the context: its own, or a temporary copy from the shard."""
        if self.offset is None:
            yield self.path
            return
        with tempfile.TemporaryDirectory(prefix="deltakern-") as folder:
            copy = Path(folder) / f"video{Path(self.name).suffix}"
            with open(self.path, "rb") as shard:
                shard.seek(self.offset)
                copy.write_bytes(shard.read(self.length))
            yield copy


def find_videos(sources: Sequence[str | os.PathLike]) -> list[Video]:
    """All videos of the sources, sorted by name.

    Args:
        sources: each a video file (named by its file name), a folder (searched to any depth; videos are named by their path
            within it), a list file (.txt or .list: one path a line, relative to the list; blank lines and lines that start with #
            are passed over; named as written), or an uncompressed tar shard (named "shard.tar/path within it").

    Raises:
        SourceError: a source is missing or holds no video, or two videos have one name.
    """
    if not sources:
        raise SourceError("no source was given; expected video files, folders, list files (.txt) or tar shards (.tar)")
    found: list[Video] = []
    for source in map(Path, sources):
        if not source.exists():
            raise SourceError(f"{source}: no such file or folder")
        videos = list(_from_folder(source) if source.is_dir() else _from_file(source, source.name))
        if not videos:
            raise SourceError(f"{source}: holds no video ({', '.join(sorted(SUFFIXES))})")
        found += videos
    found.sort()
    for one, other in itertools.pairwise(found):
        if one.name == other.name:
            raise SourceError(
                f"two videos are named {one.name!r}, in {one.path} and {other.path}; give one folder above both, or a list file"
            )
    return found


def _from_folder(folder: Path) -> Iterator[Video]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix.lower() in SUFFIXES:
            yield Video(path.relative_to(folder).as_posix(), path)
        elif path.is_file() and path.suffix.lower() == ".tar":
            yield from _from_tar(path, path.relative_to(folder).as_posix())


def _from_file(path: Path, name: str) -> Iterator[Video]:
    suffix = path.suffix.lower()
    if suffix == ".tar":
        yield from _from_tar(path, name)
    elif suffix in (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip"):
        raise SourceError(f"{path}: compressed archives cannot be read at random; unpack it, or store it as a plain .tar")
    elif suffix in LISTS:
        yield from _from_list(path)
    else:
        yield Video(name, path)


def _from_list(path: Path) -> Iterator[Video]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as problem:
        raise SourceError(f"{path}: a list file is UTF-8 text, one path a line ({problem})") from problem
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        video = path.parent / line
        if not video.is_file():
            raise SourceError(f"{path}, line {number}: no such file: {line}")
        if video.suffix.lower() in LISTS:
            raise SourceError(f"{path}, line {number}: a list inside a list: {line}")
        yield from _from_file(video, Path(line).as_posix())


def _from_tar(path: Path, name: str) -> Iterator[Video]:
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if member.isfile() and Path(member.name).suffix.lower() in SUFFIXES:
                    yield Video(f"{name}/{member.name}", path, member.offset_data, member.size)
    except (tarfile.TarError, OSError) as problem:
        raise SourceError(f"{path}: not a tar archive that can be read, or damaged ({problem})") from problem
