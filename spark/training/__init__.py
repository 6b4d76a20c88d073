"""The engine: what every training run shares, whatever it trains."""
