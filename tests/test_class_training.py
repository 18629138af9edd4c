"""Class-conditional training, from labels in the data to a model that draws what it is asked for."""

import json
import shutil

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from images import corrupt, save_images, save_parquet
from networks import KINDS, written
from PIL import Image
from training import SHORT, SMALL, TINY, WEIGHTS, launch, load, same_state

from diffusers_gm import CLDPipeline, GMSGMPipeline, NCSNv2Pipeline, data
from diffusers_gm.data import LabelledImages
from diffusers_gm.evaluation.sampling import load_pipeline, sample
from diffusers_gm.training.folder import read_log
from diffusers_gm.training.options import TrainingArguments

PIPELINES = {"gm-sgm": GMSGMPipeline, "ncsnv2": NCSNv2Pipeline, "cld": CLDPipeline}


def save_classes(folder, **counts):
    for name, count in counts.items():
        save_images(folder / name, count)
    return folder


def source_of(folder, **options):
    return data.open_source(None, train_data_dir=str(folder), cache_dir=str(folder.parent / "cache"), **options)


# --- Labels ---


def test_digits_are_what_they_are():
    labels = data.open_source("digits").labels()
    assert labels.names == [str(digit) for digit in range(10)]
    assert len(labels.of_images) == 1437
    images, ones = data.split_digits()[0], torch.tensor(labels.of_images) == 1
    zeros = torch.tensor(labels.of_images) == 0
    middle = images[:, 0, 3:5, 3:5].mean((1, 2))
    assert middle[ones].mean() > 0.3 > -0.5 > middle[zeros].mean(), "a one has ink in the middle, a zero has none"


@pytest.mark.parametrize("above", ["", "train"])
def test_folders_are_classes(tmp_path, above):
    save_classes(tmp_path / "pets" / above, dog=3, cat=2)
    save_images(tmp_path / "pets" / above / "dog" / "small", 1)
    if above:
        save_classes(tmp_path / "pets" / "test", bird=2)
    labels = source_of(tmp_path / "pets").labels()
    assert labels == (["cat", "dog"], [0] * 2 + [1] * 4)
    assert labels.counts() == [2, 4]
    some = data.subset(source_of(tmp_path / "pets"), 5, seed=0)
    names, of_some = some.labels()
    assert names == ["cat", "dog"]
    assert all(f"/{names[label]}/" in some.name(index) for index, label in enumerate(of_some)), "of the chosen images"


@pytest.mark.parametrize(
    ("feature", "values", "expected"),
    [
        (datasets.ClassLabel(names=["cow", "cat"]), [1, 0, 1], (["cow", "cat"], [1, 0, 1])),
        (datasets.Value("int64"), [7, 3, 7], (["3", "7"], [1, 0, 1])),
        (datasets.Value("string"), ["b", "a", "b"], (["a", "b"], [1, 0, 1])),
    ],
    ids=["class label", "integers", "words"],
)
def test_columns_are_classes(tmp_path, feature, values, expected):
    images = [Image.open(path) for path in sorted(save_images(tmp_path / "png", 3).iterdir())]
    features = datasets.Features({"image": datasets.Image(), "kind": feature})
    table = datasets.Dataset.from_dict({"image": images, "kind": values}, features=features)
    (tmp_path / "table").mkdir()
    table.to_parquet(str(tmp_path / "table" / "a.parquet"))
    source = source_of(tmp_path / "table")
    assert source.labels("kind") == expected
    with pytest.raises(ValueError, match=r"no column is called 'label' or 'labels': set --label_column to one of"):
        source.labels()
    with pytest.raises(ValueError, match="--label_column 'sort' is not in the data"):
        source.labels("sort")
    with pytest.raises(ValueError, match="--label_column 'image' holds Image.*, not classes"):
        source.labels("image")


def test_rows_without_a_class_are_named(tmp_path):
    images = [Image.open(path) for path in sorted(save_images(tmp_path / "png", 3).iterdir())]
    names = datasets.ClassLabel(names=["a", "b"])
    for folder, labels, said in [
        ("missing", [0, -1, -1], "--label_column 'label': 2 rows have no class, row 1 first"),
        ("wrong", [0, 1, 2], "--label_column 'label': row 2 is of class 2, and there are 2, from 0 on"),
    ]:
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).data.table
        # `datasets` itself would not write the last one.
        named = datasets.Features(features | {"label": names}).arrow_schema.metadata
        (tmp_path / folder).mkdir()
        pq.write_table(table.replace_schema_metadata(named), tmp_path / folder / "a.parquet")
        with pytest.raises(ValueError, match=said):
            source_of(tmp_path / folder).labels()


