"""Turns pages of HTML, and of Mallard (GNOME's help), into plain text without navigation."""

import html.parser
import re

Attributes = list[tuple[str, str | None]]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


VOID = _names("area base br col embed hr img input link meta source track wbr")
# Elements, and classes or ids of elements, that hold no prose.
SKIPPED = _names("head script style nav header footer aside form button select svg noscript")
SKIPPED_NAMES = _names("headerlink related sphinxsidebar docnav banner footer breadcrumbs")
MAIN_IDS = _names("DisplayArea")  # LibreOffice's help has no <main>
PARAGRAPHS = _names(
    "p h1 h2 h3 h4 h5 h6 pre table ul ol dl blockquote section article title note screen"
)
LINES = _names("br div li tr dt dd hr caption figure item list steps terms body main")
CELLS = _names("td th")
VERBATIM = _names("pre")
BLANKS = re.compile(r"\s+")
INVISIBLE = str.maketrans({"\u00a0": " ", "\u200b": None, "\u00ad": None, "\r": None})


class _TextOfPage(html.parser.HTMLParser):
    """Collects the text of a page; if the page marks its main part, of that part alone."""

    def __init__(self, skipped: frozenset[str] = SKIPPED, verbatim: frozenset[str] = VERBATIM):
        super().__init__(convert_charrefs=True)
        self._skipped_tags, self._verbatim = skipped, verbatim
        self._parts: list[str] = []
        self._newlines, self._blank = 2, False  # how the text so far ends
        self._skipped = self._main = ""  # tags of the elements that are open
        self._skipped_depth = self._main_depth = self._pre = 0
        self._done = False  # the main part has ended

    def text(self) -> str:
        """The text so far, without blanks at line ends and with one blank line at a time."""
        text = "".join(self._parts).translate(INVISIBLE)
        text = re.sub(r"[ \t]+\n", "\n", text)
        return re.sub(r"\n{3,}", "\n\n", text).strip("\n")

    def handle_starttag(self, tag: str, attrs: Attributes) -> None:
        if tag == "body":
            self._skipped = ""  # a page may leave out </head>
        if self._done:
            return
        if self._skipped:
            self._skipped_depth += tag == self._skipped
            return
        self._main_depth += tag == self._main
        if self._skips(tag, attrs):
            if tag not in VOID:
                self._skipped, self._skipped_depth = tag, 1
                self._main_depth -= tag == self._main
            return
        if not self._main and _is_main(tag, attrs):
            self._parts.clear()
            self._main, self._main_depth = tag, 1
        self._break(tag)
        self._pre += tag in self._verbatim

    def handle_endtag(self, tag: str) -> None:
        if self._done:
            return
        if self._skipped:
            self._skipped_depth -= tag == self._skipped
            if not self._skipped_depth:
                self._skipped = ""
            return
        if tag not in VOID:
            self._break(tag)
        self._pre = max(0, self._pre - (tag in self._verbatim))
        self._main_depth -= tag == self._main
        self._done = bool(self._main) and self._main_depth <= 0

    def handle_data(self, data: str) -> None:
        if self._done or self._skipped:
            return
        if not self._pre:
            data = BLANKS.sub(" ", data)
            if self._newlines or self._blank:
                data = data.lstrip(" ")
        if data:
            self._put(data)

    def _skips(self, tag: str, attrs: Attributes) -> bool:
        if tag in self._skipped_tags:
            return True
        # Most tags have no attribute, and a generator costs more than the test.
        return bool(attrs) and any(
            value and name in ("class", "id") and not SKIPPED_NAMES.isdisjoint(value.split())
            for name, value in attrs
        )

    def _break(self, tag: str) -> None:
        """End the line, or the paragraph, if `tag` is that of a block."""
        if tag in CELLS and not self._newlines and not self._blank:
            self._put(" ")
        wanted = 2 if tag in PARAGRAPHS else 1 if tag in LINES else 0
        if wanted > self._newlines:
            self._put("\n" * (wanted - self._newlines))

    def _put(self, text: str) -> None:
        self._parts.append(text)
        ending = len(text) - len(text.rstrip("\n"))
        self._newlines = ending + (self._newlines if ending == len(text) else 0)
        self._blank = text.endswith(" ")


class _TextOfMallard(_TextOfPage):
    """The same for Mallard, whose titles hold elements and whose <info> is about the page."""

    # Newer versions of Python take the elements in a <title> for text.
    RCDATA_CONTENT_ELEMENTS = ()  # pyright: ignore[reportGeneralTypeIssues]

    def __init__(self):
        super().__init__(_names("info"), _names("code screen"))


def _is_main(tag: str, attrs: Attributes) -> bool:
    return tag == "main" or any(
        value == "main" if name == "role" else name == "id" and value in MAIN_IDS
        for name, value in attrs
    )


def html_text(page: str) -> str:
    """Strip a page of HTML.

    Args:
      page: the whole page.

    Returns:
      Its text: <pre> as it is, other white space collapsed, a blank line between paragraphs.
    """
    return _strip(_TextOfPage(), page)


def mallard_text(page: str) -> str:
    """Strip a page of Mallard, as `html_text` does one of HTML."""
    return _strip(_TextOfMallard(), page)


def _strip(parser: _TextOfPage, page: str) -> str:
    parser.feed(page)
    parser.close()
    return parser.text()
