"""`deep_ep.buffers`."""
