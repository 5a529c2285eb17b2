"""Imports go one way, heavy packages stay where they belong, and no module hides another package's."""

import ast
import importlib.metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "acn_scale"

# A module may import from rows above its own, and from its own row within one package.
ROWS = [
    {"errors"},
    {"durations", "files", "stopping", "hardware", "zero", "tables", "foreach"},
    {"config"},
    {"cli", "distributed"},
    {"log", "progress", "runs", "models", "data", "optim", "guard", "profiling", "averaging"},
    {"engine", "reshape", "depth", "watchdog", "curriculum", "gradients", "pruning"},
    {"checkpoint", "ema", "memory", "dead_blocks", "early_exit", "continual"},
    {"convert", "batches", "results", "saving"},
    {"pretrain", "report"},
    {"benchmark", "plan", "evaluation", "downstream", "movement"},
    {"finetune", "sparsity"},
    {"studies"},
]
ONLY_IN = {"deepspeed": {"engine", "ema", "foreach"}, "webdataset": {"data", "benchmark"}, "submitit": set()}


LATER = {
    "webdataset",
    "fsspec",
    "PIL",
    "deepspeed",
    "torchvision",
    "matplotlib",
    "timm",
    "datasets",
    "sklearn",
    "transformers",
    "accelerate",
}


def imports_of(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return set()


def imports(path: Path) -> set[str]:
    return {name for node in ast.walk(ast.parse(path.read_text())) for name in imports_of(node)}


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_go_one_way() -> None:
    row_of = {name: number for number, row in enumerate(ROWS) for name in row}
    modules = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    assert {part(path) for path in modules} == set(row_of)
    for path in modules:
        mine = part(path)
        for name in imports(path):
            if name.startswith("acn_scale.") and (other := name.split(".")[1]) != mine:
                allowed = row_of[other] < row_of[mine]
                assert allowed, f"{path} imports {name}"


def test_heavy_packages_stay_where_they_belong() -> None:
    for path in PACKAGE.rglob("*.py"):
        top_level = {name.split(".")[0] for name in imports(path)}
        for package, places in ONLY_IN.items():
            assert package not in top_level or part(path) in places, f"{path} imports {package}"


def test_a_run_starts_without_what_it_needs_later() -> None:
    """Or at all: what takes long to import stands in the functions that use it."""
    seen, ahead = set(), {"pretrain"}
    while ahead:
        path = PACKAGE / f"{ahead.pop().replace('.', '/')}"
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if path in seen or not path.exists():
            continue
        seen.add(path)
        names = {
            name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in imports_of(node)
        }
        assert not LATER & {name.split(".")[0] for name in names}, path
        ahead |= {name.removeprefix("acn_scale.") for name in names if name.startswith("acn_scale.")}
    assert len(seen) > 30


def test_no_module_hides_another_package() -> None:
    """`python acn_scale/pretrain.py` puts acn_scale/ first on the path."""
    ours = {part(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert not ours & set(importlib.metadata.packages_distributions())


def test_tools_hold_no_algorithm() -> None:
    for path in (ROOT / "tools").glob("*.py"):
        tree = ast.parse(path.read_text())
        assert [node.name for node in tree.body if isinstance(node, ast.FunctionDef)] == ["parse", "main"], path
