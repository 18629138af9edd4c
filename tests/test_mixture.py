"""The mathematics of Gaussian-mixture noise."""

import itertools
import math
from functools import partial

import pytest
import torch
from scipy import integrate, special, stats

from diffusers_gm import GaussianMixtureNoise, GMLangevinScheduler
from diffusers_gm.losses import denoising_loss, denoising_target
from diffusers_gm.processes.mixture import _positive_stable_partial_means
from diffusers_gm.processes.random import Draw
from diffusers_gm.readings import NoiseSpace
from diffusers_gm.studies.exact import ExactDenoiser

MIXTURE = GaussianMixtureNoise([0.7, 0.2, 0.1], [0.5, 1.0, 3.0])
PER_ELEMENT = GaussianMixtureNoise([0.7, 0.2, 0.1], [0.5, 1.0, 3.0], per_element=True)


def reference_log_prob(mixture, eta, sigma):
    """torch.distributions, element by element or on the flattened image."""
    D = torch.distributions
    flat = eta.flatten(1)
    scales = mixture.scales * sigma
    if mixture.per_element:
        law = D.MixtureSameFamily(D.Categorical(mixture.weights), D.Normal(torch.zeros(3).double(), scales))
        return law.log_prob(flat).sum(1)
    components = D.Independent(D.Normal(torch.zeros(3, flat.shape[1]).double(), scales[:, None]), 1)
    return D.MixtureSameFamily(D.Categorical(mixture.weights), components).log_prob(flat)


@pytest.mark.parametrize("mixture", [MIXTURE, PER_ELEMENT], ids=["image", "element"])
@pytest.mark.parametrize("sigma", [0.1, 2.0])
def test_density_and_score_agree_with_torch_and_autograd(mixture, sigma, generator):
    eta = sigma * torch.randn(6, 1, 2, 2, dtype=torch.float64, generator=generator)
    eta = (eta * torch.tensor([0.3, 0.5, 1, 1.5, 2, 5]).double().view(-1, 1, 1, 1)).requires_grad_()
    expected = reference_log_prob(mixture, eta, sigma)
    torch.testing.assert_close(mixture.log_prob(eta, sigma), expected)
    (gradient,) = torch.autograd.grad(expected.sum(), eta)
    torch.testing.assert_close(mixture.score(eta, sigma), gradient)


@pytest.mark.parametrize("mixture", [MIXTURE, PER_ELEMENT], ids=["image", "element"])
def test_sigma_may_differ_per_sample(mixture, generator):
    eta = torch.randn(3, 1, 2, 2, generator=generator)
    sigma = torch.tensor([0.1, 1.0, 7.0])
    for function in (mixture.log_prob, mixture.score, mixture.responsibilities):
        one_by_one = torch.cat([function(eta[i : i + 1], float(sigma[i])) for i in range(3)])
        torch.testing.assert_close(function(eta, sigma), one_by_one)


@pytest.mark.parametrize("per_element", [False, True])
def test_half_precision_is_computed_in_single(per_element, generator):
    mixture = GaussianMixtureNoise([0.8, 0.2], [0.5, 2.0], per_element)
    for sigma in (1e-4, 50.0):
        eta = mixture.sample((2, 3, 8, 8), generator, sigma=sigma).half()
        half, single = (mixture.responsibilities(each, sigma) for each in (eta, eta.float()))
        torch.testing.assert_close(half.float(), single, rtol=0, atol=1e-3)
    wide = mixture.sample((1, 3, 256, 256), generator, sigma=50.0).half()
    torch.testing.assert_close(
        mixture.log_prob(wide, 50.0).float(), mixture.log_prob(wide.float(), 50.0), rtol=1e-3, atol=0
    )
    eta = mixture.sample((4, 1, 8, 8), generator, sigma=300.0)
    levels = torch.full((4,), 300.0)  # whose squares half precision has not
    for function in (mixture.responsibilities, mixture.score, mixture.log_prob):
        torch.testing.assert_close(function(eta, levels.half()), function(eta, levels))


