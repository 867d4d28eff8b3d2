"""One folder for each op; every folder has the same file names."""
