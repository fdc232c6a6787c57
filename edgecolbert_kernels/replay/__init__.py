"""Encoding the chunks of an input twice alike, first without a graph and then with one: the machinery of GradCache."""
