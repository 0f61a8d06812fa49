"""Share a port or a folder by one command, without a configuration of its tunnels."""
