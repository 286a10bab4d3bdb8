"""A domain-labelled text corpus from Debian packages; `python -m benchmarks.corpus` makes it."""
