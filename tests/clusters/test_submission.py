"""What Slurm is asked for: the operator's choices, the machine's way of naming GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from clusters.site import Site, load_sites
from clusters.slurm import Request
from clusters.submission import submission


def site(tmp_path: Path, text: str) -> Site:
    path = tmp_path / "sites.toml"
    path.write_text(text)
    return next(iter(load_sites(path).values()))


def test_a_local_site_needs_nothing_more(tmp_path: Path) -> None:
    assert submission(site(tmp_path, '[local]\nscratch = "/x"\n'), 2, "") == {}


def test_a_slurm_site_gets_the_operators_choices_and_the_machines_names(tmp_path: Path) -> None:
    lumi = '[lumi]\nscratch = "/x"\naccount = "project_1"\npartition = "small-g"\nmodules = ["a", "b/2"]\n'
    asked = submission(site(tmp_path, lumi + 'python = "/x/bin/python"\n'), 2, "run.lumi.0000")
    assert (asked["scheduler"], asked["python"]) == ("slurm", "/x/bin/python")
    assert asked["request"] == {
        "account": "project_1",
        "partition": "small-g",
        "gres": "gpu:mi250:2",
        "after": ["run.lumi.0000"],
        "setup": ["module load a", "module load b/2"],
    }
    Request.from_json(asked["request"])


def test_whole_nodes_are_asked_for_whole(tmp_path: Path) -> None:
    asked = submission(site(tmp_path, '[lumi]\nscratch = "/x"\npartition = "standard-g"\n'), 8, "")
    assert asked["request"]["exclusive"] is True


def test_more_ranks_than_a_node_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="9 ranks, and a node has 8"):
        submission(site(tmp_path, '[lumi]\nscratch = "/x"\npartition = "small-g"\n'), 9, "")


def test_nodes_to_keep_away_from_are_named(tmp_path: Path) -> None:
    lumi = site(tmp_path, '[lumi]\nscratch = "/x"\npartition = "small-g"\nexclude = ["nid1"]\n')
    assert lumi.own.exclude == ("nid1",)
    assert submission(lumi, 2, "", ["nid1", "nid2"])["request"]["exclude"] == ["nid1", "nid2"]
    assert "exclude" not in submission(lumi, 2, "")["request"]
