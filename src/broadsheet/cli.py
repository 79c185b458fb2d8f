"""The command line. Every heavy import waits until a command needs it."""

import json
from contextlib import closing
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from broadsheet import __version__, cli_draw, cli_feed, cli_index, cli_people, cli_web
from broadsheet.errors import BroadsheetError


class _Group(TyperGroup):
    """Turns the errors that are the caller's to mend into one sentence and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BroadsheetError as error:
            typer.echo(f"broadsheet: {error}", err=True)
            raise typer.Exit(2) from error
        except BrokenPipeError as error:
            raise typer.Exit(141) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="A daily-papers feed in which every paper runs.",
)


class Preset(StrEnum):
    """How large a run is."""

    small = "small"
    full = "full"


class Mode(StrEnum):
    """How a search reads the query."""

    hybrid = "hybrid"
    words = "words"
    meaning = "meaning"


JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _console() -> Any:
    from rich.console import Console

    return Console()


def _print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=1, default=str))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"broadsheet {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _chosen(slug: str | None, field: str | None, everything: bool) -> list[str]:
    from broadsheet.catalog import papers
    from broadsheet.errors import InvalidInput, NotBuilt

    if sum((slug is not None, field is not None, everything)) != 1:
        raise InvalidInput("give one of: a paper's slug, --field FIELD, --all")
    if slug is not None:
        return [slug]
    built = [entry.slug for entry in papers(field) if entry.built]
    if not built:
        raise NotBuilt(f"no paper of the field {field!r} is built yet")
    return built


def _finding_json(found: Any) -> dict[str, Any]:
    finite = {name: (value if value == value else None) for name, value in (("low", found.low), ("high", found.high))}
    return {
        "claim": found.claim.id,
        "sentence": found.claim.sentence,
        "metric": found.claim.metric,
        "unit": found.claim.unit,
        "ours": found.ours_mean,
        "baseline": found.baseline_mean,
        "effect": found.effect,
        **finite,
        "verdict": str(found.verdict),
        "seeds": found.seeds,
        "per_seed": {"ours": list(found.ours), "baseline": list(found.baseline)},
        "paper": found.claim.paper,
    }


def _print_claims(console: Any, title: str, findings: Any) -> None:
    from rich.markup import escape
    from rich.table import Table

    from broadsheet.lab.report import interval, needed, number

    colours = {"shown": "green", "not shown": "red", "inconclusive": "yellow"}
    console.print(f"\n[bold]{escape(title)}[/bold]", highlight=False)
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(min_width=12, no_wrap=True)
    grid.add_column()
    for found in findings:
        colour = colours[str(found.verdict)]
        claim = found.claim
        unit = f" {claim.unit}" if claim.unit else ""
        rival = claim.baseline or "threshold"
        effect = "ratio" if claim.effect == "ratio" else "difference"
        grid.add_row(
            f"[bold {colour}]{found.verdict}[/bold {colour}]", f"{escape(claim.sentence)} [dim]({claim.id})[/dim]"
        )
        grid.add_row(
            "",
            f"[dim]ours {number(found.ours_mean)}{unit}, {escape(rival)} {number(found.baseline_mean)}{unit}; "
            f"{effect} {escape(interval(found))}, shown if {needed(found)}[/dim]",
        )
    console.print(grid)
    counts = {verdict: sum(str(found.verdict) == verdict for found in findings) for verdict in colours}
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + ".", highlight=False)


@app.command()
def run(
    slug: Annotated[str | None, typer.Argument(help="The paper, such as cd-t.")] = None,
    field: Annotated[str | None, typer.Option(help="All built papers of a field.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All built papers.")] = False,
    preset: Annotated[Preset, typer.Option(help="small: no download; full: the paper's data.")] = Preset.small,
    seeds: Annotated[int, typer.Option(help="How many seeds; an interval needs two.")] = 5,
    first_seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    as_json: JsonFlag = False,
    publish: Annotated[bool, typer.Option(help="Write the result into the results folder.")] = False,
    fresh: Annotated[bool, typer.Option(help="Do not take up an interrupted run.")] = False,
    jobs: Annotated[
        int | None, typer.Option(help="Seeds at a time, in processes; by default as many as cores and memory allow.")
    ] = None,
) -> None:
    """Measure a paper's claims over seeds and give verdicts."""
    from broadsheet.lab import machine, run_papers
    from broadsheet.lab.results import publish as publish_outcome
    from broadsheet.lab.results import require_writable, results_dir
    from broadsheet.nn.progress import live

    chosen = _chosen(slug, field, everything)
    machine.device(device)
    if publish:
        require_writable(results_dir())
    console, printed = _console(), {}
    try:
        with live() as progress:
            outcomes = run_papers(
                chosen, preset=preset, seeds=seeds, first_seed=first_seed, device=device, progress=progress,
                fresh=fresh, jobs=jobs,
            )  # fmt: skip
            with closing(outcomes):
                for outcome in outcomes:
                    target = publish_outcome(outcome) if publish else None
                    if as_json:
                        printed[outcome.paper.slug] = _outcome_json(outcome, target)
                        continue
                    with progress.aside():
                        _print_outcome(console, outcome, target)
    except KeyboardInterrupt:
        typer.echo(
            f"\nbroadsheet: {', '.join(chosen)} interrupted; the same command goes on from where it stopped"
            " (--fresh starts anew).",
            err=True,
        )
        raise typer.Exit(130) from None
    if as_json:
        _print_json([printed[name] for name in chosen] if slug is None else printed[chosen[0]])
    else:
        typer.echo(
            f"Next: broadsheet show {chosen[0]}   (the paper, its caveats, code to copy)\n"
            "      broadsheet papers           (all papers of this edition)\n"
            "      broadsheet report           (claims and figures as one page)"
        )


