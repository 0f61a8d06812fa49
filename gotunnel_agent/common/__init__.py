"""Modules that agent and gateway share and that are not the wire protocol. They need the standard
library and PyYAML only; duplex.py, process.py and refusals.py also import gotunnel.py.

This is the only part of the agent's package that the gateway may import.
"""
