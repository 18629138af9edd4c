"""The Hub: real HTTP on loopback with the real client, every push and every load in a fresh process of its own."""

import hashlib
import json
import re
import shlex
import shutil

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from hub_client import OTHER, TOKEN, Client
from hub_server import FakeHub
from huggingface_hub import ModelCard
from networks import tiny_network
from safetensors.torch import load_file

from diffusers_gm import (
    AnnealedLangevinScheduler,
    CLDPipeline,
    CLDSSCSScheduler,
    GMLangevinScheduler,
    GMSGMPipeline,
    NCSNv2Pipeline,
)
from diffusers_gm.pipelines.uploading import files_of


def new_unet(channels_in: int = 1) -> UNet2DModel:
    return tiny_network(channels_in)


def new_pipelines() -> dict:
    mixture = {"mixture_weights": [0.8, 0.2], "mixture_scales": [0.5, 2.0], "model_noise": "mixture"}
    return {
        "gm": GMSGMPipeline(new_unet(), GMLangevinScheduler(noise_space="ve", **mixture)),
        "ncsnv2": NCSNv2Pipeline(new_unet(), AnnealedLangevinScheduler(noise_space="ve", sigma_max=7.0)),
        "cld": CLDPipeline(new_unet(2), CLDSSCSScheduler(beta_0=5.0, prediction_type="cld_mixed")),
        "ddpm": DDPMPipeline(new_unet(), GMLangevinScheduler(**mixture)),
    }


CLASSES = {"gm": "GMSGMPipeline", "ncsnv2": "NCSNv2Pipeline", "cld": "CLDPipeline"}

PUSH = """
import sys, torch
from diffusers import DDPMPipeline
import diffusers_gm
from huggingface_hub import HfApi
for name, cls in {"gm": "GMSGMPipeline", "ncsnv2": "NCSNv2Pipeline", "cld": "CLDPipeline"}.items():
    pipe = getattr(diffusers_gm, cls).from_pretrained(f"{sys.argv[1]}/{name}")
    print(pipe.push_to_hub(f"me/{name}"))
    pipe.push_to_hub(f"me/{name}-private", private=True)
DDPMPipeline.from_pretrained(sys.argv[1] + "/ddpm").push_to_hub("me/ddpm")
gm = diffusers_gm.GMSGMPipeline.from_pretrained(sys.argv[1] + "/gm")
gm.unet.conv_in.bias.data += 1
HfApi().create_branch("me/gm", branch="next")
gm.push_to_hub("me/gm", commit_message="other weights")
gm.to(torch.float16).push_to_hub("me/gm", variant="fp16")
P = diffusers_gm.GMSGMPipeline
plain, documented = sys.argv[1] + "/gm", sys.argv[1] + "/documented"
P.from_pretrained(plain).push_to_hub("me/kept")
P.from_pretrained(plain).save_pretrained(sys.argv[1] + "/saved", push_to_hub=True, repo_id="me/saved")
P.from_pretrained(documented).push_to_hub("me/replaced")
P.from_pretrained(documented).save_pretrained(documented, push_to_hub=True, repo_id="me/documented")
"""

CARD = b"---\nlicense: mit\nlibrary_name: diffusers_gm\ntags: [mine]\n---\nYears of work.\n"
BETTER_CARD = CARD.replace(b"Years", b"Decades")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for name, pipeline in new_pipelines().items():
        pipeline.save_pretrained(folder / name)
    shutil.copytree(folder / "gm", folder / "documented")
    (folder / "documented/README.md").write_bytes(BETTER_CARD)
    return folder


@pytest.fixture(scope="module")
def server(folders, tmp_path_factory):
    """A Hub to which a first process has pushed: pipelines, private too, a branch with other weights, a variant."""
    with FakeHub({TOKEN: "me", OTHER: "other"}) as running:
        for name in ("kept", "saved", "replaced"):
            running.add(f"me/{name}", {"README.md": CARD})
        done = Client(running, tmp_path_factory.mktemp("pusher"), TOKEN).run(PUSH, folders)
        assert f"{running.url}/me/gm" in done.stdout
        assert "model.safetensors" in done.stderr, "uploads show their progress"
        yield running


@pytest.fixture
def client(server, tmp_path):
    return Client(server, tmp_path / "home")


# --- Folders ---


