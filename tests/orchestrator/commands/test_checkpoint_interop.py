"""`eurotrain checkpoint import | export`, as typed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from click.testing import Result

from checkpoints.attempts import candidates
from clusters.segment import ModelShape, Start
from orchestrator.spec import parse_run
from tests.checkpoints.interop.models import loaded_model, saved_model

Run = Callable[..., Result]

REST = """
name = "goes-on"
[data]
prefixes = ["text"]
[training]
tokens = "1M"
sequence_length = 64
global_batch = 4
micro_batch = 2
learning_rate = 1e-4
[checkpoint]
every_steps = 10
[[islands]]
site = "local-a"
allocation = "demo-a"
time_limit = "1h"
"""


def test_in_out_and_what_a_run_needs(tmp_path: Path, run: Run) -> None:
    original = saved_model(tmp_path / "theirs", "qwen3")
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    (tmp_path / "theirs" / "generation_config.json").write_text('{"eos_token_id": 17}')
    facts = json.loads(run("import", tmp_path / "theirs", tmp_path / "ours", "--json").stdout)
    (attempt,) = candidates(tmp_path / "ours")
    assert facts["checkpoint"] == str(attempt)
    assert facts["tokenizer"] == ["tokenizer.json", "generation_config.json"]
    shown = json.loads(run("show", attempt, "--json").stdout)
    assert shown["sha256"] == facts["sha256"]
    spec = parse_run(REST + (tmp_path / "ours" / "start.toml").read_text(), "run.toml")
    assert spec.start == Start("models/ours", facts["sha256"])
    assert spec.model == ModelShape(**facts["model"])
    assert (spec.model.qk_norm, spec.model.kv_channels) == (True, 16)
    out = json.loads(run("export", tmp_path / "ours", tmp_path / "back", "--json").stdout)
    assert (out["sha256"], out["step"], out["dtype"]) == (facts["sha256"], 0, "float32")
    assert set(out["files"]) == {path.name for path in (tmp_path / "back").iterdir()}
    assert "tokenizer.json" in out["files"]
    back = loaded_model(tmp_path / "back")
    assert back.config.eos_token_id == 17
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), original.parameters(), strict=True))


def test_for_people_and_bad_input_is_one_line(tmp_path: Path, run: Run) -> None:
    saved_model(tmp_path / "theirs", "llama")
    told = run("import", tmp_path / "theirs", tmp_path / "ours").stdout
    assert f"to start a run from it: {tmp_path}/ours/start.toml" in told.replace("\n", "")
    told = run("export", tmp_path / "ours", tmp_path / "back", "--dtype", "bfloat16").stdout
    assert "back: step 0, bfloat16, " in told.replace("\n", "")
    (tmp_path / "text.bin").write_bytes(b"".join(bytes([n, 0]) for n in range(200)))  # tokens of 16 bits
    (tmp_path / "text.idx").write_bytes(b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + bytes([8]))
    words = ("--quantize=int8", f"--data={tmp_path}/text")
    told = " ".join(run("export", tmp_path / "ours", tmp_path / "edge", *words).stdout.split())  # unwrapped
    assert re.search(
        r"tokens of .*text: perplexity [\d.]+ becomes [\d.]+, mean KL divergence [\d.e-]+ nats", told
    )
    config = tmp_path / "theirs" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_act": "relu"}))
    failed = run("import", tmp_path / "theirs", tmp_path / "new", code=2)
    assert failed.stderr == "eurotrain: config.json: hidden_act = relu: not supported (allowed: silu)\n"
    assert not (tmp_path / "new").exists()


def test_torch_dist_in_and_out(tmp_path: Path, run: Run) -> None:
    """Its weights are all of it that is taken, so the shape has to be said."""
    saved_model(tmp_path / "theirs", "llama")
    run("import", tmp_path / "theirs", tmp_path / "ours")
    out = json.loads(
        run("export", tmp_path / "ours", tmp_path / "out", "--format=torch_dist", "--json").stdout
    )
    assert "iter_0000000/.metadata" in out["files"]
    shape = tmp_path / "ours" / "start.toml"
    facts = json.loads(run("import", tmp_path / "out", tmp_path / "new", "--model", shape, "--json").stdout)
    assert ModelShape(**facts["model"]) == parse_run(REST + shape.read_text(), "run.toml").model
    assert "say --model" in run("import", tmp_path / "out", tmp_path / "newer", code=2).stderr
