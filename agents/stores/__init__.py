"""Where readings, alerts and commands end up. What a store promises is in :mod:`agents.stores.base`."""
