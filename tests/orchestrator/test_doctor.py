"""The doctor, on made-up installations: fake distributions, packages and programs; its own code is real."""

import importlib
import json
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from rich.console import Console

from orchestrator import doctor
from orchestrator.doctor import ROOMS, Unanswered, ask
from orchestrator.machine import Check

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a distribution first on sys.path: its metadata, and empty files of its packages."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def put(name: str, version: str = "1.0", *files: str, requires: tuple[str, ...] = ()) -> Path:
        info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        header = [f"Name: {name}", f"Version: {version}", "Requires-Python: >=3.11", "Metadata-Version: 2.1"]
        (info / "METADATA").write_text("\n".join([*header, *(f"Requires-Dist: {need}" for need in requires)]))
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).touch()
        importlib.invalidate_caches()
        return tmp_path

    return put


@pytest.fixture
def nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides what this environment has installed, and leaves the standard library."""
    standard = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib") + "/lib-dynload")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path in standard])


class TestPackages:
    def test_versions_in_range_are_listed(self, install: Install) -> None:
        install(
            "eurotrain",
            requires=("one>=1.0", "two<3; python_version >= '3.11'", "three==9; python_version < '3'"),
        )
        install("one", "1.4")
        install("two", "2.9")
        assert doctor.packages() == Check("packages", "ok", "one 1.4, two 2.9")

    def test_a_version_out_of_range_and_a_missing_package_are_errors(self, install: Install) -> None:
        install("eurotrain", requires=("one>=1.0", "absent-thing>=2"))
        install("one", "0.9")
        check = doctor.packages()
        assert check.status == "error"
        assert check.detail == "one 0.9 (allowed is >=1.0), absent-thing is missing"

    def test_a_missing_package_of_the_core_is_an_error_by_itself(self, install: Install) -> None:
        install("eurotrain", requires=("absent-thing>=2",))
        assert doctor.packages().status == "error"

    def test_an_optional_part_may_be_absent_but_not_wrong(self, install: Install) -> None:
        install(
            "eurotrain",
            requires=(
                "one>=1; python_version >= '3'",
                "x>=1; extra == 'demo'",
                "y>=2; extra == 'mpi'",
                "z; extra == 'kernels'",
            ),
        )
        install("x", "1.1")
        install("y", "1.1")
        assert doctor.extra("demo") == Check("eurotrain[demo]", "ok", "x 1.1")
        assert doctor.extra("mpi").status == "error"
        absent = doctor.extra("kernels")
        assert (absent.status, absent.detail) == ("absent", "z not installed")
        assert absent.advice == "pip install 'eurotrain[kernels]'"

    def test_a_python_out_of_range_is_an_error(
        self, install: Install, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        install("eurotrain")
        assert doctor.python().status == "ok"
        monkeypatch.setattr(sys, "version_info", (3, 10, 4, "final", 0))
        assert doctor.python().status == "error"
        assert doctor.python().detail == "3.10.4; allowed is >=3.11"

    def test_an_environment_without_eurotrain_is_told_so(self, nothing_else: None) -> None:
        (check,) = doctor.distributions()
        assert check.status == "error"
        assert "has no eurotrain installed" in check.detail

    @pytest.mark.parametrize(
        ("version", "allowed", "answer"),
        [
            ("2.13.0+cpu", ">=2.6", True),
            ("2.6.0a0+ecf3bae40a.nv25.01", ">=2.6", True),  # NVIDIA's containers
            ("2.6.0rc1", ">=2.6", True),
            ("2.5.1", ">=2.6", False),
            ("0.16.1", "==0.16.1", True),
            ("0.16.1.post1", "==0.16.1", True),
            ("0.16.2", "==0.16.1", False),
            ("3.0b1", ">=2,<3", False),
        ],
    )
    def test_builds_of_vendors_count_as_the_release_they_are(
        self, version: str, allowed: str, answer: bool
    ) -> None:
        assert doctor.satisfies(version, SpecifierSet(allowed)) is answer


class TestApex:
    @pytest.fixture(autouse=True)
    def _alone(self, nothing_else: None) -> None:
        """Whatever apex this environment has."""

    def test_none(self) -> None:
        assert doctor.apex().status == "absent"

    def test_the_web_toolkit_of_that_name_is_a_loud_error(self, install: Install) -> None:
        where = install("apex", "0.9.10.dev0", "apex/__init__.py", "apex/models.py", "apex/lib/__init__.py")
        check = doctor.apex()
        assert check.status == "error"
        assert f"{where / 'apex'} is NOT NVIDIA's apex" in check.detail
        assert check.advice.startswith("pip uninstall apex")

    def test_nvidias_is_known_by_its_parts_without_being_imported(self, install: Install) -> None:
        where = install("apex", "0.1", "apex/__init__.py", "apex/multi_tensor_apply/__init__.py")
        (where / "apex/__init__.py").write_text("raise ImportError('compiled for another torch')")
        assert doctor.apex() == Check("apex", "ok", "NVIDIA's, without its compiled amp_C")
        (where / "amp_C.py").touch()
        importlib.invalidate_caches()
        assert doctor.apex().detail == "NVIDIA's, with its compiled amp_C"

    def test_transformer_engine(self, install: Install) -> None:
        assert doctor.transformer_engine().status == "absent"
        install("transformer-engine", "2.4.0", "transformer_engine/__init__.py")
        assert doctor.transformer_engine() == Check("Transformer Engine", "ok", "2.4.0")


class TestRooms:
    """`clusters`, `kernels`... are words that others use too."""

    def test_all_five_are_ours(self) -> None:
        found = list(doctor.rooms())
        assert [check.name for check in found] == [f"package {room}" for room in ROOMS]
        assert {check.status for check in found} == {"ok"}

    def test_another_distribution_of_the_same_name(
        self, install: Install, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        where = install("hpc-clusters", "2.0", "clusters/__init__.py")
        monkeypatch.setattr(sys, "path", [*sys.path[1:], str(where)])  # behind ours, still a clash
        errors = [check for check in doctor.rooms() if check.status != "ok"]
        assert [(check.name, check.detail) for check in errors] == [
            ("package clusters", "hpc-clusters installs the same name")
        ]

    def test_a_folder_that_comes_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "__init__.py").touch()
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        errors = [check for check in doctor.rooms() if check.status != "ok"]
        assert [check.detail for check in errors] == [f"comes from {tmp_path / 'checkpoints'}"]


class TestAsk:
    def test_the_last_line_is_the_answer(self) -> None:
        assert ask("import sys; print('noise'); print('[1]' if sys.argv[1] == 'x' else 2)", "x") == [1]

    def test_a_child_does_not_import_from_the_working_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "shadow.py").touch()
        monkeypatch.chdir(tmp_path)
        with pytest.raises(Unanswered, match="ModuleNotFoundError: No module named 'shadow'"):
            ask("import shadow")

    @pytest.mark.parametrize(
        ("program", "words"),
        [
            ("import os; os.abort()", "killed by SIGABRT"),
            ("import time; time.sleep(60)", "no answer in 1 s"),
            ("raise OSError('libcudart.so.12: cannot open')", r"OSError: libcudart\.so\.12: cannot open"),
            ("import sys; sys.exit(7)", "exit code 7"),
        ],
    )
    def test_every_bad_end_is_one_line(self, program: str, words: str) -> None:
        with pytest.raises(Unanswered, match=f"^{words}$"):
            ask(program, seconds=1.0)


CPU_TORCH = {
    "torch": "2.13.0",
    "cuda": None,
    "hip": None,
    "devices": [],
    "gloo": True,
    "nccl": False,
    "failures": {},
}


class TestTorch:
    @pytest.fixture
    def told(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Check]]:
        """The checks that follow from facts of a machine that is not here; `asked` gets the modules tried."""

        def answer(*there: str, **facts: object) -> dict[str, Check]:
            def child(program: str, *modules: str) -> dict[str, object]:
                self.asked = modules
                return {**CPU_TORCH, **facts}

            monkeypatch.setattr(doctor, "ask", child)
            found = doctor.torch_and_devices([Check(name, "ok", "") for name in there])
            return {check.name: check for check in found}

        return answer

    def test_a_gpu(self, told: Callable[..., dict[str, Check]]) -> None:
        found = told(cuda="12.9", nccl=True, devices=["NVIDIA A100-SXM-64GB"] * 4)
        assert found["torch"].detail == "2.13.0, CUDA 12.9, gloo and nccl"
        assert found["device"] == Check("device", "ok", "4 x NVIDIA A100-SXM-64GB")
        assert told(hip="6.4", nccl=True)["torch"].detail == "2.13.0, ROCm 6.4, gloo and nccl"

    def test_a_gpu_build_without_a_gpu(self, told: Callable[..., dict[str, Check]]) -> None:
        assert told(cuda="12.9")["device"].status == "absent"
        assert told()["device"] == Check("device", "ok", "CPU")

    def test_no_gloo(self, told: Callable[..., dict[str, Check]]) -> None:
        assert told(gloo=False)["torch"].status == "error"

    def test_only_what_is_there_is_imported_and_a_failure_is_an_error(
        self, told: Callable[..., dict[str, Check]]
    ) -> None:
        found = told(
            "apex",
            "eurotrain[kernels]",
            failures={"apex.multi_tensor_apply": "ImportError: undefined symbol"},
        )
        assert self.asked == ("megatron.core", "triton", "apex.multi_tensor_apply")
        assert found["import apex.multi_tensor_apply"].status == "error"
        assert found["import apex.multi_tensor_apply"].detail == "ImportError: undefined symbol"
        assert found["import triton"].status == "ok"

    def test_a_torch_that_cannot_be_imported(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "torch.py").write_text("import os; os.kill(os.getpid(), 11)")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        (check,) = doctor.torch_and_devices([])
        assert (check.name, check.status, check.detail) == ("torch", "error", "killed by SIGSEGV")


class TestMpi:
    @pytest.fixture
    def library(self, install: Install, monkeypatch: pytest.MonkeyPatch) -> Path:
        where = install("mpi4py", "4.1.2", "mpi4py/__init__.py", "mpi4py/MPI.py")
        (where / "mpi4py" / "__init__.py").write_text("class rc: initialize = True")
        (where / "mpi4py" / "MPI.py").write_text(
            "import mpi4py\nassert not mpi4py.rc.initialize\n"
            "Get_library_version = lambda: 'Open MPI v5.0\\nmore'"
        )
        (where / "bin").mkdir()
        monkeypatch.setenv("PYTHONPATH", str(where))
        monkeypatch.setenv("PATH", str(where / "bin"))
        return where

    def test_library_and_launcher(self, library: Path) -> None:
        (library / "bin" / "mpirun").touch(mode=0o755)
        assert doctor.mpi() == Check("MPI", "ok", "Open MPI v5.0, started with mpirun")

    def test_no_launcher(self, library: Path) -> None:
        assert doctor.mpi().status == "warning"
        assert "no srun, mpirun, mpiexec on PATH" in doctor.mpi().detail

    def test_no_library(self, library: Path) -> None:
        (library / "mpi4py" / "MPI.py").write_text("raise RuntimeError('cannot load MPI library')")
        assert doctor.mpi().detail == "mpi4py: RuntimeError: cannot load MPI library"

    def test_none(self, nothing_else: None) -> None:
        assert doctor.mpi().status == "absent"


def test_this_environment_is_fit_to_develop_in() -> None:
    """All of it, for real: the suite's own environment must pass."""
    found = doctor.checks()
    assert [check for check in found if check.status == "error"] == []
    names = [check.name for check in found]
    assert len(set(names)) == len(names)  # the keys of --json
    expected = {
        "Python",
        "packages",
        "apex",
        "package kernels",
        "disk",
        "torch",
        "import megatron.core",
        "MPI",
    }
    assert expected <= set(names)


def test_quick_starts_no_child_and_nothing_imports_torch() -> None:
    program = """
import json, sys
from orchestrator import doctor
asked = []
doctor.ask = lambda *arguments, **options: asked.append(arguments)
names = [check.name for check in doctor.checks(quick=True)]
imported = [name for name in ("torch", "ray", "megatron", "django") if name in sys.modules]
print(json.dumps([asked, imported, names]))
"""
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    asked, imported, names = json.loads(done.stdout)
    assert (asked, imported) == ([], [])
    assert "cores" in names
    assert "torch" not in names


def test_the_table_shows_every_word(capsys: pytest.CaptureFixture[str]) -> None:
    found = [Check("eurotrain[demo]", "absent", "[x] not installed", "install [y]")]
    Console(width=120).print(doctor.render(found))
    shown = capsys.readouterr().out
    for word in ("eurotrain[demo]", "absent", "[x] not installed", "install [y]"):
        assert word in shown
