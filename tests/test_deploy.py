"""inference/deploy_space.py against a Hub on loopback: pytest tests/test_deploy.py"""

import json
import shutil
import sys

import pytest
import yaml
from fake_hub import COMMIT, fake_space
from ranks import ROOT, run

from inference.model_loader import INT8_BIN, INT8_METADATA, metadata_sha256

SENT = """Dockerfile README.md inference/requirements.txt inference/app.py inference/batcher.py
inference/model_loader.py inference/index.html checkpoints/tokenizer/tokenizer.json
checkpoints/distilbert_agnews.int8.xml checkpoints/distilbert_agnews.int8.bin
checkpoints/distilbert_agnews.int8.json""".split()


@pytest.fixture
def checkpoints(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "checkpoints")


@pytest.fixture
def hub(exported):
    metadata = json.loads((exported / INT8_METADATA).read_text(encoding="utf-8"))
    with fake_space(metadata["info"]["checkpoint"]) as hub:
        yield hub


def deploy(checkpoints, hub, *flags, name="some-one/news", **extra):
    """The script by its path, from another folder, with no more than a user's environment."""
    env = {"CHECKPOINT_DIR": str(checkpoints), "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret"}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"} | extra
    command = [sys.executable, ROOT / "inference" / "deploy_space.py", name, *flags]
    done = run(command, checkpoints.parent, as_user=True, **env)
    assert "hf_secret" not in done.stdout + done.stderr
    return done


def error_of(done):
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_what_a_dry_run_lists_is_uploaded_and_the_space_is_asked(checkpoints, hub):
    listed = deploy(checkpoints, hub, "--dry-run").stdout
    assert {line.split()[1] for line in listed.splitlines()[:-1]} >= {*SENT} and hub.asked == []
    # an earlier commit's stages do not count, and a waking app answers with errors
    hub.stages = [("BUILD_ERROR", "f" * 40), ("BUILDING", COMMIT), ("RUNNING", COMMIT)]
    hub.app_statuses = [503, 404, 503]
    done = deploy(checkpoints, hub)
    assert done.returncode == 0, done.stderr
    assert set(hub.files) == {line.split()[1] for line in listed.splitlines()[:-1]}
    for name in set(hub.files) - {"README.md"}:
        inside = name.removeprefix("checkpoints/")
        source = checkpoints / inside if inside != name else ROOT / name
        assert hub.files[name] == source.read_bytes(), name
    assert hub.created["sdk"] == "docker" and hub.created["organization"] == "some-one"
    assert done.stdout.splitlines()[-2:] == [
        f"{hub.url}/app says: Business (0.97)",
        f"curl {hub.url}/app/predict -H 'Content-Type: application/json' "
        """-d '{"text": "Shares rose after the bank raised its forecast"}'""",
    ]
    assert hub.app_tokens == {None}  # a public app is not shown the token


@pytest.mark.parametrize("data, licence", [("folder news", "other"), ("sample", "mit")])
def test_the_card_names_the_terms_of_the_models_data(checkpoints, hub, data, licence):
    file = checkpoints / INT8_METADATA
    metadata = json.loads(file.read_text(encoding="utf-8"))
    metadata["info"]["data"] = data
    metadata["metadata_sha256"] = metadata_sha256(metadata)
    file.write_text(json.dumps(metadata), encoding="utf-8")
    assert deploy(checkpoints, hub).returncode == 0
    _, header, body = hub.files["README.md"].decode().split("---\n", 2)
    card = yaml.safe_load(header)
    assert card["license"] == licence and card["sdk"] == "docker" and card["app_port"] == 7860
    assert len(card["short_description"]) <= 60  # the Hub refuses a longer one
    assert ("AG_corpus" in card.get("license_link", "")) == (licence == "other")
    assert ("non-commercial" in body) == (licence == "other")


def test_odd_answers_of_a_space_that_wakes_are_waited_out(checkpoints, hub):
    health = json.dumps(hub.app["/health"]).encode()
    hub.app_statuses = [503, b"<html>", b"[1]", b'{"model": null}', b"", health, b"[1]", health]
    hub.app_statuses += [b'{"detail": "x"}', health, 503]
    assert deploy(checkpoints, hub).returncode == 0 and not hub.app_statuses


def test_a_private_space_is_asked_with_the_token(checkpoints, hub):
    hub.space["private"] = True
    done = deploy(checkpoints, hub, "--private")
    assert done.returncode == 0, done.stderr
    assert hub.created.get("visibility", "private") == "private"
    assert hub.app_tokens == {"Bearer hf_secret"}
    assert '-H "Authorization: Bearer $(hf auth token)"' in done.stdout


@pytest.mark.parametrize("file", [INT8_BIN, INT8_METADATA, "tokenizer/tokenizer.json"])
def test_a_model_that_could_not_be_served_is_not_uploaded(checkpoints, hub, file):
    (checkpoints / file).write_bytes(b"{}")  # as another tokenizer would be
    assert "export.py --to int8" in error_of(deploy(checkpoints, hub))
    assert hub.asked == []


@pytest.mark.parametrize(
    "attributes, extra, says",
    [
        ({"create_status": 402}, {}, "only for paying accounts (PRO"),
        ({"create_status": 403}, {}, "hf auth login"),
        ({"create_status": 500}, {}, "500"),
        ({}, {"HF_TOKEN": ""}, "no Hugging Face token"),
        ({}, {"HF_TOKEN": "hf_\u2026"}, "no Hugging Face token"),
        ({}, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "run the same command again"),
        ({}, {"name": "news"}, "expected OWNER/NAME"),
        ({}, {"name": "some--one/news"}, "in repo_id: 'some--one/news'.\n"),  # and no "again"
        ({"space": {"host": None}}, {}, "at which address"),
        ({"space": {"sdk": "gradio", "private": False}}, {}, "is another Space (gradio"),
        ({"space": {"siblings": [{"rfilename": "main.py"}]}}, {}, "holds another app"),
        ({"stages": [("BUILD_ERROR", COMMIT)]}, {}, "stopped at BUILD_ERROR; its logs: http"),
        ({"stages": [("BUILDING", COMMIT)]}, {}, "still in stage 'BUILDING'"),
        ({"app_statuses": [503] * 99}, {}, "serves nothing (HTTP Error 503"),
    ],
)
def test_what_stops_a_deployment_is_one_line(checkpoints, hub, attributes, extra, says):
    vars(hub).update(attributes)
    assert says in error_of(deploy(checkpoints, hub, "--timeout", "2", **extra))
