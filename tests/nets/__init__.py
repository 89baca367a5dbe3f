"""Small networks and data that tests share, and helpers: calls, builds, formulas, runners."""
