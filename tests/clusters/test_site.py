"""Sites: the catalogue joined with the operator's file, and what is said of a mistake in it."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from clusters.connection import LocalConnection
from clusters.machine import Catalogue
from clusters.site import Site, load_sites
from clusters.ssh import SshConnection
from tests.clusters.examplar import write_examplar


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "sites.toml"
    path.write_text(text)
    return path


def examplar(tmp_path: Path, own: str, old: str = "", new: str = "") -> Site:
    """A site at the invented machine, with these lines of the operator's."""
    write_examplar(tmp_path / "catalogue", old, new)
    path = write(tmp_path, f'[there]\ncatalogue = "examplar"\nscratch = "/x"\n{own}\n')
    return load_sites(path)["there"]


def test_a_site_is_the_catalogue_and_the_operators_own_part(tmp_path: Path) -> None:
    path = write(tmp_path, '[mine]\ncatalogue = "local"\nscratch = "/x"\naccount = "p1"\n')
    site = load_sites(path)["mine"]
    assert (site.name, site.scratch, site.account, site.unit) == ("mine", Path("/x"), "p1", "core-hour")
    assert (site.scheduler, site.description, site.python) == (
        "local",
        "this machine, without a scheduler",
        None,
    )
    assert site.units_per_hour(4) == 4 * site.units_per_rank_hour == 4
    assert (site.rank_memory_bytes, site.rank_flops, site.efficiency) == (2**32, 6e10, 0.2)
    assert (site.max_ranks, site.max_time_limit_seconds) == (64, 168 * 3600)
    assert site.connect(tmp_path) == LocalConnection(Path("/x"))
    assert (site.is_slurm, site.watch_seconds, site.poll_seconds, site.ahead) == (False, 5.0, 0.0, 0)


def test_the_home_directory_is_meant_by_a_tilde(tmp_path: Path) -> None:
    text = '[local]\nscratch = "~/s"\npython = "/opt/python3"\nmodules = ["a", "b/1"]\ncontainer = "c.sif"\n'
    site = load_sites(write(tmp_path, text))["local"]
    assert site.scratch == Path.home() / "s"
    assert site.python == "/opt/python3"
    assert (site.own.modules, site.own.container) == (("a", "b/1"), "c.sif")


def test_every_machine_of_the_catalogue_can_be_a_site(tmp_path: Path) -> None:
    names = Catalogue().names()
    text = "".join(f'["{name}"]\nscratch = "/x"\n' for name in names)
    assert sorted(load_sites(write(tmp_path, text))) == names


@pytest.mark.parametrize(
    ("own", "ranks", "seconds"),
    [
        ('partition = "wide"', 40, 36 * 3600),
        ('partition = "wide"\nqos = "long"', 12, 36 * 3600),  # each limit from where it is tighter
        ('partition = "wide"\nqos = "tenth"', 16, 36 * 3600),  # 10 % of 40 nodes
        ('partition = "shared"\nqos = "one"', 1, 3600),
        ('partition = "new"\nqos = "long"', 12, 72 * 3600),
        ('partition = "wide"\nmax_ranks = 100\nmax_time = "5-00:00:00"', 100, 120 * 3600),
    ],
)
def test_limits(tmp_path: Path, own: str, ranks: int, seconds: int) -> None:
    site = examplar(tmp_path, own)
    assert (site.max_ranks, site.max_time_limit_seconds) == (ranks, seconds)


@pytest.mark.parametrize(
    ("own", "ranks", "units"),
    [
        ('partition = "wide"', 1, 32),  # whole nodes
        ('partition = "wide"', 5, 64),
        ('partition = "shared"', 1, 8),  # an even share of cores and memory comes with a GPU
        ('partition = "shared"', 5, 40),
        ('partition = "shared"\nunits_per_rank_hour = 0.1', 3, 0.3),
        ('partition = "shared"\nunit = "token"\nunits_per_rank_hour = 2', 3, 6),
    ],
)
def test_what_ranks_burn(tmp_path: Path, own: str, ranks: int, units: float) -> None:
    assert examplar(tmp_path, own).units_per_hour(ranks) == units


def test_a_job_holds_whole_nodes_where_they_are_allocated_whole(tmp_path: Path) -> None:
    whole = examplar(tmp_path, 'partition = "wide"').resources(5)
    assert (whole.nodes, whole.gpus, whole.cores, whole.threads, whole.memory_gib) == (2, 8, 64, 128, 512)
    parts = examplar(tmp_path, 'partition = "shared"').resources(5)
    assert (parts.nodes, parts.gpus, parts.cores, parts.threads, parts.memory_gib) == (2, 5, 40, 80, 320)


