"""One run, whatever it is trained on: its fields, its folder, checkpoints, the trainer, from start to end."""
