"""How DCA models are trained: commands to run from a checkout."""
