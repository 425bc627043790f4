"""Wheels for a site: the right ones, all of them, and nothing is fetched twice or half."""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path

import pytest
from packaging.tags import sys_tags

from clusters import probe
from orchestrator import wheelhouse
from orchestrator.wheelhouse import Target
from tests.stub_wheels import stub

HERE = Target.from_facts(probe.facts())
_TWELVE = {"platform_machine": "aarch64", "python_version": "3.12", "python_full_version": "3.12.3"}
ARM = Target("3.12", "aarch64", "glibc 2.28", {**HERE.markers, **_TWELVE})


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All that pip can find, told by PIP_* settings as an operator would."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    for name in ("PIP_CONSTRAINT", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    return folder


def names(wheels: list[Path]) -> list[str]:
    return [wheel.name for wheel in wheels]


def test_here_is_like_here() -> None:
    assert HERE.is_like_here
    assert not ARM.is_like_here
    newer = dataclasses.replace(HERE, libc="glibc 2.999")
    older = dataclasses.replace(HERE, libc="glibc 2.5")
    assert (newer.is_like_here, older.is_like_here) == (True, False)


def test_platform_tags_are_those_that_packaging_knows_of_this_machine() -> None:
    known = {tag.platform for tag in sys_tags() if tag.platform.startswith("manylinux")}
    if platform.machine() == "x86_64":
        assert set(HERE.platforms) == known
    assert {str(tag) for tag in sys_tags()} <= {str(tag) for tag in HERE.tags}
    musl = dataclasses.replace(HERE, libc="musl")
    assert musl.platforms[0] == f"musllinux_1_2_{platform.machine()}"


def test_wheels_for_this_machine_come_with_what_they_require(index: Path, tmp_path: Path) -> None:
    stub(index, "one", requires=["two>=2", "never; python_version < '3'", "three; extra == 'more'"])
    stub(index, "two", "2.5")
    stub(index, "two", "1.0")
    found = wheelhouse.collect(["one", "absent; extra == 'dev'"], HERE, [], tmp_path / "house")
    assert names(found) == ["one-1.0-py3-none-any.whl", "two-2.5-py3-none-any.whl"]


def test_wheels_for_another_machine_are_its_own(index: Path, tmp_path: Path) -> None:
    for tag in ("manylinux_2_28_aarch64", "manylinux_2_17_x86_64", "manylinux_2_34_aarch64"):
        for python in ("cp311", "cp312"):
            stub(index, "compiled", tag=f"{python}-{python}-{tag}")
    stub(index, "compiled", "0.9", "cp312-cp312-manylinux2014_aarch64")
    found = wheelhouse.collect(["compiled"], ARM, [], tmp_path / "house")
    assert names(found) == ["compiled-1.0-cp312-cp312-manylinux_2_28_aarch64.whl"]


def test_markers_are_judged_for_the_site(index: Path, tmp_path: Path) -> None:
    for version in ("0.16", "0.19"):
        stub(index, "core", version)
    wanted = ["core==0.16; python_version < '3.12'", "core==0.19; python_version >= '3.12'"]
    assert names(wheelhouse.collect(wanted, ARM, [], tmp_path / "house")) == ["core-0.19-py3-none-any.whl"]


def test_what_pip_overlooks_is_noticed(index: Path, tmp_path: Path) -> None:
    """pip judges the markers of what a wheel requires by the Python that pip itself runs in."""
    stub(index, "one", requires=["two; python_version >= '3.12'"])
    if HERE.python == "3.11":
        with pytest.raises(
            ValueError, match=r"^one requires two; .* and there is no wheel of it for Python 3.12"
        ):
            wheelhouse.collect(["one"], ARM, [], tmp_path / "house")
    assert not list((tmp_path / "house").glob("*[0-9a-f]")), "half a collection is none"


def test_what_is_collected_is_kept_for_the_same_wishes(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(index, "one")
    first = wheelhouse.collect(["one"], HERE, [], tmp_path / "house")
    monkeypatch.setattr(wheelhouse, "_pip", lambda _: pytest.fail("pip again"))
    assert wheelhouse.collect(["one"], HERE, [], tmp_path / "house") == first
    with pytest.raises(BaseException, match="pip again"):
        wheelhouse.collect(["one"], HERE, ["--pre"], tmp_path / "house")


def test_the_operator_s_own_words_reach_pip(index: Path, tmp_path: Path) -> None:
    stub(tmp_path / "rocm", "torch", "2.6.0+rocm6.3")
    stub(index, "torch", "2.6.0")
    found = wheelhouse.collect(["torch>=2.6"], HERE, ["--find-links", str(tmp_path / "rocm")], tmp_path / "h")
    assert names(found) == ["torch-2.6.0+rocm6.3-py3-none-any.whl"]


@pytest.mark.parametrize(("target", "verb"), [(HERE, "wheel"), (ARM, "download")])
def test_pip_s_reason_is_one_line(index: Path, tmp_path: Path, target: Target, verb: str) -> None:
    why = (
        rf"^pip {verb}: No matching distribution found for none-such>=3; `pip` in sites.toml takes more words"
    )
    with pytest.raises(ValueError, match=why):
        wheelhouse.collect(["none-such>=3"], target, [], tmp_path / "house")
    assert not list((tmp_path / "house").glob("*[0-9a-f]"))


@pytest.mark.parametrize(
    ("version", "tag", "requires", "python", "why"),
    [
        (
            "1.0",
            "cp39-cp39-win_amd64",
            [],
            "",
            "one-1.0-cp39-cp39-win_amd64.whl does not run there: Python 3",
        ),
        ("1.0", "py3-none-any", [], ">=3.99", "one requires Python >=3.99, and there is 3."),
        ("0.5", "py3-none-any", [], "", "eurotrain requires one>=1, and there is one 0.5 for Python 3."),
        (
            "1.0",
            "py3-none-any",
            ["one[x]", "two; extra == 'x'"],
            "",
            "one requires two; extra == .x., and there",
        ),
    ],
)
def test_a_wheelhouse_that_would_not_do(
    tmp_path: Path, version: str, tag: str, requires: list[str], python: str, why: str
) -> None:
    wheel = stub(tmp_path, "one", version, tag, requires, python)
    with pytest.raises(ValueError, match=why):
        wheelhouse.check([wheel], ["one>=1"], HERE)


def test_eurotrain_tells_what_it_needs() -> None:
    assert any(line.startswith("torch") for line in wheelhouse.requirements())
