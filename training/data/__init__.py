"""Where examples come from: splits, files, and what is tried again when it cannot be read."""
