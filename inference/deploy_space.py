"""The API as a Hugging Face Docker Space: sends it, waits until it runs, asks it one question.

python inference/deploy_space.py OWNER/NAME [--private] [--timeout SECONDS]
python inference/deploy_space.py OWNER/NAME --dry-run     what would be sent; contacts nobody

Needs the int8 model (python inference/export.py --to onnx) and a token that may write
(hf auth login). Sent again, only what changed is uploaded.
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars, get_session, validate_repo_id

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = "checkpoints/distilbert_agnews.pt"
ONNX = "checkpoints/distilbert_agnews.int8.onnx"
ONNX_FACTS = "checkpoints/distilbert_agnews.int8.json"
EXPORT = "python inference/export.py --to onnx"
QUESTION = json.dumps({"text": "Shares rose after the bank raised its forecast"})
POLL_SECONDS = 1

README = """---
title: DistriNews
emoji: 📰
colorFrom: blue
colorTo: green
sdk: docker
app_port: 7860
pinned: false
license: mit
short_description: Labels news as World, Sports, Business or Sci/Tech
tags:
- text-classification
- fastapi
- onnx
---
# DistriNews

Labels English news as {labels}: a page at `/`, an API at `/predict` (described at `/docs`).

- Backbone: {backbone}
- Trained on: {data} ({terms})
- Test accuracy: {test_accuracy:.4f}, before the weights became int8
"""
SAMPLE_TERMS = "480 items written for DistriNews, so the accuracy is no AG News figure"
AG_NEWS_TERMS = "AG News is for research and other non-commercial use"


class DeployError(Exception):
    """What stops a deployment; the message says what to do."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("space", metavar="OWNER/NAME")
    parser.add_argument("--private", action="store_true", help="for its owner's token only")
    parser.add_argument("--dry-run", action="store_true", help="list the files, contact nobody")
    parser.add_argument("--timeout", type=int, default=1200, metavar="SECONDS",
                        help="for building and starting (default: %(default)s)")  # fmt: skip
    return parser.parse_args()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def needed() -> list[str]:
    """The Dockerfile, and what it copies: the one place where the files are listed."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    copies = re.findall(r"^COPY --chown=user (.+) \S+$", text, re.MULTILINE)
    return ["Dockerfile", *" ".join(copies).split()]


def stage(folder: Path) -> dict[str, int]:
    """Fills the folder with what is sent -> the size of each file. The checkout's .gitignore stays
    behind: the Hub would obey it, and drop the model without a word."""
    for name in needed():
        remedy = EXPORT if name in (ONNX, ONNX_FACTS) else f"git checkout -- {name}"
        if "tokenizer" in name:
            remedy = "train a model first (make demo, or bash training/run_ddp.sh)"
        if not (ROOT / name).is_file():
            raise DeployError(f"no {ROOT / name}; {remedy}")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    info = check(folder)
    (folder / "README.md").write_text(README.format(**info), encoding="utf-8")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def check(folder: Path) -> dict:
    """What the int8 model says of itself, if its two files belong together and to the checkpoint
    that lies in the checkout."""
    facts_file, again = ROOT / ONNX_FACTS, f"export it again: {EXPORT}"
    try:
        facts = json.loads((folder / ONNX_FACTS).read_text())
        info = facts["info"] | {"labels": ", ".join(facts["labels"])}
        info["terms"] = SAMPLE_TERMS if info["data"] == "sample" else AG_NEWS_TERMS
        README.format(**info)
        made_of, onnx_sha256 = facts["checkpoint_sha256"], facts["onnx_sha256"]
    except (ValueError, KeyError, TypeError):
        raise DeployError(f"{facts_file} is not what export.py writes; {again}") from None
    if sha256(folder / ONNX) != onnx_sha256:
        raise DeployError(f"{ROOT / ONNX} is damaged or not the one of {facts_file.name}; {again}")
    if (ROOT / CHECKPOINT).exists() and sha256(ROOT / CHECKPOINT) != made_of:
        raise DeployError(f"{ROOT / ONNX} was made of another checkpoint than the one beside it, "
                          f"distilbert_agnews.pt; {again}")  # fmt: skip
    return info


def create(api: HfApi, space: str, private: bool) -> None:
    """Creates the Space, or takes the one that is there if it is of this kind."""
    try:
        # None, not False: a public Space is not forced on an organisation whose default is private
        api.create_repo(space, repo_type="space", space_sdk="docker", private=private or None,
                        exist_ok=True)  # fmt: skip
    except HfHubHTTPError as error:
        if error.response.status_code != 402:
            raise
        raise DeployError(
            "Hugging Face creates Docker Spaces only for paying accounts (PRO, or an organisation "
            "on a Team plan); the CPU basic hardware that it then runs on costs nothing. The same "
            "image on a machine of your own costs nothing:\n"
            "docker build -t distrinews .\n"
            "docker run -p 7860:7860 distrinews"
        ) from None
    info = api.space_info(space, timeout=60)
    if info.sdk not in (None, "docker"):
        raise DeployError(f"{space} is a {info.sdk} Space already; choose another name")
    if private and not info.private:
        raise DeployError(f"{space} is there already and public; make it private in its settings "
                          f"({page(api, space)}/settings) or leave out --private")  # fmt: skip


def upload(api: HfApi, space: str, folder: Path, files: dict[str, int]) -> str:
    """Sends the folder -> the commit, once the Hub's own list has shown that all of it arrived."""
    try:
        commit = api.upload_folder(repo_id=space, repo_type="space", folder_path=folder,
                                   commit_message="Deploy DistriNews").oid  # fmt: skip
    except (HTTPError, OSError):
        raise
    except Exception as error:  # the transfer is compiled code with no error class of its own
        raise DeployError(f"the upload broke off ({first_line(error)}); run the same command again "
                          "and it goes on from there") from None  # fmt: skip
    tree = api.list_repo_tree(space, repo_type="space", recursive=True, revision=commit)
    arrived = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    lost = [name for name, size in files.items() if arrived.get(name) != size]
    if lost:
        raise DeployError(f"not in the Space after the upload: {', '.join(lost)}; delete a "
                          f".gitignore that names them from {page(api, space)}/tree/main"
                          )  # fmt: skip
    return commit


