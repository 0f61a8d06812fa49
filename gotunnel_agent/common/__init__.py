"""What belongs to neither program and is not the wire. Needs the standard library and PyYAML only,
and knows nothing of gotunnel; but for duplex.py, the connection that sessions run over.

The only part of the agent's package that the gateway may import.
"""
