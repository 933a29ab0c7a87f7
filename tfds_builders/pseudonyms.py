"""Group keys that tell patients apart and lead back to nobody.

A hash of a PatientID can be reversed by whoever hashes all PatientIDs there may be. So the hash is
keyed (HMAC-SHA256): the key is made once for a site, lies in a file of its own, and is never
written into a data set. With it, the same patient gets the same group in every variant and in
every rebuild; without it, groups cannot be computed.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path

from rg_jax.errors import UserError

_BYTES = 32


def default_path() -> Path:
    """Where the key of a site lies if no place is named: in the user's folder of settings."""
    settings = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(settings).expanduser() / "rg_jax" / "group_key"


def site_key(path: Path) -> tuple[bytes, bool]:
    """(the key of a file, whether it was made now).

    A missing file is made, readable by its owner alone. Raises UserError naming the file if it
    cannot be read or written, or is no key.
    """
    try:
        made = not path.exists() and _make(path)
        text = path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise UserError(
            f"{path}: the key of the groups cannot be read or written ({error.strerror});"
            " --group_key names another place for it, outside the data sets"
        ) from error
    except UnicodeDecodeError:
        text = ""
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != _BYTES:
        raise UserError(
            f"{path}: is no key of groups ({2 * _BYTES} hexadecimal digits); --group_key names a"
            " file that is one, or that is not there yet and will be made"
        )
    return key, made


def _make(path: Path) -> bool:
    """Write a new key aside and link it into place; another build may be doing the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
            return True
        return False
    finally:
        aside.unlink(missing_ok=True)


def temporary_key() -> bytes:
    """A key for groups that nobody keeps."""
    return secrets.token_bytes(_BYTES)


def pseudonym(key: bytes, name: str) -> str:
    """16 hexadecimal digits that stand for `name`."""
    return hmac.new(key, name.encode(), hashlib.sha256).hexdigest()[:16]
