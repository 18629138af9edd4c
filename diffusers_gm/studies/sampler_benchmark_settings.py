"""What one setting for everything is worth: `python -m diffusers_gm.studies.sampler_benchmark_settings`.

`.sampler_benchmark` gives every scheduler the best of its grids, chosen afterwards, separately for every network and
number of calls. Nobody can choose so. Here every setting, a scheduler on one kind of grid, stands alone for all
networks and numbers of calls that were measured in OUTPUT, or whose cells are kept in CELLS, and ours are compared with
the best that such a choice could find.
"""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..cli import Parser, at_least
from ..evaluation.report import groups, statistic
from ..evaluation.results import Results
from ..evaluation.scoring import SLICED_WASSERSTEIN
from ..evaluation.table import Table
from .digits import parts_of
from .report import Report, by_calls
from .sampler_benchmark_cells import contending
from .sampler_benchmark_models import FRECHET
from .sampler_benchmark_schedulers import CALIBRATED, CHOSEN, MULTISTEP, PEERS, Setting, name_of, theirs

# A network and a number of calls.
Cell = tuple[str, int]


@dataclass(frozen=True)
class Measured:
    """One distance of all settings on all networks.

    Attributes:
        values: means over seeds by cell and setting; cells that a setting has no run for are left out.
        defaults: by network, the setting that its pipeline comes with.
        conditions: by network, in words.
        spread: median over all cells of several seeds of their relative standard deviation; nan where there are none.
    """

    values: Mapping[Cell, Mapping[Setting, float]]
    defaults: Mapping[str, Setting]
    conditions: Mapping[str, str]
    spread: float

    @classmethod
    def of(cls, kept: Iterable[Results], metric: str) -> "Measured":
        """Of a network that has been looked at with fewer samples and then measured with more, what was left out counts
        as so many times the least error as it had at the look. A look at one seed is no measurement where others have
        several: it does not tell stochasticities apart."""
        values: dict[Cell, dict[Setting, float]] = {}
        seeds: dict[Cell, int] = {}
        defaults: dict[str, Setting] = {}
        samples: dict[str, list[str]] = {}
        titles: dict[str, str] = {}
        spreads = []
        for results in sorted(kept, key=lambda results: results.conditions["num_samples"]):
            said = results.conditions
            name = said["study"].removeprefix("samplers ")
            titles[name], defaults[name] = said["title"], (said["default"][0], said["default"][1])
            found, most = means(results, metric), 0
            for calls, (by_setting, of_spread, num_seeds) in found.items():
                looked = values.get((name, calls), {})
                scale = min(by_setting.values()) / min(looked.values()) if looked else 1.0
                values[name, calls] = {s: scale * value for s, value in looked.items()} | by_setting
                seeds[name, calls] = num_seeds
                spreads += of_spread
                most = max(most, num_seeds)
            if found:
                samples.setdefault(name, []).append(f"n = {said['num_samples']}, {most} seed(s)")
        conditions = {name: f"{titles[name]} ({'; '.join(words)})" for name, words in samples.items()}
        looks = {cell for cell, count in seeds.items() if count == 1} if max(seeds.values(), default=1) > 1 else set()
        counted = {cell: by_setting for cell, by_setting in values.items() if cell not in looks}
        return cls(counted, defaults, conditions, statistics.median(spreads) if spreads else math.nan)

    def best(self, cell: Cell, among: Callable[[Setting], bool]) -> float:
        return min((value for setting, value in self.values[cell].items() if among(setting)), default=math.nan)

    def best_peer(self, cell: Cell) -> float:
        """Of all that people have without us."""
        return self.best(cell, theirs)

    def default(self, cell: Cell) -> float:
        """Of what the network comes with."""
        return self.values[cell].get(self.defaults[cell[0]], math.nan)

    def calls(self) -> list[int]:
        return sorted({n for _, n in self.values})

    def settings(self) -> list[Setting]:
        return list(dict.fromkeys(setting for by_setting in self.values.values() for setting in by_setting))


