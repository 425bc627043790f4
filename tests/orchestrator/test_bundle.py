"""A bundle, from the operator's pip to an environment at the site by ssh; stubs for what takes gigabytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clusters.machine import Catalogue
from clusters.own import Own
from clusters.site import Site
from clusters.ssh import SshConnection
from orchestrator import bundle, wheelhouse
from orchestrator.stage import Listener, Options, Stager
from orchestrator.stock import Stock
from tests.clusters.fake_sftp import FakeSftp
from tests.orchestrator.test_stage import Heard
from tests.stub_wheels import stubs_of


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stubs of all that eurotrain requires, and nothing else for pip to find."""
    stubs_of(wheelhouse.requirements(), tmp_path / "index")
    for name, value in {
        "CONFIG_FILE": "/dev/null",
        "NO_INDEX": "1",
        "FIND_LINKS": str(tmp_path / "index"),
    }.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.delenv("PIP_CONSTRAINT", raising=False)
    return tmp_path / "index"


def site(tmp_path: Path, **own: Any) -> Site:
    told = {"base_python": sys.executable, "host": "east", **own}
    return Site("east", Catalogue().load("local"), Own(tmp_path / "site", "local", **told))


def stager(tmp_path: Path, listener: Listener | None = None) -> Stager:
    connection = SshConnection("east", str(tmp_path / "site"), tmp_path / "home", sys.executable)
    return Stager("east", connection, Stock(tmp_path / "staged"), Options(pause=0.0), listener or Listener())


def test_a_bundle_is_collected_brought_and_made_once(
    tmp_path: Path, index: Path, fake_sftp: FakeSftp, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged = stager(tmp_path)
    told = bundle.stage(site(tmp_path), staged, tmp_path / "wheels", poll=0.1)
    assert told["kind"] == "wheels"
    record = json.loads((tmp_path / f"site/bundles/{told['id']}/bundle.json").read_text())
    needed = {
        line.split("=")[0].split(">")[0].split(";")[0]
        for line in wheelhouse.requirements()
        if "extra" not in line
    }
    program = "from importlib import metadata as m; print(*(d.name for d in m.distributions()))"
    done = subprocess.run([record["python"], "-P", "-c", program], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"eurotrain", *needed}
    assert staged.stock.load("east").bundle == told
    assert staged.sent >= told["bytes"]
    monkeypatch.setattr(wheelhouse, "_pip", lambda _: pytest.fail("collected again"))
    again = stager(tmp_path)
    assert bundle.stage(site(tmp_path), again, tmp_path / "wheels") == told
    assert again.sent == 0


def test_what_pip_cannot_find_is_told_before_a_byte_moves(
    tmp_path: Path, index: Path, fake_sftp: FakeSftp
) -> None:
    next(index.glob("torch-*")).unlink()
    with pytest.raises(ValueError, match=r"^pip wheel: No matching distribution found for torch>=2\.6"):
        bundle.stage(site(tmp_path), stager(tmp_path), tmp_path / "wheels")
    assert fake_sftp.calls == []


def test_a_making_that_fails_is_told_with_its_log(
    tmp_path: Path, index: Path, fake_sftp: FakeSftp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle.probe, "code_digest", lambda: "what nobody has")
    with pytest.raises(
        ValueError, match=r"^east: the bundle cannot be made there: .*other code.*install\.log$"
    ):
        bundle.stage(site(tmp_path), stager(tmp_path), tmp_path / "wheels", poll=0.1)
    assert stager(tmp_path).stock.load("east").bundle == {}


class Restarted(Stager):
    """A site whose login node is rebooted each time something is made there."""

    def ask(self, operation: dict[str, Any]) -> dict[str, Any]:
        makes = operation["op"] in ("make", "bundle")
        return {"state": "interrupted", "why": "no sign of life"} if makes else super().ask(operation)


def test_a_making_that_is_interrupted_again_and_again_is_given_up(
    tmp_path: Path, index: Path, fake_sftp: FakeSftp
) -> None:
    simple = stager(tmp_path)
    staged = Restarted(simple.site, simple.connection, simple.stock, simple.options)
    with pytest.raises(ValueError, match="the bundle cannot be made there: no sign of life"):
        bundle.stage(site(tmp_path), staged, tmp_path / "wheels")


# ---- interpreters that are not ours


def interpreter(tmp_path: Path, **facts: Any) -> str:
    """A program that tells this of itself."""
    told = {"version": "3.11.4", "executable": str(tmp_path / "python"), "code": "c", "packages": {}, **facts}
    (tmp_path / "python").write_text(f"#!/bin/sh\ncat <<'END'\n{json.dumps(told)}\nEND\n")
    (tmp_path / "python").chmod(0o755)
    return str(tmp_path / "python")


def test_an_interpreter_of_the_operator_s_own_is_asked_and_written_down(
    tmp_path: Path, fake_sftp: FakeSftp
) -> None:
    listener = Heard()
    python = interpreter(tmp_path)
    told = bundle.stage(site(tmp_path, python=python), stager(tmp_path, listener), tmp_path / "wheels")
    assert (told["kind"], told["words"]) == ("interpreter", python)
    assert listener.lines == [f"east: the eurotrain of {python} there has other code than this one"]
    record = json.loads((tmp_path / f"site/bundles/{told['id']}/bundle.json").read_text())
    assert (record["python"], record["facts"]["version"]) == (python, "3.11.4")
    assert fake_sftp.calls == []
    other = interpreter(tmp_path, code="d")
    again = bundle.stage(site(tmp_path, python=other), stager(tmp_path), tmp_path / "wheels")
    assert again["id"] != told["id"], "it is named by what it is"


@pytest.mark.parametrize(
    ("own", "facts", "why"),
    [
        ("python", {"code": ""}, "^east: .*/python there has no eurotrain: install it, or name no python in"),
        ("python", {"version": "3.9.18"}, r"is Python 3\.9\.18, and .* >=3\.11: name another as python in"),
        ("base_python", {"version": "3.6.8"}, r"is Python 3\.6\.8, .* another as base_python in sites\.toml"),
    ],
)  # fmt: skip
def test_an_interpreter_that_will_not_do(
    tmp_path: Path, fake_sftp: FakeSftp, own: str, facts: dict[str, str], why: str
) -> None:
    python = interpreter(tmp_path, **facts)
    with pytest.raises(ValueError, match=why):
        bundle.stage(site(tmp_path, **{own: python}), stager(tmp_path), tmp_path / "wheels")


def test_a_container_is_refused_as_long_as_no_segment_runs_in_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"east in sites\.toml: segments do not run in a container yet"):
        bundle.stage(site(tmp_path, container="/images/torch.sif"), stager(tmp_path), tmp_path / "wheels")
