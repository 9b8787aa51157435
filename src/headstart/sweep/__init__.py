"""Many cases from a file into a folder, with interruptions at any moment; numbers of folders."""
