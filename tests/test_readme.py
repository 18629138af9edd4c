"""What the README and the pages beside the code tell people to type, typed; and the picture of the README."""

import argparse
import ast
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers_pipelines import stable_diffusion
from networks import tiny_autoencoder, tiny_network
from pages import blocks, commands, inline_commands, snippets
from PIL import Image

import train_gm_sgm
from diffusers_gm import (
    AnnealedLangevinScheduler,
    CLDPipeline,
    CLDSSCSScheduler,
    GMLangevinScheduler,
    GMSGMPipeline,
    NCSNv2Pipeline,
)
from diffusers_gm.schedulers.base import SamplerScheduler
from diffusers_gm.studies import tour
from diffusers_gm.training.parser import OptionParser

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
# The results page and the cards are made by commands.
PAGES = [README, *sorted((ROOT / "diffusers_gm").rglob("*.md")), ROOT / "model_cards" / "README.md"]
PAGES.append(ROOT / ".github" / "CONTRIBUTING.md")
PAGES = [page for page in PAGES if page.parent.name != "templates"]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# --- The pages themselves ---


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


@every_page
def test_no_measured_figure_is_typed(page):
    """Figures stand on the results page. Code, links, arXiv's numbers and versions are none."""
    code, versions = (
        r"```.*?```|`[^`]*`|\$[^$]*\$|\]\([^)]*\)",
        r"\b(?:diffusers |Python |Apache-)\d+\.\d+|\d+(?:\.\d+){2,}",
    )
    none = rf"{code}|\b\d{{4}}\.\d{{5}}\b|{versions}"
    text = re.sub(none, "", page.read_text(), flags=re.DOTALL)
    assert not re.findall(r"\d*\.\d+|\d ?(?:times|%)", text)


def prose(source):
    """The comments and docstrings of Python."""
    comments = [t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
    described = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, described)]
    return "\n".join([*comments, *(ast.get_docstring(node) or "" for node in nodes)])


def test_no_figure_is_typed_in_passing_in_the_source():
    """Told by how one is written in passing, `.3`: constants have their zero."""
    for path in (ROOT / "diffusers_gm").rglob("*.py"):
        assert not re.findall(r"(?<![\w.)\]`])-?\.\d+", prose(path.read_text())), path


