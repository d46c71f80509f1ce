"""The demo: small real data, its recipe and the run that ties every part together."""
