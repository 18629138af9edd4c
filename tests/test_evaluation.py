"""Distances against closed forms, other libraries and brute force; features."""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from networks import tiny_autoencoder, tiny_network

from diffusers_gm import UnconditionalPipeline
from diffusers_gm.evaluation import (
    Reference,
    features_of,
    frechet_distance,
    inception,
    kernel_distance,
    lite0,
    precision_recall_density_coverage,
    score,
    sliced_wasserstein,
)
from diffusers_gm.evaluation.features import as_bytes, cached_features_of
from diffusers_gm.evaluation.sampling import describe_model


@pytest.fixture(scope="module")
def extractor():
    return lite0()


def with_moments(n, mean, covariance, generator):
    """Points whose sample mean and covariance are exactly these."""
    x = torch.randn(n, len(mean), generator=generator, dtype=torch.float64)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + mean


# --- Distances ---


def test_sliced_wasserstein_of_a_shift_is_its_length_over_sqrt_d(generator):
    """Every projection of a shift by m is a shift by <m, u>: root mean square |m| / sqrt(d)."""
    x = torch.randn(50, 1, 4, 4, generator=generator)
    shift = torch.zeros(1, 1, 4, 4)
    shift[..., 0, 0] = 3.0
    distance = sliced_wasserstein(x + shift, x, num_projections=20_000)
    # <m, u>^2 / |m|^2 has mean 1/16 and variance 2 (d - 1) / (d^2 (d + 2))
    error = 5 * math.sqrt(2 * 15 / (16**2 * 18) / 20_000) * 16 / 2
    assert distance == pytest.approx(3 / 4, rel=error)
    assert sliced_wasserstein(x, x) == 0


def test_sliced_wasserstein_refuses_what_it_cannot_measure():
    x = torch.zeros(4, 1, 2, 2)
    with pytest.raises(ValueError, match="different shapes"):
        sliced_wasserstein(x, torch.zeros(4, 3, 2, 2))
    with pytest.raises(ValueError, match="at least two"):
        sliced_wasserstein(x[:1], x)
    broken = x.clone()
    broken[1] = math.nan
    with pytest.raises(ValueError, match="1 of 4 samples"):
        sliced_wasserstein(broken, x)


def test_frechet_distance_of_gaussians_is_the_closed_form(generator):
    """Covariances with a common basis commute: the trace is a sum over (s_i - t_i)^2."""
    basis = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0]
    s, t = torch.tensor([1.0, 2, 3, 0.5, 4]).double(), torch.tensor([2.0, 2, 1, 0.1, 5]).double()
    means = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    a = with_moments(30, means[0], basis * s.square() @ basis.T, generator)
    b = with_moments(40, means[1], basis * t.square() @ basis.T, generator)
    exact = float((means[0] - means[1]).square().sum() + (s - t).square().sum())
    assert frechet_distance(a, b) == pytest.approx(exact, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-7)


def test_frechet_distance_agrees_with_optimal_transport(generator):
    import ot

    a = torch.randn(60, 8, generator=generator).double()
    b = (torch.randn(50, 8, generator=generator) @ torch.randn(8, 8, generator=generator) + 0.3).double()
    moments = [x.mean(0).numpy() for x in (a, b)] + [np.cov(x.numpy().T) for x in (a, b)]
    assert frechet_distance(a, b) == pytest.approx(ot.gaussian.bures_wasserstein_distance(*moments) ** 2, rel=1e-8)


@pytest.mark.filterwarnings("ignore:Metric `Kernel")
def test_kernel_distance_is_that_of_torchmetrics(generator):
    from torchmetrics.image.kid import KernelInceptionDistance

    a, b = torch.randn(40, 6, generator=generator).double(), torch.rand(40, 6, generator=generator).double()
    with torch.random.fork_rng():
        metric = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=1, subset_size=40)
        metric.update(a, real=True)
        metric.update(b, real=False)
        theirs = float(metric.compute()[0])
    assert kernel_distance(b, a) == pytest.approx(theirs, rel=1e-10)


def test_kernel_distance_of_unequal_numbers_is_the_mean_over_pairs(generator):
    a, b = torch.randn(4, 3, generator=generator), torch.rand(7, 3, generator=generator)

    def k(x, y):
        return float((x.double() @ y.double() / 3 + 1) ** 3)

    def within(x):
        pairs = [k(p, q) for i, p in enumerate(x) for j, q in enumerate(x) if i != j]
        return sum(pairs) / len(pairs)

    exact = within(a) + within(b) - 2 * sum(k(p, q) for p in a for q in b) / 28
    assert kernel_distance(a, b) == pytest.approx(exact, rel=1e-12)


