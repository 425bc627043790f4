"""`eurotrain doctor`: is everything here that a run needs, and is it the right one?

Nothing is imported that is examined. Versions come from the distributions' metadata; what only an import
can tell (is there a device, does a compiled extension load) is asked in a child process.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib import metadata, util
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from orchestrator import machine
from orchestrator.home import Home
from orchestrator.machine import Check

if TYPE_CHECKING:
    from rich.table import Table

ROOMS = ("orchestrator", "kernels", "parallelism", "clusters", "checkpoints")
EXTRAS = ("demo", "kernels", "mpi", "postgresql")
MPI_LAUNCHERS = ("srun", "mpirun", "mpiexec")
# The check that must be ok -> what is then imported beside torch: compiled for another one, it fails there.
IMPORTS = {
    "eurotrain[kernels]": "triton",
    "Transformer Engine": "transformer_engine.pytorch",
    "apex": "apex.multi_tensor_apply",
}
CHILD_SECONDS = 120.0  # torch's first import from a cold network file system has taken over a minute

# Run in a child, with the names of modules to try: a crash or a hang there is a finding, not our end.
_TORCH = """
import importlib, json, sys, warnings
warnings.simplefilter("ignore")
import torch
import torch.distributed as distributed
devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip, "devices": devices,
         "gloo": distributed.is_gloo_available(), "nccl": distributed.is_nccl_available(), "failures": {}}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        facts["failures"][name] = f"{type(error).__name__}: {error}".splitlines()[0]
print(json.dumps(facts))
"""
_MPI = """
import json, mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(json.dumps(MPI.Get_library_version().splitlines()[0].strip("\\0 ")))
"""


def checks(*, quick: bool = False) -> list[Check]:
    """All checks; `quick` leaves out those that start a child process to import torch or MPI."""
    found = [*distributions(), transformer_engine(), apex(), *rooms()]
    found += machine.checks(Home.from_environment())
    return found if quick else [*found, *torch_and_devices(found), mpi()]


def render(found: Iterable[Check]) -> Table:
    """The checks as a table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "warning": "yellow", "error": "bold red", "absent": "dim"}
    table = Table("check", "", "found", "what to do", title="eurotrain doctor", title_justify="left")
    for check in found:
        status = Text(check.status, style=colours[check.status])
        table.add_row(Text(check.name), status, Text(check.detail), Text(check.advice))
    return table


def distributions() -> list[Check]:
    """Python and the packages, against the ranges in the metadata of the installed eurotrain."""
    if _version("eurotrain") is None:
        return [
            Check("eurotrain", "error", f"{sys.executable} has no eurotrain installed", "pip install -e .")
        ]
    return [python(), packages(), *map(extra, EXTRAS)]


def python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    allowed = metadata.metadata("eurotrain")["Requires-Python"]
    if version in SpecifierSet(allowed):
        return Check("Python", "ok", f"{version} at {sys.executable}")
    return Check("Python", "error", f"{version}; allowed is {allowed}", "make another virtual environment")


def packages() -> Check:
    """What eurotrain cannot do without."""
    return _within_range("packages", _requirements(""), lacking="error", advice="pip install eurotrain")


def extra(name: str) -> Check:
    """What one of eurotrain's optional parts needs."""
    advice = f"pip install 'eurotrain[{name}]'"
    return _within_range(f"eurotrain[{name}]", _requirements(name), lacking="absent", advice=advice)


def _requirements(extra: str) -> list[Requirement]:
    """What pyproject.toml asks for on this Python: the core's requirements, or those an extra adds."""
    every = [Requirement(text) for text in metadata.requires("eurotrain") or ()]
    core = [need for need in every if need.marker is None or need.marker.evaluate({"extra": ""})]
    if not extra:
        return core
    return [
        need for need in every if need not in core and need.marker and need.marker.evaluate({"extra": extra})
    ]


def _within_range(name: str, needs: list[Requirement], lacking: machine.Status, advice: str) -> Check:
    missing, wrong, right = [], [], []
    for need in needs:
        version = _version(need.name)
        if version is None:
            missing.append(need.name)
        elif satisfies(version, need.specifier):
            right.append(f"{need.name} {version}")
        else:
            wrong.append(f"{need.name} {version} (allowed is {need.specifier})")
    if wrong:
        return Check(name, "error", ", ".join(wrong + [f"{lack} is missing" for lack in missing]), advice)
    if missing:
        return Check(name, lacking, f"{', '.join(missing)} not installed", advice)
    return Check(name, "ok", ", ".join(right))


def satisfies(version: str, allowed: SpecifierSet) -> bool:
    """Whether a version is in range. A vendor's build such as 2.7.0a0+79aa174 is taken as 2.7.0."""
    return Version(version).base_version in allowed


def transformer_engine() -> Check:
    for name in ("transformer-engine", "transformer_engine_torch"):
        version = _version(name)
        if version and util.find_spec("transformer_engine"):
            return Check("Transformer Engine", "ok", version)
    return Check("Transformer Engine", "absent", "not installed; torch's own layers are used")


