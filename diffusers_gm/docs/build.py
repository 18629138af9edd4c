"""Build the site of the documentation from the pages beside the code and from the docstrings.

    python -m diffusers_gm.docs.build --output outputs/docs

Needs the `docs` extra. Ends with an error at a link to what is not there, and at anything else that mkdocs warns of.
"""

import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ..cli import Parser
from ..extra import extra

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name("mkdocs.yml")
BLOB = "https://github.com/diffusers-gm/diffusers-gm/blob/main"

# The pages of the API: modules whose public classes and functions are shown.
API = {
    "pipelines": (
        "Pipelines and schedulers",
        "pipelines.unconditional pipelines.images pipelines.pipeline_gm_sgm pipelines.pipeline_ncsnv2 "
        "pipelines.pipeline_cld schedulers.base schedulers.options schedulers.scheduling_calibrated_multistep "
        "schedulers.scheduling_annealed_langevin schedulers.scheduling_gm_langevin schedulers.scheduling_cld_sscs "
        "calibration.calibrate",
    ),
    "samplers": (
        "Samplers, readings, processes",
        "samplers.sampler samplers.langevin samplers.mixture samplers.cld samplers.multistep "
        "readings.reading readings.noise_space readings.image readings.velocity "
        "processes.annealed processes.cld processes.mixture",
    ),
    "evaluation": (
        "Data, losses, evaluation",
        "losses likelihood data.digits data.sources evaluation.distances evaluation.features evaluation.scoring "
        "evaluation.likelihood hub.push hub.cards",
    ),
}

CODE = re.compile(r"(^ *```.*?^ *```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
MATH = re.compile(r"\$\$(?P<block>.+?)\$\$|(?<![\w$])\$(?P<inline>[^\s$](?:[^$]*?[^\s$])?)\$(?![\w$])", re.DOTALL)
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)#\s]+)")


def outside_code(text: str, pattern: re.Pattern[str], replace: Callable[[re.Match[str]], str]) -> str:
    """A page in which what is no code is replaced where it fits a pattern."""
    parts = CODE.split(text)
    return "".join(part if i % 2 else pattern.sub(replace, part) for i, part in enumerate(parts))


def with_mathml(text: str) -> str:
    """A page with the formulas between `$`, which GitHub reads, as MathML, which browsers read."""
    with extra("docs"):
        from latex2mathml.converter import convert

    def converted(match: re.Match[str]) -> str:
        block = match["block"] is not None
        formula = convert(" ".join((match["block"] or match["inline"]).split()), display="block" if block else "inline")
        formula = formula.replace("_", "&#95;").replace("*", "&#42;")
        # Markdown takes a line that begins with <math> for a block.
        return formula if block else f"<span>{formula}</span>"

    return outside_code(text, MATH, converted)


def with_links(text: str, page: Path) -> str:
    """A page whose links to files that are no pages or pictures lead to the repository.

    Raises:
        ValueError: for a link to what is not there.
    """

    def led(match: re.Match[str]) -> str:
        target = (page.parent / match[1]).resolve()
        if not target.exists():
            raise ValueError(f"{page.relative_to(ROOT)} links to {match[1]}, which is not there")
        shown = target.suffix in (".md", ".png") and "templates" not in target.parts
        return match[1] if shown else f"{BLOB}/{target.relative_to(ROOT).as_posix()}"

    return outside_code(text, LINK, led)


def gather(folder: Path) -> None:
    """Put the pages, pictures and style of the repository, and the pages of the API, into `folder`, by their paths."""
    pages = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", *(ROOT / "diffusers_gm").rglob("*.md")]
    pages += [*(ROOT / "model_cards").rglob("*.md"), *(ROOT / "model_cards").rglob("*.png")]
    pages.append(CONFIG.with_name("site.css"))
    for page in pages:
        if "templates" in page.parts:
            continue
        target = folder / page.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if page.suffix == ".md":
            target.write_text(with_mathml(with_links(page.read_text("utf-8"), page)), "utf-8")
        else:
            shutil.copyfile(page, target)
    (folder / "api").mkdir()
    for name, (title, modules) in API.items():
        directives = "\n\n".join(f"::: diffusers_gm.{module}" for module in modules.split())
        (folder / "api" / f"{name}.md").write_text(f"# {title}\n\n{directives}\n", "utf-8")


def build(output: Path) -> None:
    """Write the site to the folder `output`, in place of what is there.

    Raises:
        ImportError: without the `docs` extra.
        ValueError: for a link to what is not there.
        SystemExit: for anything that mkdocs warns of, when it has said so.
    """
    with extra("docs"):
        from mkdocs.commands.build import build as build_site
        from mkdocs.config import load_config
    with tempfile.TemporaryDirectory() as folder:
        gather(Path(folder))
        config = load_config(str(CONFIG), docs_dir=folder, site_dir=str(output.resolve()), strict=True)
        config.plugins.on_startup(command="build", dirty=False)
        build_site(config)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("diffusers_gm.docs.build", __doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/docs"), help="folder of the site")
    args = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    try:
        build(args.output)
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    print(f"open {args.output / 'index.html'}")


if __name__ == "__main__":
    main()
