"""PROCESSES: several gateways on the same ports of one machine, and their supervisor."""
