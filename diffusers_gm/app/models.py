"""Models and the samplers that suit their networks."""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from ..evaluation.sampling import in_short, load_pipeline, options_in, scheduler_by_name
from ..pipelines.unconditional import UnconditionalPipeline
from ..schedulers.base import SamplerScheduler

# Classes of schedulers, and what is to differ from the config of the network, by name. Those that do not suit a network
# are left out of its menu.
MENU = {
    "multistep, fixed levels": "CalibratedMultistepScheduler calibration=null stochasticity=null",
    "GM, ode": "GMLangevinScheduler algorithm_type=ode",
    "GM, ancestral": "GMLangevinScheduler algorithm_type=ancestral",
    "GM, jump": "GMLangevinScheduler algorithm_type=jump step_size=null",
    "annealed Langevin": "AnnealedLangevinScheduler algorithm_type=langevin step_size=null",
    "annealed Langevin, chain": (
        "AnnealedLangevinScheduler algorithm_type=langevin network_level=chain step_size=null"
    ),
    "annealed, consistent": "AnnealedLangevinScheduler algorithm_type=consistent step_size=null",
    "annealed, explore": "AnnealedLangevinScheduler algorithm_type=explore step_size=null",
    "CLD, sscs": "CLDSSCSScheduler algorithm_type=sscs",
    "CLD, probability flow": "CLDSSCSScheduler algorithm_type=probability_flow",
    "DDPM": "DDPMScheduler",
    "DDIM": "DDIMScheduler",
    "Euler": "EulerDiscreteScheduler",
    "Euler ancestral": "EulerAncestralDiscreteScheduler",
    "Heun": "HeunDiscreteScheduler",
    "DPM-Solver++": "DPMSolverMultistepScheduler algorithm_type=dpmsolver++",
    "SDE-DPM-Solver++": "DPMSolverMultistepScheduler algorithm_type=sde-dpmsolver++",
    "UniPC": "UniPCMultistepScheduler",
    "Euler, flow": "FlowMatchEulerDiscreteScheduler",
    "Euler, EDM": "EDMEulerScheduler",
}
SAVED, CALIBRATED = "as saved", "calibrated"
FIRST = (SAVED, CALIBRATED, "GM, ode", "UniPC")  # what is compared unless told


@dataclass(frozen=True)
class Sampler:
    """A scheduler for the network of a model.

    Attributes:
        name: what it is called.
        scheduler: the scheduler.
        code: the expression that makes it of `pipe`; empty for the model's own.
    """

    name: str
    scheduler: Any
    code: str = ""

    @property
    def title(self) -> str:
        """Its name, and of the model's own what it is."""
        return f"{self.name}, {type(self.scheduler).__name__}" if self.name == SAVED else self.name


@dataclass
class Model:
    """A pipeline with what can be done with it.

    Attributes:
        name: its folder, or its name on the Hub.
        pipe: the pipeline; never changed.
        samplers: those that suit its network, by name.
        left_out: why the others do not, by name.
        classes: names of its classes; none for an unconditional one.
        floors: distances of real images to others, by number of images; filled by `distance`.
    """

    name: str
    pipe: Any
    samplers: dict[str, Sampler]
    left_out: dict[str, str]
    classes: list[str] = field(default_factory=list)
    floors: dict[int, tuple[Tensor, list[float]]] = field(default_factory=dict)

    @classmethod
    def load(cls, name: str) -> "Model":
        """The model in a folder or on the Hub.

        Raises:
            ValueError, OSError: where there is no pipeline, or it is not one of images alone.
        """
        name = name.strip()
        if not name:
            raise ValueError("give the folder of a model, or its name on the Hub")
        if Path(name).is_dir() and not Path(name, "model_index.json").is_file():
            raise ValueError(f"{name} holds no trained pipeline: it has no model_index.json")
        pipe = load_pipeline(name, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        if not isinstance(pipe, UnconditionalPipeline):
            raise ValueError(f"{name} is a {type(pipe).__name__}: only pipelines of images without a prompt are shown")
        return cls.of(name, pipe)

    @classmethod
    def of(cls, name: str, pipe: Any) -> "Model":
        """A pipeline that was loaded from `name`."""
        classes = pipe.class_names or [str(i) for i in range(pipe.num_classes or 0)]
        model = cls(name, pipe, {SAVED: Sampler(SAVED, pipe.scheduler)}, {}, classes)
        for entry, words in MENU.items():
            try:
                model.samplers[entry] = _sampler(pipe.scheduler, entry, words)
            except ValueError as error:
                model.left_out[entry] = str(error)
        return model

    def sampler(self, name: str) -> Sampler:
        """A sampler of the menu, or one that is described as `CLASS option=value ...`.

        Raises:
            ValueError: if it is none, or does not suit the network.
        """
        if name in self.samplers:
            return self.samplers[name]
        if name in self.left_out:
            raise ValueError(self.left_out[name])
        return _sampler(self.pipe.scheduler, name, name)


def why_left_out(model: Model) -> str:
    """Why samplers are not in the menu of a model, a line for all that lack the same; empty where none is left out."""
    names: dict[str, list[str]] = {}
    for entry, message in model.left_out.items():
        reason = message.replace(MENU[entry].split()[0], "it").removeprefix("it does not suit this network: ")
        names.setdefault(in_short(reason), []).append(entry)
    return "\n".join(f"Left out: {'; '.join(entries)}: {reason}." for reason, entries in names.items())


def _sampler(own: Any, name: str, words: str) -> Sampler:
    """What `words`, a class and what is to differ from the config, make of the scheduler of a pipeline."""
    of_class, *changes = shlex.split(words) or [""]
    try:
        _, scheduler = scheduler_by_name(own, [of_class, *changes])
    except ValueError as error:
        raise ValueError(str(error).removeprefix("--scheduler ")) from error
    theirs = hasattr(diffusers, of_class) and isinstance(own, SamplerScheduler)
    config = "pipe.scheduler.diffusers_config()" if theirs else "pipe.scheduler.config"
    arguments = "".join(f", {option}={as_python(value)}" for option, value in options_in(changes).items())
    return Sampler(name, scheduler, f"{of_class}.from_config({config}{arguments})")


def as_python(value: Any) -> str:
    """A value as it is written in Python, strings in double quotes."""
    return json.dumps(value) if isinstance(value, str) else repr(value)
