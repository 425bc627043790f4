"""The demo's text: the sentences of Django's user interface, in every official EU language it speaks.

They come with Django's wheel (BSD licence) as gettext catalogues, so that the demo needs no hub and no
download of its own. Only the files are read: Django is never imported.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polib

from clusters.paths import write_atomically

# The 24 official languages without Maltese, which Django does not speak.
# fmt: off
LANGUAGES = (
    "bg", "cs", "da", "de", "el", "en", "es", "et", "fi", "fr", "ga", "hr",
    "hu", "it", "lt", "lv", "nl", "pl", "pt", "ro", "sk", "sl", "sv",
)
# fmt: on
SOURCE_LANGUAGE = "en"  # its catalogues hold the sentences as message ids, without translations


@dataclass(frozen=True)
class Document:
    """The sentences of one component of Django in one language, one a line."""

    language: str
    component: str  # such as "contrib/admin/djangojs"
    text: str


def write(path: Path) -> dict[str, int]:
    """Write the text as JSON lines {"text", "language"}; returns the characters of each language.

    The same Django gives the same bytes. Raises ValueError when Django is not installed.
    """
    characters: Counter[str] = Counter()
    lines = []
    for document in documents(django_folder()):
        characters[document.language] += len(document.text)
        record = {"text": document.text, "language": document.language}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_atomically(path, "".join(lines))
    return dict(sorted(characters.items()))


def django_folder() -> Path:
    """Where Django lies. Raises ValueError when it is not installed, or without its catalogues."""
    spec = importlib.util.find_spec("django")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / "conf" / "locale" / SOURCE_LANGUAGE).is_dir():
        raise ValueError("the demo's text comes out of Django's wheel: pip install 'eurotrain[demo]'")
    return folder


def documents(folder: Path) -> Iterator[Document]:
    """All documents under Django's folder, component by component, languages in alphabetical order.

    A sentence that a language has in several components stays in the first one only.
    """
    seen: dict[str, set[str]] = {language: set() for language in LANGUAGES}
    for locale in _locales(folder):
        domains = sorted(path.name for path in (locale / SOURCE_LANGUAGE / "LC_MESSAGES").glob("*.po"))
        for domain in domains:
            component = str((locale.parent / domain).relative_to(folder).with_suffix(""))
            for language in LANGUAGES:
                catalogue = locale / language / "LC_MESSAGES" / domain
                sentences = list(_unseen(_sentences(catalogue, language), seen[language]))
                if sentences:
                    yield Document(language, component, "\n".join(sentences))


def _locales(folder: Path) -> list[Path]:
    return [folder / "conf" / "locale", *sorted(folder.glob("contrib/*/locale"))]


def _sentences(catalogue: Path, language: str) -> Iterator[str]:
    """What a catalogue says, in its own order, every plural form by itself; nothing for an absent one."""
    if not catalogue.exists():
        return
    for entry in polib.pofile(str(catalogue)):
        if entry.obsolete or entry.fuzzy:  # a fuzzy translation is the tool's guess
            continue
        if language == SOURCE_LANGUAGE:
            yield from (entry.msgid, entry.msgid_plural)
        else:
            yield from (entry.msgstr, *(entry.msgstr_plural[form] for form in sorted(entry.msgstr_plural)))


def _unseen(sentences: Iterator[str], seen: set[str]) -> Iterator[str]:
    for sentence in sentences:
        if sentence.strip() and sentence not in seen:
            seen.add(sentence)
            yield sentence
