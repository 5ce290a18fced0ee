"""README.md and docs/ keep their word: numbers, links, code."""

import ast
import importlib
import json
import re
import textwrap
from pathlib import Path

import pytest

from tests.suites.scripts import load_benchmark

ROOT = Path(__file__).parents[1]


refresh = load_benchmark("refresh")
each_document = pytest.mark.parametrize("document", refresh.documents(), ids=lambda path: path.name)

FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>```+|~~~+) *(?P<language>\w*).*?\n(?P<body>.*?)^(?P=indent)(?P=fence) *$", re.M | re.S
)
LINK = re.compile(r"""\]\(\s*<?(?P<target>[^)\s>]+)|(?:src|srcset|href)=["'](?P<attribute>[^"']+)["']""")
REMOTE = re.compile(r"[a-z][a-z0-9+.-]*:|//")  # a scheme or a host
HEADING = re.compile(r"^#+ (.*)$", re.M)
ARXIV = re.compile(r"\b\d{4}\.\d{4,5}\b")


def code_blocks(text: str) -> list[str]:
    return [textwrap.dedent(block["body"]) for block in FENCE.finditer(text) if block["language"] in ("python", "py")]


def links(text: str) -> list[str]:
    prose = re.sub(r"`[^`\n]+`", "", FENCE.sub("", text))
    return [link["target"] or link["attribute"] for link in LINK.finditer(prose)]


def broken_links(text: str, folder: Path) -> list[str]:
    """Those within the repository whose file, or whose place in it, is not there."""
    broken = []
    for target in links(text):
        path, _, place = target.partition("#")
        page = folder / path
        if not REMOTE.match(target) and not (
            page.exists() and (not place or has_place(page.read_text() if path else text, place))
        ):
            broken.append(target)
    return broken


def has_place(text: str, place: str) -> bool:
    """Whether a page has a heading or a documented name (``::: module`` stands for its names) of that address."""
    prose = FENCE.sub("", text)
    headings = {re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in HEADING.findall(prose)}
    modules = re.findall(r"^::: (\S+)$", prose, re.M)
    module, _, name = place.rpartition(".")
    documented = place in modules or (module in modules and hasattr(importlib.import_module(module), name))
    return documented or place in {re.sub(r"[-\s]+", "-", heading) for heading in headings}


def unresolved_imports(code: str) -> list[str]:
    """The names that the code would import from Fulgurite and cannot."""
    missing = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            wanted = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            wanted = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for module, name in wanted:
            if module.partition(".")[0] == "fulgurite" and not _resolves(module, name):
                missing.append(f"{module}.{name}" if name else module)
    return missing


def _resolves(module: str, name: str | None) -> bool:
    try:
        imported = importlib.import_module(module)
        if name is not None and not hasattr(imported, name):
            importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "fulgurite":
            raise
        return False
    return True


def test_the_readme_quotes_measured_numbers() -> None:
    assert refresh.SPAN.search((ROOT / "README.md").read_text()), "README.md quotes no result"


@each_document
def test_numbers_are_the_measured_ones(document: Path) -> None:
    assert list(refresh.stale(document.read_text())) == [], "run `python benchmarks/refresh.py`"


# What stands at the root is a page too, by a snippet in docs/.
@pytest.mark.parametrize("folder", [ROOT, ROOT / "docs"], ids=["root", "docs"])
@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_a_page_from_the_root_lead_somewhere(document: str, folder: Path) -> None:
    assert broken_links((ROOT / document).read_text(), folder) == []


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    assert broken_links(document.read_text(), document.parent) == []


@each_document
def test_addresses_are_well_formed(document: Path) -> None:
    text = document.read_text()
    assert [target for target in links(text) if REMOTE.match(target) and not target.startswith("https://")] == []
    for shown, address in re.findall(r"\[([^\]]*)\]\(https?://(?:www\.)?arxiv\.org/([^)]*)\)", text):
        assert re.fullmatch(rf"abs/{ARXIV.pattern}", address)
        assert shown.endswith(address.removeprefix("abs/")), f"{shown} leads to {address}"


def test_pages_cite_the_papers_that_the_docstrings_name() -> None:
    sources = [path for room in ("strategies", "callbacks", "plugins") for path in (ROOT / room).rglob("*.py")]
    named = {paper for path in sources for paper in re.findall(rf"arXiv ({ARXIV.pattern})", path.read_text())}
    cited = {paper for page in refresh.documents() for paper in ARXIV.findall(page.read_text())}
    assert named - cited == set()
    in_table = set(re.findall(rf"abs/({ARXIV.pattern})", (ROOT / "README.md").read_text()))
    assert in_table - {paper for path in sources for paper in ARXIV.findall(path.read_text())} == set()


@each_document
def test_code_compiles_and_its_imports_resolve(document: Path) -> None:
    for code in code_blocks(document.read_text()):
        compile(code, document.name, "exec")
        assert unresolved_imports(code) == []


# The checks themselves, on text where the answer is known.


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "bench.json").write_text(json.dumps({"wire": {"bytes": [1234567, 89]}, "share": 0.123, "name": "gloo"}))
    return tmp_path


