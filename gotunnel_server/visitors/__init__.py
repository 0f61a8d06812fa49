"""A visit, from the first byte that comes to a public port to the last one that leaves."""
