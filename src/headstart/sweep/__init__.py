"""Many cases from a file into a folder, ended and gone on with at any moment; such folders as numbers."""
