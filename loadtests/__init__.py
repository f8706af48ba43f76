"""Load tests and benchmarks of the running service. They talk to loopback addresses only."""
