"""The API as a Hugging Face Docker Space: uploads it, waits until it runs, asks it one question.

python inference/deploy_space.py OWNER/NAME [--private] [--timeout SECONDS]
python inference/deploy_space.py OWNER/NAME --dry-run     what would be uploaded; no network access

Needs the int8 model of CHECKPOINT_DIR (python inference/export.py --to int8) and a token that may
write (hf auth login).
"""

import http.client
import json
import re
import shutil
import signal
import sys
import tempfile
import time
import urllib.request
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

if not __package__:  # started by its path: imports would be looked for beside this file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback

from huggingface_hub import HfApi, SpaceCardData, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

from inference.model_loader import CHECKPOINTS, LoadError, read_metadata

ROOT = Path(__file__).resolve().parent.parent
QUESTION = json.dumps({"text": "Shares rose after the bank raised its forecast"})
AG_NEWS_TERMS = "http://groups.di.unipi.it/~gulli/AG_corpus_of_news_articles.html"


class DeployError(Exception):
    """Why a deployment stopped, and what to do."""


def space_card(metadata: dict) -> str:
    """README.md of the Space; its header is what the Hub reads."""
    info, sample = metadata["info"], metadata["info"]["data"] == "sample"
    card = SpaceCardData(
        title="DistriNews",
        emoji="📰",
        colorFrom="blue",
        colorTo="green",
        sdk="docker",
        app_port=7860,
        short_description="Labels news as World, Sports, Business or Sci/Tech",
        tags=["text-classification", "fastapi"],
        license="mit" if sample else "other",
        # the code is MIT; a model of AG News comes under the terms of that collection
        license_name=None if sample else "ag-news-non-commercial",
        license_link=None if sample else AG_NEWS_TERMS,
    )
    terms = (
        "480 items written for DistriNews, so its accuracy is not an AG News figure"
        if sample
        else f"AG News is for research and other [non-commercial use]({AG_NEWS_TERMS})"
    )
    return f"""---
{card.to_yaml()}
---
# DistriNews

Labels English news as {", ".join(metadata["labels"])}: a page at `/`, an API at `/predict`
(described at `/docs`). The code is under the MIT licence.

- Backbone: {info["backbone"]}
- Trained on: {info["data"]} ({terms})
- Test accuracy: {info["test_accuracy"]:.4f}, before the weights became int8
"""


def collect(folder: Path) -> dict:
    """Copies what the Dockerfile copies -> the int8 model's metadata. The checkout's .gitignore
    stays behind: the Hub would obey it, and drop the model without a word."""
    metadata = read_metadata(CHECKPOINTS)
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    copied = re.findall(r"^COPY --chown=user (.+) \S+$", dockerfile, re.MULTILINE)
    for name in ["Dockerfile", *" ".join(copied).split()]:
        inside = name.removeprefix("checkpoints/")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name if inside == name else CHECKPOINTS / inside, folder / name)
    (folder / "README.md").write_text(space_card(metadata), encoding="utf-8")
    return metadata


def ask(url: str, token: str | None, body: str | None = None) -> dict:
    request = urllib.request.Request(url, body and body.encode())
    request.add_header("Content-Type", "application/json")
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")  # to no other host
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def wait_until_served(api: HfApi, space: str, commit: str, checkpoint: str, timeout: float) -> None:
    """Until the Space runs this commit and its /health names this checkpoint; prints its URL."""
    page, deadline = f"{api.endpoint}/spaces/{space}", time.monotonic() + timeout
    info = api.space_info(space)
    if not info.host:
        raise DeployError(f"the Hub does not say at which address it is served; see {page}")
    url = info.host if "://" in info.host else f"https://{info.host}"
    token = api.token if info.private else None  # a public app must not see it
    while True:
        try:
            runtime = api.wait_for_space(space, timeout=max(0, deadline - time.monotonic()))
        except TimeoutError as error:
            raise DeployError(f"{error} Its logs: {page}?logs=build") from None
        current = runtime.raw.get("sha", commit) == commit  # else of an earlier commit
        if current and runtime.stage not in ("RUNNING", "SLEEPING"):
            raise DeployError(f"the Space stopped at {runtime.stage}; its logs: {page}?logs=build")
        try:
            served = ask(f"{url}/health", token)["model"]["checkpoint"]
            if current and served == checkpoint:
                answer = ask(f"{url}/predict", token, QUESTION)
                said = f"{url} says: {answer['label']} ({answer['confidence']:.2f})"
                break
        # while it wakes, a page of the Hub's own, or an answer cut short
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            served = f"nothing ({error})"
        if time.monotonic() > deadline:
            raise DeployError(
                f"{url}/health serves {served}, expected {checkpoint}; logs: {page}?logs=container"
            )
        time.sleep(1)
    print(said)
    key = ' -H "Authorization: Bearer $(hf auth token)"' if token else ""
    print(f"curl {url}/predict{key} -H 'Content-Type: application/json' -d '{QUESTION}'")


def explain(error: Exception, space: str) -> str:
    """What the Hub refused, in one line."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 402:
        return (
            "Hugging Face creates Docker Spaces only for paying accounts (PRO, or an organisation "
            "on a Team plan); the basic hardware that runs them is free. The same image is free on "
            "a machine of yours: docker build -t distrinews . && docker run -p 7860:7860 distrinews"
        )
    if status in (401, 403):
        return f"this token may not write to {space} (status {status}); hf auth login with another"
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if isinstance(error, HFValidationError):
        return reason
    return f"{reason}; run the same command again: what was uploaded is not uploaded twice"


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("space", metavar="OWNER/NAME")
    add("--private", action="store_true", help="for its owner's token only")
    add("--dry-run", action="store_true", help="list the files, no network access")
    add("--timeout", type=int, default=1200, help="seconds to start (default: %(default)s)")
    args = parser.parse_args()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.space):
        raise DeployError(f"{args.space}: expected OWNER/NAME")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        metadata = collect(folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in files:
            print(f"{path.stat().st_size:>12,}  {path.relative_to(folder)}")
        print(f"{sum(path.stat().st_size for path in files):>12,}  bytes", flush=True)
        if args.dry_run:
            return
        token = get_token() or ""
        if not (token and token.isascii()):
            raise DeployError("no Hugging Face token; hf auth login (with a token that may write)")
        api, space = HfApi(token=token), {"repo_id": args.space, "repo_type": "space"}
        try:
            # None, not False: a public Space is not forced on an organisation that has private ones
            private = args.private or None
            api.create_repo(**space, space_sdk="docker", private=private, exist_ok=True)
            info = api.space_info(args.space)
            if info.sdk not in (None, "docker") or (args.private and not info.private):
                kind = f"{info.sdk}, {'private' if info.private else 'public'}"
                raise DeployError(f"{args.space} is another Space ({kind}); choose another name")
            others = {file.rfilename for file in info.siblings or ()}
            if others - {".gitattributes", "README.md"} and "inference/app.py" not in others:
                raise DeployError(f"{args.space} holds another app; choose another name")
            how = {"folder_path": folder, "commit_message": "Deploy DistriNews"}
            done = api.upload_folder(**space, **how)
            checkpoint = metadata["info"]["checkpoint"]
            wait_until_served(api, args.space, done.oid, checkpoint, args.timeout)
        except (HTTPError, HFValidationError, OSError, RuntimeError) as error:
            raise DeployError(explain(error, args.space)) from None


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except (DeployError, LoadError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; run the same command again")
