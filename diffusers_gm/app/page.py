"""The page: what is on it, and which function answers which button. Needs gradio."""

import contextlib
import logging
import time
from collections.abc import Iterator
from inspect import isgenerator
from pathlib import Path
from typing import Any

import gradio as gr

from . import cells
from .compare import calibrate, code_of, distance
from .models import CALIBRATED, FIRST, Model, why_left_out
from .runs import MAX_IMAGES, Run, Settings, advance, parse_calls

logger = logging.getLogger(__name__)

ALL = "all"
# Why there is no distance.
ONE_CLASS = "it is to the training images of all classes, and one class was chosen"
NO_DATA = "the training images are not at hand, or the samples are fewer than two or not finite"
# Between two pictures of a run.
SECONDS = 0.1
# One thing at a time has the network.
QUEUE: dict[str, Any] = {"concurrency_id": "network", "concurrency_limit": 1}
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
    block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"
)
INTRODUCTION = """# Samplers side by side
One network, the same noise: a row is a sampler, a cell a number of network calls."""


def in_words(error: Exception) -> str:
    """An exception as a sentence; what nobody foresaw is logged, too."""
    if isinstance(error, ValueError | OSError | ImportError):
        return cells.error(str(error))
    logger.exception("not foreseen", exc_info=error)
    return cells.error(f"{type(error).__name__}: {error}")


def load(name: str) -> dict[str, Any]:
    """The model in a folder or on the Hub, and what can be chosen for it; nothing is left of the one before."""
    hidden = gr.update(visible=False)
    cleared = {"message": "", "result": "", "compared": None, "levels": hidden, "export": hidden}
    try:
        model = Model.load(name)
    except Exception as error:
        empty = gr.update(choices=[], value=[])
        return {"model": None, "status": in_words(error), "samplers": empty, "conditional": hidden, **cleared}
    first = [entry for entry in FIRST if entry in model.samplers]
    parameters = sum(weight.numel() for weight in model.pipe.unet.parameters())
    words = (
        f"{type(model.pipe).__name__}, {parameters / 1e6:.2g} million parameters, on {model.pipe.device}; saved with "
        f"{type(model.pipe.scheduler).__name__}.\n{why_left_out(model)}"
    )
    return {
        "model": model,
        "status": cells.note(words),
        "samplers": gr.update(choices=list(model.samplers), value=first),
        "conditional": gr.update(visible=bool(model.classes)),
        "label": gr.update(choices=[ALL, *model.classes], value=ALL),
        **cleared,
    }


def chosen_settings(seed: float, images: float, label: str, guidance: float) -> Settings:
    return Settings(
        int(seed or 0), int(images), None if label == ALL else label, 1.0 if guidance is None else float(guidance)
    )


def compare(model: Model | None, names: list[str], calls: str, *chosen: Any) -> Iterator[dict[str, Any]]:
    """Run every sampler at every number of calls; what there is so far, again and again."""
    try:
        if model is None:
            raise ValueError("there is no model yet: choose one above")
        if not names:
            raise ValueError("choose at least one sampler")
        settings = chosen_settings(*chosen)
        runs = [Run(model.sampler(name), n) for name in names for n in parse_calls(calls)]
    except Exception as error:
        yield {"message": in_words(error)}
        return
    yield {"message": "", "result": cells.table(runs), "export": gr.update(visible=False)}
    shown = 0.0
    try:
        for run in runs:
            for _ in advance(model, run, settings):
                if run.finished or run.error or time.monotonic() - shown > SECONDS:
                    yield {"result": cells.table(runs)}
                    shown = time.monotonic()
        one_class = settings.class_label is not None
        for run in runs if not one_class else []:  # takes longer than to sample
            if run.finished and run.images is not None:
                run.distance = distance(model, run.images)
                yield {"result": cells.table(runs)}
        if any(run.finished for run in runs) and not any(run.distance for run in runs):
            yield {"message": cells.note(f"No distance to real images: {ONE_CLASS if one_class else NO_DATA}.")}
    except Exception as error:
        yield {"message": in_words(error)}
    done = {f"{run.sampler.name}, {run.calls} calls": (model, run, settings) for run in runs if run.finished}
    if done:
        first = next(iter(done))
        which, visible = gr.update(choices=list(done), value=first), gr.update(visible=True)
        yield {"compared": done, "which": which, "export": visible, **export(done, first)}


def find_levels(
    model: Model | None, names: list[str], calls: str, effort: str, *chosen: Any
) -> Iterator[dict[str, Any]]:
    """Calibrate, and show what was found."""
    yield {"message": cells.note("Calibrating: the network is called some hundreds of times.")}
    try:
        if model is None:
            raise ValueError("there is no model yet: choose one above")
        settings = chosen_settings(*chosen)
        picture, words = calibrate(model, parse_calls(calls), effort, settings)
    except Exception as error:
        yield {"message": in_words(error)}
        return
    yield {
        "message": cells.note(f"Calibrated: choose Compare to see {CALIBRATED!r} beside the others."),
        "levels": gr.update(visible=True),
        "picture": picture,
        "found": words,
        "samplers": gr.update(choices=list(model.samplers), value=list(dict.fromkeys([*names, CALIBRATED]))),
    }


def export(compared: dict[str, Any] | None, which: str | None) -> dict[str, Any]:
    """The code and the config of one of the runs."""
    if not compared or which not in compared:
        return {"code": "", "config": ""}
    model, run, settings = compared[which]
    return {"code": code_of(model, run, settings), "config": run.sampler.scheduler.to_json_string()}


