"""inference/deploy_space.py against a Hub on loopback: pytest tests/test_deploy.py"""

import hashlib
import json
import re
import shutil
import socket
import subprocess
import sys

import pytest
from ranks import ROOT, environment
from space_stand_in import SpaceStandIn

from inference import deploy_space, model_loader

NAME = "some-one/news"
SENT = {
    "Dockerfile", "README.md", "inference/requirements.txt", "inference/app.py",
    "inference/batcher.py", "inference/model_loader.py", "inference/index.html",
    "checkpoints/distilbert_agnews.int8.onnx", "checkpoints/distilbert_agnews.int8.json",
    "checkpoints/tokenizer/tokenizer.json",
}  # fmt: skip


def digest(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def checkout(tmp_path):
    """The repository with a checkpoint and int8 files of no meaning, and its .gitignore."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "inference", folder / "inference",
                    ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
    for name in ("Dockerfile", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    checkpoints = folder / "checkpoints"
    (checkpoints / "tokenizer").mkdir(parents=True)
    (checkpoints / "tokenizer" / "tokenizer.json").write_text('{"model": {}}')
    (checkpoints / "distilbert_agnews.pt").write_bytes(b"weights")
    (checkpoints / "distilbert_agnews.int8.onnx").write_bytes(bytes(range(256)) * 100)
    facts = {
        "checkpoint_sha256": digest(b"weights"), "onnx_sha256": digest(bytes(range(256)) * 100),
        "labels": ["World", "Sports", "Business", "Sci/Tech"], "max_length": 128,
        "info": {"backbone": "distilbert-base-uncased", "data": "fancyzhx/ag_news",
                 "test_accuracy": 0.94321, "checkpoint": "0123456789ab"},
    }  # fmt: skip
    (checkpoints / "distilbert_agnews.int8.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture
def hub(tmp_path):
    with SpaceStandIn(tmp_path / "hub") as hub:
        yield hub


def deploy(checkout, endpoint, *flags, name=NAME, **extra):
    """The script by its path, from another folder, with no more than a user's environment."""
    env = environment(HF_HOME=str(checkout / "home"), HF_ENDPOINT=endpoint, HF_TOKEN="hf_secret",
                      HF_HUB_DISABLE_XET="1") | extra  # fmt: skip
    env = {key: value for key, value in env.items() if value and key != "PYTHONPATH"}
    if "HF_HUB_OFFLINE" not in extra:
        del env["HF_HUB_OFFLINE"]
    command = [sys.executable, checkout / "inference" / "deploy_space.py", name, *flags]
    return subprocess.run([*map(str, command)], cwd=checkout.parent, env=env, timeout=60,
                          capture_output=True, text=True)  # fmt: skip


def one_line(done):
    """Its error, which is one line and no traceback; the token is never printed."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "hf_secret" not in done.stdout + done.stderr
    return done.stderr


# What is sent


def test_a_dry_run_lists_every_file_and_contacts_nobody(checkout, hub):
    done = deploy(checkout, hub.url, "--dry-run")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    sizes = {name: int(size.replace(",", "")) for size, name in rows[:-1]}
    assert set(sizes) == SENT and hub.asked == []
    assert sizes["checkpoints/distilbert_agnews.int8.onnx"] == 25_600  # 256 x 100
    assert rows[-1] == [f"{sum(sizes.values()):,}", "bytes", "in", "10", "files"]


def test_what_is_sent_passes_the_dockerignore_and_has_the_names_that_the_server_reads():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    # Docker reads the Dockerfile itself in any case; README.md is the Hub's alone
    assert allowed == SENT - {"Dockerfile", "README.md"}
    assert f"checkpoints/{model_loader.ONNX}" == deploy_space.ONNX
    assert f"checkpoints/{model_loader.ONNX_FACTS}" == deploy_space.ONNX_FACTS
    assert f"checkpoints/{model_loader.CHECKPOINT}" == deploy_space.CHECKPOINT


@pytest.mark.parametrize("way", ["git-lfs", "in the commit"])
def test_a_deployment_sends_exactly_what_was_listed_and_asks_the_space(checkout, hub, way):
    hub.stages = ["BUILDING", 502, "APP_STARTING", "RUNNING"]  # 502: an answer that got lost
    hub.app_statuses = [404, 503]  # waking
    # the client's other way of uploading; that of large files, Xet, needs a storage server
    extra = {"HF_HUB_DISABLE_XET": ""} if way == "in the commit" else {}
    hub.lfs = ".onnx" if way == "git-lfs" else ".none"
    done = deploy(checkout, hub.url, **extra)
    assert done.returncode == 0, done.stderr
    repo = hub.received(NAME)
    got = {str(path.relative_to(repo)): path for path in repo.rglob("*") if path.is_file()}
    assert set(got) == SENT and hub.commits == 1
    for name in SENT - {"README.md"}:
        assert digest(got[name].read_bytes()) == digest((checkout / name).read_bytes()), name
    assert bool(hub.objects) == (way == "git-lfs")
    assert hub.created[0] | {"visibility": None} == {
        "name": "news", "organization": "some-one", "type": "space", "sdk": "docker",
        "visibility": None,
    }  # fmt: skip
    assert re.findall("the Space is (.+)", done.stdout) == ["BUILDING", "APP_STARTING", "RUNNING"]
    assert done.stdout.splitlines()[-2:] == [
        f"{hub.url}/app serves checkpoint 0123456789ab and says: Business (0.97)",
        f"curl {hub.url}/app/predict -H 'Content-Type: application/json' "
        """-d '{"text": "Shares rose after the bank raised its forecast"}'""",
    ]
    assert hub.app_tokens == {None}  # a public app is not shown the token
    assert not done.stderr and "hf_secret" not in done.stdout


def test_the_readme_is_one_that_the_hub_takes(checkout, hub):
    deploy(checkout, hub.url)
    text = (hub.received(NAME) / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    fields = dict(re.findall(r"^(\w+): (.+)$", head, re.MULTILINE))
    assert fields["sdk"] == "docker" and fields["app_port"] == "7860"
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {fields["colorFrom"], fields["colorTo"]} <= colours
    assert len(fields["short_description"]) <= 60  # the Hub refuses a longer one
    assert fields["license"] == "mit" and fields["title"] and fields["emoji"]
    assert "World, Sports, Business, Sci/Tech" in body and "0.9432" in body
    assert "non-commercial" in body


def test_a_private_space_is_asked_with_the_token(checkout, hub):
    done = deploy(checkout, hub.url, "--private")
    assert done.returncode == 0, done.stderr
    assert hub.created[0]["visibility"] == "private"
    assert hub.app_tokens == {"Bearer hf_secret"}
    assert '-H "Authorization: Bearer $(hf auth token)"' in done.stdout
    assert "hf_secret" not in done.stdout


def test_a_second_deployment_of_the_same_makes_no_new_commit(checkout, hub):
    assert deploy(checkout, hub.url).returncode == 0
    done = deploy(checkout, hub.url)
    assert done.returncode == 0, done.stderr
    assert hub.commits == 1


def test_a_stage_from_before_the_upload_is_not_taken_for_its_outcome(checkout, hub):
    hub.runtime = {"sha": "f" * 40}  # of the commit before
    hub.stages = ["BUILD_ERROR", "RUNNING", "RUNNING_BUILDING", "RUNNING"]
    done = deploy(checkout, hub.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the Space is") == 4


# What stops it before anything is sent


def spoil(folder, how):
    facts = folder / "distilbert_agnews.int8.json"
    if how == "no int8 file":
        (folder / "distilbert_agnews.int8.onnx").unlink()
    elif how == "no facts":
        facts.unlink()
    elif how == "no tokenizer":
        (folder / "tokenizer" / "tokenizer.json").unlink()
    elif how == "facts cut short":
        facts.write_text(facts.read_text()[:50])
    elif how == "facts that lack one":
        facts.write_text(facts.read_text().replace("test_accuracy", "loss"))
    elif how == "a damaged int8 file":
        (folder / "distilbert_agnews.int8.onnx").write_bytes(b"half")
    elif how == "another checkpoint":
        (folder / "distilbert_agnews.pt").write_bytes(b"trained again")


@pytest.mark.parametrize(
    "how, remedy",
    [
        ("no int8 file", "python inference/export.py --to onnx"),
        ("no facts", "python inference/export.py --to onnx"),
        ("facts cut short", "python inference/export.py --to onnx"),
        ("facts that lack one", "python inference/export.py --to onnx"),
        ("a damaged int8 file", "python inference/export.py --to onnx"),
        ("another checkpoint", "python inference/export.py --to onnx"),
        ("no tokenizer", "make demo"),
    ],
)
def test_a_model_that_could_not_be_served_is_not_sent(checkout, hub, how, remedy):
    spoil(checkout / "checkpoints", how)
    assert remedy in one_line(deploy(checkout, hub.url))
    assert hub.asked == []


def test_without_a_checkpoint_beside_them_the_int8_files_are_enough(checkout, hub):
    (checkout / "checkpoints" / "distilbert_agnews.pt").unlink()
    assert deploy(checkout, hub.url).returncode == 0


@pytest.mark.parametrize("name", ["news", "a/b/c", "some one/news"])
def test_a_name_that_no_space_has(checkout, hub, name):
    assert "expected OWNER/NAME" in one_line(deploy(checkout, hub.url, name=name))
    assert hub.asked == []


# What the Hub can answer


def test_a_free_account_is_told_what_costs_what(checkout, hub):
    hub.create_status = 402
    done = deploy(checkout, hub.url)
    assert done.returncode == 1
    sentence, *commands = done.stderr.splitlines()
    assert sentence.startswith("error: ")
    assert "PRO" in sentence and "CPU basic hardware" in sentence and "costs nothing" in sentence
    assert commands == ["docker build -t distrinews .", "docker run -p 7860:7860 distrinews"]


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_may_not(checkout, hub, status):
    hub.create_status = status
    line = one_line(deploy(checkout, hub.url))
    assert "hf auth login" in line and str(status) in line


def test_no_token(checkout, hub):
    assert "hf auth login" in one_line(deploy(checkout, hub.url, HF_TOKEN=""))
    assert hub.asked == []


def test_a_space_of_another_kind_is_left_alone(checkout, hub):
    hub.spaces[NAME], hub.sdk = False, "gradio"
    assert "a gradio Space already" in one_line(deploy(checkout, hub.url))
    assert hub.commits == 0


def test_a_public_space_is_not_filled_by_who_asked_for_a_private_one(checkout, hub):
    hub.spaces[NAME] = False
    assert "settings" in one_line(deploy(checkout, hub.url, "--private"))
    assert hub.commits == 0


def test_a_file_that_did_not_arrive_is_noticed(checkout, hub):
    hub.ignored = {"checkpoints/distilbert_agnews.int8.onnx"}  # as by a .gitignore in the Space
    line = one_line(deploy(checkout, hub.url))
    assert "checkpoints/distilbert_agnews.int8.onnx" in line and ".gitignore" in line
    assert not any("runtime" in line for line in hub.asked)


@pytest.mark.parametrize(
    "stages, place",
    [
        (["BUILDING", "BUILD_ERROR"], "?logs=build"),
        (["APP_STARTING", "RUNTIME_ERROR"], "?logs=container"),
        (["PAUSED"], "?logs=container"),
    ],
)
def test_a_space_that_fails_says_where_its_logs_are(checkout, hub, stages, place):
    hub.stages, hub.runtime = stages, hub.runtime | {"errorMessage": "Exit code: 1\nReason: x"}
    expected = f"stopped at {stages[-1]} (Exit code: 1); its logs: {hub.url}/spaces/{NAME}{place}\n"
    assert one_line(deploy(checkout, hub.url)).endswith(expected)


def test_a_build_that_does_not_end_is_not_waited_for_for_ever(checkout, hub):
    hub.stages = ["BUILDING"]
    line = one_line(deploy(checkout, hub.url, "--timeout", "1"))
    assert "still BUILDING" in line and f"{hub.url}/spaces/{NAME}?logs=build" in line


@pytest.mark.parametrize("status, says", [(503, "answer: status 503"), (401, "with status 401")])
def test_an_app_that_does_not_answer(checkout, hub, status, says):
    hub.app_statuses = [status] * 100
    line = one_line(deploy(checkout, hub.url, "--timeout", "1"))
    assert says in line and "?logs=container" in line


def test_a_hub_that_fails(checkout, hub):
    hub.create_status = 500
    assert "status 500" in one_line(deploy(checkout, hub.url))


def test_no_hub_at_all(checkout):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert "cannot reach the Hub" in one_line(deploy(checkout, url))
    line = one_line(deploy(checkout, url, HF_HUB_OFFLINE="1"))
    assert "HF_HUB_OFFLINE" in line
