"""Commands that an operator runs beside the gateway."""