def test_rare_components_are_drawn_in_half_precision_too():
    mixture = GaussianMixtureNoise.from_stable(1.5, 5)
    draws = [
        mixture.sample_scales((200_000, 1), Draw(seeded, dtype=dtype)).double().square()
        for dtype, seeded in ((d, torch.Generator().manual_seed(0)) for d in (torch.float32, torch.bfloat16))
    ]
    assert draws[0].mean().item() == pytest.approx(1, abs=5 * draws[0].std().item() / 200_000**0.5)
    torch.testing.assert_close(draws[1], draws[0], rtol=0.01, atol=0)  # the same components


def test_tables_serve_gradients_and_autocast_too(generator):
    """Whoever is first, without gradients or not."""
    mixture = GaussianMixtureNoise([0.8, 0.2], [0.5, 2.0])
    eta = torch.randn(2, 3, 8, 8, generator=generator)
    with torch.inference_mode():
        mixture.score(eta)
    mixture.log_prob(eta.clone().requires_grad_()).sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = mixture.residual_precision(eta, 1.0)
    assert torch.equal(rounded, mixture.residual_precision(eta, 1.0))


def test_responsibilities_are_a_posterior(generator):
    for mixture, shape in ((MIXTURE, (5, 3)), (PER_ELEMENT, (5, 3, 2, 4, 4))):
        r = mixture.responsibilities(torch.randn(5, 2, 4, 4, generator=generator), 0.7)
        assert r.shape == shape
        torch.testing.assert_close(r.sum(1), torch.ones_like(r.sum(1)))
    # Nothing underflows: a million elements, far apart components.
    r = MIXTURE.responsibilities(3.0 * torch.randn(1, 1, 1000, 1000, generator=generator), 1.0)
    torch.testing.assert_close(r, torch.tensor([[0.0, 0.0, 1.0]]))


@pytest.mark.parametrize("mixture", [MIXTURE, PER_ELEMENT], ids=["image", "element"])
def test_samples_have_the_moments_of_the_mixture(mixture, generator):
    n = 100_000
    eta = mixture.sample((n, 2, 1, 1), generator, sigma=2.0).double() / 2.0
    a, b = eta[:, 0].flatten(), eta[:, 1].flatten()
    m2, m4, m8 = (mixture.moment(k) for k in (2, 4, 8))
    assert float(a.mean()) == pytest.approx(0, abs=5 * math.sqrt(m2 / n))
    assert float((a**2).mean()) == pytest.approx(m2, abs=5 * math.sqrt((3 * m4 - m2**2) / n))
    assert float((a**4).mean()) == pytest.approx(3 * m4, abs=5 * math.sqrt(105 * m8 / n))
    # Elements of one image share the component, or do not.
    shared = m2**2 if mixture.per_element else m4
    assert float((a**2 * b**2).mean()) == pytest.approx(shared, abs=5 * math.sqrt(9 * m8 / n))


