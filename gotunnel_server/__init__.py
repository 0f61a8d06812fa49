"""The gateway of gotunnel: the public side, where visitors and agents arrive."""
