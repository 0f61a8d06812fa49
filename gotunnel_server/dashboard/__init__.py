"""The dashboard: what agents serve and who visits it, as a page, as an API, and live."""
