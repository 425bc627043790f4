"""`eurotrain checkpoint replicate`, as an operator types it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from clusters import ssh_session
from clusters.paths import SitePaths
from orchestrator import kinds
from orchestrator.cli import main
from orchestrator.desk import Desk
from orchestrator.stock import Record, Stock
from tests.checkpoints.samples import checkpoint, files, flip, weights
from tests.clusters.fake_ssh import FakeSsh
from tests.orchestrator.story import A, plan

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("EUROTRAIN_HOME", str(tmp_path / "home"))

    def ran(*words: object, code: int = 0) -> Result:
        result = CliRunner().invoke(main, ["checkpoint", "replicate", *map(str, words)])
        assert result.exit_code == code, result.output
        return result

    return ran


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSsh:
    ssh_session._settings.cache_clear()
    fake = FakeSsh(tmp_path / "bin")
    fake.folder.mkdir()
    fake.install(monkeypatch)
    return fake


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "here", {f"t{n}": weights(5000, n) for n in range(6)})


def test_a_directory_s_newest_is_copied_and_told_of(run: Run, source: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    told = json.loads(run(source.parent, there, "--json").stdout)
    assert told["path"] == str(there / source.name)
    assert files(there / source.name) == files(source)
    assert (told["sent"], told["already"]) == (told["bytes"], False)
    again = run(source, there)
    assert "is there already, and every byte of it is right" in again.output


def test_a_limit_is_kept(run: Run, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "large", {f"t{n}": weights(20_000, n) for n in range(6)})
    limit = ["--bwlimit", "400kB/s", "--streams", 3, "--compress", "never"]
    told = json.loads(run(source, tmp_path / "there", *limit, "--json").stdout)
    assert told["seconds"] >= (480_000 - 262_144) / 400_000  # the bucket is full at the beginning
    assert told["links_lost"] == 0


@pytest.mark.parametrize("words", [["--bwlimit", "fast"], ["--streams", "0"], ["--compress", "gzip"]])
def test_bad_options_are_bad_input(run: Run, source: Path, tmp_path: Path, words: list[str]) -> None:
    assert words[1] in run(source, tmp_path / "there", *words, code=2).output
    assert not (tmp_path / "there").exists()


def test_a_damaged_source_is_one_line_and_nothing_counts(run: Run, source: Path, tmp_path: Path) -> None:
    flip(source / "writer-00001.bin", 5)
    told = run(source, tmp_path / "there", code=2).output
    assert told.count("\n") == 1
    assert f"{source}: writer-00001.bin: bytes 0 to 20000 have crc32c" in told


def test_what_is_neither_place_nor_run_is_bad_input(run: Run, tmp_path: Path) -> None:
    assert "neither a directory nor a run" in run(tmp_path / "absent", tmp_path / "there", code=2).output


def test_into_a_store_and_back(run: Run, source: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    told = json.loads(run(source, url, "--compress", "always", "--json").stdout)
    assert told["path"].startswith(f"{url}/{source.name}-")
    assert told["carried"] < 0.95 * told["bytes"]
    for where in (url, told["path"]):
        run(where, tmp_path / "back")
    assert files(tmp_path / "back" / source.name) == files(source)
    assert "Protocol not known" in run(source, "nosuch://x", code=2).output


# ---- sites


@pytest.fixture
def sites(tmp_path: Path, fake_ssh: FakeSsh, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sites behind ssh and one here; what they may fill."""
    (tmp_path / "home").mkdir()
    python = f'python = "{sys.executable}"'
    tables = {
        "north": f'host = "n"\n{python}',
        "south": f'host = "s"\n{python}',
        "bare": 'host = "b"',
        "here": "",
    }
    text = "".join(
        f'[{name}]\ncatalogue = "local"\nscratch = "{tmp_path}/{name}"\n{more}\n'
        for name, more in tables.items()
    )
    (tmp_path / "home" / "sites.toml").write_text(text)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_from_here_to_a_site_and_on_to_another_and_back(run: Run, source: Path, sites: Path) -> None:
    run(source, "north:store")
    told = json.loads(
        run("north:store", "south:deep/er", "--compress", "always", "--streams", 1, "--json").stdout
    )
    assert told["path"] == f"{sites}/south/deep/er/{source.name}"
    assert told["carried"] < 0.95 * told["bytes"]
    run(f"south:{sites}/south/deep/er/{source.name}", "here:back")
    assert files(sites / "here" / "back" / source.name) == files(source)


def test_what_a_site_lacks_is_named(run: Run, source: Path, sites: Path, fake_ssh: FakeSsh) -> None:
    told = run(source, "bare:store", code=2).output
    assert "bare: eurotrain is not there yet: `eurotrain stage bare` brings it, or name in" in told
    assert "nroth" in (told := run(source, "nroth:store", code=2).output)
    assert "north" in told
    assert "name a directory behind the colon" in run(source, "north:", code=2).output
    fake_ssh.does("echo 'Permission denied (publickey)' >&2; exit 255")
    assert "Permission denied" in (told := run(source, "north:store", code=1).output)
    assert told.count("\n") == 1


def test_the_far_end_runs_from_what_was_staged(run: Run, source: Path, sites: Path) -> None:
    Stock(sites / "home" / "staged").save("bare", Record(bundle={"python": sys.executable}))
    run(source, "bare:store", "--streams", 1)
    assert files(sites / "bare" / "store" / source.name) == files(source)


def test_modules_of_a_site_are_loaded_before_its_python(run: Run, source: Path, sites: Path) -> None:
    path = sites / "home" / "sites.toml"
    path.write_text(path.read_text().replace('host = "s"', 'host = "s"\nmodules = ["mine"]'))
    (sites / ".bash_profile").write_text(f'module() {{ echo "$@" >> {sites}/loaded; echo loaded; }}\n')
    run(source, "south:store", "--streams", 1)
    assert set((sites / "loaded").read_text().splitlines()) == {"load mine"}
    assert files(sites / "south" / "store" / source.name) == files(source)


def test_a_run_s_checkpoint_is_found_at_its_site(run: Run, sites: Path) -> None:
    Desk.open().store.record("trial", kinds.RUN_CREATED, plan=plan())
    there = sites / "there"
    assert "several sites (local-a, local-b): choose one with --site" in run("trial", there, code=2).output
    assert "no island at north" in run("trial", there, "--site", "north", code=2).output
    assert "which run trial uses" in run("trial", there, "--site", A, code=2).output
    row = f'[{A}]\ncatalogue = "local"\nscratch = "{sites}/a"\nhost = "a"\npython = "{sys.executable}"\n'
    with (sites / "home" / "sites.toml").open("a") as stream:
        stream.write(row)
    saved = checkpoint(SitePaths(sites / "a").checkpoints("trial", A), {"t": weights(99)})
    run("trial", there, "--site", A, "--streams", 1)
    assert files(there / saved.name) == files(saved)


def test_a_site_goes_with_a_run_alone(run: Run, source: Path, sites: Path) -> None:
    assert "a site goes with the name of a run" in run(source, "here:x", "--site", "here", code=2).output
