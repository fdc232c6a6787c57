"""Training: four stages, one loop, one TOML file a run. `python -m training.train CONFIG.toml`; not installed."""
