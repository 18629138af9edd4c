"""The results page, made of the reports of the studies: `python -m diffusers_gm.studies.page`.

Every study writes its tables, pictures and verdict into a folder; this puts them on one page, typed by nobody. What
`diffusers_gm.evaluation` measured may lie there too, its `results.json` and `results.png` under any name.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from textwrap import shorten

from ..cli import Parser
from ..evaluation.report import table, verdict
from ..evaluation.results import Results
from ..files import write_text
from .report import Report

INTRODUCTION = """\
# Results

Made by `python -m diffusers_gm.studies.page` of the reports in `{reports}`; no figure is typed by hand. First what
was found, in short; then the words; then a section for every study: the command that measured it, its figures, a
verdict that the command worked out, and its conditions. Where a result goes against us, it says so.
"""

GLOSSARY = """\
## Words

- **Network calls**: evaluations of the network, the currency of all comparisons. **Peers** are the samplers of
  diffusers.
- **FD-Lite0**, **KID-Lite0**: Frechet and kernel distance of samples to real images by features of an
  EfficientNet-Lite0, what FID and KID are by those of Inception; squared distances, and no FID. **FD of pixels**:
  that of the pixels themselves, or of as many principal components of the images as the samples allow.
- **Sliced W2**: Wasserstein-2 distance of the pixels, the root mean square over random directions; no squared
  distance.
- **Precision**, **density**: whether samples lie among real images; **recall**, **coverage**: whether real ones lie
  among samples. By nearest neighbours in the same features; a recall near 0 is a lack of variety.
- **Floor**: the distance of as many real images to the same reference. *Over the floor*, 1 is as good as real images.
- **Seeds**, **+-**, **±**: trainings or draws that differ in the random numbers alone, and the spread of the values
  over them, a standard deviation unless table or conditions say otherwise. Within it, values are not told apart.
- **Ladder**: the noise levels that a sampler goes down, `sigma_1` to `sigma_L`, the grid. **Chain**: the image on its
  way down. Langevin steps leave more noise in it than the ladder says: *told the ladder* or *told the chain* is which
  of the two levels the network is given, and its *own level* is one that is measured in the image.
- **Explore**: Langevin steps on the first level, then down. Its **a** is the dimensionless length of such a step, the
  paper's eps in units of the squared last level.
- **Technique 4**: how long a Langevin step is. **prop3** is the paper's criterion (its proposition 3), which looks at
  one level; the **fixed point** looks at the whole chain. *Annealed, chain, fixed point* took steps on the first level
  as well, where a chain that is told its level takes none any more; so did those of equal budgets and GM-SGM's claim.
- **Order 1**: the denoised image is held over a step. So it was in all samplers of equal budgets, of GM-SGM's claim
  and of NCSNv2's techniques, and in what is named so; by now they extrapolate it, which is order 2.
- **Level not told**, **nor input scaled**: Technique 3 of NCSNv2 is a network that is not told the noise level, and
  whose output is divided by it. *Nor input scaled*: beyond that its input is the noisy image as it is, not brought to
  one size.
- **K**: number of Gaussians that the noise of a training is mixed from; K = 1 is ordinary noise.
- **tau**: stochasticity of the multistep sampler, from 0 (deterministic, the probability flow) to 1 (the reverse
  diffusion).
- **Martingale defect**: how far a network is from an exact denoiser, by its own runs: about 0 for an exact one, below
  0 where its errors vary from level to level. `calibrate` takes tau by it.
