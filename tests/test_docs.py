"""The docs match the code."""

import inspect
import re
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

from generator_svc.engine import Engine

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_sections_are_up_to_date(page: Path, generate: ModuleType) -> None:
    """`make docs` would change nothing: settings, metrics, errors and modules are current."""
    text = page.read_text()

    assert generate.renewed(text) == text, f"{page.name} is out of date: run make docs"


def test_every_generated_section_has_a_page(generate: ModuleType) -> None:
    """Everything that is generated is on a page."""
    shown = re.findall(r"<!-- begin ([\w-]+) -->", "\n".join(page.read_text() for page in PAGES))

    assert sorted(generate.SECTIONS) == sorted(shown)


def test_the_architecture_names_every_package(generate: ModuleType) -> None:
    """Each folder with code has a line, to help newcomers."""
    page = (ROOT / "docs" / "architecture.md").read_text()

    assert [] == [folder for folder in generate.folders() if f"| `{folder}` |" not in page]


def test_every_decision_has_a_date_and_a_status() -> None:
    """They are under the title, to show at a glance whether the decision is current."""
    line = re.compile(r"# \d+\. .+\n\n\d{4}-\d\d-\d\d\. Status: (Accepted|Superseded by \d+)[.;]")

    assert [] == [
        page.name
        for page in (ROOT / "docs" / "decisions").glob("*.md")
        if not line.match(page.read_text())
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    """Relative links name files that exist."""
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())

    assert [] == [target for target in targets if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    """Every `make …` on a page is a target in the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    told = set(re.findall(r"(?:^    |`)make ([a-z-]+)", page.read_text(), re.MULTILINE))

    assert set() == told - targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_variables_exist(page: Path, generate: ModuleType) -> None:
    """Every TRIVIUM_… variable on a page is one that the code reads."""
    known = {"TRIVIUM_CACHE", "TRIVIUM_PROTOS", "TRIVIUM_TEST_BROWSER"}
    for cls in (
        generate.FacadeSettings,
        generate.TokenizerSettings,
        generate.GeneratorSettings,
    ):
        known |= {f"{cls.model_config['env_prefix']}{name}".upper() for name in cls.model_fields}
    named = set(re.findall(r"\bTRIVIUM_[A-Z_]*[A-Z](?![A-Z_])", page.read_text()))

    assert set() == named - known


def test_the_readme_quotes_the_engine() -> None:
    """The README quotes the engine's step verbatim."""
    readme = (ROOT / "README.md").read_text()
    quoted = readme[readme.index("def step(self)") :].partition("```")[0]

    assert textwrap.dedent(inspect.getsource(Engine.step)) == quoted
