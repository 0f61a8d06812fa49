"""An agent's session: registration, heartbeat, data streams, and what its credential permits."""
