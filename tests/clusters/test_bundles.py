"""Environments at a site: made without a network, usable when whole and as long as they are so."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from clusters import bundles, making, package, staging
from clusters.paths import SitePaths
from clusters.probe import code_digest, facts
from clusters.segment import Segment
from clusters.ssh import SshConnection
from orchestrator import own_wheel
from tests.clusters.fake_ssh import FakeSsh
from tests.clusters.test_agent import ask
from tests.stub_wheels import stub


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site's scratch with wheels: eurotrain's own, pip's, and one that has nothing in it."""
    scratch = tmp_path_factory.mktemp("scratch")
    own_wheel.eurotrain(scratch / "wheels/a")
    own_wheel.pip(scratch / "wheels/b")
    stub(scratch / "wheels/c", "stub-thing")
    return scratch


@pytest.fixture
def site(wheels: Path, tmp_path: Path) -> SitePaths:
    """A scratch of one's own with these wheels."""
    (tmp_path / "the scratch").mkdir()
    (tmp_path / "the scratch/wheels").symlink_to(wheels / "wheels")
    return SitePaths(tmp_path / "the scratch")


def order(site: SitePaths, **changes: Any) -> dict[str, Any]:
    found = [path for path in sorted((site.scratch / "wheels").glob("*/*.whl")) if "pip" not in path.name]
    (pip,) = (site.scratch / "wheels").glob("*/pip*.whl")
    listed = [[str(p.relative_to(site.scratch)), hashlib.sha256(p.read_bytes()).hexdigest()] for p in found]
    told = {"python": sys.executable, "version": facts()["python"], "wheels": listed,
            "pip": str(pip.relative_to(site.scratch)), "code": code_digest()}  # fmt: skip
    return {**told, **changes}


def wait(site: SitePaths, name: str) -> dict[str, Any]:
    deadline = time.monotonic() + 120
    while (told := bundles.bundle(site, name))["state"] == bundles.MAKING:
        assert time.monotonic() < deadline, told
        time.sleep(0.1)
    return told


def logs(site: SitePaths) -> str:
    return "".join(p.read_text() for p in site.scratch.glob("bundles/*/attempts/*/install.log"))


def test_an_environment_is_made_of_wheels_alone_and_segments_run_from_it(
    site: SitePaths, segment: Segment
) -> None:
    assert bundles.bundle(site, "b1")["state"] == bundles.ABSENT
    assert bundles.make(site, "b1", order(site))["state"] == bundles.MAKING
    assert bundles.make(site, "b1", order(site))["state"] == bundles.MAKING, "one making at a time"
    told = wait(site, "b1")
    assert told["state"] == bundles.READY, (told, logs(site))
    assert len(list(site.scratch.glob("bundles/b1/attempts/*"))) == 1
    program = "import stub_thing, clusters.guard as s; print(stub_thing.version, s.__file__)"
    done = subprocess.run(
        [told["python"], "-P", "-c", program], capture_output=True, text=True, check=True, cwd="/", env={}
    )
    version, file = done.stdout.split(" ", 1)
    assert version == "1.0"
    assert file.startswith(str(site.scratch / "bundles/b1"))
    needs = {"bundle": "b1", "advice": "A"}
    assert staging.staged(site, needs)["python"] == told["python"]
    assert {**bundles.make(site, "b1", order(site)), "age": 0} == {**told, "age": 0}, "not made again"
    _purge_one_file_of(site, Path(told["python"]))
    (refused,) = ask(site.scratch, {"op": "submit", "segment": segment.to_json(), "needs": needs})
    assert refused["unstaged"]
    assert "RECORD is gone: type `A`" in refused["error"]
    assert bundles.make(site, "b1", order(site))["state"] == bundles.MAKING
    assert (again := wait(site, "b1"))["state"] == bundles.READY, again


def _purge_one_file_of(site: SitePaths, python: Path) -> None:
    record = next(python.parents[1].glob("lib/*/site-packages/stub_thing*/RECORD"))
    record.unlink()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"version": "3.99"}, "is Python 3.1., and the wheels are for 3.99"),
        ({"python": "/nonexistent/python3"}, "/nonexistent/python3 does not start: "),
        ({"code": "other"}, "has other code of eurotrain than was staged"),
    ],
)
def test_what_cannot_be_made_is_told_in_one_line(site: SitePaths, changes: dict[str, str], why: str) -> None:
    attempt = site.scratch / "attempt"
    attempt.mkdir()
    made = making.Order(bundle="b1", **order(site, **changes))
    with pytest.raises(ValueError, match=why):
        making.make(site, attempt, made)
    assert bundles.find(site, "b1") is None


def test_a_wheel_that_is_not_what_it_was_is_not_installed(site: SitePaths) -> None:
    told = order(site)
    told["wheels"] = [
        [path, digest.replace(digest[0], "f" if digest[0] != "f" else "0")] for path, digest in told["wheels"]
    ]
    bundles.make(site, "b1", told)
    answer = wait(site, "b1")
    assert answer["state"] == bundles.FAILED
    assert "\n" not in answer["why"]
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in Path(answer["log"]).read_text()
    assert not staged(site)
    bundles.make(site, "b1", order(site))
    assert wait(site, "b1")["state"] == bundles.READY, "a failed making is no obstacle to the next"


def staged(site: SitePaths) -> bool:
    try:
        staging.staged(site, {"bundle": "b1", "advice": ""})
    except staging.NotStaged:
        return False
    return True