def anchors(page):
    """The links to headings that GitHub makes of them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_no_link_is_broken(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_linked_from_the_readme():
    links = {(ROOT / link.partition("#")[0]).resolve() for link in re.findall(r"\]\(([^)]+)\)", README.read_text())}
    assert {page.resolve() for page in PAGES[1:]} <= links


def test_the_documentation_of_samplers_begins_with_the_loop():
    page = ROOT / "diffusers_gm" / "samplers" / "README.md"
    assert "sample(TwoStep(), denoiser, y, sigmas)" in blocks(page, "python")[0]


# --- Shell commands ---


class Parsed(Exception):
    """The options of a command are in order: it need not run."""


def check_make(words):
    makefile = (ROOT / "Makefile").read_text()
    for word in words[1:]:
        name, is_variable, _ = word.partition("=")
        kind = (
            rf"\b{name}\b *(\?=|:=|=)|ifdef {name}\b|\$\({name}\)" if is_variable else rf"^([a-z]+ )*{name}( [a-z]+)*:"
        )
        assert re.search(kind, makefile, re.MULTILINE), word


def check_module(module, arguments, monkeypatch):
    """As `python -m module arguments`, as far as the options."""
    parse = argparse.ArgumentParser.parse_args

    def parsed(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises((Parsed, SystemExit)) as ended:
        runpy.run_module(module, run_name="__main__")
    assert ended.type is Parsed or ended.value.code in (None, 0)


def check_training(words):
    OptionParser(train_gm_sgm.__doc__).parse(words)


def check_command(words, monkeypatch):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    while "=" in words[0]:  # of the environment
        words = words[1:]
    launched = words[:2] == ["accelerate", "launch"]
    if launched:
        own = next(i for i, word in enumerate(words) if word in ("-m", "train_gm_sgm.py"))
        assert set(words[2:own]) <= {"--multi_gpu", "--num_processes", "2"}
        words = words[own:]
    if words[0] == "make":
        check_make(words)
    elif words[0] == "git":
        assert words == ["git", "clone", project["urls"]["Homepage"]]
    elif words[0] == "cd":
        assert words == ["cd", project["urls"]["Homepage"].rpartition("/")[2]]
    elif words[0] in ("source", "python3"):  # the environment that the Makefile makes
        assert words in (["source", ".venv/bin/activate"], ["python3", "-m", "venv", ".venv"])
    elif words[:3] == ["pip", "install", "-e"]:
        (extra,) = re.fullmatch(r"\.\[(\w+)\]", words[3]).groups()
        assert extra in project["optional-dependencies"]
    elif words[0] == "train_gm_sgm.py":
        check_training(words[1:])
    elif words[0] in project["scripts"]:
        module = project["scripts"][words[0]].partition(":")[0]
        if module == "train_gm_sgm":
            check_training(words[1:])
        else:
            check_module(module.removesuffix(".command").removesuffix(".push"), words[1:], monkeypatch)
    else:
        (at,) = (i for i, word in enumerate(words) if word == "-m")
        assert words[:at] == ([] if launched else ["python"])
        check_module(words[at + 1], words[at + 2 :], monkeypatch)


@every_page
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # modules that are imported already
def test_commands_are_understood(page, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    for words in commands(page):
        check_command(words, monkeypatch)
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
    for target in re.findall(r"`make ([a-z0-9-]+)", text):
        check_make(["make", target])
    shown = {words[2] for words in commands(page) if words[:2] == ["python", "-m"]}
    for module, words in inline_commands(page):
        named = module in shown or page.name == "CHANGELOG.md"  # with its arguments elsewhere
        check_module(module, words or ["--help"] * named, monkeypatch)
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_commands_of_the_claims_are_understood(monkeypatch, tmp_path, capsys):
    page = (ROOT / "diffusers_gm" / "studies" / "README.md").read_text()
    table = page[page.index("| claim |") :].partition("\n\n")[0].splitlines()[2:]
    studies = [study.split() for row in table for study in re.findall(r"`([^`]+)`", row.split("|")[3])]
    assert len(studies) > 12
    monkeypatch.chdir(tmp_path)
    for name, *words in studies:
        check_module(f"diffusers_gm.studies.{name}", words, monkeypatch)
        monkeypatch.undo()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_command_that_is_not_understood_is_found(monkeypatch, capsys):
    for words in (["make", "tea"], ["train_gm_sgm.py", "--sugar", "2"], ["pip", "install", "-e", ".[milk]"]):
        with pytest.raises((AssertionError, SystemExit)):
            check_command(words, monkeypatch)
    for words in (["diffusers_gm.calibrate", "outputs/demo", "--sugar"], ["diffusers_gm.studies.tour"]):
        with pytest.raises(AssertionError):
            check_command(["python", "-m", *words], monkeypatch)


def test_opens_with_the_two_commands():
    made = [words for words in commands(README) if words[0] == "make"]
    assert made[:2] == [["make", "demo"], ["make", "test"]]


@every_page
def test_recipes_are_understood(page, tmp_path):
    for i, text in enumerate(blocks(page, "yaml")):
        path = tmp_path / f"{i}.yaml"
        path.write_text(text)
        for method in ("gm-sgm", *yaml.safe_load(text).get("methods", {})):
            check_training(["--config", str(path), "--method", method])


# --- Trainings ---

TRAINING_PAGE = ROOT / "diffusers_gm" / "training" / "README.md"
ON_DIGITS, ON_IMAGES = [words for words in commands(TRAINING_PAGE) if words[0] == "diffusers-gm-train"][:2]


def train(words, folder, *more):
    """A training command of the pages, cut short."""
    words = list(words)
    words[words.index("--output_dir") + 1] = str(folder)
    short = "--max_train_steps=2 --validation_steps=0 --checkpointing_steps=0 --validation_inference_steps=5"
    subprocess.run([sys.executable, "train_gm_sgm.py", *words[1:], *shlex.split(short), *more], check=True, cwd=ROOT)


@pytest.fixture(scope="module")
def digits_model(tmp_path_factory):
    """By the recipe of `make demo`: of classes, and calibrated."""
    folder = tmp_path_factory.mktemp("readme") / "demo"
    train(ON_DIGITS, folder, "--config", "digits", "--num_validation_images", "2")
    return folder


def test_training_on_a_folder_of_images(tmp_path):
    numbers = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(130):
        pixels = numbers.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    words = [str(tmp_path / "images") if word == "path/to/images" else word for word in ON_IMAGES]
    train(words, tmp_path / "mine", "--num_validation_images", "1", "--block_out_channels", "8", "16")
    config = json.loads((tmp_path / "mine" / "scheduler" / "scheduler_config.json").read_text())
    assert config["mixture_weights"] == [0.8, 0.2]
    assert config["mixture_scales"][1] == pytest.approx(3 * config["mixture_scales"][0])


# --- Python: in place of models of the Hub stand tiny untrained ones, or no network where nothing is sampled ---

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "StableDiffusionXLPipeline": EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
    "StableDiffusion3Pipeline": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "FluxPipeline": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    "StableVideoDiffusionPipeline": EulerDiscreteScheduler(
        **BETAS, prediction_type="v_prediction", sigma_max=700.0, sigma_min=0.002, timestep_type="continuous"
    ),
    "DanceDiffusionPipeline": DDPMScheduler(),
    "AnimateDiffPipeline": DDPMScheduler(**BETAS),
}


def conditional():
    """A model of the digits by class."""
    names = [str(digit) for digit in range(10)]
    return GMSGMPipeline(tiny_network(num_class_embeds=11), GMLangevinScheduler(sigma_max=10.0), class_names=names)


def of_latents():
    """A model of latents."""
    return GMSGMPipeline(tiny_network(4, 4), GMLangevinScheduler(), vae=tiny_autoencoder())


class StandIns:
    """What `from_pretrained` and `push_to_hub` do while the snippets of a page run.

    Attributes: loaded: names that were asked for. pushed: repositories. swapped: pipelines without a network.
    """

    def __init__(self, monkeypatch, digits_model):
        self.digits_model, self.loaded, self.pushed, self.swapped = digits_model, [], [], []
        load_ours, load_scheduler = GMSGMPipeline.from_pretrained, CLDSSCSScheduler.from_pretrained
        velocities = CLDSSCSScheduler(prediction_type="cld_mixed")
        made = {
            DDPMPipeline: lambda: DDPMPipeline(tiny_network(), DDPMScheduler()),
            diffusers.DiffusionPipeline: lambda: DDPMPipeline(tiny_network(), DDPMScheduler()),
            diffusers.StableDiffusionPipeline: lambda: stable_diffusion(diffusers.StableDiffusionPipeline),
            NCSNv2Pipeline: lambda: NCSNv2Pipeline(tiny_network(), AnnealedLangevinScheduler(sigma_max=10.0)),
            CLDPipeline: lambda: CLDPipeline(tiny_network(2, 1), velocities),
            GMSGMPipeline: lambda: load_ours(digits_model),
        } | {getattr(diffusers, name): lambda s=s: self.bare(s) for name, s in SCHEDULERS.items()}
        for cls, make in made.items():
            monkeypatch.setattr(cls, "from_pretrained", lambda name, make=make, **kwargs: self.load(name, make))

        def scheduler(name, **kwargs):
            return self.load(name, lambda: velocities) if name.startswith("me/") else load_scheduler(name, **kwargs)

        monkeypatch.setattr(CLDSSCSScheduler, "from_pretrained", scheduler)
        monkeypatch.setattr(GMSGMPipeline, "push_to_hub", lambda pipe, name, **kwargs: self.pushed.append(name))

    def load(self, name, make):
        self.loaded.append(name)
        return conditional() if name.endswith("-classes") else of_latents() if name.endswith("latents") else make()

    def bare(self, scheduler):
        self.swapped.append(SimpleNamespace(scheduler=scheduler))
        return self.swapped[-1]


@every_page
def test_python_snippets_run_in_order(page, digits_model, tmp_path, monkeypatch, capsys):
    stand_ins = StandIns(monkeypatch, digits_model)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "demo").symlink_to(digits_model)
    tiny_autoencoder().save_pretrained(tmp_path / "path" / "to" / "vae")
    scope = {"__name__": "snippets"}
    with torch.random.fork_rng():  # not all pass a generator
        for i, snippet in enumerate(snippets(page)):
            quick = re.sub(r"calibrate\(pipe(?!.*effort)", 'calibrate(pipe, effort="fast", progress=False', snippet)
            quick = quick.replace(
                'prompt="a lighthouse", guidance', 'prompt="a lighthouse", height=16, width=16, guidance'
            )
            exec(compile(quick, f"{page.name}, snippet {i}", "exec"), scope)
    if page == README:
        assert Image.open("digits.png").size == (268, 268)
        assert len(scope["images"]) == 16
        assert scope["image"].size == (8, 8)
    assert all(isinstance(pipe.scheduler, SamplerScheduler) for pipe in stand_ins.swapped)
    if page.parent.name == "hub":
        assert stand_ins.pushed == ["me/copy"]
    if page.with_suffix(".ipynb").is_file():
        said = capsys.readouterr().out
        assert float(re.search(r"two-step: (\S+) times the floor", said)[1]) < 2
        assert scope["image"].size == (8, 8)


# --- The picture of the README ---


def test_the_tour_shows_a_row_a_sampler_and_a_cell_a_budget(tmp_path, capsys):
    pipe = NCSNv2Pipeline(tiny_network(), AnnealedLangevinScheduler(sigma_max=10.0))
    pipe.save_pretrained(tmp_path / "model")
    own = pipe.scheduler
    rows, left_out = tour.sample_all(pipe, (4, 6), seed=0, effort="fast")
    assert not left_out
    assert pipe.scheduler is own
    assert list(rows) == list(tour.SAMPLERS)
    assert all(len({cell.image.tobytes() for cell in cells}) == 2 for cells in rows.values())
    assert all([len(cell.levels) for cell in cells] == [4, 6] for cells in rows.values())
    assert all(sorted(cell.levels, reverse=True) == cell.levels for cells in rows.values() for cell in cells)
    before, after = rows["ours,\nnot calibrated"][0], rows["ours,\ncalibrated"][0]
    assert before.levels[0] == after.levels[0] == pytest.approx(10.0)
    assert before.levels != after.levels
    assert (before.stochasticity, rows["diffusers:\nUniPC"][0].stochasticity) == (0.0, None)
    tour.main([str(tmp_path / "model"), "--calls", "4", "6", "--effort", "fast"])
    with Image.open(tmp_path / "model" / "tour.png") as picture:
        assert picture.height > 50 * len(rows)
        assert np.asarray(picture.convert("L")).std() > 10
    assert "left out" not in capsys.readouterr().out


def test_the_tour_says_what_it_leaves_out(digits_model, tmp_path, capsys):
    output = tmp_path / "tour.png"
    tour.main([str(digits_model), "--calls", "4", "--effort", "fast", "--output", str(output)])
    assert (
        "left out: diffusers: DDPM: DDPMScheduler does not suit this network: no scheduler" in capsys.readouterr().out
    )
    assert output.is_file()
    with pytest.raises(SystemExit):
        tour.main([str(tmp_path)])
    assert "holds no trained pipeline" in capsys.readouterr().err
