"""The actors that generate."""
