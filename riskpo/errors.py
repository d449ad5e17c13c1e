"""Errors of the commands in one line: what came, what was expected, what to do."""

from __future__ import annotations

import contextlib
import errno
import io
import re
import sys
import traceback
from collections.abc import Iterator

FULL = ("no space left", "storagefull", "code: 28", "quota exceeded", "pytorchstreamwriter failed")
TOO_BIG = ("out of memory", "can't allocate memory", "cannot allocate memory")
OS_ADVICE = {
    errno.ENOENT: "Check the path.",
    errno.EACCES: "Choose another path, or change its permissions.",
    errno.EPERM: "Choose another path, or change its permissions.",
    errno.EROFS: "Choose a path that can be written.",
    errno.EEXIST: "A file is in the way: choose another folder.",
    errno.ENOTDIR: "A file is in the way: choose another folder.",
    errno.EISDIR: "Give a file.",
}


def one_line(error: BaseException) -> str:
    """The text to print for an error, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if any(word in text.lower() for word in FULL):
        return f"the disk is full ({text[:200]}). Free some space and give the same command again."
    if isinstance(error, MemoryError) or any(word in text.lower() for word in TOO_BIG):
        return (
            f"out of memory ({text[:200]}). Lower micro_batch_tokens, sampler.sequences or "
            "max_response_tokens, or set memory.checkpointing; `riskpo plan` says what each takes."
        )
    if expected(error) and not isinstance(error, OSError):
        return text
    if isinstance(error, OSError) and error.filename is not None:
        reason = (error.strerror or type(error).__name__).lower()
        return f"{error.filename}: {reason}. {OS_ADVICE.get(error.errno or 0, 'Check the path.')}"
    if isinstance(error, OSError):
        return text
    if isinstance(error, ModuleNotFoundError):
        return f"{text}. Install it: pip install 'riskpo[train]' holds what the trainer needs."
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = "".join(f" in {frame.filename}:{frame.lineno}" for frame in place)
    return f"{type(error).__name__}{where}: {text}. Add --debug for the whole traceback."


def expected(error: BaseException) -> bool:
    """Whether the user can mend the error, so that its own text is enough."""
    return (
        isinstance(error, (ValueError, OSError))
        or type(error) is RuntimeError
        and (str(error).startswith(("verifier ", "sandbox", "ranks:")))
    )


@contextlib.contextmanager
def refusals_in_one_line(prog: str) -> Iterator[None]:
    """Turn an argument parser's refusal, several lines and an exit, into a one-line ValueError."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except SystemExit as error:
        if not error.code:
            raise
        raise ValueError(f"{_boiled(printed.getvalue(), prog)} See `{prog} --help`.") from None


def loading(command: str) -> None:
    """Say that the command now imports PyTorch, which takes seconds."""
    if "torch" not in sys.modules:
        print(f"riskpo {command}: loading PyTorch ...", file=sys.stderr, flush=True)


def _boiled(text: str, prog: str) -> str:
    """The words of an error message of argparse or tyro, without usage and boxes."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = plain.rpartition(" error: ")[2].splitlines()
    lines = [line.strip("│ ") for line in lines]
    unsaid = ("╭", "╰", "─", "For full helptext", "Argument helptext", f"{prog} --help")
    words = " ".join(line for line in lines if not line.startswith(unsaid)).split()
    return f"{prog}: {' '.join(words).rstrip('.')}."
