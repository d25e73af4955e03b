"""Files that are whole or absent, written to a temporary name beside them, flushed, then renamed; and where conf is."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any


def write_whole(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Calls write with an open binary file that takes the place of path once it is complete and on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: dict) -> None:
    """One readable JSON object; figures that are not finite become null."""
    text = json.dumps(finite(value), indent=2, allow_nan=False)
    write_whole(path, lambda file: file.write(text.encode() + b"\n"))


def append_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """One JSON object a line, on the disk when the call returns."""
    text = "".join(json.dumps(finite(row), allow_nan=False) + "\n" for row in rows)
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: Path) -> Iterator[dict]:
    """The rows of a file, none if it is missing; a last line that a kill cut short is left out."""
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return


def finite(value: Any) -> Any:
    """The same value with every NaN and infinity in it replaced by None: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def config_dir() -> str:
    """conf/ beside the package in a checkout, or inside it in a wheel: whichever holds train.yaml."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return str(folder)
    raise FileNotFoundError(f"no conf/train.yaml in or beside {package}: the installation is incomplete")
