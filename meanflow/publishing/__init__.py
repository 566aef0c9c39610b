"""A trained network as others use it: loaded, exported, and on the Hub."""
