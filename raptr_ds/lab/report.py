"""The report of a comparison: the same content as Markdown with pictures beside it, and as one self-contained page."""

from collections.abc import Callable
from pathlib import Path

from raptr_ds.lab.comparison import Comparison, RunResult, phase_losses
from raptr_ds.lab.pages import Code, Part, Picture, Table, Text, to_html, to_markdown
from raptr_ds.lab.paired import CONFIDENCE, paired_difference, summarize
from raptr_ds.lab.plots import loss_picture, paths_picture, phases_picture, rates_picture

MARKDOWN, PAGE = "report.md", "report.html"
_NONE = "-"


def write_report(comparison: Comparison) -> tuple[Path, Path]:
    """Write report.md, its pictures in report/, and report.html into the comparison's folder; return the two pages."""
    parts, title = report_parts(comparison), f"Comparison: {comparison.record['name']}"
    pictures = comparison.folder / "report"
    pictures.mkdir(exist_ok=True)
    for block in (block for part in parts for block in part.blocks):
        if isinstance(block, Picture):
            (pictures / f"{block.name}.png").write_bytes(block.png)
    markdown, page = comparison.folder / MARKDOWN, comparison.folder / PAGE
    markdown.write_text(to_markdown(title, parts), encoding="utf-8")
    page.write_text(to_html(title, parts), encoding="utf-8")
    return markdown, page


def result_lines(comparison: Comparison) -> list[str]:
    """Return the table of held-out losses as lines of Markdown, for a terminal."""
    return to_markdown("", [Part("", (_loss_table(comparison),))]).splitlines()[4:]


def report_parts(comparison: Comparison) -> list[Part]:
    """Return the whole report."""
    drawn = {
        "loss": (
            loss_picture,
            "Means over the seeds; shaded from the least to the most. Above the full model on "
            "held-out text, below the training loss along each step's path (smoothed), which is no like for like. "
            "The first steep fall is cut off.",
        ),
        "phases": (
            phases_picture,
            "The full model's held-out loss through the phases, all seeds; dotted: a phase begins, "
            "with its mean path length.",
        ),
        "paths": (paths_picture, "Which layers ran at which steps (the first seed of each)."),
        "rates": (rates_picture, "Final held-out loss of each learning rate tried, on the tuning seed alone."),
    }
    made = {name: _picture(name, draw(comparison), caption) for name, (draw, caption) in drawn.items()}
    parts = [
        Part(
            "Result",
            (
                *_introduction(comparison),
                _loss_table(comparison),
                Text(_how_to_read(comparison)),
                *_troubles(comparison),
            ),
        ),
        Part("What it cost", (_cost_table(comparison),)),
        Part("Loss against steps, executed FLOPs and time", made["loss"]),
        Part("The full model through the phases", (*made["phases"], *_phase_table(comparison))),
        Part("Paths", made["paths"]),
        Part("Learning rates tried", (*made["rates"], *_rate_table(comparison))),
        Part("Every run", (_run_table(comparison),)),
        Part("How it was made", _origin(comparison)),
    ]
    return [part for part in parts if part.blocks]


def _introduction(comparison: Comparison) -> list[Text]:
    record = comparison.record
    seeds = record["seeds"]
    finished = sum(run.is_finished for run in comparison.runs)
    planned = len(seeds) * len(comparison.contestants)
    return [
        Text(
            f"{len(comparison.contestants)} contestants on {len(seeds)} seed{'s' if len(seeds) > 1 else ''} "
            f"({', '.join(map(str, seeds))}), {record['budget']}; base run {record['base']}, "
            f"{record['processes']} process{'es' if record['processes'] > 1 else ''} a run. "
            f"{finished} of {planned} runs are finished."
        )
    ]