- **Grids**: which noise levels a sampler calls at. *default*, *leading*, *trailing*, *exponential*, *Karras*, *lu
  lambdas* and *quadratic* are settings of the schedulers, *even levels* is ours, *KL optimal* and **AYS** (Align Your
  Steps, found for Stable Diffusion) are published formulas and tables. *calibrated* is made for the network by
  `calibrate`, *fast* by its short form, and **GITS-like** by one trajectory of the network, in the manner of
  [GITS](https://arxiv.org/abs/2405.11326).
- **HSM**, **DSM**: hybrid and denoising score matching, two losses of CLD; its *mixed score* is a network that
  corrects the score of Gaussian data. **SSCS**: its sampler, a splitting of the reverse diffusion.
"""

# Headings of the summary, and the names of reports under them by how they begin: the order of the page.
ORDER: dict[str, tuple[str, ...]] = {
    "Ways of training, at an equal budget": ("equal-budget-digits", "equal-budget-Fashion", "equal-budget"),
    "Samplers of one and the same network": ("samplers_settings", "samplers", "defaults"),
    "GM-SGM": ("gm_sgm_claim", "gm_sgm"),
    "NCSNv2": ("ncsnv2_techniques", "ncsnv2"),
    "CLD": ("cld_squared", "cld"),
    "Costs": ("step_cost", "throughput", "latent_caching", "fine_tuning"),
    "More": ("",),
}
# Letters of an answer in the summary: sentences until there are so many, and at most.
ANSWER = (60, 400)


def page(reports: Path, output: Path) -> str:
    """The page as Markdown, with links relative to `output`.

    Raises:
        ValueError: if there are no reports in the folder.
    """
    paths = sorted(reports.glob("*.json"))
    if not paths:
        raise ValueError(f"no reports (*.json) in {reports}: run a study with --output {reports}")
    folder = Path(os.path.relpath(reports, output.parent)).as_posix()
    studies = sorted(map(read, paths), key=place)
    titles = Counter(s.title for s in studies)
    for study in studies:  # links to headings tell them by their titles
        if titles[study.title] > 1:
            study.title += f" ({study.name})"
    sections = "\n\n".join(s.markdown(folder) for s in studies)
    return f"{INTRODUCTION.format(reports=folder)}\n{summary(studies)}\n\n{GLOSSARY}\n{sections}\n"


def place(study: Report) -> tuple[int, int, str]:
    """Where a report stands on the page: by `ORDER`, then by its name."""
    return next(
        (i, j, study.name)
        for i, names in enumerate(ORDER.values())
        for j, name in enumerate(names)
        if study.name.startswith(name)
    )


def summary(studies: Sequence[Report]) -> str:
    """A line for every report, with a link to its section, under the headings of `ORDER`; no question twice running."""
    lines, asked = ["## In short"], ""
    for i, found in groupby(studies, lambda study: place(study)[0]):
        lines += ["", f"**{list(ORDER)[i]}**", ""]
        for study in found:
            question = "" if study.question == asked else f" {study.question}"
            lines.append(f"- [{study.title}](#{anchor(study.title)}):{question} *{answer(study.verdict)}*")
            asked = study.question
    return "\n".join(lines)


def answer(verdict: str) -> str:
    """The beginning of a verdict: whole sentences, or, of a long one, as many words as there is room for."""
    enough, most = ANSWER
    said = ""
    for sentence in re.split(r"(?<=\.) (?=[A-Z])", verdict.replace("*", "")):
        said = f"{said} {sentence}".strip()
        if len(said) >= enough:
            break
    return shorten(said, most, placeholder=" ...")


def read(path: Path) -> Report:
    """The report of a study, or of what an evaluation has measured.

    Raises:
        ValueError: if the file is neither.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not (isinstance(content, dict) and "cells" in content):
        return Report.read(path)
    results, picture = Results.read(path), path.with_suffix(".png")
    conditions = results.conditions
    return Report(
        path.stem,
        f"Evaluation: {conditions['model']} against {conditions['data']}",
        "How far are the samples from real images, at several numbers of network calls?",
        verdict(results),
        [table(results)],
        [picture.name] if picture.is_file() else [],
        f"{conditions['versions']}.",
        results.command,
    )


def anchor(title: str) -> str:
    """The link to a heading that Markdown viewers make of it."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(f"{__package__}.page", (__doc__ or "").splitlines()[0])
    parser.add_argument("--reports", type=Path, default=Path("model_cards/results"), help="folder of the reports")
    parser.add_argument("--output", type=Path, default=Path("model_cards/results.md"), help="the page")
    args = parser.parse_args(arguments)
    try:
        text = page(args.reports, args.output)
    except ValueError as error:
        parser.error(str(error))
    write_text(args.output, text)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
