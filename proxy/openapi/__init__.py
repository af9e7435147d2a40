"""The HTTP interface as an OpenAPI document: what is called, with what, and what comes back. Serves nothing."""
