"""The rules between the rooms of docs' house: who may import whom, read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sidp_sgl

PACKAGE = Path(sidp_sgl.__file__).parent
FORBIDDEN = {
    "scheduler": {"torch", "sglang"},
    "weightpool": {"sglang"},
    "kernels": {"sglang"},
    "planner": {"sglang"},
    "batch": {"torch", "sglang"},
}
# The engine's process of a job; the job's own process starts it and never imports it.
ENGINE_PROCESS = {"sidp_sgl.batch.engine", "sidp_sgl.batch.serving"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all imports, also those within functions; `from a import b` gives a.b."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not is_type_checking(node):
            yield from imported(node)


def imports_of(module: str) -> set[str]:
    return set(imported(ast.parse(SOURCES[module].read_text())))


def own_modules(names: set[str]) -> set[str]:
    """The modules of this package behind imported names, packages on the way included."""
    modules = set()
    for name in names:
        parts = name.split(".")
        prefixes = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
        modules.update(prefix for prefix in prefixes if prefix in SOURCES)
    return modules


def reached_libraries(module: str) -> set[str]:
    """Top-level names outside the package that importing `module` can bring in."""
    seen, open_modules, libraries = set(), own_modules({module}), set()
    while open_modules:
        current = open_modules.pop()
        seen.add(current)
        names = imports_of(current)
        libraries.update(name.partition(".")[0] for name in names)
        open_modules |= own_modules(names) - seen
    return libraries


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def modules_of(room: str) -> list[str]:
    return sorted(module for module in SOURCES if room_of(module) == room)


@pytest.mark.parametrize("room", FORBIDDEN)
def test_room_reaches_nothing_forbidden(room: str) -> None:
    for module in set(modules_of(room)) - ENGINE_PROCESS:
        assert not reached_libraries(module) & FORBIDDEN[room], module


def test_only_the_composition_root_imports_the_hooks() -> None:
    allowed = {"sidp_sgl.plugin", "sidp_sgl.runtime"}
    for module in SOURCES:
        if room_of(module) != "sglang_hooks" and module not in allowed:
            hooked = [n for n in imports_of(module) if n.startswith("sidp_sgl.sglang_hooks")]
            assert not hooked, f"{module} imports {hooked}"


def test_calibration_meets_sglang_in_one_place_and_the_pure_rooms_never_meet_calibration() -> None:
    for module in modules_of("calibration"):
        names = {name.partition(".")[0] for name in imports_of(module)}
        assert "sglang" not in names or module.endswith(".engine_steps"), module
    for room in ("scheduler", "weightpool", "kernels", "planner"):
        for module in modules_of(room):
            met = [n for n in imports_of(module) if n.startswith("sidp_sgl.calibration")]
            assert not met, f"{module} imports {met}"


def test_config_imports_nothing_heavy() -> None:
    assert reached_libraries("sidp_sgl.config") <= set(sys.stdlib_module_names) | {"sidp_sgl"}


def test_importing_the_scheduler_loads_neither_torch_nor_sglang() -> None:
    modules = [*modules_of("scheduler"), "sidp_sgl.config"]
    program = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    loaded = set(result.stdout.split())
    assert "sidp_sgl.config" in loaded
    assert not loaded & {"torch", "sglang"}


def test_the_checks_see_a_violation() -> None:
    """The reader of imports finds what it should: the hooks do reach both libraries."""
    assert reached_libraries("sidp_sgl.sglang_hooks.units") >= {"torch", "sglang"}
    assert "torch" in reached_libraries("sidp_sgl.weightpool.pool")
