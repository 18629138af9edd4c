"""How the loss is minimised: optimizer, learning rate, the average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from .options import TrainingArguments
from .plan import Plan


def build_optimizer(
    args: TrainingArguments, plan: Plan, unet: nn.Module, uncertainty: nn.Module | None = None
) -> torch.optim.Optimizer:
    options: dict[str, Any] = {
        "lr": plan.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    parameters: list[Any] = [p for p in unet.parameters() if p.requires_grad]
    if uncertainty is not None:
        parameters = [{"params": parameters}, {"params": list(uncertainty.parameters()), "weight_decay": 0.0}]
    if args.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, fused=True, **options)


def build_lr_scheduler(args: TrainingArguments, plan: Plan, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """The schedule, to be stepped once per optimizer step, whatever the number of processes."""
    if args.lr_scheduler != "one_cycle":
        return get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=plan.lr_warmup_steps,
            num_training_steps=plan.max_train_steps,
            num_cycles=args.lr_num_cycles,
            power=args.lr_power,
        )
    # PyTorch divides by the length of either half less one.
    total_steps = max(plan.max_train_steps, 4)
    return OneCycleLR(
        optimizer,
        max_lr=plan.learning_rate,
        total_steps=total_steps,
        pct_start=max(plan.lr_warmup_steps, 2) / total_steps,
        cycle_momentum=False,  # --adam_beta1 is what it says
    )


def build_ema(args: TrainingArguments, unet: nn.Module, device: torch.device) -> EMAModel | None:
    """The moving average of the weights (Technique 5 of NCSNv2), if wanted."""
    if not args.use_ema:
        return None
    ema = EMAModel(
        unet.parameters(),
        decay=args.ema_decay,
        use_ema_warmup=True,
        inv_gamma=args.ema_inv_gamma,
        power=args.ema_power,
        foreach=True,
    )
    ema.to(device)
    return ema


def check_precision(accelerator: Accelerator) -> None:
    """Raise a ValueError for fp16 on a CPU, where accelerate, by an option or its own settings, would take fp32."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError(
            "--mixed_precision fp16 needs a GPU: on a CPU use bf16 or no (it may also come from accelerate's settings)"
        )


@contextmanager
def averaged_weights(unet: nn.Module, ema: EMAModel | None) -> Iterator[None]:
    """Inside, `unet` is in evaluation mode and has the averaged weights."""
    if ema is not None:
        ema.store(unet.parameters())
        ema.copy_to(unet.parameters())
    unet.eval()
    try:
        yield
    finally:
        unet.train()
        if ema is not None:
            ema.restore(unet.parameters())
