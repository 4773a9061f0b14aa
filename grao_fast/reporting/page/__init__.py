"""The report of runs as one HTML page that needs no network: curves, samples, configuration."""
