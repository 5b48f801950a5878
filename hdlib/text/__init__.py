"""Text to token blocks: local files, data sets of the hub, and the documentation on this disk."""
