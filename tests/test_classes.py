"""Classes and guidance in the pipelines, through real files."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput
from networks import perfect_network, seeded, tiny_network

from diffusers_gm import (
    AnnealedLangevinScheduler,
    CalibratedMultistepScheduler,
    CLDPipeline,
    CLDSSCSScheduler,
    GaussianMixtureNoise,
    GMLangevinScheduler,
    GMSGMPipeline,
    NCSNv2Pipeline,
    calibrate,
)
from diffusers_gm.pipelines.encoding import is_within
from diffusers_gm.pipelines.guidance import Guidance
from diffusers_gm.studies.exact import ExactDenoiser

NAMES = ["cat", "cow", "dog"]
MIXTURE = {"mixture_weights": [0.8, 0.2], "mixture_scales": [0.7, 1.744], "model_noise": "mixture"}
SCHEDULERS = {
    "gm-sgm": lambda: GMLangevinScheduler(**MIXTURE),
    "ncsnv2": AnnealedLangevinScheduler,
    "cld": lambda: CLDSSCSScheduler(prediction_type="cld_mixed"),
}
CLASSES = {"gm-sgm": GMSGMPipeline, "ncsnv2": NCSNv2Pipeline, "cld": CLDPipeline}


def conditional(method, **config):
    channels = 2 if method == "cld" else 1
    network = tiny_network(channels, 1, **{"num_class_embeds": 4} | config)
    pipeline = CLASSES[method](network, SCHEDULERS[method](), class_names=NAMES)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(params=CLASSES)
def pipeline(request):
    return conditional(request.param)


def image_by_image(pipeline, monkeypatch):
    """Convolutions round differently in batches of other sizes: run the network image by image."""
    forward = pipeline.unet.forward

    def one_by_one(x, t, class_labels=None):
        labels = [None] * len(x) if class_labels is None else class_labels.split(1)
        outputs = [forward(one, t, class_labels=label).sample for one, label in zip(x.split(1), labels, strict=True)]
        return UNet2DOutput(torch.cat(outputs))

    monkeypatch.setattr(pipeline.unet, "forward", one_by_one)


def images(pipeline, seeds, labels, steps=8, **options):
    return pipeline(len(seeds), steps, seeded(*seeds), class_labels=labels, **{"output_type": "pt"} | options).images


def test_more_than_ten_classes_keep_their_numbers_in_a_folder(tmp_path):
    """JSON has keys in the order of the alphabet: "10" before "2"."""
    names = [f"class {i}" for i in range(12)]
    network = tiny_network(num_class_embeds=13)
    GMSGMPipeline(network, SCHEDULERS["gm-sgm"](), class_names=names).save_pretrained(tmp_path)
    assert GMSGMPipeline.from_pretrained(tmp_path).class_names == names


def test_names_survive_a_folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    for loaded in (
        type(pipeline).from_pretrained(tmp_path),
        DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True),
    ):
        assert loaded.class_names == NAMES
        assert loaded.num_classes == 3
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(images(loaded, (0, 1), ["dog", "cat"]), images(pipeline, (0, 1), [2, 0]))


def test_labels_in_every_form(pipeline):
    forms = ([2, 0], ("dog", "cat"), ["dog", 0], torch.tensor([2, 0]), np.array([2, 0]), [np.int64(2), 0])
    results = [pipeline(class_labels=labels, num_inference_steps=6, generator=seeded(0, 1), output_type="pt").images
               for labels in forms]  # fmt: skip
    assert all(torch.equal(result, results[0]) for result in results)
    for label in (2, "dog", torch.tensor(2), np.int64(2)):
        same = pipeline(class_labels=label, num_inference_steps=6, generator=seeded(0)[0], output_type="pt").images
        assert len(same) == 1


def test_the_class_decides(pipeline):
    one, other, none = (images(pipeline, (0,), label) for label in ("cat", 1, 3))
    assert not torch.equal(one, other)
    assert not torch.equal(one, none)


@pytest.mark.parametrize(
    "options", [{}, {"guidance_scale": 3.0}, {"guidance_scale": 3.0, "guidance_interval": (0.1, 9)}]
)
def test_batch_4_is_2_and_2(pipeline, monkeypatch, options):
    image_by_image(pipeline, monkeypatch)
    labels = [0, 1, 2, 2]
    whole = images(pipeline, range(4), labels, **options)
    halves = [images(pipeline, range(i, i + 2), labels[i : i + 2], **options) for i in (0, 2)]
    assert torch.equal(whole, torch.cat(halves))


def test_guidance_1_is_no_guidance(pipeline):
    expected = images(pipeline, (0, 1), "cow")
    assert torch.equal(images(pipeline, (0, 1), "cow", guidance_scale=1.0, guidance_interval=(0, 100)), expected)
    assert not torch.equal(images(pipeline, (0, 1), "cow", guidance_scale=1.5), expected)


def test_guidance_0_is_without_classes(pipeline, monkeypatch):
    image_by_image(pipeline, monkeypatch)
    without = images(pipeline, (0, 1), 3)
    torch.testing.assert_close(images(pipeline, (0, 1), "cow", guidance_scale=0.0), without)


def test_guidance_acts_in_its_interval_only(pipeline):
    sizes = []
    pipeline.unet.register_forward_pre_hook(lambda module, args: sizes.append((float(args[1]), len(args[0]))))
    for scheduler in (pipeline.scheduler, CalibratedMultistepScheduler.from_config(pipeline.scheduler.config)):
        pipeline.scheduler = scheduler
        sizes.clear()
        images(pipeline, (0,), 1, guidance_scale=2.0, guidance_interval=(0.2, 3.0), steps=16)
        levels = scheduler.reading.sigma(torch.tensor([label for label, _ in sizes], dtype=torch.float64))
        acted = [bool(0.2 <= level <= 3.0) for level in levels]
        assert [size for _, size in sizes] == [2 if acts else 1 for acts in acted]
        assert 0 < sum(acted) < 16
    inside, everywhere = [], []
    for kept, options in ((inside, {"guidance_interval": (0.2, 3.0)}), (everywhere, {})):
        keep = lambda pipe, i, t, tensors, kept=kept: kept.append(tensors["latents"]) or {}
        images(pipeline, (0,), 1, guidance_scale=2.0, callback_on_step_end=keep, **options)
    assert not torch.equal(inside[0], everywhere[0]), "the first level is above the interval"


@pytest.mark.parametrize("config", [{"noise_space": "edm"}, {}, {"sigma_labels": True}], ids=str)
def test_the_ends_of_a_guidance_interval_are_in_it(config):
    """Labels are rounded, and so are levels of a calibration."""
    ends = {"sigma_min": 0.002, "sigma_max": 14.6}
    scheduler = AnnealedLangevinScheduler(**ends, **config, algorithm_type="consistent")
    for sigma_max in (10.0, 14.6):
        scheduler.register_to_config(sigma_max=sigma_max)
        scheduler.set_timesteps(5)
        assert all(is_within((0.002, sigma_max), scheduler, t) for t in scheduler.timesteps)
        assert [is_within((0.0021, 0.99 * sigma_max), scheduler, t) for t in scheduler.timesteps] == [0, 1, 1, 1, 0]


def test_guidance_interval_of_a_scheduler_of_diffusers(monkeypatch):
    pipeline = conditional("gm-sgm")
    levels, sizes = [], []
    pipeline.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    for scheduler in (DDIMScheduler(), EulerDiscreteScheduler()):
        pipeline.scheduler = scheduler
        sizes.clear()
        images(pipeline, (0,), 1, guidance_scale=2.0, guidance_interval=(0.5, 5.0), steps=20)
        abar = DDIMScheduler().alphas_cumprod.double()[scheduler.timesteps.long()]
        levels = (1 / abar - 1).sqrt()
        assert sizes == [2 if 0.5 <= level <= 5 else 1 for level in levels.tolist()]


@pytest.mark.parametrize(
    "scheduler",
    [
        GMLangevinScheduler(**MIXTURE),
        GMLangevinScheduler(**MIXTURE, prediction_type="v_prediction"),
        AnnealedLangevinScheduler(noise_space="ve"),
        CLDSSCSScheduler(prediction_type="cld_mixed"),
        CalibratedMultistepScheduler(noise_space="edm", prediction_type="edm", sigma_min=0.01, sigma_max=50.0),
        CalibratedMultistepScheduler(noise_space="flow", shift=1.0, prediction_type="flow_prediction"),
    ],
    ids=lambda s: f"{type(s).__name__}-{s.config.prediction_type}",
)
def test_guidance_of_the_output_is_guidance_of_the_denoiser(scheduler):
    """D is affine in the output, and the weights of guidance sum to one."""
    reading, (generator,) = scheduler.reading, seeded(0)
    channels = 2 if isinstance(scheduler, CLDSSCSScheduler) else 1
    sample = torch.randn(2, channels, 4, 4, generator=generator, dtype=torch.float64)
    outputs = torch.randn(2, 2, 1, 4, 4, generator=generator, dtype=torch.float64)
    network = lambda x, t, labels: outputs[labels, torch.arange(len(labels)) % 2]
    first, last = reading.timestep_range
    for scale in (0.0, 0.5, 3.0):
        guidance = Guidance(torch.ones(2, dtype=torch.int64), 0, scale)
        for call in reading.calls(torch.linspace(first, last, 5, dtype=torch.float64))[:-1]:
            without, of_class = (reading.denoised(output, sample, call) for output in outputs)
            guided = reading.denoised(guidance.output(network, sample, torch.tensor(call.label)), sample, call)
            expected = without + scale * (of_class - without)
            torch.testing.assert_close(guided, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_a_variance_that_is_answered_besides_is_not_guided():
    """As in diffusers' pipeline of DiT: extrapolated, it would leave [-1, 1], in which it is read."""
    outputs = torch.stack([torch.full((1, 2, 4, 4), 0.2), torch.full((1, 2, 4, 4), 0.9)])
    network = lambda x, t, labels: torch.cat([outputs[label] for label in labels])
    guidance = Guidance(torch.ones(3, dtype=torch.int64), 0, 5.0)
    guided = guidance.output(network, torch.zeros(3, 1, 4, 4), torch.tensor(10))
    torch.testing.assert_close(guided[:, :1], torch.full((3, 1, 4, 4), 0.2 + 5 * 0.7))
    assert (guided[:, 1:] == 0.9).all()


