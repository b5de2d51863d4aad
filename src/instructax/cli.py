"""What the commands share: a user's mistake is one line and exit code 2, never a traceback."""

import contextlib
import os
import re
import sys
import threading
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from instructax.runtime.redaction import printable, redact_text

OUT_OF_MEMORY = "out of memory; use more devices, shorter texts, smaller batches or parts, or config.compute.remat=full"
LONGEST = 10_000  # characters of a message
DONE, INTERNAL, USER, INVARIANT, SAVED, INTERRUPTED = 0, 1, 2, 3, 42, 130


def parse_flags(argv: list[str]) -> list[str]:
    """Reads a command's flags and returns the other arguments; a bad flag is one line and
    exit code 2."""
    try:
        return _parsed(argv)
    except flags.Error as error:
        sys.exit(_say(f"error: {error}", USER))


def _parsed(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except SystemExit as end:  # absl's --help ends as a failure does
        sys.exit(DONE if end.code == 1 else end.code)


def parse_config(argv: list[str], config: flags.FlagHolder[Any]) -> list[str]:
    """As `parse_flags` for a command with a config flag of ml_collections, whose values are
    read here too."""
    try:
        rest = _parsed(argv)
        if config.value is not None:
            config.value.keys()  # a config file that is missing says so only when something is read from it
        return rest
    except (
        SyntaxError,
        ImportError,
        ArithmeticError,
    ) as error:  # in a config file, which is Python
        sys.exit(
            _say(f"error: --config: {type(error).__name__}: {error}{_where(error)}", USER)
        )
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        unknown = (
            "unknown config value: " if isinstance(error, AttributeError | KeyError) else ""
        )
        inner = error.args[0] if isinstance(error, AttributeError) and error.args else error
        text = str(
            inner.args[0] if isinstance(inner, KeyError) else inner
        )  # str(KeyError) is quoted and escaped
        # A config file that raises arrives as a whole traceback, whose last line is its
        # message.
        message = (
            text.splitlines()[-1].removeprefix("ValueError: ")
            if "Traceback" in text
            else text
        )
        if missing := re.search(r"No such file or directory: '(.+)'", text):
            unknown, message = "", f"--config: no such file: {missing[1]}"
        sys.exit(_say(f"error: {unknown}{message}", USER))


def _where(error: BaseException) -> str:
    if isinstance(error, SyntaxError):  # which says it itself
        return ""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f" ({last.filename}, line {last.lineno})"


def keep_compiled() -> None:
    """Lets JAX keep compiled programs for the next process, unless
    JAX_COMPILATION_CACHE_DIR already says where or, if it is empty, that nothing is kept.
    To be called before JAX is imported. The folder can be deleted at any time."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # A program for one kind of processor does not run on another, and homes are shared.
    cpuinfo = Path("/proc/cpuinfo")
    kind = (
        zlib.crc32(cpuinfo.read_bytes().partition(b"flags")[2].partition(b"\n")[0])
        if cpuinfo.exists()
        else 0
    )
    os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(cache / "instructax" / f"compiled-{kind:08x}")
    )


def use_large_pages() -> None:
    """Starts this command again, in the same process, with memory in large pages where
    glibc can ask Linux for them.

    XLA:CPU takes the memory of a program anew at each of its runs, and Linux fills it with
    zeros page by page: with small pages a sixth of a training step. glibc reads the setting
    GLIBC_TUNABLES when a process starts; one that is there already, empty ones too, stays.
    Nothing is done within another program, such as a debugger or a notebook.
    """
    setting, pages = "GLIBC_TUNABLES", Path("/sys/kernel/mm/transparent_hugepage/enabled")
    alone = (
        "jax" not in sys.modules
        and threading.active_count() == 1
        and sys.gettrace() is None
    )
    if (
        setting in os.environ
        or not alone
        or not pages.exists()
        or "[madvise]" not in pages.read_text()
    ):
        return
    os.environ[setting] = "glibc.malloc.hugetlb=1"
    with contextlib.suppress(OSError):  # then the pages stay small
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def guarded(call: Callable[[], Any]) -> int:
    """Runs `call` and returns the exit code, after one line on stderr unless all went well.

    A ValueError that this project raises speaks of a value the user can change: 2. Any
    other, from a library or from an operation on arrays, is a fault of the program: its
    traceback is shown, and the code is 1. What the operating system refuses (no such file,
    no permission, no space, no memory) is the user's: 2. A broken invariant and a run that
    diverged are 3, an interruption that was saved is 42, one that was not 130.
    """
    import jax

    from instructax.runtime.nonfinite import Diverged
    from instructax.stages.ppo.experience import InvariantError
    from instructax.training.loop import Interrupted

    try:
        call()
    except ValueError as error:
        if not _raised_here(error):
            print(redact_text(traceback.format_exc()), end="", file=sys.stderr)
            return INTERNAL
        return _say(f"error: {error}", USER)
    except BrokenPipeError:
        sys.stdout = None  # whoever read the output has left; nothing more is written, not even at exit
        return DONE
    except TimeoutError as error:  # an OSError too
        return _say(
            f"error: another process of the run has ended or stands still: {error}",
            INTERNAL,
        )
    except OSError as error:
        return _say(f"error: {error}", USER)
    except MemoryError as error:
        return _say(f"error: {OUT_OF_MEMORY}: {error or 'the system gives no more'}", USER)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _say(f"error: {OUT_OF_MEMORY}: {str(error).splitlines()[0]}", USER)
    except InvariantError as error:
        return _say(f"invariant broken: {error}", INVARIANT)
    except Diverged as error:
        return _say(f"diverged: {error}", INVARIANT)
    except Interrupted as error:
        return _say(str(error), SAVED)
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    return DONE


def _say(message: str, code: int) -> int:
    line = message if len(message) <= LONGEST else f"{message[:LONGEST]}…"
    print(printable(" ".join(redact_text(line).split())), file=sys.stderr)
    return code


def _raised_here(error: BaseException) -> bool:
    """Whether a `raise` of this package, or of a config, experiment or script of it, is
    where the error began."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    file = Path(last.filename).resolve()
    ours = Path(__file__).resolve().parent in file.parents or file.parent.name in (
        "configs",
        "experiments",
        "scripts",
    )
    return ours and (last.line or "").startswith("raise")
