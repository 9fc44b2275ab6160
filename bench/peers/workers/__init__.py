"""One file a peer: it runs in the environment of that peer and imports nothing else of this project."""
