"""The agent: the private side of the tunnel."""
