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
    tokenizer_steps: Annotated[int, Option(help="Training steps of DeltaTok.")] = 600,
    world_steps: Annotated[int, Option(help="Training steps of DeltaWorld.")] = 200,
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


@app.command()
def tokenize(
    sources: Annotated[list[str], typer.Argument(help="Videos, folders of videos, lists of paths (.txt), tar shards.")],
    out: Annotated[str, Option(help="The token store; created, or added to.")],
    crops: Annotated[int, Option(help="Random draws of every video.")] = 1,
    frames: Annotated[int, Option(help="Frames of a clip.")] = 8,
    size: Annotated[int, Option(help="Height and width of the drawn frames in pixels.")] = 512,
    dinov3: Annotated[str | None, Option(help="DINOv3 weights: folder or hub repository. The released models' without it.")] = None,
    deltatok: Annotated[str | None, Option(help="DeltaTok checkpoint: file or hub repository. The released one without it.")] = None,
    random_weights: Annotated[bool, Option("--random-weights", help="Random weights of the released sizes, to try it out.")] = False,
    float32: Annotated[bool, Option("--float32", help="Store float32 instead of float16.")] = False,
    precision: Annotated[str | None, Option(help="float32 or bfloat16 computation. By default bfloat16 on a GPU.")] = None,
    devices: Annotated[str | None, Option(help="Such as cuda:0,cuda:1; a process each. By default every GPU, or the CPU.")] = None,
    workers: Annotated[int, Option(help="Processes a device that decode video.")] = 0,
    batch: Annotated[int, Option(help="Clips encoded at once. Above 1 last bits may depend on what was left to do.")] = 1,
    shard: Annotated[int, Option(help="Clips a shard: what a killed process loses at most.")] = 1024,
    ray: Annotated[int, Option(help="Encode on so many actors of a Ray cluster instead of this machine's devices.")] = 0,
    part: Annotated[str, Option(help="i/n: every n-th video from the i-th, to share the work among machines.")] = "1/1",
    seed: Annotated[int, Option(help="Of the draws.")] = 0,
) -> int:
    """Encode videos as delta tokens once and keep them. A run that was killed is continued by the same command."""
    from deltakern.data.sampling import Sampling
    from deltakern.training import commands

    return commands.tokenize(
        sources,
        out,
        sampling=Sampling(num_frames=frames, size=size),
        devices=devices,
        ray=ray,
        part=part,
        precision=precision,
        dinov3=dinov3,
        deltatok=deltatok,
        random_weights=random_weights,
        crops=crops,
        dtype="float32" if float32 else "float16",
        workers=workers,
        batch=batch,
        rows_per_shard=shard,
        seed=seed,
    )


