"""The laws of the house hold, and break where they should: imports, sizes, and what old interpreters read."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("orchestrator", "kernels", "parallelism", "clusters", "checkpoints")
MODULES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
CLUSTERS = sorted((ROOT / "clusters").rglob("*.py"))

# One import that each law forbids, and the words by which import-linter must name it.
VIOLATIONS = {
    "checkpoints/bad_upwards.py": (
        "import parallelism.layout",
        "checkpoints.bad_upwards -> parallelism.layout",
    ),
    "kernels/bad_upwards.py": ("import checkpoints.manifest", "kernels.bad_upwards -> checkpoints.manifest"),
    "parallelism/bad_upwards.py": (
        "import orchestrator.home",
        "parallelism.bad_upwards -> orchestrator.home",
    ),
    "clusters/bad_sibling.py": ("import kernels", "clusters.bad_sibling -> kernels"),
    "orchestrator/bad_torch.py": ("import torch", "orchestrator.bad_torch -> torch"),
    "orchestrator/bad_detour.py": (
        "import parallelism.device",
        "orchestrator.bad_detour -> parallelism.device",
    ),
    "clusters/bad_torch.py": ("from torch import nn", "clusters.bad_torch -> torch"),
    "parallelism/bad_agent.py": ("import clusters.agent", "parallelism.bad_agent -> clusters.agent"),
    "checkpoints/bad_site.py": ("import clusters.paths", "checkpoints.bad_site -> clusters.paths"),
    "parallelism/bad_ray.py": ("import ray", "parallelism.bad_ray -> ray"),
    "orchestrator/bad_slots.py": (
        "import orchestrator.slots",
        "orchestrator.bad_slots -> orchestrator.slots",
    ),
}


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    environment = {"COLUMNS": "200", "PYTHONPATH": str(root)}
    return subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def broken_house(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What import-linter says of a copy of the tree in which every law is broken."""
    copy = tmp_path_factory.mktemp("house")
    shutil.copy(ROOT / "pyproject.toml", copy)
    for room in ROOMS:
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    for path, (line, _) in VIOLATIONS.items():
        (copy / path).write_text(line + "\n")
    done = lint_imports(copy)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def test_the_import_law_is_kept() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("chain", [chain for _, chain in VIOLATIONS.values()])
def test_the_import_law_bites(broken_house: str, chain: str) -> None:
    assert f"{chain} (l.1)" in broken_house


def test_no_contract_survives_when_all_are_broken(broken_house: str) -> None:
    assert " KEPT" not in broken_house


def test_modules_fit_in_the_head() -> None:
    long = {str(path.relative_to(ROOT)): lines for path in MODULES if (lines := _lines(path)) > 300}
    assert long == {}


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_the_command_line_starts_without_torch_and_ray() -> None:
    """On a login node `eurotrain --help` must answer in well under a second."""
    program = "import sys, orchestrator.cli; print(*{name.partition('.')[0] for name in sys.modules})"
    command = [sys.executable, "-P", "-c", program]
    loaded = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert "click" in loaded
    heavy = {"torch", "ray", "megatron", "triton", "numpy", "sqlalchemy", "pydantic", "rich", "submitit"}
    assert loaded & heavy == set()


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_what_travels_to_sites_is_python_3_9_and_needs_submitit_only(path: Path) -> None:
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    imported = set(_imports(tree))
    assert imported - sys.stdlib_module_names - {"clusters", "submitit"} == set()
    if tree.body:  # X | Y and the like in annotations are read by 3.9 only if they are not evaluated
        assert "__future__" in imported


def test_python_3_10_would_be_noticed() -> None:
    with pytest.raises(SyntaxError):
        ast.parse("match x:\n    case 1: pass", feature_version=(3, 9))


def _imports(tree: ast.Module) -> list[str]:
    """Top-level names of everything imported, wherever in the module."""
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return [name.partition(".")[0] for name in names]