def test_guidance_of_a_score_under_mixture_noise_is_that_of_the_score():
    """The sampler is given `(1 - s) score + s score_of_class`, and D that goes with it, which is not the guided D."""
    scheduler = GMLangevinScheduler(**MIXTURE, prediction_type="score", num_langevin_steps=1)
    mixture = GaussianMixtureNoise(MIXTURE["mixture_weights"], MIXTURE["mixture_scales"])
    points = torch.randn(6, 1, 4, 4, generator=seeded(0)[0], dtype=torch.float64)
    denoisers = [ExactDenoiser(points, noise=mixture), ExactDenoiser(points[:3], noise=mixture)]
    networks = [perfect_network(scheduler, denoiser) for denoiser in denoisers]
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[5]
    call = scheduler.reading.calls(t[None].double())[0]
    y = points[:2] + call.sigma * mixture.sample((2, 1, 4, 4), seeded(1)[0], dtype=torch.float64)
    x = scheduler.scale_model_input(y, t)
    network = lambda x, t, labels: torch.cat([networks[int(labels[i])](x[i : i + 1], t) for i in range(len(labels))])
    guided = Guidance(torch.ones(2, dtype=torch.int64), 0, 2.0).output(network, x, t)
    scores = [net(x, t) for net in networks]
    torch.testing.assert_close(guided, 2 * scores[1] - scores[0])
    scheduler.set_begin_index(5)
    denoised = scheduler.step(guided, t, y, generator=seeded(2)[0]).pred_original_sample
    score = mixture.score(y - denoised, call.sigma)
    torch.testing.assert_close(score, guided, rtol=1e-4, atol=1e-5 * float(guided.abs().max()))
    of_each = [denoiser(y, call.sigma) for denoiser in denoisers]
    assert float((denoised - (2 * of_each[1] - of_each[0])).abs().max()) > 1e-3


