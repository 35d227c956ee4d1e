"""A home for a user that has none, as under ``docker run --user 12345``: libraries take one for granted."""

from __future__ import annotations

import atexit
import os
import pwd
import shutil
import tempfile


def ensure_home() -> None:
    """Give this process and its children a temporary home, if HOME is not set and the user id has no name.

    Without it, Hugging Face's libraries make a folder called ``~`` in the working directory, and others stop at the
    name that the user lacks. The folder is deleted when the process ends; HOME, or FEDLORA_CACHE and HF_HOME for what
    is downloaded, give a lasting one.
    """
    try:
        pwd.getpwuid(os.getuid())
        return
    except KeyError:
        pass
    if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):  # as getpass.getuser looks
        os.environ["USER"] = f"uid{os.getuid()}"
    if not os.environ.get("HOME"):
        home, process = tempfile.mkdtemp(prefix="fedlora-home-"), os.getpid()
        os.environ["HOME"] = home

        def clean() -> None:
            if os.getpid() == process:
                shutil.rmtree(home, ignore_errors=True)

        atexit.register(clean)
