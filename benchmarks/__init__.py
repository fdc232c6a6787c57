"""Speed of MaxSim beside its peers: suites, result rows, the table of targets, plots."""