def test_labels_follow_the_proportions_of_the_data():
    network = tiny_network(num_class_embeds=4)
    pipeline = GMSGMPipeline(network, SCHEDULERS["gm-sgm"](), class_shares=[0.5, 0.0, 0.5])
    assert pipeline.class_names is None
    labels = pipeline.draw_labels(2000, seeded(*range(2000)))
    counts = np.bincount(labels, minlength=3) / 2000
    assert counts[1] == 0
    assert abs(counts[0] - 0.5) < 5 * 0.5 / 2000**0.5
    assert pipeline.draw_labels(1000, seeded(*range(1000, 2000))) == labels[1000:]
    unlike = GMSGMPipeline(network, SCHEDULERS["gm-sgm"](), class_shares=[0.2, 0.3, 0.5])
    assert unlike.draw_labels(10, evenly=True) == [0] * 2 + [1] * 3 + [2] * 5
    assert unlike.draw_labels(8, among=[2, 1], evenly=True) == [1] * 3 + [2] * 5, "each has its own share"
    unseen = GMSGMPipeline(unlike.unet, unlike.scheduler, class_shares=[1.0, 0.0, 0.0])
    assert unseen.draw_labels(4, among=[1, 2], evenly=True) == [1] * 2 + [2] * 2, "where none has any, alike"
    assert unlike.labels_in_turn(6) == [0, 0, 1, 1, 2, 2]
    assert GMSGMPipeline(tiny_network(), SCHEDULERS["gm-sgm"]()).draw_labels(1, seeded(0)) is None


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.0}])
def test_without_labels_classes_are_drawn(pipeline, monkeypatch, options):
    """The generator decides them, before anything else: the images are those of the labels that it draws."""
    image_by_image(pipeline, monkeypatch)
    seeds = range(4)
    generators = seeded(*seeds)
    labels = pipeline.draw_labels(4, generators)
    assert len(set(labels)) > 1
    expected = pipeline(4, 8, generators, class_labels=labels, output_type="pt", **options).images
    assert torch.equal(images(pipeline, seeds, None, **options), expected)
    halves = [images(pipeline, half, None, **options) for half in ((0, 1), (2, 3))]
    assert torch.equal(torch.cat(halves), expected)
    one, again, other = (
        pipeline(4, 8, torch.Generator().manual_seed(seed), output_type="pt", **options).images for seed in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_a_given_image_is_of_no_class_unless_told(pipeline):
    given = torch.rand(1, 1, 8, 8, generator=seeded(0)[0])
    none = pipeline.null_class
    assert torch.equal(*(images(pipeline, (0,), label, image=given) for label in (None, none)))
    assert torch.equal(*(
        pipeline.denoise(given, generator=seeded(1), class_labels=label, output_type="pt").images
        for label in (None, none)
    ))  # fmt: skip
    pipeline.unet.forward = None  # any network call would fail differently
    with pytest.raises(ValueError, match=r"give class_labels, of 3 classes, such as \['cat', 'cow', 'dog'\]"):
        pipeline(1, 4, image=given, guidance_scale=2.0)
    with pytest.raises(ValueError, match="give class_labels, of 3 classes"):
        pipeline.encode(given, 4)


def test_calibration_of_a_class_and_of_all(monkeypatch):
    pipeline = conditional("ncsnv2")
    seen = []
    pipeline.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    options = {"calls": (4,), "effort": "fast", "progress": False, "stochasticity": 0.0}
    everything = calibrate(pipeline, **options)
    assert sorted(set(seen[0])) == [0, 1, 2]
    assert len(seen[0]) == 64
    seen.clear()
    calibrate(pipeline, **options, class_labels="dog", guidance_scale=3.0)
    assert seen[0] == [3] * 64 + [2] * 64
    seen.clear()
    calibrate(pipeline, **options, class_labels=["dog", "cat"])
    assert seen[0] == [2, 0] * 32
    seen.clear()
    calibrate(pipeline, **options, class_labels=[1, 2], batch_size=2)
    assert seen[0] == [1, 2]
    pipeline.scheduler = everything
    assert images(pipeline, (0,), "dog", steps=4).isfinite().all()


def test_calibration_from_an_image(tiny_unet):
    """Fewer steps of the pipeline, and pixels put back: each call is still at the level that was asked for."""
    pipeline = NCSNv2Pipeline(tiny_unet, AnnealedLangevinScheduler())
    mask = torch.ones(1, 1, 8, 8)
    mask[..., :4] = 0
    scheduler = calibrate(
        pipeline, (4,), effort="fast", progress=False, image=torch.rand(1, 8, 8, generator=seeded(0)[0]),
        mask_image=mask, strength=0.5,
    )  # fmt: skip
    assert len(scheduler.config.calibration["4"]) == 4


def test_the_adaptive_solver_takes_classes():
    pipeline = conditional("cld")
    solver = {"ode_solver": "dopri5", "rtol": 1e-2, "atol": 1e-2}
    solved = [images(pipeline, (0, 1), [0, 2], None, **solver, **options)
              for options in ({}, {"guidance_scale": 1.0}, {"guidance_scale": 2.0})]  # fmt: skip
    assert torch.equal(solved[0], solved[1])
    assert not torch.equal(solved[0], solved[2])
    with pytest.raises(ValueError, match=r"image does not go with ode_solver='dopri5'"):
        pipeline(1, class_labels=0, ode_solver="dopri5", image=torch.zeros(1, 1, 8, 8))
    generators = seeded(0, 1)
    labels = pipeline.draw_labels(2, generators)
    told = pipeline(2, generator=generators, class_labels=labels, output_type="pt", **solver).images
    assert torch.equal(images(pipeline, (0, 1), None, None, **solver), told)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": 4}, r"class_labels \[4\] are out of range: this network has the classes 0 to 3"),
        ({"class_labels": [0, -1]}, r"class_labels \[-1\] are out of range"),
        ({"class_labels": "dgo"}, r"class_labels 'dgo' is no class of this model; the nearest are \['dog'"),
        ({"class_labels": [0, 1, 2]}, "class_labels must be one or 2, one for each image"),
        ({"class_labels": 1.5}, "must be indices or names of classes, got 1.5"),
        ({"class_labels": torch.tensor([0.0, 1.0])}, "must be indices or names of classes, got 0.0"),
        ({"guidance_scale": -1}, "guidance_scale must be a number of at least 0, got -1"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number of at least 0, got nan"),
        ({"guidance_interval": (3, 1)}, r"guidance_interval must be two noise levels .* got \(3, 1\)"),
    ],
)  # fmt: skip
def test_bad_classes_are_refused_before_the_first_network_call(pipeline, arguments, message):
    pipeline.unet.forward = None  # any network call would fail differently
    with pytest.raises(ValueError, match=message):
        pipeline(2, 4, **{"class_labels": 0} | arguments)


