"""What the commands share: flags, exit codes, one line on stderr for a user's mistake."""

import os
import re
import sys
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from instructax.config import ConfigError
from instructax.runtime.redaction import printable, redact_text

OUT_OF_MEMORY = (
    "out of memory; use more devices, shorter texts, smaller batches or parts, or "
    "config.compute.remat=full"
)

# Longest message on stderr, in characters.
MAX_MESSAGE = 10_000

# Exit codes; docs/reliability.md explains them.
SUCCESS = 0
INTERNAL_ERROR = 1
USER_ERROR = 2
INVARIANT_BROKEN = 3
STOPPED_AND_SAVED = 42
INTERRUPTED = 130


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags of a command and returns the remaining arguments.

    Exits with code 2 and one line on stderr if a flag is invalid.
    """
    try:
        return _parse(argv)
    except flags.Error as error:
        sys.exit(_report(f"error: {error}", USER_ERROR))


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except SystemExit as end:
        # absl exits with 1 after printing --help, which is not a failure.
        sys.exit(SUCCESS if end.code == 1 else end.code)


def parse_config(argv: list[str], config: flags.FlagHolder[Any]) -> list[str]:
    """Parses the flags of a command that has a config flag of ml_collections.

    Exits with code 2 and one line on stderr if a flag, the config file or an override is
    invalid.

    Args:
      argv: the command line.
      config: the config flag; its value is evaluated here.

    Returns:
      The remaining arguments.
    """
    try:
        rest = _parse(argv)
        if config.value is not None:
            # A missing config file is only reported when something is read from it.
            config.value.keys()
        return rest
    except (SyntaxError, ImportError, ArithmeticError) as error:
        # The config file is Python, and this is a mistake in it.
        message = f"error: --config: {type(error).__name__}: {error}{_location(error)}"
        sys.exit(_report(message, USER_ERROR))
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        sys.exit(_report(f"error: {_config_message(error)}", USER_ERROR))


def _config_message(error: Exception) -> str:
    """The message of an error that absl or ml_collections raised for a config."""
    inner = error
    # ml_collections wraps the KeyError of an unknown name.
    if isinstance(error, AttributeError) and error.args:
        inner = error.args[0]
    if isinstance(inner, KeyError):
        inner = inner.args[0]  # str(KeyError) would be quoted and escaped
    text = str(inner)
    if missing := re.search(r"No such file or directory: '(.+)'", text):
        return f"--config: no such file: {missing[1]}"
    if "Traceback" in text:
        # absl wraps an exception of the config file as text; the last line is its message.
        last = text.splitlines()[-1]
        text = re.sub(r"^(?:[\w.]+\.)?(?:ValueError|ConfigError): ", "", last)
    if isinstance(error, AttributeError | KeyError):
        return f"unknown config value: {text}"
    return text


def _location(error: BaseException) -> str:
    if isinstance(error, SyntaxError):  # its message contains the location
        return ""
    # The innermost frame: the line of the config file, or of what it called.
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f" ({last.filename}, line {last.lineno})"


def enable_compilation_cache() -> None:
    """Lets JAX keep compiled programs for later processes.

    Must be called before JAX is imported. A value of JAX_COMPILATION_CACHE_DIR wins, also
    an empty one, which disables the cache. The folder can be deleted at any time.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # A program compiled for one kind of CPU does not run on another, and home folders are
    # often shared between machines: the CPU's feature flags are part of the folder's name.
    cpuinfo = Path("/proc/cpuinfo")
    cpu_kind = 0
    if cpuinfo.exists():
        after_flags = cpuinfo.read_bytes().partition(b"flags")[2]
        cpu_kind = zlib.crc32(after_flags.partition(b"\n")[0])
    folder = cache / "instructax" / f"compiled-{cpu_kind:08x}"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))


def guarded(call: Callable[[], Any]) -> int:
    """Runs a command and returns its exit code.

    Prints one line on stderr unless the command succeeds. `ConfigError`, and what the
    operating system refuses (missing file, permission, full disk, memory), is the user's to
    correct. Any other ValueError is a bug in this program or a library: its traceback is
    printed. Exceptions that are not handled here propagate.
    """
    # Imported late, so that --help answers at once.
    import jax

    from instructax.runtime.nonfinite import Diverged
    from instructax.stages.ppo.invariants import InvariantError
    from instructax.training.loop import Interrupted

    try:
        call()
    except ConfigError as error:
        return _report(f"error: {error}", USER_ERROR)
    except ValueError:
        print(redact_text(traceback.format_exc()), end="", file=sys.stderr)
        return INTERNAL_ERROR
    except BrokenPipeError:
        # The reader of our output has gone, e.g. `head`. Python would print an error when
        # it flushes stdout at exit.
        sys.stdout = None
        return SUCCESS
    except TimeoutError as error:  # before OSError, its base class
        message = f"error: another process of the run has ended or hangs: {error}"
        return _report(message, INTERNAL_ERROR)
    except OSError as error:
        return _report(f"error: {error}", USER_ERROR)
    except MemoryError as error:
        reason = error or "the system has no memory left"
        return _report(f"error: {OUT_OF_MEMORY}: {reason}", USER_ERROR)
    except jax.errors.JaxRuntimeError as error:
        # XLA has one exception for all errors; only this one is the user's to correct.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        return _report(f"error: {OUT_OF_MEMORY}: {reason}", USER_ERROR)
    except InvariantError as error:
        return _report(f"invariant broken: {error}", INVARIANT_BROKEN)
    except Diverged as error:
        return _report(f"diverged: {error}", INVARIANT_BROKEN)
    except Interrupted as error:
        return _report(str(error), STOPPED_AND_SAVED)
    except KeyboardInterrupt:
        return _report("interrupted", INTERRUPTED)
    return SUCCESS


def _report(message: str, code: int) -> int:
    """Prints `message` as one line on stderr and returns `code`."""
    if len(message) > MAX_MESSAGE:
        message = f"{message[:MAX_MESSAGE]}…"
    # Redact before joining lines: values end at line breaks.
    one_line = " ".join(redact_text(message).split())
    print(printable(one_line), file=sys.stderr)
    return code