@pytest.mark.parametrize(
    ("path", "spec", "value"),
    [
        ("wire.bytes.0", ",.0f", "1,234,567"),
        ("wire.bytes.1", ".1f", "89.0"),
        ("share", ".0%", "12%"),
        ("share", ".2g", "0.12"),
        ("name", "s", "gloo"),
    ],
)
def test_refresh_writes_the_value_and_nothing_else(results: Path, path: str, spec: str, value: str) -> None:
    old = f"| a | <!-- result: bench.json#{path} {spec} -->old<!-- /result --> B | twice: **{{}}** |\n"
    new = old.replace("old", value)
    assert list(refresh.stale(old, results)) == [
        f"<!-- result: bench.json#{path} {spec} --> is {value}, the text says old"
    ]
    assert refresh.render(old, results) == refresh.render(new, results) == new
    assert list(refresh.stale(new, results)) == []


@pytest.mark.parametrize(
    ("span", "cause"),
    [
        ("<!-- result: none.json#share .1f -->1<!-- /result -->", "FileNotFoundError"),
        ("<!-- result: bench.json#wire.seconds .1f -->1<!-- /result -->", "KeyError: 'seconds'"),
        ("<!-- result: bench.json#wire.bytes.2 .1f -->1<!-- /result -->", "IndexError"),
        ("<!-- result: bench.json#share.x .1f -->1<!-- /result -->", "TypeError"),
        ("<!-- result: bench.json#name .1f -->1<!-- /result -->", "ValueError: Unknown format code"),
        ("<!-- result: bench.json#share -->1<!-- /result -->", "not of the form"),
        ("<!-- result: bench.json#share .1f -->1", "not of the form"),
    ],
)
def test_refresh_refuses_what_it_cannot_read(results: Path, span: str, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        refresh.render(f"Good: <!-- result: bench.json#share .1f -->0.1<!-- /result -->.\nBad: {span}.\n", results)


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "plot.png").touch()
    (tmp_path / "page.md").write_text("## `Two` words, once\n```\n# fenced\n```\n::: fulgurite.callbacks\n")
    text = """
    # Here: it is
    [a](plot.png) ![b](plot.png "title") <img src="plot.png"> [c](https://example.org/none) [d](#here-it-is)
    [h](#nowhere) [i](page.md#two-words-once) [j](page.md#fenced)
    [k](page.md#fulgurite.callbacks.log_figure) [l](page.md#fulgurite.no)
    [![e](no.png)](gone.md) <img src="lost.svg"> `[f](code.md)`
    ```
    [g](fenced.md)
    ```
    """
    text = textwrap.dedent(text)
    expected = ["#nowhere", "page.md#fenced", "page.md#fulgurite.no", "no.png", "gone.md", "lost.svg"]
    assert broken_links(text, tmp_path) == expected


def test_code_is_found_in_fences_of_python_alone() -> None:
    text = """
```python title="fit.py"
x = 1
```

=== "tab"

    ```py
    if x:
        y = 2
    ```

```bash
make
```
"""
    assert code_blocks(text) == ["x = 1\n", "if x:\n    y = 2\n"]


def test_unresolved_imports_are_found() -> None:
    code = """
import fulgurite.callbacks, fulgurite.nothing, lightning.nothing
from fulgurite.callbacks import log_figure, log_nothing
from fulgurite import strategies, others
def later():
    from fulgurite.callbacks.figures import log_figure
"""
    expected = ["fulgurite.nothing", "fulgurite.callbacks.log_nothing", "fulgurite.others"]
    assert sorted(unresolved_imports(code)) == sorted(expected)
