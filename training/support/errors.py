"""The errors of the commands: one line on standard error, without access tokens."""

import errno
import functools
import json
import os
import re
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

# The base of all errors of the HTTP client, which is httpx or httpx2 by the version of huggingface_hub.
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from tqdm.auto import tqdm


Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

#: What replaces a secret in a message.
HIDDEN = "[hidden]"

NO_TOKEN = (
    "There is no access token for the Hub: log in with `hf auth login`, or set HF_TOKEN to a token with write access."
)

LOST_PROCESS = (
    "Another process of this run has ended, or the connection to it was lost; its own message, if any, is above. "
    "Run the same command with --resume_from_checkpoint to continue from the last checkpoint"
)

# How many seconds a process waits before it prints its error, unless it is the first of its machine.
PATIENCE = 10.0

# The messages of gloo, whose errors have no class of their own.
LOSS_OF_PROCESS = re.compile(r"gloo|Connection (closed|reset) by peer|Broken pipe")

SECRETS = re.compile(
    r"""
    hf_[A-Za-z0-9]{16,}               # an access token
    | (?<=Bearer\s) [^\s'"]+          # an authorization header
    | (?<=://) [^\s/@]+ (?=@)         # user and password in a URL
    | (?<=\?) [^\s'"?]*=[^\s'"]*      # the query of a URL: those for uploads are signed
    """,
    re.VERBOSE,
)


class UserError(Exception):
    """
    An error that the user can fix: one sentence with the cause and the remedy. Access tokens, passwords and signed URLs
    are hidden, and line breaks become spaces.
    """

    def __init__(self, message: str):
        super().__init__(SECRETS.sub(HIDDEN, " ".join(message.split())))


class Terminated(SystemExit):
    """SIGTERM has ended a command. (As a `SystemExit` it ends a forked process, too, without a traceback.)"""

    def __init__(self, message: str):
        super().__init__(143)  # 128 and the number of the signal
        self.message = message


def innermost_message(error: BaseException) -> str:
    """The message of an error, in one line and without what strict dataclasses wrap around that of a validator."""
    field = re.match(r"Validation error for field '(\w+)'", str(error))
    while isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__
    message = " ".join(str(error).split())
    # A range validator does not know the name of its field.
    return f"`{field[1]}`: {message}" if field and field[1] not in message else message


def command(main: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """
    Makes `main` a command. A `UserError`, an invalid configuration or the loss of another process of the run ends it with
    `error: ...` on standard error and exit status 2, an interrupt with status 130, and SIGTERM with status 143. All other
    exceptions are faults in the code and pass through.
    """

    @functools.wraps(main)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with at_sigterm(_terminate):
            try:
                return main(*args, **kwargs)
            except (UserError, StrictDataclassError) as error:
                message, status = str(UserError(innermost_message(error))), 2
                _wait_for_the_first()
            except KeyboardInterrupt:
                message, status = "interrupted", 130
            except Terminated as error:
                message, status = error.message, error.code
            except RuntimeError as error:
                if not _is_loss_of_process(error):
                    raise
                message, status = str(UserError(f"{LOST_PROCESS} ({innermost_message(error)})")), 2
        tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, also within a progress bar
        raise SystemExit(status)

    return run


@contextmanager
def told(source: str, done: str = "converted"):
    """Turns errors of loading and saving models into a `UserError`: `source` cannot be `done` (converted, evaluated, ...)."""
    try:
        yield
    except (ImportError, OSError, RuntimeError, SafetensorError, ValueError, HTTPError) as error:
        causes = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)

        def met(*types: type) -> bool:
            return any(isinstance(cause, types) for cause in causes)

        message = f"{source!r} cannot be {done}: {innermost_message(error)}"
        if met(GatedRepoError):
            message = f"{source!r} is gated: request access on its page on the Hub, and log in with `hf auth login`."
        elif met(RepositoryNotFoundError, HFValidationError):
            message = f"{source!r} is neither a local folder nor a model on the Hub that the access token can read."
        elif met(RevisionNotFoundError):
            message = f"{source!r} does not have the revision given by --revision."
        elif met(HTTPError, ConnectionError, LocalEntryNotFoundError, OfflineModeIsEnabled):
            message = (
                f"{source!r} is not a local folder, and the Hub cannot be reached or refused the request: check the name, the "
                f"network and HF_HUB_OFFLINE ({type(causes[-1]).__name__})."
            )
        elif any("No space left" in str(cause) or getattr(cause, "errno", None) == errno.EDQUOT for cause in causes):
            message = "There is not enough disk space for the checkpoint, or for the cache of the Hub (HF_HOME)."
        raise UserError(message) from error


@contextmanager
def at_sigterm(handler: Callable):
    """Handles SIGTERM with `handler`. Only the main thread can: the processes of a TPU, which are threads, are left alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait_for_the_first():
    """Prints an error that all processes share only once: when the first process ends, the launcher ends the others."""
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        time.sleep(PATIENCE)


def _terminate(signal_number, frame):
    raise Terminated("terminated")


def _is_loss_of_process(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return False
    from torch import distributed  # (slow to import, and not needed by commands that do not train)

    if isinstance(error, (distributed.DistBackendError, distributed.DistNetworkError)):
        return True
    return bool(LOSS_OF_PROCESS.search(str(error)))


def hub_error(error: Exception) -> UserError:
    """
    The `UserError` for an exception that was raised during a push.

    Args:
        error: any exception of huggingface_hub, or of a `push_to_hub`.
    """
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        # The client wraps errors in the upload of a file.
        error = error.__cause__
    if isinstance(error, HfHubHTTPError):
        return _refusal(error)
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, OfflineModeIsEnabled):
        return UserError("HF_HUB_OFFLINE is set: unset it to push to the Hub.")
    if isinstance(error, (HTTPError, ConnectionError)):
        return UserError(f"The connection to the Hub failed: run the same command again ({reason}).")
    if isinstance(error, json.JSONDecodeError):
        return UserError("The server that answered is not a Hub: check HF_ENDPOINT and the proxy.")
    return UserError(f"The push to the Hub failed ({reason}).")


def _refusal(error: HfHubHTTPError) -> UserError:
    """The `UserError` for an answer with status 400 or above."""
    scheme, _, token = error.response.request.headers.get("authorization", "").partition(" ")
    status = error.response.status_code
    if status == 401 and not scheme:
        return UserError(NO_TOKEN)
    if status == 401:
        advice = "The Hub rejected the access token: create one with write access, and run `hf auth login` again"
    elif status == 403:
        advice = "The access token does not allow this: it needs write access to the repository"
    elif status == 404:
        advice = "The Hub has no such repository, or the access token cannot see it"
    elif status == 429:
        advice = "The Hub received too many requests: wait a few minutes, and run the same command again"
    elif status >= 500:
        advice = "The Hub has an internal error: run the same command again later"
    else:
        advice = "The Hub refused the push"
    answer = textwrap.shorten(error.server_message or "", 300, placeholder=" ...")
    if token:
        answer = answer.replace(token, HIDDEN)
    return UserError(f"{advice} (status {status}{': ' if answer else ''}{answer}).")