def test_images_in_no_folder_are_named(tmp_path):
    save_classes(tmp_path / "pets", cat=2)
    save_images(tmp_path / "pets", 1)
    with pytest.raises(ValueError, match=r"--class_conditional: 000\.png is in no class folder"):
        source_of(tmp_path / "pets").labels()
    with pytest.raises(ValueError, match="--label_column 'label' .* the files of a folder have no columns"):
        source_of(tmp_path / "pets").labels("label")


def test_labels_are_dropped_in_proportion_and_the_same_again():
    images = data.TrainingImages(data.open_source("digits"), 8, 1, seed=3)
    labels = data.open_source("digits").labels().of_images
    keys = [(epoch, index) for epoch in range(3) for index in range(1437)]
    shown = [LabelledImages(images, labels, 10, 0.2, seed).__getitems__(keys) for seed in (3, 3, 4)]
    given = [[label for _, label in batch] for batch in shown]
    assert given[0] == given[1] != given[2]
    dropped = np.array(given[0]) == 10
    assert abs(dropped.mean() - 0.2) < 5 * (0.16 / len(keys)) ** 0.5
    per_epoch = dropped.reshape(3, -1)
    assert (per_epoch[0] != per_epoch[1]).any()
    kept = [label == labels[index] for label, (_, index) in zip(given[0], keys, strict=True) if label != 10]
    assert all(kept)
    assert torch.equal(shown[0][0][0], images[keys[0]])
    never = LabelledImages(images, labels, 10, 0.0, 3).__getitems__(keys)
    assert [label for _, label in never] == labels * 3


def test_the_label_is_that_of_the_image_shown(tmp_path):
    """In place of an image that cannot be read comes the next one, with its own class."""
    save_classes(tmp_path / "pets", cat=11, dog=2)
    corrupt(tmp_path / "pets" / "cat" / "010.png")
    source = source_of(tmp_path / "pets")
    labelled = LabelledImages(data.TrainingImages(source, 8, 1, 0), source.labels().of_images, 2, 0.0, 0)
    (image, label), (after, _) = labelled.__getitems__([(0, 10), (0, 11)])
    assert torch.equal(image, after)
    assert label == 1


# --- Trainings ---


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes") / "digits"
    options = f"{TINY} --class_conditional --num_validation_images 25 --max_train_steps 3 --calibrate fast"
    return folder, launch(options, "--output_dir", folder)


def test_a_training_on_digits(digits):
    folder, printed = digits
    assert "1437 images of 1x8x8 in 10 classes" in printed
    pipeline = GMSGMPipeline.from_pretrained(folder)
    assert pipeline.class_names == [str(digit) for digit in range(10)]
    assert pipeline.unet.config.num_class_embeds == 11
    assert Image.open(folder / "samples.png").size == (2 * 68 - 4, 10 * 68 - 4), "10 rows of 2 images"
    card = (folder / "README.md").read_text()
    assert "Class-conditional generation of 8x8 images" in card
    assert "its 10 classes: `0`, `1`, `2`" in card
    assert 'pipeline(class_labels=["0"] * 4, num_inference_steps=' in card
    assert "$" not in card.replace("$\\", "")
    record = json.loads((folder / "training_args.json").read_text())
    assert (record["class_conditional"], record["class_dropout"]) == (True, 0.1)


def test_evaluation_draws_all_classes(digits):
    folder, _ = digits
    pipeline = load_pipeline(str(folder), torch.device("cpu"))
    seen = []
    pipeline.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    whole, _ = sample(pipeline, pipeline.scheduler, 2, 40, seed=1, batch_size=40)
    labels = seen[0]
    assert set(labels) == set(range(10))
    seen.clear()
    halves, _ = sample(pipeline, pipeline.scheduler, 2, 40, seed=1, batch_size=20)
    assert seen[0] + seen[2] == labels
    torch.testing.assert_close(whole, halves)


@pytest.mark.parametrize("method", PIPELINES)
def test_every_method_learns_class_folders(train, tmp_path, method):
    folder = save_classes(tmp_path / "pets", dog=20, cat=10)
    options = f"{TINY} --method {method} --class_conditional --max_train_steps 3"
    train(options, "--train_data_dir", folder, "--output_dir", tmp_path / "out")
    pipeline = PIPELINES[method].from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.class_names == ["cat", "dog"]
    assert set(pipeline.draw_labels(30, torch.Generator().manual_seed(0))) == {0, 1}
    images = pipeline(2, 3, torch.Generator().manual_seed(0), class_labels=["cat", "dog"], guidance_scale=2.0).images
    assert len(images) == 2
    moved = load(tmp_path / "out" / WEIGHTS)["class_embedding.weight"]
    assert moved.shape[0] == 3


