"""Networks of the digits, trained once and kept, and the quality of their samples."""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from ..data import Examination, ImageStream, split_digits
from ..evaluation.results import Results, Statistic
from ..evaluation.sampling import num_steps_for, sample
from ..evaluation.scoring import SLICED_WASSERSTEIN, Reference, score
from ..files import fresh_folder, publish_folder, write_json
from ..pipelines import CLDPipeline
from ..pipelines.unconditional import UnconditionalPipeline
from ..schedulers import CLDSSCSScheduler
from ..training.draws import Draws
from ..training.network import fit_unet, new_unet
from ..training.objective import Objective, build_scheduler
from ..training.optimizer import build_ema, build_lr_scheduler, build_optimizer
from ..training.option import changed_options
from ..training.options import TrainingArguments
from ..training.plan import Plan, make_plan
from ..training.uncertainty import Uncertainty

# Ratios of single seeds closer than this are called equal: one network has ratios so far apart at several seeds of
# 256 samples.
TIE = 0.15


def tie(num_seeds: int) -> float:
    """`TIE` for means over seeds: the spread of a mean falls with the root of their number."""
    return TIE / num_seeds**0.5


# --- Networks ---


def plan_for_digits(args: TrainingArguments) -> Plan:
    """The plan that `train_gm_sgm.py` makes for the digits."""
    train, _ = split_digits()
    return make_plan(args, Examination(train), len(train), num_processes=1)


@dataclass(frozen=True)
class Loss:
    """What `train_gm_sgm.py` minimises for these options: `loss(network, images)`, `(B,)`."""

    objective: Objective
    uncertainty: Uncertainty | None

    @classmethod
    def of(cls, objective: Objective) -> "Loss":
        return cls(objective, Uncertainty() if objective.args.uncertainty_weighting else None)

    def __call__(self, network: Callable[..., Any], images: Tensor) -> Tensor:
        draws = Draws.of(images)
        losses = self.objective(network, images, draws)
        return losses if self.uncertainty is None else self.uncertainty(losses, self.objective.sigma(draws.levels))


def train_on_digits(
    args: TrainingArguments,
    loss: Callable[[Any, Tensor], Tensor],
    name: str,
    uncertainty: Uncertainty | None = None,
) -> Any:
    """A network trained with the recipe of `train_gm_sgm.py` (optimizer, schedule, average) on the training digits.

    The weights of the loss are learned beside it, if there are any. The global random state is the caller's again
    afterwards.
    """
    images, _ = split_digits()
    plan, start = plan_for_digits(args), time.monotonic()
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        unet = fit_unet(new_unet(args, plan.resolution, 1), args, plan.resolution)
        optimizer = build_optimizer(args, plan, unet, uncertainty)
        schedule = build_lr_scheduler(args, plan, optimizer)
        average = build_ema(args, unet, torch.device("cpu"))
        stream = iter(ImageStream(len(images), args.train_batch_size, args.seed))
        for _ in range(plan.max_train_steps):
            mean = loss(unet, images[[index for _, index in next(stream)]]).mean()
            mean.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if average:
                average.step(unet.parameters())
    if average:
        average.copy_to(unet.parameters())
    print(f"trained {name}: {plan.max_train_steps} steps, {time.monotonic() - start:.0f} s", flush=True)
    return unet.eval().requires_grad_(False)


def parts_of(output: Path) -> Path:
    """The folder `.parts` beside the reports: networks and measurements of unfinished studies, ignored by git."""
    parts = output / ".parts"
    parts.mkdir(parents=True, exist_ok=True)
    (parts / ".gitignore").write_text("*\n", encoding="utf-8")  # always the same: studies at once do no harm
    return parts


def kept_unet(folder: Path, train: Callable[[], Any], options: Mapping[str, Any] | None = None) -> Any:
    """The network in `folder`, trained and put there (safetensors, whole or not at all) by the first who asks.

    Raises:
        ValueError: if it was trained with other `options`; a name says only those that are not the default.
    """
    described, kept = json.loads(json.dumps(options or {}, default=str)), folder / "options.json"
    if not folder.is_dir():
        network, unfinished = train(), folder.with_name(f"{folder.name}.part{os.getpid()}")
        # Another study may have trained the same network meanwhile.
        if not folder.is_dir():
            network.save_pretrained(fresh_folder(unfinished))
            write_json(unfinished / kept.name, described)
            publish_folder(unfinished, folder)
    if kept.is_file():
        then = json.loads(kept.read_text(encoding="utf-8"))
        changed = [f"{k} = {then[k]}, now {v}" for k, v in described.items() if then.get(k, v) != v]
        if changed:
            raise ValueError(
                f"{folder} was made with other settings ({'; '.join(changed)}): remove it, or take another name"
            )
    return _read(folder)


