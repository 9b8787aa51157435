"""Numbers of images: diversity, fidelity, scores, and how sure one can be of them."""