def page(api: HfApi, space: str) -> str:
    return f"{api.endpoint}/spaces/{space}"


def wait_until_running(api: HfApi, space: str, commit: str, deadline: float) -> None:
    """Until the Space runs this commit, or cannot."""
    last, moved, began = None, False, time.monotonic()
    while True:
        try:
            runtime = api.get_space_runtime(space)
        except (HTTPError, OSError) as error:  # one answer of hundreds may be lost
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else 500
            if (status < 500 and status != 429) or time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS)
            continue
        stage = getattr(runtime.stage, "value", runtime.stage)
        if stage != last:
            last = stage
            print(f"the Space is {stage}", flush=True)
        moved |= stage.endswith(("BUILDING", "STARTING"))
        # a stage from before this upload can stand for some seconds after it
        settled = moved or runtime.raw.get("sha") == commit or time.monotonic() > began + 60
        if settled and stage in ("RUNNING", "SLEEPING"):
            return  # the request that follows wakes a sleeping one
        if settled and not stage.endswith(("BUILDING", "STARTING")):
            why = first_line(runtime.raw.get("errorMessage") or "the Hub gives no reason")
            raise DeployError(f"the Space stopped at {stage} ({why}); its logs: "
                              f"{logs(api, space, stage)}")  # fmt: skip
        if time.monotonic() > deadline:
            raise DeployError(f"the Space is still {stage} at the end of --timeout; its logs: "
                              f"{logs(api, space, stage)}")  # fmt: skip
        time.sleep(POLL_SECONDS)


def logs(api: HfApi, space: str, stage: str) -> str:
    return f"{page(api, space)}?logs={'build' if 'BUILD' in stage else 'container'}"


