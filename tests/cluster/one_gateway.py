"""An agent behind a firewall that lets it reach one gateway alone.

one_gateway.py PORT ARGUMENT...    runs the agent; connections to other ports from PORTS (in the
                                   environment, by commas) are refused
"""

import os
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from gotunnel_agent import cli

if __name__ == "__main__":
    refused = {int(port) for port in os.environ["PORTS"].split(",")} - {int(sys.argv.pop(1))}
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def guarded(self, address):
        if address[1] in refused:
            raise ConnectionRefusedError("by the firewall")
        return connect(self, address)

    def guarded_ex(self, address):
        return 111 if address[1] in refused else connect_ex(self, address)

    socket.socket.connect, socket.socket.connect_ex = guarded, guarded_ex
    sys.exit(cli.main())
