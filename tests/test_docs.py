"""README and documentation: tables are those of the results, blocks run, commands parse, links lead somewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("timm")
pytest.importorskip("lightning.pytorch")

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN, SHOWN = {"python", "sh", "yaml"}, {"text", "console"}  # languages that are tried here, and those that are output
FENCE = re.compile(r"^```(?P<language>[a-z]*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>[^>]+) -->\s*\Z")
OVER = re.compile(r"<!-- over: (?P<config>[\w/.]+) -->\s*\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its code, the line that it starts on, and the comment in front of it."""

    language: str
    code: str
    line: int
    before: str

    @property
    def not_run(self) -> str | None:
        """Why it is not run; None where it is."""
        found = NOT_RUN.search(self.before)
        return found and found["reason"]


def blocks(text: str, *languages: str) -> list[Block]:
    """Return the fenced blocks of a page, of these languages, all where none is given."""
    return [
        Block(match["language"], match["code"], text.count("\n", 0, match.start("code")) + 1, text[: match.start()])
        for match in FENCE.finditer(text)
        if not languages or match["language"] in languages
    ]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands(code: str) -> Iterator[list[str]]:
    """Return the words of each line of a shell block; a line that ends in a backslash goes on in the next one."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # variables in front of the command
            words = words[1:]
        if words:
            yield words


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield
    for name in ("update_tables", "summarize_results"):
        sys.modules.pop(name, None)


# Tables


def test_each_table_is_the_one_that_its_script_wrote(scripts: None) -> None:
    from update_tables import BLOCK, pages, updated

    texts = {page: page.read_text(encoding="utf-8") for page in pages(ROOT)}
    assert sum(len(BLOCK.findall(text)) for text in texts.values()) >= 10
    late = [name_of(page) for page, text in texts.items() if updated(text, ROOT / "results") != text]
    assert late == [], "run: python scripts/update_tables.py"


def test_a_table_out_of_date_is_noticed(scripts: None, tmp_path: Path) -> None:
    from update_tables import updated

    (tmp_path / "x.md").write_text("| new |\n", encoding="utf-8")
    old = "a\n<!-- table: x -->\n\n| old |\n\n<!-- end -->\nb"
    assert updated(old, tmp_path) == "a\n<!-- table: x -->\n\n| new |\n\n<!-- end -->\nb"


def test_the_summary_in_the_readme_follows_from_the_results(scripts: None) -> None:
    from summarize_results import summary

    assert summary(ROOT / "results") == (ROOT / "results" / "summary.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("points", "low", "high", "undecided"), [(8.0, 5.0, 11.0, False), (8.0, -1.0, 17.0, True), (2.0, 1.0, 3.0, True)]
)
def test_a_difference_that_chance_explains_is_called_undecided(
    scripts: None, points: float, low: float, high: float, undecided: bool
) -> None:
    from summarize_results import row

    assert ("undecided" in row("x", 50, 50 + points, points, low, high, 3)) == undecided
    assert row("x", 50, 50 + points, points, low, high, 2).endswith(": two seeds | 2 |")


def figures(text: str) -> set[str]:
    """Return the decimal numbers of a page's prose: not those of blocks, code, copied tables, links and versions."""
    text = re.sub(
        r"<!-- table:.*?<!-- end -->|^```.*?^```$|`[^`]*`|\]\([^)]*\)", " ", text, flags=re.DOTALL | re.MULTILINE
    )
    text = re.sub(r"(?:Python|torch) \d+\.\d+", " ", text)
    return set(re.findall(r"(?<![\d.])\d+\.\d+(?![\d.]*\d)", text))


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in ("changelog.md",)], ids=name_of)
def test_every_figure_in_the_prose_is_one_that_a_script_printed(page: Path) -> None:
    printed = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "results").glob("*.md"))
    known = set(re.findall(r"\d+\.\d+", printed))
    assert figures(page.read_text(encoding="utf-8")) - known == set()


def test_a_figure_that_was_made_up_is_found_and_code_is_none() -> None:
    text = "It is 99.87 % of `0.1` with Python 3.11.\n\n```python\nlr = 0.003\n```\n[Wu](https://x/2105.07576)"
    assert figures(text) == {"99.87"}


# Blocks


def test_a_block_is_found_with_its_line_and_the_reason_for_which_it_is_not_run() -> None:
    text = "a\n\n```python\nx = 1\n```\n\n<!-- not run: needs two GPUs -->\n\n```sh\nls\n```\n"
    assert [(b.language, b.code, b.line, b.not_run) for b in blocks(text)] == [
        ("python", "x = 1\n", 4, None),
        ("sh", "ls\n", 10, "needs two GPUs"),
    ]
    assert [b.language for b in blocks(text, "sh")] == ["sh"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_is_in_a_language_that_is_tried_or_is_output(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert {block.language for block in blocks(text)} <= RUN | SHOWN
    assert len(blocks(text)) * 2 == len(re.findall(r"^[ >]*```", text, re.MULTILINE)), "an indented or open fence"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page.read_text(encoding="utf-8"), "python")], ids=name_of
)
def test_every_python_block_of_a_page_runs_one_after_the_other(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a reader runs them who copies the page from its top; the README's stand alone, each of them."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "documentation"}
    for block in blocks(page.read_text(encoding="utf-8"), "python"):
        if block.not_run:
            continue
        if page == README:
            names = {"__name__": "documentation"}
        code = compile("\n" * (block.line - 1) + block.code, name_of(page), "exec")  # so that errors name the line
        exec(code, names)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p.read_text(encoding="utf-8"), "sh")], ids=name_of)
