"""The rules between the rooms of docs' house: who may import whom, read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sidp_sgl

PACKAGE = Path(sidp_sgl.__file__).parent
# What each room may import of the package; "" are the modules beside the rooms.
ROOMS = {
    "errors": set(),
    "config": {"errors"},
    "kernels": set(),
    "weightpool": {"errors", "kernels"},
    "scheduler": {"errors", "config"},
    "sglang_hooks": {"errors", "config", "scheduler", "weightpool", "kernels"},
    "runtime": {"errors", "config", "scheduler", "weightpool", "sglang_hooks"},
    "plugin": {"errors", "scheduler", "sglang_hooks", "runtime"},
    "planner": {"errors", "config", "scheduler", "weightpool"},
    "batch": {"errors", "config", "scheduler"},
    "cli": {"errors", "planner", "batch"},
    "__main__": set(),
}
# Of the repository, beside the package.
OUTSIDE = {"bench", "tests", "examples"}
# Libraries that importing a room may not bring in.
FORBIDDEN = {
    "scheduler": {"torch", "sglang"},
    "weightpool": {"sglang"},
    "kernels": {"sglang"},
    "planner": {"torch", "sglang"},
    "batch": {"torch", "sglang"},
}
# The engine's process of a job; the job's own process starts it and never imports it.
ENGINE_PROCESS = "sidp_sgl.batch.engine."
CALIBRATE = (
    "sidp_sgl.planner.calibrate."  # measures an engine: the one part of the planner that may
)
CORES = "sidp_sgl.sglang_hooks.cpu.cores"  # calibrate divides them as an engine does


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def run_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The children of a node, but for those that only a type checker reads."""
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        yield from node.orelse
    else:
        yield from ast.iter_child_nodes(node)


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all imports, also those within functions; `from a import b` gives a.b."""
    for node in run_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
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


def is_exempt(module: str) -> bool:
    return module.startswith((ENGINE_PROCESS, CALIBRATE))


@pytest.mark.parametrize("room", FORBIDDEN)
def test_room_reaches_nothing_forbidden(room: str) -> None:
    for module in modules_of(room):
        if not is_exempt(module):
            assert not reached_libraries(module) & FORBIDDEN[room], module


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_the_rooms_it_may(room: str) -> None:
    for module in modules_of(room):
        met_modules = own_modules(imports_of(module))
        if module.startswith(CALIBRATE):
            met_modules -= own_modules({CORES})
        for met in met_modules:
            assert room_of(met) in {"", room} | ROOMS[room], f"{module} imports {met}"
        outside = {name.partition(".")[0] for name in imports_of(module)} & OUTSIDE
        assert not outside, f"{module} imports {outside}"


def test_every_module_is_in_a_room() -> None:
    assert {room_of(module) for module in SOURCES} <= {"", *ROOMS}


def test_no_circles() -> None:
    """Of modules, and of packages that import: one that does stands for what is in it."""
    graph = {m: {n for n in own_modules(imports_of(m)) - {m} if imports_of(n)} for m in SOURCES}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_calibrate_meets_sglang_in_one_place_and_only_the_command_line_meets_calibrate() -> None:
    for module in modules_of("planner"):
        names = {name.partition(".")[0] for name in imports_of(module)}
        assert "sglang" not in names or module == f"{CALIBRATE}engine_steps", module
    for module in SOURCES:
        if not module.startswith(CALIBRATE) and room_of(module) != "cli":
            met = [n for n in imports_of(module) if n.startswith(CALIBRATE)]
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
    assert reached_libraries("sidp_sgl.sglang_hooks.model.units") >= {"torch", "sglang"}
    assert "torch" in reached_libraries("sidp_sgl.weightpool.pool")


def test_what_only_a_type_checker_reads_is_no_import() -> None:
    source = "if t.TYPE_CHECKING:\n import torch\nelse:\n def f():\n  import sglang.srt"
    assert list(imported(ast.parse(source))) == ["sglang.srt"]