def means(results: Results, metric: str) -> dict[int, tuple[dict[Setting, float], list[float], int]]:
    """By number of calls, the mean over seeds of every setting, the relative spreads, and how many seeds they are of.

    Samplers start from the same noise: settings are compared on the same seeds, those that most of them have. What is
    far behind on the first may have that alone.
    """
    found: dict[int, tuple[dict[Setting, float], list[float], int]] = {}
    cells_of, ahead = groups(results), contending(results, metric)
    for calls in sorted({n for _, n in ahead if n is not None}):
        here = {name: cells for (name, n), cells in cells_of.items() if n == calls}
        contenders = {name for name, n in ahead if n == calls}
        counts = Counter(cell.seed for name in contenders for cell in here[name])
        seeds = {seed for seed, count in counts.items() if 2 * count > len(contenders)}
        by_setting, spreads = {}, []
        for name, cells in here.items():
            counted = [cell.scores for cell in sorted(cells, key=lambda cell: cell.seed or 0) if cell.seed in seeds]
            complete = len(counted) == len(seeds)
            value = statistic(counted if complete else counted[:1], metric)
            if value is not None and (complete or name not in contenders):
                sampler, _, grid = name.rpartition(", ")
                by_setting[sampler, grid] = value.mean
                spreads += [value.spread / value.mean] if value.spread is not None else []
        found[calls] = by_setting, spreads, len(seeds)
    return found


def geometric_mean(of_cells: Mapping[Cell, float], calls: int | None = None) -> float:
    """Over all cells, or those of a number of calls; nan where there are none."""
    values = [value for (_, n), value in of_cells.items() if calls in (None, n)]
    return statistics.geometric_mean(values) if values else math.nan


def ratios(measured: Measured, mine: Setting, other: Callable[[Cell], float]) -> dict[Cell, float]:
    """A setting over something else, in every cell that has both."""
    found = {cell: by[mine] / other(cell) for cell, by in measured.values.items() if mine in by}
    return {cell: ratio for cell, ratio in found.items() if not math.isnan(ratio)}


# --- Tables ----------------------------------------------------------------------------------------------------------


def row_of(name: str, of_cells: Mapping[Cell, float], calls: Sequence[int]) -> list[str]:
    """Geometric means by number of calls and over all, and the largest cell."""
    worst = max(of_cells, key=of_cells.__getitem__, default=None)
    where = f"{of_cells[worst]:.2f} ({worst[0]}, {worst[1]} calls)" if worst else "-"
    return [name, *(words(geometric_mean(of_cells, n)) for n in (*calls, None)), where]


def words(ratio: float) -> str:
    return "-" if math.isnan(ratio) else f"{ratio:.2f}"


def against(measured: Measured, caption: str, other: Callable[[Cell], float]) -> Table:
    """Our settings over something else."""
    calls = measured.calls()
    rows = [
        row_of(name_of(setting), ratios(measured, setting, other), calls)
        for setting in measured.settings()
        if setting[0] == MULTISTEP
    ]
    return Table(caption, ["setting", *by_calls(calls), "all", "worst cell"], rows)


def by_network(measured: Measured, mine: Setting, caption: str) -> Table:
    """A setting of ours over the best peers, a row for every network."""
    calls, found = measured.calls(), ratios(measured, mine, measured.best_peer)
    of_networks = {
        name: {cell: r for cell, r in found.items() if cell[0] == name} for name in sorted(measured.defaults)
    }
    rows = [row_of(name, of_network, calls)[:-1] for name, of_network in of_networks.items() if of_network]
    return Table(caption, ["network", *by_calls(calls), "all"], rows)


