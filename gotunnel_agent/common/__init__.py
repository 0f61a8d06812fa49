"""Pure modules that both programs need and that are not the wire.

The only part of the agent's package that the gateway may import.
"""