def test_one_component_is_gaussian_noise_to_the_bit():
    one = GaussianMixtureNoise([1.0], [1.0])
    draws = one.sample((3, 1, 4, 4), torch.Generator().manual_seed(3))
    assert torch.equal(draws, torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(one.score(draws), -draws)


def test_generators_decide_sample_by_sample():
    def generators(seeds):
        return [torch.Generator().manual_seed(s) for s in seeds]

    whole = MIXTURE.sample((4, 1, 3, 3), generators(range(4)))
    halves = [MIXTURE.sample((2, 1, 3, 3), generators(seeds)) for seeds in ((0, 1), (2, 3))]
    assert torch.equal(whole, torch.cat(halves))
    for count in (1, 3):
        with pytest.raises(ValueError, match=f"list of {count}"):
            MIXTURE.sample((4, 1, 3, 3), generators(range(count)))


def test_normalized_has_unit_variance():
    assert MIXTURE.normalized().moment(2) == pytest.approx(1)
    for mixture in (
        GaussianMixtureNoise.from_stable(1.2, 6),
        GaussianMixtureNoise.from_power_law(1.5, 4, 3.0),
    ):
        assert mixture.moment(2) == pytest.approx(1)


def test_power_law_follows_its_rule():
    mixture = GaussianMixtureNoise.from_power_law(1.5, 4, 2.0)
    torch.testing.assert_close(mixture.scales[1:] / mixture.scales[:-1], torch.full((3,), 2.0).double())
    torch.testing.assert_close(mixture.weights[1:] / mixture.weights[:-1], torch.full((3,), 2.0**-1.5).double())


def test_positive_stable_law_against_the_levy_distribution():
    """For rho = 1/2 the law is Levy's, with a closed form."""
    probabilities = torch.tensor([0.1, 0.6, 0.9, 0.999, 0.9999], dtype=torch.float64)
    ours = _positive_stable_partial_means(0.5, probabilities)
    quantiles = 1 / (4 * special.erfcinv(probabilities.numpy()) ** 2)

    def integrand(log_a):
        a = math.exp(log_a)
        return a * a * math.exp(-1 / (4 * a)) / (2 * math.sqrt(math.pi) * a**1.5)

    exact = [integrate.quad(integrand, -8, math.log(q), limit=500)[0] for q in quantiles]
    torch.testing.assert_close(ours, torch.tensor(exact, dtype=torch.float64), rtol=3e-3, atol=0)


@pytest.mark.parametrize(("components", "accuracy"), [(5, 0.12), (8, 0.04)])
def test_stable_tails(components, accuracy):
    """Survival of one element against scipy's symmetric stable law of the same scale, far into the tails."""
    alpha = 1.5
    mixture = GaussianMixtureNoise.from_stable(alpha, components)
    # Undo the normalisation: sqrt(A) g has the characteristic function exp(-2^(-alpha/2) |t|^alpha).
    tails = torch.logspace(math.log10(0.4), -4, components, dtype=torch.float64)[:-1]
    edges = torch.cat([torch.zeros(1), 1 - tails, torch.ones(1)]).double() * (1 - 1e-4)
    second_moment = float(_positive_stable_partial_means(alpha / 2, edges[-1:])) / (1 - 1e-4)
    stable = stats.levy_stable(alpha, 0, scale=2**-0.5)
    for x in (0.5, 1.0, 2.0, 5.0, 7.0, 10.0, 20.0):
        z = x / (mixture.scales * math.sqrt(second_moment))
        ours = float((mixture.weights * 2 * torch.special.ndtr(-z)).sum())
        assert ours == pytest.approx(2 * stable.sf(x), rel=accuracy)


def test_every_constructor_keeps_whether_components_are_drawn_per_element(generator):
    made = [
        GaussianMixtureNoise([0.8, 0.2], [0.5, 2.0], per_element=True),
        GaussianMixtureNoise.from_power_law(1.5, 3, per_element=True),
        GaussianMixtureNoise.from_stable(1.5, 3, per_element=True),
        GaussianMixtureNoise.from_stable(2.0, 3, per_element=True),
    ]
    assert all(mixture.per_element and mixture.normalized().per_element for mixture in made)
    mixture, displacement = made[0], torch.randn(2, 1, 3, 3, generator=generator)
    for precision in (mixture.residual_precision, mixture.displacement_precision):
        assert precision(displacement, 1.0).shape == displacement.shape


def test_schedulers_draw_components_as_the_network_was_trained():
    """Per element: their starts are those of the mixture."""
    options = {"mixture_weights": [0.8, 0.2], "mixture_scales": [0.75, 1.62], "mixture_per_element": True}
    scheduler = GMLangevinScheduler(**options, model_noise="mixture")
    scheduler.set_timesteps(5)
    started, drawn = (torch.Generator().manual_seed(0) for _ in range(2))
    start = scheduler.initial_sample((1, 1, 8, 8), started, torch.device("cpu"), torch.float32)
    noise = GaussianMixtureNoise([0.8, 0.2], [0.75, 1.62], per_element=True).sample((1, 1, 8, 8), drawn)
    torch.testing.assert_close(start, float(scheduler.init_noise_sigma) * noise, rtol=1e-4, atol=1e-4)


def test_a_component_of_no_weight_is_never_drawn(generator):
    mixture = GaussianMixtureNoise([0.0, 1.0], [5.0, 1.0])
    assert mixture.sample_scales((100, 1), Draw(generator)).unique().tolist() == [1.0]
    eta = torch.randn(4, 1, 3, 3, generator=generator)
    assert torch.equal(mixture.responsibilities(eta), torch.tensor([[0.0, 1.0]]).expand(4, 2))
    torch.testing.assert_close(mixture.score(eta), -eta)


def test_stable_limits():
    assert len(GaussianMixtureNoise.from_stable(2.0, 5)) == 1
    assert len(GaussianMixtureNoise.from_stable(1.5, 1)) == 1
    kurtoses = [GaussianMixtureNoise.from_stable(alpha, 5).moment(4) for alpha in (1.9, 1.5, 1.0)]
    assert kurtoses == sorted(kurtoses)


@pytest.mark.parametrize(
    ("weights", "scales", "message"),
    [
        ([0.5, 0.4], [1, 2], "sum to one"),
        ([1.5, -0.5], [1, 2], "non-negative"),
        ([0.5, 0.5], [1, 0], "scales must be positive"),
        ([0.5, 0.5], [1, -2], "scales must be positive"),
        ([0.5, 0.5], [1, math.nan], "scales must be positive"),
        ([0.5, math.nan], [1, 1], "non-negative"),
        ([1.0], [1, 2], "same length"),
        ([], [], "at least one"),
    ],
)
def test_what_is_not_a_mixture_is_refused(weights, scales, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixtureNoise(weights, scales)


def test_constructors_refuse_bad_arguments():
    for alpha in (0.0, 2.1):
        with pytest.raises(ValueError, match=f"alpha={alpha}"):
            GaussianMixtureNoise.from_stable(alpha, 3)
    with pytest.raises(ValueError, match="base=1"):
        GaussianMixtureNoise.from_power_law(1.5, 3, 1.0)


# --- Two targets, and the conversion between them ---


def data_posterior(points, y, sigma, mixture):
    """Posterior of the data points (n,) and the unit noise that each implies, `(n, C, H, W)`."""
    noise = (y - points) / sigma
    return torch.softmax(mixture.log_prob(noise), 0), noise


@pytest.mark.parametrize("mixture", [MIXTURE, PER_ELEMENT], ids=["image", "element"])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
def test_targets_have_the_minimisers_they_promise(mixture, sigma, generator):
    """The minimiser of a squared loss is the conditional mean of its target given the noisy image: summed exactly."""
    points = torch.randn(20, 1, 3, 3, dtype=torch.float64, generator=generator)
    y = (points[0] + sigma * torch.randn(1, 3, 3, dtype=torch.float64, generator=generator)).requires_grad_()
    log_p = torch.logsumexp(mixture.log_prob(y - points, sigma), 0)
    (score,) = torch.autograd.grad(log_p, y)
    posterior, noise = data_posterior(points, y.detach(), sigma, mixture)
    weights = posterior.view(-1, 1, 1, 1)

    space = NoiseSpace.ve(0.01, 10.0, 100)

    def minimiser(prediction_type):
        return (weights * denoising_target(points, noise, sigma, space, mixture, prediction_type)).sum(0)

    torch.testing.assert_close(minimiser("scaled_score"), -sigma * score)
    for prediction_type in ("epsilon", "sample", "v_prediction"):
        denoised = space.denoised(minimiser(prediction_type), y.detach(), sigma, prediction_type)
        torch.testing.assert_close(denoised, (weights * points).sum(0))
    if sigma == 1.0:
        different = minimiser("scaled_score") - minimiser("epsilon")
        assert float(different.abs().max()) > 0.1, "the two are different functions"


@pytest.mark.parametrize("width", [0.0, 0.2])
def test_exact_denoiser_against_autograd(width, generator):
    points = torch.randn(7, 1, 2, 2, dtype=torch.float64, generator=generator)
    exact = ExactDenoiser(points, width, MIXTURE)
    sigma = 0.6
    y = torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=generator).requires_grad_()
    joint = [
        w.log() + torch.distributions.Normal(p, math.sqrt(width**2 + (c * sigma) ** 2)).log_prob(y).sum((1, 2, 3))
        for p in points
        for w, c in zip(MIXTURE.weights, MIXTURE.scales, strict=True)
    ]
    (score,) = torch.autograd.grad(torch.logsumexp(torch.stack(joint), 0).sum(), y)
    torch.testing.assert_close(exact.score(y.detach(), sigma), score)
    if width == 0:
        for i in range(4):
            posterior, _ = data_posterior(points, y[i].detach(), sigma, MIXTURE)
            torch.testing.assert_close(exact(y.detach(), sigma)[i], (posterior.view(-1, 1, 1, 1) * points).sum(0))


@pytest.mark.parametrize("mixture", [MIXTURE, PER_ELEMENT], ids=["image", "element"])
def test_conversion_between_score_and_denoiser_is_exact_for_a_point_mass(mixture, generator):
    point = torch.randn(1, 1, 8, 8, dtype=torch.float64, generator=generator)
    y = point + mixture.sample((6, 1, 8, 8), generator, dtype=torch.float64, sigma=0.4)
    score = mixture.score(y - point, 0.4)
    w = mixture.residual_precision(y - point, 0.4)
    torch.testing.assert_close(w * (point - y) / 0.4**2, score)


def test_conversions_are_accurate_where_components_are_distinguishable(generator):
    """64 data points in 256 dimensions: both directions within 1% of the exact functions."""
    points = torch.randn(64, 1, 16, 16, generator=generator)
    mixture = GaussianMixtureNoise.from_power_law(1.5, 3)
    exact = ExactDenoiser(points, noise=mixture)
    for sigma in (0.1, 0.5, 1.0):
        y = points + mixture.sample(points.shape, generator, sigma=sigma)
        denoised, displacement = exact(y, sigma), sigma**2 * exact.score(y, sigma)
        from_denoiser = mixture.residual_precision(y - denoised, sigma) * (denoised - y)
        from_score = y + displacement / mixture.displacement_precision(displacement, sigma)
        assert float((from_denoiser - displacement).norm() / displacement.norm()) < 0.01
        assert float((from_score - denoised).norm() / (y - denoised).norm()) < 0.01


def test_loss_of_the_exact_network_is_its_conditional_variance(generator):
    """With the exact denoiser as network the loss is the variance of the noise given the image; any shift adds."""
    points = torch.randn(10, 1, 4, 4, generator=generator)
    space = NoiseSpace.ve(0.01, 10.0, 100)
    timesteps = torch.full((5000,), 70)
    images = points[torch.randint(10, (5000,), generator=generator)]
    noise = MIXTURE.sample(images.shape, generator)
    for prediction_type in ("epsilon", "v_prediction", "scaled_score"):
        exact = ExactDenoiser(points, noise=MIXTURE)

        def network(x, t, shift=0.0, exact=exact, prediction_type=prediction_type):
            return exact.network_output(x, t[0], space, prediction_type) + shift

        best = denoising_loss(network, images, timesteps, noise, space, MIXTURE, prediction_type)
        assert best.shape == (5000,)
        off = partial(network, shift=0.1)
        shifted = denoising_loss(off, images, timesteps, noise, space, MIXTURE, prediction_type)
        difference = shifted - best
        error = 5 * float(difference.std()) / math.sqrt(5000)
        assert float(difference.mean()) == pytest.approx(0.01, abs=error)


def test_losses_refuse_an_unknown_prediction_type():
    images = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="'noise'"):
        denoising_target(images, images, 1.0, NoiseSpace.ve(0.01, 10.0, 100), MIXTURE, "noise")


