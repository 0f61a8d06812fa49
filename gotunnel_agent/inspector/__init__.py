"""The inspector: shows what passes through the tunnels of an agent."""
