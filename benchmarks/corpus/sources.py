"""The packages of the corpus, and which of their files belong to which domain."""

import dataclasses
import re
from collections.abc import Callable, Iterable

from benchmarks.corpus.markup import html_text, mallard_text
from benchmarks.corpus.split import split_entries, split_metamath

Convert = Callable[[str], Iterable[str]]


def whole(text: str) -> Iterable[str]:
    """The file as one document."""
    return (text,)


def html(text: str) -> Iterable[str]:
    """The text of a page of HTML as one document."""
    return (html_text(text),)


def mallard(text: str) -> Iterable[str]:
    """The text of a page of GNOME's help as one document."""
    return (mallard_text(text),)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Takes the files whose path matches a pattern."""

    domain: str
    pattern: str  # searched in the path without .gz or .dz
    convert: Convert = whole  # from the text of a file to its documents

    def takes(self, path: str) -> bool:
        """True if the pattern is found in the path."""
        return re.search(self.pattern, path) is not None


@dataclasses.dataclass(frozen=True)
class Source:
    """A package and its rules; the first that takes a file counts."""

    package: str
    rules: tuple[Rule, ...]

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains of the rules, in their order."""
        return tuple(dict.fromkeys(rule.domain for rule in self.rules))


# Languages with a domain of their own -> names of their folders.  English comes first: pages that
# are not translated are English in every folder, and the first copy of a document is kept.
LANGUAGES = {
    "lang_en": ("en-US", "C"),
    "lang_de": ("de-DE", "de"),
    "lang_es": ("es-ES", "es"),
    "lang_fr": ("fr-FR", "fr"),
    "lang_it": ("it-IT", "it"),
    "lang_ja": ("ja-JP", "ja"),
    "lang_pt": ("pt-BR", "pt_BR"),
    "lang_ru": ("ru-RU", "ru"),
    "lang_zh": ("zh-CN", "zh_CN"),
}
OTHER_LANGUAGES = "languages"
# LibreOffice has a package per language.
OFFICE = {
    "en-us": "lang_en",
    "de": "lang_de",
    "es": "lang_es",
    "fr": "lang_fr",
    "it": "lang_it",
    "ja": "lang_ja",
    "pt-br": "lang_pt",
    "ru": "lang_ru",
    "zh-cn": "lang_zh",
}


def by_language(below: str, suffix: str, convert: Convert) -> tuple[Rule, ...]:
    """Rules for files in a folder per language.

    Args:
      below: pattern of the path up to the folders.
      suffix: pattern of the file's suffix.
      convert: from the text of a file to its documents.
    """
    named = tuple(
        Rule(domain, f"{below}/({'|'.join(folders)})/.*{suffix}$", convert)
        for domain, folders in LANGUAGES.items()
    )
    other = Rule(OTHER_LANGUAGES, f"{below}/(?!en|C/|index)[^/]+/.*{suffix}$", convert)
    return (*named, other)


def _java(package: str) -> Source:
    """Pages of javadoc, without lists of uses, of all names and of trees."""
    pattern = r"/api/(?!.*(-use|index-|-tree)).+/.*\.html$"
    return Source(package, (Rule("java_docs", pattern, html),))


PYTHON_DOC = Source(
    "python3.11-doc",
    (
        Rule(
            "python_docs", r"/html/(?!genindex|py-modindex|search|_static|_sources).*\.html$", html
        ),
    ),
)
PERL_DOC = Source("perl-doc", (Rule("perl_docs", r"\.pod$"),))
METAMATH = Source("metamath-databases", (Rule("proofs", r"\.mm$", split_metamath),))
WORDNET = Source("dict-wn", (Rule("dictionaries", r"/wn\.dict$", split_entries),))
GNOME = Source("gnome-user-docs", by_language(r"^usr/share/help", r"\.page", mallard))
PYTHON_TESTS = Source("libpython3.11-testsuite", (Rule("python_code", r"\.py$"),))

FULL = (
    Source(
        "linux-source-6.1",
        (
            # Without the register lists of AMD's chips, 400 of the 1177 MB of C code.
            Rule("kernel_c", r"\.tar\.xz/(?!.*/amd/include/asic_reg/).*\.[ch]$"),
            Rule("kernel_docs", r"\.tar\.xz/[^/]+/Documentation/(?!translations/).*\.(rst|txt)$"),
        ),
    ),
    Source("rust-src", (Rule("rust_code", r"\.rs$"),)),
    Source("golang-1.19-src", (Rule("go_code", r"\.go$"),)),
    Source("libpython3.11-stdlib", (Rule("python_code", r"\.py$"),)),
    PYTHON_TESTS,
    _java("openjdk-17-doc"),
    PYTHON_DOC,
    PERL_DOC,
    METAMATH,
    Source("dict-gcide", (Rule("dictionaries", r"/gcide\.dict$", split_entries),)),
    WORDNET,
    Source("debian-handbook", by_language(r"/html", r"\.html", html)),
    GNOME,
    *(
        Source(f"libreoffice-help-{name}", (Rule(domain, r"/text/.*\.html$", html),))
        for name, domain in OFFICE.items()
    ),
)

# The same domains from small packages, as far as there are any.
SMALL = (
    Source("linux-libc-dev", (Rule("kernel_c", r"\.h$"),)),
    Source("librust-syn-dev", (Rule("rust_code", r"\.rs$"),)),
    Source("golang-golang-x-tools-dev", (Rule("go_code", r"\.go$"),)),
    PYTHON_TESTS,
    _java("libcommons-lang3-java-doc"),
    PYTHON_DOC,
    PERL_DOC,
    METAMATH,
    WORDNET,
    GNOME,
)
SMALL_DOMAIN_BYTES = 1_000_000  # of text in each domain
