"""The access token of the HTTP service: made once, kept where only its owner can read it."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from domains.errors import ConfigError
from serve.models import cache_folder

TOKEN_ENV = "PRECEPTOR_TOKEN"  # noqa: S105  (the variable's name)
_MIN_CHARS = 16


def service_token() -> str:
    """``$PRECEPTOR_TOKEN``, else the user's token from the cache folder, made when there is none.

    Raises:
        ConfigError: the token is weak, or its file may be read by others.
    """
    if given := os.environ.get(TOKEN_ENV):
        return _checked(given, where=f"the environment variable {TOKEN_ENV}")
    return stored_token(cache_folder() / "token")


def stored_token(path: Path) -> str:
    """The token in a file of mode 0600; made, whole or not at all, when there is none.

    Two processes that start together agree on one token.

    Raises:
        ConfigError: the file may be read by others, or holds no token.
    """
    if not path.exists():
        _create(path, secrets.token_urlsafe(32))
    mode = stat.S_IMODE(path.stat().st_mode)
    if os.name == "posix" and mode & 0o077:
        raise ConfigError(
            f"others may read the access token {str(path)!r} (mode {mode:04o})",
            expected="mode 0600",
            next_step=f"rm {path}   (a new one is made at the next start)",
        )
    return _checked(path.read_text(encoding="utf-8").strip(), where=str(path))


def _create(path: Path, token: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(token + "\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another process was first: its token counts
            path.hardlink_to(temporary)
    finally:
        temporary.unlink(missing_ok=True)


def _checked(token: str, *, where: str) -> str:
    if len(token) < _MIN_CHARS or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"the access token in {where} has {len(token)} characters or some that can't be sent",
            expected=f"at least {_MIN_CHARS} printable ASCII characters without blanks",
            next_step='python -c "import secrets; print(secrets.token_urlsafe(32))"',
        )
    return token