def _loss_table(comparison: Comparison) -> Table:
    first = comparison.contestants[0]
    reference = comparison.final_losses(first)
    rows = []
    for name in comparison.contestants:
        losses, about = comparison.final_losses(name), comparison.about(name)
        summary, difference = summarize(list(losses.values())), paired_difference(losses, reference)
        cells = [name, about["path"], f"{about['steps']:,}", _rate(about["learning_rate"])]
        if summary is None:
            rows.append((*cells, "0", *[_NONE] * 5))
            continue
        cells += [
            str(summary.n),
            f"{summary.mean:.4f}",
            _number(summary.deviation),
            f"{summary.least:.4f} to {summary.most:.4f}",
        ]
        if name == first or difference is None:
            rows.append((*cells, _NONE, _NONE))
            continue
        half = "" if difference.half_width is None else f" ± {difference.half_width:.4f}"
        mark = " *" if difference.is_clear else ""
        rows.append(
            (
                *cells,
                f"{difference.mean:+.4f}{half}{mark} (n={difference.n})",
                f"{difference.num_lower} of {difference.n}",
            )
        )
    head = ("contestant", "paths", "steps", "learning rate", "n", "held-out loss, mean", "deviation", "range")
    return Table((*head, f"against {first}, paired by seed", f"seeds below {first}"), tuple(rows))


def _how_to_read(comparison: Comparison) -> str:
    tuned = comparison.record["sweep"]
    text = (
        "The loss is the full model's on held-out text after the last step. Deviation is the sample's over the seeds. "
        f"Differences are of the same seed's runs; ± is half the width of Student's {CONFIDENCE:.0%} interval of their "
        "mean with n - 1 degrees of freedom, and * marks an interval that leaves zero out. Below zero is better than "
        f"{comparison.contestants[0]}."
    )
    if tuned is not None:
        text += f" Learning rates were chosen for each contestant alike, by the held-out loss of seed {tuned['seed']}"
        is_shared = tuned["seed"] in comparison.record["seeds"]
        text += ", which is also one of those compared." if is_shared else ", which is not among those compared."
    return text


def _troubles(comparison: Comparison) -> list[Text | Code]:
    blocks: list[Text | Code] = []
    for name, edge in _edges(comparison):
        blocks.append(Text(f"Note: {name} did best at the {edge} learning rate tried; its best may lie beyond."))
    for run in (*comparison.tuning, *comparison.runs):
        if run.exit_code and not run.is_finished:
            rate = f", learning rate {run.learning_rate:g}" if run.learning_rate is not None else ""
            blocks.append(Text(f"FAILED: {run.contestant}, seed {run.seed}{rate}: {run.state}. The end of its log:"))
            blocks.append(Code(tuple(run.last_log_lines()) or ("(no log)",)))
    tuned = sum(run.is_finished for run in comparison.tuning)
    if tuned < len(comparison.tuning):
        blocks.append(
            Text(f"{tuned} of {len(comparison.tuning)} tuning runs are finished; rates are chosen from these.")
        )
    missing = [name for name in comparison.contestants if not comparison.of(name)]
    if missing and comparison.tuning:
        blocks.append(Text(f"No learning rate is chosen yet for {', '.join(missing)}."))
    return blocks


def _edges(comparison: Comparison) -> list[tuple[str, str]]:
    rates = (comparison.record["sweep"] or {}).get("learning_rates", [])
    if len(rates) < 3:
        return []
    chosen = [(name, comparison.about(name)["learning_rate"]) for name in comparison.contestants]
    return [
        (name, "lowest" if rate == min(rates) else "highest")
        for name, rate in chosen
        if rate in (min(rates), max(rates))
    ]


def _cost_table(comparison: Comparison) -> Table:
    first = [run for run in comparison.of(comparison.contestants[0]) if run.is_finished]
    base_flops, base_seconds = _mean(first, lambda run: run.flops), _mean(first, lambda run: run.step_seconds)
    rows = []
    for name in comparison.contestants:
        runs, about = [run for run in comparison.of(name) if run.is_finished], comparison.about(name)
        flops, seconds = _mean(runs, lambda run: run.flops), _mean(runs, lambda run: run.step_seconds)
        wall = _mean([run for run in runs if run.wall_seconds is not None], lambda run: run.wall_seconds or 0.0)
        each = None if seconds is None else seconds / about["steps"]
        ratios = [
            _NONE if one is None or not base else f"{one / base:.3f}"
            for one, base in ((flops, base_flops), (seconds, base_seconds))
        ]
        rows.append(
            (
                name,
                f"{about['steps']:,}",
                _number(about["flops"], ".4g"),
                _number(flops, ".4g"),
                ratios[0],
                _number(each, ".4g"),
                _number(seconds, ",.1f"),
                ratios[1],
                _number(wall, ",.1f"),
            )
        )
    head = (
        "contestant",
        "steps",
        "FLOPs expected",
        "FLOPs executed",
        "of the first's",
        "seconds a step",
        "seconds in steps",
        "of the first's",
        "wall-clock seconds",
    )
    return Table(head, tuple(rows))


