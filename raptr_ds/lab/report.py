"""The report of a comparison, as Markdown with its pictures as files and as one self-contained page."""

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev

from raptr_ds.lab.comparison import Comparison
from raptr_ds.lab.pages import Block, Section, code, picture, table, text, to_html, to_markdown
from raptr_ds.lab.paired import CONFIDENCE, paired_difference
from raptr_ds.lab.plots import loss_picture, paths_picture, phases_picture, rates_picture
from raptr_ds.lab.status import last_log_lines

_MARKDOWN, _PAGE = "report.md", "report.html"


def write_report(comparison: Comparison) -> tuple[Path, Path]:
    """Write report.md, its pictures in report/, and report.html into the comparison's folder; return the two pages."""
    sections, title = _sections(comparison), f"Comparison: {comparison.record['name']}"
    pictures = comparison.folder / "report"
    pictures.mkdir(exist_ok=True)
    for block in (block for section in sections for block in section.blocks):
        for name, png in block.pictures.items():
            (pictures / f"{name}.png").write_bytes(png)
    markdown, page = comparison.folder / _MARKDOWN, comparison.folder / _PAGE
    markdown.write_text(to_markdown(title, sections), encoding="utf-8")
    page.write_text(to_html(title, sections), encoding="utf-8")
    return markdown, page


def result_lines(comparison: Comparison) -> list[str]:
    """Return the table of held-out losses as lines of Markdown, for a terminal."""
    return list(_loss_table(comparison).markdown)


def _sections(comparison: Comparison) -> list[Section]:
    loss = picture(
        "loss",
        loss_picture(comparison),
        "Means over the seeds; shaded: lowest to highest. Top: the full model on held-out text. Bottom: the training "
        "loss along each step's path (smoothed), which cannot be compared between contestants. The first steep fall is "
        "cut off.",
    )
    phases = picture(
        "phases",
        phases_picture(comparison),
        "The full model's held-out loss through the phases, all seeds. Dotted: a phase begins, with its mean path "
        "length.",
    )
    paths = picture("paths", paths_picture(comparison), "Which layers ran at which steps (first seed of each).")
    caption = "Final held-out loss at each learning rate, on the tuning seed only."
    rates = picture("rates", rates_picture(comparison), caption)
    results = [_introduction(comparison), _loss_table(comparison), _how_to_read(comparison)]
    sections = [
        Section("Results", [*results, *_problems(comparison)]),
        Section("Cost", [_cost_table(comparison)]),
        Section("Loss by steps, executed FLOPs and time", loss),
        Section("The full model's loss by phase", [*phases, *_phase_table(comparison)]),
        Section("Paths", paths),
        Section("Learning rates", [*rates, *_rate_table(comparison)]),
        Section("All runs", _run_table(comparison)),
        Section("How to reproduce it", _origin(comparison)),
    ]
    return [section for section in sections if section.blocks]


def _introduction(comparison: Comparison) -> Block:
    record = comparison.record
    seeds, processes, contestants = record["seeds"], record["processes"], comparison.contestants
    finished = sum(run.is_finished for run in comparison.runs)
    return text(
        f"{len(contestants)} contestants on {len(seeds)} seed{'s' if len(seeds) > 1 else ''} "
        f"({', '.join(map(str, seeds))}), {record['budget']}; base run {record['base']}, "
        f"{processes} process{'es' if processes > 1 else ''} per run. "
        f"{finished} of {comparison.num_planned} runs are finished."
    )


def _loss_table(comparison: Comparison) -> Block:
    first = comparison.contestants[0]
    against, below = f"difference from {first}, paired by seed", f"seeds below {first}"
    reference = comparison.final_losses(first)
    rows = []
    for name in comparison.contestants:
        losses, about = comparison.final_losses(name), comparison.about(name)
        values, difference = list(losses.values()), paired_difference(losses, reference)
        row = {
            "contestant": name,
            "paths": about["path"],
            "steps": f"{about['steps']:,}",
            "learning rate": _rate(about["learning_rate"]),
            "n": str(len(values)),
        }
        if values:
            row["mean held-out loss"] = f"{fmean(values):.4f}"
            row["deviation"] = _number(stdev(values) if len(values) > 1 else None)
            row["range"] = f"{min(values):.4f} to {max(values):.4f}"
        if name != first and difference is not None:
            row[against] = f"{difference} (n={difference.n})"
            row[below] = f"{difference.num_lower} of {difference.n}"
        rows.append(row)
    measured = ("n", "mean held-out loss", "deviation", "range", against, below)
    return table(rows, ("contestant", "paths", "steps", "learning rate", *measured))


def _how_to_read(comparison: Comparison) -> Block:
    words = (
        "The loss is the full model's on held-out text after the last step. The deviation is the sample standard "
        "deviation over the seeds. Differences are between runs of the same seed; ± is half the width of Student's "
        f"{CONFIDENCE:.0%} interval of their mean with n - 1 degrees of freedom, and * marks an interval that excludes "
        f"zero. Below zero is better than {comparison.contestants[0]}."
    )
    sweep = comparison.record["sweep"]
    if sweep is not None:
        is_shared = sweep["seed"] in comparison.record["seeds"]
        words += f" Each contestant's learning rate is the one with the lowest held-out loss on seed {sweep['seed']}"
        words += ", which is also one of those compared." if is_shared else ", which is not among those compared."
    return text(words)