def alone(measured: Measured, caption: str, most: int) -> Table:
    """Every setting for itself, over the best of all peers in each cell: the best `most` and ours, and in how many
    cells it is the best of all. Settings that lack cells come last: their means are of easier or harder ones."""
    calls, least = measured.calls(), {cell: measured.best_peer(cell) for cell in measured.values}
    wins = Counter(min(by, key=by.__getitem__) for by in measured.values.values())
    everywhere = sum(not math.isnan(value) for value in least.values())
    found = {s: ratios(measured, s, least.__getitem__) for s in measured.settings()}
    found = {setting: of_cells for setting, of_cells in found.items() if of_cells}
    order = sorted(found, key=lambda s: (len(found[s]) < everywhere, geometric_mean(found[s])))
    shown = [s for rank, s in enumerate(order) if rank < most or s[0] not in PEERS or wins[s]]
    rows = []
    for setting in shown:
        name = name_of(setting) if setting[0] in PEERS else f"**{name_of(setting)}**"
        lacking = everywhere - len(found[setting])
        name += f" ({lacking} cells lacking)" if lacking else ""
        rows.append([str(order.index(setting) + 1), *row_of(name, found[setting], calls), str(wins[setting])])
    return Table(caption, ["rank", "setting", *by_calls(calls), "all", "worst cell", "wins"], rows)


def worth_of_levels(measured: Measured, caption: str) -> Table:
    """Every sampler but the one that they are made for on our calibrated levels over itself on its default grid."""
    calls, rows = measured.calls(), []
    for sampler in sorted({s for s, grid in measured.settings() if grid == "calibrated"} - {MULTISTEP}):

        def default(cell: Cell, sampler: str = sampler) -> float:
            return measured.values[cell].get((sampler, "default"), math.nan)

        if found := ratios(measured, (sampler, "calibrated"), default):
            rows.append(row_of(sampler if sampler in PEERS else f"**{sampler}**", found, calls))
    return Table(caption, ["sampler", *by_calls(calls), "all", "worst cell"], rows)


def tables_of(title: str, measured: Measured, most: int) -> list[Table]:
    """All tables of a distance."""
    known = measured.settings()
    chosen = "the best of all peers, each at the best of its grids, chosen afterwards for every cell"

    def given_ours(cell: Cell) -> float:
        return measured.best(cell, lambda setting: setting[0] in PEERS)

    captions: dict[str, Callable[[Cell], float]] = {
        f"over {chosen}; geometric means over networks": measured.best_peer,
        "over the same, the peers on our calibrated levels too": given_ours,
        "over the scheduler that the network comes with": measured.default,
    }
    rows = f"{title}: every setting alone, over {chosen}; ours in bold; `wins`: cells in which it is the best of all"
    return [
        *(
            by_network(measured, s, f"{title}: `{name_of(s)}` over {chosen}.")
            for s in (CALIBRATED, CHOSEN)
            if s in known
        ),
        *(against(measured, f"{title}: our settings {caption}.", other) for caption, other in captions.items()),
        worth_of_levels(
            measured, f"{title}: other samplers on our calibrated levels, over themselves on their default grid."
        ),
        alone(measured, f"{rows} settings, of {len(measured.values)}.", most),
    ]


# --- The study -------------------------------------------------------------------------------------------------------


