"""Several gateways as one: what they share, and how they find each other."""
