"""The demo's text: from a small Django made up here, and from the one that is installed."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from orchestrator import demo_text
from orchestrator.demo_text import LANGUAGES, Document, documents, write

HEADER = 'msgid ""\nmsgstr "Content-Type: text/plain; charset=UTF-8\\n"\n\n'
ENGLISH = """
msgid "Yes"
msgstr ""

msgctxt "a month"
msgid "May"
msgstr ""

msgid "%(count)d day"
msgid_plural "%(count)d days"
msgstr[0] ""
msgstr[1] ""

#, fuzzy
msgid "Removed"
msgstr ""
"""
CZECH = """
msgid "Yes"
msgstr "Ano"

msgctxt "a month"
msgid "May"
msgstr "květen"

msgid "%(count)d day"
msgid_plural "%(count)d days"
msgstr[2] "%(count)d dní"
msgstr[0] "%(count)d den"
msgstr[1] "%(count)d dny"

#, fuzzy
msgid "Remove"
msgstr "Odebráno?"

msgid "Not yet translated"
msgstr ""

#~ msgid "No"
#~ msgstr "Ne"
"""


@pytest.fixture
def django(tmp_path: Path) -> Path:
    put(tmp_path / "conf/locale/en", "django", ENGLISH)
    put(tmp_path / "conf/locale/cs", "django", CZECH)
    put(tmp_path / "conf/locale/eo", "django", CZECH)
    put(
        tmp_path / "contrib/admin/locale/en",
        "djangojs",
        'msgid "Clear"\nmsgstr ""\n\nmsgid "Yes"\nmsgstr ""\n',
    )
    put(tmp_path / "contrib/admin/locale/cs", "djangojs", 'msgid "Sure"\nmsgstr "Ano"\n')
    return tmp_path


def put(locale: Path, domain: str, catalogue: str) -> None:
    folder = locale / "LC_MESSAGES"
    folder.mkdir(parents=True)
    (folder / f"{domain}.po").write_text(HEADER + catalogue)


def test_documents_hold_what_is_translated_for_sure_each_sentence_once(django: Path) -> None:
    assert list(documents(django)) == [
        Document("cs", "conf/django", "Ano\nkvěten\n%(count)d den\n%(count)d dny\n%(count)d dní"),
        Document("en", "conf/django", "Yes\nMay\n%(count)d day\n%(count)d days"),
        Document("en", "contrib/admin/djangojs", "Clear"),
    ]


def test_a_missing_django_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [name for name in sys.modules if name.split(".")[0] == "django"]:
        monkeypatch.delitem(sys.modules, name)
    expected = r"pip install 'eurotrain\[demo\]'"
    with pytest.raises(ValueError, match=expected):
        demo_text.django_folder()
    (tmp_path / "django").mkdir()
    (tmp_path / "django" / "__init__.py").touch()  # a distribution's package without its catalogues
    with pytest.raises(ValueError, match=expected):
        write(tmp_path / "text.jsonl")
    assert not (tmp_path / "text.jsonl").exists()


def test_the_installed_django_speaks_23_official_languages(tmp_path: Path) -> None:
    characters = write(tmp_path / "text.jsonl")
    assert tuple(characters) == LANGUAGES
    assert len(LANGUAGES) == 23
    assert min(characters.values()) > 10_000
    lines = [json.loads(line) for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    counted: Counter[str] = Counter()
    for line in lines:
        counted[line["language"]] += len(line["text"])
    assert counted == characters
    text = {
        language: "\n".join(x["text"] for x in lines if x["language"] == language) for language in LANGUAGES
    }
    assert "Ugyldig" in text["da"]
    assert "Σεπτέμβριος" in text["el"]
    assert "„%(value)s“" in text["de"]


def test_the_same_django_gives_the_same_bytes_and_is_not_imported(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from orchestrator import demo_text;"
        "demo_text.write(Path(sys.argv[1])); print('django' in sys.modules, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-P", "-c", program, str(tmp_path / "child.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"})
    assert done.stdout == "False False\n"
    write(tmp_path / "here.jsonl")
    assert (tmp_path / "child.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()
