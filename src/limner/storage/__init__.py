"""Files on disk: checkpoints, named arrays, and the files of a run."""
