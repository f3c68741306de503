"""How far methods are apart by the length of training: several comparisons of the same contestants, side by side."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from raptr_ds.errors import DataError
from raptr_ds.json_text import parse_json
from raptr_ds.lab.comparison import Comparison
from raptr_ds.lab.paired import PairedDifference, paired_difference


@dataclass(frozen=True)
class TrendPoint:
    """A contestant against the first one of its comparison. tokens: that one's, of a run; setting: model and budget."""

    setting: str
    contestant: str
    against: str
    tokens: float
    difference: PairedDifference


def trend(comparisons: Iterable[Comparison], contestants: Sequence[str] | None = None) -> list[TrendPoint]:
    """Return a point for each contestant of each comparison, by setting and contestant, shorter training first.

    contestants: names of those to show, None for all. Those without a finished run on a seed of the first are left out.
    Raises: DataError if none is left, for a name that no comparison has, if the comparisons begin with different
    contestants, or for a run whose configuration cannot be read.
    """
    comparisons = list(comparisons)
    known = dict.fromkeys(name for comparison in comparisons for name in comparison.contestants[1:])
    if unknown := [name for name in contestants or () if name not in known]:
        raise DataError(
            f"no comparison has {', '.join(unknown)} beside its first contestant. Name some of {', '.join(known)}."
        )
    first = {comparison.contestants[0]: comparison.folder for comparison in comparisons}
    if len(first) > 1:
        listed = ", ".join(f"{name} in {folder}" for name, folder in first.items())
        raise DataError(
            f"the comparisons begin with different contestants, {listed}: differences from the first one cannot stand "
            "side by side. Name comparisons that begin with the same one."
        )
    points = [
        point
        for comparison in comparisons
        for point in _points(comparison)
        if contestants is None or point.contestant in contestants
    ]
    if not points:
        raise DataError("no contestant has finished a seed that the first of its comparison has finished too.")
    places = {key: place for place, key in enumerate(dict.fromkeys((one.setting, one.contestant) for one in points))}
    return sorted(points, key=lambda one: (one.setting, places[one.setting, one.contestant], one.tokens))


def _points(comparison: Comparison) -> Iterator[TrendPoint]:
    first, *others = comparison.contestants
    reference = comparison.final_losses(first)
    finished = [run for run in comparison.of(first) if run.seed in reference and run.curves is not None]
    if not finished:
        return
    setting = f"{_model(comparison)}, {comparison.record['budget'].partition(':')[0]}"
    tokens = fmean(float(run.curves.tokens[-1]) for run in finished if run.curves is not None)
    for name in others:
        difference = paired_difference(comparison.final_losses(name), reference)
        if difference is not None:
            yield TrendPoint(setting, name, first, tokens, difference)


def _model(comparison: Comparison) -> str:
    file = comparison.of(comparison.contestants[0])[0].folder / "config.json"
    try:
        model = parse_json(file.read_text(encoding="utf-8"))["raptr_ds"]["model"]
        return f"{model['architecture']}, {model['num_layers']} layers of width {model['hidden_size']}"
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{file}: raptr_ds.model cannot be read ({type(error).__name__}: {error}). Copy it from the run again."
        ) from error
