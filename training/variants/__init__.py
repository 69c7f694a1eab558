"""What is trained beside DCA, by the names that a run gives it (its `variant`)."""
