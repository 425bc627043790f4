from __future__ import annotations

import os
from pathlib import Path

import pytest

from clusters.guard import RUNTIME
from orchestrator.runtime import configure_ray, runtime_directory


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes made by the code under test are undone."""
    for name, value in os.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop(RUNTIME, None)


def test_ray_gets_a_token_in_a_file_that_only_we_can_read(tmp_path: Path) -> None:
    configure_ray(tmp_path, "a-secret")
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "token")
    assert (tmp_path / "token").read_text() == "a-secret"
    assert oct((tmp_path / "token").stat().st_mode) == "0o100600"
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert "a-secret" not in os.environ.values()
    with pytest.raises(FileExistsError):
        configure_ray(tmp_path, "another")


def test_another_ray_of_the_user_is_forgotten(tmp_path: Path) -> None:
    os.environ.update(RAY_ADDRESS="10.0.0.1:6379", RAY_AUTH_TOKEN="stolen", PATH="/bin")
    configure_ray(tmp_path, "own")
    assert not {"RAY_ADDRESS", "RAY_AUTH_TOKEN"} & {*os.environ}
    assert os.environ["PATH"] == "/bin"


def test_the_guards_directory_is_left_to_the_guard(tmp_path: Path) -> None:
    os.environ[RUNTIME] = str(tmp_path)
    with runtime_directory() as directory:
        assert directory == tmp_path
    assert tmp_path.is_dir()


def test_without_a_guard_the_directory_is_our_own_and_removed() -> None:
    with runtime_directory() as directory:
        assert oct(directory.stat().st_mode) == "0o40700"
        assert len(str(directory)) <= 30
        (directory / "file").touch()
    assert not directory.exists()
