"""What producer and workers share: schema, settings, keys, scripts. Imports neither of them, and no engine."""
