"""`flowalign reward-server`: serve a reward from a separate process, possibly on another machine."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from flowalign import __version__
from flowalign.checks import ConfigError
from flowalign.checks.preflight import section
from flowalign.reward_nodes import held_out, objective
from flowalign.run import CONF, instantiate

if TYPE_CHECKING:
    from flowalign.serving.app import Served

log = logging.getLogger("flowalign")
TOKEN = "FLOWALIGN_REWARD_TOKEN"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def reward_server(
    reward: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    only: str = "",
    device: str = "auto",
    places: int = 16,
    max_mib: int = 64,
    max_samples: int = 64,
    max_megapixels: int = 64,
    grace: float = 30.0,
    open: bool = False,
    config_dir: str = "",
    **options: str,
) -> None:
    """Serves the rewards of a group option to reward=remote, with reward.… options as for train.py, until Ctrl-C.

    FLOWALIGN_REWARD_TOKEN is the secret; open=true serves other machines without one. only=a,b serves only these of
    its rewards.
    """
    _check(port, places, max_mib, max_samples, max_megapixels)
    secret = os.environ.get(TOKEN) or None
    if secret is None and host not in LOOPBACK and not open:
        raise ValueError(f"host={host} lets other machines in: set {TOKEN} to a secret, or say open=true.")
    lines = [f"reward={reward}", *(f"{key}={value}" for key, value in options.items())]
    node = section("reward", lines, CONF, config_dir or None, "train")
    nodes = _select(node, only)
    uvicorn = _import_uvicorn()
    from flowalign.serving.app import Limits, make_app
    from flowalign.serving.worker import Worker

    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    worker = Worker(lambda: _instantiate(nodes), _device(device), places, node.self_check)
    limits = Limits(max_mib << 20, max_samples, max_megapixels * 1_000_000)
    app = make_app(worker, _served(reward, nodes), limits, secret, grace)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=int(grace))
    )

    def stop() -> None:
        server.should_exit = True

    worker.on_failure = stop
    with _bind(host, port) as listening:
        address = f"[{host}]" if ":" in host else host
        print(f"reward={reward} at http://{address}:{listening.getsockname()[1]}", flush=True)
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt:
            log.info("ended")
    if worker.state == "failed":
        raise ValueError(f"reward={reward} cannot be served: {worker.reason}")


def _check(port: int, *numbers: int) -> None:
    if not 0 <= port < 1 << 16:
        raise ValueError(f"port={port} is not a port: use 1 to 65535, or 0 for any free one.")
    if min(numbers) < 1:
        raise ValueError("places, max_mib, max_samples and max_megapixels are at least 1.")


def _select(node: DictConfig, only: str) -> dict[str, DictConfig]:
    """Nodes of the served rewards by name, including held-out ones; the single reward of an objective is `reward`."""
    nodes = objective(node) | held_out(node)
    if not only:
        return nodes
    if unknown := sorted(set(only.split(",")) - nodes.keys()):
        raise ConfigError(f"only={only}: there is no {', '.join(unknown)}; the rewards are {', '.join(nodes)}.")
    return {name: nodes[name] for name in only.split(",")}


def _instantiate(nodes: Mapping[str, DictConfig]) -> dict[str, Any]:
    rewards = {name: instantiate(node) for name, node in nodes.items()}
    for name, reward in rewards.items():
        if getattr(reward, "sees", "") == "latents" or hasattr(reward, "bind"):
            raise ConfigError(
                f"{name} ({type(reward).__name__}) is made of the policy's own parts, which are not here."
            )
    return rewards


def _served(reward: str, nodes: Mapping[str, DictConfig]) -> Served:
    """Name and version of the served rewards; the version changes with the package and with any setting."""
    from flowalign.serving.app import Served

    settings = {name: OmegaConf.to_container(node) for name, node in nodes.items()}
    digest = hashlib.sha256(json.dumps([__version__, settings], sort_keys=True, default=str).encode())
    return Served(reward, f"{reward}-{digest.hexdigest()[:12]}")


def _device(name: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _bind(host: str, port: int) -> socket.socket:
    """Bind the port before anything is loaded, so that a port in use is reported at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise ValueError(f"host={host} port={port} cannot be listened on: {error.strerror or error}.") from error
    return listening


def _import_uvicorn() -> Any:
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError:
        raise ValueError("flowalign reward-server needs the extra `server`: pip install 'flowalign[server]'.") from None
    return uvicorn
