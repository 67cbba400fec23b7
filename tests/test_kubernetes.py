"""The Kubernetes files against the published schemas and the real programs: no cluster needed."""

import os
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api import models
from ranks import ROOT, environment
from server import UVICORN, process

SERVING = ROOT / "inference" / "kubernetes.yaml"
TRAINJOB = ROOT / "training" / "cluster" / "trainjob.yaml"
PYTORCHJOB = ROOT / "training" / "cluster" / "pytorchjob.yaml"


def documents(path: Path) -> dict[str, dict]:
    """Its documents by their kind."""
    return {document["kind"]: document for document in yaml.safe_load_all(path.read_text())}


DEPLOYMENT = documents(SERVING)["Deployment"]
POD = DEPLOYMENT["spec"]["template"]["spec"]
API = POD["containers"][0]
RUNTIME = documents(TRAINJOB)["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"][0]
REPLICAS = documents(PYTORCHJOB)["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]


@pytest.mark.parametrize("version", ["1.30", "1.33", "1.37"])
def test_what_kubernetes_knows_fits_its_schemas(version):
    kubernetes = list(documents(SERVING).values())
    for path in (TRAINJOB, PYTORCHJOB):
        kubernetes.append(documents(path)["PersistentVolumeClaim"])
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
    kubernetes.append(job | {"spec": RUNTIME["template"]["spec"]})
    for replica in REPLICAS.values():
        pods = {"apiVersion": "v1", "kind": "PodTemplate", "template": replica["template"]}
        kubernetes.append(pods)
    for document in kubernetes:  # strict: unknown fields are errors
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("kind", ["TrainingRuntime", "TrainJob"])
def test_what_trainer_knows_fits_its_models(kind):
    document = documents(TRAINJOB)[kind]
    model = getattr(models, f"TrainerV1alpha1{kind}")
    assert model.from_dict(document).to_dict() == document  # an unknown field would be dropped


def test_names_that_refer_to_each_other_agree():
    job, serving = documents(TRAINJOB), documents(SERVING)
    runtime = job["TrainJob"]["spec"]["runtimeRef"]
    assert (runtime["kind"], runtime["name"]) == ("TrainingRuntime", "distrinews")
    assert job["TrainingRuntime"]["metadata"]["name"] == runtime["name"]
    pods = [RUNTIME["template"]["spec"]["template"], *(r["template"] for r in REPLICAS.values())]
    for pod in pods:
        claim = pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
        assert claim == job["PersistentVolumeClaim"]["metadata"]["name"]
        assert pod["spec"]["containers"][0]["image"] == job["TrainJob"]["spec"]["trainer"]["image"]
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert serving["Service"]["spec"]["selector"] == labels
    assert serving["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    target = serving["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target["name"] == DEPLOYMENT["metadata"]["name"]
    (port,) = serving["Service"]["spec"]["ports"]
    assert port["targetPort"] in [port["name"] for port in API["ports"]]


def test_user_port_and_folders_are_those_of_the_images():
    image = (ROOT / "Dockerfile").read_text()
    (port,) = API["ports"]
    assert f"EXPOSE {port['containerPort']}" in image
    assert f"--uid {POD['securityContext']['runAsUser']} user" in image
    folder = ROOT / "training" / "cluster"
    image, ignored = (
        (folder / name).read_text() for name in ("Dockerfile", "Dockerfile.dockerignore")
    )
    pod = RUNTIME["template"]["spec"]["template"]["spec"]
    assert f"--uid {pod['securityContext']['runAsUser']} user" in image
    workdir = next(line.split()[1] for line in image.splitlines() if line.startswith("WORKDIR"))
    assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == f"{workdir}/checkpoints"
    copied = [line.split()[1:-1] for line in image.splitlines() if line.startswith("COPY")]
    for name in sum(copied, []):
        assert (ROOT / name).exists() and f"!{name}\n" in ignored


def pod_commands(path: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    """The command of each pod and the variables that its operator sets, for two pods on loopback.

    Trainer: pkg/runtime/framework/plugins/torch/torch.go; Training Operator v1.9:
    pkg/controller.v1/pytorch/envvar.go and master.go.
    """
    commands = {}
    for rank, name in enumerate(("Master", "Worker")):
        pet = {"PET_NNODES": "2", "PET_NODE_RANK": str(rank), "PET_NPROC_PER_NODE": "1"}
        if path == TRAINJOB:
            container = documents(TRAINJOB)["TrainJob"]["spec"]["trainer"]
            pet |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": "29517"}
        else:
            container = REPLICAS[name]["template"]["spec"]["containers"][0]
            pet |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29518", "WORLD_SIZE": "2"}
            pet |= {"RANK": str(rank)}
        commands[name] = container["command"] + container["args"], pet
    return commands


@pytest.mark.slow
@pytest.mark.parametrize("path", [TRAINJOB, PYTORCHJOB], ids=lambda path: path.stem)
def test_two_pods_train_together(path, flags, tmp_path):
    how, pods = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True}, []
    for command, variables in pod_commands(path).values():
        env = environment(NPROC_PER_NODE="1", GLOO_SOCKET_IFNAME="lo", **variables)
        pods.append(subprocess.Popen([*command, *flags(tmp_path / "c")], env=env, **how))
    said = [pod.communicate(timeout=200)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], said
    assert "2 processes" in said[0] and said[1] == ""
    assert (tmp_path / "c" / "distilbert_agnews.pt").exists()


@pytest.fixture(scope="module")
def pod(exported):
    """The server, with nothing but / as a file system, and that read-only if the file says so."""
    command = UVICORN
    if os.geteuid() == 0 and API["securityContext"]["readOnlyRootFilesystem"]:
        inside = 'mount -o remount,bind,ro / && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", inside, "sh", *UVICORN]
    with process(exported, command=command) as (url, server):
        yield url, server


def test_probes_and_metrics_are_answered(pod):
    url, _ = pod
    probes = [API[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")]
    assert {probe["port"] for probe in probes} == {API["ports"][0]["name"]}
    notes = DEPLOYMENT["spec"]["template"]["metadata"]["annotations"]
    assert notes["prometheus.io/port"] == str(API["ports"][0]["containerPort"])
    for path in [*(probe["path"] for probe in probes), notes["prometheus.io/path"]]:
        assert urllib.request.urlopen(url + path, timeout=10).status == 200
    metrics = urllib.request.urlopen(url + notes["prometheus.io/path"]).read().decode()
    assert 'requests_total{route="/health"' in metrics


def test_sigterm_ends_the_server_within_the_grace_period(pod):
    url, server = pod
    body = b'{"texts": [' + b", ".join([b'"shares of the bank " '] * 64) + b"]}"
    request = urllib.request.Request(
        f"{url}/predict/batch", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        server.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert b'"predictions"' in answer.read()
    left = POD["terminationGracePeriodSeconds"] - API["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert server.wait(left) in (0, -signal.SIGTERM) and time.monotonic() - began < left
