"""Interfaces of other libraries on epcomm, for callers that speak those."""