@pytest.mark.parametrize("kind", KINDS)
def test_other_networks_learn_classes(train, tmp_path, kind):
    folder = save_classes(tmp_path / "pets", dog=20, cat=10)
    classes = {"num_embeds_ada_norm": 2} if kind == "dit" else {"num_class_embeds": 3}
    config = written(KINDS[kind](**classes), tmp_path / "config")
    options = f"{SHORT} --model_config {config} --class_conditional --train_data_dir {folder}"
    train(options, "--output_dir", tmp_path / "out")
    pipeline = GMSGMPipeline.from_pretrained(tmp_path / "out")
    assert (pipeline.class_names, pipeline.num_classes, pipeline.null_class) == (["cat", "dog"], 2, 2)
    outputs = [pipeline._network(torch.ones(1, 1, 8, 8), torch.tensor(5.0), torch.tensor([i])) for i in range(3)]
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_classes_are_learned(train, tmp_path):
    """Black and white images by name: a network that is told the class draws that one, and without a class both."""
    for name, value in (("black", 0), ("white", 255)):
        (tmp_path / "tones" / name).mkdir(parents=True)
        for i in range(8):
            Image.new("L", (8, 8), value).save(tmp_path / "tones" / name / f"{i}.png")
    options = f"{TINY} --method ncsnv2 --sigma_max 8 --class_conditional --class_dropout 0.2 --learning_rate 2e-2"
    options += " --prediction_type sample --max_train_steps 100 --ema_decay 0.9"
    train(options, "--train_data_dir", tmp_path / "tones", "--output_dir", tmp_path / "out")
    pipeline = NCSNv2Pipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    labels = ["black"] * 16 + ["white"] * 16
    white = pipeline(32, 5, generator, class_labels=labels, output_type="pt").images.mean((1, 2, 3)) > 0.5
    assert int((~white[:16]).sum()) + int(white[16:].sum()) >= 27, "by chance, one time in seventeen thousand"
    white = pipeline(32, 5, generator, class_labels=pipeline.null_class, output_type="pt").images.mean((1, 2, 3)) > 0.5
    assert 4 <= int(white.sum()) <= 28