def test_a_label_that_is_none_is_named_without_a_batch_size(pipeline):
    with pytest.raises(ValueError, match=r"must be indices or names of classes, got 1\.5"):
        pipeline(class_labels=1.5)


@pytest.mark.parametrize(
    "arguments",
    [{"guidance_scale": -1}, {"guidance_interval": (3, 1)}, {"strength": 2.0}, {"mask_image": torch.ones(1, 1, 8, 8)}],
    ids=str,
)
def test_a_refused_call_draws_no_class(pipeline, arguments):
    (generator,) = seeded(0)
    before = generator.get_state()
    with pytest.raises(ValueError):
        pipeline(1, 4, generator, **arguments)
    assert torch.equal(generator.get_state(), before)


def test_what_an_unconditional_network_does_not_have(tiny_unet):
    pipeline = GMSGMPipeline(tiny_unet, SCHEDULERS["gm-sgm"]())
    pipeline.unet.forward = None
    with pytest.raises(ValueError, match="class_labels=0: this network has no classes"):
        pipeline(class_labels=0)
    with pytest.raises(ValueError, match="guidance_scale=2 needs a class-conditional network"):
        pipeline(guidance_scale=2)
    with pytest.raises(ValueError, match="guidance_interval needs a class-conditional network"):
        pipeline(guidance_interval=(1, 2))
    with pytest.raises(ValueError, match="class_names for a network without classes"):
        GMSGMPipeline(tiny_unet, SCHEDULERS["gm-sgm"](), class_names=["a"])
    with pytest.raises(ValueError, match=r"class_embed_type 'timestep'"):
        GMSGMPipeline(tiny_network(class_embed_type="timestep"), SCHEDULERS["gm-sgm"]())(class_labels=0)


