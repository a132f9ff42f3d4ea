"""Fluxor climate controllers: 43-byte frames as hexadecimal text over MQTT."""
