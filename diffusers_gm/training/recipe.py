"""Recipes: options kept in a YAML file. Those of this package are in `recipes/`.

A recipe maps options to values. Its section `methods` maps methods to options that only they take:

    dataset_name: digits
    max_train_steps: 1200
    methods:
      ncsnv2: {prediction_type: v_prediction}
"""

import logging
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from .methods import METHODS
from .options import TrainingArguments

logger = logging.getLogger(__name__)

RECIPES = files("diffusers_gm.training") / "recipes"


def recipe_names() -> list[str]:
    """The recipes of this package."""
    return sorted(path.name.removesuffix(".yaml") for path in RECIPES.iterdir() if path.name.endswith(".yaml"))


def read_recipe(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options of a recipe, one of `recipe_names()` or the path of a YAML file, by name with the values of the file:
    without those that are `given`, which go first, or mean nothing beside what is given.

    Raises:
        ValueError: if there is no such recipe, or it is none.
    """
    if name in recipe_names():
        text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    elif Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
    else:
        raise ValueError(f"--config {name}: there is no such file, and no recipe but {', '.join(recipe_names())}")
    try:
        content = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--config {name} is no YAML file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {name} must map options to values, as in 'seed: 1'")
    methods = content.pop("methods", None) or {}
    if not isinstance(methods, dict) or not all(isinstance(options or {}, dict) for options in methods.values()):
        raise ValueError(f"--config {name}: the section 'methods' must map methods to options and their values")
    known = {f.name: f for f in fields(TrainingArguments)}
    unknown = set(methods) - set(METHODS)
    for section in (content, *methods.values()):
        unknown |= set(section or {}) - set(known)
    if unknown:
        raise ValueError(f"--config {name}: unknown {sorted(map(str, unknown))}; options are named as in --help")
    method = given.get("method") or content.get("method") or known["method"].default
    meaningless = {other for option in given for other in known[option].metadata["in_place_of"]}
    options = content | (methods.get(method) or {})
    chosen = {option: value for option, value in options.items() if option not in meaningless and option not in given}
    if empty := [option for option, value in chosen.items() if value is None]:
        logger.warning(
            f"--config {name}: no value for {', '.join(empty)}, left open; # begins a comment unless it is quoted"
        )
    return chosen