def test_a_making_that_was_killed_never_counts_and_is_begun_anew(
    site: SitePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles.make(site, "b1", order(site))
    (attempt,) = site.scratch.glob("bundles/b1/attempts/*")
    deadline = time.monotonic() + 60
    while not (attempt / "venv/bin/python").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (pid,) = [int(p.name) for p in Path("/proc").glob("[0-9]*") if is_making(p, attempt)]
    os.killpg(pid, signal.SIGKILL)
    assert bundles.bundle(site, "b1")["state"] == bundles.MAKING, "it may still live, as far as one can see"
    assert not staged(site)
    os.utime(attempt / "heartbeat", (1, 1))
    assert bundles.bundle(site, "b1")["state"] == bundles.INTERRUPTED
    assert bundles.make(site, "b1", order(site))["state"] == bundles.MAKING
    assert not attempt.exists(), "the ruins are removed"
    assert wait(site, "b1")["state"] == bundles.READY


def is_making(process: Path, attempt: Path) -> bool:
    try:
        return f"clusters.making\0{attempt.parents[3]}\0".encode() in (process / "cmdline").read_bytes()
    except OSError:
        return False


def test_a_slow_making_shows_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr(bundles, "BEAT_SECONDS", 0.01)
    done = threading.Event()
    thread = threading.Thread(target=making._show_life, args=(tmp_path / "heartbeat", done))
    thread.start()
    while not (tmp_path / "heartbeat").exists():
        time.sleep(0.01)
    done.set()
    thread.join()


# ---- interpreters of the operator's own


def test_an_interpreter_tells_what_it_is(site: SitePaths) -> None:
    told = bundles.interpreter(site, sys.executable)["facts"]
    own = facts()
    assert told["code"] == own["code"] == code_digest() != ""
    assert told["markers"] == own["markers"]
    assert told["packages"]["eurotrain"] == own["packages"]["eurotrain"]


def test_modules_are_loaded_by_a_login_shell(
    site: SitePaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".bash_profile").write_text('module() { export LOADED="$LOADED $*"; echo "loaded $2"; }\n')
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\nprintf \'{"loaded": "%s"}\\n\' "$LOADED"\n')
    program.chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert bundles.probe(str(program), ["python/3.11", "gcc; x"]) == {
        "loaded": " load python/3.11 load gcc; x"
    }


@pytest.mark.parametrize(
    ("shell", "why"),
    [
        ("echo 'no such module' >&2; exit 1", "does not start: no such module"),
        ("exit 3", "does not start: exit code 3"),
        ("echo 7", "does not start: exit code 0"),
    ],
)
def test_what_is_no_interpreter(tmp_path: Path, shell: str, why: str) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{shell}\n")
    program.chmod(0o755)
    with pytest.raises(ValueError, match=why):
        bundles.probe(str(program))


def test_a_registered_interpreter_counts_until_it_changes(site: SitePaths, tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\n")
    told = bundles.register(site, "i1", str(program), {"executable": str(program), "version": "3.11.4"})
    assert (told["state"], told["python"]) == (bundles.READY, str(program))
    program.write_text("#!/bin/sh\nother\n")
    with pytest.raises(staging.NotStaged, match=r"bundle i1 is not as it was made: .*python has changed"):
        staging.staged(site, {"bundle": "i1", "advice": "A"})
    program.unlink()
    with pytest.raises(staging.NotStaged, match=r"python is gone"):
        staging.staged(site, {"bundle": "i1", "advice": "A"})


def test_a_bundle_is_made_young_again_with_all_its_files(site: SitePaths, tmp_path: Path) -> None:
    (tmp_path / "python").touch()
    bundles.register(site, "i1", "py", {"executable": str(tmp_path / "python")})
    module = site.scratch / "bundles/i1/attempts/a/venv/lib/module.py"
    module.parent.mkdir(parents=True)
    module.touch()
    (module.parent / "link").symlink_to("nowhere")
    os.utime(module, (1, 1))
    os.utime(module.parent / "link", (1, 1), follow_symlinks=False)
    record = site.scratch / "bundles/i1/bundle.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "made": 1.0}))
    assert bundles.bundle(site, "i1")["age"] > 1e9
    assert bundles.renew(site, "i1")["age"] < 60
    assert min(time.time() - p.lstat().st_mtime for p in (module, module.parent / "link")) < 60
    with pytest.raises(ValueError, match="bundle none is not there"):
        bundles.renew(site, "none")


# ---- from the agent that travels


def test_the_agent_s_file_alone_is_enough_to_make_one(
    site: SitePaths, tmp_path: Path, fake_ssh: FakeSsh
) -> None:
    connection = SshConnection("site", str(site.scratch), tmp_path / "home", sys.executable)
    (told,) = connection.exchange([{"op": "make", "name": "b1", "order": order(site)}])
    assert told["state"] == bundles.MAKING
    (attempt,) = site.scratch.glob("bundles/b1/attempts/*")
    (process,) = [p for p in Path("/proc").glob("[0-9]*") if is_making(p, attempt)]
    assert str(site.scratch / "agent" / package.build().name).encode() in (process / "environ").read_bytes()
    deadline = time.monotonic() + 120
    while told["state"] == bundles.MAKING:
        assert time.monotonic() < deadline
        (told,) = connection.exchange([{"op": "bundle", "name": "b1"}])
    assert told["state"] == bundles.READY, (told, logs(site))
    assert json.loads((site.scratch / "bundles/b1/bundle.json").read_text())["kind"] == "wheels"
