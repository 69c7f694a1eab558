"""Models that studies train for comparison with DCA, by their names in a run (`variant`)."""
