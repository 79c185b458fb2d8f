"""The documentation is held to the code: every block runs, every command and name exists, nothing public is missing."""

import importlib
import importlib.util
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from broadsheet.cli import app

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load(DOCS / "build.py")


def named(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


def pieces(page):
    """The setups and code blocks of a page, in order."""
    pattern = r"<!-- setup\n(.*?)-->|^```python\n(.*?)^```"
    return ["".join(found) for found in re.findall(pattern, page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)]


# --- code -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    """Tiny random models and a tokenizer of whole words in the place of what ``from_pretrained`` would fetch."""
    transformers = pytest.importorskip("transformers")
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers

    from broadsheet.nn.seeding import seeded

    def install(text):
        words = dict.fromkeys(["<pad>", "<unk>", *re.findall(r"\w+", text)])
        vocabulary = {word: number for number, word in enumerate(words)}
        core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        sizes = {"vocab_size": len(vocabulary), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}

        def tokenizer(*_, **__):
            return transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>")

        def decoder(*_, **__):
            config = transformers.GPT2Config(n_layer=6, n_head=12, n_embd=48, n_positions=32, **sizes)
            with seeded(0):
                return transformers.GPT2LMHeadModel(config).eval()

        def classifier(*_, **__):
            config = transformers.BertConfig(
                hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, **sizes
            )
            with seeded(0):
                return transformers.BertForSequenceClassification(config).eval()

        for name, made in {
            "AutoTokenizer": tokenizer,
            "AutoModelForCausalLM": decoder,
            "AutoModelForSequenceClassification": classifier,
        }.items():
            monkeypatch.setattr(getattr(transformers, name), "from_pretrained", made)

    for variable in ("HOME", "DATA"):
        monkeypatch.setenv(f"BROADSHEET_{variable}", str(tmp_path / variable.lower()))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return install


@named([page for page in PAGES if pieces(page)])
def test_every_code_block_runs(page, stand_ins):
    import matplotlib.pyplot as plt

    stand_ins(page.read_text(encoding="utf-8"))
    names = {"__name__": page.stem}
    for number, code in enumerate(pieces(page), 1):
        exec(compile(code, f"{page.name}, block {number}", "exec"), names)
    plt.close("all")


@named(sorted(DOCS.rglob("*.md")))
def test_code_fits_the_page(page):
    shown = re.findall(r"^```(?:python|console)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert not [line for block in shown for line in block.splitlines() if len(line) > 92]


# --- commands -------------------------------------------------------------------------------------------------------


def command_lines(page):
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    typed = [line[2:] for line in blocks.splitlines() if line.startswith("$ ")]
    inline = re.findall(
        r"`((?:broadsheet|make|python) [^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    )
    for line in [*typed, *inline]:
        for part in line.split("&&"):
            yield shlex.split(part, comments=True)


def parse(arguments):
    """Read a command line as the program would, without running it."""
    group = get_command(app)
    context = group.make_context("broadsheet", list(arguments))
    name, command, rest = group.resolve_command(context, arguments)
    command.make_context(name, rest, parent=context)


@named([page for page in PAGES if list(command_lines(page))])
def test_every_command_line_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for words in command_lines(page):
        match words:
            case ["broadsheet", *arguments] if arguments != ["..."]:
                parse(arguments)
            case ["make", *wanted]:
                assert set(wanted) <= targets, words
            case ["python", file, *_] if file.endswith(".py"):
                assert (ROOT / file).is_file(), words


def test_a_wrong_command_line_would_be_noticed():
    for wrong in ("run cd-t --sedes 5", "reprot", "papers --field", "search"):
        with pytest.raises(Exception, match=r"(?i)no such|missing|requires"):
            parse(wrong.split())


def test_the_command_line_reference_is_current():
    stale = "stale: write it anew with `python docs/build.py --cli`"
    assert (DOCS / "reference" / "cli.md").read_text(encoding="utf-8") == build.command_line(), stale


def test_every_command_is_explained_in_a_guide():
    guides = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.name != "cli.md")
    for name in get_command(app).commands:
        assert f"broadsheet {name}" in guides, f"broadsheet {name} is in no guide"


# --- settings and extras --------------------------------------------------------------------------------------------


def test_every_environment_variable_is_documented_and_every_documented_one_exists():
    page = build.filled(DOCS / "reference" / "settings.md")
    source = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "src").rglob("*.py"))
    read = set(re.findall(r"BROADSHEET_[A-Z_]*[A-Z]", source))
    listed = set(re.findall(r"^\| `(BROADSHEET_[A-Z_]+)`", page, re.MULTILINE))
    computed = set(re.findall(r"`(BROADSHEET_[A-Z_]+)`", build.settings()))
    assert read <= listed | computed, f"missing from docs/reference/settings.md: {read - listed - computed}"
    assert listed <= read | computed, f"not read anywhere: {listed - read - computed}"