@app.command()
def train_world(
    stores: Annotated[list[str], typer.Argument(help="Token stores, all of one tokenizer.")],
    out: Annotated[Path, Option(help="Folder of the run; one that is there is continued.")],
    steps: Annotated[int, Option(help="Before the cool-down.")] = 300_000,
    batch_size: Annotated[int, Option(help="Clips a step, over all processes.")] = 1024,
    rate: Annotated[float, Option(help="Learning rate after the warm-up.")] = 1e-4,
    weight_decay: Annotated[float, Option(help="Of linear weights.")] = 0.4,
    warmup: Annotated[int, Option(help="Steps.")] = 5000,
    cooldown: Annotated[int, Option(help="Steps at a tenth of the rate, after the others.")] = 5000,
    clip: Annotated[float | None, Option(help="Largest norm of the gradient. Not clipped without it.")] = None,
    accumulate: Annotated[int, Option(help="Parts that a process computes its share of a batch in.")] = 1,
    width: Annotated[int, Option(help="Of the predictor.")] = 768,
    layers: Annotated[int, Option(help="Of the predictor.")] = 12,
    heads: Annotated[int, Option(help="Of the predictor.")] = 12,
    candidates: Annotated[int, Option(help="Among which training takes the best.")] = 256,
    samples: Annotated[int, Option(help="Futures drawn in validation.")] = 20,
    init: Annotated[str | None, Option(help="DeltaWorld checkpoint to begin with.")] = None,
    val_fraction: Annotated[float, Option(help="Share of the videos held out for validation.")] = 0.02,
    val_video: Annotated[list[str] | None, Option(help="Video, folder or list to validate on in features. May be repeated.")] = None,
    dinov3: Annotated[str | None, Option(help="As of tokenize; given, the stores must hold its tokens.")] = None,
    deltatok: Annotated[str | None, Option(help="As of tokenize; given, the stores must hold its tokens.")] = None,
    random_weights: Annotated[bool, Option("--random-weights", help="As of tokenize.")] = False,
    precision: Annotated[str | None, Option(help="float32 or bfloat16. By default bfloat16 on a GPU.")] = None,
    device: Annotated[str | None, Option(help="By default the GPU where there is one; under torchrun each process its own.")] = None,
    seed: Annotated[int, Option(help="Of weights, order and noise.")] = 0,
    save_every: Annotated[int, Option(help="Steps.")] = 500,
    validate_every: Annotated[int, Option(help="Steps.")] = 5000,
    log_every: Annotated[int, Option(help="Steps.")] = 10,
    keep: Annotated[int, Option(help="Latest checkpoints that stay.")] = 3,
    compile: Annotated[bool, Option("--compile", help="torch.compile the training pass.")] = False,
    recompute: Annotated[bool, Option("--recompute", help="Keep no activations inside blocks.")] = False,
    deterministic: Annotated[bool, Option("--deterministic", help="Deterministic algorithms alone.")] = False,
    tensorboard: Annotated[bool, Option("--tensorboard", help="TensorBoard logs beside the CSV files.")] = False,
) -> int:
    """Train DeltaWorld from stored tokens by the released recipe. A run that was killed is continued by the same command."""
    from deltakern.training import commands
    from deltakern.training.world import Predictor

    return commands.world(
        stores,
        out,
        {
            "steps": steps,
            "batch_size": batch_size,
            "rate": rate,
            "weight_decay": weight_decay,
            "warmup": warmup,
            "cooldown": cooldown,
            "clip": clip,
            "accumulate": accumulate,
            "precision": precision,
            "device": device,
            "seed": seed,
            "save_every": save_every,
            "validate_every": validate_every,
            "log_every": log_every,
            "keep": keep,
            "compile": compile,
            "recompute": recompute,
            "deterministic": deterministic,
            "tensorboard": tensorboard,
        },
        predictor=Predictor(width=width, layers=layers, heads=heads, candidates=candidates, samples=samples),
        init=init,
        val_fraction=val_fraction,
        val_videos=val_video or (),
        dinov3=dinov3,
        deltatok=deltatok,
        random_weights=random_weights,
    )


