"""Search over real text: encode a corpus, rank it with MaxSim, show what matched. Run `python -m demo`."""
