"""`eurotrain checkpoint ...` as an operator types it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result

from orchestrator.cli import main

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    def ran(*words: object, code: int = 0) -> Result:
        result = CliRunner().invoke(main, ["checkpoint", *map(str, words)])
        assert result.exit_code == code, result.output
        return result

    return ran
