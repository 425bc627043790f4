"""What Slurm is asked for: the operator's choices, the machine's way of naming GPUs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from clusters.site import Site, load_sites
from clusters.slurm import Request
from clusters.submission import limits_question, submission


def site(tmp_path: Path, text: str) -> Site:
    path = tmp_path / "sites.toml"
    path.write_text(text)
    return next(iter(load_sites(path).values()))


def test_a_local_site_needs_nothing_more(tmp_path: Path) -> None:
    assert submission(site(tmp_path, '[local]\nscratch = "/x"\n'), 2, 1, "") == {}


def test_a_slurm_site_gets_the_operators_choices_and_the_machines_names(tmp_path: Path) -> None:
    lumi = '[lumi]\nscratch = "/x"\naccount = "project_1"\npartition = "small-g"\nmodules = ["a", "b/2"]\n'
    asked = submission(site(tmp_path, lumi + 'python = "/x/bin/python"\n'), 2, 1, "run.lumi.0000")
    assert (asked["scheduler"], asked["python"]) == ("slurm", "/x/bin/python")
    exports = asked["request"]["setup"][2:]
    assert asked["request"] == {
        "account": "project_1",
        "partition": "small-g",
        "gres": "gpu:mi250:2",
        "nodes": 1,
        "cpus_per_node": 14,
        "after": ["run.lumi.0000"],
        "setup": ["module load a", "module load b/2", *exports],
    }
    assert all(line.startswith("export ") for line in exports)
    Request.from_json(asked["request"])


def test_whole_nodes_are_asked_for_whole(tmp_path: Path) -> None:
    asked = submission(site(tmp_path, '[lumi]\nscratch = "/x"\npartition = "standard-g"\n'), 8, 1, "")
    assert asked["request"]["exclusive"] is True


def test_nodes_to_keep_away_from_are_named(tmp_path: Path) -> None:
    lumi = site(tmp_path, '[lumi]\nscratch = "/x"\npartition = "small-g"\nexclude = ["nid1"]\n')
    assert lumi.own.exclude == ("nid1",)
    assert submission(lumi, 2, 1, "", ["nid1", "nid2"])["request"]["exclude"] == ["nid1", "nid2"]
    assert "exclude" not in submission(lumi, 2, 1, "")["request"]


def test_a_job_of_several_nodes_asks_for_each_nodes_share(tmp_path: Path) -> None:
    lumi = '[lumi]\nscratch = "/x"\npartition = "standard-g"\n'
    asked = submission(site(tmp_path, lumi), 16, 2, "")["request"]
    assert (asked["nodes"], asked["gres"], asked["cpus_per_node"]) == (2, "gpu:mi250:8", 56)
    half = submission(site(tmp_path, lumi), 16, 4, "")["request"]
    assert (half["nodes"], half["gres"], half["cpus_per_node"]) == (4, "gpu:mi250:4", 28)


@pytest.mark.parametrize(
    ("own", "nodes", "why"),
    [
        ('[lumi]\npartition = "small-g"', 5, "lumi: nodes = 5: partition small-g allows 4"),
        (
            '[leonardo]\nqos = "boost_qos_bprod"\npartition = "boost_usr_prod"',
            2,
            "leonardo: nodes = 2: partition boost_usr_prod with qos boost_qos_bprod is for jobs of 65 "
            "or more",
        ),
    ],
)
def test_more_or_fewer_nodes_than_a_job_may_have_are_refused(
    tmp_path: Path, own: str, nodes: int, why: str
) -> None:
    with pytest.raises(ValueError, match=f"^{why}$"):
        submission(site(tmp_path, own + '\nscratch = "/x"\n'), nodes, nodes, "")


def test_the_operators_own_limit_goes_before_the_catalogues(tmp_path: Path) -> None:
    own = '[lumi]\npartition = "small-g"\nscratch = "/x"\nmax_ranks = 40\n'
    assert submission(site(tmp_path, own), 40, 5, "")["request"]["nodes"] == 5


def test_jobs_get_the_environment_for_collectives_the_operators_word_last(tmp_path: Path) -> None:
    own = '[lumi]\npartition = "small-g"\nscratch = "/x"\n[lumi.environment]\n'
    own += 'CXI_FORK_SAFE = "0"\nQUOTED = \'say "hi" `now` \\ for $USER\'\n'
    setup = submission(site(tmp_path, own), 1, 1, "")["request"]["setup"]
    assert 'export NCCL_SOCKET_IFNAME="hsn0,hsn1,hsn2,hsn3"' in setup
    assert [line for line in setup if "CXI_FORK_SAFE=" in line] == ['export CXI_FORK_SAFE="0"']
    script = "\n".join(["USER=me", *setup, 'printf %s "$QUOTED"'])
    said = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert said == 'say "hi" `now` \\ for me'


def test_a_segment_may_be_told_to_begin_later(tmp_path: Path) -> None:
    asked = submission(site(tmp_path, '[lumi]\nscratch = "/x"\npartition = "small-g"\n'), 2, 1, "", (), 9e9)
    assert Request.from_json(asked["request"]).begin == 9e9


def test_what_a_site_allows_is_asked_for_the_operators_place(tmp_path: Path) -> None:
    lumi = site(tmp_path, '[lumi]\nscratch = "/x"\naccount = "project_1"\npartition = "small-g"\n')
    assert limits_question(lumi, ["k"]) == {
        "op": "limits", "account": "project_1", "partition": "small-g", "qos": "", "keys": ["k"],
    }  # fmt: skip
