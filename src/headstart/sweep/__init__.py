"""Many cases from a file into a folder, at any moment ended and gone on with; what it is worth."""