@app.command()
def train_tok(
    sources: Annotated[list[str], typer.Argument(help="Videos, folders of videos, lists of paths (.txt), tar shards.")],
    out: Annotated[Path, Option(help="Folder of the run; one that is there is continued.")],
    size: Annotated[int, Option(help="Height and width of the drawn frames in pixels.")] = 256,
    steps: Annotated[int, Option(help="Before the cool-downs.")] = 1_000_000,
    batch_size: Annotated[int, Option(help="Clips a step, over all processes.")] = 1024,
    rate: Annotated[float, Option(help="Learning rate after the warm-up.")] = 1e-3,
    weight_decay: Annotated[float, Option(help="Of linear weights.")] = 0.01,
    warmup: Annotated[int, Option(help="Steps.")] = 5000,
    cooldown: Annotated[int, Option(help="Steps of each cool-down, at a tenth of the rate before.")] = 0,
    cooldowns: Annotated[int, Option(help="How many cool-downs.")] = 1,
    clip: Annotated[float, Option(help="Largest norm of the gradient.")] = 0.01,
    accumulate: Annotated[int, Option(help="Parts that a process computes its share of a batch in.")] = 1,
    workers: Annotated[int, Option(help="Processes that decode video.")] = 0,
    dinov3: Annotated[str | None, Option(help="DINOv3 weights: folder or hub repository. The released models' without it.")] = None,
    init: Annotated[str | None, Option(help="DeltaTok checkpoint to begin with.")] = None,
    random_weights: Annotated[bool, Option("--random-weights", help="A backbone of random weights, to try it out.")] = False,
    val_fraction: Annotated[float, Option(help="Share of the videos held out for validation.")] = 0.0,
    val_video: Annotated[list[str] | None, Option(help="Video, folder or list to validate on. May be repeated.")] = None,
    precision: Annotated[str | None, Option(help="float32 or bfloat16. By default bfloat16 on a GPU.")] = None,
    device: Annotated[str | None, Option(help="By default the GPU where there is one; under torchrun each process its own.")] = None,
    seed: Annotated[int, Option(help="Of weights, order and draws.")] = 0,
    save_every: Annotated[int, Option(help="Steps.")] = 500,
    validate_every: Annotated[int, Option(help="Steps.")] = 5000,
    log_every: Annotated[int, Option(help="Steps.")] = 10,
    keep: Annotated[int, Option(help="Latest checkpoints that stay.")] = 3,
    compile: Annotated[bool, Option("--compile", help="torch.compile the training pass.")] = False,
    recompute: Annotated[bool, Option("--recompute", help="Keep no activations inside blocks.")] = False,
    deterministic: Annotated[bool, Option("--deterministic", help="Deterministic algorithms alone.")] = False,
    tensorboard: Annotated[bool, Option("--tensorboard", help="TensorBoard logs beside the CSV files.")] = False,
) -> int:
    """Train DeltaTok from videos by the released recipe. A run that was killed is continued by the same command."""
    from deltakern.training import commands

    return commands.tok(
        sources,
        out,
        {
            "steps": steps,
            "batch_size": batch_size,
            "rate": rate,
            "weight_decay": weight_decay,
            "warmup": warmup,
            "cooldown": cooldown,
            "cooldowns": cooldowns,
            "clip": clip,
            "accumulate": accumulate,
            "precision": precision,
            "device": device,
            "seed": seed,
            "save_every": save_every,
            "validate_every": validate_every,
            "log_every": log_every,
            "keep": keep,
            "compile": compile,
            "recompute": recompute,
            "deterministic": deterministic,
            "tensorboard": tensorboard,
        },
        size=size,
        workers=workers,
        dinov3=dinov3,
        init=init,
        random_weights=random_weights,
        val_fraction=val_fraction,
        val_videos=val_video or (),
    )


@app.command()
def rollout(
    video: Annotated[Path, typer.Argument(help="A video file, or a folder of images (25 a second).")],
    out: Annotated[Path, Option(help="Folder for the page, tokens.safetensors and features.safetensors.")] = Path("deltakern-rollout"),
    context: Annotated[int, Option(help="Frames given.")] = 4,
    horizon: Annotated[int, Option(help="Frames predicted.")] = 3,
    samples: Annotated[int, Option(help="Futures sampled.")] = 20,
    show: Annotated[int, Option(help="Futures decoded and drawn, the first ones.")] = 6,
    start: Annotated[float, Option(help="Seconds of the first frame.")] = 0.0,
    gap: Annotated[float, Option(help="Seconds from one frame to the next.")] = 0.2,
    size: Annotated[int, Option(help="Shorter side of the frames in pixels.")] = 512,
    seed: Annotated[int, Option(help="Future i of a seed is the same for any number of samples.")] = 0,
    dinov3: Annotated[str | None, Option(help="DINOv3 weights: folder or hub repository. The released models' without it.")] = None,
    deltatok: Annotated[str | None, Option(help="DeltaTok checkpoint: file or hub repository. The released one without it.")] = None,
    deltaworld: Annotated[
        str | None, Option(help="DeltaWorld checkpoint: file, run of train-world, or hub repository. The released one without it.")
    ] = None,
    rgb: Annotated[str | None, Option(help="RGB head: file or hub repository; draws pixels too.")] = None,
    random: Annotated[bool, Option("--random-weights", help="A small model of random weights, to try the command.")] = False,
    device: Annotated[str | None, Option(help="By default the GPU where there is one.")] = None,
) -> None:
    """Sample futures of a video's frames: a page with pictures, and the tokens and features."""
    from deltakern.rollout import Settings, run

    run(
        Settings(
            video=video,
            out=out,
            context=context,
            horizon=horizon,
            samples=samples,
            show=show,
            start=start,
            gap=gap,
            size=size,
            seed=seed,
            dinov3=dinov3,
            deltatok=deltatok,
            deltaworld=deltaworld,
            rgb=rgb,
            random=random,
            device=device,
        )
    )