@lru_cache(maxsize=8)
def _read(folder: Path) -> Any:
    return UNet2DModel.from_pretrained(folder).eval().requires_grad_(False)


def trained(output: Path, **options: Any) -> tuple[Any, Any]:
    """The digits network that `train_gm_sgm.py` would train with these options, and its scheduler.

    It is kept beside the reports in `output`, in a folder named after the options.
    """
    args = TrainingArguments(**options)
    plan, name = plan_for_digits(args), name_of(args)
    scheduler = build_scheduler(args, plan)
    loss = Loss.of(Objective(args, plan, scheduler))
    train = partial(train_on_digits, args, loss, name, loss.uncertainty)
    return kept_unet(parts_of(output) / name, train, asdict(args)), scheduler


def name_of(args: TrainingArguments) -> str:
    """The method and the options that were given, in words that make a file name."""
    words = [
        f"{name}={getattr(args, name)}" for name in changed_options(args) if name not in ("method", "dataset_name")
    ]
    return " ".join([args.method, *sorted(words)])


# --- Quality ---


@cache
def floor_of_digits(num_samples: int) -> dict[str, float]:
    """Scores of as many held-out digits against the training digits: what real images have.

    Raises:
        ValueError: if there are not so many: a floor of fewer would be another one.
    """
    _, held_out = split_digits()
    if num_samples > len(held_out):
        raise ValueError(f"num_samples {num_samples}: there are {len(held_out)} held-out digits for the floor")
    return scores_of(held_out[:num_samples])


def scores_of(samples: Tensor) -> dict[str, float]:
    """Sliced W2 of digits `(n, 1, 8, 8)`, clipped to [-1, 1], to the training digits."""
    return score(samples, Reference(split_digits()[0]), ["sw"])


def over_floor(samples: Tensor) -> float:
    """Sliced W2 over that of real digits; nan where samples are."""
    return scores_of(samples).get(SLICED_WASSERSTEIN, float("nan")) / floor_of_digits(len(samples))[SLICED_WASSERSTEIN]


def pipeline_of(unet: Any, scheduler: Any) -> Any:
    """The pipeline of ours that runs a network with a scheduler, ours or diffusers'."""
    pipeline = (CLDPipeline if isinstance(scheduler, CLDSSCSScheduler) else UnconditionalPipeline)(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images_of(pipeline: Any, num_calls: int, num_samples: int, seed: int = 0) -> tuple[Tensor, int]:
    """Samples `(n, C, H, W)` in [-1, 1], and the network calls that they took.

    Raises:
        NoGridError: where the scheduler has no stable step with so few calls.
    """
    pipeline.set_progress_bar_config(disable=True)
    scheduler = pipeline.scheduler
    return sample(pipeline, scheduler, num_steps_for(scheduler, num_calls), num_samples, seed, num_samples)


def kept_results(name: str, num_samples: int, output: Path, **settings: Any) -> Results:
    """The measurements of a study, `num_samples` images a cell, kept beside its report in `output`.

    `settings` are all that they depend on besides; where one of them is not what it was, the file is refused.
    """
    words = [f"{key}={value}" for key, value in settings.items() if isinstance(value, int)]
    path = parts_of(output) / f"{' '.join([name, f'n={num_samples}', *words])}.json"
    return Results.open(path, {"study": name, "num_samples": num_samples, **settings})


def quality(
    results: Results, name: str, calls: int, num_seeds: int, pipeline: Callable[[int], Any]
) -> list[float] | None:
    """Sliced W2 over the floor for seeds from 0 on, of the network and sampler `name` in `pipeline(seed)`; what is kept
    in `results` is not measured again. None where a sampler has no stable step, or its samples are not finite."""
    num_samples = results.conditions["num_samples"]
    results.floor = [floor_of_digits(num_samples)]

    def draw(seed: int) -> tuple[Tensor, int]:
        return images_of(pipeline(seed), calls, num_samples, seed)

    cells = [results.measure(name, calls, seed, partial(draw, seed), scores_of) for seed in range(num_seeds)]
    if any(SLICED_WASSERSTEIN not in cell.scores for cell in cells):
        return None
    return [cell.scores[SLICED_WASSERSTEIN] / results.floor[0][SLICED_WASSERSTEIN] for cell in cells]


def over_seeds(
    results: Results, name: str, calls: int | None, num_seeds: int, make: Callable[[int], dict[str, float]]
) -> dict[str, Statistic]:
    """What `make(seed)` scores, by the names of the scores, over seeds; empty where one of them has no scores."""
    scores = results.of_seeds(name, calls, num_seeds, make) or []
    return {key: Statistic.of([one[key] for one in scores]) for key in (scores[0] if scores else ())}
