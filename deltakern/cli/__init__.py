"""``deltakern``: the entry point. Commands are in :mod:`deltakern.cli.commands`; here is what happens when they fail.

An error is one message on stderr and exit status 1 (2 for a wrong command line, 130 after Ctrl-C); ``--debug``, anywhere on the
line, shows the traceback instead.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from deltakern._extras import MissingExtraError, require


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (``sys.argv[1:]`` by default) and returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    try:
        for package in ("typer", "rich"):
            require(package, "demo", "the command line")
        from deltakern.cli.commands import run

        return run(arguments)
    except KeyboardInterrupt:
        print("deltakern: stopped", file=sys.stderr)
        return 130
    except Exception as problem:
        if debug:
            raise
        known = isinstance(problem, ValueError | OSError | MissingExtraError)
        what = str(problem) if known and str(problem) else f"{type(problem).__name__}: {problem}"
        print(f"deltakern: error: {what}" + ("" if known else " (--debug shows where)"), file=sys.stderr)
        return 1