def _phase_table(comparison: Comparison) -> list[Table]:
    rows = []
    for name in comparison.contestants:
        by_seed = [phase_losses(run) for run in comparison.of(name) if run.is_finished]
        if not by_seed or len(by_seed[0]) < 2:
            continue
        for number, (first, length, _) in enumerate(by_seed[0]):
            losses = [phases[number][2] for phases in by_seed if len(phases) > number]
            known = summarize([loss for loss in losses if loss is not None])
            rows.append(
                (
                    name,
                    str(number),
                    f"{first:,.0f}",
                    f"{length:.3g}",
                    _NONE if known is None else f"{known.mean:.4f}",
                    _NONE if known is None else str(known.n),
                )
            )
    head = ("contestant", "phase", "first step", "mean path length", "full model's last held-out loss in it, mean", "n")
    return [Table(head, tuple(rows))] if rows else []


def _rate_table(comparison: Comparison) -> list[Table]:
    if not comparison.tuning:
        return []
    rates = sorted({run.learning_rate for run in comparison.tuning if run.learning_rate is not None})
    rows = []
    for name in comparison.contestants:
        found = {run.learning_rate: run for run in comparison.tuning if run.contestant == name}
        cells = [_NONE if found[rate].final_loss is None else f"{found[rate].final_loss:.4f}" for rate in rates]
        rows.append((name, *cells, _rate(comparison.about(name)["learning_rate"])))
    return [Table(("contestant", *(f"{rate:g}" for rate in rates), "chosen"), tuple(rows))]


def _run_table(comparison: Comparison) -> Table:
    rows = tuple(
        (
            run.contestant,
            str(run.seed),
            _rate(run.learning_rate),
            run.state,
            _number(run.final_loss),
            _number(run.flops or None, ".4g"),
            _number(run.step_seconds or None, ",.1f"),
            _number(run.wall_seconds, ",.1f"),
        )
        for run in comparison.runs
    )
    head = (
        "contestant",
        "seed",
        "learning rate",
        "state",
        "held-out loss",
        "executed FLOPs",
        "seconds in steps",
        "wall-clock seconds",
    )
    return Table(head, rows)


def _origin(comparison: Comparison) -> tuple[Text | Code, ...]:
    blocks: list[Text | Code] = []
    for session in comparison.record["sessions"]:
        versions = ", ".join(f"{name} {value}" for name, value in session["versions"].items())
        blocks += [Text(f"{session['started']}, on {session['machine']}: {versions}"), Code((session["command"],))]
    settings = comparison.record["settings"]
    if settings:
        blocks += [Text("Set for all, over the base run:"), Code(tuple(settings))]
    blocks += [Text("What each contestant sets:")]
    blocks.append(
        Code(
            tuple(
                f"{one['name']}: {' '.join(one['settings']) or '(nothing)'}" for one in comparison.record["contestants"]
            )
        )
    )
    commands = [run.command for run in comparison.runs if run.seed == comparison.record["seeds"][0]]
    if commands:
        blocks += [Text("The runs of the first seed, one by one:"), Code(tuple(commands))]
    return tuple(blocks)


def _picture(name: str, png: bytes | None, caption: str) -> tuple[Picture, ...]:
    return () if png is None else (Picture(name, png, caption),)


def _mean(runs: list[RunResult], value: Callable[[RunResult], float]) -> float | None:
    summary = summarize([value(run) for run in runs])
    return None if summary is None else summary.mean


def _number(value: float | None, form: str = ".4f") -> str:
    return _NONE if value is None else format(value, form)


def _rate(rate: float | None) -> str:
    return "base" if rate is None else f"{rate:g}"