def test_what_a_saved_pipeline_says_of_its_classes(folders):
    index = json.loads((folders / "gm/model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "GMSGMPipeline"]
    assert index["scheduler"] == ["diffusers_gm", "GMLangevinScheduler"]
    assert json.loads((folders / "ddpm/model_index.json").read_text())["scheduler"] == index["scheduler"]
    assert {path.name for path in (folders / "ddpm").rglob("*.py")} == set(), "diffusers' own pipeline, its own format"


def test_pipelines_of_other_classes_get_no_code(tmp_path):
    class MyPipeline(GMSGMPipeline):
        pass

    MyPipeline(**new_pipelines()["gm"].components).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "MyPipeline"
    assert not list(tmp_path.rglob("*.py"))
    assert isinstance(MyPipeline.from_pretrained(tmp_path), MyPipeline)


def test_saved_twice_is_saved_the_same(folders, tmp_path):
    """Where it was loaded from is not written either: it would tell everybody a path of this host."""
    GMSGMPipeline.from_pretrained(folders / "gm").save_pretrained(tmp_path)
    for path in (folders / "gm").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / path.relative_to(folders / "gm")).read_bytes(), path


def test_folders_that_name_source_files_still_load(folders, tmp_path):
    """So did pipelines of before, and so does whatever was saved while only diffusers was imported."""
    shutil.copytree(folders / "gm", tmp_path / "old", ignore=shutil.ignore_patterns("*.py"))
    index = json.loads((tmp_path / "old/model_index.json").read_text())
    index["_class_name"] = "GMSGMPipeline"
    index["scheduler"][0] = "diffusers_gm.schedulers.scheduling_gm_langevin"
    (tmp_path / "old/model_index.json").write_text(json.dumps(index))
    assert isinstance(GMSGMPipeline.from_pretrained(tmp_path / "old").scheduler, GMLangevinScheduler)


def test_a_model_of_a_newer_version_says_so(folders, tmp_path):
    shutil.copytree(folders / "gm", tmp_path / "new")
    index = (tmp_path / "new/model_index.json").read_text().replace("GMLangevinScheduler", "TomorrowScheduler")
    (tmp_path / "new/model_index.json").write_text(index)
    with pytest.raises(ValueError, match="has no TomorrowScheduler: the model needs a newer version"):
        GMSGMPipeline.from_pretrained(tmp_path / "new")


# --- Push ---


def test_what_is_on_the_hub_after_a_push(server):
    files = server.repos["me/gm"].files
    assert set(files) == {
        *("README.md", "model_index.json", "pipeline.py", "unet/config.json", "scheduler/scheduler_config.json"),
        *("scheduler/diffusers_gm.py", "unet/diffusion_pytorch_model.safetensors"),
        "unet/diffusion_pytorch_model.fp16.safetensors",
    }
    assert server.repos["me/gm-private"].private
    assert not server.repos["me/gm"].private
    assert server.paths("PUT", "/lfs/me/gm"), "weights go the way of large files"
    assert len(server.repos["me/gm"].commits) == 4, "none, and one per push: what is found there is whole"
    for data in [*server.lfs.values(), *(data for repo in server.repos.values() for data in repo.files.values())]:
        assert TOKEN.encode() not in data


def test_cards_on_the_hub_are_never_replaced_by_less(server, folders):
    card = ModelCard(server.repos["me/gm"].files["README.md"].decode())
    assert card.data.library_name == "diffusers_gm"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert 'GMSGMPipeline.from_pretrained("me/gm")' in card.text, (
        "a pipeline of which nothing is known gets a short card"
    )

    for name, expected in {"kept": CARD, "saved": CARD, "replaced": BETTER_CARD, "documented": BETTER_CARD}.items():
        files = server.repos[f"me/{name}"].files
        assert files["README.md"] == expected, name
        assert "model_index.json" in files, name
    assert (folders / "documented/README.md").read_bytes() == BETTER_CARD


# --- Load ---

LOAD = """
import sys, numpy, torch
import diffusers, diffusers_gm
out, token = sys.argv[1], sys.argv[2]
def draw(pipe, name):
    images = pipe(2, generator=torch.Generator().manual_seed(5), num_inference_steps=10, output_type="np").images
    numpy.save(f"{out}/{name}.npy", images)
for name, cls in {"gm": "GMSGMPipeline", "ncsnv2": "NCSNv2Pipeline", "cld": "CLDPipeline"}.items():
    cls = getattr(diffusers_gm, cls)
    draw(cls.from_pretrained(f"me/{name}", revision="next" if name == "gm" else None), name)
    draw(cls.from_pretrained(f"me/{name}-private", token=token, cache_dir=out + "/elsewhere"), f"{name}-private")
    try:
        cls.from_pretrained(f"me/{name}-private")
        print("LEAK")
    except OSError as error:
        print("REFUSED", type(error).__name__)
draw(diffusers.DDPMPipeline.from_pretrained("me/ddpm"), "ddpm")
scheduler = diffusers_gm.CLDSSCSScheduler.from_pretrained("me/cld", subfolder="scheduler")
print("BETA", scheduler.config.beta_0)

def no_more(self, address):
    raise AssertionError("local_files_only asks nobody")
socket.socket.connect = no_more
GM = diffusers_gm.GMSGMPipeline
draw(GM.from_pretrained("me/gm", revision="next", local_files_only=True), "gm-cached")
draw(GM.from_pretrained("me/gm-private", local_files_only=True, cache_dir=out + "/elsewhere"), "gm-cached-elsewhere")
for name in ("me/never-seen", "me/gm"):  # the latter was seen at another revision
    try:
        GM.from_pretrained(name, local_files_only=True)
        print("FOUND", name)
    except OSError as error:
        print("NOT CACHED", type(error).__name__)
"""


def test_a_fresh_process_with_another_cache_loads_the_same_models(server, client, folders, tmp_path):
    """By name, branch, token and cache folder; without trust_remote_code, and no code comes along."""
    import numpy as np

    done = client.run(LOAD, tmp_path, TOKEN)
    assert "LEAK" not in done.stdout
    assert done.stdout.count("REFUSED RepositoryNotFoundError") == 3
    assert "BETA 5.0" in done.stdout
    assert not list(tmp_path.rglob("*.py")), "no code is downloaded"
    for name, cls in {"gm": GMSGMPipeline, "ncsnv2": NCSNv2Pipeline, "cld": CLDPipeline, "ddpm": DDPMPipeline}.items():
        pipe = cls.from_pretrained(folders / name)
        options = {"generator": torch.Generator().manual_seed(5), "num_inference_steps": 10, "output_type": "np"}
        expected = pipe(2, **options).images
        for saved in tmp_path.glob(f"{name}*.npy"):
            assert (np.load(saved) == expected).all(), saved.stem
    assert len(list(tmp_path.glob("*.npy"))) == 9
    assert done.stdout.count("NOT CACHED") == 2
    assert not list((tmp_path / "home").rglob("models--me--gm-private/**/*.safetensors")), "cache_dir is where it goes"
    assert not list(tmp_path.rglob("*.fp16.safetensors")), "a variant that was not asked for"


VARIANT = """
import sys, torch
from diffusers_gm import GMSGMPipeline
from diffusers_gm import GMLangevinScheduler
half = GMSGMPipeline.from_pretrained("me/gm", variant="fp16", torch_dtype=torch.float16)
print("DTYPE", half.unet.dtype, float(half.unet.conv_in.bias.sum()))
given = GMSGMPipeline.from_pretrained("me/ncsnv2", unet=half.unet)
print("GIVEN", given.unet is half.unet, type(given.scheduler).__name__)
for name, options in {
    "me/ncsnv2": {"variant": "fp16"}, "me/gm": {"revision": "no-such"}, "me/nothing": {}, "me/empty": {},
}.items():
    try:
        GMSGMPipeline.from_pretrained(name, **options)
        print("FOUND", name)
    except (OSError, ValueError) as error:
        print("ERROR", name, type(error).__name__, error)
"""


LOAD_FAULTS = """
print("LOADED", GMSGMPipeline.from_pretrained("me/hiccup").scheduler.config.mixture_scales)
for name in ("short", "broken", "forbidden"):
    try:
        GMSGMPipeline.from_pretrained("me/" + name)
        print("FOUND", name)
    except OSError as error:
        print("ERROR", name, type(error).__name__, error)
print("LOADED", GMSGMPipeline.from_pretrained("me/short").scheduler.config.mixture_scales)
"""


@pytest.fixture(scope="module")
def odd_loads(server, tmp_path_factory):
    """What a second process says that loads what is special, broken or not there, and its home."""
    weights, gm = "unet/diffusion_pytorch_model.safetensors", server.repos["me/gm"]
    server.add("me/empty", {"README.md": b""})
    server.add("me/hiccup", gm.files)
    server.add("me/short", gm.commits[gm.branches["next"]])
    for name in ("broken", "forbidden"):
        server.add(f"me/{name}", gm.files)
    oids = {name: hashlib.sha256(server.repos[f"me/{name}"].files[weights]).hexdigest() for name in ("hiccup", "short")}
    server.fail("GET", "/me/hiccup/resolve/.*scheduler_config.json", kind="truncate", times=1)
    server.fail("GET", f"/cdn/{oids['hiccup']}", kind="truncate", times=1)
    server.fail("GET", f"/cdn/{oids['short']}", kind="short", times=1)
    server.fail("GET", "/api/models/me/broken", status=500)
    server.fail("GET", "/api/models/me/forbidden", status=403)
    before = len(server.requests)
    home = tmp_path_factory.mktemp("odd")
    done = Client(server, home).run(VARIANT + LOAD_FAULTS)
    weights_asked = [r.path for r in server.requests[before:] if r.path == f"/cdn/{oids['hiccup']}"]
    return done.stdout, home, len(weights_asked)


def test_variants_parts_and_what_is_not_there(odd_loads, folders):
    said, home, _ = odd_loads
    bias = load_file(folders / "gm/unet/diffusion_pytorch_model.safetensors")["conv_in.bias"]
    dtype, total = re.search(r"DTYPE (\S+) (\S+)", said).groups()
    assert dtype == "torch.float16"
    assert float(total) == pytest.approx(float((bias + 1).sum()), abs=0.05), "main has the second weights"
    assert "GIVEN True AnnealedLangevinScheduler" in said
    cached = [path.name for name in ("gm", "ncsnv2") for path in home.rglob(f"models--me--{name}/**/*.safetensors")]
    assert cached == ["diffusion_pytorch_model.fp16.safetensors"], "what is passed is not downloaded, nor full weights"
    for pattern in (
        r"ERROR me/ncsnv2 ValueError .*variant=fp16",
        r"ERROR me/gm RevisionNotFoundError .*Revision Not Found",
        r"ERROR me/nothing RepositoryNotFoundError .*Repository Not Found",
        r"ERROR me/empty OSError me/empty holds no pipeline: there is no model_index.json",
    ):
        assert re.search(pattern, said, re.DOTALL), pattern
    assert "FOUND me" not in said


GENERIC = """
import sys
from diffusers import DDPMPipeline, DiffusionPipeline
sys.modules["diffusers_gm"] = None  # as where it is not installed
try:
    DiffusionPipeline.from_pretrained("me/gm", trust_remote_code=True)
except ImportError as error:
    print("MISSING", error)
del sys.modules["diffusers_gm"]
for options in ({"custom_pipeline": "me/gm"}, {}, {"custom_pipeline": "pipeline", "revision": "next"}):
    pipe = DiffusionPipeline.from_pretrained("me/gm", trust_remote_code=True, **options)
    print("LOADED", type(pipe).__module__, type(pipe).__name__, type(pipe.scheduler).__module__)
pipe = DiffusionPipeline.from_pretrained("me/ncsnv2", trust_remote_code=True)
print("LOADED", type(pipe).__module__, type(pipe).__name__, type(pipe.scheduler).__module__)
print("LOADED", type(DiffusionPipeline.from_pretrained("me/ddpm")).__name__)
import diffusers_gm
diffusers_gm.GMSGMPipeline.from_pretrained("me/gm")  # with the code in the cache, and none of it run
try:
    DiffusionPipeline.from_pretrained("me/gm")
except ValueError as error:
    print("NO TRUST", error)
"""


def test_the_generic_class_finds_the_pipeline_if_its_code_is_trusted(client):
    done = client.run(GENERIC)
    gm = "diffusers_gm.pipelines.pipeline_gm_sgm GMSGMPipeline diffusers_gm.schedulers.scheduling_gm_langevin"
    assert done.stdout.count(f"LOADED {gm}") == 3
    assert re.search(r"LOADED diffusers_gm\S+ NCSNv2Pipeline diffusers_gm\S+annealed_langevin", done.stdout)
    assert "LOADED DDPMPipeline" in done.stdout
    assert re.search(r"NO TRUST .*trust_remote_code=True", done.stdout, re.DOTALL)
    assert re.search(
        r"^MISSING this model needs the Python package diffusers_gm, version \S+ or newer: "
        r"install it, then load the model again$",
        done.stdout,
        re.MULTILINE,
    )


# --- Failures ---

FAULTS = {
    "unauthorized": (("POST", "/me/unauthorized/commit"), {"status": 401}, "the Hub does not know you: log in"),
    "forbidden": (("POST", "/me/forbidden/commit"), {"status": 403}, "your token may not write to this repository"),
    "gone": (("POST", "/me/gone/preupload"), {"status": 404}, "there is no such user, organisation or repository"),
    "conflict": (("POST", "/me/conflict/commit"), {"status": 409}, "somebody else is changing the repository"),
    "broken": (("POST", "/me/broken/commit"), {"status": 500}, "the Hub has a problem, try again later (HTTP 500)"),
    "dropped": (("POST", "/me/dropped/commit"), {"kind": "drop"}, "no connection to the Hub"),
}

PUSH_FAULTS = """
import sys, shutil
from pathlib import Path
from diffusers_gm.hub import push
for name in sys.argv[2:]:
    try:
        print("PUSHED", name, push.push_to_hub(Path(sys.argv[1]), "me/" + name))
    except Exception as error:
        print(f"FAILED {name}:", push.failure(error, Path(sys.argv[1]), "me/" + name), f":END {name}")
for repo_id, private in (("me/public", True), ("other/name", False)):
    try:
        print("PUSHED", repo_id, push.push_to_hub(Path(sys.argv[1]), repo_id, private))
    except Exception as error:
        print(f"FAILED {repo_id}: {push.explain(error)}")
"""


def test_failed_uploads_say_why_and_how_to_go_on(empty_server, folders, tmp_path):
    server = empty_server
    server.add("me/public", {})
    for (method, pattern), fault, _ in FAULTS.values():
        server.fail(method, pattern, **{"times": 1} | fault)
    server.fail("PUT", "/lfs/me/hiccup", status=500, times=1)
    server.fail("PUT", "/lfs/me/hiccup", kind="drop", times=1)
    shutil.copytree(folders / "gm", tmp_path / "my model")
    client = Client(server, tmp_path / "home", TOKEN)
    done = client.run(PUSH_FAULTS, tmp_path / "my model", "hiccup", *FAULTS)
    assert "PUSHED hiccup" in done.stdout, "what passes by itself is tried again"
    assert "PUSHED me/public" not in done.stdout
    assert "FAILED me/public: me/public exists and is public" in done.stdout
    assert "FAILED other/name: your token may not write to this repository" in done.stdout
    assert "other/name" not in server.repos
    for name, (_, _, said) in FAULTS.items():
        message = re.search(rf"^FAILED {name}: (.*) :END {name}$", done.stdout, re.MULTILINE | re.DOTALL).group(1)
        assert said in message, name
        first, complete, command = message.splitlines()
        assert first.startswith("the upload failed: ")
        assert complete == f"The model is complete in {tmp_path / 'my model'}. To upload it:"
        assert "model_index.json" not in server.repos[f"me/{name}"].files, "whole, or nothing"
        assert shlex.split(command) == ["python", "-m", "diffusers_gm.hub", str(tmp_path / "my model"), f"me/{name}"]
        assert TOKEN not in message


def test_broken_downloads_resume_or_fail_and_leave_nothing_half(odd_loads):
    said, home, times_asked = odd_loads
    assert said.count("LOADED [0.5, 2.0]") == 2, "the rest of a file is asked for, or all of it the next time"
    assert times_asked == 2
    assert "FOUND" not in said
    assert re.search(r"ERROR short OSError .*Consistency check failed", said)
    assert re.search(r"ERROR broken LocalEntryNotFoundError .*500", said)
    assert re.search(r"ERROR forbidden LocalEntryNotFoundError .*403", said)
    for path in home.rglob("*.safetensors"):
        load_file(path)
    assert not list(home.rglob("*.incomplete"))


def test_all_components_of_a_pipeline_are_uploaded_and_nothing_else(folders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders / "ddpm", folder)
    index = json.loads((folder / "model_index.json").read_text()) | {"vqvae": ["diffusers", "VQModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    for name in ("vqvae/config.json", "checkpoint-1/unet/config.json", "logs/events", "samples.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    names = {path.relative_to(folders / "ddpm").as_posix() for path in (folders / "ddpm").rglob("*") if path.is_file()}
    assert set(files_of(folder)) == names | {"vqvae/config.json", "samples.png"}
