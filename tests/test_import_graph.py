"""Imports run one way: cli -> report, demo, doctor, training -> data, models -> nn -> ops -> backend -> launch."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "deltakern"
# What each room may import of the package, itself included.
ALLOWED = {
    "_extras": set(),
    "launch": set(),
    "backend": {"launch"},
    "ops": {"launch", "backend", "ops"},
    "cases": {"backend", "ops", "cases"},
    "nn": {"backend", "ops", "nn"},
    "models": {"backend", "ops", "nn", "models"},
    "data": {"_extras", "data", "models", "nn"},
    "training": {"_extras", "backend", "ops", "nn", "models", "data", "training"},
    "report": {"_extras", "backend", "ops", "cases", "nn", "models", "data", "report"},
    "doctor": {"backend", "ops", "cases", "nn", "doctor", "report"},
    "demo": {"_extras", "backend", "ops", "nn", "models", "data", "report", "demo"},
    "rollout": {"_extras", "models", "nn", "data", "report", "rollout"},
    "cli": {"_extras", "backend", "ops", "cases", "models", "data", "training", "report", "doctor", "demo", "rollout", "cli"},
    "__init__": {"backend", "ops", "models", "nn"},
}


def _imports(path: Path) -> set[str]:
    """Rooms that a file imports, at any depth of the file."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "deltakern" else [node.module]
        for name in names:
            parts = name.split(".")
            if parts[0] == "deltakern" and len(parts) > 1:
                rooms.add(parts[1])
    return rooms


def test_imports_run_one_way():
    seen = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert room in ALLOWED, f"{path.name}: a new room; say in ALLOWED what it may import"
        seen.add(room)
        known = {r for r in _imports(path) if (PACKAGE / r).is_dir() or (PACKAGE / f"{r}.py").exists()}
        extra = known - ALLOWED[room]
        assert not extra, f"{path.relative_to(PACKAGE)} imports {sorted(extra)}, which its room {room!r} may not"
    assert {"backend", "ops", "nn", "models"} <= seen
