"""What the app does, without a page: models, runs call by call, distances, calibration, code, and their HTML."""

import json
import re
import runpy
import shutil
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from images import save_images
from networks import tiny_autoencoder, tiny_network

from diffusers_gm import (
    AnnealedLangevinScheduler,
    CLDPipeline,
    CLDSSCSScheduler,
    GMLangevinScheduler,
    GMSGMPipeline,
    NCSNv2Pipeline,
    UnconditionalPipeline,
)
from diffusers_gm.app import cells
from diffusers_gm.app.compare import calibrate, code_of, distance
from diffusers_gm.app.models import CALIBRATED, SAVED, Model, why_left_out
from diffusers_gm.app.runs import Run, Settings, advance, parse_calls
from diffusers_gm.data import split_digits
from diffusers_gm.evaluation import sliced_wasserstein

MIXTURE = {"mixture_weights": [0.8, 0.2], "mixture_scales": [0.7, 1.743559577]}
PIPELINES = {
    "ncsnv2": lambda: NCSNv2Pipeline(tiny_network(), AnnealedLangevinScheduler(sigma_max=10.0)),
    "gm-sgm": lambda: GMSGMPipeline(
        tiny_network(), GMLangevinScheduler(sigma_max=10.0, model_noise="mixture", **MIXTURE)
    ),
    "cld": lambda: CLDPipeline(tiny_network(2, 1), CLDSSCSScheduler(prediction_type="cld_mixed")),
    "classes": lambda: NCSNv2Pipeline(
        tiny_network(num_class_embeds=4), AnnealedLangevinScheduler(sigma_max=10.0), class_names=["one", "two", "many"]
    ),
    "ddpm": lambda: DDPMPipeline(tiny_network(), DDPMScheduler(clip_sample=False)),
    "unconditional": lambda: UnconditionalPipeline(tiny_network(), DDPMScheduler(clip_sample=False)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Untrained models, which say that they were trained on digits."""
    root = tmp_path_factory.mktemp("models")
    for name, make in PIPELINES.items():
        make().save_pretrained(root / name)
        (root / name / "training_args.json").write_text(json.dumps({"dataset_name": "digits", "resolution": 8}))
    return {name: str(root / name) for name in PIPELINES}


@pytest.fixture
def model(folders):
    return Model.load(folders["ncsnv2"])


def done(model, name, calls=6, settings=None):
    run = Run(model.sampler(name), calls)
    for _ in advance(model, run, settings or Settings(num_images=3)):
        pass
    return run


# --- Models ---


def test_the_menu_is_what_suits_the_network(folders):
    menus = {name: Model.load(folder) for name, folder in folders.items()}
    assert {"UniPC", "GM, ode", "CLD, sscs", "annealed Langevin, chain"} <= set(menus["ncsnv2"].samplers)
    assert {"GM, ode", "GM, jump"} <= set(menus["gm-sgm"].samplers)
    assert not {"UniPC", "DDIM", "annealed Langevin"} & set(menus["gm-sgm"].samplers)
    assert "mixture noise" in menus["gm-sgm"].left_out["annealed Langevin"]
    assert {"CLD, probability flow", "multistep, fixed levels"} <= set(menus["cld"].samplers)
    assert {"DDIM", "UniPC", "CLD, sscs"} <= set(menus["ddpm"].samplers)
    for menu in menus.values():
        assert SAVED in menu.samplers
        assert "Euler, flow" in menu.left_out
    assert {name: menu.classes for name, menu in menus.items() if menu.classes} == {"classes": ["one", "two", "many"]}


def test_it_is_said_why_samplers_are_left_out(folders):
    lines = why_left_out(Model.load(folders["gm-sgm"])).splitlines()
    assert len(lines) == 2, "one for all that lack the same"
    assert lines[0].startswith("Left out: annealed Langevin; annealed Langevin, chain; ")
    assert lines[0].endswith(
        "CLD, probability flow: the network was trained with mixture noise, which it would take for Gaussian."
    )
    assert lines[1].endswith(
        "Euler, EDM: no scheduler of diffusers reads a network that was trained with mixture noise."
    )
    assert why_left_out(Model.load(folders["ncsnv2"])).startswith(
        "Left out: Euler, flow: it reads those of flow noise, "
    )
    nothing = Model.load(folders["ddpm"])
    nothing.left_out = {}
    assert why_left_out(nothing) == ""


def test_what_is_saved_is_named(folders):
    model = Model.load(folders["cld"])
    assert [model.samplers[name].title for name in (SAVED, "CLD, sscs")] == ["as saved, CLDSSCSScheduler", "CLD, sscs"]
    assert "<h3>as saved, CLDSSCSScheduler</h3>" in cells.table([Run(model.sampler(SAVED), 4)])


def test_models_that_are_none_are_refused_in_words(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no trained pipeline"):
        Model.load(str(tmp_path / "empty"))
    with pytest.raises(OSError, match="neither a folder nor a pipeline on the Hub"):
        Model.load("me/nothing-of-the-kind")
    with pytest.raises(ValueError, match="give the folder"):
        Model.load(" ")


def test_any_other_sampler_is_described(model):
    sampler = model.sampler("DEISMultistepScheduler solver_order=3 use_karras_sigmas=true")
    assert sampler.scheduler.config.solver_order == 3
    assert sampler.code.endswith("diffusers_config(), solver_order=3, use_karras_sigmas=True)")
    for name, message in {
        "Tea": "'Tea' is no scheduler",
        "DDIMScheduler sugar=2": "'sugar=2' must be option=value",
    }.items():
        with pytest.raises(ValueError, match=message) as refused:
            model.sampler(name)
        assert not str(refused.value).startswith("--")


# --- Runs ---


@pytest.mark.parametrize(
    ("name", "sampler"), [("ncsnv2", "UniPC"), ("cld", SAVED), ("gm-sgm", "GM, ode"), ("ddpm", "DDIM")]
)
def test_a_run_is_told_call_by_call(folders, name, sampler):
    model, settings = Model.load(folders[name]), Settings(seed=5, num_images=3)
    own = model.pipe.scheduler
    run = Run(model.sampler(sampler), 4)
    told = [(r.network_calls, r.finished, r.images.clone()) for r in advance(model, run, settings)]
    assert [calls for calls, _, _ in told] == [1, 2, 3, 4, 4]
    assert [finished for _, finished, _ in told] == [False] * 4 + [True]
    assert model.pipe.scheduler is own
    assert all(look.denoised.shape == look.seen.shape == (1, 1, 8, 8) for look in run.looks)
    assert all(
        torch.equal(images[:1], look.denoised) for (_, _, images), look in zip(told[:-1], run.looks, strict=True)
    )
    assert run.seconds > 0
    assert not run.error
    # Image i by seed + i, whatever the batch.
    alone = done(model, sampler, 4, Settings(seed=6, num_images=1))
    torch.testing.assert_close(run.images[1:2], alone.images)
    # Nothing of a run is left in the sampler.
    again = done(model, sampler, 4, settings)
    assert torch.equal(again.images, run.images)
    assert len(again.looks) == 4


@pytest.mark.parametrize(
    ("name", "sampler"),
    [("ncsnv2", "DDIM"), ("ncsnv2", "Euler"), ("ddpm", "DDIM"), ("ddpm", "Euler"), ("edm", "Euler, EDM")],
)
def test_the_denoised_images_of_schedulers_of_diffusers(folders, name, sampler):
    """Those two say what they are: the network is read as they do."""
    preconditioned = AnnealedLangevinScheduler(noise_space="edm", sigma_data=0.5, sigma_max=80.0)
    edm = Model.of("", NCSNv2Pipeline(tiny_network(), preconditioned))
    model = edm if name == "edm" else Model.load(folders[name])
    said, scheduler = [], model.sampler(sampler).scheduler
    take = type(scheduler).step

    class Telling(type(scheduler)):
        def step(self, *args, **kwargs):
            result = take(self, *args, **kwargs)
            said.append(result.pred_original_sample[:1].float())
            return result

    scheduler.__class__ = Telling
    run = done(model, sampler)
    assert len(said) == len(run.looks) == 6
    for ours, theirs in zip(run.looks, said, strict=True):
        torch.testing.assert_close(ours.denoised, theirs, rtol=2e-3, atol=2e-3 * float(theirs.abs().max()))


def test_second_order_schedulers_make_no_more_calls_than_allowed(model):
    run = done(model, "Heun", 10)
    assert (run.network_calls, run.steps) == (9, 5)
    assert "9 made" in cells.cell(run)


def test_a_run_that_nobody_watches_stops(model):
    before, calls = threading.active_count(), []
    model.pipe.unet.register_forward_pre_hook(lambda *_: calls.append(0))
    watched = advance(model, Run(model.sampler("GM, ode"), 500), Settings(num_images=1))
    next(watched)
    watched.close()
    assert threading.active_count() == before
    assert len(calls) < 100
    assert done(model, "GM, ode").finished, "and the next one runs"


def test_errors_of_a_run_are_its_own(folders):
    model = Model.load(folders["gm-sgm"])
    run = done(model, "GM, jump", 3)
    assert "no solution" in run.error
    assert not run.finished
    assert "gm-failed" in cells.cell(run)
    assert "no solution" in cells.cell(run)


@pytest.mark.parametrize("text", ["", "ten", "0", "5 -3", "2000", "5.5"])
def test_calls_that_are_none(text):
    with pytest.raises(ValueError, match="whole numbers from 1 to 1000"):
        parse_calls(text)


def test_settings():
    assert parse_calls("20, 5 10 5") == [5, 10, 20]
    for wrong in ({"seed": -1}, {"num_images": 0}, {"num_images": 257}):
        with pytest.raises(ValueError, match="must be"):
            Settings(**wrong)


def test_classes_and_guidance(folders):
    model = Model.load(folders["classes"])
    everything, two, guided = (
        done(model, "UniPC", 4, Settings(num_images=6, **chosen))
        for chosen in ({}, {"class_label": "two"}, {"class_label": "two", "guidance_scale": 3.0})
    )
    assert not torch.equal(two.images, everything.images)
    assert not torch.equal(two.images, guided.images)
    of_pipe = model.pipe(4, num_inference_steps=4, class_labels="two", generator=Settings(num_images=4).generators())
    assert len(of_pipe.images) == 4
    assert 'class_labels="two", guidance_scale=3.0' in code_of(model, guided, Settings(0, 6, "two", 3.0))


def test_latents_are_decoded():
    vae = tiny_autoencoder()
    pipe = NCSNv2Pipeline(tiny_network(4, 4), AnnealedLangevinScheduler(sigma_max=10.0), vae=vae)
    run = done(Model.of("", pipe), "UniPC", 4)
    assert run.images.shape[1:] == run.looks[-1].denoised.shape[1:] == (3, 16, 16)
    torch.testing.assert_close(run.looks[-1].denoised, run.images[:1], atol=0.5, rtol=0)


# --- Distance ---


def test_the_distance_is_that_of_the_evaluation_over_the_floor(folders):
    model = Model.load(folders["gm-sgm"])
    training, held_out = split_digits()
    ratio, spread = distance(model, held_out[:40])
    assert 0.7 < ratio < 1.4
    reference, floor = model.floors[40]
    assert 0 < spread < 0.3
    assert spread == pytest.approx(stdev(floor) / mean(floor))
    assert sorted(map(float, reference.sum((1, 2, 3)))) == pytest.approx(
        sorted(map(float, training.sum((1, 2, 3)))), abs=1e-3
    )
    assert len(floor) == 8
    black = -torch.ones(40, 1, 8, 8)
    assert distance(model, black)[0] == pytest.approx(sliced_wasserstein(black, reference) / mean(floor))
    assert distance(model, black)[0] > 2
    assert distance(model, held_out[:200])[1] is None, "held-out digits are enough for one draw"


def test_no_distance_without_data(folders, tmp_path):
    model = Model.load(folders["ncsnv2"])
    assert distance(model, torch.zeros(1, 1, 8, 8)) is None
    assert distance(model, torch.full((4, 1, 8, 8), float("nan"))) is None
    model.name = str(tmp_path)
    assert distance(model, torch.zeros(4, 1, 8, 8)) is None


@pytest.mark.parametrize(
    ("number", "more", "found"),
    [
        (24, {}, True),
        (25, {}, False),
        (16, {}, False),
        (16, {"max_train_samples": 16}, True),
        (99, {"streaming": True}, True),
    ],
)
def test_the_folder_of_a_training_is_known_by_its_bare_name(folders, tmp_path, monkeypatch, number, more, found):
    """Another of the same name is not taken for it. Its images are made as large as for the training."""
    save_images(tmp_path / "train", size=(16, 16))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders["ncsnv2"], "m")
    said = {"train_data_dir": "train", "num_images": number, "resolution": 8} | more
    Path("m", "training_args.json").write_text(json.dumps(said))
    images = torch.linspace(-1, 1, 4).view(4, 1, 1, 1).expand(-1, 1, 8, 8)
    assert (distance(Model.load("m"), images) is not None) == found


def test_it_is_said_why_there_is_no_distance(folders):
    page = pytest.importorskip("diffusers_gm.app.page", reason="the page needs gradio")
    model = Model.load(folders["classes"])

    def said(*chosen):
        return "".join(answer.get("message", "") for answer in page.compare(model, ["UniPC"], "4", *chosen))

    assert said(0, 3, page.ALL, 1) == ""
    assert "all classes, and one class was chosen" in said(0, 3, "two", 1)
    assert "fewer than two" in said(0, 1, page.ALL, 1)


# --- Calibration and code ---


def test_calibrating_adds_a_sampler_whose_levels_are_shown(folders):
    model = Model.load(folders["ncsnv2"])
    with pytest.raises(ValueError, match="calls must be whole numbers from 2 to 80"):
        calibrate(model, [1], "fast", Settings())
    assert CALIBRATED not in model.samplers
    picture, words = calibrate(model, [4, 6], "fast", Settings())
    assert min(picture.size) > 100
    assert re.search(r"^4 calls: 10, .*\n6 calls: 10, ", words, re.MULTILINE)
    run = done(model, CALIBRATED, 4)
    assert run.finished
    assert json.loads(run.sampler.scheduler.to_json_string())["_class_name"] == "CalibratedMultistepScheduler"


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        *(("ncsnv2", SAVED), ("ncsnv2", "UniPC"), ("ncsnv2", "annealed Langevin, chain"), ("ncsnv2", CALIBRATED)),
        *(
            ("cld", "CLD, probability flow"),
            ("ddpm", "UniPC"),
            ("ddpm", "CLD, sscs"),
            ("classes", "UniPC"),
            ("unconditional", "UniPC"),
        ),
    ],
)
def test_the_code_gives_the_same_images(folders, name, sampler, capsys):
    model, settings = Model.load(folders[name]), Settings(seed=3, num_images=2)
    if sampler == CALIBRATED:
        calibrate(model, [6], "fast", settings)
    run = done(model, sampler, 6, settings)
    scope = {}
    exec(code_of(model, run, settings), scope)
    pixels = torch.stack([torch.tensor(list(image.tobytes())) for image in scope["images"]])
    shown = ((run.images.clamp(-1, 1) + 1) * 127.5).round().flatten(1)
    assert (pixels - shown).abs().max() <= 1


# --- HTML ---


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.pictures = [], []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.pictures.append(dict(attrs))
        else:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_table_shows_what_there_is(model):
    settings = Settings(num_images=40)
    runs = [Run(model.sampler("GM, ode"), n) for n in (4, 12)] + [Run(model.sampler("UniPC"), 4)]
    for _ in advance(model, runs[1], settings):
        pass
    runs[1].distance = (1.234, 0.05)
    next(watched := advance(model, runs[2], settings))
    page = Balanced()
    page.feed(html := cells.table(runs))
    watched.close()
    assert page.open == []
    assert html.count("<section") == 2
    assert html.count("waiting</div>") == 1
    assert html.count("gm-finished") == 1
    assert "1.23 x floor (± 0.05)" in html
    runs[1].distance = (1.234, None)
    assert "1.23 x floor</span>" in cells.table(runs)
    assert html.count("x floor: the sliced Wasserstein distance") == 1
    assert "x floor" not in cells.table(runs[:1]), "nothing is explained that is not there"
    assert "denoised at call 1</span>" in html
    assert [picture["alt"] for picture in page.pictures] == [
        "first 32 of 40 samples of GM, ode, 12 calls",
        "first image, denoised at 8 of 12 calls: 1, 3, 4, 6, 7, 9, 10, 12",
        "first 32 of 40 denoised images of UniPC, 4 calls",
        "first image, denoised at call 1",
    ]


def test_words_of_others_are_escaped(model):
    run = Run(model.sampler("UniPC"), 4, error="<script>alert(1)</script>")
    run.sampler = run.sampler.__class__("<b>bold</b>", run.sampler.scheduler)
    html = cells.table([run]) + cells.error("<i>no</i>") + cells.note("<u>no</u>")
    assert not re.search("<(script|b|i|u)>", html)


def test_errors_are_sentences():
    assert cells.sentence("no  such\n model") == "No such model."
    assert cells.sentence("me/model is none") == "me/model is none."
    assert cells.sentence("Why?") == "Why?"
    assert len(cells.sentence("word " * 500)) < 410


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "diffusers_gm.app.page", raising=False)
    monkeypatch.setattr(sys, "argv", ["diffusers_gm.app"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("diffusers_gm.app", run_name="__main__")
    assert ended.value.code == 2
    said = 'error: gradio is not installed: pip install "diffusers-gm[app]" (in a clone: pip install -e ".[app]")\n'
    assert capsys.readouterr().err == said


def test_an_emptied_box_of_the_guidance_is_none():
    from diffusers_gm.app.page import chosen_settings

    assert chosen_settings(0, 4, "3", None).guidance_scale == 1.0
    assert chosen_settings(0, 4, "3", 0).guidance_scale == 0.0


@pytest.mark.parametrize("name", ["cld", "nowhere"])
def test_another_model_leaves_no_results_of_the_one_before(folders, name):
    pytest.importorskip("gradio")
    from diffusers_gm.app.page import build, load

    told = load(folders.get(name, name))
    assert (told["result"], told["message"], told["compared"]) == ("", "", None)
    assert not told["export"]["visible"]
    assert not told["levels"]["visible"]
    loading = [event for event in build(name).fns.values() if [part.elem_id for part in event.inputs] == ["model"]]
    assert len(loading) == 2, "of the page, and of another model"
    for event in loading:
        assert {"result", "message", "export", "levels"} <= {part.elem_id for part in event.outputs}
