"""What the commands share: a user's mistake is one line and exit code 2, never a traceback."""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

DONE, INTERNAL, USER, INVARIANT, INTERRUPTED = 0, 1, 2, 3, 130


def guarded(call: Callable[[], Any]) -> int:
    """Runs `call` and returns the exit code, after one line on stderr unless all went well.

    A ValueError that this project raised speaks of a value the user can change: 2. One from deeper down is a fault of
    the program: its traceback is shown, and the code is 1. A broken invariant is 3, an interruption that was saved 130.
    """
    from instructax.experience import InvariantError
    from instructax.training import Interrupted

    try:
        call()
    except (ValueError, FileNotFoundError) as error:
        if not _raised_here(error):
            traceback.print_exc()
            return INTERNAL
        return _say(f"error: {error}", USER)
    except InvariantError as error:
        return _say(f"invariant broken: {error}", INVARIANT)
    except (Interrupted, KeyboardInterrupt) as error:
        return _say(str(error) or "interrupted", INTERRUPTED)
    return DONE


def _say(message: str, code: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return code


def _raised_here(error: BaseException) -> bool:
    """Whether the innermost frame of the error is in this package or in a config or experiment of the project."""
    frames = traceback.extract_tb(error.__traceback__)
    last = Path(frames[-1].filename).resolve() if frames else Path()
    return Path(__file__).resolve().parent in last.parents or last.parent.name in ("configs", "experiments")
