"""Pipelines that cannot be calibrated, as far as they tell before they run."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from diffusers import DDIMPipeline, DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

# Arguments of diffusers' pipelines that act in a share of a run, or by the calls before, and what they are where they
# act in all or none of it.
SHARES: dict[str, Any] = {
    "control_guidance_start": 0.0,
    "control_guidance_end": 1.0,
    "skip_guidance_layers": None,
    "adapter_conditioning_factor": 1.0,
    "cfg_trunc_ratio": 1.0,
    "cfg_truncation": 1.0,
    "denoising_start": None,
    "denoising_end": None,
    "use_dynamic_cfg": False,
    "gligen_scheduled_sampling_beta": 1.0,
    "edit_warmup_steps": 0,
    "edit_cooldown_steps": None,
    "edit_momentum_scale": 0.0,
    "sld_warmup_steps": 0,
    "sld_momentum_scale": 0.0,
    "max_iter_to_alter": 0,
    "thresholds": {},
    "num_temporal_reasoning_steps": 0,
    "mixed_precision_first_steps": None,
    "mixed_precision_last_steps": None,
}

# And where these say so, they do nothing: edits without a text, safety without a concept.
IDLE: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "edit_": lambda said: said.get("editing_prompt") is None and said.get("editing_prompt_embeddings") is None,
    "sld_": lambda said: (said.get("sld_guidance_scale") or 0) <= 1,
}

# Likewise of guiders, under these names or such that end in them; momentum makes an answer depend on those before.
SHARES_OF_GUIDERS = {"start": 0.0, "stop": 1.0, "start_step": -1, "zero_init_steps": 0, "momentum": None}

# Pipelines that give their scheduler the velocity from the noise of the start to a frame that is given, and never put
# that frame back: any fresh noise would stay in it, and look like an error of the network.
PINNED_BY_VELOCITY, FRAMES = ("Cosmos2_5", "Cosmos3"), ("image", "video")


def refuse_what_cannot_be(pipe: Any, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise a ValueError for a pipeline that cannot be calibrated, or not so; `defaults`: of the arguments of its call,
    `given`: those that the user has given."""
    _refuse_shares({**defaults, **given}, given)
    kind = type(pipe).__name__
    if getattr(getattr(pipe, "config", None), "expand_timesteps", False) and given.get("image") is not None:
        raise ValueError(
            f"a {kind} with expand_timesteps gives the frame that it begins with a level of its own, which its "
            "scheduler does not see: it cannot be calibrated"
        )
    if isinstance(pipe, DDIMPipeline):
        raise ValueError(
            "DDIMPipeline hands its own scheduler's eta to step: calibrate, and use, DDPMPipeline(**pipe.components)"
        )
    _refuse_pipelines_inside(pipe)
    _refuse_parts(getattr(pipe, "components", {}))
    if "num_inference_steps" not in defaults:
        raise ValueError(f"a {kind} takes no num_inference_steps: it cannot be calibrated")


def _refuse_shares(said: Mapping[str, Any], given: Collection[str]) -> None:
    """Arguments of a call that act in a share of a run."""
    idle = tuple(prefix for prefix, is_idle in IDLE.items() if is_idle(said))
    shares = {
        name: whole
        for name, whole in SHARES.items()
        if not is_whole(said.get(name), whole) and not name.startswith(idle)
    }
    if isinstance(said.get("callback_on_step_end"), PipelineCallback | MultiPipelineCallbacks):
        shares["callback_on_step_end"] = None  # these cut something off after some steps
    for name, whole in sorted(shares.items()):
        raise ValueError(
            f"{name}={said[name]!r} acts in a share of a run, or by the calls before, and a calibration makes no run "
            "as long as yours: "
            f"{'leave it out' if name in given else f'give {whole!r}'}"
        )


def refuse_noise(pipe: Any, given: Mapping[str, Any], stochasticity: Any, images: Any) -> bool:
    """Whether a run leaves the noise of its steps in frames that it was given, so that there must be none; a ValueError
    where some is asked for, or `images` might choose it."""
    frames = [name for name in FRAMES if given.get(name) is not None]
    if not frames or not type(pipe).__name__.startswith(PINNED_BY_VELOCITY):
        return False
    if stochasticity not in (None, 0, (0, 0), [0, 0]) or images is not None:
        asked = f"stochasticity={stochasticity}" if images is None else "images, which choose among stochasticities,"
        raise ValueError(
            f"{asked} beside {frames[0]}: a {type(pipe).__name__} leaves the noise of its steps in the frames that it "
            "is given; use stochasticity=0"
        )
    return True


def _refuse_pipelines_inside(pipe: Any) -> None:
    """Parts that are pipelines keep the scheduler that they were made with, whatever that of the whole is."""
    for name, part in vars(pipe).items():
        if isinstance(part, DiffusionPipeline) and getattr(part, "scheduler", None) is not None:
            raise ValueError(
                f"a {type(pipe).__name__} runs pipe.{name}, which has a scheduler of its own: calibrate that pipeline, "
                f"and give it what is returned: pipe.{name}.scheduler = ..."
            )
    if getattr(pipe, "audio_scheduler", None) is not None:
        raise ValueError(
            "audio_scheduler takes the sound down levels of its own, which a calibration would not move: the pipeline "
            "cannot be calibrated"
        )


def _has_cache(part: Any) -> bool:
    """Whether a network has a cache over its calls, enabled or put there by `diffusers.hooks`; one of keys of the
    prompt is no such cache."""
    if getattr(part, "is_cache_enabled", False):
        return True
    modules = part.modules() if hasattr(part, "modules") else ()
    hooks = [hook for m in modules for hook in getattr(getattr(m, "_diffusers_hook", None), "hooks", {}).values()]
    return any(hook._is_stateful and not type(hook).__name__.startswith("TextKV") for hook in hooks)


def _refuse_parts(components: Mapping[str, Any]) -> None:
    """Parts of a pipeline whose answer depends on more than the noisy image and its level."""
    for name, part in components.items():
        if _has_cache(part):
            raise ValueError(
                f"{name} has a cache, which answers by the calls before, and a calibration makes them in another order "
                f"than a run: pipe.{name}.disable_cache(), or remove its hooks, calibrate, and enable it again"
            )
        config = getattr(part, "config", None) or {}
        if getattr(config, "use_meanflow", False):
            raise ValueError(
                f"{name} was distilled to answer the mean velocity between two levels (use_meanflow), not a denoised "
                "image: it cannot be calibrated"
            )
        if hasattr(part, "set_state") and getattr(part, "_enabled", False):
            _refuse_share_of_guider(name, part, config)


def _refuse_share_of_guider(name: str, guider: Any, config: Mapping[str, Any]) -> None:
    shares = {
        option: whole
        for option, value in config.items()
        for ending, whole in SHARES_OF_GUIDERS.items()
        if (option == ending or option.endswith(f"_{ending}")) and not is_whole(value, whole)
    }
    if shares:
        said = ", ".join(f"{option}={config[option]!r}" for option in shares)
        right = ", ".join(f"{option}={whole!r}" for option, whole in shares.items())
        raise ValueError(
            f"{name}, of class {type(guider).__name__}, has {said}: it acts in a share of a run, or by the calls "
            f"before, and a calibration makes no run as long as yours; give the pipeline pipe.{name}.new({right}), or "
            "another guider"
        )


def is_whole(value: Any, whole: Any) -> bool:
    """Whether an argument, or each of a list of them, is unsaid or what it is in a whole run."""
    return all(one in (None, whole) for one in (value if isinstance(value, list | tuple) else [value]))
