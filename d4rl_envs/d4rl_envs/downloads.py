"""Downloads that are whole or not there, from the first of several addresses that has the file."""

import os
import queue
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from d4rl_envs.spaces import say

ANSWER_SECONDS, STALL_SECONDS = 4.5, 10.0  # until an address sends its first byte; between bytes after that
ALTERNATIVES = "give another data set by path with --dataset, or make one with tools/data/collect.py"


class SourceError(ValueError):
    """What is wrong with a data set and what to do about it, in one line."""


def reason(error: BaseException) -> str:
    """An exception's text in one line, or its kind if it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def download(urls: list[str], path: Path, check: Callable[[Path], None]) -> Path:
    """Write to `path`, whole or not at all, what the first address sends that `check` accepts (else it raises)."""
    why, aside = [], path.with_suffix(f".{os.getpid()}.part")  # other runs may download it at the same time
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(f"cannot keep {path.name} in {path.parent} ({reason(error)}); {ALTERNATIVES}") from None
    for url in urls:
        try:
            response, first = answer(url)
            size = int(response.headers.get("Content-Length") or 0) or None
            with response, open(aside, "wb") as file, tqdm.wrapattr(file, "write", total=size, desc=path.name) as out:
                out.write(first)
                while block := response.read(1 << 16):
                    out.write(block)
                file.flush()
                os.fsync(file.fileno())
            if size and aside.stat().st_size != size:
                raise ValueError(f"{aside.stat().st_size:,} of {size:,} bytes came")
            check(aside)
            aside.replace(path)
            if why:
                say(f"{path.name} comes from {url}, not {' nor '.join(why)}")
            return path
        except Exception as error:
            why.append(f"{url} ({reason(error)})")
        finally:
            aside.unlink(missing_ok=True)
    by_hand = f"put the file into {path.parent} by hand, or {ALTERNATIVES}"
    raise SourceError(f"could not download {' nor '.join(why)}; {by_hand}")


def answer(url: str) -> tuple[Any, bytes]:
    """The open response and its first byte. TimeoutError if that takes more than ANSWER_SECONDS, whatever it waits for.

    A socket's own timeout does not bound the look-up of a name, several addresses of a host, or slow headers.
    """
    answers = queue.SimpleQueue()

    def ask() -> None:
        try:
            response = urllib.request.urlopen(url, timeout=STALL_SECONDS)
            answers.put((response, response.read(1)))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        found = answers.get(timeout=ANSWER_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer within {ANSWER_SECONDS:g} s") from None
    if isinstance(found, Exception):
        raise found
    return found