@pytest.mark.parametrize("width", [0.0, 0.2])
def test_exact_denoiser_of_per_element_noise_against_brute_force(width, generator):
    """All assignments of components to the four elements, one by one, each a Gaussian of its own."""
    points = torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=generator)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    exact = ExactDenoiser(points, width, PER_ELEMENT, weights)
    sigma = torch.tensor([0.2, 0.6, 1.5, 4.0], dtype=torch.float64)
    y = torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=generator).requires_grad_()
    log_joint, means = [], []
    for p, w in zip(points, weights, strict=True):
        for ks in itertools.product(range(3), repeat=4):
            scales, prior = PER_ELEMENT.scales[list(ks)].view(1, 2, 2), PER_ELEMENT.weights[list(ks)].log().sum()
            variance = width**2 + (scales * sigma.view(-1, 1, 1, 1)) ** 2
            density = torch.distributions.Normal(p, variance.sqrt()).log_prob(y).sum((1, 2, 3))
            log_joint.append(w.log() + prior + density)
            means.append(p + width**2 / variance * (y - p))
    joint = torch.stack(log_joint)
    expected = (torch.softmax(joint, 0)[..., None, None, None] * torch.stack(means)).sum(0)
    torch.testing.assert_close(exact(y.detach(), sigma), expected.detach())
    (score,) = torch.autograd.grad(torch.logsumexp(joint, 0).sum(), y)
    torch.testing.assert_close(exact.score(y.detach(), sigma), score)