def test_neighbours_against_brute_force(generator):
    samples, real, k = torch.randn(25, 4, generator=generator) * 1.2, torch.randn(30, 4, generator=generator), 3

    def ball(points, i):
        return sorted(float((points[i] - q).norm()) for j, q in enumerate(points) if j != i)[k - 1]

    inside = [[float((x - y).norm()) <= ball(real, j) for j, y in enumerate(real)] for x in samples]
    covered = [[float((x - y).norm()) <= ball(samples, i) for i, x in enumerate(samples)] for y in real]
    assert precision_recall_density_coverage(samples, real, k) == pytest.approx(
        {
            "precision": np.mean([any(row) for row in inside]),
            "recall": np.mean([any(row) for row in covered]),
            "density": np.sum(inside) / (k * 25),
            "coverage": np.mean(np.any(inside, 0)),
        }
    )


def test_neighbours_of_the_same_set_and_of_a_distant_one(generator):
    x = torch.randn(20, 4, generator=generator)
    same = precision_recall_density_coverage(x, x)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    assert set(precision_recall_density_coverage(x + 100, x).values()) == {0}
    # Samples that collapsed to one real image: all of them realistic, little of the data covered.
    collapsed = precision_recall_density_coverage(x[:1].expand(20, -1), x)
    assert collapsed["precision"] == 1
    assert collapsed["recall"] == 1 / 20
    assert collapsed["coverage"] < 1


@pytest.mark.parametrize(
    ("distance", "a", "b", "message"),
    [
        (frechet_distance, (8, 8), (20, 8), r"more than 8 images each, got 8 and 20"),
        (frechet_distance, (20, 8), (20, 7), "different shapes"),
        (kernel_distance, (20, 8, 2), (20, 8, 2), r"must be \(n, d\)"),
        (kernel_distance, (1, 8), (20, 8), "at least two"),
        (precision_recall_density_coverage, (5, 8), (20, 8), "num_neighbors must be .* 5 and 20, got 5"),
    ],
)
def test_distances_refuse_what_they_cannot_measure(distance, a, b, message, generator):
    with pytest.raises(ValueError, match=message):
        distance(torch.randn(a, generator=generator), torch.randn(b, generator=generator))
    broken = torch.full((20, 8), math.inf)
    with pytest.raises(ValueError, match="20 of 20 reference images"):
        distance(torch.zeros(20, 8), broken)


# --- Features ---


def test_lite0_follows_its_recipe(extractor, generator):
    images = torch.rand(3, 3, 32, 32, generator=generator) * 2 - 1
    features = features_of(images, extractor)
    pixels = torch.nn.functional.interpolate(as_bytes(images).float(), (96, 96), mode="bilinear")
    with torch.no_grad():
        network = extractor.network.network
        trunk = network.extract_features((pixels - 127) / 128).mean((2, 3))
    assert features.shape == (3, 1392)
    torch.testing.assert_close(features[:, extractor.kernel], trunk, rtol=1e-3, atol=1e-3)
    assert extractor.frechet_dimension == 112


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (5, 130)])
def test_gray_images_of_any_size_are_those_in_colour(extractor, size, generator):
    gray = torch.rand(2, 1, *size, generator=generator) * 2 - 1
    assert torch.equal(features_of(gray, extractor), features_of(gray.expand(-1, 3, -1, -1), extractor))


def test_features_refuse_what_is_no_image(extractor):
    for images, message in [
        (torch.zeros(2, 2, 8, 8), "1 or 3"),
        (torch.zeros(0, 1, 8, 8), "n > 0"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), r"\[-1, 1\], got torch.uint8"),
        (torch.full((2, 1, 8, 8), math.nan), "2 of 2 images"),
    ]:
        with pytest.raises(ValueError, match=message):
            features_of(images, extractor)


def test_inception_says_what_it_needs():
    with pytest.raises(ImportError, match="pip install torch-fidelity"):
        inception()


def test_cache_of_features(extractor, tmp_path, caplog, generator):
    images = torch.rand(3, 1, 8, 8, generator=generator)
    features = cached_features_of(images, extractor, tmp_path)
    (path,) = tmp_path.glob("[!.]*")
    hook = extractor.network.register_forward_pre_hook(lambda *_: pytest.fail("computed again"))
    assert torch.equal(cached_features_of(images, extractor, tmp_path), features)
    hook.remove()
    assert not caplog.records

    cached_features_of(images, replace(extractor, version="another"), tmp_path)
    assert "not 'Lite0: another': computed again" in caplog.text
    caplog.clear()
    other = cached_features_of(images / 2, extractor, tmp_path)
    (other_path,) = set(tmp_path.glob("[!.]*")) - {path}
    path.write_bytes(other_path.read_bytes())  # the file of other images under the name of these
    assert torch.equal(cached_features_of(images, extractor, tmp_path), features)
    assert not torch.equal(other, features)
    assert f"{path} holds features of images" in caplog.text
    path.write_bytes(b"cut short")
    assert torch.equal(cached_features_of(images, extractor, tmp_path), features)
    assert "cannot be read" in caplog.text


