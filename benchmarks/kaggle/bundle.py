"""The repo as one script that Kaggle runs on two T4s: make kaggle

A pushed kernel is a single file, so what training and measuring need travels inside it. Then, with
Kaggle's own client and its API token:

kaggle kernels push -p build/kaggle
kaggle kernels output USER/distrinews -p build/kaggle/out     # when it has run
"""

import base64
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

from training.machine import ROOT, git_commit

OUT = ROOT / "build" / "kaggle"
CONTENT = "training benchmarks docs README.md requirements.txt requirements-dev.txt".split()

KERNEL = '''"""DistriNews on Kaggle, made by `make kaggle` from commit {commit}. Choose GPU T4 x2.

What it does once it has unpacked itself is in benchmarks/kaggle/run.py.
"""

import base64
import io
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

CONTENT = """
{content}
"""

place = Path("distrinews").resolve()  # below the folder that Kaggle keeps, /kaggle/working
if place.exists():
    sys.exit(f"error: {place} exists already; start this where it does not")
packed = io.BytesIO(lzma.decompress(base64.b85decode(CONTENT.replace("\\n", ""))))
with tarfile.open(fileobj=packed) as files:
    files.extractall(place)
command = [sys.executable, "-m", "benchmarks.kaggle.run", str(Path.cwd()), *sys.argv[1:]]
env = os.environ | {"GIT_COMMIT": "{commit}"}
status = subprocess.run(command, cwd=place, env=env).returncode
if status == 0:
    shutil.rmtree(place)  # what is left is what was made
sys.exit(status)
'''


def user() -> str:
    """The Kaggle account that a push needs: KAGGLE_USERNAME, or that of the API token's file."""
    named, token = os.environ.get("KAGGLE_USERNAME"), Path.home() / ".kaggle" / "kaggle.json"
    try:
        owner = json.loads(token.read_text())["username"]
    except (OSError, ValueError, KeyError):
        owner = None
    if named and owner and named != owner:
        sys.exit(
            f"error: KAGGLE_USERNAME is {named}, but {token} belongs to {owner}; Kaggle would "
            "refuse the push: unset the one that is wrong"
        )
    if not (named or owner):
        sys.exit(f"error: no Kaggle account: set KAGGLE_USERNAME, or put the API token in {token}")
    return named or owner


def git(*args: str) -> bytes:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, check=True).stdout


def content() -> bytes:
    """The tracked files of CONTENT as they are now."""
    tree = git("stash", "create").decode().strip() or "HEAD"  # with changes not committed
    return lzma.compress(git("archive", tree, *CONTENT, ":!benchmarks/plots"))


def main(out: Path = OUT) -> None:
    packed = base64.b85encode(content()).decode()
    lines = "\n".join(packed[i : i + 100] for i in range(0, len(packed), 100))
    out.mkdir(parents=True, exist_ok=True)
    kernel = KERNEL.replace("{commit}", git_commit() or "unknown").replace("{content}", lines)
    (out / "kernel.py").write_text(kernel)
    name = f"{user()}/distrinews"
    metadata = {
        "id": name,
        "title": "distrinews",
        "code_file": "kernel.py",
        "language": "python",
        "kernel_type": "script",
        "is_private": True,
        "enable_gpu": True,
        "enable_internet": True,
        "machine_shape": "NvidiaTeslaT4",  # two of them
    }
    (out / "kernel-metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")
    place = os.path.relpath(out)
    print(f"wrote {place}/kernel.py, {len(kernel) / 2**10:.0f} KiB; next, with Kaggle's client:")
    print(f"kaggle kernels push -p {place}")
    print(f"kaggle kernels output {name} -p {place}/out    # when it has run")


if __name__ == "__main__":
    main()
