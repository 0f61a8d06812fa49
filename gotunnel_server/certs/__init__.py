"""Certificates: wanted, ordered, kept, and served by SNI."""
