"""Removes what a translation has left in English."""

import re

from benchmarks.corpus.sources import LANGUAGES, OTHER_LANGUAGES

ENGLISH, *_ = LANGUAGES
TRANSLATED = {*LANGUAGES, OTHER_LANGUAGES} - {ENGLISH}
SHORTEST = 40  # characters of a line that is compared; shorter ones are names and code


class EnglishLines:
    """The lines of all English documents so far, which must come before their translations."""

    def __init__(self):
        self._lines: set[str] = set()

    def remove(self, text: str, domain: str) -> str:
        """Remove from a translation the lines that an English document has.

        Args:
          text: a document; one of the domain ENGLISH is remembered.
          domain: of the document.

        Returns:
          The text; it is unchanged unless the domain is one of TRANSLATED.
        """
        if domain == ENGLISH:
            self._lines.update(line for line in text.splitlines() if len(line) >= SHORTEST)
        if domain not in TRANSLATED:
            return text
        kept = [line for line in text.splitlines() if line not in self._lines]
        return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip("\n")
