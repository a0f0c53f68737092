"""The command line: what it prints, its exit status, one line for an error."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")

import deltakern
from deltakern.cli import main


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"deltakern {deltakern.__version__}"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert "demo" in capsys.readouterr().out


def test_demo_help_names_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--help"]) == 0
    out = capsys.readouterr().out
    for option in ("--out", "--seed", "--video", "--size", "--dinov3", "--deltatok", "--deltaworld"):
        assert option in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "nonsense"),
        (["demo", "--nonsense"], "--nonsense"),
        (["demo", "--seed", "x"], "--seed"),
    ],
)
def test_wrong_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("deltakern: error: ")
    assert message in streams.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--video", "nowhere.mp4"], "nowhere.mp4: no such file or folder"),
        (["--size", "50"], "size must be a multiple of 16 and at least 32, got 50"),
        (["--gap", "0"], "gap must be at least 1, got 0"),
        (["--deltatok", "tok.bin"], "give dinov3 as well"),
        (["--deltaworld", "world.bin"], "give deltatok as well"),
        (["--gap", "9"], "too short: 132 frames leave 44 held out, a window with gap 9 needs 55"),
    ],
)
def test_an_error_is_one_line(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av")
    pytest.importorskip("matplotlib")
    assert main(["demo", "--out", str(tmp_path), *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("deltakern: error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size must be a multiple of 16"):
        main(["demo", "--size", "50", "--out", str(tmp_path), "--debug"])


def test_unexpected_errors_name_their_type(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: list[str]) -> int:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("deltakern.cli.commands.run", fail)
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == "deltakern: error: ZeroDivisionError: division by zero (--debug shows where)\n"


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(_: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("deltakern.cli.commands.run", stop)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "deltakern: stopped\n"


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_a_missing_package_names_the_extra(package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["--version"]) == 1
    assert f'needs the package {package}; install it with: pip install "deltakern[demo]"' in capsys.readouterr().err