def _outcome_json(outcome: Any, target: Any) -> dict[str, Any]:
    return {
        "slug": outcome.paper.slug,
        "preset": outcome.preset,
        "seeds": list(outcome.seeds),
        "device": outcome.device,
        "wall_s": outcome.wall_s,
        "peak_mib": outcome.peak_mib,
        "claims": [_finding_json(found) for found in outcome.findings],
        "figures": [{"file": str(file), "caption": caption} for file, caption in outcome.figures],
        "published": None if target is None else str(target),
    }


def _print_outcome(console: Any, outcome: Any, target: Any) -> None:
    _print_claims(console, outcome.paper.title, outcome.findings)
    taken = f", seeds {list(outcome.resumed)} taken over from an interrupted run" if outcome.resumed else ""
    work = f"{outcome.wall_s:.0f} s of work on {outcome.device}"
    console.print(f"{len(outcome.seeds)} seeds, preset {outcome.preset}, {work}{taken}.", highlight=False)
    if outcome.figures:
        typer.echo(f"Figures: {outcome.figures[0][0].parent}")
    if target is not None:
        typer.echo(f"Published: {target}")


def _results(slug: str | None, field: str | None, local: bool) -> list[Any]:
    """Published results, or the newest finished run of each paper in this machine's ledger."""
    from broadsheet.catalog import paper, papers
    from broadsheet.lab.results import Published, published

    entries = [paper(slug)] if slug is not None else [entry for entry in papers(field) if entry.built]
    if not local:
        return [result for entry in entries if (result := published(entry.slug)) is not None]
    from broadsheet.lab.context import home
    from broadsheet.lab.ledger import Ledger
    from broadsheet.lab.runner import judge

    ledger, results = Ledger(), []
    for entry in entries:
        finished = next((r for r in ledger.runs(entry.slug) if r.status == "finished"), None)
        if finished is None:
            continue
        measured = ledger.measurements(finished.id)
        folder = home() / "figures" / f"{entry.slug}-{finished.preset}"
        facts = {
            "preset": finished.preset,
            "seeds": list(finished.seeds),
            "date": finished.started[:10],
            "device": finished.device,
            "machine": finished.machine,
            "versions": finished.versions,
            "commit": finished.commit,
            "wall_s": sum({m.seed: m.wall_s for m in measured}.values()),
            "peak_mib": max(m.peak_mib for m in measured),
        }
        figures = tuple((file, file.stem.replace("-", " ")) for file in sorted(folder.glob("*.png")))
        results.append(Published(entry, judge(entry, finished.preset, measured), figures, facts))
    return results


