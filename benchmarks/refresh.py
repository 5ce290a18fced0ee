"""Writes measured numbers into README.md and docs/: ``python benchmarks/refresh.py`` after a benchmark.

A number in the text stands between two comments, which no rendered page shows::

    <!-- result: streaming_diloco.json#wire.ratio.median .0f -->152<!-- /result -->

That is ``wire.ratio.median`` of ``benchmarks/results/streaming_diloco.json`` (a number between dots indexes a list),
formatted by the Python format specification ``.0f``. Between ``<!-- compatibility -->`` and its end stands the table of
``compatibility.json``. ``tests/test_readme.py`` fails where the text says otherwise.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fulgurite.commands.compatibility import render as table_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OPENING = "<!-- result:"
SPAN = re.compile(
    r"(?P<opening><!-- result: (?P<file>[\w./-]+\.json)#(?P<path>\S+) (?P<spec>\S+) -->)"
    r"(?P<value>[^<\n]*)(?P<closing><!-- /result -->)"
)
TABLE = re.compile(r"(?<=<!-- compatibility -->\n).*?(?=<!-- /compatibility -->)", re.DOTALL)


def documents(root: Path = ROOT) -> list[Path]:
    """The README and every page of the documentation."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def render(text: str, results: Path = RESULTS) -> str:
    """The text with each value read anew from the results.

    Raises:
        ValueError: a comment opens a value and is not of the form above, or its result is missing or does not format.
    """

    def fresh(span: re.Match[str]) -> str:
        try:
            value = _look_up(json.loads((results / span["file"]).read_text()), span["path"])
            return f"{span['opening']}{value:{span['spec']}}{span['closing']}"
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{span['opening']}: {type(error).__name__}: {error}") from error

    rendered, count = SPAN.subn(fresh, text)
    if count != text.count(OPENING):
        broken = next(line for line in text.splitlines() if line.count(OPENING) != len(SPAN.findall(line)))
        raise ValueError(
            f"not of the form '{OPENING} FILE.json#path.to.value FORMAT -->VALUE<!-- /result -->': {broken}"
        )
    return TABLE.sub(lambda table: _table(results), rendered)


def _table(results: Path) -> str:
    return f"\n{table_of(json.loads((results / 'compatibility.json').read_text()))}\n\n"


def stale(text: str, results: Path = RESULTS) -> Iterator[str]:
    """Names each value that the results do not give."""
    for old, new in zip(SPAN.finditer(text), SPAN.finditer(render(text, results)), strict=True):
        if old["value"] != new["value"]:
            yield f"{old['opening']} is {new['value']}, the text says {old['value']}"
    if any(table != _table(results) for table in TABLE.findall(text)):
        yield "the table of compatibility.json is another one"


def _look_up(node: Any, path: str) -> Any:
    for part in path.split("."):
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node


def main() -> None:
    for document in documents():
        text = document.read_text()
        changes = list(stale(text))
        if changes:
            document.write_text(render(text))
        print(f"{document.relative_to(ROOT)}: {len(SPAN.findall(text))} numbers, {len(changes)} changed")
        print(*(f"  {change}" for change in changes), sep="\n", end="\n" if changes else "")


if __name__ == "__main__":
    main()
