"""Unconditional training from diffusers' public classes, as its example does it: for `.throughput`."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffusers_gm.cli import Parser


def train(data: str, config: str, resolution: int, batch_size: int, max_train_steps: int) -> None:  # noqa: PLR0915
    """The loop of diffusers' example, without its checkpoints, samples and trackers.

    Args:
        data: a folder of images or of parquet files; or a .safetensors file of `latents`, all of which are in memory.
        config: of the network, a JSON file.
        resolution, batch_size, max_train_steps: as its options.
    """
    accelerator = Accelerator()
    model = UNet2DModel.from_config(UNet2DModel.load_config(config))
    ema_model = EMAModel(
        model.parameters(),
        decay=0.9999,
        use_ema_warmup=True,
        inv_gamma=1.0,
        power=0.75,
        model_cls=UNet2DModel,
        model_config=model.config,
    )
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    mode = "L" if model.config["in_channels"] == 1 else "RGB"
    path = Path(data)

    def augmentations(image: Image.Image) -> torch.Tensor:
        """Resize, crop at random, to a tensor, normalize."""
        if min(image.size) != resolution:
            scale = resolution / min(image.size)
            width, height = (max(resolution, int(side * scale)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        if image.size != (resolution, resolution):
            left, top = (int(torch.randint(0, side - resolution + 1, ())) for side in image.size)
            image = image.crop((left, top, left + resolution, top + resolution))
        pixels = torch.from_numpy(np.array(image)).view(resolution, resolution, -1).permute(2, 0, 1).contiguous()
        return pixels.float().div(255).sub_(0.5).div_(0.5)

    def transform_images(examples: dict[str, Any]) -> dict[str, Any]:
        return {"input": [augmentations(image.convert(mode)) for image in examples["image"]]}

    dataset: Any
    if path.suffix == ".safetensors":
        dataset = [{"input": latents} for latents in load_file(path)["latents"]]
    else:
        kind = "parquet" if any(path.glob("*.parquet")) else "imagefolder"
        dataset = datasets.load_dataset(kind, data_dir=data, split="train")
        dataset.set_transform(transform_images)
    # Batches of one size, as those of train_gm_sgm.py are.
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=True, drop_last=True)
    lr_scheduler = get_scheduler(
        "cosine", optimizer=optimizer, num_warmup_steps=500, num_training_steps=max(max_train_steps, 501)
    )
    model, optimizer, loader, lr_scheduler = accelerator.prepare(model, optimizer, loader, lr_scheduler)
    ema_model.to(accelerator.device)

    global_step = 0
    while global_step < max_train_steps:
        model.train()
        progress_bar = tqdm(total=len(loader))
        for batch in loader:
            clean_images = batch["input"]
            noise = torch.randn(clean_images.shape, device=clean_images.device)
            timesteps = torch.randint(0, 1000, (len(clean_images),), device=clean_images.device).long()
            noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
            with accelerator.accumulate(model):
                model_output = model(noisy_images, timesteps).sample
                loss = F.mse_loss(model_output.float(), noise.float())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                ema_model.step(model.parameters())
                progress_bar.update(1)
                global_step += 1
            logs = {"loss": loss.detach().item(), "lr": lr_scheduler.get_last_lr()[0], "step": global_step}
            progress_bar.set_postfix(**logs, ema_decay=ema_model.cur_decay_value)
            accelerator.log(logs, step=global_step)
            if global_step == max_train_steps:
                break
        progress_bar.close()


if __name__ == "__main__":
    parser = Parser("diffusers_gm.studies.diffusers_loop", __doc__)
    parser.add_argument("data", help="a folder of images or of parquet files, or a .safetensors file of latents")
    parser.add_argument("config", help="of the network, a JSON file")
    for name in ("resolution", "batch_size", "max_train_steps"):
        parser.add_argument(name, type=int, help="as of diffusers' example")
    train(**vars(parser.parse_args()))