def test_more_nodes_than_needed_are_held_too(tmp_path: Path) -> None:
    whole = examplar(tmp_path, 'partition = "wide"')
    assert whole.resources(4, nodes=4).gpus == 16
    assert whole.units_per_hour(4, nodes=4) == 4 * whole.units_per_hour(4)
    parts = examplar(tmp_path, 'partition = "shared"')
    assert parts.units_per_hour(4, nodes=4) == parts.units_per_hour(4), "each rank its share, wherever it is"


@pytest.mark.parametrize(
    ("own", "nodes", "why"),
    [
        ('partition = "wide"', 10, None),
        ('partition = "wide"', 11, "nodes = 11: partition wide allows 10"),
        ('partition = "wide"\nqos = "long"', 4, "nodes = 4: partition wide with qos long allows 3"),
        ('partition = "wide"\nmax_ranks = 100', 25, None),
    ],
)
def test_nodes_that_a_job_may_not_have(tmp_path: Path, own: str, nodes: int, why: str | None) -> None:
    assert examplar(tmp_path, own).refuses(nodes) == why


def test_a_partition_with_other_devices(tmp_path: Path) -> None:
    usual = examplar(tmp_path, 'partition = "wide"')
    other = examplar(tmp_path, 'partition = "new"')
    assert usual.rank_memory_bytes == 40 * 10**9  # a vendor's GB
    assert other.rank_memory_bytes == 80 * 2**30
    assert usual.rank_flops == other.rank_flops == 100.5e12
    assert other.device.name is not None
    assert other.device.name.value == "Other GPU"
    assert other.node is other.machine.node


def test_lumi_counts_dies_and_bills_modules(tmp_path: Path) -> None:
    text = '[lumi]\nscratch = "/x"\npartition = "{}"\n'
    whole = load_sites(write(tmp_path, text.format("standard-g")))["lumi"]
    assert [whole.units_per_hour(gcds) for gcds in (1, 8, 9, 16)] == [4, 4, 8, 8]
    assert (whole.unit, whole.units_per_rank_hour, whole.max_ranks) == ("GPU-hour", 0.5, 8192)
    parts = load_sites(write(tmp_path, text.format("small-g")))["lumi"]
    assert [parts.units_per_hour(gcds) for gcds in (1, 2, 3, 8)] == [0.5, 1, 1.5, 4]
    held = parts.resources(3)
    assert (held.gpus, held.cores, held.memory_gib) == (3, 21, 180)  # 7 of 56 cores, 60 of 480 GiB each


def test_names_as_slurm_takes_them(tmp_path: Path) -> None:
    text = '[daint]\ncatalogue = "alps"\nscratch = "/x"\npartition = "daint-normal"\n'
    site = load_sites(write(tmp_path, text))["daint"]
    assert (site.partition_name, site.qos_name) == ("normal", None)
    text = '[d]\ncatalogue = "discoverer-plus"\nscratch = "/x"\nqos = "account"\naccount = "ehpc-1"\n'
    site = load_sites(write(tmp_path, text))["d"]
    assert (site.partition_name, site.qos_name) == ("common", "ehpc-1")
    site = load_sites(write(tmp_path, '[fortytwo]\nscratch = "/x"\npartition = "gpu"\n'))["fortytwo"]
    assert (site.partition_name, site.qos_name) == ("gpu", None)  # where no partition is known any may be


WIDE, SHARED, NEW = (f'partition = "{name}"' for name in ("wide", "shared", "new"))
PEAK, MEMORY, PER_NODE = "peak_tflops = 100.5\n", "memory_gb = 40\n", "per_node = 4\n"


@pytest.mark.parametrize(
    ("asked", "own", "left_out", "why"),
    [
        ("partition", "", "", "choose a partition: wide, shared, new"),
        ("max_ranks", "", "", "choose a partition"),
        ("max_time_limit_seconds", NEW, "", "choose a qos: tenth, long, one"),
        ("max_time_limit_seconds", NEW + '\nqos = "tenth"', "", "the time limit, of examplar; set max_time"),
        ("max_ranks", SHARED, PER_NODE, "how many GPUs a node has, of examplar; set ranks_per_node"),
        ("rank_memory_bytes", WIDE, MEMORY, "a rank's memory, of examplar; set rank_memory_gib"),
        ("rank_flops", WIDE, PEAK, "a rank's peak FLOP/s, of examplar; set rank_tflops"),
        ("efficiency", WIDE, "", "what share of its peak training reaches, of examplar; set efficiency"),
        ("units_per_rank_hour", SHARED, "cores = 32\n", "needs the cores of a node, which are not known"),
        ("scheduler", WIDE, 'name = {value = "Slurm", source = "guide"}', "does not tell the scheduler"),
    ],
)
def test_what_nobody_told_is_named_when_it_is_needed(
    tmp_path: Path, asked: str, own: str, left_out: str, why: str
) -> None:
    site = examplar(tmp_path, own, left_out)
    with pytest.raises(ValueError, match=r"there in sites\.toml") as caught:
        getattr(site, asked)
    assert why in str(caught.value)