def controls(given: str) -> dict[str, Any]:
    """The left column."""
    trained = sorted(str(path.parent) for path in Path("outputs").glob("*/model_index.json"))
    at_hand = list(dict.fromkeys([given, *trained]))
    parts: dict[str, Any] = {"model": gr.State(None)}
    parts["name"] = gr.Dropdown(at_hand, value=given, label="Model", info="a folder, or a name on the Hub", allow_custom_value=True, elem_id="model")  # fmt: skip # noqa: E501
    parts["status"] = gr.HTML(elem_id="status", padding=False)
    parts["samplers"] = gr.Dropdown([], multiselect=True, label="Samplers", info="chain: the network is told the noise level that the Langevin run has come to; or any other sampler, such as DEISMultistepScheduler solver_order=3", allow_custom_value=True, elem_id="samplers")  # fmt: skip # noqa: E501
    with gr.Row():
        parts["calls"] = gr.Textbox("5 10 20", label="Network calls", min_width=120, elem_id="calls")
        parts["seed"] = gr.Number(0, label="Seed", precision=0, min_width=80, elem_id="seed")
    parts["images"] = gr.Slider(1, MAX_IMAGES, 32, step=1, label="Images", info="the more, the surer is the distance to real ones", elem_id="images")  # fmt: skip # noqa: E501
    with gr.Row(visible=False) as parts["conditional"]:
        parts["label"] = gr.Dropdown([ALL], value=ALL, label="Class", min_width=120, elem_id="class")
        parts["guidance"] = gr.Number(1, label="Guidance", step=0.5, min_width=80, elem_id="guidance")
    with gr.Row():
        parts["compare"] = gr.Button("Compare", variant="primary", elem_id="compare", min_width=120)
        parts["stop"] = gr.Button("Stop", elem_id="stop", min_width=80)
    with gr.Accordion("Calibrate", open=False, elem_id="calibration"):
        gr.Markdown("Finds the noise levels that suit this network at these numbers of calls, by itself.")
        parts["effort"] = gr.Radio(["fast", "full"], value="fast", label="Effort", info="fast: seconds, good on many networks; full: some hundreds of network calls for each number", elem_id="effort")  # fmt: skip # noqa: E501
        parts["calibrate"] = gr.Button("Calibrate", elem_id="calibrate")
    return parts


def results() -> dict[str, Any]:
    """The right column."""
    parts: dict[str, Any] = {"compared": gr.State(None)}
    parts["message"] = gr.HTML(elem_id="message", padding=False)
    with gr.Accordion("Levels", visible=False, elem_id="levels") as parts["levels"]:
        parts["picture"] = gr.Image(show_label=False, interactive=False, buttons=["download", "fullscreen"])
        parts["found"] = gr.Textbox(show_label=False, interactive=False, elem_id="found")
    parts["result"] = gr.HTML(elem_id="result", padding=False)
    with gr.Accordion("Use it in your code", visible=False, elem_id="export") as parts["export"]:
        parts["which"] = gr.Dropdown([], label="Of", elem_id="which")
        parts["code"] = gr.Code(language="python", label="Python", interactive=False, elem_id="code")
        parts["config"] = gr.Code(language="json", label="Config of the scheduler", interactive=False, max_lines=16, elem_id="config")  # fmt: skip # noqa: E501
    return parts


def build(given: str) -> gr.Blocks:
    """The page, with a model to begin with."""
    with gr.Blocks(title="diffusers_gm: samplers side by side", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                parts = controls(given)
            with gr.Column(scale=3, min_width=300):
                parts |= results()

        def listen(event: Any, work: Any, inputs: str, outputs: str, **how: Any) -> Any:
            """On an event, `work` of these parts, which names the parts that it answers."""

            def answered(*values: Any) -> Iterator[dict[Any, Any]]:
                answer = work(*values)
                for told in answer if isgenerator(answer) else [answer]:
                    yield {parts[key]: value for key, value in told.items()}

            return event(answered, *([parts[key] for key in keys.split()] for keys in (inputs, outputs)), **how)

        settings = "seed images label guidance"
        for event in (page.load, parts["name"].change):
            of_model = "model status samplers conditional label message result compared levels export"
            listen(event, load, "name", of_model, **QUEUE)
        running = listen(
            parts["compare"].click,
            compare,
            f"model samplers calls {settings}",
            "message result export compared which code config",
            show_progress="hidden",
            **QUEUE,
        )
        parts["stop"].click(None, cancels=[running])
        listen(
            parts["calibrate"].click,
            find_levels,
            f"model samplers calls effort {settings}",
            "message levels picture found samplers",
            **QUEUE,
        )
        listen(parts["which"].change, export, "compared which", "code config")
    return page


def launch(model: str, host: str, port: int | None, browser: bool) -> None:
    """Serve the page until it is interrupted."""
    page = build(model)
    page.launch(
        server_name=host,
        server_port=port,
        inbrowser=browser,
        prevent_thread_lock=True,
        theme=THEME,
        css_paths=[Path(__file__).with_name("style.css")],
        footer_links=[],
        ssr_mode=False,
        share=False,
    )
    with contextlib.suppress(ImportError):
        import ot  # noqa: F401 - takes seconds, for which somebody would wait later
    page.block_thread()