def test_every_extra_is_documented_and_every_documented_one_exists():
    extras = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    )
    page = (DOCS / "reference" / "settings.md").read_text(encoding="utf-8")
    listed = set(re.findall(r'"broadsheet\[([a-z]+)\]"', page))
    assert extras == listed
    for other in PAGES:
        for names in re.findall(r'(?:broadsheet|\.)\[([a-z,]+)\]"', other.read_text(encoding="utf-8")):
            assert set(names.split(",")) <= extras, f"{other.name}: {names}"


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", build.packages())
def test_every_public_name_is_in_the_api_reference_with_a_docstring(package):
    module = importlib.import_module(f"broadsheet.{package}")
    page = build.api_pages()[f"{package}.md"]
    described = {line.rpartition(".")[2]: line[4:] for line in page.splitlines() if line.startswith("::: ")}
    modules = {file.stem for file in Path(module.__file__).parent.glob("*")} if hasattr(module, "__path__") else set()
    assert set(getattr(module, "__all__", [])) - modules <= set(described)
    assert described
    for name, path in described.items():
        home, _, last = path.rpartition(".")
        value = getattr(importlib.import_module(home), last)
        if callable(value):
            assert value.__doc__, f"{path} has no docstring"
        assert last == name


@named(PAGES)
def test_every_dotted_name_resolves(page):
    text = re.sub(r"^```text.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for name in set(re.findall(r"`(broadsheet(?:\.\w+)+)(?:\(.*?\))?`", text)) - {
        "broadsheet.papers"
    }:  # an entry point
        parts = name.split(".")
        value = importlib.import_module(parts[0])
        for position, part in enumerate(parts[1:], 2):
            value = getattr(value, part, None) or importlib.import_module(".".join(parts[:position]))


# --- pages ----------------------------------------------------------------------------------------------------------


@named(PAGES)
def test_links_lead_somewhere(page):
    made = {DOCS / "reference" / "api" / name for name in build.api_pages()}
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("https://", "mailto:")):
            place = (page.parent / target).resolve()
            assert place.exists() or place in made, f"{page.name}: {target}"


@named(sorted((DOCS / "papers").glob("[!i]*.md")))
def test_a_guide_shows_what_was_published(page):
    from broadsheet.catalog import paper
    from broadsheet.lab.results import published

    text = build.filled(page)
    result = published(page.stem)
    for found in result.findings:
        assert build.escape(found.claim.sentence) in text
        assert f'<dt class="{str(found.verdict).replace(" ", "-")}">{found.verdict}</dt>' in text
    for file, _ in result.figures:
        assert f"](../results/{page.stem}/{file.name})" in text
    assert f"https://arxiv.org/abs/{paper(page.stem).arxiv}" in text
    assert "<!-- setup" not in text


def test_every_built_paper_has_a_guide():
    from broadsheet.catalog import papers

    assert {entry.slug for entry in papers() if entry.built} == {
        page.stem for page in (DOCS / "papers").glob("[!i]*.md")
    }


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in DOCS.rglob("*.md"):
        assert str(page.relative_to(DOCS)) in navigation
    for name in build.api_pages():
        assert f"reference/api/{name}" in navigation


def test_the_speed_table_is_the_one_that_was_measured():
    content = json.loads((ROOT / "results" / "benchmarks.json").read_text(encoding="utf-8"))
    table = load(ROOT / "benchmarks" / "collect.py").table
    assert table(content, brief=True) in README
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert table(content) in page
    if "feed" in content:
        assert load(ROOT / "benchmarks" / "feed_scale.py").table(content["feed"]) in page
    for slug in ("cd-t", "diffusion-spectral-entropy", "multiplicative-diffusion", "rbtransformer"):
        rows = [row for group, rows in content["groups"].items() if group.startswith(slug) for row in rows]
        assert any("ours" in row["name"] for row in rows)
        assert any("ours" not in row["name"] for row in rows)
