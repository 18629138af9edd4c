"""The methods of training, one file each."""

from dataclasses import dataclass

from . import cld, ddpm, gm_sgm, ncsnv2
from .cld import CLDOptions
from .ddpm import DDPMOptions
from .gm_sgm import GMSGMOptions
from .method import Method

METHODS: dict[str, Method] = {module.METHOD.name: module.METHOD for module in (gm_sgm, ncsnv2, cld, ddpm)}


@dataclass
class MethodOptions(DDPMOptions, CLDOptions, GMSGMOptions):
    """The options of all methods."""


def options_of_others(method: str) -> set[str]:
    """Names of the options that say nothing about a method."""
    return set().union(*(m.option_names for m in METHODS.values())) - METHODS[method].option_names