def study(kept: Sequence[Results], most: int, name: str | None = None) -> Report:
    """The report of all networks in files of results; `name`: what is said of them, of all if None.

    Raises:
        ValueError: if none of them has the calibrated sampler.
    """
    tables: list[Table] = []
    said: list[str] = []
    measures = {SLICED_WASSERSTEIN: "Sliced W2 (a root)", FRECHET: "FD of pixels (a squared distance)"}
    conditions, spread = "", math.nan
    for metric, title in measures.items():
        measured = Measured.of(kept, metric)
        if not any(CALIBRATED in by for by in measured.values.values()):
            continue
        tables += tables_of(title, measured, most)
        said.append(verdict_of(title, measured))
        if metric == SLICED_WASSERSTEIN:
            conditions, spread = "; ".join(measured.conditions.values()), measured.spread
    if not tables:
        raise ValueError("no results with the calibrated sampler: run `sampler_benchmark` first")
    noise = (
        "" if math.isnan(spread) else f" Relative standard deviation over seeds of a cell, the median: {spread:.3f}."
    )
    return Report(
        f"samplers_settings_{name.replace(' ', '-')}" if name else "samplers_settings",
        f"One setting for everything: every scheduler on every grid alone{f', {name}' if name else ''}",
        "How good is a scheduler on one kind of grid, the same for all networks and numbers of calls, and how near "
        "does the calibrated sampler come to the best choice that could be made afterwards?",
        " ".join(said),
        tables,
        [],
        f"Of the cells that `sampler_benchmark` has kept: {conditions}.{noise} Sliced W2 of few samples has a floor "
        "that all settings share, which brings ratios near 1 at many calls; FD, squared, has hardly one. Samplers "
        "start from the same noise, and deterministic ones share its chance where they have converged: there a ratio "
        "tells of the seeds, and the best of many peers is the luckiest. `GITS-like` needs a calibration that "
        "diffusers does not have; it counts as a peer's grid, ours do not.",
    )


def verdict_of(title: str, measured: Measured) -> str:
    """The calibrated sampler against the best choice, any one setting and the default, in words."""
    of_cells = ratios(measured, CALIBRATED, measured.best_peer)
    worst = max(of_cells, key=of_cells.__getitem__)
    peers = {s: ratios(measured, s, measured.best_peer) for s in measured.settings() if theirs(s)}
    text = (
        f"{title}: calibrated, ours has {geometric_mean(of_cells):.2f} times the best choice of a peer in the "
        f"geometric mean of {len(of_cells)} cells, {of_cells[worst]:.2f} in the worst ({worst[0]}, {worst[1]} calls)"
    )
    if complete := {s: found for s, found in peers.items() if found.keys() >= of_cells.keys()}:
        leader = min(complete, key=lambda s: geometric_mean(complete[s]))
        mean = geometric_mean(complete[leader])
        text += f"; the best single setting of diffusers that was run everywhere ({name_of(leader)}) has {mean:.2f}"
    ahead, uncompared = [], []
    for n in sorted({n for _, n in of_cells}):
        own, cells = geometric_mean(of_cells, n), {cell for cell in of_cells if cell[1] == n}
        # Settings that other numbers of calls lack count too.
        of_n = {s: geometric_mean(found, n) for s, found in peers.items() if found.keys() >= cells}
        if not of_n:
            uncompared.append(str(n))
        first = min(of_n, key=of_n.__getitem__, default=None)
        if first is not None and of_n[first] < own:
            ahead.append(f"{n} calls ({name_of(first)}, {of_n[first]:.2f} against {own:.2f})")
    text += f"; a single setting is ahead of ours at {', '.join(ahead) or 'no number of calls'}"
    if uncompared:
        text += f" (none of them was run everywhere at {', '.join(uncompared)} calls)"
    of_default = ratios(measured, CALIBRATED, measured.default)
    if of_default:
        text += f"; {geometric_mean(of_default):.2f} times the scheduler that a network comes with"
    return text + "."


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(f"{__package__}.sampler_benchmark_settings", __doc__)
    add = parser.add_argument
    add("--most", type=at_least(1), default=20, help="settings of peers that are shown")
    add("--name", help="of the report, where it is of some networks: what is said of them")
    add("--cells", type=Path, help="folder of the cells [OUTPUT/.parts]")
    add("--output", type=Path, default=Path("outputs/studies"), help="folder of the reports")
    args = parser.parse_args(arguments)
    try:
        paths = sorted((args.cells or parts_of(args.output)).glob("samplers *.json"))
        study([Results.read(path) for path in paths], args.most, args.name).write(args.output)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
