"""What fits on a machine, at what rate and price, before anything runs: `plan.make_plan`. Pure functions."""