def test_every_command_of_a_page_is_one_that_there_is(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for block in blocks(page.read_text(encoding="utf-8"), "sh"):
        for words in commands(block.code):
            if words[0] == "torchrun" and "finetune_bn.cli" in words:
                words = ["finetune-bn", *words[words.index("finetune_bn.cli") + 1 :]]
            if words[:2] in (["finetune-bn", "configs"], ["finetune-bn", "init"]):
                assert_runs(words[1:], tmp_path)
            elif words[:3] == ["finetune-bn", "predict", "--model"]:
                assert_reaches_the_model_file(words[1:])
            elif words[0] == "finetune-bn":
                assert_parses(words[1:])
            elif words[0] == "make":
                targets = [word for word in words[1:] if "=" not in word]
                assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), words
            elif words[0] == "python" and words[1].endswith(".py"):
                assert (ROOT / words[1]).is_file(), words
            else:
                assert words[0] in ("pip", "git", "cd", "python", "pytest"), f"{words}: what is this?"


def assert_runs(arguments: list[str], folder: Path) -> None:
    """Run a command that takes no time, on a folder of two classes where it wants images."""
    from PIL import Image

    from finetune_bn.cli import main

    here = Path.cwd()
    os.chdir(folder)
    try:
        for name in ("cat", "dog"):
            images = folder / "path" / "to" / "images" / name
            images.mkdir(parents=True, exist_ok=True)
            for number in range(6):
                Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(images / f"{number}.png")
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            main(arguments)
    finally:
        os.chdir(here)
    assert output.getvalue()


def assert_reaches_the_model_file(arguments: list[str]) -> None:
    """Assert that all is well with the arguments but that the file which they name is not there."""
    from finetune_bn.cli import main

    with pytest.raises(SystemExit, match=f"got '{arguments[2]}'"):
        main(arguments)


_parsed: set[tuple[str, ...]] = set()


def assert_parses(arguments: list[str]) -> None:
    """Assert that the command takes these arguments; nothing is built or trained. Once for each set of arguments."""
    pytest.importorskip("jsonargparse")
    if "metric_learning" in arguments:
        pytest.importorskip("pytorch_metric_learning")
    from finetune_bn.cli import main

    if tuple(arguments) in _parsed:
        return
    output = io.StringIO()
    argv, sys.argv = sys.argv, ["finetune-bn"]  # Lightning warns of others beside the arguments given
    try:
        with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as ended:
            main([*arguments, "--print_config"])
    finally:
        sys.argv = argv
    assert ended.value.code in (0, None), f"{' '.join(arguments)}: {ended.value.code}"
    assert "batch_norm:" in output.getvalue()
    _parsed.add(tuple(arguments))


def test_a_command_with_a_wrong_argument_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(AssertionError, match="affinity"):
        assert_parses(["fit", "--config", "configs/quickstart.yaml", "--batch_norm.policy.affinity", "none"])


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p.read_text(encoding="utf-8"), "yaml")], ids=name_of)
def test_every_piece_of_a_config_fits_over_a_config(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for block in blocks(page.read_text(encoding="utf-8"), "yaml"):
        over = OVER.search(block.before)
        piece = tmp_path / "piece.yaml"
        piece.write_text(block.code, encoding="utf-8")
        base = ["--config", over["config"]] if over else []
        _parsed.discard(("fit", *base, "--config", str(piece)))
        assert_parses(["fit", *base, "--config", str(piece)])


# Links and size


def test_every_file_that_the_readme_links_to_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", README.read_text(encoding="utf-8")) if "://" not in link]
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_readme_is_one_page() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) < 200


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [name for name in ("mkdocs", "material", "mkdocstrings_handlers") if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f"the site is not built: {', '.join(missing)} not installed (pip install 'finetune-bn[docs]')")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    # tests/scripts/test_notebooks.py runs their cells, on a small network.
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "FINETUNE_BN_NOTEBOOKS": "not run"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


class _Fetched(HTMLParser):
    """What a browser loads by itself when it shows a page, and what the page links to on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        loads = {"script": "src", "img": "src", "iframe": "src", "source": "src"}.get(tag)
        if tag == "link" and named.get("rel") in ("stylesheet", "preconnect", "preload", "icon"):
            loads = "href"
        if loads and named.get(loads):
            self.found.append(named[loads])


def test_the_site_builds_strictly_and_shows_every_page(site: Path) -> None:
    pages = [path.relative_to(ROOT / "docs").with_suffix(".html") for path in sorted((ROOT / "docs").rglob("*.md"))]
    assert [str(page) for page in pages if not (site / page).is_file()] == []


def test_the_site_loads_nothing_from_the_network(site: Path) -> None:
    foreign, local = [], 0
    for page in site.rglob("*.html"):
        parser = _Fetched()
        parser.feed(page.read_text(encoding="utf-8"))
        local += len(parser.found)
        foreign += [f"{page.name}: {url}" for url in parser.found if re.match(r"(https?:)?//", url)]
    assert local > 100
    assert foreign == []
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^)\"']*", styles) == []


def test_every_name_of_the_face_is_in_the_reference(site: Path) -> None:
    import finetune_bn
    from finetune_bn import callbacks

    text = "".join(path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html"))
    there = set(re.findall(r'id="(finetune_bn[\w.]*)"', text))
    missing = []
    for package in (finetune_bn, callbacks):
        for name in package.__all__:
            thing = getattr(package, name)
            if not {f"{package.__name__}.{name}", f"{thing.__module__}.{name}"} & there:
                missing.append(name)
    assert missing == [], "give it a place in docs/api"
