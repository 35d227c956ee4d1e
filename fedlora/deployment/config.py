"""The server's TOML file."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from fedlora.config import Section, input_error, read_toml
from fedlora.errors import InputError
from fedlora.paths import beside, find_path

RUNS, NODE = "/fedlora/runs", "/fedlora/node"
"""Where the server serves run folders, and tells a node whether the federation sees it."""

KEEP_ALIVE_SECONDS = 20
"""How long the server keeps a connection between two requests."""


class TlsSection(Section):
    """``[tls]``: the authority that nodes check the server against, and the server's certificate and key, in PEM."""

    ca_certificate: str
    certificate: str
    private_key: str


class ServerFile(Section):
    """A server: where it listens, who may give it orders, and where it keeps what it knows.

    Attributes
    ----------
    host : str
        Address or name to listen on; 0.0.0.0 for all. The certificate must name it (127.0.0.1 for all).
    port : int
    directory : str
        Holds runs/, the database of registrations, and the logs.
    control_from : list of str
        Networks from which runs may be submitted and fetched and nodes be registered, beside this machine itself.
    tls : TlsSection, optional
        Required unless the server is started with ``--insecure-no-tls``.
    """

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    directory: Annotated[str, Field(min_length=1)] = "server"
    control_from: list[str] = Field(default=[])
    tls: TlsSection | None = None

    @property
    def folder(self) -> Path:
        """The directory, as a path."""
        return Path(self.directory)

    @property
    def own_host(self) -> str:
        """Name by which processes on this machine reach the server."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)

    @property
    def address(self) -> str:
        """``host:port`` for processes on this machine."""
        return f"[{self.own_host}]:{self.port}" if ":" in self.own_host else f"{self.own_host}:{self.port}"


def _is_host(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return len(text) <= 253 and re.fullmatch(r"\w[\w-]*(\.\w[\w-]*)*\.?", text, re.ASCII) is not None
    return True


def load_server(path: str | Path) -> ServerFile:
    """Read and check a server's TOML file.

    Parameters
    ----------
    path : str or Path
        Relative paths in the file are relative to its folder.

    Raises
    ------
    InputError
        If the file cannot be read, is no TOML, or a key or value is wrong.
    """
    file = (find_path(str(path), "SERVER") or Path(path)).absolute()
    try:
        server = ServerFile.model_validate(read_toml(file, "SERVER"))
    except ValidationError as error:
        raise input_error(error, ServerFile, "SERVER") from None
    if not _is_host(server.host):
        remedy = "is no address or host name; give one of this machine, or 0.0.0.0 for all"
        raise InputError("host", server.host, remedy)
    for network in server.control_from:
        try:
            ipaddress.ip_network(network)
        except ValueError as error:
            raise InputError("control_from", network, f"is no address or network ({error})") from None

    def absolute(value: str, field: str) -> str:
        return str(beside(file.parent, value, field))

    changes: dict[str, object] = {"directory": absolute(server.directory, "directory")}
    if server.tls is not None:
        paths = {key: absolute(value, f"tls.{key}") for key, value in server.tls.model_dump().items()}
        changes["tls"] = server.tls.model_copy(update=paths)
    return server.model_copy(update=changes)
