"""Connects to a site from within the test bed's network and hands the socket to ssh (ProxyUseFdpass).

    python dial.py NAMESPACE HOST PORT

Standard output is ssh's socket. The connection itself is a plain one: nothing relays its bytes.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.testbed.namespaces import enter_network

    namespace, host, port = sys.argv[1:]
    enter_network(namespace)
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.settimeout(None)
    with socket.socket(fileno=1) as ssh:
        socket.send_fds(ssh, [b"\0"], [connection.fileno()])