def test_resumed_equals_uninterrupted(train, tmp_path):
    options = f"{SMALL} --class_conditional --random_flip --validation_steps 0 --max_train_steps 4 --logging_steps 1"
    train(options, "--checkpointing_steps 2 --output_dir", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    train(options, "--resume_from_checkpoint latest --output_dir", tmp_path / "part")
    assert same_state(load(tmp_path / "whole" / WEIGHTS), load(tmp_path / "part" / WEIGHTS))
    # Split otherwise, a step has the same labels, dropped alike.
    halves = options.replace("--train_batch_size 16", "--train_batch_size 8 --gradient_accumulation_steps 2")
    train(halves, "--checkpointing_steps 0 --output_dir", tmp_path / "halves")
    losses = [[entry["loss"] for entry in read_log(tmp_path / name)] for name in ("whole", "halves")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_classes_may_not_change_on_resume(train, tmp_path):
    folder = save_classes(tmp_path / "pets", dog=12, cat=6)
    options = f"{SMALL} --class_conditional --validation_steps 0 --max_train_steps 2 --checkpointing_steps 2"
    out = ("--train_data_dir", folder, "--output_dir", tmp_path / "out")
    train(options, *out)
    resume = "--resume_from_checkpoint latest"
    with pytest.raises(ValueError, match="--class_conditional was True and is False"):
        train(options.replace("--class_conditional", ""), *out, resume)
    with pytest.raises(ValueError, match="--class_dropout was 0.1 and is 0.5"):
        train(options, *out, resume, "--class_dropout 0.5")
    (folder / "cat").rename(folder / "cow")
    with pytest.raises(ValueError, match="other classes: the first that differs was 'cat' with 6 images and is 'cow'"):
        train(options, *out, resume)
    (folder / "cow").rename(folder / "cat")
    (folder / "dog" / "000.png").rename(folder / "cat" / "100.png")
    with pytest.raises(ValueError, match="was 'cat' with 6 images and is 'cat' with 7 images"):
        train(options, *out, resume)


def test_a_checkpoint_from_before_classes_goes_on(train, tmp_path):
    """Options that a checkpoint does not know had their defaults."""
    options = f"{SMALL} --validation_steps 0 --max_train_steps 4"
    train(options, "--checkpointing_steps 2 --output_dir", tmp_path / "whole")
    path = tmp_path / "whole" / "checkpoint-2" / "training_state.json"
    content = json.loads(path.read_text())
    for name in ("class_conditional", "class_dropout", "label_column"):
        del content["arguments"][name]
    del content["data"]["classes"], content["seal"]
    from diffusers_gm.training import folder as training_folder

    path.write_text(json.dumps(content | {"seal": training_folder._seal(content)}))
    shutil.copytree(path.parent, tmp_path / "part" / "checkpoint-2")
    train(options, "--resume_from_checkpoint latest --output_dir", tmp_path / "part")
    assert same_state(load(tmp_path / "whole" / WEIGHTS), load(tmp_path / "part" / WEIGHTS))


def test_without_dropping_there_is_no_class_for_none(train, tmp_path):
    folder = save_classes(tmp_path / "pets", dog=12, cat=6)
    train(TINY, "--class_conditional --class_dropout 0 --train_data_dir", folder, "--output_dir", tmp_path / "out")
    pipeline = GMSGMPipeline.from_pretrained(tmp_path / "out")
    assert (pipeline.num_classes, pipeline.null_class, pipeline.unet.config.num_class_embeds) == (2, None, 2)


def test_fine_tuning_goes_on_with_the_same_classes(train, digits, tmp_path):
    folder, _ = digits
    options = f"--max_train_steps 1 --train_batch_size 16 --validation_inference_steps 2 --model_name_or_path {folder}"
    train(options, "--class_conditional --learning_rate 1e-9 --no_use_ema --output_dir", tmp_path / "out")
    before, after = (load(path / WEIGHTS) for path in (folder, tmp_path / "out"))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    refused = options + " --output_dir " + str(tmp_path / "refused")
    pets, ten = save_classes(tmp_path / "pets", dog=12, cat=6), {f"{i}": 2 for i in range(9)}
    renamed = shutil.copytree(folder, tmp_path / "renamed")
    index = json.loads((renamed / "model_index.json").read_text())
    index["class_names"] = [*map(str, range(10)), "ten"]
    (renamed / "model_index.json").write_text(json.dumps(index))
    for words, message in (
        (refused, r"needs a class for every image \(num_class_embeds = 11\).*add --class_conditional"),
        (
            f"{refused} --class_conditional --train_data_dir {pets}",
            "has 11 classes, and the data 2, and one that",
        ),
        (f"{refused} --class_conditional --class_dropout 0", "has 11 classes, and the data 10: it must have num_class"),
        (
            f"{refused} --class_conditional --train_data_dir {save_classes(tmp_path / 'ten', ten=2, **ten)}",
            "was trained on other classes, or in another order: the first that differs was '9' and is 'ten'",
        ),
        (
            # As many embeddings, but what was learned for a class would stand for none.
            refused.replace(str(folder), str(renamed)) + " --class_conditional",
            "the first that differs was 'ten' and is None",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(words)
    assert not (tmp_path / "refused").exists()


def test_what_cannot_be_conditional(train, digits, tmp_path):
    train(TINY, "--output_dir", tmp_path / "unconditional")
    images, table = save_images(tmp_path / "images"), save_parquet(tmp_path)[0]
    one = save_classes(tmp_path / "one", cat=3)
    for words, message in (
        (f"--model_name_or_path {tmp_path / 'unconditional'}", "is a network without num_class_embeds"),
        (f"--train_data_dir {images}", "is in no class folder"),
        (f"--train_data_dir {one}", "all images are of one class, 'cat'"),
        (f"--train_data_dir {table} --label_column kind", "--label_column 'kind' is not in the data"),
        ("--label_column kind", "'kind' is not in the data: these images have no columns"),
    ):
        with pytest.raises(ValueError, match=message):
            train("--class_conditional", words, "--output_dir", tmp_path / "refused")
    with pytest.raises(ValueError, match="--label_column kind means nothing without --class_conditional"):
        train("--label_column kind --output_dir", tmp_path / "refused")
    with pytest.raises(ValueError, match=r"--class_dropout must be in \[0, 1\), got 1"):
        TrainingArguments(class_conditional=True, class_dropout=1.0)
    assert not (tmp_path / "refused").exists()


def test_more_classes_than_images_in_a_grid(train, tmp_path):
    train(TINY, "--class_conditional --num_validation_images 6 --output_dir", tmp_path / "out")
    assert Image.open(tmp_path / "out" / "samples.png").size == (3 * 68 - 4, 2 * 68 - 4)