def test_a_network_all_of_whose_classes_have_names_cannot_be_guided():
    pipeline = GMSGMPipeline(tiny_network(num_class_embeds=3), SCHEDULERS["gm-sgm"](), class_names=NAMES)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.num_classes == 3
    assert images(pipeline, (0,), "dog").isfinite().all()
    with pytest.raises(ValueError, match="guidance_scale=2 needs a class that stands for none"):
        pipeline(class_labels="dog", guidance_scale=2)


def test_a_class_that_has_a_share_like_all_stands_for_none_neither():
    shares = [0.1, 0.2, 0.2, 0.5]
    pipeline = GMSGMPipeline(tiny_network(num_class_embeds=4), SCHEDULERS["gm-sgm"](), class_shares=shares)
    assert (pipeline.num_classes, pipeline.null_class) == (4, None)
    assert pipeline.draw_labels(10, evenly=True) == [0] + [1] * 2 + [2] * 2 + [3] * 5
    for names in (["cat", "dog", "eel"], ["cat", "dog", "eel", "fox"]):
        other = shares if len(names) == 3 else shares[1:]
        with pytest.raises(ValueError, match=f"one for each of the {len(names)} class_names, got {len(other)}"):
            GMSGMPipeline(pipeline.unet, SCHEDULERS["gm-sgm"](), class_names=names, class_shares=other)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", "dog"], "class_names has 2 entries, but the network 4 classes: give 3"),
        (["cat", "dog", "cat"], r"class_names must differ, \['cat'\] do not"),
    ],
)
def test_names_that_do_not_suit_the_network(names, message):
    with pytest.raises(ValueError, match=message):
        GMSGMPipeline(tiny_network(num_class_embeds=4), SCHEDULERS["gm-sgm"](), class_names=names)