def ask(url: str, deadline: float, token: str | None, body: str | None = None) -> dict:
    """The app's answer as JSON. A Space that wakes refuses connections, or says 404 or 5xx."""
    request = urllib.request.Request(url, body and body.encode())
    request.add_header("Content-Type", "application/json")
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")  # to no other host
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            why = f"status {error.code}"
            if error.code < 500 and error.code != 404:
                raise DeployError(f"{url} answers with {why}") from None
        except (OSError, ValueError) as error:  # ValueError: a page of the Hub's, not the app's
            why = first_line(error)
        if time.monotonic() > deadline:
            raise DeployError(f"{url} does not answer: {why}")
        time.sleep(POLL_SECONDS)


def question(api: HfApi, space: str, deadline: float) -> None:
    """Asks the running Space who it is and what a text is, and prints how to do the same."""
    info = api.space_info(space, timeout=60)
    if not info.host:
        raise DeployError(f"the Hub names no address for it; look at {page(api, space)}")
    url = info.host if "://" in info.host else f"https://{info.host}"
    token = api.token if info.private else None  # a public app has no business with it
    try:
        model = ask(f"{url}/health", deadline, token)["model"]
        answer = ask(f"{url}/predict", deadline, token, QUESTION)
        print(f"{url} serves checkpoint {model['checkpoint']} and says: "
              f"{answer['label']} ({answer['confidence']:.2f})")  # fmt: skip
    except DeployError as error:
        raise DeployError(f"{error}; its logs: {logs(api, space, 'RUNNING')}") from None
    except (KeyError, TypeError, ValueError):
        raise DeployError(f"{url} is not DistriNews; look at {page(api, space)}") from None
    key = ' -H "Authorization: Bearer $(hf auth token)"' if token else ""
    print(f"curl {url}/predict{key} -H 'Content-Type: application/json' -d '{QUESTION}'")


def first_line(error) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def explain(error: Exception, space: str) -> str:
    """The Hub's refusal, or its absence, in one line."""
    if not isinstance(error, HfHubHTTPError):
        return f"cannot reach the Hub ({first_line(error)}); run the same command again later"
    status = error.response.status_code
    if status in (401, 403):
        return (f"the Hub takes no such change to {space} from this token (status {status}); "
                "hf auth login with a token of the owner's that may write")  # fmt: skip
    return f"the Hub answered with status {status}: {first_line(error.server_message or error)}"


def deploy(args: argparse.Namespace, folder: Path, files: dict[str, int]) -> None:
    token = get_token()
    if token is None:
        raise DeployError("no Hugging Face token; hf auth login (with a token that may write)")
    if not sys.stderr.isatty():
        disable_progress_bars()
    get_session().timeout = 60  # without it a Hub that says nothing is waited for without end
    api = HfApi(token=token)
    create(api, args.space, args.private)
    print(f"uploading to {page(api, args.space)}", flush=True)
    commit = upload(api, args.space, folder, files)
    deadline = time.monotonic() + args.timeout
    wait_until_running(api, args.space, commit, deadline)
    question(api, args.space, deadline)


def main() -> None:
    args = parse_args()
    try:
        validate_repo_id(args.space if "/" in args.space else "")
    except HFValidationError:
        raise DeployError(f"{args.space}: expected OWNER/NAME, of letters, digits, '-', '_', '.'"
                          ) from None  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        try:
            files = stage(Path(folder))
        except OSError as error:
            raise DeployError(f"cannot copy {error.filename}: {error.strerror}") from None
        for name, size in files.items():
            print(f"{size:>12,}  {name}")
        print(f"{sum(files.values()):>12,}  bytes in {len(files)} files", flush=True)
        if args.dry_run:
            return
        try:
            deploy(args, Path(folder), files)
        except (HTTPError, OSError) as error:
            raise DeployError(explain(error, args.space)) from None


if __name__ == "__main__":
    try:
        main()
    except DeployError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; run the same command again and it goes on from there")
