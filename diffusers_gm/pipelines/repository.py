"""What lies in a repository of the Hub beside the weights, and the model card."""

import re
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..version import __version__

HOMEPAGE = "https://github.com/diffusers-gm/diffusers-gm"

# What `diffusers_gm.evaluation` measures, with the model's folder as --output_dir; version 0.1.0 had `quality` too.
QUALITY_FILES = ("quality.json", "quality.md", "quality.png", "results.json", "results.md", "results.png")
CARD_FILES = ("README.md", "samples.png", "training_args.json", *QUALITY_FILES)

# The card of a model that was not pushed by its training loads it from its own folder.
HERE = 'from_pretrained(".")'
HERE_NOTE = "Run it in the folder of this file. "
# Between these, the card says how good the samples are, once that is measured.
QUALITY = ("<!-- quality -->", "<!-- end of quality -->")
# And between these, which sampler was the best.
BEST = ("<!-- best -->", "<!-- end of best -->")


def model_card(tags: list[str], datasets: list[str] | None, template: Traversable, **values: Any) -> ModelCard:
    """A card of a template, with the metadata that all our models share."""
    data = ModelCardData(
        license="apache-2.0",
        library_name="diffusers_gm",  # the Hub would show diffusers' own snippet otherwise, which fails
        pipeline_tag="unconditional-image-generation",
        tags=["diffusers", "score-based-generative-model", "langevin-dynamics", *tags],
        datasets=datasets,
    )
    return ModelCard.from_template(
        data, template_str=template.read_text(encoding="utf-8"), version=__version__, homepage=HOMEPAGE, **values
    )


def short_card(repo_id: str, pipeline_class: str, num_inference_steps: int) -> ModelCard:
    """The card of a pipeline that nothing else is known of."""
    return model_card(
        [],
        None,
        files(__package__).joinpath("templates/short_card.md"),
        title=repo_id.rpartition("/")[2],
        pipeline_class=pipeline_class,
        repository=repo_id,
        num_inference_steps=num_inference_steps,
    )


# The line by which our cards load a model; other names in a text are its author's.
OURS = "(?:GMSGM|NCSNv2|CLD|Unconditional)Pipeline"
LOAD = re.compile(rf'(?m)^(pipe(?:line)? = {OURS}\.)from_pretrained\("[^"]*"\)')


def card_of_repository(text: str, repo_id: str) -> str:
    """A card with the name that its repository loads by, in place of the folder or another repository."""
    load = f'from_pretrained("{repo_id}")'
    if QUALITY[0] in text:  # one of ours
        text = LOAD.sub(rf"\g<1>{load}", text, count=1)
    return text.replace(HERE, load).replace(HERE_NOTE, "")
