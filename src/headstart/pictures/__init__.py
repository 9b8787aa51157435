"""Letters, curves and contact sheets drawn into arrays of pixels."""