def _problems(comparison: Comparison) -> list[Block]:
    blocks: list[Block] = []
    rates = (comparison.record["sweep"] or {}).get("learning_rates", [])
    ends = {min(rates): "lowest", max(rates): "highest"} if len(rates) > 2 else {}
    for name in comparison.contestants:
        if edge := ends.get(comparison.about(name)["learning_rate"]):
            blocks.append(text(f"Note: {name} did best at the {edge} learning rate tried; its best may lie beyond."))
    for run in (*comparison.tuning, *comparison.runs):
        if run.has_failed:
            rate = f", learning rate {run.learning_rate:g}" if run.learning_rate is not None else ""
            blocks.append(text(f"FAILED: {run.contestant}, seed {run.seed}{rate}: {run.state}. The end of its log:"))
            blocks.append(code(last_log_lines(run.folder) or ["(no log)"]))
    tuned, num_tuning = sum(run.is_finished for run in comparison.tuning), len(comparison.tuning)
    if tuned < num_tuning:
        blocks.append(text(f"{tuned} of {num_tuning} tuning runs are finished; rates are chosen from these."))
    missing = [name for name in comparison.contestants if not comparison.of(name)]
    if missing and comparison.tuning:
        blocks.append(text(f"No learning rate is chosen yet for {', '.join(missing)}."))
    return blocks


def _cost_table(comparison: Comparison) -> Block:
    first = comparison.contestants[0]
    flops_ratio, seconds_ratio = f"FLOPs / {first}'s", f"seconds / {first}'s"
    finished = {
        name: {run.seed: run for run in comparison.of(name) if run.is_finished} for name in comparison.contestants
    }
    rows = []
    for name, of_seeds in finished.items():
        about, runs = comparison.about(name), of_seeds.values()
        flops, seconds = _mean(run.flops for run in runs), _mean(run.step_seconds for run in runs)
        walls = [run.outcome.wall_seconds for run in runs]
        shared = finished[first].keys() & of_seeds.keys()  # so that both are of the same seeds, as losses are
        sides = [[runs_of[seed] for seed in shared] for runs_of in (of_seeds, finished[first])]
        rows.append(
            {
                "contestant": name,
                "steps": f"{about['steps']:,}",
                "expected FLOPs": _number(about["flops"], ".4g"),
                "executed FLOPs": _number(flops, ".4g"),
                flops_ratio: _number(_ratio(*(sum(run.flops for run in side) for side in sides)), ".3f"),
                "seconds per step": _number(_ratio(seconds, about["steps"]), ".4g"),
                "seconds in steps": _number(seconds, ",.1f"),
                seconds_ratio: _number(_ratio(*(sum(run.step_seconds for run in side) for side in sides)), ".3f"),
                "wall-clock seconds": _number(_mean(wall for wall in walls if wall is not None), ",.1f"),
            }
        )
    return table(rows)


def _phase_table(comparison: Comparison) -> list[Block]:
    rows = []
    for name in comparison.contestants:
        by_seed = [run.phase_losses() for run in comparison.of(name) if run.is_finished]
        if not by_seed or len(by_seed[0]) < 2:
            continue
        for number, (first, length, _) in enumerate(by_seed[0]):
            losses = [phases[number][2] for phases in by_seed if len(phases) > number]
            known = [loss for loss in losses if loss is not None]
            row = {"contestant": name, "phase": str(number), "first step": f"{first:,.0f}"}
            row["mean path length"] = f"{length:.3g}"
            row["full model's last held-out loss, mean"] = _number(_mean(known))
            row["n"] = str(len(known))
            rows.append(row)
    return [table(rows)] if rows else []


def _rate_table(comparison: Comparison) -> list[Block]:
    if not comparison.tuning:
        return []
    rates = sorted({run.learning_rate for run in comparison.tuning if run.learning_rate is not None})
    rows = []
    for name in comparison.contestants:
        row = {_rate(run.learning_rate): _number(run.final_loss) for run in comparison.tuning if run.contestant == name}
        rows.append({"contestant": name, **row, "chosen": _rate(comparison.about(name)["learning_rate"])})
    return [table(rows, ("contestant", *map(_rate, rates), "chosen"))]


def _run_table(comparison: Comparison) -> list[Block]:
    rows = [
        {
            "contestant": run.contestant,
            "seed": str(run.seed),
            "learning rate": _rate(run.learning_rate),
            "state": run.state,
            "held-out loss": _number(run.final_loss),
            "executed FLOPs": _number(run.flops or None, ".4g"),
            "seconds in steps": _number(run.step_seconds or None, ",.1f"),
            "wall-clock seconds": _number(run.outcome.wall_seconds, ",.1f"),
        }
        for run in comparison.runs
    ]
    return [table(rows)] if rows else []


def _origin(comparison: Comparison) -> list[Block]:
    record = comparison.record
    blocks: list[Block] = []
    for session in record["sessions"]:
        versions = ", ".join(f"{name} {value}" for name, value in session["versions"].items())
        blocks += [text(f"{session['started']}, on {session['machine']}: {versions}"), code([session["command"]])]
    if record["settings"]:
        blocks += [text("Set for all contestants, over the base run:"), code(record["settings"])]
    settings = [f"{one['name']}: {' '.join(one['settings']) or '(nothing)'}" for one in record["contestants"]]
    blocks += [text("Set for each contestant:"), code(settings)]
    commands = [runs[0].command for runs in map(comparison.of, comparison.contestants) if runs]
    if commands:
        blocks += [text("Each contestant's first run, one by one:"), code(commands)]
    return blocks


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return fmean(known) if known else None


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def _rate(rate: float | None) -> str:
    return "base" if rate is None else f"{rate:g}"
