"""The Hub: from a training to somebody else's computer, and what a push replaces."""

import json
import re
import shlex
import sys
from pathlib import Path

from hub_client import TOKEN, Client
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_gm.evaluation.card import add_quality
from diffusers_gm.pipelines.measurements import forget_quality
from diffusers_gm.pipelines.uploading import weights_before

ROOT = Path(__file__).parents[1]


QUALITY = {
    "floor": 0.02,
    "n": 256,
    "digits": [
        {"sampler": "ode", "calls": 10, "distance": 0.05, "ratio": 2.5, "seconds": 1.0, "reason": ""},
        {"sampler": "ode", "calls": 50, "distance": 0.03, "ratio": 1.4567, "seconds": 1.0, "reason": ""},
        {"sampler": "langevin", "calls": 10, "distance": None, "ratio": None, "seconds": 0.0, "reason": "no step"},
    ],
}


TRAIN = (
    "--max_train_steps 4 --checkpointing_steps 2 --validation_steps 0 --block_out_channels 8 16 --train_batch_size 16 "
    "--validation_inference_steps 4 --num_validation_images 4 --push_to_hub --hub_model_id me/digits "
    f"--hub_private_repo --hub_strategy every_save --hub_token {TOKEN}"
)


def test_from_a_training_to_the_snippet_on_another_computer(empty_server, tmp_path):
    """The upload at the first checkpoint passes, the last one fails, its command repeats it, the card tells all."""
    server, folder = empty_server, tmp_path / "digits"
    trainer = Client(server, tmp_path / "trainer")
    words = [sys.executable, str(ROOT / "train_gm_sgm.py"), *TRAIN.split(), "--output_dir", str(folder)]
    server.fail("POST", "/me/digits/commit", status=500, after=1, times=1)
    done = trainer.command(words, check=False, ACCELERATE_USE_CPU="true")
    assert done.returncode == 1, done.stderr[-3000:]
    assert f"uploaded to {server.url}/me/digits" in done.stdout
    first, complete, command = done.stderr.strip().splitlines()[-3:]
    assert first == "the upload failed: the Hub has a problem, try again later (HTTP 500)"
    assert complete == f"The model is complete in {folder}. To upload it:"
    assert TOKEN not in done.stdout + done.stderr
    repo = server.repos["me/digits"]
    assert repo.private
    assert "after 2 steps" in " ".join(repo.files["README.md"].decode().split())
    final = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}

    (folder / "quality.json").write_text(json.dumps(QUALITY))
    Client(server, tmp_path / "again", TOKEN).command([sys.executable, *shlex.split(command)[1:]])
    assert set(repo.files) == {
        *("README.md", "model_index.json", "pipeline.py", "samples.png", "training_args.json", "quality.json"),
        *("unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
        *("scheduler/scheduler_config.json", "scheduler/diffusers_gm.py"),
    }, "neither checkpoints nor logs"
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert repo.files[weights] == final[weights].read_bytes()
    for name, data in repo.files.items():
        assert TOKEN.encode() not in data, name
        assert str(tmp_path).encode() not in data, name

    card = ModelCard(repo.files["README.md"].decode())
    assert "after 4 steps" in " ".join(card.text.split())
    assert "| ode | 2.50 | 1.46 |" in card.text
    assert "| up to 4 |" in card.text, "the loss curve"
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results["sliced W2 over the floor of held-out images, ode, 50 network calls"] == 1.457
    assert len(results) == 2

    snippet = re.search(r"```python\n(.*?)```", card.text, re.DOTALL).group(1)
    assert 'GMSGMPipeline.from_pretrained("me/digits")' in snippet
    (tmp_path / "elsewhere").mkdir()
    Client(server, tmp_path / "home", TOKEN).run(
        f"import os, sys; os.chdir(sys.argv[1])\n{snippet}", tmp_path / "elsewhere"
    )
    assert Image.open(tmp_path / "elsewhere/grid.png").size == (132, 132), "2 x 2 images, enlarged, a gap of 4"


def test_only_weights_that_are_replaced_are_stale():
    there = [
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin", "unet/config.json",
        "vae/diffusion_pytorch_model.bin", "mine.safetensors",
    ]  # fmt: skip
    whole = "unet/diffusion_pytorch_model.safetensors"
    assert weights_before(there, [whole, "README.md"]) == there[:4]
    assert weights_before([whole, *there], there) == [whole]
    parts = ["unet/diffusion_pytorch_model.fp16-00001-of-00002.bin", "unet/diffusion_pytorch_model.bin.index.fp16.json"]
    assert weights_before([*parts, "unet/other.fp16.bin"], [whole]) == parts
    assert weights_before(there, ["unet/diffusion_pytorch_model.fp16.safetensors"]) == [], "a variant beside"


def test_measurements_replace_those_of_before_and_nothing_else(tmp_path):
    text = "---\nlicense: mit\ntags: [mine]\n---\nMine.\n<!-- quality -->\nOld.\n<!-- end of quality -->\nAlso mine.\n"
    (tmp_path / "README.md").write_text(text)
    add_quality(tmp_path)
    assert (tmp_path / "README.md").read_text() == text, "nothing was measured"
    (tmp_path / "quality.json").write_text(json.dumps(QUALITY))
    add_quality(tmp_path)
    once = (tmp_path / "README.md").read_text()
    add_quality(tmp_path)
    assert (tmp_path / "README.md").read_text() == once
    card = ModelCard(once)
    assert card.data.license == "mit"
    assert card.text.startswith("Mine.\n<!-- quality -->\nSliced")
    assert card.text.endswith("<!-- end of quality -->\nAlso mine.\n")
    assert "Old." not in card.text
    forget_quality(tmp_path)
    assert not (tmp_path / "quality.json").exists()