def test_what_the_operator_tells_stands_in_for_facts(tmp_path: Path) -> None:
    own = """
        unit = "GPU-hour"
        units_per_rank_hour = 1
        ranks_per_node = 2
        rank_memory_gib = 63.5
        rank_tflops = 312
        efficiency = 0.35
        max_ranks = 16
        max_time = "12:00:00"
    """
    site = load_sites(write(tmp_path, f'[fortytwo]\nscratch = "/x"\n{own}'))["fortytwo"]
    assert (site.unit, site.units_per_hour(3), site.units_per_rank_hour) == ("GPU-hour", 3, 1)
    assert (site.rank_memory_bytes, site.rank_flops, site.efficiency) == (int(63.5 * 2**30), 312e12, 0.35)
    assert (site.max_ranks, site.max_time_limit_seconds) == (16, 12 * 3600)
    assert site.resources(3).nodes == 2
    assert site.resources(3).gpus == Fraction(3)


def test_two_budgets_at_once(tmp_path: Path) -> None:
    text = '[d]\ncatalogue = "discoverer-plus"\nscratch = "/x"\n'
    with pytest.raises(ValueError, match="draw on GPU-hour and billing-hour at once: choose a unit"):
        _ = load_sites(write(tmp_path, text))["d"].unit
    chosen = load_sites(write(tmp_path, text + 'unit = "GPU-hour"\n'))["d"]
    assert chosen.units_per_hour(5) == 5
    other = load_sites(write(tmp_path, text + 'unit = "billing-hour"\n'))["d"]
    with pytest.raises(ValueError, match="needs the memory of a node"):
        other.units_per_hour(5)


def test_a_machine_that_nobody_knows_how_it_bills(tmp_path: Path) -> None:
    site = load_sites(write(tmp_path, '[vega]\nscratch = "/x"\n'))["vega"]
    with pytest.raises(ValueError, match="the unit of allocations, of vega; set unit"):
        _ = site.unit


def test_a_slurm_site_is_reached_by_ssh_and_asked_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EUROTRAIN_SSH_CONFIG", "/etc/mine")
    text = '[lumi]\nscratch = "/x"\nhost = "l"\ndata_mover = "m"\npoll = "00:00:05"\nahead = 2\n'
    site = load_sites(write(tmp_path, text))["lumi"]
    assert site.connect(tmp_path) == SshConnection("l", "/x", tmp_path, config=Path("/etc/mine"), carrier="m")
    assert (site.is_slurm, site.watch_seconds, site.poll_seconds, site.ahead) == (True, 0.0, 5.0, 2)
    assert site.lag_seconds >= 60


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[a", "not TOML"),
        ("a = 1", "a must be a table"),
        ('[a]\nscrach = "/x"', "[a]: unknown 'scrach'; did you mean 'scratch'"),
        ('[a]\ncatalogue = "local"', "[a] lacks scratch"),
        ('[a]\ncatalogue = "locl"\nscratch = "/x"', "catalogue: unknown 'locl'; did you mean 'local'"),
        ("[lumi]\nscratch = 3", "[lumi] scratch is 3; it must be a text"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(ValueError, match=r"sites\.toml") as caught:
        load_sites(write(tmp_path, text))
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('partition = "standardg"', "[lumi] partition: unknown 'standardg'; did you mean 'standard-g'"),
        ('unit = "core-hour"', "[lumi] unit: unknown 'core-hour'; known: GPU-hour"),
        ('max_time = "2d"', "[lumi] max_time is '2d'; it must be a time as Slurm writes it"),
        ("max_ranks = 1.5", "[lumi] max_ranks is 1.5; it must be a whole number"),
        ("efficiency = 0", "[lumi] efficiency is 0; it must be more"),
        ("ranks_per_node = 0", "[lumi] ranks_per_node is 0; it must be more"),
        ('modules = "a"', "[lumi] modules is 'a'; it must be a list of texts"),
        ("python = 3.11", "[lumi] python is 3.11; it must be a text"),
        ('environment = "A=1"', "[lumi] environment is 'A=1'; it must be a table such as {NCCL_DEBUG = "),
        ('environment = {"A B" = "1"}', "[lumi] environment.A B is '1'; it must be a variable with a text"),
        ("environment = {A = 1}", "[lumi] environment.A is 1; it must be a variable with a text of one line"),
    ],
)
def test_a_mistake_in_one_line_is_named(tmp_path: Path, line: str, why: str) -> None:
    test_a_mistake_is_named(tmp_path, f'[lumi]\nscratch = "/x"\n{line}', why)


def test_an_unknown_qos_is_named(tmp_path: Path) -> None:
    why = "[leonardo] qos: unknown 'norml'; did you mean 'normal'"
    test_a_mistake_is_named(tmp_path, '[leonardo]\nscratch = "/x"\nqos = "norml"', why)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file; it names your sites"):
        load_sites(tmp_path / "sites.toml")