def apex() -> Check:
    """NVIDIA's apex is known by its parts: on PyPI the name belongs to a toolkit for Pyramid web sites."""
    spec = util.find_spec("apex")
    if spec is None:
        return Check("apex", "absent", "not installed; torch's own optimizers are used")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    parts = [
        part for part in ("multi_tensor_apply", "normalization") if any((f / part).is_dir() for f in folders)
    ]
    if parts:
        extension = "with" if util.find_spec("amp_C") else "without"
        return Check("apex", "ok", f"NVIDIA's, {extension} its compiled amp_C")
    return Check(
        "apex",
        "error",
        f"{', '.join(map(str, folders)) or spec.origin} is NOT NVIDIA's apex but a web toolkit of that name "
        "from PyPI; megatron-core would import it",
        "pip uninstall apex; NVIDIA's is built from its source repository",
    )


def rooms() -> Iterator[Check]:
    """Whether eurotrain's top-level packages are its own: their names are ordinary words."""
    ours = Path(__file__).resolve().parents[1]
    owners: dict[str, set[str]] = defaultdict(set)
    for name, distributions in metadata.packages_distributions().items():
        owners[name].update(distributions)
    for room in ROOMS:
        others = sorted(owners[room] - {"eurotrain"})
        origin = _origin(room)
        if origin != ours / room:
            yield Check(f"package {room}", "error", f"comes from {origin}", "take that folder off PYTHONPATH")
        elif others:
            advice = f"pip uninstall {' '.join(others)}, then reinstall eurotrain"
            yield Check(f"package {room}", "error", f"{', '.join(others)} installs the same name", advice)
        else:
            yield Check(f"package {room}", "ok", str(origin))


def _origin(package: str) -> Path | None:
    """Where an import in a fresh process would find a package; `sys.modules` would only show our own."""
    spec = PathFinder.find_spec(package)
    return Path(spec.origin).resolve().parent if spec and spec.origin else None


class Unanswered(RuntimeError):
    """A child process that crashed, hung or failed; one line says how."""


def ask(program: str, *arguments: str, seconds: float = CHILD_SECONDS) -> Any:
    """What a Python program prints as its last line, in JSON. Raises Unanswered."""
    command = [sys.executable, "-P", "-c", program, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        raise Unanswered(f"no answer in {seconds:.0f} s") from error
    if done.returncode < 0:
        raise Unanswered(f"killed by {signal.Signals(-done.returncode).name}")
    if done.returncode:
        raise Unanswered((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def torch_and_devices(found: list[Check]) -> Iterator[Check]:
    """What torch says, and whether the optional parts that are installed can be imported beside it."""
    there = {check.name for check in found if check.status == "ok"}
    modules = ["megatron.core", *(module for check, module in IMPORTS.items() if check in there)]
    try:
        facts = ask(_TORCH, *modules)
    except Unanswered as error:
        yield Check(
            "torch", "error", str(error), "reinstall torch; `python -c 'import torch'` shows the whole error"
        )
        return
    yield _torch(facts)
    yield _device(facts)
    for module in modules:
        failure = facts["failures"].get(module)
        if failure:
            yield Check(f"import {module}", "error", failure, "reinstall it for this build of torch")
        else:
            yield Check(f"import {module}", "ok", "loads beside torch")


def _torch(facts: dict[str, Any]) -> Check:
    build = (
        f"CUDA {facts['cuda']}" if facts["cuda"] else f"ROCm {facts['hip']}" if facts["hip"] else "CPU only"
    )
    backends = [name for name in ("gloo", "nccl") if facts[name]]
    detail = f"{facts['torch']}, {build}, {' and '.join(backends) or 'no backend'}"
    if "gloo" not in backends:
        return Check("torch", "error", detail, "install a build of torch with gloo")
    return Check("torch", "ok", detail)


def _device(facts: dict[str, Any]) -> Check:
    if facts["devices"]:
        return Check("device", "ok", f"{len(facts['devices'])} x {facts['devices'][0]}")
    if facts["cuda"] or facts["hip"]:
        return Check("device", "absent", "torch was built for GPUs and sees none: ranks run on the CPU")
    return Check("device", "ok", "CPU")


def mpi() -> Check:
    """The second launcher beside Ray: mpi4py, its library, and something to start ranks with."""
    if _version("mpi4py") is None:
        return Check("MPI", "absent", "mpi4py is not installed", "pip install 'eurotrain[mpi]'")
    advice = "load the site's MPI module"
    try:
        library = ask(_MPI)
    except Unanswered as error:
        return Check("MPI", "warning", f"mpi4py: {error}", advice)
    launcher = next(filter(shutil.which, MPI_LAUNCHERS), None)
    if launcher is None:
        return Check("MPI", "warning", f"{library}; no {', '.join(MPI_LAUNCHERS)} on PATH", advice)
    return Check("MPI", "ok", f"{library}, started with {launcher}")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
