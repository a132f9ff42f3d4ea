"""The Things Stack v3: LoRaWAN uplinks as JSON."""
