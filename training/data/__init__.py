"""Where examples come from: splits, local files, and retries."""