def test_features_that_cannot_be_kept_are_not_lost(extractor, tmp_path, caplog, generator):
    images = torch.rand(3, 1, 8, 8, generator=generator)
    (tmp_path / "file").touch()
    features = cached_features_of(images, extractor, tmp_path / "file" / "cache")
    assert torch.equal(features, cached_features_of(images, extractor, tmp_path / "cache"))
    assert "cannot be written to" in caplog.text
    assert "features are not kept" in caplog.text


# --- All at once ---


def test_score_puts_the_metrics_together(extractor, generator):
    real = torch.rand(130, 1, 8, 8, generator=generator) * 2 - 1
    samples = torch.rand(120, 1, 8, 8, generator=generator) * 2 - 1
    reference = Reference(real, extractor)
    values = score(samples, reference)
    own, theirs = features_of(samples, extractor), reference.features
    assert values == {
        "num_nan": 0,
        "FD-Lite0": frechet_distance(own[:, :112], theirs[:, :112]),
        "KID-Lite0": kernel_distance(own[:, 112:], theirs[:120, 112:]),
        **precision_recall_density_coverage(own[:, 112:], theirs[:120, 112:]),
        "sliced W2": sliced_wasserstein(samples, real),
    }
    beyond = score(3 * samples, reference)
    assert beyond == score((3 * samples).clamp(-1, 1), reference), "as in a picture"
    assert beyond["sliced W2"] != sliced_wasserstein(3 * samples, real)
    samples[7, 0, 0, 0] = math.nan
    assert score(samples, reference) == {"num_nan": 1}


def test_score_refuses_what_it_cannot_measure(extractor):
    small = Reference(torch.zeros(20, 1, 8, 8))
    for samples, reference, metrics, message in [
        (torch.zeros(20, 3, 8, 8), small, ["sw"], r"samples are \(n, 3, 8, 8\), the reference is \(m, 1, 8, 8\)"),
        (torch.zeros(20, 1, 8, 8), small, ["fd"], "'fd' needs features"),
        (torch.zeros(20, 1, 8, 8), small, ["fid"], r"\['fid'\] must be among"),
        (torch.zeros(1, 1, 8, 8), small, ["sw"], "at least 2 samples and reference images, got 1 and 20"),
    ]:
        with pytest.raises(ValueError, match=message):
            score(samples, reference, metrics)
    small.extractor = extractor
    with pytest.raises(ValueError, match="FD-Lite0 needs more than 112 images.*got 20 and 20"):
        score(torch.zeros(20, 1, 8, 8), small)
    with pytest.raises(ValueError, match="at least 6"):
        score(torch.zeros(5, 1, 8, 8), small, ["prdc"])


def test_packages_of_the_extra_are_imported_late_and_named_when_missing(monkeypatch):
    heavy = ["torchmetrics", "sklearn", "ot", "matplotlib", "efficientnet_lite_pytorch"]
    code = (
        "import sys; from diffusers import DDPMPipeline; theirs = set(sys.modules); import diffusers_gm.evaluation;"
        f"print([name for name in {heavy} if name in sys.modules and name not in theirs])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
    x = torch.zeros(10, 4)
    for name, call in [
        ("ot", lambda: sliced_wasserstein(x, x)),
        ("torchmetrics.image.fid", lambda: frechet_distance(x, x)),
        ("sklearn.neighbors", lambda: precision_recall_density_coverage(x, x)),
        ("efficientnet_lite_pytorch", lite0),
    ]:
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=r'pip install "diffusers-gm\[evaluation\]"'):
            call()


def test_a_model_is_the_same_whatever_order_the_defaults_of_its_config_are_in():
    """They come from a set, whose order each process has its own of."""
    pipe = DDPMPipeline(tiny_network(), DDPMScheduler.from_config({"beta_end": 0.01}))
    described = describe_model(pipe)
    defaults = pipe.scheduler.config["_use_default_values"]
    assert len(defaults) > 1
    pipe.scheduler.register_to_config(_use_default_values=defaults[::-1])
    assert describe_model(pipe) == described
    pipe.scheduler.register_to_config(beta_end=0.02)
    assert describe_model(pipe) != described


def test_a_model_that_draws_its_classes_in_other_shares_is_another():
    pipes = [
        UnconditionalPipeline(tiny_network(num_class_embeds=2), DDPMScheduler(), class_shares=shares)
        for shares in ([0.5, 0.5], [0.99, 0.01])
    ]
    assert describe_model(pipes[0]) != describe_model(pipes[1])


def test_a_model_that_scales_its_latents_in_another_way_is_another():
    """With the same weights it makes other images."""
    described = set()
    for mean, std in ((0.0, 1.0), (0.5, 1.0), (0.0, 2.0)):
        scaling = {"latents_mean": [mean] * 4, "latents_std": [std] * 4}
        pipe = UnconditionalPipeline(tiny_network(4, 4), DDPMScheduler(), vae=tiny_autoencoder(), **scaling)
        described.add(describe_model(pipe))
    assert len(described) == 3
