"""The Kaggle kernel, made and run here as there, but for the GPUs: pytest tests/test_kaggle.py"""

import base64
import io
import json
import lzma
import shutil
import sys
import tarfile

import pytest
import ranks
from fakes import make_backbone

from benchmarks.kaggle import bundle, run
from training.model import packaged_backbone


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """/kaggle with the one file that a push sends, and its metadata."""
    kaggle = tmp_path_factory.mktemp("kaggle")
    (kaggle / "working").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAGGLE_USERNAME", "someone")
        patch.setenv("HOME", str(kaggle))  # where no token is
        bundle.main(kaggle / "push")
    return kaggle


def test_a_push_asks_for_two_t4s_and_holds_the_code(kernel):
    metadata = json.loads((kernel / "push" / "kernel-metadata.json").read_text())
    assert metadata["id"] == "someone/distrinews" and metadata["enable_internet"] is True
    assert metadata["machine_shape"] == "NvidiaTeslaT4"  # this name means two of them
    code = (kernel / "push" / metadata["code_file"]).read_text()
    packed = base64.b85decode(code.split('"""')[3].replace("\n", ""))
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(packed))) as files:
        assert {"training/train_ddp.py", "benchmarks/kaggle/run.py"} <= {*files.getnames()}


def test_a_push_under_another_name_than_the_tokens_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KAGGLE_USERNAME", raising=False)
    with pytest.raises(SystemExit, match="no Kaggle account: set KAGGLE_USERNAME"):
        bundle.user()
    (tmp_path / ".kaggle").mkdir()
    (tmp_path / ".kaggle" / "kaggle.json").write_text('{"username": "owner", "key": "0"}')
    assert bundle.user() == "owner"
    monkeypatch.setenv("KAGGLE_USERNAME", "someone")
    with pytest.raises(SystemExit, match="KAGGLE_USERNAME is someone, but .* belongs to owner"):
        bundle.user()


@pytest.mark.slow
def test_the_kernel_runs_from_preflight_to_pages(kernel, tmp_path):
    # the sample's words need a real tokenizer
    tiny_backbone = make_backbone(tmp_path / "tiny", 0.1, tokenizer=packaged_backbone())
    working = kernel / "working"
    shutil.copy(kernel / "push" / "kernel.py", working / "script.py")
    command = [sys.executable, "script.py", "--quick", "--model", tiny_backbone]
    # as a user: there is no checkout on Kaggle
    done = ranks.run(command, working, 280, as_user=True, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "GB/s, by gloo" in done.stdout
    left = {path.name for path in working.iterdir()}
    assert left == {"script.py", "benchmarks", "checkpoints", "checkpoints_single"}
    results = working / "benchmarks" / "results"
    for name, world_size in (("kaggle_single", 1), ("kaggle_ddp", 2)):
        record = json.loads((results / f"{name}.json").read_text())
        assert record["world_size"] == world_size and record["data"] == "sample"
    rows = json.loads((results / "kaggle_levers.json").read_text())
    assert [row["how"] for row in rows] == list(run.LEVERS)
    assert all(row["samples_per_second"] > 0 for row in rows)
    assert (working / "checkpoints" / "distilbert_agnews.pt").exists()
    assert json.loads((results / "kaggle_preflight.json").read_text())["transport"] == ["gloo"]
    page = (working / "benchmarks" / "ddp_2gpu.md").read_text()
    assert tiny_backbone.name in page and "the sample, 2 processes" in page


@pytest.mark.slow
def test_a_transport_that_fails_is_followed_by_the_next(monkeypatch, capsys):
    # gloo stands in for NCCL: it fails until it is told of an interface that exists
    works = {"GLOO_SOCKET_IFNAME": "lo"}
    monkeypatch.setattr(run, "ATTEMPTS", ({}, works))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    assert run.preflight(2)["environment"] == works
    assert capsys.readouterr().out.count("fails (") == 1
    monkeypatch.setattr(run, "ATTEMPTS", ({},))
    with pytest.raises(SystemExit, match="no all-reduce works"):
        run.preflight(2)


def test_without_two_gpus_it_says_what_to_choose(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="^error: two GPUs are needed: choose .* GPU T4 x2"):
        run.main()
