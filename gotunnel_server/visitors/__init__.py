"""A visit: all that the gateway does for it, from the visitor's first byte to the last one sent."""
