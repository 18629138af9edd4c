"""Pushed again, elsewhere or over what was there: real HTTP on loopback, the pushes in fresh processes."""

import shutil
import sys

import pytest
from hub_client import TOKEN, Client

from diffusers_gm import GMLangevinScheduler, GMSGMPipeline
from diffusers_gm.pipelines.measurements import forget_quality
from diffusers_gm.pipelines.uploading import differ, files_of


@pytest.fixture
def saved(tiny_unet, tmp_path):
    """The folder of a pipeline."""
    mixture = {"mixture_weights": [0.8, 0.2], "mixture_scales": [0.5, 2.0], "model_noise": "mixture"}
    GMSGMPipeline(tiny_unet, GMLangevinScheduler(noise_space="ve", **mixture)).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


PUSH_FOLDERS = """
import sys
from pathlib import Path
from diffusers_gm.hub.push import push_to_hub
for folder, repo_id in zip(sys.argv[1::2], sys.argv[2::2]):
    push_to_hub(Path(folder), repo_id)
"""


def test_a_folder_can_be_pushed_to_two_repositories(empty_server, saved, tmp_path):
    """Each card names its own; that of the folder stays what it was."""
    of_others = 'Made from `GMSGMPipeline.from_pretrained("alice/base")`, by'
    card = f'---\nlicense: mit\n---\n{of_others}\npipe = GMSGMPipeline.from_pretrained(".")\n'
    card += "<!-- quality -->\nNot measured.\n<!-- end of quality -->\n"
    texts = {"here": card, "elsewhere": card.replace('"."', '"me/elsewhere"')}
    pushes = [(tmp_path / name, f"me/{repo}") for name in texts for repo in ("one", "two")]
    for name, text in texts.items():
        shutil.copytree(saved, tmp_path / name)
        (tmp_path / name / "README.md").write_text(text)
    Client(empty_server, tmp_path / "home", TOKEN).run(PUSH_FOLDERS, *(word for push in pushes for word in push))
    for folder, repo_id in pushes:
        cards = {files["README.md"].decode() for files in empty_server.repos[repo_id].commits.values() if files}
        assert cards == {card.replace('"."', f'"{repo_id}"')}
        assert (folder / "README.md").read_text() == texts[folder.name]


def test_no_weights_of_before_are_left_in_a_repository(empty_server, saved, tmp_path):
    """Where weights in parts lie beside whole ones, diffusers reads the parts."""
    pipeline = GMSGMPipeline.from_pretrained(saved)
    pipeline.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    pipeline.save_pretrained(tmp_path / "whole")
    parts = {name for name in files_of(tmp_path / "parts") if "-of-" in name or name.endswith(".index.json")}
    assert len(parts) > 2
    client = Client(empty_server, tmp_path / "home", TOKEN)
    done = client.run(PUSH_FOLDERS, tmp_path / "parts", "me/parts", tmp_path / "whole", "me/parts")
    assert all(name in done.stderr for name in parts), "said"
    assert any(parts <= files.keys() for files in empty_server.repos["me/parts"].commits.values()), "they were there"
    files = empty_server.repos["me/parts"].files
    assert parts.isdisjoint(files)
    assert "unet/diffusion_pytorch_model.safetensors" in files


def test_measurements_of_another_model_leave_the_repository_with_its_card(empty_server, saved, tmp_path):
    (saved / "README.md").write_text("---\nlicense: mit\n---\nYears of work.\n")
    push = [sys.executable, "-m", "diffusers_gm.hub", str(saved), "me/measured"]
    (saved / "quality.png").write_bytes(b"a picture")
    Client(empty_server, tmp_path / "home", TOKEN).command(push)
    assert "quality.png" in empty_server.repos["me/measured"].files
    forget_quality(saved)
    Client(empty_server, tmp_path / "home", TOKEN).command(push)
    files = empty_server.repos["me/measured"].files
    assert "quality.png" not in files
    assert "model_index.json" in files


def test_a_card_that_was_edited_in_the_repository_is_named_before_it_is_replaced(empty_server, saved, tmp_path):
    (saved / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    push = [sys.executable, "-m", "diffusers_gm.hub", str(saved), "me/edited"]
    client = Client(empty_server, tmp_path / "home", TOKEN)
    client.command(push)
    assert "README.md" not in client.command(push).stderr, "the same as before"
    repo = empty_server.repos["me/edited"]
    edited = repo.commit("main", {**repo.files, "README.md": b"---\nlicense: mit\n---\nEdited here.\n"})
    assert f"/me/edited/blob/{edited}/README.md" in client.command(push).stderr
    assert repo.files["README.md"].endswith(b"Mine.\n")
    assert repo.commits[edited]["README.md"].endswith(b"Edited here.\n")


@pytest.mark.parametrize("card", ["---\na: [1\n---\n", "---\nmodel-index:\n- results: []\n---\n", "---\n- a\n---\n"])
def test_cards_that_cannot_be_parsed_differ_from_others(card):
    assert differ(card, "---\nlicense: mit\n---\nMine.\n")
    assert not differ(card, card)


PUSH_AS_IT_IS = """
import os, sys
from pathlib import Path
from diffusers_gm import GMSGMPipeline
os.chdir(sys.argv[1])
loaded = GMSGMPipeline.from_pretrained(sys.argv[1])
made = GMSGMPipeline(loaded.unet, loaded.scheduler)
made.push_to_hub("me/made")
loaded.push_to_hub("me/loaded")
"""


def test_a_pipeline_takes_the_card_of_its_folder_along_and_no_other(empty_server, saved, tmp_path):
    """Not that of the current folder, if the pipeline was made and not loaded."""
    shutil.copytree(saved, tmp_path / "model")
    card = "---\nlicense: mit\n---\nof the folder\n"
    (tmp_path / "model/README.md").write_text(card)
    Client(empty_server, tmp_path / "home", TOKEN).run(PUSH_AS_IT_IS, tmp_path / "model")
    assert empty_server.repos["me/loaded"].files["README.md"].decode() == card
    made = empty_server.repos["me/made"].files["README.md"].decode()
    assert "of the folder" not in made
    assert "Nothing else is known of this model" in " ".join(made.split())
