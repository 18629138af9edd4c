"""Loss weights that the training learns beside the network."""

import pytest
import torch
from training import SMALL, WEIGHTS, arguments, load, plan_for, small_unet

from diffusers_gm.training.folder import read_log
from diffusers_gm.training.optimizer import build_optimizer
from diffusers_gm.training.uncertainty import Uncertainty


def sigmas(n):
    return torch.logspace(-2, 1.5, n, dtype=torch.float64)


def test_it_learns_the_mean_loss_of_each_level(generator):
    """Losses of a chi-squared law about a mean that rises a hundredfold over the levels, with a bend."""

    def mean(sigma):
        return 0.02 + sigma.float() ** 2 / (sigma.float() ** 2 + 0.25) * 2

    before = torch.get_rng_state()
    uncertainty = Uncertainty()
    assert torch.equal(torch.get_rng_state(), before), "no random numbers are drawn"
    optimizer = torch.optim.Adam(uncertainty.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=1000)
    for _ in range(1000):
        sigma = (0.01 * 3162 ** torch.rand(128, generator=generator)).double()
        losses = mean(sigma) * torch.randn(128, 20, generator=generator).square().mean(1)
        uncertainty(losses, sigma).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    inside = sigmas(52)[1:-1]  # at the very ends there is little to learn from
    error = uncertainty.log_loss(inside).detach() - mean(inside).log()
    assert error.abs().max() < 0.15
    assert error.square().mean().sqrt() < 0.06


def test_the_network_learns_from_the_loss_over_the_expected_one(generator):
    """The gradient of the network is that of `L / exp(u)`, u a constant; that of u is zero where `exp(u) = L`."""
    uncertainty, sigma = Uncertainty(), sigmas(6)
    with torch.no_grad():
        uncertainty.weight.normal_(generator=generator)
        uncertainty.bias.fill_(-0.5)
    answers = torch.randn(6, generator=generator, requires_grad=True)
    (of_answers,) = torch.autograd.grad(uncertainty(answers.square(), sigma).sum(), answers)
    torch.testing.assert_close(of_answers, 2 * answers / uncertainty.log_loss(sigma).exp())
    losses = uncertainty.log_loss(sigma).detach().exp()
    torch.testing.assert_close(uncertainty(losses, sigma), 1 + losses.log())
    of_u = torch.autograd.grad(uncertainty(losses, sigma).sum(), uncertainty.parameters())
    assert all(gradient.abs().max() < 1e-5 for gradient in of_u)


def test_it_is_trained_by_the_same_optimizer_without_weight_decay():
    args = arguments(adam_weight_decay=0.1, uncertainty_weighting=True)
    unet, uncertainty = small_unet(), Uncertainty()
    of_network, of_weights = build_optimizer(args, plan_for(args), unet, uncertainty).param_groups
    assert (of_network["weight_decay"], of_weights["weight_decay"]) == (0.1, 0)
    assert of_network["lr"] == of_weights["lr"]
    assert sum(p.numel() for p in of_weights["params"]) == 129


@pytest.mark.parametrize("method", ["gm-sgm", "ncsnv2", "cld", "cld --objective score", "ddpm"])
def test_it_changes_what_is_learned_and_not_what_is_logged(train, tmp_path, method):
    """A network that stands still, as its gradient is clipped to nothing: the losses are those of a training without,
    while the weights are learned. And then one that moves: it is another, of the same files."""
    still = (
        f"{SMALL} --method {method} --max_train_steps 3 --logging_steps 1 --validation_steps 0 --lr_scheduler constant"
    )
    still += " --max_grad_norm 1e-20 --adam_epsilon 1e-4 --checkpointing_steps 3"
    moves = still.replace("1e-20", "1")
    for name, words in {"still": still, "moves": moves}.items():
        for no, folder in (("no_", tmp_path / name), ("", tmp_path / f"{name} weighted")):
            train(words, f"--{no}uncertainty_weighting --output_dir", folder.parent / folder.name.replace(" ", "-"))
    losses = [[entry["loss"] for entry in read_log(tmp_path / name)] for name in ("still", "still-weighted")]
    assert losses[0] == losses[1]
    assert not torch.equal(*(load(tmp_path / name / WEIGHTS)["conv_in.weight"] for name in ("moves", "moves-weighted")))
    learned = load(tmp_path / "still-weighted" / "checkpoint-3" / "model_1.safetensors")
    assert learned["weight"].abs().max() > 0
    files = [
        {p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in ("moves", "moves-weighted")
    ]
    assert {str(path) for path in files[1] - files[0]} == {"checkpoint-3/model_1.safetensors"}
    assert not files[0] - files[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "ncsnv2", "snr_gamma": 5.0}, "undo those of --snr_gamma"),
        ({"method": "cld", "objective": "score", "cld_weighting": "likelihood"}, "undo those of --cld_weighting"),
    ],
)
def test_weights_beside_it_would_mean_nothing(options, said):
    arguments(**options)
    with pytest.raises(ValueError, match=said):
        arguments(**options, uncertainty_weighting=True)
