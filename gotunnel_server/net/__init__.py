"""The gateway's sockets: ports, a peer's first bytes, files and names of the system."""