LocalFlag = Annotated[bool, typer.Option("--local", help="This machine's own runs instead of the published ones.")]


@app.command()
def claims(
    slug: Annotated[str | None, typer.Argument(help="One paper only.")] = None,
    field: Annotated[str | None, typer.Option(help="One field only.")] = None,
    local: LocalFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """The measured claims with intervals and verdicts."""
    results = _results(slug, field, local)
    if as_json:
        _print_json(
            {r.paper.slug: {**r.facts, "claims": [_finding_json(found) for found in r.findings]} for r in results}
        )
        return
    console = _console()
    for result in results:
        facts = result.facts
        title = f"{result.paper.slug}: {result.paper.title} ({len(facts['seeds'])} seeds, preset {facts['preset']})"
        _print_claims(console, title, result.findings)
    if not results:
        typer.echo("Nothing measured yet: broadsheet run SLUG measures a paper's claims.")


@app.command()
def report(
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("broadsheet-report.html"),
    slug: Annotated[str | None, typer.Argument(help="One paper only.")] = None,
    field: Annotated[str | None, typer.Option(help="One field only.")] = None,
    local: LocalFlag = False,
) -> None:
    """Claims, figures and versions as one self-contained HTML file."""
    from broadsheet.errors import ResultsError
    from broadsheet.lab.report import write

    results = _results(slug, field, local)
    if not results:
        raise ResultsError("nothing measured yet: broadsheet run SLUG measures a paper's claims")
    file = write(output, results, "this machine's runs" if local else "published results")
    typer.echo(f"Report: {file.resolve()}")


@app.command()
def papers(
    field: Annotated[str | None, typer.Option(help="One field only.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """The papers of the catalogue."""
    from broadsheet.catalog import papers as catalogue

    entries = catalogue(field)
    if as_json:
        _print_json([{**entry.model_dump(mode="json"), "built": entry.built} for entry in entries])
        return
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("paper", "field", "date", "method", "what it does"):
        table.add_column(column, no_wrap=column in ("paper", "date", "method"))
    for entry in entries:
        method = "[green]runs[/green]" if entry.built else "[dim]not built yet[/dim]"
        table.add_row(entry.slug, entry.field, str(entry.published), method, entry.tagline)
    console = _console()
    console.print(table)
    built = sum(entry.built for entry in entries)
    console.print(f"{len(entries)} papers, {built} with their method.", highlight=False)


@app.command()
def show(slug: Annotated[str, typer.Argument(help="The paper.")], as_json: JsonFlag = False) -> None:
    """One paper: facts, summary, figures of the paper, claims, caveats, code to copy."""
    from broadsheet.catalog import paper
    from broadsheet.lab.results import published

    entry = paper(slug)
    if as_json:
        _print_json({**entry.model_dump(mode="json"), "built": entry.built})
        return
    from rich.markup import escape
    from rich.padding import Padding
    from rich.syntax import Syntax
    from rich.table import Table

    console = _console()
    console.print(f"\n[bold]{escape(entry.title)}[/bold]", highlight=False)
    console.print(escape(", ".join(entry.authors)), style="dim", highlight=False)
    venue = f", {entry.venue}" if entry.venue else ""
    console.print(f"{entry.published}{escape(venue)}, {entry.url}", highlight=False, style="dim")
    if entry.code:
        console.print(f"official code: {entry.code} (licence: {escape(entry.licence or 'unknown')})", style="dim")
    console.print()
    console.print(escape(entry.summary), highlight=False)
    if entry.reported:
        table = Table(title="What the paper reports", title_justify="left", box=None, padding=(0, 2, 0, 0))
        for column in ("data set", "metric", "value", "baseline", "note"):
            table.add_column(column)
        for row in entry.reported:
            against = f"{row.baseline} {row.baseline_value}".strip()
            table.add_row(*(escape(text) for text in (row.dataset, row.metric, row.value, against, row.remark)))
        console.print()
        console.print(table)
    if entry.caveats:
        console.print("\n[bold]What to know before trusting it[/bold]")
        for caveat in entry.caveats:
            console.print(Padding(f"• {escape(caveat.text)}", (0, 0, 0, 2)), highlight=False)
    if not entry.built:
        console.print("\nThe method of this paper is not built yet.")
        return
    result = published(entry.slug)
    console.print()
    if result is not None:
        _print_claims(console, "What we measured", result.findings)
    else:
        for claim in entry.claims:
            console.print(f"• {escape(claim.sentence)} [dim]({claim.id}: not published yet)[/dim]", highlight=False)
    console.print("[bold]Use it[/bold]")
    console.print(Padding(Syntax(entry.snippet.strip(), "python", background_color="default"), (0, 0, 1, 2)))
    console.print(f"Run it: broadsheet run {entry.slug}", highlight=False)


@app.command()
def search(
    query: Annotated[list[str], typer.Argument(help="Words or meaning.")],
    k: Annotated[int, typer.Option("-k", help="How many papers.", min=1)] = 8,
    mode: Annotated[Mode, typer.Option(help="Both engines fused, or one of them.")] = Mode.hybrid,
    as_json: JsonFlag = False,
) -> None:
    """Find papers by words and by meaning."""
    from broadsheet.catalog import papers as catalogue
    from broadsheet.catalog.search import Searcher

    hits = Searcher(catalogue()).search(" ".join(query), k=k, mode=mode.value)
    if as_json:
        rows = [{"slug": hit.paper.slug, "title": hit.paper.title, "score": hit.score, "why": hit.why} for hit in hits]
        _print_json({"mode": hits.mode, "note": hits.note, "hits": rows})
        return
    from rich.markup import escape

    console = _console()
    if hits.note:
        console.print(escape(hits.note), style="yellow", highlight=False)
    for place, hit in enumerate(hits, 1):
        state = "" if hit.paper.built else " [dim](not built yet)[/dim]"
        console.print(f"{place}. [bold]{hit.paper.slug}[/bold]{state}  {escape(hit.paper.title)}", highlight=False)
        console.print(f"   {escape(hit.paper.tagline)}", highlight=False)
        console.print(f"   [dim]{escape(hit.why)}[/dim]", highlight=False)
    if not hits:
        console.print("No paper found.")


@app.command()
def cite(slugs: Annotated[list[str], typer.Argument(help="One or more papers.")]) -> None:
    """BibTeX of the papers."""
    from broadsheet.catalog import paper
    from broadsheet.catalog.bibtex import bibtex_of

    typer.echo(bibtex_of([paper(slug) for slug in slugs]).rstrip())


@app.command()
def new(
    slug: Annotated[str, typer.Argument(help="The new paper's slug, such as my-paper.")],
    field: Annotated[str, typer.Option(help="Its field, a package under src/broadsheet.")],
    title: Annotated[str, typer.Option(help="Its title.")],
    arxiv: Annotated[str, typer.Option(help="Its arXiv id without version.")],
    root: Annotated[Path, typer.Option(help="The checkout to lay the files out in.")] = Path(),
) -> None:
    """Lay out the files of a new paper in a checkout."""
    from broadsheet.catalog.scaffold import scaffold

    for file in scaffold(slug, root, field=field, title=title, arxiv=arxiv):
        typer.echo(file)
    typer.echo("Next: the catalogue entry, then the method, its tests and its experiment (see CONTRIBUTING.md).")


app.command("draw")(cli_draw.draw)

# The feed: its commands have files of their own.
app.command("serve")(cli_web.serve)
app.command("import")(cli_feed.import_papers)
app.command("watch")(cli_feed.watch)
app.command("index")(cli_index.index)
app.command("digest")(cli_people.send_digest)
app.command("role")(cli_people.set_role)
app.command("backup")(cli_feed.backup)
app.command("restore")(cli_feed.restore)


def main() -> None:
    """Entry point of the ``broadsheet`` command."""
    app()
