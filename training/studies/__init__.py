"""Many runs: what is compared, statistics, the report; and studies with models of their own."""
