"""What a figure came from: the configuration's hash, the source's revision, the versions."""

import hashlib
import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "torchvision", "numpy", "hydra-core", "wandb")


def content_hash(value: object) -> str:
    """16 hex digits that change with anything in a JSON-like value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def source_hash() -> str:
    """16 hex digits that change with any line of brqat's own code."""
    here = Path(__file__).resolve().parent
    files = sorted(path for path in here.rglob("*") if path.suffix in (".py", ".cpp", ".h"))
    return content_hash({str(path.relative_to(here)): path.read_text() for path in files})


def git_sha() -> str | None:
    """Revision of the checkout that brqat is imported from, with -dirty for changed files; None outside of one."""
    here = Path(__file__).resolve().parent
    try:
        # Our own checkout and not one that merely surrounds an installed package.
        top = _git(here, "rev-parse", "--show-toplevel")
        if Path(top) != here.parent:
            return None
        dirty = "-dirty" if _git(here, "status", "--porcelain", "--untracked-files=no") else ""
        return _git(here, "rev-parse", "HEAD") + dirty
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str]:
    from brqat import __version__

    found = {"python": platform.python_version(), "brqat": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()
