"""The commands of ``deltakern``, one function each. Each imports what it needs when it runs.

To add one, write a function with typed parameters and put ``@app.command()`` above it. Failures are exceptions: ValueError and
OSError reach the user as their message alone, others with their type; see :mod:`deltakern.cli`.
"""

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

app = typer.Typer(
    name="deltakern",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run(arguments: list[str]) -> int:
    """Parses and runs; returns the exit status. A wrong command line is reported here, all else is raised."""
    command = typer.main.get_command(app)
    try:
        return int(command.main(args=arguments or ["--help"], prog_name="deltakern", standalone_mode=False) or 0)
    except typer.Exit as done:
        return done.exit_code
    except typer.Abort as stop:
        raise KeyboardInterrupt from stop
    except Exception as problem:
        # typer brings its own copy of click in some versions, so its errors are known by what they can do
        if not (hasattr(problem, "format_message") and hasattr(problem, "exit_code")):
            raise
        typer.echo(f"deltakern: error: {problem.format_message()} (see deltakern --help)", err=True)
        return problem.exit_code


def _version(asked: bool) -> None:
    if asked:
        from deltakern import __version__

        typer.echo(f"deltakern {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")] = False,
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """DeltaTok and DeltaWorld: one token per video frame, many futures in one pass."""


@app.command()
def demo(
    out: Annotated[Path, Option(help="Folder for the page.")] = Path("deltakern-demo"),
    seed: Annotated[int, Option(help="The same seed gives the same numbers, bit for bit.")] = 0,
    video: Annotated[Path | None, Option(help="A video of your own, or a folder of images (25 a second).")] = None,
    size: Annotated[int, Option(help="Shorter side of the frames in pixels.")] = 96,
    gap: Annotated[int, Option(help="Frames of the video from one step to the next.")] = 5,
    tokenizer_steps: Annotated[int, Option(help="Training steps of DeltaTok.")] = 400,
    world_steps: Annotated[int, Option(help="Training steps of DeltaWorld.")] = 400,
    samples: Annotated[int, Option(help="Futures sampled for each context.")] = 20,
    dinov3: Annotated[str | None, Option(help="DINOv3 weights: folder or hub repository. Random weights without it.")] = None,
    deltatok: Annotated[Path | None, Option(help="Released DeltaTok checkpoint, not trained further; needs --dinov3.")] = None,
    deltaworld: Annotated[Path | None, Option(help="Released DeltaWorld checkpoint, not trained further; needs --deltatok.")] = None,
    threads: Annotated[int, Option(help="CPU threads; 0 leaves the number as it is. It may change the last bits of the numbers.")] = 0,
) -> None:
    """Train both models on a short clip, predict its held-out end, and write a page with the pictures."""
    from deltakern.demo import Settings, run

    run(
        Settings(
            out=out,
            seed=seed,
            video=video,
            size=size,
            gap=gap,
            tokenizer_steps=tokenizer_steps,
            world_steps=world_steps,
            samples=samples,
            dinov3=dinov3,
            deltatok=deltatok,
            deltaworld=deltaworld,
            threads=threads,
        )
    )


@app.command()
def doctor(json: Annotated[bool, Option("--json", help="Print JSON instead of text.")] = False) -> int:
    """Say what is installed, which implementation every op takes and why, and whether its values are right. 0 if nothing is broken."""
    from deltakern.doctor import main as diagnose

    return diagnose(json_output=json)


@app.command()
def report(
    preset: Annotated[str | None, Option(help="tiny, vitb-256 or vitb-512. By default tiny on a CPU, vitb-512 on a GPU.")] = None,
    device: Annotated[str | None, Option(help="cpu or cuda. By default the GPU where there is one.")] = None,
    out: Annotated[Path, Option(help="Folder for report.html, report.md and report.json.")] = Path("deltakern-report"),
    only: Annotated[str | None, Option(help="flops, latency, memory or accuracy instead of all four.")] = None,
    source: Annotated[Path | None, Option("--from", help="Draw the rows of this folder (benchmarks/results) instead of measuring.")] = None,
) -> int:
    """Measure FLOPs, latency, memory and accuracy against the release's structure, and write a page with charts."""
    from deltakern.report.run import main as measure

    return measure(preset, device, out, only, source)
