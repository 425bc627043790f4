# ruff: noqa: E501 - complaints are quoted whole, so that they can be judged as the user reads them
"""run.toml: what a good one becomes, and the one line that every mistake is answered with."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters.segment import Data, ModelShape, Rounds, Training
from orchestrator.spec import RunSpec, load_run, new_run_id, parse_run
from parallelism.layout import Layout

GOOD = """\
name = "demo"
[model]
preset = "llama-7m"
[data]
tokenizer = "data/tokenizer.json"
prefixes = ["data/eu"]
weights = [1.0]
[training]
tokens = "2M"
sequence_length = 256
global_batch = 16
micro_batch = 4
learning_rate = 3e-3
warmup_steps = 10
[start]
checkpoint = "models/llama"
sha256 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
[rounds]
inner_steps = 20
deadline = "60s"
[checkpoint]
every_steps = 20
[[islands]]
site = "local-a"
allocation = "demo-a"
tp = 2
time_limit = "30min"
[[islands]]
site = "local-b"
allocation = "demo-b"
pp = 2
time_limit = "1h30min"
"""
ROUNDS = GOOD[GOOD.index("[rounds]") : GOOD.index("[checkpoint]")]
SECOND_ISLAND = GOOD[GOOD.rindex("[[islands]]") :]


def with_change(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new, 1)


def complaints(text: str) -> list[str]:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_run(text, "run.toml")
    assert type(caught.value) is ValueError  # pydantic's own error would print many lines
    lines = str(caught.value).splitlines()
    assert all(line.startswith("run.toml: ") and "http" not in line for line in lines)
    return [line.removeprefix("run.toml: ") for line in lines]


def test_a_good_file() -> None:
    spec = parse_run(GOOD, "run.toml")
    assert spec.model == ModelShape(4, 256, 688, 8, 4, 8192)
    assert spec.segment_training() == Training(
        steps=260,
        sequence_length=256,
        global_batch=16,
        micro_batch=4,
        learning_rate=3e-3,
        warmup_steps=10,
        seed=1234,
    )
    assert spec.segment_data() == Data(prefixes=("data/eu",), weights=(1.0,))
    assert spec.segment_rounds() == Rounds(inner_steps=20, deadline_seconds=60.0)
    assert (spec.checkpoint.every_steps, spec.checkpoint.keep) == (20, 3)
    assert [island.layout for island in spec.islands] == [Layout(tp=2), Layout(pp=2)]
    assert [island.time_limit_seconds for island in spec.islands] == [1800.0, 5400.0]


def test_what_a_segment_carries_is_of_the_contract_and_nothing_else() -> None:
    spec = parse_run(GOOD, "run.toml")
    assert type(spec.segment_training()) is Training
    assert type(spec.segment_data()) is Data
    assert type(spec.segment_rounds()) is Rounds
    assert type(spec.islands[0].layout) is Layout


def test_fields_beside_a_preset_override_it() -> None:
    spec = parse_run(with_change('"llama-7m"', '"llama-7m"\nlayers = 8\nvocabulary_size = 4096'), "run.toml")
    assert spec.model == ModelShape(8, 256, 688, 8, 4, 4096)


def test_a_model_may_be_spelt_out() -> None:
    fields = "layers=2\nhidden_size=64\nffn_hidden_size=128\nattention_heads=4\nquery_groups=2\nvocabulary_size=512"
    assert parse_run(with_change('preset = "llama-7m"', fields), "run.toml").model == ModelShape(
        2, 64, 128, 4, 2, 512
    )


def test_one_island_needs_no_rounds() -> None:
    spec = parse_run(GOOD.replace(ROUNDS, "").replace(SECOND_ISLAND, ""), "run.toml")
    assert spec.segment_rounds() is None
    assert spec.steps == 489  # ceil(2,000,000 / 4096)


@given(tokens=st.integers(1, 10**9), inner=st.integers(1, 500), batch=st.integers(1, 64), one=st.booleans())
def test_steps_cover_the_tokens_with_whole_rounds_and_no_more(
    tokens: int, inner: int, batch: int, one: bool
) -> None:
    text = GOOD.replace('"2M"', str(tokens)).replace("inner_steps = 20", f"inner_steps = {inner}")
    text = text.replace("global_batch = 16", f"global_batch = {4 * batch}").replace("warmup_steps = 10\n", "")
    spec = parse_run(text.replace(SECOND_ISLAND, "") if one else text, "run.toml")
    per_step = 4 * batch * 256 * len(spec.islands)
    assert spec.steps % inner == 0
    assert (spec.steps - inner) * per_step < tokens <= spec.steps * per_step


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("tokens =", "tokns =", "training: unknown key 'tokns': did you mean 'tokens'? Known: adam_beta1, adam_beta2, "
         "clip_grad, final_learning_rate, global_batch, learning_rate, micro_batch, precision, sequence_length, "
         "tokens, warmup_steps, weight_decay"),
        ("[rounds]", "[round]", "unknown key 'round': did you mean 'rounds'? Known: checkpoint, data, islands, model, "
         "name, rounds, seed, start, training"),
        ("tp = 2", "tq = 2", "islands.local-a: unknown key 'tq'; known: allocation, cp, distributed_optimizer, dp, ep, nodes, pp, site, time_limit, tp, vpp"),
        ("deadline =", "deadline_seconds =", "rounds: unknown key 'deadline_seconds': did you mean 'deadline'? Known: "
         "deadline, inner_steps, max_drift, max_norm_ratio, max_open_rounds, outer_learning_rate, outer_momentum, "
         "quantise, reset_every"),
        ("every_steps = 20", "every_steps = 20\nkep = 3", "checkpoint: unknown key 'kep': did you mean 'keep'? Known: "
         "every_steps, fast, keep, keep_every, milestone_steps, peers, writer_timeout"),
        ("every_steps = 20", "every_steps = 20\npeers = true", "checkpoint.peers needs checkpoint.fast, the nodes' directory for copies, such as /dev/shm"),
        ("every_steps = 20", 'every_steps = 20\nfast = "shm"', "checkpoint.fast is 'shm'; it must begin with / or a $VARIABLE of the nodes"),
        ("every_steps = 20", 'every_steps = 20\nkeep_every = "often"', "checkpoint.keep_every: 'often' is not a duration such as \"30min\" or \"1h30min\"; units: ms, s, min, h, d"),
        ("every_steps = 20", "every_steps = 20\nmilestone_steps = -1", "checkpoint.milestone_steps is -1; it must be at least 0"),
        ("every_steps = 20", 'every_steps = 20\nwriter_timeout = "10ms"', "checkpoint.writer_timeout is 0.01; it must be at least 1"),
        ('tokens = "2M"\n', "", "training.tokens is missing"),
        ('site = "local-a"\n', "", "islands.#1.site is missing"),
        ("tp = 2", 'tp = "2"', 'islands.local-a.tp is "2"; it must be a whole number'),
        ("tp = 2", "tp = true", "islands.local-a.tp is true; it must be a whole number"),
        ("tp = 2", "tp = 2.0", "islands.local-a.tp is 2.0; it must be a whole number"),
        ("3e-3", '"fast"', 'training.learning_rate is "fast"; it must be a number'),
        ('["data/eu"]', '"data/eu"', 'data.prefixes is "data/eu"; it must be a list, such as [1, 2]'),
        ("[1.0]", '["a"]', 'data.weights.#1 is "a"; it must be a number'),
        ('name = "demo"', 'name = "De mo"', 'name is "De mo"; it must be small letters, digits and inner hyphens, at most 40'),
        ('"local-b"', '"../b"', 'islands.../b.site is "../b"; it must be small letters, digits and inner hyphens, at most 40'),
        ('"60s"', "60", 'rounds.deadline: 60 is not a duration such as "30min" or "1h30min"; units: ms, s, min, h, d'),
        ('"2M"', '"2m"', "training.tokens: '2m' is not a count such as \"2M\": unknown unit 'm'; units: none, k, K, M, B, T"),
        ('"2M"', "1979-05-27", "training.tokens: '1979-05-27' is not a count such as \"2M\"; units: none, k, K, M, B, T"),
        ('"2M"', "0", "training.tokens is 0; it must be at least 1"),
        ("3e-3", "nan", "training.learning_rate is nan; it must be above 0"),
        ("3e-3", "inf", "training.learning_rate is inf; it must be above 0"),
        ("3e-3", "3e-3\nadam_beta2 = 1.0", "training.adam_beta2 is 1.0; it must be at least 0 and below 1"),
        ("every_steps = 20", "every_steps = 20\nkeep = 1", "checkpoint.keep is 1; it must be at least 2: the newest may be damaged"),
        ("warmup_steps = 10", "warmup_steps = 300", "training.warmup_steps is 300; the run has only 260 steps"),
        ('"30min"', '"0s"', "islands.local-a.time_limit is 0.0; it must be above 0"),
        ("3e-3", '3e-3\nprecision = "fp16"', "training.precision = 'fp16': not known (allowed: fp32, bf16)"),
        ("deadline =", 'quantise = "int2"\ndeadline =', "rounds.quantise is \"int2\"; it must be 'int8', 'int4' or 'none'"),
        ("deadline =", "max_norm_ratio = 1\ndeadline =", "rounds.max_norm_ratio is 1.0; it must be above 1"),
        ("deadline =", "max_drift = 0\ndeadline =", "rounds.max_drift is 0.0; it must be above 0"),
        ("deadline =", "reset_every = 0\ndeadline =", "rounds.reset_every is 0; it must be at least 1"),
        ("tp = 2", "tp = 3", "islands.local-a.tp = 3: must divide model.attention_heads = 8 (allowed: 1, 2, 4, 8)"),
        ("pp = 2", "ep = 2", "islands.local-b.ep = 2: the model has no experts (allowed: 1)"),
        ('"local-b"', '"local-a"', "islands: site 'local-a' appears 2 times; a site has one island of a run"),
        (ROUNDS, "", "rounds is missing; 2 islands need the table [rounds] to train one model"),
        ("models/llama", "../x", "start.checkpoint has '../x'; paths are relative to a site's scratch and stay below it"),
        ('"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"', '"ABC"', "start.sha256 is 'ABC'; it must be the 64 digits of the checkpoint's manifest, as `eurotrain checkpoint show` prints them"),
        ('sha256 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"\n', "", "start.sha256 is missing"),
        ('"data/eu"', '"/data/eu"', "data.prefixes has '/data/eu'; paths are relative to a site's scratch and stay below it"),
        ('"data/tok', '"../tok', "data.tokenizer has '../tokenizer.json'; paths are relative to a site's scratch and stay below it"),
        ("[1.0]", "[1.0, 2.0]", "data.weights has 2 numbers; one for each of 1 prefixes, or none"),
        ("[1.0]", "[0.0]", "data.weights is [0.0]; every weight must be above 0"),
        ('"llama-7m"', '"lama-7m"', "model: unknown preset 'lama-7m': did you mean 'llama-7m'? Known: eurollm-9b, llama-3-8b, "
         "llama-3.2-1b, llama-3m, llama-7m, moe-6m, salamandra-2b, salamandra-7b"),
        ('preset = "llama-7m"', "layers = 4", "model: lacks hidden_size, ffn_hidden_size, attention_heads, query_groups, "
         "vocabulary_size; or a preset: eurollm-9b, llama-3-8b, llama-3.2-1b, llama-3m, llama-7m, moe-6m, salamandra-2b, salamandra-7b"),
        ("[data]", "[data", "not TOML: Expected ']' at the end of a table declaration (at line 4, column 6)"),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_with_one_line(old: str, new: str, complaint: str) -> None:
    assert complaints(with_change(old, new)) == [complaint]


def test_several_mistakes_get_a_line_each() -> None:
    text = with_change("tp = 2", 'tp = "2"').replace('"2M"', '"2m"').replace("[1.0]", "3")
    assert len(complaints(text)) == 3


def test_a_table_where_a_list_of_tables_belongs() -> None:
    text = GOOD.replace(SECOND_ISLAND, "").replace("[[islands]]", "[islands]")
    (line,) = complaints(text)
    assert line.startswith("islands is {")
    assert line.endswith("it must be [[islands]] tables, in double brackets")


def test_no_island_at_all() -> None:
    without = GOOD[: GOOD.index("[[islands]]")]
    assert complaints(without) == ["islands is missing"]
    assert complaints("islands = []\n" + without) == [
        "islands is empty; a run needs one [[islands]] table at least"
    ]


@pytest.mark.parametrize("key", ["steps", "seed"])
def test_what_a_segment_computes_cannot_be_written(key: str) -> None:
    (line,) = complaints(with_change("warmup_steps", f"{key} = 1\nwarmup_steps"))
    assert line.startswith(f"training: unknown key '{key}'")


@given(st.data())
def test_any_damage_to_the_file_is_one_line_or_a_run(data: st.DataObject) -> None:
    """Cut, doubled or overwritten anywhere: nothing but ValueError comes out."""
    at, length = data.draw(st.integers(0, len(GOOD))), data.draw(st.integers(0, 30))
    junk = data.draw(
        st.sampled_from(
            ["", "0", "-1", "nan", '"', "[", "]", "=", "\n", "x", "[[islands]]\n", "9" * 30, "1e400"]
        )
    )
    try:
        spec = parse_run(GOOD[:at] + junk + GOOD[at + length :], "run.toml")
    except ValueError as error:
        caught = error
    else:
        assert spec.steps > 0
        return
    assert type(caught) is ValueError
    assert all(line.startswith("run.toml: ") for line in str(caught).splitlines())


def test_the_dump_says_what_the_user_said() -> None:
    dumped = parse_run(GOOD, "run.toml").model_dump(mode="json")
    assert dumped["rounds"]["deadline_seconds"] == 60.0
    assert set(dumped["training"]) & {"steps", "seed"} == set()
    assert dumped["training"]["tokens"] == 2_000_000


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        load_run(path)
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        load_run(tmp_path)
    path.write_bytes(b'name = "\xff"')
    with pytest.raises(ValueError, match="not UTF-8 text: byte 8"):
        load_run(path)
    path.write_text(GOOD)
    assert load_run(path) == parse_run(GOOD, "elsewhere")


def test_a_spec_cannot_be_changed() -> None:
    spec = parse_run(GOOD, "run.toml")
    with pytest.raises(ValueError, match="frozen"):
        spec.name = "other"


def test_run_ids_are_unique_and_safe_in_names() -> None:
    made = {new_run_id("demo") for _ in range(200)}
    assert len(made) == 200
    assert all(re.fullmatch(r"demo-[a-z2-7]{6}", name) for name in made)


def test_the_fixture_names_every_table() -> None:
    """A table that no good file of these tests has would be untested."""
    assert set(RunSpec.model_fields) - {"seed"} == set(tomllib.loads(GOOD))
