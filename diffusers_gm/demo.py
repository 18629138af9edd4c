"""Look at a model trained on the digits: pictures, and its quality under every sampler.

    python -m diffusers_gm.demo outputs/demo [--compare outputs/demo-k1]

`make demo` runs it on the digits model it has just trained. Writes into the model's folder:
`digits.png` (samples beside real digits), `forward_noise.png` (what the noise of the method does), `quality.png`,
`quality.json` and `quality.md` (sliced W2 over the floor of held-out against training digits).
"""

import argparse
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import diffusers_gm
from diffusers_gm import AnnealedLangevinScheduler, CLDSSCSScheduler, GaussianMixtureNoise, GMLangevinScheduler, cards
from diffusers_gm.data import split_digits
from diffusers_gm.evaluation import Quality, markdown_table, quality, sliced_wasserstein
from diffusers_gm.pictures import CALLS, GRID, plot_forward_cld, plot_forward_noise, plot_quality, plot_samples

# The samplers of each scheduler for its own networks, by name: what to change in the config of the network.
SAMPLERS: dict[type, dict[str, dict[str, Any]]] = {
    GMLangevinScheduler: {
        name: {"algorithm_type": name, "step_size": None, "denoise": True}
        for name in ("langevin", "jump", "exponential", "ancestral", "ode")
    }
    | {"langevin, chain": {"algorithm_type": "langevin", "step_size": None, "denoise": True, "network_level": "chain"}},
    AnnealedLangevinScheduler: {
        "langevin": {"algorithm_type": "langevin", "num_langevin_steps": 1, "step_size": None, "denoise": True},
        "langevin, chain": {
            "algorithm_type": "langevin",
            "num_langevin_steps": 1,
            "step_size": None,
            "denoise": True,
            "network_level": "chain",
        },
        "langevin, T = 3": {"algorithm_type": "langevin", "num_langevin_steps": 3, "step_size": None, "denoise": True},
        "consistent": {"algorithm_type": "consistent", "step_size": None, "denoise": True},
    },
    CLDSSCSScheduler: {
        "sscs": {"algorithm_type": "sscs", "splitting_order": 1},
        "sscs, order 2": {"algorithm_type": "sscs", "splitting_order": 2},
        "euler_maruyama": {"algorithm_type": "euler_maruyama"},
        "probability_flow": {"algorithm_type": "probability_flow"},
    },
}


def load_pipeline(folder: Path) -> Any:
    """The pipeline in `folder`, of the class that its `model_index.json` names."""
    name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    pipeline = getattr(diffusers_gm, name if isinstance(name, str) else name[-1]).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def samplers(scheduler: Any) -> dict[str, Any]:
    """Every sampler for the network that `scheduler` describes, each with its default step size."""
    cls = type(scheduler)
    return {name: cls.from_config(scheduler.config, **changes) for name, changes in SAMPLERS[cls].items()}


def evaluate(folder: Path, num_samples: int) -> tuple[list[Quality], float]:
    """The quality table of one digits model, printed as it grows, and the floor."""
    train, held_out = split_digits()
    floor = sliced_wasserstein(held_out[:num_samples], train)
    pipeline = load_pipeline(folder)
    cells = []
    for cell in quality(pipeline, samplers(pipeline.scheduler), CALLS, train, floor, num_samples):
        cells.append(cell)
        value = "no stable step" if cell.ratio is None else f"{cell.ratio:5.2f} x floor   {cell.seconds:5.1f} s"
        print(f"  {cell.sampler:16s} {cell.calls:4d} calls  {value}", flush=True)
    return cells, floor


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="a model trained by train_gm_sgm.py --dataset_name digits")
    parser.add_argument("--compare", type=Path, help="a second model, for the same table (K = 1, say)")
    parser.add_argument("--num_samples", type=int, default=256, help="images per cell of the table, at most 360")
    parser.add_argument("--seed", type=int, default=0, help="decides the samples of the grid")
    args = parser.parse_args()
    folder: Path = args.folder
    if not (folder / "model_index.json").is_file():
        parser.error(f"{folder} holds no trained pipeline: run make demo, or train_gm_sgm.py --dataset_name digits")
    if args.compare and args.compare.name == folder.name:
        parser.error(f"--compare {args.compare} needs another name than {folder}: the table tells the models by it")
    _, held_out = split_digits()
    if not 2 <= args.num_samples <= len(held_out):
        parser.error(f"--num_samples must be in [2, {len(held_out)}], the number of held-out digits")
    logging.getLogger("diffusers").setLevel(logging.ERROR)

    pipeline = load_pipeline(folder)
    generator = torch.Generator().manual_seed(args.seed)
    images = pipeline(GRID * GRID, generator=generator, output_type="pt").images * 2 - 1
    scheduler, calls = pipeline.scheduler, pipeline.default_num_inference_steps
    title = f"{type(pipeline).__name__}, {scheduler.config.algorithm_type}, {calls} network calls"
    plot_samples(images, held_out, title, folder / "digits.png")
    if isinstance(scheduler, CLDSSCSScheduler):
        plot_forward_cld(held_out[0], scheduler.process, folder / "forward_noise.png")
    else:
        mixture = getattr(scheduler, "mixture", GaussianMixtureNoise([1.0], [1.0]))
        plot_forward_noise(held_out[0], mixture, 0.5, folder / "forward_noise.png")

    results = {}
    for model in filter(None, (folder, args.compare)):
        print(f"{model}: sliced W2 to the training digits, n = {args.num_samples}, over the floor of held-out digits")
        results[model.name], floor = evaluate(model, args.num_samples)
    plot_quality(results, floor, folder / "quality.png")
    text = [f"Sliced W2 to the training digits over the floor {floor:.4f} (held-out digits), n = {args.num_samples}."]
    for name, cells in results.items():
        text += [f"\n{name}\n", markdown_table(cells)]
    (folder / "quality.md").write_text("\n".join(text) + "\n")
    record = {name: [asdict(cell) for cell in cells] for name, cells in results.items()}
    (folder / "quality.json").write_text(json.dumps({"floor": floor, "n": args.num_samples, **record}, indent=1))
    cards.add_quality(folder)
    print("\n".join(text))
    print("\nLook at:")
    for name in ("digits.png", "forward_noise.png", "quality.png", "quality.md", "README.md"):
        print(f"  {folder / name}")


if __name__ == "__main__":
    main()
