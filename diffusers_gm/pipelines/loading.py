"""How pipelines of this package are saved, pushed, found and loaded: in folders and on the Hub."""

import inspect
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from huggingface_hub import snapshot_download

from .. import schedulers
from ..files import write_text
from ..version import __version__
from .measurements import forget_quality, same_model, set_aside_measurements
from .repository import CARD_FILES, QUALITY_FILES, short_card
from .uploading import upload

logger = logging.getLogger(__name__)

LIBRARY = "diffusers_gm"
PIPELINE_LOADER = "pipeline.py"

# diffusers accepts components from the libraries of this table alone, when it downloads a pipeline of its own (a
# DDPMPipeline with our scheduler, say), and writes "diffusers_gm" into model_index.json for those it knows: without
# it, the path of a source file. `import diffusers_gm` is the consent that it asks for.
LOADABLE_CLASSES.setdefault(
    LIBRARY, {name: ["save_pretrained", "from_pretrained"] for name in ("ModelMixin", "SchedulerMixin")}
)

# What `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` runs: it knows of no other libraries. Saved as
# pipeline.py, and in the folder of a component under the name of its library, which is where diffusers looks.
LOADER = '''"""Lets diffusers find {name}, which is part of the Python package diffusers_gm."""

try:
    from diffusers_gm import {name}  # noqa: F401
except ImportError as error:
    raise ImportError(
        "this model needs the Python package diffusers_gm, version {version} or newer: "
        "install it, then load the model again"
    ) from error
'''


class HubPipeline(DiffusionPipeline):
    """Abstract: a pipeline of diffusers that loads from the Hub by its class, and runs no code from there."""

    default_num_inference_steps = 50

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Download what this class needs, configurations and weights and no code, and return the folder.

        Takes `revision`, `variant`, `cache_dir`, `force_download`, `local_files_only`, `token` and `use_safetensors`
        (False: pickled weights, from people you trust). Components that are passed are not downloaded.

        Raises:
            OSError: if the repository does not exist, is not to be seen with this token, or holds no pipeline.
        """
        weights = "diffusion_pytorch_model"
        variant = f".{kwargs['variant']}" if kwargs.get("variant") else ""
        suffix = "bin" if kwargs.get("use_safetensors") is False else "safetensors"
        names = [
            *("config.json", "scheduler_config.json"),
            *(f"{weights}{variant}.{suffix}", f"{weights}{variant}-*.{suffix}", f"{weights}.{suffix}.index*.json"),
        ]
        components = [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", *kwargs)]
        passed_on = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        folder = snapshot_download(
            pretrained_model_name,
            allow_patterns=[cls.config_name, *(f"{component}/{name}" for component in components for name in names)],
            user_agent={"pipeline_class": cls.__name__},
            **{name: kwargs[name] for name in passed_on if kwargs.get(name) is not None},
        )
        if not Path(folder, cls.config_name).is_file():
            where = f"revision {kwargs['revision']} of " if kwargs.get("revision") else ""
            raise OSError(f"{where}{pretrained_model_name} holds no pipeline: there is no {cls.config_name}")
        return folder

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers, with the names that point at code beside the model, which is where diffusers looks for it,
        replaced by those of this package."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][-1]
        for name, value in config.items():
            if isinstance(value, list | tuple) and value[0] == LIBRARY:
                known = getattr(schedulers, value[1], None)
                if known is None:
                    raise ValueError(f"diffusers_gm {__version__} has no {value[1]}: the model needs a newer version")
                config[name] = [known.__module__, value[1]]
        return loaded

    def save_config(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in diffusers, without paths of this host, and with what `DiffusionPipeline` finds the class by."""
        super().save_config(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        for path in (folder / self.config_name, *folder.glob("*/config.json")):
            _edit_json(path, lambda config: config.pop("_name_or_path", None))
        absent = [name for name in self._optional_components if getattr(self, name) is None]
        _edit_json(folder / self.config_name, lambda config: [config.pop(name, None) for name in absent])
        if type(self).__module__.split(".")[0] != LIBRARY:
            return  # a class of the user's: whoever loads it needs that one
        name = type(self).__name__
        index = _edit_json(folder / self.config_name, lambda config: config.update(_class_name=["pipeline", name]))
        _write_loader(folder / PIPELINE_LOADER, name)
        for component, value in index.items():
            if isinstance(value, list) and value[0] == LIBRARY:
                write_component_loader(folder, component, value[1])

    def save_pretrained(
        self,
        save_directory: Any,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        *,
        repo_id: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save to a folder; with `push_to_hub`, upload it to `repo_id` too, by default named after the folder.

        A README.md in the folder is the model card; without one, that of the repository stays, and where there is
        none either, a short one is written. Measurements of another model that was there before are set aside.

        Raises:
            ValueError: if `private` is asked for and the repository already exists and is public.
        """
        if self._takes_place_of_measured(Path(save_directory)):
            set_aside_measurements(Path(save_directory))
        super().save_pretrained(save_directory, safe_serialization, variant, max_shard_size, **kwargs)
        if push_to_hub:
            self._push(save_directory, repo_id or Path(save_directory).name, commit_message, private, token, create_pr)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
    ) -> str:
        """Upload the pipeline to the Hub and return the address of its repository.

        A pipeline that was loaded from a folder takes the model card of that folder along, and what was measured
        unless its weights or its scheduler are others by now. Otherwise the card of the repository stays, and where
        there is none, a short one is written.

        Raises:
            ValueError: if `private` is asked for and the repository already exists and is public.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization, variant)
            source = Path(self.name_or_path) if self.name_or_path else None
            if source and (source / self.config_name).is_file():
                for name in filter(lambda name: (source / name).is_file(), CARD_FILES):
                    shutil.copy(source / name, folder)
                if self._takes_place_of_measured(source):
                    forget_quality(Path(folder))
                    logger.warning(f"what was measured in {source} stays there: it is of other weights or schedulers")
            return self._push(folder, repo_id, commit_message, private, token, create_pr)

    def _takes_place_of_measured(self, folder: Path) -> bool:
        """Whether another model than this one was measured in a folder."""
        measured = any((folder / name).is_file() for name in QUALITY_FILES)
        if not measured or not (folder / self.config_name).is_file():
            return False
        try:
            return not same_model(self, type(self).from_pretrained(folder))
        except (OSError, ValueError, TypeError, AttributeError):  # not whole, say
            return True

    def _push(
        self, folder: Any, repo_id: str, message: str | None, private: bool | None, token: str | None, create_pr: bool
    ) -> str:
        card = short_card(repo_id, type(self).__name__, self.default_num_inference_steps)
        return upload(
            Path(folder), repo_id, private, token, message or f"Upload {type(self).__name__}", create_pr, card
        )


def _edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")
    return content


def write_component_loader(folder: Path, component: str, class_name: str) -> None:
    """Beside a component of a saved pipeline of ours; pipelines of diffusers go without."""
    if (folder / PIPELINE_LOADER).is_file():
        _write_loader(folder / component / f"{LIBRARY}.py", class_name)


def _write_loader(path: Path, class_name: str) -> None:
    write_text(path, LOADER.format(name=class_name, version=__version__))
