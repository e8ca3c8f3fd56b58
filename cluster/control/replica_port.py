"""The port that Ray Serve opens in each replica for handles of others: at the node's address, not at all of them.

Called as a replica begins, before Serve opens the port. Stands on a name inside Ray Serve, which has no setting for it.
"""

from __future__ import annotations

import ipaddress
import logging
from typing import Any

log = logging.getLogger(__name__)
_NAME = "add_port_to_grpc_server"


def keep_port_on_node() -> None:
    """Ray of `diptych serve` is on loopback, and so is the port then. It asks for Ray's token wherever it is."""
    import ray
    from ray.serve._private import replica

    opens: Any = getattr(replica, _NAME, None)
    if opens is None:
        log.warning(
            "this version of Ray Serve opens the ports of its replicas in another way: look at who can reach them"
        )
        return

    def open_on_node(server: Any, address: str) -> Any:
        node: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return opens(server, f"{_bracketed(node)}:{address.rpartition(':')[2]}")

    setattr(replica, _NAME, open_on_node)


def _bracketed(address: str) -> str:
    return f"[{address}]" if ipaddress.ip_address(address).version == 6 else address
