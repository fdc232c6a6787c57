"""The command `edgecolbert`: index a corpus, search it, measure the ranking. `edgecolbert --help` says the rest."""
