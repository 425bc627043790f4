"""Sites: the catalogue and the operator's file, and what is said of a mistake in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from clusters.site import catalogue_names, load_sites


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "sites.toml"
    path.write_text(text)
    return path


def test_a_site_is_the_catalogue_and_the_operators_own_part(tmp_path: Path) -> None:
    path = write(tmp_path, '[mine]\ncatalogue = "local"\nscratch = "/x"\naccount = "p1"\n')
    site = load_sites(path)["mine"]
    assert (site.name, site.scratch, site.account, site.unit) == ("mine", Path("/x"), "p1", "core-hour")
    assert site.units_per_hour(4) == 4 * site.units_per_rank_hour


def test_every_machine_of_the_catalogue_loads(tmp_path: Path) -> None:
    assert catalogue_names()
    text = "".join(f'["{name}"]\nscratch = "/x"\n' for name in catalogue_names())
    assert sorted(load_sites(write(tmp_path, text))) == catalogue_names()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[a", "not TOML"),
        ("a = 1", "a must be a table"),
        ('[a]\nscrach = "/x"', "unknown 'scrach'; did you mean 'scratch'"),
        ('[a]\ncatalogue = "local"', "lacks scratch"),
        ('[a]\ncatalogue = "locl"\nscratch = "/x"', "did you mean 'local'"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why.replace("[", r"\[")):
        load_sites(write(tmp_path, text))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file; it names your sites"):
        load_sites(tmp_path / "sites.toml")
