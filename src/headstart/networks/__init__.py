"""The networks, one file each, read from top to bottom, and weights into them."""
