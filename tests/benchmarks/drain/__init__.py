"""What bench_drain.py is made of: workload, fleet, observer, baseline, figures, plots."""
